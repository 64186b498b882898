"""Batches of small problems: every element equals an independent answer, and none disturbs another."""

import importlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import constrained
from constrained import BatchedNewton, ConstrainedProblem, EqualityProblem, solve_batch
from constrained.batch.elements import Elements
from constrained.batch.functions import BatchFunctions
from constrained.batch.search import enter, search, to_boundary
from constrained.batch.system import Direction, System, gaps
from implicit import ConvergenceWarning, SolveError, Status


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kkt_of(problem: Any, solution: constrained.BatchSolution, row: int, *data: Tensor) -> constrained.KKTResidual:
    """The residual of one element by the code for one problem."""
    own = [d[row] for d in data]

    def bind(function: Any) -> Any:
        return None if function is None else lambda x: function(x, *own)

    single = ConstrainedProblem(
        objective=bind(problem.objective),
        equality=bind(problem.equality),
        inequality=bind(problem.inequality),
        lower=problem.lower,
        upper=problem.upper,
    )
    multipliers = [v[row] if isinstance(v, Tensor) else v for v in solution.multipliers]
    return constrained.kkt_residual(single, solution.x[row], *multipliers)


MIXED = ConstrainedProblem(
    objective=lambda x, p, q: ((x - p) ** 2).sum() + 0.5 * torch.cos(3 * x).sum() + x[0] * x[1] * q[0],
    equality=lambda x, p, q: x.sum() - 1,
    inequality=lambda x, p, q: torch.stack([(x * x).sum() - 2 - q[1] ** 2, x[0] * x[1] - x[2] - q[2] ** 2]),
    lower=-1.0,
    upper=1.5,
)


def mixed(count: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return torch.zeros(count, 6), (1.5 * randn(count, 6, seed=1), randn(count, 3, seed=2))


def test_projections_onto_an_ellipsoid_equal_their_closed_form() -> None:
    """``min 1/2 ||x - p||^2, <a, x^2> = 1``: x = p / (1 + 2 l a), and l > -1 / (2 max a) at the global solution."""
    p, a = 3 * randn(40, 5), 1 + randn(40, 5, seed=1).abs()
    problem = EqualityProblem(lambda x, p, a: 0.5 * ((x - p) ** 2).sum(), lambda x, p, a: (a * x * x).sum() - 1)
    found = solve_batch(problem, p / p.norm(dim=1, keepdim=True), (p, a))
    assert found.success
    low, high = -0.5 / a.amax(dim=1) + 1e-15, torch.full((40,), 1e6)
    for _ in range(200):
        middle = (low + high) / 2
        outside = (a * (p / (1 + 2 * middle[:, None] * a)) ** 2).sum(dim=1) > 1
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    expected = p / (1 + 2 * low[:, None] * a)
    assert torch.allclose(found.x, expected, atol=1e-7)
    assert torch.allclose(found.multipliers.equality, low, atol=1e-7)
    assert torch.allclose(found.objective, 0.5 * ((expected - p) ** 2).sum(dim=1), atol=1e-7)


def test_every_element_is_as_good_as_slsqp() -> None:
    x0, data = mixed(25)
    found = solve_batch(MIXED, x0, data)
    assert found.success
    assert float(found.residual.amax()) <= 1e-8
    # Steps to nine tenths of the boundary, or beyond it, take more.
    assert float(found.steps.double().mean()) <= 11
    assert found.counts["objective"] <= 30 * 25
    for row in range(25):
        d = [v[row] for v in data]

        def call(function: Any, d: list[Tensor] = d) -> Any:
            return lambda x: function(torch.from_numpy(x), *d).reshape(-1).numpy()

        def slope(function: Any, d: list[Tensor] = d) -> Any:
            return lambda x: torch.func.jacrev(lambda y: function(y, *d).reshape(-1))(torch.from_numpy(x)).numpy()

        assert MIXED.equality is not None
        assert MIXED.inequality is not None
        c, jacobian = call(MIXED.inequality), slope(MIXED.inequality)
        other = minimize(
            lambda x, f=call(MIXED.objective): f(x)[0],
            found.x[row].numpy(),
            jac=lambda x, f=slope(MIXED.objective): f(x)[0],
            constraints=[
                {"type": "eq", "fun": call(MIXED.equality), "jac": slope(MIXED.equality)},
                {"type": "ineq", "fun": lambda x, c=c: -c(x), "jac": lambda x, j=jacobian: -j(x)},
            ],
            bounds=[(-1, 1.5)] * 6,
            method="SLSQP",
            options={"ftol": 1e-12},
        )
        assert abs(other.fun - float(found.objective[row])) <= 1e-6 * max(1, abs(other.fun)), row
        assert np.abs(other.x - found.x[row].numpy()).max() <= 1e-4, row
        assert kkt_of(MIXED, found, row, *data).largest <= 1e-8, row


def test_residuals_are_those_of_the_code_for_one_problem() -> None:
    x0, data = mixed(6)
    found = solve_batch(MIXED, x0, data, max_steps=3)
    assert set(found.statuses) == {Status.STEP_LIMIT}
    assert found.status is Status.STEP_LIMIT
    for row in range(6):
        single = kkt_of(MIXED, found, row, *data)
        expected = torch.tensor([single.stationarity, single.feasibility, single.complementarity])
        assert float(expected.amax()) > 1e-6
        assert torch.allclose(found.residual[row], expected, rtol=1e-10, atol=1e-14)


def test_mixed_fates_are_told_apart_and_do_not_disturb_each_other() -> None:
    def f(x: Tensor, kind: Tensor, p: Tensor) -> Tensor:
        bowl = ((x - p) ** 2).sum()
        start = torch.where(kind == 3, torch.nan, 0.0) * x[0]
        return torch.where(kind == 2, x.sum(), torch.where(kind == 4, x[0] * x[1], bowl)) + start

    def h(x: Tensor, kind: Tensor, p: Tensor) -> Tensor:
        line = x[2] - x[0]
        impossible = (x * x).sum() + 1
        return torch.where(kind == 1, impossible, torch.where(kind == 4, x[2], line))

    problem = EqualityProblem(f, h)
    kind = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 2, 0])
    x0 = torch.where(kind[:, None] == 4, 0.0, 0.5 + 0.1 * randn(10, 3))
    data = (kind, randn(10, 3, seed=3))
    found = solve_batch(problem, x0, data)
    named = {
        0: Status.CONVERGED,
        1: Status.INFEASIBLE,
        2: Status.UNBOUNDED,
        3: Status.NONFINITE,
        4: Status.STALLED,
    }
    assert found.statuses == [named[k] for k in kind.tolist()]
    assert found.status is Status.STALLED
    assert found.saddle.tolist() == [k == 4 for k in kind.tolist()]
    assert found.message == "4 CONVERGED, 2 INFEASIBLE, 2 UNBOUNDED, 1 STALLED, 1 NONFINITE"
    # The least infeasible point of x^2 + 1 = 0 is the origin.
    assert float(found.x[kind == 1].abs().max()) <= 1e-6
    assert float(found.objective[kind == 2].max()) < -1e9
    assert bool(torch.isfinite(found.x).all())
    p = data[1]
    expected = torch.stack([(p[:, 0] + p[:, 2]) / 2, p[:, 1], (p[:, 0] + p[:, 2]) / 2], dim=1)
    assert torch.allclose(found.x[kind == 0], expected[kind == 0], atol=1e-7)
    for row in range(10):
        alone = solve_batch(problem, x0[row : row + 1], tuple(d[row : row + 1] for d in data))
        assert alone.statuses == [found.statuses[row]]
        assert int(alone.steps) == int(found.steps[row])
        assert torch.allclose(alone.x[0], found.x[row], rtol=1e-12, atol=1e-12)


