"""Dense LDL^T, for symmetric operators of any inertia (Bunch and Kaufman 1977)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit.linear_solvers.dense import DenseSolver


@dataclass(frozen=True, kw_only=True)
class LDLT(DenseSolver):
    """``P A P^T = L D L^T`` with blocks of one and two in D, for symmetric operators, definite or not.

    Half the work of LU, and the signs of D give the ``inertia`` of A, the numbers of its positive, negative and zero
    eigenvalues (Sylvester): a saddle point, or the KKT matrix of a minimum, is told from its counts. One step of
    iterative refinement follows each solve. A singular operator is solved in the least-squares sense, ``singular``.

    Args:
        rtol: the relative residual that counts as solved; None means ``sqrt(eps)`` of the dtype.
        atol: the absolute residual that counts as solved.
        max_size: largest n accepted; a dense n x n matrix is formed.

    Example:
        >>> import torch, implicit
        >>> kkt = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
        >>> found = implicit.LDLT().solve(implicit.Dense(kkt, positive_definite=False), torch.tensor([3.0, 3.0, 2.0]))
        >>> found.value, found.inertia
        (tensor([1., 1., 1.]), (2, 1, 0))
    """

    symmetric: ClassVar[bool] = True
    instead: ClassVar[str] = "MINRES"

    def factorize(self, matrix: Tensor) -> tuple[Tensor, ...] | None:
        """L and D in one matrix, and the exchanges with the shape of D."""
        factors, exchanges, info = torch.linalg.ldl_factor_ex(matrix)
        return (factors, exchanges) if int(info) == 0 else None

    def back(self, factors: tuple[Tensor, ...], columns: Tensor, *, transposed: bool) -> Tensor:
        """Two triangular solves with D between them."""
        return torch.linalg.ldl_solve(*factors, columns)

    def pivots(self, factors: tuple[Tensor, ...]) -> Tensor:
        """The eigenvalues of D."""
        packed, exchanges = factors
        values = packed.diagonal().clone()
        paired = exchanges < 0  # both rows of a block of two
        first = torch.nonzero(paired & (paired.cumsum(0) % 2 == 1))[:, 0]
        a, b, c = values[first], packed[first + 1, first], values[first + 1]
        middle, radius = 0.5 * (a + c), torch.hypot(0.5 * (a - c), b)
        values[first], values[first + 1] = middle + radius, middle - radius
        return values
