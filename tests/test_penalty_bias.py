"""How the penalty method measures its bias, what it does about it, and what independent batches do to G."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
import problems
from bilevel import Penalty, SingleLoop, Storm
from bilevel.algorithms.penalty_bias import ExactPenalty, measure
from bilevel.oracle import Oracle, new_counts
from implicit import tree

PLAIN = {"step_size": 0.1, "lower_chunks": 3, "lower_condition": 1.0}


def exact(name: str, p: float, x: Tensor, y: Tensor, central: bool = False) -> ExactPenalty:
    problem = problems.case(name).problem
    return ExactPenalty(problem, Oracle.full(problem, new_counts()), p, x, y, y, central=central)


@pytest.mark.parametrize(("central", "order"), [(False, 1), (True, 2)])
def test_the_bias_of_central_differences_is_of_second_order(central: bool, order: int) -> None:
    """Against the hypergradient of the closed form; the estimate from two penalties is the true error."""
    case = problems.case("quadratic")
    x, y = torch.linspace(-1.0, 1.0, 5), torch.zeros(8)
    errors = []
    for p in (100.0, 200.0):
        solver = exact("quadratic", p, x, y, central)
        found = measure(solver, x)
        expected = bilevel.singular_hypergradient(case.problem, x, found.y).value
        errors.append(float((found.once - expected).norm()))
        assert found.two == pytest.approx(errors[-1], rel=0.05)
        assert found.disagreement == pytest.approx(errors[-1], rel=1e-6)
        assert float((solver.extrapolated(x) - expected).norm()) < 0.02 * errors[-1]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


def test_two_penalties_that_are_both_too_small_agree_and_are_found_out() -> None:
    """g_yy = 1e-3 and p = 0.01: doubling p changes nothing, implicit differentiation knows better."""
    problem = bilevel.BilevelProblem(lambda x, y: 0.5 * (y - 1) ** 2 + 0.5 * x**2, lambda x, y: 0.5e-3 * (y - x) ** 2)
    x, y = torch.tensor(0.5), torch.tensor(0.0)
    solver = ExactPenalty(problem, Oracle.full(problem, new_counts()), 0.01, x, y, y)
    found = measure(solver, x)
    assert found.two < 1e-4
    assert found.disagreement == pytest.approx(0.5, rel=1e-3)
    assert found.bias == found.disagreement


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        # d/dx of min over the line of solutions, and of the clipped lower solution, both by hand
        ("many_solutions", 0.7, (0.7 - 2.0) + 0.5 * (0.7 + 1.0)),
        ("box", 0.4, (0.4 - 2.0) + 2.0 * 0.4),
        ("box_kink", 1.5, 0.5 * 1.5),
    ],
)
def test_pseudo_inverses_serve_many_solutions_and_sets(name: str, x: float, expected: float) -> None:
    case = problems.case(name)
    found = measure(exact(name, 100.0, torch.tensor(x), case.start[1]), torch.tensor(x))
    assert found.independent
    assert float(found.value) == pytest.approx(expected, rel=1e-6)


def test_y_is_the_solution_that_f_prefers_and_not_the_one_next_to_z() -> None:
    case = problems.case("many_solutions_selected")
    x, far = torch.tensor(0.3), torch.tensor([5.0, -2.0, 1.0])
    problem = case.problem
    solver = ExactPenalty(problem, Oracle.full(problem, new_counts()), 100.0, x, case.start[1], far)
    found = measure(solver, x)
    a, b, n = torch.tensor([0.5, -1.0, 1.0]), torch.tensor([1.0, 0.5, -1.5]), torch.tensor([0.0, 0.5, 0.5])
    target = b - 0.5 * x * n / n.norm()
    best = target + a * (x - a @ target) / (a @ a)
    assert float((found.y - best).norm()) < 1e-3
    assert float((solver.z - best).norm()) > 1.0


def test_extrapolation_removes_the_bias() -> None:
    case = problems.case("quadratic")
    method = Penalty(penalty=100.0, extrapolate=True, rtol=1e-7, **PLAIN)
    found = bilevel.solve(case.problem, method, *case.start)
    assert found.success, found.message
    assert case.error(found) < 1e-6
    assert case.distance(found) <= (found.accuracy.distance or 0.0) <= 10.0 * case.distance(found) + 1e-7
    assert "extrapolated from penalties up to 400" in found.message
    assert [row["penalty"] for row in found.history][-1] == 400.0


def test_extrapolation_refuses_what_is_no_straight_line() -> None:
    """At the kink the penalised minimizers 1 / (1 + 1/2p) approach 1, but with an active bound on x they stand still;
    a tolerance as coarse as the differences leaves no ratio to see."""
    case = problems.case("quadratic")
    method = Penalty(penalty=1e4, extrapolate=True, rtol=1e-2, **PLAIN)
    found = bilevel.solve(case.problem, method, *case.start, max_steps=400)
    assert found.success, found.message
    assert any(note.startswith("not extrapolated") for note in found.accuracy.notes)
    held = problems.case("box_active")
    still = bilevel.solve(held.problem, Penalty(extrapolate=True), *held.start)
    assert still.success, still.message
    assert float(still.x) == 0.5
    assert still.accuracy.notes == ()


def test_the_penalty_grows_until_the_measured_bias_is_small() -> None:
    case = problems.case("quadratic")
    found = bilevel.solve(case.problem, Penalty(penalty=10.0, bias_rtol=1e-3, rtol=1e-5, **PLAIN), *case.start)
    assert found.success, found.message
    path = [row["penalty"] for row in found.history]
    assert path[0] == 10.0
    assert path == sorted(path)
    assert 100.0 < path[-1] < 1e5
    assert case.error(found) < 2e-3
    assert case.distance(found) <= (found.accuracy.distance or 0.0)
    kept = bilevel.solve(case.problem, Penalty(penalty=10.0, rtol=1e-4, **PLAIN), *case.start)
    assert {row["penalty"] for row in kept.history} == {10.0}
    assert (kept.accuracy.bias or 0.0) > 0.1  # a given penalty stays, and the report says what it costs


def test_float32_stops_growing_where_rounding_takes_over() -> None:
    """Asked for the impossible, it ends between the penalties where the error is smallest."""
    case = problems.case("quadratic", dtype=torch.float32)
    method = Penalty(bias_rtol=1e-9, **PLAIN)
    found = bilevel.solve(case.problem, method, *case.start, raise_on_failure=False, max_steps=300)
    p = found.history[-1]["penalty"]
    assert 3e2 < p <= 35.0 / torch.finfo(torch.float32).eps ** 0.5
    assert case.error(found) < 5e-3


class Cleaning:
    """Weighted ridge regression with one weight per group of rows, four of ten groups corrupted; F in closed form."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, size, self.groups = 200, 6, 10
        weights = torch.randn(size, generator=generator)
        a = torch.randn(rows, size, generator=generator)
        b = a @ weights + 0.1 * torch.randn(rows, generator=generator)
        group = torch.arange(rows) % self.groups
        b = torch.where(group < 4, b + 4.0 * torch.randn(rows, generator=generator) - 3.0, b)
        v = torch.randn(60, size, generator=generator)
        t = v @ weights + 0.1 * torch.randn(60, generator=generator)
        self.train, self.clean = {"a": a, "b": b, "group": group}, {"v": v, "t": t}
        self.start = torch.zeros(self.groups), torch.zeros(size)

    def upper(self, x: Tensor, y: Tensor, *, batch: Any) -> Tensor:
        return 0.5 * ((batch["v"] @ y - batch["t"]) ** 2).mean() + 1e-3 * (x**2).sum()

    def lower(self, x: Tensor, y: Tensor, *, batch: Any) -> Tensor:
        rest = batch["a"] @ y - batch["b"]
        return 0.5 * (torch.sigmoid(x)[batch["group"]] * rest**2).mean() + 0.025 * (y**2).sum()

    def problem(self, size: int) -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            self.upper,
            self.lower,
            upper_data=bilevel.Batches(self.clean, size),
            lower_data=bilevel.Batches(self.train, size),
        )

    def value(self, x: Tensor) -> Tensor:
        """F(x) by one linear solve."""
        a, b, w = self.train["a"], self.train["b"], torch.sigmoid(x)[self.train["group"]]
        matrix = (a * w[:, None]).T @ a / len(b) + 0.05 * torch.eye(a.shape[1])
        y = torch.linalg.solve(matrix, (a * w[:, None]).T @ b / len(b))
        return self.upper(x, y, batch=self.clean)

    def best(self) -> float:
        x = self.start[0].clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([x], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            found = self.value(x)
            found.backward()
            return found

        optimizer.step(closure)
        return float(self.value(x).detach())


def test_common_batches_decide_on_minibatches() -> None:
    """Batches of 20 at p = 100: with common ones the excess falls below 5 % of the start's, with independent ones it
    stays or grows; recursive momentum does not rescue them, and adds little to the others."""
    case = Cleaning()
    best, first = case.best(), float(case.value(case.start[0]))
    problem, ends = case.problem(20), {}
    for common in (True, False):
        for name, scheme in (
            ("f2ba", bilevel.F2BA()),
            ("plain", SingleLoop(estimator=Storm(exponent=0.0))),
            ("storm", SingleLoop()),
        ):
            method = Penalty(scheme=scheme, penalty=100.0, step_size=0.5, common_batches=common)
            found = bilevel.solve(problem, method, *case.start, max_steps=400)
            ends[name, common] = (float(case.value(found.x)) - best) / (first - best)
    for name in ("f2ba", "plain", "storm"):
        assert ends[name, True] < 0.05, ends
        assert ends[name, False] > 0.5, ends


def test_default_penalty_on_minibatches() -> None:
    case = Cleaning()
    best, first = case.best(), float(case.value(case.start[0]))
    found = bilevel.solve(case.problem(20), Penalty(), *case.start, max_steps=500)
    assert float(case.value(found.x)) - best < 0.1 * (first - best)
    assert bool(tree.all_finite(found.x, found.y))
