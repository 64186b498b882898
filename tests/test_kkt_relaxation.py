"""KKTRelaxation against closed forms, enumerations of active sets, and its own promises."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

import bilevel
import constrained
import problems
from bilevel import BilevelProblem, KKTRelaxation, Status, verify
from bilevel.algorithms import kkt_relaxation
from bilevel.algorithms.kkt_checks import looks_convex, lower_scale, moves_with_x
from bilevel.algorithms.relaxed_kkt import RelaxedKKT, solve_program
from bilevel.algorithms.start_points import start_box
from bilevel.flat import FlatProblem
from bilevel.lower_level import solve_lower_level
from constrained.multipliers import FlatMultipliers
from implicit import Run, SolveError, tree
from implicit.iterate import iterate

ZERO = torch.zeros(1, dtype=torch.float64)


def distance(a: Any, b: Any) -> float:
    return float(tree.max_abs(tree.detach(tree.sub(a, b))))


def clamped(a: float = 1.0, *, scale: float = 1.0, **more: Any) -> BilevelProblem:
    """y = max(x, 0), f = (x - 1)^2 + (y - a)^2."""
    return BilevelProblem(
        upper=lambda x, y: ((x - 1) ** 2 + (y - a) ** 2).sum(),
        lower=lambda x, y: scale * 0.5 * ((y - x) ** 2).sum(),
        lower_inequality=lambda x, y: -y,
        **more,
    )


# Closed forms.

CLOSED = {
    "coupled_scalar_active": 1e-8,
    "coupled_scalar_inactive": 1e-8,
    "coupled_scalar_degenerate": 1e-5,
    "coupled_scalar_shifted": 1e-8,
    "coupled_segment": 1e-8,
    "coupled_waves_1": 1e-8,
    "coupled_waves_4": 1e-8,
    "coupled_polyhedral": 1e-8,
}
"""Accuracy of x, y and the multipliers; where a constraint holds without force it is the root of the residual."""


@pytest.mark.parametrize("name", list(CLOSED))
def test_closed_forms(name: str) -> None:
    case = problems.case(name)
    found = bilevel.solve(case.problem, KKTRelaxation(restarts=None if "waves" in name else 1), *case.start)
    assert found.status is Status.CONVERGED
    assert distance(found.x, case.x_star) < CLOSED[name]
    assert distance(found.y, case.y_star) < CLOSED[name]
    for field, value in case.multipliers_star.items():
        assert distance(found.multipliers[field], value) < CLOSED[name]


@pytest.mark.parametrize("name", ["coupled_sum", "coupled_sum_bilinear"])
def test_many_lower_solutions_under_one_equation(name: str) -> None:
    case = problems.case(name, n=5)
    found = bilevel.solve(case.problem, KKTRelaxation(restarts=1), *case.start)
    assert found.status is Status.CONVERGED
    assert distance(found.x, case.x_star) < 1e-7
    assert distance(found.y, case.y_star) < 1e-7
    assert distance(found.multipliers["lower_equality"], case.multipliers_star["lower_equality"]) < 1e-7


def test_one_of_several_local_solutions_is_global() -> None:
    case = problems.case("coupled_waves_4")
    alone = bilevel.solve(case.problem, KKTRelaxation(restarts=0), *case.start)
    assert alone.status is Status.CONVERGED
    assert len(alone.starts) == 1
    nearest = min(distance(alone.x, m) for m in (case.x_star, *case.local_minima))
    assert nearest < 1e-7
    several = bilevel.solve(case.problem, KKTRelaxation(), *case.start)
    assert several.upper_value == pytest.approx(float(case.upper_star), abs=1e-10)
    best = min(s.upper_value for s in several.starts if s.accepted)
    assert several.upper_value == pytest.approx(best)
    assert [s.name for s in several.starts[:3]] == ["given", "random 1", "random 2"]


# Enumerations of active sets.


def vertices(cost: np.ndarray, slope: np.ndarray, A: np.ndarray, B: np.ndarray, b: np.ndarray, reach: float) -> float:
    """min cost'(x, y) with y minimizing slope'y, A x + B y <= b, and |x| <= reach: one program per active set."""
    p, m = B.shape
    n, best = A.shape[1], math.inf
    for active in itertools.product((False, True), repeat=p):
        on = np.array(active)
        rows = np.hstack([A, B, np.zeros((p, p))])
        stationary = np.hstack([np.zeros((m, n + m)), B.T])
        bounds = [(-reach, reach)] * n + [(None, None)] * m + [(0, None if k else 0) for k in active]
        found = linprog(
            np.concatenate([cost, np.zeros(p)]),
            rows[~on] if not on.all() else None,
            b[~on] if not on.all() else None,
            np.vstack([stationary, rows[on]]),
            np.concatenate([-slope, b[on]]),
            bounds=bounds,
        )
        if found.status == 0:
            best = min(best, found.fun)
    return best


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_linear_programs_at_both_levels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = 2, 2
    A = np.vstack([rng.normal(size=(3, n)), np.zeros((2 * m, n))])
    B = np.vstack([rng.normal(size=(3, m)), np.eye(m), -np.eye(m)])
    b = np.concatenate([1.0 + rng.uniform(size=3), np.full(2 * m, 2.0)])
    cost, slope = rng.normal(size=n + m), rng.normal(size=m)
    c, d, A_, B_, b_ = (torch.from_numpy(v) for v in (cost, slope, A, B, b))
    problem = BilevelProblem(
        upper=lambda x, y: c[:n] @ x + c[n:] @ y,
        lower=lambda x, y: d @ y,
        lower_inequality=lambda x, y: A_ @ x + B_ @ y - b_,
        upper_set=constrained.Box(-3.0, 3.0),
    )
    found = bilevel.solve(problem, KKTRelaxation(restarts=2), torch.zeros(n), torch.zeros(m))
    assert found.status is Status.CONVERGED
    assert found.upper_value == pytest.approx(vertices(cost, slope, A, B, b, 3.0), abs=1e-7)


def pieces(P: np.ndarray, Q: np.ndarray, target: np.ndarray, most: float) -> tuple[float, np.ndarray]:
    """min |(x, y) - target|^2 with y minimizing y'Qy/2 - (Px)'y over 0 <= y <= 1, and sum(x) <= most, by cvxpy."""
    m, n = P.shape
    best = (math.inf, np.zeros(n))
    for sides in itertools.product((0, 1, 2), repeat=m):
        x, y = cp.Variable(n), cp.Variable(m)
        slope = Q @ y - P @ x
        constraints = [cp.sum(x) <= most]
        for j, side in enumerate(sides):
            constraints += [
                [y[j] == 0, slope[j] >= 0],
                [y[j] == 1, slope[j] <= 0],
                [y[j] >= 0, y[j] <= 1, slope[j] == 0],
            ][side]
        program = cp.Problem(cp.Minimize(cp.sum_squares(cp.hstack([x, y]) - target)), constraints)
        program.solve(solver=cp.CLARABEL)
        if program.status == "optimal" and program.value < best[0]:
            best = (float(program.value), np.array(x.value))
    return best


@pytest.mark.parametrize("seed", [0, 1])
def test_box_below_and_row_above_against_every_piece(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = 2, 3
    P, root, target = rng.normal(size=(m, n)), rng.normal(size=(m, m)), 2 * rng.normal(size=n + m)
    Q = root @ root.T + np.eye(m)
    value, x = pieces(P, Q, target, 0.5)
    P_, Q_, goal = (torch.from_numpy(v) for v in (P, Q, target))
    problem = BilevelProblem(
        upper=lambda x, y: ((torch.cat([x, y]) - goal) ** 2).sum(),
        lower=lambda x, y: 0.5 * y @ Q_ @ y - (P_ @ x) @ y,
        lower_set=constrained.Box(0.0, 1.0),
        upper_inequality=lambda x, y: x.sum() - 0.5,
    )
    found = bilevel.solve(problem, KKTRelaxation(restarts=3), torch.zeros(n), torch.full((m,), 0.5))
    assert found.status is Status.CONVERGED
    assert found.upper_value == pytest.approx(value, abs=1e-6)
    assert distance(found.x, torch.from_numpy(x)) < 1e-4
    slope = Q_ @ found.y - P_ @ found.x
    assert distance(found.multipliers["lower_set"], -slope) < 1e-7  # upper minus lower bound's


# Every kind of constraint.


def test_equalities_and_sets_at_both_levels() -> None:
    # Below y1 + y2 = x1 makes y = (x1 + (1, -1)) / 2; above x1 + x2 = 1 with x >= 0 and y1 = 3/4 leave x = (1/2, 1/2).
    problem = BilevelProblem(
        upper=lambda x, y: (x["a"] - 3).square().sum() + y["v"].square().sum(),
        lower=lambda x, y: 0.5 * y["v"].square().sum() - 0.5 * (y["v"][0] - y["v"][1]),
        upper_set=constrained.Simplex(),
        lower_equality=lambda x, y: {"sum": y["v"].sum() - x["a"][0]},
        upper_equality=lambda x, y: y["v"][0] - 0.75,
    )
    start = {"a": torch.tensor([0.3, 0.7])}, {"v": torch.zeros(2)}
    found = bilevel.solve(problem, KKTRelaxation(restarts=0), *start)
    assert found.status is Status.CONVERGED
    assert distance(found.x, {"a": torch.tensor([0.5, 0.5])}) < 1e-8
    assert distance(found.y, {"v": torch.tensor([0.75, -0.25])}) < 1e-8
    # y1 - 1/2 + multiplier = 0
    assert float(found.multipliers["lower_equality"]["sum"]) == pytest.approx(-0.25, abs=1e-8)


def test_curved_lower_set() -> None:
    # The point of the unit disc nearest to x, and f = |y - (0, 2)|^2 + |x - (3, 4)|^2: x = (3, 4) is not best for y.
    problem = BilevelProblem(
        upper=lambda x, y: (
            ((y - torch.tensor([0.0, 2.0])) ** 2).sum() + 0.1 * ((x - torch.tensor([3.0, 4.0])) ** 2).sum()
        ),
        lower=lambda x, y: ((y - x) ** 2).sum(),
        lower_set=constrained.Ball(1.0),
    )
    found = bilevel.solve(problem, KKTRelaxation(restarts=1), torch.ones(2), torch.zeros(2))
    assert found.status is Status.CONVERGED
    angles = torch.linspace(0, math.pi, 20_001)
    radii = torch.linspace(1, 8, 701)[:, None]
    x = torch.stack([radii * angles.cos(), radii * angles.sin()])
    value = (angles.cos() ** 2 + (angles.sin() - 2) ** 2) + 0.1 * ((x[0] - 3) ** 2 + (x[1] - 4) ** 2)
    assert found.upper_value <= float(value.min()) + 1e-9
    assert found.upper_value == pytest.approx(float(value.min()), abs=1e-4)
    assert float(found.y.norm()) == pytest.approx(1.0, abs=1e-8)


def test_multipliers_of_upper_constraints_are_the_change_of_the_optimum() -> None:
    # y = x >= 0 below makes F(x) = 2 |x - 1|^2.
    def solved(**more: Any) -> bilevel.Solution:
        problem = clamped(**more)
        found = bilevel.solve(problem, KKTRelaxation(restarts=0), torch.full((2,), 0.25), torch.ones(2))
        assert found.status is Status.CONVERGED
        return found

    row = solved(upper_inequality=lambda x, y: {"a": x[:1] - 0.5, "b": -x - 9})
    assert distance(row.x, torch.tensor([0.5, 1.0])) < 1e-8
    # F' = 4 (x - 1) = -2 at 1/2
    assert distance(row.multipliers["upper_inequality"], {"a": ZERO + 2, "b": torch.zeros(2)}) < 1e-7
    assert distance(row.multipliers["lower_inequality"], torch.zeros(2)) < 1e-7
    equal = solved(upper_equality=lambda x, y: 2 * (x[1] + y[1]) - 6)
    assert distance(equal.x, torch.tensor([1.0, 1.5])) < 1e-8
    # x2 = 3/2, F' = 2, and the row changes by 4 with x2
    assert float(equal.multipliers["upper_equality"]) == pytest.approx(-0.5, abs=1e-7)
    box = solved(upper_set=constrained.Box(torch.tensor([1.25, -5.0]), torch.tensor([4.0, 0.75])))
    assert distance(box.x, torch.tensor([1.25, 0.75])) < 1e-8
    assert distance(box.multipliers["upper_set"], torch.tensor([-1.0, 1.0])) < 1e-7
    assert "upper_inequality" not in box.multipliers


@pytest.mark.filterwarnings("ignore:lower_inequality")
def test_rows_moved_to_the_upper_level_have_their_multiplier_there() -> None:
    problem = BilevelProblem(
        upper=lambda x, y: ((x - 1) ** 2 + y**2).sum(),
        lower=lambda x, y: 0.5 * ((y - x) ** 2).sum(),
        lower_inequality=lambda x, y: torch.cat([2 * x - 0.5, 0.75 - y]),
    )
    found = bilevel.solve(problem, KKTRelaxation(restarts=0), ZERO, ZERO + 1)
    assert found.status is Status.CONVERGED
    # y = 3/4 with slope 3/4 - x = 1/2 below; above F' = 2 (1/4 - 1), and the row changes by 2 with x.
    assert distance(found.multipliers["lower_inequality"], torch.tensor([0.75, 0.5])) < 1e-7


def test_unconstrained_lower_level() -> None:
    problem = BilevelProblem(lambda x, y: ((y - 2) ** 2).sum() + (x**2).sum(), lambda x, y: ((y - x) ** 2).sum())
    found = bilevel.solve(problem, KKTRelaxation(restarts=0), ZERO, ZERO)
    assert found.status is Status.CONVERGED
    assert distance(found.x, ZERO + 1) < 1e-9
    assert found.multipliers == {}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_size_of_the_lower_objective_does_not_matter(scale: float) -> None:
    found = bilevel.solve(clamped(scale=scale), KKTRelaxation(restarts=0), ZERO - 2, ZERO + 1)
    assert found.status is Status.CONVERGED
    assert distance(found.x, ZERO + 1) < 1e-6
    inside = BilevelProblem(
        upper=lambda x, y: ((x + 1) ** 2 + (y - 1) ** 2).sum(),
        lower=lambda x, y: scale * 0.5 * ((y - x) ** 2).sum(),
        lower_inequality=lambda x, y: -y,
    )
    found = bilevel.solve(inside, KKTRelaxation(restarts=0), ZERO + 2, ZERO + 1)
    assert float(found.multipliers["lower_inequality"]) == pytest.approx(scale, rel=1e-5)  # y = 0, slope -scale x


# Lower levels that are not convex.


def pitchfork(**more: Any) -> BilevelProblem:
    """Lower minima at 0 for x >= 0 and at +-sqrt(-x) below; 0 stays a KKT point. f* = 3/16 at (-1/4, +-1/2)."""
    return BilevelProblem(
        upper=lambda x, y: ((x + 0.5) ** 2 + 0.5 * y**2).sum(),
        lower=lambda x, y: (0.5 * x * y**2 + 0.25 * y**4).sum(),
        upper_set=constrained.Box(-1.0, 1.0),
        lower_set=constrained.Box(-1.0, 1.0),
        **more,
    )


def test_kkt_points_that_are_no_minima_are_rejected() -> None:
    problem = pitchfork()
    assert not verify(problem, ZERO - 0.5, ZERO)
    found = bilevel.solve(problem, KKTRelaxation(restarts=2), ZERO + 0.1, ZERO)
    assert found.status is Status.CONVERGED
    assert found.upper_value == pytest.approx(3 / 16, abs=1e-6)
    assert float(found.x) == pytest.approx(-0.25, abs=1e-4)
    assert len(found.starts) > 3  # better points became starts
    alone = bilevel.solve(problem, KKTRelaxation(restarts=0), ZERO + 0.1, ZERO, max_steps=4)
    assert alone.status is Status.STEP_LIMIT
    assert not alone.success


def test_cuts_lead_to_the_global_lower_minimum() -> None:
    # g = x y^2 / 2 - y^3 / 3 with y in [-1, 1]: KKT points at -1 give f = -2, but there the lower minimum is 1.
    problem = BilevelProblem(
        upper=lambda x, y: (x + y).sum(),
        lower=lambda x, y: (0.5 * x * y**2 - y**3 / 3).sum(),
        upper_set=constrained.Box(-1.0, 1.0),
        lower_set=constrained.Box(-1.0, 1.0),
    )
    found = bilevel.solve(problem, KKTRelaxation(restarts=0), ZERO, ZERO - 0.9)
    assert found.status is Status.CONVERGED
    assert max(row["cuts"] for row in found.history) >= 1
    assert found.upper_value == pytest.approx(0.0, abs=1e-6)
    assert float(found.x) == pytest.approx(-1.0, abs=1e-6)


def test_no_false_claims_where_the_better_minimum_is_far() -> None:
    # Two wells, the deeper one at y = 3; around 0 there is another one, which is better for f.
    problem = BilevelProblem(
        upper=lambda x, y: (y**2 + (x - 1) ** 2).sum(),
        lower=lambda x, y: (((y - x) * (y - 3)) ** 2 - 0.5 * y).sum(),
        upper_set=constrained.Box(0.0, 2.0),
    )
    found = bilevel.solve(problem, KKTRelaxation(restarts=1), ZERO + 1, ZERO, raise_on_failure=False)
    accepted = bool(verify(problem, found.x, found.y))
    assert accepted or found.status is not Status.CONVERGED
    assert accepted
    assert float(found.y) > 2.9


# Constraint qualifications.


def test_a_lower_level_without_multipliers_at_its_solution() -> None:
    # y^2 <= x has no interior at x = 0, where f is smallest: there is no multiplier, and they grow on the way.
    problem = BilevelProblem(
        upper=lambda x, y: ((x - 3.5) ** 2 + (y + 4) ** 2).sum(),
        lower=lambda x, y: ((y - 3) ** 2).sum(),
        lower_inequality=lambda x, y: y**2 - x,
    )
    found = bilevel.solve(problem, KKTRelaxation(restarts=0), ZERO + 1, ZERO + 1)
    assert found.upper_value == pytest.approx(28.25, abs=1e-2)
    assert bool(verify(problem, found.x, found.y))


# Infeasible problems.


def test_infeasible_problems_end_with_the_least_infeasible_point() -> None:
    # max(x, 0) >= x + 1 needs x <= -1, which the box forbids; the least violation is 1/2, at x = -1/2.
    problem = clamped(upper_inequality=lambda x, y: x - y + 1.0, upper_set=constrained.Box(-0.5, 2.0))
    with pytest.raises(SolveError, match="INFEASIBLE") as caught:
        bilevel.solve(problem, KKTRelaxation(restarts=1), ZERO, ZERO)
    solution = caught.value.solution
    assert solution.status is Status.INFEASIBLE
    assert float(solution.x) == pytest.approx(-0.5, abs=1e-3)
    assert float(solution.y) == pytest.approx(0.0, abs=1e-6)
    assert solution.accuracy.feasibility == pytest.approx(0.5 / math.sqrt(2), abs=1e-3)
    assert not any(s.accepted for s in solution.starts)
    assert solution.multipliers == {}


def test_infeasible_lower_levels() -> None:
    problem = BilevelProblem(
        upper=lambda x, y: (x**2).sum(),
        lower=lambda x, y: (y**2).sum(),
        lower_inequality=lambda x, y: torch.cat([y - x + 1, x - y + 1]),
    )
    with pytest.warns(UserWarning, match="does not depend on y"):
        found = bilevel.solve(problem, KKTRelaxation(restarts=1), ZERO, ZERO, raise_on_failure=False)
    assert found.status is Status.INFEASIBLE


# Refusals.


def test_minibatches_are_refused() -> None:
    data = bilevel.Batches(torch.randn(8, 1, generator=torch.Generator().manual_seed(0)), 2)
    problem = BilevelProblem(
        lambda x, y: ((y - 1) ** 2).sum() + (x**2).sum(),
        lambda x, y, *, batch: ((y - x - batch) ** 2).mean(),
        lower_data=data,
    )
    with pytest.raises(ValueError, match=r"lower_data draws minibatches.*Penalty"):
        bilevel.solve(problem, KKTRelaxation(), ZERO, ZERO)


def test_single_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x0 is torch.float32.*\.double\(\)"):
        bilevel.solve(clamped(), KKTRelaxation(), ZERO.float(), ZERO.float())


def test_large_problems_are_refused() -> None:
    with pytest.raises(ValueError, match=r"603 unknowns, above the limit of 500.*LVHBA"):
        bilevel.solve(clamped(), KKTRelaxation(), torch.zeros(201), torch.zeros(201))


class Cut(torch.autograd.Function):
    """A square whose backward pass forgets where it comes from."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * 2 * y.detach()


