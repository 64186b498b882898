"""Hessians of many small problems at once."""

from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.derivatives import require_scalar
from implicit.operators.hessian import Hessian
from implicit.tree import Tree


class BlockHessian(Hessian):
    """The block-diagonal Hessian of ``sum_i fn(y_i, data_i)`` on trees stacked along a leading axis of b blocks.

    The objective is mapped over the blocks once and the sum is differentiated: a product for all blocks is one backward
    pass, without a loop and without nested transforms. Blocks of unequal size need padding, and a mask in ``data``.

    Args:
        fn: a scalar function of one block ``y_i`` and, if there are data, of ``data_i``.
        y: the blocks, leaves of shape ``(b, *leaf.shape)``.
        data: a tree whose leaves are stacked in the same way.
        order, expected_products, positive_definite, block_bytes: as for :class:`Hessian`.

    Attributes:
        count: b.

    Raises:
        ValueError: if the leaves of y and data do not share their first axis, or fn is not scalar.

    Example:
        >>> import torch, implicit
        >>> scales, y = torch.tensor([1.0, 10.0]), torch.ones(2, 3)
        >>> H = implicit.BlockHessian(lambda y, s: s * (y**2).sum() / 2, y, scales)
        >>> H @ torch.ones(2, 3)
        tensor([[ 1.,  1.,  1.],
                [10., 10., 10.]])
        >>> H.blocks().shape
        torch.Size([2, 3, 3])
    """

    def __init__(self, fn: Any, y: Tree, data: Tree = None, **options: Any) -> None:
        leading = {leaf.shape[0] if leaf.ndim else None for leaf in tree.leaves((y, data)) if isinstance(leaf, Tensor)}
        if len(leading) != 1 or None in leading:
            raise ValueError(
                f"y and data must be stacked along one first axis; y is {tree.describe(y)}"
                + ("" if data is None else f", data is {tree.describe(data)}")
            )
        self.count = int(leading.pop() or 0)

        def total(point: Tree) -> Tensor:
            arguments = (point,) if data is None else (point, data)
            return torch.func.vmap(lambda *block: require_scalar(fn(*block), "fn"))(*arguments).sum()

        super().__init__(total, y, **options)

    def blocks(self) -> Tensor:
        """The dense blocks, shape ``(b, d, d)``, in the ravelled order of one block: d products for all of them."""
        b = self.count
        one = tree.map(lambda leaf: leaf[0] if b else leaf.new_empty(leaf.shape[1:]), self.like)
        d = tree.size(one)
        identity = torch.eye(d, dtype=self.dtype, device=self.device)
        directions = tree.map(
            lambda leaf, own: leaf[:, None].expand(d, b, *own.shape), tree.unravel(identity, one), one
        )
        columns = self.mm(directions)  # leaves (d, b, ...)
        flat = torch.cat(
            [leaf.reshape(d, b, -1) for leaf in tree.leaves(columns) if leaf.numel()] or [identity.new_zeros(d, b, 0)],
            dim=2,
        )
        return flat.permute(1, 2, 0)
