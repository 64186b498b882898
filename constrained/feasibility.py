"""Newton's method on the violation of the constraints alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from constrained.lagrangian import Lagrangian, Point
from constrained.newton_direction import DirectionFinder

ARMIJO = 1e-4
SHORTEST = 1e-10
STATIONARY = 1e-8
NEARLY_STATIONARY = 1e-4
NEGATIVE = 1e-6


@dataclass(frozen=True)
class FeasibilityStep:
    """What a step found.

    Attributes:
        point: the next one; None where there is none with less violation.
        length: of the step.
        shift: what to hand to the next step.
        stationarity: ``|J^T s^2 c| / (|s c| max(1, |s J|))`` where the step began.
        stationary: whether the violation has a stationary point here, without a way down.
        linear_steps: of the linear solver.
    """

    point: Point | None
    length: float
    shift: float
    stationarity: float
    stationary: bool
    linear_steps: int


def feasibility_step(
    problem: Lagrangian, point: Point, weights: Tensor, finder: DirectionFinder, *, last: float, rtol: float
) -> FeasibilityStep:
    """One step of Newton's method with a line search on ``1/2 |s c(x)|^2``.

    With ``C = sum_i s_i^2 c_i Hess c_i``, ``(C + J^T s^2 J + p I) d = -J^T s^2 c`` is the KKT system
    ``[[C + p I, J^T], [J, -s^-2]]`` with right-hand side ``(0, -c)``, whose inertia is (n, m, 0) where the matrix on
    the left is positive definite. At a stationary point with negative curvature (as where J = 0) the step follows that.
    """
    c, jacobian = point.constraints, point.jacobian
    hessian = point.hessian(weights**2 * c, 0.0)
    gradient = jacobian.T.flat_mv(weights**2 * c)
    size, slope_size = (float(torch.linalg.vector_norm(v)) for v in (weights * c, gradient))
    stretched = float(torch.linalg.vector_norm(weights * jacobian.flat_mv(gradient)))
    stationarity = slope_size / (size * max(1.0, stretched / slope_size)) if slope_size else 0.0
    rhs = torch.cat([torch.zeros_like(gradient), -c])
    found = finder.find(hessian, jacobian, rhs, last=last, rtol=rtol, dual_diagonal=weights**-2)
    d, shift = found.step[: problem.n], found.last
    if stationarity <= STATIONARY:
        down = _way_down(hessian.to_dense(), jacobian.to_dense(), weights, gradient) if problem.dense else None
        if down is None:
            return FeasibilityStep(None, 0.0, shift, stationarity, True, found.linear_steps)
        d = down * max(1.0, float(torch.linalg.vector_norm(point.x)))
    elif not found.success:
        return FeasibilityStep(None, 0.0, shift, stationarity, False, found.linear_steps)
    slope, length = float(gradient @ d), 1.0
    while length > SHORTEST:
        trial = problem.at(point.x + length * d)
        value = float(torch.linalg.vector_norm(weights * trial.constraints))
        if trial.finite and value < size and value**2 <= size**2 + 2 * ARMIJO * length * slope:
            return FeasibilityStep(trial, length, shift, stationarity, False, found.linear_steps)
        length *= 0.5
    return FeasibilityStep(None, 0.0, shift, stationarity, stationarity <= NEARLY_STATIONARY, found.linear_steps)


def _way_down(hessian: Tensor, jacobian: Tensor, weights: Tensor, gradient: Tensor) -> Tensor | None:
    rows = weights[:, None] * jacobian
    values, vectors = torch.linalg.eigh(hessian + rows.T @ rows)
    if not bool(values[0] < -NEGATIVE * values.abs().amax()):
        return None
    return torch.where(gradient @ vectors[:, 0] > 0, -vectors[:, 0], vectors[:, 0])
