"""The exact augmented Lagrangian: values, gradient and slope against automatic differentiation."""

import pytest
import torch
from torch import Tensor

from constrained import EqualityProblem, Lagrangian
from constrained.merit import ExactAugmentedLagrangian, Slope, Terms

W, S = 0.3, torch.tensor([2.0, 0.5], dtype=torch.float64)
MU, NU = 1.7, 0.4


def objective(x: Tensor) -> Tensor:
    return torch.exp(x[0] * x[1]) + (x[2] ** 2 - x[3]) ** 2 + x[3] ** 4


def equality(x: Tensor) -> Tensor:
    return torch.stack([x[0] ** 3 + torch.sin(x[1]) - x[2], x @ x - 2.0])


PROBLEM = EqualityProblem(objective, equality)


def place() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, generator=generator), torch.randn(2, generator=generator)


def by_hand(x: Tensor, multiplier: Tensor, mu: float = MU, nu: float = NU) -> Tensor:
    """M with nothing but functions of torch; its gradient needs no Hessian of ours."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    lagrangian = objective(x) + multiplier @ equality(x)
    (slope,) = torch.autograd.grad(lagrangian, x, create_graph=True)
    c = S * equality(x)
    return W * lagrangian + 0.5 * mu * c @ c + 0.5 * nu * W**2 * slope @ slope


def expected_gradient(x: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    x, multiplier = x.clone().requires_grad_(), multiplier.clone().requires_grad_()
    along_x, along_l = torch.autograd.grad(by_hand(x, multiplier), (x, multiplier))
    return along_x, along_l


@pytest.mark.parametrize("dense", [True, False])
def test_value_and_gradient_are_those_of_autodiff(dense: bool) -> None:
    x, multiplier = place()
    lagrangian = Lagrangian(PROBLEM, x, dense=dense)
    point, merit = lagrangian.at(x), ExactAugmentedLagrangian(W, S)
    assert merit.terms(point, multiplier).at(MU, NU) == pytest.approx(float(by_hand(x, multiplier).detach()), rel=1e-13)
    found = merit.gradient(point, multiplier, point.hessian(multiplier), MU, NU)
    for ours, theirs in zip(found, expected_gradient(x, multiplier), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_gradient_costs_one_hessian_product() -> None:
    x, multiplier = place()
    lagrangian = Lagrangian(PROBLEM, x, dense=False)
    point = lagrangian.at(x)
    ExactAugmentedLagrangian(W, S).gradient(point, multiplier, point.hessian(multiplier), MU, NU)
    assert lagrangian.counts["products"] == 1


def test_the_hessian_of_the_objective_alone_is_not_enough() -> None:
    x, multiplier = place()
    point = Lagrangian(PROBLEM, x).at(x)
    merit = ExactAugmentedLagrangian(W, S)
    along_x, _ = merit.gradient(point, multiplier, point.hessian(torch.zeros(2)), MU, NU)
    assert (along_x - expected_gradient(x, multiplier)[0]).abs().max() > 0.1


def test_slope_is_the_gradient_along_the_step() -> None:
    x, multiplier = place()
    point, merit = Lagrangian(PROBLEM, x).at(x), ExactAugmentedLagrangian(W, S)
    step, multiplier_step = torch.tensor([0.3, -1.0, 0.7, 0.2]), torch.tensor([-0.4, 2.0])
    slope = merit.slope(point, multiplier, point.hessian(multiplier), step, multiplier_step)
    along_x, along_l = expected_gradient(x, multiplier)
    assert slope.at(MU, NU) == pytest.approx(float(along_x @ step + along_l @ multiplier_step), rel=1e-12)
    t = 1e-6
    ahead, behind = (by_hand(x + s * step, multiplier + s * multiplier_step, 3.0, 0.2) for s in (t, -t))
    assert slope.at(3.0, 0.2) == pytest.approx(float((ahead - behind).detach()) / (2 * t), rel=1e-6)


def test_the_floor_is_the_value_without_its_last_term() -> None:
    x, multiplier = place()
    lagrangian = Lagrangian(PROBLEM, x)
    point, merit = lagrangian.at(x), ExactAugmentedLagrangian(W, S)
    assert merit.floor(point, multiplier, MU) == pytest.approx(merit.terms(point, multiplier).at(MU, 0.0), rel=1e-14)
    fresh = lagrangian.at(x)
    before = dict(lagrangian.counts)
    merit.floor(fresh, multiplier, MU)
    assert lagrangian.counts == before


def test_terms_and_slopes_are_affine_in_the_penalties() -> None:
    assert Terms(1.0, 2.0, 3.0).at(10.0, 100.0) == 161.0
    assert Slope(1.0, 2.0, 3.0).at(10.0, 100.0) == 321.0
    assert Terms(1.0, 2.0, 3.0).residual == 5.0


def test_newton_steps_descend_once_the_penalties_fit() -> None:
    """The identity behind the descent test: with exact solves the slope is
    ``-d^T H d + 2 <dl, c> - mu |c|^2 - nu |grad L|^2`` (all weights one)."""
    x, multiplier = place()
    point, merit = Lagrangian(PROBLEM, x).at(x), ExactAugmentedLagrangian(1.0, torch.ones(2))
    hessian, jacobian = point.hessian(multiplier).to_dense(), point.jacobian.to_dense()
    matrix = torch.zeros(6, 6)
    matrix[:4, :4], matrix[4:, :4], matrix[:4, 4:] = hessian, jacobian, jacobian.T
    gradient, c = point.lagrangian_gradient(multiplier), point.constraints
    z = torch.linalg.solve(matrix, -torch.cat([gradient, c]))
    d, dl = z[:4], z[4:]
    slope = merit.slope(point, multiplier, point.hessian(multiplier), d, dl)
    expected = -d @ hessian @ d + 2 * dl @ c - MU * c @ c - NU * gradient @ gradient
    assert slope.at(MU, NU) == pytest.approx(float(expected), rel=1e-10)
