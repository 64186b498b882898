"""Quadratic and linear programs against cvxpy, HiGHS, closed forms and their own optimality conditions."""

import math
import warnings
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicit
from constrained import QPSolution, solve_qp
from implicit import ConvergenceWarning, SolveError, Status

INF = math.inf
Problem = dict[str, Any]


def draw(
    generator: torch.Generator, batch: int, n: int, m: int, p: int, rank: int | None = None, room: float = 0.5
) -> Problem:
    """Random feasible programs with active constraints; rank of Q below n makes them semidefinite, 0 linear."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    point = normal(batch, n)
    factor = normal(batch, n, n if rank is None else rank)
    A, G = normal(batch, m, n), normal(batch, p, n)
    problem = {
        "Q": factor @ factor.mT + (0.1 * torch.eye(n) if rank is None else 0.0),
        "q": 3 * normal(batch, n),
        "A": A,
        "b": (A @ point[..., None])[..., 0],
        "G": G,
        "h": (G @ point[..., None])[..., 0] + room * torch.rand(batch, p, generator=generator),
    }
    if rank is not None:
        problem |= {"lower": point - 2, "upper": point + 1}
    return problem


def sides(problem: Problem, solution: QPSolution, i: int) -> list[tuple[Tensor, Tensor, Tensor, bool]]:
    """(rows, right-hand side, multipliers, whether equations) of one element, dense and independent of the solver."""
    n = problem["q"].shape[-1]
    found = []
    for rows, side, kind in (("A", "b", "equality"), ("G", "h", "inequality")):
        if problem.get(rows) is not None:
            found.append((problem[rows][i], problem[side][i], getattr(solution, kind)[i], rows == "A"))
    for side, sign in (("lower", -1.0), ("upper", 1.0)):
        if problem.get(side) is not None:
            found.append((sign * torch.eye(n), sign * problem[side][i], getattr(solution, side)[i], False))
    return found


def check_optimal(problem: Problem, solution: QPSolution, tolerance: float = 1e-10) -> None:
    """The optimality conditions, which for a convex program prove that the point is a minimizer."""
    for i in range(len(solution.x)):
        x = solution.x[i]
        gradient = problem["q"][i] + (0.0 if problem.get("Q") is None else problem["Q"][i] @ x)
        for rows, side, multiplier, equation in sides(problem, solution, i):
            gap = rows @ x - side
            gradient = gradient + rows.T @ multiplier
            if equation or not len(gap):
                assert (gap.abs() <= tolerance).all()
                continue
            assert gap.max() <= tolerance
            assert multiplier.min() >= -tolerance
            assert (gap * multiplier)[side.isfinite()].abs().max() <= tolerance * 10
            assert multiplier[~side.isfinite()].abs().sum() == 0
        assert gradient.abs().max() <= tolerance * (1 + problem["q"][i].abs().max()) * 10


def by_cvxpy(problem: Problem, i: int) -> tuple[np.ndarray, list[np.ndarray]]:
    data = {k: v[i].numpy() for k, v in problem.items()}
    x = cp.Variable(len(data["q"]))
    constraints = [data["A"] @ x == data["b"], data["G"] @ x <= data["h"]]
    objective = cp.Minimize(0.5 * cp.quad_form(x, cp.psd_wrap(data["Q"])) + data["q"] @ x)
    accuracy = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}
    cp.Problem(objective, constraints).solve(solver=cp.CLARABEL, **accuracy)
    assert x.value is not None
    return x.value, [c.dual_value for c in constraints]


@pytest.mark.parametrize(("n", "m", "p"), [(2, 0, 3), (3, 1, 0), (10, 5, 10), (30, 8, 60), (100, 20, 120)])
def test_strictly_convex_programs_agree_with_clarabel(generator: torch.Generator, n: int, m: int, p: int) -> None:
    problem = draw(generator, 3, n, m, p)
    solution = solve_qp(**problem)
    assert solution.status == [Status.CONVERGED] * 3
    check_optimal(problem, solution)
    x, (equality, inequality) = by_cvxpy(problem, 1)
    np.testing.assert_allclose(solution.x[1], x, atol=1e-6)
    np.testing.assert_allclose(solution.equality[1], equality, atol=1e-4)
    np.testing.assert_allclose(solution.inequality[1], inequality, atol=1e-4)
    value = 0.5 * x @ problem["Q"][1].numpy() @ x + problem["q"][1].numpy() @ x
    assert float(solution.objective[1]) == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_semidefinite_and_linear_programs(generator: torch.Generator, rank: int) -> None:
    problem = draw(generator, 60, 8, 2, 12, rank=rank)
    solution = solve_qp(**problem)
    assert solution.success
    assert (solution.steps > 0).all()  # the interior-point method
    assert solution.steps.max() <= 40
    check_optimal(problem, solution)


def test_linear_programs_agree_with_highs(generator: torch.Generator) -> None:
    problem = draw(generator, 10, 8, 3, 15, rank=0)
    del problem["Q"]
    solution = solve_qp(None, **problem)
    for i in range(10):
        data = {k: v[i].numpy() for k, v in problem.items()}
        bounds = list(zip(data["lower"], data["upper"], strict=True))
        found = linprog(data["q"], data["G"], data["h"], data["A"], data["b"], bounds, method="highs")
        np.testing.assert_allclose(solution.x[i], found.x, atol=1e-9)
        # scipy's marginals are derivatives of the optimum: the opposite of multipliers of L = f + ...
        np.testing.assert_allclose(solution.inequality[i], -found.ineqlin.marginals, atol=1e-8)
        np.testing.assert_allclose(solution.equality[i], -found.eqlin.marginals, atol=1e-8)
        np.testing.assert_allclose(solution.upper[i], -found.upper.marginals, atol=1e-8)
        np.testing.assert_allclose(solution.lower[i], found.lower.marginals, atol=1e-8)


def test_slsqp_agrees(generator: torch.Generator) -> None:
    problem = draw(generator, 4, 5, 1, 4)
    solution = solve_qp(**problem, lower=-1.5, upper=1.5, raise_on_failure=False)
    compared = 0
    for i in range(4):
        if solution.codes[i] != 0:
            continue
        data = {k: v[i].numpy() for k, v in problem.items()}
        found = minimize(
            lambda x, d=data: 0.5 * x @ d["Q"] @ x + d["q"] @ x,
            np.zeros(5),
            jac=lambda x, d=data: d["Q"] @ x + d["q"],
            bounds=[(-1.5, 1.5)] * 5,
            constraints=[
                {"type": "eq", "fun": lambda x, d=data: d["A"] @ x - d["b"]},
                {"type": "ineq", "fun": lambda x, d=data: d["h"] - d["G"] @ x},
            ],
            options={"ftol": 1e-14, "maxiter": 500},
        )
        if found.success:
            compared += 1
            np.testing.assert_allclose(solution.x[i], found.x, atol=1e-5)
    assert compared >= 2


def test_a_batch_equals_its_elements_and_shared_arguments_serve_all(generator: torch.Generator) -> None:
    for rank in (None, 3):
        problem = draw(generator, 12, 6, 2, 9, rank=rank)
        together = solve_qp(**problem)
        for i in (0, 5, 11):
            alone = solve_qp(**{k: v[i] for k, v in problem.items()})
            assert alone.x.shape == (6,)
            assert alone.status is Status.CONVERGED
            torch.testing.assert_close(alone.x, together.x[i], rtol=0, atol=1e-11)
            torch.testing.assert_close(alone.inequality, together.inequality[i], rtol=0, atol=1e-9)
            torch.testing.assert_close(alone.objective, together.objective[i], rtol=0, atol=1e-10)
    shared = {k: v[0] for k, v in problem.items()}
    many = shared | {"q": problem["q"]}
    for i in (0, 7):
        one = solve_qp(**(shared | {"q": problem["q"][i]}))
        torch.testing.assert_close(solve_qp(**many).x[i], one.x, rtol=0, atol=1e-10)


# -- what other solvers trip over


def test_a_vacuous_inequality_and_none_at_all_change_nothing(generator: torch.Generator) -> None:
    problem = draw(generator, 1, 6, 0, 0)
    Q, q = problem["Q"][0], problem["q"][0]
    exact = -torch.linalg.solve(Q, q)
    rows, far = torch.ones(1, 6), torch.tensor([1e6])
    for extra in (
        {},
        {"G": rows, "h": far},
        {"G": rows, "h": torch.tensor([INF])},
        {"upper": 1e6, "lower": -1e6},
        {"upper": INF, "lower": -INF},
        {"G": torch.zeros(0, 6), "h": torch.zeros(0)},
        {"G": torch.zeros(1, 6), "h": torch.ones(1)},
    ):
        point = q.clone().requires_grad_()
        solution = solve_qp(Q, point, **extra)
        torch.testing.assert_close(solution.x.detach(), exact, rtol=1e-12, atol=1e-12)
        jacobian = torch.stack([torch.autograd.grad(v, point, retain_graph=True)[0] for v in solution.x])
        torch.testing.assert_close(jacobian, -torch.linalg.inv(Q), rtol=1e-11, atol=1e-11)


def test_a_vacuous_inequality_of_a_semidefinite_program(generator: torch.Generator) -> None:
    problem = draw(generator, 100, 8, 2, 9, rank=3)
    G, h = torch.cat([problem["G"], torch.ones(100, 2, 8)], 1), torch.cat([problem["h"], torch.full((100, 2), 1e6)], 1)
    solution, plain = solve_qp(**(problem | {"G": G, "h": h})), solve_qp(**problem)
    torch.testing.assert_close(solution.objective, plain.objective, rtol=1e-12, atol=1e-11)
    assert solution.inequality[:, -2:].abs().max() == 0


def test_absent_rows_take_no_part_in_the_interior_point_method(generator: torch.Generator) -> None:
    problem = draw(generator, 20, 8, 2, 9, rank=3)
    G, h = torch.cat([problem["G"], -problem["G"]], 1), torch.cat([problem["h"], torch.full((20, 9), INF)], 1)
    solution, plain = solve_qp(**(problem | {"G": G, "h": h})), solve_qp(**problem)
    assert torch.equal(solution.steps, plain.steps)


def test_an_accuracy_beyond_rounding_is_not_claimed(generator: torch.Generator) -> None:
    problem = draw(generator, 20, 8, 2, 9, rank=3)
    assert Status.STALLED in solve_qp(**problem, atol=1e-300).status


def test_a_distant_active_constraint() -> None:
    Q, q = torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([-1.0, -2.0])
    solution = solve_qp(Q, q, G=torch.ones(1, 2), h=torch.tensor([1e6]))
    torch.testing.assert_close(solution.x, torch.tensor([-1.0, 1e6 + 1]), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(solution.inequality, torch.tensor([2.0]))


@pytest.mark.parametrize("rank", [None, 3])
def test_redundant_rows(generator: torch.Generator, rank: int | None) -> None:
    problem = draw(generator, 30, 6, 2, 8, rank=rank)
    plain = solve_qp(**problem)
    A = torch.cat([problem["A"], problem["A"][:, :1], problem["A"].sum(1, keepdim=True)], 1)
    b = torch.cat([problem["b"], problem["b"][:, :1], problem["b"].sum(1, keepdim=True)], 1)
    G, h = torch.cat([problem["G"], problem["G"]], 1), torch.cat([problem["h"], problem["h"]], 1)
    changed = problem | {"A": A, "b": b, "G": G, "h": h}
    solution = solve_qp(**changed)
    assert solution.success
    check_optimal(changed, solution, 1e-12)
    torch.testing.assert_close(solution.objective, plain.objective, rtol=1e-11, atol=1e-10)


def test_an_empty_interior_and_fixed_variables(generator: torch.Generator) -> None:
    """Equations written as two inequalities, and bounds that coincide."""
    problem = draw(generator, 20, 5, 2, 6, rank=2)
    G = torch.cat([problem["G"], problem["A"], -problem["A"]], 1)
    h = torch.cat([problem["h"], problem["b"], -problem["b"]], 1)
    changed = {k: v for k, v in problem.items() if k not in "Ab"} | {"G": G, "h": h}
    solution = solve_qp(**changed)
    assert solution.success
    torch.testing.assert_close(solution.objective, solve_qp(**problem).objective, rtol=1e-10, atol=1e-9)
    lower = problem["lower"].clone()
    upper = problem["upper"].clone()
    fixed = (lower[:, 0] + upper[:, 0]) / 2
    lower[:, 0], upper[:, 0] = fixed, fixed
    free = {k: v for k, v in problem.items() if k not in ("A", "b", "G", "h")}
    found = solve_qp(**(free | {"lower": lower, "upper": upper}))
    assert found.success
    torch.testing.assert_close(found.x[:, 0], fixed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_do_not_matter(generator: torch.Generator, scale: float) -> None:
    for rank in (None, 2):
        problem = draw(generator, 20, 5, 1, 7, rank=rank)
        plain = solve_qp(**problem)
        rows = problem | {"Q": problem["Q"] * scale, "q": problem["q"] * scale}
        rows |= {"G": problem["G"] * 1e3, "h": problem["h"] * 1e3, "A": problem["A"] * 1e-3, "b": problem["b"] * 1e-3}
        solution = solve_qp(**rows)
        torch.testing.assert_close(solution.x, plain.x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(solution.inequality, plain.inequality * scale / 1e3, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e-7, 1e-8, 1e-9, 1e-12])
def test_small_units_of_x_do_not_matter(generator: torch.Generator, unit: float) -> None:
    box = solve_qp(None, torch.tensor([-3.0, 1.0]), lower=0.0, upper=unit)
    torch.testing.assert_close(box.x / unit, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(box.upper - box.lower, torch.tensor([3.0, -1.0]))
    q, row = torch.tensor([-3.0, 1.0, -2.9]), torch.ones(1, 3)
    simplex = solve_qp(None, q, A=row, b=torch.tensor([unit]), lower=0.0)
    torch.testing.assert_close(simplex.x / unit, torch.tensor([1.0, 0.0, 0.0]))
    for rank in (None, 2, 0):
        problem = draw(generator, 10, 5, 1, 7, rank=rank) | {"lower": -torch.ones(10, 5), "upper": torch.ones(10, 5)}
        problem["h"] = problem["h"].abs()
        del problem["A"], problem["b"]
        scale = dict.fromkeys(("h", "lower", "upper"), unit) | {"Q": 1 / unit}
        small = {k: v * scale.get(k, 1.0) for k, v in problem.items()}
        plain, found = solve_qp(**problem), solve_qp(**small)
        assert found.success
        torch.testing.assert_close(found.x / unit, plain.x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.inequality, plain.inequality, rtol=1e-7, atol=1e-7)
        theta = small["h"].clone().requires_grad_()
        weight = torch.randn(10, 5, generator=generator)
        (slope,) = torch.autograd.grad((solve_qp(**(small | {"h": theta})).x * weight).sum(), theta)
        large = problem["h"].clone().requires_grad_()
        (expected,) = torch.autograd.grad((solve_qp(**(problem | {"h": large})).x * weight).sum(), large)
        torch.testing.assert_close(slope, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("bound", [1e-12, 1e-8])
def test_a_tiny_bound_beside_a_large_solution(bound: float) -> None:
    Q = torch.diag(torch.tensor([1.0, 0.0, 1.0]))
    found = solve_qp(Q, torch.tensor([-1.0, 1.0, -2.0]), lower=bound)
    torch.testing.assert_close(found.x, torch.tensor([1.0, bound, 2.0]), rtol=1e-9, atol=1e-20)


def test_a_small_gradient_along_a_large_x_is_not_the_end() -> None:
    """The residuals are at most 1e-8 all along an edge on which the objective falls from -0.8 to -9."""
    G, h = torch.tensor([[1.0, 0.0], [-1.0, 1e-8]]), torch.tensor([0.0, -1.0])
    found = solve_qp(None, torch.tensor([1.0, 0.0]), G=G, h=h, lower=-1e9, upper=1e9)
    assert found.status is not Status.CONVERGED or float(found.objective) == pytest.approx(-9.0)


@pytest.mark.parametrize("angle", [0.3, 0.6435])
@pytest.mark.parametrize("bend", [1e-9, 1e-10, 1e-11, 1e-12])
def test_small_curvature_bounds_the_objective(angle: float, bend: float) -> None:
    R = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    tilted = solve_qp(R @ torch.diag(torch.tensor([1.0, bend])) @ R.T, torch.ones(2), raise_on_failure=False)
    assert tilted.status is not Status.UNBOUNDED
    straight = solve_qp(torch.diag(torch.tensor([1.0, bend])), torch.tensor([0.0, -1.0]), raise_on_failure=False)
    assert straight.status is Status.CONVERGED
    torch.testing.assert_close(straight.x, torch.tensor([0.0, 1 / bend]), rtol=1e-6, atol=1e-6)


def test_integer_data_with_degenerate_vertices(generator: torch.Generator) -> None:
    """Ties everywhere; every element must be classified, and rightly."""
    for rank in (0, 1, 2):
        shapes = {"Q": (rank,), "q": (), "A": (1,), "G": (7,)}
        drawn = {k: torch.randint(-2, 3, (150, *s, 3), generator=generator).double() for k, s in shapes.items()}
        factor = drawn["Q"]
        point = torch.randint(-2, 3, (150, 3, 1), generator=generator).double()
        problem = {
            "Q": factor.mT @ factor,
            "q": drawn["q"],
            "A": drawn["A"],
            "b": (drawn["A"] @ point)[..., 0],
            "G": drawn["G"],
            "h": (drawn["G"] @ point)[..., 0].clamp(min=0),
        }
        solution = solve_qp(**problem, raise_on_failure=False)
        status = solution.status
        assert isinstance(status, list)
        assert set(status) <= {Status.CONVERGED, Status.UNBOUNDED, Status.INFEASIBLE}
        solved = (solution.codes == 0).nonzero()[:, 0]
        assert len(solved) > 50
        chosen = {k: v[solved] for k, v in problem.items()}
        check_optimal(chosen, solve_qp(**chosen), 1e-8)
        check_certificates(problem, solution)


# -- no solution


def check_certificates(problem: Problem, solution: QPSolution) -> tuple[int, int]:
    """Farkas' lemma for infeasible elements, a ray of descent for unbounded ones; how many there were."""
    counts = {Status.INFEASIBLE: 0, Status.UNBOUNDED: 0}
    status = solution.status
    assert isinstance(status, list)
    for i, outcome in enumerate(status):
        parts = sides(problem, solution, i)
        if outcome is Status.INFEASIBLE:
            combination = sum((rows.T @ y for rows, _, y, _ in parts), torch.zeros(1))
            value = sum(float(side[side.isfinite()] @ y[side.isfinite()]) for _, side, y, _ in parts)
            assert value < 0
            assert combination.abs().max() <= 1e-6 * -value
            assert all(equation or y.min() >= 0 for _, _, y, equation in parts)
        elif outcome is Status.UNBOUNDED:
            ray = solution.ray[i]
            assert all((y == 0).all() for _, _, y, _ in parts)
            assert problem["q"][i] @ ray < 0
            if problem.get("Q") is not None:
                assert (problem["Q"][i] @ ray).abs().max() <= 1e-8 * ray.abs().max()
            for rows, side, _, equation in parts:
                ahead = rows @ ray if equation else (rows @ ray)[side.isfinite()].clamp(min=0)
                assert ahead.abs().sum() <= 1e-7 * ray.abs().max()
                gap = rows @ solution.x[i] - side
                assert (gap.abs().max() if equation else gap.max()) <= 1e-7
        if outcome in counts:
            counts[outcome] += 1
    return counts[Status.INFEASIBLE], counts[Status.UNBOUNDED]


