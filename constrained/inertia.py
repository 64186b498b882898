"""Shifts that make the KKT matrix of a Newton step that of a strictly convex model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from constrained.kkt_preconditioner import ProbedKKT, prepare
from constrained.kkt_system import KKTSystem
from constrained.lagrangian import Lagrangian
from implicit import (
    CG,
    GMRES,
    LDLT,
    LSMR,
    LU,
    MINRES,
    Cholesky,
    Dense,
    LinearOperator,
    LinearSolver,
    Neumann,
    NormalCG,
    SparseLU,
    Status,
)
from implicit.linear_solvers.dense import DenseSolver
from implicit.tree import Tree

DENSE = 2_000
"""Up to this many rows a matrix whose parts are dense is factorised with its inertia."""
DENSE_IF_SPARSE = 400
"""The same where the parts are sparse: below this, the dense factorisation is no slower."""
REFINEMENTS = 4
EQUILIBRATIONS = 6


def require_kkt_solver(solver: Any) -> None:
    """Refuse what cannot solve KKT systems; None stands for a choice by size.

    Raises:
        TypeError: if it is no linear solver.
        ValueError: if it needs definite matrices.
    """
    if solver is None:
        return
    if not isinstance(solver, LinearSolver):
        known = {cls.__name__.lower(): cls for cls in (LDLT, LU, MINRES, GMRES, LSMR, NormalCG, SparseLU)}
        name = solver if isinstance(solver, str) else getattr(solver, "__name__", "")
        cls = known.get(name.lower(), MINRES)
        raise TypeError(f"linear_solver must be such as implicit.{cls.__name__}(), or None; got {solver!r}")
    if isinstance(solver, CG | Cholesky | Neumann):
        raise ValueError(
            f"linear_solver={type(solver).__name__}(): KKT matrices are indefinite, and it needs definite ones: use "
            "implicit.MINRES() or implicit.LDLT()"
        )


@dataclass(frozen=True, kw_only=True)
class InertiaCorrection:
    """Finds shifts p and r such that ``[[H + D + p I, J^T], [J, -R - r I]]`` has n positive and m negative eigenvalues.

    That is the inertia (n, m, 0) of a quadratic model with a unique minimum on its linear constraints, so that the step
    descends. Where it is wrong, p grows by factors, starting from a fraction of the last one that was needed (Waechter
    and Biegler 2006, algorithm IC); r is set where the matrix is singular, for constraints that depend on each other.

    Solvers that do not tell the inertia are judged by the step itself (Chiang and Zavala 2016): the shift grows until

    ``d^T (H + D + p I) d + y^T (R + r I) y + max(y^T b, 0) >= curvature ||d||^2``

    holds for the solution ``(d, y)`` of the system with the right-hand side ``(a, b)``.

    Args:
        linear_solver: None takes :class:`implicit.LDLT` up to 2,000 rows (400 where the parts are sparse),
            :class:`implicit.SparseLU` for larger sparse parts and :class:`constrained.ProbedKKT` else.
        first: p at the first attempt of all.
        smallest, largest: limits of p > 0. Beyond the largest the correction has failed.
        decrease: what the last p is multiplied by for a first attempt.
        increase, first_increase: factors between attempts, the latter as long as no shift has ever been needed.
        dual: r where one is needed.
        curvature: of the step, relative to its square, that is asked from solvers without inertia.

    Raises:
        TypeError, ValueError: if ``linear_solver`` is none, or needs definite matrices.
        ValueError: if a factor or a limit has the wrong sign or order.
    """

    linear_solver: LinearSolver | None = None
    first: float = 1e-4
    smallest: float = 1e-20
    largest: float = 1e20
    decrease: float = 1 / 3
    increase: float = 8.0
    first_increase: float = 100.0
    dual: float = 1e-8
    curvature: float = 1e-10

    def __post_init__(self) -> None:
        require_kkt_solver(self.linear_solver)
        if not 0 < self.smallest <= self.first <= self.largest:
            raise ValueError(
                "the limits must be ordered 0 < smallest <= first <= largest, got "
                f"{self.smallest}, {self.first}, {self.largest}"
            )
        if not (0 < self.decrease < 1 < self.increase and self.first_increase > 1):
            raise ValueError(
                "decrease must lie in (0, 1), increase and first_increase above 1, got "
                f"{self.decrease}, {self.increase}, {self.first_increase}"
            )
        for name in ("dual", "curvature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")

    def correct(
        self,
        hessian: LinearOperator,
        jacobian: LinearOperator,
        rhs: Tensor,
        *,
        diagonal: Tensor | None = None,
        dual_diagonal: Tensor | float = 0.0,
        last: float = 0.0,
        start: float = 0.0,
        dual: float | None = None,
    ) -> "CorrectedKKT":
        """Factorise with growing shifts until the matrix is right.

        Args:
            hessian: H, shape (n, n), symmetric, on vectors.
            jacobian: J, shape (m, n), on vectors.
            rhs: ``(a, b)``, shape (n + m,); its solution is :attr:`CorrectedKKT.step`.
            diagonal: D, shape (n,); zero if None.
            dual_diagonal: R >= 0, a number or shape (m,).
            last: the p that the call before needed (:attr:`CorrectedKKT.last`).
            start: a p from which to begin instead of trying none at all.
            dual: r where one is needed, in place of the field; interior-point methods let it shrink.

        Returns:
            The system with its factors; ``success`` is False where no shift up to ``largest`` was enough.

        Example:
            >>> import torch, implicit
            >>> from constrained.inertia import InertiaCorrection
            >>> H = implicit.Dense(torch.diag(torch.tensor([-2.0, 1.0])), positive_definite=False)
            >>> J = implicit.Dense(torch.tensor([[0.0, 1.0]]))
            >>> found = InertiaCorrection(first=1.0).correct(H, J, torch.tensor([1.0, 0.0, 0.0]))
            >>> found.success, found.inertia, found.primal > 2
            (True, (2, 1, 0), True)
        """
        own = self.dual if dual is None else dual
        shifts = _Shifts(self, last, start)
        n, dual_shift, attempts = hessian.shape[0], 0.0, 0
        tried: CorrectedKKT | None = None
        while True:
            top = (rhs.new_zeros(n) if diagonal is None else diagonal) + shifts.value
            bottom = rhs.new_zeros(len(rhs) - n) + dual_diagonal + dual_shift
            system = KKTSystem(hessian, jacobian, diagonal=top, dual_shift=bottom)
            scale = torch.cat([top, bottom])
            tried = CorrectedKKT(self, system, rhs, scale, (shifts.value, dual_shift, last), tried)
            attempts += 1
            tried.attempts = attempts
            if tried.success or not tried.finite:
                return tried
            if tried.singular and not dual_shift and system.m:
                dual_shift = own
                # Without a sign of negative curvature the second block alone may be at fault.
                if tried.blames_constraints:
                    continue
            if not shifts.grow():
                return tried


class _Shifts:
    """The sequence of p."""

    def __init__(self, rule: InertiaCorrection, last: float, start: float) -> None:
        self.rule, self.last, self.value = rule, last, start

    def grow(self) -> bool:
        rule = self.rule
        if not self.value:
            self.value = max(rule.smallest, rule.decrease * self.last) if self.last else rule.first
        else:
            self.value *= rule.increase if self.last else rule.first_increase
        return self.value <= rule.largest


class CorrectedKKT:
    """A KKT system with shifts, factorised.

    Attributes:
        system: the operator with its shifts.
        primal, dual: the shifts p and r.
        last: what to hand to the next correction: p, or the one before where none was needed.
        inertia: (positive, negative, zero) eigenvalues; None if the solver does not tell.
        step: the solution for the right-hand side that the correction was made with.
        success: whether inertia or curvature is right.
        singular: whether the matrix, or an iterative solver's answer, is not to be relied on.
        finite: whether all entries are numbers.
        attempts: factorisations.
    """

    def __init__(
        self,
        rule: InertiaCorrection,
        system: KKTSystem,
        rhs: Tensor,
        diagonal: Tensor,
        shifts: tuple[float, float, float],
        before: "CorrectedKKT | None" = None,
    ) -> None:
        self.system, (self.primal, self.dual, last) = system, shifts
        self.last = self.primal or last
        self.attempts = 1
        self.inertia: tuple[int, int, int] | None = None
        self.step, self.success, self.singular, self.blames_constraints = torch.zeros_like(rhs), False, False, False
        self._solver, self._solved = rule.linear_solver or default_solver(system), False
        self._scaled, self._scale = _equilibrated(system, self._solver, diagonal)
        self._prepared: Any = prepare(self._solver, self._scaled, None if before is None else before._prepared)
        self.finite = bool(torch.isfinite(rhs).all()) and getattr(self._prepared, "finite", True)
        if not self.finite:
            return
        self.inertia = getattr(self._prepared, "inertia", None)
        if self.inertia is None:
            self.step = self.solve(rhs)
            self.finite = bool(torch.isfinite(self.step).all())
            self.singular = self.blames_constraints = not self._solved
            self.success = self._solved and self._curved(rhs, rule.curvature)
            return
        positive, negative, zero = self.inertia
        self.singular = zero > 0 or negative < system.m
        self.blames_constraints = self.singular and positive >= system.n
        self.success = self.inertia == (system.n, system.m, 0)
        if self.success:
            self.step = self.solve(rhs)

    def solve(self, rhs: Tensor) -> Tensor:
        """The solution for another right-hand side, shape (n + m,), refined until its residual stops falling."""
        best = self._apply(rhs)
        residual = rhs - self.system.flat_mv(best)
        size = float(residual.abs().amax()) if len(rhs) else 0.0
        for _ in range(REFINEMENTS):
            if not size > 8 * torch.finfo(rhs.dtype).eps * float(rhs.abs().amax()):
                break
            trial = best + self._apply(residual)
            left = rhs - self.system.flat_mv(trial)
            found = float(left.abs().amax())
            if not found < size:
                break
            better = found < 0.5 * size
            best, residual, size = trial, left, found
            if not better:
                break
        return best

    def _apply(self, rhs: Tensor) -> Tensor:
        with torch.no_grad():
            found = self._solver.solve_flat(self._scaled, self._prepared, (rhs * self._scale)[None], None)
        self._solved = found.status is Status.CONVERGED and not found.singular
        return found.value[0] * self._scale

    def _curved(self, rhs: Tensor, curvature: float) -> bool:
        d, y = self.system.split(self.step)
        top, bottom = self.system.split(self.system.flat_mv(self.step))
        b = self.system.split(rhs)[1]
        through = float(y @ self.system.jacobian.flat_mv(d)) if len(y) else 0.0
        primal = float(d @ top) - through
        dual = through - float(y @ bottom)
        return primal + dual + max(float(y @ b), 0.0) >= curvature * float(d @ d)


def default_solver(system: KKTSystem) -> LinearSolver:
    """LDL^T where the matrix is small or dense, sparse LU where it is sparse, :class:`ProbedKKT` else."""
    if system.size > DENSE_IF_SPARSE and system.to_sparse() is not None:
        return SparseLU()
    if isinstance(system.hessian, Dense) or system.size <= DENSE:
        return LDLT()
    return ProbedKKT()


def solver_for(problem: Lagrangian, x: Tensor) -> LinearSolver:
    """:func:`default_solver` of the system at x; derivatives are evaluated where their kind is not known before."""
    declared = problem.problem
    supplied = declared.equality_jacobian or declared.inequality_jacobian or declared.has_hessian
    if problem.n + problem.constraints <= DENSE_IF_SPARSE or (problem.dense and not supplied):
        return LDLT()
    point = problem.at(x)
    return default_solver(KKTSystem(point.hessian(torch.zeros_like(point.constraints)), point.jacobian))


class _Scaled(LinearOperator):
    """``diag(s) K diag(s)``, for solvers that multiply only."""

    symmetric = True

    def __init__(self, system: KKTSystem, scale: Tensor) -> None:
        super().__init__(system.like)
        self.system, self.scale = system, scale

    def mv(self, v: Tree) -> Tree:
        return self.scale * self.system.mv(self.scale * v)

    def flat_mv(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.scale * self.system.flat_mv(self.scale * vector)


def _equilibrated(system: KKTSystem, solver: LinearSolver, diagonal: Tensor) -> tuple[LinearOperator, Tensor]:
    """``diag(s) K diag(s)`` with rows of size about one, and s, powers of two; inertia does not change (Sylvester)."""
    if isinstance(solver, DenseSolver):
        matrix = system.to_dense()
        scale = torch.ones_like(matrix[0])
        for _ in range(EQUILIBRATIONS):
            size = (scale[:, None] * matrix * scale).abs().amax(dim=1)
            usable = (size > 0) & torch.isfinite(size)
            scale = scale * torch.exp2(torch.round(-0.5 * torch.log2(torch.where(usable, size, 1.0))))
        return Dense(scale[:, None] * matrix * scale, symmetric=True, positive_definite=False), scale
    if isinstance(solver, SparseLU | ProbedKKT):  # they equilibrate by themselves
        return system, torch.ones_like(system.like)
    scale = torch.exp2(torch.round(-0.5 * torch.log2(diagonal.abs().clamp(min=1.0))))
    return _Scaled(system, scale), scale
