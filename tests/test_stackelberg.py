"""The pricing problem: what cvxpy made of the market, and the enumerated answer against searches over prices."""

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import constrained
import problems
from bilevel.flat import FlatProblem
from bilevel.lower_level import solve_lower_level
from problems import stackelberg

H = torch.full((5, 5), 0.6, dtype=torch.float64) + 1.4 * torch.eye(5, dtype=torch.float64)


@pytest.fixture(scope="module")
def case() -> problems.Case:
    torch.set_default_dtype(torch.float64)
    return problems.case("stackelberg_pricing")


def bought(prices: Tensor) -> constrained.QPSolution:
    """The market's purchases at rows of prices, by quadratic programs."""
    worth = torch.tensor([10.0, 9.0, 8.0, 8.0, 5.0])
    rival = torch.tensor([4.0, 4.5]).expand(len(prices), -1)
    ones = torch.ones(1, 5)
    return constrained.solve_qp(H, torch.cat([prices, rival], dim=1) - worth, G=ones, h=torch.tensor([3.0]), lower=0.0)


def profit(prices: Tensor) -> Tensor:
    return ((prices - torch.tensor([2.0, 1.5, 1.0])) * bought(prices).x[:, :3]).sum(dim=1)


def test_no_prices_earn_more(case: problems.Case, generator: torch.Generator) -> None:
    best = case.x_star["price"]
    assert case.upper_star is not None
    assert float(profit(best[None])[0]) == pytest.approx(-case.upper_star, rel=1e-12)
    everywhere = 10 * torch.rand(1500, 3, generator=generator)
    near = (best + torch.logspace(-3, 0, 500)[:, None] * torch.randn(500, 3, generator=generator)).clamp(0, 10)
    distance = torch.linalg.vector_norm(near - best, dim=1)
    assert float(profit(everywhere).max()) < -case.upper_star
    assert bool((profit(near) < -case.upper_star - 1e-3 * distance**2).all())


@pytest.mark.filterwarnings("ignore::implicit.ConvergenceWarning")  # a search may try a price at a kink
def test_searches_over_prices_end_there(case: problems.Case) -> None:
    def loss(p: np.ndarray) -> tuple[float, np.ndarray]:
        prices = torch.from_numpy(p).requires_grad_(True)
        value = -profit(prices[None])[0]
        return float(value.detach()), torch.autograd.grad(value, prices)[0].numpy()

    for start in ([5.0, 5.0, 5.0], [7.0, 4.0, 3.0]):
        found = scipy.optimize.minimize(
            loss, start, jac=True, method="L-BFGS-B", bounds=[(0, 10)] * 3, options={"ftol": 1e-15, "gtol": 1e-10}
        )
        np.testing.assert_allclose(found.x, case.x_star["price"].numpy(), atol=1e-5)
        assert found.fun == pytest.approx(case.upper_star, rel=1e-9)


def test_the_market_buys_what_cvxpy_says(case: problems.Case) -> None:
    quantity = cp.Variable(5)
    prices = np.concatenate([case.x_star["price"].numpy(), [4.0, 4.5]])
    worth = np.array([10.0, 9.0, 8.0, 8.0, 5.0])
    rows: list[Any] = [quantity >= 0, cp.sum(quantity) <= 3]
    cost = cp.quad_form(quantity, H.numpy()) / 2 - (worth - prices) @ quantity
    market = cp.Problem(cp.Minimize(cost), rows)
    market.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_feas=1e-12, tol_gap_rel=1e-12)
    assert quantity.value is not None
    np.testing.assert_allclose(case.y_star["quantity"].numpy(), quantity.value, atol=1e-6)


def test_the_answer_uses_the_constraints(case: problems.Case) -> None:
    solved = bought(case.x_star["price"][None])
    assert float(solved.inequality[0, 0]) > 0.1  # the market is full
    assert float(solved.lower[0, 4]) > 0.1  # and one of the rival's products is not bought
    assert bool((case.y_star["quantity"][:4] > 0.1).all())
    assert bool(((case.x_star["price"] > 0) & (case.x_star["price"] < 10)).all())


def test_the_declared_problem(case: problems.Case, generator: torch.Generator) -> None:
    x0, y0 = case.start
    case.problem.validate(x0, y0)
    flat = FlatProblem(case.problem, x0, y0)
    assert (flat.n, flat.m, flat.lower_level.inequalities, flat.lower_level.equalities) == (3, 5, 1, 0)
    assert flat.lower_level.affine
    torch.testing.assert_close(flat.lower_level.lower, torch.zeros(5))
    assert case.problem.upper_set.project({"price": torch.tensor([-1.0, 5.0, 11.0])})["price"].tolist() == [0, 5, 10]
    for _ in range(3):
        p, q = 10 * torch.rand(3, generator=generator), torch.randn(5, generator=generator)
        net = torch.tensor([10.0, 9.0, 8.0, 8.0, 5.0]) - torch.cat([p, torch.tensor([4.0, 4.5])])
        x, y = {"price": p}, {"quantity": q}
        assert float(case.problem.lower(x, y)) == pytest.approx(float(0.5 * q @ H @ q - net @ q), rel=1e-10)
        earned = (p - torch.tensor([2.0, 1.5, 1.0])) @ q[:3]
        assert float(case.problem.upper(x, y)) == pytest.approx(-float(earned), rel=1e-12)
        solved = solve_lower_level(flat, p, flat.flat_y(y0))
        torch.testing.assert_close(solved.y, bought(p[None]).x[0], atol=1e-7, rtol=1e-7)


def test_the_case_is_consistent(case: problems.Case) -> None:
    assert float(case.problem.upper(case.x_star, case.y_star)) == pytest.approx(case.upper_star, rel=1e-14)
    flat = FlatProblem(case.problem, *case.start)
    assert flat.violation(flat.flat_x(case.x_star), flat.flat_y(case.y_star)) < 1e-12
    again = stackelberg._best_prices()
    np.testing.assert_array_equal(again[0], case.x_star["price"].numpy())
    assert case.lower_class == "strongly convex"
    assert float(torch.linalg.eigvalsh(H)[0]) > 0.1


def test_calls_are_counted_and_float32_is_kept() -> None:
    single = problems.case("stackelberg_pricing", dtype=torch.float32)
    assert (single.counter.upper, single.counter.lower) == (0, 0)
    values = single.problem.upper(*single.start), single.problem.lower(*single.start)
    assert (single.counter.upper, single.counter.lower) == (1, 1)
    assert {value.dtype for value in values} == {torch.float32}
    assert single.x_star["price"].dtype == single.start[1]["quantity"].dtype == torch.float32
