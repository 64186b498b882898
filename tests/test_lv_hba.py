"""LV-HBA: closed forms, the value function by independent means, costs, resumption, failures."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import bilevel
import problems
from bilevel import BilevelProblem, SolveError, Status
from bilevel.algorithms.lv_hba_report import _descends
from bilevel.flat import FlatProblem
from bilevel.lower_level import solve_lower_level
from bilevel.nearest_response import respond
from constrained import Affine, Ball, Box
from implicit import tree
from tests import lv_hba_checks

CASES = sorted(name for name, entry in problems.entries().items() if "lv_hba" in entry.tags)


@pytest.mark.parametrize("name", CASES)
def test_closed_forms_with_default_arguments(name: str) -> None:
    solution, problem = lv_hba_checks.case(bilevel.LVHBA, name), problems.case(name).problem
    assert bilevel.verify(problem, solution.x, solution.y)
    assert "verified" in solution.message
    accuracy = solution.accuracy
    assert accuracy.feasibility is not None and accuracy.feasibility <= 1e-8
    assert accuracy.lower_kkt is not None and accuracy.lower_kkt.largest <= 1e-8
    assert accuracy.optimality_gap is not None and abs(accuracy.optimality_gap) <= 1e-8
    assert accuracy.bias is not None and accuracy.bias <= 0.05
    # grad_y g + multiplier . grad_y c = 0, in the units of the declaration.
    y = tree.variables(solution.y)
    total = problem.lower(solution.x, y)
    for field, values in solution.multipliers.items():
        total = total + (tree.ravel(values) * tree.ravel(getattr(problem, field)(solution.x, y))).sum()
    slopes = torch.autograd.grad(total, tree.leaves(y))
    assert max(float(slope.abs().max()) for slope in slopes) <= 1e-7


@pytest.mark.parametrize("check", [lv_hba_checks.bounds, lv_hba_checks.scaled], ids=lambda check: check.__name__)
def test_bounds_and_units(check: object) -> None:
    check(bilevel.LVHBA)  # type: ignore[operator]


def test_sets_in_given_lengths_are_the_same_sets() -> None:
    """f = |x - (2, 1)|² + |y|²/10 and y = x in a disc, whose projection knows no lengths but those that are given."""
    problem = BilevelProblem(
        lambda x, y: (x - torch.tensor([2.0, 1.0])).square().sum() + y.square().sum() / 10,
        lambda x, y: 0.5 * (y - x).square().sum(),
        upper_set=Ball(1.5),
    )
    zero = torch.zeros(2)
    measured = bilevel.solve(problem, bilevel.LVHBA(), zero, zero)
    assert measured.algorithm.lengths == (1.0,)
    given = bilevel.solve(problem, bilevel.LVHBA(lengths=(3.0, 0.7)), zero, zero)
    expected = 1.5 * torch.tensor([2.0, 1.0]) / math.sqrt(5)
    for solution in (measured, given):
        assert solution.success, solution.message
        torch.testing.assert_close(solution.x, expected, rtol=0, atol=1e-4)


def test_the_bias_of_one_penalty_is_the_one_of_theory() -> None:
    """Where the constraint is slack, y_c = (g's target w + f's) / (w + 1) with w = gamma c / (1 + gamma)."""
    case = problems.case("coupled_scalar_inactive")
    for gamma, c in ((1.0, 11.9), (1.0, 40.0), (5.0, 11.9)):
        method = bilevel.LVHBA(
            penalty=c,
            proximal=gamma,
            stages=1,
            upper_curvature=1.0,
            lower_curvature=1.0,
            lengths=(1.0,),
            rtol=1e-10,
        )
        reached: list[float] = []
        bilevel.solve(
            case.problem,
            method,
            *case.start,
            raise_on_failure=False,
            callbacks=[lambda info, reached=reached: reached.append(float(info.state.y))],
        )
        w = gamma * c / (1.0 + gamma)
        assert reached[-1] == pytest.approx(w / (w + 1.0), abs=1e-8)


def test_the_iteration_of_the_paper_alone_converges_too() -> None:
    """No acceleration, one stage, c_k = 5 (k + 1)^(1/4), as in the paper."""
    plain = bilevel.LVHBA(penalty=5.0, exponent=0.25, stages=1, acceleration=0, stage_steps=3_000)
    for name in ("coupled_scalar_active", "coupled_scalar_inactive"):
        case = problems.case(name)
        errors = []
        for budget in (100, 1_000):
            solution = bilevel.solve(case.problem, plain, *case.start, max_steps=budget, raise_on_failure=False)
            assert solution.status is Status.STEP_LIMIT
            errors.append(case.distance(solution))
        assert errors[1] <= 2e-2 and errors[1] <= 0.25 * errors[0] + 1e-12


# The value function, computed by other means.


@pytest.mark.parametrize("seed", range(3))
def test_directions_are_the_gradient_of_f_minus_v_by_finite_differences(seed: int) -> None:
    lv_hba_checks.directions(bilevel.LVHBA, seed)


@pytest.mark.parametrize("seed", range(4))
def test_v_lies_below_f_on_c_and_touches_it_at_lower_solutions(seed: int) -> None:
    case, method, state = lv_hba_checks.without_upper(bilevel.LVHBA)
    x, y, z = lv_hba_checks.pair(case, seed)
    assert float(case.problem.lower(x, y)) - lv_hba_checks.value_function(case, x, y, z, 3.0)[0] > 1e-3
    assert float(lv_hba_checks.field(case, method, state, x, y, z)[2]["gap"]) > 1e-3
    generator = torch.Generator().manual_seed(seed)
    at_x = torch.randn(3, generator=generator)
    flat = FlatProblem(case.problem, *case.start)
    solved = solve_lower_level(flat, at_x, torch.zeros(4))
    duals = solved.multipliers.inequality
    r = 2.0 * float(duals.abs().max()) + 1.0
    state.radius = torch.tensor(r)
    v, _, _ = lv_hba_checks.value_function(case, at_x, solved.y, duals, r)
    assert solved.value - v == pytest.approx(0.0, abs=1e-10)
    directions, here, values = lv_hba_checks.field(case, method, state, at_x, solved.y, duals)
    assert float(values["gap"]) == pytest.approx(0.0, abs=1e-8)
    torch.testing.assert_close(here.theta, solved.y, rtol=0, atol=1e-6)
    torch.testing.assert_close(here.lam, duals, rtol=0, atol=1e-6)
    assert float(directions[2].abs().max()) <= 1e-6


# Cost.


def test_three_backward_passes_and_no_product_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problems.case("coupled_polyhedral")
    method = bilevel.LVHBA().resolve(case.problem, *case.start)
    state = method.init(case.problem, *case.start)
    before, counted = (case.counter.upper, case.counter.lower), dict(state.counts)
    passes: list[bool] = []
    real = torch.autograd.grad

    def watched(*args: object, **kwargs: object) -> object:
        passes.append(bool(kwargs.get("create_graph", False)))
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "grad", watched)
    for step in range(1, 30):
        method.step(case.problem, state)
        state.step += 1
        assert len(passes) == 3 * step
        assert {k: v - counted[k] for k, v in state.counts.items()} == {"upper": step, "lower": 3 * step, "products": 0}
    assert not any(passes)
    assert (case.counter.upper - before[0], case.counter.lower - before[1]) == (29, 87)


# Resumption.


def finite_sum(size: int | None, rows: int = 40) -> tuple[BilevelProblem, Tensor, Tensor]:
    """g = mean |y - A x - e_i|²/2 with y <= 1, f = mean |y - b - d_i|²/2 + |x|²/20 over examples e_i, d_i."""
    generator = torch.Generator().manual_seed(5)
    A = torch.randn(3, 2, generator=generator)
    target = torch.tensor([2.0, -1.0, 0.5])
    noise = {"e": 0.3 * torch.randn(rows, 3, generator=generator), "d": 0.3 * torch.randn(rows, 3, generator=generator)}
    data = bilevel.Batches(noise, size)
    problem = BilevelProblem(
        lambda x, y, *, batch: 0.5 * (y - target - batch["d"]).square().sum(1).mean() + 0.05 * x.square().sum(),
        lambda x, y, *, batch: 0.5 * (y - A @ x - batch["e"]).square().sum(1).mean(),
        upper_data=data,
        lower_data=data,
        lower_inequality=lambda x, y: y - 1.0,
    )
    return problem, torch.zeros(2), torch.zeros(3)


def same(a: bilevel.Solution, b: bilevel.Solution) -> bool:
    leaves = zip(tree.leaves((a.x, a.y, a.multipliers)), tree.leaves((b.x, b.y, b.multipliers)), strict=True)
    return all(torch.equal(p, q) for p, q in leaves)


@pytest.mark.parametrize("at", [1, 37, 120, 195])
def test_a_split_run_equals_the_whole_run(at: int, tmp_path: Path) -> None:
    case = problems.case("coupled_polyhedral")
    whole = bilevel.solve(case.problem, bilevel.LVHBA(), *case.start, max_steps=200)
    path = tmp_path / "run.pt"
    save = bilevel.SaveCheckpoint(path, every=1)
    bilevel.solve(case.problem, bilevel.LVHBA(), *case.start, max_steps=at, callbacks=[save])
    resumed = bilevel.solve(case.problem, checkpoint=bilevel.load_checkpoint(path), max_steps=200)
    assert same(whole, resumed)
    assert (whole.steps, whole.counts, whole.algorithm) == (resumed.steps, resumed.counts, resumed.algorithm)
    assert whole.accuracy == resumed.accuracy


@pytest.mark.parametrize("at", [1, 45])
def test_a_split_run_with_lengths_equals_the_whole_run(at: int, tmp_path: Path) -> None:
    """Bounds and rows, measured lengths, and given ones in which divisions round."""
    case = problems.case("coupled_polyhedral")
    problem, (x, y) = lv_hba_checks.in_units(case, 64.0, 64.0, 0.5), case.start
    for method in (bilevel.LVHBA(), bilevel.LVHBA(lengths=(0.3, 7.0))):
        whole = bilevel.solve(problem, method, x / 64, y * 64, max_steps=80)
        assert whole.algorithm.lengths != (1.0,)
        path = tmp_path / "run.pt"
        save = bilevel.SaveCheckpoint(path, every=1)
        bilevel.solve(problem, method, x / 64, y * 64, max_steps=at, callbacks=[save])
        resumed = bilevel.solve(problem, checkpoint=bilevel.load_checkpoint(path), max_steps=80)
        assert same(whole, resumed)
        assert (whole.steps, whole.counts, whole.algorithm) == (resumed.steps, resumed.counts, resumed.algorithm)
        assert whole.accuracy == resumed.accuracy


@pytest.mark.parametrize(("at", "lengths"), [(1, None), (40, None), (40, (0.3, 7.0))])
def test_a_split_minibatch_run_equals_the_whole_run(at: int, lengths: tuple[float, ...] | None, tmp_path: Path) -> None:
    problem, x, y = finite_sum(8)
    method = bilevel.LVHBA(lengths=lengths)
    whole = bilevel.solve(problem, method, x, y, max_steps=90)
    path = tmp_path / "run.pt"
    save = bilevel.SaveCheckpoint(path, every=1)
    bilevel.solve(problem, method, x, y, max_steps=at, callbacks=[save])
    resumed = bilevel.solve(problem, checkpoint=bilevel.load_checkpoint(path), max_steps=90)
    assert same(whole, resumed) and whole.counts == resumed.counts
    assert not torch.equal(whole.x, x)


# Minibatches.


def test_minibatches_come_near_the_solution_on_all_data() -> None:
    exact = bilevel.solve(finite_sum(None)[0], bilevel.LVHBA(), *finite_sum(None)[1:])
    assert exact.success
    problem, x, y = finite_sum(8)
    start = float((x - exact.x).norm())
    found = bilevel.solve(problem, bilevel.LVHBA(), x, y, max_steps=3_000)
    assert found.status is Status.STEP_LIMIT
    assert float((found.x - exact.x).norm()) <= 0.2 * start
    assert exact.upper_value <= found.upper_value + 1e-6 <= exact.upper_value + 0.02
    assert found.accuracy.feasibility is not None and found.accuracy.feasibility <= 1e-8
    assert found.accuracy.lower_kkt is not None and found.accuracy.lower_kkt.largest <= 1e-7


def test_all_lower_terms_of_a_step_see_the_same_batch() -> None:
    seen: dict[str, list[Tensor]] = {"upper": [], "lower": []}

    def level(name: str, x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        seen[name].append(batch)
        return (y - x - batch.mean()).square().sum()

    data = bilevel.Batches(torch.arange(50.0), 5)
    problem = BilevelProblem(
        lambda x, y, *, batch: level("upper", x, y, batch),
        lambda x, y, *, batch: level("lower", x, y, batch),
        upper_data=data,
        lower_data=data,
        lower_inequality=lambda x, y: y - x - 50,
    )
    zero = torch.zeros(2)
    method = bilevel.LVHBA(upper_curvature=1.0, lower_curvature=1.0).resolve(problem, zero, zero)
    state = method.init(problem, zero, zero)
    batches = []
    for step in range(3):
        for part in seen.values():
            part.clear()
        method.step(problem, state)
        state.step = step + 1
        assert len(seen["lower"]) == 3 and len(seen["upper"]) == 1
        assert all(torch.equal(part, seen["lower"][0]) for part in seen["lower"])
        batches.append(seen["lower"][0])
    assert not torch.equal(batches[0], batches[1])


# Constraints at the upper level, sets, shapes, precisions.


def test_upper_constraints_and_sets_hold() -> None:
    """g = |y - x|²/2, f = |x - (2, 2, 2)|² + |y|²/10, x1 + y2 <= 1, x3 = y1, |x| <= 1.5: against SLSQP with y = x."""
    problem = BilevelProblem(
        lambda x, y: (x - 2).square().sum() + y.square().sum() / 10,
        lambda x, y: 0.5 * (y - x).square().sum(),
        upper_set=Ball(1.5),
        lower_inequality=lambda x, y: y.sum() - 30,
        upper_inequality=lambda x, y: x[0] + y[1] - 1,
        upper_equality=lambda x, y: x[2] - y[0],
    )
    solution = bilevel.solve(problem, bilevel.LVHBA(), torch.zeros(3), torch.zeros(3))
    assert solution.success, solution.message
    reference = scipy.optimize.minimize(
        lambda x: ((x - 2) ** 2).sum() + (x**2).sum() / 10,
        np.zeros(3),
        method="SLSQP",
        options={"ftol": 1e-14},
        constraints=[
            {"type": "ineq", "fun": lambda x: 1 - x[0] - x[1]},
            {"type": "eq", "fun": lambda x: x[2] - x[0]},
            {"type": "ineq", "fun": lambda x: 2.25 - (x**2).sum()},
        ],
    )
    np.testing.assert_allclose(solution.x.numpy(), reference.x, atol=1e-4)
    assert solution.accuracy.feasibility is not None and solution.accuracy.feasibility <= 1e-6


def test_convex_rows_that_are_not_affine() -> None:
    """g = -y1 - y2 over |y|² <= x has y = sqrt(x/2) (1, 1); with f = (x - 3)² + |y - 1|² x is the root of F'."""
    problem = BilevelProblem(
        lambda x, y: (x - 3) ** 2 + (y - 1).square().sum(),
        lambda x, y: -y.sum(),
        lower_inequality=lambda x, y: y.square().sum() - x,
    )
    solution = bilevel.solve(problem, bilevel.LVHBA(), torch.tensor(2.0), torch.tensor([0.5, 0.1]))
    assert solution.success, solution.message
    x = float(
        np.asarray(
            scipy.optimize.brentq(
                lambda x: 2 * (x - 3) + 2 * (math.sqrt(x / 2) - 1) / math.sqrt(2 * x), 1, 4, xtol=1e-14
            )
        )
    )
    assert float(solution.x) == pytest.approx(x, abs=1e-4)
    assert float(solution.multipliers["lower_inequality"]) == pytest.approx(1 / math.sqrt(2 * x), abs=1e-4)


