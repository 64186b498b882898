"""What the direct solvers share: the matrix, its factors, refinement, and what is done where it is singular."""

import copy
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from implicit.linear_solvers.base import (
    Apply,
    FlatSolution,
    LinearSolver,
    check_positive_int,
    check_tolerances,
    normalised,
    relative,
    require_square,
    require_symmetric,
)
from implicit.operators import LinearOperator
from implicit.status import Status


@dataclass(frozen=True, kw_only=True)
class DenseSolver(LinearSolver):
    """A factorisation of the matrix: n products once, then any right-hand side, and the transpose, for n² flops.

    One step of iterative refinement follows each solve. The pivots tell whether the matrix may be singular to working
    precision; then its rank is revealed by eigenvalues or singular values, and the answer is the least-squares solution
    of minimum norm, marked ``singular``: CONVERGED with a sentence where it meets the tolerance, STALLED where the
    system has no solution.

    Args:
        rtol: the relative residual that counts as solved; None means ``sqrt(eps)`` of the dtype.
        atol: the absolute residual that counts as solved.
        max_size: largest n accepted; a dense n x n matrix is formed.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_size: int = 20_000

    # Whether the factorisation needs a symmetric, a positive definite operator; what to use for a larger one.
    symmetric: ClassVar[bool] = False
    definite: ClassVar[bool] = False
    instead: ClassVar[str] = "an iterative solver"

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol, None)
        check_positive_int(self.max_size, "max_size")

    @abstractmethod
    def factorize(self, matrix: Tensor) -> tuple[Tensor, ...] | None:
        """The factors, or None where there are none."""

    @abstractmethod
    def back(self, factors: tuple[Tensor, ...], columns: Tensor, *, transposed: bool) -> Tensor:
        """``A^{-1}`` (or that of the transpose) times the columns of an ``(n, k)`` matrix."""

    @abstractmethod
    def pivots(self, factors: tuple[Tensor, ...]) -> Tensor:
        """Numbers of the size of the matrix, one of which is tiny where it is nearly singular."""

    def init(self, operator: LinearOperator) -> "DenseFactors":
        """The matrix and its factors.

        Raises:
            ValueError: if the operator is larger than ``max_size``, not square, or not declared symmetric where the
                factorisation needs that.
        """
        name = type(self).__name__
        if self.symmetric:
            require_symmetric(operator, name, "LU")
        else:
            require_square(operator, name)
        if operator.size > self.max_size:
            raise ValueError(
                f"{name} would form a {operator.size} x {operator.size} matrix, above max_size={self.max_size}; "
                f"use {self.instead}, or raise max_size"
            )
        return DenseFactors(self, operator.to_dense())

    def transpose(self, prepared: "DenseFactors") -> "DenseFactors":
        """The same factors, used for ``A^T``."""
        return prepared if self.symmetric else prepared.turned()

    def solve_flat(
        self, operator: LinearOperator, prepared: "DenseFactors", b: Tensor, x0: Tensor | None
    ) -> FlatSolution:
        """Solve for the rows of ``b``, shape ``(k, n)``; ``x0`` is ignored."""
        b, scale, norms, targets = normalised(b, self.rtol, self.atol)
        x, verdict = torch.zeros_like(b), prepared.verdict(self.definite)
        singular = False
        if not bool(torch.isfinite(norms).all()):
            verdict = Status.NONFINITE, "the right-hand side is not finite"
        residuals = norms
        if verdict is None:
            x, residuals, singular = prepared.solve(b, targets)
            verdict = self._judge(prepared, residuals, norms, targets, singular=singular)
        inertia = prepared.inertia
        return FlatSolution(
            x * scale,
            residuals * scale[:, 0],
            norms * scale[:, 0],
            1,
            verdict[0],
            inertia is not None and inertia[1] > 0,
            verdict[1],
            singular=singular,
            inertia=inertia,
        )

    @staticmethod
    def _judge(
        prepared: "DenseFactors", residuals: Tensor, norms: Tensor, targets: Tensor, *, singular: bool
    ) -> tuple[Status, str]:
        solved = bool((residuals <= targets).all())
        rank = f"the matrix is singular to working precision (rank {prepared.rank} of {len(prepared.matrix)})"
        if solved and singular:
            return Status.CONVERGED, f"{rank}: this is the solution of minimum norm"
        if solved:
            return Status.CONVERGED, "factorised"
        worst = relative(residuals, norms)
        if singular:
            text = f"{rank} and the system has no solution: least-squares answer, relative residual {worst:.3g}"
            return Status.STALLED, text
        return Status.STALLED, f"too ill-conditioned for this precision: relative residual {worst:.3g}"


class DenseFactors:
    """A matrix with its factors and, where its pivots are suspect, its eigenvalues or singular values.

    Attributes:
        matrix: shape (n, n).
        finite: whether it holds numbers only.
        inertia: numbers of positive, negative and zero eigenvalues; None if the solver is not for symmetric matrices.
        rank: to working precision.
    """

    def __init__(self, solver: DenseSolver, matrix: Tensor) -> None:
        self.solver, self.matrix, self.transposed = solver, matrix, False
        self.finite = bool(torch.isfinite(matrix).all())
        self.rank, self.smallest = len(matrix), 0.0
        self.factors: tuple[Tensor, ...] | None = None
        self.inverse: tuple[Tensor, Tensor, Tensor] | None = None
        self.inertia: tuple[int, int, int] | None = None
        if not self.finite:
            return
        used = 0.5 * (matrix + matrix.T) if solver.symmetric else matrix
        self.factors = solver.factorize(used)
        pivots = None if self.factors is None else solver.pivots(self.factors)
        if pivots is None or not self._healthy(pivots):
            pivots = self._reveal(used)
        if solver.symmetric:
            positive, negative = int((pivots > 0).sum()), int((pivots < 0).sum())
            self.inertia = positive, negative, len(matrix) - positive - negative

    def _healthy(self, pivots: Tensor) -> bool:
        size = pivots.abs()
        return not len(size) or bool(size.min() > _tolerance(size))

    def _reveal(self, matrix: Tensor) -> Tensor:
        """Set the pseudo-inverse ``right diag(1 / values) left^T``; returns all values, noise among them as zeros."""
        if self.solver.symmetric:
            values, left = torch.linalg.eigh(matrix)
            right = left
            self.smallest = float(values[0])
        else:
            left, values, right = torch.linalg.svd(matrix)
            right = right.T
        real = values.abs() > _tolerance(values.abs())
        self.rank = int(real.sum())
        self.inverse = left[:, real], values[real], right[:, real]
        return torch.where(real, values, 0.0)

    def turned(self) -> Self:
        """The same for the transpose."""
        other = copy.copy(self)
        other.transposed = not self.transposed
        other.matrix = self.matrix.T
        if self.inverse is not None:
            left, values, right = self.inverse
            other.inverse = right, values, left
        return other

    def verdict(self, definite: bool) -> tuple[Status, str] | None:
        """What stands against solving at all."""
        if not self.finite:
            return Status.NONFINITE, "the matrix is not finite"
        if definite and self.inertia is not None and self.inertia[1] > 0:
            text = f"the operator is not positive definite: its smallest eigenvalue is {self.smallest:.3g}"
            return Status.LINEAR_SOLVE_FAILED, text
        return None

    def solve(self, b: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Answers, their residuals, and whether any is a least-squares solution of a singular system."""
        if self.inverse is None or self.rank == len(self.matrix):
            apply = self._back if self.factors is not None else self._pseudo
            return *self._refined(apply, b), False
        x, size = self._refined(self._pseudo, b)
        fits = size <= targets
        if self.factors is None or bool(fits.all()):
            return x, size, True
        # A matrix that is only badly scaled can be solved all the same.
        other, other_size = self._refined(self._back, b)
        take = ~fits & (other_size <= targets)
        x, size = torch.where(take[:, None], other, x), torch.where(take, other_size, size)
        return x, size, not bool(take.all())

    def _refined(self, apply: Apply, b: Tensor) -> tuple[Tensor, Tensor]:
        x = apply(b)
        x = x + apply(b - x @ self.matrix.T)
        return x, torch.linalg.vector_norm(b - x @ self.matrix.T, dim=1)

    def _back(self, rows: Tensor) -> Tensor:
        assert self.factors is not None
        return self.solver.back(self.factors, rows.T, transposed=self.transposed).T

    def _pseudo(self, rows: Tensor) -> Tensor:
        assert self.inverse is not None
        left, values, right = self.inverse
        return ((rows @ left) / values) @ right.T


def _tolerance(sizes: Tensor) -> Tensor:
    """Below this share of the largest, n of them are rounding."""
    return len(sizes) * torch.finfo(sizes.dtype).eps * sizes.max()