def test_a_far_bound_is_not_unbounded() -> None:
    problem = ConstrainedProblem(objective=lambda x: -x.sum(), lower=0.0, upper=1e11)
    found = solve_batch(problem, torch.ones(3, 2))
    assert found.status is Status.STALLED  # the gap to such a bound is known to 1e-5 only
    torch.testing.assert_close(found.x, torch.full((3, 2), 1e11), rtol=1e-6, atol=0)


def test_the_order_and_the_chunks_do_not_matter() -> None:
    x0, data = mixed(60)
    found = solve_batch(MIXED, x0, data)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    other = solve_batch(MIXED, x0[order], tuple(d[order] for d in data), method=BatchedNewton(chunk=7))
    assert torch.allclose(other.x, found.x[order], rtol=1e-12, atol=1e-12)
    assert torch.equal(other.steps, found.steps[order])
    assert len(other.history) == len(found.history)
    assert torch.allclose(other.multipliers.inequality, found.multipliers.inequality[order], rtol=1e-9, atol=1e-12)


def test_a_few_slow_elements_do_not_cost_the_whole_batch() -> None:
    x0, data = mixed(60)
    found = solve_batch(MIXED, x0, data)
    moves = int(found.steps.sum())
    # One evaluation of the Hessian per move, and one where each element is found to be solved.
    assert found.counts["hessian"] == moves + 60
    assert int(found.steps.amax()) > int(found.steps.amin())
    assert len(found.history) == int(found.steps.amax()) + 1
    assert found.history[-1]["converged"] == 60


@pytest.mark.parametrize(
    ("bounds", "start", "expected"),
    [
        ({"lower": 0.0}, [3.0, 1.0], [1.0, 0.0]),
        ({"upper": 0.5}, [-3.0, -1.0], [0.5, -2.0]),
        (
            {"lower": torch.tensor([0.25, -5.0]).double(), "upper": torch.tensor([0.25, 5.0]).double()},
            [0.0, 0.0],
            [0.25, -2.0],
        ),
        ({"lower": 0.0, "upper": 0.5}, [9.0, 9.0], [0.5, 0.0]),
    ],
    ids=["lower", "upper", "fixed", "box"],
)
def test_bounds_clip_a_bowl(bounds: dict[str, Any], start: list[float], expected: list[float]) -> None:
    target = torch.tensor([1.0, -2.0])
    problem = ConstrainedProblem(objective=lambda x, a: (a * (x - target) ** 2).sum(), **bounds)
    a = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    found = solve_batch(problem, torch.tensor([start, start]), a)
    wanted = torch.tensor(expected)
    assert found.success
    assert torch.allclose(found.x, wanted.expand(2, 2), atol=1e-7)
    slope = 2 * a * (wanted - target)
    assert torch.allclose(found.multipliers.lower, slope.clamp(min=0), atol=1e-6)
    assert torch.allclose(found.multipliers.upper, (-slope).clamp(min=0), atol=1e-6)


