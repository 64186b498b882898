"""Operators on top of each other."""

from collections.abc import Sequence
from typing import Any

import scipy.sparse
import torch
from torch import Tensor

from implicit import Dense, LinearOperator, Sparse, tree
from implicit.tree import Tree


class Stacked(LinearOperator):
    """``[A_1; A_2; ...]`` over one domain of vectors, for rows that have different owners.

    Args:
        parts: operators from vectors of the same size, to vectors.

    Raises:
        ValueError: if there is none, or their domains differ in size.
    """

    def __init__(self, parts: Sequence[LinearOperator]) -> None:
        if len({part.shape[1] for part in parts}) != 1:
            raise ValueError(f"stacked operators need one domain, got sizes {[part.shape[1] for part in parts]}")
        self.parts = tuple(parts)
        self.rows = [part.shape[0] for part in parts]
        like = tree.ravel(parts[0].like).detach()
        super().__init__(like, like.new_zeros(sum(self.rows)))

    @staticmethod
    def of(parts: Sequence[LinearOperator]) -> LinearOperator:
        """The stack as one matrix where all parts are dense, or all sparse."""
        if len(parts) == 1:
            return parts[0]
        if all(isinstance(part, Dense) for part in parts):
            return Dense(torch.cat([part.to_dense() for part in parts]), symmetric=False)
        blocks: list[Any] = [
            scipy.sparse.csr_array(part.to_dense().cpu().numpy()) if isinstance(part, Dense) else part.to_sparse()
            for part in parts
        ]
        if all(block is not None for block in blocks):
            like = tree.ravel(parts[0].like).detach()
            matrix: Any = scipy.sparse.vstack(blocks, format="csr")
            return Sparse(matrix, symmetric=False, like=like, out=like.new_zeros(matrix.shape[0]))
        return Stacked(parts)

    def mv(self, v: Tree) -> Tree:
        return torch.cat([part.flat_mv(v) for part in self.parts])

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += len(rows)
        return torch.cat([part.flat_mm(rows) for part in self.parts], dim=1)

    @property
    def T(self) -> LinearOperator:
        """The parts' transposes side by side."""
        return _Beside([part.T for part in self.parts], self)


class _Beside(LinearOperator):
    def __init__(self, parts: Sequence[LinearOperator], stacked: Stacked) -> None:
        super().__init__(stacked.out, stacked.like)
        self.parts, self.stacked = tuple(parts), stacked

    def mv(self, v: Tree) -> Tree:
        pieces = torch.split(v, self.stacked.rows)
        return torch.stack([part.flat_mv(piece) for part, piece in zip(self.parts, pieces, strict=True)]).sum(0)

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += len(rows)
        pieces = torch.split(rows, self.stacked.rows, dim=1)
        return torch.stack([part.flat_mm(piece) for part, piece in zip(self.parts, pieces, strict=True)]).sum(0)

    @property
    def T(self) -> LinearOperator:
        return self.stacked
