"""Optimizers as differentiable functions, for unrolling: the updates of ``torch.optim`` over pytrees, nothing in place.

Every hyperparameter may be a tensor with a graph, so that step sizes, momenta and decays can be learned.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.tree import Tree

Rate = Any
"""A float, a 0-d tensor, or a tree shaped like the variable (one rate per entry)."""


class InnerOptimizer(ABC):
    """``init`` makes the buffers, ``update`` is one step; both are pure functions of trees.

    The step count is an argument rather than a buffer, so that buffers are tensors only.
    """

    @abstractmethod
    def init(self, y: Tree) -> Tree:
        """The buffers before the first step."""

    @abstractmethod
    def update(self, gradient: Tree, buffers: Tree, y: Tree, t: int) -> tuple[Tree, Tree]:
        """The next y and the next buffers.

        Args:
            gradient: of the objective at y.
            buffers: from the step before.
            y: the variable.
            t: how many steps were taken before this one.
        """


@dataclass(frozen=True, kw_only=True)
class SGD(InnerOptimizer):
    """Gradient descent, with momentum, Nesterov's form of it, and weight decay; as ``torch.optim.SGD``.

    .. math:: u = \\nabla g + \\lambda y, \\quad b \\leftarrow m\\, b + (1 - d)\\, u, \\quad y \\leftarrow y - s\\, b,

    where the first b is u; Nesterov's form steps along ``u + m b``.

    Args:
        lr: s; a float, a 0-d tensor, or a tree shaped like y with a step size for every entry (Meta-SGD).
        momentum: m.
        dampening: d.
        weight_decay: lambda.
        nesterov: Nesterov's form; needs momentum, and no dampening.

    Example:
        >>> import torch, implicit
        >>> y = implicit.unroll(lambda x, y: (y - x) ** 2 / 2, torch.tensor(1.0), torch.tensor(0.0),
        ...                     steps=2, optimizer=implicit.SGD(lr=0.5))
        >>> y
        tensor(0.7500)
    """

    lr: Rate
    momentum: float | Tensor = 0.0
    dampening: float | Tensor = 0.0
    weight_decay: float | Tensor = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check(self.lr, "lr", low=0.0)
        _check(self.momentum, "momentum", low=0.0)
        _check(self.dampening, "dampening")
        _check(self.weight_decay, "weight_decay", low=0.0)
        if self.nesterov and (_is_zero(self.momentum) or not _is_zero(self.dampening)):
            raise ValueError(
                f"nesterov needs momentum > 0 and dampening = 0, got momentum={self.momentum}, "
                f"dampening={self.dampening}"
            )

    def init(self, y: Tree) -> Tree:
        """One buffer with momentum, none without."""
        return () if _is_zero(self.momentum) else tree.zeros_like(tree.detach(y))

    def update(self, gradient: Tree, buffers: Tree, y: Tree, t: int) -> tuple[Tree, Tree]:
        """One step."""
        direction = _decayed(gradient, y, self.weight_decay)
        if _is_zero(self.momentum):
            return _descend(y, self.lr, direction), buffers
        if t:
            fresh = direction if _is_zero(self.dampening) else tree.scale(1.0 - self.dampening, direction)
            buffers = tree.axpy(self.momentum, buffers, fresh)
        else:
            buffers = direction
        step = tree.axpy(self.momentum, buffers, direction) if self.nesterov else buffers
        return _descend(y, self.lr, step), buffers


@dataclass(frozen=True, kw_only=True)
class Adam(InnerOptimizer):
    """Adam (Kingma and Ba 2015) and, with ``decoupled``, AdamW (Loshchilov and Hutter 2019); as ``torch.optim``.

    .. math:: m \\leftarrow \\beta_1 m + (1 - \\beta_1) u, \\quad v \\leftarrow \\beta_2 v + (1 - \\beta_2) u^2, \\quad
        y \\leftarrow y - s\\, \\frac{m / (1 - \\beta_1^t)}{\\sqrt{v / (1 - \\beta_2^t)} + \\epsilon} .

    Where v is exactly zero, as it is for entries that have had no gradient, the square root is given derivative zero;
    then the derivative of the step is that of ``m / eps``, which is right, and no NaN arises.

    Args:
        lr: s; a float, a 0-d tensor, or a tree shaped like y.
        betas: the two decay rates, each a float or a 0-d tensor.
        eps: added to the square root.
        weight_decay: lambda; ``u = grad + lambda y``, or with ``decoupled`` y shrinks by ``1 - s lambda``.
        amsgrad: divide by the largest v so far (Reddi, Kale and Kumar 2018).
        decoupled: weight decay as in AdamW.
    """

    lr: Rate
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999)
    eps: float | Tensor = 1e-8
    weight_decay: float | Tensor = 0.0
    amsgrad: bool = False
    decoupled: bool = False

    def __post_init__(self) -> None:
        _check(self.lr, "lr", low=0.0)
        _check(self.eps, "eps", low=0.0)
        _check(self.weight_decay, "weight_decay", low=0.0)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ValueError(f"betas must be a pair, got {self.betas!r}")
        for beta in self.betas:
            _check(beta, "betas", low=0.0, below=1.0)

    def init(self, y: Tree) -> Tree:
        """Two moments, and their maximum with ``amsgrad``."""
        y = tree.detach(y)
        return tuple(tree.zeros_like(y) for _ in range(3 if self.amsgrad else 2))

    def update(self, gradient: Tree, buffers: Tree, y: Tree, t: int) -> tuple[Tree, Tree]:
        """One step."""
        first, second = self.betas
        if self.decoupled:
            y = _descend(y, self.lr, tree.scale(self.weight_decay, y))
            direction = gradient
        else:
            direction = _decayed(gradient, y, self.weight_decay)
        m = _average(buffers[0], direction, first)
        v = _average(buffers[1], _square(direction), second)
        largest = tree.map(torch.maximum, buffers[2], v) if self.amsgrad else v
        corrected = 1.0 - second ** (t + 1)
        step = tree.map(lambda a, b: a / (_root(b / corrected) + self.eps), m, largest)
        step = tree.scale(1.0 / (1.0 - first ** (t + 1)), step)
        return _descend(y, self.lr, step), (m, v, largest) if self.amsgrad else (m, v)


@dataclass(frozen=True, kw_only=True)
class RMSprop(InnerOptimizer):
    """RMSprop (Tieleman and Hinton 2012), as ``torch.optim.RMSprop``.

    .. math:: v \\leftarrow \\alpha v + (1 - \\alpha) u^2, \\quad b \\leftarrow m\\, b + u / (\\sqrt{v} + \\epsilon),
        \\quad y \\leftarrow y - s\\, b .

    Args:
        lr: s; a float, a 0-d tensor, or a tree shaped like y.
        alpha: decay rate of v.
        eps: added to the square root.
        weight_decay: lambda; ``u = grad + lambda y``.
        momentum: m.
        centered: v minus the square of the averaged gradient under the root.
    """

    lr: Rate
    alpha: float | Tensor = 0.99
    eps: float | Tensor = 1e-8
    weight_decay: float | Tensor = 0.0
    momentum: float | Tensor = 0.0
    centered: bool = False

    def __post_init__(self) -> None:
        _check(self.lr, "lr", low=0.0)
        _check(self.alpha, "alpha", low=0.0)
        _check(self.eps, "eps", low=0.0)
        _check(self.weight_decay, "weight_decay", low=0.0)
        _check(self.momentum, "momentum", low=0.0)

    def init(self, y: Tree) -> Tree:
        """The square average; the average with ``centered``; the momentum buffer where there is momentum."""
        zeros = tree.zeros_like(tree.detach(y))
        return {
            "square": zeros,
            "mean": zeros if self.centered else (),
            "momentum": () if _is_zero(self.momentum) else zeros,
        }

    def update(self, gradient: Tree, buffers: Tree, y: Tree, t: int) -> tuple[Tree, Tree]:
        """One step."""
        direction = _decayed(gradient, y, self.weight_decay)
        square = _average(buffers["square"], _square(direction), self.alpha)
        mean, spread = buffers["mean"], square
        if self.centered:
            mean = _average(mean, direction, self.alpha)
            spread = tree.map(lambda v, m: v - m * m, square, mean)
        step = tree.map(lambda u, v: u / (_root(v) + self.eps), direction, spread)
        momentum = buffers["momentum"]
        if not _is_zero(self.momentum):
            step = momentum = tree.axpy(self.momentum, momentum, step)
        return _descend(y, self.lr, step), {"square": square, "mean": mean, "momentum": momentum}


@dataclass(frozen=True, kw_only=True)
class Adagrad(InnerOptimizer):
    """Adagrad (Duchi, Hazan and Singer 2011), as ``torch.optim.Adagrad``.

    .. math:: v \\leftarrow v + u^2, \\quad
        y \\leftarrow y - \\frac{s}{1 + t\\, d}\\, \\frac{u}{\\sqrt{v} + \\epsilon} .

    Args:
        lr: s; a float, a 0-d tensor, or a tree shaped like y.
        lr_decay: d, with t counted from zero.
        weight_decay: lambda; ``u = grad + lambda y``.
        initial_accumulator_value: the first v.
        eps: added to the square root.
    """

    lr: Rate
    lr_decay: float | Tensor = 0.0
    weight_decay: float | Tensor = 0.0
    initial_accumulator_value: float = 0.0
    eps: float | Tensor = 1e-10

    def __post_init__(self) -> None:
        _check(self.lr, "lr", low=0.0)
        _check(self.lr_decay, "lr_decay", low=0.0)
        _check(self.weight_decay, "weight_decay", low=0.0)
        _check(self.initial_accumulator_value, "initial_accumulator_value", low=0.0)
        _check(self.eps, "eps", low=0.0)

    def init(self, y: Tree) -> Tree:
        """The sum of squares."""
        return tree.map(lambda leaf: torch.full_like(leaf, self.initial_accumulator_value), tree.detach(y))

    def update(self, gradient: Tree, buffers: Tree, y: Tree, t: int) -> tuple[Tree, Tree]:
        """One step."""
        direction = _decayed(gradient, y, self.weight_decay)
        total = tree.add(buffers, _square(direction))
        step = tree.map(lambda u, v: u / (_root(v) + self.eps), direction, total)
        return _descend(y, self.lr, tree.scale(1.0 / (1.0 + t * self.lr_decay), step)), total


def _descend(y: Tree, lr: Rate, step: Tree) -> Tree:
    if isinstance(lr, float | int) or (isinstance(lr, Tensor) and lr.ndim == 0):
        return tree.axpy(-lr, step, y)
    return tree.map(lambda q, s, u: q - s * u, y, lr, step)


def _decayed(gradient: Tree, y: Tree, weight_decay: float | Tensor) -> Tree:
    return gradient if _is_zero(weight_decay) else tree.axpy(weight_decay, y, gradient)


def _average(old: Tree, new: Tree, keep: float | Tensor) -> Tree:
    return tree.map(lambda a, b: keep * a + (1.0 - keep) * b, old, new)


def _square(value: Tree) -> Tree:
    return tree.map(lambda leaf: leaf * leaf, value)


def _root(leaf: Tensor) -> Tensor:
    """The square root with derivative zero at zero, where autograd's is infinite and turns 0 * inf into NaN."""
    positive = leaf > 0
    return torch.where(positive, torch.where(positive, leaf, 1.0).sqrt(), 0.0)


def _is_zero(value: float | Tensor) -> bool:
    """Whether a term can be left out; a tensor never, as it may be differentiated at zero."""
    return not isinstance(value, Tensor) and value == 0


def _check(value: Any, name: str, *, low: float = -float("inf"), below: float = float("inf")) -> None:
    """Refuse numbers out of range; what tensors hold is the caller's affair."""
    if isinstance(value, float | int):
        if not low <= value < below:
            raise ValueError(f"{name} must be a tensor or a number in [{low:g}, {below:g}), got {value}")
    elif not all(isinstance(leaf, Tensor) for leaf in tree.leaves(value)):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