HARD: list[tuple[str, dict[str, Any], list[float], float, int]] = [
    (
        "hs7",
        {
            "objective": lambda x, t: torch.log(1 + x[0] ** 2) - x[1],
            "equality": lambda x, t: (1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4,
        },
        [2.0, 2.0],
        -(3**0.5),
        15,
    ),
    (
        "hs71",
        {
            "objective": lambda x, t: x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2],
            "equality": lambda x, t: (x * x).sum() - 40,
            "inequality": lambda x, t: 25 - x.prod(),
            "lower": 1.0,
            "upper": 5.0,
        },
        [1.0, 5.0, 5.0, 1.0],
        17.0140173,
        15,
    ),
    # Full Newton steps are refused here without the second-order correction.
    (
        "maratos",
        {
            "objective": lambda x, t: 10 * ((x * x).sum() - 1) - x[0],
            "equality": lambda x, t: (x * x).sum() - 1,
        },
        [0.8, 0.6],
        -1.0,
        8,
    ),
    # Line searches on barrier problems without restoration end at an infeasible point (Waechter, Biegler 2000).
    (
        "crash into the bound",
        {
            "objective": lambda x, t: x[0],
            "equality": lambda x, t: torch.stack([x[0] ** 2 - x[1] - 1, x[0] - x[2] - 2]),
            "lower": torch.tensor([-torch.inf, 0.0, 0.0]).double(),
        },
        [-4.0, 1.0, 1.0],
        2.0,
        40,
    ),
    (
        "dependent constraints",
        {
            "objective": lambda x, t: (x * x).sum(),
            "equality": lambda x, t: torch.stack([x.sum() - 1, 2 * x.sum() - 2]),
        },
        [3.0, 1.0],
        0.5,
        5,
    ),
    (
        "rosenbrock",
        {"objective": lambda x, t: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2},
        [-1.2, 1.0],
        0.0,
        40,
    ),
    (
        "linear program",
        {"objective": lambda x, t: x.sum(), "inequality": lambda x, t: torch.stack([1 - x[0], 2 - x[1]])},
        [5.0, 5.0],
        3.0,
        12,
    ),
]


@pytest.mark.parametrize(("name", "functions", "start", "optimum", "steps"), HARD, ids=[h[0] for h in HARD])
def test_known_optima(name: str, functions: dict[str, Any], start: list[float], optimum: float, steps: int) -> None:
    """From the published start and from one that is a little off, in one batch."""
    x0 = torch.tensor([start, start])
    x0[1] += 0.05
    found = solve_batch(ConstrainedProblem(**functions), x0, torch.zeros(2))
    assert found.statuses == [Status.CONVERGED] * 2
    assert torch.allclose(found.objective, torch.tensor(optimum), atol=2e-7)
    assert int(found.steps.amax()) <= steps


@pytest.mark.parametrize(
    ("functions", "x"),
    [
        ({"equality": lambda x, t: torch.stack([(x * x).sum() - 1, x[0] - 3])}, [1.2896239, 0.0]),
        ({"inequality": lambda x, t: torch.stack([x[0] - 1, 2 - x[0]])}, [1.5, None]),
        ({"inequality": lambda x, t: x[0] + 1, "lower": 0.0}, [0.0, None]),
    ],
    ids=["curved", "interval", "bound"],
)
def test_infeasible_problems_end_at_their_least_violation(functions: dict[str, Any], x: list[float | None]) -> None:
    problem = ConstrainedProblem(objective=lambda x, t: (x * x).sum() + x[1], **functions)
    found = solve_batch(problem, torch.tensor([[3.0, 1.0], [2.0, 0.4]]), torch.zeros(2))
    assert found.statuses == [Status.INFEASIBLE] * 2
    for column, value in enumerate(x):
        if value is not None:
            assert torch.allclose(found.x[:, column], torch.tensor(value), atol=1e-4)
    assert float(found.residual[:, 1].amin()) > 0.1


def test_a_maximizer_is_not_reported_as_solved() -> None:
    circle = EqualityProblem(lambda x, t: x[0], lambda x, t: (x * x).sum() - 1)
    found = solve_batch(circle, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2))
    assert found.statuses == [Status.STALLED, Status.CONVERGED]
    assert found.saddle.tolist() == [True, False]


def tree_problem() -> tuple[ConstrainedProblem, dict[str, Tensor], dict[str, Tensor]]:
    def f(x: dict[str, Tensor], d: dict[str, Tensor], weight: Tensor) -> Tensor:
        return weight * ((x["a"] - d["target"]) ** 2).sum() + (x["b"] ** 2).sum()

    problem = ConstrainedProblem(
        objective=f,
        equality=lambda x, d, weight: {"sum": x["a"].sum() - x["b"].sum()},
        inequality=lambda x, d, weight: (x["a"][0], x["b"].reshape(-1) - d["cap"]),
        lower={"a": -2.0, "b": None},
    )
    x0 = {"b": torch.zeros(3, 2, 1), "a": torch.zeros(3, 2)}
    return problem, x0, {"cap": torch.tensor([1.0, 0.2, 3.0]), "target": randn(3, 2)}


