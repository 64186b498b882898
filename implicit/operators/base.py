"""Linear operators on pytrees: products without matrices."""

from abc import ABC, abstractmethod
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from implicit import tree
from implicit.tree import Tree


class LinearOperator(ABC):
    """A linear map from trees shaped like ``like`` to trees shaped like ``out``, a matrix of shape ``(m, n)``.

    Subclasses write :meth:`mv`; everything else follows, except the transpose of an operator that is not symmetric.
    ``symmetric`` and ``positive_definite`` are declarations that solvers rely on: CG needs both, and reports an
    operator that breaks them.

    ``A @ v`` is the product with a tree, or with k trees stacked on a leading axis of every leaf; ``A @ B``, ``A + B``,
    ``A - B``, ``2 * A``, ``A / 2`` and ``-A`` are operators again.

    Args:
        like: a tree with the shapes, dtype and device of the domain.
        out: the same for the range; the domain itself by default.

    Attributes:
        like: the domain, detached.
        out: the range, detached.
        size: n, the dimension of the domain.
        shape: ``(m, n)``.
        dtype: of every leaf of the domain and the range.
        products: number of products computed so far (a block of k vectors counts k).

    Raises:
        ValueError: if the leaves of the domain and the range mix dtypes.
    """

    symmetric: bool = False
    positive_definite: bool = False

    def __init__(self, like: Tree, out: Tree = None) -> None:
        self.like = tree.detach(like)
        self.out = self.like if out is None else tree.detach(out)
        self.dtype = tree.common_dtype(self.like, "the operator's domain")
        if out is not None and tree.common_dtype(self.out, "the operator's range") != self.dtype:
            raise ValueError(
                f"the operator's domain has dtype {self.dtype}, its range {tree.common_dtype(self.out)}; "
                "convert one to the dtype of the other"
            )
        self.size = tree.size(self.like)
        self.shape = (self.size if out is None else tree.size(self.out), self.size)
        self.products = 0

    @property
    def device(self) -> torch.device:
        """The device of the first leaf of the domain."""
        own = tree.leaves(self.like)
        return own[0].device if own else torch.device("cpu")

    @property
    def held_bytes(self) -> int:
        """About how much memory the operator keeps between products, beside its domain."""
        return 0

    @abstractmethod
    def mv(self, v: Tree) -> Tree:
        """The product with one tree, whose dicts have the domain's key order."""

    def mm(self, vectors: Tree, chunk: int | None = None) -> Tree:
        """Products with k trees: leaves of shape ``(k, *leaf.shape)`` in and out.

        Args:
            vectors: the k trees, stacked on a leading axis.
            chunk: how many to take at a time at most; the operator's own choice by default. Memory grows with it.

        Raises:
            ValueError: if the leaves are not stacked trees of the domain, or ``chunk`` is not positive.
        """
        found = self._lead(vectors)
        if found is None or len(found[1]) != 1:
            raise ValueError(f"mm takes k trees like {tree.describe(self.like)}, each with a leading axis of length k")
        return self._tree_mm(found[0], _checked(chunk))

    def _tree_mm(self, vectors: Tree, chunk: int | None) -> Tree:
        return tree.unravel(self.flat_mm(tree.ravel_batch(vectors), chunk), self.out)

    def flat_mv(self, vector: Tensor) -> Tensor:
        """The product with a ravelled vector of shape ``(n,)``; shape ``(m,)``."""
        self.products += 1
        return tree.ravel(self.mv(tree.unravel(vector, self.like)))

    def flat_mm(self, rows: Tensor, chunk: int | None = None) -> Tensor:
        """Products with the rows of a ``(k, n)`` matrix; shape ``(k, m)``.

        Raises:
            ValueError: if ``chunk`` is not positive.
        """
        if not len(rows):
            return rows.new_zeros(0, self.shape[0])
        parts = [self._flat_block(part) for part in torch.split(rows, _checked(chunk) or len(rows))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _flat_block(self, rows: Tensor) -> Tensor:
        return torch.stack([self.flat_mv(row) for row in rows])

    def _lead(self, v: Tree) -> tuple[Tree, tuple[int, ...]] | None:
        """``v`` with the key order of the domain, and its leading axes: ``()``, or ``(k,)`` for k stacked trees."""
        aligned = tree.map(lambda _, leaf: leaf, self.like, v)
        leads = {_extra(own, leaf) for own, leaf in zip(tree.leaves(self.like), tree.leaves(aligned), strict=True)}
        lead = leads.pop() if leads else ()
        return None if leads or lead is None or len(lead) > 1 else (aligned, lead)

    @overload
    def __matmul__(self, v: "LinearOperator") -> "LinearOperator": ...
    @overload
    def __matmul__(self, v: Tree) -> Tree: ...
    def __matmul__(self, v: Any) -> Any:
        """``A @ v`` for one tree, for k trees stacked on a leading axis of every leaf, or for another operator.

        Raises:
            ValueError: if a leaf of v has another shape than the domain's.
        """
        if isinstance(v, LinearOperator):
            from implicit.operators.sums import Product

            return Product(self, v)
        found = self._lead(v)
        if found is None:
            raise ValueError(
                f"v is {tree.describe(v)}; the operator acts on {tree.describe(self.like)}, or on k of them stacked on "
                "a leading axis of every leaf"
            )
        aligned, lead = found
        if lead:
            return self._tree_mm(aligned, None)
        self.products += 1
        return self.mv(aligned)

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        from implicit.operators.sums import Sum

        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        return self + (-other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, alpha: float) -> "LinearOperator":
        from implicit.operators.sums import Scaled

        return Scaled(alpha, self)

    __rmul__ = __mul__

    def __truediv__(self, alpha: float) -> "LinearOperator":
        return self * (1.0 / alpha)

    def __neg__(self) -> "LinearOperator":
        return self * -1.0

    @property
    def T(self) -> "LinearOperator":
        """The transpose.

        Raises:
            TypeError: if the operator is not symmetric and has no transpose of its own.
        """
        if self.symmetric:
            return self
        raise TypeError(f"{type(self).__name__} has no transpose; declare it symmetric or use Dense")

    def to_dense(self, chunk: int | None = None) -> Tensor:
        """The ``(m, n)`` matrix, in the operator's dtype; needs n products and m n numbers."""
        identity = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return self.flat_mm(identity, chunk).T

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` over ravelled numpy vectors.

        It has ``rmatvec`` where there is a transpose; blocks of vectors go through :meth:`flat_mm`.
        """
        import scipy.sparse.linalg

        make: Any = scipy.sparse.linalg.LinearOperator  # its stub describes the subclassing form only

        def vectors(operator: LinearOperator) -> Any:
            def matvec(v: np.ndarray) -> np.ndarray:
                return operator.flat_mv(self._from_numpy(v.reshape(-1))).detach().cpu().numpy()

            return matvec

        def blocks(operator: LinearOperator) -> Any:
            def matmat(columns: np.ndarray) -> np.ndarray:
                return operator.flat_mm(self._from_numpy(columns.T)).T.detach().cpu().numpy()

            return matmat

        try:
            turned = self.T
        except TypeError:
            reverse: dict[str, Any] = {}
        else:
            reverse = {"rmatvec": vectors(turned), "rmatmat": blocks(turned)}
        dtype = torch.zeros(0, dtype=self.dtype).numpy().dtype
        return make(self.shape, matvec=vectors(self), matmat=blocks(self), dtype=dtype, **reverse)

    def to_sparse(self) -> Any:
        """The matrix as a ``scipy.sparse.csr_array`` in host memory; None for an operator that is not made of sparse
        matrices. Do not write into it."""
        return None

    def _from_numpy(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(values), dtype=self.dtype, device=self.device)


def _checked(chunk: int | None) -> int | None:
    if chunk is not None and not chunk >= 1:
        raise ValueError(f"chunk must be None or at least 1, got {chunk}")
    return chunk


def _extra(own: Tensor, leaf: Any) -> tuple[int, ...] | None:
    """The axes ``leaf`` has before those of ``own``, or None if it is not such a stack."""
    if not isinstance(leaf, Tensor) or leaf.dtype != own.dtype or leaf.ndim < own.ndim:
        return None
    extra = leaf.ndim - own.ndim
    return tuple(leaf.shape[:extra]) if leaf.shape[extra:] == own.shape else None


def aligned_spaces(first: Tree, second: Tree, name: str) -> bool:
    """Whether two spaces are the same down to the order of dict keys, so that ravelled vectors agree.

    Raises:
        ValueError: if the structures, the shapes or the dtypes differ.
    """
    spec = tree.structure(first)
    other = tree.aligned_leaves(second, spec)
    for own, leaf in zip(tree.leaves(first), other, strict=True):
        if own.shape != leaf.shape or own.dtype != leaf.dtype:
            raise ValueError(f"{name} differ: {tree.describe(first)} and {tree.describe(second)}")
    return tree.structure(second) == spec
