"""Multinomial logistic regression with one log-penalty per feature, tuned on validation rows."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel import Batches, BilevelProblem, Solution
from implicit import LBFGS, minimize
from problems.case import Case, OracleCounter, Report
from problems.datasets import Dataset, load, standardize
from problems.registry import register

START = -5.0
"""Log-penalty that the prior pulls to, and the start."""

PIXELS = {"digits": (8, 8), "mnist": (28, 28)}
"""Image shapes. Pixels are used as loaded, in [0, 1]; other features are standardized and followed by a constant 1."""

Rows = dict[str, Tensor]


@register("logistic_penalties", "multinomial logistic regression, one log-penalty per feature", "real-data")
def logistic_penalties(
    *,
    dataset: str = "digits",
    data_dir: str | None = None,
    train: int | None = None,
    batch_size: int | None = None,
    prior: float = 1e-3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Case:
    """g = CE(Xw) + sum_j exp(x_j) |w_j|²/2 on training rows, f = CE(Vw) + prior |x + 5|²/2 on validation rows.

    CE is the mean cross-entropy; w has one row per feature and one column per class. Images have no intercept; other
    data have one, the last row of w, with a log-penalty of its own.

    Args:
        dataset: any classification set of ``problems.datasets``.
        data_dir: where its files are, if it is not a bundled one.
        train: training rows, all others are for validation; None means 1000, or half of a set below 1500 rows.
        batch_size: rows per draw at both levels; None means all.
        prior: positive; without it the penalties of useless features run to infinity.
        seed: permutes the rows.
        dtype: of the data and the variables.
        device: of the data and the variables.

    Raises:
        ValueError: for a regression set, ``train`` outside ``1..n-1``, or a ``prior`` that is not positive.
    """
    if not prior > 0:
        raise ValueError(f"prior must be positive, got {prior}: without it penalties run to infinity")
    data = load(dataset, data_dir=data_dir)
    fit, held = _rows(data, train, seed)
    fit, held = ({k: _place(v, dtype, device) for k, v in rows.items()} for rows in (fit, held))
    counter = OracleCounter()

    def upper(x: Tensor, w: Tensor, *, batch: Rows) -> Tensor:
        return _loss(w, batch) + 0.5 * prior * ((x - START) ** 2).sum()

    def lower(x: Tensor, w: Tensor, *, batch: Rows) -> Tensor:
        return _loss(w, batch) + 0.5 * (torch.exp(x)[:, None] * w**2).sum()

    x0 = torch.full((fit["features"].shape[1],), START, dtype=dtype, device=device)
    w0 = x0.new_zeros(len(x0), data.n_classes or 0)

    def report(solution: Solution, folder: Path) -> Report:
        common = minimize(lambda w: lower(x0, w, batch=fit), w0, LBFGS(rtol=1e-6, max_steps=300)).point
        return _report(solution, folder, held, common, PIXELS.get(data.name))

    return Case(
        name="logistic_penalties",
        problem=BilevelProblem(
            counter.watch("upper", upper),
            counter.watch("lower", lower),
            upper_data=Batches(held, batch_size),
            lower_data=Batches(fit, batch_size),
            metrics={"accuracy": lambda x, w: _accuracy(w, held)},
            name="logistic_penalties",
        ),
        start=(x0, w0),
        source=data.source,
        max_steps=None if batch_size else 300,
        report=report,
        counter=counter,
    )


def _rows(data: Dataset, train: int | None, seed: int) -> tuple[Rows, Rows]:
    """Training and validation rows."""
    if data.n_classes is None:
        raise ValueError(f"dataset={data.name!r} is a regression set; logistic_penalties needs classes, such as digits")
    n = data.n_samples
    count = (1000 if n >= 1500 else n // 2) if train is None else train
    if not 0 < count < n:
        raise ValueError(f"train must be in 1..{n - 1} for the {n} rows of {data.name}, got {count}")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    features, targets = data.features[order], data.targets[order]
    fit, held = features[:count], features[count:]
    if data.name not in PIXELS:
        fit, held = (torch.cat([part, torch.ones_like(part[:, :1])], dim=1) for part in standardize(fit, held))
    return {"features": fit, "targets": targets[:count]}, {"features": held, "targets": targets[count:]}


def _place(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)


def _loss(w: Tensor, rows: Rows) -> Tensor:
    return cross_entropy(rows["features"] @ w, rows["targets"])


def _accuracy(w: Tensor, rows: Rows) -> Tensor:
    return ((rows["features"] @ w).argmax(dim=1) == rows["targets"]).double().mean()


def _report(solution: Solution, folder: Path, held: Rows, common: Tensor, image: tuple[int, int] | None) -> Report:
    penalties, w = solution.x.detach().cpu(), solution.y.detach()
    metrics = {
        "start_accuracy": float(_accuracy(common, held)),
        "start_cross_entropy": float(_loss(common, held)),
        "accuracy": float(_accuracy(w, held)),
        "cross_entropy": float(_loss(w, held)),
        "smallest_log_penalty": float(penalties.min()),
        "largest_log_penalty": float(penalties.max()),
    }
    low, high = int(penalties.argmin()), int(penalties.argmax())
    text = "\n".join(
        (
            f"{'validation rows':<42}{'accuracy':>9}{'cross-entropy':>15}",
            f"{f'every log-penalty at the start, {START:g}':<42}"
            f"{metrics['start_accuracy']:>9.4f}{metrics['start_cross_entropy']:>15.4f}",
            f"{'log-penalties learned':<42}{metrics['accuracy']:>9.4f}{metrics['cross_entropy']:>15.4f}",
            f"smallest log-penalty {float(penalties[low]):.3f} (feature {low}), "
            f"largest {float(penalties[high]):.3f} (feature {high})",
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "penalties.csv", folder / "penalties.png"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("feature", "log_penalty", "weight_norm"))
        norms = torch.linalg.vector_norm(w, dim=1).tolist()
        writer.writerows((j, p, n) for j, (p, n) in enumerate(zip(penalties.tolist(), norms, strict=True)))
    _draw(penalties, image, picture)
    return Report(text, metrics, [table, picture])


def _draw(penalties: Tensor, image: tuple[int, int] | None, path: Path) -> None:
    """A heat map where the features are pixels, else bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 4.2) if image else (8.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    if image:
        drawn = axes.imshow(penalties.reshape(image).numpy(), cmap="viridis")
        figure.colorbar(drawn, ax=axes, label="log-penalty")
        axes.set(title="Log-penalty of each pixel", xticks=[], yticks=[])
    else:
        axes.bar(range(len(penalties)), penalties.numpy())
        axes.axhline(START, color="black", linewidth=0.8, label="start")
        axes.set(title="Log-penalty of each feature", xlabel="feature", ylabel="log-penalty")
        axes.legend()
    figure.savefig(path, dpi=120)
