"""Minimizers and their line search against scipy, cvxpy and dense algebra, with their evaluations counted."""

import math

import cvxpy
import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from implicit import CG, LBFGS, Jacobi, NewtonCG, SpectralProjectedGradient, Status, minimize, tree
from implicit.minimizers import Evaluation, ProjectedObjective, gradient_objective, graph_objective
from implicit.minimizers.line_search import ARMIJO, CURVATURE, wolfe_search

BOTH = pytest.mark.parametrize("cls", [LBFGS, NewtonCG])
EPS = torch.finfo(torch.float64).eps


def vector(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spd(n: int, condition: float) -> Tensor:
    q, _ = torch.linalg.qr(vector(n, n, seed=0))
    matrix = (q * torch.logspace(0, math.log10(condition), n)) @ q.T
    return 0.5 * (matrix + matrix.T)


def quadratic(n: int, condition: float, offset: float = 0.0):
    matrix, b = spd(n, condition), vector(n)
    return (lambda y: 0.5 * y @ (matrix @ y) - b @ y + offset), torch.linalg.solve(matrix, b), matrix


def rosenbrock(y: Tensor) -> Tensor:
    return (100 * (y[1:] - y[:-1] ** 2) ** 2 + (1 - y[:-1]) ** 2).sum()


class Counted:
    """A function that counts its calls."""

    def __init__(self, fn):
        self.fn, self.calls = fn, 0

    def __call__(self, y):
        self.calls += 1
        return self.fn(y)


def gradient_norm(fn, y) -> float:
    return float(tree.norm(torch.func.grad(fn)(y)))


# ---------------------------------------------------------------- smooth problems


@BOTH
@pytest.mark.parametrize(("n", "limit"), [(2, 100), (20, 180)])
def test_rosenbrock(cls, n, limit) -> None:
    start = torch.full((n,), -1.0)
    start[0] = -1.2
    fn = Counted(rosenbrock)
    found = minimize(fn, start, cls(rtol=1e-12))
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.point, torch.ones(n), rtol=0, atol=1e-9)
    assert found.gradient_norm == pytest.approx(gradient_norm(rosenbrock, found.point), rel=1e-9, abs=1e-15)
    assert found.gradient_norm <= 1e-12 * gradient_norm(rosenbrock, start)
    assert found.evaluations == fn.calls <= limit
    assert found.value == float(rosenbrock(found.point))


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
def test_newton_on_ill_conditioned_quadratics(condition) -> None:
    fn, solution, matrix = quadratic(40, condition)
    found = minimize(fn, torch.zeros(40), NewtonCG(rtol=1e-9))
    assert found.status is Status.CONVERGED
    assert found.evaluations <= 12
    assert float((matrix @ (found.point - solution)).norm()) <= 2e-9 * gradient_norm(fn, torch.zeros(40))


@pytest.mark.parametrize(("condition", "rtol"), [(1e1, 1e-12), (1e3, 1e-12), (1e4, 1e-12), (1e5, 1e-9)])
def test_lbfgs_on_ill_conditioned_quadratics(condition, rtol) -> None:
    fn, solution, _ = quadratic(30, condition)
    found = minimize(fn, torch.zeros(30), LBFGS(rtol=rtol, max_steps=20_000))
    assert found.status is Status.CONVERGED
    assert float((found.point - solution).norm() / solution.norm()) <= 10 * rtol * condition
    assert found.evaluations <= 1.2 * found.steps + 10


@BOTH
def test_a_quadratic_in_one_newton_step(cls) -> None:
    found = minimize(lambda y: 0.5 * (y - 3.0) @ (y - 3.0), torch.zeros(4), cls())
    assert found.status is Status.CONVERGED
    assert found.steps <= 2
    torch.testing.assert_close(found.point, torch.full((4,), 3.0))


@BOTH
@pytest.mark.parametrize("start", [20.0, 350.0])
def test_cosh_from_far_away(cls, start) -> None:
    y0 = torch.tensor([start, -start / 2, 3.0])
    found = minimize(lambda y: torch.cosh(y).sum(), y0, cls(rtol=0.0, atol=1e-10, max_steps=3000))
    assert found.status is Status.CONVERGED
    assert float(found.point.abs().max()) <= 1e-10
    assert found.evaluations < 40 + 4 * start


