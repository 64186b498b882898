"""Linear support vector machines with one penalty per training example, tuned on validation rows.

The lower level is the machine with squared slacks written as a quadratic program, so that its constraints are coupled
to nothing but its own variables, while the upper level moves their prices:

    min over w, b, s of  |w|²/2 + sum_i exp(x_i) s_i²/2    subject to    1 - s_i - l_i (a_i'w + b) <= 0

with labels l_i in {-1, 1}. The intercept b is not penalised and needs no term of its own: wherever some slack is
positive, as always between overlapping classes, its constraint fixes b. The upper level is a smooth version of the
validation loss of S. Xu, M. Zhu, "Efficient gradient approximation method for constrained bilevel optimization", AAAI
2023, and of the experiments with the proximal Lagrangian value function (ICLR 2024): with the signed distance m of a
validation point from the hyperplane, t = 2 sigmoid(-5 m) - 1 runs from -1 (right) to 1 (wrong), and the loss is t where
it is positive and t/100 elsewhere; here the kink at zero is rounded by a softplus of width 1/20, since minimizers are
drawn to kinks, where no gradient method stops.

With as many hyperparameters as training rows, the validation loss can be fitted closely, and accuracy on other rows
need not gain: the report states both.
"""

import csv
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bilevel import BilevelProblem, Solution
from constrained import Box
from problems.case import Case, OracleCounter, Report
from problems.datasets import load
from problems.registry import register
from problems.two_classes import LabelledRows, Parts, divide

BOUNDS = (-6.0, 2.0)
"""Of every x_i: from a machine that hardly looks at an example to one that hardly tolerates its slack."""
START = -2.0
SPLITS = {"diabetes_scaled": (500, 150), "german_numer_scaled": (500, 250)}
"""Training and validation rows; the others are for testing."""
SLOPE, SHARPNESS, STEEPNESS = 0.01, 20.0, 5.0

Machine = dict[str, Tensor]


class Rows(LabelledRows):
    """Rows that a machine ``{"w": (d,), "b": ()}`` separates."""

    def margins(self, y: Machine) -> Tensor:
        """``l_i (a_i'w + b)``."""
        return self.labels * (self.features @ y["w"] + y["b"])

    def loss(self, y: Machine) -> Tensor:
        """The smooth validation loss of the module's description, averaged."""
        # The shift keeps the gradient finite for w = 0 and is below rounding elsewhere.
        distance = self.margins(y) / torch.sqrt((y["w"] ** 2).sum() + 1e-12)
        t = 2 * torch.sigmoid(-STEEPNESS * distance) - 1
        return (SLOPE * t + (1 - SLOPE) * softplus(SHARPNESS * t) / SHARPNESS).mean()

    def accuracy(self, y: Machine) -> float:
        """The share of rows on their side of the hyperplane."""
        return float((self.margins(y) > 0).double().mean())


