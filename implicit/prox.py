"""Proximal operators with exact Jacobians: ``prox(v, step) = argmin_u r(u) + ||u - v||^2 / (2 step)``.

Each factory returns ``prox(v, step, *theta)`` as :func:`implicit.optimality.proximal_gradient` calls it; a ``weight``
that is to be differentiated is looked up in theta by a function. At a kink the derivative is that of the side where
the entry is zero.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.tree import Tree

Weight = float | Tensor | Callable[..., Tensor]
Prox = Callable[..., Tree]


def soft_threshold(v: Tensor, threshold: float | Tensor) -> Tensor:
    """``sign(v) max(|v| - threshold, 0)``, entry by entry; its Jacobian is ``diag(|v| > threshold)``.

    Args:
        v: any shape.
        threshold: at least zero; broadcast against v.

    Example:
        >>> import torch, implicit
        >>> implicit.soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), 1.0)
        tensor([-2., 0., 1.])
    """
    return torch.where(v.abs() > threshold, v - torch.sign(v) * threshold, 0.0)


def block_soft_threshold(v: Tensor, threshold: float | Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """``v max(1 - threshold / ||v||, 0)``, with norms along ``dim``: whole blocks become zero.

    Args:
        v: any shape.
        threshold: at least zero; broadcast against the norms, which keep ``dim`` with length 1.
        dim: the axes of one block.
    """
    squared = (v * v).sum(dim, keepdim=True)
    kept = squared > torch.as_tensor(threshold, dtype=v.dtype, device=v.device) ** 2
    # sqrt has no derivative at zero, and torch.where passes NaN of the branch not taken.
    norms = torch.sqrt(torch.where(kept, squared, 1.0))
    return torch.where(kept, v * (1 - threshold / norms), 0.0)


def prox_l1(weight: Weight = 1.0) -> Prox:
    """The proximal operator of ``weight * ||u||_1`` (lasso), on every leaf.

    Args:
        weight: a number, a tensor without gradient, or a function of theta: ``prox_l1(lambda x: x.exp())``.
    """

    def prox(v: Tree, step: float, *theta: Any) -> Tree:
        return tree.map(lambda leaf: soft_threshold(leaf, step * _value(weight, theta)), v)

    return prox


def prox_elastic_net(weight: Weight = 1.0, ridge: Weight = 1.0) -> Prox:
    """The proximal operator of ``weight * ||u||_1 + ridge / 2 * ||u||^2``, on every leaf.

    Args:
        weight: of the absolute values; see :func:`prox_l1`.
        ridge: of the squares; see :func:`prox_l1`.
    """

    def prox(v: Tree, step: float, *theta: Any) -> Tree:
        scale = 1 + step * _value(ridge, theta)
        return tree.map(lambda leaf: soft_threshold(leaf, step * _value(weight, theta)) / scale, v)

    return prox


def prox_group_lasso(weight: Weight = 1.0, dim: int | tuple[int, ...] = -1) -> Prox:
    """The proximal operator of ``weight * sum ||u_block||``, blocks along ``dim`` of every leaf.

    Args:
        weight: see :func:`prox_l1`.
        dim: the axes of one block.
    """

    def prox(v: Tree, step: float, *theta: Any) -> Tree:
        return tree.map(lambda leaf: block_soft_threshold(leaf, step * _value(weight, theta), dim), v)

    return prox


def _value(weight: Weight, theta: tuple[Any, ...]) -> float | Tensor:
    return weight(*theta) if callable(weight) else weight
