"""Hypergradients and their accuracy report against dense linear algebra and finite differences."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev

import implicit
from implicit import CG, Cholesky, ConvergenceWarning, GradientGraph, tree
from implicit.linear_solvers import LinearSolver
from implicit.tree import Tree
from tests.dense import SETTINGS, Setting, condition, normal, relative, setting_of, swapped


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Setting:
    return setting_of(request.param)


@pytest.mark.parametrize("solver", [CG(rtol=1e-13), Cholesky()], ids=["CG", "Cholesky"])
def test_hypergradient_matches_dense_linear_algebra(setting: Setting, solver: LinearSolver) -> None:
    found = implicit.hypergradient(setting.upper, setting.lower, setting.x, setting.y, linear_solver=solver)
    f, _, x, y = setting.flat
    expected = setting.dense()
    assert relative(tree.ravel(found.value), expected) < 1e-9
    # The implicit term alone, which a direct term could hide.
    direct = f.gradient(x, y, 0)
    assert relative(tree.ravel(found.value) - direct, expected - direct) < 1e-9
    assert found.upper_value == pytest.approx(float(f(x, y)), rel=1e-14)
    assert tree.describe(found.value) == tree.describe(setting.x)
    assert found.accuracy is not None
    assert found.accuracy.error < 1e-9 * float(expected.norm())


def test_hypergradient_matches_finite_differences(setting: Setting) -> None:
    found = implicit.hypergradient(setting.upper, setting.lower, setting.x, setting.y, linear_solver=CG(rtol=1e-12))
    assert relative(tree.ravel(found.value), setting.differences()) < 1e-7


def test_settings_reach_condition_1e4() -> None:
    assert 5e3 < condition(setting_of("ridge")) < 2e4
    assert 5e3 < condition(setting_of("network")) < 2e4


def test_adjoint_is_a_warm_start(setting: Setting) -> None:
    def run(adjoint: Tree | None, rtol: float = 1e-10) -> implicit.Hypergradient:
        solver = CG(rtol=rtol)
        return implicit.hypergradient(
            setting.upper, setting.lower, setting.x, setting.y, linear_solver=solver, adjoint=adjoint, accuracy=False
        )

    cold = run(None)
    f, g, x, y = setting.flat
    exact = tree.unravel(torch.linalg.solve(g.hessian(x, y), f.gradient(x, y, 1)), setting.y)
    assert cold.linear.steps > 5
    assert relative(tree.ravel(cold.adjoint), tree.ravel(exact)) < 1e-6
    warm = run(exact)
    assert warm.linear.steps == 0
    assert relative(tree.ravel(warm.value), setting.dense()) < 1e-9
    astray = run(tree.map(lambda leaf: 1e3 * leaf + 1.0, exact), rtol=1e-13)
    assert relative(tree.ravel(astray.value), setting.dense()) < 1e-9


def test_a_kept_graph_is_used(setting: Setting) -> None:
    graph = GradientGraph(setting.lower, setting.x, setting.y)

    def refuse(x: Tree, y: Tree) -> Tensor:
        raise AssertionError("the lower objective was evaluated again")

    found = implicit.hypergradient(
        setting.upper, refuse, setting.x, setting.y, graph=graph, linear_solver=Cholesky(), accuracy=False
    )
    assert relative(tree.ravel(found.value), setting.dense()) < 1e-9


@pytest.mark.parametrize("name", ["logistic", "network"])
def test_key_order_does_not_matter(name: str) -> None:
    setting = setting_of(name)
    first = implicit.hypergradient(setting.upper, setting.lower, setting.x, setting.y, linear_solver=Cholesky())
    for x, y in ((swapped(setting.x), setting.y), (setting.x, swapped(setting.y))):
        for adjoint in (first.adjoint, swapped(first.adjoint)):
            found = implicit.hypergradient(setting.upper, setting.lower, x, y, adjoint=adjoint)
            assert list(found.value) == list(x)
            assert list(found.adjoint) == list(y)
            assert found.linear.steps == 0
            difference = tree.sub(found.value, first.value)
            assert float(tree.norm(difference)) < 1e-9 * float(tree.norm(first.value))


def test_key_order_with_equal_shapes() -> None:
    """Leaves of one shape: pairing by position would give a wrong number and no error."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -1.0])

    def upper(x: Tree, y: Tree) -> Tensor:
        return (y["a"] * torch.tensor([1.0, -2.0])).sum() + 3 * (y["b"] ** 2).sum() / 2

    def lower(x: Tree, y: Tree) -> Tensor:
        return ((y["a"] - x["a"] * a) ** 2).sum() / 2 + 2 * ((y["b"] - x["b"] * b) ** 2).sum()

    x, y = {"a": a, "b": b}, {"b": b * b, "a": a * a}
    adjoint = {"a": torch.tensor([1.0, -2.0]), "b": 3 * b * b / 4}
    expected = {"a": a * torch.tensor([1.0, -2.0]), "b": 3 * b**3}
    for given in (None, adjoint, swapped(adjoint)):
        found = implicit.hypergradient(upper, lower, x, y, adjoint=given, linear_solver=CG(rtol=1e-14))
        torch.testing.assert_close(found.value, expected, rtol=1e-12, atol=0)
        assert (found.linear.steps == 0) == (given is not None)


