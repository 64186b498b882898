"""Estimates of gradients from minibatches, over trees: plain momentum and STORM.

An estimate is a tree shaped like what it estimates, so it can be kept in any state, saved, and masked when a step is
refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from implicit import tree
from implicit.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """The exponential average ``d <- decay d + (1 - decay) q`` of samples q.

    Its variance is ``(1 - decay) / (1 + decay)`` of one sample's, and it lags behind a moving mean by
    ``decay / (1 - decay)`` steps.

    Args:
        decay: in [0, 1); 0 keeps the last sample only.

    Raises:
        ValueError: if ``decay`` lies elsewhere.

    Example:
        >>> import torch
        >>> from bilevel import Momentum
        >>> average = Momentum(decay=0.5)
        >>> average.update(average.init(torch.zeros(1)), torch.ones(1))
        tensor([0.5000])
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")

    def init(self, like: Tree) -> Tree:
        """Zeros shaped like the samples."""
        return tree.zeros_like(like)

    def update(self, estimate: Tree, sample: Tree) -> Tree:
        """The estimate after one more sample."""
        return tree.axpy(self.decay, estimate, tree.scale(1.0 - self.decay, sample))


@dataclass(frozen=True, kw_only=True)
class Storm:
    """Recursive momentum ``d_k = q(v_k; s_k) + (1 - eta_k) (d_{k-1} - q(v_{k-1}; s_k))``, the same sample s_k at both.

    With ``eta_k = min(1, weight (k + 1)^(-exponent))``. The first estimate is the sample itself. Where the oracle is
    exact the estimate stays exact: ``d_k = q(v_k)``. On samples its error obeys ``e_k = (1 - eta_k) e_{k-1}`` plus
    noise of the size of the *step*, which small steps make small. A weight of one (``exponent=0``) is no momentum, and
    costs one evaluation instead of two.

    Source: Cutkosky and Orabona 2019, "Momentum-based variance reduction in non-convex SGD".

    Args:
        weight: eta at the first step.
        exponent: how fast eta falls.

    Raises:
        ValueError: if ``weight`` is not positive, or ``exponent`` is negative.

    Example:
        >>> import torch
        >>> from bilevel import Storm
        >>> storm = Storm(exponent=0.5)
        >>> first = storm.update(torch.zeros(1), lambda v: 2 * v, torch.ones(1), torch.zeros(1), 0)
        >>> storm.update(first, lambda v: 2 * v, torch.full((1,), 3.0), torch.ones(1), 1)
        tensor([6.])
    """

    weight: float = 1.0
    exponent: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight must be positive, got {self.weight}")
        if not 0 <= self.exponent < float("inf"):
            raise ValueError(f"exponent must be >= 0, got {self.exponent}")

    @property
    def plain(self) -> bool:
        """Whether every weight is one: then there is nothing to keep."""
        return self.weight >= 1.0 and self.exponent == 0.0

    def eta(self, step: int) -> float:
        """Weight of the fresh sample at step ``step``, counted from 0."""
        return min(1.0, self.weight * (step + 1.0) ** -self.exponent)

    def init(self, like: Tree) -> Tree:
        """NaN, shaped like the values of the oracle: no estimate yet."""
        return tree.map(lambda leaf: torch.full_like(leaf, math.nan), like)

    def update(self, estimate: Tree, oracle: Callable[[Tree], Tree], point: Tree, before: Tree, step: int) -> Tree:
        """The estimate at ``point``.

        Args:
            estimate: the one at ``before``; one that is not finite is replaced by the sample.
            oracle: a tree of points to a tree of values, on *one* sample: it is called at both points.
            point: where the estimate is wanted.
            before: the point of the last update. The caller keeps it, since estimates can share it.
            step: updates done so far.

        Returns:
            The new estimate; nothing is modified.
        """
        eta = self.eta(step)
        fresh = oracle(point)
        if eta == 1.0:
            return fresh
        moved = tree.axpy(1.0 - eta, tree.sub(estimate, oracle(before)), fresh)
        # A run whose first step was refused still has no estimate: from zero it would be too small for long.
        return tree.where(tree.all_finite(estimate), moved, fresh)
