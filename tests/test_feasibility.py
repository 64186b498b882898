"""Steps of restoration, and steps away from saddle points, against dense formulas."""

import pytest
import torch
from torch import Tensor

from constrained import EqualityProblem, Lagrangian
from constrained.escape import escape, negative_curvature
from constrained.feasibility import feasibility_step, stationarity
from constrained.merit import ExactAugmentedLagrangian
from constrained.newton_direction import DirectionFinder
from implicit import LDLT, MINRES, LinearSolver

WEIGHTS = torch.tensor([0.2, 3.0], dtype=torch.float64)


def objective(x: Tensor) -> Tensor:
    return 50.0 * (x**4).sum()


def equality(x: Tensor) -> Tensor:
    return torch.stack([x[0] * x[1] + x[2] ** 2 + 4.0, torch.sin(x[1]) + x[0] ** 2 - x[2] + 3.0])


@pytest.mark.parametrize("solver", [LDLT(), MINRES(max_steps=200)])
@pytest.mark.parametrize("curved", [False, True])
def test_step_solves_the_damped_normal_equations_with_weights(solver: LinearSolver, curved: bool) -> None:
    x = torch.tensor([0.7, -0.4, 1.1])
    point = Lagrangian(EqualityProblem(objective, equality), x).at(x)
    c, jacobian = equality(x), torch.autograd.functional.jacobian(equality, x)
    s2, damping = WEIGHTS**2, 20.0
    matrix = jacobian.T @ torch.diag(s2) @ jacobian + damping * torch.eye(3)
    if curved:
        matrix = matrix + torch.autograd.functional.hessian(lambda y: (s2 * c) @ equality(y), x)
    expected = x - torch.linalg.solve(matrix, jacobian.T @ (s2 * c))
    finder = DirectionFinder(solver, torch.Generator())
    found = feasibility_step(point.lagrangian, point, WEIGHTS, finder, damping=damping, curved=curved, rtol=1e-12)
    assert found.point is not None and found.damping < damping
    torch.testing.assert_close(found.point.x, expected, rtol=1e-9, atol=1e-9)


def test_way_down_from_a_stationary_point_is_that_of_the_constraints_alone() -> None:
    """c = 1 - x^2 + y^2 at the origin: along x, whatever f does."""
    problem = EqualityProblem(lambda x: 50 * x[0] ** 2 - 50 * x[1] ** 2, lambda x: 1 - x[0] ** 2 + x[1] ** 2)
    point = Lagrangian(problem, torch.zeros(2)).at(torch.zeros(2))
    finder = DirectionFinder(LDLT(), torch.Generator())
    found = feasibility_step(point.lagrangian, point, torch.ones(1), finder, damping=0.0, curved=False, rtol=0.1)
    assert found.point is not None and not found.stationary
    assert abs(float(found.point.x[0])) > 0.1 and abs(float(found.point.x[1])) < 1e-12


def test_valleys_to_infinity_are_not_stationary() -> None:
    """c = 1 + 1/x: J^T c vanishes as x grows, and so does x^-1; the origin of x^2 + 1 is stationary."""
    for problem, at, still in (
        (EqualityProblem(lambda x: x[0], lambda x: 1.0 + 1.0 / x), 1e6, False),
        (EqualityProblem(lambda x: x[0], lambda x: 1e3 * (x**2 + 1.0)), 1e-12, True),
    ):
        x = torch.tensor([at])
        point = Lagrangian(problem, x).at(x)
        gradient = point.jacobian.T @ point.constraints
        assert (stationarity(point, torch.ones(1), gradient) <= 1e-8) is still


def test_escape_lowers_the_merit_function() -> None:
    """f = x^4 - x^2 from its saddle: a step of 1 gains nothing, one of 1/2 gains 3/16."""
    problem = EqualityProblem(lambda x: x[0] ** 4 - x[0] ** 2, lambda x: x[1])
    point = Lagrangian(problem, torch.zeros(2)).at(torch.zeros(2))
    zero = torch.zeros(1)
    curvature = negative_curvature(point.hessian(zero).to_dense(), point.jacobian.to_dense(), point.gradient, 1e-4)
    assert curvature is not None and curvature.value == pytest.approx(-2.0)
    merit = ExactAugmentedLagrangian(1.0, torch.ones(1))
    moved = escape(point.lagrangian, point, zero, curvature, merit, 1.0)
    assert moved is not None and moved[1] == 0.5
    assert float(moved[0].objective) == pytest.approx(-3 / 16)
