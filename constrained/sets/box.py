"""Entrywise bounds: boxes and the nonnegative orthant."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from constrained.sets.base import Bound, ConvexSet, Gaps, check_fit, check_values, spread
from implicit import tree
from implicit.tree import Tree


@dataclass(frozen=True, eq=False)
class Box(ConvexSet):
    """Entrywise bounds, ``C = {p : lower <= p <= upper}``.

    Args:
        lower: a number or a tensor for all leaves, or a pytree matching the point (dicts by key) with such entries.
            A tensor broadcasts to its leaf and has its dtype and device. ``None`` or ``-inf`` means no bound.
        upper: likewise; ``None`` or ``inf`` means no bound. Where ``lower == upper`` the entry is fixed.

    Raises:
        TypeError: if an entry is not a number, a floating-point tensor or None.
        ValueError: if a bound is NaN, ``lower`` is ``inf``, ``upper`` is ``-inf``, or ``lower > upper`` somewhere.

    Example:
        >>> Box(0, 1).project(torch.tensor([-1.0, 0.5, 2.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    lower: Bound = None
    upper: Bound = None

    def __post_init__(self) -> None:
        check_values("Box.lower", self.lower, (math.inf,), "use None or -inf for no bound")
        check_values("Box.upper", self.upper, (-math.inf,), "use None or inf for no bound")
        outer, name = (self.upper, "Box.upper") if tree.structure(self.lower).is_leaf() else (self.lower, "Box.lower")
        lows, highs = (spread("Box.upper", bound, outer, name) for bound in (self.lower, self.upper))
        for path, low, high in zip(tree.paths(outer), lows, highs, strict=True):
            if low is not None and high is not None:
                _check_order(path, low, high)

    def project(self, point: Tree) -> Tree:
        """``argmin_{lower <= p <= upper} ||p - point||_2 = min(max(point, lower), upper)``, entry by entry.

        The derivative is 1 strictly inside, 0 outside and for fixed entries; exactly at a bound it is taken as 1.
        Bounds that require gradients receive them. See :meth:`ConvexSet.project`.
        """
        self.check(point, "point")
        values, spec = tree.flatten(point)
        lows, highs = (spread("Box", bound, point, "point") for bound in (self.lower, self.upper))
        return tree.unflatten([_clamp(*group) for group in zip(values, lows, highs, strict=True)], spec)

    @property
    def is_whole_space(self) -> bool:
        """True where no bound is finite."""
        entries = [entry for entry in tree.leaves(self.lower) + tree.leaves(self.upper) if entry is not None]
        return all(bool(torch.as_tensor(entry).isinf().all()) for entry in entries)

    def check(self, point: Tree, name: str) -> None:
        """See :meth:`ConvexSet.check`; the bounds must broadcast to their leaves and have their dtype and device."""
        super().check(point, name)
        check_fit("Box.lower", self.lower, point, name)
        check_fit("Box.upper", self.upper, point, name)

    def _gaps(self, point: Tree, projected: Tree) -> Gaps:
        return _entry_gaps(point, projected)


@dataclass(frozen=True)
class Nonnegative(ConvexSet):
    """The nonnegative orthant, ``C = {p : p >= 0}`` entrywise."""

    def project(self, point: Tree) -> Tree:
        """``argmin_{p >= 0} ||p - point||_2 = max(point, 0)``, derivative 1 at 0; see :meth:`ConvexSet.project`."""
        self.check(point, "point")
        return tree.map(lambda leaf: leaf.clamp(min=0), point)

    def _gaps(self, point: Tree, projected: Tree) -> Gaps:
        return _entry_gaps(point, projected)


def _clamp(leaf: Tensor, low: Any, high: Any) -> Tensor:
    low, high = (bound if bound is None or isinstance(bound, Tensor) else float(bound) for bound in (low, high))
    result = leaf if low is None else leaf.clamp(min=low)
    result = result if high is None else result.clamp(max=high)
    if low is None or high is None or (isinstance(low, float) and isinstance(high, float) and low < high):
        return result
    return torch.where(~leaf.isnan() & (low == high), high, result)  # fixed entries: a constant, also for autograd


def _entry_gaps(point: Tree, projected: Tree) -> Gaps:
    pairs = zip(tree.leaves(tree.sub(point, projected)), tree.leaves(projected), strict=True)
    return [(gap.abs(), p.abs().clamp(min=1)) for gap, p in pairs]


def _check_order(path: str, low: Any, high: Any) -> None:
    like = next((bound for bound in (low, high) if isinstance(bound, Tensor)), torch.zeros((), dtype=torch.float64))
    low, high = (bound if isinstance(bound, Tensor) else like.new_full((), bound) for bound in (low, high))
    try:
        wrong = (low > high).nonzero()
    except RuntimeError as error:
        raise ValueError(
            f"Box.lower{path} of shape {tuple(low.shape)} on {low.device} and Box.upper{path} of shape "
            f"{tuple(high.shape)} on {high.device} do not fit together: give both the shape and device of the point"
        ) from error
    if len(wrong):
        index = tuple(wrong[0].tolist())
        low, high = (bound[index].item() for bound in torch.broadcast_tensors(low, high))
        at = path + (str(list(index)) if index else "")
        raise ValueError(f"Box.lower{at} = {low:g} exceeds Box.upper{at} = {high:g}: swap them or widen the interval")
