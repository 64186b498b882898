"""The Hessian of an objective as an operator."""

from typing import Self

from torch import Tensor

from implicit import tree
from implicit.derivatives import GradientGraph, ScalarFunction
from implicit.operators.base import LinearOperator
from implicit.tree import Tree


class Hessian(LinearOperator):
    """:math:`\\nabla^2 \\mathrm{fn}(y)`, with its primal pass kept: each product is one backward pass.

    Example:
        >>> import torch, implicit
        >>> H = implicit.Hessian(lambda y: (y**4).sum() / 12, torch.tensor([1.0, 2.0]))
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])
    """

    symmetric = True

    def __init__(self, fn: ScalarFunction, y: Tree, *, positive_definite: bool = True) -> None:
        self._attach(GradientGraph(lambda _, q: fn(q), (), y, "the objective"), positive_definite)

    @classmethod
    def of(cls, graph: GradientGraph, *, positive_definite: bool = True) -> Self:
        """The Hessian in y of a graph that already exists; nothing is evaluated."""
        operator = cls.__new__(cls)
        operator._attach(graph, positive_definite)
        return operator

    def _attach(self, graph: GradientGraph, positive_definite: bool) -> None:
        super().__init__(graph.y)
        self.graph = graph
        self.positive_definite = positive_definite

    @property
    def value(self) -> Tensor:
        """The objective where the Hessian was taken."""
        return self.graph.value

    @property
    def gradient(self) -> Tree:
        """The gradient where the Hessian was taken."""
        return self.graph.gradient

    def mv(self, v: Tree) -> Tree:
        return self.graph.hvp(v)

    def _flat_block(self, rows: Tensor) -> Tensor:
        if rows.shape[0] == 1:
            return self.flat_mv(rows[0])[None]
        self.products += rows.shape[0]
        return tree.ravel_batch(self.graph.hvp_batch(tree.unravel(rows, self.like)))
