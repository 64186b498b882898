"""How steep functions are, and the factors that bring steep ones down."""

import torch
from torch import Tensor

from constrained.lagrangian import Point
from implicit import Dense

STEEP, SMALLEST = 100.0, 1e-8
"""Slopes above the first are brought down to it, by no more than the second (Waechter and Biegler 2006, 3.8)."""


def row_sizes(point: Point) -> Tensor:
    """The largest entry of each row of J in size, shape (m + p,); ones where J is not written down."""
    jacobian = point.jacobian
    if isinstance(jacobian, Dense):
        return jacobian.matrix.abs().amax(dim=1)
    sparse = jacobian.to_sparse()
    if sparse is None:  # rows cannot be had for less than a product each
        return point.x.new_ones(jacobian.shape[0])
    return torch.as_tensor(abs(sparse).max(axis=1).toarray().ravel(), dtype=point.x.dtype, device=point.x.device)


def factors(sizes: Tensor) -> Tensor:
    """What to multiply functions of these slopes by; one where the slope is not a number."""
    sizes = torch.nan_to_num(sizes, nan=1.0, posinf=1.0)
    return torch.clamp(STEEP / sizes.clamp(min=STEEP), min=SMALLEST)
