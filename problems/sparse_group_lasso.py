"""Sparse group lasso with one penalty per group and one per feature, tuned on validation rows.

The lower level is logistic regression on the breast-cancer data, whose 30 features are ten measurements of cell nuclei,
each with its mean, standard error and worst value: ten groups of three. With weights v and intercept b it minimizes

    mean logistic loss + sum_g exp(x_g) |v_g| + sum_j exp(x_j) |v_j|,

which is not differentiable. As a smooth problem with constraints it has two more variables, sizes t_g and bounds s_j,

    mean logistic loss + sum_g exp(x_g) t_g + sum_j exp(x_j) s_j
    subject to    -s_j <= v_j <= s_j    and    (|v_g|² + tip²)^(1/2) <= t_g,

where the cones |v_g| <= t_g are rounded at their tips, the points of groups that are left out. All rows are convex in
(x, y), finite everywhere, and free of x. The rounding adds at most ``tip sum_g exp(x_g)`` to the objective.

After L. Gao, J. Ye, H. Yin, S. Zeng, J. Zhang, "Value function based difference-of-convex algorithm for bilevel
hyperparameter selection problems", ICML 2022, and W. Yao, H. Yin, S. Zeng, J. Zhang, "Overcoming lower-level
constraints in bilevel optimization", 2024, who bound the norms instead of pricing them.
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

BOUNDS = (-9.0, -1.0)
"""Of every log-penalty; at the upper end of all nothing is left but the intercept."""
START = -5.0
GROUPS, MEMBERS = 10, 3  # feature j belongs to group j mod 10
SIZES = (250, 150)
USED = 1e-3  # weights and norms below this count as left out

Penalties = dict[str, Tensor]


class Rows(LabelledRows):
    """Rows that ``{"weight": (30,), "intercept": ()}`` score."""

    def loss(self, y: dict[str, Tensor]) -> Tensor:
        """Mean logistic loss of ``{"weight": (..., 30), "intercept": (...,)}``, over the last axis."""
        scores = y["weight"] @ self.features.T + y["intercept"][..., None]
        return softplus(-self.labels * scores).mean(dim=-1)

    def accuracy(self, y: dict[str, Tensor]) -> float:
        """The share of labels that the sign of the score tells."""
        scores = self.features @ y["weight"] + y["intercept"]
        return float((self.labels * scores > 0).double().mean())


@register(
    "sparse_group_lasso",
    "logistic regression, one penalty per group and per feature",
    "real-data",
    "constraints",
    "upper-set",
)
def sparse_group_lasso(
    *, tip: float = 1e-3, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Case:
    """The problem of the module's description, with x = {group (10,), feature (30,)} in [-9, -1].

    y = {weight (30,), intercept (), size (10,), bound (30,)}. Both levels start at x = -5.

    Args:
        tip: positive; the radius within which a group's norm is rounded.
        seed: draws 250 rows for training, 150 for validation and 169 for testing.
        dtype: of the data and the variables.
        device: of the data and the variables.

    Raises:
        ValueError: if ``tip`` is not positive.
    """
    if not tip > 0:
        raise ValueError(f"tip must be positive, got {tip}: without it a group's norm has a kink at zero")
    parts = read(seed=seed, dtype=dtype, device=device)
    like = parts.train.features
    x0 = {"group": like.new_full((GROUPS,), START), "feature": like.new_full((GROUPS * MEMBERS,), START)}
    counter = OracleCounter()

    def lower(x: Penalties, y: dict[str, Tensor]) -> Tensor:
        prices = (torch.exp(x["group"]) * y["size"]).sum() + (torch.exp(x["feature"]) * y["bound"]).sum()
        return parts.train.loss(y) + prices

    def rows(x: Penalties, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "above": y["weight"] - y["bound"],
            "below": -y["weight"] - y["bound"],
            "size": torch.sqrt(_squares(y["weight"]) + tip**2) - y["size"],
        }

    return Case(
        name="sparse_group_lasso",
        problem=BilevelProblem(
            counter.watch("upper", lambda x, y: parts.valid.loss(y)),
            counter.watch("lower", lower),
            upper_set=Box(*BOUNDS),
            lower_inequality=rows,
            metrics={
                "validation_accuracy": lambda x, y: parts.valid.accuracy(y),
                "test_accuracy": lambda x, y: parts.test.accuracy(y),
                "groups": lambda x, y: _used(y["weight"])[0],
                "features": lambda x, y: _used(y["weight"])[1],
            },
            name="sparse_group_lasso",
        ),
        start=(x0, complete(fit(parts.train, x0), tip)),
        source=parts.data.source,
        lower_class="convex",
        report=lambda solution, folder: _report(parts, solution, folder),
        counter=counter,
    )


def read(*, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Parts[Rows]:
    """The three parts of the breast-cancer data, standardized by the training rows."""
    return divide(load("breast_cancer"), Rows, SIZES, seed=seed, dtype=dtype, device=device)


def complete(y: dict[str, Tensor], tip: float) -> dict[str, Tensor]:
    """Weights and intercept with the least sizes and bounds that the constraints admit."""
    return {**y, "size": torch.sqrt(_squares(y["weight"]) + tip**2), "bound": y["weight"].abs()}


def fit(train: Rows, x: Penalties, max_steps: int = 20_000) -> dict[str, Tensor]:
    """Weights and intercept for the penalties x, by accelerated proximal gradients on the problem without rounding.

    The proximal map of both norms together shrinks every weight and then every group. x may have one more axis in
    front; all are fitted at once.

    Raises:
        RuntimeError: if the steps do not become small within ``max_steps``.

    References:
        N. Simon, J. Friedman, T. Hastie, R. Tibshirani, "A sparse-group lasso", J. Comput. Graph. Stat. 22(2), 2013.
        B. O'Donoghue, E. Candes, "Adaptive restart for accelerated gradient schemes", Found. Comput. Math. 15, 2015.
    """
    design = torch.nn.functional.pad(train.features, (0, 1), value=1.0)
    step = 4.0 * len(design) / float(torch.linalg.matrix_norm(design, ord=2) ** 2)
    group, feature = torch.exp(x["group"]), torch.exp(x["feature"])
    point = ahead = design.new_zeros(*feature.shape[:-1], design.shape[1])
    momentum = design.new_ones(*feature.shape[:-1], 1)
    tolerance = float(torch.finfo(design.dtype).eps) ** 0.65  # 7e-11 in float64
    for _ in range(max_steps):
        pull = train.labels * torch.sigmoid(-train.labels * (ahead @ design.T))
        moved = ahead + step / len(design) * (pull @ design)
        weight = (moved[..., :-1].abs() - step * feature).clamp(min=0) * moved[..., :-1].sign()
        norms = torch.sqrt(_squares(weight))
        kept = (1 - step * group / norms.where(norms > 0, 1.0)).clamp(min=0)
        new = torch.cat([weight * kept.repeat(*[1] * (kept.ndim - 1), MEMBERS), moved[..., -1:]], dim=-1)
        change = new - point
        if float(change.abs().max()) <= tolerance and float((new - ahead).abs().max()) <= tolerance:
            return {"weight": new[..., :-1], "intercept": new[..., -1]}
        uphill = ((ahead - new) * change).sum(dim=-1, keepdim=True) > 0
        previous = momentum.where(~uphill, 1.0)
        momentum = (1 + torch.sqrt(1 + 4 * previous**2)) / 2
        ahead = new + (previous - 1) / momentum * change
        point = new
    raise RuntimeError(f"not fitted in {max_steps} steps, at penalties down to exp({float(x['feature'].min()):.3g})")


def _squares(weight: Tensor) -> Tensor:
    """Squared norms of the groups, ``(..., 10)``."""
    return (weight.unflatten(-1, (MEMBERS, GROUPS)) ** 2).sum(dim=-2)


def _used(weight: Tensor) -> tuple[int, int]:
    """How many groups and features are not left out."""
    return int((_squares(weight) > USED**2).sum()), int((weight.abs() > USED).sum())


def _report(parts: Parts[Rows], solution: Solution, folder: Path) -> Report:
    like = parts.train.features
    ends = START + torch.linspace(-2, 2, 5, dtype=like.dtype, device=like.device)
    pairs = torch.cartesian_prod(ends, ends)
    common = fit(
        parts.train, {"group": pairs[:, :1].expand(-1, GROUPS), "feature": pairs[:, 1:].expand(-1, GROUPS * MEMBERS)}
    )
    best, middle = int(parts.valid.loss(common).argmin()), len(pairs) // 2
    label = "best common log-penalties, " + ", ".join(f"{v:.3g}" for v in pairs[best].tolist())
    lines = {
        "start": (f"all log-penalties {START:g}", {key: value[middle] for key, value in common.items()}),
        "common": (label, {key: value[best] for key, value in common.items()}),
        "learned": ("one learned for each", solution.y),
    }
    metrics: dict[str, float] = {}
    text = [f"{'':<44}{'validation loss':>16}{'test loss':>11}{'test accuracy':>15}{'groups':>8}{'features':>10}"]
    for key, (title, y) in lines.items():
        losses, used = (float(parts.valid.loss(y)), float(parts.test.loss(y))), _used(y["weight"])
        text.append(
            f"{title:<44}{losses[0]:>16.5f}{losses[1]:>11.5f}{parts.test.accuracy(y):>15.4f}{used[0]:>8}{used[1]:>10}"
        )
        metrics[f"{key}_validation_loss"], metrics[f"{key}_test_loss"] = losses
        metrics[f"{key}_test_accuracy"] = parts.test.accuracy(y)
        metrics[f"{key}_groups"], metrics[f"{key}_features"] = used
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "penalties.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("feature", "group", "group_log_penalty", "log_penalty", "weight"))
        group, feature, weight = (
            v.detach().cpu().tolist() for v in (solution.x["group"], solution.x["feature"], solution.y["weight"])
        )
        writer.writerows((j, j % GROUPS, group[j % GROUPS], feature[j], weight[j]) for j in range(len(weight)))
    return Report("\n".join(text), metrics, [table])
