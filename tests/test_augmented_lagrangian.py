"""AugmentedLagrangian: known solutions with their multipliers, scipy, large problems in linear memory, statuses."""

import gc
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, hessian
from torch.utils._python_dispatch import TorchDispatchMode

import constrained
from constrained import AugmentedLagrangian, ConstrainedProblem, EqualityProblem, Lagrangian, Solution
from constrained.augmented_function import Augmented
from constrained.augmented_lagrangian import _row_norms
from implicit import SolveError, Status, tree
from tests.dense import normal

INF = math.inf


def solve(problem: Any, x0: Any, method: AugmentedLagrangian | None = None, **options: Any) -> Solution:
    start = torch.tensor(x0) if isinstance(x0, list) else x0
    return constrained.solve(problem, method or AugmentedLagrangian(), start, **options)


def test_the_augmented_lagrangian_and_its_derivatives() -> None:
    """Value, gradient and Hessian against torch.func, dense and matrix-free, with and without the objective."""
    a, q = normal(1, 3, 5), normal(2, 2, 5)
    problem = ConstrainedProblem(
        objective=lambda x: torch.sin(x).sum() + x.prod(),
        equality=lambda x: (a @ x) ** 2 - 1,
        inequality=lambda x: torch.tanh(q @ x) - torch.tensor([-0.9, 0.9]),
    )
    x, shift, rho = normal(3, 5), normal(4, 3), normal(5, 5).abs() + 0.5
    pressure = torch.tensor([2.5, 0.4])
    for weight in (1.0, 0.0):

        def reference(x: Tensor, weight: float = weight) -> Tensor:
            h, c = (a @ x) ** 2 - 1, torch.tanh(q @ x) - torch.tensor([-0.9, 0.9])
            total = weight * (torch.sin(x).sum() + x.prod()) + (0.5 * rho[:3] * (h + shift / rho[:3]) ** 2).sum()
            return total + (0.5 * rho[3:] * (c + pressure / rho[3:]).clamp(min=0) ** 2).sum()

        constant = (shift**2 / rho[:3]).sum() / 2 + (pressure**2 / rho[3:]).sum() / 2
        for dense in (True, False):
            lagrangian = Lagrangian(problem, x, dense=dense)
            found = Augmented(lagrangian, lagrangian.at(x), shift, pressure, rho, weight)
            assert found.value == pytest.approx(float(reference(x) - constant), rel=1e-13)
            torch.testing.assert_close(found.gradient, grad(reference)(x))
            v = normal(6, 5)
            torch.testing.assert_close(found.product(v), hessian(reference)(x) @ v, rtol=1e-8, atol=1e-8)
            c = lagrangian.at(x).inequality
            assert (c + pressure / rho[3:] > 0).tolist() in ([True, False], [False, True])
            assert bool((c.abs() < pressure / rho[3:]).any()), "the sign of -mu/rho matters"
            expected = torch.cat([((a @ x) ** 2 - 1).abs(), torch.maximum(c, -pressure / rho[3:]).abs()])
            torch.testing.assert_close(found.progress, expected)
            assert (
                found.moved(2 * x).value
                == Augmented(lagrangian, lagrangian.at(2 * x), shift, pressure, rho, weight).value
            )


