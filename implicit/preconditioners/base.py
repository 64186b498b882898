"""What preconditioners share: a tensor form that can be kept and saved, and the diagonal of a declared regularizer."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.derivatives import GradientGraph, ScalarFunction
from implicit.linear_solvers.base import Apply, Preconditioner
from implicit.operators import Hessian, LinearOperator
from implicit.tree import Tree

Tensors = dict[str, Tensor]
"""A prepared preconditioner as plain data."""

Regularizer = float | Tree | ScalarFunction
"""The regularizer's share of the Hessian: a number (times the identity), a diagonal shaped like the domain, or the
function r(x, y) itself."""


class Keepable(Preconditioner):
    """A preconditioner that splits into tensors, which can be kept and saved, and what is done with them."""

    @abstractmethod
    def prepare(self, operator: LinearOperator) -> Tensors:
        """Everything that :meth:`action` needs."""

    @abstractmethod
    def action(self, prepared: Tensors) -> Apply:
        """The map of rows ``(k, n)``, symmetric positive definite."""

    def init(self, operator: LinearOperator) -> Apply:
        """Prepared and applied at this operator."""
        return self.action(self.prepare(operator))


def aligned(diagonal: Tree, operator: LinearOperator, name: str) -> Tensor:
    """A tree shaped like the operator's domain as a vector, shape ``(n,)``, in its dtype and device.

    Raises:
        ValueError: if structures or shapes differ.
    """
    found = tree.map(lambda _, leaf: leaf, operator.like, diagonal)
    for own, leaf in zip(tree.leaves(operator.like), tree.leaves(found), strict=True):
        if own.shape != leaf.shape:
            raise ValueError(
                f"{name} has {tree.size(found)} entries, the operator acts on {operator.size}: {name} is "
                f"{tree.describe(found)}, the domain {tree.describe(operator.like)}"
            )
    return tree.ravel(found).detach().to(dtype=operator.dtype, device=operator.device)


def regularizer_diagonal(regularizer: Regularizer, operator: LinearOperator) -> Tensor:
    """The diagonal that a regularizer adds to the operator, shape ``(n,)``, nonnegative.

    A function r(x, y) is differentiated where the Hessian was taken: two products, one of which checks with random
    signs that its Hessian is diagonal.

    Raises:
        TypeError: if r is a function and the operator no Hessian, which alone knows where it was taken.
        ValueError: if r is not separable in y, or its diagonal is negative or not finite.
    """
    if isinstance(regularizer, int | float):
        found = torch.full((operator.size,), float(regularizer), dtype=operator.dtype, device=operator.device)
    elif callable(regularizer):
        found = _separable(regularizer, operator)
    else:
        found = aligned(regularizer, operator, "regularizer")
    if not bool((found >= 0).all() & torch.isfinite(found).all()):
        raise ValueError(
            f"the regularizer's diagonal must be finite and nonnegative, its least is {float(found.min())}"
        )
    return found


def _separable(regularizer: Callable[..., Any], operator: LinearOperator) -> Tensor:
    if not isinstance(operator, Hessian):
        raise TypeError(
            f"regularizer is a function, which needs to know where to take its Hessian; {type(operator).__name__} does "
            "not tell: declare the regularizer's diagonal as a tree instead"
        )
    graph = GradientGraph(regularizer, operator.graph.x, operator.graph.y, "regularizer")
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(operator.size, generator=generator).to(dtype=operator.dtype, device=operator.device)
    diagonal, pulled = Hessian.of(graph).flat_mm(torch.stack([torch.ones_like(probe), probe]))
    gap = torch.linalg.vector_norm(pulled - diagonal * probe)
    if not bool(gap <= torch.finfo(probe.dtype).eps ** 0.75 * torch.linalg.vector_norm(pulled)):
        raise ValueError(
            "the regularizer's Hessian in y is not diagonal; declare only the part of it that is a sum over single "
            "entries of y, or none"
        )
    return diagonal
