"""One primal-dual Newton step of a barrier problem, and the filter line search along it."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from constrained.barrier import BarrierModel, Evaluation
from constrained.filter import ARMIJO, PHI_MARGIN, ROUNDING, THETA_MARGIN, Filter
from constrained.inertia import CorrectedKKT, InertiaCorrection
from implicit import State

CORRECTIONS = 4
CORRECTION_PROGRESS = 0.99
SAFEGUARD = 1e10
TINY = 10.0
BACKTRACK = 0.5
DUAL_SHIFT = 1e-8
SOFT = 0.9999


@dataclass(kw_only=True)
class BarrierState(State):
    """An iterate of a barrier problem.

    Attributes:
        w: variables, shape (size,), strictly inside their bounds.
        y: multipliers of the constraints, shape (m,).
        z: multipliers of the bounds, shape (k,), positive.
        mu: the barrier parameter.
        filter: for this mu.
        shift: the last shift of the Hessian that was needed.
        tiny: consecutive steps that rounding does not notice.
    """

    w: Tensor
    y: Tensor
    z: Tensor
    mu: float
    filter: Filter = field(default_factory=Filter)
    shift: float = 0.0
    tiny: int = 0

    @property
    def boundary(self) -> float:
        """The share of a distance to a bound that one step may use up."""
        return max(0.99, 1.0 - self.mu)


@dataclass
class Direction:
    """A Newton step with the factors it came from."""

    dw: Tensor
    dy: Tensor
    kkt: CorrectedKKT
    curvatures: Tensor  # (size - n,) the second derivatives of the variables that enter linearly


@dataclass
class Trial:
    """A point that the line search accepted."""

    evaluation: Evaluation
    alpha: float
    direction: Direction
    armijo: bool  # it decreased phi enough, and the filter need not grow
    corrected: int = 0


def violation(evaluation: Evaluation) -> float:
    """theta: the sum of the absolute constraint values."""
    return float(evaluation.constraints.abs().sum())


class NewtonStep:
    """The linearised optimality conditions of the barrier problem at one iterate.

    Args:
        model: the problem.
        evaluation: at ``state.w``.
        state: the iterate.
    """

    def __init__(self, model: BarrierModel, evaluation: Evaluation, state: BarrierState) -> None:
        self.model, self.evaluation, self.state = model, evaluation, state
        self.broken = False  # whether the derivatives turned out not to be numbers
        self.gaps = model.sides.gaps(state.w)
        self.gradient = model.barrier_gradient(evaluation, state.mu)
        self.theta = violation(evaluation)
        self.phi = model.barrier(evaluation, state.mu)
        self.curvatures = model.sides.gather(state.z / self.gaps) + evaluation.diagonal()

    def direction(self, rule: InertiaCorrection) -> Direction | None:
        """The step, or None where no shift makes the system right."""
        model, state = self.model, self.state
        if not model.size:
            return None
        hessian = self.evaluation.hessian(state.y)
        inner, outer = self.curvatures[: model.n], self.curvatures[model.n :]
        below = state.y.new_zeros(model.m).index_add(0, model.row, 1.0 / outer)
        kkt = rule.correct(
            hessian,
            self.evaluation.jacobian(),
            self._reduced(self.evaluation.constraints, outer),
            diagonal=inner,
            dual_diagonal=below,
            last=state.shift,
            dual=DUAL_SHIFT * state.mu**0.25,
        )
        self.broken = not kkt.finite
        if not kkt.success:
            return None
        state.shift = kkt.last
        return self._expand(kkt, kkt.step, outer)

    def corrected(self, direction: Direction, constraints: Tensor) -> Direction:
        """The step to other values of the constraints, with the same factors."""
        reduced = direction.kkt.solve(self._reduced(constraints, direction.curvatures))
        return self._expand(direction.kkt, reduced, direction.curvatures)

    def _reduced(self, constraints: Tensor, outer: Tensor) -> Tensor:
        model = self.model
        dual = self.gradient + model.pull(self.evaluation, self.state.y)
        bottom = -constraints.index_add(0, model.row, -model.sign * dual[model.n :] / outer)
        return torch.cat([-dual[: model.n], bottom])

    def _expand(self, kkt: CorrectedKKT, reduced: Tensor, outer: Tensor) -> Direction:
        model = self.model
        du, dy = kkt.system.split(reduced)
        dual = self.gradient + model.pull(self.evaluation, self.state.y)
        de = -(dual[model.n :] + model.sign * dy[model.row]) / outer
        return Direction(torch.cat([du, de]), dy, kkt, outer)

    def dual_step(self, dw: Tensor) -> Tensor:
        """The step of the bounds' multipliers that goes with dw."""
        z, mu = self.state.z, self.state.mu
        return mu / self.gaps - z - z / self.gaps * self.model.sides.along(dw)

    def longest(self, dw: Tensor) -> float:
        """The longest step that keeps a share of every gap."""
        return longest(self.gaps, self.model.sides.along(dw), self.state.boundary)

    def search(self, direction: Direction) -> Trial | None:
        """The filter line search with second-order corrections; None where the shortest step fails."""
        state, theta = self.state, self.theta
        slope = float(self.gradient @ direction.dw)
        alpha = self.longest(direction.dw)
        least = state.filter.shortest(theta, slope)
        first = True
        while alpha >= least or first:
            evaluation = self.model.at(state.w + alpha * direction.dw)
            found = self._judge(evaluation, alpha, slope)
            if found is not None:
                return Trial(evaluation, alpha, direction, found)
            if first and evaluation.finite and violation(evaluation) >= theta:
                corrected = self._correct(direction, evaluation, alpha, slope)
                if corrected is not None:
                    return corrected
            first = False
            alpha *= BACKTRACK
        return None

    def _correct(self, direction: Direction, evaluation: Evaluation, alpha: float, slope: float) -> Trial | None:
        """Steps to the constraints as the trial point has them (against the Maratos effect)."""
        constraints, before = self.evaluation.constraints, math.inf
        for count in range(1, CORRECTIONS + 1):
            constraints = alpha * constraints + evaluation.constraints
            changed = self.corrected(direction, constraints)
            alpha = self.longest(changed.dw)
            evaluation = self.model.at(self.state.w + alpha * changed.dw)
            theta = violation(evaluation)
            found = self._judge(evaluation, alpha, slope)
            if found is not None:
                return Trial(evaluation, alpha, changed, found, count)
            if not theta <= CORRECTION_PROGRESS * before:
                return None
            before = theta
        return None

    def _judge(self, evaluation: Evaluation, alpha: float, slope: float) -> bool | None:
        """Whether the trial point satisfies the Armijo condition (True) or the filter's margins (False); else None."""
        if not evaluation.finite:
            return None
        state, eps = self.state, torch.finfo(self.gradient.dtype).eps
        theta, phi = violation(evaluation), self.model.barrier(evaluation, state.mu)
        if not (math.isfinite(phi) and state.filter.accepts(theta, phi, eps)):
            return None
        rounding = ROUNDING * eps * abs(self.phi)
        switches = state.filter.switches(self.theta, slope, alpha)
        armijo = phi - self.phi - rounding <= ARMIJO * alpha * slope
        if switches and self.theta <= state.filter.smallest:
            return True if armijo else None
        enough = theta <= (1 - THETA_MARGIN) * self.theta or phi - self.phi <= rounding - PHI_MARGIN * self.theta
        return (switches and armijo) if enough else None

    def whole(self, direction: Direction) -> Trial | None:
        """The longest step, where rounding hides what it changes; None if the values are not finite."""
        alpha = self.longest(direction.dw)
        evaluation = self.model.at(self.state.w + alpha * direction.dw)
        return Trial(evaluation, alpha, direction, True) if evaluation.finite else None

    def soft(self, direction: Direction) -> Trial | None:
        """The longest step if it reduces the residual of the optimality conditions, whatever the filter says."""
        state, dz = self.state, self.dual_step(direction.dw)
        alpha = min(self.longest(direction.dw), longest(state.z, dz, state.boundary))
        evaluation = self.model.at(state.w + alpha * direction.dw)
        if not evaluation.finite:
            return None
        reached = replace(
            state, w=evaluation.w, y=state.y + alpha * direction.dy, z=state.z + alpha * dz, filter=Filter()
        )
        before = barrier_error(self.model, self.evaluation, state, state.mu)
        after = barrier_error(self.model, evaluation, reached, state.mu)
        return Trial(evaluation, alpha, direction, False) if after <= SOFT * before else None

    def negligible(self, direction: Direction) -> bool:
        """Whether the step is within rounding of w."""
        size = (direction.dw.abs() / (1 + self.state.w.abs())).amax()
        return float(size) < TINY * torch.finfo(size.dtype).eps

    def accept(self, trial: Trial) -> None:
        """Move the iterate."""
        state = self.state
        if not trial.armijo:
            state.filter.add(self.theta, self.phi)
        dz = self.dual_step(trial.direction.dw)
        alpha_dual = longest(state.z, dz, state.boundary)
        state.w = trial.evaluation.w
        state.y = state.y + trial.alpha * trial.direction.dy
        state.z = safeguarded(self.model, state.w, state.z + alpha_dual * dz, state.mu)