def test_shapes_are_those_of_the_declaration() -> None:
    case = problems.case("coupled_polyhedral")
    inner = case.problem
    problem = BilevelProblem(
        lambda x, y: inner.upper(x["a"].reshape(-1), torch.cat([y[0], y[1].reshape(-1)])),
        lambda x, y: inner.lower(x["a"].reshape(-1), torch.cat([y[0], y[1].reshape(-1)])),
        lower_inequality=lambda x, y: {
            "rows": inner.lower_inequality(x["a"].reshape(-1), torch.cat([y[0], y[1].reshape(-1)]))[:, None]  # type: ignore[misc]
        },
    )
    start = {"a": torch.zeros(3, 1)}, (torch.zeros(2), torch.zeros(2, 1))
    solution = bilevel.solve(problem, bilevel.LVHBA(), *start)
    torch.testing.assert_close(solution.x["a"].reshape(-1), case.x_star, rtol=0, atol=1e-4)
    assert solution.multipliers["lower_inequality"]["rows"].shape == (3, 1)
    assert case.multipliers_star is not None
    expected = case.multipliers_star["lower_inequality"]
    torch.testing.assert_close(solution.multipliers["lower_inequality"]["rows"][:, 0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["coupled_scalar_active", "coupled_scalar_inactive", "coupled_sum", "coupled_segment"])
def test_single_precision(name: str) -> None:
    case = problems.case(name, dtype=torch.float32)
    solution = bilevel.solve(case.problem, bilevel.LVHBA(), *case.start)
    assert solution.success, solution.message
    assert solution.x.dtype == torch.float32
    away = tree.norm(tree.sub((solution.x, solution.y), (case.x_star, case.y_star)))
    assert float(away) <= 2e-2 * (1.0 + float(tree.norm((case.x_star, case.y_star))))


# Adaptation.


def test_the_radius_grows_where_it_cuts_multipliers_off() -> None:
    case = problems.case("coupled_scalar_active")
    radii: list[float] = []
    narrow = bilevel.LVHBA(radius=0.01)
    state = dataclasses.replace(narrow).resolve(case.problem, *case.start).init(case.problem, *case.start)
    assert float(state.radius) >= 2 * float(state.point[3:].abs().max())  # the multiplier at the start is known
    problem = dataclasses.replace(case.problem, lower=lambda x, y: 0.5 * (y - 20 * x - 2) ** 2)
    solution = bilevel.solve(
        problem, narrow, *case.start, callbacks=[lambda info: radii.append(info.values["radius"])], max_steps=400
    )
    # y <= x < 20 x + 2 everywhere near: y = x with multiplier 19 x + 2.
    assert float(solution.x) == pytest.approx(0.5, abs=1e-4)
    assert float(solution.multipliers["lower_inequality"]) == pytest.approx(11.5, abs=1e-3)
    assert radii[-1] > radii[0] or radii[0] > 0.01


def test_steps_shrink_where_objectives_become_steep() -> None:
    """f = cosh(3 (x - 2)) beside y: flat at the start's left, curvature a hundred times larger on the way."""
    problem = BilevelProblem(
        lambda x, y: ((x - 4) ** 4).sum() / 100 + (y + x).square().sum() / 2,
        lambda x, y: 0.5 * (y - x).square().sum() + 0.1 * (y**4).sum(),
        lower_inequality=lambda x, y: y - x - 10,
    )
    method = bilevel.LVHBA(upper_curvature=1e-3, lower_curvature=1e-2)  # far too small: steps a hundred times too long
    damping: list[float] = []
    solution = bilevel.solve(
        problem,
        method,
        torch.tensor([3.0]),
        torch.tensor([1.0]),
        callbacks=[lambda info: damping.append(info.values["damping"])],
        raise_on_failure=False,
    )
    assert min(damping) < 0.1
    reference = bilevel.solve(problem, bilevel.LVHBA(), torch.tensor([3.0]), torch.tensor([1.0]))
    assert reference.success
    assert solution.success, solution.message
    torch.testing.assert_close(solution.x, reference.x, rtol=1e-4, atol=1e-4)


# What must not be called a solution.


def test_an_upper_objective_without_a_minimum_is_not_solved() -> None:
    problem = BilevelProblem(
        lambda x, y: -(x**2) - y,
        lambda x, y: 0.5 * (y - x) ** 2,
        lower_inequality=lambda x, y: y - x - 1,
    )
    one = torch.tensor(1.0)
    solution = bilevel.solve(problem, bilevel.LVHBA(), one, one, raise_on_failure=False, max_steps=3_000)
    assert solution.status in (Status.STALLED, Status.STEP_LIMIT, Status.NONFINITE)
    assert math.isfinite(float(solution.x)) and math.isfinite(float(solution.y))


def test_a_local_solution_of_a_nonconvex_lower_level_is_not_called_converged() -> None:
    """y starts at the global minimum, which x turns into a local one on its way to -1."""
    problem = BilevelProblem(
        lambda x, y: (x + 1) ** 2 + (y - 1) ** 2 / 10,
        lambda x, y: (y**2 - 1) ** 2 - x * y,
        lower_inequality=lambda x, y: y - x - 9,
    )
    one = torch.tensor(1.0)
    solution = bilevel.solve(problem, bilevel.LVHBA(), one, one)
    assert solution.status is Status.STALLED and "not verified" in solution.message
    assert not bilevel.verify(problem, solution.x, solution.y)


def test_points_that_are_not_stationary_are_no_kinks_in_small_units() -> None:
    """In lengths of one, x 4096 times as small as y stops far from a solution; steps longer than x tell nothing."""
    case, big = problems.case("coupled_polyhedral"), 64.0
    problem, (x, y) = lv_hba_checks.in_units(case, big, big, 0.5), case.start
    solution = bilevel.solve(problem, bilevel.LVHBA(lengths=(1.0,)), x / big, y * big, raise_on_failure=False)
    assert solution.status is Status.STALLED and "not stationary" in solution.message


@pytest.mark.parametrize("big", [1.0, 8.0])
def test_kinks_are_solutions(big: float) -> None:
    """f falls on both sides towards x = 1, beyond which y stays at its bound; in other units, too."""
    case = problems.case("box_kink")
    declared = case.problem
    problem = BilevelProblem(
        lambda x, y: declared.upper(big * x, y / big),
        lambda x, y: declared.lower(big * x, y / big),
        upper_set=Box(-3.0 / big, 3.0 / big),
        lower_set=Box(-big, big),
    )
    x, y = case.start
    solution = bilevel.solve(problem, bilevel.LVHBA(), x / big, y * big)
    assert solution.success and "kink" in solution.message, solution.message
    assert float(big * solution.x - case.x_star) == pytest.approx(0.0, abs=1e-4)


def test_steps_that_look_for_descent_are_long_beside_the_error_of_x() -> None:
    """Slopes of -0.99 and 0.01 beside the kink: f falls up to it from an error away, and is flat beyond."""
    case = problems.case("box_kink", r=0.01)
    x, y = case.x_star.reshape(1), case.y_star.reshape(1)
    flat = FlatProblem(case.problem, case.x_star, case.y_star)
    for error in (1e-3, 1e-5, 1e-7):
        for side in (-error, error):
            point = respond(flat, x + side, y, curvature=1.0)
            assert not _descends(flat, point, 2.0, error, 1.0)
    point = respond(flat, x - 0.01, y, curvature=1.0)
    assert _descends(flat, point, 2.0, 1e-6, 1.0)


@pytest.mark.parametrize("stages", [1, 2])
def test_too_few_penalties_give_no_bias_and_no_convergence(stages: int) -> None:
    case = problems.case("coupled_scalar_inactive")
    method = bilevel.LVHBA(stages=stages)
    solution = bilevel.solve(case.problem, method, *case.start, raise_on_failure=False)
    assert solution.status is Status.STALLED
    assert "no three in a row" in solution.message
    assert solution.accuracy.bias is None


def test_budgets_end_with_a_lower_solution() -> None:
    case = problems.case("coupled_polyhedral")
    solution = bilevel.solve(case.problem, bilevel.LVHBA(), *case.start, max_steps=25)
    assert solution.status is Status.STEP_LIMIT
    assert bilevel.verify(case.problem, solution.x, solution.y)


def test_constraints_without_a_common_point_are_infeasible() -> None:
    """y >= x + 1 and y <= x - 1: the least infeasible pairs violate both by the same."""
    problem = BilevelProblem(
        lambda x, y: x**2 + y**2,
        lambda x, y: y**2,
        lower_inequality=lambda x, y: torch.stack([x + 1 - y, y - x + 1]),
    )
    zero = torch.zeros(())
    with pytest.raises(SolveError, match=r"INFEASIBLE.*least infeasible") as caught:
        bilevel.solve(problem, bilevel.LVHBA(), zero, zero)
    solution = caught.value.solution
    assert solution.steps == 0
    assert solution.accuracy.feasibility == pytest.approx(1 / math.sqrt(2), rel=1e-6)


# Misuse.


def test_an_equation_that_is_not_affine_is_refused_by_name() -> None:
    for name in ("lower_equality", "upper_equality"):
        problem = BilevelProblem(lambda x, y: x + y, lambda x, y: y**2, **{name: lambda x, y: x * y - 1})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"{name} is not affine.*KKTRelaxation"):
            bilevel.solve(problem, bilevel.LVHBA(), torch.tensor(1.0), torch.tensor(1.0))


