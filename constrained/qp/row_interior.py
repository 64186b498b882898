"""Interior points for a projection onto rows and bounds: which rows and bounds are active, from no guess at all.

The method is that of :mod:`constrained.qp.interior_point`, for one projection in place of a batch of programs: Q is the
identity and bounds are no rows, so that a step solves with ``J C J' + D`` (C and D diagonal), by the structure of J,
where the other factorizes a dense matrix with a row per variable and equation.

Reference:
    S. Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 2(4), 1992.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from constrained.qp.row_structure import RowStructure
from constrained.qp.row_system import RowSystem

STEPS = 40
BACK = 0.995


@dataclass(frozen=True, eq=False)
class Sets:
    """Rows that hold with equality, ``(rows,)``, and entries at a bound, ``(n,)``; bool."""

    working: Tensor
    low: Tensor
    high: Tensor

    @property
    def free(self) -> Tensor:
        """Entries at no bound."""
        return ~(self.low | self.high)


@dataclass(frozen=True, eq=False, kw_only=True)
class RowProgram:
    """``J z = d`` where ``equation``, ``J z <= d`` elsewhere, ``lower <= z <= upper``; rows of length one."""

    rows: RowStructure
    d: Tensor
    equation: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True, eq=False)
class _Pair:
    """Slacks and their multipliers, positive where ``there``; their changes along a step."""

    slack: Tensor
    force: Tensor
    there: Tensor

    @property
    def ratio(self) -> Tensor:
        return torch.where(self.there, self.force / self.slack, 0.0)

    @property
    def product(self) -> Tensor:
        return torch.where(self.there, self.slack * self.force, 0.0)

    def moved(self, step: Tensor, by: "_Pair") -> "_Pair":
        slack = torch.where(self.there, self.slack + step * by.slack, 1.0)
        return _Pair(slack, self.force + step * by.force, self.there)

    def longest(self, by: "_Pair") -> Tensor:
        """The longest step, up to one, that keeps both positive."""
        shrink = torch.maximum(-by.slack / self.slack, -by.force / torch.where(self.there, self.force, 1.0))
        return 1 / torch.where(self.there, shrink, 0.0).amax().clamp(min=1.0)


class _Iterate(NamedTuple):
    """The point; pairs of the inequality rows (equations have a multiplier only), lower and upper bounds."""

    z: Tensor
    row: _Pair
    low: _Pair
    high: _Pair

    @property
    def pairs(self) -> tuple[_Pair, _Pair, _Pair]:
        return self.row, self.low, self.high

    def longest(self, by: "_Iterate") -> Tensor:
        return torch.stack([mine.longest(other) for mine, other in zip(self.pairs, by.pairs, strict=True)]).amin()

    def moved(self, step: Tensor, by: "_Iterate") -> "_Iterate":
        pairs = [mine.moved(step, other) for mine, other in zip(self.pairs, by.pairs, strict=True)]
        return _Iterate(self.z + step * by.z, *pairs)

    def total(self) -> Tensor:
        return torch.stack([pair.product.sum() for pair in self.pairs]).sum()


class _Newton:
    """The linear system of one iterate; entries with equal bounds do not move."""

    def __init__(self, program: RowProgram, point: Tensor, at: _Iterate, pinned: Tensor) -> None:
        self.rows, self.at = program.rows, at
        inequality = at.row.there
        self.gap = program.rows.multiply(at.z) - program.d + torch.where(inequality, at.row.slack, 0.0)
        slope = at.z - point + program.rows.pull(at.row.force)
        slope = slope - torch.where(at.low.there, at.low.force, 0.0) + torch.where(at.high.there, at.high.force, 0.0)
        self.slope = torch.where(pinned, 0.0, slope)
        self.columns = torch.where(pinned, 0.0, 1 / (1 + at.low.ratio + at.high.ratio))
        self.diagonal = torch.where(inequality, at.row.slack / torch.where(inequality, at.row.force, 1.0), 0.0)

    @property
    def residual(self) -> Tensor:
        return torch.cat([self.gap, self.slope]).abs().amax()

    def factor(self) -> None:
        self.system = RowSystem(self.rows, self.columns, self.diagonal, torch.ones_like(self.at.row.there))

    def direction(self, row: Tensor, low: Tensor, high: Tensor) -> _Iterate:
        """The step after which the products of slacks and multipliers have changed by the given amounts."""
        at = self.at
        pull = -self.slope + low / at.low.slack - high / at.high.slack
        relief = torch.where(at.row.there, row / torch.where(at.row.there, at.row.force, 1.0), 0.0)
        force = self.system.solve(self.rows.multiply(self.columns * pull) + self.gap + relief)
        z = self.columns * (pull - self.rows.pull(force))
        return _Iterate(
            z,
            _Pair(relief - self.diagonal * force, force, at.row.there),
            _Pair(z, torch.where(at.low.there, (low - at.low.force * z) / at.low.slack, 0.0), at.low.there),
            _Pair(-z, torch.where(at.high.there, (high + at.high.force * z) / at.high.slack, 0.0), at.high.there),
        )


def interior_sets(program: RowProgram, point: Tensor) -> tuple[Tensor, Sets, int]:
    """Mehrotra's method for the projection of ``point``: multipliers of the rows, the active sets, steps taken.

    Ends where everything is small or no step is possible; the sets are a guess that has to be verified.
    """
    pinned = ~(program.lower < program.upper)
    at, steps = _start(program, point, pinned), 0
    count = max(1, int(torch.cat([pair.there for pair in at.pairs]).sum()))
    goal = 1e-3 * torch.finfo(point.dtype).eps ** 0.5
    for _ in range(STEPS):
        newton, total = _Newton(program, point, at, pinned), at.total()
        mean, error, size = torch.stack([total / count, newton.residual, at.z.abs().amax()]).tolist()
        if not max(abs(mean) ** 0.5, error) > goal * (1 + size):
            break
        newton.factor()
        first = newton.direction(*(-pair.product for pair in at.pairs))
        ahead = at.moved(at.longest(first), first).total()
        centre = total / count * (ahead / total.clamp(min=torch.finfo(point.dtype).tiny)) ** 3
        targets = [
            torch.where(pair.there, centre - pair.product - by.slack * by.force, 0.0)
            for pair, by in zip(at.pairs, first.pairs, strict=True)
        ]
        step = newton.direction(*targets)
        at = at.moved(BACK * at.longest(step), step)
        steps += 1
    row, low, high = (pair.there & (pair.force > pair.slack) for pair in at.pairs)
    return at.row.force, Sets(program.equation | row, low | pinned, high), steps


def _start(program: RowProgram, point: Tensor, pinned: Tensor) -> _Iterate:
    lower, upper = program.lower, program.upper
    width = torch.where((upper - lower).isfinite(), upper - lower, torch.inf)
    room = torch.minimum(0.25 * width, 0.1 * (1 + point.abs().amax()).expand_as(point))
    z = torch.where(pinned, lower, torch.minimum(torch.maximum(point, lower + room), upper - room))
    gap = program.rows.multiply(z) - program.d
    size = torch.stack([gap.abs().amax(), (z - point).abs().amax(), 1e-2 * (1 + point.abs().amax())]).amax()
    has_low, has_high = lower.isfinite() & ~pinned, upper.isfinite() & ~pinned
    inequality = ~program.equation
    return _Iterate(
        z,
        _Pair(torch.where(inequality, torch.maximum(-gap, size), 1.0), torch.where(inequality, size, 0.0), inequality),
        _Pair(torch.where(has_low, z - lower, 1.0), torch.where(has_low, size, 0.0), has_low),
        _Pair(torch.where(has_high, upper - z, 1.0), torch.where(has_high, size, 0.0), has_high),
    )
