"""A Cholesky factorization as a preconditioner: exact where it was taken, good near there."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.linear_solvers.base import Apply, check_positive_int
from implicit.operators import LinearOperator
from implicit.preconditioners.base import Keepable, Tensors


@dataclass(frozen=True, kw_only=True)
class Factorization(Keepable):
    """``A + tau I = L L^T``: n products and n³/3 flops to build, n² per application.

    tau is zero where A is positive definite to working precision, and else the first of 1e-3, 2e-3, 4e-3 ... times
    the mean absolute diagonal that makes it so (Nocedal and Wright 2006, algorithm 3.3): a preconditioner has to be
    positive definite even where the operator is not.

    By itself this solves in one step, as :class:`Cholesky` does; inside :class:`Kept` it pays for many systems.

    Args:
        max_size: largest n accepted; a dense n x n matrix is formed.

    Raises:
        ValueError: in ``init``, if the operator is larger than ``max_size``.
    """

    max_size: int = 20_000

    def __post_init__(self) -> None:
        check_positive_int(self.max_size, "max_size")

    def prepare(self, operator: LinearOperator) -> Tensors:
        """The factor L, shape ``(n, n)``."""
        if operator.size > self.max_size:
            raise ValueError(
                f"Factorization would form a {operator.size} x {operator.size} matrix, above max_size={self.max_size}; "
                "use Nystrom, or raise max_size"
            )
        return {"factor": _factor(operator.to_dense())}

    def action(self, prepared: Tensors) -> Apply:
        """Two triangular solves per row."""
        return inverse_of(prepared["factor"])


def inverse_of(factor: Tensor) -> Apply:
    """``(L L^T)^{-1}`` times rows, for a lower triangular L."""
    upper = factor.T

    def apply(rows: Tensor) -> Tensor:  # cholesky_solve copies the factor at every call
        half = torch.linalg.solve_triangular(factor, rows.T, upper=False)
        return torch.linalg.solve_triangular(upper, half, upper=True).T

    return apply


def _factor(matrix: Tensor) -> Tensor:
    n = len(matrix)
    # What is not finite is the solver's to report: it meets the same products.
    if not n or not bool(torch.isfinite(matrix).all() & matrix.any()):
        return torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    # A diagonal that is zero, or next to it, says nothing about the size of A.
    scale = max(float(matrix.diagonal().abs().mean()), torch.finfo(matrix.dtype).eps * float(matrix.abs().amax()))
    shift = 1e-3 * scale
    factor, info = torch.linalg.cholesky_ex(matrix)
    while int(info) != 0 or _singular(factor):
        shifted = matrix.clone()
        shifted.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        shift *= 2.0
    return factor


def _singular(factor: Tensor) -> bool:
    """Whether the least pivot is rounding: the inverse would be noise."""
    pivots = factor.diagonal().square()
    return not bool(pivots.min() > len(pivots) * torch.finfo(factor.dtype).eps * pivots.max())
