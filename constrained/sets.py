"""Convex sets with Euclidean projections: the whole space, boxes, the orthant, balls, simplices and products of them.

A point is a pytree of floating-point tensors. Every projection is exact (no iteration), runs without host
synchronisation, keeps structure, dtype and device, and differentiates by autograd wherever it is differentiable.

References:
    N. Parikh, S. Boyd, "Proximal algorithms", Foundations and Trends in Optimization 1(3), 2014, sections 2.1 and 6.2.
    A. Beck, "First-Order Methods in Optimization", SIAM, 2017, section 6.4.
    M. Held, P. Wolfe, H. P. Crowder, "Validation of subgradient optimization", Math. Programming 6, 1974 (simplex).
    A. Martins, R. Astudillo, "From softmax to sparsemax", ICML 2016 (algorithm 1, the Jacobian for the simplex).
"""

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.tree import Tree

Bound = Any
"""None, a number, a tensor that broadcasts to every leaf, or a pytree matching the point with such entries."""
Gaps = list[tuple[Tensor, Tensor | float]]
"""Distances of the blocks of a point to the set, each with the scale of its default tolerance."""


class ConvexSet(ABC):
    """A closed convex set ``C`` of pytrees; a subclass needs to define :meth:`project` only."""

    @abstractmethod
    def project(self, point: Tree) -> Tree:
        """The nearest point of the set, ``argmin_{p in C} ||p - point||_2`` over all leaves together.

        Out of place and differentiable almost everywhere; a NaN stays a NaN. Leaves that the set does not restrict
        may be returned as they are, so clone before writing into the result.

        Returns:
            A tree with the structure, shapes, dtypes and devices of ``point``; misfits raise as in :meth:`check`.
        """

    @property
    def is_whole_space(self) -> bool:
        """Whether every point belongs to the set; may read tensors, so ask before the loop and not within it."""
        return False

    def check(self, point: Tree, name: str) -> None:
        """Refuse a point that cannot be projected; looks at structure, shapes, dtypes and devices only.

        Args:
            point: the candidate.
            name: what to call it in the message, such as ``"y0"``.

        Raises:
            TypeError: if a leaf is not a floating-point tensor.
            ValueError: if the set's structure, shapes, dtypes or devices do not fit those of the point.
        """
        for i, leaf in enumerate(tree.leaves(point)):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{_leaf(name, point, i)} = {leaf!r}: give a floating-point tensor")
            if not leaf.is_floating_point():
                raise TypeError(f"{_leaf(name, point, i)} has dtype {leaf.dtype}: convert it to a real floating dtype")

    def contains(self, point: Tree, atol: float | None = None) -> bool:
        """Whether the point lies in the set up to ``atol``; reads the result on the host.

        A set that splits into blocks (``Box``: entries, ``Simplex``: slices, ``Product``: its sets) is tested block by
        block, so that a large block does not excuse another: the distance of each block to its factor of the set must
        be at most ``atol``. A point with a NaN or an infinity is never contained.

        Args:
            point: the candidate.
            atol: largest distance of a block. ``None`` means ``sqrt(eps(dtype)) * scale``, where scale is ``total`` for
                ``Simplex``, ``max(radius, ||projection||)`` for ``Ball`` and ``max(1, ||projection||)`` otherwise.

        Raises:
            ValueError: if ``atol`` is negative or NaN; misfits raise as in :meth:`check`.
        """
        if atol is not None and not atol >= 0:
            raise ValueError(f"atol = {atol!r}: give a nonnegative number, or None for the default")
        with torch.no_grad():
            projected = self.project(point)
            if not tree.all_finite(point):
                return False
            tolerance = math.sqrt(max((torch.finfo(leaf.dtype).eps for leaf in tree.leaves(point)), default=0.0))
            return all(
                bool((distance <= (tolerance * scale if atol is None else atol)).all())
                for distance, scale in self._gaps(point, projected)
            )

    def _gaps(self, point: Tree, projected: Tree) -> Gaps:
        return [(tree.norm(tree.sub(point, projected)), tree.norm(projected).clamp(min=1))]


