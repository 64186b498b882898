"""Hessians from differences of gradients."""

import torch

from implicit import tree
from implicit.derivatives import ScalarFunction, value_and_gradient
from implicit.operators.base import LinearOperator
from implicit.tree import Tree


class GradientDifference(LinearOperator):
    """The Hessian from central differences of gradients: for objectives whose backward pass cannot be differentiated.

    Args:
        fn: a scalar function of one tree.
        y: where.

    Each product costs two gradients and is accurate to about ``eps^(2/3)`` relative.
    """

    symmetric = True

    def __init__(self, fn: ScalarFunction, y: Tree) -> None:
        super().__init__(y)
        self._fn = fn
        # Central differences balance truncation h^2 against rounding eps / h.
        self._width = float(torch.finfo(self.dtype).eps) ** (1 / 3) * (1.0 + float(tree.norm(self.like)))

    def mv(self, v: Tree) -> Tree:
        norm = tree.norm(v)
        h = self._width / torch.where(norm > 0, norm, 1.0)
        _, ahead = value_and_gradient(self._fn, tree.axpy(h, v, self.like))
        _, behind = value_and_gradient(self._fn, tree.axpy(-h, v, self.like))
        return tree.scale(0.5 / h, tree.sub(ahead, behind))