def test_closed_forms_with_multipliers() -> None:
    point = torch.tensor([3.0, -4.0])
    sphere = solve(
        EqualityProblem(lambda x: 0.5 * ((x - point) ** 2).sum(), lambda x: ((x**2).sum() - 1) / 2), [1.0, 0.0]
    )
    torch.testing.assert_close(sphere.x, point / 5, atol=1e-7, rtol=0)
    assert float(sphere.multipliers.equality) == pytest.approx(4.0, abs=1e-6)
    a = torch.tensor([1.0, 2.0, -2.0])
    linear = solve(EqualityProblem(lambda x: a @ x, lambda x: (x**2).sum() - 1), [0.1, 0.2, 0.3])
    torch.testing.assert_close(linear.x, -a / 3, atol=1e-7, rtol=0)
    assert float(linear.multipliers.equality) == pytest.approx(1.5, abs=1e-6)
    box = solve(ConstrainedProblem(objective=lambda x: ((x - a) ** 2).sum(), lower=-1.0, upper=0.5), torch.zeros(3))
    assert box.x.tolist() == [0.5, 0.5, -1.0]
    torch.testing.assert_close(box.multipliers.upper, torch.tensor([1.0, 3.0, 0.0]))
    torch.testing.assert_close(box.multipliers.lower, torch.tensor([0.0, 0.0, 2.0]))
    half = solve(ConstrainedProblem(objective=lambda x: (x**2).sum(), inequality=lambda x: 3 - a @ x), torch.zeros(3))
    torch.testing.assert_close(half.x, a / 3, atol=1e-7, rtol=0)
    assert float(half.multipliers.inequality) == pytest.approx(2 / 3, abs=1e-6)
    idle = solve(ConstrainedProblem(objective=lambda x: (x**2).sum(), inequality=lambda x: a @ x - 3), torch.ones(3))
    assert float(idle.multipliers.inequality) == 0.0
    assert float(idle.x.abs().amax()) < 1e-8


@pytest.mark.parametrize("seed", range(4))
def test_equality_programs_against_one_linear_system(seed: int) -> None:
    root, e, b, p = normal(seed, 8, 8), normal(seed + 10, 3, 8), normal(seed + 20, 3), normal(seed + 30, 8)
    q = root @ root.T + torch.eye(8)
    found = solve(EqualityProblem(lambda x: 0.5 * x @ q @ x - p @ x, lambda x: e @ x - b), torch.zeros(8))
    matrix = torch.cat([torch.cat([q, e.T], 1), torch.cat([e, torch.zeros(3, 3)], 1)])
    exact = torch.linalg.solve(matrix, torch.cat([p, b]))
    assert found.success
    torch.testing.assert_close(torch.cat([found.x, found.multipliers.equality]), exact, atol=1e-6, rtol=1e-6)


def hs71() -> ConstrainedProblem:
    return ConstrainedProblem(
        objective=lambda x: x[0] * x[3] * x[:3].sum() + x[2],
        inequality=lambda x: 25 - x.prod(),
        equality=lambda x: (x**2).sum() - 40,
        lower=1.0,
        upper=5.0,
    )


def hs43() -> ConstrainedProblem:
    def inequality(x: Tensor) -> Tensor:
        a, b, c, d = x**2
        one = a + b + c + d + x[0] - x[1] + x[2] - x[3] - 8
        two = a + 2 * b + c + 2 * d - x[0] - x[3] - 10
        return torch.stack([one, two, 2 * a + b + c + 2 * x[0] - x[1] - x[3] - 5])

    weights, slopes = torch.tensor([1.0, 1, 2, 1]), torch.tensor([-5.0, -5, -21, 7])
    return ConstrainedProblem(objective=lambda x: weights @ x**2 + slopes @ x, inequality=inequality)


def hs100() -> ConstrainedProblem:
    def objective(x: Tensor) -> Tensor:
        one = (x[0] - 10) ** 2 + 5 * (x[1] - 12) ** 2 + x[2] ** 4 + 3 * (x[3] - 11) ** 2 + 10 * x[4] ** 6
        return one + 7 * x[5] ** 2 + x[6] ** 4 - 4 * x[5] * x[6] - 10 * x[5] - 8 * x[6]

    def inequality(x: Tensor) -> Tensor:
        one = 2 * x[0] ** 2 + 3 * x[1] ** 4 + x[2] + 4 * x[3] ** 2 + 5 * x[4] - 127
        two = 7 * x[0] + 3 * x[1] + 10 * x[2] ** 2 + x[3] - x[4] - 282
        three = 23 * x[0] + x[1] ** 2 + 6 * x[5] ** 2 - 8 * x[6] - 196
        four = 4 * x[0] ** 2 + x[1] ** 2 - 3 * x[0] * x[1] + 2 * x[2] ** 2 + 5 * x[5] - 11 * x[6]
        return torch.stack([one, two, three, four])

    return ConstrainedProblem(objective=objective, inequality=inequality)


