"""Dense Cholesky, for symmetric positive definite operators."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit.linear_solvers.dense import DenseSolver


@dataclass(frozen=True, kw_only=True)
class Cholesky(DenseSolver):
    """``A = L L^T`` for symmetric positive definite operators: n products once, then any right-hand side for n² flops.

    One step of iterative refinement follows each solve. An operator with a negative eigenvalue is reported
    (``indefinite``, status LINEAR_SOLVE_FAILED) with a zero answer; a singular positive semidefinite one is solved in
    the least-squares sense, ``singular``.

    Args:
        rtol: the relative residual that counts as solved; None means ``sqrt(eps)`` of the dtype.
        atol: the absolute residual that counts as solved.
        max_size: largest n accepted; a dense n x n matrix is formed.

    Example:
        >>> import torch, implicit
        >>> found = implicit.Cholesky().solve(implicit.Dense(torch.diag(torch.tensor([2.0, 4.0]))), torch.ones(2))
        >>> found.value, found.inertia
        (tensor([0.5000, 0.2500]), (2, 0, 0))
    """

    symmetric: ClassVar[bool] = True
    definite: ClassVar[bool] = True
    instead: ClassVar[str] = "CG"

    def factorize(self, matrix: Tensor) -> tuple[Tensor, ...] | None:
        """The lower factor."""
        factor, info = torch.linalg.cholesky_ex(matrix)
        return (factor,) if int(info) == 0 else None

    def back(self, factors: tuple[Tensor, ...], columns: Tensor, *, transposed: bool) -> Tensor:
        """Two triangular solves."""
        return torch.cholesky_solve(columns, factors[0])

    def pivots(self, factors: tuple[Tensor, ...]) -> Tensor:
        """The squares on the factor's diagonal."""
        return factors[0].diagonal() ** 2
