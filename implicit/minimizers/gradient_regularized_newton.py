"""Newton's method regularized by the gradient norm (Semenov, Jaggi and Doikov, Gradient-Normalized Smoothness, 2025).

.. math:: y^+ = y - \\Big(H(y) + \\frac{\\|\\nabla f(y)\\|}{\\gamma} I\\Big)^{-1} \\nabla f(y),

where H is the Hessian or a surrogate such as Gauss-Newton or Fisher, and :math:`\\gamma`, the radius in which H
predicts the gradient, is found by doubling and halving. No line search and no constant of the problem is needed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from implicit import tree
from implicit.curvature import lanczos
from implicit.derivatives import GradientGraph
from implicit.iterate import Values
from implicit.linear_solvers import CG, Cholesky, LinearSolution, LinearSolver
from implicit.linear_solvers.base import check_positive_int
from implicit.minimizers.base import ROUNDING, Evaluation, Minimizer, Objective, PointState
from implicit.operators import Dense, Hessian, LinearOperator, Shifted
from implicit.tree import Tree

PATIENCE = 5
DENSE_SIZE = 256
"""Up to here a matrix and its factor cost less than the products of CG."""
LARGEST = 1e100
"""Beyond this radius the regularization is zero to rounding."""

Curvature = Callable[[Tree, Tree], LinearOperator]


@dataclass(kw_only=True)
class RegularizedState(PointState):
    """``gamma`` is the radius to try next; ``solves`` and ``products`` count linear solves and their products."""

    gamma: float
    solves: int = 0
    products: int = 0
    reference: float = 0.0


@dataclass(frozen=True, kw_only=True)
class GradientRegularizedNewton(Minimizer[RegularizedState]):
    """Gradient-regularized Newton with the adaptive radius of Gradient-Normalized Smoothness.

    With :math:`\\lambda = \\|\\nabla f\\| / \\gamma`, a trial is accepted if

    * ``acceptance="value"``: :math:`f(y) - f(y^+) \\ge \\|g^+\\|^2 / (8 \\lambda)`, :math:`g^+ = \\nabla f(y^+)`;
    * ``acceptance="gradient"``: :math:`\\langle g^+, y - y^+ \\rangle \\ge \\|g^+\\|^2 / (4 \\lambda)`, for convex
      f; it does not subtract values.

    Then gamma doubles, otherwise it is halved. Where the two values differ by rounding only, the second test or a
    gradient norm that falls by a tenth decides, and five refusals of one step end the run as STALLED. Where the
    system is found to be indefinite, H is shifted by twice its lowest Ritz value.

    Needs an objective whose evaluations carry a :class:`GradientGraph`, as in ``implicit.minimize`` and as
    ``lower_solver`` of ``bilevel.ImplicitGradient``.

    Args:
        rtol: relative tolerance on the gradient norm.
        atol: absolute tolerance on the gradient norm.
        max_steps: step limit.
        curvature: ``"exact"``, the Hessian; or a function ``(x, y) -> LinearOperator`` that builds a symmetric
            positive semidefinite surrogate at y (x is the upper variable of a lower level, ``()`` in ``minimize``).
        acceptance: ``"value"`` or ``"gradient"``.
        gamma: the first radius tried; about two solves correct a factor of four.
        gamma_min: the radius after an accepted step is at least this.
        max_trials: halvings per step before the run ends as STALLED at the last accepted point.
        linear_solver: for ``(H + lambda I) d = -grad f``; None means Cholesky up to n = 256, with H formed once per
            point, and CG beyond, to ``min(0.1, sqrt(||grad|| / reference))``.

    Example:
        >>> import torch, implicit
        >>> found = implicit.minimize(lambda y: torch.cosh(y - 3.0).sum(), torch.zeros(2),
        ...                           implicit.GradientRegularizedNewton(rtol=1e-6))
        >>> found.point
        tensor([3., 3.])
    """

    max_steps: int = 1_000
    curvature: Literal["exact"] | Curvature = "exact"
    acceptance: Literal["value", "gradient"] = "value"
    gamma: float = 1.0
    gamma_min: float = 1e-8
    max_trials: int = 40
    linear_solver: LinearSolver | None = None

    needs_graph = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curvature != "exact" and not callable(self.curvature):
            raise TypeError(
                f"curvature must be 'exact' or a function (x, y) -> LinearOperator, got {self.curvature!r}; for "
                "Gauss-Newton or Fisher curvature pass a function that builds that operator"
            )
        if self.acceptance not in ("value", "gradient"):
            raise ValueError(f"acceptance must be 'value' or 'gradient', got {self.acceptance!r}")
        for name in ("gamma", "gamma_min"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        check_positive_int(self.max_trials, "max_trials")
        if self.linear_solver is not None and not isinstance(self.linear_solver, LinearSolver):
            raise TypeError(f"linear_solver must be a LinearSolver such as CG(), got {self.linear_solver!r}")

    def start(self, evaluation: Evaluation, point: Tensor, tolerance: float) -> RegularizedState:
        """A state at an evaluated point."""
        if not isinstance(evaluation.extra, GradientGraph):
            raise TypeError(
                "GradientRegularizedNewton needs an objective whose evaluations carry a GradientGraph; "
                "use graph_objective"
            )
        return RegularizedState(
            point=point,
            value=evaluation.value,
            gradient=evaluation.gradient,
            tolerance=tolerance,
            extra=evaluation.extra,
            gamma=self.gamma,
            reference=float(torch.linalg.vector_norm(evaluation.gradient)),
        )

    def step(self, problem: Objective, state: RegularizedState) -> Values:
        """One accepted step, after as many trials as it takes."""
        norm = float(torch.linalg.vector_norm(state.gradient))
        if norm == 0:
            return self._values(state, 0.0, 0.0)
        state.reference = max(state.reference, norm)
        if state.extra is None:  # just loaded from a checkpoint
            state.extra = problem(state.point).extra
        operator = self._operator(state.extra)
        system = _System(self._formed(operator), self._solver(state, norm))
        hopeless = 0
        for trials in range(1, self.max_trials + 1):
            length = norm / state.gamma
            direction = system.solve(-state.gradient, length)
            state.solves += 1
            trial, point = None, state.point
            if direction is not None:
                point = state.point + direction
                trial = problem(point)
                state.evaluations += 1
            if trial is not None and self._accepts(state, trial, point, length):
                state.products += operator.products
                return self._move(state, trial, point, trials)
            hopeless += trial is not None and self._undecided(state, trial)
            if hopeless >= PATIENCE:
                break
            state.gamma *= 0.5
        state.products += operator.products
        state.stalled = True
        return self._values(state, norm, 0.0)

    def _operator(self, graph: GradientGraph) -> LinearOperator:
        if callable(self.curvature):
            found = self.curvature(tree.detach(graph.x), tree.detach(graph.y))
            if not isinstance(found, LinearOperator):
                raise TypeError(f"curvature(x, y) must return a LinearOperator, got {type(found).__name__}")
        else:
            found = Hessian.of(graph, positive_definite=False)
        return found

    def _formed(self, operator: LinearOperator) -> LinearOperator:
        """A matrix where every trial would ask for all of its columns again."""
        dense = self.linear_solver is None and operator.size <= DENSE_SIZE
        return Dense(operator.to_dense(), operator.like) if dense else operator

    def _solver(self, state: RegularizedState, norm: float) -> LinearSolver:
        if self.linear_solver is not None:
            return self.linear_solver
        if state.point.numel() <= DENSE_SIZE:
            return Cholesky()
        return CG(rtol=min(0.1, max(math.sqrt(norm / state.reference), 0.5 * state.tolerance / norm)))

    def _accepts(self, state: RegularizedState, trial: Evaluation, point: Tensor, length: float) -> bool:
        square = float(trial.gradient @ trial.gradient)
        if not (math.isfinite(trial.value) and math.isfinite(square)):
            return False
        undecided = self._undecided(state, trial)
        if self.acceptance == "value" and not undecided:
            return state.value - trial.value >= square / (8.0 * length)
        # Where rounding hides the slope along the step as well, the gradient norm is all there is.
        flatter = undecided and square <= 0.81 * float(state.gradient @ state.gradient)
        return flatter or float(trial.gradient @ (state.point - point)) >= square / (4.0 * length)

    @staticmethod
    def _undecided(state: RegularizedState, trial: Evaluation) -> bool:
        """Whether rounding alone can explain the difference of the two values."""
        eps = float(torch.finfo(state.point.dtype).eps)
        return abs(trial.value - state.value) <= ROUNDING * eps * abs(state.value)

    def _move(self, state: RegularizedState, trial: Evaluation, point: Tensor, trials: int) -> Values:
        moved = float(torch.linalg.vector_norm(point - state.point))
        after = float(torch.linalg.vector_norm(trial.gradient))
        self.accept(state, trial, point)
        state.gamma = min(max(2.0 * state.gamma, self.gamma_min), LARGEST)
        self.watch(state, after, trials, PATIENCE)
        return self._values(state, after, moved)

    @staticmethod
    def _values(state: RegularizedState, norm: float, moved: float) -> Values:
        return {"value": state.value, "gradient_norm": norm, "step_length": moved, "gamma": state.gamma}


class _System:
    """``(H + lambda I) d = b`` at one point, for a sequence of lambdas."""

    def __init__(self, operator: LinearOperator, solver: LinearSolver) -> None:
        self.operator, self.solver = operator, solver
        self.shift = 0.0

    def solve(self, b: Tensor, length: float) -> Tensor | None:
        """d, or None if the system could not be solved; H is shifted where it is found to be indefinite."""
        found = self._attempt(b, length)
        if found.indefinite:
            lowest = lanczos(self.operator).smallest
            if lowest < 0 and self.shift < -2.0 * lowest:
                self.shift = -2.0 * lowest
                found = self._attempt(b, length)
        d = tree.ravel(found.value)
        return None if found.status.is_failure or not float(d @ b) > 0 else d

    def _attempt(self, b: Tensor, length: float) -> LinearSolution:
        shifted = Shifted(self.operator, self.shift + length)
        shifted.positive_definite = True
        return self.solver.solve(shifted, tree.unravel(b, self.operator.like))
