"""Ridge regression with one penalty per feature, tuned on validation rows: real data, exact answer."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jacrev

from bilevel import BilevelProblem
from problems.case import Case, OracleCounter
from problems.datasets import load, split, standardize
from problems.registry import register

CENTRE = -2.0
"""Log-penalty that the prior pulls to, and the start."""


def _minimize(fn: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """A minimizer of ``fn`` by Newton's method with exact Hessians, damped wherever the full step is no descent.

    Raises:
        RuntimeError: if the gradient does not fall below 1e-12.
    """
    slope, curvature, damping = grad(fn), jacrev(grad(fn)), 0.0
    for _ in range(100):
        value, g, h = fn(point), slope(point), curvature(point)
        if float(torch.linalg.vector_norm(g)) <= 1e-13:
            break
        lowest = float(torch.linalg.eigvalsh(h)[0])
        shift = max(damping, 1e-3 - lowest if lowest <= 0 else 0.0)
        step = torch.linalg.solve(h + shift * torch.eye(len(g), dtype=g.dtype), g)
        if bool(fn(point - step) <= value + 1e-14 * value.abs()):
            point, damping = point - step, 0.1 * damping if damping > 1e-6 else 0.0
        else:
            damping = max(10.0 * damping, 1e-4)
    if not float(torch.linalg.vector_norm(slope(point))) <= 1e-12:
        raise RuntimeError("the exact answer was not found to 1e-12; choose a larger prior")
    return point


@register("ridge_penalties", "ridge on the diabetes data, one log-penalty per feature", "exact", "real-data")
def ridge_penalties(
    *, seed: int = 0, prior: float = 1e-3, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Case:
    """g = |Xw - t|²/2n + sum_j exp(x_j) w_j²/2, f = |Vw - s|²/2m + prior |x + 2|²/2.

    Args:
        seed: draws the halves (X, t) for training and (V, s) for validation, 221 patients each.
        prior: positive; without it the penalties of useless features run to infinity.
        dtype: of the data and the variables; the exact answer is computed in float64.
        device: of the data and the variables.

    Raises:
        ValueError: if ``prior`` is not positive.
    """
    if not prior > 0:
        raise ValueError(f"prior must be positive, got {prior}: without it penalties run to infinity")
    data = load("diabetes")
    rows = split(data.n_samples, (-1, data.n_samples // 2), torch.Generator().manual_seed(seed))
    features = standardize(*(data.features[part] for part in rows))
    targets = standardize(*(data.targets[part, None] for part in rows))
    design, held = features
    response, held_response = targets[0][:, 0], targets[1][:, 0]
    gram, moment = design.T @ design / len(design), design.T @ response / len(design)

    def fitted(x: Tensor) -> Tensor:
        return torch.linalg.solve(gram + torch.diag(torch.exp(x)), moment)

    def hyper_objective(x: Tensor) -> Tensor:
        return 0.5 * ((held @ fitted(x) - held_response) ** 2).mean() + 0.5 * prior * ((x - CENTRE) ** 2).sum()

    start = torch.full((data.n_features,), CENTRE, dtype=torch.float64)
    x_star = _minimize(hyper_objective, start)

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype)

    train_x, train_t, valid_x, valid_t = map(place, (design, response, held, held_response))

    def upper(x: Tensor, w: Tensor) -> Tensor:
        return 0.5 * ((valid_x @ w - valid_t) ** 2).mean() + 0.5 * prior * ((x - CENTRE) ** 2).sum()

    def lower(x: Tensor, w: Tensor) -> Tensor:
        return 0.5 * ((train_x @ w - train_t) ** 2).mean() + 0.5 * (torch.exp(x) * w**2).sum()

    counter = OracleCounter()
    return Case(
        name="ridge_penalties",
        problem=BilevelProblem(counter.watch("upper", upper), counter.watch("lower", lower), name="ridge_penalties"),
        start=(place(start), place(torch.zeros_like(start))),
        source=f"{data.source}; exact answer by Newton's method on the closed-form hyper-objective",
        x_star=place(x_star),
        y_star=place(fitted(x_star)),
        upper_star=float(hyper_objective(x_star)),
        lower_class="strongly convex",
        counter=counter,
    )