def test_direct_term_alone_and_implicit_term_alone() -> None:
    x = {"direct": torch.tensor(2.0), "both": torch.tensor(3.0), "lower": torch.tensor([1.0, 4.0])}
    x["loose"] = torch.ones(2)

    def upper(x: Tree, y: Tree) -> Tensor:
        return x["direct"] ** 3 + x["both"] * y.sum()

    def lower(x: Tree, y: Tree) -> Tensor:  # y* = lower + both; "loose" shifts the value only
        return 0.5 * ((y - x["lower"] - x["both"]) ** 2).sum() + x["loose"].sum()

    found = implicit.hypergradient(upper, lower, x, x["lower"] + x["both"])
    expected = {
        "direct": torch.tensor(12.0),
        "both": torch.tensor(11.0 + 6.0),
        "lower": torch.tensor([3.0, 3.0]),
        "loose": torch.zeros(2),
    }
    torch.testing.assert_close(found.value, expected)


def test_lower_level_linear_in_a_leaf() -> None:
    """g_yy has a zero block: harmless while f ignores that leaf, no solution otherwise."""
    x, y = torch.tensor(2.0), {"w": torch.tensor([4.0, 6.0]), "free": torch.tensor([1.0])}

    def lower(x: Tree, y: Tree) -> Tensor:
        return 0.5 * ((y["w"] - x * torch.tensor([2.0, 3.0])) ** 2).sum() + 0.0 * y["free"].sum()

    found = implicit.hypergradient(lambda x, y: (y["w"] ** 2).sum() / 2, lower, x, y)
    assert float(found.value) == pytest.approx(4 * 2 + 6 * 3)
    assert found.linear.success
    with pytest.warns(ConvergenceWarning, match="estimate of its error inf"):
        found = implicit.hypergradient(lambda x, y: (y["w"] ** 2).sum() + y["free"].sum(), lower, x, y)
    assert found.linear.status is implicit.Status.LINEAR_SOLVE_FAILED


# The accuracy report.


def stopped_early(setting: Setting, seed: int, size: float) -> tuple[Tree, float]:
    """A point at distance ``size`` from the lower solution, and the true error of the hypergradient there."""
    shift = normal(seed, tree.size(setting.y))
    y = tree.add(setting.y, tree.unravel(size * shift / shift.norm(), setting.y))
    return y, float((setting.dense(y) - setting.dense()).norm())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("solver", [CG(rtol=1e-10), Cholesky()], ids=["CG", "Cholesky"])
