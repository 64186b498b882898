"""When c grows and when a run is over, on made-up fixed points."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bilevel.algorithms.lv_hba_stages import Measured, Outcome, Stages, StagesState

SETTLED = Measured(residual=0.0, tolerance=1e-9, merit=0.0)
MOVING = Measured(residual=1.0, tolerance=1e-9, merit=0.0)
UNITS = torch.ones(2)


def made(**settings: float) -> Stages:
    return Stages(**{"growth": 3.0, "count": 12, "steps": 1_000, "rtol": 1e-4, "atol": 0.0, **settings})  # type: ignore[arg-type]


def sequence(stages: Stages, fixed_point: Callable[[float], Tensor], penalty: float = 1.0) -> StagesState:
    """Every stage settles at once at the fixed point of its c: x, y and theta, one number each."""
    state = stages.init(torch.zeros(3), penalty)
    for step in range(100):
        point = fixed_point(float(state.penalty))
        stages.look(state, point, point, step + 1, UNITS, 1, SETTLED)
        if state.outcome != Outcome.RUNNING:
            return state
    raise AssertionError("no end")


def test_two_terms_of_the_bias_are_extrapolated_away() -> None:
    limit = torch.tensor([1.0, 2.0, 2.0])

    def bias(c: float) -> Tensor:
        return limit + torch.tensor([3.0, -1.0, -1.0]) / c + torch.tensor([-2.0, 5.0, 5.0]) / c**2

    state = sequence(made(), bias)
    assert Outcome(state.outcome) is Outcome.CONVERGED
    assert state.step == 4
    found = made().limit(state)
    assert found is not None
    torch.testing.assert_close(found[:3], limit, rtol=0, atol=1e-12)
    ended = bias(float(state.penalty))
    assert state.bias == pytest.approx(float((ended - limit)[:2].norm()), rel=1e-6)


def test_no_bias_takes_three_values() -> None:
    state = sequence(made(), lambda c: torch.tensor([1.0, 2.0, 2.0]))
    assert (state.step, Outcome(state.outcome), state.change) == (3, Outcome.CONVERGED, 0.0)
    assert float(state.penalty) == 9.0


def test_y_held_away_from_lower_solutions_is_no_convergence() -> None:
    state = sequence(made(), lambda c: torch.tensor([1.0, 2.0, 2.5]))
    assert Outcome(state.outcome) is Outcome.EXHAUSTED
    assert state.step == 12 and state.apart == pytest.approx(0.5)


def test_slow_tails_are_not_called_converged_early() -> None:
    """A bias of c^(-1/2) is not extrapolated away; the changes are small only where the error is."""
    state = sequence(made(rtol=1e-3), lambda c: torch.tensor([1.0, 2.0, 2.0]) + 0.3 / c**0.5)
    found = made().limit(state)
    assert found is not None
    error = float((found[:2] - torch.tensor([1.0, 2.0])).norm())
    assert Outcome(state.outcome) is Outcome.EXHAUSTED or error <= 10 * 1e-3 * 3.2


def test_a_stage_that_does_not_settle_ends_after_its_steps_and_is_not_extrapolated() -> None:
    stages = made(count=3, steps=50)
    state = stages.init(torch.zeros(3), 1.0)
    changed = []
    for step in range(1, 200):
        before, point = float(state.penalty), torch.full((3,), float(step))
        stages.look(state, point, point, step, UNITS, 1, Measured(residual=1.0 / step, tolerance=0.0, merit=-step))
        changed += [step] if float(state.penalty) != before else []
        if state.outcome != Outcome.RUNNING:
            break
    assert changed == [50, 100]
    assert Outcome(state.outcome) is Outcome.EXHAUSTED and state.settled == [0, 0, 0]
    assert stages.limit(state) is None


def test_a_run_that_stands_still_unsettled_is_over() -> None:
    stages = made(steps=50)
    state, point = stages.init(torch.zeros(3), 1.0), torch.ones(3)
    for step in (50, 100):
        assert Outcome(state.outcome) is Outcome.RUNNING
        stages.look(state, point, point, step, UNITS, 1, MOVING)
    assert Outcome(state.outcome) is Outcome.EXHAUSTED and state.step == 2


def test_a_stage_that_stagnates_ends_early() -> None:
    stages = made(steps=100_000)
    state, point = stages.init(torch.zeros(3), 1.0), torch.ones(3)
    ended = []
    for step in range(10, 600, 10):
        stages.look(state, point, point, step, UNITS, 1, MOVING)
        ended.append(state.step)
    assert ended.index(1) == 50 and state.settled == [0]
    again = stages.init(torch.zeros(3), 1.0)
    for step in range(10, 3_000, 10):  # the residual halves in time
        stages.look(again, point, point, step, UNITS, 1, Measured(residual=0.998**step, tolerance=1e-9, merit=0.0))
    assert again.step == 0


def test_the_next_stage_begins_where_the_last_two_lead() -> None:
    """Ends 1 + 1/c: the next is met exactly."""
    stages = made(rtol=0.0)
    state = stages.init(torch.zeros(3), 1.0)
    begin: Tensor | None = None
    for step in range(1, 6):
        end = torch.ones(3) + 1.0 / float(state.penalty)
        if step > 2 and begin is not None:
            torch.testing.assert_close(begin, end)
        begin = stages.look(state, end, end, step, UNITS, 1, SETTLED)


def test_runs_that_leave_return_to_the_start_with_a_larger_penalty() -> None:
    stages = made(count=3)
    state = stages.init(torch.full((3,), 0.5), 1.0)
    far = torch.full((3,), 1e7)
    back = stages.look(state, far, far, 10, UNITS, 1, MOVING)
    assert back is not None and torch.equal(back, torch.full((3,), 0.5))
    assert float(state.penalty) == 3.0 and state.began == 10
    for step in (20, 30):
        back = stages.look(state, far, far, step, UNITS, 1, MOVING)
    assert back is None and Outcome(state.outcome) is Outcome.DIVERGED


def test_changes_are_measured_in_the_units_of_the_problem() -> None:
    """Extrapolations that still change by 1e-3 in u: in x = 2^-10 u by 1e-6, in y = theta = 2^10 u by one."""

    def fixed_point(c: float) -> Tensor:
        return torch.tensor([1.0, 1.0, 1.0]) + torch.tensor([0.1, 0.0, 0.0]) / c**0.5

    def ends(unit: float) -> StagesState:
        stages = made(rtol=1e-4, count=5)
        state = stages.init(torch.zeros(3), 1.0)
        for step in range(1, 6):
            point = fixed_point(float(state.penalty))
            stages.look(state, point, point, step, torch.tensor([unit, 1.0]), 1, SETTLED)
        return state

    short, long = ends(2.0**-10), ends(2.0**10)
    assert Outcome(short.outcome) is Outcome.CONVERGED and Outcome(long.outcome) is Outcome.EXHAUSTED
    assert long.change > 1e3 * short.change > 0 and long.bias > 1e3 * short.bias > 0
