"""Conjugate gradients for symmetric positive definite operators (Hestenes and Stiefel 1952)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.linear_solvers.base import (
    Apply,
    FlatSolution,
    LinearSolver,
    Preconditioner,
    check_tolerances,
    default_rtol,
)
from implicit.operators import LinearOperator
from implicit.status import Status


@dataclass(frozen=True, kw_only=True)
class CG(LinearSolver):
    """Preconditioned conjugate gradients, for any number of right-hand sides at once.

    Stops when the true residual ``||b - A v||`` is at most ``max(atol, rtol ||b||)``. The recursively updated
    residual drifts from the true one, so a claim of convergence is checked with one more product; if it fails, the
    iteration restarts from the true residual. Converged right-hand sides are frozen. The status comes from the
    measured residual alone: reaching it in the very last step is convergence.

    An operator that is not positive definite is reported (``indefinite``, status LINEAR_SOLVE_FAILED) with the last
    iterate before the offending direction. Right-hand sides are scaled to order one and back, so their size, down to
    the smallest numbers, changes nothing.

    Args:
        rtol: relative tolerance; None means ``sqrt(eps)`` of the dtype.
        atol: absolute tolerance; zero by default, so that scaling b changes nothing.
        max_steps: step limit; None means ``10 n`` (rounding can need more than n).
        preconditioner: builds an approximate inverse of A.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol, self.max_steps)

    def init(self, operator: LinearOperator) -> Apply | None:
        """The preconditioner's action, or None."""
        return self.preconditioner.init(operator) if self.preconditioner is not None else None

    def solve_flat(
        self, operator: LinearOperator, prepared: Apply | None, b: Tensor, x0: Tensor | None
    ) -> FlatSolution:
        """Solve for the rows of ``b``, shape ``(k, n)``."""
        rtol = default_rtol(b.dtype) if self.rtol is None else self.rtol
        limit = 10 * max(operator.size, 1) if self.max_steps is None else self.max_steps
        scale = _power_of_two(b)
        b = b / scale
        norms = torch.linalg.vector_norm(b, dim=1)
        run = _Run(operator, prepared, b, scale, torch.clamp(rtol * norms, min=self.atol / scale[:, 0]))
        if not bool(torch.isfinite(norms).all()):
            run.x, run.r = torch.zeros_like(b), b
            return run.finish(norms, Status.NONFINITE, "the right-hand side is not finite")
        run.start(None if x0 is None else x0.detach() / scale)
        last = torch.full_like(norms, torch.inf)
        while True:
            reason = run.iterate(limit)
            true = run.refresh()
            if reason == "nonfinite" or not bool(torch.isfinite(true).all()):
                return run.finish(norms, Status.NONFINITE, "a product with the operator is not finite")
            open_rows = true > run.targets
            if not bool(open_rows.any()):
                return run.finish(norms, Status.CONVERGED, f"true residual reached in {run.steps} steps")
            if run.indefinite:
                return run.finish(
                    norms,
                    Status.LINEAR_SOLVE_FAILED,
                    f"the operator is not positive definite: p.Ap = {run.curvature:.3g} in step {run.steps}",
                )
            if reason == "limit":
                return run.finish(norms, Status.STEP_LIMIT, f"true residual not reached in {limit} steps")
            # Only rounding separates the recursion from the truth here; restart while that still helps.
            if bool((open_rows & (true > 0.5 * last)).any()):
                return run.finish(norms, Status.STALLED, "the true residual stopped falling: rounding level reached")
            last = true


def _power_of_two(b: Tensor) -> Tensor:
    """The size of each row rounded to a power of two, shape (k, 1): dividing by it is exact."""
    if not b.numel():
        return b.new_ones(b.shape[0], 1)
    largest = b.abs().amax(dim=1, keepdim=True)
    usable = torch.isfinite(largest) & (largest > 0)
    # The exponents at both ends of the range have no representable reciprocal.
    return torch.exp2(torch.log2(torch.where(usable, largest, 1.0)).floor().clamp(*_exponents(b.dtype)))