class NoBackward(torch.autograd.Function):
    """Twice its argument, without a derivative."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return 2 * v


class Once(Cut):
    """A square whose derivative has none."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * NoBackward.apply(y)


@pytest.mark.parametrize(("square", "said"), [(Cut, "deviate"), (Once, "third derivatives")])
def test_lower_functions_must_have_third_derivatives(square: Any, said: str) -> None:
    problem = BilevelProblem(
        upper=lambda x, y: (x**2 + y**2).sum(),
        lower=lambda x, y: square.apply(y - x).sum() + 0.0 * (x * y).sum(),
        lower_inequality=lambda x, y: -y,
    )
    with pytest.raises(ValueError, match=said):
        bilevel.solve(problem, KKTRelaxation(), ZERO, ZERO + 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("restarts", -1),
        ("restarts", True),
        ("decrease", 1.0),
        ("decrease", 0.0),
        ("smallest", 0.0),
        ("relaxation", 1e-12),
    ],
)
def test_settings_are_validated(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        KKTRelaxation(**{field: value})


# Budgets and resumption.


def test_budgets_keep_the_best_point() -> None:
    problem = clamped()
    first = bilevel.solve(problem, KKTRelaxation(), ZERO - 2, ZERO, max_steps=1)
    assert first.status is Status.STEP_LIMIT
    assert first.starts == ()
    whole = bilevel.solve(problem, KKTRelaxation(restarts=1), ZERO - 2, ZERO)
    early = bilevel.solve(problem, KKTRelaxation(restarts=1), ZERO - 2, ZERO, max_steps=whole.steps - 1)
    assert early.status is Status.STEP_LIMIT
    assert distance(early.x, whole.x) == 0.0
    assert len(early.starts) == len(whole.starts) - 1


def test_a_time_limit_ends_a_program_which_a_resumed_run_solves_again() -> None:
    method = KKTRelaxation(restarts=0)
    whole = bilevel.solve(clamped(2.0), method, ZERO + 2, ZERO)
    late = bilevel.solve(clamped(2.0), method, ZERO + 2, ZERO, time_limit=1e-9)
    assert late.status is Status.TIME_LIMIT
    assert [row["inner_steps"] for row in late.history] == [1.0]
    assert late.starts == ()
    resumed = bilevel.solve(clamped(2.0), checkpoint=late.checkpoint)
    assert resumed.status is Status.CONVERGED
    assert torch.equal(resumed.x, whole.x)
    assert [row["inner_steps"] for row in resumed.history[1:]] == [row["inner_steps"] for row in whole.history]


WHOLE: dict[str, bilevel.Solution] = {}


@pytest.mark.parametrize(("name", "split"), [("clamped", 1), ("clamped", 3), ("clamped", 6), ("pitchfork", 5)])
def test_resumption_is_bitwise(name: str, split: int, tmp_path: Path) -> None:
    problem = pitchfork() if name == "pitchfork" else clamped(0.5)
    generator = torch.Generator().manual_seed(5)
    method = KKTRelaxation(restarts=1, relaxation=1e-3)
    steps, start = 7, (ZERO + 0.1, ZERO)
    if name not in WHOLE:
        WHOLE[name] = bilevel.solve(problem, method, *start, generator=generator, max_steps=steps)
    whole = WHOLE[name]
    path = tmp_path / "run.pt"
    save = bilevel.SaveCheckpoint(path, every=1)
    bilevel.solve(problem, method, *start, generator=generator, max_steps=split, callbacks=[save])
    resumed = bilevel.solve(problem, checkpoint=bilevel.load_checkpoint(path), max_steps=steps)
    assert resumed.steps == whole.steps > split or whole.status is Status.CONVERGED
    assert torch.equal(resumed.x, whole.x)
    assert torch.equal(resumed.y, whole.y)
    keys = [k for k in whole.history[0] if k != "seconds"]
    assert [[row[k] for k in keys] for row in resumed.history] == [[row[k] for k in keys] for row in whole.history]
    assert repr(resumed.starts) == repr(whole.starts)
    assert resumed.accuracy == whole.accuracy
    assert resumed.status is whole.status


def test_other_generators_give_other_starts() -> None:
    problem = clamped(0.5)
    values = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        found = bilevel.solve(problem, KKTRelaxation(restarts=1), ZERO, ZERO, generator=generator)
        values.append([row["inner_steps"] for row in found.history] + [row["upper_value"] for row in found.history])
    assert values[0] == values[1] != values[2]


def test_paths_that_meet_are_given_up() -> None:
    # Relaxed, y may exceed max(x, 0), which f likes: relaxed values are below the best one, and points decide.
    found = bilevel.solve(clamped(2.0), KKTRelaxation(restarts=2), ZERO + 2, ZERO)
    assert found.status is Status.CONVERGED
    assert distance(found.x, ZERO + 1.5) < 1e-8
    assert [s.accepted for s in found.starts] == [True, False, False]
    assert all("earlier start" in s.note for s in found.starts[1:])
    counts = [sum(row["start"] == k for row in found.history) for k in range(3)]
    assert counts == [4, 1, 1]  # t = 0.1, 1e-3, 1e-5 and the piece; then one program each


# The programs themselves.


def row_and_bounds() -> tuple[FlatProblem, RelaxedKKT]:
    problem = BilevelProblem(
        upper=lambda x, y: (x**2).sum() * y[0] + y[1] ** 3,
        lower=lambda x, y: x[0] * y[0] ** 2 * y[1] + y.exp().sum(),
        lower_inequality=lambda x, y: (y[0] ** 2 * x[0] + y[1] - 3)[None],
        lower_equality=lambda x, y: (y[0] * y[1] * x[0] - 1)[None],
        lower_set=constrained.Box(torch.tensor([-4.0, -torch.inf]), torch.tensor([torch.inf, 5.0])),
        upper_inequality=lambda x, y: (x[0] * y[1] - 7)[None],
    )
    flat = FlatProblem(problem, torch.tensor([0.5]), torch.tensor([1.0, 2.0]))
    return flat, RelaxedKKT(flat, 0.5)


def test_the_program_is_the_relaxed_kkt_system() -> None:
    _, kkt = row_and_bounds()
    assert kkt.size == 1 + 2 + 1 + 1 + 1 + 1
    assert kkt.pairs == 3
    x, a, b, v, w, low, high = values = (0.7, 1.1, -0.4, 0.3, -0.8, 0.2, 0.6)
    program = kkt.relaxed(0.25, torch.tensor([[2.0, 1.0]]), 0.125)
    z = torch.tensor(values)
    row, equal = a**2 * x + b - 3, a * b * x - 1
    slope = [
        0.5 * (2 * x * a * b + math.exp(a)) + v * 2 * a * x + w * b * x - low,
        0.5 * (x * a**2 + math.exp(b)) + v + w * a * x + high,
    ]
    assert program.equality is not None
    assert program.inequality is not None
    assert distance(program.equality(z), torch.tensor([*slope, equal])) < 1e-14
    g = lambda p, q: x * p**2 * q + math.exp(p) + math.exp(q)  # noqa: E731
    products = [-v * row - 0.25, low * (a + 4) - 0.25, high * (5 - b) - 0.25]
    cut = 0.5 * (g(a, b) - g(2.0, 1.0)) - 0.125
    assert distance(program.inequality(z), torch.tensor([x * b - 7, row, *products, cut])) < 1e-14
    assert float(program.objective(z).detach()) == pytest.approx(x**2 * a + b**3)
    assert program.lower.tolist() == [-math.inf, -4.0, -math.inf, 0.0, -math.inf, 0.0, 0.0]
    assert program.upper.tolist() == [math.inf, math.inf, 5.0, math.inf, math.inf, math.inf, math.inf]
    multipliers, slacks = kkt.pairs_at(z)
    assert distance(multipliers, torch.tensor([v, low, high])) == 0.0
    assert distance(slacks, torch.tensor([-row, a + 4, 5 - b])) < 1e-14
    there = kkt.multipliers(z)
    assert float(there.inequality) == v / 0.5
    assert float(there.equality) == w / 0.5
    assert there.lower.tolist() == [low / 0.5, 0.0]
    assert there.upper.tolist() == [0.0, high / 0.5]
    assert distance(kkt.join(z[:1], z[1:3], there), z) < 1e-15


@pytest.mark.parametrize("active", list(itertools.product((False, True), repeat=3)))
def test_pieces_fix_one_side_of_every_pair(active: tuple[bool, ...]) -> None:
    _, kkt = row_and_bounds()
    program = kkt.piece(torch.tensor(active), torch.zeros(0, 2), 0.0)
    z = torch.tensor([0.7, 1.1, -0.4, 0.3, -0.8, 0.2, 0.6])
    assert program.equality is not None
    assert program.inequality is not None
    row = 1.1**2 * 0.7 - 0.4 - 3
    tail = program.equality(z)[3:].tolist()
    assert tail == pytest.approx([row] if active[0] else [])
    assert len(program.inequality(z)) == 2 - active[0]
    assert program.upper[3] == (math.inf if active[0] else 0.0)
    assert program.upper[5] == (math.inf if active[1] else 0.0)
    assert program.upper[6] == (math.inf if active[2] else 0.0)
    assert program.upper[1] == (-4.0 if active[1] else math.inf)
    assert program.lower[2] == (5.0 if active[2] else -math.inf)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_pieces_that_end_where_another_descends_are_left(bound: bool, sign: float) -> None:
    # y = max(x, 0) (or mirrored), and f = (x - 1)^2 + y^2 is smallest at 1/2; the piece y = 0 ends at x = 0.
    more: dict[str, Any] = {}
    if bound:
        more["lower_set"] = constrained.Box(0.0, None) if sign > 0 else constrained.Box(None, 0.0)
    else:
        more["lower_inequality"] = lambda x, y: -sign * y
    problem = BilevelProblem(
        upper=lambda x, y: ((sign * x - 1) ** 2 + y**2).sum(), lower=lambda x, y: 0.5 * ((y - x) ** 2).sum(), **more
    )
    kkt = RelaxedKKT(FlatProblem(problem, ZERO, ZERO), 1.0)
    none = ZERO.new_zeros(0, 1)
    z = torch.tensor([-sign, 0.0, 1.0])
    active = torch.tensor([True])
    first = solve_program(kkt.piece(active, none, 0.0), z, None, atol=1e-10, max_steps=100)
    assert float(first.z[0]) == pytest.approx(0.0, abs=1e-5)
    assert float(kkt.promises(first, active)) == pytest.approx(-2.0, abs=1e-4)
    second = solve_program(kkt.piece(~active, none, 0.0), first.z, None, atol=1e-10, max_steps=100)
    assert float(second.z[0]) == pytest.approx(0.5 * sign, abs=1e-8)
    assert float(kkt.promises(second, ~active)) == 0.0
    # From the other side: f = (x + 1)^2 + y^2 is smallest at x = -1, y = 0, and the piece y = x ends at 0.
    other = BilevelProblem(
        upper=lambda x, y: ((sign * x + 1) ** 2 + y**2).sum(), lower=lambda x, y: 0.5 * ((y - x) ** 2).sum(), **more
    )
    kkt = RelaxedKKT(FlatProblem(other, ZERO, ZERO), 1.0)
    third = solve_program(
        kkt.piece(~active, none, 0.0), torch.tensor([sign, sign, 0.0]), None, atol=1e-10, max_steps=100
    )
    assert float(kkt.promises(third, ~active)) == pytest.approx(-2.0, abs=1e-4)


def kinks(count: int) -> tuple[BilevelProblem, Any]:
    """y = max(x, 0) and f = |x - 1|^2 + |y|^2, smallest at 1/2; and a run that is in the piece y = 0."""
    problem = BilevelProblem(
        upper=lambda x, y: ((x - 1) ** 2 + y**2).sum(),
        lower=lambda x, y: 0.5 * ((y - x) ** 2).sum(),
        lower_inequality=lambda x, y: -y,
    )
    start = torch.full((count,), -1.0), torch.zeros(count)
    method = KKTRelaxation(restarts=0).resolve(problem, *start)
    state = method.init(problem, *start)
    state.point = torch.cat([*start, torch.ones(count)])
    state.active, state.phase, state.relaxed_value = torch.ones(count, dtype=torch.bool), "piece", math.inf
    return problem, iterate(method, problem, Run(state), max_steps=20)


def test_pairs_are_turned_over_one_by_one() -> None:
    # The multiplier of every pair is 2: f = 2 x + O(x^2) on the side x < 0 and falls on the other.
    _, run = kinks(3)
    assert run.status is Status.CONVERGED
    assert run.state.step == 4
    assert distance(run.state.x, torch.full((3,), 0.5)) < 1e-8
    assert not run.state.unexplored


def test_a_point_from_which_f_still_falls_is_not_called_a_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kkt_relaxation, "FLIPS", 2)
    problem, run = kinks(3)
    assert sorted(round(v, 4) for v in run.state.x.tolist()) == [0.0, 0.5, 0.5]
    assert verify(problem, run.state.x, run.state.y)  # bilevel feasible, but not optimal: one x at the kink
    assert run.status is Status.STALLED
    assert run.state.unexplored
    method = KKTRelaxation(restarts=0).resolve(problem, run.state.x, run.state.y)
    _, status, message = method.assess(problem, run.state, run.status)
    assert status is Status.STALLED
    assert "other side of a pair" in message


