"""Linear operators on pytrees: products without matrices."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit import tree
from implicit.tree import Tree


class LinearOperator(ABC):
    """A square linear map on trees shaped like ``like``.

    Subclasses write :meth:`mv`; everything else follows. ``symmetric`` and ``positive_definite`` are declarations
    that solvers rely on: CG needs both, and reports an operator that breaks them.

    Attributes:
        like: a tree with the shapes, dtype and device of the domain.
        products: number of products computed so far (a block of k vectors counts k).
    """

    symmetric: bool = False
    positive_definite: bool = False

    def __init__(self, like: Tree) -> None:
        self.like = tree.detach(like)
        self.dtype = tree.common_dtype(self.like, "the operator's domain")
        self.products = 0

    @property
    def size(self) -> int:
        """The dimension n."""
        return tree.size(self.like)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return self.size, self.size

    @property
    def device(self) -> torch.device:
        """The device of the first leaf."""
        own = tree.leaves(self.like)
        return own[0].device if own else torch.device("cpu")

    @abstractmethod
    def mv(self, v: Tree) -> Tree:
        """The product with one tree."""

    def mm(self, vectors: Tree, chunk: int | None = None) -> Tree:
        """Products with k trees: leaves of shape ``(k, *leaf.shape)`` in and out.

        Args:
            vectors: the k trees, stacked on a leading axis.
            chunk: how many to take at a time; all by default. Memory grows with it.
        """
        return tree.unravel(self.flat_mm(tree.ravel_batch(vectors), chunk), self.like)

    def flat_mv(self, vector: Tensor) -> Tensor:
        """The product with a ravelled vector of shape ``(n,)``."""
        self.products += 1
        return tree.ravel(self.mv(tree.unravel(vector, self.like)))

    def flat_mm(self, rows: Tensor, chunk: int | None = None) -> Tensor:
        """Products with the rows of a ``(k, n)`` matrix."""
        if not len(rows):
            return rows
        step = chunk or max(rows.shape[0], 1)
        parts = [self._flat_block(part) for part in torch.split(rows, step)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _flat_block(self, rows: Tensor) -> Tensor:
        return torch.stack([self.flat_mv(row) for row in rows])

    def __matmul__(self, v: Tree) -> Tree:
        """``A @ v`` for one tree.

        Raises:
            ValueError: if a leaf of v has another shape than the domain's.
        """
        aligned = tree.map(lambda _, leaf: leaf, self.like, v)
        for path, own, leaf in zip(tree.paths(self.like), tree.leaves(self.like), tree.leaves(aligned), strict=True):
            if own.shape != leaf.shape:
                raise ValueError(f"v{path} has shape {tuple(leaf.shape)}, the operator acts on {tuple(own.shape)}")
        return tree.unravel(self.flat_mv(tree.ravel(aligned)), self.like)

    @property
    def T(self) -> "LinearOperator":
        """The transpose.

        Raises:
            TypeError: if the operator is not symmetric and has no transpose of its own.
        """
        if self.symmetric:
            return self
        raise TypeError(f"{type(self).__name__} has no transpose; declare it symmetric or use Dense")

    def to_dense(self, chunk: int | None = 64) -> Tensor:
        """The ``(n, n)`` matrix, in the operator's dtype; needs n products and n² numbers."""
        identity = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return self.flat_mm(identity, chunk).T

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` over ravelled numpy vectors."""
        import scipy.sparse.linalg

        make: Any = scipy.sparse.linalg.LinearOperator  # its stub describes the subclassing form only

        def matvec(v: np.ndarray) -> np.ndarray:
            flat = torch.as_tensor(np.ascontiguousarray(v).reshape(-1), dtype=self.dtype, device=self.device)
            return self.flat_mv(flat).detach().cpu().numpy()

        dtype = torch.zeros(0, dtype=self.dtype).numpy().dtype
        return make(self.shape, matvec=matvec, rmatvec=matvec if self.symmetric else None, dtype=dtype)
