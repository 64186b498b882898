"""What a run leaves behind: result, history, solution and checkpoint as files, and texts to read.

Every file is written beside its place and renamed, so that a kill never leaves half of one. JSON is strict: NaN and
infinities are the texts "nan", "inf" and "-inf".
"""

import importlib.metadata
import inspect
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

from bilevel.problem import BilevelProblem
from bilevel.registry import algorithms
from bilevel.settings import class_slots, listing, plain, show
from bilevel.solution import Accuracy, Solution
from implicit import SaveCheckpoint, Status, StepInfo, tree
from implicit.tree import Tree

RESULT, HISTORY, PICTURE, SOLUTION = "result.json", "history.jsonl", "convergence.png", "solution.safetensors"
CHECKPOINT, REQUEST = "run.pt", "run.json"
FILES = (RESULT, HISTORY, PICTURE, SOLUTION, CHECKPOINT, CHECKPOINT + ".previous", REQUEST)

SAVE_SECONDS = 10.0

_EXPLAINED = {
    "stationarity": "norm of the hypergradient at x; projected where x is in a set",
    "hypergradient_error": "how far that hypergradient is from the true one",
    "bias": "how far the penalty alone moves the hypergradient",
    "lower_residual": "norm of the lower gradient at (x, y); projected where y is in a set",
    "lower_error": "distance of y to the lower solution",
    "linear_residual": "relative residual of the adjoint system",
    "distance": "estimated distance of x to the nearest solution, doubled for safety",
    "feasibility": "violation of the constraints",
}
_COUNTED = {
    "upper": "upper evaluations (each with a gradient)",
    "lower": "lower evaluations (each with a gradient)",
    "products": "second-order products",
}


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


