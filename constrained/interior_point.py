"""The primal-dual interior-point method with a filter line search.

Source: Waechter and Biegler, "On the implementation of an interior-point filter line-search algorithm for large-scale
nonlinear programming", Mathematical Programming 106 (2006).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from constrained.barrier import BarrierModel, Evaluation, ScaledEvaluation, ScaledProblem
from constrained.barrier_step import BarrierState, Direction, NewtonStep, Trial, barrier_error, violation
from constrained.inertia import InertiaCorrection, require_kkt_solver
from constrained.interior_start import begin, begin_warm, least_squares, shrink_multipliers
from constrained.lagrangian import Lagrangian
from constrained.method import ConstrainedMethod, ConstrainedState, smallest_curvature
from constrained.residual import measure
from constrained.residual import violation as largest_violation
from constrained.restoration import LeastSquares, Restoration, RestorationModel, begin_l1, begin_squares, leave
from constrained.rounding import excess
from constrained.unbounded import unbounded_below
from implicit import LinearSolver, Status
from implicit.iterate import Values

ERROR_FACTOR = 10.0
LOWEST = 1e-18
PROGRESS = 0.9
SOFT_STEPS = 10
VISITS = 50
SMALL_STEP = 1e-12
SMALL_STEPS = 15
NO_INTERIOR = 1e8
STATIONARY = 1e-8
POLISHING = 5

MAIN, L1, SQUARES = 0, 1, 2


@dataclass(kw_only=True)
class InteriorPointState(ConstrainedState):
    """The state of a run.

    Attributes:
        scales: of the objective and the constraints, shape (1 + m + p,).
        main: the iterate of the barrier problem.
        inner, squares: those of the two restoration phases.
        phase: 0 outside them, 1 and 2 in them.
        reference: where the phase began, and ``entry`` with which violation; ``visits`` counts the phases.
        soft: consecutive steps that the filter did not accept.
        small: consecutive steps below the precision.
        margin: by how much bounds and inequalities may be violated.
        floor: an objective below it counts as unbounded.
        residual: the largest KKT residual, unscaled.
        polished: consecutive steps within the tolerance at which the curvature was that of no minimum.
    """

    scales: Tensor
    main: BarrierState
    inner: BarrierState
    squares: BarrierState
    reference: Tensor
    phase: int = MAIN
    entry: float = 0.0
    visits: int = 0
    soft: int = 0
    small: int = 0
    margin: float = 0.0
    floor: float = 0.0
    residual: float = float("inf")
    polished: int = 0
    evaluation: ScaledEvaluation | None = field(default=None, metadata={"transient": True})


@dataclass(frozen=True, kw_only=True)
class InteriorPoint(ConstrainedMethod[InteriorPointState]):
    """Primal-dual interior points with a filter line search, for equalities, inequalities, bounds, or none of them.

    Inequalities get slacks, ``c(x) + s = 0`` with ``s >= 0``, and every bounded variable a logarithmic term. Each step
    is a Newton step, with exact second derivatives, on the optimality conditions of

    .. math:: \\min f(x) - \\mu \\sum_i \\log(\\text{distance to bound } i)
              \\quad\\text{s.t.}\\quad h(x) = 0,\\; c(x) + s = 0,

    kept strictly inside the bounds, and accepted by a filter: it must improve on every pair (violation, barrier value)
    met so far in one of the two. mu shrinks superlinearly as its problems are solved. Second-order corrections,
    shifts of the Hessian (:class:`constrained.inertia.InertiaCorrection`), and two restoration phases, towards the
    least absolute and then the least squared violation, do the rest. After x0 has been checked, functions are
    evaluated within the bounds only, but for a margin of ``atol / 2`` where bounds and constraints leave no interior.

    The run ends CONVERGED on the unscaled KKT residual; INFEASIBLE at a stationary point of the sum of squared
    violations within the bounds; UNBOUNDED where some variable lacks a bound and the objective has fallen by sixteen
    orders of magnitude more than its size at the start, over feasible points; STALLED where rounding hides all
    progress, as at kinks.

    Args:
        atol: the largest :class:`constrained.KKTResidual` that counts as solved; None means 1e-8 in float64 and 1e-4
            in float32.
        linear_solver: for the Newton systems; None takes :class:`implicit.LDLT`, :class:`implicit.SparseLU` or
            :class:`constrained.ProbedKKT` by size and structure.
        barrier: the first mu. A start with ``multipliers`` begins lower, in proportion to its KKT residual.
        decrease, power: mu becomes ``min(decrease mu, mu^power)``.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> import torch, constrained
        >>> disc = constrained.ConstrainedProblem(
        ...     objective=lambda x: ((x - 2) ** 2).sum(), inequality=lambda x: (x**2).sum() - 2, lower=-1.0
        ... )
        >>> found = constrained.solve(disc, constrained.InteriorPoint(), torch.zeros(2))
        >>> found.success, [round(v, 2) for v in found.x.tolist()], round(float(found.multipliers.inequality), 2)
        (True, [1.0, 1.0], 1.0)
    """

    linear_solver: LinearSolver | None = None
    barrier: float = 0.1
    decrease: float = 0.2
    power: float = 1.5

    default_max_steps: ClassVar[int] = 1_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kkt_solver(self.linear_solver)
        if not 0 < self.barrier < float("inf"):
            raise ValueError(f"barrier must be positive, got {self.barrier!r}")
        if not 0 < self.decrease < 1:
            raise ValueError(f"decrease must lie in (0, 1), got {self.decrease!r}")
        if not 1 < self.power < 2:
            raise ValueError(f"power must lie in (1, 2), got {self.power!r}; the Newton steps are quadratic at best")

    def init(self, problem: Lagrangian, *start: Any, generator: torch.Generator | None = None) -> InteriorPointState:
        """Scales, a point inside the bounds, and multipliers: given, or of least squares."""
        x0, given = start[0], start[1] if len(start) > 1 else None
        if given is None:
            model, evaluation, main = begin(problem, x0, self.barrier)
            if evaluation.finite:
                main.y = least_squares(model, evaluation, main.z, self._inertia)
        else:
            model, evaluation, main = begin_warm(problem, x0, given, self._least(1.0), self.barrier)
        main.filter.limit(violation(evaluation))
        size, k, m = model.size, len(main.z), model.m
        zeros = torch.zeros_like(x0)
        state = InteriorPointState(
            x=evaluation.point.x,
            equality=x0.new_zeros(problem.equalities),
            inequality=x0.new_zeros(problem.inequalities),
            lower=zeros,
            upper=zeros.clone(),
            generator=generator or torch.Generator().manual_seed(0),
            scales=torch.cat([x0.new_tensor([model.objective_scale]), model.constraint_scale]),
            main=main,
            inner=_blank(x0, size + 2 * m, m, k + 2 * m),
            squares=_blank(x0, size + m, m, k),
            reference=x0.new_zeros(size),
            floor=unbounded_below(problem, evaluation.point),
        )
        state.verdict = "" if evaluation.finite else "NONFINITE"
        self._publish(problem, model, state, evaluation)
        return state

    def step(self, problem: Lagrangian, state: InteriorPointState) -> Values:
        """One Newton step of the problem or of a restoration phase."""
        model = ScaledProblem(problem, state.scales, state.margin)
        if state.phase == MAIN:
            trial, iterate = self._advance(problem, model, state), state.main
        else:
            trial, iterate = self._restore(problem, model, state)
        point = state.at(problem)
        self._settle(problem, state)
        return {
            "residual": state.residual,
            "objective": point.objective,
            "feasibility": largest_violation(problem, point),
            "mu": iterate.mu,
            "step_length": trial.alpha if trial else 0.0,
            "shift": trial.direction.kkt.primal if trial else 0.0,
            "phase": float(state.phase),
        }

    def terminate(self, problem: Lagrangian, state: InteriorPointState) -> Status:
        """From the unscaled KKT residual, or what a step has established."""
        assert self.atol is not None
        if state.residual <= self.atol and not 0 < state.polished <= POLISHING:
            return Status.CONVERGED
        return Status[state.verdict] if state.verdict else Status.RUNNING

    def _settle(self, problem: Lagrangian, state: InteriorPointState) -> None:
        """Go on for a few steps where the curvature looks wrong: with a smaller mu it may be clear what is active."""
        assert self.atol is not None
        if state.residual > self.atol or not len(state.main.z):
            return
        curvature = smallest_curvature(problem, state.at(problem), state.multipliers)
        wrong = curvature is not None and curvature < -(self.atol**0.5)
        state.polished = state.polished + 1 if wrong else 0

    @property
    def _inertia(self) -> InertiaCorrection:
        return InertiaCorrection(linear_solver=self.linear_solver)

    def _least(self, scale: float) -> float:
        """The mu at which the conditions should hold to the tolerance."""
        assert self.atol is not None
        return self.atol / (ERROR_FACTOR + 1) * min(1.0, scale)

    def _advance(self, problem: Lagrangian, model: ScaledProblem, state: InteriorPointState) -> Trial | None:
        """A step of the problem itself; None where a restoration phase is due instead."""
        assert self.atol is not None
        main, evaluation = state.main, self._evaluation(problem, model, state)
        if float(evaluation.point.objective) < state.floor:
            if excess(problem, evaluation.point) <= self.atol:
                state.verdict = "UNBOUNDED"
            else:
                self._begin_phase(state, evaluation, NewtonStep(model, evaluation, main))
            return None
        if self._has_no_interior(model, state):
            self._relax(problem, state)
            return None
        shrink_multipliers(model, evaluation, main, self._inertia)
        self._update_barrier(model, evaluation, main, self._least(model.objective_scale))
        newton = NewtonStep(model, evaluation, main)
        direction = newton.direction(self._inertia)
        trial = self._search(newton, direction, state)
        if trial is None:
            self._give_up(problem, model, state, evaluation, newton)
            return None
        newton.accept(trial)
        moved = trial.alpha * (trial.direction.dw.abs() / (1 + main.w.abs())).amax()
        state.small = state.small + 1 if float(moved) < SMALL_STEP else 0
        assert isinstance(trial.evaluation, ScaledEvaluation)
        self._publish(problem, model, state, trial.evaluation)
        if state.small >= SMALL_STEPS:
            state.small = 0
            self._give_up(problem, model, state, trial.evaluation, NewtonStep(model, trial.evaluation, main))
        return trial

    def _search(self, newton: NewtonStep, direction: Direction | None, state: InteriorPointState) -> Trial | None:
        assert self.atol is not None
        if direction is None:
            return None
        if newton.negligible(direction):
            return newton.whole(direction) if newton.theta <= self.atol else None
        trial = newton.search(direction)
        state.soft = 0 if trial is not None else state.soft + 1
        return newton.soft(direction) if trial is None and state.soft <= SOFT_STEPS else trial

    def _give_up(
        self,
        problem: Lagrangian,
        model: ScaledProblem,
        state: InteriorPointState,
        evaluation: ScaledEvaluation,
        newton: NewtonStep,
    ) -> None:
        """Where no step is accepted: restore feasibility, or stop where there is nothing to restore."""
        assert self.atol is not None
        if newton.broken and not _differentiable(newton):
            state.verdict = "NONFINITE"
            return
        # Rounding, and a margin that the bounds were given, are nothing to restore.
        allowed = max(0.1 * self.atol, state.margin)
        if not model.m or excess(problem, evaluation.point) <= allowed or state.visits >= VISITS:
            state.verdict = "STALLED"
        else:
            self._begin_phase(state, evaluation, newton)

    def _begin_phase(self, state: InteriorPointState, evaluation: ScaledEvaluation, newton: NewtonStep) -> None:
        main = state.main
        main.filter.add(newton.theta, newton.phi)
        state.phase, state.entry, state.reference = L1, newton.theta, main.w.clone()
        state.visits += 1
        begin_l1(evaluation, main, state.inner)

    def _restore(
        self, problem: Lagrangian, model: ScaledProblem, state: InteriorPointState
    ) -> tuple[Trial | None, BarrierState]:
        """A step of the restoration phase."""
        iterate = state.inner if state.phase == L1 else state.squares
        base = self._evaluation(problem, model, state)
        phase = self._phase(model, state)
        evaluation = phase.around(base, iterate.w)
        least = 0.1 * STATIONARY
        if self._update_barrier(phase, evaluation, iterate, least):
            phase = self._phase(model, state)
            evaluation = phase.around(base, iterate.w)
        if _phase_error(phase, evaluation, iterate) <= self._stationary(iterate):
            self._end_phase(problem, model, state, base)
            return None, iterate
        newton = NewtonStep(phase, evaluation, iterate)
        direction = newton.direction(self._inertia)
        trial = None
        if direction is not None:
            trial = newton.whole(direction) if newton.negligible(direction) else newton.search(direction)
            iterate.tiny = iterate.tiny + 1 if newton.negligible(direction) else 0
            trial = trial or newton.soft(direction)
        if trial is None or iterate.tiny > 2:
            self._end_phase(problem, model, state, base)
            return None, iterate
        newton.accept(trial)
        found = trial.evaluation.inner  # type: ignore[attr-defined]
        self._publish(problem, model, state, found)
        self._leave_if_better(problem, model, state, found)
        return trial, iterate

    def _phase(self, model: ScaledProblem, state: InteriorPointState) -> RestorationModel:
        return Restoration(model, state.reference, state.inner.mu) if state.phase == L1 else LeastSquares(model)

    def _stationary(self, iterate: BarrierState) -> float:
        """The residual at which a phase has converged, relative to its multipliers: those are what it minimises."""
        return STATIONARY * min(1.0, float(iterate.y.abs().amax()))

    def _leave_if_better(
        self, problem: Lagrangian, model: ScaledProblem, state: InteriorPointState, found: ScaledEvaluation
    ) -> None:
        theta, main = violation(found), state.main
        phi = model.barrier(found, main.mu)
        if theta <= PROGRESS * state.entry and main.filter.accepts(theta, phi, torch.finfo(main.w.dtype).eps):
            self._leave(problem, model, state, found)

    def _leave(
        self, problem: Lagrangian, model: ScaledProblem, state: InteriorPointState, found: ScaledEvaluation
    ) -> None:
        leave(model, state.main, found.w)
        state.main.y = least_squares(model, found, state.main.z, self._inertia)
        state.phase = MAIN
        self._publish(problem, model, state, found)

    def _end_phase(
        self, problem: Lagrangian, model: ScaledProblem, state: InteriorPointState, found: ScaledEvaluation
    ) -> None:
        """Where a phase has converged or can do no more: go on to the next, back to the problem, or stop."""
        assert self.atol is not None
        if excess(problem, found.point) <= self.atol:
            state.main.filter.reset()
            self._leave(problem, model, state, found)
        elif state.phase == L1:
            state.phase = SQUARES
            begin_squares(LeastSquares(model), found, state.squares)
        else:
            phase = LeastSquares(model)
            error = _phase_error(phase, phase.around(found, state.squares.w), state.squares)
            certain = error <= 1e3 * self._stationary(state.squares)
            state.verdict = "INFEASIBLE" if certain else "STALLED"

    def _update_barrier(self, model: BarrierModel, evaluation: Evaluation, state: BarrierState, least: float) -> bool:
        """Lower mu while its problem is solved; whether it changed. Below ``least`` only if that was not enough."""
        if not len(state.z):
            return False
        changed = False
        while state.mu > LOWEST and barrier_error(model, evaluation, state, state.mu) <= ERROR_FACTOR * state.mu:
            floor = least if state.mu > least else LOWEST
            state.mu = max(floor, min(self.decrease * state.mu, state.mu**self.power))
            state.filter.reset()
            changed = True
        return changed

    def _has_no_interior(self, model: ScaledProblem, state: InteriorPointState) -> bool:
        """Multipliers run away where the feasible points do not leave the bounds."""
        main = state.main
        return not state.margin and len(main.z) > 0 and float(main.z.amax()) > NO_INTERIOR

    def _relax(self, problem: Lagrangian, state: InteriorPointState) -> None:
        """Give bounds and inequalities a margin within the tolerance."""
        assert self.atol is not None
        main, state.margin = state.main, 0.5 * self.atol
        model = ScaledProblem(problem, state.scales, state.margin)
        main.z = torch.minimum(main.z, main.mu / model.sides.gaps(main.w))
        main.filter.reset()

    def _evaluation(self, problem: Lagrangian, model: ScaledProblem, state: InteriorPointState) -> ScaledEvaluation:
        if state.evaluation is None:
            w = (state.main, state.inner, state.squares)[state.phase].w[: model.size]
            state.evaluation = ScaledEvaluation(model, w, state.at(problem))
        return state.evaluation

    def _publish(
        self, problem: Lagrangian, model: ScaledProblem, state: InteriorPointState, evaluation: ScaledEvaluation
    ) -> None:
        """The iterate in the problem's own terms."""
        main, point = state.main, evaluation.point
        state.evaluation, state.point, state.x = evaluation, point, point.x
        if not point.finite:
            return
        y = model.constraint_scale * main.y / model.objective_scale
        state.equality, state.inequality = y[: problem.equalities], y[problem.equalities :].clamp(min=0.0)
        sides, z = model.sides, main.z / model.objective_scale
        parts = [sides.gather(torch.where(sides.sign == sign, z, 0.0))[: model.n] for sign in (1.0, -1.0)]
        state.lower, state.upper = (torch.zeros_like(state.x).index_copy(0, model.free, part) for part in parts)
        if model.reduced:
            slope = point.lagrangian_gradient(torch.cat([state.equality, state.inequality]))
            slope = slope.index_fill(0, model.free, 0.0)
            state.lower, state.upper = state.lower + slope.clamp(min=0.0), state.upper + (-slope).clamp(min=0.0)
        state.residual = float(measure(problem, point, state.multipliers).amax())


