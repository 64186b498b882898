"""The picture of a run's convergence; matplotlib is imported only when one is drawn."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bilevel.kinds import KINDS, Kind
from bilevel.report import HISTORY, RESULT, write


@dataclass(frozen=True)
class Curve:
    """One run of a picture: its label, its kind, its history, and the optimal value where it is known."""

    label: str
    kind: Kind
    history: Sequence[Mapping[str, Any]]
    optimum: float | None = None

    def column(self, *names: str) -> tuple[str, list[float]]:
        """The first of ``names`` that the history has, and its values."""
        for name in names:
            if self.history and name in self.history[0]:
                return name, [float(row.get(name, "nan")) for row in self.history]
        return names[0], []


def read_curve(folder: Path) -> Curve:
    """The curve of a result directory.

    Raises:
        FileNotFoundError, ValueError: if there is no history, or what is there cannot be read.
    """
    path = folder / HISTORY
    if not path.exists():
        reason = f"has no {HISTORY}; a run writes it at its end" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {reason}. Give directories that bilevel run or bilevel solve wrote")
    try:
        history = [json.loads(line) for line in path.read_text().splitlines()]
        about = json.loads((folder / RESULT).read_text()) if (folder / RESULT).exists() else {}
        exact = about.get("exact") or {}
        kind = KINDS[about["kind"]] if "kind" in about else _guess(history)
        name = f"{about['problem']}, {about['algorithm']['name']}" if about else folder.name
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: {HISTORY} or {RESULT} is damaged ({error})") from None
    optimum = exact.get(kind.chart.optimum)
    return Curve(name, kind, history, float(optimum) if optimum is not None else None)


def _guess(history: Sequence[Mapping[str, Any]]) -> Kind:
    """The kind by the columns, for folders whose result is gone or old; a run without steps counts as bilevel."""
    columns = history[0] if history else {}
    return next((kind for kind in KINDS.values() if kind.chart.value in columns), KINDS["bilevel"])


def read_curves(folders: Sequence[Path]) -> list[Curve]:
    """The curves of several result directories; runs with one name are told apart by their folder.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_curve`; and if runs of different kinds are among them.
    """
    curves = [read_curve(folder) for folder in folders]
    where = {curve.kind.name: folder for curve, folder in zip(curves, folders, strict=True)}
    if len(where) > 1:
        listing = " and ".join(f"{folder} ({name})" for name, folder in where.items())
        raise ValueError(
            f"{listing} are runs of different kinds, whose values and residuals cannot be compared; plot them apart"
        )
    labels = [curve.label for curve in curves]
    return [
        replace(curve, label=f"{curve.label} ({folder})") if labels.count(curve.label) > 1 else curve
        for curve, folder in zip(curves, folders, strict=True)
    ]


def draw(path: Path, curves: Sequence[Curve], title: str) -> Path:
    """Value and residual against steps and seconds, one colour per run; all runs are of one kind."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        figure = Figure(figsize=(10, 6.4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2, sharey="row", sharex="col")
        chart = curves[0].kind.chart
        residuals = [curve.column(*chart.residuals) for curve in curves]
        norms = [[v if v > 0 else math.nan for v in values] for _, values in residuals]
        rows = [
            (chart.label, [curve.column(chart.value)[1] for curve in curves]),
            (" /\n".join(dict.fromkeys(chart.residuals[name] for name, _ in residuals)), norms),
        ]
        for row, (name, values) in enumerate(rows):
            for axis, abscissa in zip(axes[row], ("step", "seconds"), strict=True):
                _panel(axis, curves, abscissa, values, optimum=row == 0)
            if _wants_log(values):
                axes[row][0].set_yscale("log")
            axes[row][0].set_ylabel(name)
        axes[1][0].set_xlabel("step")
        axes[1][0].xaxis.get_major_locator().set_params(integer=True)
        axes[1][1].set_xlabel("seconds")
        handles, names = axes[0][0].get_legend_handles_labels()
        if names != [curves[0].label]:  # then the title says it all
            figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3), frameon=False)
        figure.align_ylabels()
        figure.suptitle(title, fontsize=12)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return write(path, buffer.getvalue())


def _panel(axis: Any, curves: Sequence[Curve], abscissa: str, values: Sequence[list[float]], optimum: bool) -> None:
    for index, (curve, found) in enumerate(zip(curves, values, strict=True)):
        at = curve.column(abscissa)[1][: len(found)]
        colour, mean = f"C{index}", _running_mean(found)
        if mean is None:
            style = "o-" if len(found) <= 30 else "-"
            axis.plot(at, found, style, color=colour, label=curve.label, linewidth=1.4, markersize=3.5)
        else:
            axis.plot(at, found, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(at, mean, color=colour, label=f"{curve.label}, running mean", linewidth=1.6)
    known = dict.fromkeys(curve.optimum for curve in curves if curve.optimum is not None)
    for value in known if optimum else ():
        axis.axhline(value, color="0.35", linestyle="--", linewidth=1, label=f"optimal value {value:.5g}")
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _running_mean(values: list[float]) -> list[float] | None:
    """Means over a tenth of the run, for values that mostly go up and down, as those of minibatches do; else None."""
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < len(values) or len(values) <= 30:
        return None
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(values, values[1:], values[2:], strict=False))
    if turns < len(values) / 3:
        return None
    half = max(2, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _wants_log(values: Sequence[list[float]]) -> bool:
    """Positive throughout, and over more than a decade."""
    finite = [v for found in values for v in found if math.isfinite(v)]
    return bool(finite) and min(finite) > 0 and max(finite) > 10 * min(finite)
