"""Systems ``(J C J' + D) step = right`` with diagonal C and D, by the structure of J."""

import torch
from torch import Tensor

from constrained.qp.row_structure import RowStructure

PIVOT = 1e-6
"""A row of length one is eliminated where its entry of the diagonal is at least this."""


class RowSystem:
    """``(J C J' + diagonal)`` over the working rows, factored.

    With fewer shared columns than rows, all rows with a large diagonal (own columns included) are eliminated, which
    leaves a matrix as small as the number of shared columns, and a dense system for the rows that remain. Elsewhere
    the whole system is dense.

    Args:
        rows: J, of rows of length about one.
        columns: C, from 0 to 1, of the variables that take part; numbers or bool.
        diagonal: D, ``(rows,)``, at least zero, or None for zeros.
        working: which rows take part, ``(rows,)``, bool.
        gram: ``U U'`` of the shared columns, where it is known.
    """

    def __init__(
        self,
        rows: RowStructure,
        columns: Tensor,
        diagonal: Tensor | None,
        working: Tensor,
        gram: Tensor | None = None,
    ) -> None:
        weight = columns[: rows.width].to(rows.shared.dtype).sqrt()
        self._reduced: Tensor | None = None
        size = rows.summed(rows.own.square() * columns[rows.width :]) if len(rows.own) else None
        if diagonal is not None:
            size = diagonal if size is None else size + diagonal
        if size is not None and rows.width < len(working):
            chosen = working & (size > PIVOT)
            self._eliminated = chosen / size.clamp(min=PIVOT)
            self._shared = rows.shared * weight
            block = self._shared.mT @ (self._shared * self._eliminated[:, None])
            block.diagonal().add_(1.0)
            self._reduced, _ = torch.linalg.cholesky_ex(block)
            working = working & ~chosen
        self._index = working.nonzero()[:, 0]
        if not len(self._index):
            return
        if self._reduced is not None:
            part = self._shared[self._index]
            block = part @ torch.cholesky_solve(part.mT, self._reduced)
        elif gram is not None and bool((weight == 1).all()):
            block = gram[self._index[:, None], self._index]
        else:
            part = rows.shared[self._index] * weight
            block = part @ part.mT
        if size is not None:
            block.diagonal().add_(size[self._index])
        # Dependent rows share their step.
        shift = torch.finfo(block.dtype).eps ** 0.8 * block.diagonal().amax().clamp(min=PIVOT)
        block.diagonal().add_(shift)
        self._factor, _ = torch.linalg.cholesky_ex(block)

    def solve(self, right: Tensor) -> Tensor:
        """The step, ``(rows,)``, zero in rows that do not take part."""
        if self._reduced is None:
            return self._remaining(right)
        pushed = _solved(self._reduced, (self._eliminated * right) @ self._shared)
        if not len(self._index):
            return self._eliminated * (right - self._shared @ pushed)
        rest = self._remaining(right - self._shared @ pushed)
        pushed = pushed + _solved(self._reduced, rest @ self._shared)
        return self._eliminated * (right - self._shared @ pushed) + rest

    def _remaining(self, right: Tensor) -> Tensor:
        found = torch.zeros_like(right)
        if len(self._index):
            found[self._index] = _solved(self._factor, right[self._index])
        return found


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right[:, None], factor)[:, 0]