@dataclass(frozen=True)
class WholeSpace(ConvexSet):
    """No constraint, ``C = R^n``."""

    def project(self, point: Tree) -> Tree:
        """``argmin_p ||p - point||_2 = point``: the point itself, not a copy; see :meth:`ConvexSet.project`."""
        self.check(point, "point")
        return point

    @property
    def is_whole_space(self) -> bool:
        """Always true."""
        return True


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
        _check_values("Box.lower", self.lower, (math.inf,), "use None or -inf for no bound")
        _check_values("Box.upper", self.upper, (-math.inf,), "use None or inf for no bound")
        outer, name = (self.upper, "Box.upper") if tree.structure(self.lower).is_leaf() else (self.lower, "Box.lower")
        lows, highs = (_spread("Box.upper", bound, outer, name) for bound in (self.lower, self.upper))
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
        lows, highs = (_spread("Box", bound, point, "point") for bound in (self.lower, self.upper))
        return tree.unflatten([_clamp(*group) for group in zip(values, lows, highs, strict=True)], spec)

    @property
    def is_whole_space(self) -> bool:
        """True where no bound is finite."""
        entries = [entry for entry in tree.leaves(self.lower) + tree.leaves(self.upper) if entry is not None]
        return all(bool(torch.as_tensor(entry).isinf().all()) for entry in entries)

    def check(self, point: Tree, name: str) -> None:
        """See :meth:`ConvexSet.check`; the bounds must broadcast to their leaves and have their dtype and device."""
        super().check(point, name)
        _check_fit("Box.lower", self.lower, point, name)
        _check_fit("Box.upper", self.upper, point, name)

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


@dataclass(frozen=True, eq=False)
class Ball(ConvexSet):
    """A Euclidean ball, ``C = {p : ||p - center||_2 <= radius}`` with ONE norm over all leaves together.

    Args:
        radius: a positive finite number.
        center: ``None`` for the origin, or finite values given like the bounds of :class:`Box`.

    Raises:
        TypeError: if ``radius`` is not a number, or an entry of ``center`` not a number, a float tensor or None.
        ValueError: if ``radius`` is not positive and finite, or ``center`` not finite.
    """

    radius: float
    center: Bound = None

    def __post_init__(self) -> None:
        _check_positive("Ball.radius", self.radius)
        _check_values("Ball.center", self.center, (math.inf, -math.inf), "give finite values, or None for the origin")

    def project(self, point: Tree) -> Tree:
        """``argmin_{||p - center|| <= radius} ||p - point||_2 = center + min(1, radius / ||d||) d``.

        Here ``d = point - center``. Inside, the center included, the point comes back unchanged and the derivative is
        the identity; outside, with ``n = d / ||d||``, it is ``radius / ||d|| (I - n n')``. The norm is scaled against
        overflow and accumulates bf16/fp16 in float32. A NaN or an infinity anywhere makes every leaf NaN.
        See :meth:`ConvexSet.project`.
        """
        self.check(point, "point")
        values, spec = tree.flatten(point)
        if not tree.size(point):
            return point
        dtype = functools.reduce(torch.promote_types, (v.dtype for v in values), torch.float32)
        centers = [0.0 if c is None else c for c in _spread("Ball.center", self.center, point, "point")]
        offsets = [v.to(dtype) - c for v, c in zip(values, centers, strict=True)]
        largest = tree.max_abs([d.detach() for d in offsets])
        largest = torch.where(largest > 0, largest, 1.0)  # a NaN shows up in `squared`
        units = [d / largest.to(d.device) for d in offsets]  # entries in [-1, 1]
        squared = torch.stack([u.square().sum().to(largest.device) for u in units]).sum()
        outside = ~(squared <= (self.radius / largest).square())  # true for NaN
        factor = self.radius / torch.where(outside, squared, 1.0).sqrt()  # the inner where avoids sqrt'(0) = inf
        moved = [(c + factor.to(u.device) * u).to(v.dtype) for v, c, u in zip(values, centers, units, strict=True)]
        return tree.where(outside, tree.unflatten(moved, spec), point)

    def check(self, point: Tree, name: str) -> None:
        """See :meth:`ConvexSet.check`; the center must broadcast to the leaves and have their dtype and device."""
        super().check(point, name)
        _check_fit("Ball.center", self.center, point, name)

    def _gaps(self, point: Tree, projected: Tree) -> Gaps:
        return [(tree.norm(tree.sub(point, projected)), tree.norm(projected).clamp(min=self.radius))]


