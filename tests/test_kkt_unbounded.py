"""KKTRelaxation where upper falls without bound, where it only seems to, and what it says where nothing is feasible."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import BilevelProblem, KKTRelaxation, Status, verify
from bilevel.algorithms import kkt_relaxation, kkt_relaxation_unbounded
from bilevel.algorithms.kkt_relaxation_report import worst
from bilevel.algorithms.kkt_relaxation_unbounded import fall, look
from bilevel.algorithms.relaxed_kkt import Outcome, RelaxedKKT, solve_program
from bilevel.flat import FlatProblem
from constrained import Box
from implicit import SolveError

pytestmark = pytest.mark.filterwarnings("ignore:upper does not depend on y")
ALONE = KKTRelaxation(restarts=0)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def nearest(upper: Callable[[Tensor, Tensor], Tensor], **more: Any) -> BilevelProblem:
    """y = x, with y <= x + 1 never active."""
    more.setdefault("lower_inequality", lambda x, y: y - x - 1)
    return BilevelProblem(upper=upper, lower=lambda x, y: ((y - x) ** 2).sum(), **more)


def halves(x: Tensor) -> Tensor:
    return torch.cat([x, x]) / 2


FALLING = {
    "down x": (nearest(lambda x, y: x.sum()), vector(0.0), vector(0.0), lambda x: x),
    "concave": (nearest(lambda x, y: -(x**2).sum()), vector(1.0), vector(0.0), lambda x: x),
    "exponential": (nearest(lambda x, y: -torch.exp(-x).sum()), vector(1.0), vector(1.0), lambda x: x),
    "an active row": (
        BilevelProblem(lambda x, y: 0.1 * x.sum() - y.sum(), lambda x, y: (y**2).sum(), lower_inequality=torch.sub),
        vector(0.0),
        vector(0.0),
        lambda x: x.clamp(min=0),
    ),
    "a bound": (
        nearest(lambda x, y: -(x + y).sum(), lower_inequality=None, lower_set=Box(0.0, None)),
        vector(1.0),
        vector(1.0),
        lambda x: x.clamp(min=0),
    ),
    "an equation": (
        BilevelProblem(lambda x, y: -y[0], lambda x, y: (y**2).sum(), lower_equality=lambda x, y: y.sum() - x),
        vector(1.0),
        vector(1.0, 1.0),
        halves,
    ),
    "along an edge": (
        nearest(
            lambda x, y: x[0] - 2 * y[0],
            lower_inequality=lambda x, y: 1 - y,
            upper_inequality=lambda x, y: x[:1] - 2 * x[1:],
        ),
        vector(1.0, 1.0),
        vector(1.0, 1.0),
        lambda x: x.clamp(min=1),
    ),
    "a lower level that is concave": (
        BilevelProblem(
            lambda x, y: -x.sum() + (y**2).sum(), lambda x, y: -((y - x) ** 2).sum(), lower_set=Box(-1.0, 1.0)
        ),
        vector(0.5),
        vector(0.0),
        lambda x: -torch.sign(x),
    ),
}


def slowly(names: Any, *slow: str) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


@pytest.mark.parametrize("name", slowly(FALLING, "an active row", "an equation", "a lower level that is concave"))
def test_falls_without_end_are_found_at_the_first_start(name: str) -> None:
    problem, x0, y0, solution = FALLING[name]
    with pytest.raises(SolveError, match=r"UNBOUNDED after 1 steps.*verified.*upper_set=.*sign of upper") as caught:
        bilevel.solve(problem, KKTRelaxation(), x0, y0)
    found = caught.value.solution
    assert found.status is Status.UNBOUNDED
    below = solution(found.x)
    assert float((found.y - below).abs().max()) <= 1e-9 * float(found.x.abs().max()), "the lower solution there"
    assert found.upper_value <= -1e6
    assert float(found.x.abs().max()) < 1e12, "early in the fall"
    assert verify(problem, found.x, found.y, generator=torch.Generator().manual_seed(5))
    assert found.multipliers == {}
    (start,) = found.starts
    assert (start.status, start.accepted, start.upper_value) == (Status.UNBOUNDED, True, found.upper_value)
    assert "without bound" in start.note


def test_a_fall_that_another_start_finds_ends_the_run() -> None:
    # x^3 has a stationary point at 0, where the given start ends.
    problem = nearest(lambda x, y: (y**3).sum())
    alone = bilevel.solve(problem, ALONE, vector(1.0), vector(1.0))
    assert alone.status is Status.CONVERGED
    found = bilevel.solve(problem, KKTRelaxation(), vector(1.0), vector(1.0), raise_on_failure=False)
    assert found.status is Status.UNBOUNDED
    assert found.upper_value < -1e6
    assert [s.status for s in found.starts].count(Status.UNBOUNDED) == 1


def test_an_unbounded_run_is_resumed_as_what_it_is() -> None:
    problem, x0, y0, _ = FALLING["concave"]
    found = bilevel.solve(problem, ALONE, x0, y0, raise_on_failure=False)
    again = bilevel.solve(problem, ALONE, checkpoint=found.checkpoint, raise_on_failure=False)
    assert again.status is Status.UNBOUNDED
    assert again.steps == found.steps
    assert torch.equal(again.x, found.x)


# Bounded problems whose values or minimizers are far away.

FAR = {
    "square": (nearest(lambda x, y: ((x - 1e5) ** 2).sum()), 1e5),
    "square, coupled above": (
        nearest(lambda x, y: ((x - 1e5) ** 2).sum(), upper_inequality=lambda x, y: x + y - 1e4),
        5e3,
    ),
    "line to a row": (nearest(lambda x, y: x.sum(), upper_inequality=lambda x, y: -1e9 - x), -1e9),
    "line to a coupled row": (nearest(lambda x, y: x.sum(), upper_inequality=lambda x, y: -1e11 - y), -1e11),
    "line to a bound": (nearest(lambda x, y: x.sum(), upper_set=Box(-1e7, None)), -1e7),
    "flat parabola": (nearest(lambda x, y: (1e-9 * x**2 - x).sum()), 5e8),
    "flatter parabola": (nearest(lambda x, y: (1e-12 * x**2 - y).sum()), 5e11),
    "quartic to a bound": (nearest(lambda x, y: -((x + 0.1) ** 4).sum(), upper_set=Box(-1e5, 1e6)), 1e6),
}


@pytest.mark.parametrize("name", FAR)
def test_far_minima_are_found(name: str) -> None:
    problem, x = FAR[name]
    found = bilevel.solve(problem, ALONE, vector(0.0), vector(0.0))
    assert found.status is Status.CONVERGED, found.message
    assert float(found.x) == pytest.approx(x, rel=1e-6)
    assert float(found.y) == pytest.approx(x, rel=1e-6)


DEEP = {
    "quartic": nearest(lambda x, y: -(x**4).sum(), upper_inequality=lambda x, y: (x**2).sum() - 1e10),
    "sextic": nearest(lambda x, y: -(y**6).sum(), lower_inequality=lambda x, y: torch.cat([y - 1e4, -1e4 - y])),
}
"""The smallest values are -1e20 and -1e24, the sizes at the start about one."""


@pytest.mark.parametrize("name", slowly(DEEP, "quartic"))
def test_deep_values_are_not_taken_for_a_fall_without_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def counted(*args: Any, **more: Any) -> Any:
        looks.append(look(*args, **more))
        return looks[-1]

    monkeypatch.setattr(kkt_relaxation, "look", counted)
    found = bilevel.solve(DEEP[name], ALONE, vector(0.1), vector(0.0), raise_on_failure=False)
    assert found.status is not Status.UNBOUNDED
    assert looks == [None, None], "it fell deep, and is not asked more than twice"


def test_the_program_itself_says_unbounded_there() -> None:
    # The interior-point method's threshold is 1e16; that alone would be a false claim.
    kkt = RelaxedKKT(FlatProblem(DEEP["sextic"], vector(0.1), vector(0.0)), 1.0)
    free = torch.zeros(2, dtype=torch.bool)
    program = kkt.piece(free, vector().reshape(0, 1), 0.0)
    outcome = solve_program(program, vector(0.1, 0.1, 0.0, 0.0), None, atol=1e-8, max_steps=300)
    assert outcome.status is Status.UNBOUNDED
    assert outcome.fell


def test_solved_programs_do_not_fall() -> None:
    kkt = RelaxedKKT(FlatProblem(FAR["line to a bound"][0], vector(0.0), vector(0.0)), 1.0)
    program = kkt.piece(torch.zeros(1, dtype=torch.bool), vector().reshape(0, 1), 0.0)
    outcome = solve_program(program, vector(0.0, 0.0, 0.0), None, atol=1e-8, max_steps=300)
    assert outcome.status is Status.CONVERGED
    assert kkt.value(outcome.z) < -9e6
    assert not outcome.fell


@pytest.mark.slow
def test_every_start_may_look() -> None:
    # x^4 goes down on both sides; on the side of the given start it ends at a bound, and both looks there fail.
    problem = nearest(lambda x, y: -(x**4).sum(), upper_inequality=lambda x, y: x - 1e5)
    found = bilevel.solve(problem, KKTRelaxation(), vector(0.1), vector(0.0), raise_on_failure=False)
    assert found.status is Status.UNBOUNDED
    assert len(found.starts) > 1
    assert float(found.x) < 0


def at(problem: BilevelProblem, *z: float) -> tuple[RelaxedKKT, Any, Outcome]:
    """A run that stands at z, and the end of a program there."""
    point = vector(*z)
    kkt = RelaxedKKT(FlatProblem(problem, point[:1], point[1:2]), 1.0)
    state = ALONE.resolve(problem, point[:1], point[1:2]).init(problem, point[:1], point[1:2])
    state.point = point
    outcome = solve_program(kkt.relaxed(1.0, state.used_cuts, 0.0), point, None, atol=1e-8, max_steps=0)
    return kkt, state, replace(outcome, z=point, fell=True)


def test_what_the_tolerance_allows_is_not_a_fall() -> None:
    # y = 0 for every x, but g = exp(-x) y tells little at x = 33: y = 1e6 is optimal within 1e-8.
    problem = BilevelProblem(
        lambda x, y: -y.sum() + 0 * x.sum(),
        lambda x, y: (torch.exp(-x) * y).sum(),
        lower_inequality=lambda x, y: -y,
    )
    kkt, state, outcome = at(problem, 30.0, 1.0, 0.0)
    free = torch.zeros(1, dtype=torch.bool)
    deep = fall(kkt, kkt.piece(free, state.used_cuts, 0.0), state.point, atol=1e-8, time_limit=None)
    assert deep is not None
    seen = verify(problem, deep[:1], deep[1:2])
    assert seen and seen.optimality_gap is not None and seen.optimality_gap > 3e-9
    assert look(kkt, state, outcome, atol=1e-8, time_limit=None) is None


def test_a_fall_over_points_that_do_not_solve_the_lower_level_is_none() -> None:
    # -y^2 on y <= 1: y = 0 is stationary for every x, and a maximum; below, there is no minimum at all.
    problem = BilevelProblem(
        lambda x, y: x.sum() + y.sum(), lambda x, y: -(y**2).sum(), lower_inequality=lambda x, y: y - 1 + 0 * x
    )
    kkt, state, outcome = at(problem, 0.0, 0.0, 0.0)
    free = torch.zeros(1, dtype=torch.bool)
    assert fall(kkt, kkt.piece(free, state.used_cuts, 0.0), state.point, atol=1e-8, time_limit=None) is not None
    assert look(kkt, state, outcome, atol=1e-8, time_limit=None) is None


def test_what_verify_refuses_is_not_a_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    kkt, state, outcome = at(FALLING["down x"][0], 0.0, 0.0, 0.0)
    looked = look(kkt, state, outcome, atol=1e-8, time_limit=None)
    assert looked is not None
    refused = replace(looked[1], accepted=False)
    monkeypatch.setattr(kkt_relaxation_unbounded, "verify_flat", lambda *_: refused)
    assert look(kkt, state, outcome, atol=1e-8, time_limit=None) is None


def test_a_look_ends_with_the_time_and_where_functions_are_not_defined() -> None:
    problem = FALLING["down x"][0]
    kkt, state, outcome = at(problem, 0.0, 0.0, 0.0)
    assert look(kkt, state, outcome, atol=1e-8, time_limit=None) is not None
    assert look(kkt, state, outcome, atol=1e-8, time_limit=1e-3) is None

    def defined(x: Tensor, y: Tensor) -> Tensor:
        if float(x.detach().abs().max()) > 1e9:
            raise ArithmeticError("too far")
        return x.sum()

    kkt, state, outcome = at(nearest(defined), 0.0, 0.0, 0.0)
    assert look(kkt, state, outcome, atol=1e-8, time_limit=None) is None


# Infeasible problems name the field.


def test_the_worst_row_is_named_by_its_field() -> None:
    problem = BilevelProblem(
        lambda x, y: (x**2).sum() + (y**2).sum(),
        lambda x, y: ((y - x) ** 2).sum(),
        lower_inequality=lambda x, y: torch.stack([y[0] - 1, x[0] - 2, 100 * (y[1] - 1)]),  # row 1 is moved above
        lower_equality=lambda x, y: y[:1] + y[1:] - 1,
        upper_inequality=lambda x, y: x[:1] - 9,
        upper_set=Box(-1.0, 20.0),
        lower_set=Box(None, 30.0),
    )
    flat = FlatProblem(problem, vector(0.0, 0.0), vector(0.0, 0.0))
    for x, y, said in (
        ((5.0, 0.0), (2.0, -1.0), "lower_inequality, row 1, by 3"),
        ((0.0, 0.0), (1.5, -0.5), "lower_inequality, row 0, by 0.5"),
        ((0.0, 0.0), (-0.5, 1.5), "lower_inequality, row 2, by 50"),
        ((0.0, 0.0), (-1.0, -2.0), "lower_equality, row 0, by 4"),
        ((0.0, -1.5), (0.0, 1.0), "upper_set, entry 1, by 0.5"),
        ((0.0, 0.0), (-70.0, 71.0), "lower_inequality, row 2, by 7e+03"),
        ((0.0, 0.0), (32.0, -31.0), "lower_inequality, row 0, by 31"),
        ((0.0, 25.0), (0.0, 1.0), "upper_set, entry 1, by 5"),
    ):
        assert worst(flat, vector(*x), vector(*y)) == said


def test_rows_count_relative_to_their_gradients() -> None:
    problem = nearest(lambda x, y: (x**2).sum(), lower_inequality=lambda x, y: torch.cat([100 * (y - 1), y - 0.5]))
    flat = FlatProblem(problem, vector(0.0), vector(0.0))
    assert worst(flat, vector(0.0), vector(1.4)) == "lower_inequality, row 1, by 0.9"


def test_the_message_of_an_infeasible_problem_names_the_row() -> None:
    problem = nearest(lambda x, y: (x**2).sum(), upper_inequality=lambda x, y: torch.cat([x - 7, x + 1 - y]))
    with pytest.raises(SolveError, match=r"INFEASIBLE.*least violation is 0\.707.*upper_inequality, row 1, by 1$"):
        bilevel.solve(problem, ALONE, vector(0.0), vector(0.0))
