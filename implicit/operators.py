"""Linear operators on pytrees: products without matrices."""

from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from implicit import tree
from implicit.derivatives import GradientGraph, ScalarFunction, value_and_gradient
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


class Hessian(LinearOperator):
    """:math:`\\nabla^2 \\mathrm{fn}(y)`, with its primal pass kept: each product is one backward pass.

    Example:
        >>> import torch, implicit
        >>> H = implicit.Hessian(lambda y: (y**4).sum() / 12, torch.tensor([1.0, 2.0]))
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])
    """

    symmetric = True

    def __init__(self, fn: ScalarFunction, y: Tree, *, positive_definite: bool = True) -> None:
        self._attach(GradientGraph(lambda _, q: fn(q), (), y, "the objective"), positive_definite)

    @classmethod
    def of(cls, graph: GradientGraph, *, positive_definite: bool = True) -> Self:
        """The Hessian in y of a graph that already exists; nothing is evaluated."""
        operator = cls.__new__(cls)
        operator._attach(graph, positive_definite)
        return operator

    def _attach(self, graph: GradientGraph, positive_definite: bool) -> None:
        super().__init__(graph.y)
        self.graph = graph
        self.positive_definite = positive_definite

    @property
    def value(self) -> Tensor:
        """The objective where the Hessian was taken."""
        return self.graph.value

    @property
    def gradient(self) -> Tree:
        """The gradient where the Hessian was taken."""
        return self.graph.gradient

    def mv(self, v: Tree) -> Tree:
        return self.graph.hvp(v)

    def _flat_block(self, rows: Tensor) -> Tensor:
        if rows.shape[0] == 1:
            return self.flat_mv(rows[0])[None]
        self.products += rows.shape[0]
        return tree.ravel_batch(self.graph.hvp_batch(tree.unravel(rows, self.like)))


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


class GradientDifference(LinearOperator):
    """The Hessian from central differences of gradients: for objectives whose backward pass cannot be differentiated.

    Args:
        fn: a scalar function of one tree.
        y: where.

    Each product costs two gradients and is accurate to about ``eps^(2/3)`` relative.
    """

    symmetric = True

    def __init__(self, fn: ScalarFunction, y: Tree) -> None:
        super().__init__(y)
        self._fn = fn
        # Central differences balance truncation h^2 against rounding eps / h.
        self._width = float(torch.finfo(self.dtype).eps) ** (1 / 3) * (1.0 + float(tree.norm(self.like)))

    def mv(self, v: Tree) -> Tree:
        norm = tree.norm(v)
        h = self._width / torch.where(norm > 0, norm, 1.0)
        _, ahead = value_and_gradient(self._fn, tree.axpy(h, v, self.like))
        _, behind = value_and_gradient(self._fn, tree.axpy(-h, v, self.like))
        return tree.scale(0.5 / h, tree.sub(ahead, behind))