@BOTH
def test_logistic_regression_agrees_with_scipy(cls) -> None:
    features = vector(200, 8, seed=2)
    labels = torch.sign(features @ vector(8, seed=3) + vector(200, seed=4))

    def loss(y):
        return torch.nn.functional.softplus(-labels * (features @ y)).mean() + 5e-3 * y @ y

    objective = gradient_objective(loss, torch.zeros(8))

    def for_scipy(y):
        found = objective(torch.from_numpy(y))
        return found.value, found.gradient.numpy()

    expected = scipy.optimize.minimize(
        for_scipy, np.zeros(8), jac=True, method="L-BFGS-B", options={"gtol": 1e-12, "ftol": 0}
    )
    found = minimize(loss, torch.zeros(8), cls(rtol=1e-12))
    assert found.status is Status.CONVERGED
    np.testing.assert_allclose(found.point.numpy(), expected.x, rtol=1e-6)
    assert found.value <= expected.fun + 1e-15
    assert found.evaluations <= 2 * expected.nfev


@BOTH
def test_negative_curvature_leads_to_a_minimum_and_not_to_the_saddle(cls) -> None:
    def fn(y):
        return 0.25 * (y**4).sum() - 0.5 * (y**2).sum() + 0.1 * y[0] * y[1]

    found = minimize(fn, torch.tensor([0.01, -0.02, 0.005]), cls(rtol=1e-10))
    assert found.status is Status.CONVERGED
    assert float(torch.linalg.eigvalsh(torch.func.hessian(fn)(found.point)).min()) > 0.5
    assert found.value < -0.7


@BOTH
def test_flat_minima_of_quartics(cls) -> None:
    found = minimize(lambda y: (y**4).sum(), torch.ones(3), cls(rtol=1e-12))
    assert found.status is Status.CONVERGED
    assert float(found.point.abs().max()) < 1e-3
    tiny = minimize(lambda y: (y**4).sum(), torch.ones(3), cls(rtol=0.0, max_steps=1000))
    assert tiny.status in (Status.CONVERGED, Status.STALLED, Status.STEP_LIMIT)
    assert tiny.gradient_norm < 1e-90


@BOTH
def test_regions_without_values_are_backed_off_from(cls) -> None:
    def barrier(y):
        return 3 * y[0] - torch.log(y).sum() - torch.log(1 - y.sum())

    found = minimize(barrier, torch.full((5,), 0.01), cls(rtol=1e-12))
    assert found.status is Status.CONVERGED
    assert bool((found.point > 0).all())
    assert float(found.point.sum()) < 1
    assert gradient_norm(barrier, found.point) < 1e-9
    # The minimum sits one ulp-like distance from the wall.
    steep = minimize(lambda y: 1e6 * y[0] - torch.log(y[0]), torch.tensor([5.0]), cls(rtol=1e-12))
    assert float(steep.point[0]) == pytest.approx(1e-6, rel=1e-6)


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_start_without_a_value_is_nonfinite(cls, bad) -> None:
    found = minimize(lambda y: (y**2).sum() * bad, torch.ones(2), cls())
    assert found.status is Status.NONFINITE
    assert (found.steps, found.evaluations) == (0, 1)
    assert torch.equal(found.point, torch.ones(2))


@BOTH
def test_trees_keep_structure_dtype_and_the_callers_memory(cls) -> None:
    target = {"w": vector(2, 3), "parts": [torch.tensor(2.0), torch.zeros(0)]}
    start = tree.zeros_like(target)
    found = minimize(lambda y: 0.5 * tree.dot(tree.sub(y, target), tree.sub(y, target)), start, cls())
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.point, target)
    assert float(tree.norm(start)) == 0.0
    single = minimize(lambda y: ((y - 1) ** 2).sum(), torch.zeros(3, dtype=torch.float32), cls(rtol=1e-6))
    assert single.point.dtype == torch.float32
    torch.testing.assert_close(single.point, torch.ones(3, dtype=torch.float32))
    scalar = minimize(lambda y: torch.exp(y) - 2 * y, torch.tensor(3.0), cls())
    assert scalar.point.shape == ()
    assert float(scalar.point) == pytest.approx(math.log(2.0), abs=1e-12)