@pytest.mark.parametrize("rank", [None, 0, 2])
def test_infeasible_elements_come_with_a_certificate_and_the_nearest_point(
    generator: torch.Generator, rank: int | None
) -> None:
    problem = draw(generator, 40, 4, 1, 12, rank=rank)
    problem["h"] = problem["h"] - 3 * torch.rand(40, 12, generator=generator)
    solution = solve_qp(**problem, raise_on_failure=False)
    infeasible, _ = check_certificates(problem, solution)
    assert infeasible >= 5
    i = int((solution.codes == 4).nonzero()[0])
    data = {k: v[i].numpy() for k, v in problem.items()}
    x = cp.Variable(4)
    terms = [cp.sum_squares(data["A"] @ x - data["b"]) / data["A"].__pow__(2).sum()]
    terms += [cp.sum_squares(cp.multiply(cp.pos(data["G"] @ x - data["h"]), 1 / np.linalg.norm(data["G"], axis=1)))]
    if "lower" in data:
        terms += [cp.sum_squares(cp.pos(data["lower"] - x)), cp.sum_squares(cp.pos(x - data["upper"]))]
    cp.Problem(cp.Minimize(sum(terms))).solve(solver=cp.CLARABEL)
    np.testing.assert_allclose(solution.x[i], x.value, atol=1e-4)