@dataclass(frozen=True)
class Simplex(ConvexSet):
    """Scaled probability simplices, ``C = {p : p >= 0, sum(p, dim) = total}``, one per slice of each leaf.

    Args:
        total: the sum of each slice, a positive finite number.
        dim: the dimension that is summed; the others are batch dimensions.

    Raises:
        TypeError: if ``total`` is not a number or ``dim`` not an int.
        ValueError: if ``total`` is not positive and finite.

    Example:
        >>> Simplex().project(torch.tensor([2.0, 1.5, -3.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """

    total: float = 1.0
    dim: int = -1

    def __post_init__(self) -> None:
        _check_positive("Simplex.total", self.total)
        if isinstance(self.dim, bool) or not isinstance(self.dim, int):
            raise TypeError(f"Simplex.dim = {self.dim!r}: give an int, such as -1 for the last dimension")

    def project(self, point: Tree) -> Tree:
        """``argmin_{p >= 0, sum p = total} ||p - z||_2 = max(z - theta, 0)`` for each slice ``z``, by sorting it.

        With ``s`` the 0/1 support of the projection, the derivative is ``diag(s) - s s' / sum(s)``. A ``-inf`` entry
        projects to 0; a NaN or ``+inf`` makes its slice NaN. bf16/fp16 leaves are computed in float32.
        See :meth:`ConvexSet.project`.
        """
        self.check(point, "point")
        return tree.map(lambda leaf: _project_simplex(leaf, float(self.total), self.dim), point)

    def check(self, point: Tree, name: str) -> None:
        """See :meth:`ConvexSet.check`; each leaf must have the dimension ``dim``, and not with size 0."""
        super().check(point, name)
        for i, leaf in enumerate(tree.leaves(point)):
            if not (-leaf.ndim <= self.dim < leaf.ndim and leaf.shape[self.dim]):
                raise ValueError(
                    f"Simplex.dim = {self.dim} needs at least one entry to sum, but {_leaf(name, point, i)} has shape "
                    f"{tuple(leaf.shape)}: reshape it (a scalar to (1,)) or change dim"
                )

    def _gaps(self, point: Tree, projected: Tree) -> Gaps:
        differences = tree.leaves(tree.sub(point, projected))
        return [(torch.linalg.vector_norm(d, dim=self.dim), float(self.total)) for d in differences]


@dataclass(frozen=True, eq=False)
class Product(ConvexSet):
    """A Cartesian product, ``C = C_1 x ... x C_k``: each set constrains its own part of the point.

    Args:
        sets: a pytree prefix of the point (a nesting of dicts, lists, tuples; dicts by key) with sets as entries. Every
            part needs one, ``WholeSpace()`` if it is free.

    Raises:
        TypeError: if an entry is not a set.

    Example:
        >>> Product({"w": Simplex(), "b": WholeSpace()}).project({"b": torch.tensor(3.0), "w": torch.zeros(2)})
        {'b': tensor(3.), 'w': tensor([0.5000, 0.5000])}
    """

    sets: Tree

    def __post_init__(self) -> None:
        for path, entry in zip(tree.paths(self.sets), tree.leaves(self.sets), strict=True):
            if not isinstance(entry, ConvexSet):
                raise TypeError(f"Product.sets{path} = {entry!r}: give a set, such as WholeSpace() for a free part")

    def project(self, point: Tree) -> Tree:
        """``argmin_{p_i in C_i} ||p - point||_2``: each part onto its own set; see :meth:`ConvexSet.project`."""
        self.check(point, "point")
        parts = [child.project(part) for _, child, part in self._parts(point, "point")]
        spec = tree.structure(point)  # keeps the key order of the point
        return tree.unflatten(tree.aligned_leaves(tree.unflatten(parts, tree.structure(self.sets)), spec), spec)

    @property
    def is_whole_space(self) -> bool:
        """True where every set is the whole space."""
        children: list[Any] = tree.leaves(self.sets)
        return all(child.is_whole_space for child in children)

    def check(self, point: Tree, name: str) -> None:
        """See :meth:`ConvexSet.check`; the point must have the containers and keys of ``sets``."""
        for path, child, part in self._parts(point, name):
            child.check(part, f"{name}{path}")

    def contains(self, point: Tree, atol: float | None = None) -> bool:
        """Whether each part lies in its set; see :meth:`ConvexSet.contains`."""
        self.check(point, "point")
        return all(child.contains(part, atol) for _, child, part in self._parts(point, "point"))

    def _parts(self, point: Tree, name: str) -> list[tuple[str, Any, Tree]]:
        try:
            parts = tree.structure(self.sets).flatten_up_to(point)
        except (ValueError, TypeError, KeyError) as error:
            cure = f"give one set for each part of {name}, under the same keys"
            raise _mismatch("Product.sets", self.sets, point, name, cure) from error
        return list(zip(tree.paths(self.sets), tree.leaves(self.sets), parts, strict=True))