def test_it_handles_every_field() -> None:
    problem = BilevelProblem(
        lambda x, y: x.sum(),
        lambda x, y: y.sum(),
        upper_set=Box(0.0, 1.0),
        lower_set=Affine(torch.ones(1, 2), torch.ones(1)),
        lower_inequality=lambda x, y: y - x,
        lower_equality=lambda x, y: y[0] - x[1],
        upper_inequality=lambda x, y: x - y,
        upper_equality=lambda x, y: x.sum() - 1,
    )
    assert bilevel.LVHBA().refuses(problem) is None


def test_lengths_are_a_tuple() -> None:
    with pytest.raises(TypeError, match=r"lengths must be a tuple of numbers, such as \(1.0,\), got 2.0"):
        bilevel.LVHBA(lengths=2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": 0.0}, "penalty must be positive, got 0.0"),
        ({"exponent": 0.5}, r"exponent must lie in \[0, 0.5\), got 0.5"),
        ({"growth": 1.0}, "growth must be greater than 1, got 1.0"),
        ({"stages": 0}, "stages must be a positive integer, got 0"),
        ({"acceleration": -1}, "acceleration must be an integer of at least 0, got -1"),
        ({"proximal": -1.0}, "proximal must be positive, got -1.0"),
        ({"radius": 0}, "radius must be positive, got 0"),
        ({"lengths": ()}, r"lengths must be positive numbers, one or one for every leaf, got \(\)"),
        ({"lengths": (1.0, -2.0)}, r"lengths must be positive numbers, one or one for every leaf, got \(1.0, -2.0\)"),
        ({"outer_step": 0}, "outer_step must be positive, got 0"),
    ],
)
def test_settings_are_validated(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bilevel.LVHBA(**settings)  # type: ignore[arg-type]


def test_a_row_with_an_infinite_gradient_at_the_start_is_reported() -> None:
    problem = BilevelProblem(
        lambda x, y: ((x - 1) ** 2 + (y - 1) ** 2).sum(),
        lambda x, y: ((y - x) ** 2).sum(),
        lower_inequality=lambda x, y: y.clamp(min=0).sqrt() - 5,
    )
    zero = torch.zeros(1)
    solution = bilevel.solve(problem, bilevel.LVHBA(), zero, zero, raise_on_failure=False)
    assert solution.status is Status.NONFINITE
    assert torch.equal(solution.x, zero) and torch.equal(solution.y, zero)
