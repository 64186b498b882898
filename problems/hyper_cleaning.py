"""Data hyper-cleaning: one weight per training example, learned from a small clean set, finds the wrong labels.

The lower level fits a softmax classifier to weighted examples, some of them mislabelled on purpose; the upper level
asks how well that classifier does on clean examples. Since only examples with a right label help there, wrong labels
lose their weight. The setting is that of Franceschi et al. 2017, "Forward and reverse gradient-based hyperparameter
optimization", section 5.1.
"""

import csv
import functools
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bilevel import Accuracy, Batches, BilevelProblem, Solution
from implicit import NewtonCG, Status, minimize, tree
from implicit.derivatives import value_and_gradient
from implicit.tree import Tree
from problems import datasets
from problems.case import Case, OracleCounter, Report
from problems.registry import register

BIAS_RIDGE = 1e-6  # makes the lower problem strongly convex in the bias too, too small to matter otherwise
FIT_RTOL = 1e-5  # of the classifiers that are compared, on the gradient norm relative to that at zero
FOLDS = 5  # of the cross-validation on the clean rows
SCALINGS = ("feature", "global", "none")


@dataclass(frozen=True)
class _Settings:
    """What a case is built with; the defaults suit a set of some thousand rows. ``train`` and ``clean`` below 1 are
    shares of the rows. ``grid``: ridges tried for the classifiers to compare with, as the exponents of the weakest and
    the strongest and their number."""

    train: float = 0.6
    clean: float = 0.1
    corruption: float = 0.4
    ridge: float = 0.04
    prior: float = 0.3
    scaling: str = "feature"
    dtype: torch.dtype = torch.float64
    grid: tuple[float, float, int] = (-5.0, 1.0, 13)
    max_steps: int = 60


_DEFAULTS = {
    "digits": _Settings(train=1_000, clean=100, scaling="global"),
    "mnist": _Settings(
        train=20_000,
        clean=5_000,
        corruption=0.5,
        ridge=0.06,
        prior=0.01,
        dtype=torch.float32,
        grid=(-2.5, 0.0, 6),
        max_steps=8,
    ),
}


@dataclass(frozen=True, eq=False)
class _Rows:
    """Features ``(n, d)`` and labels ``(n,)``."""

    features: Tensor
    labels: Tensor

    def part(self, keep: Tensor) -> "_Rows":
        return _Rows(self.features[keep], self.labels[keep])


@dataclass(frozen=True, eq=False)
class _Cleaning:
    """The data and both objectives; ``train.labels`` are the given labels, partly ``wrong``."""

    data: datasets.Dataset
    train: _Rows
    rows: Tensor  # (n,) of the training examples in the data set
    true_labels: Tensor  # (n,)
    wrong: Tensor  # (n,) bool
    clean: _Rows
    test: _Rows
    settings: _Settings

    @property
    def zero(self) -> dict[str, Tensor]:
        """The classifier that knows nothing."""
        shape = self.data.n_features, self.data.n_classes or 0
        return {
            "weight": self.train.features.new_zeros(shape),
            "bias": self.train.features.new_zeros(shape[1]),
        }

    def lower(self, x: Tensor, y: Tree) -> Tensor:
        """The weighted training loss plus ridge on all rows."""
        return _training_loss(y, self.train, _weights(x), self.settings.ridge)

    def lower_on(self, x: Tensor, y: Tree, *, batch: dict[str, Tensor]) -> Tensor:
        """The same on some rows."""
        rows = _Rows(batch["features"], batch["labels"])
        return _training_loss(y, rows, _weights(x[batch["index"]]), self.settings.ridge)

    def upper(self, x: Tensor, y: Tree) -> Tensor:
        """The clean loss plus prior on all rows."""
        return _mean_loss(y, self.clean) + 0.5 * self.settings.prior * (x**2).mean()

    def upper_on(self, x: Tensor, y: Tree, *, batch: dict[str, Tensor]) -> Tensor:
        """The same on some rows."""
        return _mean_loss(y, _Rows(**batch)) + 0.5 * self.settings.prior * (x**2).mean()

    def auc(self, x: Tensor) -> float:
        """Area under the ROC curve of ``1 - weight`` against the wrong labels."""
        from sklearn.metrics import roc_auc_score  # slow to import, needed for the record only

        return float(roc_auc_score(self.wrong.cpu().numpy(), -x.detach().cpu().numpy()))

    def ridges(self) -> list[float]:
        """The grid, strongest first: the order in which a fit is the best start for the next."""
        low, high, count = self.settings.grid
        return [float(r) for r in np.logspace(high, low, count)]


