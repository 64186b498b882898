"""The solver that fits an operator's declared structure and size."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from implicit.linear_solvers.base import (
    FlatSolution,
    LinearSolver,
    Preconditioner,
    check_positive_int,
    check_tolerances,
)
from implicit.linear_solvers.cg import CG
from implicit.linear_solvers.cholesky import Cholesky
from implicit.linear_solvers.gmres import GMRES
from implicit.linear_solvers.ldlt import LDLT
from implicit.linear_solvers.lsmr import LSMR
from implicit.linear_solvers.lu import LU
from implicit.linear_solvers.minres import MINRES
from implicit.linear_solvers.sparse_lu import SparseLU
from implicit.operators import Dense, LinearOperator


@dataclass(frozen=True)
class Choice:
    """A solver with what it prepared, and why it was chosen."""

    solver: LinearSolver
    prepared: Any
    reason: str


@dataclass(frozen=True, kw_only=True)
class AutoSolver(LinearSolver):
    """Picks by what the operator declares and by its size, and says why in ``method`` of the answer.

    ===================================  ==========================  ==================================
    declared                             small, or a known matrix    large
    ===================================  ==========================  ==================================
    symmetric and positive definite      :class:`Cholesky`           :class:`CG`
    symmetric                            :class:`LDLT`               :class:`MINRES`
    nothing                              :class:`LU`                 :class:`GMRES`
    rectangular                          :class:`LSMR`               :class:`LSMR`
    ===================================  ==========================  ==================================

    Between small and large, operators made of sparse matrices (:class:`Sparse`) go to :class:`SparseLU`.
    The declarations are believed, and nothing is tried twice: a wrong one ends as the chosen solver reports it.

    Args:
        rtol: relative tolerance on the true residual; None means ``sqrt(eps)`` of the dtype.
        atol: absolute tolerance on the true residual.
        max_steps: step limit of the iterative solvers; None means their own.
        preconditioner: for CG, MINRES and GMRES.
        dense_size: largest n for which n products are spent on writing the matrix down. An iterative solver needs up
            to n products as well, one after the other, where these go in blocks; and a factorisation tells rank and
            inertia.
        matrix_size: the same for operators that are matrices already.
        sparse_size: the same for operators that are made of sparse matrices, whose factors are sparse too.

    Example:
        >>> import torch, implicit
        >>> A = implicit.Dense(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), positive_definite=False)
        >>> found = implicit.AutoSolver().solve(A, torch.tensor([3.0, 3.0]))
        >>> found.value, found.method
        (tensor([1., 1.]), 'LDLT: symmetric, and a matrix with n = 2 <= matrix_size = 2000')
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None
    preconditioner: Preconditioner | None = None
    dense_size: int = 200
    matrix_size: int = 2000
    sparse_size: int = 100_000

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol, self.max_steps)
        check_positive_int(self.dense_size, "dense_size")
        check_positive_int(self.matrix_size, "matrix_size")
        check_positive_int(self.sparse_size, "sparse_size")

    def choose(self, operator: LinearOperator) -> tuple[LinearSolver, str]:
        """The solver for ``operator``, and the reason in words."""
        rows, columns = operator.shape
        if rows != columns:
            return LSMR(rtol=self.rtol, atol=self.atol, max_steps=self.max_steps), f"rectangular, {rows} x {columns}"
        declared = "symmetric" if operator.symmetric else "not declared symmetric"
        if operator.symmetric and operator.positive_definite:
            declared = "symmetric positive definite"
        limit, name = self.dense_size, "dense_size"
        if isinstance(operator, Dense):
            declared, limit, name = f"{declared}, and a matrix", self.matrix_size, "matrix_size"
        if columns <= limit:
            reason = f"{declared} with n = {columns} <= {name} = {limit}"
            return self._direct(operator), reason
        if columns <= self.sparse_size and operator.to_sparse() is not None:
            reason = (
                f"made of sparse matrices, with {self.dense_size} < n = {columns} <= sparse_size = {self.sparse_size}"
            )
            return SparseLU(rtol=self.rtol, atol=self.atol), reason
        return self._iterative(operator), f"{declared} with n = {columns} > {name} = {limit}"

    def _direct(self, operator: LinearOperator) -> LinearSolver:
        kind = LU if not operator.symmetric else Cholesky if operator.positive_definite else LDLT
        return kind(rtol=self.rtol, atol=self.atol)

    def _iterative(self, operator: LinearOperator) -> LinearSolver:
        kind = GMRES if not operator.symmetric else CG if operator.positive_definite else MINRES
        return kind(rtol=self.rtol, atol=self.atol, max_steps=self.max_steps, preconditioner=self.preconditioner)

    def init(self, operator: LinearOperator) -> Choice:
        """The chosen solver, with what it prepared."""
        solver, reason = self.choose(operator)
        return Choice(solver, solver.init(operator), reason)

    def transpose(self, prepared: Choice) -> Choice:
        """The same solver, with what it prepared turned around."""
        return replace(prepared, prepared=prepared.solver.transpose(prepared.prepared))

    def solve_flat(self, operator: LinearOperator, prepared: Choice, b: Tensor, x0: Tensor | None) -> FlatSolution:
        """Solve for the rows of ``b`` with the chosen solver."""
        found = prepared.solver.solve_flat(operator, prepared.prepared, b, x0)
        return replace(found, method=f"{type(prepared.solver).__name__}: {prepared.reason}")
