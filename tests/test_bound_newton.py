"""Minimization in a box with Hessian products, against scipy and closed forms."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, jvp

from constrained.bound_newton import BoxMinimum, minimize_in_box, projected_gradient
from implicit import Status
from tests.dense import normal

INF = math.inf


class Smooth:
    """A torch function around a point; counts what is asked for."""

    products = 0

    def __init__(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.fn, self.x = fn, x
        self.value, self.gradient = float(fn(x)), grad(fn)(x)

    def product(self, v: Tensor) -> Tensor:
        Smooth.products += 1
        return jvp(grad(self.fn), (self.x,), (v,))[1]


def run(
    fn: Callable[[Tensor], Tensor],
    x0: Tensor,
    lower: Tensor | float = -INF,
    upper: Tensor | float = INF,
    tolerance: float = 1e-9,
    max_steps: int = 200,
    floor: float = -INF,
    radius: float = 1.0,
) -> BoxMinimum:
    low, high = (torch.as_tensor(b, dtype=x0.dtype).expand_as(x0) for b in (lower, upper))
    seen: list[Tensor] = []

    def evaluate(x: Tensor) -> Smooth:
        seen.append(x)
        return Smooth(fn, x)

    found = minimize_in_box(
        evaluate, Smooth(fn, x0), low, high, tolerance=tolerance, radius=radius, max_steps=max_steps, floor=floor
    )
    assert all(bool(((x >= low) & (x <= high)).all()) for x in seen), "the box is never left"
    assert found.steps == len(seen)
    noise = 1e-13 * abs(found.at.value)
    assert found.at.value <= min([float(fn(x0)), *(v for v in map(float, map(fn, seen)) if v == v)]) + noise
    if found.status is Status.CONVERGED:
        assert float(projected_gradient(found.at.x, found.at.gradient, low, high).abs().amax()) <= tolerance
    return found


def test_the_projected_gradient() -> None:
    x, lower, upper = torch.tensor([0.0, 1.0, 0.5, 1e9]), torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, INF])
    gradient = torch.tensor([3.0, -2.0, -0.25, 1e-9])
    assert projected_gradient(x, gradient, lower, upper).tolist() == [0.0, 0.0, -0.25, 1e-9]
    assert projected_gradient(x, -gradient, lower, upper).tolist() == [-1.0, 1.0, 0.25, -1e-9]
    expected = x[:3] - torch.clamp(x[:3] - 0.3 * gradient[:3], 0, 1)
    torch.testing.assert_close(projected_gradient(x, 0.3 * gradient, lower, upper)[:3], expected)


@pytest.mark.parametrize("seed", range(6))
def test_convex_quadratics_against_scipy(seed: int) -> None:
    """min ||A x - b||^2 in a box; more than half of the entries end at a bound."""
    a, b = normal(seed, 30, 20), 3 * normal(seed + 50, 30)
    lower, upper = -0.2 + 0.1 * normal(seed + 9, 20), 0.3 + 0.1 * normal(seed + 8, 20)
    found = run(lambda x: 0.5 * ((a @ x - b) ** 2).sum(), (lower + upper) / 2, lower, upper)
    exact = scipy.optimize.lsq_linear(a.numpy(), b.numpy(), (lower.numpy(), upper.numpy()), method="bvls", tol=1e-14).x
    assert found.status is Status.CONVERGED
    np.testing.assert_allclose(found.at.x.numpy(), exact, atol=1e-8)
    assert found.steps <= 15
    bound = (found.at.x == lower) | (found.at.x == upper)
    assert 5 <= int(bound.sum()) < 20


@pytest.mark.parametrize("n", [2, 10, 20])
def test_rosenbrock_free_and_bounded(n: int) -> None:
    def rosenbrock(x: Tensor) -> Tensor:
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    x0 = torch.tensor([-1.2, 1.0] * (n // 2))
    free = run(rosenbrock, x0, max_steps=500)
    assert free.status is Status.CONVERGED
    if n == 2:
        torch.testing.assert_close(free.at.x, torch.ones(n))
    bounded = run(rosenbrock, x0.clamp(max=0.5), upper=0.5, max_steps=500)
    assert bounded.status is Status.CONVERGED
    exact = scipy.optimize.minimize(
        lambda x: float(rosenbrock(torch.as_tensor(x))),
        bounded.at.x.numpy(),
        jac=lambda x: grad(rosenbrock)(torch.as_tensor(x)).numpy(),
        bounds=[(None, 0.5)] * n,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    assert bounded.at.value <= exact.fun + 1e-8


def test_newton_steps_near_the_end_are_few() -> None:
    """Quadratic convergence: from 1e-2 to 1e-12 in four evaluations."""
    found = run(lambda x: torch.cosh(x - 0.3).sum() + 0.1 * x.sum() ** 2, torch.full((5,), 0.25), tolerance=1e-12)
    assert found.status is Status.CONVERGED
    assert found.steps <= 4


def test_steps_that_go_up_are_taken_back() -> None:
    """Newton's step for sqrt(1 + x^2) is -x^3 - x: it leads away."""
    found = run(lambda x: torch.sqrt(1 + x**2).sum(), torch.tensor([5.0, -3.0]), radius=1e3)
    assert found.status is Status.CONVERGED
    assert float(found.at.x.abs().amax()) < 1e-8