def test_trees_of_points_and_data() -> None:
    problem, x0, data = tree_problem()
    found = solve_batch(problem, x0, data, shared=torch.tensor(2.0))
    assert found.success
    assert found.x["a"].shape == (3, 2)
    assert found.x["b"].shape == (3, 2, 1)
    assert found.multipliers.equality["sum"].shape == (3,)
    assert found.multipliers.inequality[1].shape == (3, 2)
    assert found.multipliers.lower["b"].shape == (3, 2, 1)
    for row in range(3):
        own = {k: v[row] for k, v in data.items()}
        single = ConstrainedProblem(
            objective=lambda x, d=own: problem.objective(x, d, torch.tensor(2.0)),
            equality=lambda x, d=own: problem.equality(x, d, None),
            inequality=lambda x, d=own: problem.inequality(x, d, None),
            lower=problem.lower,
        )
        v = found.multipliers
        residual = constrained.kkt_residual(
            single,
            {k: leaf[row] for k, leaf in found.x.items()},
            {"sum": v.equality["sum"][row]},
            tuple(leaf[row] for leaf in v.inequality),
            {k: leaf[row] for k, leaf in v.lower.items()},
            {k: leaf[row] for k, leaf in v.upper.items()},
        )
        assert residual.largest <= 1e-8


def test_supplied_derivatives_replace_automatic_ones() -> None:
    calls = []

    def jacobian(x: Tensor, p: Tensor) -> Tensor:
        calls.append("jacobian")
        return (2 * x)[None]

    problem = EqualityProblem(
        lambda x, p: ((x - p) ** 4).sum(),
        lambda x, p: (x * x).sum() - 1,
        gradient=lambda x, p: 4 * (x - p) ** 3,
        jacobian=jacobian,
        hessian=lambda x, dual, p: torch.diag(12 * (x - p) ** 2 + 2 * dual),
    )
    plain = EqualityProblem(problem.objective, problem.equality)
    p = randn(8, 3)
    x0 = 0.5 + 0.1 * randn(8, 3, seed=1)
    found, other = solve_batch(problem, x0, p), solve_batch(plain, x0, p)
    assert calls
    assert found.success
    assert torch.equal(found.steps, other.steps)
    assert torch.allclose(found.x, other.x, atol=1e-10)
    # The exponent is wrong on purpose: were the supplied function not used, nothing would change.
    wrong = EqualityProblem(problem.objective, problem.equality, jacobian=lambda x, p: (3 * x + 1)[None])
    assert not solve_batch(wrong, x0, p, max_steps=30).success


def test_supplied_hessians_of_inequalities_and_infeasibility() -> None:
    """A restoring element needs the Hessian of its violation, without the objective."""

    def hessian(x: Tensor, equality: Any, v: Tensor, p: Tensor) -> Tensor:
        assert equality == ()
        return 2 * torch.eye(2) + 2 * v * torch.eye(2)

    problem = ConstrainedProblem(
        objective=lambda x, p: ((x - 1) ** 2).sum(), inequality=lambda x, p: (x * x).sum() + p, hessian=hessian
    )
    found = solve_batch(problem, torch.ones(2, 2), torch.tensor([-1.0, 1.0]))
    assert found.statuses == [Status.CONVERGED, Status.INFEASIBLE]
    assert torch.allclose(found.x[0], torch.full((2,), 0.5**0.5), atol=1e-7)
    assert float(found.x[1].abs().max()) <= 1e-6


def test_float32() -> None:
    x0, data = mixed(20)
    exact = solve_batch(MIXED, x0, data)
    found = solve_batch(MIXED, x0.float(), tuple(d.float() for d in data))
    assert found.x.dtype == torch.float32
    assert found.success
    assert found.method.atol == 1e-4
    assert float(found.residual.amax()) <= 1e-4
    close = (found.x.double() - exact.x).abs().amax(dim=1) <= 0.02
    assert int(close.sum()) >= 19


def test_a_resumed_run_is_the_same_bit_by_bit(tmp_path: Path) -> None:
    x0, data = mixed(30)
    whole = solve_batch(MIXED, x0, data)
    part = solve_batch(MIXED, x0, data, max_steps=5)
    torch.save(part.checkpoint, tmp_path / "run.pt")
    checkpoint = torch.load(tmp_path / "run.pt", weights_only=True)
    rest = solve_batch(MIXED, data=data, checkpoint=checkpoint)
    assert torch.equal(rest.x, whole.x)
    assert torch.equal(rest.multipliers.inequality, whole.multipliers.inequality)
    assert torch.equal(rest.steps, whole.steps)
    assert rest.counts == whole.counts
    assert [h["converged"] for h in rest.history] == [h["converged"] for h in whole.history]