def _differentiable(newton: NewtonStep) -> bool:
    """Whether all derivatives are numbers: a system of them may overflow where gaps are below rounding."""
    model, evaluation = newton.model, newton.evaluation
    ones = torch.ones_like(evaluation.constraints)
    bent = evaluation.hessian(ones) @ torch.ones_like(evaluation.w[: model.n])
    return all(bool(torch.isfinite(v).all()) for v in (evaluation.gradient, model.pull(evaluation, ones), bent))


def _phase_error(phase: RestorationModel, evaluation: Evaluation, state: BarrierState) -> float:
    """The residual of a phase's conditions, each slope times the size of its variable.

    In large units of x slopes are small everywhere: what counts is the change over a step of x's own size.
    """
    error = barrier_error(phase, evaluation, state, 0.0)
    if not phase.n:
        return error
    dual = phase.lagrangian_gradient(evaluation, state.y, state.z)[: phase.n]
    change = float((dual * state.w[: phase.n].abs().clamp(min=1.0)).abs().amax())
    return max(error, change) if change == change else change


def _blank(like: Tensor, size: int, m: int, k: int) -> BarrierState:
    """Room for a restoration phase."""
    return BarrierState(w=like.new_zeros(size), y=like.new_zeros(m), z=like.new_zeros(k), mu=1.0)