def test_estimate_of_a_lower_level_stopped_early(setting: Setting, solver: LinearSolver, seed: int) -> None:
    y, true = stopped_early(setting, 50 + seed, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = implicit.hypergradient(setting.upper, setting.lower, setting.x, y, linear_solver=solver).accuracy
    assert found is not None
    assert found.kind == "estimate"
    assert 0.5 * true < found.error < 2 * true
    assert 0.5e-3 < found.lower_error < 2e-3
    _, g, x, _ = setting.flat
    assert found.lower_residual == pytest.approx(float(g.gradient(x, tree.ravel(y), 1).norm()), rel=1e-9)


def test_estimate_is_exact_for_a_quadratic_lower_level() -> None:
    """The Newton correction lands on the solution however far it is."""
    setting = setting_of("ridge")
    y, true = stopped_early(setting, 55, 30.0)
    assert true > float(setting.dense().norm())
    with pytest.warns(ConvergenceWarning):
        found = implicit.hypergradient(setting.upper, setting.lower, setting.x, y, linear_solver=Cholesky()).accuracy
    assert found is not None
    assert found.error == pytest.approx(true, rel=1e-9)
    assert found.lower_error == pytest.approx(30.0, rel=1e-9)


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-4])
def test_estimate_of_a_linear_system_stopped_early(setting: Setting, rtol: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = implicit.hypergradient(setting.upper, setting.lower, setting.x, setting.y, linear_solver=CG(rtol=rtol))
    assert found.accuracy is not None
    true = float((tree.ravel(found.value) - setting.dense()).norm())
    assert 0.5 * true < found.accuracy.error < 2 * true + 1e-14
    f, g, x, y = setting.flat
    slope = f.gradient(x, y, 1)
    residual = slope - g.hessian(x, y) @ tree.ravel(found.adjoint)
    assert found.accuracy.linear_residual == pytest.approx(float(residual.norm() / slope.norm()), rel=1e-6, abs=1e-14)


@pytest.mark.parametrize("rtol", [1e-10, 1e-2])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e-1])
def test_bound_under_declared_strong_convexity(rtol: float, size: float) -> None:
    setting = setting_of("ridge")
    _, g, x, best = setting.flat
    mu = float(torch.linalg.eigvalsh(g.hessian(x, best))[0])
    for seed in range(3):
        y, _ = stopped_early(setting, 60 + seed, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = implicit.hypergradient(
                setting.upper, setting.lower, setting.x, y, linear_solver=CG(rtol=rtol), strong_convexity=mu
            )
        report = found.accuracy
        assert report is not None
        assert report.kind == "bound"
        assert report.error >= float((tree.ravel(found.value) - setting.dense()).norm())
        assert report.lower_error == pytest.approx(report.lower_residual / mu)
        assert report.lower_error >= size * (1 - 1e-9)


@pytest.mark.parametrize("rtol", [1e-10, 1e-2])
def test_bound_by_dense_norms(setting: Setting, rtol: float) -> None:
    """(|phi_xy| + |g_xy| |phi_yy| / mu) |g_y| / mu + |g_xy| |r| / mu with phi = f - <g_y, v> and spectral norms."""
    y, _ = stopped_early(setting, 70, 1e-4)
    f, g, x, _ = setting.flat
    at = x, tree.ravel(y)
    mu = 0.5 * float(torch.linalg.eigvalsh(g.hessian(*at))[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = implicit.hypergradient(
            setting.upper, setting.lower, setting.x, y, linear_solver=CG(rtol=rtol), strong_convexity=mu
        )
    v = tree.ravel(found.adjoint)

    def phi(p: Tensor, q: Tensor) -> Tensor:
        return f(p, q) - g.gradient(p, q, 1) @ v

    def norm(matrix: Tensor) -> float:
        return float(torch.linalg.matrix_norm(matrix, ord=2))

    phi_xy = norm(jacrev(grad(phi, argnums=1), argnums=0)(*at))
    phi_yy = norm(jacrev(grad(phi, argnums=1), argnums=1)(*at))
    g_xy, residual = norm(g.mixed(*at)), float((f.gradient(*at, 1) - g.hessian(*at) @ v).norm())
    lower_residual = float(g.gradient(*at, 1).norm())
    expected = (phi_xy + g_xy * phi_yy / mu) * lower_residual / mu + g_xy * residual / mu
    assert found.accuracy is not None
    assert found.accuracy.error == pytest.approx(expected, rel=1e-5)


def test_warning_where_the_lower_level_is_not_solved() -> None:
    x, y = torch.tensor(2.0), torch.tensor([5.0, 1.0])

    def lower(x: Tree, y: Tree) -> Tensor:
        return torch.cosh(y - x).sum()

    def upper(x: Tree, y: Tree) -> Tensor:
        return (y**2).sum()

    with pytest.warns(ConvergenceWarning, match=r"hypergradient has norm .* lower level \(residual 10.1\)"):
        implicit.hypergradient(upper, lower, x, y)
    implicit.hypergradient(upper, lower, x, y, accuracy=False)
    implicit.hypergradient(upper, lower, x, torch.full((2,), 2.0 + 1e-6))  # pytest makes warnings errors


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_warning_where_the_report_is_not_finite(broken: float) -> None:
    one = torch.tensor(1.0)
    with pytest.warns(ConvergenceWarning):
        implicit.hypergradient(lambda x, y: broken * x + y, lambda x, y: (y - x) ** 2, one, one)


def test_an_indefinite_lower_level_is_reported() -> None:
    x, y = torch.tensor(1.0), torch.tensor([1.0, 0.0])
    with pytest.warns(ConvergenceWarning, match="relative residual"):
        found = implicit.hypergradient(
            lambda x, y: y.sum(), lambda x, y: 0.5 * (y[0] - x) ** 2 - 0.5 * y[1] ** 2, x, y, linear_solver=Cholesky()
        )
    assert found.linear.indefinite
    assert found.linear.status is implicit.Status.LINEAR_SOLVE_FAILED
    assert found.accuracy is not None
    assert found.accuracy.error == float("inf")


def test_a_newton_correction_that_fails_leaves_the_error_unknown() -> None:
    """The adjoint system sees positive curvature alone; the lower residual lies along the negative one."""
    x, y = torch.tensor(1.0), torch.tensor([1.0, 0.5])
    with pytest.warns(ConvergenceWarning, match="estimate of its error inf"):
        found = implicit.hypergradient(lambda x, y: y[0], lambda x, y: 0.5 * (y[0] - x) ** 2 - 0.5 * y[1] ** 2, x, y)
    assert found.linear.success
    assert float(found.value) == pytest.approx(1.0)
    assert found.accuracy is not None
    assert found.accuracy.error == float("inf")
