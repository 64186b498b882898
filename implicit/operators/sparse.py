"""Sparse matrices as operators."""

import warnings
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from implicit import tree
from implicit.operators.base import LinearOperator
from implicit.tree import Tree

SYMMETRIC = 16.0
"""Entries that differ from their mirror images by fewer roundings of the largest one count as equal."""


class Sparse(LinearOperator):
    """A sparse matrix as an operator, acting on ravelled trees.

    Products run on the device of the matrix, in compressed rows: one call for any number of vectors. Solvers that
    factorise (:class:`SparseLU`) take the matrix from :meth:`to_sparse`, as they do from sums, multiples, shifts and
    products of such operators.

    Args:
        matrix: shape ``(m, n)``, a ``scipy.sparse`` matrix or array (which goes to the device of ``like``, the CPU by
            default), or a sparse torch tensor (COO, CSR, CSC; it stays on its device). float32 or float64. It is
            copied; repeated entries add up.
        symmetric: whether it equals its transpose; None looks, up to rounding.
        positive_definite: a declaration that solvers rely on; implies ``symmetric``.
        like: the domain; one vector of length n by default.
        out: the range; one vector of length m by default, or the domain itself if the matrix is square.

    Attributes:
        matrix: the matrix as a torch tensor in CSR layout.

    Raises:
        TypeError: if ``matrix`` is not sparse, or holds neither float32 nor float64 numbers.
        ValueError: if the spaces do not have its sizes, or one that is not square is declared symmetric.

    Example:
        >>> import scipy.sparse, torch, implicit
        >>> A = implicit.Sparse(scipy.sparse.csr_array([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> A @ torch.tensor([1.0, 1.0, 5.0], dtype=torch.float64), (A.T @ A).to_sparse().nnz
        (tensor([2., 1.], dtype=torch.float64), 2)
    """

    def __init__(
        self,
        matrix: Any,
        *,
        symmetric: bool | None = None,
        positive_definite: bool = False,
        like: Tree = None,
        out: Tree = None,
    ) -> None:
        host = None
        if not isinstance(matrix, Tensor):
            host, matrix = _from_scipy(matrix, None if like is None else tree.leaves(like))
        self.matrix = _compressed(matrix)
        rows, columns = self.matrix.shape
        if rows != columns and (symmetric or positive_definite):
            raise ValueError(f"matrix of shape {(rows, columns)} is declared symmetric; it must be square")
        if out is None and rows != columns:
            out = self.matrix.values().new_zeros(rows)
        super().__init__(self.matrix.values().new_zeros(columns) if like is None else like, out)
        if self.shape != (rows, columns):
            raise ValueError(
                f"like has {self.size} entries and out {self.shape[0]}, the matrix {columns} columns and {rows} rows; "
                "they must agree"
            )
        if self.dtype != self.matrix.dtype:
            raise ValueError(f"the matrix has dtype {self.matrix.dtype}, like {self.dtype}; convert one of them")
        self._host: scipy.sparse.csr_array | None = host
        self._turned: Sparse | None = None
        if symmetric is None and not positive_definite:
            symmetric = rows == columns and out is None and _mirrored(self.to_sparse())
        self.symmetric = positive_definite or bool(symmetric)
        self.positive_definite = positive_definite

    @property
    def held_bytes(self) -> int:
        """The entries and their places."""
        parts = (self.matrix.values(), self.matrix.col_indices(), self.matrix.crow_indices())
        return sum(part.numel() * part.element_size() for part in parts)

    def mv(self, v: Tree) -> Tree:
        return tree.unravel(self.matrix @ tree.ravel(v), self.out)

    def flat_mv(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        return (self.matrix @ rows.T).T

    @property
    def T(self) -> LinearOperator:
        if self.symmetric:
            return self
        if self._turned is None:
            turned = Sparse(self.matrix.t(), symmetric=False, like=self.out, out=self.like)
            self._turned, turned._turned = turned, self
        return self._turned

    def to_dense(self, chunk: int | None = None) -> Tensor:
        """The ``(m, n)`` matrix with its zeros; costs no product."""
        return self.matrix.to_dense()

    def to_sparse(self) -> scipy.sparse.csr_array:
        """The matrix as a ``scipy.sparse.csr_array`` in host memory; do not write into it."""
        if self._host is None:
            parts = (self.matrix.values(), self.matrix.col_indices(), self.matrix.crow_indices())
            self._host = scipy.sparse.csr_array(tuple(part.cpu().numpy() for part in parts), shape=self.shape)
        return self._host

    def diagonal(self) -> Tree:
        """The diagonal of a square matrix, as a tree like the domain: what Jacobi preconditioners divide by.

        Raises:
            ValueError: if the matrix is not square.
        """
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"the matrix has shape {self.shape}; only a square one has a diagonal here")
        values = torch.as_tensor(np.array(self.to_sparse().diagonal()), device=self.device)
        return tree.unravel(values, self.like)


def sparse_diagonal(values: Tensor) -> scipy.sparse.csr_array | None:
    """``diag(values)`` in host memory; None in half precision, which scipy does not have."""
    if values.dtype not in (torch.float32, torch.float64):
        return None
    return scipy.sparse.csr_array(scipy.sparse.diags_array(values.cpu().numpy()))


def _from_scipy(matrix: Any, leaves: list[Tensor] | None) -> tuple[scipy.sparse.csr_array, Tensor]:
    """A copy in compressed rows, and the same as a torch tensor."""
    if not scipy.sparse.issparse(matrix):
        raise TypeError(f"matrix must be a scipy.sparse or a sparse torch matrix, got {type(matrix).__name__}")
    host = scipy.sparse.csr_array(matrix, copy=True)
    host.sum_duplicates()
    if host.ndim != 2:
        raise ValueError(f"matrix must have two axes, got shape {host.shape}")
    if host.dtype not in (np.float32, np.float64):
        raise TypeError(f"matrix has dtype {host.dtype}; convert it to float32 or float64")
    device = leaves[0].device if leaves else None
    parts = [torch.as_tensor(part, device=device) for part in (host.indptr, host.indices, host.data)]
    return host, _csr(*parts, size=host.shape)


def _csr(*parts: Tensor, size: Any) -> Tensor:
    with warnings.catch_warnings():  # that the layout is in beta state
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(*parts, size=size)


def _compressed(matrix: Tensor) -> Tensor:
    """A sparse tensor in CSR layout, with each entry once."""
    if matrix.layout is torch.strided:
        raise TypeError("matrix is a dense tensor; wrap it as implicit.Dense, or give matrix.to_sparse()")
    if matrix.ndim != 2:
        raise ValueError(f"matrix must have two axes, got shape {tuple(matrix.shape)}")
    if matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"matrix has dtype {matrix.dtype}; convert it to float32 or float64")
    with warnings.catch_warnings():  # that the layout is in beta state
        warnings.simplefilter("ignore")
        return matrix.detach().to_sparse_csr()


def _mirrored(matrix: scipy.sparse.csr_array) -> bool:
    """Whether a square matrix is its own transpose up to rounding."""
    if not matrix.nnz:
        return True
    gap = abs(matrix - matrix.T)
    return bool(gap.max() <= SYMMETRIC * np.finfo(matrix.dtype).eps * abs(matrix).max())