def test_contradicting_equations() -> None:
    A, b = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1.0, 2.0])
    solution = solve_qp(torch.eye(2), torch.ones(2), A=A, b=b, raise_on_failure=False)
    assert solution.status is Status.INFEASIBLE
    assert float(solution.x[0]) == pytest.approx(1.5)
    torch.testing.assert_close(A.T @ solution.equality, torch.zeros(2))
    assert float(b @ solution.equality) < 0


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-7])
def test_constraints_that_barely_exclude_each_other(gap: float) -> None:
    found = solve_qp(torch.eye(1), torch.zeros(1), lower=1.0, upper=1 - gap, raise_on_failure=False)
    assert found.status is Status.INFEASIBLE
    assert float(found.x) == pytest.approx(1 - gap / 2, abs=1e-10)
    G, h = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([1.0, -1 - gap])
    found = solve_qp(torch.eye(2), torch.tensor([0.0, 1.0]), G=G, h=h, raise_on_failure=False)
    assert found.status is Status.INFEASIBLE
    close = solve_qp(torch.eye(2), torch.tensor([0.0, 1.0]), G=G, h=torch.tensor([1.0, gap - 1]))
    assert close.status is Status.CONVERGED


def test_unbounded_programs_come_with_a_ray(generator: torch.Generator) -> None:
    for rank in (0, 2):
        problem = draw(generator, 60, 4, 1, 5, rank=rank)
        problem = {k: v for k, v in problem.items() if k != "upper"} | {"G": problem["G"][:, :2]}
        problem["h"] = problem["h"][:, :2]
        solution = solve_qp(**problem, raise_on_failure=False)
        _, unbounded = check_certificates(problem, solution)
        assert unbounded >= 1
        assert (solution.codes == 0).sum() + unbounded == 60
    assert solve_qp(None, torch.zeros(2)).status is Status.CONVERGED
    assert solve_qp(None, torch.ones(2), raise_on_failure=False).status is Status.UNBOUNDED


