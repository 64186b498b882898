"""The primal-dual interior-point method with a filter line search.

Source: Waechter and Biegler, "On the implementation of an interior-point filter line-search algorithm for large-scale
nonlinear programming", Mathematical Programming 106 (2006).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from constrained.barrier import Evaluation, ScaledEvaluation, ScaledProblem
from constrained.barrier_step import BarrierState, NewtonStep, barrier_error, violation
from constrained.inertia import InertiaCorrection
from constrained.lagrangian import Lagrangian, Point
from constrained.method import ConstrainedMethod, ConstrainedState
from constrained.residual import measure
from constrained.residual import violation as largest_violation
from constrained.restoration import PROGRESS, Restoration, enter, leave
from implicit import Dense, Diagonal, LinearSolver, Status
from implicit.iterate import Values

ERROR_FACTOR = 10.0
LARGE_MULTIPLIER = 1e3
STEEP = 100.0
SMALLEST_SCALE = 1e-8
LOWEST = 1e-18
LEAST_SQUARES_DAMPING = 1e-8


@dataclass(kw_only=True)
class InteriorPointState(ConstrainedState):
    """The state of a run.

    Attributes:
        scales: of the objective and the constraints, shape (1 + m + p,).
        main: the iterate of the barrier problem.
        inner: that of the restoration phase.
        reference: where the phase began.
        restoring: whether the phase is on.
        entry: the violation with which it began.
        residual: the largest KKT residual, unscaled.
    """

    scales: Tensor
    main: BarrierState
    inner: BarrierState
    reference: Tensor
    restoring: bool = False
    entry: float = 0.0
    residual: float = float("inf")
    evaluation: ScaledEvaluation | None = field(default=None, metadata={"transient": True})


@dataclass(frozen=True, kw_only=True)
class InteriorPoint(ConstrainedMethod[InteriorPointState]):
    """Newton steps on the perturbed optimality conditions, kept inside the bounds, accepted by a filter."""

    linear_solver: LinearSolver | None = None
    barrier: float | None = None
    decrease: float = 0.2
    power: float = 1.5

    default_max_steps: ClassVar[int] = 3_000

    def init(self, problem: Lagrangian, *start: Any, generator: torch.Generator | None = None) -> InteriorPointState:
        x0, given = start[0], start[1] if len(start) > 1 else None
        unscaled = ScaledProblem(problem, x0.new_ones(1 + problem.constraints))
        u = unscaled.sides.inside(torch.cat([x0[unscaled.free], x0.new_ones(problem.inequalities)]))[: unscaled.n]
        point = problem.at(unscaled.x(u))
        scales = _scales(problem, point)
        model = ScaledProblem(problem, scales)
        slacks = -(scales[1:] * point.constraints)[problem.equalities :]
        w = model.sides.inside(torch.cat([u, torch.nan_to_num(slacks)]))
        evaluation = ScaledEvaluation(model, w, point)
        main = BarrierState(w=w, y=x0.new_zeros(model.m), z=torch.ones_like(model.sides.bound), mu=self.barrier or 0.1)
        if evaluation.finite:
            main.filter.limit(violation(evaluation))
            main.y = self._estimate(model, evaluation, main.z)
        size, k = model.size + 2 * model.m, len(main.z) + 2 * model.m
        inner = BarrierState(w=x0.new_zeros(size), y=torch.zeros_like(main.y), z=x0.new_zeros(k), mu=1.0)
        zeros = torch.zeros_like(x0)
        state = InteriorPointState(
            x=point.x.clone(),
            equality=x0.new_zeros(problem.equalities),
            inequality=x0.new_zeros(problem.inequalities),
            lower=zeros,
            upper=zeros.clone(),
            generator=generator or torch.Generator().manual_seed(0),
            scales=scales,
            main=main,
            inner=inner,
            reference=torch.zeros_like(w),
        )
        state.verdict = "" if evaluation.finite else "NONFINITE"
        self._publish(problem, model, state, evaluation)
        return state

    def _shrink_multipliers(self, model: ScaledProblem, evaluation: Evaluation, state: BarrierState) -> None:
        """Where gradients of constraints depend on each other, huge multipliers may do no more than small ones."""
        if not model.m or not float(state.y.abs().amax()) > LARGE_MULTIPLIER:
            return
        y = self._estimate(model, evaluation, state.z, damping=LEAST_SQUARES_DAMPING)
        before, after = (float(model.lagrangian_gradient(evaluation, v, state.z).abs().amax()) for v in (state.y, y))
        if after <= before:
            state.y = y

    def _estimate(self, model: ScaledProblem, evaluation: Evaluation, z: Tensor, damping: float = 0.0) -> Tensor:
        """Least-squares multipliers; zero where they are too large to be of use."""
        if not model.m:
            return z.new_zeros(0)
        right = -model.lagrangian_gradient(evaluation, z.new_zeros(model.m), z)
        ones = right.new_ones(model.n)
        below = right.new_zeros(model.m).index_add(0, model.row, torch.ones_like(model.sign))
        identity = Diagonal(ones) if evaluation.jacobian.to_sparse() is not None else Dense(torch.diag(ones))
        bottom = right.new_zeros(model.m).index_add(0, model.row, -model.sign * right[model.n :])
        kkt = InertiaCorrection(linear_solver=self.linear_solver).correct(
            identity, evaluation.jacobian, torch.cat([right[: model.n], bottom]), dual_diagonal=below + damping
        )
        y = kkt.system.split(kkt.step)[1]
        return y if kkt.success and float(y.abs().amax()) <= LARGE_MULTIPLIER else torch.zeros_like(y)

    def step(self, problem: Lagrangian, state: InteriorPointState) -> Values:
        model = ScaledProblem(problem, state.scales)
        values = self._restore(problem, model, state) if state.restoring else self._advance(problem, model, state)
        return {"residual": state.residual, **values}

    def terminate(self, problem: Lagrangian, state: InteriorPointState) -> Status:
        assert self.atol is not None
        if not state.restoring and state.residual <= self.atol:
            return Status.CONVERGED
        return Status[state.verdict] if state.verdict else Status.RUNNING

    def _advance(self, problem: Lagrangian, model: ScaledProblem, state: InteriorPointState) -> Values:
        evaluation = self._evaluation(problem, model, state)
        main = state.main
        self._shrink_multipliers(model, evaluation, main)
        self._update_barrier(model, evaluation, main)
        newton = NewtonStep(model, evaluation, main)
        direction = newton.direction(InertiaCorrection(linear_solver=self.linear_solver))
        trial = None
        if direction is not None:
            trial = newton.search(direction)
        if trial is None:
            return self._begin_restoration(problem, model, state, evaluation, newton)
        newton.accept(trial)
        self._publish(problem, model, state, trial.evaluation)
        return self._values(state, trial.evaluation, main, trial.alpha, trial.direction.kkt.primal)

    def _update_barrier(self, model: Any, evaluation: Evaluation, state: BarrierState) -> bool:
        """Lower mu while its problem is solved; whether it changed."""
        assert self.atol is not None
        least = (
            self.atol
            / (ERROR_FACTOR + 1)
            * min(1.0, model.objective_scale if hasattr(model, "objective_scale") else 1.0)
        )
        changed = False
        if not len(state.z):
            return False
        while barrier_error(model, evaluation, state, state.mu) <= ERROR_FACTOR * state.mu and state.mu > LOWEST:
            least = least if state.mu > least else LOWEST
            state.mu = max(least, min(self.decrease * state.mu, state.mu**self.power))
            state.filter.reset()
            changed = True
        return changed

    def _begin_restoration(
        self, problem: Lagrangian, model: ScaledProblem, state: InteriorPointState, evaluation: Any, newton: NewtonStep
    ) -> Values:
        main = state.main
        if newton.theta <= 1e-13 or not model.m:
            state.verdict = "STALLED"
            return self._values(state, evaluation, main, 0.0, 0.0)
        main.filter.add(newton.theta, newton.phi)
        state.restoring, state.entry, state.reference = True, newton.theta, main.w.clone()
        enter(model, evaluation, main, state.inner)
        return self._restore(problem, model, state)

    def _restore(self, problem: Lagrangian, model: ScaledProblem, state: InteriorPointState) -> Values:
        assert self.atol is not None
        inner, base = state.inner, self._evaluation(problem, model, state)
        phase = Restoration(model, state.reference, inner.mu)
        evaluation = phase.around(base, inner.w)
        if self._update_barrier(phase, evaluation, inner):
            phase = Restoration(model, state.reference, inner.mu)
            evaluation = phase.around(base, inner.w)
        newton = NewtonStep(phase, evaluation, inner)
        direction = newton.direction(InertiaCorrection(linear_solver=self.linear_solver))
        trial = None if direction is None else newton.search(direction)
        if trial is None:
            bad = float(largest_violation(problem, base.point)) > self.atol
            state.verdict = "INFEASIBLE" if bad else "STALLED"
            return self._values(state, base, inner, 0.0, 0.0)
        newton.accept(trial)
        found = trial.evaluation.inner
        self._publish(problem, model, state, found)
        theta, main = violation(found), state.main
        phi = model.barrier(found, main.mu)
        if theta <= PROGRESS * state.entry and main.filter.accepts(theta, phi, torch.finfo(main.w.dtype).eps):
            leave(model, main, found.w)
            main.y = self._estimate(model, found, main.z)
            state.restoring = False
            self._publish(problem, model, state, found)
        elif barrier_error(phase, trial.evaluation, inner, 0.0) <= 1e-8:
            state.verdict = "INFEASIBLE"
        return self._values(state, found, inner, trial.alpha, trial.direction.kkt.primal)

    def _evaluation(self, problem: Lagrangian, model: ScaledProblem, state: InteriorPointState) -> ScaledEvaluation:
        if state.evaluation is None:
            w = state.inner.w[: model.size] if state.restoring else state.main.w
            state.evaluation = ScaledEvaluation(model, w, state.at(problem))
        return state.evaluation

    def _publish(
        self, problem: Lagrangian, model: ScaledProblem, state: InteriorPointState, evaluation: ScaledEvaluation
    ) -> None:
        """The iterate in the problem's own terms."""
        main, point = state.main, evaluation.point
        state.evaluation, state.point, state.x = evaluation, point, point.x
        y = model.constraint_scale * main.y / model.objective_scale
        state.equality, state.inequality = y[: problem.equalities], y[problem.equalities :].clamp(min=0.0)
        sides, z = model.sides, main.z / model.objective_scale
        lower = sides.gather(torch.where(sides.sign > 0, z, 0.0))[: model.n]
        upper = sides.gather(torch.where(sides.sign < 0, z, 0.0))[: model.n]
        zeros = torch.zeros_like(state.x)
        state.lower, state.upper = zeros.index_copy(0, model.free, lower), zeros.index_copy(0, model.free, upper)
        if model.reduced and point.finite:
            slope = point.lagrangian_gradient(torch.cat([state.equality, state.inequality]))
            slope[model.free] = 0.0
            state.lower, state.upper = state.lower + slope.clamp(min=0.0), state.upper + (-slope).clamp(min=0.0)
        if point.finite:
            state.residual = float(measure(problem, point, state.multipliers).amax())

    def _values(
        self, state: InteriorPointState, evaluation: Evaluation, iterate: BarrierState, alpha: float, shift: float
    ) -> dict[str, Any]:
        return {
            "residual": state.residual,
            "objective": evaluation.point.objective,
            "feasibility": float(evaluation.constraints.abs().amax()) if len(evaluation.constraints) else 0.0,
            "barrier": iterate.mu,
            "step_length": alpha,
            "shift": shift,
            "restoring": float(state.restoring),
        }


def _scales(problem: Lagrangian, point: Point) -> Tensor:
    """Factors that bring slopes above 100 down to it."""
    ones = point.x.new_ones(1 + problem.constraints)
    if not point.finite:
        return ones
    ones[0] = min(1.0, STEEP / max(float(point.gradient.abs().amax()), 1e-300))
    jacobian = point.jacobian
    if isinstance(jacobian, Dense):
        slopes = jacobian.matrix.abs().amax(dim=1) if problem.constraints else ones[1:]
    else:
        matrix = jacobian.to_sparse()
        if matrix is None:
            return ones
        slopes = torch.as_tensor(abs(matrix).max(axis=1).toarray().ravel(), dtype=ones.dtype, device=ones.device)
    ones[1:] = torch.clamp(STEEP / slopes.clamp(min=STEEP), min=SMALLEST_SCALE)
    return ones.clamp(min=SMALLEST_SCALE)
