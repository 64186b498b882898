"""Lower levels declared in cvxpy, against cvxpy's own solutions."""

from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch

import bilevel
from bilevel.flat import FlatProblem
from bilevel.lower_level import solve_lower_level
from constrained import Box, Simplex, WholeSpace
from implicit import SolveError, tree

RNG = np.random.default_rng(0)
X, T = RNG.normal(size=(12, 4)), RNG.normal(size=12)
M = RNG.normal(size=(3, 4))
Declared = tuple[cp.Problem, dict[str, cp.Parameter]]


def nothing(x: Any, y: Any) -> torch.Tensor:
    return sum(leaf.sum() for leaf in tree.leaves(y))


def declare(declared: Declared, **more: Any) -> bilevel.CvxpyProblem:
    problem, parameters = declared
    return bilevel.from_cvxpy(problem, parameters=parameters, **{"upper": nothing, **more})


def at(problem: bilevel.CvxpyProblem, values: dict[str, np.ndarray]) -> tuple[FlatProblem, torch.Tensor]:
    flat = FlatProblem(problem, *problem.start)
    return flat, flat.flat_x({key: torch.as_tensor(np.asarray(value, dtype=float)) for key, value in values.items()})


def ridge() -> Declared:
    w, penalty, t = cp.Variable(4, name="w"), cp.Parameter(nonneg=True, value=1.0), cp.Parameter(12, value=T)
    loss = cp.sum_squares(X @ w - t) / 12 + penalty * cp.sum_squares(w) + 3 * cp.sum(t)
    return cp.Problem(cp.Minimize(loss)), {"penalty": penalty, "t": t}


def lasso() -> Declared:
    w, penalty = cp.Variable(4, name="w"), cp.Parameter(nonneg=True, value=1.0)
    return cp.Problem(cp.Minimize(cp.sum_squares(X @ w - T) + penalty * cp.norm1(w))), {"penalty": penalty}


def transport() -> Declared:
    flow, costs = cp.Variable((2, 3), name="flow", nonneg=True), cp.Parameter((2, 3), value=RNG.uniform(1, 2, (2, 3)))
    demand = cp.Parameter(3, nonneg=True, value=np.ones(3))
    rows = [cp.sum(flow, axis=0) == demand, cp.sum(flow, axis=1) <= 4]
    return cp.Problem(cp.Minimize(cp.sum(cp.multiply(costs, flow))), rows), {"costs": costs, "demand": demand}


def profit() -> Declared:
    made, price = cp.Variable(4, name="made"), cp.Parameter(4, value=np.ones(4))
    rows = [made >= 0, made <= 3, M @ made <= 2]
    return cp.Problem(cp.Maximize(price @ made - 0.1 * cp.sum_squares(made) + 7), rows), {"price": price}


def polytope() -> Declared:
    z, matrix, side = cp.Variable(4, name="z"), cp.Parameter((3, 4), value=M), cp.Parameter(3, value=np.full(3, 2.0))
    return cp.Problem(cp.Minimize(cp.sum_squares(z - 1)), [matrix @ z <= side]), {"matrix": matrix, "side": side}


def ball() -> Declared:
    z, radius = cp.Variable(4, name="z"), cp.Parameter(nonneg=True, value=1.0)
    return cp.Problem(cp.Minimize(M[0] @ z), [cp.norm(z) <= radius]), {"radius": radius}


def nearest() -> Declared:
    z, p = cp.Variable(4, name="z"), cp.Parameter(4, value=np.full(4, 3.0))
    rows = [cp.sum_squares(z) <= 1, z[0] + z[1] == 0.2]
    return cp.Problem(cp.Minimize(cp.norm(z - p) + 0.5 * cp.norm(z - M[0])), rows), {"p": p}


def robust() -> Declared:
    z, t = cp.Variable(4, name="z"), cp.Parameter(12, value=T)
    return cp.Problem(cp.Minimize(cp.sum(cp.huber(X @ z - t, 0.5)) + cp.max(cp.abs(z)))), {"t": t}


def symmetric() -> Declared:
    z, p = cp.Variable((2, 2), name="z", symmetric=True), cp.Parameter((2, 2), value=np.ones((2, 2)))
    w = cp.Variable(2, name="w", bounds=[-1, 0.5])
    return cp.Problem(cp.Minimize(cp.sum_squares(z - p) + cp.sum_squares(w - p[0]) + cp.sum(w))), {"p": p}