def test_failures_raise_with_the_solution(generator: torch.Generator) -> None:
    q = torch.tensor([[1.0], [-1.0], [math.nan]])
    with pytest.raises(SolveError, match=r"1 of 3 elements \(2\): NONFINITE") as caught:
        solve_qp(None, q, lower=0.0)
    assert "1 of 3 elements (1): UNBOUNDED: the objective falls for ever along .ray; a feasible" in str(caught.value)
    assert "NONFINITE: an argument is NaN or infinite" in str(caught.value)
    solution = caught.value.solution
    assert solution.status == [Status.CONVERGED, Status.UNBOUNDED, Status.NONFINITE]
    assert solution.x[2].isnan().all()
    assert not solution.success
    assert "1 of 3 elements: CONVERGED" in solution.message
    with pytest.raises(SolveError, match=r"^INFEASIBLE"):
        solve_qp(torch.eye(1), torch.ones(1), lower=1.0, upper=0.0)


def test_a_step_limit_is_told(generator: torch.Generator) -> None:
    problem = draw(generator, 2, 8, 2, 20, rank=2)
    solution = solve_qp(**problem, max_steps=1, raise_on_failure=False)
    assert isinstance(solution.status, list)
    assert Status.STEP_LIMIT in solution.status
    assert max(solution.stationarity.max(), solution.feasibility.max(), solution.complementarity.max()) > 1e-8


