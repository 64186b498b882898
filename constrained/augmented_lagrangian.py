"""The augmented Lagrangian method of Powell, Hestenes and Rockafellar, with safeguarded multipliers."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from constrained.augmented_function import Augmented
from constrained.barrier import Sides
from constrained.bound_newton import minimize_in_box, projected_gradient
from constrained.lagrangian import Lagrangian, Point
from constrained.method import ConstrainedMethod, ConstrainedState
from constrained.residual import KKTResidual, measure, violation
from constrained.rounding import excess
from constrained.unbounded import unbounded_below
from implicit import Dense, Status
from implicit.iterate import Values
from implicit.random import copy_generator

_FIRST_TOLERANCE = 1e-3  # of the first minimization
_PROBES = 8  # random vectors that estimate the norms of the constraints' gradients within a factor of two
_DOUBT = 1e6  # growth of the penalty after which the constraints themselves are looked at
_PATIENCE = 8  # steps in a row that neither lower the residual nor leave a minimization that falls
_FALL = 1e-4  # of the value, which a minimization that needs more steps must fall by


@dataclass(kw_only=True)
class AugmentedState(ConstrainedState):
    """``equality`` and ``inequality`` of the base are estimates at x; the shifts are what the function contains.

    Attributes:
        shift_equality, shift_inequality: multipliers of the current augmented Lagrangian.
        penalty: rho of every constraint, shape (m + p,).
        tolerance: of the current minimization, relative to the scale of :class:`constrained.KKTResidual`.
        radius: trust radius of the next minimization.
        progress: the infeasibility and complementarity measure at the last multiplier update.
        best: the smallest residual so far; ``idle`` counts steps in a row that got nowhere.
        floor: a value below it counts as unbounded.
        examined: the penalties at which the constraints alone were last minimized.
    """

    shift_equality: Tensor
    shift_inequality: Tensor
    penalty: Tensor
    tolerance: float
    radius: float
    progress: float = math.inf
    best: float = math.inf
    idle: int = 0
    floor: float
    examined: Tensor


@dataclass(frozen=True, kw_only=True)
class AugmentedLagrangian(ConstrainedMethod[AugmentedState]):
    """For problems with many variables: nothing but products with Hessians and Jacobians, memory linear in n + m + p.

    Each step minimizes over the bounds, to a tolerance that tightens,

        L_rho(x) = f + sum_i rho_i/2 (h_i + lambda_i/rho_i)^2 + sum_i rho_i/2 max(0, c_i + mu_i/rho_i)^2,

    and then sets ``lambda_i = lambda_i + rho_i h_i``, ``mu_i = max(0, mu_i + rho_i c_i)``. With the violation
    ``V_i = |h_i|`` or ``|max(c_i, -mu_i/rho_i)|``, rho_i grows by ``growth`` where V_i exceeds ``reduction`` times the
    largest V of the step before. The minimizations are a trust-region Newton method for bounds, which leaves points
    where L_rho has negative curvature.

    Where a rho_i has grown a million times, the sum of squared violations is minimized alone: a stationary point of it
    that violates the constraints ends the run as INFEASIBLE.

    Args:
        atol: see :class:`ConstrainedMethod`.
        penalty: the first rho_i is this over the squared norm of the gradient of constraint i at x0 (no norm counting
            for less than a tenth of the largest); None means ten times the curvature of f along a random
            combination of those gradients.
        growth: factor of rho_i, greater than 1.
        reduction: see above; between 0 and 1.
        inner_steps: evaluations per step; a minimization that needs more goes on in the next step.
        max_multiplier: the safeguard: multipliers inside L_rho are clipped to this size.

    Raises:
        ValueError: for numbers out of range.

    References:
        Birgin and Martinez, Practical Augmented Lagrangian Methods for Constrained Optimization, SIAM 2014, algorithm
        4.1; Lin and More, SIAM J. Optim. 9 (1999), for the minimizations.

    Example:
        >>> import torch, constrained
        >>> problem = constrained.ConstrainedProblem(
        ...     objective=lambda x: ((x - 2) ** 2).sum(), inequality=lambda x: (x**2).sum() - 2, lower=0.0
        ... )
        >>> found = constrained.solve(problem, constrained.AugmentedLagrangian(), torch.tensor([3.0, 0.0]))
        >>> found.success, bool((found.x - 1).abs().max() < 1e-3), round(float(found.multipliers.inequality), 2)
        (True, True, 1.0)
    """

    penalty: float | None = None
    growth: float = 10.0
    reduction: float = 0.25
    inner_steps: int = 100
    max_multiplier: float = 1e12

    default_max_steps: ClassVar[int] = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty is not None and not 0 < self.penalty < math.inf:
            raise ValueError(f"penalty must be positive or None, got {self.penalty!r}")
        if not 1 < self.growth < math.inf:
            raise ValueError(f"growth must be greater than 1, got {self.growth!r}")
        if not 0 < self.reduction < 1:
            raise ValueError(f"reduction must be between 0 and 1, got {self.reduction!r}")
        if isinstance(self.inner_steps, bool) or not isinstance(self.inner_steps, int) or self.inner_steps < 1:
            raise ValueError(f"inner_steps must be a positive integer, got {self.inner_steps!r}")
        if not 0 < self.max_multiplier < math.inf:
            raise ValueError(f"max_multiplier must be positive, got {self.max_multiplier!r}")

    def resolve(self, problem: Lagrangian, *start: Tensor, max_steps: int | None = None) -> Self:
        """The same method with every None filled in; looks at curvature at the start."""
        resolved = super().resolve(problem, *start, max_steps=max_steps)
        if resolved.penalty is not None:
            return resolved
        point = _first_point(problem, start[0].detach())
        return replace(resolved, penalty=_first_penalty(problem, point) if point.finite else 10.0)

    def init(self, problem: Lagrangian, *start: Any, generator: torch.Generator | None = None) -> AugmentedState:
        """A state at the start, moved into the bounds; multipliers that are not given are zero."""
        assert self.atol is not None and self.penalty is not None, "resolve comes first"
        x0, given = start[0].detach(), start[1] if len(start) > 1 else None
        multipliers = given if given is not None else problem.flat_multipliers()
        equality, inequality, lower, upper = (v.clone() for v in multipliers)
        inequality = inequality.clamp(min=0)
        point = _first_point(problem, x0)
        x, finite = point.x.clone(), _differentiable(point)
        penalty = self.penalty / _row_norms(problem, point).square() if finite else torch.ones_like(point.constraints)
        return AugmentedState(
            x=x,
            equality=equality,
            inequality=inequality,
            lower=lower.clamp(min=0),
            upper=upper.clamp(min=0),
            generator=copy_generator(generator) if generator is not None else torch.Generator().manual_seed(0),
            point=point,
            verdict="" if finite else Status.NONFINITE.name,
            shift_equality=equality.clone(),
            shift_inequality=inequality.clone(),
            penalty=penalty,
            tolerance=_FIRST_TOLERANCE if problem.constraints else 0.5 * self.atol,
            radius=1.0 + float(torch.linalg.vector_norm(x)),
            floor=unbounded_below(problem, point),
            examined=penalty.clone(),
        )

    def terminate(self, problem: Lagrangian, state: AugmentedState) -> Status:
        """Measured residuals against atol."""
        assert self.atol is not None
        if state.verdict:
            return Status[state.verdict]
        residual = measure(problem, state.at(problem), state.multipliers)
        return Status.CONVERGED if bool((residual <= self.atol).all()) else Status.RUNNING

    def step(self, problem: Lagrangian, state: AugmentedState) -> Values:
        """One minimization, then new multipliers and penalty."""
        assert self.atol is not None
        start = Augmented(problem, state.at(problem), state.shift_equality, state.shift_inequality, state.penalty)
        # Not of the multipliers: where constraints have small gradients, or none hold, those are large.
        scale = max(1.0, float(start.point.gradient.abs().amax()))
        found = minimize_in_box(
            start.moved,
            start,
            problem.lower,
            problem.upper,
            tolerance=state.tolerance,
            scale=scale,
            radius=state.radius,
            max_steps=self.inner_steps,
            floor=state.floor,
        )
        assert isinstance(found.at, Augmented)
        if found.status is Status.UNBOUNDED:
            self._descend(problem, state, found.at.point)
        else:
            state.radius = found.radius
            self._move(problem, state, found.at, scale)
            residual = KKTResidual(*measure(problem, found.at.point, state.multipliers).tolist())
            if found.status is Status.NONFINITE:
                state.verdict = Status.NONFINITE.name
            else:
                fallen = start.value - found.at.value > _FALL * max(1.0, abs(found.at.value))
                unfinished = found.status is Status.STEP_LIMIT
                grown = not unfinished and self._update(problem, state, found.at, residual.largest)
                self._count(state, residual.largest, grown or (unfinished and fallen))
        return self._report(problem, state, found.steps)

    def _move(self, problem: Lagrangian, state: AugmentedState, at: Augmented, scale: float) -> None:
        """Take the point, with first-order estimates of all multipliers."""
        state.x, state.point = at.x, at.point
        state.equality, state.inequality = problem.split(at.multiplier)
        slope = at.gradient
        # A bound carries the slope where the projected step ends at it; elsewhere the slope is left to be seen.
        state.lower = torch.where(at.x - problem.lower <= slope / scale, slope.clamp(min=0), 0.0)
        state.upper = torch.where(problem.upper - at.x <= -slope / scale, (-slope).clamp(min=0), 0.0)

    def _count(self, state: AugmentedState, residual: float, moved: bool) -> None:
        """Steps that got nowhere."""
        assert self.atol is not None
        state.idle = 0 if moved or residual < 0.9 * state.best else state.idle + 1
        state.best = min(state.best, residual)
        if not state.verdict and residual > self.atol and state.idle >= _PATIENCE:
            state.verdict = Status.STALLED.name

    def _update(self, problem: Lagrangian, state: AugmentedState, at: Augmented, residual: float) -> bool:
        """Multipliers, tolerance and penalty for the next minimization; whether a penalty has grown."""
        assert self.atol is not None
        bound = self.max_multiplier
        state.shift_equality = state.equality.clamp(-bound, bound)
        state.shift_inequality = state.inequality.clamp(max=bound)
        floor = 0.1 * self.atol
        state.tolerance = max(floor, min(state.tolerance, 0.1 * residual))
        progress = at.progress
        late = progress > max(self.reduction * state.progress, floor)
        late &= state.penalty < 1.0 / torch.finfo(state.penalty.dtype).eps
        state.penalty = torch.where(late, self.growth * state.penalty, state.penalty)
        state.progress = float(progress.amax()) if len(progress) else 0.0
        if bool((state.penalty >= _DOUBT * state.examined).any()):
            state.examined = state.penalty.clone()
            self._examine(problem, state)
        return bool(late.any())

    def _examine(self, problem: Lagrangian, state: AugmentedState) -> None:
        """Minimize the violation alone: either it can be removed, and the run goes on there, or it cannot."""
        assert self.atol is not None
        point, stationary = self._restore(problem, state.at(problem))
        remaining = float(violation(problem, point))
        if stationary and excess(problem, point) > 1e2 * self.atol:
            state.verdict = Status.INFEASIBLE.name
        elif remaining > 0.5 * float(violation(problem, state.at(problem))):
            return
        state.x, state.point = point.x, point

    def _restore(self, problem: Lagrangian, point: Point) -> tuple[Point, bool]:
        """The end of a minimization of ``||h||^2 / 2 + ||max(0, c)||^2 / 2``, and whether that is stationary."""
        assert self.atol is not None
        zeros = torch.zeros_like(point.constraints)
        start = Augmented(problem, point, *problem.split(zeros), torch.ones_like(zeros), weight=0.0)
        size = float(start.multiplier.abs().amax())
        found = minimize_in_box(
            start.moved,
            start,
            problem.lower,
            problem.upper,
            tolerance=1e-2 * self.atol * min(1.0, size) / max(1.0, float(point.x.abs().amax())),
            radius=1.0 + float(torch.linalg.vector_norm(point.x)),
            max_steps=self.inner_steps,
            floor=0.5 * (0.1 * self.atol) ** 2,
        )
        assert isinstance(found.at, Augmented)
        left = projected_gradient(found.at.x, found.at.gradient, problem.lower, problem.upper)
        # Near a degenerate feasible point J^T r vanishes too, but faster than r: hence a ratio.
        # Slopes are small in large units of x: what counts is the change over a step of x's own size.
        change = left * found.at.x.abs().clamp(min=1.0)
        small = float(change.abs().amax()) <= 1e2 * self.atol * float(found.at.multiplier.abs().amax())
        return found.at.point, small

    def _descend(self, problem: Lagrangian, state: AugmentedState, far: Point) -> None:
        """L_rho has no minimum: neither has the problem if the point can be made feasible, else rho is too small."""
        assert self.atol is not None
        low = min(float(far.objective), state.floor)
        point, stationary = self._restore(problem, far) if problem.constraints else (far, False)
        satisfied = excess(problem, point) <= 1e2 * self.atol
        infeasible = stationary and not satisfied
        deep = satisfied and float(point.objective) < 0.5 * low
        if infeasible or deep:
            state.x, state.point = point.x, point
            state.verdict = (Status.INFEASIBLE if infeasible else Status.UNBOUNDED).name
            return
        state.penalty = self.growth * state.penalty
        state.idle += 1
        if state.idle > _PATIENCE:
            state.verdict = Status.STALLED.name

    def _report(self, problem: Lagrangian, state: AugmentedState, steps: int) -> Values:
        point = state.at(problem)
        stationarity, feasibility, complementarity = measure(problem, point, state.multipliers).unbind()
        return {
            "objective": point.objective,
            "residual": torch.stack([stationarity, feasibility, complementarity]).amax(),
            "stationarity": stationarity,
            "feasibility": feasibility,
            "complementarity": complementarity,
            "penalty": state.penalty.amax() if len(state.penalty) else 0.0,
            "inner_steps": float(steps),
        }


def _first_point(problem: Lagrangian, x0: Tensor) -> Point:
    """The nearest point in the bounds; well inside them where the problem has no derivatives at that."""
    x = problem.clip(x0)
    point = problem.at(x)
    if _differentiable(point):
        return point
    inside = Sides.between(problem.lower, problem.upper).inside(x)
    return point if torch.equal(inside, x) else problem.at(inside)


def _differentiable(point: Point) -> bool:
    """Whether values, the gradient and the Jacobian are finite."""
    if not (point.finite and bool(torch.isfinite(point.gradient).all())):
        return False
    pulled = point.jacobian.T @ torch.ones_like(point.constraints) if len(point.constraints) else point.gradient
    return bool(torch.isfinite(pulled).all())


def _row_norms(problem: Lagrangian, point: Point) -> Tensor:
    """Norms of the constraints' gradients, shape (m + p,), none below a tenth of the largest.

    Where the Jacobian is not formed they are estimated: ``E (J v)_i^2 = ||J_i||^2`` for standard normal v.
    """
    if not problem.constraints:
        return torch.ones_like(point.constraints)
    if isinstance(point.jacobian, Dense):
        found = torch.linalg.vector_norm(point.jacobian.to_dense(), dim=1)
    else:
        probes = _normal(_PROBES, problem.n, like=point.x)
        found = point.jacobian.flat_mm(probes).square().mean(dim=0).sqrt()
    largest = torch.where(torch.isfinite(found), found, 0.0).amax()
    return torch.where(largest > 0, torch.clamp(found, min=0.1 * largest, max=largest), 1.0)


def _normal(*shape: int, like: Tensor) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(like)


def _first_penalty(problem: Lagrangian, point: Point) -> float:
    """Ten times the curvature of f along the constraints' gradients; where f is linear, its slope over |x|."""
    if not problem.constraints:
        return 10.0
    weights = _normal(problem.constraints, like=point.x)
    v = point.jacobian.T @ (weights / _row_norms(problem, point))
    size = float(torch.linalg.vector_norm(v))
    if not 0 < size < math.inf:
        return 10.0
    bend = float(torch.linalg.vector_norm(point.hessian(torch.zeros_like(weights)) @ v)) / size
    slope = float(torch.linalg.vector_norm(point.gradient)) / max(1.0, float(torch.linalg.vector_norm(point.x)))
    found = 10.0 * (bend if bend > 0 else slope)
    return min(max(found, 1e-4), 1e8) if 0 < found < math.inf else 10.0