def test_callbacks_budgets_and_errors() -> None:
    x0, data = mixed(5)
    seen = []
    found = solve_batch(MIXED, x0, data, callbacks=[lambda info: seen.append(info.values) or info.step == 2])
    assert found.status is Status.STOPPED
    assert [set(v) for v in seen] == [{"unfinished", "converged"}] * 2
    none = solve_batch(MIXED, x0, data, max_steps=0)
    assert none.statuses == [Status.STEP_LIMIT] * 5
    calls = [0]

    def breaks(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > 6:
            raise RuntimeError("lost")
        return MIXED.objective(x, p, q)

    with pytest.raises(SolveError, match="lost") as caught:
        solve_batch(ConstrainedProblem(objective=breaks, lower=-1.0), x0, data)
    assert caught.value.solution.x.shape == (5, 6)
    assert caught.value.solution.status is Status.STOPPED


CURVED = ConstrainedProblem(
    objective=lambda x, p, q: ((x - p) ** 2).sum() + 0.2 * (x**4).sum(),
    equality=lambda x, p, q: x.sum() - 1 - 0.1 * q,
    inequality=lambda x, p, q: torch.stack([(x * x).sum() - 0.7 - q * q, x[0] - p[1] - 3]),
    lower=0.0,
    upper=2.0,
)


def curved(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    found = solve_batch(CURVED, torch.full((len(p), 3), 0.3), p, shared=q, atol=1e-11)
    return found.x, found.multipliers.equality, found.multipliers.inequality, found.multipliers.lower, found.objective


def points() -> tuple[Tensor, Tensor]:
    p = torch.tensor([[0.4, 0.9, -1.0], [0.1, 2.5, -0.3], [0.4, 0.3, 0.6], [-2.0, 0.3, 1.4]])
    return p, torch.tensor(0.3)


def test_the_cases_of_the_derivatives_cover_active_and_inactive_constraints() -> None:
    found = solve_batch(CURVED, torch.full((4, 3), 0.3), points()[0], shared=points()[1])
    assert found.success
    for dual in (found.multipliers.inequality[:, 0], found.multipliers.lower):
        assert bool((dual > 1e-2).any())
        assert bool((dual < 1e-6).any())


def part(number: int) -> tuple[Tensor, Tensor]:
    """One element in every entry of x, with the parameters that it does not share."""
    return points()[0][number : number + 1].requires_grad_(), points()[1].requires_grad_()


@pytest.mark.parametrize("number", range(4))
def test_first_derivatives_in_both_modes(number: int) -> None:
    """Every output in random directions, forward and reverse."""
    assert torch.autograd.gradcheck(
        curved, part(number), eps=1e-6, atol=1e-5, check_forward_ad=True, fast_mode=True, check_undefined_grad=False
    )


@pytest.mark.parametrize("number", range(4))
def test_second_derivatives(number: int) -> None:
    assert torch.autograd.gradgradcheck(
        lambda p, q: curved(p, q)[:2],
        part(number),
        eps=1e-6,
        atol=1e-4,
        fast_mode=True,
        check_undefined_grad=False,
    )


def test_transforms_agree() -> None:
    p, q = points()
    reverse = torch.func.jacrev(lambda p: curved(p, q)[0])(p)
    forward = torch.func.jacfwd(lambda p: curved(p, q)[0])(p)
    assert torch.allclose(reverse, forward, atol=1e-12)
    assert float(reverse.abs().amax()) > 0.1
    # Elements are independent.
    blocks = torch.eye(4)[:, None, :, None]
    assert float((reverse * (1 - blocks)).abs().amax()) == 0.0
    second = torch.func.jacfwd(torch.func.jacrev(lambda p: curved(p, q)[0]))(p)
    other = torch.func.jacrev(torch.func.jacrev(lambda p: curved(p, q)[0]))(p)
    assert torch.allclose(second, other, atol=1e-11)
    with pytest.raises(NotImplementedError, match="batch axis"):
        torch.func.vmap(lambda p: curved(p, q)[0])(p[None])


def test_derivatives_of_a_projection_equal_their_closed_form() -> None:
    """The projection p / |p| onto the sphere has the Jacobian ``(I - u u^T) / |p|``."""
    p = (2 * randn(6, 3)).requires_grad_()
    sphere = EqualityProblem(lambda x, p: ((x - p) ** 2).sum(), lambda x, p: (x * x).sum() - 1)
    found = solve_batch(sphere, p.detach() / p.detach().norm(dim=1, keepdim=True), p)
    weights = randn(6, 3, seed=1)
    (slope,) = torch.autograd.grad((found.x * weights).sum(), p)
    size = p.detach().norm(dim=1, keepdim=True)
    u = p.detach() / size
    assert torch.allclose(slope, (weights - u * (u * weights).sum(1, keepdim=True)) / size, atol=1e-8)


def test_undefined_derivatives_are_named() -> None:
    p = torch.tensor([[0.5], [1.0]], requires_grad=True)
    box = ConstrainedProblem(objective=lambda x, p: ((x - p) ** 2).sum(), upper=1.0)
    found = solve_batch(box, torch.zeros(2, 1), p)
    with pytest.warns(ConvergenceWarning, match="strict complementarity fails in 1 elements"):
        found.x.sum().backward()
    stopped = solve_batch(box, torch.zeros(2, 1), p, max_steps=1)
    with pytest.warns(ConvergenceWarning, match="2 elements have not converged"):
        (slope,) = torch.autograd.grad(stopped.x[0].sum(), p)
    assert bool(torch.isnan(slope[0]).all())
    assert float(slope[1]) == 0.0


BOWL = {"objective": lambda x, p: ((x - p) ** 2).sum()}


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0, 1e5])
@pytest.mark.parametrize("kind", ["equality", "inequality"])
def test_dependent_constraints_have_the_derivatives_of_independent_ones(kind: str, factor: float) -> None:
    """Onto the line <a, x> = 1 the projection has the Jacobian ``I - a a^T / |a|^2``, however often it is written."""
    a = torch.tensor([0.7, 1.0])
    doubled: Any = {kind: lambda x, p: torch.stack([a @ x - 1, factor * (a @ x - 1)])}
    problem = ConstrainedProblem(**BOWL, **doubled)
    p, x0 = torch.tensor([[2.0, 1.5], [3.0, 1.0]]), torch.zeros(2, 2)

    def x(p: Tensor) -> Tensor:
        return solve_batch(problem, x0, p).x[1]

    expected = torch.eye(2) - torch.outer(a, a) / (a @ a)
    for mode in (torch.func.jacrev, torch.func.jacfwd):
        found = mode(x)(p)
        assert torch.allclose(found[:, 1], expected, atol=1e-7)
        assert float(found[:, 0].abs().amax()) == 0.0
    second = torch.func.jacfwd(torch.func.jacrev(x))(p)
    assert float(second.abs().amax()) <= 1e-6


