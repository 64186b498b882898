"""The interior-point method against closed forms, cvxpy, scipy and published optima."""

import itertools

import cvxpy
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch
from torch import Tensor

import constrained
from constrained import ConstrainedProblem, EqualityProblem, InteriorPoint, Lagrangian, Problem, Solution
from constrained.barrier import ScaledProblem, Sides
from constrained.barrier_step import BarrierState, NewtonStep, Trial, barrier_error, longest
from constrained.filter import Filter
from constrained.inertia import InertiaCorrection
from constrained.interior_start import begin_warm
from constrained.restoration import WEIGHT, LeastSquares, Restoration, elastic
from constrained.rounding import excess, rounding
from constrained.scaling import factors
from implicit import MINRES, LinearSolver, SolveError, SparseLU, Status
from tests.systems import normal

INF = float("inf")


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def solve(problem: Problem, x0: Tensor | dict[str, Tensor], **more: object) -> Solution:
    method = more.pop("method", InteriorPoint())
    return constrained.solve(problem, method, x0, raise_on_failure=False, **more)  # type: ignore[arg-type]


def solved(problem: Problem, x0: Tensor, **more: object) -> Solution:
    found = solve(problem, x0, **more)
    assert found.status is Status.CONVERGED, found.message
    again = constrained.kkt_residual(problem, found.x, *found.multipliers)
    assert again.largest <= 1e-8
    return found


# Closed forms