@register(
    "svm_penalties",
    "linear SVM on the diabetes data, one penalty per example",
    "real-data",
    "constraints",
    "upper-set",
    "external-data",
)
def svm_penalties(
    *,
    dataset: str = "diabetes_scaled",
    data_dir: str | None = None,
    train: int | None = None,
    valid: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Case:
    """The machine of the module's description; x is ``(train,)`` in [-6, 2], y = {w, b, slack}.

    Both levels start at the machine with x_i = -2 for every example.

    Args:
        dataset: any two-class set of ``problems.datasets``. Sets whose name ends in ``_scaled`` are used as they are,
            others standardized.
        data_dir: where its files are, if it is not a bundled one.
        train: training rows; None means 500 for the sets diabetes_scaled and german_numer_scaled, half of others.
        valid: validation rows, 150 and 250, or a quarter; the remaining rows are for testing.
        seed: permutes the rows.
        dtype: of the data and the variables.
        device: of the data and the variables.

    Raises:
        ValueError: for a set without two classes, or parts that need more rows than there are.
    """
    parts = read(dataset, data_dir=data_dir, train=train, valid=valid, seed=seed, dtype=dtype, device=device)
    return _build("svm_penalties", parts)


@register(
    "svm_penalties_german",
    "the same on the German credit data",
    "real-data",
    "constraints",
    "upper-set",
    "external-data",
)
def svm_penalties_german(
    *, data_dir: str | None = None, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Case:
    """``svm_penalties`` with 500, 250 and 250 of the 1000 rows with 24 features of ``german_numer_scaled``."""
    parts = read("german_numer_scaled", data_dir=data_dir, seed=seed, dtype=dtype, device=device)
    return _build("svm_penalties_german", parts)


def _build(name: str, parts: Parts[Rows]) -> Case:
    x0 = torch.full_like(parts.train.labels, START)
    counter = OracleCounter()

    def upper(x: Tensor, y: Machine) -> Tensor:
        return parts.valid.loss(y)

    def lower(x: Tensor, y: Machine) -> Tensor:
        return 0.5 * (y["w"] ** 2).sum() + 0.5 * (torch.exp(x) * y["slack"] ** 2).sum()

    def report(solution: Solution, folder: Path) -> Report:
        return _report(parts, solution, folder)

    return Case(
        name=name,
        problem=BilevelProblem(
            counter.watch("upper", upper),
            counter.watch("lower", lower),
            upper_set=Box(*BOUNDS),
            lower_inequality=lambda x, y: 1 - y["slack"] - parts.train.margins(y),
            metrics={
                "validation_accuracy": lambda x, y: parts.valid.accuracy(y),
                "test_accuracy": lambda x, y: parts.test.accuracy(y),
            },
            name=name,
        ),
        start=(x0, fit(parts.train, x0)),
        source=parts.data.source,
        lower_class="convex",
        report=report,
        counter=counter,
    )


def read(
    dataset: str,
    *,
    data_dir: str | None = None,
    train: int | None = None,
    valid: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Parts[Rows]:
    """The three parts of a data set; arguments as for :func:`svm_penalties`.

    Raises:
        ValueError: for a set without two classes, or parts that need more rows than there are.
    """
    data = load(dataset, data_dir=data_dir)
    usual = SPLITS.get(data.name, (data.n_samples // 2, data.n_samples // 4))
    sizes = usual[0] if train is None else train, usual[1] if valid is None else valid
    scale = not data.name.endswith("_scaled")
    return divide(data, Rows, sizes, scale=scale, seed=seed, dtype=dtype, device=device)


def fit(train: Rows, x: Tensor) -> Machine:
    """The machine for the log-penalties x, by Newton's method on the loss without slacks, to rounding.

    With the slacks eliminated, |w|²/2 + sum_i exp(x_i) max(0, 1 - margin_i)²/2 has d + 1 variables, and its gradient is
    piecewise linear. Rounding is relative to the largest that the terms of the gradient add up to at zero, where all
    slacks are one.

    Raises:
        RuntimeError: if the gradient does not fall to rounding.
    """
    signed = train.labels[:, None] * torch.nn.functional.pad(train.features, (0, 1), value=1.0)  # (n, d + 1)
    ridge = torch.ones_like(signed[0])
    ridge[-1] = 0.0
    weights = torch.exp(x)

    def value(v: Tensor) -> Tensor:
        return 0.5 * (ridge * v**2).sum() + 0.5 * (weights * (1 - signed @ v).clamp(min=0) ** 2).sum()

    def derivative(v: Tensor) -> tuple[Tensor, Tensor]:
        slack = (1 - signed @ v).clamp(min=0)
        return slack, ridge * v - signed.T @ (weights * slack)

    v = torch.zeros_like(ridge)
    slack, slope = derivative(v)
    rounding = 100 * torch.finfo(v.dtype).eps
    tolerance = rounding * float((signed.abs().T @ weights).max())
    for _ in range(100):
        if float(slope.abs().max()) <= tolerance:
            return {"w": v[:-1], "b": v[-1], "slack": slack}
        active = weights * (slack > 0)
        step = torch.linalg.solve(torch.diag(ridge) + signed.T @ (active[:, None] * signed), slope)
        size, before, decrease = 1.0, value(v), float(slope @ step)
        # Values that rounding makes equal are no reason to shorten a step: the slope has half as many digits to go.
        while float(value(v - size * step) - before) > rounding * float(before) - 1e-4 * size * decrease:
            size *= 0.5
        v = v - size * step
        slack, slope = derivative(v)
    raise RuntimeError(f"the machine was not found: its gradient is {float(slope.abs().max()):.3g}")


def _report(parts: Parts[Rows], solution: Solution, folder: Path) -> Report:
    grid = torch.linspace(*BOUNDS, 17).tolist()
    machines = {c: fit(parts.train, torch.full_like(parts.train.labels, c)) for c in (START, *grid)}
    common = min(grid, key=lambda c: float(parts.valid.loss(machines[c])))
    lines = {
        "start": (f"every log-penalty {START:g}", machines[START]),
        "common": (f"best common log-penalty, {common:g}", machines[common]),
        "learned": ("one learned for each example", solution.y),
    }
    metrics = {}
    text = [f"{'':<36}{'validation loss':>16}{'accuracy':>10}{'test accuracy':>15}"]
    for key, (label, machine) in lines.items():
        numbers = float(parts.valid.loss(machine)), parts.valid.accuracy(machine), parts.test.accuracy(machine)
        text.append(f"{label:<36}{numbers[0]:>16.5f}{numbers[1]:>10.4f}{numbers[2]:>15.4f}")
        names = f"{key}_validation_loss", f"{key}_validation_accuracy", f"{key}_test_accuracy"
        metrics |= dict(zip(names, numbers, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "penalties.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("example", "label", "log_penalty", "slack"))
        columns = (parts.train.labels, solution.x, solution.y["slack"])
        writer.writerows(zip(range(len(columns[0])), *(c.detach().cpu().tolist() for c in columns), strict=True))
    return Report("\n".join(text), metrics, [table])