@pytest.mark.parametrize(
    ("limits", "p"),
    [
        ({"inequality": lambda x, p: torch.stack([x[0] - 1, x[1] - 1, x.sum() - 2])}, [3.0, 2.5]),
        ({"inequality": lambda x, p: x - 1, "upper": 1.0}, [3.0, 2.5]),
        ({"inequality": lambda x, p: torch.stack([x[0] - 1, x[1] - 1, 0 * x[0]])}, [3.0, 2.5]),
    ],
    ids=["vertex", "twice", "no gradient"],
)
def test_an_overdetermined_vertex_does_not_move(limits: dict[str, Any], p: list[float]) -> None:
    point = torch.tensor([p])
    for mode in (torch.func.jacrev, torch.func.jacfwd):
        found = mode(lambda p: solve_batch(ConstrainedProblem(**BOWL, **limits), torch.zeros(1, 2), p).x)(point)
        assert float(found.abs().amax()) <= 1e-9


def test_curved_dependent_constraints_to_second_order() -> None:
    """Two ways to write the unit circle whose gradients are parallel by a factor that depends on the point."""

    def circle(x: Tensor) -> Tensor:
        return (x * x).sum() - 1

    single = EqualityProblem(BOWL["objective"], lambda x, p: circle(x))
    double = EqualityProblem(BOWL["objective"], lambda x, p: torch.stack([circle(x), (2 + x[0]) * circle(x)]))
    p, x0 = torch.tensor([[1.5, 0.7]]), torch.tensor([[0.8, 0.6]])
    jacobians, hessians = [], []
    for problem in (single, double):

        def x(p: Tensor, problem: EqualityProblem = problem) -> Tensor:
            return solve_batch(problem, x0, p, atol=1e-11).x

        jacobians.append(torch.func.jacrev(x)(p))
        hessians.append(torch.func.jacrev(torch.func.jacfwd(x))(p))
    assert torch.allclose(*jacobians, atol=1e-8)
    assert torch.allclose(*hessians, atol=1e-7)
    assert float(hessians[0].abs().amax()) > 0.1


def test_dependent_constraints_warn_where_the_data_move_them_apart() -> None:
    problem = EqualityProblem(
        lambda x, p, b: ((x - p) ** 2).sum(), lambda x, p, b: torch.stack([x.sum() - b[0], 3 * x.sum() - b[1]])
    )
    p, b = torch.tensor([[2.0, 1.5], [0.0, 1.0]]), torch.tensor([[1.0, 3.0], [2.0, 6.0]])

    def x(p: Tensor, b: Tensor) -> Tensor:
        return solve_batch(problem, torch.zeros(2, 2), (p, b)).x

    for mode in (torch.func.jacrev, torch.func.jacfwd):
        expected = torch.eye(2) - 0.5
        assert torch.allclose(mode(x)(p, b)[0, :, 0], expected, atol=1e-9)  # no warning: b stays
        together = mode(lambda t: x(p, torch.stack([t, 3 * t], dim=1)))  # judged leaf by leaf
        for move in (mode(x, argnums=1), together):
            with pytest.warns(ConvergenceWarning, match="linearly dependent in 2 elements, and the data move them"):
                found = move(*((p, b) if move is not together else (b[:, 0],)))
            assert torch.isfinite(found).all()
        assert torch.allclose(found[0, :, 0], torch.full((2,), 0.5), atol=1e-9)


