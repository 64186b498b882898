"""Multipliers that make the gradient of the Lagrangian smallest."""

import warnings

import torch
from torch import Tensor

from constrained.lagrangian import Point
from constrained.residual import largest
from implicit import LSMR, ConvergenceWarning, Dense

LARGEST = 1e3
"""An estimate with larger entries says that the constraints' gradients nearly depend on each other; zero is better."""
RTOL = 1e-8


def least_squares_multipliers(point: Point, limit: float = LARGEST) -> Tensor:
    """``argmin_l |grad f + J^T l|`` of minimum norm, shape (m,); zero where an entry is larger than ``limit``."""
    jacobian, rhs = point.jacobian, -point.gradient
    if isinstance(jacobian, Dense):
        matrix = jacobian.to_dense().T
        finite = bool(torch.isfinite(matrix).all() & torch.isfinite(rhs).all())
        found = (
            torch.linalg.lstsq(matrix.cpu(), rhs.cpu(), driver="gelsd").solution
            if finite
            else rhs.new_full((1,), torch.inf)
        )
        found = found.to(rhs.device)
    else:
        with warnings.catch_warnings():
            # Dependent constraints are what minimum norm is for.
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = LSMR(rtol=RTOL).solve(jacobian.T, rhs).value
    usable = bool(torch.isfinite(found).all()) and bool(largest(found) <= limit)
    return found if usable else rhs.new_zeros(jacobian.shape[0])
