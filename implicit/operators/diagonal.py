"""The identity and diagonal matrices."""

from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.operators.base import LinearOperator
from implicit.operators.sparse import sparse_diagonal
from implicit.tree import Tree


class Identity(LinearOperator):
    """The identity on trees shaped like ``like``.

    Example:
        >>> import torch, implicit
        >>> (2 * implicit.Identity(torch.zeros(2))) @ torch.tensor([1.0, 2.0])
        tensor([2., 4.])
    """

    symmetric = True
    positive_definite = True

    def mv(self, v: Tree) -> Tree:
        return tree.clone(v)  # a product never shares the memory of its argument

    def to_sparse(self) -> Any:
        return sparse_diagonal(torch.ones(self.size, dtype=self.dtype))

    def flat_mv(self, vector: Tensor) -> Tensor:
        self.products += 1
        return vector.clone()

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        return rows.clone()


class Diagonal(LinearOperator):
    """``diag(d)``; positive definite where every entry is positive, which is looked at once.

    Args:
        diagonal: d, a tree of entries shaped like the domain.

    Example:
        >>> import torch, implicit
        >>> implicit.Diagonal({"a": torch.tensor([1.0, 2.0])}) @ {"a": torch.ones(2)}
        {'a': tensor([1., 2.])}
    """

    symmetric = True

    def __init__(self, diagonal: Tree) -> None:
        super().__init__(diagonal)
        self.diagonal = self.like
        self._flat = tree.ravel(self.like)
        self.positive_definite = bool((self._flat > 0).all())

    def mv(self, v: Tree) -> Tree:
        return tree.map(torch.mul, self.diagonal, v)

    def to_sparse(self) -> Any:
        return sparse_diagonal(self._flat)

    def flat_mv(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self._flat * vector

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        return self._flat * rows
