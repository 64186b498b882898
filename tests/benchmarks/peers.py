"""What the comparisons share: one thread, interleaved rounds, medians, tables, and peers that may be missing.

A comparison is a list of rows. A row is one way to compute the same thing; every round runs each row once (quick rows
a few times), in an order that rotates, so that a busy spell of the machine falls on all of
them.
"""

import argparse
import gc
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

Cell = str | float | int | None

DISTRIBUTIONS = ("torch", "numpy", "scipy", "torchopt", "curvlinops-for-pytorch", "jax", "jaxopt", "betty-ml")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
BURST_SECONDS = 0.05
"""Rows quicker than this are timed up to three times a visit, as their caches would be in a real loop."""


@dataclass
class Row:
    """One way to do the job.

    Attributes:
        name: first column.
        run: the timed call; returns an answer that is measured outside the timing.
        peer: rows of other libraries may fail; the reason is printed instead of their figures.
        prepare: compilation, timed apart and run once.
    """

    name: str
    run: Callable[[], Any]
    peer: bool = False
    prepare: Callable[[], Any] | None = None
    compile_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    answer: Any = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Comparison:
    """Rows that ran, and why the others did not."""

    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def add_peer(self, name: str, build: Callable[[], list[Row]], wanted: bool) -> None:
        """The rows of a library, or the reason why there are none."""
        if not wanted:
            self.missing[name] = "left out by --no-peers"
            return
        try:
            with warnings.catch_warnings():  # some announce their retirement
                warnings.simplefilter("ignore")
                built = build()
        except ImportError as error:
            self.missing[name] = f"not importable ({error})"
            return
        for row in built:
            row.peer = True
        self.rows += built

    def run(self, arguments: argparse.Namespace, *, warm_up: bool = True, budget: float = 6.0) -> None:
        """Time all rows; a row that has used ``budget`` seconds is left out of later rounds."""
        clock = CLOCKS[arguments.clock]
        for row in list(self.rows):
            self._guarded(row, lambda row=row: _prepare(row, warm_up))
        for turn in range(min(arguments.rounds, 2) if arguments.quick or arguments.toy else arguments.rounds):
            shift = turn % max(len(self.rows), 1)
            for row in self.rows[shift:] + self.rows[:shift]:
                if not row.seconds or sum(row.seconds) <= budget:
                    self._guarded(row, lambda row=row: _visit(row, clock))

    def _guarded(self, row: Row, action: Callable[[], None]) -> None:
        try:
            if row.peer:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    action()
            else:
                action()
        except Exception as error:  # whatever a peer raises is a result, not a reason to lose the table
            if not row.peer:
                raise
            self.rows.remove(row)
            self.missing[row.name] = (
                f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )


def _prepare(row: Row, warm_up: bool) -> None:
    if row.prepare is not None:
        began = time.perf_counter()
        row.prepare()
        row.compile_seconds = time.perf_counter() - began
    if warm_up:
        row.run()


def _visit(row: Row, clock: Callable[[], float]) -> None:
    gc.collect()
    spent, calls = 0.0, 0
    while calls < 3 and (calls == 0 or spent < BURST_SECONDS):
        began = clock()
        row.answer = row.run()
        row.seconds.append(clock() - began)
        spent, calls = spent + row.seconds[-1], calls + 1


def conjugate_gradients(
    product: Callable[[torch.Tensor], torch.Tensor],
    b: torch.Tensor,
    tolerance: float,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """Textbook CG to ``||r|| <= tolerance`` with nothing checked: the loop one writes by hand. Also counts products."""
    if start is None:
        v, r, products = torch.zeros_like(b), b.clone(), 0
    else:
        v, r, products = start.clone(), b - product(start), 1
    p, square = r.clone(), float(torch.dot(r.view(-1), r.view(-1)))
    while square > tolerance**2:
        ap = product(p)
        products += 1
        step = square / float(torch.dot(p.view(-1), ap.view(-1)))
        v.add_(p, alpha=step)
        r.sub_(ap, alpha=step)
        before, square = square, float(torch.dot(r.view(-1), r.view(-1)))
        p.mul_(square / before).add_(r)
    return v, products


def betty_levels(problem: Any) -> tuple[Any, Any, Any]:
    """Betty's classes: a module of one tensor, and the levels ``problem.lower(x, y)`` and ``problem.upper(x, y)``."""
    from betty.problems import ImplicitProblem

    class Point(torch.nn.Module):
        def __init__(self, value: torch.Tensor) -> None:
            super().__init__()
            self.value = torch.nn.Parameter(value.clone())

    class Level(ImplicitProblem):
        def get_batch(self) -> tuple[()]:
            return ()

    class Lower(Level):
        def training_step(self, batch: Any) -> torch.Tensor:
            return problem.lower(self.upper.module.value, self.module.value)

    class Upper(Level):
        def training_step(self, batch: Any) -> torch.Tensor:
            return problem.upper(self.module.value, self.lower.module.value)

    return Point, Lower, Upper


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all three jobs share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds (%(default)s)")
    made.add_argument("--quick", action="store_true", help="at most two rounds, and without the slowest rows")
    made.add_argument("--toy", action="store_true", help="a tiny problem that only shows that the script runs")
    made.add_argument("--no-peers", dest="peers", action="store_false", help="without other libraries")
    made.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: less disturbed on a busy machine")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write every sample there")
    made.add_argument("--data-dir", type=Path, default=os.environ.get("BILEVEL_DATA"), help="default: BILEVEL_DATA")
    return made


def inputs(arguments: argparse.Namespace, name: str) -> dict[str, np.ndarray] | None:
    """``DIR/jobs/name.npz``, or None where it is missing or a toy is asked for."""
    if arguments.toy or not arguments.data_dir:
        return None
    file = Path(arguments.data_dir) / "jobs" / f"{name}.npz"
    if not file.exists():
        return None
    with np.load(file) as stored:
        return dict(stored)


def settle() -> None:
    """One core and one thread for every library. Call it before jax is imported: it counts the cores then."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.getLogger("betty").disabled = True


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def format_cell(value: Cell) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(rows: Sequence[dict[str, Cell]]) -> None:
    """A Markdown table; the columns are those of the first row."""
    columns = list(rows[0])
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in rows:
        print(f"| {' | '.join(format_cell(row[column]) for column in columns)} |", flush=True)


def finish(
    arguments: argparse.Namespace, title: str, comparison: Comparison, measured: Sequence[dict[str, Cell]]
) -> Sequence[dict[str, Cell]]:
    """Print the table with the rows that are missing, write the file asked for, and return the table."""
    print(title, end="\n\n")
    print_table(measured)
    for name, reason in comparison.missing.items():
        print(f"- {name}: {reason}")
    versions = {}
    for name in DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    machine = f"{_processor()}, {torch.get_num_threads()} thread(s), {arguments.clock} clock"
    print(f"\n{machine}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if arguments.json:
        record = {
            "title": title,
            "machine": machine,
            "versions": versions,
            "table": measured,
            "missing": comparison.missing,
            "seconds": {row.name: row.seconds for row in comparison.rows},
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return measured