@BOTH
def test_exceptions_of_the_objective_reach_the_caller(cls) -> None:
    calls = []

    def fn(y):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("third call")
        return (y**4).sum()

    with pytest.raises(KeyError, match="third call"):
        minimize(fn, torch.ones(2), cls())


# ---------------------------------------------------------------- tolerances and rounding


@BOTH
def test_tolerances_refer_to_the_first_gradient_or_the_given_reference(cls) -> None:
    fn, _, _ = quadratic(20, 100.0)
    start = torch.zeros(20)
    first = gradient_norm(fn, start)
    for scale in (1e-8, 1.0, 1e8):
        found = minimize(lambda y, s=scale: s * fn(y), start, cls(rtol=1e-6))
        assert found.status is Status.CONVERGED
        assert 1e-9 * first < found.gradient_norm / scale <= 1e-6 * first
    absolute = minimize(fn, start, cls(rtol=0.0, atol=1e-3))
    assert 1e-7 < absolute.gradient_norm <= 1e-3
    objective = graph_objective(lambda _, y: fn(y), (), start)
    near = minimize(fn, start, cls(rtol=1e-6)).point
    state, status = cls(rtol=1e-3).run(objective, near, reference=first)
    assert (status, state.step, state.evaluations) == (Status.CONVERGED, 0, 1)
    state, status = cls(rtol=1e-3).run(objective, near)
    assert (status, state.step > 0) == (Status.CONVERGED, True)


@BOTH
def test_starting_at_the_optimum_costs_one_evaluation(cls) -> None:
    fn = Counted(lambda y: (y**2).sum())
    found = minimize(fn, torch.zeros(3), cls(rtol=0.0))
    assert (found.status, found.steps, found.evaluations, fn.calls) == (Status.CONVERGED, 0, 1, 1)
    state = cls().init(graph_objective(lambda _, y: (y**2).sum(), (), torch.zeros(3)), torch.zeros(3))
    values = cls().step(graph_objective(lambda _, y: (y**2).sum(), (), torch.zeros(3)), state)
    assert values["gradient_norm"] == 0.0
    assert torch.equal(state.point, torch.zeros(3))
    constant = minimize(lambda y: torch.tensor(2.0), torch.ones(2), cls())
    assert (constant.status, constant.steps) == (Status.CONVERGED, 0)


@BOTH
def test_step_limit_is_reported(cls) -> None:
    found = minimize(rosenbrock, torch.tensor([-1.2, 1.0]), cls(max_steps=3))
    assert (found.status, found.steps) == (Status.STEP_LIMIT, 3)
    assert found.value < float(rosenbrock(torch.tensor([-1.2, 1.0])))


PLAIN = {
    "quadratic": lambda: (quadratic(30, 1e2)[0], torch.zeros(30)),
    "ill-conditioned": lambda: (quadratic(30, 1e4)[0], torch.zeros(30)),
    "offset": lambda: (quadratic(30, 1e3, offset=1e8)[0], torch.zeros(30)),
    "barrier": lambda: (lambda y: 3 * y[0] - torch.log(y).sum() - torch.log(1 - y.sum()), torch.full((5,), 0.01)),
    "saddle": lambda: (
        lambda y: 0.25 * (y**4).sum() - 0.5 * (y**2).sum() + 0.1 * y[0] * y[1],
        torch.tensor([0.01, -0.02, 0.1]),
    ),
    "exponential": lambda: (lambda y: (torch.exp(y) - math.pi * y).sum(), torch.tensor([3.0, -1.0])),
}


@BOTH
@pytest.mark.parametrize("name", PLAIN)
def test_rounding_is_a_stall_that_costs_few_evaluations(cls, name) -> None:
    fn, start = PLAIN[name]()
    reached = minimize(fn, start, cls(rtol=1e-11, max_steps=5_000))
    assert reached.status is Status.CONVERGED
    counted = Counted(fn)
    found = minimize(counted, start, cls(rtol=0.0, max_steps=100_000))
    assert found.status in (Status.STALLED, Status.CONVERGED)
    assert found.gradient_norm <= 1e-11 * gradient_norm(fn, start)
    assert found.evaluations == counted.calls
    assert counted.calls <= 4 * reached.evaluations + (100 if cls is LBFGS else 25)


