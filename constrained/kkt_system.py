"""The matrix of a Newton step on the optimality conditions."""

import functools

import scipy.sparse
import torch
from torch import Tensor

from implicit import LinearOperator, tree
from implicit.tree import Tree


class KKTSystem(LinearOperator):
    """``[[H + diag(d) + p I, J^T], [J, -diag(r)]]`` over vectors of shape (n + m,), symmetric and indefinite.

    With p = 0, d = 0, r = 0 this is the matrix of the Newton step on ``grad L = 0, c = 0``. A positive p makes up for
    directions of negative curvature, a positive r for constraints whose gradients depend on each other.

    Args:
        hessian: H, shape (n, n), on vectors, symmetric.
        jacobian: J, shape (m, n), on vectors.
        diagonal: d, shape (n,); zero if None.
        primal_shift: p.
        dual_shift: r, a number or shape (m,).

    Attributes:
        primal: d + p, shape (n,).
        dual: r, shape (m,).
    """

    symmetric = True

    def __init__(
        self,
        hessian: LinearOperator,
        jacobian: LinearOperator,
        *,
        diagonal: Tensor | None = None,
        primal_shift: float = 0.0,
        dual_shift: float | Tensor = 0.0,
    ) -> None:
        self.hessian, self.jacobian = hessian, jacobian
        self.n, self.m = hessian.shape[0], jacobian.shape[0]
        flat = tree.ravel(hessian.like)
        self.primal = (flat.new_zeros(self.n) if diagonal is None else diagonal) + primal_shift
        self.dual = flat.new_zeros(self.m) + dual_shift
        super().__init__(flat.new_zeros(self.n + self.m))

    def split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The primal and the dual part, along the last axis."""
        return v[..., : self.n], v[..., self.n :]

    def mv(self, v: Tree) -> Tree:
        x, y = self.split(v)
        top = self.hessian.flat_mv(x) + self.primal * x + self.jacobian.T.flat_mv(y)
        return torch.cat([top, self.jacobian.flat_mv(x) - self.dual * y])

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += len(rows)
        x, y = self.split(rows)
        top = self.hessian.flat_mm(x) + self.primal * x + self.jacobian.T.flat_mm(y)
        return torch.cat([top, self.jacobian.flat_mm(x) - self.dual * y], dim=1)

    def to_dense(self, chunk: int | None = None) -> Tensor:
        """The matrix, written block by block."""
        matrix = self.like.new_zeros(self.size, self.size)
        jacobian = self.jacobian.to_dense(chunk)
        matrix[: self.n, : self.n] = self.hessian.to_dense(chunk)
        matrix[self.n :, : self.n] = jacobian
        matrix[: self.n, self.n :] = jacobian.T
        matrix.diagonal().add_(torch.cat([self.primal, -self.dual]))
        return matrix

    def to_sparse(self) -> scipy.sparse.csc_array | None:
        """The matrix in scipy's format where both parts are sparse, else None."""
        return self._sparse

    @functools.cached_property
    def _sparse(self) -> scipy.sparse.csc_array | None:
        hessian = self.hessian.to_sparse()
        jacobian = (
            self.jacobian.to_sparse()
            if self.m
            else scipy.sparse.csr_array((0, self.n), dtype=getattr(hessian, "dtype", None))
        )
        if hessian is None or jacobian is None:
            return None
        top = hessian + scipy.sparse.diags_array(self.primal.cpu().numpy())
        corner = -scipy.sparse.diags_array(self.dual.cpu().numpy())
        return scipy.sparse.csc_array(scipy.sparse.block_array([[top, jacobian.T], [jacobian, corner]], format="csc"))
