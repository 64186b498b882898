"""Restarted GMRES for any square operator (Saad and Schultz 1986)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit.linear_solvers.base import Apply, Preconditioner, check_positive_int
from implicit.linear_solvers.krylov import KrylovSolver
from implicit.linear_solvers.sweep import End, Recurrence, Sweep, System, safe_divide
from implicit.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class GMRES(KrylovSolver):
    """Generalized minimal residuals: the smallest residual over the Krylov space, started again every few steps.

    Arnoldi with Gram-Schmidt done twice, which keeps the basis orthogonal to rounding (Giraud, Langou and Rozloznik
    2005), and Givens rotations; one product per step, and one per cycle. Preconditioned from the right, so that the
    residual that is minimised is the true one.

    A cycle that no longer lowers the residual ends the run as STALLED: more memory (``restart``) may cure that. On a
    singular operator the Krylov space can end before a solution is in it, which is reported as LINEAR_SOLVE_FAILED.

    Args:
        rtol: relative tolerance on the true residual; None means ``sqrt(eps)`` of the dtype.
        atol: absolute tolerance on the true residual.
        max_steps: limit on the steps of all cycles together; None means ``10 n``.
        restart: steps per cycle: ``restart + 1`` vectors are kept per right-hand side. At least n means no restarts.
        preconditioner: an approximate inverse of A.

    Example:
        >>> import torch, implicit
        >>> A = implicit.Dense(torch.tensor([[0.0, 1.0], [-1.0, 1.0]]), symmetric=False)
        >>> implicit.GMRES().solve(A, torch.tensor([1.0, 0.0])).status.name
        'CONVERGED'
    """

    restart: int = 30
    preconditioner: Preconditioner | None = None

    cure: ClassVar[str] = "raise restart, add a preconditioner, or use LSMR"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int(self.restart, "restart")

    def init(self, operator: LinearOperator) -> Apply | None:
        """The preconditioner's action, or None."""
        self.check(operator)
        return self.preconditioner.init(operator) if self.preconditioner is not None else None

    def sweep(self, system: System, r: Tensor, goals: Tensor, limit: int) -> Sweep:
        """One cycle."""
        return _Cycle(system, r, goals, min(self.restart, r.shape[1])).run(limit)


class _Cycle(Recurrence):
    """``A M V_j = V_{j+1} H_j`` and ``G H_j = R_j``, G the product of the rotations."""

    def __init__(self, system: System, r: Tensor, goals: Tensor, length: int) -> None:
        super().__init__(system, r, goals)
        k, n = r.shape
        self.length, self.done = length, 0
        self.beta = torch.linalg.vector_norm(r, dim=1)
        self.basis = r.new_zeros(k, length + 1, n)
        self.basis[:, 0] = r / self.beta[:, None]
        self.triangle = r.new_zeros(k, length, length)
        self.rotations = torch.eye(length + 1, dtype=r.dtype, device=r.device).repeat(k, 1, 1)

    def advance(self) -> Tensor:
        j = self.done
        w = self.system.apply(self.system.precondition(self.basis[:, j]))
        size = torch.linalg.vector_norm(w, dim=1)
        basis = self.basis[:, : j + 1]
        h = torch.zeros_like(w[:, : j + 1])
        for _ in range(2):  # twice is enough
            part = _rows_times(w, basis.mT)
            w = w - _rows_times(part, basis)
            h = h + part
        self.norm = torch.maximum(self.norm, size)
        rest = torch.linalg.vector_norm(w, dim=1)
        self.basis[:, j + 1] = safe_divide(w, rest[:, None])
        singular = self._rotate(j, h, rest)
        self.done += 1
        codes = self.reached(self.beta * self.rotations[:, j + 1, 0].abs())
        if self.done == self.length:
            codes.masked_fill_(codes == 0, int(End.RESTART))
        codes.masked_fill_(singular, int(End.BREAKDOWN))
        return codes.masked_fill_(~torch.isfinite(size), int(End.NONFINITE))

    def _rotate(self, j: int, h: Tensor, rest: Tensor) -> Tensor:
        """Take a column into the triangle; returns where it adds nothing new, and leaves that column out."""
        column = _rows_times(h, self.rotations[:, : j + 1, : j + 1].mT)
        diagonal = torch.hypot(column[:, j], rest)
        # The residual gains less by such a column than rounding loses by the size of its coefficient.
        singular = diagonal <= self.eps**0.75 * self.norm
        cosine = torch.where(singular, 0.0, safe_divide(column[:, j], diagonal))[:, None]
        sine = torch.where(singular, 1.0, safe_divide(rest, diagonal))[:, None]
        self.triangle[:, :j, j] = column[:, :j]
        self.triangle[:, j, j] = torch.where(singular, 1.0, diagonal)
        upper, lower = self.rotations[:, j].clone(), self.rotations[:, j + 1].clone()
        self.rotations[:, j] = cosine * upper + sine * lower
        self.rotations[:, j + 1] = cosine * lower - sine * upper
        return singular

    def solution(self) -> Tensor:
        j = self.done
        g = self.beta[:, None] * self.rotations[:, :j, 0]
        y = torch.linalg.solve_triangular(self.triangle[:, :j, :j], g[..., None], upper=True)[..., 0]
        return self.system.precondition(_rows_times(y, self.basis[:, :j]))


def _rows_times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Each row ``(k, a)`` times its own matrix ``(k, a, b)``."""
    return torch.bmm(rows[:, None, :], matrices)[:, 0]
