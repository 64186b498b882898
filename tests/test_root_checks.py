"""What implicit derivatives refuse or warn of: unsolved lower levels, captured tensors, diverged solvers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

import implicit
from implicit import CG, LU, ConvergenceWarning, SolveError
from tests.dense import normal

ROWS, TARGET = normal(60, 30, 6), normal(61, 30)


def ridge(y: Tensor, x: Tensor) -> Tensor:
    return 0.5 * ((ROWS @ y - TARGET) ** 2).sum() + 0.5 * (torch.exp(x) * y**2).sum()


def exact(x: Tensor) -> Tensor:
    return torch.linalg.solve(ROWS.T @ ROWS + torch.diag(torch.exp(x)), ROWS.T @ TARGET)


def descend(steps: int, scale: float = 1.0) -> Callable[..., Tensor]:
    def solver(init: Tensor, x: Tensor) -> Tensor:
        y = init
        for _ in range(steps):
            y = y - 0.01 * grad(ridge)(y, x)
        return y

    return solver


X = torch.zeros(6, dtype=torch.float64)
DIFFERENTIATIONS: dict[str, Callable[..., object]] = {
    "backward": lambda f: f(X.clone().requires_grad_()).backward(),
    "create_graph": lambda f: torch.autograd.grad(f(x := X.clone().requires_grad_()), x, create_graph=True),
    "grad": lambda f: grad(f)(X),
    "jvp": lambda f: jvp(f, (X,), (X + 1,)),
    "vmap of grad": lambda f: vmap(grad(f))(X[None]),
    "jacrev": lambda f: jacrev(f)(X),
}


@pytest.mark.parametrize("differentiate", DIFFERENTIATIONS.values(), ids=DIFFERENTIATIONS)
@pytest.mark.parametrize("solver", [CG(rtol=1e-12), LU()], ids=["CG", "LU"])
def test_an_unsolved_lower_level_is_named(differentiate: Callable[..., object], solver: implicit.LinearSolver) -> None:
    """Two gradient steps: peers differentiate that without a word."""

    def value(steps: int, tolerance: float | None) -> Callable[[Tensor], Tensor]:
        solve = implicit.custom_argmin(ridge, linear_solver=solver, residual_tolerance=tolerance)(descend(steps))
        return lambda x: (solve(torch.zeros(6), x) ** 2).sum()

    with pytest.warns(ConvergenceWarning, match=r"did not solve .* one Newton step would move y"):
        differentiate(value(2, 1e-2))
    differentiate(value(2, None))  # pytest makes warnings errors
    differentiate(value(400, 1e-2))
    with pytest.warns(ConvergenceWarning, match=r"residual_tolerance = 1e-12"):
        differentiate(value(30, 1e-12))


def test_the_length_of_the_newton_step_is_reported() -> None:
    shift = 0.3 * normal(62, 6)
    solve = implicit.custom_argmin(ridge, linear_solver=CG(rtol=1e-12))(lambda init, x: exact(x) + shift)
    x = X.clone().requires_grad_()
    y = exact(X) + shift
    size, residual = float(y.norm()), float(grad(ridge)(y, X).norm())
    message = (
        rf"\|\|F\(y, theta\)\|\| = {residual:.3g}, and one Newton step would move y, of norm {size:.3g}, "
        rf"by {float(shift.norm()):.3g}\. .* relative size, {float(shift.norm()) / size:.2g};"
    )
    with pytest.warns(ConvergenceWarning, match=message):
        solve(torch.zeros(6), x).sum().backward()


def test_the_newton_step_of_a_nonsymmetric_root() -> None:
    matrix = torch.tensor([[1.0, 30.0], [0.0, 2.0]])
    solve = implicit.custom_root(lambda y, a: matrix @ y - a, linear_solver=LU())(
        lambda init, a: torch.linalg.solve(matrix, a) + torch.tensor([0.0, 0.7])
    )
    for differentiate in (grad, lambda f: lambda a: jvp(f, (a,), (a,))):
        with pytest.warns(ConvergenceWarning, match=r"by 0\.7\."):
            differentiate(lambda a: solve(torch.zeros(2), a).sum())(torch.ones(2))


@pytest.mark.parametrize("units", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_the_test_has_no_units(units: float, factor: float) -> None:
    """Neither the units of the objective nor those of y decide; only the relative error of y does."""

    def objective(y: Tensor, x: Tensor) -> Tensor:
        return factor * ridge(y / units, x)

    for error, warns in ((3e-3, False), (3e-2, True)):
        direction = normal(63, 6)
        direction = direction / direction.norm() * error
        solve = implicit.custom_argmin(objective, linear_solver=LU())(
            lambda init, x, move=direction: units * (exact(x) + move * exact(x).norm())
        )
        value = solve(torch.zeros(6), X.clone().requires_grad_()).sum()
        if warns:
            with pytest.warns(ConvergenceWarning):
                value.backward()
        else:
            value.backward()


def test_ill_conditioning_raises_no_false_alarm() -> None:
    """Condition 1e8, solved to a gradient of 1e-9 relative: the error of y is below the tolerance."""
    diagonal = torch.logspace(0, 8, 20)
    for noise in (torch.zeros(20), 1e-9 * diagonal.flip(0).sqrt() * normal(64, 20)):
        solve = implicit.custom_argmin(lambda y, b: 0.5 * (diagonal * y**2).sum() - (b * y).sum(), linear_solver=LU())(
            lambda init, b, noise=noise: (b + noise) / diagonal
        )
        b = torch.ones(20, requires_grad=True)
        solve(torch.zeros(20), b).sum().backward()
        torch.testing.assert_close(b.grad, 1 / diagonal)


def test_stiff_residuals_do_not_hide_soft_errors() -> None:
    """The residual is mostly that of a small error in a stiff direction; the large error is in the soft one."""
    diagonal = torch.tensor([1.0, 1e4])
    solve = implicit.custom_argmin(lambda y, b: 0.5 * (diagonal * y**2).sum() - (b * y).sum(), linear_solver=LU())(
        lambda init, b: b / diagonal + torch.tensor([0.5, 0.01])
    )
    with pytest.warns(ConvergenceWarning, match=r"by 0\.5"):
        solve(torch.zeros(2), torch.ones(2, requires_grad=True)).sum().backward()


def test_weakly_determined_directions_are_not_overlooked() -> None:
    """The cotangent sees only the stiff direction, the error lies in the soft one."""
    diagonal = torch.tensor([1.0, 1e6])
    solve = implicit.custom_argmin(lambda y, b: 0.5 * (diagonal * y**2).sum() - (b * y).sum(), linear_solver=LU())(
        lambda init, b: b / diagonal + torch.tensor([0.5, 0.0])
    )
    with pytest.warns(ConvergenceWarning, match=r"by 0\.5"):
        solve(torch.zeros(2), torch.ones(2, requires_grad=True))[1].backward()


@pytest.mark.parametrize("units", [1e-12, 1.0, 1e12])
def test_a_solution_at_zero_is_judged_by_the_way_to_it(units: float) -> None:
    for left, warns in ((1e-6, False), (1e-3, True)):
        solve = implicit.custom_argmin(lambda y, b: ((y - b) ** 2).sum())(lambda init, b, left=left: b + left * init)
        value = solve(units * torch.ones(3), torch.zeros(3, requires_grad=True)).sum()
        if warns:
            with pytest.warns(ConvergenceWarning):
                value.backward()
        else:
            value.backward()


def test_tolerances_are_checked() -> None:
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="residual_tolerance must be None or > 0"):
            implicit.custom_argmin(ridge, residual_tolerance=wrong)


def test_a_diverged_solver_raises() -> None:
    solve = implicit.custom_argmin(ridge)(lambda init, x: torch.full((6,), torch.nan))
    with pytest.raises(SolveError, match="the solver returned a solution with NaN or infinite entries"):
        solve(torch.zeros(6), X)


def test_a_residual_that_is_not_finite_raises() -> None:
    solve = implicit.custom_root(lambda y, a: torch.log(y) * y - a, linear_solver=LU())(lambda init, a: a)
    with pytest.raises(SolveError, match=r"the residual function is NaN or infinite"):
        solve(torch.zeros(2), torch.zeros(2, requires_grad=True)).sum().backward()


def test_captured_tensors_are_refused() -> None:
    """They would get no gradient, silently."""
    weight, x = torch.tensor(2.0, requires_grad=True), X.clone().requires_grad_()

    def captured(y: Tensor, x: Tensor, weight: Tensor = weight) -> Tensor:
        return ridge(y, x) + weight * (y**2).sum()

    scaled = 3 * weight  # not a leaf

    for objective in (captured, lambda y, x: ridge(y, x) + scaled * (y**2).sum()):
        solve = implicit.custom_argmin(objective, residual_tolerance=None)(lambda init, x: exact(x))
        for again in (False, True):
            value = solve(torch.zeros(6), x).sum()
            with pytest.raises(ValueError, match=r"tensor of shape \(\) that it captured .* pass it through theta"):
                torch.autograd.grad(value, x, create_graph=again)
    fixed = implicit.custom_argmin(lambda y, x: ridge(y, x) + 0 * scaled.detach() * (y**2).sum())
    fixed(lambda init, x: exact(x))(torch.zeros(6), x).sum().backward()


class Callable_:
    """A residual that is an object."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        return self.weight * y - x


