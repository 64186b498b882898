"""What the schemes of the penalty method share: the state of a run, the gradients, and what a step hands back."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from bilevel.algorithms.base import BilevelState
from bilevel.algorithms.minibatch import MinibatchState, draw
from bilevel.measure import draw_oracles
from bilevel.oracle import Oracle, new_counts
from bilevel.problem import BilevelProblem
from implicit import GradientDifference, lanczos, tree
from implicit.derivatives import value_and_gradient
from implicit.tree import Tree

if TYPE_CHECKING:
    from bilevel.algorithms.penalty import Penalty

FLOOR = 1e-3
"""A lower eigenvalue below this fraction of the largest is not told from zero: twenty Lanczos steps cannot."""


@dataclass(kw_only=True)
class PenaltyState(BilevelState):
    """The state of a run.

    Attributes:
        z: tracks argmin g(x, .); ``y`` tracks argmin f(x, .) + penalty g(x, .).
        extra: further trees of the scheme by name: previous iterates, prox iterates, estimates.
        penalty: p now.
        curvature: current estimate of L_g, raised when the path shows more.
        surrogate: ``||x - P_X(x - G)||`` at the last step, ``first`` that of the first.
        small: how many steps in a row it was below the tolerance.
        gap: moving average of ``p (g(x, y) - g(x, z))``; negative only where z has lost track, and then x slows down.
        bias: hypergradient bias when it was last measured, at the penalty ``measured``; infinite and 0 before.
        stages: x and y at the ends of the penalties before this one, for extrapolation; ``stage`` counts them.
        growing, done: whether the penalty may still grow for the bias; whether nothing is left to do.
        inner: samplers, momentum and step length of x.
    """

    z: Tree
    extra: dict[str, Tree]
    penalty: Tensor
    curvature: Tensor
    surrogate: Tensor
    first: Tensor
    small: Tensor
    gap: Tensor
    bias: Tensor
    measured: Tensor
    stages: list[Tree]
    stage: int = 0
    growing: bool = True
    done: bool = False
    inner: MinibatchState


@dataclass(frozen=True)
class Sizes:
    """Measured at the start: ``largest``, the Lipschitz constant of grad_y g; ``smallest``, its lowest curvature, which
    may be negative; ``upper``, the Lipschitz constant of grad_y f. Over minibatches the extremes of eight draws."""

    largest: float
    smallest: float
    upper: float

    @property
    def flat(self) -> bool:
        """Whether the lower level is not visibly strongly convex: singular, nonconvex, or too ill-conditioned."""
        return self.smallest <= FLOOR * self.largest

    @property
    def modulus(self) -> float:
        """The smallest curvature, floored."""
        return max(self.smallest, FLOOR * self.largest)


def measure_sizes(problem: BilevelProblem, x: Tree, y: Tree, steps: int = 20) -> Sizes:
    """By Lanczos on gradient differences. Of an objective that is affine in y over a set, ``largest`` is the slope over
    the size of y: any step will do.

    Raises:
        ValueError: if the lower objective is affine in y at (x, y), and there is no set.
    """
    largest, smallest, upper = 0.0, float("inf"), 0.0
    for oracle in draw_oracles(problem, new_counts()):
        g = lanczos(GradientDifference(lambda q, o=oracle: o.lower(x, q), y), steps)
        f = lanczos(GradientDifference(lambda q, o=oracle: o.upper(x, q), y), steps)
        largest = max(largest, g.largest, -g.smallest)
        smallest = min(smallest, g.smallest)
        upper = max(upper, abs(f.largest), abs(f.smallest))
    if not largest > 0 and not problem.lower_set.is_whole_space:
        _, slope = value_and_gradient(lambda q: Oracle.full(problem, new_counts()).lower(x, q), y)
        largest = float(tree.norm(slope)) / (1.0 + float(tree.norm(y))) or upper or 1.0
    if not largest > 0:
        raise ValueError(
            "the lower objective has no curvature in y at the start; give lower_curvature, a Lipschitz constant of its "
            "gradient, start elsewhere, or add a ridge"
        )
    return Sizes(largest, problem.strong_convexity or smallest, upper)


@dataclass
class Move:
    """What a scheme's step hands back.

    Attributes:
        y, z, extra: the new iterates.
        gradient: G.
        values: for the history.
        curvature: the new estimate of L_g.
        gap: ``p (g(x, y) - g(x, z))``, where a negative one tells that z has lost track; None where it does not.
        drift: how far the prox iterates stand from their centres, as an error of G.
        behind: whether the lower iterates are known to lag so far that G is mostly their error.
        length: length of the plain step of x; None leaves it to ``step_size``.
        penalty: the penalty that G was made with.
    """

    y: Tree
    z: Tree
    gradient: Tree
    values: dict[str, Tensor]
    curvature: Tensor
    penalty: Tensor
    extra: dict[str, Tree] = field(default_factory=dict)
    gap: Tensor | None = None
    drift: Tensor | None = None
    behind: Tensor | None = None
    length: float | Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """How y and z follow x, and which penalty and step of x go with it: a part of :class:`Penalty`."""

    scheduled: ClassVar[bool] = False
    """Whether penalty and steps of x follow the scheme's own schedule."""

    def refuses(self, settings: "Penalty") -> str | None:
        """Why settings of :class:`Penalty` do not fit, naming one; None if they do."""
        return None

    def resolve(self, settings: "Penalty", problem: BilevelProblem, sizes: Sizes) -> "Scheme":
        """The same scheme with every None filled in."""
        return self

    def default_penalty(self, sizes: Sizes) -> float:
        """``100 max(1, L_f / mu)``; without a visible mu ``100 max(1, L_f / L_g)``, to grow with the measured bias."""
        return 100.0 * max(1.0, sizes.upper / (sizes.largest if sizes.flat else sizes.modulus))

    def default_steps(self, problem: BilevelProblem) -> int:
        """T: 10 on full data, 5 on minibatches."""
        return 5 if problem.stochastic else 10

    @abstractmethod
    def init(self, settings: "Penalty", problem: BilevelProblem, x: Tree, y: Tree) -> dict[str, Tree]:
        """The trees that the state keeps beyond x, y and z, allocated."""

    @abstractmethod
    def step(self, settings: "Penalty", problem: BilevelProblem, state: PenaltyState) -> Move:
        """Move y and z, and take G there; nothing is written to ``state`` but samplers and counts."""


