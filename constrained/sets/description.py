"""Convex sets as constraints: bounds, linear rows and smooth convex functions of the ravelled point."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from constrained.sets.affine import Affine, HalfSpace
from constrained.sets.ball import Ball
from constrained.sets.base import Bound, ConvexSet, spread
from constrained.sets.box import Box, Nonnegative
from constrained.sets.polyhedron import Polyhedron
from constrained.sets.product import Product
from constrained.sets.second_order_cone import SecondOrderCone
from constrained.sets.simplex import Simplex
from constrained.sets.whole_space import WholeSpace
from implicit import tree
from implicit.tree import Tree

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Description:
    """``{z : lower <= z <= upper, A z = b, G z <= h, curved(z) <= 0}`` with z the ravelled point.

    Attributes:
        lower, upper: ``(n,)``, infinite where there is no bound.
        A, b: ``(q, n)`` and ``(q,)``.
        G, h: ``(p, n)`` and ``(p,)``.
        curved: convex functions of z with values of shape ``(k,)`` each.
    """

    lower: Tensor
    upper: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor
    curved: tuple[Rows, ...] = ()

    def equality(self, z: Tensor) -> Tensor:
        """``A z - b``."""
        return self.A @ z - self.b

    def inequality(self, z: Tensor) -> Tensor:
        """``G z - h`` and the curved rows below each other."""
        return torch.cat([self.G @ z - self.h, *(rows(z) for rows in self.curved)])


def describe(chosen: ConvexSet, point: Tree) -> Description:
    """The set as constraints on points shaped like ``point``.

    Boxes and orthants become bounds, simplices bounds and one equation per slice, half-spaces, affine sets and
    polyhedra linear rows, balls ``(||z - c||^2 - r^2) / 2r <= 0`` and cones ``||z|| - t <= 0``.

    Raises:
        TypeError: for a set of another class, which is known by its projection only.
    """
    chosen.check(point, "point")
    flat = tree.ravel(point)
    if isinstance(chosen, Product):
        return _product(chosen, point, flat)
    if isinstance(chosen, WholeSpace):
        return _made(flat)
    if isinstance(chosen, Nonnegative):
        return _made(flat, lower=torch.zeros_like(flat))
    if isinstance(chosen, Box):
        bounds = {"lower": (chosen.lower, -torch.inf), "upper": (chosen.upper, torch.inf)}
        return _made(flat, **{name: _bound(value, point, none) for name, (value, none) in bounds.items()})
    if isinstance(chosen, Simplex):
        return _simplex(chosen, point, flat)
    if isinstance(chosen, HalfSpace):
        normal = _bound(chosen.normal, point, 0.0)
        return _made(flat, G=normal[None], h=(flat.new_zeros(1) + chosen.offset))
    if isinstance(chosen, Affine):
        entries = tree.aligned_leaves(chosen.matrix, tree.structure(point))
        matrix = torch.cat([entry.reshape(len(entry), -1) for entry in entries], dim=1)
        return _made(flat, A=matrix, b=flat.new_zeros(len(matrix)) + chosen.offset)
    if isinstance(chosen, Polyhedron):
        return _polyhedron(chosen, flat)
    if isinstance(chosen, Ball):
        center, radius = _bound(chosen.center, point, 0.0), chosen.radius
        return _made(flat, curved=(lambda z: ((z - center).square().sum() - radius**2).reshape(1) / (2 * radius),))
    if isinstance(chosen, SecondOrderCone):
        return _made(flat, curved=(_cone,))
    raise TypeError(
        f"{type(chosen).__name__} is known by its projection only and cannot be written as constraints; use the sets "
        "of constrained, or declare the constraints as functions"
    )


def _made(flat: Tensor, **given: object) -> Description:
    n = len(flat)
    blank = {
        "lower": flat.new_full((n,), -torch.inf),
        "upper": flat.new_full((n,), torch.inf),
        "A": flat.new_zeros(0, n),
        "b": flat.new_zeros(0),
        "G": flat.new_zeros(0, n),
        "h": flat.new_zeros(0),
    }
    return Description(**{**blank, **given})  # type: ignore[arg-type]


def _bound(value: Bound, point: Tree, none: float) -> Tensor:
    leaves = tree.leaves(point)
    entries = [none if entry is None else entry for entry in spread("set", value, point, "point")]
    parts = [torch.zeros_like(leaf) + entry for entry, leaf in zip(entries, leaves, strict=True)]
    return tree.ravel(tree.unflatten(parts, tree.structure(point))).detach()


def _indices(point: Tree) -> Tree:
    """Shaped like the point, each entry its place in the ravelled one (as float64, which is exact here)."""
    like = tree.map(lambda leaf: leaf.to(torch.float64), tree.detach(point))
    return tree.unravel(torch.arange(tree.size(point), dtype=torch.float64, device=tree.ravel(like).device), like)


def _simplex(chosen: Simplex, point: Tree, flat: Tensor) -> Description:
    slices = [leaf.movedim(chosen.dim, -1).reshape(-1, leaf.shape[chosen.dim]) for leaf in tree.leaves(_indices(point))]
    A = torch.cat([flat.new_zeros(len(places), len(flat)).scatter_(1, places.long(), 1.0) for places in slices])
    return _made(flat, lower=torch.zeros_like(flat), A=A, b=flat.new_full((len(A),), float(chosen.total)))


def _polyhedron(chosen: Polyhedron, flat: Tensor) -> Description:
    given: dict[str, object] = {}
    for name in ("lower", "upper"):
        if getattr(chosen, name) is not None:
            given[name] = torch.zeros_like(flat) + getattr(chosen, name)
    if chosen.A is not None:
        given.update(A=chosen.A, b=chosen.b)
    if chosen.G is not None and chosen.h is not None:
        real = torch.isfinite(chosen.h)
        given.update(G=chosen.G[real], h=chosen.h[real])
    return _made(flat, **given)


def _cone(z: Tensor) -> Tensor:
    """``||z_1 .. z_k|| - t``, with slope zero at the apex instead of NaN."""
    squared = z[:-1].square().sum()
    apart = squared > 0
    return (torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0) - z[-1]).reshape(1)


def _product(chosen: Product, point: Tree, flat: Tensor) -> Description:
    lower, upper = flat.new_full((len(flat),), -torch.inf), flat.new_full((len(flat),), torch.inf)
    linear: dict[str, list[Tensor]] = {"A": [], "b": [], "G": [], "h": []}
    curved: list[Rows] = []
    for (_, child, part), (_, _, index) in zip(
        chosen.parts(point, "point"), chosen.parts(_indices(point), "point"), strict=True
    ):
        if not tree.leaves(part):
            continue
        places, own = tree.ravel(index).long(), describe(child, part)
        lower[places], upper[places] = own.lower, own.upper
        for name, side in (("A", "b"), ("G", "h")):
            wide = flat.new_zeros(len(getattr(own, name)), len(flat))
            wide[:, places] = getattr(own, name)
            linear[name].append(wide)
            linear[side].append(getattr(own, side))
        curved += [_placed(rows, places) for rows in own.curved]
    joined = {name: torch.cat(parts) for name, parts in linear.items() if parts}
    return _made(flat, lower=lower, upper=upper, curved=tuple(curved), **joined)


def _placed(rows: Rows, places: Tensor) -> Rows:
    return lambda z: rows(z[places])
