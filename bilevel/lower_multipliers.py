"""Lagrange multipliers of the lower level at a given point."""

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from constrained import KKTResidual, Lagrangian
from constrained.multipliers import FlatMultipliers
from constrained.residual import bound_gaps, measure

LIMIT = 2_000
"""Up to this many unknowns and rows multipliers are found by least squares."""
REACHES = (1e-8, 1e-6, 1e-4, 1e-2)
"""How far from zero, relative to its gradient, a row may be that may have a force."""
EXACT = 300
"""Up to so many rows, by an active-set method."""


def recover_multipliers(flat: FlatProblem, x: Tensor, y: Tensor) -> tuple[FlatMultipliers, KKTResidual] | None:
    """The multipliers that make (x, y) look most like a KKT point of the lower level, and its residuals.

    Nonnegative least squares ``min |grad_y g + sum_i v_i grad_y c_i|`` over the rows and bounds that nearly hold with
    equality. What counts as nearly is tried from tight to loose, and the choice with the smallest residual wins: a
    row that is included wrongly shows as complementarity, one that is left out wrongly as stationarity.

    Returns:
        None beyond :data:`LIMIT`.
    """
    level = flat.lower_level
    if flat.m + level.inequalities + level.equalities > LIMIT and not level.free:
        return None
    lagrangian = Lagrangian(flat.lower_problem(x), y)
    point = lagrangian.at(y)
    zeros = torch.zeros_like(y)
    best = FlatMultipliers(y.new_zeros(level.equalities), y.new_zeros(level.inequalities), zeros, zeros)
    residual = _residual(lagrangian, point, best)
    if level.free:
        return best, residual
    jacobian = point.jacobian.to_dense()
    below, above = bound_gaps(lagrangian, y)
    sizes = torch.linalg.vector_norm(jacobian, dim=1).clamp(min=1.0)
    for reach in REACHES:
        rows = point.inequality >= -reach * sizes[level.equalities :]
        low, high = below >= -reach * y.abs().clamp(min=1.0), above >= -reach * y.abs().clamp(min=1.0)
        found = _least_squares(jacobian, point.gradient, level.equalities, rows, low, high)
        at = _residual(lagrangian, point, found)
        if not residual.largest <= at.largest:
            best, residual = found, at
    return best, residual


def _residual(lagrangian: Lagrangian, point: object, multipliers: FlatMultipliers) -> KKTResidual:
    return KKTResidual(*measure(lagrangian, point, multipliers).tolist())  # type: ignore[arg-type]


def _least_squares(
    jacobian: Tensor, gradient: Tensor, equalities: int, rows: Tensor, low: Tensor, high: Tensor
) -> FlatMultipliers:
    unit = torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)
    parts = [jacobian[:equalities], jacobian[equalities:][rows], -unit[low], unit[high]]
    found = nonnegative_least_squares(torch.cat(parts), -gradient, free=equalities)
    equality, inequality, lower, upper = found.split([len(part) for part in parts])
    blank = torch.zeros_like(gradient)
    return FlatMultipliers(
        equality,
        inequality.new_zeros(len(rows)).masked_scatter(rows, inequality),
        blank.masked_scatter(low, lower),
        blank.masked_scatter(high, upper),
    )


def nonnegative_least_squares(rows: Tensor, target: Tensor, free: int = 0) -> Tensor:
    """``argmin_v |rows' v - target|`` with ``v >= 0`` but for the first ``free`` entries; in double precision.

    Args:
        rows: ``(k, n)``.
        target: ``(n,)``.
        free: how many entries may have any sign.

    Returns:
        v, ``(k,)``; zeros where the data are not finite.
    """
    from scipy.optimize import lsq_linear

    if not len(rows) or not bool(torch.isfinite(rows).all() & torch.isfinite(target).all()):
        return target.new_zeros(len(rows))
    sizes = torch.linalg.vector_norm(rows, dim=1)
    sizes = torch.where(sizes > 0, sizes, 1.0)
    matrix = (rows / sizes[:, None]).T.detach().cpu().double().numpy()
    lowest = [-float("inf")] * free + [0.0] * (len(rows) - free)
    method = "bvls" if len(rows) <= EXACT else "trf"
    goal = target.detach().cpu().double().numpy()
    if free == len(rows):
        import numpy as np

        found = np.linalg.lstsq(matrix, goal, rcond=None)[0]
    else:
        found = lsq_linear(matrix, goal, (lowest, float("inf")), method=method, tol=1e-14).x
    return torch.as_tensor(found, dtype=rows.dtype, device=rows.device) / sizes