def hs35() -> ConstrainedProblem:
    def objective(x: Tensor) -> Tensor:
        squares = 2 * x[0] ** 2 + 2 * x[1] ** 2 + x[2] ** 2 + 2 * x[0] * x[1] + 2 * x[0] * x[2]
        return 9 - 8 * x[0] - 6 * x[1] - 4 * x[2] + squares

    return ConstrainedProblem(objective=objective, inequality=lambda x: x[0] + x[1] + 2 * x[2] - 3, lower=0.0)


HOCK_SCHITTKOWSKI: dict[str, tuple[Any, list[float], float]] = {
    "HS71": (hs71, [1.0, 5, 5, 1], 17.0140172891),
    "HS43": (hs43, [0.0, 0, 0, 0], -44.0),
    "HS100": (hs100, [1.0, 2, 0, 4, 0, 1, 1], 680.6300573744),
    "HS35": (hs35, [0.5, 0.5, 0.5], 1 / 9),
}


@pytest.mark.parametrize("dense", [True, False], ids=["matrices", "products"])
@pytest.mark.parametrize("name", HOCK_SCHITTKOWSKI)
def test_hock_schittkowski(name: str, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr("constrained.lagrangian.DENSE_LIMIT", 0)
    build, x0, value = HOCK_SCHITTKOWSKI[name]
    found = solve(build(), x0)
    assert found.success
    assert found.residual.largest <= 1e-8
    assert found.fun == pytest.approx(value, rel=1e-7)
    assert (found.counts["products"] == 0) == dense
    assert (found.counts["hessian"] > 0) == dense
    assert found.nfev <= 120


@pytest.mark.parametrize("name", HOCK_SCHITTKOWSKI)
def test_the_same_answer_as_scipy(name: str) -> None:
    build, x0, _ = HOCK_SCHITTKOWSKI[name]
    problem = build()
    found = solve(problem, x0)
    constraints = []
    for kind, function, sign in (("eq", problem.equality, 1.0), ("ineq", problem.inequality, -1.0)):
        if function is not None:
            constraints.append(
                {"type": kind, "fun": lambda x, f=function, s=sign: s * f(torch.as_tensor(x)).reshape(-1).numpy()}
            )
    bounds = None if problem.lower is None else scipy.optimize.Bounds(problem.lower, problem.upper or np.inf)
    exact = scipy.optimize.minimize(
        lambda x: float(problem.objective(torch.as_tensor(x))),
        x0,
        method="SLSQP",
        bounds=bounds,
        constraints=constraints,
        options={"ftol": 1e-12, "maxiter": 200},
    )
    np.testing.assert_allclose(found.x.numpy(), exact.x, atol=2e-4)


def large(n: int) -> tuple[ConstrainedProblem, Tensor]:
    """A chain in a box under a sphere, a budget and one inequality for every fourth pair."""
    target = normal(11, n)

    def objective(x: Tensor) -> Tensor:
        chain = 0.5 * ((x[1:] - x[:-1]) ** 2).sum() + 0.1 * torch.cos(x).sum()
        return 0.5 * ((x - target) ** 2).sum() + chain

    problem = ConstrainedProblem(
        objective=objective,
        equality=lambda x: torch.stack([x.sum() - 0.01 * n, (x**2).sum() - 0.2 * n]) / n**0.5,
        inequality=lambda x: x[:-1:4] * x[1::4] - 0.05,
        lower=-1.0,
        upper=1.0,
    )
    return problem, (0.5 * target).clamp(-0.9, 0.9)


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree.leaves(found):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
        return found


def test_twenty_thousand_variables_by_products_in_linear_memory() -> None:
    n = 20_000
    problem, x0 = large(n)
    found = solve(problem, x0)
    assert found.success
    assert found.counts["hessian"] == 0
    assert found.counts["products"] > 0
    fixed = (found.x.abs() == 1).sum()
    assert 100 < int(fixed) < n
    assert int((found.multipliers.inequality > 1e-6).sum()) > 100
    again = constrained.kkt_residual(problem, found.x, *found.multipliers)
    assert again.largest <= 1e-8


def test_no_tensor_grows_faster_than_the_number_of_variables() -> None:
    """Eight probes of the Jacobian are the largest things made."""
    sizes = {}
    for n in (2_000, 4_000):
        problem, x0 = large(n)
        gc.collect()
        with LargestTensor() as watch:
            constrained.solve(problem, AugmentedLagrangian(inner_steps=10), x0, max_steps=2)
        sizes[n] = watch.largest
    assert sizes[2_000] <= 16 * 2_000
    assert sizes[4_000] <= 2 * sizes[2_000]


def test_row_norms_exact_and_estimated() -> None:
    scales = torch.logspace(0, 0.9, 6)
    a = normal(7, 6, 400) * scales[:, None]
    problem = EqualityProblem(lambda x: (x**2).sum(), lambda x: a @ x)
    exact = torch.linalg.vector_norm(a, dim=1)
    x = torch.zeros(400)
    for dense, tolerance in ((True, 1e-12), (False, 0.8)):
        lagrangian = Lagrangian(problem, x, dense=dense)
        found = _row_norms(lagrangian, lagrangian.at(x))
        assert bool(((found / exact).log().abs() <= tolerance).all())
    zero = EqualityProblem(lambda x: (x**2).sum(), lambda x: torch.stack([100 * x[0], x[1] ** 2]))
    lagrangian = Lagrangian(zero, torch.zeros(2))
    assert _row_norms(lagrangian, lagrangian.at(torch.zeros(2))).tolist() == [100.0, 10.0]


def test_penalties_follow_the_units_of_the_constraints() -> None:
    """The same constraint in other units: the same steps."""

    def scaled(unit: float) -> Solution:
        problem = EqualityProblem(lambda x: ((x - 2) ** 2).sum(), lambda x: unit * (x.sum() - 1 + x[0] ** 2))
        return solve(problem, [0.3, 0.4], max_steps=3)

    one, thousand = scaled(1.0), scaled(1e3)
    torch.testing.assert_close(one.x, thousand.x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one.multipliers.equality, 1e3 * thousand.multipliers.equality, rtol=1e-8, atol=0)
    assert one.history[0]["penalty"] == pytest.approx(1e6 * thousand.history[0]["penalty"])


STATUSES: dict[str, tuple[ConstrainedProblem | EqualityProblem, list[float], Status]] = {
    "no real solution": (EqualityProblem(lambda x: x.sum(), lambda x: (x**2).sum() + 1), [1.0, 2.0], Status.INFEASIBLE),
    "contradiction": (
        ConstrainedProblem(objective=lambda x: (x**2).sum(), inequality=lambda x: torch.stack([x[0] - 1, 2 - x[0]])),
        [0.0, 0.0],
        Status.INFEASIBLE,
    ),
    "out of bounds": (
        ConstrainedProblem(objective=lambda x: x[1], equality=lambda x: x[0] - 3, upper=2.0, lower=-1.0),
        [0.0, 0.0],
        Status.INFEASIBLE,
    ),
    "contradiction, unbounded": (
        ConstrainedProblem(objective=lambda x: x.sum(), inequality=lambda x: torch.stack([x[0] - 1, 2 - x[0]])),
        [0.0, 0.0],
        Status.INFEASIBLE,
    ),
    "linear": (EqualityProblem(lambda x: -x[0], lambda x: x[1] - 1), [0.0, 0.0], Status.UNBOUNDED),
    "concave": (EqualityProblem(lambda x: -(x**2).sum(), lambda x: x[1] - x[0]), [1.0, 0.0], Status.UNBOUNDED),
    "half-line": (ConstrainedProblem(objective=lambda x: x.sum(), upper=0.0), [-1.0, 0.0], Status.UNBOUNDED),
    "kink": (EqualityProblem(lambda x: x.abs().sum(), lambda x: x[0] + 2 * x[1] - 4), [3.0, 1.0], Status.STALLED),
}


@pytest.mark.parametrize("name", STATUSES)
def test_failures_have_a_true_name_and_the_best_point(name: str) -> None:
    problem, x0, status = STATUSES[name]
    found = solve(problem, x0, raise_on_failure=False)
    assert found.status is status
    assert bool(torch.isfinite(found.x).all())
    feasibility = found.residual.feasibility
    if status is Status.INFEASIBLE:  # a stationary point of the violation
        lagrangian = Lagrangian(problem, found.x)
        point = lagrangian.at(found.x)
        force = point.jacobian.T @ torch.cat([point.equality, point.inequality.clamp(min=0)])
        stays = torch.clamp(found.x - force, lagrangian.lower, lagrangian.upper) - found.x
        assert float(stays.abs().amax()) <= 1e-6
        assert feasibility > 0.4
    if status is Status.UNBOUNDED:
        assert found.fun < -1e9
        assert feasibility <= 1e-10 * float(found.x.abs().amax())
    if status.is_failure:
        with pytest.raises(SolveError, match=status.name):
            solve(problem, x0)


def test_what_only_looks_unbounded_or_infeasible_is_solved() -> None:
    """L_rho has no minimum at first: log x <= 5; a double root; dependent constraints; x^3 falls beside the circle."""
    flat = ConstrainedProblem(objective=lambda x: -x[0], inequality=lambda x: torch.log(x[:1]) - 5, lower=1e-3)
    assert solve(flat, [1.0]).x.tolist() == pytest.approx([math.exp(5)], rel=1e-6)
    double = solve(EqualityProblem(lambda x: x[0], lambda x: x[0] ** 2), [1.0])
    assert double.status is Status.CONVERGED
    assert abs(float(double.x)) < 1e-3
    dependent = solve(
        EqualityProblem(lambda x: (x**2).sum(), lambda x: torch.stack([x.sum() - 1, 2 * x.sum() - 2])), [3.0, 1.0]
    )
    torch.testing.assert_close(dependent.x, torch.tensor([0.5, 0.5]), atol=1e-7, rtol=0)
    cubic = solve(EqualityProblem(lambda x: x[0] ** 3 + x[1], lambda x: (x**2).sum() - 1), [0.6, 0.5])
    assert cubic.success


def test_a_start_outside_the_bounds_is_moved_inside() -> None:
    seen: list[Tensor] = []

    def objective(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return torch.sqrt(x).sum() + ((x - 2) ** 2).sum()

    problem = ConstrainedProblem(objective=objective, lower=0.5, upper=1.0)
    found = solve(problem, [3.0, 0.7])
    assert found.success
    assert all(bool(((x >= 0.5) & (x <= 1.0)).all()) for x in seen[1:]), "only the check looks at the start itself"
    torch.testing.assert_close(found.x, torch.ones(2))


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e5])
def test_steep_functions_in_a_narrow_box(size: float) -> None:
    """The projected gradient is never longer than the box, whatever the size of f."""
    problem = ConstrainedProblem(
        objective=lambda x: -size * torch.log(x + torch.tensor([0.03, 0.1, 0.2])).sum(),
        equality=lambda x: x.sum() - 1,
        lower=0.0,
        upper=0.4,
    )
    found = solve(problem, [0.3, 0.3, 0.3], atol=1e-10)
    assert found.success
    torch.testing.assert_close(found.x, torch.tensor([0.4, 0.35, 0.25]), atol=1e-5 if size < 1 else 1e-7, rtol=0)
    assert float(found.multipliers.upper[0]) == pytest.approx(size * (1 / 0.43 - 1 / 0.45), rel=1e-3)


