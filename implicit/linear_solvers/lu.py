"""Dense LU: any square operator small enough to write down."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.linear_solvers.dense import DenseSolver


@dataclass(frozen=True, kw_only=True)
class LU(DenseSolver):
    """``A = P L U`` with partial pivoting, for nonsymmetric operators; one step of iterative refinement.

    The transposed system reuses the factors. A singular operator is solved in the least-squares sense, ``singular``.

    Args:
        rtol: the relative residual that counts as solved; None means ``sqrt(eps)`` of the dtype.
        atol: the absolute residual that counts as solved.
        max_size: largest n accepted; a dense n x n matrix is formed.

    Example:
        >>> import torch, implicit
        >>> A = implicit.Dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), symmetric=False)
        >>> implicit.LU().solve(A, torch.tensor([2.0, 3.0])).value
        tensor([3., 1.])
    """

    def factorize(self, matrix: Tensor) -> tuple[Tensor, ...] | None:
        """The factors and the row exchanges."""
        factors, exchanges, info = torch.linalg.lu_factor_ex(matrix)
        return (factors, exchanges) if int(info) == 0 else None

    def back(self, factors: tuple[Tensor, ...], columns: Tensor, *, transposed: bool) -> Tensor:
        """Two triangular solves."""
        return torch.linalg.lu_solve(*factors, columns, adjoint=transposed)

    def pivots(self, factors: tuple[Tensor, ...]) -> Tensor:
        """The diagonal of U."""
        return factors[0].diagonal()