def _weights(x: Tensor) -> Tensor:
    """Between 0 and 2; 1 at x = 0, which is training as usual."""
    return 2.0 * torch.sigmoid(x)


def _logits(y: Tree, features: Tensor) -> Tensor:
    return torch.addmm(y["bias"], features, y["weight"])


def _mean_loss(y: Tree, rows: _Rows) -> Tensor:
    return functional.cross_entropy(_logits(y, rows.features), rows.labels)


def _training_loss(y: Tree, rows: _Rows, weights: Tensor, ridge: float) -> Tensor:
    losses = functional.cross_entropy(_logits(y, rows.features), rows.labels, reduction="none")
    shrink = ridge * (y["weight"] ** 2).sum() + BIAS_RIDGE * (y["bias"] ** 2).sum()
    return (weights * losses).mean() + 0.5 * shrink


def _accuracy(y: Tree, rows: _Rows) -> float:
    return float((_logits(y, rows.features).argmax(dim=1) == rows.labels).double().mean())


@register("hyper_cleaning", "finds wrong labels in real data: one learned weight per example", "real-data")
def hyper_cleaning(
    *,
    dataset: str = "digits",
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    train: int | None = None,
    clean: int | None = None,
    corruption: float | None = None,
    ridge: float | None = None,
    prior: float | None = None,
    scaling: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
) -> Case:
    """g = mean_i w_i CE_i(y) + ridge |weight|²/2 with w_i = 2 sigmoid(x_i), f = mean clean CE(y) + prior mean_i x_i²/2.

    x has one entry per training example; y = {"weight": (d, k), "bias": (k,)} is a softmax classifier (its bias
    carries a ridge of 1e-6). The run starts at zero, where every weight is 1: training as usual.

    Args:
        dataset: any classification set of ``problems.datasets``.
        data_dir: folder with its files; see ``problems.datasets.load``.
        seed: draws the training and clean rows, and which labels are made wrong.
        train, clean: numbers of rows; the rest, or the official test part where there is one, is for testing only.
            Defaults: 1,000 and 100 on digits, 20,000 and 5,000 on MNIST, else 60 % and 10 % of the rows.
        corruption: share of training labels replaced by another class; 0.5 on MNIST, else 0.4.
        ridge: of the lower level; 0.06 on MNIST, else 0.04.
        prior: pulls the weights towards 1 at the upper level; 0.01 on MNIST, else 0.3.
        scaling: ``"feature"`` centres every feature and divides it by its deviation, ``"global"`` centres and divides
            all by one number (so that pixels that are nearly constant stay small), ``"none"``. Statistics come from
            the training rows. Default: ``"global"`` on digits, else ``"feature"``.
        dtype: float32 on MNIST, else float64.
        device: of data and start.
        batch_size: rows per minibatch, at both levels; None means all rows at every step.

    Returns:
        The case; its ``report`` compares the classifier with four others, and writes ``weights.csv`` and
        ``weights.png``.

    Raises:
        TypeError: a ``dtype`` that is not floating point.
        ValueError: a setting out of range, or a regression set; the message names it and the cure.
        MissingDataError: the files of the data set are not there.
    """
    given = {
        "train": train,
        "clean": clean,
        "corruption": corruption,
        "ridge": ridge,
        "prior": prior,
        "scaling": scaling,
        "dtype": dtype,
    }
    defaults = _DEFAULTS.get(dataset.lower(), _Settings())
    settings = replace(defaults, **{name: value for name, value in given.items() if value is not None})
    _check(settings, seed, batch_size, given)
    data = datasets.load(dataset, data_dir=data_dir, dtype=settings.dtype)
    cleaning = _prepare(data, settings, seed, device)
    n_train = len(cleaning.rows)
    counter = OracleCounter()
    upper, lower, upper_data, lower_data = cleaning.upper, cleaning.lower, None, None
    if batch_size is not None:
        upper, lower = cleaning.upper_on, cleaning.lower_on
        index = torch.arange(n_train, device=device)
        upper_data = Batches(_as_batch(cleaning.clean), batch_size)
        lower_data = Batches({**_as_batch(cleaning.train), "index": index}, batch_size)
    problem = BilevelProblem(
        counter.watch("upper", upper),
        counter.watch("lower", lower),
        upper_data=upper_data,
        lower_data=lower_data,
        metrics={
            "auc": lambda x, y: cleaning.auc(x),
            "clean_accuracy": lambda x, y: _accuracy(y, cleaning.clean),
            "test_accuracy": lambda x, y: _accuracy(y, cleaning.test),
        },
        name="hyper_cleaning",
    )
    return Case(
        name="hyper_cleaning",
        problem=problem,
        start=(cleaning.train.features.new_zeros(n_train), cleaning.zero),
        source=f"{data.source}; {int(cleaning.wrong.sum())} of {n_train} labels replaced by another class",
        max_steps=None if problem.stochastic else settings.max_steps,
        report=functools.partial(_report, cleaning),
        counter=counter,
    )