def test_multipliers_given_shorten_the_run() -> None:
    problem, x0, _ = hs71(), [1.0, 5, 5, 1], None
    first = solve(problem, x0)
    moved = first.x + 1e-3
    warm, cold = solve(problem, moved, multipliers=first.multipliers), solve(problem, moved)
    assert warm.success
    assert warm.steps < cold.steps


def test_unfinished_minimizations_go_on_in_the_next_step() -> None:
    """One evaluation per step: multipliers and penalty wait until the minimization is finished."""
    whole, pieces = solve(hs43(), [0.0] * 4), solve(hs43(), [0.0] * 4, AugmentedLagrangian(inner_steps=1))
    assert whole.success
    assert pieces.success
    assert pieces.steps > 2 * whole.steps
    torch.testing.assert_close(pieces.x, whole.x, atol=1e-7, rtol=0)
    assert {row["inner_steps"] for row in pieces.history} <= {0.0, 1.0}


def test_history_and_settings() -> None:
    found = solve(hs43(), [0.0] * 4, AugmentedLagrangian(penalty=3.0, growth=4.0))
    assert found.success
    assert found.method.penalty == 3.0
    assert set(found.history[0]) == {
        *("step", "seconds", "objective", "residual", "stationarity", "feasibility", "complementarity"),
        *("penalty", "inner_steps"),
    }
    assert found.history[-1]["residual"] == found.residual.largest


