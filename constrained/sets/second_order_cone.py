"""The second-order cone."""

from dataclasses import dataclass

import torch

from constrained.sets.base import ConvexSet, compute_dtype
from implicit import tree
from implicit.tree import Tree


@dataclass(frozen=True)
class SecondOrderCone(ConvexSet):
    """The second-order (Lorentz) cone, ``C = {(z, t) : ||z||_2 <= t}``.

    A point is a tuple or list of two: z, any tree of tensors under one norm, and t, a tensor with one entry.

    Example:
        >>> SecondOrderCone().project((torch.tensor([3.0, 4.0]), torch.tensor(0.0)))
        (tensor([1.5000, 2.0000]), tensor(2.5000))
    """

    def project(self, point: Tree) -> Tree:
        """``argmin_{||p|| <= s} ||(p, s) - (z, t)||_2``.

        The point itself where ``||z|| <= t``, the origin where ``||z|| <= -t``, and elsewhere
        ``a (z / ||z||, 1)`` with ``a = (||z|| + t) / 2``; there, with ``n = z / ||z||``, the derivative is
        ``1/2 [[(1 + t / ||z||) I - t / ||z|| n n', n], [n', 1]]``. On the cone, its boundary and its apex it is taken
        as the identity, on the negative of the cone as zero. The norm is scaled against overflow and accumulates
        bf16/fp16 in float32. A NaN or an infinity anywhere makes every leaf NaN. See :meth:`ConvexSet.project`.
        """
        self.check(point, "point")
        values, spec = tree.flatten(point)
        dtype = compute_dtype(values)
        largest = tree.max_abs([v.detach() for v in values])
        largest = torch.where(largest > 0, largest, 1.0)  # a NaN shows up in the norm
        *z, t = (v.to(dtype) / largest.to(v.device) for v in values)  # entries in [-1, 1]
        height = t.sum().to(largest.device)
        squared = torch.stack([u.square().sum().to(largest.device) for u in z] + [torch.zeros_like(height)]).sum()
        apart = squared != 0  # true for NaN
        norm = torch.where(apart, squared, 1.0).sqrt()  # the inner where avoids sqrt'(0) = inf
        length = torch.where(apart, norm, 0.0)
        middle = largest * (length + height) / 2
        moved = [(middle / norm).to(u.device) * u for u in z] + [middle.to(t.device).expand(t.shape)]
        inside, opposite = length <= height, length <= -height
        moved = [torch.where(opposite.to(v.device), 0.0, m).to(v.dtype) for m, v in zip(moved, values, strict=True)]
        return tree.where(~inside, tree.unflatten(moved, spec), point)

    def check(self, point: Tree, name: str) -> None:
        """See :meth:`ConvexSet.check`; the point must be a pair (z, t) with one entry in t."""
        if not isinstance(point, (tuple, list)) or len(point) != 2:
            raise ValueError(f"SecondOrderCone needs a pair (z, t), but {name} is {tree.describe(point)}: give a tuple")
        super().check(point, name)
        t = point[1]
        if not isinstance(t, torch.Tensor) or t.numel() != 1:
            raise ValueError(
                f"SecondOrderCone needs one entry in t, but {name}[1] is {tree.describe(t)}: give a tensor of shape ()"
            )
