"""Sparse matrices of fixed pattern, and affine maps, for batches of values."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AffineMap:
    """``theta -> constant + coefficients theta`` for a batch of rows theta, as a list of nonzeros."""

    constant: Tensor  # (k,)
    rows: Tensor
    columns: Tensor
    coefficients: Tensor

    def __call__(self, theta: Tensor) -> Tensor:
        """The values, ``(batch, k)``."""
        return self.constant + self.linear(theta)

    def linear(self, theta: Tensor) -> Tensor:
        """Without the constant."""
        terms = self.coefficients * theta[:, self.columns]
        return theta.new_zeros(len(theta), len(self.constant)).index_add(1, self.rows, terms)

    def pull(self, cotangent: Tensor, size: int) -> Tensor:
        """The transpose of the linear part, ``(batch, k) -> (batch, size)``."""
        terms = self.coefficients * cotangent[:, self.rows]
        return cotangent.new_zeros(len(cotangent), size).index_add(1, self.columns, terms)


@dataclass(frozen=True)
class Pattern:
    """Rows and columns of the nonzeros of a sparse matrix."""

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    def product(self, values: Tensor, v: Tensor) -> Tensor:
        """``M v`` for rows of values and of v."""
        return v.new_zeros(len(v), self.shape[0]).index_add(1, self.rows, values * v[:, self.columns])

    def transposed_product(self, values: Tensor, v: Tensor) -> Tensor:
        """``M' v``."""
        return v.new_zeros(len(v), self.shape[1]).index_add(1, self.columns, values * v[:, self.rows])