def bends() -> Declared:
    """Rotated cones, and cones of several sizes."""
    z, p = cp.Variable(3, name="z"), cp.Parameter(3, value=np.array([0.3, 0.2, -0.1]))
    bent = cp.quad_over_lin(z, z[0] + 2) + cp.inv_pos(z[0]) + cp.pnorm(z - p - 1, 3) - 0.3 * cp.geo_mean(z + 2)
    return cp.Problem(cp.Minimize(bent + p @ z), [cp.SOC(1 + z[0], z[1:] - p[1:]), z[2] == 0.4]), {"p": p}


ZOO: dict[str, tuple[Callable[[], Declared], set[str]]] = {
    "ridge": (ridge, set()),
    "lasso": (lasso, {"lower_inequality"}),
    "transport": (transport, {"lower_equality", "lower_inequality"}),
    "profit": (profit, {"lower_inequality"}),
    "polytope": (polytope, {"lower_inequality"}),
    "ball": (ball, {"lower_inequality", "upper_inequality"}),
    "nearest": (nearest, {"lower_equality", "lower_inequality"}),
    "robust": (robust, {"lower_inequality"}),
    "symmetric": (symmetric, {"lower_equality"}),
    "bends": (bends, {"lower_equality", "lower_inequality"}),
}


@pytest.mark.parametrize("name", ZOO)
def test_lower_solutions_are_cvxpys(name: str) -> None:
    declared = ZOO[name][0]()
    source, parameters = declared
    problem = declare(declared)
    assert set(problem.constraints) == ZOO[name][1]
    rng = np.random.default_rng(1)
    sign = -1.0 if isinstance(source.objective, cp.Maximize) else 1.0
    y = FlatProblem(problem, *problem.start).flat_y(problem.start[1])
    for _ in range(3):
        for parameter in parameters.values():
            parameter.value = parameter.project(parameter.value + 0.3 * rng.normal(size=parameter.shape))
        source.solve(cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        flat, x = at(problem, {key: parameter.value for key, parameter in parameters.items()})
        found = solve_lower_level(flat, x, y, atol=1e-8)
        assert found.residual.largest <= 1e-7
        assert found.value == pytest.approx(sign * source.value, rel=1e-7, abs=1e-7)
        values = flat.y_tree(found.y)
        for variable in source.variables():
            np.testing.assert_allclose(values[variable.name()].numpy(), variable.value, rtol=0, atol=2e-5)
        assert flat.violation(x, found.y) <= 1e-7


@pytest.mark.parametrize("name", ZOO)
def test_the_start_is_a_lower_solution(name: str) -> None:
    declared = ZOO[name][0]()
    problem = declare(declared)
    source, parameters = declared
    for key, parameter in parameters.items():
        np.testing.assert_array_equal(problem.start[0][key].numpy(), parameter.value)
    source.solve(cp.CLARABEL)
    sign = -1.0 if isinstance(source.objective, cp.Maximize) else 1.0
    assert float(problem.lower(*problem.start)) == pytest.approx(sign * source.value, rel=1e-6, abs=1e-6)
    flat = FlatProblem(problem, *problem.start)
    assert flat.violation(*(flat.flat_x(problem.start[0]), flat.flat_y(problem.start[1]))) <= 1e-8
    assert all(leaf.dtype == torch.float64 for leaf in tree.leaves(problem.start))


def test_what_compilation_adds_is_taken_out_again() -> None:
    added = {name: declare(make()).start[1].get("auxiliary", torch.zeros(0)).numel() for name, (make, _) in ZOO.items()}
    assert added == {
        "ridge": 0, "lasso": 4, "transport": 0, "profit": 0, "polytope": 0,
        "ball": 0, "nearest": 2, "robust": 25, "symmetric": 0, "bends": 14,
    }  # fmt: skip


def test_rows_that_are_bounds_become_boxes() -> None:
    made = declare(profit())
    assert isinstance(made.lower_set, Box)
    assert made.lower_set.lower["made"].tolist() == [0] * 4
    assert made.lower_set.upper["made"].tolist() == [3] * 4
    assert isinstance(made.upper_set, WholeSpace)
    other = declare(symmetric())
    assert other.lower_set.lower["w"].tolist() == [-1, -1]
    assert other.lower_set.upper["z"].isinf().all()
    costs = declare(transport()).upper_set
    assert costs.lower["demand"].tolist() == [0] * 3
    assert costs.lower["costs"].isinf().all()


def test_bounds_of_parameters_become_the_upper_set() -> None:
    z = cp.Variable(name="z")
    names = {"nonneg": (0, torch.inf), "pos": (0, torch.inf), "nonpos": (-torch.inf, 0), "neg": (-torch.inf, 0)}
    for attribute, limits in names.items():
        p = cp.Parameter(**{attribute: True})
        p.value = 1.0 if limits[0] == 0 else -1.0
        found = bilevel.from_cvxpy(cp.Problem(cp.Minimize((z - p) ** 2)), parameters=[p], upper=nothing)
        assert (float(found.upper_set.lower[0]), float(found.upper_set.upper[0])) == limits
    p = cp.Parameter(2, bounds=[[0, -1], [1, 2]], value=[0.5, 0])
    found = bilevel.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(z - p))), parameters=(p,), upper=nothing)
    assert isinstance(found.start[0], tuple)
    assert found.upper_set.lower[0].tolist() == [0, -1]
    assert found.upper_set.upper[0].tolist() == [1, 2]


