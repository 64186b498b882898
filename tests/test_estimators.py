"""Estimators of the adjoint: what each of them is, and whether it admits how far off it is."""

import warnings
from collections.abc import Callable

import pytest
import sklearn.datasets
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import implicit
from implicit import CG, Cholesky, ConvergenceWarning, FiniteDifference, LinearSolve, NeumannSeries, OneStep, tree
from implicit.estimators import Estimator, GradientDifferences
from implicit.status import Status
from implicit.tree import Tree
from tests.dense import SETTINGS, Setting, normal, relative, setting_of, swapped


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Setting:
    return setting_of(request.param)


def quiet(setting: Setting, **options) -> implicit.Hypergradient:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return implicit.hypergradient(setting.upper, setting.lower, setting.x, setting.y, **options)


def matrices(setting: Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_x f, grad_y f, g_yy and g_yx (m, n)."""
    f, g, x, y = setting.flat
    return f.gradient(x, y, 0), f.gradient(x, y, 1), g.hessian(x, y), g.mixed(x, y)


# The Neumann series.


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_is_the_partial_sum(setting: Setting, terms: int) -> None:
    direct, b, hessian, mixed = matrices(setting)
    step = 0.7 / float(torch.linalg.eigvalsh(hessian)[-1])
    found = quiet(setting, estimator=NeumannSeries(terms=terms, step=step))
    contraction = torch.eye(len(b)) - step * hessian
    v = step * sum(torch.linalg.matrix_power(contraction, k) @ b for k in range(terms))
    assert relative(tree.ravel(found.adjoint), v) < 1e-12
    assert relative(tree.ravel(found.value), direct - mixed.T @ v) < 1e-12
    assert found.linear.residual == pytest.approx(float((b - hessian @ v).norm()), rel=1e-12)
    assert found.linear.relative_residual == pytest.approx(float((b - hessian @ v).norm() / b.norm()), rel=1e-12)
    assert (found.linear.steps, found.linear.products) == (terms, terms)
    assert found.linear.status is Status.STEP_LIMIT
    assert str(terms) in found.linear.message


def test_neumann_measures_a_step_that_cannot_diverge(setting: Setting) -> None:
    _, b, hessian, _ = matrices(setting)
    found = quiet(setting, estimator=NeumannSeries(terms=1))
    step = float(tree.ravel(found.adjoint) @ b / (b @ b))
    largest = float(torch.linalg.eigvalsh(hessian)[-1])
    assert 0.3 / largest < step <= 1.0 / largest * (1 + 1e-12)


def test_neumann_converges_and_says_so() -> None:
    curvature = torch.tensor([1.0, 3.0, 10.0])
    x, y = torch.tensor(2.0), 2.0 / curvature

    def run(terms: int) -> implicit.Hypergradient:
        return implicit.hypergradient(
            lambda x, y: (y**2).sum() / 2,
            lambda x, y: 0.5 * (curvature * y**2).sum() - x * y.sum(),
            x,
            y,
            estimator=NeumannSeries(terms=terms, step=0.1, rtol=1e-6),
        )

    done, short = run(200), run(50)  # 0.9^200 = 7e-10, 0.9^50 = 5e-3
    assert (done.linear.status, short.linear.status) == (Status.CONVERGED, Status.STEP_LIMIT)
    assert float(done.value) == pytest.approx(float((2.0 / curvature**2).sum()), rel=1e-8)
    assert short.accuracy is not None
    assert short.accuracy.error == pytest.approx(abs(float(short.value - done.value)), rel=1e-6)


def test_a_starting_adjoint_is_refined(setting: Setting) -> None:
    """Ten terms, and ten more from there, are twenty."""
    step = 1.0 / float(torch.linalg.eigvalsh(matrices(setting)[2])[-1])
    whole = quiet(setting, estimator=NeumannSeries(terms=20, step=step), accuracy=False)
    half = quiet(setting, estimator=NeumannSeries(terms=10, step=step), accuracy=False)
    both = quiet(setting, estimator=NeumannSeries(terms=10, step=step), adjoint=half.adjoint, accuracy=False)
    assert relative(tree.ravel(both.adjoint), tree.ravel(whole.adjoint)) < 1e-12
    assert both.linear.residual == pytest.approx(whole.linear.residual, rel=1e-9)


def test_a_series_that_grows_is_a_failed_solve(setting: Setting) -> None:
    step = 2.5 / float(torch.linalg.eigvalsh(matrices(setting)[2])[-1])
    with pytest.warns(ConvergenceWarning, match="estimate of its error inf"):
        found = implicit.hypergradient(
            setting.upper, setting.lower, setting.x, setting.y, estimator=NeumannSeries(terms=60, step=step)
        )
    assert found.linear.status is Status.LINEAR_SOLVE_FAILED
    assert "longer than 2 / L" in found.linear.message
    found = quiet(setting, estimator=NeumannSeries(terms=5_000, step=5 * step), accuracy=False)
    assert found.linear.status is Status.NONFINITE


@pytest.mark.parametrize(("step", "failed"), [(1.9, False), (2.1, True)])
def test_growth_is_noticed_at_its_first_sign(step: float, failed: bool) -> None:
    """On g = (y - x)^2 / 2 the residual of k terms is (1 - step)^k."""
    one = torch.tensor(1.0)
    for estimator in (NeumannSeries(terms=1, step=step), NeumannSeries(terms=3, step=step), OneStep(step=step)):
        found = implicit.hypergradient(
            lambda x, y: y, lambda x, y: 0.5 * (y - x) ** 2, one, one, estimator=estimator, accuracy=False
        )
        assert found.linear.status is (Status.LINEAR_SOLVE_FAILED if failed else Status.STEP_LIMIT)
        assert found.linear.residual == pytest.approx(abs(1 - step) ** found.linear.steps, rel=1e-6)


def test_differences_start_at_a_given_adjoint(setting: Setting) -> None:
    _, b, hessian, _ = matrices(setting)
    exact = tree.unravel(torch.linalg.solve(hessian, b), setting.y)
    solver = CG(rtol=1e-5)
    cold = quiet(setting, estimator=FiniteDifference(linear_solver=solver), accuracy=False)
    warm = quiet(setting, estimator=FiniteDifference(linear_solver=solver), adjoint=exact, accuracy=False)
    assert cold.linear.steps > 5
    assert warm.linear.steps == 0


def test_nothing_to_solve_is_solved() -> None:
    x, y = torch.tensor(1.0), torch.ones(3)
    for estimator in (NeumannSeries(terms=3), OneStep(step=0.1), FiniteDifference(), LinearSolve()):
        found = implicit.hypergradient(lambda x, y: x**2, lambda x, y: ((y - x) ** 2).sum(), x, y, estimator=estimator)
        assert found.linear.status is Status.CONVERGED
        assert (float(found.value), float(tree.norm(found.adjoint))) == (2.0, 0.0)


# Finite differences.


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cotangent: Tensor, y: Tensor) -> Tensor:
        return cotangent * (1 - y**2)

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:
        raise NotImplementedError("no double backward")


class OnceTanh(torch.autograd.Function):
    """tanh with a backward pass that refuses to be differentiated, as fused attention and cuDNN RNNs do."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:
        return _Slope.apply(cotangent, *ctx.saved_tensors)


def test_finite_differences_need_first_derivatives_only(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting_of("network")
    expected = setting.dense()
    monkeypatch.setattr(torch, "tanh", OnceTanh.apply)
    with pytest.raises(NotImplementedError, match="no double backward"):
        implicit.hypergradient(setting.upper, setting.lower, setting.x, setting.y)
    found = implicit.hypergradient(setting.upper, setting.lower, setting.x, setting.y, estimator=FiniteDifference())
    assert relative(tree.ravel(found.value), expected) < 1e-5
    assert found.accuracy is not None
    assert found.accuracy.error < 1e-5 * float(expected.norm())


def test_finite_differences_match_dense_linear_algebra(setting: Setting) -> None:
    found = implicit.hypergradient(setting.upper, setting.lower, setting.x, setting.y, estimator=FiniteDifference())
    assert relative(tree.ravel(found.value), setting.dense()) < 1e-5
    assert found.linear.relative_residual < 1e-6
    assert tree.describe(found.value) == tree.describe(setting.x)


def test_differences_are_the_products(setting: Setting) -> None:
    _, _, hessian, mixed = matrices(setting)
    point = GradientDifferences(setting.lower, setting.x, setting.y)
    for size in (1e-8, 1.0, 1e8):
        v = size * normal(3, len(hessian))
        along_x, along_y = point.joint(tree.unravel(v, setting.y))
        assert relative(tree.ravel(along_y), hessian @ v) < 1e-8
        assert relative(tree.ravel(along_x), mixed.T @ v) < 1e-8
        assert torch.equal(tree.ravel(point.hvp(tree.unravel(v, setting.y))), tree.ravel(along_y))
        assert torch.equal(tree.ravel(point.mixed_vjp(tree.unravel(v, setting.y))), tree.ravel(along_x))
    zero = point.joint(tree.zeros_like(setting.y))
    assert float(tree.norm(zero)) == 0.0


def test_the_width_of_differences_is_used() -> None:
    """Central differences of a quartic's gradient y^3 / 3 along 1 err by exactly h^2 / 3."""
    y = torch.tensor(2.0)
    for width in (0.01, 0.1):
        point = GradientDifferences(lambda x, y: y**4 / 12 + x * y, torch.tensor(1.0), y, width)
        h = width * 3.0
        assert float(point.hvp(torch.tensor(1.0))) == pytest.approx(4.0 + h**2 / 3, rel=1e-9)
        assert float(point.hvp(torch.tensor(-5.0))) == pytest.approx(-5 * (4.0 + h**2 / 3), rel=1e-9)
        assert float(point.mixed_vjp(torch.tensor(1.0))) == pytest.approx(1.0)
        found = implicit.hypergradient(
            lambda x, y: y, lambda x, y: y**4 / 12 - x * y, torch.tensor(8.0 / 3), y,
            estimator=FiniteDifference(width=width), accuracy=False,
        )  # fmt: skip
        assert float(found.value) == pytest.approx(1 / (4.0 + h**2 / 3), rel=1e-9)


def test_finite_differences_in_float32() -> None:
    curvature = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float32)
    x = torch.tensor(2.0, dtype=torch.float32)
    found = implicit.hypergradient(
        lambda x, y: (y**2).sum() / 2,
        lambda x, y: 0.5 * (curvature * y**2).sum() - x * y.sum(),
        x,
        x / curvature,
        estimator=FiniteDifference(),
    )
    assert found.linear.status is Status.CONVERGED
    assert found.value.dtype == torch.float32
    assert float(found.value) == pytest.approx(float((2.0 / curvature**2).sum()), rel=1e-3)


# One step.


def test_one_step_is_the_first_term(setting: Setting) -> None:
    direct, b, _, mixed = matrices(setting)
    found = quiet(setting, estimator=OneStep(step=0.3))
    series = quiet(setting, estimator=NeumannSeries(terms=1, step=0.3))
    assert relative(tree.ravel(found.value), direct - 0.3 * mixed.T @ b) < 1e-6
    assert relative(tree.ravel(found.adjoint), tree.ravel(series.adjoint)) < 1e-14
    assert found.linear.relative_residual == pytest.approx(series.linear.relative_residual, rel=1e-7)


# What an approximation admits.


APPROXIMATIONS: dict[str, Estimator] = {
    "one term": NeumannSeries(terms=1),
    "10 terms": NeumannSeries(terms=10),
    "one step": OneStep(step=0.02),
    "loose CG": LinearSolve(linear_solver=CG(rtol=0.1)),
    "one step of CG": LinearSolve(linear_solver=CG(max_steps=1)),
    "one step of CG, by differences": FiniteDifference(linear_solver=CG(max_steps=1)),
}


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_no_approximation_hides_its_error(setting: Setting, name: str) -> None:
    """Peers return hypergradients that are 93 to 98 % wrong by default, without a word."""
    with pytest.warns(ConvergenceWarning, match="estimate of its error"):
        found = implicit.hypergradient(
            setting.upper, setting.lower, setting.x, setting.y, estimator=APPROXIMATIONS[name]
        )
    exact = setting.dense()
    true = float((tree.ravel(found.value) - exact).norm())
    assert true > 0.01 * float(exact.norm())
    assert found.accuracy is not None
    assert 0.5 * true < found.accuracy.error < 2 * true
    _, b, hessian, _ = matrices(setting)
    residual = float((b - hessian @ tree.ravel(found.adjoint)).norm() / b.norm())
    assert found.accuracy.linear_residual == pytest.approx(residual, rel=1e-6)
    assert found.linear.status is not Status.CONVERGED or name == "loose CG"


def test_the_implicit_term_of_a_single_step_is_lost_almost_entirely(setting: Setting) -> None:
    direct, b, hessian, mixed = matrices(setting)
    implied = -mixed.T @ torch.linalg.solve(hessian, b)

    def error(estimator: Estimator) -> float:
        return relative(tree.ravel(quiet(setting, estimator=estimator).value) - direct, implied)

    assert error(OneStep(step=0.02)) > 0.9
    assert error(NeumannSeries(terms=1)) > 0.9
    assert error(LinearSolve(linear_solver=CG(rtol=1e-10))) < 1e-7


# Conventions.


@pytest.mark.parametrize(
    "estimator", [NeumannSeries(terms=5), FiniteDifference(), OneStep(step=0.1), LinearSolve()], ids=repr
)
def test_key_order_does_not_matter(estimator: Estimator) -> None:
    setting = setting_of("logistic")
    first = quiet(setting, estimator=estimator, accuracy=False)
    for x, y in ((swapped(setting.x), setting.y), (setting.x, swapped(setting.y))):
        other = Setting(setting.upper, setting.lower, x, y)
        for adjoint in (None, swapped(first.adjoint)):
            found = quiet(other, estimator=estimator, accuracy=False, adjoint=adjoint)
            assert list(found.value) == list(x)
            assert list(found.adjoint) == list(y)
            if adjoint is None:
                assert float(tree.norm(tree.sub(found.value, first.value))) < 1e-6 * float(tree.norm(first.value))


def test_the_default_is_a_linear_solve(setting: Setting) -> None:
    plain = quiet(setting)
    for options in (
        {"estimator": LinearSolve()},
        {"linear_solver": CG()},
        {"estimator": LinearSolve(linear_solver=CG())},
    ):
        found = quiet(setting, **options)
        assert torch.equal(tree.ravel(found.value), tree.ravel(plain.value))
        assert found.accuracy == plain.accuracy


def test_misuse_is_refused() -> None:
    x, y = torch.tensor(1.0), torch.ones(2)

    def lower(x: Tree, y: Tree) -> Tensor:
        return ((y - x) ** 2).sum()

    def run(**options) -> None:
        implicit.hypergradient(lambda x, y: y.sum(), lower, x, y, **options)

    with pytest.raises(TypeError, match=r"estimator must be an Estimator such as LinearSolve.*got CG"):
        run(estimator=CG())
    with pytest.raises(ValueError, match="either estimator or linear_solver"):
        run(estimator=LinearSolve(), linear_solver=CG())
    for estimator in (FiniteDifference(), OneStep(step=1.0)):
        name = type(estimator).__name__
        with pytest.raises(ValueError, match=f"second derivatives, which {name} avoids"):
            run(estimator=estimator, strong_convexity=2.0)
        with pytest.raises(ValueError, match=f"second derivatives, which {name} avoids"):
            run(estimator=estimator, graph=implicit.GradientGraph(lower, x, y))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: NeumannSeries(terms=0), "terms must be a positive integer, got 0"),
        (lambda: NeumannSeries(terms=True), "terms must be a positive integer, got True"),
        (lambda: NeumannSeries(terms=2, step=0.0), "step must be positive and finite, got 0.0"),
        (lambda: NeumannSeries(terms=2, rtol=-1.0), "rtol must be None or >= 0, got -1.0"),
        (lambda: OneStep(step=float("nan")), "step must be positive and finite, got nan"),
        (lambda: OneStep(step=1.0, width=-1.0), "width must be positive and finite, got -1.0"),
        (lambda: FiniteDifference(width=0.0), "width must be positive and finite, got 0.0"),
    ],
)
def test_settings_are_validated(make: Callable[[], Estimator], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("cls", [LinearSolve, FiniteDifference])
def test_solvers_are_validated(cls) -> None:
    with pytest.raises(TypeError, match=r"linear_solver must be a LinearSolver such as CG\(\), got 'cg'"):
        cls(linear_solver="cg")
    assert cls(linear_solver=Cholesky()).linear_solver == Cholesky()


# Figures of peers, reproduced with the error said aloud.


def digits() -> tuple[Callable[[Tree, Tree], Tensor], Callable[[Tree, Tree], Tensor], Tensor]:
    """Multinomial logistic regression on 8 x 8 digits with a log-penalty per pixel: condition about 800."""
    data = sklearn.datasets.load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    rows, labels = torch.from_numpy(data.data / 16.0)[order], torch.from_numpy(data.target)[order]

    def upper(x: Tree, w: Tree) -> Tensor:
        return cross_entropy(rows[1000:] @ w, labels[1000:])

    def lower(x: Tree, w: Tree) -> Tensor:
        return cross_entropy(rows[:1000] @ w, labels[:1000]) + 0.5 * (x.exp()[:, None] * w**2).sum()

    return upper, lower, -5.0 + normal(0, 64)


def test_defaults_of_peers_are_97_percent_wrong_and_say_so_here() -> None:
    upper, lower, x = digits()
    w = implicit.minimize(lambda w: lower(x, w), torch.zeros(64, 10), implicit.NewtonCG(rtol=1e-10)).point
    exact = implicit.hypergradient(upper, lower, x, w, linear_solver=CG(rtol=1e-10)).value
    norm = float(exact.norm())
    for estimator, low, high in (
        (NeumannSeries(terms=1), 0.9, 1.0),
        (LinearSolve(linear_solver=CG(max_steps=1)), 0.8, 1.1),
        (OneStep(step=1.0), 0.8, 1.1),
        (NeumannSeries(terms=96), 0.1, 0.5),
    ):
        with pytest.warns(ConvergenceWarning, match="is not solved well enough"):
            found = implicit.hypergradient(upper, lower, x, w, estimator=estimator)
        true = float((found.value - exact).norm()) / norm
        assert low < true < high
        assert found.accuracy is not None
        assert found.accuracy.error / norm == pytest.approx(true, rel=1e-3)


def test_a_biased_estimator_cannot_converge_unnoticed() -> None:
    """Descent on a truncated series stops where that series vanishes: its own norm is 1e-9 there, the true one is not,
    and the report says which."""
    train, held = normal(1, 30, 5) * torch.tensor([1.0, 1.0, 1.0, 0.1, 0.05]), normal(2, 20, 5)
    target, held_target = train.sum(dim=1) + 0.3 * normal(3, 30), held.sum(dim=1)

    def lower(x: Tree, w: Tree) -> Tensor:
        return 0.5 * ((train @ w - target) ** 2).mean() + 0.5 * (x.exp() * w**2).sum()

    def upper(x: Tree, w: Tree) -> Tensor:
        return 0.5 * ((held @ w - held_target) ** 2).mean() + 0.05 * ((x + 2) ** 2).sum()

    def solved(x: Tensor) -> Tensor:
        return torch.linalg.solve(train.T @ train / 30 + torch.diag(x.exp()), train.T @ target / 30)

    series = NeumannSeries(terms=3, step=0.3)
    x = torch.full((5,), -2.0)
    for _ in range(400):
        x = x - 2.0 * implicit.hypergradient(upper, lower, x, solved(x), estimator=series, accuracy=False).value
    with pytest.warns(ConvergenceWarning, match="estimate of its error"):
        found = implicit.hypergradient(upper, lower, x, solved(x), estimator=series)
    true = float(torch.func.grad(lambda x: upper(x, solved(x)))(x).norm())
    assert float(found.value.norm()) < 1e-9
    assert true > 1e-3
    assert found.accuracy is not None
    assert found.accuracy.error == pytest.approx(true, rel=1e-6)
