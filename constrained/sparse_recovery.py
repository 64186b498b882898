"""A sparse matrix from a few dozen of its products with vectors."""

from typing import Any

import numpy as np
import scipy.sparse
import torch

from implicit import LinearOperator

CELLS = (1, 2, 4, 4, 8, 8, 8, 16, 16)
"""Groups of columns per round; every round takes two products per group."""
LOOK_AFTER, RESOLVED = 5, 0.5
"""After so many rounds that share of the rows has to be known, or the matrix counts as full."""
FULL_ROWS = 8
"""Rows with many entries that are taken one by one, by products with the transpose."""
ZERO, MATCH, ROUNDING, AGREE = 1e-9, 1e-10, 4e-15, 1e-7
"""Relative to the row's largest sum, to the sum, to the largest again; and of the product that checks the answer."""


def recover(operator: LinearOperator, *, seed: int = 0) -> scipy.sparse.csr_array | None:
    """The matrix of an operator with few entries per row, of unknown places, or None where it cannot be had so.

    Every round puts the columns into random groups and sums each group twice, with random factors ``u_j`` and
    ``u_j w_j``. Where one entry of a row falls into a group by itself the ratio of the two sums is its ``w_j``, which
    tells the column. Entries that are known are subtracted from all sums, which leaves others by themselves, and so on
    (peeling, as in invertible Bloom lookup tables: Goodrich and Mitzenmacher 2011). Up to eight full rows are read off
    products with the transpose. The answer is compared with one more product.

    Diagonals take 3 products, five-point stencils on grids about 100, and what has more than some 16 entries in more
    than a few rows is given up after 38 to 134. The sums are 268 numbers per row at the most.

    Args:
        operator: shape ``(m, n)``, in float64: the ratios of single precision do not tell columns apart.
        seed: of groups and factors.

    Example:
        >>> import torch, implicit
        >>> from constrained.sparse_recovery import recover
        >>> A = implicit.Hessian(lambda x: (x**3).sum(), torch.arange(4.0, dtype=torch.float64))
        >>> recover(A).toarray().diagonal().round(6), A.products
        (array([ 0.,  6., 12., 18.]), 3)
    """
    if operator.dtype != torch.float64:
        return None
    found = _Peeling(operator, np.random.default_rng(seed)).run()
    return found if found is not None and _agrees(operator, found, seed) else None


def _product(operator: LinearOperator, rows: np.ndarray) -> np.ndarray:
    """The operator applied to each row."""
    taken = operator.flat_mm(torch.as_tensor(rows, dtype=operator.dtype, device=operator.device))
    return taken.detach().cpu().numpy()


def _agrees(operator: LinearOperator, matrix: Any, seed: int) -> bool:
    v = np.random.default_rng(seed + 1).standard_normal(matrix.shape[1])
    gap = np.abs(_product(operator, v[None])[0] - matrix @ v)
    return bool((gap <= AGREE * (abs(matrix) @ np.abs(v))).all())


class _Round:
    """Columns in groups: group and factor u of each, shape (n,), and the sums that are not explained yet."""

    def __init__(self, operator: LinearOperator, cells: int, weights: np.ndarray, rng: np.random.Generator) -> None:
        n = len(weights)
        self.group = rng.integers(0, cells, n)
        self.factor = rng.uniform(0.5, 1.0, n) * rng.choice([-1.0, 1.0], n)
        self.weights = weights
        probes = np.zeros((2, cells, n))
        probes[0, self.group, np.arange(n)] = self.factor
        probes[1, self.group, np.arange(n)] = self.factor * weights
        self.sums = _product(operator, probes.reshape(2 * cells, n)).reshape(2, cells, -1)

    def subtract(self, i: np.ndarray, j: np.ndarray, value: np.ndarray) -> None:
        part = value * self.factor[j]
        np.subtract.at(self.sums[0], (self.group[j], i), part)
        np.subtract.at(self.sums[1], (self.group[j], i), part * self.weights[j])


class _Peeling:
    def __init__(self, operator: LinearOperator, rng: np.random.Generator) -> None:
        self.operator, self.rng = operator, rng
        self.m, self.n = operator.shape
        self.weights = rng.uniform(1.0, 2.0, self.n)
        self.order = np.argsort(self.weights)
        self.sorted = self.weights[self.order]
        self.size = np.zeros(self.m)
        self.rounds: list[_Round] = []
        none = np.zeros(0, dtype=np.int64)
        self.i, self.j, self.value = [none], [none], [np.zeros(0)]

    def run(self) -> scipy.sparse.csr_array | None:
        if not self.m or not self.n:
            return scipy.sparse.csr_array((self.m, self.n))
        left = np.ones(self.m, dtype=bool)
        for place, cells in enumerate(CELLS):
            self.look(cells)
            if not np.isfinite(self.size).all():
                return None
            while self.peel():
                pass
            left = self.unexplained()
            if not left.any() or (place + 1 >= LOOK_AFTER and left.mean() > 1.0 - RESOLVED):
                break
        return self.matrix(np.flatnonzero(left)) if left.sum() <= FULL_ROWS else None

    def look(self, cells: int) -> None:
        """One more round, less what is known."""
        new = _Round(self.operator, cells, self.weights, self.rng)
        self.size = np.maximum(self.size, np.abs(new.sums).max(axis=(0, 1)))
        new.subtract(*map(np.concatenate, (self.i, self.j, self.value)))
        self.rounds.append(new)

    def peel(self) -> bool:
        """Take the entries that are by themselves; whether there were any."""
        any_found = False
        for this in self.rounds:
            i, j, value = self.singles(this)
            if len(i):
                any_found = True
                for kept, new in ((self.i, i), (self.j, j), (self.value, value)):
                    kept.append(new)
                for each in self.rounds:
                    each.subtract(i, j, value)
        return any_found

    def singles(self, this: _Round) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        group, i = np.nonzero(np.abs(this.sums[0]) > ZERO * self.size)
        first, second = this.sums[:, group, i]
        after = np.searchsorted(self.sorted, second / first).clip(0, self.n - 1)
        before = (after - 1).clip(0)
        ratio = second / first
        nearer = np.abs(self.sorted[before] - ratio) < np.abs(self.sorted[after] - ratio)
        j = self.order[np.where(nearer, before, after)]
        gap = np.abs(second - first * self.weights[j])
        alone = (gap <= MATCH * np.abs(first) + ROUNDING * self.size[i]) & (this.group[j] == group)
        i, j = i[alone], j[alone]
        return i, j, first[alone] / this.factor[j]

    def unexplained(self) -> np.ndarray:
        """Which rows have sums left."""
        sums = np.stack([np.abs(this.sums).max(axis=(0, 1)) for this in self.rounds])
        return sums.max(axis=0) > ZERO * self.size

    def matrix(self, full: np.ndarray) -> scipy.sparse.csr_array:
        i, j, value = map(np.concatenate, (self.i, self.j, self.value))
        if len(full):
            units = np.zeros((len(full), self.m))
            units[np.arange(len(full)), full] = 1.0
            rows = _product(self.operator.T, units)
            kept = ~np.isin(i, full)
            places = np.nonzero(rows)
            i = np.concatenate([i[kept], full[places[0]]])
            j = np.concatenate([j[kept], places[1]])
            value = np.concatenate([value[kept], rows[places]])
        return scipy.sparse.csr_array((value, (i, j)), shape=(self.m, self.n))
