"""Reverse-mode products that can be differentiated again in whatever mode is active.

Without ``torch.func`` transforms an ordinary autograd graph is used: it is cheaper, and it works for modules that
refuse the transforms. Under a transform the same product is written with ``torch.func.vjp``.
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
    if transforms_active():
        value, pull = vjp(fn, *points)
        return value, lambda *cotangents: pull(tuple(cotangents))
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Fresh names: what the points themselves depend on is held fixed.
        own = tuple(_alias(point) for point in points)
        value = fn(*own)
    return value, lambda *cotangents: gradients(value, own, cotangents, create_graph=again)


def _alias(point: Tensor) -> Tensor:
    alias = point.view_as(point)
    return alias if alias.requires_grad else alias.requires_grad_()


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
    if transforms_active():
        return torch.func.grad(lambda q: require_scalar(fn(*q), name))(tuple(points))
    value, pull = pullback(lambda *q: (require_scalar(fn(*q), name),), points)
    return pull(torch.ones_like(value[0]))


def push(fn: Map, points: Sequence[Tensor], tangents: Sequence[Tensor], like: Sequence[Tensor]) -> Leaves:
    """``J t``, shaped like ``like``, as the transpose of the pullback: forward mode cannot be nested, this can."""

    def transposed(*cotangents: Tensor) -> Leaves:
        return pullback(fn, points)[1](*cotangents)

    return pullback(transposed, [torch.zeros_like(leaf) for leaf in like])[1](*tangents)
