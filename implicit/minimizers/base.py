"""What minimizers of a smooth function share: the objective, the tolerance and the result."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from implicit import tree
from implicit.derivatives import GradientGraph, ScalarFunction, value_and_gradient
from implicit.iterate import IterativeMethod, Run, iterate
from implicit.state import State
from implicit.status import Status
from implicit.tree import Tree

ROUNDING = 100.0
"""Multiples of ``eps * |f|`` by which a value must fall to count as progress."""


@dataclass
class Evaluation:
    """An objective at one ravelled point.

    Attributes:
        value: the objective.
        gradient: shape ``(n,)``.
        extra: whatever came with it: a kept graph, a lower solution.
    """

    value: float
    gradient: Tensor
    extra: Any = None


Objective = Callable[[Tensor], Evaluation]


@dataclass(kw_only=True)
class PointState(State):
    """What every minimizer keeps of its current point, and what tells that rounding is reached.

    ``extra`` belongs to the current point and is not saved. ``idle`` counts evaluations since the value last fell
    below ``best_value``, or the gradient norm below ``best_norm``, by more than rounding can explain.
    """

    point: Tensor
    value: float
    gradient: Tensor
    tolerance: float
    evaluations: int = 1
    stalled: bool = False
    extra: Any = field(default=None, metadata={"transient": True})
    best_value: float = math.inf
    best_norm: float = math.inf
    idle: int = 0


P = TypeVar("P", bound=PointState)


@dataclass(frozen=True)
class Minimum:
    """The result of a minimization.

    Attributes:
        point: the minimizer found.
        value: the objective there.
        gradient_norm: Euclidean norm of the gradient there.
        status: CONVERGED only where the gradient norm was measured to be at most the tolerance.
        steps, evaluations: iterations, and evaluations of value and gradient.
        extra: what the objective attached to the last accepted evaluation.
    """

    point: Tree
    value: float
    gradient_norm: float
    status: Status
    steps: int
    evaluations: int
    extra: Any = None


@dataclass(frozen=True, kw_only=True)
class Minimizer(IterativeMethod[P], Generic[P]):
    """Base of the minimizers: stops when ``||grad|| <= max(atol, rtol * reference)``.

    The reference is the gradient norm at the first point unless a caller that warm-starts hands over its own: an
    absolute tolerance that rounding cannot meet burns every evaluation there is.

    Args:
        rtol: relative tolerance on the gradient norm.
        atol: absolute tolerance on the gradient norm.
        max_steps: step limit.
    """

    rtol: float = 1e-12
    atol: float = 0.0
    max_steps: int = 1_000

    needs_graph = False

    def __post_init__(self) -> None:
        if not self.rtol >= 0 or not self.atol >= 0:
            raise ValueError(f"rtol and atol must be >= 0, got rtol={self.rtol}, atol={self.atol}")
        if not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ValueError(f"max_steps must be a positive integer, got {self.max_steps}")

    @abstractmethod
    def start(self, evaluation: Evaluation, point: Tensor, tolerance: float) -> P:
        """A state at an evaluated point."""

    def init(self, problem: Objective, *start: Any, generator: torch.Generator | None = None) -> P:
        """Evaluate the starting point ``start[0]``; ``start[1]``, if given, is the reference gradient norm."""
        point = start[0].detach().clone()
        evaluation = problem(point)
        reference = start[1] if len(start) > 1 else 0.0
        return self.start(evaluation, point, self.tolerance(evaluation.gradient, reference))

    def tolerance(self, gradient: Tensor, reference: float = 0.0) -> float:
        """The absolute tolerance that a run from here uses."""
        return max(self.atol, self.rtol * max(reference, float(torch.linalg.vector_norm(gradient))))

    def terminate(self, problem: Objective, state: P) -> Status:
        """Measured gradient norm against the tolerance."""
        norm = float(torch.linalg.vector_norm(state.gradient))
        if not (norm < float("inf") and abs(state.value) < float("inf")):
            return Status.NONFINITE
        if norm <= state.tolerance:
            return Status.CONVERGED
        return Status.STALLED if state.stalled else Status.RUNNING

    def run(self, objective: Objective, point: Tensor, reference: float = 0.0) -> tuple[P, Status]:
        """Minimize from a ravelled point; returns the last state and how it ended."""
        state = self.init(objective, point, reference)
        status = self.terminate(objective, state)
        if status is Status.RUNNING:
            run = iterate(self, objective, Run(state), max_steps=self.max_steps, record=False)
            if run.error is not None:
                raise run.error
            status = run.status
        return state, status

    def watch(self, state: P, norm: float, evaluations: int, patience: int) -> None:
        """Mark the state as stalled after evaluations that improved neither value nor gradient.

        ``patience`` of them, and a fifth of all so far: hard problems earn longer pauses.
        """
        noise = ROUNDING * float(torch.finfo(state.point.dtype).eps) * abs(state.value)
        lower, flatter = state.value < state.best_value - noise, norm < 0.7 * state.best_norm
        state.best_value = state.value if lower else state.best_value
        state.best_norm = norm if flatter else state.best_norm
        state.idle = 0 if lower or flatter else state.idle + evaluations
        state.stalled = state.stalled or state.idle >= patience + state.evaluations // 5

    def accept(self, state: P, trial: Evaluation, point: Tensor) -> None:
        """Move to an evaluated point."""
        state.point, state.value, state.gradient, state.extra = point, trial.value, trial.gradient, trial.extra


def graph_objective(fn: Callable[[Tree, Tree], Tensor], x: Tree, like: Tree, name: str = "the objective") -> Objective:
    """``y -> fn(x, y)`` over ravelled y, with the :class:`GradientGraph` of each evaluation attached."""
    return expanded_objective(lambda y: GradientGraph(fn, x, y, name), like)


def expanded_objective(expand: Callable[[Tree], GradientGraph], like: Tree) -> Objective:
    """The objective over ravelled y whose kept graph at y is ``expand(y)``."""

    def evaluate(flat: Tensor) -> Evaluation:
        graph = expand(tree.unravel(flat, like))
        return Evaluation(float(graph.value), tree.ravel(graph.gradient), graph)

    return evaluate


def gradient_objective(fn: ScalarFunction, like: Tree, name: str = "the objective") -> Objective:
    """``y -> fn(y)`` over ravelled y, first derivatives only."""

    def evaluate(flat: Tensor) -> Evaluation:
        value, gradient = value_and_gradient(fn, tree.unravel(flat, like), name)
        return Evaluation(float(value), tree.ravel(gradient))

    return evaluate


def minimize(fn: ScalarFunction, y0: Tree, method: Minimizer[Any]) -> Minimum:
    """Minimize ``fn(y)`` from ``y0``.

    Args:
        fn: a smooth scalar function of a pytree.
        y0: where to start; fixes shapes, dtype and device.
        method: :class:`LBFGS` or :class:`NewtonCG`.

    Returns:
        The minimum with its measured gradient norm and status; limits and failures do not raise.
    """
    objective = graph_objective(lambda _, y: fn(y), (), y0) if method.needs_graph else gradient_objective(fn, y0)
    state, status = method.run(objective, tree.ravel(tree.detach(y0)))
    return Minimum(
        point=tree.unravel(state.point, y0),
        value=state.value,
        gradient_norm=float(torch.linalg.vector_norm(state.gradient)),
        status=status,
        steps=state.step,
        evaluations=state.evaluations,
        extra=state.extra,
    )