@BOTH
def test_float32_stalls_at_its_own_rounding(cls) -> None:
    matrix, b = spd(30, 1e3).float(), vector(30).float()
    fn = Counted(lambda y: 0.5 * y @ (matrix @ y) - b @ y)
    found = minimize(fn, torch.zeros(30, dtype=torch.float32), cls(rtol=1e-12))
    assert found.status is Status.STALLED
    assert found.gradient_norm < 3e-5 * float(b.norm())
    assert fn.calls < 400


def test_a_stalled_state_stays_stalled_and_names_no_convergence() -> None:
    fn, start = PLAIN["barrier"]()
    objective = gradient_objective(fn, start)
    method = LBFGS(rtol=0.0)
    state, status = method.run(objective, start)
    assert status is Status.STALLED
    assert method.terminate(objective, state) is Status.STALLED


def test_newton_needs_graphs_and_reuses_them() -> None:
    fn = Counted(rosenbrock)
    objective = graph_objective(lambda _, y: fn(y), (), torch.zeros(2))
    state, _ = NewtonCG().run(objective, torch.tensor([-1.2, 1.0]))
    assert fn.calls == state.evaluations
    assert state.products > state.step
    assert torch.equal(tree.ravel(state.extra.gradient), state.gradient)
    with pytest.raises(
        TypeError, match="needs an objective whose evaluations carry a GradientGraph; use graph_objective"
    ):
        NewtonCG().run(gradient_objective(rosenbrock, torch.zeros(2)), torch.zeros(2))


def test_newton_with_a_preconditioner_and_a_product_limit() -> None:
    scales = torch.logspace(0, 6, 40)

    def fn(y):
        return 0.5 * (scales * y * y).sum() + 0.25 * (y**4).sum() - y.sum()

    plain = graph_objective(lambda _, y: fn(y), (), torch.zeros(40))
    slow, status = NewtonCG(rtol=1e-10).run(plain, torch.ones(40))
    fast, fast_status = NewtonCG(rtol=1e-10, preconditioner=Jacobi(diagonal=scales)).run(plain, torch.ones(40))
    assert status is fast_status is Status.CONVERGED
    assert fast.products < 0.5 * slow.products
    torch.testing.assert_close(scales * fast.point, scales * slow.point, rtol=0, atol=1e-3)
    few, _ = NewtonCG(max_products=2, max_steps=4).run(plain, torch.ones(40))
    assert few.products <= 4 * (2 + 2)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LBFGS(rtol=-1.0), "rtol and atol must be >= 0, got rtol=-1.0"),
        (lambda: NewtonCG(atol=math.nan), "rtol and atol must be >= 0"),
        (lambda: LBFGS(max_steps=0), "max_steps must be a positive integer, got 0"),
        (lambda: LBFGS(memory=0), "memory must be a positive integer, got 0"),
        (lambda: LBFGS(first_length=0.0), "first_length must be positive or None, got 0.0"),
        (lambda: NewtonCG(max_products=0), "max_products must be a positive integer or None, got 0"),
    ],
)
def test_settings_are_validated(make, text) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_lbfgs_memory_and_first_length() -> None:
    fn, _, _ = quadratic(30, 1e3)
    steps = {m: minimize(fn, torch.zeros(30), LBFGS(rtol=1e-9, memory=m)).steps for m in (1, 40)}
    assert steps[40] < 0.7 * steps[1]
    seen = []

    def spy(y):
        seen.append(y.detach().clone())
        return ((y - 100.0) ** 2).sum()

    minimize(spy, torch.full((4,), 3.0), LBFGS(first_length=0.1))
    assert float((seen[1] - seen[0]).norm()) == pytest.approx(0.1 * (6.0 + 2.0))
    seen.clear()
    minimize(spy, torch.full((4,), 3.0), LBFGS())
    assert float((seen[1] - seen[0]).norm()) == pytest.approx(1.0)


