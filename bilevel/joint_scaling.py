"""Scales of objectives and constraint rows in (x, y) together, measured at a point."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bilevel.flat import FlatProblem, row_sizes
from bilevel.oracle import Oracle
from implicit import GradientDifference, Jacobian, lanczos
from implicit.derivatives import value_and_gradient

SLOPE = 0.1
"""A gradient counts as the curvature that would build it up over ten times the size of the point: linear objectives
have no other scale."""
SMALL = 1e-8


def joint_curvature(flat: FlatProblem, level: str, x: Tensor, y: Tensor, oracles: Sequence[Oracle]) -> float:
    """The scale L of an objective, by which it is divided.

    The largest absolute eigenvalue of its Hessian in (x, y), from Lanczos steps on gradient differences, but at least a
    tenth of its gradient over ``1 + |(x, y)|``; the largest over the given batches.
    """
    point = torch.cat([x, y]).detach()
    largest = 0.0
    for oracle in oracles:
        objective = _of_pair(flat, level, oracle)
        spectrum = lanczos(GradientDifference(objective, point), 20)
        _, slope = value_and_gradient(objective, point)
        steep = float(torch.linalg.vector_norm(slope)) / (1.0 + float(torch.linalg.vector_norm(point)))
        largest = max(largest, abs(spectrum.largest), abs(spectrum.smallest), SLOPE * steep)
    return largest if largest > SMALL else 1.0


def _of_pair(flat: FlatProblem, level: str, oracle: Oracle) -> Callable[[Tensor], Tensor]:
    function = flat.upper if level == "upper" else flat.lower
    return lambda z: function(z[: flat.n], z[flat.n :], oracle) + 0.0 * z.sum()


def row_weights(flat: FlatProblem, x: Tensor, y: Tensor) -> Tensor:
    """Factors that give every row of the lower level a gradient of length one, and all of them a Jacobian of norm one.

    Inequalities first, then equations, ``(p + q,)``. Where a row has no gradient at the point, as at the center of a
    ball, it is measured beside it.
    """
    level = flat.lower_level
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(len(v), generator=generator, dtype=v.dtype).to(v.device) for v in (x, y)]
    beside = x + (1.0 + x.abs()) * noise[0], y + (1.0 + y.abs()) * noise[1]
    found = []
    for rows, count in ((level.inequality, level.inequalities), (level.equality, level.equalities)):
        if not count:
            continue
        here, _ = row_sizes(rows, x, y)
        there, _ = row_sizes(rows, *beside)
        size = torch.where(here > SMALL * there.nan_to_num(0.0, 0.0, 0.0), here, there)
        found.append(torch.where(torch.isfinite(size) & (size > 0), 1.0 / size, 1.0))
    if not found:
        return x.new_zeros(0)
    weights = torch.cat(found)
    point = torch.cat([x, y]).detach()
    matrix = Jacobian(lambda z: _rows(flat, z) + 0.0 * z.sum(), point).to_dense() * weights[:, None]
    norm = torch.linalg.matrix_norm(matrix, 2)
    return weights / torch.where(torch.isfinite(norm), norm, 1.0).clamp(min=1.0)


def _rows(flat: FlatProblem, z: Tensor) -> Tensor:
    x, y, level = z[: flat.n], z[flat.n :], flat.lower_level
    return torch.cat([level.inequality(x, y), level.equality(x, y)])
