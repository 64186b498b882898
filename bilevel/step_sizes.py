"""Step-length rules that need no curvature of the hyper-objective."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit import State, tree
from implicit.tree import Tree


@dataclass(kw_only=True)
class PathState(State):
    """``length`` is the current step length, ``anchor`` the point of the last decision, ``path`` the distance walked
    and ``since`` the steps taken from there; a decision is due after ``window`` steps."""

    length: Tensor
    anchor: Tree
    path: Tensor
    since: Tensor
    window: Tensor


@dataclass(frozen=True, kw_only=True)
class PathEfficiency:
    """Adapts the length of normalised steps by how straight the path is.

    Every ``window`` steps the distance travelled is compared with the length of the path. A wandering path
    (ratio below ``low``) halves the step length, a straight one (above ``high``) doubles it. Everything stays on the
    device.

    On minibatches each halving also doubles the window. Where noise dominates, every path wanders, and a fixed window
    would shrink the steps geometrically, wherever x stands; this way they shrink like 1/t, and the longer window tells
    drift from noise.

    Args:
        initial: first step length; None means ``0.01 (1 + ||x0||)``.
        window: steps between decisions; None means 20 on full data, 100 on minibatches, whose random walk
            momentum hides at shorter distances.
        low, high: ratios at which the length is halved or doubled.
        growth: factor on the window at each halving; None means 1 on full data, 2 on minibatches.
    """

    initial: float | None = None
    window: int | None = None
    low: float = 0.3
    high: float = 0.9
    growth: float | None = None

    def __post_init__(self) -> None:
        if self.initial is not None and not self.initial > 0:
            raise ValueError(f"initial must be positive or None, got {self.initial}")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 2):
            raise ValueError(f"window must be an integer of at least 2 or None, got {self.window}")
        if not 0 < self.low < self.high < 1:
            raise ValueError(f"low and high must satisfy 0 < low < high < 1, got {self.low} and {self.high}")
        if self.growth is not None and not self.growth >= 1:
            raise ValueError(f"growth must be at least 1 or None, got {self.growth}")

    def resolve(self, x: Tree, stochastic: bool) -> "PathEfficiency":
        """The same rule without None."""
        return PathEfficiency(
            initial=0.01 * (1.0 + float(tree.norm(x))) if self.initial is None else self.initial,
            window=(100 if stochastic else 20) if self.window is None else self.window,
            low=self.low,
            high=self.high,
            growth=(2.0 if stochastic else 1.0) if self.growth is None else self.growth,
        )

    def init(self, x: Tree) -> PathState:
        """A state at the starting point."""
        zero = tree.norm(x).detach() * 0.0
        return PathState(
            length=zero + (self.initial or 0.0),
            anchor=tree.clone(x),
            path=zero.clone(),
            since=zero.clone(),
            window=zero + (self.window or 0),
        )

    def update(self, state: PathState, x: Tree, moved: Tensor, lost: Tensor | None = None) -> None:
        """Record a step of length ``moved`` that ended in x; decide when a window is over.

        Where ``lost`` is true the length is halved however straight the path is: a lower level that has lost track
        of x points straight into the void.
        """
        state.path = state.path + moved
        state.since = state.since + 1
        state.step += 1
        if self.window is None or state.step % self.window:
            return
        due = state.since >= state.window
        ratio = tree.norm(tree.sub(x, state.anchor)) / torch.where(state.path > 0, state.path, 1.0)
        halve = ratio < self.low if lost is None else (ratio < self.low) | lost
        factor = torch.where(halve, 0.5, torch.where(ratio > self.high, 2.0, 1.0))
        state.length = state.length * torch.where(due, factor, 1.0).to(state.length)
        state.window = torch.where(due & halve, state.window * (self.growth or 1.0), state.window)
        state.anchor = tree.where(due, x, state.anchor)
        state.path = torch.where(due, 0.0, state.path)
        state.since = torch.where(due, 0.0, state.since)