# -- derivatives


def arguments(generator: torch.Generator, batch: int = 2) -> tuple[Tensor, ...]:
    """Q, q, A, b, G, h, lower, upper with active constraints of every kind."""
    factor = torch.randn(4, 4, generator=generator)
    Q = factor @ factor.T + 0.5 * torch.eye(4)
    q, A = torch.randn(batch, 4, generator=generator), torch.randn(1, 4, generator=generator)
    b, G = torch.randn(batch, 1, generator=generator), torch.randn(3, 4, generator=generator)
    h = torch.rand(3, generator=generator)
    return Q, 3 * q, A, b, G, h, torch.full((4,), -0.5), torch.full((4,), 0.4)


def solved(*theta: Tensor) -> tuple[Tensor, ...]:
    Q, q, A, b, G, h, lower, upper = theta
    s = solve_qp(Q, q, A=A, b=b, G=G, h=h, lower=lower, upper=upper)
    return s.x, s.equality, s.inequality, s.lower, s.upper, s.objective


def test_derivatives_in_all_arguments(generator: torch.Generator) -> None:
    theta = tuple(t.requires_grad_() for t in arguments(generator.manual_seed(1)))
    solution = solved(*theta)
    assert (solution[2] > 0).any()
    assert (solution[3] > 0).any()
    assert (solution[4] > 0).any()
    assert gradcheck(solved, theta, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(lambda *t: solved(*t)[:4], theta, fast_mode=True, check_fwd_over_rev=True)


def test_torch_func(generator: torch.Generator) -> None:
    theta = arguments(generator)

    def x(q: Tensor, G: Tensor = theta[4]) -> Tensor:
        return solved(theta[0], q, *theta[2:4], G, *theta[5:])[0]

    q, more = theta[1], theta[1] + 0.02 * torch.randn(5, 2, 4, generator=generator)
    torch.testing.assert_close(jacrev(x)(q), jacfwd(x)(q), rtol=1e-10, atol=1e-12)
    each = torch.stack([x(row) for row in more])
    torch.testing.assert_close(vmap(x)(more), each, rtol=1e-10, atol=1e-12)
    slopes = torch.stack([grad(lambda v: x(v).square().sum())(row) for row in more])
    torch.testing.assert_close(vmap(grad(lambda v: x(v).square().sum()))(more), slopes, rtol=1e-9, atol=1e-11)
    both = vmap(lambda G: vmap(lambda v: x(v, G))(more))(torch.stack([theta[4], 1.01 * theta[4]]))
    torch.testing.assert_close(both[0], each, rtol=1e-10, atol=1e-12)
    second = hessian(lambda G: x(q, G).square().sum())(theta[4]).reshape(12, 12)
    torch.testing.assert_close(second, second.T, rtol=1e-9, atol=1e-11)
    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        jacfwd(jacfwd(x))(q)


def test_derivatives_agree_with_the_cvxpy_layer(generator: torch.Generator) -> None:
    problem = {k: v[0] for k, v in draw(generator, 1, 5, 1, 6).items()}
    x, q, G, h = cp.Variable(5), cp.Parameter(5), cp.Parameter((6, 5)), cp.Parameter(6)
    root = torch.linalg.cholesky(problem["Q"]).mT.numpy()
    objective = cp.Minimize(0.5 * cp.sum_squares(root @ x) + q @ x)
    constraints = [problem["A"].numpy() @ x == problem["b"].numpy(), G @ x <= h]
    layer = implicit.cvx.Layer(cp.Problem(objective, constraints), parameters=[q, G, h], variables=[x])
    theta = [problem[k].clone().requires_grad_() for k in ("q", "G", "h")]
    weight = torch.randn(5, generator=generator)
    ours = solve_qp(problem["Q"], theta[0], A=problem["A"], b=problem["b"], G=theta[1], h=theta[2])
    expected = torch.autograd.grad((layer(*theta)[0] * weight).sum(), theta)
    for mine, theirs in zip(torch.autograd.grad((ours.x * weight).sum(), theta), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_a_linear_program_moves_with_its_vertex(generator: torch.Generator) -> None:
    problem = {k: v[0] for k, v in draw(generator, 1, 4, 1, 8, rank=0).items() if k != "Q"}
    names = list(problem)
    theta = tuple(problem[k].requires_grad_() for k in names)
    assert gradcheck(lambda *t: solve_qp(None, **dict(zip(names, t, strict=True))).x, theta)


def test_multipliers_are_the_derivatives_of_the_optimum(generator: torch.Generator) -> None:
    theta = arguments(generator, batch=1)
    Q, q, A, b, G, h, lower, upper = (t.requires_grad_() for t in theta)
    s = solve_qp(Q, q, A=A, b=b, G=G, h=h, lower=lower, upper=upper)
    slopes = torch.autograd.grad(s.objective.sum(), (b, h, lower, upper))
    for slope, expected in zip(slopes, (-s.equality, -s.inequality[0], s.lower[0], -s.upper[0]), strict=True):
        torch.testing.assert_close(slope, expected.detach(), rtol=1e-10, atol=1e-12)


def test_kinks_warn_and_smooth_solutions_do_not() -> None:
    q = torch.tensor([-1.0, -2.0], requires_grad=True)  # x_1 = 1 just reaches its bound
    solution = solve_qp(torch.eye(2), q, upper=torch.tensor([1.0, 5.0]))
    with pytest.warns(ConvergenceWarning, match="the quadratic program: strict complementarity fails"):
        solution.x.sum().backward()
    with pytest.warns(ConvergenceWarning, match="strict complementarity fails"):
        jacfwd(lambda v: solve_qp(torch.eye(2), v, upper=torch.tensor([1.0, 5.0])).x)(q.detach())
    batch = torch.tensor([[-3.0, -2.0], [-1.0, -2.0], [-3.0, -1.0]], requires_grad=True)
    solution = solve_qp(torch.eye(2), batch, upper=torch.tensor([1.0, 5.0]))
    with pytest.warns(ConvergenceWarning, match="quadratic program 1: strict"):
        solution.x.sum().backward()
    solve_qp(torch.eye(2), batch, upper=torch.tensor([1.0, 5.0])).x[::2].sum().backward()  # element 1 is not used


def test_variables_between_bounds_that_meet_are_no_kink() -> None:
    lower, upper, q = torch.tensor([1.0, -5.0]), torch.tensor([1.0, 5.0]), torch.tensor([1.0, 1.0])
    for mode in (jacrev, jacfwd):
        found = mode(lambda q: solve_qp(torch.eye(2), q, lower=lower, upper=upper).x)(q)
        torch.testing.assert_close(found, torch.diag(torch.tensor([0.0, -1.0])))
    with pytest.warns(ConvergenceWarning, match="strict complementarity fails"):
        jacrev(lambda upper: solve_qp(torch.eye(2), q, lower=lower, upper=upper).x)(upper)
    with pytest.warns(ConvergenceWarning, match="strict complementarity fails"):  # another one, beside it
        jacrev(lambda q: solve_qp(torch.eye(2), q, lower=lower, upper=upper).x)(torch.tensor([1.0, 5.0]))


def test_a_repeated_row_is_no_loose_direction() -> None:
    G, h = torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.zeros(2)
    for mode in (jacfwd, jacrev):
        found = mode(lambda q: solve_qp(torch.eye(2), q, G=G, h=h).x)(torch.tensor([-1.0, -2.0]))
        torch.testing.assert_close(found, torch.tensor([[-0.5, 0.5], [0.5, -0.5]]))


def test_warnings_number_programs_and_not_cotangents() -> None:
    upper = torch.tensor([1.0, 5.0, 5.0, 5.0])
    kink, smooth = torch.tensor([-1.0, 1.0, 2.0, 3.0]), torch.tensor([-3.0, 1.0, 2.0, 3.0])

    def x(q: Tensor) -> Tensor:
        return solve_qp(torch.eye(4), q, upper=upper).x

    batch = torch.stack([smooth, kink, smooth])
    for mode in (jacrev, jacfwd):
        with pytest.warns(ConvergenceWarning, match="^the quadratic program: strict"):
            mode(x)(kink)
        with pytest.warns(ConvergenceWarning, match="^quadratic program 1: strict"):
            mode(x)(batch)
        with pytest.warns(ConvergenceWarning, match="^quadratic program 1: strict"):
            vmap(mode(x))(batch)
        with pytest.warns(ConvergenceWarning, match="^quadratic programs 2, 3: strict"):
            vmap(mode(x))(batch[:, None].repeat(1, 2, 1))


def test_solutions_that_are_not_unique_warn_where_it_matters() -> None:
    Q = torch.diag(torch.tensor([1.0, 0.0]))
    q = torch.tensor([-1.0, 0.0], requires_grad=True)
    solution = solve_qp(Q, q, lower=-1.0, upper=3.0)
    (slope,) = torch.autograd.grad(solution.x[0], q, retain_graph=True)
    torch.testing.assert_close(slope, torch.tensor([-1.0, 0.0]))
    with pytest.warns(ConvergenceWarning, match="the solution is not unique"):
        torch.autograd.grad(solution.x[1], q)


def test_dependent_rows_warn_only_where_they_move() -> None:
    A, b = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([1.0, 2.0])
    q = torch.tensor([0.3, -0.2], requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve_qp(torch.eye(2), q, A=A, b=b)
        jacobian = torch.stack([torch.autograd.grad(v, q, retain_graph=True)[0] for v in solution.x])
    torch.testing.assert_close(jacobian, torch.tensor([[-0.5, 0.5], [0.5, -0.5]]))
    b.requires_grad_()
    moving = solve_qp(torch.eye(2), q, A=A, b=b)
    with pytest.warns(ConvergenceWarning, match="active constraints are linearly dependent"):
        (slope,) = torch.autograd.grad(moving.x.sum(), b)
    assert float(slope @ torch.tensor([1.0, 2.0])) == pytest.approx(1.0)  # along right-hand sides that fit


def test_failed_elements_have_no_derivative() -> None:
    q = torch.tensor([[-1.0], [2.0]], requires_grad=True)
    solution = solve_qp(torch.ones(1, 1), q, upper=torch.tensor([[5.0], [-1.0]]), lower=0.0, raise_on_failure=False)
    with pytest.warns(ConvergenceWarning, match="quadratic program 1: no solution was found"):
        solution.x.sum().backward()
    torch.testing.assert_close(q.grad, torch.tensor([[-1.0], [0.0]]))


# -- the interface


def test_a_start_saves_steps_and_keeps_the_answer(generator: torch.Generator) -> None:
    for rank in (None, 3):
        problem = draw(generator, 20, 8, 2, 12, rank=rank)
        first = solve_qp(**problem)
        moved = problem | {"q": problem["q"] * (1 + 1e-4)}
        cold = solve_qp(**moved)
        for start in (first, first.x):
            warm = solve_qp(**moved, start=start)
            torch.testing.assert_close(warm.x, cold.x, rtol=0, atol=1e-10)
            assert warm.steps.sum() == 0
    wrong = first.x + 100.0
    torch.testing.assert_close(solve_qp(**moved, start=wrong).x, cold.x, rtol=0, atol=1e-10)


def test_float32(generator: torch.Generator) -> None:
    for rank in (None, 2):
        problem = draw(generator, 50, 6, 2, 8, rank=rank)
        exact = solve_qp(**problem)
        single = solve_qp(**{k: v.float() for k, v in problem.items()})
        assert single.x.dtype == torch.float32
        assert single.success
        torch.testing.assert_close(single.objective.double(), exact.objective, rtol=1e-3, atol=1e-3)


def test_only_the_symmetric_part_of_Q_matters(generator: torch.Generator) -> None:
    problem = draw(generator, 2, 4, 1, 3)
    skew = torch.randn(4, 4, generator=generator)
    torch.testing.assert_close(solve_qp(**(problem | {"Q": problem["Q"] + skew - skew.T})).x, solve_qp(**problem).x)


def test_misuse_is_named(generator: torch.Generator) -> None:
    q, eye = torch.ones(2), torch.eye(2)
    with pytest.raises(ValueError, match=r"Q is not positive semidefinite: its smallest eigenvalue is -1 times"):
        solve_qp(-eye, q)
    with pytest.raises(ValueError, match=r"Q\[1\] is not positive semidefinite"):
        solve_qp(torch.stack([eye, torch.diag(torch.tensor([1.0, -0.1]))]), q)
    with pytest.raises(ValueError, match="b is missing: give A and b together"):
        solve_qp(eye, q, A=eye)
    with pytest.raises(ValueError, match="G is missing"):
        solve_qp(eye, q, h=q)
    with pytest.raises(ValueError, match=r"A has shape \(2, 3\): give it \(2, 2\)"):
        solve_qp(eye, q, A=torch.ones(2, 3), b=q)
    with pytest.raises(ValueError, match=r"G is torch.float32 on cpu, but q is torch.float64"):
        solve_qp(eye, q, G=eye.float(), h=q)
    with pytest.raises(ValueError, match="batch sizes"):
        solve_qp(eye.expand(3, 2, 2), torch.ones(2, 2))
    with pytest.raises(TypeError, match="q = 'a'"):
        solve_qp(eye, "a")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"Q = a tensor of torch\.int64"):
        solve_qp(torch.ones(2, 2, dtype=torch.int64), q)
    with pytest.raises(TypeError, match="lower = True"):
        solve_qp(eye, q, lower=True)
    with pytest.raises(ValueError, match="upper contains -inf"):
        solve_qp(eye, q, upper=-INF)
    with pytest.raises(ValueError, match="h contains -inf"):
        solve_qp(eye, q, G=eye, h=torch.tensor([0.0, -INF]))
    with pytest.raises(ValueError, match="atol = 0"):
        solve_qp(eye, q, atol=0)
    with pytest.raises(ValueError, match="max_steps = 0"):
        solve_qp(eye, q, max_steps=0)
    with pytest.raises(TypeError, match="start = 3"):
        solve_qp(eye, q, start=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="start has 0 constraints in a batch of 1, the program 2"):
        solve_qp(eye, q, lower=0.0, start=solve_qp(eye, q))
    with pytest.raises(ValueError, match=r"q has shape \(\)"):
        solve_qp(eye, torch.tensor(1.0))
