"""Optimality conditions ``F(y, *theta) = 0``: what :func:`implicit.custom_root` differentiates."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from implicit import tree
from implicit.pullback import gradient
from implicit.tree import Tree


def stationary(objective: Callable[..., Tensor]) -> Callable[..., Tree]:
    """``F(y, *theta) = grad_y g(y, *theta)``, the condition of an unconstrained minimizer."""

    def residual(y: Tree, *theta: Any) -> Tree:
        leaves, spec = tree.flatten(y)
        return tree.unflatten(gradient(lambda *q: objective(tree.unflatten(q, spec), *theta), leaves), spec)

    return residual


def fixed_point(iteration: Callable[..., Tree]) -> Callable[..., Tree]:
    """``F(y, *theta) = T(y, *theta) - y``."""

    def residual(y: Tree, *theta: Any) -> Tree:
        return tree.map(lambda after, before: after - before, iteration(y, *theta), y)

    return residual
