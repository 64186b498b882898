"""Levenberg-Marquardt steps on the violation of the constraints alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from constrained.lagrangian import Lagrangian, Point
from constrained.newton_direction import DirectionFinder
from constrained.scaling import row_sizes
from implicit import Diagonal

ARMIJO = 1e-4
SHORTEST = 1e-10
STATIONARY = 1e-8
NEARLY_STATIONARY = 1e-4
NEGATIVE = 1e-6
FIRST_DAMPING, SMALLEST_DAMPING = 1e-3, 1e-12
"""Relative to the largest entry of the squared rows of s J."""
GAIN, RELAX, TIGHTEN, ATTEMPTS = 1e-4, 0.2, 2.0, 40


@dataclass(frozen=True)
class FeasibilityStep:
    """What a step found.

    Attributes:
        point: the next one; None where there is none with less violation.
        length: 1; or that of a step along negative curvature.
        damping: what to hand to the next step.
        stationarity: of the violation where the step began; see :func:`stationarity`.
        stationary: whether the violation has a stationary point here, without a way down.
        linear_steps: of the linear solver.
    """

    point: Point | None
    length: float
    damping: float
    stationarity: float
    stationary: bool
    linear_steps: int


def feasibility_step(
    problem: Lagrangian,
    point: Point,
    weights: Tensor,
    finder: DirectionFinder,
    *,
    damping: float,
    curved: bool,
    rtol: float,
) -> FeasibilityStep:
    """One Levenberg-Marquardt step on ``1/2 |s c(x)|^2``, or one along negative curvature from a stationary point.

    ``(C + J^T s^2 J + p I) d = -J^T s^2 c`` is the KKT system ``[[C + p I, J^T], [J, -s^-2]]`` with right-hand side
    ``(0, -c)``, whose inertia is (n, m, 0) where the matrix on the left is positive definite. ``C`` is zero, or
    ``sum_i s_i^2 c_i Hess c_i`` with ``curved``. p follows the ratio of decrease and prediction (Nielsen 1999). At
    stationary points, as where J = 0, negative curvature of the whole Hessian leads down.
    """
    c, jacobian = point.constraints, point.jacobian
    gradient = jacobian.T.flat_mv(weights**2 * c)
    size = float(torch.linalg.vector_norm(weights * c))
    measure = stationarity(point, weights, gradient)
    if measure <= STATIONARY:
        moved = _along_negative_curvature(problem, point, weights, gradient) if problem.dense else None
        found, length = moved or (None, 0.0)
        return FeasibilityStep(found, length, damping, measure, moved is None, 0)
    unit = float((weights * row_sizes(point)).amax()) ** 2
    p, growth, linear_steps = max(damping or FIRST_DAMPING * unit, SMALLEST_DAMPING * unit), TIGHTEN, 0
    model = point.hessian(weights**2 * c, 0.0) if curved else Diagonal(torch.zeros_like(gradient))
    rhs = torch.cat([torch.zeros_like(gradient), -c])
    for _ in range(ATTEMPTS):
        step = finder.find(model, jacobian, rhs, last=p, start=p, rtol=rtol, dual_diagonal=weights**-2)
        linear_steps += step.linear_steps
        if not step.success:
            break
        p, d = max(p, step.shift), step.step[: problem.n]
        predicted = 0.5 * float(p * (d @ d) - gradient @ d)
        trial = problem.at(point.x + d)
        value = float(torch.linalg.vector_norm(weights * trial.constraints))
        if trial.finite and value < size and 0.5 * (size**2 - value**2) > GAIN * predicted:
            gain = min(0.5 * (size**2 - value**2) / predicted, 1.0)
            p *= max(RELAX, 1.0 - (2.0 * gain - 1.0) ** 3)
            return FeasibilityStep(trial, 1.0, p, measure, False, linear_steps)
        p, growth = growth * p, 2.0 * growth
    return FeasibilityStep(None, 0.0, p, measure, measure <= NEARLY_STATIONARY, linear_steps)


def stationarity(point: Point, weights: Tensor, gradient: Tensor) -> float:
    """How far x is from a stationary point of ``1/2 |s c|^2``, ``gradient = J^T s^2 c``; without units.

    The larger of ``|gradient| / (|s c| max(1, |s J|))`` and ``|gradient| max(1, |x|) / |s c|^2``. The second, the
    relative change of the violation along the gradient over a length of x, stays large in valleys without end.
    """
    size, slope, x = (float(torch.linalg.vector_norm(v)) for v in (weights * point.constraints, gradient, point.x))
    if not slope:
        return 0.0
    stretched = float(torch.linalg.vector_norm(weights * point.jacobian.flat_mv(gradient))) / slope
    return slope / size * max(1.0 / max(1.0, stretched), max(1.0, x) / size)


def _along_negative_curvature(
    problem: Lagrangian, point: Point, weights: Tensor, gradient: Tensor
) -> tuple[Point, float] | None:
    c = point.constraints
    down = _way_down(point.hessian(weights**2 * c, 0.0).to_dense(), point.jacobian.to_dense(), weights, gradient)
    if down is None:
        return None
    size = float(torch.linalg.vector_norm(weights * c))
    length = max(1.0, float(torch.linalg.vector_norm(point.x)))
    while length > SHORTEST:
        trial = problem.at(point.x + length * down)
        if trial.finite and float(torch.linalg.vector_norm(weights * trial.constraints)) < size:
            return trial, length
        length *= 0.5
    return None


def _way_down(hessian: Tensor, jacobian: Tensor, weights: Tensor, gradient: Tensor) -> Tensor | None:
    rows = weights[:, None] * jacobian
    values, vectors = torch.linalg.eigh(hessian + rows.T @ rows)
    if not bool(values[0] < -NEGATIVE * values.abs().amax()):
        return None
    return torch.where(gradient @ vectors[:, 0] > 0, -vectors[:, 0], vectors[:, 0])
