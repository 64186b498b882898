"""The Neumann series: a fixed-step iteration, and the inverse that hypergradients truncate (Lorraine et al. 2020)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from implicit.curvature import lanczos
from implicit.linear_solvers.krylov import KrylovSolver
from implicit.linear_solvers.sweep import End, Recurrence, Sweep, System
from implicit.operators import LinearOperator
from implicit.tree import Tree

PROBES = 20
"""Products that measure the largest singular value."""


@dataclass(frozen=True, kw_only=True)
class Neumann(KrylovSolver):
    """``v = step * sum_j (I - step A)^j b``, that is, v += step (b - A v): one product per step.

    Converges where every eigenvalue of ``I - step A`` is smaller than one in size; the error of a symmetric operator
    falls by ``1 - 1 / condition`` per step, so this is by far the slowest solver here. It is offered because papers
    truncate it (``max_steps=K``). A residual that grows is reported as divergence, status LINEAR_SOLVE_FAILED.

    Args:
        rtol: relative tolerance on the true residual; None means ``sqrt(eps)`` of the dtype.
        atol: absolute tolerance on the true residual.
        max_steps: number of terms; None means ``10 n``.
        step: the factor of A; None measures ``1 / ||A||`` by 20 steps of Lanczos, on A if it is symmetric
            positive definite, else on ``A^T A``. Small enough to converge on any
            operator whose symmetric part is positive enough, and on every symmetric positive definite one.

    Example:
        >>> import torch, implicit
        >>> A = implicit.Dense(torch.diag(torch.tensor([0.5, 1.0])))
        >>> found = implicit.Neumann(step=1.0, max_steps=3).solve(A, torch.tensor([1.0, 1.0]))
        >>> found.value, found.status.name  # 1 + 1/2 + 1/4
        (tensor([1.7500, 1.0000]), 'STEP_LIMIT')
    """

    step: float | None = None

    monotone: ClassVar[bool] = False
    divergence: ClassVar[str] = (
        "the Neumann series diverges: its residual grows. Lower step, or use CG (symmetric positive definite), MINRES "
        "(symmetric) or GMRES"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None and not 0 < self.step < float("inf"):
            raise ValueError(f"step must be None or a positive number, got {self.step}")

    def init(self, operator: LinearOperator) -> float:
        """The step. One that could not be measured is not a number, and the solve will say so."""
        self.check(operator)
        if self.step is not None:
            return self.step
        try:
            norm = _norm(operator)
        except ValueError:  # a product is not finite
            return float("nan")
        return 1.0 / norm if norm > 0 else 1.0

    def sweep(self, system: System, r: Tensor, goals: Tensor, limit: int) -> Sweep:
        """The series of one residual."""
        return _Rows(system, r, goals, limit).run(limit)


class _Rows(Recurrence):
    """Partial sums, with the residual that each leaves."""

    def __init__(self, system: System, r: Tensor, goals: Tensor, limit: int) -> None:
        super().__init__(system, r, goals)
        self.r = r
        self.step, self.left = system.prepared, limit
        self.start = torch.linalg.vector_norm(r, dim=1)

    def advance(self) -> Tensor:
        self.left -= 1
        self.x = torch.add(self.x, self.r, alpha=self.step)
        self.r = torch.sub(self.r, self.system.apply(self.r), alpha=self.step)
        size = torch.linalg.vector_norm(self.r, dim=1)
        # Residuals of operators that are far from normal grow before they fall; at the end of the run they may not.
        grown = size > self.start * (self.eps**-0.5 if self.left else 1.0)
        codes = self.reached(size).masked_fill_(grown, int(End.DIVERGED))
        return codes.masked_fill_(~torch.isfinite(size), int(End.NONFINITE))


def _norm(operator: LinearOperator) -> float:
    """The largest singular value, or a little more."""
    if operator.symmetric and operator.positive_definite:
        return lanczos(operator, steps=PROBES).ceiling
    gram = _Gram(operator)
    before = gram.transposed.products
    norm = lanczos(gram, steps=PROBES).ceiling ** 0.5
    if gram.transposed is not operator:  # it keeps a count of its own
        operator.products += gram.transposed.products - before
    return norm


class _Gram(LinearOperator):
    """``A^T A``."""

    symmetric = True

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.like)
        self.operator, self.transposed = operator, operator.T

    def mv(self, v: Tree) -> Tree:
        return self.transposed @ (self.operator @ v)
