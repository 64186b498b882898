"""MINRES for symmetric operators, definite or not (Paige and Saunders 1975)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.linear_solvers.base import Apply, Preconditioner, require_symmetric
from implicit.linear_solvers.krylov import KrylovSolver
from implicit.linear_solvers.sweep import End, Recurrence, Sweep, System, safe_divide
from implicit.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class MINRES(KrylovSolver):
    """Minimal residuals over the Krylov space, for symmetric operators of any inertia.

    Lanczos with a QR factorisation by Givens rotations: one product per step, and one to check the residual. On a
    singular operator the answer from a zero start is the least-squares solution of minimum norm (without a
    preconditioner); where b is not in the range that is reported as STALLED, ``singular``. Negative curvature is
    reported (``indefinite``) at no cost (Liu and Roosta 2022) and is no failure.

    Args:
        rtol: relative tolerance on the true residual; None means ``sqrt(eps)`` of the dtype.
        atol: absolute tolerance on the true residual.
        max_steps: step limit; None means ``10 n``.
        preconditioner: symmetric positive definite, also where A is not: an approximate inverse of ``|A|``. The norm
            that is minimised is then the preconditioner's; the tolerance is still on the Euclidean residual.

    Example:
        >>> import torch, implicit
        >>> A = implicit.Dense(torch.tensor([[1.0, 2.0], [2.0, -1.0]]), positive_definite=False)
        >>> found = implicit.MINRES().solve(A, torch.tensor([3.0, 1.0]))
        >>> found.status.name, found.indefinite
        ('CONVERGED', True)
    """

    preconditioner: Preconditioner | None = None

    def init(self, operator: LinearOperator) -> Apply | None:
        """The preconditioner's action, or None."""
        self.check(operator)
        return self.preconditioner.init(operator) if self.preconditioner is not None else None

    def check(self, operator: LinearOperator) -> None:
        """Refuse operators that are not declared symmetric."""
        require_symmetric(operator, "MINRES", "GMRES or LSMR")

    def orthogonal(self, eps: float) -> float:
        """Further than that the short recurrence does not reach: its answer would grow along the null space."""
        return eps**0.5

    def minimum_norm(self, x: Tensor, r: Tensor, z: Tensor) -> Tensor:
        """``A z = 0``, and x has no other part in the null space (Liu, Milzarek and Roosta 2023, lifting)."""
        return x - safe_divide(torch.linalg.vecdot(r, x), torch.linalg.vecdot(r, z))[:, None] * z

    def sweep(self, system: System, r: Tensor, goals: Tensor, limit: int) -> Sweep:
        """MINRES from a zero start."""
        return _Rows(system, r, goals).run(limit)


class _Rows(Recurrence):
    """Lanczos ``A V = U T``, rotations ``Q T = R``, x = ``V R^-1 Q e_1 beta_1``; scalars have shape (k, 1)."""

    def __init__(self, system: System, r: Tensor, goals: Tensor) -> None:
        super().__init__(system, r, goals)
        # The Lanczos vector before (u) and after (z) the preconditioner, and its norm beta, not yet divided by it.
        self.u, self.z = r, system.precondition(r)
        self.u_old = torch.zeros_like(r)
        self.beta, self.sick = _norm(self.u, self.z, self.eps)
        self.beta[self.sick] = 1.0
        self.beta_old = torch.ones_like(self.beta)
        # The last rotation, and what it left for the next column of T: its diagonal entry and the one above.
        self.cosine, self.sine = -torch.ones_like(self.beta), torch.zeros_like(self.beta)
        self.entry, self.above = torch.zeros_like(self.beta), torch.zeros_like(self.beta)
        self.phi = self.beta  # the residual in the norm that is minimised
        self.w, self.w_old = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.r = r if system.prepared is not None else None

    def advance(self) -> Tensor:
        v = self.z / self.beta  # a row that goes on has beta > 0
        u = self.system.apply(v)
        u = torch.addcmul(u, self.beta / self.beta_old, self.u_old, value=-1.0)
        alpha = torch.linalg.vecdot(v, u)[:, None]
        u.addcmul_(alpha / self.beta, self.u, value=-1.0)
        z = self.system.precondition(u)
        beta, sick = _norm(u, z, self.eps)
        above, delta = self.above, self.cosine * self.entry + self.sine * alpha
        diagonal = self.sine * self.entry - self.cosine * alpha
        self.above, self.entry = self.sine * beta, -self.cosine * beta
        self.norm = torch.maximum(self.norm, torch.sqrt(delta**2 + diagonal**2 + beta**2)[:, 0])
        # r.Ar / r.r of the last residual comes for nothing; so does ||A r|| / ||r||.
        curvature = -(self.cosine * diagonal)[:, 0]
        negative = curvature < -10.0 * self.eps * self.norm
        self.curvature = torch.where(negative, torch.minimum(curvature, self.curvature), self.curvature)
        settled = torch.hypot(diagonal, self.entry) <= self.system.ls_rtol * self.norm[:, None]
        gamma = torch.hypot(diagonal, beta).clamp(min=self.eps * self.eps)
        # With nothing left in the range, another step would only add to the null space.
        cosine = torch.where(settled, 0.0, diagonal / gamma)
        sine = torch.where(settled, 1.0, beta / gamma)
        w = torch.addcmul(v, above, self.w_old, value=-1.0).addcmul_(delta, self.w, value=-1.0).div_(gamma)
        self.x.addcmul_(cosine * self.phi, w)
        self.phi = self.phi * sine
        codes = self.reached(self._residual(cosine, sine, u, beta))
        codes.masked_fill_(settled[:, 0] & (codes == 0), int(End.LEAST_SQUARES))
        codes.masked_fill_(self.sick | sick, int(End.PRECONDITIONER))
        codes.masked_fill_(~torch.isfinite(alpha[:, 0]), int(End.NONFINITE))
        self.u_old, self.u, self.z, self.beta_old, self.beta = self.u, u, z, self.beta, beta
        self.w_old, self.w, self.cosine, self.sine = self.w, w, cosine, sine
        return codes

    def _residual(self, cosine: Tensor, sine: Tensor, u: Tensor, beta: Tensor) -> Tensor:
        """The Euclidean residual; without a preconditioner it is the one that is minimised."""
        if self.r is None:
            return self.phi[:, 0]
        self.r = sine**2 * self.r - cosine * self.phi * safe_divide(u, beta)
        return torch.linalg.vector_norm(self.r, dim=1)


def _norm(u: Tensor, z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``sqrt(u.z)``, shape (k, 1), and where its square is negative beyond rounding."""
    square = torch.linalg.vecdot(u, z)
    sick = square < -eps * torch.linalg.vector_norm(u, dim=1) * torch.linalg.vector_norm(z, dim=1)
    return torch.sqrt(square.clamp(min=0.0))[:, None], sick
