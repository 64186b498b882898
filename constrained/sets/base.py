"""What a convex set is, and the checks and spreading of their data that the sets share."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
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
                raise TypeError(f"{leaf_name(name, point, i)} = {leaf!r}: give a floating-point tensor")
            if not leaf.is_floating_point():
                raise TypeError(
                    f"{leaf_name(name, point, i)} has dtype {leaf.dtype}: convert it to a real floating dtype"
                )

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

    def distance(self, point: Tree) -> Tensor:
        """The Euclidean distance ``||point - project(point)||_2`` over all leaves together, a scalar tensor.

        Differentiable outside the set, where the gradient is ``(point - project(point)) / distance``; inside it is 0.
        Misfits raise as in :meth:`check`.
        """
        return tree.norm(tree.sub(point, self.project(point)))

    def _gaps(self, point: Tree, projected: Tree) -> Gaps:
        return [(tree.norm(tree.sub(point, projected)), tree.norm(projected).clamp(min=1))]


def leaf_name(name: str, point: Tree, index: int) -> str:
    return f"{name}{tree.paths(point)[index]}"


def mismatch(field: str, value: Tree, point: Tree, name: str, cure: str) -> ValueError:
    given, found = (", ".join(tree.paths(t)) or "one entry" for t in (value, point))
    return ValueError(f"{field} has the entries {given}, which do not match those of {name} ({found}): {cure}")


def not_a_tensor(name: str, value: Any, expected: str) -> TypeError:
    """The error for a leaf that is none, with how to make one of it."""
    if isinstance(value, np.ndarray):
        return TypeError(f"{name} is a numpy array: {expected}; torch.from_numpy({name}) is one")
    if isinstance(value, Real) and not isinstance(value, bool):
        expected += f", such as torch.tensor({float(value)!r}); a list of numbers becomes one by torch.tensor([...])"
    return TypeError(f"{name} = {value!r}: {expected}")


def spread(field: str, value: Bound, point: Tree, name: str) -> list[Any]:
    """The entry of ``value`` for each leaf of ``point``, in the order of its leaves."""
    if tree.structure(value).is_leaf():
        return [value] * len(tree.leaves(point))
    try:
        return tree.aligned_leaves(value, tree.structure(point))
    except ValueError as error:
        cure = "give one value for all leaves, or one under each of the same keys"
        if isinstance(value, list | tuple) and all(isinstance(v, Real) for v in tree.leaves(value)):
            cure += "; for the entries of one tensor give torch.tensor([...])"
        raise mismatch(field, value, point, name, cure) from error


def compute_dtype(values: Sequence[Tensor]) -> torch.dtype:
    """The widest dtype of ``values``, at least float32: norms in bf16 lose everything after 8 bits."""
    return functools.reduce(torch.promote_types, (v.dtype for v in values), torch.float32)


def check_scalar(field: str, value: Any) -> float:
    """The value of a finite number or a finite floating-point tensor of shape ``()``; anything else is refused."""
    if isinstance(value, Tensor) and (value.ndim or not value.is_floating_point()):
        found = f"{field} has dtype {value.dtype} and shape {tuple(value.shape)}"
        raise TypeError(f"{found}: give a number, or a floating-point tensor of shape ()")
    if isinstance(value, bool) or not isinstance(value, (Tensor, Real)):
        raise TypeError(f"{field} = {value!r}: give a number, or a floating-point tensor of shape ()")
    number = float(value.detach() if isinstance(value, Tensor) else value)
    if not math.isfinite(number):
        raise ValueError(f"{field} = {number}: give a finite value")
    return number


def check_positive(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{field} = {value!r}: give a positive number")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{field} = {value!r}: give a positive finite number")


def check_values(field: str, values: Bound, refused: tuple[float, ...], cure: str) -> None:
    for path, entry in zip(tree.paths(values), tree.leaves(values), strict=True):
        if entry is None:
            continue
        if isinstance(entry, Tensor) and not entry.is_floating_point():
            raise TypeError(f"{field}{path} has dtype {entry.dtype}: convert it to the dtype of the point")
        if isinstance(entry, bool) or not isinstance(entry, (Tensor, Real)):
            raise not_a_tensor(f"{field}{path}", entry, "give a number, a floating-point tensor or None")
        entry = torch.as_tensor(entry)
        for bad, found in [(math.nan, entry.isnan()), *((value, entry == value) for value in refused)]:
            if bool(found.any()):
                raise ValueError(f"{field}{path} contains {bad}: {cure}")


def check_fit(field: str, value: Bound, point: Tree, name: str) -> None:
    for i, (entry, leaf) in enumerate(zip(spread(field, value, point, name), tree.leaves(point), strict=True)):
        if not isinstance(entry, Tensor):
            continue
        sizes = zip(reversed(entry.shape), reversed(leaf.shape), strict=False)
        if entry.ndim > leaf.ndim or any(n not in (1, m) for n, m in sizes):
            raise ValueError(
                f"{field} of shape {tuple(entry.shape)} does not broadcast to {leaf_name(name, point, i)} of shape "
                f"{tuple(leaf.shape)}: give it the shape of the leaf"
            )
        if (entry.dtype, entry.device) != (leaf.dtype, leaf.device):
            raise ValueError(
                f"{field} is {entry.dtype} on {entry.device}, but {leaf_name(name, point, i)} is {leaf.dtype} on "
                f"{leaf.device}: convert one of them, or give a plain number"
            )
