"""Euclidean balls."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from constrained.sets.base import (
    Bound,
    ConvexSet,
    Gaps,
    check_fit,
    check_positive,
    check_scalar,
    check_values,
    compute_dtype,
    spread,
)
from implicit import tree
from implicit.tree import Tree


@dataclass(frozen=True, eq=False)
class Ball(ConvexSet):
    """A Euclidean ball, ``C = {p : ||p - center||_2 <= radius}`` with ONE norm over all leaves together.

    Args:
        radius: a positive finite number, or a tensor of shape ``()`` with the dtype and device of the point.
        center: ``None`` for the origin, or finite values given like the bounds of :class:`Box`.

    Raises:
        TypeError: if ``radius`` is not a number or a float scalar, or an entry of ``center`` not a number, a float
            tensor or None.
        ValueError: if ``radius`` is not positive and finite, or ``center`` not finite.
    """

    radius: float | Tensor
    center: Bound = None

    def __post_init__(self) -> None:
        radius = self.radius
        check_positive("Ball.radius", check_scalar("Ball.radius", radius) if isinstance(radius, Tensor) else radius)
        check_values("Ball.center", self.center, (math.inf, -math.inf), "give finite values, or None for the origin")

    def project(self, point: Tree) -> Tree:
        """``argmin_{||p - center|| <= radius} ||p - point||_2 = center + min(1, radius / ||d||) d``.

        Here ``d = point - center``. Inside, the center included, the point comes back unchanged and the derivative is
        the identity; outside, with ``n = d / ||d||``, it is ``radius / ||d|| (I - n n')``. The norm is scaled against
        overflow and accumulates bf16/fp16 in float32. A NaN or an infinity anywhere makes every leaf NaN. ``radius``
        and ``center`` receive gradients where they are tensors that require them.
        See :meth:`ConvexSet.project`.
        """
        self.check(point, "point")
        values, spec = tree.flatten(point)
        if not tree.size(point):
            return point
        dtype = compute_dtype(values)
        centers = [0.0 if c is None else c for c in spread("Ball.center", self.center, point, "point")]
        offsets = [v.to(dtype) - c for v, c in zip(values, centers, strict=True)]
        largest = tree.max_abs([d.detach() for d in offsets])
        largest = torch.where(largest > 0, largest, 1.0)  # a NaN shows up in `squared`
        units = [d / largest.to(d.device) for d in offsets]  # entries in [-1, 1]
        squared = torch.stack([u.square().sum().to(largest.device) for u in units]).sum()
        outside = ~(squared <= (self.radius / largest).square())  # true for NaN
        factor = self.radius / torch.where(outside, squared, 1.0).sqrt()  # the inner where avoids sqrt'(0) = inf
        moved = [(c + factor.to(u.device) * u).to(v.dtype) for v, c, u in zip(values, centers, units, strict=True)]
        return tree.where(outside, tree.unflatten(moved, spec), point)

    def check(self, point: Tree, name: str) -> None:
        """See :meth:`ConvexSet.check`; the center must broadcast to the leaves and have their dtype and device."""
        super().check(point, name)
        check_fit("Ball.center", self.center, point, name)
        check_fit("Ball.radius", self.radius, point, name)

    def _gaps(self, point: Tree, projected: Tree) -> Gaps:
        return [(tree.norm(tree.sub(point, projected)), tree.norm(projected).clamp(min=self.radius))]
