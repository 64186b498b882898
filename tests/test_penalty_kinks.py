"""Kinks of the hyper-objective: where the active set of the lower level changes."""

import pytest
import torch
from torch import Tensor

import bilevel
import problems
from bilevel import Penalty
from bilevel.algorithms.penalty_bias import kink
from constrained import WholeSpace
from tests import penalty_checks as checks


def test_a_kink_is_reached_and_reported() -> None:
    """box_kink: the hypergradient jumps from -1/2 to 1/2 at x* = 1, so that its bias cannot fall with p."""
    found = checks.reaches("box_kink", rtol=1e-3)
    assert "kink" in found.accuracy.notes[-1]
    assert found.accuracy.stationarity is not None
    assert found.accuracy.stationarity < 1e-2
    assert float(found.x) == pytest.approx(1.0, abs=1e-3)


def test_kinks_are_told_from_slopes() -> None:
    space, zero = WholeSpace(), torch.zeros(2)

    def ridge(x: Tensor) -> Tensor:  # |x_0| + x_1^2 / 2
        return torch.stack([x[0].sign(), x[1]])

    def slope(x: Tensor) -> Tensor:
        return torch.stack([torch.ones(()), x[1]])

    problem = bilevel.BilevelProblem(lambda x, y: x.sum() + y, lambda x, y: y**2, upper_set=space)
    x = zero + torch.tensor([1e-3, 0.0])
    found = kink(problem, ridge, x, ridge(x), 1e-4, 1e-6)
    assert found is not None
    assert found[0] == pytest.approx(1.6e-3)
    assert found[1] < 1e-12
    assert kink(problem, slope, x, slope(x), 1e-4, 1e-6) is None
    tilted = x + torch.tensor([0.0, 0.5])
    assert kink(problem, ridge, tilted, ridge(tilted), 1e-4, 1e-2) is None


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
