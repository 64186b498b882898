"""Scalar problems beyond unique, strongly convex lower levels, with closed forms: what penalty methods are tested on.

Their hyper-objective is ``psi(x) = min f(x, y)`` over all lower solutions y, and the penalised one
``psi_s(x) = min_y max_z f(x, y) + (g(x, y) - g(x, z)) / s``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from constrained import Box
from problems.case import Case, answered
from problems.registry import register

Level = Callable[[Tensor, Tensor], Tensor]
Minimizer = Callable[[float], Tensor]

PENALIZED = "closed form, with and without a penalty"


@register("many_solutions", "a line of lower solutions, which the upper level does not tell apart", "exact", "penalty")
def many_solutions(
    *, b: float = 2.0, r: float = 0.5, d: float = -1.0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Case:
    """g = (a'y - x)²/2 and f = (a'y - b)²/2 + r (x - d)²/2 with a = (1, -2, 2)/2: x* = (b + r d) / (1 + r).

    Every y with a'y = x solves the lower level; ``y_star`` is the shortest. The proximal error bound holds with one
    constant for all penalties.
    """
    direction = torch.tensor([0.5, -1.0, 1.0], dtype=dtype, device=device)

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (direction @ y - b) ** 2 + 0.5 * r * (x - d) ** 2

    def minimizer(sigma: float) -> Tensor:
        return torch.tensor((b / (1 + sigma) + r * d) / (1 / (1 + sigma) + r), dtype=dtype, device=device)

    x_star = minimizer(0.0)
    y_star = x_star * direction / (direction @ direction)
    return _line("many_solutions", direction, upper, x_star, y_star, minimizer)


@register(
    "many_solutions_selected", "a line of lower solutions, of which the upper level picks one", "exact", "penalty"
)
def many_solutions_selected(
    *,
    c: float = 0.5,
    r: float = 1.0,
    d: float = 2.0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Case:
    """g = (a'y - x)²/2 and f = |y - b|²/2 + c x n'y + r (x - d)²/2 with |n| = 1, n orthogonal to a.

    The best lower solution is y*(x) = a x/|a|² + P (b - c x n) with P the projection along a, and
    x* = (r d - c n'b + a'b/|a|²) / (r - c² + 1/|a|²). The constant of the proximal error bound is about the inverse of
    the penalty, so that the work of the inner loop grows with the penalty.

    Raises:
        ValueError: unless r + 1/|a|² > c², without which there is no minimizer; |a|² = 9/4.
    """
    a, b, n = (
        torch.tensor(v, dtype=dtype, device=device) for v in ([0.5, -1.0, 1.0], [1.0, 0.5, -1.5], [0.0, 0.5, 0.5])
    )
    n = n / torch.linalg.vector_norm(n)
    square, along, across = float(a @ a), float(a @ b), float(n @ b)
    if not r + 1 / square > c**2:
        raise ValueError(f"r = {r} is too small for c = {c}: r + 4/9 must exceed c squared")

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((y - b) ** 2).sum() + c * x * (n @ y) + 0.5 * r * (x - d) ** 2

    def minimizer(sigma: float) -> Tensor:
        inverse = 1 / (square + sigma)
        value = (r * d - c * across + along * inverse) / (r - c**2 + inverse)
        return torch.tensor(value, dtype=dtype, device=device)

    x_star = minimizer(0.0)
    target = b - c * x_star * n
    y_star = target + a * (x_star - a @ target) / square
    return _line("many_solutions_selected", a, upper, x_star, y_star, minimizer)


def _line(name: str, a: Tensor, upper: Level, x_star: Tensor, y_star: Tensor, minimizer: Minimizer) -> Case:
    """A case with the lower objective (a'y - x)²/2."""

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (a @ y - x) ** 2

    start = torch.zeros_like(x_star), torch.zeros_like(a)
    return answered(
        name,
        upper,
        lower,
        start,
        (x_star, y_star),
        source=PENALIZED,
        lower_class="convex",
        x_penalized=minimizer,
    )


@register("nonconvex_lower", "a nonconvex lower level without other stationary points", "exact", "penalty")
def nonconvex_lower(*, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
    """g = t² + 3 sin² t with t = y - x, and f = (y - 1)²/2 + x²/4: y* = x, x* = 2/3.

    g is not convex, but its gradient bounds the distance to its only stationary point (Polyak-Lojasiewicz).
    """
    return _nonconvex("nonconvex_lower", 0.0, dtype, device)


@register("nonconvex_lower_far", "the same from y = 4, where the lower level is not convex", "exact", "penalty")
def nonconvex_lower_far(*, start: float = 4.0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
    """``nonconvex_lower`` from another lower start."""
    return _nonconvex("nonconvex_lower_far", start, dtype, device)


def _nonconvex(name: str, y0: float, dtype: torch.dtype, device: str) -> Case:
    def upper(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y - 1) ** 2 + 0.25 * x**2

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return (y - x) ** 2 + 3 * torch.sin(y - x) ** 2

    zero = torch.zeros((), dtype=dtype, device=device)
    best = torch.full_like(zero, 2 / 3)
    start = zero, torch.full_like(zero, y0)
    return answered(name, upper, lower, start, (best, best.clone()), lower_class="nonconvex")


@register("discontinuous", "a hyper-objective with a jump at its minimizer", "exact", "penalty", "lower-set")
def discontinuous(*, start: float = 1.0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
    """g = x y on [-1, 1] and f = x² + y²: psi(0) = 0, but psi(x) = x² + 1 for every other x.

    The penalised hyper-objective is continuous, ``x² - x²/4s² + |x|/s`` for ``|x| <= 2s`` and ``x² + 1`` beyond.
    """

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return x**2 + y**2

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    zero = torch.zeros((), dtype=dtype, device=device)
    return answered(
        "discontinuous",
        upper,
        lower,
        (torch.full_like(zero, start), zero),
        (zero.clone(), zero.clone()),
        source=PENALIZED,
        lower_class="convex",
        x_penalized=lambda sigma: zero.clone(),
        lower_set=Box(-1.0, 1.0),
    )
