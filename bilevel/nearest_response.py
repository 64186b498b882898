"""The lower solution next to a given point: of several, the one that an upper level has been heading for."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from bilevel.lower_level import LowerSolution, solve_lower_level
from bilevel.problem import BilevelProblem
from constrained import KKTResidual, Lagrangian
from constrained.multipliers import FlatMultipliers
from constrained.residual import measure
from implicit.tree import Tree

ANCHOR = 1e-6
"""Weight of ``|y - anchor|^2 / 2`` relative to the curvature of the lower level: the solution moves by as much. In
single precision it is the root of a rounding."""
ROUNDS = 2
"""A second anchor at what the first one gave leaves a lower value that is higher by the square of that only."""
SAME_VALUE = 1e-9
NEARLY = 1e-7
WORTH = 1e-4


@dataclass(frozen=True, kw_only=True)
class Response:
    """A lower solution at x.

    Attributes:
        x, y: ``(n,)`` and ``(m,)``.
        upper: f(x, y).
        violation: of all constraints of both levels.
        lower: y with multipliers and residual.
    """

    x: Tensor
    y: Tensor
    upper: float
    violation: float
    lower: LowerSolution


def respond(
    flat: FlatProblem, x: Tensor, y: Tensor, *, curvature: float, multipliers: FlatMultipliers | None = None
) -> Response:
    """Solve the lower level at x, from y and near y.

    Where there are several lower solutions a solver picks any of them, while the methods of the optimistic problem have
    moved y to a good one. So the level is solved once as it is, and once with ``ANCHOR curvature |y - anchor|^2 / 2``
    added, which approximates the projection of y onto the solutions; the second one counts if it is a solution too and
    its upper value is smaller. y itself counts only where value and optimality conditions hold up to :data:`NEARLY` and
    it is much better for the upper level: x may be next to one where the solutions jump.
    """
    plain = solve_lower_level(flat, x, y, multipliers=multipliers)
    best = _made(flat, x, plain)
    eps = float(torch.finfo(y.dtype).eps)
    weight = max(ANCHOR, eps**0.5)
    if float(torch.linalg.vector_norm(plain.y - y)) <= weight * (1.0 + float(torch.linalg.vector_norm(y))):
        return best
    anchor = y
    near = plain
    for _ in range(ROUNDS):
        held = FlatProblem(_anchored(flat, anchor, weight * curvature), flat.x_like, flat.y_like)
        near = solve_lower_level(held, x, anchor, multipliers=plain.multipliers)
        anchor = near.y
    duals = plain.multipliers, near.multipliers
    exact, nearly = max(SAME_VALUE, 100.0 * eps), max(NEARLY, 100.0 * eps)
    for point, allowed, gain in ((near.y, exact, 0.0), (y, nearly, WORTH)):
        found = _made(flat, x, _paired(flat, x, point, duals, near))
        as_low = found.lower.value <= plain.value + allowed * max(1.0, abs(plain.value))
        as_low = as_low and (point is not y or found.lower.residual.largest <= nearly)
        as_feasible = found.violation <= max(best.violation, allowed)
        if as_low and as_feasible and found.upper < best.upper - gain * max(1.0, abs(best.upper)):
            best = found
    return best


def _made(flat: FlatProblem, x: Tensor, lower: LowerSolution) -> Response:
    with torch.no_grad():
        upper = float(flat.upper(x, lower.y))
    return Response(x=x, y=lower.y, upper=upper, violation=flat.violation(x, lower.y), lower=lower)


def _anchored(flat: FlatProblem, anchor: Tensor, weight: float) -> BilevelProblem:
    problem = flat.problem
    before: Callable[..., Tensor] | None = problem.regularizer

    def regularizer(x: Tree, y: Tree) -> Tensor:
        own = 0.5 * weight * (flat.flat_y(y) - anchor).square().sum()
        return own if before is None else own + before(x, y)

    return replace(problem, regularizer=regularizer)


def _paired(
    flat: FlatProblem, x: Tensor, y: Tensor, given: tuple[FlatMultipliers, ...], found: LowerSolution
) -> LowerSolution:
    """y with the multipliers that fit it best; any ones of a convex level fit all of its solutions."""
    lagrangian = Lagrangian(flat.lower_problem(x), y)
    point = lagrangian.at(y)
    pairs = [(KKTResidual(*measure(lagrangian, point, duals).tolist()), duals) for duals in given]
    residual, duals = min(pairs, key=lambda pair: pair[0].largest)
    return LowerSolution(y=y, multipliers=duals, residual=residual, status=found.status, value=float(point.objective))
