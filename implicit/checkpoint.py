"""Checkpoints: plain data, written atomically, checked when read, with one predecessor kept."""

import importlib
import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from implicit.iterate import StepInfo
from implicit.status import ConvergenceWarning, Status

FORMAT = 1
_PACKAGES = ("implicit", "constrained", "bilevel", "torch.optim")


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write ``checkpoint`` to ``path`` so that a kill at any moment leaves a complete file.

    The data go to a temporary file, are flushed to the disk and renamed; the file that was there before is kept as
    ``<path>.previous``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".writing")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists() and _problem_with(path) is None:
        _keep(path)
    os.replace(temporary, path)


def _keep(path: Path) -> None:
    """Give the file its second name, so that ``path`` itself exists at every moment."""
    link = path.with_name(path.name + ".linking")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # no hard links on this filesystem
        os.replace(path, _previous(path))
        return
    os.replace(link, _previous(path))
    link.unlink(missing_ok=True)  # renaming onto another name of the same file does nothing


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint; a damaged file is reported with a warning and its predecessor is used.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if every candidate is damaged or of another format.
    """
    path = Path(path)
    faults = []
    for candidate in (path, _previous(path)):
        if not candidate.exists():
            if candidate == path and _previous(path).exists():
                faults.append(f"{path} is missing")
            continue
        checkpoint, fault = _read(candidate)
        if fault is None:
            found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
            if found != FORMAT:
                raise ValueError(f"{candidate} is no checkpoint of this version (format {found}, expected {FORMAT})")
            if faults:
                warnings.warn(f"{'; '.join(faults)}; resuming from {candidate.name}", ConvergenceWarning, stacklevel=2)
            return checkpoint
        faults.append(f"{candidate} is damaged ({fault})")
    if faults:
        raise ValueError(f"{'; '.join(faults)}; no intact checkpoint is left, start the run again")
    raise FileNotFoundError(f"no checkpoint at {path}; save one with SaveCheckpoint({str(path)!r}, every=...)")


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _problem_with(path: Path) -> str | None:
    """None for an intact file. A cut file has lost its zip directory; a flipped bit breaks a CRC."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a flipped header bit can look like encryption, another codec, another encoding
        return f"{type(error).__name__}: {error}"
    return f"checksum of {damaged} does not match" if damaged else None


def _read(path: Path) -> tuple[Any, str | None]:
    """The content, or what is wrong with the file."""
    fault = _problem_with(path)
    if fault is not None:
        return None, fault
    try:
        return torch.load(path, weights_only=True), None
    except Exception as error:  # headers carry no checksum
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


class SaveCheckpoint:
    """A callback that saves the run every ``every`` steps, and when it ends.

    Args:
        path: where to write; the previous file is kept beside it.
        every: steps between saves.
    """

    def __init__(self, path: str | Path, every: int = 100) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.path = Path(path)
        self.every = every
        self._saved = 0

    def start(self, info: StepInfo) -> None:
        """Count from where the run starts."""
        self._saved = info.step

    def __call__(self, info: StepInfo) -> None:
        """Save if another ``every`` steps are done."""
        if info.step // self.every > self._saved // self.every:
            save_checkpoint(info.capture(), self.path)
            self._saved = info.step

    def end(self, info: StepInfo, status: Status) -> None:
        """Save the end of the run, so that it can be extended; not after a failure in the middle of a step."""
        if status not in (Status.NONFINITE, Status.RUNNING) and info.step > self._saved:
            save_checkpoint(info.capture(), self.path)


def encode_method(method: Any) -> Any:
    """A method object as plain data: class name and fields.

    Raises:
        TypeError: if a field holds something that cannot be rebuilt by name, such as a lambda.
    """
    if method is None or isinstance(method, bool | int | str):
        return method
    if isinstance(method, float):  # numpy's float64 is one, and weights_only loading refuses it
        return float(method)
    if isinstance(method, tuple | list):
        kind = "tuple" if isinstance(method, tuple) else "list"
        return {"class": kind, "items": [encode_method(item) for item in method]}
    if is_dataclass(method) and not isinstance(method, type):
        name = _public_name(type(method))
        return {"class": name, "fields": {f.name: encode_method(getattr(method, f.name)) for f in fields(method)}}
    if isinstance(method, type):
        return {"class": "type", "name": _public_name(method)}
    if isinstance(method, torch.Tensor):
        return {"class": "tensor", "value": method.detach().clone()}
    if isinstance(method, dict) and all(isinstance(k, str) for k in method):
        return {"class": "dict", "items": {k: encode_method(v) for k, v in method.items()}}
    raise TypeError(f"{method!r} cannot be rebuilt from a checkpoint; pass the algorithm to solve() when resuming")


def decode_method(data: Any) -> Any:
    """The inverse of :func:`encode_method`; only public names of this library and of torch.optim are built."""
    if not isinstance(data, dict):
        return data
    kind = data["class"]
    if kind == "tuple":
        return tuple(decode_method(item) for item in data["items"])
    if kind == "list":
        return [decode_method(item) for item in data["items"]]
    if kind == "dict":
        return {k: decode_method(v) for k, v in data["items"].items()}
    if kind == "tensor":
        return data["value"]
    if kind == "type":
        return _lookup(data["name"])
    return _lookup(kind)(**{k: decode_method(v) for k, v in data["fields"].items()})


def _public_name(cls: type) -> str:
    for package in _PACKAGES:
        inside = cls.__module__ == package or cls.__module__.startswith(package + ".")
        if inside and getattr(importlib.import_module(package), cls.__name__, None) is cls:
            return f"{package}:{cls.__name__}"
    raise TypeError(
        f"{cls.__module__}.{cls.__qualname__} is no public class of this library or of torch.optim and cannot be "
        "rebuilt from a checkpoint; pass the algorithm to solve() when resuming"
    )


def _lookup(name: str) -> Callable[..., Any]:
    package, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(package), attribute, None) if package in _PACKAGES else None
    if not isinstance(found, type):
        raise ValueError(f"the checkpoint names {name!r}, which this version does not have")
    return found