def _project_simplex(leaf: Tensor, total: float, dim: int) -> Tensor:
    z = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
    z = z - z.detach().amax(dim, keepdim=True)  # a shift does not move the projection, and saves digits
    ordered = z.detach().sort(dim=dim, descending=True).values
    excess = ordered.cumsum(dim) - total
    rank = torch.ones_like(z).cumsum(dim)
    count = (rank * ordered > excess).sum(dim, keepdim=True).clamp(min=1)  # at least 1 also for NaN
    dropped = z.detach() <= excess.gather(dim, count - 1) / count  # false for NaN
    # The threshold again, from the support alone: its gradient needs neither the sort nor the cumsum.
    theta = (torch.where(dropped, 0.0, z).sum(dim, keepdim=True) - total) / (~dropped).sum(dim, keepdim=True)
    return torch.where(dropped, 0.0, (z - theta).clamp(min=0)).to(leaf.dtype)  # the clamp is for rounding only


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


def _leaf(name: str, point: Tree, index: int) -> str:
    return f"{name}{tree.paths(point)[index]}"


def _mismatch(field: str, value: Tree, point: Tree, name: str, cure: str) -> ValueError:
    given, found = (", ".join(tree.paths(t)) or "one entry" for t in (value, point))
    return ValueError(f"{field} has the entries {given}, which do not match those of {name} ({found}): {cure}")


def _spread(field: str, value: Bound, point: Tree, name: str) -> list[Any]:
    """The entry of ``value`` for each leaf of ``point``, in the order of its leaves."""
    if tree.structure(value).is_leaf():
        return [value] * len(tree.leaves(point))
    try:
        return tree.aligned_leaves(value, tree.structure(point))
    except ValueError as error:
        cure = "give one value for all leaves, or one under each of the same keys"
        raise _mismatch(field, value, point, name, cure) from error


def _check_positive(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{field} = {value!r}: give a positive number")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{field} = {value!r}: give a positive finite number")


def _check_values(field: str, values: Bound, refused: tuple[float, ...], cure: str) -> None:
    for path, entry in zip(tree.paths(values), tree.leaves(values), strict=True):
        if entry is None:
            continue
        if isinstance(entry, Tensor) and not entry.is_floating_point():
            raise TypeError(f"{field}{path} has dtype {entry.dtype}: convert it to the dtype of the point")
        if isinstance(entry, bool) or not isinstance(entry, (Tensor, Real)):
            raise TypeError(f"{field}{path} = {entry!r}: give a number, a floating-point tensor or None")
        entry = torch.as_tensor(entry)
        for bad, found in [(math.nan, entry.isnan()), *((value, entry == value) for value in refused)]:
            if bool(found.any()):
                raise ValueError(f"{field}{path} contains {bad}: {cure}")


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


def _check_fit(field: str, value: Bound, point: Tree, name: str) -> None:
    for i, (entry, leaf) in enumerate(zip(_spread(field, value, point, name), tree.leaves(point), strict=True)):
        if not isinstance(entry, Tensor):
            continue
        sizes = zip(reversed(entry.shape), reversed(leaf.shape), strict=False)
        if entry.ndim > leaf.ndim or any(n not in (1, m) for n, m in sizes):
            raise ValueError(
                f"{field} of shape {tuple(entry.shape)} does not broadcast to {_leaf(name, point, i)} of shape "
                f"{tuple(leaf.shape)}: give it the shape of the leaf"
            )
        if (entry.dtype, entry.device) != (leaf.dtype, leaf.device):
            raise ValueError(
                f"{field} is {entry.dtype} on {entry.device}, but {_leaf(name, point, i)} is {leaf.dtype} on "
                f"{leaf.device}: convert one of them, or give a plain number"
            )