def longest(values: Tensor, change: Tensor, boundary: float) -> float:
    """The largest alpha up to one with ``values + alpha change >= (1 - boundary) values``."""
    shrinking = change < 0
    if not bool(shrinking.any()):
        return 1.0
    return min(1.0, float((-boundary * values[shrinking] / change[shrinking]).amin()))


def safeguarded(model: BarrierModel, w: Tensor, z: Tensor, mu: float) -> Tensor:
    """z within a large factor of mu / gap, so that the primal-dual Hessian stays near the primal one."""
    central = mu / model.sides.gaps(w)
    return torch.minimum(torch.maximum(z, central / SAFEGUARD), central * SAFEGUARD)


def barrier_error(model: BarrierModel, evaluation: Evaluation, state: BarrierState, mu: float) -> float:
    """The largest residual of the conditions of the barrier problem with mu, scaled by the mean multiplier."""
    dual = model.lagrangian_gradient(evaluation, state.y, state.z)
    gaps = model.sides.gaps(state.w)
    total = float(state.z.abs().sum())
    scale = _mean_scale(total + float(state.y.abs().sum()), model.m + len(state.z))
    scale_z = _mean_scale(total, len(state.z))
    parts = (
        _largest(dual) / scale,
        _largest(evaluation.constraints),
        _largest(gaps * state.z - mu) / scale_z,
    )
    return max(parts) if all(p == p for p in parts) else math.nan


def _largest(v: Tensor) -> float:
    return float(v.abs().amax()) if len(v) else 0.0


def _mean_scale(total: float, count: int) -> float:
    return max(100.0, total / count) / 100.0 if count else 1.0