@pytest.mark.parametrize("factor", [3.0, 1e5])
def test_dependent_constraints_that_move_together(factor: float) -> None:
    """Terms that cancel to rounding do not warn: ``x = p`` shifted onto ``0.7 x_0 + x_1 = 0.1 p_0``."""
    a = torch.tensor([0.7, 1.0])

    def line(x: Tensor, p: Tensor) -> Tensor:
        return a @ x - 0.1 * p[0]

    problem = EqualityProblem(BOWL["objective"], lambda x, p: torch.stack([line(x, p), factor * line(x, p)]))
    p = torch.tensor([[2.1, 1.5]])
    expected = torch.eye(2) - torch.outer(a, a - torch.tensor([0.1, 0.0])) / (a @ a)
    for mode in (torch.func.jacrev, torch.func.jacfwd):
        found = mode(lambda p: solve_batch(problem, torch.zeros(1, 2), p).x)(p)
        assert torch.allclose(found[0, :, 0], expected, atol=1e-9)


def test_constraints_in_small_units_are_not_dependent() -> None:
    problem = EqualityProblem(BOWL["objective"], lambda x, p: 1e-4 * (x[:2] - p[:2] ** 2))
    p = torch.tensor([[0.5, 2.0, 1.0]])
    found = torch.func.jacrev(lambda p: solve_batch(problem, torch.zeros(1, 3), p, atol=1e-11).x)(p)
    assert torch.allclose(found[0, :, 0], torch.diag(torch.tensor([1.0, 4.0, 1.0])), atol=1e-6)


def test_solutions_that_are_not_unique_warn() -> None:
    flat = ConstrainedProblem(objective=lambda x, p: (x[0] - p[0]) ** 2 + 0 * x[1])
    with pytest.warns(ConvergenceWarning, match="not unique to first order in 1 elements"):
        found = torch.func.jacrev(lambda p: solve_batch(flat, torch.zeros(1, 2), p).x)(torch.ones(1, 2))
    assert torch.allclose(found[0, :, 0], torch.tensor([[1.0, 0.0], [0.0, 0.0]]), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_active_bounds_are_found_in_any_units(scale: float) -> None:
    problem = ConstrainedProblem(
        objective=lambda x, p: scale * ((x - p) ** 2).sum(),
        inequality=lambda x, p: 1e3 * (x[0] - 1),
        upper=torch.tensor([torch.inf, 1.0]),
    )
    p = torch.tensor([[2.0, 2.0], [0.5, 0.5], [2.0, 0.5], [0.5, 2.0]])
    found = torch.func.jacrev(lambda p: solve_batch(problem, torch.zeros(4, 2), p).x)(p)
    diagonal = found.reshape(8, 8).diagonal().reshape(4, 2)
    assert torch.allclose(diagonal, (p < 1).double(), atol=1e-6)


def test_forward_over_forward_is_refused() -> None:
    p, q = points()
    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        torch.func.jacfwd(torch.func.jacfwd(lambda p: curved(p, q)[0]))(p)


def test_a_row_without_gradient_does_not_hide_the_others() -> None:
    """Its multiplier may be as large as it likes; it scaled the residuals of all others away."""
    problem = ConstrainedProblem(
        objective=lambda x, t: 0.5 * (8.1 * x[0] ** 2 + 2.1 * x[1] ** 2),
        inequality=lambda x, t: torch.stack([0 * x[0], x[1] - x[0], x[1] - 2 * x[0] - 2]),
        lower=-3.0,
        upper=3.0,
    )
    found = solve_batch(problem, torch.zeros(1, 2), torch.zeros(1))
    assert found.statuses == [Status.CONVERGED]
    assert float(found.x.abs().amax()) <= 1e-4
    assert float(found.objective.amax()) <= 1e-7


def test_a_fall_that_ends_is_not_without_bound() -> None:
    problem = ConstrainedProblem(objective=lambda x, t: 0.5 * (x[0] - 1e6) ** 2 - 5e11)
    found = solve_batch(problem, torch.zeros(1, 1), torch.zeros(1))
    assert found.statuses == [Status.CONVERGED]
    assert float(found.x) == pytest.approx(1e6)


def test_no_graph_without_need() -> None:
    x0, data = mixed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not solve_batch(MIXED, x0.requires_grad_(), data).x.requires_grad
        with torch.no_grad():
            assert not solve_batch(MIXED, x0, (data[0].requires_grad_(), data[1])).x.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"problem": 3}, TypeError, "EqualityProblem or a ConstrainedProblem"),
        ({"x0": None}, TypeError, "x0 is missing"),
        ({"x0": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"x0": torch.zeros(())}, ValueError, "leading batch axis"),
        ({"x0": {"a": torch.zeros(4, 3), "b": torch.zeros(3, 3)}}, ValueError, "leading batch axis"),
        ({"x0": torch.full((4, 6), torch.nan)}, ValueError, "not finite"),
        ({"data": (torch.zeros(3, 6), torch.zeros(4, 3))}, ValueError, "batch has 4 elements"),
        ({"data": (torch.zeros(4, 6), 1.0)}, TypeError, "give a tensor"),
        ({"method": "newton"}, TypeError, "BatchedNewton"),
        ({"maxiter": 3}, TypeError, "max_steps"),
        ({"atol": -1.0}, ValueError, "atol must be positive"),
        ({"x0": torch.zeros(0, 6)}, ValueError, "a batch of no elements"),
        ({"x0": torch.zeros(4, 6, dtype=torch.float32)}, ValueError, "objective returns torch.float64"),
        (
            {"problem": replace(MIXED, objective=lambda x, p, q: ((x.detach() - p) ** 2).sum())},
            ValueError,
            "objective depends on x, but its value has no graph",
        ),
        ({"problem": replace(MIXED, lower=2.0)}, ValueError, "lower is above upper in 6 entries"),
        ({"problem": replace(MIXED, lower=torch.zeros(5).double())}, ValueError, "does not broadcast to x0"),
        ({"problem": replace(MIXED, inequality=lambda x, p, q: 3.0)}, TypeError, "inequality must return a tensor"),
        ({"max_steps": -1}, ValueError, "max_steps"),
    ],
    ids=lambda v: str(v)[:30] if isinstance(v, dict) else "",
)
def test_misuse_is_named(change: dict[str, Any], error: type[Exception], match: str) -> None:
    x0, data = mixed(4)
    arguments = {"problem": MIXED, "x0": x0, "data": data, **change}
    with pytest.raises(error, match=match):
        solve_batch(**arguments)


