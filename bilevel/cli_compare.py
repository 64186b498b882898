"""What ``bilevel compare`` asks for, resolved: cases, algorithms and their settings."""

import argparse
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from bilevel.auto import AUTO
from bilevel.compare import entrants, open_journal, request
from bilevel.comparison_run import Entrant, Journal, Plan, Source
from bilevel.kinds import KINDS, Kind
from bilevel.settings import SettingError, arguments, class_slots, function_slots, sort_keys, split

EXTERNAL = "external-data"

Build = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A comparison that is fully specified.

    Attributes:
        title: what is compared, in words.
        kind: of the cases.
        plan: the runs.
        asked: what must be the same to resume.
        out: the directory.
        left_out: cases of the suite that need data which are not there.
    """

    title: str
    kind: Kind
    plan: Plan
    asked: dict[str, Any]
    out: Path
    left_out: tuple[str, ...] = ()

    def journal(self, resume: bool) -> Journal:
        """Where finished runs are written down."""
        return open_journal(self.out, self.asked, resume)


def prepare(args: argparse.Namespace, problems: ModuleType, build: Build) -> Contest:
    """Resolve a command line.

    Args:
        args: as ``bilevel compare`` parses them.
        problems: the package of that name, which this one must not import.
        build: ``build(name, settings)`` makes the job of a case; processes of their own must be able to import it.

    Raises:
        TypeError, ValueError, OSError: for cases, algorithms and settings that do not exist or fit together.
    """
    entries, name, left_out = _entries(args, problems)
    kind = _kind(entries)
    names = [part for part in args.algorithms.split(",") if part] if args.algorithms is not None else None
    chosen = entrants(kind, names)
    texts = split(args.set)
    slots = {entry.name: function_slots(entry.factory) for entry in entries}
    of_cases, of_methods = _sorted(texts, slots, chosen, name)
    chosen = tuple(_with_settings(entrant, of_methods.get(entrant.label, {})) for entrant in chosen)
    _check_flags(args, texts, slots)
    sources = []
    for entry in entries:
        own = arguments(of_cases.get(entry.name, {}), slots[entry.name])
        if args.data_dir is not None and "data_dir" in slots[entry.name]:
            own["data_dir"] = args.data_dir
        seeded = "seed" in slots[entry.name]
        sources.append(Source(entry.name, functools.partial(_build, build, entry.name, own, seeded)))
    if args.suite is None:
        for source in sources:
            source.build(None)  # a case that was named and cannot be built is misuse
    plan = Plan(
        sources=tuple(sources),
        entrants=chosen,
        seeds=(None,) if args.seeds is None else tuple(range(args.seeds)),
        max_steps=args.max_steps,
        time_limit=args.time_limit,
    )
    return Contest(
        title=f"{len(chosen)} algorithms on {name if args.suite is None else f'the {len(entries)} cases of {name}'}",
        kind=kind,
        plan=plan,
        asked=request(plan, [f"{key}={text}" for key, text in texts.items()]),
        out=args.out or Path("runs") / f"compare-{_folder(args)}",
        left_out=left_out,
    )


def _build(build: Build, name: str, settings: Mapping[str, Any], seeded: bool, seed: int | None) -> Any:
    return build(name, {**settings, "seed": seed} if seeded and seed is not None else dict(settings))


def _folder(args: argparse.Namespace) -> str:
    return args.suite.replace(",", "-") if args.suite is not None else "-".join(args.cases[:3])


def _entries(args: argparse.Namespace, problems: ModuleType) -> tuple[list[Any], str, tuple[str, ...]]:
    """The registry's entries, what to call them, and which of the suite are left out."""
    if bool(args.cases) == (args.suite is not None):
        raise ValueError("name cases, or a suite with --suite NAME, such as: bilevel compare --suite exact")
    if args.cases:
        found = list({entry.name: entry for entry in map(problems.entry, args.cases)}.values())
        return found, ", ".join(entry.name for entry in found), ()
    wanted = {tag for tag in args.suite.split(",") if tag}
    every = [entry for name in KINDS for entry in problems.entries(name).values()]
    members = [entry for entry in every if wanted <= entry.tags | {entry.kind}]
    if not members:
        tags = sorted({tag for entry in every for tag in entry.tags} | set(KINDS))
        raise ValueError(
            f"--suite {args.suite}: no case has {' and '.join(sorted(wanted))}; tags are {', '.join(tags)}"
        )
    first = next(name for name in KINDS if any(entry.kind == name for entry in members))
    members = [entry for entry in members if entry.kind == first]
    data = EXTERNAL in wanted or args.data_dir is not None or "BILEVEL_DATA" in os.environ
    kept = [entry for entry in members if data or EXTERNAL not in entry.tags]
    if not kept:
        raise ValueError(f"--suite {args.suite}: all its cases need data files; say where they are with --data-dir")
    return kept, f"the suite {args.suite}", tuple(e.name for e in members if e not in kept)


def _kind(entries: Sequence[Any]) -> Kind:
    names = {entry.kind: entry.name for entry in entries}
    if len(names) > 1:
        listing = " and ".join(f"{case} ({kind})" for kind, case in names.items())
        raise ValueError(f"{listing} are cases of different kinds; compare them apart")
    return KINDS[next(iter(names))]


def _sorted(
    texts: Mapping[str, str], slots: Mapping[str, Mapping[str, Any]], chosen: Sequence[Entrant], name: str
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """The settings of each case and of each algorithm: a key goes to all that have it, ``Penalty.key`` to one."""
    fields = {e.label: class_slots(e.method) for e in chosen if e.method is not None}
    of_cases: dict[str, dict[str, str]] = {}
    of_methods: dict[str, dict[str, str]] = {}
    shared = {}
    for key, text in texts.items():
        head, _, rest = key.partition(".")
        label = next((label for label in fields if rest and _plain(label) == _plain(head)), None)
        if label is None:
            shared[key] = text
        elif rest.partition(".")[0] not in fields[label]:
            raise SettingError(
                f"--set {key}={text}: {label} has no setting {rest!r}; it has {', '.join(fields[label])}"
            )
        else:
            of_methods.setdefault(label, {})[rest] = text
    owners = {
        "case": (name, {key: slot for own in slots.values() for key, slot in own.items()}),
        "algorithm": (", ".join(fields) or AUTO, {key: slot for own in fields.values() for key, slot in own.items()}),
    }
    split_up = sort_keys(shared, owners)
    for prefix, members, result in (("case", slots, of_cases), ("algorithm", fields, of_methods)):
        for key, text in split_up[prefix].items():
            for member, own in members.items():
                if key.partition(".")[0] in own:
                    result.setdefault(member, {}).setdefault(key, text)
    return of_cases, of_methods


def _plain(text: str) -> str:
    return text.lower().replace("_", "").replace("-", "")


def _with_settings(entrant: Entrant, texts: Mapping[str, str]) -> Entrant:
    if not texts:
        return entrant
    return Entrant(entrant.label, replace(entrant.method, **arguments(texts, class_slots(entrant.method))))


def _check_flags(args: argparse.Namespace, texts: Mapping[str, str], slots: Mapping[str, Mapping[str, Any]]) -> None:
    if args.data_dir is not None and not any("data_dir" in own for own in slots.values()):
        raise SettingError(f"--data-dir {args.data_dir}: no case has a setting 'data_dir'")
    if args.seeds is not None and {"seed", "case.seed"} & set(texts):
        raise SettingError(f"--seeds {args.seeds} and --set seed=... say the same thing twice; leave one out")