def move_aside(folder: Path) -> Path | None:
    """Make ``folder`` ready for a new run; an earlier one there is renamed to the first free ``folder.1``, ...

    Returns:
        Where the earlier run is now, or None.
    """
    moved = None
    if any((folder / name).exists() for name in FILES):
        number = 1
        while (moved := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(moved)
    folder.mkdir(parents=True, exist_ok=True)
    return moved


def write_json(path: Path, data: Any) -> Path:
    """Strict, indented JSON of anything :func:`bilevel.settings.plain` understands."""
    return write(path, (json.dumps(plain(data), indent=2, allow_nan=False) + "\n").encode())


def result(solution: Solution, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about a run that is a number or a name; ``facts`` are those the solution does not know."""
    leaf = tree.leaves(solution.y)[0]
    return {
        **facts,
        "algorithm": {"name": solution.algorithm.name, "settings": solution.algorithm.settings()},
        "status": solution.status.name,
        "message": solution.message,
        "steps": solution.steps,
        "seconds": solution.seconds,
        "upper_value": solution.upper_value,
        "lower_value": solution.lower_value,
        "accuracy": vars(solution.accuracy),
        "counts": solution.counts,
        "metrics": solution.metrics,
        "dtype": leaf.dtype,
        "device": str(leaf.device),
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


def write_solution(path: Path, solution: Solution, name: str) -> Path:
    """x and y as tensors under readable keys; the metadata key ``bilevel`` says in JSON what they solve."""
    found = {**_named("x", solution.x), **_named("y", solution.y)}
    about = {
        "problem": name,
        "algorithm": solution.algorithm.name,
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


def header(problem: BilevelProblem, x: Tree, y: Tree, algorithm: str) -> str:
    """One line on what is about to be solved."""
    leaf = tree.leaves(y)[0]
    parts = [f"x has {_count(x)}", f"y has {_count(y)}"]
    for level in ("upper", "lower"):
        data = getattr(problem, f"{level}_data")
        if data is not None:
            rows = f"{data.rows:,}" if data.rows is not None else "unknown"
            batches = f" in batches of {data.batch_size:,}" if data.stochastic and data.batch_size else ""
            parts.append(f"{level} data: {rows} rows{batches}")
    return f"{problem.name}: {'; '.join(parts)}; {algorithm}, {plain(leaf.dtype)} on {leaf.device}"


def _count(point: Tree) -> str:
    size, parts = tree.size(point), len(tree.leaves(point))
    return f"{size:,} number{'s' if size != 1 else ''}" + (f" in {parts} tensors" if parts > 1 else "")


def summary(solution: Solution, facts: Mapping[str, Any]) -> str:
    """The outcome in words and numbers."""
    lines = [
        f"{solution.status.name} after {solution.steps:,} steps and {solution.seconds:.3g} s",
        *textwrap.wrap(solution.message, 96, initial_indent="  ", subsequent_indent="  "),
    ]
    advised = solution.status is Status.CONVERGED or solution.status.value in solution.message or "error" in facts
    if not advised:
        lines += textwrap.wrap(solution.status.value, 96, initial_indent="  ", subsequent_indent="  ")
    rows = [("upper value", solution.upper_value, ""), ("lower value", solution.lower_value, "")]
    rows += [(name, value, "") for name, value in solution.metrics.items()]
    exact = facts.get("exact") or {}
    rows += [(name.replace("_", " "), value, "known exactly for this case") for name, value in exact.items()]
    lines += [
        "",
        *_table(rows),
        "",
        "How accurate it is, measured at the end on all data:",
        *_accuracy(solution.accuracy),
    ]
    counts = ", ".join(f"{value:,} {_COUNTED.get(name, name)}" for name, value in solution.counts.items())
    return "\n".join([*lines, "", f"Work: {counts}"])


def describe_algorithms() -> list[dict[str, Any]]:
    """Name, guarantee, one-line summary and settings of every algorithm, as plain data."""
    return [
        {
            "name": name,
            "guarantee": cls.guarantee,
            "summary": (inspect.getdoc(inspect.getmodule(cls)) or "").partition("\n")[0],
            "settings": plain({key: slot.default for key, slot in class_slots(cls).items()}),
        }
        for name, cls in algorithms().items()
    ]


def overview(cases: Sequence[Mapping[str, Any]], methods: Sequence[Mapping[str, Any]]) -> str:
    """The text of ``bilevel list``."""
    lines = ["Cases (bilevel run NAME):"]
    for case in cases:
        defaults = [f"{key}={show(value)}" for key, value in case["settings"].items()]
        fits = ", ".join(case["fits"]) if case["fits"] is not None else case["note"]
        tags = f"  [{', '.join(case['tags'])}]" if case["tags"] else ""
        lines += ["", f"  {case['name']}: {case['summary']}{tags}", f"      fits      {fits}", *_wrapped(defaults)]
    lines += ["", "Algorithms (--algorithm NAME) and what they guarantee:"]
    for method in methods:
        defaults = listing(class_slots(algorithms()[method["name"]]))
        lines += ["", f"  {method['name']} ({method['guarantee']}): {method['summary']}", *_wrapped(defaults)]
    return "\n".join(lines)


def _wrapped(defaults: Sequence[str]) -> list[str]:
    return textwrap.wrap(
        " ".join(defaults) or "none", 110, initial_indent="      settings  ", subsequent_indent=" " * 16,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip


def _accuracy(accuracy: Accuracy) -> list[str]:
    rows = []
    for name, meaning in _EXPLAINED.items():
        value = getattr(accuracy, name)
        if value is not None:
            kind = accuracy.hypergradient_error_kind if name == "hypergradient_error" else None
            rows.append((name.replace("_", " "), value, f"{meaning} ({kind})" if kind else meaning))
    notes = [line for note in accuracy.notes for line in textwrap.wrap(f"note: {note}", 94)]
    return [*_table(rows), *(f"  {note}" for note in notes)]


def _table(rows: Sequence[tuple[str, float, str]]) -> list[str]:
    width = max((len(name) for name, _, _ in rows), default=0)
    return [f"  {name:<{width}}  {value:<12.6g} {meaning}".rstrip() for name, value, meaning in rows]