def test_negative_curvature_is_left_from_a_point_beside_the_saddle() -> None:
    found = run(lambda x: (x[0] ** 2 - 1) ** 2 + x[1] ** 2, torch.tensor([1e-6, 1.0]))
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.at.x.abs(), torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
    corner = run(lambda x: -(x**2).sum() + 0.3 * x.sum(), torch.tensor([0.2, 0.1, -0.3]), -1.0, 1.0)
    assert corner.status is Status.CONVERGED
    assert corner.at.x.abs().tolist() == [1.0] * 3


def test_thousands_of_bounds_are_met_at_once() -> None:
    """Products, not steps per bound: n = 20,000 with half of the bounds active."""
    n = 20_000
    target = normal(3, n)
    Smooth.products = 0
    found = run(
        lambda x: 0.5 * ((x - target) ** 2).sum() + 0.5 * (x[1:] - x[:-1]).square().sum(), torch.zeros(n), -0.2, 0.2
    )
    assert found.status is Status.CONVERGED
    assert found.steps <= 10
    assert Smooth.products <= 300
    assert int((found.at.x.abs() == 0.2).sum()) > n // 3


def test_how_it_ends() -> None:
    start = torch.tensor([2.0, 1.0])
    assert run(lambda x: (x**4).sum(), start, max_steps=3).status is Status.STEP_LIMIT
    assert run(lambda x: (x**4).sum(), start, max_steps=0).steps == 0
    deep = run(lambda x: -x.sum(), start, floor=-1e6)
    assert deep.status is Status.UNBOUNDED
    assert deep.at.value < -1e6
    # Sums of thirty terms do not cancel to 1e-18.
    a, b = normal(1, 30, 20), normal(2, 30)
    rounded = run(lambda x: 0.5 * ((a @ x - b) ** 2).sum(), torch.zeros(20), tolerance=1e-18)
    assert rounded.status is Status.STALLED
    assert float(rounded.at.gradient.abs().amax()) < 1e-12
    at_once = run(lambda x: (x**2).sum(), torch.zeros(2))
    assert (at_once.status, at_once.steps) == (Status.CONVERGED, 0)


def test_steps_out_of_the_domain_are_shortened() -> None:
    found = run(lambda x: (x - 3 * torch.log(x)).sum(), torch.tensor([0.01, 0.05]), radius=100.0)
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.at.x, torch.tensor([3.0, 3.0]))

    def island(x: Tensor) -> Tensor:
        return (x**2).sum() * torch.where((x == 1).all(), 1.0, torch.nan)

    lost = run(island, torch.ones(2))
    assert lost.status is Status.NONFINITE
    assert lost.at.x.tolist() == [1.0, 1.0]
    without_curvature = run(lambda x: (x**1.5).sum() - x.sum(), torch.zeros(2))  # infinite at zero
    assert without_curvature.status is Status.NONFINITE


def test_fixed_entries_stay() -> None:
    lower = torch.tensor([0.5, -1.0, 2.0])
    found = run(lambda x: (x**2).sum() + x.prod(), torch.tensor([0.5, 1.0, 2.0]), lower, torch.tensor([0.5, 1.0, 2.0]))
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.at.x, torch.tensor([0.5, -0.5, 2.0]))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x - 1).square().sum() + (x - x).sqrt().sum(),  # gradient NaN
        lambda x: -x.sqrt().sum(),  # gradient infinite at the bound
    ],
)
def test_derivatives_that_are_no_numbers_end_the_run(fn: Callable[[Tensor], Tensor]) -> None:
    found = run(fn, torch.zeros(2), lower=0.0, upper=9.0)
    assert (found.status, found.steps) == (Status.NONFINITE, 0)


def test_a_curvature_that_is_no_number_ends_the_search() -> None:
    class Bent(Smooth):
        def product(self, v: Tensor) -> Tensor:
            assert Smooth.products < 100, "the search goes on"
            Smooth.products += 1
            return torch.full_like(v, torch.nan)

    Smooth.products = 0
    start = Bent(lambda x: -x.sum(), torch.zeros(2))
    bounds = torch.zeros(2), torch.full((2,), 0.5)
    found = minimize_in_box(lambda x: Bent(start.fn, x), start, *bounds, tolerance=1e-9, radius=5.0, max_steps=5)
    assert found.status is Status.NONFINITE
