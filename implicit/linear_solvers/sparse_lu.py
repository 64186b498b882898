"""Sparse LU on the host, for matrices with few entries (SuperLU: Li, Demmel and others 1999)."""

import copy
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from implicit.linear_solvers.base import (
    FlatSolution,
    LinearSolver,
    check_positive_int,
    check_tolerances,
    normalised,
    relative,
    require_square,
)
from implicit.operators import LinearOperator
from implicit.status import Status

SINGULAR = 10.0
"""A reciprocal condition number below so many roundings cannot be told from zero."""
SCALINGS = 5
"""Passes of equilibration; each takes the square root of what is left of the spread."""
ESTIMATES = 5
"""Steps of the norm estimate; two nearly always do."""


@dataclass(frozen=True, kw_only=True)
class SparseLU(LinearSolver):
    """``R A C = P L U Q`` with a column order that keeps L and U sparse, for square operators, symmetric or not.

    Factorises what the operator's ``to_sparse`` gives, on the host: :class:`Sparse` and sums, multiples, shifts and
    products of such operators. Rows and columns are first scaled to entries of size one, by powers of two; one step of
    iterative refinement follows each solve, and the transposed system reuses the factors. Memory and time depend on the
    fill: for a KKT matrix of a 64 x 64 grid (12,288 unknowns, 57 thousand entries) L and U hold a million numbers.
    The inertia stays unknown; :class:`LDLT` tells it.

    A matrix without a usable pivot ends as LINEAR_SOLVE_FAILED with ``singular``. One whose condition number is beyond
    the precision (by the estimate of Hager 1984) is marked ``singular`` too, and CONVERGED only where its residual
    says so. For the least-squares answer use :class:`LSMR`.

    Args:
        rtol: the relative residual that counts as solved; None means ``sqrt(eps)`` of the dtype.
        atol: the absolute residual that counts as solved.
        max_size: largest n for which an operator that has no sparse matrix is written down, by n products.

    Example:
        >>> import scipy.sparse, torch, implicit
        >>> A = implicit.Sparse(scipy.sparse.csr_array([[0.0, 2.0], [1.0, 0.0]]))
        >>> implicit.SparseLU().solve(A, torch.tensor([2.0, 3.0], dtype=torch.float64)).value
        tensor([3., 1.], dtype=torch.float64)
    """

    rtol: float | None = None
    atol: float = 0.0
    max_size: int = 20_000

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol, None)
        check_positive_int(self.max_size, "max_size")

    def init(self, operator: LinearOperator) -> "SparseFactors":
        """The matrix and its factors.

        Raises:
            ValueError: if the operator is not square, or has no sparse matrix and is larger than ``max_size``.
        """
        require_square(operator, "SparseLU")
        matrix = operator.to_sparse()
        if matrix is None:
            if operator.size > self.max_size:
                raise ValueError(
                    f"{type(operator).__name__} has no sparse matrix, and SparseLU would write down one of "
                    f"{operator.size} x {operator.size}, above max_size={self.max_size}; wrap its matrix as "
                    "implicit.Sparse, use an iterative solver, or raise max_size"
                )
            matrix = scipy.sparse.csr_array(operator.to_dense().cpu().numpy())
        return SparseFactors(matrix)

    def transpose(self, prepared: "SparseFactors") -> "SparseFactors":
        """The same factors, used for ``A^T``."""
        return prepared.turned()

    def solve_flat(
        self, operator: LinearOperator, prepared: "SparseFactors", b: Tensor, x0: Tensor | None
    ) -> FlatSolution:
        """Solve for the rows of ``b``, shape ``(k, n)``; ``x0`` is ignored."""
        b, scale, norms, targets = normalised(b, self.rtol, self.atol)
        x, residuals = torch.zeros_like(b), norms
        if not bool(torch.isfinite(norms).all()):
            verdict = Status.NONFINITE, "the right-hand side is not finite"
        elif not prepared.finite:
            verdict = Status.NONFINITE, "the matrix is not finite"
        else:
            if prepared.factors is not None:
                x, residuals = prepared.solve(b)
            verdict = _judge(prepared, residuals, norms, targets)
        return FlatSolution(
            x * scale,
            residuals * scale[:, 0],
            norms * scale[:, 0],
            1,
            verdict[0],
            False,
            verdict[1],
            singular=prepared.singular,
        )


