"""AdaSketch-Newton: Newton's method on the KKT conditions, globalised by the exact augmented Lagrangian."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from constrained.accuracy import DELTA_FLOOR, accuracy_trial, relative_tolerance
from constrained.escape import escape, negative_curvature
from constrained.feasibility import FeasibilityStep, feasibility_step
from constrained.inertia import require_kkt_solver, solver_for
from constrained.lagrangian import DENSE_LIMIT, Lagrangian, Point
from constrained.line_search import LineSearch, Trial
from constrained.merit import ExactAugmentedLagrangian, Slope, Terms
from constrained.method import ConstrainedMethod, ConstrainedState, smallest_curvature
from constrained.multiplier_estimate import LARGEST, least_squares_multipliers
from constrained.multipliers import FlatMultipliers
from constrained.newton_direction import DirectionFinder, NewtonDirection
from constrained.problem import Problem
from constrained.residual import largest, measure
from constrained.rounding import excess
from constrained.scaling import factors, row_sizes
from constrained.unbounded import unbounded_below
from implicit import LinearSolver, Status

LARGEST_MU, SMALLEST_NU = 1e8, 1e-8
"""Penalties are no longer adapted beyond these."""
INCONSISTENT = 0.1
"""Where the Newton step leaves more than this share of c, the linearised constraints contradict each other."""
SHORT_STEP, TINY_STEP, PATIENCE = 0.125, 1e-3, 3
"""Steps that short, so many times in a row, or once a tiny one: it is the constraints that are in the way."""
BARELY_VIOLATED = 1e-4
"""Below this violation short steps are not blamed on the constraints."""
NU_CUT = 10.0
TRIED, SLOW = 10, 0.7
"""After so many steps of restoration that leave more than this share of the violation its model is changed."""
PROGRESS = 0.1
"""The share of its violation at which a phase of restoration ends."""
HALVING = 0.5
NEAR_SADDLE, ESCAPES = 1e-4, 5
MEMORY = 5
TIGHTEST = 1e-12


@dataclass(kw_only=True)
class AdaSketchNewtonState(ConstrainedState):
    """The iterate, with what adapts.

    Attributes:
        mu, nu, delta: penalties and accuracy.
        objective_weight, constraint_weights: w and s of the merit function; s is one where that left no way on.
        shift: primal shift of the last step, zero if none was needed.
        residual, best: the KKT residual, and its smallest value so far.
        memory: the terms of M at the last iterates, three numbers each.
        short: short steps in a row.
        restoring: whether the violation alone is being reduced; until it is at most ``target``.
        damping: as ``shift``, in that phase; zero before its first step.
        curved: whether its model has the curvature of the constraints.
        mark, since: their weighted violation when the model was last judged, and the steps since then.
        escapes: saddle points left behind.
        floor: an objective below it counts as unbounded.
    """

    mu: float
    nu: float
    delta: float
    objective_weight: float
    constraint_weights: Tensor
    shift: float = 0.0
    residual: float = math.nan
    best: float = math.inf
    memory: list[float] = field(default_factory=list)
    short: int = 0
    restoring: bool = False
    target: float = 0.0
    damping: float = 0.0
    curved: bool = False
    mark: float = 0.0
    since: int = 0
    escapes: int = 0
    floor: float = -math.inf


@dataclass(frozen=True, kw_only=True)
class AdaSketchNewton(ConstrainedMethod[AdaSketchNewtonState]):
    """Newton's method for equality constraints with an exact augmented Lagrangian and inexact, possibly random, solves.

    With ``G = J(x)``, ``H = Hess_xx L`` and ``b = (grad_x L, c)`` each step solves

    ``[[H + p I, G^T], [G, 0]] (dx, dl) = -b``

    approximately, where p makes H positive definite on the null space of G, and takes ``(x, l) + a (dx, dl)`` with the
    largest a of 1, 1/2, 1/4, ... that satisfies Armijo's condition on

    ``M(x, l) = f + <l, c> + mu/2 |c|^2 + nu/2 |grad_x L|^2``.

    Until ``<grad M, (dx, dl)> <= -nu/2 |b|^2`` the solve is continued to a smaller residual, mu grows by ``rho^2`` and
    nu shrinks by ``rho``, whichever of the two stands in the way. Guarantee: EXACT, KKT points.

    Beyond the paper: M is scaled; a full step that halves the smallest KKT residual so far is taken at once; M is
    compared with its largest value over five iterates; nu is cut where ``|grad L|^2`` alone keeps steps short; where
    the constraints do, or are inconsistent to first order, their violation alone is reduced for a while; multipliers
    are estimated afresh by least squares after shifted steps, if that lowers M; saddle points are left along negative
    curvature. ``docs/algorithms/adasketch-newton.md`` gives the reasons and measurements.

    Ends CONVERGED at KKT points (minima to second order where matrices are formed), INFEASIBLE at stationary points of
    ``|c|^2`` with c not zero, UNBOUNDED where f falls below -1e16 times its size and slope at the start at points that
    are violated by less than 1e-4 relative to x, NONFINITE where functions or derivatives are no numbers, and STALLED
    where no step lowers M.

    Args:
        linear_solver: None takes :class:`implicit.LDLT` for up to 2,000 variables and constraints together (the
            inertia is then known exactly; 400 where the derivatives are sparse), :class:`implicit.SparseLU` for larger
            sparse ones, and :class:`constrained.ProbedKKT` otherwise. :class:`constrained.SketchAndProject` is the
            paper's.
        mu, nu, delta: penalties and accuracy at the start; the paper's constants.
        xi_b: the paper's lower bound on the curvature of H + p I on the null space of G; for ``accuracy="theory"``.
        beta: Armijo's constant, in (0, 1/2).
        rho: the factor of adaptation, above 1.
        accuracy: how far iterative solvers go. "relative": to a residual of ``relative |b|``, or ``|b|^2`` if that is
            less, tightened by ``rho^2`` whenever the descent test fails. "theory": the paper's bound
            ``|G| Psi |r| <= theta delta |b|``, which amounts to exact solves; it needs matrices.
        relative: the relative residual far from the solution.
        second_order_correction: try to correct full steps that were refused, for the curvature of the constraints.
        atol: see :class:`constrained.ConstrainedMethod`.

    Raises:
        ValueError: if a field is out of its range.
        TypeError: if ``linear_solver`` is none.

    Example:
        >>> import torch, constrained
        >>> hs7 = constrained.EqualityProblem(
        ...     lambda x: torch.log(1 + x[0] ** 2) - x[1], lambda x: (1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4
        ... )
        >>> found = constrained.solve(hs7, constrained.AdaSketchNewton(), torch.tensor([2.0, 2.0]))
        >>> found.success, round(found.objective, 3)
        (True, -1.732)

    References:
        Hong, Na, Mahoney, Kolar: Constrained optimization via exact augmented Lagrangian and randomized iterative
        sketching, ICML 2023, algorithm 1.
    """

    linear_solver: LinearSolver | None = None
    mu: float = 1.0
    nu: float = 0.1
    delta: float = 0.1
    xi_b: float = 0.1
    beta: float = 0.1
    rho: float = 1.5
    accuracy: Literal["relative", "theory"] = "relative"
    relative: float = 0.1
    second_order_correction: bool = True

    default_max_steps: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kkt_solver(self.linear_solver)
        for name in ("mu", "nu", "delta", "xi_b"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not 0 < self.beta < 0.5:
            raise ValueError(f"beta must lie in (0, 1/2), got {self.beta!r}")
        if not self.rho > 1:
            raise ValueError(f"rho must be above 1, got {self.rho!r}")
        if not 0 < self.relative < 1:
            raise ValueError(f"relative must lie in (0, 1), got {self.relative!r}")
        if self.accuracy not in ("relative", "theory"):
            raise ValueError(f"accuracy must be 'relative' or 'theory', got {self.accuracy!r}")

    def refuses(self, problem: Problem) -> str | None:
        """Inequalities and bounds are not for this method, and neither is a problem without equalities."""
        for name in ("inequality", "lower", "upper"):
            if getattr(problem, name) is not None:
                return f"AdaSketchNewton takes equalities alone, but the problem has {name}: use InteriorPoint"
        if problem.equality is None:
            return "AdaSketchNewton needs an equality, the problem has none: use InteriorPoint or implicit.minimize"
        return None

    def resolve(self, problem: Lagrangian, *start: Tensor, max_steps: int | None = None) -> Self:
        """The same method with its tolerance and linear solver chosen."""
        own = super().resolve(problem, *start, max_steps=max_steps)
        if own.accuracy == "theory" and not problem.dense:
            raise ValueError("accuracy='theory' needs the matrices' norms, which are not formed here; use 'relative'")
        return own if own.linear_solver is not None else replace(own, linear_solver=solver_for(problem, start[0]))

    def init(self, problem: Lagrangian, *start: Any, generator: torch.Generator | None = None) -> AdaSketchNewtonState:
        """A state at ``start = (x0, multipliers)``, with scaling and multipliers from the derivatives there."""
        x, given = start
        point = problem.at(x)
        weight, weights = 1.0, torch.ones_like(point.constraints)
        multipliers = problem.flat_multipliers() if given is None else given
        if point.finite:
            weight = factors(largest(point.gradient)).item()
            weights = factors(row_sizes(point))
            if given is None:
                multipliers = multipliers._replace(equality=least_squares_multipliers(point))
        return AdaSketchNewtonState(
            x=x.clone(),
            **FlatMultipliers(*(v.clone() for v in multipliers))._asdict(),
            generator=torch.Generator() if generator is None else generator,
            point=point,
            mu=self.mu,
            nu=self.nu,
            delta=self.delta,
            objective_weight=weight,
            constraint_weights=weights,
            floor=unbounded_below(problem, point),
        )

    def terminate(self, problem: Lagrangian, state: AdaSketchNewtonState) -> Status:
        """The verdict of the step, or what the KKT residual says."""
        point = state.at(problem)
        if not point.finite:
            return Status.NONFINITE
        if state.verdict:
            return Status[state.verdict]
        assert self.atol is not None
        if math.isnan(state.residual):  # at the start; every step measures where it ends
            state.residual = float(measure(problem, point, state.multipliers).max())
        if not state.residual <= self.atol:
            return Status.RUNNING
        curvature = smallest_curvature(problem, point, state.multipliers) if state.escapes < ESCAPES else None
        saddle = curvature is not None and curvature < -(self.atol**0.5)
        return Status.RUNNING if saddle else Status.CONVERGED

    def step(self, problem: Lagrangian, state: AdaSketchNewtonState) -> dict[str, float]:
        """One Newton step, one step of restoration, or one away from a saddle point."""
        point = state.at(problem)
        values = self._feasibility(problem, state) if state.restoring else self._newton(problem, state)
        if float(point.objective) <= state.floor and _barely_violated(point):
            state.verdict = Status.UNBOUNDED.name
        end = state.at(problem)
        stationarity, feasibility, _ = measure(problem, end, state.multipliers).tolist()
        state.residual = max(stationarity, feasibility)
        return {
            "residual": state.residual,
            "stationarity": stationarity,
            "feasibility": feasibility,
            "objective": float(end.objective),
            "mu": state.mu,
            "nu": state.nu,
            "restoring": float(state.restoring),
            **{"step_length": 0.0, "shift": 0.0, "linear_steps": 0.0, "rejected": 0.0, "escape": 0.0, **values},
        }

    def _newton(self, problem: Lagrangian, state: AdaSketchNewtonState) -> dict[str, float]:
        point, multiplier = state.at(problem), state.equality
        merit = ExactAugmentedLagrangian(state.objective_weight, state.constraint_weights)
        rhs = -torch.cat([point.lagrangian_gradient(multiplier), point.constraints])
        hessian = point.hessian(multiplier)
        terms = merit.terms(point, multiplier)
        finder = self._finder(state)
        rtol = self._first_tolerance(state, point, hessian, terms)
        found = finder.find(hessian, point.jacobian, rhs, last=state.shift, rtol=rtol)
        if not (found.finite and found.success):
            state.verdict = (
                Status.STALLED if bool(torch.isfinite(rhs).all()) and found.finite else Status.NONFINITE
            ).name
            return {"shift": found.shift, "linear_steps": found.linear_steps}
        if found.shift and state.residual <= NEAR_SADDLE and (left := self._escape(problem, state, merit, hessian)):
            return left
        if found.dual_shift and self._inconsistent(problem, state, point, found):
            self._restore(state, point)
            return {**self._feasibility(problem, state), "linear_steps": found.linear_steps}
        if found.dual_shift:
            self._limit_multipliers(problem.n, point, multiplier, found)
        slope, rejected = self._adapt(problem, state, merit, hessian, found, rhs, terms, rtol)
        state.shift = found.last
        trial, search = self._search(problem, state, merit, found, slope, terms, rhs, rtol)
        values = {"shift": found.shift, "linear_steps": found.linear_steps, "rejected": rejected}
        self._react(problem, state, point, trial, search)
        if trial is None:
            return values
        state.x, state.point = trial.point.x, trial.point
        state.equality = self._multipliers(state, merit, trial) if found.shift else trial.multiplier
        return {**values, "step_length": trial.length}

    def _finder(self, state: AdaSketchNewtonState) -> DirectionFinder:
        assert self.linear_solver is not None
        return DirectionFinder(self.linear_solver, state.generator)

    def _first_tolerance(self, state: AdaSketchNewtonState, point: Point, hessian: Any, terms: Terms) -> float:
        """The relative residual of the first solve; theta goes to zero with the residual, for a superlinear rate."""
        size = math.sqrt(terms.residual)
        if self.accuracy == "theory":
            trial = accuracy_trial(point.jacobian, hessian, state.mu, state.nu, self.beta, self.xi_b)
            state.delta = max(min(state.delta, trial), DELTA_FLOOR)
            return relative_tolerance(point.jacobian, hessian, min(1.0, size), state.delta, self.xi_b)
        return max(min(self.relative, size), TIGHTEST)

    def _adapt(
        self,
        problem: Lagrangian,
        state: AdaSketchNewtonState,
        merit: ExactAugmentedLagrangian,
        hessian: Any,
        found: NewtonDirection,
        rhs: Tensor,
        terms: Terms,
        rtol: float,
    ) -> tuple[float, int]:
        """Change penalties and accuracy until the step is one of descent, or no further."""
        point, multiplier, n = state.at(problem), state.equality, problem.n
        slope = merit.slope(point, multiplier, hessian, found.step[:n], found.step[n:])
        rejected = 0
        while not slope.at(state.mu, state.nu) <= -0.5 * state.nu * terms.residual:
            if state.mu >= LARGEST_MU or state.nu <= SMALLEST_NU:
                break
            rejected += 1
            self._change_penalties(state, slope, terms)
            if not found.exact:
                rtol = max(rtol / self.rho**2, TIGHTEST)
                found.tighten(rhs, rtol)
                slope = merit.slope(point, multiplier, hessian, found.step[:n], found.step[n:])
        return slope.at(state.mu, state.nu), rejected

    def _change_penalties(self, state: AdaSketchNewtonState, slope: Slope, terms: Terms) -> None:
        assert self.atol is not None
        first = slope.lagrangian + state.mu * slope.infeasibility
        too_steep = slope.stationarity + 0.5 * terms.residual > 0
        if first >= 0:
            state.mu *= self.rho**2
        if too_steep and (first < 0 or terms.infeasibility <= self.atol**2):
            state.nu /= self.rho
        if self.accuracy == "theory":
            state.delta = max(state.delta / self.rho**4, DELTA_FLOOR)

    def _search(
        self,
        problem: Lagrangian,
        state: AdaSketchNewtonState,
        merit: ExactAugmentedLagrangian,
        found: NewtonDirection,
        slope: float,
        terms: Terms,
        rhs: Tensor,
        rtol: float,
    ) -> tuple[Trial | None, LineSearch]:
        n, point = problem.n, state.at(problem)
        state.memory = [*state.memory, terms.lagrangian, terms.infeasibility, terms.stationarity][-3 * MEMORY :]
        past = [Terms(*state.memory[i : i + 3]) for i in range(0, len(state.memory), 3)]
        reference = max(old.at(state.mu, state.nu) for old in past)
        search = LineSearch(merit, state.mu, state.nu, reference, self.beta)
        state.best = min(state.best, state.residual)
        right = not found.shift and not found.dual_shift

        def good(trial: Point, multiplier: Tensor) -> bool:
            all_multipliers = state.multipliers._replace(equality=multiplier)
            return right and bool(measure(problem, trial, all_multipliers).max() <= HALVING * state.best)

        def correct(trial: Point) -> tuple[Tensor, Tensor] | None:
            before, after = (torch.linalg.vector_norm(state.constraint_weights * p.constraints) for p in (point, trial))
            if not self.second_order_correction or not bool(after >= before):
                return None
            z = found.other(torch.cat([rhs[:n], rhs[n:] - trial.constraints]), rtol)
            return z[:n], z[n:]

        start, step = (state.x, state.equality), (found.step[:n], found.step[n:])
        trial = search.run(problem, start, step, slope, good=good, correct=correct)
        if found.shift and trial is not None and trial.length == 1.0 and _barely_violated(point):
            trial = search.extend(problem, start, step, slope, trial)
        return trial, search

    def _react(
        self,
        problem: Lagrangian,
        state: AdaSketchNewtonState,
        point: Point,
        trial: Trial | None,
        search: LineSearch,
    ) -> None:
        """What follows from a step that was short, or found no point at all."""
        violation = float(largest(point.constraints))
        if trial is None:
            if self._violated(problem, point):
                self._restore(state, point)
            else:
                state.verdict = Status.STALLED.name
            return
        state.short = state.short + 1 if trial.length <= SHORT_STEP else 0
        if search.outside:
            state.short = 0
        elif trial.length <= SHORT_STEP and search.bent and state.nu > SMALLEST_NU:
            state.nu, state.short = state.nu / NU_CUT, 0
        elif violation > BARELY_VIOLATED and (trial.length < TINY_STEP or state.short >= PATIENCE):
            self._restore(state, point)

    def _violated(self, problem: Lagrangian, point: Point) -> bool:
        """Whether constraints are violated by more than atol and rounding."""
        assert self.atol is not None
        return excess(problem, point) > self.atol

    def _multipliers(self, state: AdaSketchNewtonState, merit: ExactAugmentedLagrangian, trial: Trial) -> Tensor:
        """Those of least squares where they lower M: a shifted system spoils its multipliers by the shift."""
        other = least_squares_multipliers(trial.point, math.inf)
        values = [merit.terms(trial.point, m).at(state.mu, state.nu) for m in (other, trial.multiplier)]
        return other if values[0] <= values[1] else trial.multiplier

    def _limit_multipliers(self, n: int, point: Point, multiplier: Tensor, found: NewtonDirection) -> None:
        """Keep the multipliers where G has lost rank and the step makes them huge: mu would have to outweigh that."""
        d, change = found.step[:n], found.step[n:]
        if bool(largest(multiplier + change) > LARGEST * largest(point.gradient).clamp(min=1.0)):
            found.step = torch.cat([d, torch.zeros_like(change)])

    def _inconsistent(
        self, problem: Lagrangian, state: AdaSketchNewtonState, point: Point, found: NewtonDirection
    ) -> bool:
        c, s = point.constraints, state.constraint_weights
        left = c + point.jacobian.flat_mv(found.step[: len(point.x)])
        sizes = [float(torch.linalg.vector_norm(s * v)) for v in (left, c)]
        return self._violated(problem, point) and not sizes[0] <= INCONSISTENT * sizes[1]

    def _escape(
        self, problem: Lagrangian, state: AdaSketchNewtonState, merit: ExactAugmentedLagrangian, hessian: Any
    ) -> dict[str, float] | None:
        assert self.atol is not None
        point = state.at(problem)
        if not problem.dense or problem.n > DENSE_LIMIT or state.escapes >= ESCAPES:
            return None
        matrices = hessian.to_dense(), point.jacobian.to_dense()
        curvature = negative_curvature(*matrices, point.gradient, self.atol**0.5)
        moved = None if curvature is None else escape(problem, point, state.equality, curvature, merit, state.mu)
        if moved is None or curvature is None:
            return None
        state.point, length = moved
        state.x, state.equality = state.point.x, least_squares_multipliers(state.point, math.inf)
        state.memory, state.best = [], math.inf
        state.escapes += 1
        return {"step_length": length, "escape": curvature.value}

    def _restore(self, state: AdaSketchNewtonState, point: Point) -> None:
        state.restoring, state.short, state.damping, state.curved, state.since = True, 0, 0.0, False, 0
        state.mark = float(torch.linalg.vector_norm(state.constraint_weights * point.constraints))
        state.target = PROGRESS * state.mark

    def _feasibility(self, problem: Lagrangian, state: AdaSketchNewtonState) -> dict[str, float]:
        assert self.atol is not None
        point, weights = state.at(problem), state.constraint_weights
        found = feasibility_step(
            problem, point, weights, self._finder(state), damping=state.damping, curved=state.curved, rtol=self.relative
        )
        state.damping = found.damping
        values = {"step_length": found.length, "shift": found.damping, "linear_steps": found.linear_steps}
        if found.point is None:
            self._judge(problem, state, point, found)
            return values
        state.x, state.point = found.point.x, found.point
        violation = float(torch.linalg.vector_norm(weights * found.point.constraints))
        state.since += 1
        if state.since == TRIED:
            # Slow: the other model may see more, of a valley or of a saddle.
            state.curved = state.curved != (violation > SLOW * state.mark)
            state.mark, state.since = violation, 0
        if violation <= state.target:
            state.restoring, state.memory, state.shift = False, [], 0.0
            state.mu = self.mu
            state.equality = least_squares_multipliers(found.point)
        return values

    def _judge(self, problem: Lagrangian, state: AdaSketchNewtonState, point: Point, found: FeasibilityStep) -> None:
        """The verdict where the weighted violation cannot be lowered; infeasible is what holds without weights."""
        violated = self._violated(problem, point)
        if not math.isfinite(found.stationarity):
            state.verdict = Status.NONFINITE.name
        elif violated and bool((state.constraint_weights != 1.0).any()):
            state.constraint_weights = torch.ones_like(state.constraint_weights)
            self._restore(state, point)
        else:
            state.verdict = (Status.INFEASIBLE if violated and found.stationary else Status.STALLED).name


def _barely_violated(point: Point) -> bool:
    return bool(largest(point.constraints) <= BARELY_VIOLATED * largest(point.x).clamp(min=1.0))