@dataclass(frozen=True)
class Pair:
    """The oracles of one draw: ``y`` serves f and g at y, ``z`` serves g at z. On common batches they are one."""

    y: Oracle
    z: Oracle


def draw_pair(settings: "Penalty", problem: BilevelProblem, state: PenaltyState) -> Pair:
    """The next batches; independent ones of the lower level for y and z unless ``common_batches``."""
    oracle = draw(problem, state, state.inner)
    lower = problem.lower_data
    if settings.common_batches or lower is None:
        return Pair(oracle, oracle)
    return Pair(oracle, replace(oracle, lower_batch=lower.draw(state.inner.lower_position, state.generator)))


def descend(
    problem: BilevelProblem, fn: Callable[[Tree], Tensor], point: Tree, step: float | Tensor
) -> tuple[Tree, Tree]:
    """One projected gradient step, and the gradient it took."""
    _, slope = value_and_gradient(fn, point)
    return problem.lower_set.project(tree.axpy(-step, slope, point)), slope


def penalised(oracle: Oracle, x: Tree, p: Tensor | float) -> Callable[[Tree], Tensor]:
    """``y -> f(x, y) + p g(x, y)``."""
    return lambda q: oracle.upper(x, q) + p * oracle.lower(x, q)


def hypergradient(pair: Pair, x: Tree, y: Tree, z: Tree, p: Tensor | float) -> tuple[dict[str, Tensor], Tree]:
    """``G = grad_x f(x, y) + p [grad_x g(x, y) - grad_x g(x, z)]`` from one backward pass, and the values in it."""
    parts: dict[str, Tensor] = {}

    def joint(q: Tree) -> Tensor:
        parts["upper_value"] = pair.y.upper(q, y)
        parts["penalty_gap"] = p * (pair.y.lower(q, y) - pair.z.lower(q, z))
        return parts["upper_value"] + parts["penalty_gap"]

    _, gradient = value_and_gradient(joint, x)
    return {k: v.detach() for k, v in parts.items()}, gradient


def central_hypergradient(oracle: Oracle, x: Tree, y: Tree, w: Tree, p: Any) -> tuple[dict[str, Tensor], Tree]:
    """``[grad_x f(x, y) + grad_x f(x, w)] / 2 + p [grad_x g(x, y) - grad_x g(x, w)] / 2``: with w the minimizer of
    ``-f + p g`` its bias is O(1/p^2)."""
    parts: dict[str, Tensor] = {}

    def joint(q: Tree) -> Tensor:
        parts["upper_value"] = 0.5 * (oracle.upper(q, y) + oracle.upper(q, w))
        parts["penalty_gap"] = 0.5 * p * (oracle.lower(q, y) - oracle.lower(q, w))
        return parts["upper_value"] + parts["penalty_gap"]

    _, gradient = value_and_gradient(joint, x)
    return {k: v.detach() for k, v in parts.items()}, gradient