def test_projection_onto_a_ball_and_its_multiplier() -> None:
    """min |x - a|^2 / 2 over |x|^2 <= 1: x = a / |a|, v = (|a| - 1) / 2."""
    a = t(3.0, -4.0, 12.0)
    ball = ConstrainedProblem(objective=lambda x: 0.5 * ((x - a) ** 2).sum(), inequality=lambda x: (x**2).sum() - 1)
    found = solved(ball, torch.zeros(3))
    torch.testing.assert_close(found.x, a / 13, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.multipliers.inequality, torch.tensor(6.0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_projection_onto_the_simplex(seed: int) -> None:
    a = normal(12, seed=seed)
    problem = ConstrainedProblem(
        objective=lambda x: 0.5 * ((x - a) ** 2).sum(), equality=lambda x: x.sum() - 1, lower=0.0
    )
    found = solved(problem, torch.zeros(12), atol=1e-10)
    exact = constrained.Simplex().project(a)
    torch.testing.assert_close(found.x, exact, rtol=0, atol=1e-7)
    # x - a + l - z = 0 with l the threshold of the projection and z >= 0 where x = 0
    threshold = (a - exact)[exact > 0].mean()
    torch.testing.assert_close(found.multipliers.equality, threshold, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.multipliers.lower, (threshold - a).clamp(min=0), rtol=0, atol=1e-7)
    assert bool((found.multipliers.upper == 0).all())


def test_multipliers_are_the_sensitivities_of_the_optimum() -> None:
    """Raising the right-hand side of row i by d changes f* by minus its multiplier times d (upper bounds as rows)."""

    def problem(shift: Tensor) -> ConstrainedProblem:
        return ConstrainedProblem(
            objective=lambda x: (x**4).sum() + x[0] * x[1] - 3 * x.sum(),
            equality=lambda x: x[0] + x[1] ** 2 - 1 - shift[0],
            inequality=lambda x: x[2] ** 2 + x[0] - 0.5 - shift[1],
            lower=t(-INF, 0.9, -INF, -INF) + shift[2] * t(0.0, 1.0, 0.0, 0.0),
            upper=t(INF, INF, INF, 0.25) + shift[3] * t(0.0, 0.0, 0.0, 1.0),
        )

    x0, zero, step = t(0.1, 1.0, 0.1, 0.0), torch.zeros(4), 1e-4
    found = solved(problem(zero), x0, atol=1e-10)
    slopes = []
    for i in range(4):
        move = torch.eye(4)[i] * step
        ends = [solved(problem(sign * move), x0, atol=1e-10).objective for sign in (1.0, -1.0)]
        slopes.append((ends[0] - ends[1]) / (2 * step))
    m = found.multipliers
    own = torch.stack([-m.equality, -m.inequality, m.lower[1], -m.upper[3]])
    torch.testing.assert_close(own, torch.tensor(slopes), rtol=0, atol=1e-5)
    assert float(m.inequality) > 0.1 and float(m.lower[1]) > 0.1 and float(m.upper[3]) > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_convex_quadratic_programs_equal_cvxpy(seed: int) -> None:
    n, m, p = 12, 3, 6
    root, q, a, g = normal(n, n, seed=seed), normal(n, seed=9), normal(m, n, seed=seed + 10), normal(p, n, seed=20)
    h = root @ root.T / n
    b, d = a @ torch.full((n,), 0.1), g @ torch.full((n,), 0.1) + 0.05
    problem = ConstrainedProblem(
        objective=lambda x: 0.5 * x @ h @ x + q @ x,
        equality=lambda x: a @ x - b,
        inequality=lambda x: g @ x - d,
        lower=-0.5,
        upper=torch.linspace(0.3, 0.8, n),
    )
    found = solved(problem, torch.zeros(n))
    x = cvxpy.Variable(n)
    objective = 0.5 * cvxpy.quad_form(x, cvxpy.psd_wrap(h.numpy())) + q.numpy() @ x
    rows = [a.numpy() @ x == b.numpy(), g.numpy() @ x <= d.numpy()]
    rows += [x >= -0.5, x <= np.linspace(0.3, 0.8, n)]
    cvxpy.Problem(cvxpy.Minimize(objective), rows).solve(
        solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
    )
    np.testing.assert_allclose(found.x.numpy(), np.asarray(x.value), atol=2e-6)
    ours = (found.multipliers.equality, found.multipliers.inequality, found.multipliers.lower, found.multipliers.upper)
    for mine, row in zip(ours, rows, strict=True):
        np.testing.assert_allclose(mine.numpy(), row.dual_value, atol=2e-5)


# Published optima (Hock and Schittkowski 1981): problem, start, f*


def hs71() -> ConstrainedProblem:
    return ConstrainedProblem(
        objective=lambda x: x[0] * x[3] * x[:3].sum() + x[2],
        equality=lambda x: (x**2).sum() - 40,
        inequality=lambda x: 25 - x.prod(),
        lower=1.0,
        upper=5.0,
    )


def rosen_suzuki() -> ConstrainedProblem:
    w = [t(1.0, 1.0, 1.0, 1.0), t(1.0, 2.0, 1.0, 2.0), t(2.0, 1.0, 1.0, 0.0)]
    b = [t(1.0, -1.0, 1.0, -1.0), t(-1.0, 0.0, 0.0, -1.0), t(2.0, -1.0, 0.0, -1.0)]
    return ConstrainedProblem(
        objective=lambda x: (t(1.0, 1.0, 2.0, 1.0) * x**2).sum() - 5 * x[0] - 5 * x[1] - 21 * x[2] + 7 * x[3],
        inequality=lambda x: torch.stack([w[i] @ x**2 + b[i] @ x - (8.0, 10.0, 5.0)[i] for i in range(3)]),
    )


def hs65() -> ConstrainedProblem:
    return ConstrainedProblem(
        objective=lambda x: (x[0] - x[1]) ** 2 + (x[0] + x[1] - 10) ** 2 / 9 + (x[2] - 5) ** 2,
        inequality=lambda x: (x**2).sum() - 48,
        lower=t(-4.5, -4.5, -5.0),
        upper=t(4.5, 4.5, 5.0),
    )


def hs100() -> ConstrainedProblem:
    def objective(x: Tensor) -> Tensor:
        quartic = (x[0] - 10) ** 2 + 5 * (x[1] - 12) ** 2 + x[2] ** 4 + 3 * (x[3] - 11) ** 2 + 10 * x[4] ** 6
        return quartic + 7 * x[5] ** 2 + x[6] ** 4 - 4 * x[5] * x[6] - 10 * x[5] - 8 * x[6]

    def inequality(x: Tensor) -> Tensor:
        return torch.stack(
            [
                2 * x[0] ** 2 + 3 * x[1] ** 4 + x[2] + 4 * x[3] ** 2 + 5 * x[4] - 127,
                7 * x[0] + 3 * x[1] + 10 * x[2] ** 2 + x[3] - x[4] - 282,
                23 * x[0] + x[1] ** 2 + 6 * x[5] ** 2 - 8 * x[6] - 196,
                4 * x[0] ** 2 + x[1] ** 2 - 3 * x[0] * x[1] + 2 * x[2] ** 2 + 5 * x[5] - 11 * x[6],
            ]
        )

    return ConstrainedProblem(objective=objective, inequality=inequality)


def rosenbrock(lower: float, upper: float = INF) -> ConstrainedProblem:
    return ConstrainedProblem(
        objective=lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, lower=t(-INF, lower), upper=t(INF, upper)
    )


def maratos() -> EqualityProblem:
    return EqualityProblem(lambda x: 2 * ((x**2).sum() - 1) - x[0], lambda x: (x**2).sum() - 1)


def hs6() -> EqualityProblem:
    return EqualityProblem(lambda x: (1 - x[0]) ** 2, lambda x: 10 * (x[1] - x[0] ** 2))


PUBLISHED = [
    ("HS1", rosenbrock(-1.5), [-2.0, 1.0], 0.0, 35),
    ("HS2", rosenbrock(1.5), [-2.0, 1.0], 4.941229318, 20),  # the other local minimum is 0.0504
    ("HS6", hs6(), [-1.2, 1.0], 0.0, 8),
    ("HS35", None, [0.5, 0.5, 0.5], 1 / 9, 10),
    ("HS43", rosen_suzuki(), [0.0] * 4, -44.0, 12),
    ("HS65", hs65(), [-5.0, 5.0, 0.0], 0.9535288567, 30),
    ("HS71", hs71(), [1.0, 5.0, 5.0, 1.0], 17.0140173, 10),
    ("HS100", hs100(), [1.0, 2.0, 0.0, 4.0, 0.0, 1.0, 1.0], 680.6300573, 14),
    ("MARATOS", maratos(), [1.1, 0.1], -1.0, 6),
]


def hs35() -> ConstrainedProblem:
    def objective(x: Tensor) -> Tensor:
        squares = 2 * x[0] ** 2 + 2 * x[1] ** 2 + x[2] ** 2 + 2 * x[0] * x[1] + 2 * x[0] * x[2]
        return 9 - 8 * x[0] - 6 * x[1] - 4 * x[2] + squares

    return ConstrainedProblem(objective=objective, inequality=lambda x: x[0] + x[1] + 2 * x[2] - 3, lower=0.0)


@pytest.mark.parametrize(("name", "problem", "x0", "optimum", "steps"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_optima(name: str, problem: Problem | None, x0: list[float], optimum: float, steps: int) -> None:
    """With no more steps than IPOPT 3.14 and a few."""
    found = solved(problem or hs35(), torch.tensor(x0))
    assert found.objective == pytest.approx(optimum, rel=1e-8, abs=1e-7)
    assert found.steps <= steps
    assert found.counts["hessian"] <= found.steps + 2  # and two looks at the curvature of the end point


@pytest.mark.parametrize("angle", [0.1, 0.5])
def test_second_order_corrections_let_full_steps_through(angle: float) -> None:
    """Maratos: on the circle a full step raises both the objective and the violation, however near the solution."""
    found = solved(maratos(), t(np.cos(angle), np.sin(angle)))
    assert [row["step_length"] for row in found.history] == [1.0] * found.steps
    assert found.steps <= 4


def test_equals_scipy_on_a_nonconvex_problem() -> None:
    def f(x: Tensor) -> Tensor:
        return (x[0] - 2) ** 2 * torch.exp(x[1]) + torch.sin(3 * x[2]) + x[1] ** 2

    problem = ConstrainedProblem(
        objective=f,
        equality=lambda x: x[0] * x[1] + x[2] - 1,
        inequality=lambda x: torch.stack([(x**2).sum() - 3, -x[0]]),
        upper=t(INF, 0.4, INF),
    )
    x0 = t(0.5, 0.2, 0.9)
    found = solved(problem, x0)
    start = x0.numpy()
    theirs = scipy.optimize.minimize(
        lambda v: float(f(torch.as_tensor(v))),
        start,
        jac=lambda v: torch.func.grad(f)(torch.as_tensor(v)).numpy(),
        method="SLSQP",
        bounds=[(None, None), (None, 0.4), (None, None)],
        constraints=[
            {"type": "eq", "fun": lambda v: v[0] * v[1] + v[2] - 1},
            {"type": "ineq", "fun": lambda v: np.array([3 - v @ v, v[0]])},
        ],
        options={"ftol": 1e-14, "maxiter": 300},
    )
    np.testing.assert_allclose(found.x.numpy(), theirs.x, atol=1e-6)
    assert found.objective <= theirs.fun + 1e-8


# Starts, bounds and domains


@pytest.mark.parametrize("x0", [[9.0, -9.0], [0.0, 1.0], [0.5, 0.5], [1.0, 1.0]], ids=str)
def test_starts_outside_and_on_the_bounds(x0: list[float]) -> None:
    problem = ConstrainedProblem(objective=lambda x: ((x - t(0.25, 2.0)) ** 2).sum(), lower=0.0, upper=1.0)
    found = solved(problem, torch.tensor(x0))
    torch.testing.assert_close(found.x, t(0.25, 1.0), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.multipliers.upper, t(0.0, 2.0), rtol=0, atol=1e-7)


def test_functions_are_not_evaluated_beyond_the_bounds() -> None:
    """The entropy is undefined there; two entries of its minimum are next to the bound."""
    seen: list[float] = []

    def entropy(x: Tensor) -> Tensor:
        seen.append(float(x.detach().min()))
        return (x * torch.log(x)).sum() + (t(0.0, 30.0, 25.0) * x).sum()

    problem = ConstrainedProblem(objective=entropy, equality=lambda x: x.sum() - 1, lower=0.0)
    found = solved(problem, t(1.0, 0.5, 0.2))
    torch.testing.assert_close(found.x, torch.softmax(t(0.0, -30.0, -25.0), 0), rtol=0, atol=1e-8)
    assert min(seen) > 0


def test_variables_with_equal_bounds_are_parameters() -> None:
    """min sum (x - a)^2 with x0 = 0.5 and x1 = 2 fixed; their multipliers are the slopes there."""
    a = t(1.0, 1.5, 3.0, -1.0)
    problem = ConstrainedProblem(
        objective=lambda x: ((x - a) ** 2).sum(),
        equality=lambda x: x[2] - x[3] - 1 - x[0],
        lower=t(0.5, 2.0, -9.0, -INF),
        upper=t(0.5, 2.0, 9.0, INF),
    )
    found = solved(problem, torch.zeros(4))
    torch.testing.assert_close(found.x, t(0.5, 2.0, 1.75, 0.25), rtol=0, atol=1e-8)
    # 2 (x2 - 3) + l = 0: l = 2.5; the slope of L in x0 is 2 (0.5 - 1) - l = -3.5, in x1 it is 1
    torch.testing.assert_close(found.multipliers.upper[:2], t(3.5, 0.0), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.multipliers.lower[:2], t(0.0, 1.0), rtol=0, atol=1e-7)
    all_fixed = ConstrainedProblem(objective=lambda x: (x**2).sum(), lower=1.0, upper=1.0)
    assert solved(all_fixed, torch.zeros(2)).steps == 0


def test_trees_of_tensors() -> None:
    a = {"b": normal(2, 2, seed=1), "a": normal(3, seed=2)}
    problem = ConstrainedProblem(
        objective=lambda x: ((x["a"] - a["a"]) ** 2).sum() + ((x["b"] - a["b"]) ** 2).sum(),
        equality=lambda x: {"row": x["b"].sum(dim=1), "sum": x["a"].sum()},
        inequality=lambda x: (x["a"][0] - 0.1,),
        lower={"a": None, "b": torch.zeros(2, 2)},
    )
    found = solve(problem, {"a": torch.zeros(3), "b": torch.ones(2, 2)})
    assert found.success and set(found.x) == {"a", "b"}
    assert found.multipliers.equality["row"].shape == (2,) and found.multipliers.lower["b"].shape == (2, 2)
    assert constrained.kkt_residual(problem, found.x, *found.multipliers).largest <= 1e-8


def test_single_precision() -> None:
    problem = hs35()
    found = solve(problem, torch.full((3,), 0.5, dtype=torch.float32))
    assert found.success and found.x.dtype == torch.float32 and found.method.atol == 1e-4
    assert found.objective == pytest.approx(1 / 9, abs=1e-3)


# Degenerate problems


def test_constraint_qualification_fails() -> None:
    """c <= 0 and -c <= 0 leave no interior; neither does x >= 0 with x0 + x1 = 0, nor a complementarity."""
    pair = ConstrainedProblem(
        objective=lambda x: (x**2).sum(), inequality=lambda x: torch.stack([x.sum() - 1, 1 - x.sum()])
    )
    torch.testing.assert_close(solved(pair, t(3.0, 0.0)).x, t(0.5, 0.5), rtol=0, atol=1e-6)
    corner = ConstrainedProblem(objective=lambda x: (x[0] - 1) ** 2 + x[1], equality=lambda x: x.sum(), lower=0.0)
    torch.testing.assert_close(solved(corner, t(1.0, 1.0)).x, t(0.0, 0.0), rtol=0, atol=1e-8)
    exclusive = ConstrainedProblem(
        objective=lambda x: (x[0] - 1) ** 2 + (x[1] - 1) ** 2, inequality=lambda x: x[0] * x[1], lower=0.0
    )
    found = solved(exclusive, t(0.5, 0.4))
    torch.testing.assert_close(found.x, t(1.0, 0.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", ["twice", "more than variables"])
def test_dependent_equalities(rows: str) -> None:
    def equality(x: Tensor) -> Tensor:
        if rows == "twice":
            return torch.stack([x.sum() - 1, 2 * x.sum() - 2])
        return torch.stack([x[0] - 0.5, x[1] - 0.5, x.sum() - 1])

    found = solved(EqualityProblem(lambda x: (x**2).sum(), equality), t(3.0, 0.0))
    torch.testing.assert_close(found.x, t(0.5, 0.5), rtol=0, atol=1e-7)


def test_huge_multipliers_give_way_to_smaller_ones() -> None:
    """BT8: the gradients of its constraints are parallel at the solution (1, 0, 0, 0, 0)."""
    problem = EqualityProblem(
        lambda x: (x[:3] ** 2).sum(),
        lambda x: torch.stack([x[0] - 1 - x[3] ** 2 + x[1] ** 2, (x[:2] ** 2).sum() - 1 - x[4] ** 2]),
    )
    found = solved(problem, t(1.0, 1.0, 1.0, 0.0, 0.0))
    assert found.objective == pytest.approx(1.0, abs=1e-7)
    assert float(found.multipliers.equality.abs().max()) < 1e3


def test_the_example_on_which_line_searches_crash() -> None:
    """Waechter and Biegler 2000: steps along linearised constraints alone end at an infeasible point."""
    problem = ConstrainedProblem(
        objective=lambda x: x[0],
        equality=lambda x: torch.stack([x[0] ** 2 - x[1] - 1, x[0] - x[2] - 0.5]),
        lower=t(-INF, 0.0, 0.0),
    )
    found = solved(problem, t(-2.0, 1.0, 1.0))
    torch.testing.assert_close(found.x, t(1.0, 0.0, 0.5), rtol=0, atol=1e-7)
    assert {row["phase"] for row in found.history} == {0.0, 1.0, 2.0}  # both restoration phases were needed


# Problems without a solution


def squared_violation(problem: ConstrainedProblem | EqualityProblem, x: Tensor) -> Tensor:
    """The projected gradient of its half at x, relative to the sizes of its terms."""
    own = Lagrangian(problem, x)

    def violations(v: Tensor) -> Tensor:
        parts = [f(v).reshape(-1) for f in (problem.equality,) if f is not None]
        parts += [f(v).reshape(-1).clamp(min=0) for f in (problem.inequality,) if f is not None]
        return torch.cat(parts)

    terms = torch.func.jacrev(violations)(x) * violations(x)[:, None]
    slope = terms.sum(0) / terms.abs().sum(0).max().clamp(min=1e-300)
    return x - (x - slope).clamp(min=own.lower, max=own.upper)


def test_infeasible_problems_end_at_a_stationary_point_of_the_violation() -> None:
    disc = ConstrainedProblem(
        objective=lambda x: x.sum(),
        equality=lambda x: 300 * (x.sum() - 10),
        inequality=lambda x: 9 * ((x**2).sum() - 1),
    )
    roots = EqualityProblem(lambda x: (x**2).sum(), lambda x: torch.stack([x[0] ** 2 + 1, x[1] - 2]))
    linear = ConstrainedProblem(objective=lambda x: x.sum(), inequality=lambda x: torch.stack([x[0] - 1, 2 - x[0]]))
    box = ConstrainedProblem(objective=lambda x: x.sum(), equality=lambda x: x.sum() - 5, lower=0.0, upper=1.0)
    rows = EqualityProblem(lambda x: (x**2).sum(), lambda x: torch.stack([x[0] - 1, x[1] - 2, x.sum() - 4]))
    for problem, x0 in (
        (disc, t(0.3, 0.2)),
        (roots, t(1.0, 1.0)),
        (linear, t(0.0, 0.0)),
        (box, t(0.5, 0.5)),
        (rows, t(0.0, 0.0)),
    ):
        found = solve(problem, x0)
        assert found.status is Status.INFEASIBLE, found.message
        assert found.residual.feasibility > 0.1
        assert float(squared_violation(problem, found.x).abs().max()) < 1e-5
    with pytest.raises(SolveError, match="INFEASIBLE"):
        constrained.solve(box, InteriorPoint(), t(0.5, 0.5))


UNBOUNDED = [
    ("linear", ConstrainedProblem(objective=lambda x: x.sum(), upper=1.0)),
    ("free", ConstrainedProblem(objective=lambda x: x.sum())),
    ("quadratic", ConstrainedProblem(objective=lambda x: -(x**2).sum(), lower=0.0)),
    ("equality", EqualityProblem(lambda x: x[0] - x[1] ** 2, lambda x: x[0] - x[1])),
    ("product", ConstrainedProblem(objective=lambda x: -x.prod(), inequality=lambda x: x[0] - x[1], lower=0.0)),
    ("exponential", ConstrainedProblem(objective=lambda x: -torch.exp(x).sum(), lower=0.0)),
]


@pytest.mark.parametrize(("name", "problem"), UNBOUNDED, ids=[row[0] for row in UNBOUNDED])
def test_unbounded_problems(name: str, problem: Problem) -> None:
    found = solve(problem, t(0.5, 0.9))
    assert found.status is Status.UNBOUNDED, found.message
    assert found.objective < -1e11 and found.residual.feasibility <= 1e-8 * float(found.x.abs().max())


def test_a_low_optimum_is_not_unbounded() -> None:
    """f* = -2.5e17 from f = 0 at the start, where the slope is 1e13."""
    problem = ConstrainedProblem(objective=lambda x: 1e8 * (x**2).sum() / 1e0 - 1e13 * x.sum(), upper=1e12)
    found = solve(problem, torch.zeros(1))
    assert found.success and found.objective == pytest.approx(-2.5e17, rel=1e-9)


def test_values_that_are_no_numbers() -> None:
    nowhere = solve(ConstrainedProblem(objective=lambda x: torch.log(x).sum()), t(-1.0, 1.0))
    assert nowhere.status is Status.NONFINITE
    elsewhere = ConstrainedProblem(objective=lambda x: (x - torch.log(x)).sum())  # steps are cut where it is undefined
    torch.testing.assert_close(solved(elsewhere, t(3.0, 50.0)).x, torch.ones(2), rtol=0, atol=1e-7)


def test_kinks_end_as_stalled_at_the_kink() -> None:
    found = solve(ConstrainedProblem(objective=lambda x: (x - 1).abs().sum()), t(2.0, -2.0))
    assert found.status is Status.STALLED and found.steps < 300
    torch.testing.assert_close(found.x, t(1.0, 1.0), rtol=0, atol=1e-6)


def test_saddle_points_are_not_called_minima() -> None:
    found = solve(ConstrainedProblem(objective=lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4), torch.zeros(2))
    assert found.status is Status.STALLED and found.curvature is not None and found.curvature < -0.1
    off = solved(ConstrainedProblem(objective=lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4), t(0.1, 1e-3))
    assert off.objective == pytest.approx(-0.25)


# Large and sparse problems


def obstacle(k: int, kind: str) -> ConstrainedProblem:
    """A membrane over a floor on a k x k grid."""
    side = scipy.sparse.eye_array(k, k=1)
    band = 2 * scipy.sparse.eye_array(k) - side - side.T
    eye = scipy.sparse.eye_array(k)
    a = scipy.sparse.csr_array(scipy.sparse.kron(eye, band) + scipy.sparse.kron(band, eye))
    load = torch.full((k * k,), -8.0 / (k + 1) ** 2)

    def energy(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x.reshape(k, k), (1, 1, 1, 1))
        slopes = ((padded[1:] - padded[:-1]) ** 2).sum() + ((padded[:, 1:] - padded[:, :-1]) ** 2).sum()
        return 0.5 * slopes - load @ x

    total = -0.15 * k * k
    if kind == "products":
        return ConstrainedProblem(objective=energy, equality=lambda x: x.sum() - total, lower=-0.25)
    row = scipy.sparse.csr_array(np.ones((1, k * k)))
    return ConstrainedProblem(
        objective=energy,
        equality=lambda x: x.sum() - total,
        lower=-0.25,
        equality_jacobian=lambda x: row,
        hessian=lambda x, *multipliers: a,
    )


def test_dense_sparse_and_matrix_free_runs_agree() -> None:
    """17 x 17: 290 rows are factorised densely by default; the others are asked for."""
    k = 17
    dense = solved(obstacle(k, "sparse"), torch.zeros(k * k))
    solver: LinearSolver
    for solver in (SparseLU(), MINRES(rtol=1e-10)):
        kind = "sparse" if isinstance(solver, SparseLU) else "products"
        found = solved(obstacle(k, kind), torch.zeros(k * k), method=InteriorPoint(linear_solver=solver))
        torch.testing.assert_close(found.x, dense.x, rtol=0, atol=1e-6)
        assert abs(found.steps - dense.steps) <= 1
    touching = int((dense.multipliers.lower > 1e-4).sum())
    assert 10 < touching < k * k - 10


def test_products_are_enough() -> None:
    """Nothing is formed at 2,116 variables."""
    k = 46
    found = solved(obstacle(k, "products"), torch.zeros(k * k))
    assert found.counts["hessian"] == 0 and found.counts["products"] > 0
    sparse = solved(obstacle(k, "sparse"), torch.zeros(k * k))
    assert found.objective == pytest.approx(sparse.objective, rel=1e-7)


# Warm starts, resumption, records


def test_multipliers_make_a_start_near_the_solution_pay() -> None:
    def moved(shift: float) -> ConstrainedProblem:
        base = hs71()
        return ConstrainedProblem(
            objective=base.objective,
            equality=lambda x: (x**2).sum() - 40 - shift,
            inequality=base.inequality,
            lower=1.0,
            upper=5.0,
        )

    x0 = t(1.0, 5.0, 5.0, 1.0)
    first = solved(moved(0.0), x0)
    assert solved(moved(0.0), first.x, multipliers=first.multipliers).steps == 0
    for shift, steps in ((1e-4, 3), (1e-2, 5)):
        cold = solved(moved(shift), x0)
        warm = solved(moved(shift), first.x, multipliers=first.multipliers)
        assert warm.steps <= steps < cold.steps
        torch.testing.assert_close(warm.x, cold.x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["HS100", "restoring"])
def test_resumed_runs_are_the_same_run(name: str) -> None:
    if name == "HS100":
        problem, x0, stops = hs100(), t(1.0, 2.0, 0.0, 4.0, 0.0, 1.0, 1.0), (1, 6)
    else:
        problem = ConstrainedProblem(
            objective=lambda x: x[0],
            equality=lambda x: torch.stack([x[0] ** 2 - x[1] - 1, x[0] - x[2] - 0.5]),
            lower=t(-INF, 0.0, 0.0),
        )
        x0, stops = t(-2.0, 1.0, 1.0), (6, 10, 14, 20, 26)
    whole = solved(problem, x0)
    phases = set()
    for stop in stops:
        part = solve(problem, x0, max_steps=stop)
        phases.add(part.history[-1]["phase"])
        rest = constrained.solve(problem, checkpoint=part.checkpoint)
        assert torch.equal(rest.x, whole.x) and rest.steps == whole.steps
        for a, b in zip(rest.multipliers, whole.multipliers, strict=True):
            assert (a == () and b == ()) or torch.equal(a, b)
    assert name == "HS100" or phases == {0.0, 1.0, 2.0}


def test_the_record_of_a_run() -> None:
    found = solved(hs71(), t(1.0, 5.0, 5.0, 1.0))
    row = found.history[-1]
    assert {"residual", "objective", "feasibility", "mu", "step_length", "shift", "phase"} <= set(row)
    assert row["residual"] == pytest.approx(found.residual.largest, rel=1e-6)
    assert all(a["mu"] >= b["mu"] for a, b in itertools.pairwise(found.history))
    assert found.counts["gradient"] <= found.steps + 2 and found.counts["jacobian"] <= found.steps + 2


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"barrier": 0.0}, ValueError),
        ({"decrease": 1.0}, ValueError),
        ({"power": 2.0}, ValueError),
        ({"atol": -1.0}, ValueError),
        ({"linear_solver": "lu"}, TypeError),
    ],
    ids=str,
)
def test_settings_are_checked(settings: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(settings))):
        InteriorPoint(**settings)  # type: ignore[arg-type]


# Parts


def parts(scale: float = 1.0) -> tuple[ScaledProblem, BarrierState]:
    """Three variables with bounds of all kinds, one equality, two inequalities; an iterate inside."""
    problem = ConstrainedProblem(
        objective=lambda x: torch.exp(x).sum() + x[0] * x[1],
        equality=lambda x: x[0] * x[2] - 1,
        inequality=lambda x: torch.stack([x[0] ** 2 + x[1] - 4, x[1] - x[2] ** 2]),
        lower=t(0.0, -INF, -3.0),
        upper=t(INF, 2.0, 3.0),
    )
    own = Lagrangian(problem, torch.zeros(3))
    model = ScaledProblem(own, t(0.5, scale, 0.25, 2.0))
    w = t(0.7, 0.3, 1.1, 0.9, 0.4)
    z = torch.linspace(0.2, 1.0, len(model.sides.bound))
    return model, BarrierState(w=w, y=t(0.3, 0.7, -0.2), z=z, mu=0.05)


def test_sides_list_every_bound_once() -> None:
    sides = Sides.between(t(0.0, -INF, -3.0, -INF), t(INF, 2.0, 3.0, INF))
    assert sides.index.tolist() == [0, 2, 1, 2] and sides.sign.tolist() == [1, 1, -1, -1]
    assert sides.damped.tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(sides.gaps(t(0.5, 0.5, 0.5, 0.5)), t(0.5, 3.5, 1.5, 2.5))
    inside = sides.inside(t(-5.0, 9.0, 3.0, 7.0))
    torch.testing.assert_close(inside, t(0.01, 2 - 0.02, 3 - 0.03, 7.0))
    narrow = Sides.between(t(1.0), t(1.0 + 1e-3))
    torch.testing.assert_close(narrow.inside(t(0.0)), t(1.0 + 1e-5), rtol=0, atol=1e-12)


def test_gradient_of_the_barrier_function() -> None:
    model, state = parts()
    mu, step = 0.3, 1e-6
    found = model.barrier_gradient(model.at(state.w), mu)
    for i in range(model.size):
        move = torch.zeros(model.size)
        move[i] = step
        ends = [model.barrier(model.at(state.w + sign * move), mu) for sign in (1.0, -1.0)]
        assert float(found[i]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("phase", ["problem", "l1", "squares"])
def test_newton_steps_solve_the_linearised_conditions(phase: str) -> None:
    """The reduced system against all equations, with their matrix by automatic differentiation."""
    base, state = parts()
    model = base
    if phase != "problem":
        model = Restoration(base, state.w + 0.1, 0.04) if phase == "l1" else LeastSquares(base)  # type: ignore[assignment]
        more = model.size - base.size
        extra = torch.linspace(0.1, 0.8, more)
        z = torch.linspace(0.2, 1.0, len(model.sides.bound))
        state = BarrierState(w=torch.cat([state.w, extra]), y=state.y, z=z, mu=state.mu)
    evaluation = model.at(state.w)
    newton = NewtonStep(model, evaluation, state)
    direction = newton.direction(InertiaCorrection())
    assert direction is not None and direction.kkt.primal == 0 and direction.kkt.dual == 0
    dz = newton.dual_step(direction.dw)
    own = base.lagrangian.problem
    scales = torch.cat([t(base.objective_scale), base.constraint_scale])
    size, m, sides = base.size, base.m, model.sides

    def residual(v: Tensor) -> Tensor:
        w, y, z = v[: model.size], v[model.size : model.size + m], v[model.size + m :]

        def lagrangian(w: Tensor) -> Tensor:
            x, s = w[:3], w[3:size]
            values = torch.cat([own.equality(x).reshape(1), own.inequality(x)])  # type: ignore[misc]
            c = scales[1:] * values + torch.cat([torch.zeros(1), s])
            if phase == "problem":
                return scales[0] * own.objective(x) + y @ c
            if phase == "squares":
                r = w[size:]
                return 0.5 * (model.weights * r**2).sum() + y @ (c - r)  # type: ignore[attr-defined]
            n, p = w[size : size + m], w[size + m :]
            proximal = 0.5 * (model.weights * (w[:size] - model.reference) ** 2).sum()  # type: ignore[attr-defined]
            return WEIGHT * (n + p).sum() + proximal + y @ (c + n - p)

        top = torch.func.grad(lagrangian)(w) - sides.gather(sides.sign * z)
        damping = 1e-5 * state.mu * sides.gather(sides.sign * sides.damped)
        middle = torch.func.grad(lambda y: lagrangian_of(w, y))(y)
        gaps = sides.sign * (w[sides.index] - sides.bound)
        return torch.cat([top + damping, middle, gaps * z - state.mu])

    def lagrangian_of(w: Tensor, y: Tensor) -> Tensor:
        x, s = w[:3], w[3:size]
        values = torch.cat([own.equality(x).reshape(1), own.inequality(x)])  # type: ignore[misc]
        c = scales[1:] * values + torch.cat([torch.zeros(1), s])
        if phase == "squares":
            c = c - w[size:]
        if phase == "l1":
            c = c + w[size : size + m] - w[size + m :]
        return y @ c

    v = torch.cat([state.w, state.y, state.z])
    expected = torch.linalg.solve(torch.func.jacrev(residual)(v), -residual(v))
    torch.testing.assert_close(torch.cat([direction.dw, direction.dy, dz]), expected, rtol=1e-7, atol=1e-7)


def test_steps_keep_a_share_of_every_distance() -> None:
    assert longest(t(1.0, 2.0), t(1.0, 0.0), 0.99) == 1.0
    assert longest(t(1.0, 2.0), t(-2.0, -100.0), 0.99) == pytest.approx(0.0198)
    model, state = parts()
    newton = NewtonStep(model, model.at(state.w), state)
    dw = t(-70.0, 0.0, 0.0, 0.0, 0.0)
    alpha = newton.longest(dw)
    assert alpha == pytest.approx(0.99 * 0.01) and float(model.sides.gaps(state.w + alpha * dw).min()) > 0


def test_the_error_of_a_barrier_problem_is_that_of_its_conditions() -> None:
    model, state = parts()
    evaluation = model.at(state.w)
    gaps = model.sides.gaps(state.w)
    dual = model.lagrangian_gradient(evaluation, state.y, state.z)
    expected = max(float(v.abs().max()) for v in (dual, evaluation.constraints, gaps * state.z - 0.01))
    assert barrier_error(model, evaluation, state, 0.01) == pytest.approx(expected)
    assert barrier_error(model, evaluation, state, 90.0) == pytest.approx(float((gaps * state.z - 90.0).abs().max()))
    state.z = 1e5 * state.z
    scale = float((state.z.abs().sum()) / len(state.z)) / 100
    products = float((gaps * state.z - 0.01).abs().max()) / scale
    dual = model.lagrangian_gradient(evaluation, state.y, state.z)
    mean = float(state.z.abs().sum() + state.y.abs().sum()) / (len(state.z) + len(state.y)) / 100
    expected = max(float(dual.abs().max()) / mean, products, float(evaluation.constraints.abs().max()))
    assert barrier_error(model, evaluation, state, 0.01) == pytest.approx(expected)


def test_the_filter_refuses_what_is_dominated() -> None:
    found, eps = Filter(), 2e-16
    found.limit(0.5)
    assert (found.largest, found.smallest) == (1e4, 1e-4)
    assert found.accepts(9e3, 1.0, eps) and not found.accepts(2e4, 1.0, eps) and not found.accepts(1.0, INF, eps)
    found.add(1.0, 2.0)
    assert not found.accepts(1.0, 2.0, eps)
    assert not found.accepts(1.0 - 1e-6, 2.0 - 1e-9, eps)  # within both margins
    assert found.accepts(1.0 - 2e-5, 9.0, eps) and found.accepts(5.0, 2.0 - 2e-8, eps)
    found.add(0.5, 1.0)
    assert len(found.thetas) == 1  # the first is dominated
    found.add(0.1, 3.0)
    assert len(found.thetas) == 2 and not found.accepts(0.2, 4.0, eps) and found.accepts(0.2, 0.5, eps)
    found.reset()
    assert found.accepts(1.0, 2.0, eps) and found.largest == 1e4


def test_what_the_line_search_accepts() -> None:
    model, state = parts()
    evaluation = model.at(state.w)
    state.filter.limit(0.0)
    newton = NewtonStep(model, evaluation, state)
    theta, phi = newton.theta, newton.phi

    def judged(theta: float, phi: float, slope: float = -1e-6) -> bool | None:
        """At a trial point with these values of violation and barrier function."""
        trial = model.at(state.w)
        trial.constraints = torch.full((model.m,), theta / model.m)
        trial.objective = trial.objective + phi - newton.phi
        return newton._judge(trial, 0.5, slope)

    assert judged(1.1 * theta, phi + 1) is None
    assert judged(0.9 * theta, phi + 1) is False and judged(1.1 * theta, phi - 1) is False
    assert judged((1 - 1e-6) * theta, phi) is None and judged(1.1 * theta, phi - 1e-9 * theta) is None  # margins
    assert judged(1.1 * theta, phi - 1, slope=-1e6) is True  # what descends as promised is no entry of the filter
    state.filter.add(0.95 * theta, phi - 2)
    assert judged(1.1 * theta, phi - 1) is None
    newton.theta = 1e-6  # nearly feasible: a step that promises descent must deliver it
    assert judged(0.5e-6, phi + 1e-3, slope=-1.0) is None
    state.filter.reset()
    assert judged(0.5e-6, phi + 1e-3, slope=-1.0) is None and judged(0.5e-6, phi - 0.1, slope=-1.0) is True


@pytest.mark.parametrize("armijo", [True, False])
def test_only_steps_that_do_not_descend_enlarge_the_filter(armijo: bool) -> None:
    model, state = parts()
    newton = NewtonStep(model, model.at(state.w), state)
    direction = newton.direction(InertiaCorrection())
    assert direction is not None
    moved, y, z = state.w + 0.01 * direction.dw, state.y + 0.01 * direction.dy, state.z
    dz = newton.dual_step(direction.dw)
    newton.accept(Trial(model.at(moved), 0.01, direction, armijo))
    assert len(state.filter.thetas) == (0 if armijo else 1)
    assert torch.equal(state.w, moved) and torch.equal(state.y, y) and bool((state.z > 0).all())
    torch.testing.assert_close(state.z, z + longest(z, dz, 0.99) * dz)


def test_small_multipliers_do_not_make_a_vertex_look_like_a_saddle() -> None:
    """At x = 1 the multipliers are 2e-4 and the curvature is -2: a mu of 1e-9 leaves the bounds 1e-5 away."""
    start = 1 - 1e-4
    problem = ConstrainedProblem(objective=lambda x: -((x - start) ** 2).sum(), lower=start, upper=1.0)
    found = solved(problem, t(1.0, 1.0))
    torch.testing.assert_close(found.x, t(1.0, 1.0), rtol=0, atol=1e-5)


def test_when_descent_is_asked_for_and_when_steps_are_too_short() -> None:
    rule = Filter()
    rule.limit(0.0)
    assert rule.switches(1e-8, -1.0, 1.0) and not rule.switches(1.0, -1e-3, 1.0) and not rule.switches(0.0, 1.0, 1.0)
    assert rule.shortest(1.0, 1.0) == pytest.approx(0.05e-5)
    assert rule.shortest(1.0, -1.0) == pytest.approx(0.05e-8)
    assert rule.shortest(1e-8, -1.0) == pytest.approx(0.05e-16, rel=1e-12, abs=0)
    assert rule.shortest(1e-8, -1e8) == pytest.approx(0.05 * 1e-8**1.1 / 1e8**2.3, rel=1e-12, abs=0)
    assert rule.shortest(1e-8, -1e300) == pytest.approx(0.0)


@pytest.mark.parametrize("mu", [1.0, 1e-6])
def test_elastic_variables_minimise_their_barrier_function(mu: float) -> None:
    c = t(-3.0, -1e-6, 0.0, 1e-6, 3.0, 1e4)
    n, p = elastic(c, mu)
    torch.testing.assert_close(c + n - p, torch.zeros(6), rtol=0, atol=1e-11)
    assert bool((n > 0).all() and (p > 0).all())
    # d/dn [rho (n + p) - mu log n - mu log p] = 0 with p = c + n
    torch.testing.assert_close(mu / n + mu / p, torch.full((6,), 2 * WEIGHT), rtol=1e-6, atol=0)


# Large variables, wide boxes, and what rounding leaves


def test_large_units_of_x_do_not_make_a_feasible_problem_infeasible() -> None:
    """Example of Waechter and Biegler (2000) in units of 1e8, where J^T r is small everywhere; x* = (1, 0, 1/2)."""
    unit = 1e8

    def rows(x: Tensor) -> Tensor:
        u = x / unit
        return torch.stack([u[0] ** 2 - u[1] - 1, u[0] - u[2] - 0.5])

    problem = ConstrainedProblem(objective=lambda x: x[0] / unit, equality=rows, lower=t(-INF, 0.0, 0.0))
    found = solved(problem, unit * t(-2.0, 3.0, 1.0))
    torch.testing.assert_close(found.x / unit, t(1.0, 0.0, 0.5), rtol=0, atol=1e-8)


def test_multipliers_of_steep_functions_are_in_their_own_units() -> None:
    """All functions have slopes above 100 and are scaled: 1000 x_1 + 1000 l = 0, 1000 x_0 + 1000 l + 1e4 v = 0."""
    problem = ConstrainedProblem(
        objective=lambda x: 500 * (x**2).sum() + 700 * x[2],
        equality=lambda x: 1e3 * (x[0] + x[1] - 2),
        inequality=lambda x: 1e4 * (x[0] - 0.5),
        lower=t(-INF, -INF, 0.0),
    )
    found = solved(problem, t(1.0, 3.0, 1.0))
    torch.testing.assert_close(found.x, t(0.5, 1.5, 0.0), rtol=0, atol=1e-8)
    rows = torch.stack([found.multipliers.equality, found.multipliers.inequality])
    torch.testing.assert_close(rows, t(-1.5, 0.1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.multipliers.lower, t(0.0, 0.0, 700.0), rtol=1e-6, atol=1e-6)
    # A start with these multipliers has them in the scaled problem: the gradient of its Lagrangian vanishes.
    lagrangian = Lagrangian(problem, found.x)
    given = lagrangian.flat_multipliers(*found.multipliers)
    model, evaluation, state = begin_warm(lagrangian, found.x, given, 1e-9, 0.1)
    assert model.objective_scale < 1 and bool((model.constraint_scale < 1).all())
    assert float(model.lagrangian_gradient(evaluation, state.y, state.z).abs().amax()) <= 1e-6


def test_slopes_that_are_no_numbers_scale_nothing() -> None:
    assert factors(t(float("nan"), INF, 50.0, 1e3, 1e12)).tolist() == [1.0, 1.0, 1.0, 0.1, 1e-8]


def test_wide_boxes_are_not_unbounded() -> None:
    for upper in (1e11, 1e13, 1e18):
        found = solve(ConstrainedProblem(objective=lambda x: -x.sum(), lower=0.0, upper=upper), torch.zeros(2))
        assert found.status in (Status.CONVERGED, Status.STALLED), found.message
        torch.testing.assert_close(found.x, torch.full((2,), upper), rtol=1e-6, atol=0)
    well = ConstrainedProblem(objective=lambda x: (1e-12 * x**4 - x**2).sum())
    assert solved(well, t(1e-3)).objective == pytest.approx(-2.5e11)


def test_one_large_variable_does_not_hide_the_violation_of_others() -> None:
    """f falls without bound, and no x satisfies the constraints: rounding at x_1 = -1e16 exceeds what they lack."""
    problem = ConstrainedProblem(
        objective=lambda x: 1e4 * x.sum(), inequality=lambda x: torch.stack([x[0] - 1, 2 - x[0]])
    )
    assert solve(problem, torch.zeros(2)).status is Status.INFEASIBLE


@pytest.mark.parametrize("dense", [True, False])
def test_rounding_of_constraints_has_the_size_of_their_terms(dense: bool) -> None:
    problem = ConstrainedProblem(
        objective=lambda x: x.sum(),
        equality=lambda x: (x[0] - x[1]).reshape(1),
        inequality=lambda x: torch.stack([x[2] - 1, 1e-3 * x[0] - 0.1]),
        upper=1e9,
    )
    x = t(1e8, 1e8 + 1e-7, 1.5)
    point = Lagrangian(problem, x, dense=dense).at(x)
    hidden = 10 * torch.finfo(x.dtype).eps * t(2e8, 1.5, 1e5)
    torch.testing.assert_close(rounding(point), hidden, rtol=1e-6, atol=0)
    assert excess(Lagrangian(problem, x, dense=dense), point) == pytest.approx(1e5 - 0.1)
    near = t(10.0, 10.0, 1.5)
    lagrangian = Lagrangian(problem, near, dense=dense)
    assert excess(lagrangian, lagrangian.at(near)) == pytest.approx(0.5)
    level = t(1e8, 1e8 + 1e-7, 0.0)  # off by the seventh digit after the point: x_0 and x_1 round to that
    assert float(rounding(Lagrangian(problem, level).at(level))[0]) > 1e-7


def test_after_the_start_only_points_within_the_bounds_are_evaluated() -> None:
    seen: list[float] = []

    def objective(x: Tensor) -> Tensor:
        return torch.where(x >= 0, (x - 3) ** 2, 1e30 * x).sum()

    problem = ConstrainedProblem(objective=objective, lower=0.0, upper=9.0)
    lagrangian = Lagrangian(problem, t(-5.0))
    at = lagrangian.at

    def watched(x: Tensor) -> object:
        seen.append(float(x))
        return at(x)

    lagrangian.at = watched  # type: ignore[assignment,method-assign]
    state = InteriorPoint(atol=1e-8).init(lagrangian, t(-5.0))
    assert seen and min(seen) >= 0.0
    assert float(state.scales[0]) == 1.0  # the slope at x = 0, not the 1e30 at x0


@pytest.mark.parametrize("seed", range(6))
def test_no_better_accuracy_is_stalled_and_not_nonfinite(seed: int) -> None:
    """HS71 beyond the precision, where gaps to active bounds underflow."""
    problem = ConstrainedProblem(
        objective=lambda x: x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2],
        equality=lambda x: (x**2).sum() - 40,
        inequality=lambda x: 25 - x.prod(),
        lower=1.0,
        upper=5.0,
    )
    start = STARTS_71[seed]
    found = solve(problem, t(*start), atol=1e-16)
    assert found.status is Status.STALLED, found.message
    assert found.objective == pytest.approx(17.0140172891, rel=1e-9)
    assert found.residual.largest < 1e-13


STARTS_71 = [
    (1.0, 5.0, 5.0, 1.0),
    (3.6375070693218747, 3.185837910880989, 1.1968961237337257, 2.0605324833064365),
    (4.741155135783027, 4.2626979169496, 3.6505523238411604, 4.515239321370465),
    (1.7420802824754724, 2.831538607722755, 2.9385395490981456, 4.646486884626862),
    (3.975162202913589, 3.5829805233645384, 2.5326889913567365, 3.947563862496297),
    (3.429029993673418, 3.0115989228479676, 1.0452537351630946, 1.0547880032551125),
]
