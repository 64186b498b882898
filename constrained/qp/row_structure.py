"""Rows of a linear system by the structure of their columns: those with one entry, and those that rows share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class RowStructure:
    """A matrix J, ``(rows, n)``, whose columns with a single entry ("own" columns of that row) are kept apart.

    ``J J' = D + U U'`` with D diagonal, from own columns, and U the shared columns: where few columns are shared a
    system with it costs no more than some products with U. Columns without an entry take no part. Products are in the
    variables that take part, in the order ``order``: the k shared ones, then own ones row by row.
    """

    n: int
    order: Tensor  # (k + s,), places among the n columns
    shared: Tensor  # (rows, k)
    own: Tensor  # (s,)
    own_row: Tensor  # (s,)
    offsets: Tensor | None  # (rows + 1,): where the own entries of a row begin and end; None where each has one

    @classmethod
    def of(cls, index: Tensor, values: Tensor, shape: Sequence[int]) -> "RowStructure":
        """From the nonzero entries: their rows and columns, ``(2, entries)``, and values, in any order."""
        rows, n = shape
        row, column = index
        count = torch.bincount(column, minlength=n)
        single = count[column] == 1
        place = torch.zeros_like(count)
        place[column[~single]] = 1
        shared_at = place.nonzero()[:, 0]
        place[shared_at] = torch.arange(len(shared_at), device=place.device)
        shared = values.new_zeros(rows, len(shared_at))
        shared[row[~single], place[column[~single]]] = values[~single]
        sorting = row[single].argsort(stable=True)
        own_row = row[single][sorting]
        lengths = torch.bincount(own_row, minlength=rows)
        return cls(
            n=n,
            order=torch.cat([shared_at, column[single][sorting]]),
            shared=shared,
            own=values[single][sorting],
            own_row=own_row,
            offsets=None if bool((lengths == 1).all()) else torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        )

    @property
    def width(self) -> int:
        """How many columns are shared, k."""
        return self.shared.shape[1]

    def spread(self, values: Tensor) -> Tensor:
        """Values of the variables that take part among all n, zero elsewhere."""
        found = values.new_zeros(self.n)
        found[self.order] = values
        return found

    def multiply(self, z: Tensor) -> Tensor:
        """``J z``, ``(rows,)``."""
        found = self.shared @ z[: self.width]
        return found + self.summed(self.own * z[self.width :]) if len(self.own) else found

    def pull(self, multiplier: Tensor) -> Tensor:
        """``J' multiplier``, in the variables that take part."""
        found = multiplier @ self.shared
        return torch.cat([found, self.own * self.repeated(multiplier)]) if len(self.own) else found

    def summed(self, entries: Tensor) -> Tensor:
        """Sums over the own entries of each row, ``(rows,)``."""
        if self.offsets is None:
            return entries
        return torch.segment_reduce(entries, "sum", offsets=self.offsets, unsafe=True)

    def repeated(self, values: Tensor) -> Tensor:
        """Values of the rows at their own entries, ``(s,)``."""
        return values if self.offsets is None else values[self.own_row]

    def lengths(self) -> Tensor:
        """Euclidean lengths of the rows."""
        found = self.shared.square().sum(1)
        return (found + self.summed(self.own.square()) if len(self.own) else found).sqrt()

    def scaled(self, rows: Tensor, columns: Tensor | None = None) -> "RowStructure":
        """With rows times ``rows`` and, of all n, columns times ``columns``."""
        shared, own = self.shared * rows[:, None], self.own * self.repeated(rows)
        if columns is not None:
            factors = columns[self.order]
            shared, own = shared * factors[: self.width], own * factors[self.width :]
        return replace(self, shared=shared, own=own)

    def dense(self) -> Tensor:
        """J as a matrix, ``(rows, n)``."""
        found = self.shared.new_zeros(len(self.shared), self.n)
        found[:, self.order[: self.width]] = self.shared
        found[self.own_row, self.order[self.width :]] = self.own
        return found
