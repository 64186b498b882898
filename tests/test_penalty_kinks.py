"""Kinks of the hyper-objective: where the active set of the lower level changes."""

import pytest
import torch

import bilevel
import problems
from bilevel import Penalty
from tests import penalty_checks as checks


def test_a_kink_is_reached_and_reported() -> None:
    """box_kink: the hypergradient jumps from -1/2 to 1/2 at x* = 1, so that its bias cannot fall with p."""
    found = checks.reaches("box_kink", rtol=1e-3)
    assert "kink" in found.accuracy.notes[-1]
    assert found.accuracy.stationarity is not None
    assert found.accuracy.stationarity < 1e-2
    assert float(found.x) == pytest.approx(1.0, abs=1e-3)


def test_kinks_are_told_from_slopes() -> None:
    checks.tells_kinks_from_slopes()


def test_the_bias_at_a_smooth_minimizer_is_not_taken_for_a_kink() -> None:
    """f = (y - 1)^2 / 2 + x^2 / 10 and g = (y - x)^2 / 20 at p = 30: the penalised minimizer is 75/95, not 5/6."""
    problem = bilevel.BilevelProblem(lambda x, y: 0.5 * (y - 1) ** 2 + 0.1 * x**2, lambda x, y: 0.05 * (y - x) ** 2)
    x, y = torch.tensor(75 / 95), torch.tensor(0.8)
    method = Penalty(penalty=30.0, bias_rtol=1e-3).resolve(problem, x, y)
    state = method.init(problem, x, y)
    state.first = torch.tensor(1.0)
    accuracy, status, message = method.assess(problem, state, bilevel.Status.CONVERGED)
    assert status is bilevel.Status.STALLED
    assert "the hypergradient is biased" in message
    assert accuracy.stationarity == pytest.approx(1.2 * (5 / 6 - 75 / 95), rel=1e-6)
    assert not any("kink" in note for note in accuracy.notes)


def test_the_step_at_a_kink_must_be_short() -> None:
    """The penalised hyper-objective has curvature p there: eta = 0.3 hops around it, eta = 1/p settles."""
    case = problems.case("box_kink")
    assert case.x_penalized is not None
    best, ends = float(case.x_penalized(0.01)), {}
    for eta in (0.3, 0.01):
        method = Penalty(penalty=100.0, step_size=eta, rtol=0.0, lower_chunks=2, lower_condition=1.0)
        x, y = torch.tensor(0.9), torch.tensor(0.9)
        away = []
        for steps in (60, 61):
            away.append(abs(float(bilevel.solve(case.problem, method, x, y, max_steps=steps).x) - best))
        ends[eta] = max(away)
    assert ends[0.01] < 1e-6
    assert ends[0.3] > 0.02