def test_a_given_upper_set_must_lie_within_the_declared_bounds() -> None:
    declared = ridge()
    inside = {"penalty": 0.1, "t": None}, {"penalty": 2.0, "t": None}
    assert declare(declared, upper_set=Box(*inside)).upper_set.lower["penalty"] == 0.1
    with pytest.raises(ValueError, match=r"upper_set reaches beyond .* declared to be.*bounds="):
        declare(declared, upper_set=Box({"penalty": -1.0, "t": None}, None))
    p, z = cp.Parameter(3, nonneg=True, value=np.ones(3)), cp.Variable(3, name="z")
    squares = cp.Problem(cp.Minimize(p @ cp.square(z) - cp.sum(z)))
    simplex = Simplex()
    assert bilevel.from_cvxpy(squares, parameters={"p": p}, upper=nothing, upper_set=simplex).upper_set is simplex


def test_rows_in_parameters_alone_belong_to_the_upper_level() -> None:
    z, p = cp.Variable(2, name="z"), cp.Parameter(2, value=[1.0, 2.0])
    source = cp.Problem(cp.Minimize(cp.sum_squares(z - p)), [p[0] <= p[1], cp.sum(p) == 3, z <= p])
    problem = bilevel.from_cvxpy(source, parameters={"p": p}, upper=nothing)
    x, y = {"p": torch.tensor([2.0, 0.5]).double()}, problem.start[1]
    assert problem.upper_inequality(x, y).tolist() == [1.5]
    assert problem.upper_equality(x, y).abs().tolist() == [0.5]
    assert problem.lower_inequality(x, {"z": torch.zeros(2).double()}).tolist() == [-2, -0.5]
    both = bilevel.from_cvxpy(
        source, parameters={"p": p}, upper=nothing, upper_inequality=lambda x, y: y["z"].sum() - 4
    )
    found = both.upper_inequality(*both.start)
    assert float(found["declared"]) == pytest.approx(-1)
    assert found["parameters"].tolist() == [-1]
    assert FlatProblem(both, *both.start).upper_level.inequalities == 2


def test_cones_in_parameters_alone_belong_to_the_upper_level() -> None:
    z, p, r = cp.Variable(2, name="z"), cp.Parameter(2, value=[0.6, 0.3]), cp.Parameter(nonneg=True, value=2.0)
    goal, disc, room = cp.Minimize(cp.sum_squares(z - p)), cp.norm(p) <= 2, cp.norm(z) <= r
    x, y = {"p": torch.tensor([3.0, -4.0]).double()}, {"z": torch.tensor([1.0, 1.0]).double()}
    alone = bilevel.from_cvxpy(cp.Problem(goal, [disc]), parameters={"p": p}, upper=nothing)
    assert alone.constraints == ("upper_inequality",)
    assert alone.upper_inequality(x, y).tolist() == [25 - 4]
    both = bilevel.from_cvxpy(cp.Problem(goal, [disc, room]), parameters={"p": p, "r": r}, upper=nothing)
    x["r"] = torch.tensor(3.0).double()
    assert both.lower_inequality(x, y).tolist() == [2 - 9]
    assert both.upper_inequality(x, y).tolist() == [-3, 25 - 4]  # the radius r, then the cone of p
    assert FlatProblem(both, *both.start).notes == ()


