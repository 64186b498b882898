"""The sequence of penalties of LV-HBA, and the extrapolation of its limit."""

import enum
from dataclasses import dataclass, field

import torch
from torch import Tensor

from implicit import State

KEPT = 4
FAR = 1e6
"""A run that is so many times as far away as it began has left for infinity: F / c was stronger than f - v there."""
EARLY = 0.1
"""Two extrapolations of first order may agree by chance; they must agree so much better."""
PATIENCE = 500
LITTLE = 1e-3


class Outcome(enum.IntEnum):
    """How the stages ended."""

    RUNNING = 0
    CONVERGED = 1
    EXHAUSTED = 2
    DIVERGED = 3


@dataclass(kw_only=True)
class StagesState(State):
    """Where the sequence stands; ``step`` counts the stages that ended.

    Attributes:
        penalty: c_0 of the current stage.
        began: the step at which it began.
        marked: the step of the last comparison of merit and residual, which are ``mark``.
        home: the start, to which a run that diverged returns.
        ended: the ends of the last four stages, newest last: the projected point and then its image.
        settled: whether each of them reached its fixed point.
        outcome: an :class:`Outcome`.
        change: distance of the last two extrapolations of (x, y); ``change_x`` that of x alone.
        bias: distance of (x, y) at the end of the last stage from the extrapolation.
        apart: distance of y and theta in the extrapolation.
    """

    penalty: Tensor
    began: int
    home: Tensor
    ended: Tensor
    settled: list[int] = field(default_factory=list)
    outcome: int = 0
    marked: int = 0
    mark: list[float] = field(default_factory=list)
    change: float = float("inf")
    change_x: float = float("inf")
    bias: float = float("inf")
    apart: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Residual of the fixed point, what it must not exceed, and the merit there."""

    residual: float
    tolerance: float
    merit: float


@dataclass(frozen=True, kw_only=True)
class Stages:
    """When c grows, and when the run is over.

    The fixed point of a stage differs from the limit by ``a / c + b / c^2 + ...`` as long as the active constraints
    stay, so that of the ends s_1, s_2 of consecutive stages ``(growth s_2 - s_1) / (growth - 1)`` is free of the first
    term, and three ends give an extrapolation free of the second. The run has converged when that changes by at most
    the tolerance from one stage to the next and its theta meets y, which says that y solves the lower level:
    constraints may hold (x, y) in place while c is too small.

    Args:
        growth: factor on c.
        count: stages at most.
        steps: of a stage at most.
        rtol, atol: on the change, relative to ``1 + |(x, y)|``, and absolute.
    """

    growth: float
    count: int
    steps: int
    rtol: float
    atol: float

    def init(self, point: Tensor, penalty: float) -> StagesState:
        """Before the first step."""
        return StagesState(
            penalty=point.new_tensor(penalty), began=0, home=point.clone(), ended=point.new_zeros(KEPT, 2 * len(point))
        )

    def look(
        self, state: StagesState, point: Tensor, end: Tensor, step: int, lengths: Tensor, n: int, measured: Measured
    ) -> Tensor | None:
        """End the stage if it is over; returns the point at which the next one begins, not projected.

        A stage is over at its fixed point, after ``steps``, or where neither merit nor residual has improved for
        :data:`PATIENCE` steps.

        Args:
            state: updated.
            point: the current point, projected.
            end: its image, not projected.
            step: steps done.
            lengths: units of x and y, which lead in the point; theta follows, in the units of y.
            n: size of x.
            measured: of the current point.
        """
        if Outcome(state.outcome) is not Outcome.RUNNING:
            return None
        if float(torch.linalg.vector_norm(end)) > FAR * (1.0 + float(torch.linalg.vector_norm(state.home))):
            return self._home(state, step)
        settled = measured.residual <= measured.tolerance
        if not settled and step - state.began < self.steps and not _stagnates(state, step, measured):
            return None
        state.step += 1
        state.ended = torch.cat([state.ended[1:], torch.cat([point, end])[None]])
        state.settled = [*state.settled, int(settled)][-KEPT:]
        if self._converged(state, lengths, n):
            state.outcome = int(Outcome.CONVERGED)
            return None
        if state.step >= self.count or self._stands(state, lengths):
            state.outcome = int(Outcome.EXHAUSTED)
            return None
        self._raise(state, step)
        if len(state.settled) > 1 and all(state.settled[-2:]):
            return end + (end - state.ended[-2][len(end) :]) / self.growth
        return end

    def limit(self, state: StagesState) -> Tensor | None:
        """The extrapolation ``c -> inf`` from the last two or three fixed points; None where there are none."""
        found = self._limits(state)
        return found[-1] if found else None

    def _limits(self, state: StagesState) -> list[Tensor]:
        """Extrapolations, the last one last: of second order where three fixed points in a row are there."""
        usable = 0
        for flag in reversed(state.settled):
            if not flag:
                break
            usable += 1
        ends = list(state.ended[KEPT - usable :])
        first = [_extrapolated(ends[k], ends[k + 1], self.growth) for k in range(usable - 1)]
        if usable < KEPT:
            return first
        return [_extrapolated(first[k], first[k + 1], self.growth**2) for k in range(usable - 2)]

    def _converged(self, state: StagesState, lengths: Tensor, n: int) -> bool:
        limits = self._limits(state)
        if len(limits) < 2:
            return False
        count = len(lengths)
        before, limit, last = (lengths * point[:count] for point in (*limits[-2:], state.ended[-1]))
        theta = lengths[n:] * limits[-1][count : 2 * count - n]
        change = limit - before
        state.change, state.change_x, state.bias, state.apart, size = torch.stack(
            [torch.linalg.vector_norm(v) for v in (change, change[:n], limit - last, limit[n:] - theta, limit)]
        ).tolist()
        allowed = max(self.atol, self.rtol * (1.0 + size))
        strict = 1.0 if len(state.settled) == KEPT else EARLY
        return state.change <= strict * allowed and state.apart <= 10.0 * allowed

    def _stands(self, state: StagesState, lengths: Tensor) -> bool:
        """Whether two stages in a row ended at the same (x, y) without reaching their fixed points: more will not."""
        if len(state.settled) < 2 or any(state.settled[-2:]):
            return False
        before, after = (lengths * point[: len(lengths)] for point in state.ended[-2:])
        moved, length = torch.linalg.vector_norm(after - before), torch.linalg.vector_norm(after)
        return bool(moved <= max(self.atol, self.rtol * (1.0 + float(length))))

    def _raise(self, state: StagesState, step: int) -> None:
        state.penalty = self.growth * state.penalty
        state.began = state.marked = step
        state.mark = []

    def _home(self, state: StagesState, step: int) -> Tensor | None:
        """Back to the start with a larger c."""
        state.step += 1
        state.settled = []
        if state.step >= self.count:
            state.outcome = int(Outcome.DIVERGED)
            return None
        self._raise(state, step)
        return state.home


def _stagnates(state: StagesState, step: int, measured: Measured) -> bool:
    if state.mark and step - state.marked < PATIENCE:
        return False
    now = [measured.merit, measured.residual]
    before, state.mark, state.marked = state.mark, now, step
    return bool(before) and now[0] >= before[0] - LITTLE * abs(now[0]) and now[1] > 0.5 * before[1]


def _extrapolated(before: Tensor, after: Tensor, factor: float) -> Tensor:
    return (factor * after - before) / (factor - 1.0)
