"""A compiled cvxpy problem as torch functions: an objective, rows and bounds in what stays of its columns."""

import numpy as np
import torch
from torch import Tensor

from bilevel.conic_presolve import Level, presolve
from implicit.cvx.cones import SecondOrder
from implicit.cvx.exponential import Exponential
from implicit.cvx.pattern import AffineMap, Pattern
from implicit.cvx.program import Program
from implicit.cvx.semidefinite import Semidefinite

REFUSED = {
    Exponential: "exponential cones (exp, log, entr, logistic, log_sum_exp, ...)",
    Semidefinite: "semidefinite cones (PSD variables, lambda_max, normNuc, ...)",
}


class ConicLower:
    """``minimize 1/2 z' P z + q' z + d  subject to  b - A z in K`` in the columns that a presolve leaves.

    P, q, d, A and b are affine in theta. K has linear and second-order cones; ``|v| <= t`` becomes the smooth rows
    ``|v|^2 - t^2 <= 0`` and ``-t <= 0``.

    Args:
        program: the structure of the compiled problem.
        constant: d as a map of theta, which programs leave out.
        user: the columns of the user's variables.
        like: fixes dtype and device.

    Attributes:
        added: how many added columns stay; y holds the user's columns, then those.
        lower, upper: bounds on y, infinite where there is none.
        equalities, inequalities: how many rows depend on y.
        parameter_equalities, parameter_inequalities: how many depend on theta alone.

    Raises:
        ValueError: if the program has other cones.
    """

    def __init__(self, program: Program, constant: AffineMap, user: np.ndarray, like: Tensor) -> None:
        for family in program.families:
            if type(family) in REFUSED:
                raise ValueError(
                    f"the problem compiles to {REFUSED[type(family)]}, which have no smooth rows c(x, y) <= 0: rewrite "
                    "it with linear and second-order cones, write the lower level in torch, or use "
                    "implicit.cvx.Layer as its solution inside an upper objective"
                )
        found = presolve(program, user)
        kept = np.concatenate([user, found.added])
        self.added = len(found.added)
        self.lower, self.upper = (torch.as_tensor(bound[kept] + 0.0).to(like) for bound in (found.lower, found.upper))
        self._P, self._q, self._A, self._b, self._d = (_cast(m, like) for m in (*program.maps, constant))
        self._P_pattern, self._A_pattern = _place(program.P, like), _place(program.A, like)
        places = np.full(program.n, len(kept))
        places[kept] = np.arange(len(kept))
        self._cones = [f for f in program.families if isinstance(f, SecondOrder)]

        def index(values: np.ndarray) -> Tensor:
            return torch.as_tensor(values, dtype=torch.long, device=like.device)

        self._places, self._alias = index(places), index(found.alias)
        self._levels = [_Solved(level, program.A, found.alias, like) for level in reversed(found.levels)]
        self._equal, self._equal_theta = index(found.equal.columns), index(found.equal.parameters)
        self._below = index(found.below.columns)
        self._radii = index(found.radii.columns)
        self._round, self._round_theta = index(found.cones.columns), index(found.cones.parameters)
        self._below_theta = index(np.concatenate([found.below.parameters, found.radii.parameters]))
        self.equalities, self.parameter_equalities = len(self._equal), len(self._equal_theta)
        self.inequalities = len(self._below) + len(self._round) + len(self._radii)
        self.parameter_inequalities = len(self._below_theta) + len(self._round_theta)

    def objective(self, theta: Tensor, y: Tensor) -> Tensor:
        """``1/2 z' P z + q' z + d``."""
        z = self.columns(theta, y)
        half = 0.5 * _product(self._P_pattern, _at(self._P, theta), z)
        return (half + _at(self._q, theta)) @ z + _at(self._d, theta)[0]

    def equality(self, theta: Tensor, y: Tensor) -> Tensor:
        """``A z - b`` in the rows of the zero cone."""
        return self._excess(theta, y)[self._equal]

    def inequality(self, theta: Tensor, y: Tensor) -> Tensor:
        """``A z - b`` in the linear rows, then ``|v|^2 - t^2`` of the cones, then ``-t`` of those where t varies."""
        excess = self._excess(theta, y)
        return torch.cat([excess[self._below], self._squares(excess)[self._round], excess[self._radii]])

    def parameter_inequality(self, theta: Tensor, y: Tensor) -> Tensor:
        """The inequality rows in theta alone."""
        excess = self._excess(theta, y)
        return torch.cat([excess[self._below_theta], self._squares(excess)[self._round_theta]])

    def parameter_equality(self, theta: Tensor, y: Tensor) -> Tensor:
        """The equality rows in theta alone."""
        return self._excess(theta, y)[self._equal_theta]

    def _squares(self, excess: Tensor) -> Tensor:
        """``|v|^2 - t^2`` of all cones."""
        squares = [excess.new_zeros(0)]
        for cone in self._cones:
            s = excess[cone.start : cone.start + cone.count * cone.size].unflatten(0, (cone.count, cone.size))
            squares.append(s[:, 1:].square().sum(1) - s[:, 0].square())
        return torch.cat(squares)

    def columns(self, theta: Tensor, y: Tensor) -> Tensor:
        """All columns z, ``(n,)``."""
        z = torch.cat([y, y.new_zeros(1)])[self._places]
        A, b = _at(self._A, theta), _at(self._b, theta)
        for level in self._levels:
            z = level.fill(z, A, b)
        return z[self._alias]

    def y(self, z: Tensor) -> Tensor:
        """The columns that stay, ``(k,)``, of all."""
        kept = self._places < len(self.lower)
        return torch.zeros_like(self.lower).index_copy(0, self._places[kept], z[kept])

    def _excess(self, theta: Tensor, y: Tensor) -> Tensor:
        return _product(self._A_pattern, _at(self._A, theta), self.columns(theta, y)) - _at(self._b, theta)


class _Solved:
    """One level of the presolve in torch."""

    def __init__(self, level: Level, A: Pattern, alias: np.ndarray, like: Tensor) -> None:
        rows, columns = A.rows.numpy(), alias[A.columns.numpy()]
        place = np.full(A.shape[0], -1)
        place[level.rows] = np.arange(len(level.rows))
        inside = place[rows] >= 0
        inside[inside] = level.columns[place[rows[inside]]] != columns[inside]
        entries = np.flatnonzero(inside)

        def index(values: np.ndarray) -> Tensor:
            return torch.as_tensor(values, dtype=torch.long, device=like.device)

        self._rows, self._columns, self._entries = index(level.rows), index(level.columns), index(entries)
        self._pivots = torch.as_tensor(level.pivots).to(like)
        shape = (len(level.rows), A.shape[1])
        self._rest = Pattern(index(place[rows[entries]]), index(columns[entries]), shape)

    def fill(self, z: Tensor, A: Tensor, b: Tensor) -> Tensor:
        rest = _product(self._rest, A[self._entries], z)
        return z.index_copy(0, self._columns, (b[self._rows] - rest) / self._pivots)


def _product(pattern: Pattern, values: Tensor, z: Tensor) -> Tensor:
    return pattern.product(values[None], z[None])[0]


def _at(entries: AffineMap, theta: Tensor) -> Tensor:
    return entries(theta[None])[0]


def _cast(entries: AffineMap, like: Tensor) -> AffineMap:
    place = like.device
    return AffineMap(
        entries.constant.to(like), entries.rows.to(place), entries.columns.to(place), entries.coefficients.to(like)
    )


def _place(pattern: Pattern, like: Tensor) -> Pattern:
    return Pattern(pattern.rows.to(like.device), pattern.columns.to(like.device), pattern.shape)