def _as_batch(rows: _Rows) -> dict[str, Tensor]:
    return {"features": rows.features, "labels": rows.labels}


def _check(settings: _Settings, seed: int, batch_size: int | None, given: dict[str, Any]) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    for name in ("train", "clean"):
        rows = given[name]
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < FOLDS):
            raise ValueError(f"{name} must be a number of rows, at least {FOLDS}, got {rows!r}")
    if not 0.0 < settings.corruption < 1.0:
        raise ValueError(f"corruption is the share of wrong labels, above 0 and below 1; got {settings.corruption}")
    if not 0.0 < settings.ridge < math.inf:
        raise ValueError(f"ridge must be positive, or the lower level has no unique solution; got {settings.ridge}")
    if not 0.0 <= settings.prior < math.inf:
        raise ValueError(f"prior must be positive, or zero for none; got {settings.prior}")
    if settings.scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}; got {settings.scaling!r}")
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer, or None for all rows; got {batch_size!r}")


def _prepare(data: datasets.Dataset, settings: _Settings, seed: int, device: str) -> _Cleaning:
    if data.n_classes is None:
        raise ValueError(f"dataset must have classes; {data.name!r} is a regression set. Take digits, for example")
    n_train, n_clean = (int(size if size >= 1 else size * data.n_samples) for size in (settings.train, settings.clean))
    wanted, official = n_train + n_clean, data.test_features is not None
    if wanted > data.n_samples - (not official):
        rest = "" if official else ", and testing needs the rest"
        raise ValueError(
            f"train + clean asks for {n_train} + {n_clean} = {wanted} rows, but {data.name} has {data.n_samples}"
            f"{rest}; lower train or clean"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(data.n_samples, generator=generator)
    rows, clean_rows, others = order[:n_train], order[n_train:wanted], order[wanted:]
    true_labels = data.targets[rows]
    labels, wrong = datasets.corrupt_labels(true_labels, data.n_classes, settings.corruption, generator)
    if not 0 < int(wrong.sum()) < n_train:
        raise ValueError(f"corruption {settings.corruption} of {n_train} rows leaves no right or no wrong label")
    if data.test_features is not None and data.test_targets is not None:
        test = _Rows(data.test_features, data.test_targets)
    else:
        test = _Rows(data.features[others], data.targets[others])
    parts = _scale(settings.scaling, data.features[rows], data.features[clean_rows], test.features)
    train_features, clean_features, test_features = (part.to(device) for part in parts)
    return _Cleaning(
        data=data,
        train=_Rows(train_features, labels.to(device)),
        rows=rows,
        true_labels=true_labels.to(device),
        wrong=wrong.to(device),
        clean=_Rows(clean_features, data.targets[clean_rows].to(device)),
        test=_Rows(test_features, test.labels.to(device)),
        settings=settings,
    )


def _scale(scaling: str, train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    if scaling == "feature":
        return datasets.standardize(train, *others)
    if scaling == "none":
        return (train, *others)
    mean = train.mean(dim=0)
    size = float(((train - mean) ** 2).mean()) ** 0.5
    if size == 0.0:
        raise ValueError("scaling 'global' needs features that vary among the training rows; take 'none'")
    return tuple((part - mean) / size for part in (train, *others))


@dataclass(frozen=True)
class _Fit:
    """A trained classifier, the ridge it was trained with, and whether its tolerance was reached."""

    y: Tree
    ridge: float
    converged: bool


def _fit(rows: _Rows, weights: Tensor, ridge: float, y: Tree) -> _Fit:
    """The lower problem for fixed weights, started from ``y``."""

    def loss(q: Tree) -> Tensor:
        return _training_loss(q, rows, weights, ridge)

    # The tolerance refers to the gradient at zero: little of it is left at a good start.
    _, gradient = value_and_gradient(loss, tree.zeros_like(y))
    found = minimize(loss, y, NewtonCG(rtol=0.0, atol=FIT_RTOL * float(tree.norm(gradient))))
    return _Fit(found.point, ridge, found.status is Status.CONVERGED)


def _path(rows: _Rows, ridges: Iterable[float], y: Tree) -> list[_Fit]:
    """Equal weights; one fit per ridge, each started from the one before."""
    ones, fits = torch.ones_like(rows.features[:, 0]), []
    for ridge in ridges:
        fits.append(_fit(rows, ones, ridge, y))
        y = fits[-1].y
    return fits


def _best(scores: list[tuple[float, float]]) -> int:
    """Index of the highest accuracy; ties go to the lowest loss."""
    return max(range(len(scores)), key=lambda i: (scores[i][0], -scores[i][1]))


def _tuned(cleaning: _Cleaning, rows: _Rows) -> _Fit:
    """Equal weights, with the ridge that does best on the clean rows."""
    fits = _path(rows, cleaning.ridges(), cleaning.zero)
    return fits[_best([(_accuracy(f.y, cleaning.clean), float(_mean_loss(f.y, cleaning.clean))) for f in fits])]


def _clean_only(cleaning: _Cleaning) -> _Fit:
    """The clean rows alone, with the ridge that does best in cross-validation."""
    ridges, clean = cleaning.ridges(), cleaning.clean
    fold = torch.arange(len(clean.labels), device=clean.labels.device) % FOLDS
    right, loss = [0.0] * len(ridges), [0.0] * len(ridges)
    for k in range(FOLDS):
        held_out = clean.part(fold == k)
        for i, fit in enumerate(_path(clean.part(fold != k), ridges, cleaning.zero)):
            right[i] += round(_accuracy(fit.y, held_out) * len(held_out.labels))
            loss[i] += float(_mean_loss(fit.y, held_out)) * len(held_out.labels)
    best = _best(list(zip(right, loss, strict=True)))
    return _path(clean, ridges[: best + 1], cleaning.zero)[best]


def _report(cleaning: _Cleaning, solution: Solution, directory: Path) -> Report:
    """Train the baselines, and write ``weights.csv`` and ``weights.png``."""
    weights, right = _weights(solution.x), ~cleaning.wrong
    ideal = right.to(weights.dtype)
    fits = {
        "all_labels": _tuned(cleaning, cleaning.train),
        "clean_only": _clean_only(cleaning),
        "learned": _fit(cleaning.train, weights, cleaning.settings.ridge, solution.y),
        "right_labels": _fit(cleaning.train, ideal, cleaning.settings.ridge, solution.y),
        "right_labels_tuned": _tuned(cleaning, cleaning.train.part(right)),
    }
    metrics = {
        "auc": cleaning.auc(solution.x),
        "mean_weight_right": float(weights[right].mean()),
        "mean_weight_wrong": float(weights[cleaning.wrong].mean()),
        **{f"accuracy_{name}": _accuracy(fit.y, cleaning.test) for name, fit in fits.items()},
        **{f"ridge_{name}": fit.ridge for name, fit in fits.items()},
    }
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / "weights.csv", directory / "weights.png"]
    _write_table(cleaning, weights, files[0])
    _draw(cleaning, weights, metrics["auc"], files[1])
    text = _text(cleaning, metrics, solution.accuracy, [ROWS[n][0] for n, f in fits.items() if not f.converged])
    return Report(text, metrics, files)


ROWS = {
    "all_labels": ("all labels, wrong ones too", "chosen on the clean rows"),
    "clean_only": ("the clean rows alone", f"chosen by {FOLDS}-fold cross-validation"),
    "learned": ("all labels, learned weights", "that of the lower level"),
    "right_labels": ("only the right labels", "that of the lower level"),
    "right_labels_tuned": ("only the right labels", "chosen on the clean rows"),
}


def _text(cleaning: _Cleaning, metrics: dict[str, float], accuracy: Accuracy, unfinished: list[str]) -> str:
    n, wrong = len(cleaning.rows), int(cleaning.wrong.sum())
    lines = [
        f"Data hyper-cleaning on {cleaning.data.name}: {n} training rows, {wrong} of them with a wrong label; "
        f"{len(cleaning.clean.labels)} clean rows; {len(cleaning.test.labels)} rows for testing only.",
        "",
        f"{'A linear classifier trained on':<31}{'test accuracy':>13}{'ridge':>10}  ridge is",
    ]
    for name, (what, how) in ROWS.items():
        lines.append(f"{what:<31}{metrics[f'accuracy_{name}']:>13.4f}{metrics[f'ridge_{name}']:>10.3g}  {how}")
    lines += [
        "",
        f"Weights against wrong labels: ROC AUC {metrics['auc']:.4f} (1 tells all apart, 0.5 is chance); mean weight "
        f"{metrics['mean_weight_right']:.3f} of right labels, {metrics['mean_weight_wrong']:.3f} of wrong ones.",
        f"Accuracy of the solution: stationarity {_number(accuracy.stationarity)}, hypergradient error "
        f"{_number(accuracy.hypergradient_error)} ({accuracy.hypergradient_error_kind or 'not measured'}), distance of "
        f"x to the nearest solution {_number(accuracy.distance)}.",
    ]
    if unfinished:
        lines.append(f"Trained to less than the tolerance {FIT_RTOL:g}: {', '.join(unfinished)}.")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"


def _write_table(cleaning: _Cleaning, weights: Tensor, path: Path) -> None:
    columns = (cleaning.rows, cleaning.train.labels, cleaning.true_labels, cleaning.wrong.long(), weights)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "given_label", "true_label", "wrong", "weight"])
        writer.writerows(zip(*(column.tolist() for column in columns), strict=True))


def _draw(cleaning: _Cleaning, weights: Tensor, auc: float, path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import; a Figure by itself leaves pyplot and its backend alone

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    bins = np.linspace(0.0, 2.0, 41).tolist()
    for name, rows, color in (("right", ~cleaning.wrong, "tab:blue"), ("wrong", cleaning.wrong, "tab:red")):
        label = f"{name} label ({int(rows.sum())} rows)"
        axes.hist(weights[rows].cpu().numpy(), bins=bins, alpha=0.6, color=color, label=label)
    axes.set_title(f"Learned weights on {cleaning.data.name}: ROC AUC {auc:.3f} against wrong labels")
    axes.set_xlabel("weight of the training example (1 is training as usual)")
    axes.set_ylabel("training examples")
    axes.legend()
    figure.savefig(path, dpi=150)