def _exponents(dtype: torch.dtype) -> tuple[float, float]:
    end = math.floor(math.log2(torch.finfo(dtype).max))
    return 2.0 - end, end - 1.0


class _Run:
    """The moving parts of one call, for rows of shape (k, n) divided by ``scale``."""

    def __init__(
        self, operator: LinearOperator, precondition: Apply | None, b: Tensor, scale: Tensor, targets: Tensor
    ) -> None:
        self.operator, self.precondition, self.b, self.scale, self.targets = operator, precondition, b, scale, targets
        self.steps = 0
        self.curvature = 0.0
        self.indefinite = False

    def _apply(self, rows: Tensor) -> Tensor:
        return self.operator.flat_mv(rows[0])[None] if rows.shape[0] == 1 else self.operator.flat_mm(rows)

    def start(self, x0: Tensor | None) -> None:
        if x0 is None:
            self.x, self.r = torch.zeros_like(self.b), self.b.clone()
        else:
            self.x = x0.detach().clone()
            self.r = self.b - self._apply(self.x)
            # A stale start can be worse than none; one that is not finite always is.
            worse = ~(torch.linalg.vector_norm(self.r, dim=1) <= torch.linalg.vector_norm(self.b, dim=1))
            self.x[worse], self.r[worse] = 0.0, self.b[worse]
        self.fresh = True

    def refresh(self) -> Tensor:
        """Replace the recursive residual by the true one and return its norms, shape (k,)."""
        if not self.fresh:
            self.r = self.b - self._apply(self.x)
            self.fresh = True
        return torch.linalg.vector_norm(self.r, dim=1)

    def iterate(self, limit: int) -> str:
        r, x = self.r, self.x
        tiny = torch.finfo(r.dtype).eps
        size = torch.linalg.vector_norm(r, dim=1)
        active = size > self.targets
        # Beyond eps of its start the recursion is fiction: look at the true residual then, whatever was asked for.
        targets = torch.maximum(self.targets, tiny * size)
        if not bool(active.any()):
            return "converged"
        z = self.precondition(r) if self.precondition else r
        p = z.clone()
        rz = torch.linalg.vecdot(r, z)
        while self.steps < limit:
            ap = self._apply(p)
            curvature = torch.linalg.vecdot(p, ap)
            # Below rounding of p.Ap the sign says nothing, and the step would be noise.
            floor = tiny * torch.linalg.vector_norm(p, dim=1) * torch.linalg.vector_norm(ap, dim=1)
            bad = active & ~(curvature > floor)
            if bool(bad.any()):
                if not bool(torch.isfinite(curvature[bad]).all()):
                    return "nonfinite"
                self.curvature, self.indefinite = float(curvature[bad].min()), True
                active = active & ~bad
                if not bool(active.any()):
                    return "indefinite"
            alpha = torch.where(active, rz / torch.where(active, curvature, 1.0), 0.0)[:, None]
            x.addcmul_(alpha, p)
            r.addcmul_(alpha, ap, value=-1.0)
            self.fresh = False
            self.steps += 1
            active = active & (torch.linalg.vector_norm(r, dim=1) > targets)
            if not bool(active.any()):
                return "indefinite" if self.indefinite else "converged"
            z = self.precondition(r) if self.precondition else r
            rz_next = torch.linalg.vecdot(r, z)
            beta = torch.where(active, rz_next / torch.where(active, rz, 1.0), 0.0)[:, None]
            p = torch.addcmul(z, beta, p)
            rz = rz_next
        return "limit"

    def finish(self, norms: Tensor, status: Status, message: str) -> FlatSolution:
        residuals, scale = torch.linalg.vector_norm(self.r, dim=1), self.scale[:, 0]
        return FlatSolution(
            self.x * self.scale, residuals * scale, norms * scale, self.steps, status, self.indefinite, message
        )
