"""The Newton step on the KKT conditions, with the matrix made to have the inertia of a minimum."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from constrained.kkt_system import KKTSystem
from implicit import LDLT, Dense, LinearOperator, LinearSolver

FIRST_SHIFT = 1e-4
"""The first shift tried, relative to the largest entry of the diagonal of H or to one."""
GROWTH, FIRST_GROWTH, DECAY = 8.0, 100.0, 1.0 / 3.0
LARGEST_SHIFT = 1e40
DUAL_SHIFT = 1e-8
KAPPA = 1e-10
"""The curvature along a step that counts as positive, from solvers that find no inertia."""


@dataclass
class NewtonSystem:
    """The matrix of one step, its factors, and how it was corrected.

    Attributes:
        matrix: ``[[H + p I, J^T], [J, -r]]``.
        solver: what answers.
        prepared: what the solver keeps between right-hand sides.
        shift, dual_shift: p and r.
        steps: linear solver steps so far.
    """

    matrix: KKTSystem
    solver: LinearSolver
    shift: float
    dual_shift: float
    steps: int = 0
    balance: Any = None
    balanced: Any = None
    prepared: Any = None

    def solve(self, b: Tensor, start: Tensor | None = None, rtol: float | None = None) -> tuple[Tensor, Any]:
        """The answer to ``matrix z = b``, from ``start``, to the relative residual ``rtol`` where solvers iterate."""
        solver = self.solver if rtol is None else with_rtol(self.solver, rtol)
        if self.balance is not None:
            found = solver.solve_flat(self.balanced, self.prepared, (self.balance * b)[None], None)
            self.steps += found.steps
            return self.balance * found.value[0], found
        found = solver.solve_flat(self.matrix, self.prepared, b[None], None if start is None else start[None])
        self.steps += found.steps
        return found.value[0], found

    def prepare(self) -> None:
        if isinstance(self.solver, LDLT):
            dense = self.matrix.to_dense()
            self.balance = balance(dense)
            self.balanced = Dense(self.balance[:, None] * dense * self.balance, positive_definite=False)
            self.prepared = self.solver.init(self.balanced)
        else:
            self.prepared = self.solver.init(self.matrix)


def balance(matrix: Tensor) -> Tensor:
    scale = torch.ones_like(matrix[0])
    for _ in range(4):
        size = (scale[:, None] * matrix * scale).abs().amax(dim=1)
        scale = scale * torch.exp2(torch.round(-0.5 * torch.log2(torch.where(size > 0, size, 1.0))))
    return scale


def with_rtol(solver: LinearSolver, rtol: float) -> LinearSolver:
    """The same solver with another tolerance, where it has one."""
    has = any(f.name == "rtol" for f in fields(solver))  # type: ignore[arg-type]
    return replace(solver, rtol=rtol) if has else solver  # type: ignore[type-var]


def corrected(
    hessian: LinearOperator,
    jacobian: LinearOperator,
    solver: LinearSolver,
    b: Tensor,
    *,
    last_shift: float,
    least_shift: float = 0.0,
    dual_shift: float = 0.0,
    dual_weights: Tensor,
    rtol: float | None = None,
) -> tuple[NewtonSystem, Tensor, Any] | None:
    """The system whose matrix has inertia (n, m, 0), and its answer for b; None if no shift achieves that.

    The shift of the last iteration is the guide: a third of it is tried first, then eight times as much until the
    inertia fits (Waechter and Biegler 2006, algorithm IC). Solvers that find no inertia are asked for positive
    curvature along their step (Chiang and Zavala 2016).
    """
    n, m = hessian.shape[0], jacobian.shape[0]
    shift, dual, steps = least_shift, dual_shift, 0
    while shift <= LARGEST_SHIFT:
        matrix = KKTSystem(hessian, jacobian, primal_shift=shift, dual_shift=dual * dual_weights)
        system = NewtonSystem(matrix, solver, shift, dual)
        system.prepare()
        z, found = system.solve(b, rtol=rtol)
        system.steps += steps
        if not bool(torch.isfinite(z).all()):
            return None
        if found.inertia is None:
            d = z[:n]
            good = bool(d @ (hessian.flat_mv(d) + shift * d) >= KAPPA * (d @ d)) or bool((d == 0).all())
        else:
            good = found.inertia == (n, m, 0)
        if good:
            return system, z, found
        steps = system.steps
        if found.inertia is not None and not dual and (found.inertia[2] > 0 or found.inertia[1] < m):
            dual = DUAL_SHIFT
            if found.inertia[0] == n:
                continue
        if shift == least_shift:
            first = FIRST_SHIFT if not last_shift else DECAY * last_shift
            shift = max(first, 2 * least_shift)
        else:
            shift *= FIRST_GROWTH if not last_shift else GROWTH
    return None
