"""Dense factorisations: exact up to rounding, for systems small enough to write down."""

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
class Cholesky(LinearSolver):
    """``A = L L^T`` for symmetric positive definite operators: n products once, then any right-hand side for n² flops.

    One step of iterative refinement follows each solve. An operator that is not positive definite is reported
    (``indefinite``) with a zero answer.

    Args:
        rtol: the relative residual that counts as solved; None means ``sqrt(eps)`` of the dtype.
        max_size: largest n accepted; a dense n x n matrix is formed.
    """

    rtol: float | None = None
    max_size: int = 20_000

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, 0.0, None)
        check_positive_int(self.max_size, "max_size")

    def init(self, operator: LinearOperator) -> tuple[Tensor, Tensor, bool]:
        """The matrix, its factor, and whether the factorisation succeeded.

        Raises:
            ValueError: if the operator is larger than ``max_size``.
        """
        if operator.size > self.max_size:
            raise ValueError(
                f"Cholesky would form a {operator.size} x {operator.size} matrix, above max_size={self.max_size}; "
                "use CG, or raise max_size"
            )
        matrix = operator.to_dense()
        matrix = 0.5 * (matrix + matrix.T)
        factor, info = torch.linalg.cholesky_ex(matrix)
        return matrix, factor, int(info) == 0

    def solve_flat(
        self, operator: LinearOperator, prepared: tuple[Tensor, Tensor, bool], b: Tensor, x0: Tensor | None
    ) -> FlatSolution:
        """Solve for the rows of ``b``, shape ``(k, n)``; ``x0`` is ignored."""
        matrix, factor, definite = prepared
        norms = torch.linalg.vector_norm(b, dim=1)
        if not bool(torch.isfinite(matrix).all() & torch.isfinite(b).all()):
            message = "the matrix or the right-hand side is not finite"
            return FlatSolution(torch.zeros_like(b), norms, norms, 0, Status.NONFINITE, False, message)
        if not definite:
            message = "the operator is not positive definite: Cholesky broke down"
            return FlatSolution(torch.zeros_like(b), norms, norms, 0, Status.LINEAR_SOLVE_FAILED, True, message)
        x = torch.cholesky_solve(b.T, factor).T
        x = x + torch.cholesky_solve((b - x @ matrix).T, factor).T
        residuals = torch.linalg.vector_norm(b - x @ matrix, dim=1)
        rtol = default_rtol(b.dtype) if self.rtol is None else self.rtol
        solved = bool((residuals <= rtol * norms).all())
        message = "factorised" if solved else "too ill-conditioned for this precision"
        return FlatSolution(x, residuals, norms, 1, Status.CONVERGED if solved else Status.STALLED, False, message)