def test_misuse_of_settings_and_checkpoints() -> None:
    x0, data = mixed(2)
    with pytest.raises(ValueError, match="chunk"):
        BatchedNewton(chunk=0)
    with pytest.raises(ValueError, match="atol"):
        BatchedNewton(atol=0.0)
    part = solve_batch(MIXED, x0, data, max_steps=1)
    with pytest.raises(ValueError, match="leave out x0"):
        solve_batch(MIXED, x0, data, checkpoint=part.checkpoint)
    with pytest.raises(ValueError, match="not of BatchedNewton"):
        solve_batch(MIXED, data=data, checkpoint={**part.checkpoint, "name": "Other"})
    sparse = EqualityProblem(lambda x, t: x.sum(), lambda x, t: x.sum(), jacobian=lambda x, t: [[1.0, 1.0]])
    with pytest.raises(TypeError, match="dense tensors"):
        solve_batch(sparse, torch.zeros(2, 2), torch.zeros(2))


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    script = importlib.import_module("many_small_problems")
    family = script.mixed(6, torch.Generator().manual_seed(0))
    for problem in (family.closed, family.automatic):
        found = solve_batch(problem, family.x0, family.data)
        assert found.success
        for row in range(6):
            assert script.residual(family, found.x[row].numpy(), row) <= 1e-7
            other = script.slsqp(family, script.torch_functions(family, row), row)
            assert np.allclose(other, script.slsqp(family, script.numpy_functions(family, row), row), atol=1e-6)


def begun(problem: Any, x0: Tensor, *data: Tensor) -> tuple[BatchFunctions, Elements]:
    functions = BatchFunctions(problem, x0, data, ())
    return functions, BatchedNewton().resolve(functions).init(functions, x0).elements


def test_steps_keep_a_part_of_every_slack_multiplier_and_distance() -> None:
    functions, e = begun(MIXED, mixed(3)[0], *mixed(3)[1])
    still = Direction(*(torch.zeros_like(v) for v in (e.x, e.slack, e.equality, e.inequality, e.lower, e.upper)))
    room, tau = gaps(functions, e.x), torch.full((3,), 0.9)
    half = 0.45
    cases = [
        ({"slack": -2 * e.slack}, half, 1.0),
        ({"inequality": -2 * e.inequality}, 1.0, half),
        ({"lower": -2 * e.lower}, 1.0, half),
        ({"upper": -2 * e.upper}, 1.0, half),
        ({"x": -2 * room[0]}, half, 1.0),
        ({"x": 2 * room[1]}, half, 1.0),
        ({"slack": e.slack, "x": -0.5 * room[0]}, 1.0, 1.0),
    ]
    for change, primal, dual in cases:
        found = to_boundary(e, functions, room, still._replace(**change), tau)
        assert torch.allclose(found[0], torch.full((3,), primal)), change
        assert torch.allclose(found[1], torch.full((3,), dual)), change


def test_the_filter_remembers_points() -> None:
    """The same step is taken with an empty filter, and refused where a pair of it is better than everything ahead."""
    x0, data = mixed(4)
    functions, e = begun(MIXED, x0, *data)
    d = functions.derivatives(e.x, e.multipliers, functions.leaves)
    room = gaps(functions, e.x)
    system = System(functions, e, d, room, restoring=False)
    step = system.direction(e.barrier)
    longest, _ = to_boundary(e, functions, room, step, torch.full((4,), 0.99))
    free = search(functions, functions.leaves, e, d, system, step, longest, restoring=False)
    assert free.accepted.all()
    flags = torch.tensor([True, False, True, False])
    barred = enter(e, flags, torch.tensor([[0.0, -1e6]]).expand(4, 2))
    found = search(functions, functions.leaves, barred, d, system, step, longest, restoring=False)
    assert found.accepted.tolist() == [False, True, False, True]
    assert barred.place.tolist() == [1, 0, 1, 0]
