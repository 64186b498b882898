"""Dense LU: any nonsingular operator small enough to write down."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.linear_solvers.base import (
    FlatSolution,
    LinearSolver,
    check_positive_int,
    check_tolerances,
    default_rtol,
)
from implicit.operators import LinearOperator
from implicit.status import Status


@dataclass(frozen=True, kw_only=True)
class LU(LinearSolver):
    """``A = P L U`` with partial pivoting, for nonsymmetric operators; one step of iterative refinement.

    Args:
        rtol: the relative residual that counts as solved; None means ``sqrt(eps)`` of the dtype.
        max_size: largest n accepted; a dense n x n matrix is formed.
    """

    rtol: float | None = None
    max_size: int = 20_000

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, 0.0, None)
        check_positive_int(self.max_size, "max_size")

    def init(self, operator: LinearOperator) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The matrix, its factors and pivots, and whether it is nonsingular.

        Raises:
            ValueError: if the operator is larger than ``max_size``.
        """
        if operator.size > self.max_size:
            raise ValueError(
                f"LU would form a {operator.size} x {operator.size} matrix, above max_size={self.max_size}; "
                "use an iterative solver, or raise max_size"
            )
        matrix = operator.to_dense()
        factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
        return matrix, factors, pivots, int(info) == 0

    def solve_flat(
        self, operator: LinearOperator, prepared: tuple[Tensor, Tensor, Tensor, bool], b: Tensor, x0: Tensor | None
    ) -> FlatSolution:
        """Solve for the rows of ``b``, shape ``(k, n)``; ``x0`` is ignored."""
        matrix, factors, pivots, regular = prepared
        norms = torch.linalg.vector_norm(b, dim=1)
        if not bool(torch.isfinite(matrix).all() & torch.isfinite(b).all()):
            message = "the matrix or the right-hand side is not finite"
            return FlatSolution(torch.zeros_like(b), norms, norms, 0, Status.NONFINITE, False, message)
        if not regular:
            message = "the operator is singular: LU met a zero pivot"
            return FlatSolution(torch.zeros_like(b), norms, norms, 0, Status.LINEAR_SOLVE_FAILED, False, message)
        x = torch.linalg.lu_solve(factors, pivots, b.T).T
        x = x + torch.linalg.lu_solve(factors, pivots, (b - x @ matrix.T).T).T
        residuals = torch.linalg.vector_norm(b - x @ matrix.T, dim=1)
        rtol = default_rtol(b.dtype) if self.rtol is None else self.rtol
        solved = bool((residuals <= rtol * norms).all())
        message = "factorised" if solved else "too ill-conditioned for this precision"
        return FlatSolution(x, residuals, norms, 1, Status.CONVERGED if solved else Status.STALLED, False, message)
