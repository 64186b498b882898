"""Matrices, and shifts of other operators."""

from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.operators.base import LinearOperator, aligned_spaces
from implicit.operators.sparse import sparse_diagonal
from implicit.tree import Tree


class Dense(LinearOperator):
    """A matrix as an operator, acting on ravelled trees.

    Args:
        matrix: shape ``(m, n)``.
        like: the domain; one vector of length n by default.
        out: the range; one vector of length m by default, or the domain itself if the matrix is square.
        symmetric: a declaration that solvers rely on; square matrices are taken to be symmetric unless told.
        positive_definite: the same.

    Raises:
        ValueError: if ``matrix`` is no matrix, the spaces do not have its sizes, or one that is not square is declared
            symmetric.

    Example:
        >>> import torch, implicit
        >>> A = implicit.Dense(torch.tensor([[1.0, 2.0, 0.0]]))
        >>> A.shape, A @ torch.ones(3), A.T @ torch.ones(1)
        ((1, 3), tensor([3.]), tensor([1., 2., 0.]))
    """

    def __init__(
        self,
        matrix: Tensor,
        like: Tree = None,
        out: Tree = None,
        *,
        symmetric: bool | None = None,
        positive_definite: bool = True,
    ) -> None:
        if matrix.ndim != 2:
            raise ValueError(f"matrix must have two axes, got shape {tuple(matrix.shape)}")
        rows, columns = matrix.shape
        if symmetric and rows != columns:
            raise ValueError(f"matrix of shape {tuple(matrix.shape)} is declared symmetric; it must be square")
        if out is None and rows != columns:
            out = matrix.new_zeros(rows)
        super().__init__(matrix.new_zeros(columns) if like is None else like, out)
        if self.size != columns:
            raise ValueError(f"like has {self.size} entries, the matrix {columns} columns; they must agree")
        if self.shape[0] != rows:
            raise ValueError(f"out has {self.shape[0]} entries, the matrix {rows} rows; they must agree")
        self.matrix = matrix
        self.symmetric = rows == columns and out is None if symmetric is None else symmetric
        self.positive_definite = positive_definite and self.symmetric

    def mv(self, v: Tree) -> Tree:
        return tree.unravel(self.matrix @ tree.ravel(v), self.out)

    def flat_mv(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        return rows @ self.matrix.T

    @property
    def T(self) -> LinearOperator:
        return self if self.symmetric else Dense(self.matrix.T, self.out, self.like, symmetric=False)


class Shifted(LinearOperator):
    """``A + shift * I``: damping, or the mass of a proximal term.

    Args:
        operator: A, square.
        shift: a number.

    Raises:
        ValueError: if A is not square.
    """

    def __init__(self, operator: LinearOperator, shift: float) -> None:
        if operator.out is not operator.like and not aligned_spaces(
            operator.like, operator.out, "the domain and the range of a shifted operator"
        ):
            raise ValueError("the domain and the range of a shifted operator must order their keys alike")
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

    def to_sparse(self) -> Any:
        matrix = self.operator.to_sparse()
        if matrix is None:
            return None
        return matrix + sparse_diagonal(torch.full((self.size,), self.shift, dtype=self.dtype))

    @property
    def T(self) -> LinearOperator:
        return self if self.symmetric else Shifted(self.operator.T, self.shift)