def test_promises_that_do_not_hold_are_settled_by_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RelaxedKKT, "promises", lambda *_: -(ZERO + 1))  # multipliers that are not unique say anything
    _, run = kinks(1)
    assert run.status is Status.CONVERGED
    assert distance(run.state.x, ZERO + 0.5) < 1e-8
    assert run.state.step == 3  # y = 0, y = x, and back in y = 0, which is not better


def test_relaxed_points_are_nearly_optimal_below() -> None:
    problem = clamped(-1.0)
    kkt = RelaxedKKT(FlatProblem(problem, ZERO, ZERO), 1.0)
    for t in (1e-1, 1e-3, 1e-5):
        found = solve_program(kkt.relaxed(t, ZERO.new_zeros(0, 1), 0.0), torch.ones(3), None, atol=1e-10, max_steps=200)
        at = kkt.split(found.z)
        gap = float(problem.lower(at.x, at.y) - problem.lower(at.x, at.x.clamp(min=0)))
        assert -1e-12 <= gap <= t + 1e-9


# What is looked at before.


def test_convexity_and_dependence_are_found_by_looking() -> None:
    def flat(lower: Callable[..., Tensor], **more: Any) -> tuple[FlatProblem, Tensor]:
        problem = BilevelProblem(upper=lambda x, y: (x * y).sum(), lower=lower, **more)
        return FlatProblem(problem, ZERO, ZERO), torch.zeros(2)

    square = lambda x, y: ((y - x) ** 2).sum()  # noqa: E731
    assert looks_convex(*flat(square))
    assert looks_convex(*flat(lambda x, y: (x * y).sum()))
    assert not looks_convex(*flat(lambda x, y: (x * y**2).sum()))
    assert looks_convex(*flat(square, lower_inequality=lambda x, y: y**2 - x))
    assert not looks_convex(*flat(square, lower_inequality=lambda x, y: x - y**2))
    assert not looks_convex(*flat(square, lower_equality=lambda x, y: x - y**2))
    assert moves_with_x(*flat(square, lower_inequality=lambda x, y: y**2 - x))
    assert not moves_with_x(*flat(square, lower_inequality=lambda x, y: y**2 - 1))
    assert not moves_with_x(*flat(square))
    assert lower_scale(*flat(square)) == 1.0
    assert lower_scale(*flat(lambda x, y: 1e6 * square(x, y))) == pytest.approx(0.5e-6, rel=0.9)
    assert lower_scale(*flat(lambda x, y: 1e-6 * square(x, y))) == pytest.approx(0.5e6, rel=0.9)


