"""KKT systems that are known by products: the sparse matrices behind them, recovered, precondition the iteration."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from constrained.kkt_system import KKTSystem
from constrained.sparse_recovery import recover
from implicit import GMRES, MINRES, LinearOperator, LinearSolver, Sparse, Status, hutchinson_diagonal
from implicit.linear_solvers.base import FlatSolution, check_positive_int, check_tolerances, default_rtol
from implicit.linear_solvers.sparse_lu import equilibrated

PRECONDITIONED_STEPS = 60
"""Two cycles; a factorisation that is worth its while needs less than ten steps."""
FEW_STEPS, BEYOND = 10, 1e-4
"""A solve that took no more steps is continued, for no more, to that share of its tolerance."""
SAMPLES = 10
"""Products for the diagonal of a Hessian that is not sparse."""
SMALLEST_DIAGONAL = 1e-8
REGULARIZATION = 1e-10
"""Share of diag(J D^-1 J^T) that is subtracted from the preconditioner's dual block, for dependent rows."""
FREE_FILL = 5e6
"""Numbers that factors may hold however small the matrix: 60 MB; graphs without a grid's locality fill in."""


@dataclass(frozen=True, kw_only=True)
class ProbedKKT(LinearSolver):
    """MINRES, and where that takes long GMRES with a sparse factorisation of a matrix that products reveal.

    A KKT matrix of grid or chain structure has few entries, but automatic differentiation gives only its products. If
    ``patience`` steps of MINRES do not solve the system, J and H are recovered (:mod:`constrained.sparse_recovery`,
    some 100 products for stencils), H by its diagonal where it is not sparse, and ``[[H + p I, J^T], [J, -R]]`` is
    factorised incompletely with at most ``fill`` numbers per entry (or five million), so that memory is linear in the
    entries. GMRES goes on from where MINRES was; its residual is that of the true system. If J cannot be recovered, or
    GMRES fails, MINRES goes on alone: the price is at most some 300 products and 60 steps per system.

    Args:
        rtol, atol: tolerances on the true residual, as for :class:`implicit.MINRES`.
        max_steps: limit for the last MINRES; None means 10 per unknown.
        patience: steps of MINRES before anything is recovered.
        fill: most numbers that factors hold for each entry of the matrix.
        drop: entries below this share of their column are left out of the factors.

    Raises:
        ValueError: if a number is out of its range.
        TypeError: in ``init``, for an operator that is no KKTSystem.

    Example:
        >>> import torch, implicit, constrained
        >>> x = torch.linspace(-1, 1, 200, dtype=torch.float64)
        >>> H = implicit.Hessian(lambda x: (x.abs() ** 3).sum() + (x[1:] * x[:-1]).sum(), x)
        >>> J = implicit.Jacobian(lambda x: x[2:] - 2 * x[1:-1] + x[:-2], x)
        >>> system = constrained.KKTSystem(H, J)
        >>> found = constrained.ProbedKKT().solve(system, torch.ones(398, dtype=x.dtype))
        >>> found.status.name, found.steps < 130  # the first 100 are those of MINRES
        ('CONVERGED', True)
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None
    patience: int = 100
    fill: float = 30.0
    drop: float = 1e-4

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol, self.max_steps)
        check_positive_int(self.patience, "patience")
        if not self.fill >= 1:
            raise ValueError(f"fill must be at least 1, got {self.fill!r}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must lie in [0, 1), got {self.drop!r}")

    def init(self, operator: LinearOperator, known: "ProbedSystem | None" = None) -> "ProbedSystem":
        """Nothing yet; with ``known``, of the same H and J and other shifts, what was recovered then."""
        if not isinstance(operator, KKTSystem):
            raise TypeError(f"ProbedKKT is for KKTSystem, got {type(operator).__name__}; use MINRES or GMRES")
        prepared = ProbedSystem()
        if known is not None and known.probed:
            prepared.probed, prepared.hessian, prepared.jacobian = True, known.hessian, known.jacobian
            prepared.factorise(operator, self.fill, self.drop)
        return prepared

    def solve_flat(
        self, operator: LinearOperator, prepared: "ProbedSystem", b: Tensor, x0: Tensor | None
    ) -> FlatSolution:
        """Solve for the rows of ``b``, shape ``(k, n + m)``."""
        assert isinstance(operator, KKTSystem)
        plain = MINRES(rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)
        steps = 0
        if not prepared.probed:
            limit = self.patience if self.max_steps is None else min(self.patience, self.max_steps)
            first = replace(plain, max_steps=limit).solve_flat(operator, None, b, x0)
            if first.status in (Status.CONVERGED, Status.NONFINITE) or limit == self.max_steps:
                return first
            steps, x0 = first.steps, first.value
            prepared.probe(operator)
            prepared.factorise(operator, self.fill, self.drop)
        if prepared.apply is not None:
            helped = GMRES(rtol=self.rtol, atol=self.atol, max_steps=PRECONDITIONED_STEPS)
            found = helped.solve_flat(operator, prepared.apply, b, x0)
            if found.status is Status.CONVERGED and found.steps <= FEW_STEPS:
                found = self._beyond(helped, operator, prepared, b, found)
            steps += found.steps
            if found.status is Status.CONVERGED:
                return replace(found, steps=steps)
            x0 = found.value if bool(torch.isfinite(found.value).all()) else x0
        last = plain.solve_flat(operator, None, b, x0)
        return replace(last, steps=steps + last.steps)

    def _beyond(
        self, solver: GMRES, operator: KKTSystem, prepared: "ProbedSystem", b: Tensor, found: FlatSolution
    ) -> FlatSolution:
        """A few steps more: they are cheaper than another Newton step, which would have to recover H and J again."""
        rtol = default_rtol(b.dtype) if self.rtol is None else self.rtol
        closer = replace(solver, rtol=BEYOND * rtol, atol=BEYOND * self.atol, max_steps=FEW_STEPS)
        better = closer.solve_flat(operator, prepared.apply, b, found.value)
        if not bool((better.residuals <= found.residuals).all()):
            return replace(found, steps=found.steps + better.steps)
        return replace(found, value=better.value, residuals=better.residuals, steps=found.steps + better.steps)


def prepare(solver: LinearSolver, operator: LinearOperator, before: Any = None) -> Any:
    """``solver.init(operator)``; ``before`` is what it returned for the same H and J with other shifts."""
    if isinstance(solver, ProbedKKT):
        return solver.init(operator, before)
    return solver.init(operator)


@dataclass
class ProbedSystem:
    """What is known of a system.

    Attributes:
        probed: whether that was tried.
        hessian, jacobian: sparse; None where J has too many entries. H is its diagonal where it has.
        apply: the preconditioner, for rows.
    """

    probed: bool = False
    hessian: scipy.sparse.csr_array | None = None
    jacobian: scipy.sparse.csr_array | None = None
    apply: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def probe(self, system: KKTSystem) -> None:
        """Recover both matrices from products."""
        self.probed = True
        self.jacobian = recover(system.jacobian)
        if self.jacobian is None:
            return
        self.hessian = recover(system.hessian)
        if self.hessian is None:
            diagonal = hutchinson_diagonal(system.hessian, SAMPLES).reshape(-1).abs().cpu().numpy()
            diagonal = np.maximum(diagonal, SMALLEST_DIAGONAL * diagonal.max(initial=1.0))
            self.hessian = scipy.sparse.csr_array(scipy.sparse.diags_array(diagonal))

    def factorise(self, system: KKTSystem, fill: float, drop: float) -> None:
        """The preconditioner for the shifts of ``system``; none where a pivot is zero."""
        if self.hessian is None or self.jacobian is None:
            return
        half = 0.5 * (self.hessian + self.hessian.T)
        diagonal = np.abs(half.diagonal() + system.primal.cpu().numpy())
        diagonal = np.maximum(diagonal, SMALLEST_DIAGONAL * diagonal.max(initial=1.0))
        dual = system.dual + REGULARIZATION * torch.as_tensor(self.jacobian.power(2) @ (1.0 / diagonal)).to(
            system.device
        )
        parts = Sparse(half, symmetric=True), Sparse(self.jacobian)
        matrix = KKTSystem(*parts, diagonal=system.primal, dual_shift=dual).to_sparse()
        assert matrix is not None
        self.apply = _incomplete_inverse(matrix, max(fill, FREE_FILL / max(matrix.nnz, 1)), drop)


def _incomplete_inverse(matrix: scipy.sparse.csc_array, fill: float, drop: float) -> Callable[[Tensor], Tensor] | None:
    scaled, left, right = equilibrated(matrix)
    try:
        factors = scipy.sparse.linalg.spilu(scaled, drop_tol=drop, fill_factor=fill)
    except RuntimeError as error:
        if "singular" not in str(error):
            raise
        return None

    def apply(rows: Tensor) -> Tensor:
        found = right[:, None] * factors.solve(left[:, None] * rows.T.cpu().numpy())
        return torch.as_tensor(found.T.copy(), device=rows.device)

    return apply
