"""What a run leaves behind: result, history, solution and checkpoint as files, and texts to read.

Every file is written beside its place and renamed, so that a kill never leaves half of one. JSON is strict: NaN and
infinities are the texts "nan", "inf" and "-inf".
"""

import importlib.metadata
import json
import os
import platform
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save

from bilevel.kinds import EXACT, Kind, Outcome, Row
from bilevel.settings import plain
from implicit import SaveCheckpoint, Status, StepInfo, tree
from implicit.tree import Tree

RESULT, HISTORY, PICTURE, SOLUTION = "result.json", "history.jsonl", "convergence.png", "solution.safetensors"
CHECKPOINT, REQUEST = "run.pt", "run.json"
FILES = (RESULT, HISTORY, PICTURE, SOLUTION, CHECKPOINT, CHECKPOINT + ".previous", REQUEST)

SAVE_SECONDS = 10.0


def version() -> str:
    """The installed version of this library."""
    try:
        return importlib.metadata.version("bilevel")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write(path: Path, data: bytes) -> Path:
    """Write ``data`` to ``path`` atomically."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    return path


def move_aside(folder: Path, files: Sequence[str] = FILES) -> Path | None:
    """Make ``folder`` ready for a new run; an earlier one there, known by ``files``, is renamed to the first free
    ``folder.1``, ...

    Returns:
        Where the earlier run is now, or None.
    """
    moved = None
    if any((folder / name).exists() for name in files):
        number = 1
        while (moved := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(moved)
    folder.mkdir(parents=True, exist_ok=True)
    return moved


def write_json(path: Path, data: Any) -> Path:
    """Strict, indented JSON of anything :func:`bilevel.settings.plain` understands."""
    return write(path, (json.dumps(plain(data), indent=2, allow_nan=False) + "\n").encode())


def result(solution: Any, outcome: Outcome, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about a run that is a number or a name; ``facts`` are those the solution does not know."""
    return {
        **facts,
        "algorithm": {"name": outcome.method.name, "settings": outcome.method.settings()},
        "status": solution.status.name,
        "message": solution.message,
        "steps": solution.steps,
        "seconds": solution.seconds,
        **outcome.numbers,
        "counts": solution.counts,
        "dtype": outcome.like.dtype,
        "device": str(outcome.like.device),
        "versions": {
            "bilevel": version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "numpy": numpy.__version__,
        },
    }


def write_history(path: Path, history: Sequence[Mapping[str, float]]) -> Path:
    """One JSON object per check and line."""
    return write(path, "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in history).encode())


def write_solution(path: Path, solution: Any, outcome: Outcome, name: str) -> Path:
    """The variables as tensors under readable keys; the metadata key ``bilevel`` says in JSON what they solve."""
    found = {}
    for prefix, point in outcome.variables.items():
        found.update(_named(prefix, point))
    about = {
        "problem": name,
        "algorithm": outcome.method.name,
        "status": solution.status.name,
        "steps": solution.steps,
        "version": version(),
    }
    # One metadata entry only: safetensors writes several in random order, and equal runs should give equal bytes.
    return write(path, save(found, metadata={"bilevel": json.dumps(about)}))


def _named(prefix: str, point: Tree) -> dict[str, torch.Tensor]:
    """Leaves by key: ``x``, ``y.weight``, ``x.blocks.0``; keys that would collide keep their brackets."""
    paths = tree.paths(point)
    short = [prefix + re.sub(r"\[(?:'([^']*)'|([^\]]*))\]", r".\1\2", path) for path in paths]
    names = [s if short.count(s) == 1 else prefix + path for s, path in zip(short, paths, strict=True)]
    leaves = (leaf.detach().cpu().contiguous() for leaf in tree.leaves(point))
    return dict(zip(names, leaves, strict=True))


class TimedCheckpoint(SaveCheckpoint):
    """Saves every ten seconds, whatever a step costs, and at the end."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, every=1)
        self._last = 0.0

    def start(self, info: StepInfo) -> None:
        """Count from where the run starts."""
        super().start(info)
        self._last = info.seconds

    def __call__(self, info: StepInfo) -> None:
        """Save if it is time."""
        if info.seconds - self._last >= SAVE_SECONDS:
            super().__call__(info)
            self._last = info.seconds


def header(name: str, parts: Sequence[str], method: str, like: torch.Tensor) -> str:
    """One line on what is about to be solved; ``parts`` are phrases, ``like`` has the dtype and the device."""
    return f"{name}: {'; '.join(parts)}; {method}, {plain(like.dtype)} on {like.device}"


def summary(solution: Any, outcome: Outcome, kind: Kind, facts: Mapping[str, Any]) -> str:
    """The outcome in words and numbers."""
    lines = [
        f"{solution.status.name} after {solution.steps:,} steps and {solution.seconds:.3g} s",
        *textwrap.wrap(solution.message, 96, initial_indent="  ", subsequent_indent="  "),
    ]
    advised = solution.status is Status.CONVERGED or solution.status.value in solution.message or "error" in facts
    if not advised:
        lines += textwrap.wrap(solution.status.value, 96, initial_indent="  ", subsequent_indent="  ")
    exact = facts.get("exact") or {}
    rows = [outcome.headline, *outcome.rows]
    rows += [Row(name.replace("_", " "), value, kind.meanings.get(name, EXACT)) for name, value in exact.items()]
    lines += ["", *_table(rows), "", kind.accuracy_title, *_table(outcome.accuracy)]
    lines += [f"  {line}" for note in outcome.notes for line in textwrap.wrap(f"note: {note}", 94)]
    counts = ", ".join(f"{value:,} {kind.counted.get(name, name)}" for name, value in solution.counts.items())
    return "\n".join([*lines, "", f"Work: {counts}"])


def _table(rows: Sequence[Row]) -> list[str]:
    width = max((len(row.name) for row in rows), default=0)
    return [f"  {name:<{width}}  {value:<12.6g} {meaning}".rstrip() for name, value, meaning in rows]