def test_starts_lie_in_what_affine_constraints_leave() -> None:
    problem = BilevelProblem(
        upper=lambda x, y: x.sum() + y.sum(),
        lower=lambda x, y: ((y - 1) ** 2).sum(),
        upper_inequality=lambda x, y: torch.stack([-x[0], x[0] + x[1] - 2, x[0] ** 2 - 5]),
        lower_inequality=lambda x, y: torch.stack([x[0] - y[0], y[0] - 3 * x[0], -x[1] - y[0]]),
    )
    x, y = torch.tensor([0.5, 0.5]), torch.tensor([0.7])
    box = start_box(FlatProblem(problem, x, y), torch.cat([x, y]))
    # x1 + x2 <= 2, x2 >= -y >= -3 x1; x1 >= 0 has no upper end but that of the curved row, which does not count.
    assert box.low.tolist() == pytest.approx([0.0, -math.inf, 0.0])
    assert box.high.tolist() == pytest.approx([math.inf, 2.0, math.inf])
    inside = clamped(upper_set=constrained.Box(-1.0, 3.0), lower_set=constrained.Box(-2.0, 2.0))
    drawn = start_box(FlatProblem(inside, ZERO, ZERO), torch.zeros(2))
    points = torch.stack([drawn.draw(k, 7) for k in range(1, 17)])
    assert float(points[:, 0].min()) >= -1
    assert float(points[:, 0].max()) <= 3
    assert float(points[:, 1].min()) >= 0  # -y <= 0 is a row
    quarters = ((points[:, 0] + 1) // 1.0).long().bincount(minlength=4)
    assert quarters.tolist() == [4, 4, 4, 4]  # a Sobol sequence


def test_multipliers_of_the_lower_level_are_a_warm_start() -> None:
    flat = FlatProblem(clamped(), ZERO, ZERO)
    kkt = RelaxedKKT(flat, 1.0)
    lower = solve_lower_level(flat, ZERO - 2, ZERO)
    z = kkt.join(ZERO - 2, lower.y, lower.multipliers)
    assert distance(z, torch.tensor([-2.0, 0.0, 2.0])) < 1e-7
    blank = FlatMultipliers(ZERO.new_zeros(0), ZERO, ZERO, ZERO)
    assert distance(kkt.join(ZERO, ZERO, blank), torch.zeros(3)) == 0.0
