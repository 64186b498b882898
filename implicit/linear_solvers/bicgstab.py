"""BiCGSTAB for any square operator, with short recurrences (van der Vorst 1992)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit.linear_solvers.base import Apply, Preconditioner
from implicit.linear_solvers.krylov import KrylovSolver
from implicit.linear_solvers.sweep import End, Recurrence, Sweep, System, safe_divide
from implicit.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class BiCGSTAB(KrylovSolver):
    """Biconjugate gradients, stabilized: two products per step, eight vectors, and no transpose.

    The residual goes up and down; the best iterate is the answer. Divisions by zero (skew-symmetric operators meet one
    at once) are detected, the iteration starts again from the true residual, and where that does not help the run ends
    as LINEAR_SOLVE_FAILED. Preconditioned from the right.

    Args:
        rtol: relative tolerance on the true residual; None means ``sqrt(eps)`` of the dtype.
        atol: absolute tolerance on the true residual.
        max_steps: step limit; None means ``10 n``.
        preconditioner: an approximate inverse of A.

    Example:
        >>> import torch, implicit
        >>> A = implicit.Dense(torch.tensor([[3.0, 1.0], [-1.0, 2.0]]), symmetric=False)
        >>> found = implicit.BiCGSTAB().solve(A, torch.tensor([4.0, 1.0]))
        >>> found.status.name, found.products
        ('CONVERGED', 5)
    """

    preconditioner: Preconditioner | None = None

    cure: ClassVar[str] = "use GMRES or LSMR"

    def init(self, operator: LinearOperator) -> Apply | None:
        """The preconditioner's action, or None."""
        self.check(operator)
        return self.preconditioner.init(operator) if self.preconditioner is not None else None

    def sweep(self, system: System, r: Tensor, goals: Tensor, limit: int) -> Sweep:
        """BiCGSTAB from a zero start, with r as the shadow residual."""
        return _Rows(system, r, goals).run(limit)


class _Rows(Recurrence):
    """The recurrence; scalars have shape (k,)."""

    def __init__(self, system: System, r: Tensor, goals: Tensor) -> None:
        super().__init__(system, r, goals)
        self.r = self.shadow = self.p = r
        self.rho = torch.linalg.vecdot(r, r)
        self.shadow_norm = self.best = torch.linalg.vector_norm(r, dim=1)
        self.best_x = self.x

    def advance(self) -> Tensor:
        toward = self.system.precondition(self.p)
        v = self.system.apply(toward)
        bottom = torch.linalg.vecdot(self.shadow, v)
        broken = bottom.abs() <= self.eps * self.shadow_norm * torch.linalg.vector_norm(v, dim=1)
        alpha = torch.where(broken, 0.0, self.rho / torch.where(broken, 1.0, bottom))[:, None]
        s = torch.addcmul(self.r, alpha, v, value=-1.0)
        along = self.system.precondition(s)
        t = self.system.apply(along)
        ts, tt = torch.linalg.vecdot(t, s), torch.linalg.vecdot(t, t)
        left = torch.linalg.vector_norm(s, dim=1)
        stuck = ts.abs() <= self.eps * torch.sqrt(tt) * left
        omega = safe_divide(ts, tt)[:, None]
        self.x = torch.addcmul(self.x, alpha, toward).addcmul_(omega, along)
        self.r = torch.addcmul(s, omega, t, value=-1.0)
        size = torch.linalg.vector_norm(self.r, dim=1)
        rho = torch.linalg.vecdot(self.shadow, self.r)
        lost = rho.abs() <= self.eps * self.shadow_norm * size
        beta = safe_divide(rho * alpha[:, 0], self.rho * omega[:, 0])[:, None]
        self.p = torch.addcmul(self.r, beta, torch.addcmul(self.p, omega, v, value=-1.0))
        self.rho = rho
        better = size < self.best
        self.best = torch.where(better, size, self.best)
        self.best_x = torch.where(better[:, None], self.x, self.best_x)
        codes = self.reached(size)
        codes.masked_fill_((broken | stuck | lost) & (codes == 0), int(End.BREAKDOWN))
        return codes.masked_fill_(~torch.isfinite(size), int(End.NONFINITE))

    def solution(self) -> Tensor:
        return self.best_x
