"""A scalar problem with sets at both levels and a closed-form answer."""

import torch
from torch import Tensor

from constrained import Box
from problems.case import Case, answered
from problems.registry import register


def _build(r: float, upper_bound: float, dtype: torch.dtype, device: str) -> Case:
    def upper(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y - 2.0) ** 2 + 0.5 * r * x**2

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y - x) ** 2

    # y* = clip(x, -1, 1); on [-1, 1] F = (x - 2)²/2 + r x²/2, and beyond 1 F grows.
    best = min(2.0 / (1.0 + r), 1.0, upper_bound)
    x_star = torch.tensor(best, dtype=dtype, device=device)

    def x_penalized(sigma: float) -> Tensor:
        # The minimizer in y of the penalised lower level, (2 sigma + x) / (1 + sigma), reaches 1 at x = 1 - sigma.
        inside = 2.0 / (1.0 + r * (1.0 + sigma))
        free = inside if inside <= 1.0 - sigma else 1.0 / (1.0 + r * sigma)
        return torch.tensor(min(free, upper_bound), dtype=dtype, device=device)

    zero = torch.zeros((), dtype=dtype, device=device)
    return answered(
        "box",
        upper,
        lower,
        (zero, zero.clone()),
        (x_star, x_star.clone()),
        source="closed form, with and without a penalty",
        lower_class="strongly convex",
        x_penalized=x_penalized,
        upper_set=Box(-3.0, upper_bound),
        lower_set=Box(-1.0, 1.0),
    )


@register("box", "scalar, boxes at both levels, solution inside", "exact", "upper-set", "lower-set")
def box(*, r: float = 2.0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
    """g = (y - x)²/2 on [-1, 1], f = (y - 2)²/2 + r x²/2, x in [-3, 3]: x* = 2 / (1 + r)."""
    return _build(r, 3.0, dtype, device)


@register("box_active", "scalar, boxes at both levels, upper bound active", "exact", "upper-set", "lower-set")
def box_active(*, bound: float = 0.5, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
    """The same with x at most 0.5: the bound is active at the solution."""
    return _build(2.0, bound, dtype, device)


@register("box_kink", "scalar, boxes at both levels, solution at a kink", "exact", "upper-set", "lower-set")
def box_kink(*, r: float = 0.5, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
    """The same with r below 1: F has a kink at its minimizer x* = 1, where the lower bound becomes active."""
    return _build(r, 3.0, dtype, device)
