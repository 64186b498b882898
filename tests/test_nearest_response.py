"""The lower solution next to a point, against projections onto the set of lower solutions."""

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel.nearest_response
import problems
from bilevel import BilevelProblem
from bilevel.flat import FlatProblem
from bilevel.lower_level import solve_lower_level
from bilevel.nearest_response import _paired, respond


def flat_of(problem: BilevelProblem, x: Tensor, y: Tensor) -> FlatProblem:
    return FlatProblem(problem, x, y)


def test_a_single_lower_solution_is_returned_from_anywhere() -> None:
    case = problems.case("coupled_polyhedral")
    flat = flat_of(case.problem, *case.start)
    found = respond(flat, case.x_star, case.y_star + 3.0, curvature=1.0)
    torch.testing.assert_close(found.y, case.y_star, rtol=0, atol=1e-9)
    assert case.multipliers_star is not None
    multipliers = found.lower.multipliers.inequality
    torch.testing.assert_close(multipliers, case.multipliers_star["lower_inequality"], rtol=0, atol=1e-8)
    assert found.upper == pytest.approx(case.upper_star)
    assert found.violation <= 1e-9


def test_of_many_lower_solutions_the_nearest_is_taken_if_the_upper_level_gains() -> None:
    """Solutions at x = 2: y1 + y2 = 2 with y1 <= 1."""
    case = problems.case("coupled_segment")
    flat = flat_of(case.problem, *case.start)
    x = torch.tensor([2.0])
    target = torch.tensor([2.0, 0.0])  # of f; the nearest solution to it is (1, 1)
    for y, nearest in ((torch.tensor([0.9, 0.9]), torch.tensor([1.0, 1.0])), (torch.tensor([3.0, 0.4]), None)):
        found = respond(flat, x, y, curvature=2.0)
        assert float(found.y.sum()) == pytest.approx(2.0, abs=1e-6)
        assert found.lower.residual.largest <= 1e-8
        if nearest is not None:
            torch.testing.assert_close(found.y, nearest, rtol=0, atol=1e-5)
        best = 0.5 * float((torch.tensor([1.0, 1.0]) - target).square().sum()) + 2.0
        assert found.upper >= best - 1e-6


def test_another_solution_stays_where_the_upper_level_prefers_it() -> None:
    """g is flat in y2: near y the upper value is 25, at what the solver finds from there smaller."""
    problem = BilevelProblem(
        lambda x, y: (y[1] - x[0]).square() + y[0],
        lambda x, y: (y[0] - x[0]).square(),
        lower_inequality=lambda x, y: y.abs() - 10.0 - 0.0 * x[0],
    )
    x, y = torch.zeros(1), torch.tensor([0.3, 5.0])
    flat = flat_of(problem, x, y)
    plain = solve_lower_level(flat, x, y)
    assert float(plain.y[1]) < 4.0
    torch.testing.assert_close(respond(flat, x, y, curvature=2.0).y, plain.y, rtol=0, atol=0)


def test_a_solution_that_violates_the_upper_level_does_not_count() -> None:
    """g is flat in y2, f falls with it, and the upper level allows no more than y2 = 1."""
    problem = BilevelProblem(
        lambda x, y: x.sum() - y[1],
        lambda x, y: (y[0] - x[0]).square(),
        lower_inequality=lambda x, y: y[1].abs() - 10.0 - 0.0 * x[0],
        upper_inequality=lambda x, y: y[1] - 1.0 + 0.0 * x[0],
    )
    x, y = torch.zeros(1), torch.tensor([0.3, 5.0])
    assert respond(flat_of(problem, x, y), x, y, curvature=2.0).violation <= 1e-9


def test_next_to_the_solution_one_solve_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problems.case("coupled_polyhedral")
    flat, calls = flat_of(case.problem, *case.start), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return solve_lower_level(*arguments, **options)

    monkeypatch.setattr(bilevel.nearest_response, "solve_lower_level", counted)
    respond(flat, case.x_star, case.y_star, curvature=1.0)
    assert len(calls) == 1
    respond(flat, case.x_star, case.y_star + 3.0, curvature=1.0)
    assert len(calls) == 4


def test_of_two_sets_of_multipliers_those_that_fit_are_taken() -> None:
    case = problems.case("coupled_polyhedral")
    flat = flat_of(case.problem, *case.start)
    right = solve_lower_level(flat, case.x_star, case.y_star)
    wrong = right.multipliers._replace(inequality=right.multipliers.inequality + 1.0)
    for given in ((right.multipliers, wrong), (wrong, right.multipliers)):
        found = _paired(flat, case.x_star, case.y_star, given, right)
        assert found.multipliers is right.multipliers
        assert found.residual.largest <= 1e-8


def test_beside_a_jump_of_the_solutions_the_point_itself_counts() -> None:
    """g = x y over [0, 1]: at x = 1e-8 the solution is 0, but y = 1 is one up to 1e-8 and wanted above."""
    problem = BilevelProblem(
        lambda x, y: (y - 1.0).square().sum() + x.square().sum(),
        lambda x, y: (x * y).sum(),
        lower_inequality=lambda x, y: torch.cat([y - 1.0, -y]),
    )
    one, zero = torch.ones(1), torch.zeros(1)
    flat = flat_of(problem, one, one)
    assert float(respond(flat, zero + 1e-8, one, curvature=1.0).y) == 1.0
    assert float(respond(flat, zero + 1e-3, one, curvature=1.0).y) == pytest.approx(0.0, abs=1e-6)


def test_quadratic_growth_is_not_mistaken_for_a_solution() -> None:
    """(y - 1)²/2 at 1 + 1e-4 is 5e-9 above its minimum, and f falls with y: still y = 1."""
    problem = BilevelProblem(
        lambda x, y: -10.0 * (y - 1.0).sum() + x.sum(),
        lambda x, y: 0.5 * (y - 1.0).square().sum(),
        lower_inequality=lambda x, y: y - x - 9.0,
    )
    x, y = torch.zeros(1), torch.tensor([1.0001])
    assert float(respond(flat_of(problem, x, y), x, y, curvature=1.0).y) == pytest.approx(1.0, abs=1e-8)
