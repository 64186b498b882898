"""The picture of a comparison; matplotlib is imported only when one is drawn."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel.comparison import Comparison, Trial
from bilevel.kinds import KINDS
from bilevel.report import write

_AXES = (("seconds", 1), ("oracle calls", 3))


def draw(path: Path, found: Comparison) -> Path:
    """For one case the upper value along each run, for several the share of the cases solved, both against time and
    against oracle calls."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        figure = Figure(figsize=(10, 4.6), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2, sharey=True)
        title = _curves(axes, found) if len(found.cases) == 1 else _profiles(axes, found)
        for axis in axes:
            axis.grid(True, which="major", alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        handles, names = axes[0].get_legend_handles_labels()
        if names:
            figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), frameon=False)
        figure.suptitle(title, fontsize=12)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return write(path, buffer.getvalue())


def _curves(axes: Sequence[Any], found: Comparison) -> str:
    shown = [trial for trial in found.trials if any(math.isfinite(point[2]) for point in trial.trace)]
    colours = {label: f"C{k}" for k, label in enumerate(found.algorithms)}
    for axis, (name, column) in zip(axes, _AXES, strict=True):
        named: set[str] = set()
        for trial in shown:
            points = [(point[column], point[2]) for point in trial.trace]
            label = trial.algorithm if trial.algorithm not in named else None
            named.add(trial.algorithm)
            style = "o-" if len(points) <= 30 else "-"
            colour = colours[trial.algorithm]
            axis.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.3, markersize=3)
            # A filled end is a point that the independent check accepts.
            face = colour if trial.verified else "white"
            axis.plot(*points[-1], "s", color=colour, markerfacecolor=face, markersize=7)
        _logarithmic(axis, "x", [p[column] for t in shown for p in t.trace])
        axis.set_xlabel(name)
        for k, best in enumerate(dict.fromkeys(t.best_known for t in shown if t.best_known is not None)):
            axis.axhline(best, color="0.35", linestyle="--", linewidth=1, label=None if k else "best known")
    _logarithmic(axes[0], "y", [p[2] for t in shown for p in t.trace])
    axes[0].set_ylabel(KINDS[found.kind].chart.label)
    return f"{found.cases[0]} (filled square: verified)"


def _profiles(axes: Sequence[Any], found: Comparison) -> str:
    """Data profiles: how many of all runs with a known best value were solved within a budget."""
    for axis, (name, column) in zip(axes, _AXES, strict=True):
        every = [_cost(trial, column) for trial in found.trials if trial.solved]
        for k, label in enumerate(found.algorithms):
            trials = [t for t in found.trials if t.algorithm == label and t.best_known is not None]
            if not trials:
                continue
            costs = sorted(_cost(trial, column) for trial in trials if trial.solved)
            shares = [i / len(trials) for i in range(len(costs) + 1)]
            # From where the first algorithm solves a case to where the last one does.
            axis.step(
                [min(every, default=1.0), *costs, max(every, default=1.0)],
                [*shares, shares[-1]],
                where="post",
                color=f"C{k}",
                label=label,
            )
        _logarithmic(axis, "x", every, least=1.0)
        axis.set_xlabel(name)
    axes[0].set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("share of the cases solved")
    return f"{len(found.cases)} cases: verified and F <= F* + 1e-2 max(1, |F*|)"


def _cost(trial: Trial, column: int) -> float:
    return trial.seconds if column == 1 else float(max(1, trial.calls))


def _logarithmic(axis: Any, direction: str, values: Sequence[float], least: float = 30.0) -> None:
    """A logarithmic axis for positive values over more than a factor of ``least``, a decade and a half."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    finite = [v for v in values if math.isfinite(v)]
    if not finite or min(finite) <= 0 or max(finite) <= least * min(finite):
        return
    axis.set(**{f"{direction}scale": "log"})
    ticks = axis.xaxis if direction == "x" else axis.yaxis
    if max(finite) < 100 * min(finite):  # powers of ten alone would leave one number, or none
        ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ticks.set_major_formatter(StrMethodFormatter("{x:g}"))
        ticks.set_minor_formatter(NullFormatter())
