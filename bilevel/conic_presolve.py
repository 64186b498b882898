"""Which columns and rows of a compiled cvxpy problem can be taken out again, exactly and for every parameter.

cvxpy's compilation adds columns: copies of variables with attributes, and values of expressions. An added column that
an equality ties to another column is that column. One that occurs in a single equality, with a coefficient without
parameters, is what that equality says. One without cost that only one inequality keeps from growing, while the others
are met the better the larger it is, is what makes that inequality tight (the bound tau of ``|v| <= tau, tau <= r``). A
row with one entry, where neither it nor the right-hand side has parameters, is a bound.
"""

from dataclasses import dataclass

import numpy as np

from implicit.cvx.cones import Nonnegative, SecondOrder, Zero
from implicit.cvx.program import Program


@dataclass(frozen=True)
class Level:
    """Columns that rows determine: ``z[columns] = (b[rows] - rest) / pivots``."""

    rows: np.ndarray
    columns: np.ndarray
    pivots: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Rows of one kind that stay: those with columns, and those in the parameters alone."""

    columns: np.ndarray
    parameters: np.ndarray


@dataclass(frozen=True)
class Reduction:
    """What stays of a program with n columns.

    Attributes:
        alias: which column each column is, ``(n,)``.
        levels: columns that others determine. A level may use columns of later levels, so that the last comes first.
        added: the columns that stay beside the user's.
        lower, upper: bounds of all columns.
        equal, below, radii: rows of the zero cone, of the nonnegative cone, and first rows of second-order cones.
        cones: which second-order cones, counted from 0.
    """

    alias: np.ndarray
    levels: list[Level]
    added: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    equal: Rows
    below: Rows
    radii: Rows
    cones: Rows


def presolve(program: Program, user: np.ndarray) -> Reduction:
    """Reduce ``A z + s = b``, ``s in K``; ``user`` are the columns that have to stay."""
    system = _System(program, user)
    system.tie()
    grown = system.grow(_costs(program))
    levels = [grown, *system.eliminate()]
    lower, upper = system.bounds(levels)
    system.trace(levels)
    gone = np.isin(np.arange(program.n), np.concatenate([user, *(level.columns for level in levels)]))
    return Reduction(
        alias=system.alias,
        levels=levels,
        added=np.flatnonzero(~gone & (system.alias == np.arange(program.n))),
        lower=lower,
        upper=upper,
        equal=system.split(system.equal),
        below=system.split(system.below),
        radii=system.split(np.array([rows.start for rows in system.cones], dtype=np.int64)),
        cones=system.split_cones(),
    )


class _System:
    """The nonzeros of A by row and representing column, and which rows are still there."""

    def __init__(self, program: Program, user: np.ndarray) -> None:
        _, _, A, b = program.maps
        self.m, self.n = program.A.shape
        self.is_user = np.isin(np.arange(self.n), user)
        self.alias = np.arange(self.n)
        self.rows, self.columns = program.A.rows.numpy(), program.A.columns.numpy()
        self.values, self.moves = A.constant.numpy(), np.isin(np.arange(len(A.constant)), A.rows.numpy())
        self.right, self.right_moves = b.constant.numpy(), np.isin(np.arange(self.m), b.rows.numpy())
        self.equal, self.below = _rows(program, Zero), _rows(program, Nonnegative)
        self.cones = [
            range(start, start + c.size)
            for c in program.families
            if type(c) is SecondOrder
            for start in range(c.start, c.start + c.count * c.size, c.size)
        ]
        self._merge()

    def _merge(self) -> None:
        """Nonzeros of the same row and representing column together."""
        keys, place = np.unique(self.rows * self.n + self.alias[self.columns], return_inverse=True)
        self.rows, self.columns = keys // self.n, keys % self.n
        self.values = np.bincount(place, self.values, minlength=len(keys))
        self.moves = np.bincount(place, self.moves, minlength=len(keys)) > 0
        stays = self.moves | (self.values != 0)
        self.rows, self.columns, self.values, self.moves = (
            part[stays] for part in (self.rows, self.columns, self.values, self.moves)
        )

    def _entries(self, rows: np.ndarray) -> np.ndarray:
        return np.isin(self.rows, rows)

    def tie(self) -> None:
        """Merge the columns of rows ``a u - a v = 0`` of which one was added, which leaves the rows empty."""
        counts = np.bincount(self.rows, minlength=self.m)
        fixed = np.bincount(self.rows, self.moves, minlength=self.m) == 0
        balanced = np.bincount(self.rows, self.values, minlength=self.m) == 0
        plain = (counts == 2) & fixed & balanced & ~self.right_moves & (self.right == 0)
        ties = np.intersect1d(self.equal, np.flatnonzero(plain))
        pairs = self.columns[self._entries(ties)].reshape(-1, 2)  # entries are sorted by row
        for first, second in pairs:
            a, b = self._root(first), self._root(second)
            if self.is_user[a] and not self.is_user[b]:
                a, b = b, a
            if not self.is_user[a]:
                self.alias[a] = b
        self.alias = np.array([self._root(j) for j in range(self.n)], dtype=np.int64)
        self._merge()

    def _root(self, column: int) -> int:
        while self.alias[column] != column:
            column = self.alias[column]
        return int(column)

    def grow(self, costs: np.ndarray) -> Level:
        """Solve inequality rows for added columns that nothing else keeps from growing, and drop the rows.

        Columns of a row that was used occur in more rows from then on, and are left alone.
        """
        below = self._entries(self.below)
        held = np.bincount(self.columns[below & (self.values > 0)], minlength=self.n) == 1
        closed = self.is_user | costs
        closed[self.columns[self._entries(self.equal) | self.moves]] = True
        pivots: dict[int, int] = {}
        for j in np.flatnonzero(held & ~closed).tolist():
            own = self.columns == j
            row = self.rows[own & below & (self.values > 0)][0]
            columns = self.columns[self.rows == row]
            if closed[j] or np.isin(columns, list(pivots.values())).any() or not self._widens(j):
                continue
            pivots[int(row)] = j
            closed[columns] = True
        rows, columns = (np.array(part, dtype=np.int64) for part in (list(pivots), list(pivots.values())))
        self.below = np.setdiff1d(self.below, rows)
        values = [self.values[(self.rows == row) & (self.columns == j)][0] for row, j in pivots.items()]
        return Level(rows, columns, np.array(values, dtype=np.float64))

    def _widens(self, column: int) -> bool:
        """Whether a larger entry of z keeps points inside all second-order cones: minus the column lies in each."""
        own = self.columns == column
        s = np.bincount(self.rows[own], -1.0 * self.values[own], minlength=self.m)
        return all(np.linalg.norm(s[rows.start + 1 : rows.stop]) <= s[rows.start] * (1 + 1e-12) for rows in self.cones)

    def eliminate(self) -> list[Level]:
        """Solve equality rows for added columns that no other equality has, as long as there are any."""
        levels: list[Level] = []
        while True:
            active = self._entries(self.equal)
            counts = np.bincount(self.columns[active], minlength=self.n)
            single = active & ~self.moves & ~self.is_user[self.columns] & (counts[self.columns] == 1)
            rows, first = np.unique(self.rows[single], return_index=True)
            if not len(rows):
                return levels
            levels.append(Level(rows, self.columns[single][first], self.values[single][first]))
            self.equal = np.setdiff1d(self.equal, rows)

    def bounds(self, levels: list[Level]) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``a z_j <= b`` without parameters as bounds, and drop them; those of columns of ``levels`` stay."""
        lower, upper = np.full(self.n, -np.inf), np.full(self.n, np.inf)
        counts = np.bincount(self.rows, minlength=self.m)
        solved = np.isin(self.columns, np.concatenate([np.zeros(0), *(level.columns for level in levels)]))
        fixed = ~self.moves & ~self.right_moves[self.rows]
        fit = self._entries(self.below) & (counts[self.rows] == 1) & fixed & ~solved
        rows, columns, values = self.rows[fit], self.columns[fit], self.values[fit]
        limits = self.right[rows] / values
        np.minimum.at(upper, columns[values > 0], limits[values > 0])
        np.maximum.at(lower, columns[values < 0], limits[values < 0])
        self.below = np.setdiff1d(self.below, rows)
        return lower, upper

    def trace(self, levels: list[Level]) -> None:
        """Find which columns depend on columns that stay, and which on parameters."""
        self.varies = np.ones(self.n, dtype=bool)
        self.shifts = np.zeros(self.n, dtype=bool)
        for level in reversed(levels):
            self.varies[level.columns] = False
            varies, shifts = self._reach()
            self.varies[level.columns], self.shifts[level.columns] = varies[level.rows], shifts[level.rows]

    def _reach(self) -> tuple[np.ndarray, np.ndarray]:
        """Which rows depend on columns that stay, and which on parameters."""
        varies = np.bincount(self.rows, self.varies[self.columns], minlength=self.m) > 0
        shifts = np.bincount(self.rows, self.shifts[self.columns] | self.moves, minlength=self.m) > 0
        return varies, shifts | self.right_moves

    def split(self, rows: np.ndarray) -> Rows:
        """Rows that depend on columns that stay and rows in parameters alone; rows of constants are dropped."""
        varies, shifts = self._reach()
        return Rows(rows[varies[rows]], rows[~varies[rows] & shifts[rows]])

    def split_cones(self) -> Rows:
        """The same for whole second-order cones."""
        varies, shifts = ([part[rows.start : rows.stop].any() for rows in self.cones] for part in self._reach())
        moving, shifted = np.array(varies, dtype=bool), np.array(shifts, dtype=bool)
        return Rows(np.flatnonzero(moving), np.flatnonzero(~moving & shifted))


def _costs(program: Program) -> np.ndarray:
    """Which columns enter the objective."""
    q = program.maps[1]
    found = q.constant.numpy() != 0
    found[np.concatenate([q.rows.numpy(), program.P.rows.numpy()])] = True
    return found


def _rows(program: Program, kind: type) -> np.ndarray:
    """All rows of the cones of a kind."""
    found = [np.arange(c.start, c.start + c.count * c.size) for c in program.families if type(c) is kind]
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])