def test_lbfgs_direction_is_that_of_dense_bfgs() -> None:
    """The two-loop recursion against the BFGS formula for the inverse Hessian written out."""
    fn, start = rosenbrock, vector(5)
    objective, method = gradient_objective(fn, start), LBFGS(memory=3)
    state = method.init(objective, start)
    pairs = []
    for _ in range(6):
        before = state.point.clone(), state.gradient.clone()
        method.step(objective, state)
        pairs.append((state.point - before[0], state.gradient - before[1]))
    kept = [p for p in pairs if p[0] @ p[1] > 0][-3:]
    s, y = kept[-1]
    inverse = torch.eye(5) * (s @ y) / (y @ y)
    for s, y in kept:
        rho = 1 / (s @ y)
        left = torch.eye(5) - rho * torch.outer(s, y)
        inverse = left @ inverse @ left.T + rho * torch.outer(s, s)
    torch.testing.assert_close(method._direction(state), -inverse @ state.gradient, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- the line search


def search(fn, point, direction, first=1.0, budget=25):
    calls = []

    def objective(y):
        calls.append(y)
        y = y.detach().requires_grad_()
        value = fn(y)
        return Evaluation(float(value.detach()), torch.autograd.grad(value, y)[0])

    start = objective(point)
    calls.clear()
    slope = float(start.gradient @ direction)
    trial, used = wolfe_search(objective, point, start.value, slope, direction, first, EPS, budget)
    assert used == len(calls)
    return trial, used, start.value, slope


FUNCTIONS = {
    "quadratic": (lambda y: 0.5 * (y[0] ** 2 + 30.0 * y[1] ** 2), [3.0, 1.0]),
    "rosenbrock": (rosenbrock, [-1.2, 1.0]),
    "cosh": (lambda y: torch.cosh(3 * y).sum(), [4.0, -2.0]),
    "wavy": (lambda y: (y**2).sum() + 3 * torch.sin(5 * y).sum(), [4.0, 3.0]),
    "logarithm": (lambda y: torch.log1p((y**2).sum()), [30.0, 1.0]),
    "barrier": (lambda y: 5 * y.sum() - torch.log(y).sum(), [2.0, 3.0]),
    "far": (lambda y: torch.nn.functional.softplus(-y).sum() + 1e-3 * (y**2).sum(), [-50.0, 0.0]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("first", [1e-6, 1e-2, 1.0, 1e2, 1e6])
def test_the_accepted_point_satisfies_the_strong_wolfe_conditions(name, first) -> None:
    fn, start = FUNCTIONS[name]
    point = torch.tensor(start)
    direction = -torch.func.grad(fn)(point)
    trial, used, value, slope = search(fn, point, direction, first)
    assert trial is not None
    assert used <= 22
    there = point + trial.length * direction
    torch.testing.assert_close(trial.point, there)
    assert trial.value == float(fn(there))
    torch.testing.assert_close(trial.evaluation.gradient, torch.func.grad(fn)(there))
    assert trial.slope == pytest.approx(float(torch.func.grad(fn)(there) @ direction), rel=1e-9, abs=1e-12)
    assert trial.value <= value + ARMIJO * trial.length * slope
    assert abs(trial.slope) <= CURVATURE * abs(slope)


def test_a_first_length_that_is_good_is_taken() -> None:
    trial, used, _, _ = search(lambda y: 0.5 * (y * y).sum(), torch.tensor([2.0]), torch.tensor([-2.0]))
    assert (trial.length, used, float(trial.point)) == (1.0, 1, 0.0)


def test_a_quadratic_overshoot_is_repaired_by_one_interpolation() -> None:
    for first in (3.0, 30.0):
        trial, used, _, _ = search(lambda y: 0.5 * (y * y).sum(), torch.tensor([2.0]), torch.tensor([-2.0]), first)
        assert used == 2
        assert trial.length == pytest.approx(1.0, rel=1e-6)


def test_a_small_decrease_over_a_long_step_is_refused() -> None:
    """phi(1) = -1e-5 at slope -1: flat enough, not low enough."""
    trial, used, value, slope = search(
        lambda y: (-y + 1.49998 * y**2 - 0.49999 * y**3).sum(), torch.zeros(1), torch.ones(1)
    )
    assert slope == -1.0
    assert used > 1
    assert trial.value <= value + ARMIJO * trial.length * slope
    assert abs(trial.slope) <= CURVATURE


def test_a_longer_step_that_is_higher_ends_the_extension() -> None:
    """A hump between two trials on a downhill road: the search stays on this side of it."""
    trial, used, _, slope = search(
        lambda y: (-0.99 * y + 3 * torch.sigmoid(10 * (y - 2.5))).sum(), torch.zeros(1), torch.ones(1)
    )
    assert 1.0 < trial.length < 2.5
    assert used <= 9
    assert abs(trial.slope) <= CURVATURE * abs(slope)


def test_lengths_beyond_a_bad_one_are_not_tried_again() -> None:
    lengths = []

    def fn(y):
        lengths.append(float(y.detach()))
        return (-y + 0 * torch.sqrt(1 - y)).sum()

    trial, _, _, _ = search(fn, torch.zeros(1), torch.ones(1), first=64.0)
    bad = math.inf
    for length in lengths[1:]:
        assert length < bad
        bad = min(bad, length) if length > 1.0 else bad
    assert 0.5 < trial.length <= 1.0


def test_no_search_beyond_the_budget_and_the_best_decrease_is_kept() -> None:
    trial, used, value, _ = search(lambda y: -y.sum(), torch.zeros(2), torch.ones(2), budget=6)
    assert used == 6
    assert trial.length == 4.0**5
    assert trial.value < value


def test_a_direction_without_any_finite_value_fails() -> None:
    nowhere, used = wolfe_search(
        lambda y: Evaluation(math.nan, torch.ones(1)), torch.zeros(1), 1.0, -1.0, torch.tensor([-1.0]), 1.0, EPS
    )
    assert nowhere is None
    assert used <= 25


def test_slopes_decide_where_values_are_only_rounding() -> None:
    """f = 1e6 + small: the values are flat to rounding, the gradient is not."""
    point = torch.tensor([1e-6, 1e-6])
    trial, used, _, slope = search(lambda y: 1e6 + (y * y).sum(), point, -2e6 * point, first=1e-6)
    assert trial is not None
    assert used <= 6
    assert abs(trial.slope) <= CURVATURE * abs(slope)
    assert float(trial.point.norm()) < float(point.norm())


def test_hopeless_rounding_is_given_up_early() -> None:
    """A slope of the wrong sign that no length can reduce, on flat values."""
    trial, used = wolfe_search(
        lambda y: Evaluation(1.0, torch.tensor([-1.1e-13])), torch.zeros(1), 1.0, -1e-13, torch.tensor([-1.0]), 1.0, EPS
    )
    assert trial is None
    assert used == 10


def test_lbfgs_restarts_with_the_last_curvature_seen() -> None:
    seen = []

    def spy(y):
        seen.append(y.detach().clone())
        return 500.0 * ((y - 1.0) ** 2).sum()

    objective = gradient_objective(spy, torch.zeros(3))
    state = LBFGS().init(objective, torch.zeros(3))
    LBFGS().step(objective, state)
    assert state.scale == pytest.approx(1e-3)
    state.stored, state.gradient, state.point = 0, torch.full((3,), -1000.0), torch.zeros(3)
    seen.clear()
    LBFGS(first_length=0.1).step(objective, state)
    torch.testing.assert_close(seen[0], torch.ones(3))


# ---------------------------------------------------------------- projected gradient


def project_simplex(v: Tensor) -> Tensor:
    ordered = torch.sort(v, descending=True).values
    excess = (torch.cumsum(ordered, 0) - 1) / torch.arange(1, len(v) + 1)
    return torch.clamp(v - excess[(ordered > excess).nonzero()[-1]], min=0)


def project_box(v: Tensor) -> Tensor:
    return v.clamp(-0.05, 0.1)


@pytest.mark.parametrize("condition", [1e1, 1e3])
@pytest.mark.parametrize("name", ["box", "simplex"])
def test_projected_gradient_agrees_with_cvxpy(condition, name) -> None:
    n = 15
    fn, _, matrix = quadratic(n, condition)
    b, project = vector(n), project_box if name == "box" else project_simplex
    variable = cvxpy.Variable(n)
    sets = [variable >= -0.05, variable <= 0.1] if name == "box" else [variable >= 0, cvxpy.sum(variable) == 1]
    objective = 0.5 * cvxpy.quad_form(variable, cvxpy.psd_wrap(matrix.numpy())) - b.numpy() @ variable
    cvxpy.Problem(cvxpy.Minimize(objective), sets).solve(
        solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    counted = Counted(fn)
    problem = ProjectedObjective(gradient_objective(counted, torch.zeros(n)), project)
    state, status = SpectralProjectedGradient(rtol=1e-11).run(problem, vector(n, seed=9))
    assert status is Status.CONVERGED
    assert torch.equal(project(state.point), state.point) or name == "simplex"
    torch.testing.assert_close(project(state.point), state.point, rtol=0, atol=1e-15)
    np.testing.assert_allclose(state.point.numpy(), variable.value, atol=2e-6)
    residual = state.point - project(state.point - state.gradient)
    assert float(residual.norm()) <= state.tolerance
    assert counted.calls == state.evaluations <= 60 * condition**0.5


def test_projected_gradient_without_a_set_minimizes_rosenbrock() -> None:
    problem = ProjectedObjective(gradient_objective(rosenbrock, torch.zeros(2)), lambda v: v)
    state, status = SpectralProjectedGradient(rtol=1e-10).run(problem, torch.tensor([-1.2, 1.0]))
    assert status is Status.CONVERGED
    torch.testing.assert_close(state.point, torch.ones(2), rtol=0, atol=1e-7)


def test_projected_gradient_starts_stops_and_stalls() -> None:
    fn, _, _ = quadratic(10, 1e2)
    problem = ProjectedObjective(gradient_objective(fn, torch.zeros(10)), project_box)
    solution, _ = SpectralProjectedGradient(rtol=1e-13).run(problem, torch.full((10,), 5.0))
    state, status = SpectralProjectedGradient(rtol=1e-6).run(problem, solution.point, reference=1.0)
    assert (status, state.step, state.evaluations) == (Status.CONVERGED, 0, 1)
    counted = Counted(fn)
    problem = ProjectedObjective(gradient_objective(counted, torch.zeros(10)), project_box)
    state, status = SpectralProjectedGradient(rtol=0.0).run(problem, torch.full((10,), 5.0))
    assert status in (Status.STALLED, Status.CONVERGED)
    assert counted.calls == state.evaluations < 150
    assert float(problem.residual(state.point, state.gradient).norm()) < 1e-13
    _, status = SpectralProjectedGradient(rtol=0.0, max_steps=2).run(problem, torch.full((10,), 5.0))
    assert status is Status.STEP_LIMIT
    infinite = ProjectedObjective(gradient_objective(lambda y: y.sum() * math.inf, torch.zeros(10)), project_box)
    assert SpectralProjectedGradient().run(infinite, torch.ones(10))[1] is Status.NONFINITE
    with pytest.raises(TypeError, match="needs a ProjectedObjective"):
        minimize(fn, torch.zeros(10), SpectralProjectedGradient())


def test_projected_gradient_backs_off_from_regions_without_values() -> None:
    def fn(y):
        return 5 * y.sum() - torch.log(y).sum()

    problem = ProjectedObjective(gradient_objective(fn, torch.zeros(3)), lambda v: v.clamp(max=4.0))
    state, status = SpectralProjectedGradient(rtol=1e-10).run(problem, torch.tensor([3.0, 9.0, 1e-3]))
    assert status is Status.CONVERGED
    torch.testing.assert_close(state.point, torch.full((3,), 0.2), rtol=1e-7, atol=0)


def test_newton_forcing_is_loose_far_away_and_tight_near_the_end(monkeypatch) -> None:
    asked = []
    original = CG.solve

    def spy(self, operator, b, **options):
        asked.append(self.rtol)
        return original(self, operator, b, **options)

    monkeypatch.setattr(CG, "solve", spy)
    minimize(rosenbrock, torch.full((10,), -1.0), NewtonCG(rtol=1e-10))
    assert asked[0] == 0.5
    assert min(asked) < 1e-2
    assert max(asked) <= 0.5
