"""LSMR: least squares by Golub-Kahan bidiagonalization (Fong and Saunders 2011)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit.linear_solvers.krylov import KrylovSolver
from implicit.linear_solvers.sweep import End, Recurrence, Sweep, System, safe_divide


@dataclass(frozen=True, kw_only=True)
class LSMR(KrylovSolver):
    """MINRES on the normal equations without forming them, for any operator with a transpose: ``||A^T r||`` falls in
    every step.

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
        >>> A = implicit.Dense(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))  # singular
        >>> implicit.LSMR().solve(A, torch.tensor([2.0, 2.0])).value
        tensor([1., 1.])
    """

    rectangular: ClassVar[bool] = True

    def sweep(self, system: System, r: Tensor, goals: Tensor, limit: int) -> Sweep:
        """LSMR from a zero start."""
        return _Rows(system, r, goals).run(limit)


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their norms, shape (k, 1); a zero row stays zero."""
    size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return safe_divide(rows, size), size


def _rotation(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine, sine and r of the rotation that turns (a, b) into (r, 0)."""
    r = torch.hypot(a, b)
    zero = r == 0
    return torch.where(zero, 1.0, a / r), torch.where(zero, 0.0, b / r), r


class _Rows(Recurrence):
    """The recurrence in the names of the paper's section 2; scalars have shape (k, 1)."""

    def __init__(self, system: System, r: Tensor, goals: Tensor) -> None:
        super().__init__(system, r, goals)
        self.u, beta = _unit(r)
        self.v, self.alpha = _unit(system.apply_transpose(self.u))
        one, zero = torch.ones_like(beta), torch.zeros_like(beta)
        self.alpha_bar, self.zeta_bar = self.alpha, self.alpha * beta
        self.rho, self.rho_bar, self.c_bar, self.s_bar, self.zeta = one, one, one, zero, zero
        self.h, self.h_bar = self.v, torch.zeros_like(self.v)
        # For the norm of the residual, section 3.2.
        self.beta_dd, self.beta_d, self.rho_dot, self.tau, self.theta_tilde = beta, zero, one, zero, zero
        self.square = self.alpha**2

    def advance(self) -> Tensor:
        self.u, beta = _unit(torch.addcmul(self.system.apply(self.v), self.alpha, self.u, value=-1.0))
        self.v, self.alpha = _unit(torch.addcmul(self.system.apply_transpose(self.u), beta, self.v, value=-1.0))
        rho_old, rho_bar_old, zeta_old = self.rho, self.rho_bar, self.zeta
        c, s, self.rho = _rotation(self.alpha_bar, beta)
        theta, self.alpha_bar = s * self.alpha, c * self.alpha
        theta_bar = self.s_bar * self.rho
        self.c_bar, self.s_bar, self.rho_bar = _rotation(self.c_bar * self.rho, theta)
        self.zeta, self.zeta_bar = self.c_bar * self.zeta_bar, -self.s_bar * self.zeta_bar
        scale = safe_divide(theta_bar * self.rho, rho_old * rho_bar_old)
        self.h_bar = torch.addcmul(self.h, scale, self.h_bar, value=-1.0)
        self.x = torch.addcmul(self.x, safe_divide(self.zeta, self.rho * self.rho_bar), self.h_bar)
        self.h = torch.addcmul(self.v, safe_divide(theta, self.rho), self.h, value=-1.0)
        self.square = self.square + beta**2
        self.norm = torch.sqrt(self.square)[:, 0]
        self.square = self.square + self.alpha**2
        size = self._residual(c, s, theta_bar, zeta_old)
        codes = self.reached(size)
        settled = self.zeta_bar.abs()[:, 0] <= self.system.ls_rtol * self.norm * size
        codes.masked_fill_(settled & (codes == 0), int(End.LEAST_SQUARES))
        return codes.masked_fill_(~torch.isfinite(self.norm), int(End.NONFINITE))

    def _residual(self, c: Tensor, s: Tensor, theta_bar: Tensor, zeta_old: Tensor) -> Tensor:
        """``||r||`` from scalars alone."""
        beta_hat, self.beta_dd = c * self.beta_dd, -s * self.beta_dd
        theta_old = self.theta_tilde
        c_tilde, s_tilde, rho_tilde = _rotation(self.rho_dot, theta_bar)
        self.theta_tilde, self.rho_dot = s_tilde * self.rho_bar, c_tilde * self.rho_bar
        self.beta_d = c_tilde * beta_hat - s_tilde * self.beta_d
        self.tau = safe_divide(zeta_old - theta_old * self.tau, rho_tilde)
        tau_d = safe_divide(self.zeta - self.theta_tilde * self.tau, self.rho_dot)
        return torch.hypot(self.beta_d - tau_d, self.beta_dd)[:, 0]
