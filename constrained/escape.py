"""Leaving a saddle point along a direction of negative curvature."""

from dataclasses import dataclass

import torch
from torch import Tensor

from constrained.lagrangian import Lagrangian, Point
from constrained.merit import ExactAugmentedLagrangian
from constrained.method import null_space

DECREASE = 0.1
TRIALS = 40
SMALLEST_HESSIAN = 1e-4
"""Smaller entries may be the rounding of multipliers that are zero."""


@dataclass(frozen=True)
class NegativeCurvature:
    """The most negative curvature on the tangent space of the constraints.

    Attributes:
        direction: a unit vector u with ``J u = 0``, along which f does not increase.
        value: ``u^T H u``, negative.
    """

    direction: Tensor
    value: float


def negative_curvature(
    hessian: Tensor, jacobian: Tensor, gradient: Tensor, tolerance: float
) -> NegativeCurvature | None:
    """The eigenvector of ``Z^T H Z`` with the smallest eigenvalue, if that is below -tolerance |H|."""
    basis = null_space(jacobian)
    if not basis.shape[1]:
        return None
    values, vectors = torch.linalg.eigh(basis.T @ hessian @ basis)
    if not bool(values[0] < -tolerance * hessian.abs().amax().clamp(min=SMALLEST_HESSIAN)):
        return None
    direction = basis @ vectors[:, 0]
    return NegativeCurvature(torch.where(gradient @ direction > 0, -direction, direction), float(values[0]))


def escape(
    problem: Lagrangian,
    point: Point,
    multiplier: Tensor,
    curvature: NegativeCurvature,
    merit: ExactAugmentedLagrangian,
    mu: float,
) -> tuple[Point, float] | None:
    """The first point along ``x +- t u``, moved back towards the constraints, that lowers ``f + <l, c> + mu/2 |c|^2``.

    The decrease asked for is a tenth of what the curvature promises; the gradient of the Lagrangian, zero at a saddle
    point, has to grow and is left out. Returns the point and t.
    """
    base = merit.floor(point, multiplier, mu)
    matrix = point.jacobian.to_dense().cpu()
    length = max(1.0, float(torch.linalg.vector_norm(point.x)))
    for _ in range(TRIALS):
        target = base + 0.5 * DECREASE * merit.objective_weight * length**2 * curvature.value
        for sign in (1.0, -1.0):
            trial = problem.at(point.x + sign * length * curvature.direction)
            if not trial.finite:
                continue
            back = torch.linalg.lstsq(matrix, trial.constraints.cpu(), driver="gelsd").solution
            trial = problem.at(trial.x - back.to(trial.x.device))
            if trial.finite and merit.floor(trial, multiplier, mu) <= target:
                return trial, length
        length *= 0.5
    return None