@pytest.mark.parametrize(
    "wrong",
    [
        {"penalty": 0.0},
        {"penalty": -1.0},
        {"growth": 1.0},
        {"reduction": 0.0},
        {"reduction": 1.0},
        {"inner_steps": 0},
        {"inner_steps": 2.5},
        {"max_multiplier": 0.0},
        {"atol": -1.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        AugmentedLagrangian(**wrong)


def test_the_safeguard_clips_multipliers_inside_but_not_in_the_solution() -> None:
    problem = EqualityProblem(lambda x: 50 * x[0] + x[1] ** 2, lambda x: x[0] - 1)
    found = solve(problem, [0.0, 3.0], AugmentedLagrangian(max_multiplier=1.0, penalty=1.0), raise_on_failure=False)
    assert found.success
    assert float(found.multipliers.equality) == pytest.approx(-50, rel=1e-6)
    assert max(row["penalty"] for row in found.history) >= 1e6, "a quadratic penalty does what the multiplier may not"


def test_wide_boxes_and_deep_wells_are_not_unbounded() -> None:
    for upper in (1e11, 1e13, 1e18):
        wide = ConstrainedProblem(objective=lambda x: -x.sum(), lower=0.0, upper=upper)
        assert solve(wide, [0.0, 0.0]).x.tolist() == [upper, upper]
    well = ConstrainedProblem(objective=lambda x: (1e-12 * x**4 - x**2).sum())
    assert solve(well, [1e-3]).fun == pytest.approx(-2.5e11)


def test_large_units_of_x_do_not_make_a_feasible_problem_infeasible() -> None:
    """Example of Waechter and Biegler (2000) in units of 1e8, where J^T r is small everywhere."""
    unit = 1e8

    def rows(x: Tensor) -> Tensor:
        u = x / unit
        return torch.stack([u[0] ** 2 - u[1] - 1, u[0] - u[2] - 0.5])

    problem = ConstrainedProblem(objective=lambda x: x[0] / unit, equality=rows, lower=torch.tensor([-INF, 0.0, 0.0]))
    found = solve(problem, [-2 * unit, 3 * unit, unit], raise_on_failure=False)
    assert found.status is not Status.INFEASIBLE, found.message
    # The part alone: at the start the slope of the squared violation is below 1e-6 of the violation, and no minimum.
    x = unit * torch.tensor([-2.0, 3.0, 1.0])
    lagrangian = Lagrangian(problem, x)
    method = AugmentedLagrangian(atol=1e-8, inner_steps=1)
    point, stationary = method._restore(lagrangian, lagrangian.at(x))
    assert float(point.constraints.abs().max()) > 0.1 and not stationary


@pytest.mark.parametrize(
    ("objective", "inequality", "expected"),
    [
        (lambda x: (x - x.log()).sum(), None, 1.0),
        (lambda x: (x**2).sum(), lambda x: 1 - x.sqrt().sum(), 0.25),
    ],
)
def test_a_start_where_the_bound_has_no_derivatives_moves_inside(
    objective: Any, inequality: Any, expected: float
) -> None:
    """The logarithm has no value at zero, the root no slope; x = 0 and points below it are starts all the same."""
    problem = ConstrainedProblem(objective=objective, inequality=inequality, lower=0.0)
    found = solve(problem, [0.0, 0.0])
    torch.testing.assert_close(found.x, torch.full((2,), expected), rtol=0, atol=1e-6)
