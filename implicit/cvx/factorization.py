"""Sparse factorizations of one derivative matrix each, with the least-squares solution where it is singular."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit.cvx.pattern import Pattern
from implicit.status import SolveError

MAX_DENSE = 3000
"""Largest singular system that is decomposed by singular values."""
RANK_TOLERANCE = 1e-12
"""Relative to the largest, singular values below this count as zero."""


class Factorization:
    """``J`` with equilibrated rows and columns, as sparse LU factors or, if it is singular, as singular vectors.

    Args:
        values: the nonzeros, in the order of ``pattern``.
        pattern: where they are.
        called: what to call the matrix in errors.

    Raises:
        SolveError: if the matrix is not finite, or singular and too large for a singular value decomposition.
    """

    def __init__(self, values: Tensor, pattern: Pattern, called: str) -> None:
        import scipy.sparse

        rows, columns, size = pattern.rows.numpy(), pattern.columns.numpy(), pattern.shape[0]
        entries = values.numpy()
        if not np.isfinite(entries).all():
            raise SolveError(f"{called}: the derivative of the optimality conditions is not finite")
        self._left = _inverse_largest(np.abs(entries), rows, size)
        self._right = _inverse_largest(np.abs(entries) * self._left[rows], columns, size)
        scaled = entries * self._left[rows] * self._right[columns]
        matrix = scipy.sparse.csc_array((scaled, (rows, columns)), shape=pattern.shape)
        self._lu = _regular_factors(matrix)
        if self._lu is not None:
            return
        if size > MAX_DENSE:
            raise SolveError(
                f"{called}: the derivative of the optimality conditions is singular, and with {size} rows too large "
                "for a least-squares solution: remove redundant constraints, or add a strongly convex term"
            )
        u, self._sigma, vt = np.linalg.svd(matrix.toarray())
        self._rank = int((self._sigma > RANK_TOLERANCE * self._sigma[0]).sum())
        self._u, self._v = u, vt.T

    @property
    def singular(self) -> bool:
        """Whether the matrix has a kernel at this precision."""
        return self._lu is None and self._rank < len(self._left)

    def solve(self, rhs: np.ndarray, transposed: bool) -> np.ndarray:
        """``J w = rhs``, or ``J' w = rhs``, for the columns of rhs; least squares in the scaled norm if singular."""
        left, right = (self._right, self._left) if transposed else (self._left, self._right)
        scaled = left[:, None] * rhs
        if self._lu is not None:
            return right[:, None] * self._lu.solve(scaled, trans="T" if transposed else "N")
        u, v = (self._v, self._u) if transposed else (self._u, self._v)
        r = self._rank
        return right[:, None] * (v[:, :r] @ ((u[:, :r].T @ scaled) / self._sigma[:r, None]))

    def inconsistency(self, rhs: np.ndarray, transposed: bool) -> float:
        """The part of the columns of rhs outside the range, relative to them."""
        left, u = (self._right, self._v) if transposed else (self._left, self._u)
        scaled = left[:, None] * rhs
        return float(np.linalg.norm(u[:, self._rank :].T @ scaled) / max(np.linalg.norm(scaled), 1e-300))

    def right_kernel(self) -> np.ndarray:
        """Rows w with ``J w' = 0``."""
        return (self._right[:, None] * self._v[:, self._rank :]).T

    def left_kernel(self) -> np.ndarray:
        """Rows w with ``w J = 0``."""
        return (self._left[:, None] * self._u[:, self._rank :]).T


class Factorizations:
    """The last factorization at each position of a batch.

    Newton steps that do not change the derivative, the backward pass of a call and further derivatives at the same
    point find theirs here.
    """

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self._kept: dict[int, tuple[Tensor, Factorization]] = {}

    def get(self, values: Tensor, position: int, called: str) -> Factorization:
        """The factorization of the matrix with these nonzeros; see :class:`Factorization`."""
        kept = self._kept.get(position)
        if kept is not None and torch.equal(kept[0], values):
            return kept[1]
        found = Factorization(values, self.pattern, called)
        self._kept[position] = (values.clone(), found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Without the factors, which cannot be copied."""
        return {"pattern": self.pattern, "_kept": {}}


def _inverse_largest(magnitudes: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    largest = np.zeros(size)
    np.maximum.at(largest, index, magnitudes)
    return 1 / np.where(largest > 0, largest, 1.0)


def _regular_factors(matrix: Any) -> Any:
    """Sparse LU factors; None where the matrix is singular at this precision."""
    import scipy.sparse.linalg

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            lu = scipy.sparse.linalg.splu(matrix)
        except (RuntimeError, scipy.sparse.linalg.MatrixRankWarning):  # an exactly zero pivot
            return None
    probe = np.cos(np.arange(1.0, matrix.shape[0] + 1) ** 2)  # seen by every kernel that is not made for it
    growth = np.linalg.norm(lu.solve(probe)) / np.linalg.norm(probe)
    norm = abs(matrix).sum(axis=0).max() if matrix.shape[0] else 0.0
    return lu if growth * norm * RANK_TOLERANCE < 1 else None  # false for NaN


def name(index: int, count: int) -> str:
    """How to call one element of a batch in messages."""
    return f"element {index} of the batch" if count > 1 else "the problem"


def listed(elements: Sequence[int], count: int) -> str:
    """How to call some elements of a batch in messages."""
    if count == 1:
        return "the problem"
    return f"elements {list(elements[:10])}{' and more' if len(elements) > 10 else ''} of the batch"
