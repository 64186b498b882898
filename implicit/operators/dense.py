"""Matrices, and shifts of other operators."""

import torch
from torch import Tensor

from implicit import tree
from implicit.operators.base import LinearOperator
from implicit.tree import Tree


class Dense(LinearOperator):
    """A matrix as an operator, acting on ravelled trees.

    Args:
        matrix: shape ``(n, n)``.
        like: the domain; one vector of length n by default.
    """

    def __init__(
        self, matrix: Tensor, like: Tree = None, *, symmetric: bool = True, positive_definite: bool = True
    ) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {tuple(matrix.shape)}")
        super().__init__(matrix.new_zeros(matrix.shape[0]) if like is None else like)
        if self.size != matrix.shape[0]:
            raise ValueError(f"like has {self.size} entries, the matrix {matrix.shape[0]} rows; they must agree")
        self.matrix = matrix
        self.symmetric = symmetric
        self.positive_definite = positive_definite and symmetric

    def mv(self, v: Tree) -> Tree:
        return tree.unravel(self.matrix @ tree.ravel(v), self.like)

    def flat_mv(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        return rows @ self.matrix.T

    @property
    def T(self) -> LinearOperator:
        return self if self.symmetric else Dense(self.matrix.T, self.like, symmetric=False)


class Shifted(LinearOperator):
    """``A + shift * I``: damping, or the mass of a proximal term."""

    def __init__(self, operator: LinearOperator, shift: float) -> None:
        super().__init__(operator.like)
        self.operator = operator
        self.shift = shift
        self.symmetric = operator.symmetric
        self.positive_definite = operator.positive_definite and shift >= 0

    def mv(self, v: Tree) -> Tree:
        return tree.axpy(self.shift, v, self.operator.mv(v))

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        return torch.add(self.operator.flat_mm(rows), rows, alpha=self.shift)

    def flat_mv(self, vector: Tensor) -> Tensor:
        self.products += 1
        return torch.add(self.operator.flat_mv(vector), vector, alpha=self.shift)

    @property
    def T(self) -> LinearOperator:
        return self if self.symmetric else Shifted(self.operator.T, self.shift)