def test_captured_tensors_are_refused_under_transforms() -> None:
    def value(weight: Tensor) -> Tensor:
        solve = implicit.custom_root(lambda y, x: weight * y - x)(lambda init, x: x / 2)
        return solve(torch.zeros(6), X + 1).sum()

    def nested(weight: Tensor) -> Tensor:
        held = {"weight": [weight]}

        def scale(y: Tensor) -> Tensor:
            return held["weight"][0] * y

        solve = implicit.custom_root(lambda y, x: scale(y) - x)(lambda init, x: x / 2)
        return solve(torch.zeros(6), X + 1).sum()

    def bound(weight: Tensor) -> Tensor:
        def scaled(weight: Tensor, y: Tensor, x: Tensor) -> Tensor:
            return weight * y - x

        solve = implicit.custom_root(partial(scaled, weight))(lambda init, x: x / 2)
        return solve(torch.zeros(6), X + 1).sum()

    def held(weight: Tensor) -> Tensor:
        return implicit.custom_root(Callable_(weight))(lambda init, x: x / 2)(torch.zeros(6), X + 1).sum()

    two = torch.tensor(2.0)
    for fn in (value, nested, bound, held):
        for transform in (grad, lambda f: lambda w: vmap(f)(w[None]), lambda f: lambda w: jvp(f, (w,), (w,))):
            with pytest.raises(ValueError, match="captured instead of receiving it as an argument"):
                transform(fn)(two)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="captured instead of receiving it"):
        value(forward_ad.make_dual(two, two))
    assert float(value(two)) == 3.0


def test_wrong_shapes_are_named() -> None:
    a = torch.ones(3, requires_grad=True)
    broadcast = implicit.custom_root(lambda y, a: y.sum() - a.sum())(lambda init, a: a)
    with pytest.raises(ValueError, match=r"the residual function returned tensor \(\) .* shapes of init's: \(3,\)"):
        broadcast(torch.zeros(3), a).sum().backward()
    with pytest.raises(ValueError, match=r"the solver returned tensor \(1, 3\) .* shapes of init's: \(3,\)"):
        implicit.custom_root(lambda y, a: y - a)(lambda init, a: a[None])(torch.zeros(3), a)
    with pytest.raises(ValueError, match="init mixes dtypes"):
        implicit.custom_root(lambda y, a: y)(lambda init, a: init)((torch.zeros(3), torch.zeros(3).float()), a)
    with pytest.raises(TypeError, match="init must be a tree of floating-point tensors"):
        implicit.custom_root(lambda y, a: y)(lambda init, a: init)(torch.zeros(3, dtype=torch.long), a)
    with pytest.raises(TypeError, match="complex arguments"):
        implicit.custom_root(lambda y, a: y)(lambda init, a: init)(torch.zeros(3), torch.zeros(3, dtype=torch.cfloat))
