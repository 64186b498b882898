"""Conjugate gradients for symmetric positive definite operators (Hestenes and Stiefel 1952)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit.linear_solvers.base import Apply, Preconditioner, require_symmetric
from implicit.linear_solvers.krylov import KrylovSolver
from implicit.linear_solvers.sweep import End, Recurrence, Sweep, System
from implicit.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class CG(KrylovSolver):
    """Preconditioned conjugate gradients, for any number of right-hand sides at once.

    One product per step, and one to check the residual. An operator that is not positive definite is reported
    (``indefinite``, status LINEAR_SOLVE_FAILED) with the last iterate before the offending direction. On a singular
    positive semidefinite operator and a b in its range, the answer from a zero start is that of minimum norm.

    Args:
        rtol: relative tolerance on the true residual; None means ``sqrt(eps)`` of the dtype.
        atol: absolute tolerance on the true residual.
        max_steps: step limit; None means ``10 n`` (rounding can need more than n).
        preconditioner: builds an approximate inverse of A.

    Example:
        >>> import torch, implicit
        >>> A = implicit.Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]]))
        >>> found = implicit.CG().solve(A, torch.tensor([1.0, 2.0]))
        >>> found.status.name, found.steps, found.products
        ('CONVERGED', 2, 3)
    """

    preconditioner: Preconditioner | None = None

    monotone: ClassVar[bool] = False

    def init(self, operator: LinearOperator) -> Apply | None:
        """The preconditioner's action, or None."""
        self.check(operator)
        return self.preconditioner.init(operator) if self.preconditioner is not None else None

    def check(self, operator: LinearOperator) -> None:
        """Refuse operators that are not declared symmetric."""
        require_symmetric(operator, "CG", "GMRES or LSMR")

    def sweep(self, system: System, r: Tensor, goals: Tensor, limit: int) -> Sweep:
        """Conjugate gradients from a zero start."""
        return _single(system, r[0], goals, limit) if len(r) == 1 else _Rows(system, r, goals).run(limit)


class _Rows(Recurrence):
    """The recurrence for several rows."""

    def __init__(self, system: System, r: Tensor, goals: Tensor) -> None:
        super().__init__(system, r, goals)
        self.r = r.clone()
        self.p = torch.zeros_like(r)
        self.rz = torch.full_like(goals, torch.inf)

    def advance(self) -> Tensor:
        z = self.system.precondition(self.r)
        rz = torch.linalg.vecdot(self.r, z)
        self.p = torch.addcmul(z, (rz / self.rz)[:, None], self.p)
        self.rz = rz
        ap = self.system.apply(self.p)
        curvature = torch.linalg.vecdot(self.p, ap)
        # Below rounding of p.Ap the sign says nothing, and the step would be noise.
        floor = self.eps * torch.linalg.vector_norm(self.p, dim=1) * torch.linalg.vector_norm(ap, dim=1)
        bad = ~(curvature > floor)
        alpha = torch.where(bad, 0.0, rz / curvature)[:, None]
        self.x.addcmul_(alpha, self.p)
        self.r.addcmul_(alpha, ap, value=-1.0)
        self.curvature = torch.where(bad, curvature, self.curvature)
        codes = self.reached(torch.linalg.vector_norm(self.r, dim=1))
        codes.masked_fill_(bad, int(End.INDEFINITE))
        codes.masked_fill_(~(rz > 0), int(End.PRECONDITIONER))
        return codes.masked_fill_(~torch.isfinite(curvature), int(End.NONFINITE))


def _single(system: System, start: Tensor, goals: Tensor, limit: int) -> Sweep:
    """The recurrence for one row, in as few operations as it can be written, with one look from the host per step."""
    r, x = start.clone(), torch.zeros_like(start)
    goal = float(goals[0]) ** 2
    eps = float(torch.finfo(r.dtype).eps)
    apply, preconditioned = system.operator.flat_mv, system.prepared is not None
    rr = torch.dot(r, r)
    rz, p = rr, r
    largest, size, before = 0.0, 0.0, math.inf
    curvature, end, steps = math.inf, End.LIMIT, 0
    while steps < limit:
        z = system.precondition(r[None])[0] if preconditioned else r
        previous, rz = rz, torch.dot(r, z) if preconditioned else rr
        p = torch.addcmul(z, p, rz / previous) if steps else z.clone()
        ap = apply(p)
        pap = torch.dot(p, ap)
        alpha = rz / pap
        r.addcmul_(ap, alpha, value=-1.0)
        rr = torch.dot(r, r)
        curved, inner, left = torch.stack((pap, rz, rr)).tolist()
        if not inner > 0:
            end = End.PRECONDITIONER if math.isfinite(inner) else End.NONFINITE
            break
        # Squared norm of p in the preconditioner's inverse: its directions are conjugate, so this is a recursion.
        size = inner + (inner / before) ** 2 * size
        before = inner
        # The rounding floor of p.Ap costs two norms; it matters only where the Rayleigh quotient collapses.
        doubtful = steps == 0 or not curved > eps**0.5 * largest * size
        if doubtful and not curved > eps * _product_of_norms(p, ap):
            end = End.INDEFINITE if math.isfinite(curved) else End.NONFINITE
            curvature = curved
            break
        largest = max(curved / size, largest)
        x.addcmul_(p, alpha)
        steps += 1
        if not left > goal:
            end = End.TARGET
            break
    return Sweep(x[None], [end], steps, torch.zeros_like(goals), torch.full_like(goals, curvature))


def _product_of_norms(p: Tensor, ap: Tensor) -> float:
    return float(torch.linalg.vector_norm(p)) * float(torch.linalg.vector_norm(ap))
