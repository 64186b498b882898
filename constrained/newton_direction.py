"""The Newton step on the KKT conditions, by factorisation or by iteration, with the curvature of a minimum."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from constrained.inertia import CorrectedKKT, InertiaCorrection
from constrained.kkt_preconditioner import prepare
from constrained.kkt_system import KKTSystem
from constrained.sketch_solver import SketchAndProject
from implicit import LinearOperator, LinearSolver, SparseLU
from implicit.linear_solvers.dense import DenseSolver

SHIFTS = InertiaCorrection()
"""The sequence of shifts, that of the interior-point method."""
SIGMA = 10.0


@dataclass
class NewtonDirection:
    """A KKT matrix with shifts, and answers for it.

    Attributes:
        step: the answer, ``(d, multiplier step)``, shape (n + m,).
        shift: the primal shift p.
        dual_shift: r, on top of what was asked for.
        last: what to hand to the next correction.
        linear_steps: of the linear solver; factorisations count one.
        exact: whether the answer is as accurate as it gets.
        success: whether the curvature is right.
        finite: whether all numbers are.
    """

    step: Tensor
    shift: float
    dual_shift: float
    last: float
    linear_steps: int
    exact: bool
    success: bool
    finite: bool
    solve: Any  # (right-hand side, start, relative tolerance) to an answer and its linear steps

    def tighten(self, rhs: Tensor, rtol: float) -> None:
        """Go on from the answer to a smaller residual."""
        self.step, steps = self.solve(rhs, self.step, rtol)
        self.linear_steps += steps

    def other(self, rhs: Tensor, rtol: float) -> Tensor:
        """The answer for another right-hand side."""
        found, steps = self.solve(rhs, None, rtol)
        self.linear_steps += steps
        return found


@dataclass(frozen=True)
class DirectionFinder:
    """Solves ``[[H + p I, J^T], [J, -R - r I]] z = rhs`` with shifts that make its answer a descent direction.

    Args:
        solver: LDLT tells the inertia, which has to be (n, m, 0); the others are judged by the curvature along their
            answer (Chiang and Zavala 2016).
        generator: of solvers that draw.
    """

    solver: LinearSolver
    generator: torch.Generator

    @property
    def direct(self) -> bool:
        """Whether the solver factorises."""
        return isinstance(self.solver, DenseSolver | SparseLU)

    def find(
        self,
        hessian: LinearOperator,
        jacobian: LinearOperator,
        rhs: Tensor,
        *,
        last: float,
        rtol: float,
        start: float = 0.0,
        dual_diagonal: Tensor | float = 0.0,
    ) -> NewtonDirection:
        """The direction for ``rhs``, p at least ``start``; iterative solvers stop at a relative residual of rtol."""
        if not self.direct:
            return self._iterate(hessian, jacobian, rhs, (last, start), rtol, dual_diagonal)
        rule = replace(SHIFTS, linear_solver=self.solver)
        found = rule.correct(hessian, jacobian, rhs, last=last, start=start, dual_diagonal=dual_diagonal)
        return NewtonDirection(
            step=found.step,
            shift=found.primal,
            dual_shift=found.dual,
            last=found.primal,
            linear_steps=found.attempts,
            exact=True,
            success=found.success,
            finite=found.finite,
            solve=_factorised(found),
        )

    def _iterate(
        self,
        hessian: LinearOperator,
        jacobian: LinearOperator,
        rhs: Tensor,
        shifts: tuple[float, float],
        rtol: float,
        dual_diagonal: Tensor | float,
    ) -> NewtonDirection:
        (last, shift), steps = shifts, 0
        solve: _Iterative | None = None
        while True:
            system = KKTSystem(hessian, jacobian, primal_shift=shift, dual_shift=dual_diagonal)
            solve = _Iterative(self, system, solve)
            z, taken = solve(rhs, None, rtol)
            steps += taken
            finite = bool(torch.isfinite(z).all())
            success = finite and _curved(system, z)
            if success or not finite or shift > SHIFTS.largest:
                return NewtonDirection(z, shift, 0.0, shift, steps, False, success, finite, solve)
            if shift:
                shift *= SHIFTS.increase if last else SHIFTS.first_increase
            else:
                shift = max(SHIFTS.smallest, SHIFTS.decrease * last) if last else SHIFTS.first


def _factorised(found: CorrectedKKT) -> Any:
    return lambda rhs, start, rtol: (found.solve(rhs), 1)


class _Iterative:
    """A system that is solved by iteration."""

    def __init__(self, finder: DirectionFinder, system: KKTSystem, before: "_Iterative | None") -> None:
        self.finder, self.system = finder, system
        solver = finder.solver
        self.prepared: Any
        if isinstance(solver, SketchAndProject):
            self.prepared = solver.init(system, finder.generator)
        else:
            self.prepared = prepare(solver, system, None if before is None else before.prepared)

    def __call__(self, rhs: Tensor, start: Tensor | None, rtol: float) -> tuple[Tensor, int]:
        solver: Any = self.finder.solver
        if any(f.name == "rtol" for f in fields(solver)):
            solver = replace(solver, rtol=rtol if solver.rtol is None else min(rtol, solver.rtol))
        with torch.no_grad():
            found = solver.solve_flat(self.system, self.prepared, rhs[None], None if start is None else start[None])
        return found.value[0], found.steps


def _curved(system: KKTSystem, z: Tensor) -> bool:
    """Whether ``d^T (H + p I) d + y^T R y + sigma |J d|^2 >= kappa |d|^2``.

    On directions with ``J d = 0`` that is the curvature that counts; the other part of d says nothing about it, and
    sigma, ten times the size of H over that of ``J^T J``, makes up for whatever it contributes.
    """
    d, y = system.split(z)
    top, bottom = system.split(system.flat_mv(z))
    across = system.jacobian.flat_mv(d)
    bent = top - system.jacobian.T.flat_mv(y)
    back = system.jacobian.T.flat_mv(across)
    sizes = [torch.linalg.vector_norm(v) for v in (bent, d, back, across)]
    tiny = torch.finfo(z.dtype).tiny
    sigma = SIGMA * (sizes[0] / sizes[1].clamp(min=tiny)) * (sizes[3] / sizes[2].clamp(min=tiny)) ** 2
    curvature = d @ bent + (across - bottom) @ y + sigma * sizes[3] ** 2
    return bool(curvature >= SHIFTS.curvature * (d @ d))
