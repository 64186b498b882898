"""Conjugate gradients on the normal equations, in the stable form of Hestenes and Stiefel (1952)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit.linear_solvers.krylov import KrylovSolver
from implicit.linear_solvers.sweep import End, Recurrence, Sweep, System


@dataclass(frozen=True, kw_only=True)
class NormalCG(KrylovSolver):
    """CGLS: conjugate gradients on ``A^T A v = A^T b`` without forming that system, for any operator with a transpose.

    One product with A and one with its transpose per step. The number of steps grows with the condition number itself
    and not with its root: prefer another solver where there is one. On a singular operator, and on a rectangular one,
    the answer from a zero start is the least-squares solution of minimum norm. For a rectangular operator that is what
    CONVERGED means when ``||A^T r|| <= rtol ||A|| ||r||``; a square system without solution is STALLED, ``singular``.

    Args:
        rtol: relative tolerance on the true residual; None means ``sqrt(eps)`` of the dtype.
        atol: absolute tolerance on the true residual.
        max_steps: step limit; None means ten times the larger dimension.

    Example:
        >>> import torch, implicit
        >>> A = implicit.Dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), symmetric=False)
        >>> implicit.NormalCG().solve(A, torch.tensor([3.0, 1.0])).status.name
        'CONVERGED'
    """

    rectangular: ClassVar[bool] = True

    def sweep(self, system: System, r: Tensor, goals: Tensor, limit: int) -> Sweep:
        """CGLS from a zero start."""
        return _Rows(system, r, goals).run(limit)


class _Rows(Recurrence):
    """The recurrence, with the residual r and the normal residual ``s = A^T r``."""

    def __init__(self, system: System, r: Tensor, goals: Tensor) -> None:
        super().__init__(system, r, goals)
        self.r = r
        self.s = system.apply_transpose(r)
        self.p = torch.zeros_like(self.s)
        self.ss = torch.full_like(goals, torch.inf)

    def advance(self) -> Tensor:
        ss = torch.linalg.vecdot(self.s, self.s)
        self.p = torch.addcmul(self.s, (ss / self.ss)[:, None], self.p)
        self.ss = ss
        q = self.system.apply(self.p)
        qq, pp = torch.linalg.vecdot(q, q), torch.linalg.vecdot(self.p, self.p)
        stuck = ~(qq > 0)
        alpha = torch.where(stuck, 0.0, ss / torch.where(stuck, 1.0, qq))[:, None]
        self.norm = torch.maximum(self.norm, torch.where(stuck, 0.0, torch.sqrt(qq / pp)))
        self.x = torch.addcmul(self.x, alpha, self.p)
        self.r = torch.addcmul(self.r, alpha, q, value=-1.0)
        self.s = self.system.apply_transpose(self.r)
        size, normal = torch.linalg.vector_norm(self.r, dim=1), torch.linalg.vector_norm(self.s, dim=1)
        codes = self.reached(size)
        settled = stuck | (normal <= self.system.ls_rtol * self.norm * size)
        codes.masked_fill_(settled & (codes == 0), int(End.LEAST_SQUARES))
        return codes.masked_fill_(~torch.isfinite(qq), int(End.NONFINITE))