def _judge(prepared: "SparseFactors", residuals: Tensor, norms: Tensor, targets: Tensor) -> tuple[Status, str]:
    solved = bool((residuals <= targets).all())
    if prepared.factors is None:
        text = "the matrix is singular: no pivot is left in some column; LSMR finds the least-squares solution"
        return (Status.CONVERGED if solved else Status.LINEAR_SOLVE_FAILED), text
    rank = f"the matrix is singular to working precision (reciprocal condition number {prepared.rcond:.2g})"
    if solved:
        return Status.CONVERGED, f"{rank}: this is one solution of many" if prepared.singular else "factorised"
    worst = f"relative residual {relative(residuals, norms):.3g}"
    return Status.STALLED, f"{rank if prepared.singular else 'too ill-conditioned for this precision'}: {worst}"


class SparseFactors:
    """A sparse matrix with the factors of its equilibrated form.

    Attributes:
        matrix: in compressed rows, on the host.
        finite: whether it holds numbers only.
        factors: what SuperLU returned; None where the matrix is exactly singular, or not finite.
        rcond: estimated reciprocal condition number of the equilibrated matrix in the 1-norm.
        singular: whether that is below the precision.
    """

    def __init__(self, matrix: Any) -> None:
        self.matrix, self.transposed = matrix, False
        self.finite = bool(np.isfinite(matrix.data).all())
        self.factors: Any = None
        self.rcond, self.singular = 1.0, False
        if not self.finite or not matrix.shape[0]:
            return
        scaled, self.left, self.right = equilibrated(matrix)
        self.singular = True
        try:
            self.factors = scipy.sparse.linalg.splu(scaled)
        except RuntimeError as error:
            if "singular" not in str(error):
                raise
            self.rcond = 0.0
            return
        self.rcond = self._condition(scaled)
        self.singular = not self.rcond > SINGULAR * np.finfo(matrix.dtype).eps

    def turned(self) -> Self:
        """The same for the transpose."""
        other = copy.copy(self)
        other.transposed = not self.transposed
        other.matrix = self.matrix.T
        return other

    def solve(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """Answers for the rows of ``b``, refined once, and their residuals; zero where rounding overflows."""
        columns = b.T.cpu().numpy()
        x = self._back(columns)
        x = x + self._back(columns - self.matrix @ x)
        x[:, ~np.isfinite(x).all(axis=0)] = 0.0
        residuals = np.linalg.norm(columns - self.matrix @ x, axis=0)
        return torch.as_tensor(x.T.copy(), device=b.device), torch.as_tensor(residuals, device=b.device)

    def _back(self, columns: np.ndarray) -> np.ndarray:
        first, last = (self.right, self.left) if self.transposed else (self.left, self.right)
        with np.errstate(over="ignore", invalid="ignore"):
            found = self.factors.solve(np.asfortranarray(first[:, None] * columns), "T" if self.transposed else "N")
            return last[:, None] * found

    def _condition(self, scaled: Any) -> float:
        """``1 / (||A||_1 est ||A^-1||_1)``: the norm of the inverse is climbed along its subgradients (Hager)."""
        n = scaled.shape[0]
        x, norm = np.full(n, 1.0 / n, dtype=scaled.dtype), 0.0
        for _ in range(ESTIMATES):
            y = self.factors.solve(x)
            size = float(np.abs(y).sum())
            if not size > norm:
                break
            norm = size
            slope = self.factors.solve(np.where(y >= 0, 1.0, -1.0).astype(scaled.dtype), "T")
            best = int(np.abs(slope).argmax())
            if not abs(slope[best]) > slope @ x:
                break
            x = np.zeros_like(x)
            x[best] = 1.0
        size = float(abs(scaled).sum(axis=0).max()) * norm
        return 1.0 / size if np.isfinite(size) and size > 0 else 0.0


def equilibrated(matrix: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """``R A C`` with the largest entries of rows and columns near one (Ruiz 2001), R and C being powers of two."""
    places = matrix.tocoo()
    rows, columns = places.coords
    left, right = (np.ones(n, dtype=matrix.dtype) for n in matrix.shape)
    for _ in range(SCALINGS):
        size = np.abs(places.data) * left[rows] * right[columns]
        row, column = np.zeros_like(left), np.zeros_like(right)
        np.maximum.at(row, rows, size)
        np.maximum.at(column, columns, size)
        left, right = left * _root(row), right * _root(column)
    values = places.data * left[rows] * right[columns]
    return scipy.sparse.csc_array((values, (rows, columns)), shape=matrix.shape), left, right


def _root(largest: np.ndarray) -> np.ndarray:
    """The power of two next to ``1 / sqrt(largest)``; one where that is zero."""
    logs = np.log2(np.where(largest > 0, largest, 1.0))
    return np.exp2(np.round(-0.5 * logs)).astype(largest.dtype)