def test_multipliers_are_cvxpys() -> None:
    """Signs of all kinds of rows: L = g + v . c, as in cvxpy."""
    z, p, side = cp.Variable(4, name="z"), cp.Parameter(4, value=[3.0, 2.0, 1.0, -4.0]), cp.Parameter(value=-1.0)
    low, high, disc = z[3] >= -0.5, z[0] <= 0.6, cp.norm(z) <= 1.3
    linear, apart = M[1] @ z <= side, 2 * (z[1] - z[2]) == p[1] - 1.8
    # nu (|z| - t) is lambda (|z|^2 - t^2) with nu = 2 t lambda.
    cases: list[tuple[Any, Any, list[Any], dict[str, Any], float]] = [
        (cp.sum(z) == 1.5, linear, [low, high], {"p": p, "side": side}, 1.0),
        (apart, disc, [low], {"p": p}, 2.6),
    ]
    for equality, inequality, bounds, parameters, factor in cases:
        source = cp.Problem(cp.Minimize(cp.sum_squares(z - p)), [equality, inequality, *bounds])
        problem = bilevel.from_cvxpy(source, parameters=parameters, upper=nothing)
        source.solve(cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        flat = FlatProblem(problem, *problem.start)
        found = solve_lower_level(flat, flat.flat_x(problem.start[0]), flat.flat_y(problem.start[1]), atol=1e-9)
        duals = found.multipliers
        expected = [float(c.dual_value) for c in (equality, inequality, low, high) if c is not high or high in bounds]
        ours = [duals.equality, duals.inequality * factor, duals.lower[3:], duals.upper[:1]]
        assert torch.cat(ours)[: len(expected)].tolist() == pytest.approx(expected, rel=1e-5)
        assert min(map(abs, expected)) > 0.1  # all of them matter


def test_a_cone_is_described_by_smooth_rows() -> None:
    problem = declare(ball())
    x, y = {"radius": torch.tensor(2.0).double()}, {"z": torch.tensor([1.0, 2, 0, 1]).double()}
    assert problem.lower_inequality(x, y).tolist() == [2.0]
    assert problem.upper_inequality(x, y).tolist() == [-2.0]


def test_derivatives_and_float32() -> None:
    problem = declare(polytope())
    x, y = problem.start
    flat = FlatProblem(problem, x, y)
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(flat.n + flat.m, generator=generator, dtype=torch.float64, requires_grad=True)

    def values(v: torch.Tensor) -> torch.Tensor:
        own = v[: flat.n], v[flat.n :]
        return torch.cat([flat.lower(*own)[None], flat.lower_level.inequality(*own)])

    assert torch.autograd.gradcheck(values, point)
    assert torch.autograd.gradgradcheck(values, point)
    batch = torch.func.vmap(values)(torch.stack([point, 2 * point]))
    torch.testing.assert_close(batch[1], values(2 * point))
    single = declare(polytope(), dtype=torch.float32)
    assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(single.start))
    found = single.lower_inequality(*single.start)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), problem.lower_inequality(x, y), atol=1e-5, rtol=1e-5)


def test_a_whole_problem_is_solved() -> None:
    """Ridge regression with one validation set: the same stationary point as a dense grid of the penalty."""
    source, parameters = ridge()
    valid, wanted = torch.tensor(RNG.normal(size=(9, 4))), torch.tensor(RNG.normal(size=9))
    parameters.pop("t")
    w, penalty = source.variables()[0], parameters["penalty"]
    fit = cp.Problem(cp.Minimize(cp.sum_squares(X @ w - T) / 12 + penalty * cp.sum_squares(w)))

    def upper(x: Any, y: Any) -> torch.Tensor:
        return ((valid @ y["w"] - wanted) ** 2).mean()

    problem = bilevel.from_cvxpy(fit, parameters=parameters, upper=upper, name="ridge")
    assert problem.name == "ridge"
    solution = bilevel.solve(problem, bilevel.Penalty(), raise_on_failure=False)
    grid = np.linspace(0, 5, 4001)
    weights = np.linalg.solve(X.T @ X / 12 + grid[:, None, None] * np.eye(4), (X.T @ T / 12)[None, :, None])[..., 0]
    losses = ((weights @ valid.numpy().T - wanted.numpy()) ** 2).mean(1)
    assert float(upper(solution.x, solution.y)) == pytest.approx(losses.min(), rel=1e-4)
    problem.load_into_cvxpy(solution.x, solution.y)
    assert penalty.value == pytest.approx(float(solution.x["penalty"]))
    np.testing.assert_array_equal(w.value, solution.y["w"].numpy())


