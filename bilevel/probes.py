"""Points around a start, and whether what is found at several of them is the same: how structure is recognised."""

import torch
from torch import Tensor

from implicit import tree
from implicit.tree import Tree

SAME = 1e4
"""Derivatives that differ by fewer roundings of their size count as the same."""


def displacement(point: Tree, generator: torch.Generator) -> Tree:
    """``(1 + |point|) e`` with standard normal e: a random step as long as the point is large, shaped like it."""
    return tree.map(lambda leaf, e: (1.0 + leaf.abs()) * e, tree.detach(point), tree.randn_like(point, generator))


def beside(point: Tree, generator: torch.Generator, reach: float = 1.0) -> Tree:
    """The point moved by ``reach`` such steps."""
    step = displacement(point, generator)
    return tree.map(lambda leaf, moved: leaf + reach * moved, tree.detach(point), step)


def same(one: Tensor, other: Tensor, size: Tensor) -> Tensor:
    """Where two derivatives of magnitude ``size`` differ by rounding alone; nowhere that one is NaN."""
    return (one - other).abs() <= SAME * torch.finfo(one.dtype).eps * size
