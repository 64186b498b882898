"""Projections onto linear rows and bounds, from the multipliers of a projection nearby.

At multipliers l of the rows the Lagrangian of ``min ||z - p||^2 / 2  s.t.  J z = d`` (first rows), ``J z <= d``
(others), ``lower <= z <= upper`` is least at ``z(l) = clip(p - J' l)``. Which rows hold with equality and which
entries are at a bound is guessed, the equations are solved, and the guess is corrected by the signs: a semismooth
Newton method, exact after one step from the right guess. Where guesses cycle, interior points find one.

Reference:
    M. Hintermueller, K. Ito, K. Kunisch, "The primal-dual active set strategy as a semismooth Newton method", SIAM J.
        Optim. 13(3), 2002.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from constrained.qp.active_set import accuracy
from constrained.qp.row_interior import RowProgram, Sets, interior_sets
from constrained.qp.row_structure import RowStructure
from constrained.qp.row_system import RowSystem
from constrained.qp.scaling import inverse

HUGE = 1e5
"""Multipliers this large, relative to the point, come from guesses that are wrong."""


@dataclass(frozen=True, eq=False)
class Projected:
    """A candidate for the projection.

    Attributes:
        z: ``clip(p - J' multiplier)``, ``(n,)``.
        multiplier: ``(rows,)``, of rows of length one; at least zero for inequalities.
        error: the largest violation, and the largest smaller one of slack and multiplier, over ``1 + max |p|``.
        steps: linear systems solved.
    """

    z: Tensor
    multiplier: Tensor
    error: float
    steps: int = 0


class RowProjection:
    """``{z : J z = d`` in the first ``equalities`` rows, ``J z <= d`` in the others, ``lower <= z <= upper}``.

    Args:
        structure: J, with at least one row.
        d: ``(rows,)``.
        equalities: how many rows are equations.
        lower, upper: ``(n,)``, infinite where there is no bound; ``lower <= upper``.

    Attributes:
        unit: what rows are multiplied by to have length one, ``(rows,)``.
        program: the set in the variables that rows restrict.
    """

    def __init__(self, structure: RowStructure, d: Tensor, equalities: int, lower: Tensor, upper: Tensor) -> None:
        self.unit = inverse(structure.lengths())
        self.equalities, self.lower, self.upper = equalities, lower, upper
        self.program = RowProgram(
            rows=structure.scaled(self.unit),
            d=self.unit * d,
            equation=torch.arange(len(d), device=d.device) < equalities,
            lower=lower[structure.order],
            upper=upper[structure.order],
        )
        finite = self.program.lower.isfinite() | self.program.upper.isfinite()
        self._bounded = bool(finite.any())
        self._nowhere = torch.zeros_like(finite)
        self._gram: Tensor | None = None
        self._kept: tuple[Tensor, Tensor, RowSystem] | None = None

    def project(self, point: Tensor, multiplier: Tensor) -> Projected:
        """From the multipliers (of rows of length one) of an earlier projection, or zeros.

        The result is as good as rounding allows unless the set is empty or badly conditioned: the caller has to look
        at its error. Reads from the device once, twice more per step, and once or twice per change of the active sets.
        """
        if not len(multiplier):
            return Projected(torch.clamp(point, self.lower, self.upper), multiplier, 0.0, 0)
        inner, size = point[self.program.rows.order], point.abs().amax()
        scale = 1 / (1 + size) + 0 * size  # NaN where the point is not finite
        found = self._correct(inner, scale, multiplier)
        if len(inner) and not found.error <= accuracy(point.dtype) ** 0.7:
            duals, sets, steps = interior_sets(self.program, inner)
            again = self._correct(inner, scale, duals * sets.working, sets)
            best = again if again.error < found.error else found
            found = Projected(best.z, best.multiplier, best.error, found.steps + steps + again.steps)
        z = torch.clamp(point, self.lower, self.upper)
        z[self.program.rows.order] = found.z
        return Projected(z, found.multiplier, found.error, found.steps)

    def _correct(
        self, point: Tensor, scale: Tensor, multiplier: Tensor, sets: Sets | None = None, max_steps: int = 12
    ) -> Projected:
        """Semismooth Newton steps; the best candidate met, in the variables that rows restrict."""
        rows, goal, steps = self.program.rows, 64 * torch.finfo(point.dtype).eps, 0
        target, z, gap = self._evaluate(point, multiplier)
        best = Projected(z, multiplier, float(self._error(gap, multiplier, scale)))
        while best.error > goal and steps < max_steps:
            given, sets = sets is not None, sets or self._sets(target, gap, multiplier)
            other, changed = self._differences(sets, multiplier)
            if given or other:  # else z and gap are those of the sets
                multiplier = multiplier * sets.working
                target = point - rows.pull(multiplier)
                fixed = torch.where(sets.low, self.program.lower, target)
                fixed = torch.where(sets.high, self.program.upper, fixed)
                gap = rows.multiply(fixed) - self.program.d
            multiplier = multiplier + self._system(sets, changed).solve(gap)
            target, z, gap = self._evaluate(point, multiplier)
            size = torch.linalg.vector_norm(multiplier, torch.inf) * scale
            error, size = torch.stack([self._error(gap, multiplier, scale), size]).tolist()
            steps, sets = steps + 1, None
            if not size < HUGE:
                break  # dependent rows that contradict each other
            settled = best.error <= accuracy(point.dtype) and not error < 0.5 * best.error
            best = Projected(z, multiplier, error) if error < best.error else best
            if settled:
                break
        signed = torch.where(self.program.equation, best.multiplier, best.multiplier.clamp(min=0))
        return Projected(best.z, signed, best.error, steps)

    def _evaluate(self, point: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``p - J' l``, its nearest point z within the bounds, and ``J z - d``."""
        target = point - self.program.rows.pull(multiplier)
        z = torch.clamp(target, self.program.lower, self.program.upper) if self._bounded else target
        return target, z, self.program.rows.multiply(z) - self.program.d

    def _error(self, gap: Tensor, multiplier: Tensor, scale: Tensor) -> Tensor:
        wrong = torch.maximum(gap, -multiplier)
        if self.equalities:
            wrong = torch.where(self.program.equation, gap, wrong)
        return torch.linalg.vector_norm(wrong, torch.inf) * scale

    def _sets(self, target: Tensor, gap: Tensor, multiplier: Tensor) -> Sets:
        working = multiplier + gap > 0
        if self.equalities:
            working = working | self.program.equation
        if not self._bounded:
            return Sets(working, self._nowhere, self._nowhere)
        return Sets(working, target <= self.program.lower, target >= self.program.upper)

    def _differences(self, sets: Sets, multiplier: Tensor) -> tuple[bool, bool]:
        """Whether rows outside the sets have multipliers, and whether the sets are not those of the kept system."""
        flags = [(multiplier * ~sets.working).any()]
        if self._kept is not None:
            flags += [(self._kept[0] != sets.working).any(), (self._kept[1] != sets.free).any()]
        other, *changed = torch.stack(flags).tolist()
        return other, any(changed) or self._kept is None

    def _system(self, sets: Sets, changed: bool) -> RowSystem:
        """The factored system of some active sets; the last one is kept."""
        if self._kept is None or changed:
            rows = self.program.rows
            if self._gram is None and (rows.width >= len(self.program.d) or not len(rows.own)):
                self._gram = rows.shared @ rows.shared.mT
            self._kept = sets.working, sets.free, RowSystem(rows, sets.free, None, sets.working, self._gram)
        return self._kept[2]