# Refusals.

Z, P = cp.Variable(2, name="z"), cp.Parameter(2, value=np.ones(2), name="p")
PLAIN = cp.Minimize(cp.sum_squares(Z - P))


def quadratic(*rows: Any, objective: Any = PLAIN) -> cp.Problem:
    return cp.Problem(objective, list(rows))


@pytest.mark.parametrize(
    ("problem", "parameters", "error", "message"),
    [
        (3, [P], TypeError, "give a cvxpy.Problem"),
        (quadratic(), P, TypeError, "give a list or a dict of cvxpy.Parameter"),
        (quadratic(), [Z], TypeError, "give a list of cvxpy.Parameter objects"),
        (quadratic(), [P, P], ValueError, "none twice"),
        (quadratic(cp.Parameter(name="side", value=1) >= Z), [P], ValueError, "also has the parameters side"),
        (quadratic(), [P, cp.Parameter(name="far", value=1)], ValueError, "far do not occur in the problem"),
        (quadratic(cp.Variable(2) >= Z), [P], ValueError, r"shape \(2,\) has no name, .* name='w'"),
        (quadratic(cp.Variable(2, name="z") >= Z), [P], ValueError, "two variables have the name 'z'"),
        (quadratic(cp.Variable(2, name="auxiliary") >= Z), [P], ValueError, "'auxiliary', the key of what compilation"),
        (quadratic(cp.Variable(2, name="b", boolean=True) >= Z), [P], ValueError, "boolean variables, .*: b$"),
        (quadratic(cp.Variable(2, name="i", integer=True) >= Z), [P], ValueError, "integer .*: i$"),
        (quadratic(cp.FiniteSet(Z, [0, 1, 2])), [P], ValueError, r"integer or boolean variables, .*: FiniteSet\(z"),
        (quadratic(cp.Variable(2, name="c", complex=True) == Z), [P], ValueError, "complex .* parts of c as two"),
        (quadratic(objective=cp.Maximize(cp.sum_squares(Z - P))), [P], ValueError, "not convex .* in maximize quad"),
        (quadratic(Z <= 9, cp.sum_squares(Z) >= 1), [P], ValueError, r"not convex .* in 1.0 <= quad_over_lin\(z"),
        (quadratic(cp.quad_form(Z, cp.diag(cp.pos(P))) <= 1), [P], ValueError, r"not (DPP|convex)"),
        (quadratic(P[0] * P[1] + Z[0] <= 1), [P], ValueError, r"not (DPP|convex)"),
        (quadratic(cp.sum(cp.exp(Z)) <= 9), [P], ValueError, r"exponential cones \(exp, .*implicit.cvx.Layer"),
        (quadratic(cp.lambda_max(cp.diag(Z)) <= 9), [P], ValueError, "semidefinite cones .*implicit.cvx.Layer"),
        (quadratic(Z >= 1, Z <= 0), [P], SolveError, "at the values of the parameters p, .* infeasible"),
        (quadratic(objective=cp.Minimize(P @ Z)), [P], SolveError, "unbounded"),
    ],
)
def test_refusals(problem: Any, parameters: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bilevel.from_cvxpy(problem, parameters=parameters, upper=nothing)


def test_more_refusals() -> None:
    silent = cp.Parameter(2, name="silent")
    with pytest.raises(ValueError, match=r"parameters\['q'\], silent, has no value: set \.value"):
        bilevel.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(Z - silent))), parameters={"q": silent}, upper=nothing)
    for name in ("lower_set", "lower_data", "regularizer"):
        with pytest.raises(TypeError, match=f"{name} comes from the cvxpy problem"):
            bilevel.from_cvxpy(quadratic(), parameters=[P], upper=nothing, **{name: None})
    with pytest.raises(TypeError, match="no argument uper_set"):
        bilevel.from_cvxpy(quadratic(), parameters=[P], upper=nothing, uper_set=None)
    problem = bilevel.from_cvxpy(quadratic(), parameters=[P], upper=nothing)
    with pytest.raises(ValueError, match=r"x\[0\] has shape \(3,\), cvxpy declares \(2,\)"):
        problem.lower([torch.ones(3).double()], problem.start[1])
