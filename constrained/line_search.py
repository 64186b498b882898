"""Backtracking on the exact augmented Lagrangian."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from constrained.lagrangian import Lagrangian, Point
from constrained.merit import ExactAugmentedLagrangian

SHORTEST = 1e-10
EXPANSION, LONGEST = 8.0, 1e15
ROUNDING = 1e-14


@dataclass(frozen=True)
class Trial:
    """A point that was accepted.

    Attributes:
        point, multiplier: where.
        length: of the step, relative to the Newton step.
        kind: "armijo", "residual" or "correction".
    """

    point: Point
    multiplier: Tensor
    length: float
    kind: str


@dataclass
class LineSearch:
    """Finds a point with ``M <= reference + length * beta * slope``.

    Args:
        merit: M, with its penalties.
        mu, nu: penalties.
        reference: what M is compared with: its largest value over the last iterates.
        beta: the share of the slope that is asked for.

    Attributes:
        bent: whether the gradient of the Lagrangian was what made the last refused point too high.
        outside: whether the last refused point lies where f or c is no number.
    """

    merit: ExactAugmentedLagrangian
    mu: float
    nu: float
    reference: float
    beta: float
    bent: bool = False
    outside: bool = False

    def run(
        self,
        problem: Lagrangian,
        start: tuple[Tensor, Tensor],
        step: tuple[Tensor, Tensor],
        slope: float,
        *,
        good: Callable[[Point, Tensor], bool],
        correct: Callable[[Point], tuple[Tensor, Tensor] | None],
    ) -> Trial | None:
        """The first point along ``step`` that is low enough, halving its length.

        Args:
            problem: evaluates.
            start: x and multiplier.
            step: for both.
            slope: of M along it, negative.
            good: accepts a full step for another reason.
            correct: another full step in place of one that was refused, from the point it led to.
        """
        length = 1.0
        while length > SHORTEST and slope < 0:
            point = problem.at(start[0] + length * step[0])
            multiplier = start[1] + length * step[1]
            if length == 1.0 and point.finite and good(point, multiplier):
                return Trial(point, multiplier, length, "residual")
            if self.accepts(point, multiplier, length * slope):
                return Trial(point, multiplier, length, "armijo")
            if length == 1.0 and point.finite and (other := correct(point)) is not None:
                corrected = problem.at(start[0] + other[0])
                if self.accepts(corrected, start[1] + other[1], slope):
                    return Trial(corrected, start[1] + other[1], length, "correction")
            length *= 0.5
        return None

    def extend(
        self,
        problem: Lagrangian,
        start: tuple[Tensor, Tensor],
        step: tuple[Tensor, Tensor],
        slope: float,
        trial: Trial,
    ) -> Trial:
        """The longest of 1, 8, 64, ... along a full step while that still satisfies Armijo's condition and lowers M.

        For steps whose length is that of a shift, not of the curvature: where M has no minimum along them.
        """
        value = self.merit.terms(trial.point, trial.multiplier).at(self.mu, self.nu)
        while trial.length < LONGEST:
            length = EXPANSION * trial.length
            point, multiplier = problem.at(start[0] + length * step[0]), start[1] + length * step[1]
            if not (point.finite and self.merit.floor(point, multiplier, self.mu) < value):
                break
            found = self.merit.terms(point, multiplier).at(self.mu, self.nu)
            if not found < min(value, self.reference + self.beta * length * slope):
                break
            trial, value = Trial(point, multiplier, length, "armijo"), found
        return trial

    def accepts(self, point: Point, multiplier: Tensor, decrease: float) -> bool:
        """Whether M is low enough there; derivatives are evaluated only where the other terms leave it open."""
        bound = self.reference + self.beta * decrease + ROUNDING * abs(self.reference)
        if not point.finite or not self.merit.floor(point, multiplier, self.mu) <= bound:
            self.bent, self.outside = False, not point.finite
            return False
        accepted = self.merit.terms(point, multiplier).at(self.mu, self.nu) <= bound
        if not accepted:
            self.bent, self.outside = True, False
        return accepted
