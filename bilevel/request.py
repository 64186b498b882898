"""What a command asks for, resolved, stored beside the results, and compared when a run is resumed."""

import argparse
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import bilevel
from bilevel import kinds, report
from bilevel.auto import AUTO
from bilevel.kinds import KINDS, Automatic, Job, Kind
from bilevel.settings import SettingError, arguments, class_slots, plain, sort_keys, split
from bilevel.targets import Target

_BUDGETS = ("max_steps", "time_limit", "rtol", "atol", "checkpoint_every")
_FLAGS = ("seed", "dtype", "device", "data_dir")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run that is fully specified.

    Attributes:
        target, job, algorithm: what to solve, and the method.
        texts: the settings given, as texts, for the case and for the algorithm.
        seed: of the run's generator.
        max_steps, time_limit, rtol, atol, checkpoint_every: as in the kind's ``solve``; free to change on resumption.
        out: the result directory.
    """

    target: Target
    job: Job
    algorithm: Any
    texts: Mapping[str, Mapping[str, str]]
    seed: int
    max_steps: int | None
    time_limit: float | None
    rtol: float | None
    atol: float | None
    checkpoint_every: int | None
    out: Path

    @property
    def method(self) -> Any:
        """What ``solve`` is given."""
        return self.job.kind.automatic() if isinstance(self.algorithm, Automatic) else self.algorithm

    def identity(self) -> dict[str, Any]:
        """Everything that must be the same for a resumed run to be the same run, by name."""
        return {
            "target": self.target.identity,
            "algorithm": self.algorithm.name,
            **{f"case.{k}": v for k, v in plain(self.job.settings).items() if k != "data_dir"},
            **{f"algorithm.{k}": v for k, v in plain(self.algorithm.settings()).items()},
            "seed": self.seed,
        }

    def record(self) -> dict[str, Any]:
        """What is stored when the run starts."""
        return {
            "identity": self.identity(),
            "texts": self.texts,
            "budgets": {name: getattr(self, name) for name in _BUDGETS},
            "file_sha256": _sha256(self.target.file),
        }

    def facts(self) -> dict[str, Any]:
        """What the result says about the problem."""
        place = "case" if self.target.file is None else "file"
        return {
            "problem": self.target.name,
            "kind": self.job.kind.name,
            place: self.target.identity.removeprefix("case "),
            "source": self.job.source,
            "settings": self.job.settings,
            "seed": self.seed,
            "budgets": {name: getattr(self, name) for name in _BUDGETS},
        }


def prepare(args: argparse.Namespace, target: Target, stored: dict[str, Any] | None) -> Request:
    """Resolve a command line; what it leaves open is taken from ``stored``, the run that is resumed.

    Raises:
        TypeError, ValueError, OSError: for settings that do not exist or fit, and data that are missing.
        ValueError: if the resumed run was asked for differently; the message names what differs.
    """
    texts = {**split(args.set), **_from_flags(args, target)}
    name = args.algorithm or (stored["identity"]["algorithm"] if stored else None)
    cls = kinds.method(name) if name else None
    if cls is not None:  # refuse a wrong key before any data are loaded
        sort_keys(texts, _owners(target, cls))
    if target.kind is not None:
        _check_kind(args, target, target.kind, cls)
    own = {key: text for key, text in texts.items() if key.partition(".")[0] in ("case", *target.slots)}
    before = stored["texts"] if stored else {"case": {}, "algorithm": {}}
    case_texts = {**before["case"], **sort_keys(own, {"case": (target.label, target.slots)})["case"]}
    _check_device(case_texts.get("device", ""))
    job = target.build(**arguments(case_texts, target.slots))
    _check_kind(args, target, job.kind, cls)
    base = job.kind.default(job.problem) if cls is None else cls()
    algorithm_texts = {**before["algorithm"], **sort_keys(texts, _owners(target, type(base)))["algorithm"]}
    algorithm = replace(base, **arguments(algorithm_texts, class_slots(base)))
    budgets = {
        key: value if value is not None or not stored else stored["budgets"][key]
        for key, value in ((key, getattr(args, key)) for key in _BUDGETS)
    }
    if budgets["max_steps"] is None:
        budgets["max_steps"] = job.max_steps
    if budgets["checkpoint_every"] is not None and budgets["checkpoint_every"] < 1:
        raise SettingError(f"--checkpoint-every {budgets['checkpoint_every']}: must be at least 1 step")
    seed = args.seed if args.seed is not None else stored["identity"]["seed"] if stored else 0
    if not 0 <= seed < 2**63:
        raise SettingError(f"--seed {seed}: must lie between 0 and 2^63 - 1")
    out = args.out or Path("runs") / f"{target.name}-{algorithm.name}"
    request = Request(
        target=target,
        job=job,
        algorithm=algorithm,
        texts={"case": case_texts, "algorithm": algorithm_texts},
        seed=seed,
        out=out,
        **budgets,
    )
    if stored:
        _compare(stored, request)
    return request


def _owners(target: Target, cls: type[Any]) -> dict[str, tuple[str, Any]]:
    return {"case": (target.label, target.slots), "algorithm": (cls().name, class_slots(cls))}


def _from_flags(args: argparse.Namespace, target: Target) -> dict[str, str]:
    """Options that are settings of the case, under their keys."""
    found = {}
    for name in _FLAGS:
        value = getattr(args, name)
        flag = "--" + name.replace("_", "-")
        if value is None or (name == "seed" and name not in target.slots):
            continue
        if name not in target.slots:
            cure = "; dtype and device are those of its starting point" if name in ("dtype", "device") else ""
            known = ", ".join(target.slots) or "none"
            raise SettingError(f"{flag} {value}: {target.label} has no setting {name!r} (it has: {known}){cure}")
        if {name, f"case.{name}"} & set(split(args.set)):
            raise SettingError(f"{flag} {value} and --set {name}=... say the same thing twice; leave one out")
        found[f"case.{name}"] = str(value)
    return found


def _check_device(text: str) -> None:
    """Refuse a CUDA device that is not there, before anything is built on it."""
    if not text.startswith("cuda"):
        return
    try:
        index = torch.device(text).index or 0
    except RuntimeError as error:
        raise SettingError(f"device={text}: {error}; use --device cpu or --device cuda") from None
    if index >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
        raise SettingError(f"device={text}: PyTorch sees {found} here; use --device cpu")


def _check_kind(args: argparse.Namespace, target: Target, kind: Kind, cls: type[Any] | None) -> None:
    """Refuse a method of another kind, and tolerances that this kind does not have."""
    if cls is not None:
        kinds.require_kind(cls, kind, target.label)
    for name in {"rtol", "atol"} - set(kind.tolerances):
        if getattr(args, name) is not None:
            known = ", ".join(f"--{key} ({meaning})" for key, meaning in kind.tolerances.items())
            raise SettingError(f"--{name} {getattr(args, name)}: for {kind.name} problems there is only {known}")


def _compare(stored: dict[str, Any], request: Request) -> None:
    then, now = stored["identity"], plain(request.identity())
    different = [
        f"{name} is {now.get(name)!r}, was {then.get(name)!r}"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(
            f"--resume: the run in {request.out} was started differently ({'; '.join(different)}); leave these out to "
            "go on with it, or start a new run without --resume"
        )
    if stored["file_sha256"] != _sha256(request.target.file):
        warnings.warn(
            f"{request.target.file} has changed since the run was started; the resumed run is not the same run",
            stacklevel=2,
        )


def read_request(args: argparse.Namespace, target: Target) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stored request and the checkpoint of the run to resume; sets ``args.out`` where it was left open.

    Raises:
        FileNotFoundError, ValueError: if there is nothing to resume, or it is damaged.
    """
    if args.out is None:
        args.out = _find_run(args, target)
    out: Path = args.out
    checkpoints = [out / report.CHECKPOINT, out / f"{report.CHECKPOINT}.previous"]
    if not any(path.exists() for path in checkpoints):
        started = (out / report.REQUEST).exists()
        reason = "ended before its first checkpoint" if started else f"does not exist: no {report.CHECKPOINT} there"
        raise FileNotFoundError(f"--resume: the run in {out} {reason}; start it without --resume")
    try:
        stored = json.loads((out / report.REQUEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--resume: {out / report.REQUEST} cannot be read ({error}); start a new run") from None
    return stored, bilevel.load_checkpoint(out / report.CHECKPOINT)


def _find_run(args: argparse.Namespace, target: Target) -> Path:
    possible = KINDS.values() if target.kind is None else [target.kind]
    every = [*(name for kind in possible for name in kind.methods()), AUTO]
    names = [kinds.method(args.algorithm)().name] if args.algorithm else every
    places = [Path("runs") / f"{target.name}-{name}" for name in names]
    found = [place for place in places if (place / report.REQUEST).exists()]
    if len(found) > 1:
        raise ValueError(f"--resume: there are several runs: {', '.join(map(str, found))}; say which with --out")
    return found[0] if found else places[0]


def _sha256(file: Path | None) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file is not None else None
