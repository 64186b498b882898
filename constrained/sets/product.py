"""Cartesian products of sets."""

from dataclasses import dataclass
from typing import Any

from constrained.sets.base import ConvexSet, mismatch
from implicit import tree
from implicit.tree import Tree


@dataclass(frozen=True, eq=False)
class Product(ConvexSet):
    """A Cartesian product, ``C = C_1 x ... x C_k``: each set constrains its own part of the point.

    Args:
        sets: a pytree prefix of the point (a nesting of dicts, lists, tuples; dicts by key) with sets as entries. Every
            part needs one, ``WholeSpace()`` if it is free.

    Raises:
        TypeError: if an entry is not a set.

    Example:
        >>> import torch
        >>> from constrained import Simplex, WholeSpace
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
        parts = [child.project(part) for _, child, part in self.parts(point, "point")]
        spec = tree.structure(point)  # keeps the key order of the point
        return tree.unflatten(tree.aligned_leaves(tree.unflatten(parts, tree.structure(self.sets)), spec), spec)

    @property
    def is_whole_space(self) -> bool:
        """True where every set is the whole space."""
        children: list[Any] = tree.leaves(self.sets)
        return all(child.is_whole_space for child in children)

    def check(self, point: Tree, name: str) -> None:
        """See :meth:`ConvexSet.check`; the point must have the containers and keys of ``sets``."""
        for path, child, part in self.parts(point, name):
            child.check(part, f"{name}{path}")

    def contains(self, point: Tree, atol: float | None = None) -> bool:
        """Whether each part lies in its set; see :meth:`ConvexSet.contains`."""
        self.check(point, "point")
        return all(child.contains(part, atol) for _, child, part in self.parts(point, "point"))

    def parts(self, point: Tree, name: str) -> list[tuple[str, Any, Tree]]:
        """Path, set and part of the point, for every set; misfits raise as in :meth:`ConvexSet.check`."""
        try:
            parts = tree.structure(self.sets).flatten_up_to(point)
        except (ValueError, TypeError, KeyError) as error:
            cure = f"give one set for each part of {name}, under the same keys"
            raise mismatch("Product.sets", self.sets, point, name, cure) from error
        return list(zip(tree.paths(self.sets), tree.leaves(self.sets), parts, strict=True))
