"""The restoration phase: the point nearest to feasibility near where the line search failed."""

from functools import cached_property

import torch
from torch import Tensor

from constrained.barrier import BarrierModel, Evaluation, ScaledEvaluation, ScaledProblem
from constrained.barrier_step import BarrierState, longest
from constrained.filter import Filter
from implicit import LinearOperator

WEIGHT = 1e3
PROGRESS = 0.9
LARGE_MULTIPLIER = 1e3


class Restoration(BarrierModel):
    """``min rho sum(n + p) + zeta / 2 ||D (w - r)||^2 s.t. C(w) + n - p = 0, n, p >= 0, bounds on w``.

    The l1 norm of the constraints, made smooth by their positive and negative parts, with a pull towards the point r
    where the phase began (Waechter and Biegler 2006, section 3.3).

    Args:
        base: the problem whose constraints are to be satisfied.
        reference: r, shape (base.size,); ``D = 1 / max(1, |r|)``.
        mu: the phase's barrier parameter; ``zeta = sqrt(mu)``.
    """

    def __init__(self, base: ScaledProblem, reference: Tensor, mu: float) -> None:
        self.base, self.reference = base, reference
        self.n, self.m = base.n, base.m
        self.sides = base.sides.extended(2 * base.m)
        rows = torch.arange(base.m, device=base.row.device)
        ones = reference.new_ones(base.m)
        self.row, self.sign = torch.cat([base.row, rows, rows]), torch.cat([base.sign, ones, -ones])
        self.pull_weights = mu**0.5 / reference.abs().clamp(min=1.0) ** 2

    def at(self, w: Tensor) -> "RestorationEvaluation":
        return self.around(self.base.at(w[: self.base.size]), w)

    def around(self, inner: ScaledEvaluation, w: Tensor) -> "RestorationEvaluation":
        """The same where the problem has been evaluated at ``w[:base.size]`` already."""
        return RestorationEvaluation(self, inner, w)


class RestorationEvaluation(Evaluation):
    """See :class:`Restoration`."""

    def __init__(self, model: Restoration, inner: ScaledEvaluation, w: Tensor) -> None:
        self.model, self.inner, self.w, self.point = model, inner, w, inner.point
        size, m = model.base.size, model.m
        self.offset = w[:size] - model.reference
        n, p = w[size : size + m], w[size + m :]
        self.objective = float(WEIGHT * (n + p).sum() + 0.5 * (model.pull_weights * self.offset**2).sum())
        self.constraints = inner.constraints + n - p
        self.finite = inner.finite

    @cached_property
    def gradient(self) -> Tensor:
        violations = self.w.new_full((2 * self.model.m,), WEIGHT)
        return torch.cat([self.model.pull_weights * self.offset, violations])

    @property
    def jacobian(self) -> LinearOperator:
        return self.inner.jacobian

    def hessian(self, y: Tensor) -> LinearOperator:
        return self.inner.weighted_hessian(y, 0.0)

    @cached_property
    def diagonal(self) -> Tensor:
        return torch.cat([self.model.pull_weights, self.w.new_zeros(2 * self.model.m)])


def violations(constraints: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """The n and p that minimise the barrier function of the phase for fixed w, with ``C + n - p = 0``."""
    a = (mu - WEIGHT * constraints) / (2 * WEIGHT)
    n = a + torch.sqrt(a**2 + mu * constraints / (2 * WEIGHT))
    # For C >> mu the two terms cancel; the root is the product of the roots over the other one.
    other = a - torch.sqrt(a**2 + mu * constraints / (2 * WEIGHT))
    stable = -mu * constraints / (2 * WEIGHT) / torch.where(other < 0, other, -1.0)
    n = torch.where((a < 0) & (other < 0), stable, n).clamp(min=torch.finfo(n.dtype).tiny)
    return n, constraints + n


def enter(base: ScaledProblem, evaluation: Evaluation, state: BarrierState, inner: BarrierState) -> None:
    """Start the phase at ``state.w``: fills ``inner``."""
    constraints = evaluation.constraints
    inner.mu = max(state.mu, float(constraints.abs().amax()) if len(constraints) else 0.0)
    n, p = violations(constraints, inner.mu)
    inner.w = torch.cat([state.w, n, p])
    inner.y = torch.zeros_like(state.y)
    inner.z = torch.cat([state.z.clamp(max=WEIGHT), inner.mu / n, inner.mu / p.clamp(min=torch.finfo(p.dtype).tiny)])
    inner.filter, inner.shift, inner.tiny = Filter(), 0.0, 0
    inner.filter.limit(0.0)


def leave(base: ScaledProblem, state: BarrierState, w: Tensor) -> None:
    """Put the end of the phase into ``state``; its constraint multipliers are left to be estimated."""
    gaps = base.sides.gaps(state.w)
    dz = state.mu / gaps - state.z - state.z / gaps * base.sides.along(w - state.w)
    z = state.z + longest(state.z, dz, state.boundary) * dz
    state.z = torch.ones_like(z) if len(z) and float(z.max()) > LARGE_MULTIPLIER else z
    state.w = w
