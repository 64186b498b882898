"""Reverse-mode products that can be differentiated again in whatever mode is active.

At points that autograd follows, an ordinary graph is used: it is cheaper, and it works for modules that refuse
``torch.func``. Elsewhere, and under transforms, the same product is written with ``torch.func.vjp``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from implicit.derivatives import ScalarFunction, require_scalar, vjp
from implicit.transforms import transforms_active

Leaves = tuple[Tensor, ...]
Map = Callable[..., Leaves]


def pullback(fn: Map, points: Sequence[Tensor]) -> tuple[Leaves, Map]:
    """Value of ``fn`` at ``points`` and the map from cotangents of the value to cotangents of the points.

    Both are differentiable in the points and in the cotangents. Points that do not enter get zeros.
    """
    own = _names(points)
    if own is None:
        value, pull = vjp(fn, *points)
        return value, lambda *cotangents: pull(tuple(cotangents))
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        value = fn(*own)
    return value, lambda *cotangents: gradients(value, own, cotangents, create_graph=again)


def _names(points: Sequence[Tensor]) -> Leaves | None:
    """Fresh names of the points, so that what they depend on is held fixed; None where autograd does not follow them.

    A point that requires no gradient would have to be made to, and its graph would leak out of here. What a transform
    that has ended left behind claims to require one until it is used.
    """
    if transforms_active():
        return None
    with torch.enable_grad():
        own = tuple(point.view_as(point) for point in points)
    return own if all(name.requires_grad for name in own) else None


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, create_graph: bool = False
) -> Leaves:
    """``J^T c`` on a kept graph, zeros where nothing depends."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if pairs and inputs:
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            grad_outputs=[c for _, c in pairs],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    return tuple(torch.zeros_like(i) if f is None else f for f, i in zip(found, inputs, strict=True))


def gradient(fn: ScalarFunction, points: Sequence[Tensor], name: str = "the objective") -> Leaves:
    """The gradient of a scalar function of tensors, differentiable again in every mode."""
    if _names(points) is None:
        return torch.func.grad(lambda q: require_scalar(fn(*q), name))(tuple(points))
    value, pull = pullback(lambda *q: (require_scalar(fn(*q), name),), points)
    return pull(torch.ones_like(value[0]))


def push(fn: Map, points: Sequence[Tensor], tangents: Sequence[Tensor], like: Sequence[Tensor]) -> Leaves:
    """``J t``, shaped like ``like``, as the transpose of the pullback: forward mode cannot be nested, this can."""

    def transposed(*cotangents: Tensor) -> Leaves:
        return pullback(fn, points)[1](*cotangents)

    return pullback(transposed, [torch.zeros_like(leaf) for leaf in like])[1](*tangents)
