"""Gradient-regularized Newton against its own closed forms, a plain reimplementation, scipy and the lower level of a
bilevel problem."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import bilevel
import implicit
from implicit import CG, Cholesky, Dense, GaussNewton, GradientRegularizedNewton, NewtonCG, Status, minimize, tree
from implicit.minimizers import Evaluation, graph_objective
from implicit.minimizers.gradient_regularized_newton import DENSE_SIZE, RegularizedState
from implicit.tree import Tree
from tests.dense import normal, relative, setting_of
from tests.test_minimizers import Counted, gradient_norm, rosenbrock

EPS = torch.finfo(torch.float64).eps


def run(fn, y0: Tensor, method: GradientRegularizedNewton) -> tuple[RegularizedState, Status]:
    return method.run(graph_objective(lambda _, y: fn(y), (), y0), y0)


def residuals(y: Tensor) -> Tensor:
    """Rosenbrock as half a sum of squares."""
    return torch.cat([10 * (y[1:] - y[:-1] ** 2), 1 - y[:-1]])


def half_squares(y: Tensor) -> Tensor:
    return 0.5 * (residuals(y) ** 2).sum()


def gauss_newton(x: Tree, y: Tensor) -> GaussNewton:
    return GaussNewton(residuals, lambda r: 0.5 * (r**2).sum(), y)


ROWS = normal(1, 200, 10)
CLEAN = torch.sign(ROWS @ normal(2, 10))
NOISY = torch.sign(ROWS @ normal(2, 10) + 2 * normal(3, 200))


def logistic(labels: Tensor):
    return lambda y: torch.nn.functional.softplus(-labels * (ROWS @ y)).mean()


def fisher_of(labels: Tensor):
    def fisher(x: Tree, y: Tensor) -> Dense:
        scores = ROWS * torch.sigmoid(-labels * (ROWS @ y))[:, None]
        return Dense(scores.T @ scores / len(labels))

    return fisher


# The method itself.


def plain(fn, y: Tensor, steps: int, *, acceptance: str) -> list[tuple[Tensor, float]]:
    """The published rule in a dozen lines of dense algebra."""
    gamma, path = 1.0, []
    for _ in range(steps):
        g, hessian = torch.func.grad(fn)(y), torch.func.hessian(fn)(y)
        while True:
            lam = float(g.norm()) / gamma
            new = y - torch.linalg.solve(hessian + lam * torch.eye(len(y)), g)
            after = torch.func.grad(fn)(new)
            if acceptance == "value":
                good = float(fn(y) - fn(new)) >= float(after @ after) / (8 * lam)
            else:
                good = float(after @ (y - new)) >= float(after @ after) / (4 * lam)
            if good:
                break
            gamma /= 2
        y, gamma = new, 2 * gamma
        path.append((y, gamma))
    return path


@pytest.mark.parametrize("acceptance", ["value", "gradient"])
@pytest.mark.parametrize("solver", [None, Cholesky(), CG(rtol=1e-12)], ids=["default", "Cholesky", "CG"])
@pytest.mark.parametrize("name", ["logistic", "cubic", "cosh"])
def test_every_step_is_that_of_the_published_rule(name: str, solver, acceptance: str) -> None:
    fn, y0 = {
        "logistic": (logistic(CLEAN), torch.zeros(10)),
        "cubic": (lambda y: y.norm() ** 3, torch.tensor([1.0, 2.0, 3.0])),
        "cosh": (lambda y: torch.cosh(y).sum(), torch.tensor([12.0, -5.0, 3.0])),
    }[name]
    method = GradientRegularizedNewton(acceptance=acceptance, linear_solver=solver)
    objective = graph_objective(lambda _, y: fn(y), (), y0)
    state = method.init(objective, y0)
    rejected = 0
    for step, (y, gamma) in enumerate(plain(fn, y0, 12, acceptance=acceptance)):
        solves = state.solves
        values = method.step(objective, state)
        assert relative(state.point, y) < 1e-7
        assert state.gamma == values["gamma"] == gamma
        assert values["value"] == float(fn(state.point))
        assert float(values["gradient_norm"]) == pytest.approx(gradient_norm(fn, state.point), rel=1e-12)
        rejected += state.solves - solves - 1
        assert not state.stalled, step
    assert rejected > 0


def test_a_quadratic_doubles_gamma_and_converges_superlinearly() -> None:
    """g_i shrinks by lambda / (h_i + lambda), lambda = |g| / 2^k: no rejection, one solve a step."""
    curvature, b = torch.logspace(0, 3, 30), normal(4, 30)
    g, gamma, norms = -b, 1.0, []
    for _ in range(5):
        lam = float(g.norm()) / gamma
        g, gamma = g * lam / (curvature + lam), 2 * gamma
        norms.append(float(g.norm()))
    ratios = [b / a for a, b in itertools.pairwise(norms)]
    assert ratios == sorted(ratios, reverse=True)
    method = GradientRegularizedNewton()
    objective = graph_objective(lambda _, y: 0.5 * (curvature * y**2).sum() - b @ y, (), b)
    state = method.init(objective, torch.zeros(30))
    for k, norm in enumerate(norms):
        method.step(objective, state)
        assert float(state.gradient.norm()) == pytest.approx(norm, rel=1e-6)
        assert (state.gamma, state.solves, state.evaluations) == (2.0 ** (k + 1), k + 1, k + 2)
    found = minimize(lambda y: 0.5 * (curvature * y**2).sum() - b @ y, torch.zeros(30), method)
    assert found.status is Status.CONVERGED
    assert found.steps <= 7
    torch.testing.assert_close(found.point, b / curvature, rtol=1e-10, atol=0)


def test_the_cubed_norm_contracts_as_its_closed_form() -> None:
    """grad = 3 r y, Hessian along y is 6 r: y+ = y (1 - 3 r / (6 r + 3 r^2 / gamma))."""
    y = torch.tensor([1.0, 2.0, 3.0])
    r = float(y.norm())
    method = GradientRegularizedNewton(gamma=0.5)
    objective = graph_objective(lambda _, q: q.norm() ** 3, (), y)
    state = method.init(objective, y)
    method.step(objective, state)
    assert state.solves == 1
    torch.testing.assert_close(state.point, y * (1 - 3 * r / (6 * r + 3 * r**2 / 0.5)))
    state, status = run(lambda q: q.norm() ** 3, y, GradientRegularizedNewton(rtol=1e-12))
    assert status is Status.CONVERGED
    assert float(state.point.norm()) < 1e-5
    assert state.step <= 30


@pytest.mark.parametrize("acceptance", ["value", "gradient"])
@pytest.mark.parametrize(("labels", "limit"), [(NOISY, 12), (CLEAN, 30)], ids=["noisy", "separable"])
def test_logistic_regression_with_the_hessian(labels: Tensor, limit: int, acceptance: str) -> None:
    fn = Counted(logistic(labels))
    found = minimize(fn, torch.zeros(10), GradientRegularizedNewton(rtol=0.0, atol=1e-9, acceptance=acceptance))
    assert found.status is Status.CONVERGED
    assert found.gradient_norm <= 1e-9
    assert found.steps <= limit
    assert found.evaluations == fn.calls <= 2 * found.steps + 2  # one rejection a step, on average


def test_logistic_regression_with_the_empirical_fisher() -> None:
    """A good surrogate where the labels are noisy, and a poor one where they are separable."""
    noisy = GradientRegularizedNewton(rtol=0.0, atol=1e-8, curvature=fisher_of(NOISY))
    found = minimize(logistic(NOISY), torch.zeros(10), noisy)
    assert found.status is Status.CONVERGED
    assert found.steps <= 40
    exact = minimize(logistic(NOISY), torch.zeros(10), NewtonCG())
    assert relative(found.point, exact.point) < 1e-5
    clean = GradientRegularizedNewton(rtol=0.0, atol=1e-8, curvature=fisher_of(CLEAN), max_steps=200)
    found = minimize(logistic(CLEAN), torch.zeros(10), clean)
    assert found.status is Status.STEP_LIMIT
    assert found.gradient_norm < 2e-3


@pytest.mark.parametrize("solver", [None, CG()], ids=["default", "CG"])
def test_rosenbrock_with_gauss_newton(solver) -> None:
    """The published count for four variables is 39 steps and 78 solves."""
    y0 = torch.full((4,), -1.0)
    state, status = run(half_squares, y0, GradientRegularizedNewton(curvature=gauss_newton, linear_solver=solver))
    assert status is Status.CONVERGED
    torch.testing.assert_close(state.point, torch.ones(4), rtol=0, atol=1e-9)
    assert 20 <= state.step <= 50
    assert state.solves <= 2.2 * state.step


def test_nonconvex_functions_with_the_hessian() -> None:
    """Where the Hessian is indefinite it is shifted: a saddle is left behind."""

    def double_well(y: Tensor) -> Tensor:
        return 0.25 * (y**4).sum() - 0.5 * (y**2).sum() + 0.1 * y[0] * y[1]

    for solver in (None, Cholesky(), CG()):
        method = GradientRegularizedNewton(linear_solver=solver)
        found = minimize(double_well, torch.tensor([0.01, -0.02, 0.005]), method)
        assert found.status is Status.CONVERGED
        assert float(torch.linalg.eigvalsh(torch.func.hessian(double_well)(found.point)).min()) > 0.5
        assert found.steps <= 25
        found = minimize(rosenbrock, torch.tensor([-1.2, 1.0]), method)
        torch.testing.assert_close(found.point, torch.ones(2), rtol=0, atol=1e-9)
        assert found.steps <= 60


def test_the_shift_is_twice_the_lowest_curvature_and_only_where_it_is_needed() -> None:
    matrix = torch.tensor([-3.0, 1.0, 2.0])
    seen = []

    class Watching(Cholesky):
        def init(self, operator):
            seen.append(float(operator.to_dense()[0, 0]) + 3.0)
            return super().init(operator)

    y0 = torch.tensor([0.1, 1.0, 1.0])

    def fn(y: Tensor) -> Tensor:
        return 0.5 * (matrix * y**2).sum() + (y**4).sum()

    norm = gradient_norm(fn, y0)
    hessian = torch.func.hessian(fn)(y0)
    method = GradientRegularizedNewton(gamma=10.0, linear_solver=Watching())
    objective = graph_objective(lambda _, y: fn(y), (), y0)
    method.step(objective, method.init(objective, y0))
    lowest = float(hessian[0, 0])
    assert seen[0] == pytest.approx(lowest + 3.0 + norm / 10.0)
    assert seen[1] == pytest.approx(lowest + 3.0 + norm / 10.0 - 2 * lowest)
    seen.clear()
    method = GradientRegularizedNewton(gamma=norm / 5.0, linear_solver=Watching())  # lambda = 5 outweighs -3
    method.step(objective, method.init(objective, y0))
    assert seen[0] == pytest.approx(lowest + 3.0 + 5.0)
    assert all(a < 20.0 for a in seen)
    assert len(seen) <= 3


# Rounding.


@pytest.mark.parametrize("acceptance", ["value", "gradient"])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e6])
def test_rounding_ends_the_run_after_a_few_solves(offset: float, acceptance: str) -> None:
    """The test on values alone burns over a thousand solves there."""
    fn = logistic(NOISY)
    method = GradientRegularizedNewton(rtol=0.0, acceptance=acceptance)
    state, status = run(lambda y: fn(y) + offset, torch.zeros(10), method)
    assert status is Status.STALLED
    assert state.solves <= 40
    exact = minimize(fn, torch.zeros(10), NewtonCG()).point
    assert relative(state.point, exact) < 1e-8
    assert math.isfinite(state.value)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e6])
def test_a_tolerance_within_reach_is_reached_however_large_the_value(offset: float) -> None:
    fn = logistic(NOISY)
    found = minimize(lambda y: fn(y) + offset, torch.zeros(10), GradientRegularizedNewton(rtol=1e-11))
    assert found.status is Status.CONVERGED
    assert found.steps <= 10


def test_float32() -> None:
    found = minimize(
        lambda y: torch.cosh(y - 1.0).sum(), torch.zeros(5, dtype=torch.float32), GradientRegularizedNewton(rtol=1e-6)
    )
    assert found.status is Status.CONVERGED
    assert found.point.dtype == torch.float32
    stalled = minimize(
        lambda y: torch.cosh(y - 1.0).sum() + 1e3,
        torch.zeros(5, dtype=torch.float32),
        GradientRegularizedNewton(rtol=0.0),
    )
    assert stalled.status in (Status.STALLED, Status.CONVERGED)
    assert stalled.evaluations < 60


def test_exhausted_trials_keep_the_point() -> None:
    """A surrogate without any curvature predicts nothing: steps of length gamma along -g of a steep quartic."""
    method = GradientRegularizedNewton(
        curvature=lambda x, y: Dense(torch.zeros(2, 2)), gamma=1e4, max_trials=3, linear_solver=Cholesky()
    )
    state, status = run(lambda y: (y**4).sum(), torch.tensor([3.0, -2.0]), method)
    assert status is Status.STALLED
    assert torch.equal(state.point, torch.tensor([3.0, -2.0]))
    assert state.value == 97.0
    assert (state.step, state.solves) == (1, 3)
    assert state.gamma == 1e4 / 8
    more = GradientRegularizedNewton(curvature=method.curvature, gamma=1e4, max_trials=40, linear_solver=Cholesky())
    _, status = run(lambda y: (y**4).sum(), torch.tensor([3.0, -2.0]), more)
    assert status is Status.CONVERGED


def test_regions_without_values_are_backed_off_from() -> None:
    def barrier(y: Tensor) -> Tensor:
        return 3 * y[0] - torch.log(y).sum() - torch.log(1 - y.sum())

    found = minimize(barrier, torch.full((5,), 0.01), GradientRegularizedNewton(rtol=1e-12, gamma=1e6))
    assert found.status is Status.CONVERGED
    assert bool((found.point > 0).all()) and float(found.point.sum()) < 1
    assert gradient_norm(barrier, found.point) < 1e-9


# What every minimizer keeps to.


def test_agreement_with_scipy() -> None:
    fn = logistic(NOISY)
    objective = graph_objective(lambda _, y: fn(y) + 5e-3 * y @ y, (), torch.zeros(10))

    def for_scipy(y):
        found = objective(torch.from_numpy(y))
        return found.value, found.gradient.numpy()

    expected = scipy.optimize.minimize(
        for_scipy, np.zeros(10), jac=True, method="L-BFGS-B", options={"gtol": 1e-12, "ftol": 0}
    )
    found = minimize(lambda y: fn(y) + 5e-3 * y @ y, torch.zeros(10), GradientRegularizedNewton())
    assert found.status is Status.CONVERGED
    np.testing.assert_allclose(found.point.numpy(), expected.x, rtol=1e-6)


def test_trees_and_the_callers_memory() -> None:
    target = {"w": normal(5, 2, 3), "parts": [torch.tensor(2.0), torch.zeros(0)]}
    start = tree.zeros_like(target)
    found = minimize(lambda y: torch.cosh(tree.norm(tree.sub(y, target))), tree.axpy(0.5, target, start),
                     GradientRegularizedNewton(rtol=1e-8))  # fmt: skip
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.point, target, rtol=1e-6, atol=1e-6)
    assert float(tree.norm(start)) == 0.0


def test_surrogates_see_trees_and_the_upper_variable() -> None:
    seen = []

    def surrogate(x: Tree, y: Tree) -> Dense:
        seen.append((x, y))
        assert not y["a"].requires_grad
        return Dense(torch.diag(torch.full((3,), float(x))), y)

    x, y0 = torch.tensor(4.0), {"b": torch.ones(1), "a": torch.zeros(2)}
    objective = graph_objective(lambda x, y: 0.5 * x * ((y["a"] - 1) ** 2).sum() + 0.5 * x * (y["b"] ** 2).sum(), x, y0)
    state, status = GradientRegularizedNewton(curvature=surrogate).run(objective, tree.ravel(y0))
    assert status is Status.CONVERGED
    point = tree.unravel(state.point, y0)
    torch.testing.assert_close(point, {"b": torch.zeros(1), "a": torch.ones(2)}, rtol=0, atol=1e-11)
    assert float(seen[0][0]) == 4.0 and list(seen[0][1]) == ["b", "a"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_start_without_a_value_is_nonfinite(bad: float) -> None:
    found = minimize(lambda y: (y**2).sum() * bad, torch.ones(2), GradientRegularizedNewton())
    assert (found.status, found.steps, found.evaluations) == (Status.NONFINITE, 0, 1)


def test_starts_limits_and_references() -> None:
    fn = Counted(lambda y: (y**2).sum())
    found = minimize(fn, torch.zeros(3), GradientRegularizedNewton(rtol=0.0))
    assert (found.status, found.steps, fn.calls) == (Status.CONVERGED, 0, 1)
    objective = graph_objective(lambda _, y: (y**2).sum(), (), torch.zeros(3))
    method = GradientRegularizedNewton()
    assert method.step(objective, method.init(objective, torch.zeros(3)))["gradient_norm"] == 0.0
    limited = minimize(rosenbrock, torch.tensor([-1.2, 1.0]), GradientRegularizedNewton(max_steps=3))
    assert (limited.status, limited.steps) == (Status.STEP_LIMIT, 3)
    assert limited.value < float(rosenbrock(torch.tensor([-1.2, 1.0])))
    _, status = GradientRegularizedNewton(rtol=1e-3).run(objective, torch.full((3,), 1e-6), reference=1.0)
    assert status is Status.CONVERGED


def test_a_loaded_state_goes_on_as_before() -> None:
    method, y0 = GradientRegularizedNewton(), torch.full((4,), -1.0)
    objective = graph_objective(lambda _, y: rosenbrock(y), (), y0)
    straight = method.init(objective, y0)
    for _ in range(10):
        method.step(objective, straight)
    half = method.init(objective, y0)
    for _ in range(5):
        method.step(objective, half)
    loaded = method.init(objective, torch.zeros(4))
    loaded.load_state_dict(half.state_dict())
    assert loaded.extra is None
    for _ in range(5):
        method.step(objective, loaded)
    assert torch.equal(loaded.point, straight.point)
    assert (loaded.gamma, loaded.solves) == (straight.gamma, straight.solves)


def test_products_are_counted_and_large_problems_go_matrix_free() -> None:
    small = torch.linspace(1.0, 2.0, 20)
    state, _ = run(lambda y: 0.5 * (small * y**2).sum() - y.sum(), torch.zeros(20), GradientRegularizedNewton())
    assert state.products == 20 * state.step
    n = DENSE_SIZE + 1
    large = torch.linspace(1.0, 2.0, n)
    state, status = run(lambda y: 0.5 * (large * y**2).sum() - y.sum(), torch.zeros(n), GradientRegularizedNewton())
    assert status is Status.CONVERGED
    assert state.products < n
    torch.testing.assert_close(state.point, 1 / large, rtol=1e-10, atol=0)


def test_a_given_solver_gets_the_operator_itself() -> None:
    two = torch.tensor([1.0] * 20 + [2.0] * 20)
    method = GradientRegularizedNewton(linear_solver=CG(rtol=1e-10))
    state, status = run(lambda y: 0.5 * (two * y**2).sum() - y.sum(), torch.zeros(40), method)
    assert status is Status.CONVERGED
    assert state.products <= 4 * state.solves  # two eigenvalues, two directions; 40 columns if the matrix were formed


def test_conjugate_gradients_are_tightened_on_the_way() -> None:
    """A fixed relative residual of 0.1 gains one digit a step and would need twelve."""
    n = DENSE_SIZE + 1
    curvature, b = torch.linspace(1.0, 50.0, n), normal(6, n)
    state, status = run(
        lambda y: 0.5 * (curvature * y**2).sum() + 0.1 * torch.cosh(y).sum() - b @ y,
        torch.zeros(n),
        GradientRegularizedNewton(rtol=1e-12),
    )
    assert status is Status.CONVERGED
    assert state.step <= 9


def test_the_radius_stays_between_its_limits() -> None:
    objective = graph_objective(lambda _, y: 0.5 * (y**2).sum(), (), torch.zeros(2))  # every trial is accepted
    for gamma, low, expected in ((1e-3, 10.0, 10.0), (1e-3, 1e-8, 2e-3), (9e99, 1e-8, 1e100)):
        method = GradientRegularizedNewton(gamma=gamma, gamma_min=low)
        state = method.init(objective, torch.ones(2))
        method.step(objective, state)
        assert (state.solves, state.gamma) == (1, expected)


# As the lower solver of a bilevel problem.


def test_it_solves_lower_levels() -> None:
    setting = setting_of("ridge")
    problem = bilevel.BilevelProblem(setting.upper, setting.lower)
    method = bilevel.ImplicitGradient(lower_solver=GradientRegularizedNewton())
    found = bilevel.solve(problem, method, setting.x, tree.zeros_like(setting.y), max_steps=60)
    expected = bilevel.solve(problem, bilevel.ImplicitGradient(), setting.x, setting.y, max_steps=60)
    assert found.upper_value == pytest.approx(expected.upper_value, rel=1e-7)
    assert found.accuracy.lower_residual < 1e-9


# Misuse.


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"curvature": "fisher"}, TypeError, "curvature must be 'exact' or a function"),
        ({"acceptance": "armijo"}, ValueError, "acceptance must be 'value' or 'gradient', got 'armijo'"),
        ({"gamma": 0.0}, ValueError, "gamma must be positive and finite, got 0.0"),
        ({"gamma_min": math.inf}, ValueError, "gamma_min must be positive and finite, got inf"),
        ({"max_trials": 0}, ValueError, "max_trials must be a positive integer, got 0"),
        ({"linear_solver": "cg"}, TypeError, r"linear_solver must be a LinearSolver such as CG\(\), got 'cg'"),
        ({"rtol": -1.0}, ValueError, "rtol and atol must be >= 0"),
    ],
)
def test_settings_are_validated(options, error, text) -> None:
    with pytest.raises(error, match=text):
        GradientRegularizedNewton(**options)


def test_misused_objectives_and_surrogates_are_named() -> None:
    with pytest.raises(TypeError, match="whose evaluations carry a GradientGraph"):
        GradientRegularizedNewton().run(lambda y: Evaluation(0.0, torch.ones(2)), torch.zeros(2))
    with pytest.raises(TypeError, match="must return a LinearOperator, got Tensor"):
        minimize(lambda y: (y**2).sum(), torch.ones(2), GradientRegularizedNewton(curvature=lambda x, y: torch.eye(2)))
    assert implicit.GradientRegularizedNewton is GradientRegularizedNewton
