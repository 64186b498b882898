"""custom_argmin and custom_root: first and second derivatives against closed forms, gradcheck and gradgradcheck."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev
from torch.nn.functional import cross_entropy

import implicit
from implicit import CG, LU, Cholesky, ConvergenceWarning, NewtonCG, SolveError, tree
from implicit.tree import Tree
from tests.dense import normal, relative, setting_of, swapped

FEATURES, TARGETS = normal(30, 12, 3), normal(31, 12)


def ridge_objective(y: Tree, penalty: Tree, targets: Tensor) -> Tensor:
    residual = FEATURES @ y["w"] + y["b"] - targets
    ridge = (torch.exp(penalty["w"]) * y["w"] ** 2).sum() + torch.exp(penalty["b"]) * y["b"] ** 2
    return 0.5 * (residual**2).mean() + 0.5 * ridge


def ridge_solution(penalty: Tree, targets: Tensor) -> Tensor:
    """w and b in closed form, differentiable."""
    design = torch.cat([FEATURES, torch.ones(12, 1)], dim=1)
    matrix = design.T @ design / 12 + torch.diag(torch.cat([torch.exp(penalty["w"]), torch.exp(penalty["b"])[None]]))
    return torch.linalg.solve(matrix, design.T @ targets / 12)


def ridge_solver(init: Tree, penalty: Tree, targets: Tensor) -> Tree:
    found = ridge_solution(penalty, targets).detach()
    return {"b": found[3], "w": found[:3]}  # keys in another order than init


def ridge_inputs() -> tuple[Tensor, ...]:
    return tuple(t.requires_grad_() for t in (normal(32, 3) - 1, normal(33) - 1, TARGETS.clone()))


INIT = {"w": normal(36, 3), "b": normal(37)}


def as_function(solver: Callable[..., Tree], init: Tree = INIT) -> Callable[..., Tensor]:
    def solve(w: Tensor, b: Tensor, targets: Tensor) -> Tensor:
        found = solver(init, {"b": b, "w": w}, targets)
        return torch.cat([found["w"], found["b"].reshape(1)])

    return solve


def ridge_root(y: Tree, penalty: Tree, targets: Tensor) -> Tree:
    return swapped(grad(ridge_objective)(y, penalty, targets))


WAYS = {
    "argmin, CG": implicit.custom_argmin(ridge_objective, linear_solver=CG(rtol=1e-13)),
    "argmin, Cholesky": implicit.custom_argmin(ridge_objective, linear_solver=Cholesky()),
    "root, LU": implicit.custom_root(ridge_root),
    "root, symmetric CG": implicit.custom_root(ridge_root, linear_solver=CG(rtol=1e-13), symmetric=True),
}


@pytest.mark.parametrize("decorate", WAYS.values(), ids=WAYS)
def test_first_and_second_derivatives_on_pytrees(decorate: Callable[..., Callable[..., Tree]]) -> None:
    solve, inputs = as_function(decorate(ridge_solver)), ridge_inputs()
    assert gradcheck(solve, inputs)
    assert gradgradcheck(solve, inputs, gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("decorate", WAYS.values(), ids=WAYS)
def test_ridge_derivatives_in_closed_form(decorate: Callable[..., Callable[..., Tree]]) -> None:
    inputs = ridge_inputs()
    penalty, weights = {"w": inputs[0], "b": inputs[1]}, normal(34, 4)

    def second(solve: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        slopes = torch.autograd.grad((weights * solve(*inputs)).sum() ** 2, inputs, create_graph=True)
        mix = torch.stack([(slope * (k + 1) * torch.cos(slope)).sum() for k, slope in enumerate(slopes)]).sum()
        return (*slopes, *torch.autograd.grad(mix, inputs))

    solve = as_function(decorate(ridge_solver))
    torch.testing.assert_close(second(solve), second(lambda w, b, t: ridge_solution({"w": w, "b": b}, t)))
    # dy/dl_j = -A^-1 e_j exp(l_j) y_j
    design = torch.cat([FEATURES, torch.ones(12, 1)], dim=1)
    sizes = torch.exp(torch.cat([inputs[0], inputs[1][None]])).detach()
    inverse = torch.linalg.inv(design.T @ design / 12 + torch.diag(sizes))
    expected = -inverse * (sizes * ridge_solution(penalty, TARGETS).detach())
    jacobian = torch.autograd.functional.jacobian(lambda w: solve(w, inputs[1], inputs[2]), inputs[0])
    torch.testing.assert_close(jacobian, expected[:, :3])


def test_argmin_agrees_with_the_hypergradient() -> None:
    setting = setting_of("network")

    @implicit.custom_argmin(lambda y, x: setting.lower(x, y), linear_solver=CG(rtol=1e-13))
    def inner(init: Tree, x: Tree) -> Tree:
        return setting.y

    x = tree.map(lambda leaf: leaf.clone().requires_grad_(), setting.x)
    setting.upper(x, inner(setting.y, x)).backward()
    found = tree.map(lambda leaf: leaf.grad, x)
    assert relative(tree.ravel(found), setting.dense()) < 1e-9


@implicit.custom_root(lambda y, a: y**2 - a)
def square_root(init: Tensor, a: Tensor) -> Tensor:
    return a.sqrt()


def test_scalar_root() -> None:
    """A 0-d unknown has its derivative 1 / (2 sqrt a), not zero."""
    a = torch.tensor(4.0, requires_grad=True)
    root = square_root(torch.tensor(1.0), a)
    slope = torch.autograd.grad(root, a, create_graph=True)[0]
    curvature = torch.autograd.grad(slope, a, create_graph=True)[0]
    third = torch.autograd.grad(curvature, a)[0]
    assert [v.item() for v in (root, slope, curvature, third)] == pytest.approx([2, 1 / 4, -1 / 32, 3 / 256])


MATRIX = torch.tensor([[2.0, 1.5, 0.0], [-1.0, 1.0, 0.3], [0.4, -2.0, 3.0]], dtype=torch.float64)


def nonsymmetric(y: Tree, theta: Tree) -> Tree:
    """``(p (2 + u_0²) - c, M u + p tanh(u) - a)``; its derivative in y is not symmetric."""
    first = MATRIX @ y["u"] + torch.tanh(y["u"]) * y["p"] - theta["a"]
    return {"p": y["p"] * (2 + y["u"][0] ** 2) - theta["c"], "u": first}


UNKNOWN = {"p": normal(38), "u": normal(39, 3)}


def flat_residual(y: Tensor, theta: Tensor) -> Tensor:
    return tree.ravel(nonsymmetric(tree.unravel(y, UNKNOWN), {"a": theta[1:], "c": theta[0]}))


def newton(init: Tree, theta: Tree) -> Tree:
    y, fixed = tree.ravel(init), torch.cat([theta["c"].reshape(1), theta["a"]]).detach()
    for _ in range(30):
        y = y - torch.linalg.solve(jacrev(flat_residual)(y, fixed), flat_residual(y, fixed))
    assert float(flat_residual(y, fixed).norm()) < 1e-13
    return tree.unravel(y, init)


def test_nonsymmetric_root() -> None:
    solver = implicit.custom_root(nonsymmetric, linear_solver=LU())(newton)

    def solve(theta: Tensor) -> Tensor:
        return tree.ravel(solver(UNKNOWN, {"a": theta[1:], "c": theta[0]}))

    theta = torch.tensor([1.3, 1.0, -0.5, 2.0], requires_grad=True)
    assert gradcheck(solve, theta)
    assert gradgradcheck(solve, theta, gen_non_contig_grad_outputs=True)
    assert gradgradcheck(  # third derivatives
        lambda t: torch.autograd.grad((normal(40, 4) * solve(t)).sum(), t, create_graph=True)[0], theta
    )
    at = solve(theta).detach(), theta.detach()
    in_y = jacrev(flat_residual)(*at)
    assert float((in_y - in_y.T).abs().max()) > 1
    expected = -torch.linalg.solve(in_y, jacrev(flat_residual, argnums=1)(*at))
    torch.testing.assert_close(torch.autograd.functional.jacobian(solve, theta), expected)


def test_some_outputs_may_go_unused() -> None:
    inputs = ridge_inputs()
    solver = implicit.custom_argmin(ridge_objective, linear_solver=CG(rtol=1e-13))(ridge_solver)
    found = solver(INIT, {"w": inputs[0], "b": inputs[1]}, inputs[2])["b"]
    expected = ridge_solution({"w": inputs[0], "b": inputs[1]}, inputs[2])[3]
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


def test_the_start_has_no_gradient() -> None:
    init = {key: leaf.clone().requires_grad_() for key, leaf in INIT.items()}
    solve, inputs = as_function(WAYS["argmin, CG"](ridge_solver), init), ridge_inputs()
    grads = torch.autograd.grad(solve(*inputs).sum(), (*tree.leaves(init), *inputs), allow_unused=True)
    assert all(g is None or not bool(g.any()) for g in grads[:2])
    assert all(bool(g.any()) for g in grads[2:])
    fixed = [t.detach() for t in inputs]
    assert not solve(*fixed).requires_grad
    with torch.no_grad():
        assert not solve(*inputs).requires_grad


def test_solvers_may_differentiate() -> None:
    """A solver written with autograd works inside, and its own graph stays out of the result."""

    @implicit.custom_argmin(lambda y, a: ((y - a) ** 2).sum())
    def descend(init: Tensor, a: Tensor) -> Tensor:
        y = init.requires_grad_()
        for _ in range(5):
            y = y - 0.5 * torch.autograd.grad(((y - a) ** 2).sum(), y, create_graph=True)[0]
        return 1.0 * y

    a = normal(41, 3).requires_grad_()
    found = descend(torch.zeros(3), a)
    torch.testing.assert_close(found, a)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), a)[0], torch.ones(3))


def test_arguments_need_not_be_floating_tensors() -> None:
    """Labels, masks, numbers, strings and None travel along; a leaf that enters nothing has a zero gradient."""
    rows, labels = normal(35, 30, 4), torch.arange(30) % 3
    mask = torch.arange(30) % 5 != 0

    def objective(w: Tensor, log_ridge: Tensor, data: Tree, power: float, mode: str | None) -> Tensor:
        assert mode in ("mean", None)
        losses = cross_entropy(data["rows"] @ w, data["labels"], reduction="none")
        return losses[data["mask"]].mean() + 0.5 * (torch.exp(log_ridge) * w.abs() ** power).sum()

    @implicit.custom_argmin(objective, linear_solver=CG(rtol=1e-12))
    def solve(init: Tensor, *theta: Tree) -> Tensor:
        return implicit.minimize(lambda w: objective(w, *theta), init, NewtonCG(rtol=1e-13)).point

    data = {"labels": labels, "rows": rows, "mask": mask, "unused": torch.ones(2, requires_grad=True)}
    log_ridge = torch.tensor(-2.0, requires_grad=True)
    for mode in ("mean", None):
        found = (solve(torch.zeros(4, 3), log_ridge, data, 2.0, mode) ** 2).sum()
        slope, unused = torch.autograd.grad(found, (log_ridge, data["unused"]), create_graph=True)
        curvature = torch.autograd.grad(slope, log_ridge)[0]

        def value(shift: float, mode: str | None = mode) -> float:
            return (solve(torch.zeros(4, 3), log_ridge + shift, data, 2.0, mode) ** 2).sum().item()

        ahead, here, behind = (value(shift) for shift in (1e-3, 0.0, -1e-3))
        assert slope.item() == pytest.approx((ahead - behind) / 2e-3, rel=1e-5)
        assert curvature.item() == pytest.approx((ahead - 2 * here + behind) / 1e-6, rel=1e-4)
        assert not bool(unused.any())


def test_an_indefinite_system_raises() -> None:
    a = torch.tensor(4.0, requires_grad=True)

    @implicit.custom_argmin(lambda y, a: a * y[0] - y[0] ** 2 + y[1] ** 2)
    def saddle(init: Tensor, a: Tensor) -> Tensor:
        return torch.stack([a / 2, torch.zeros(())])

    found = saddle(torch.zeros(2), a).sum()
    with pytest.raises(SolveError, match="implicit differentiation failed: the operator is not positive definite"):
        found.backward()


def test_a_singular_system_is_solved_by_least_squares_with_a_warning() -> None:
    a = torch.tensor(4.0, requires_grad=True)

    @implicit.custom_root(lambda y, a: (y.sum() - a).expand(2))
    def underdetermined(init: Tensor, a: Tensor) -> Tensor:
        return (a / 2).expand(2)

    with pytest.warns(ConvergenceWarning, match="singular to working precision"):
        underdetermined(torch.zeros(2), a).sum().backward()
    torch.testing.assert_close(a.grad, torch.tensor(1.0))  # the sum is a, whichever solution it is


def test_a_linear_system_left_unsolved_warns() -> None:
    diagonal = torch.logspace(0, 6, 50)

    def minimizer(solver: CG) -> Tensor:
        @implicit.custom_argmin(lambda y, b: 0.5 * (diagonal * y**2).sum() - (b * y).sum(), linear_solver=solver)
        def solve(init: Tensor, b: Tensor) -> Tensor:
            return b / diagonal

        return solve(torch.zeros(50), torch.ones(50, requires_grad=True)).sum()

    with pytest.warns(ConvergenceWarning, match=r"relative residual of .* only: true residual not reached in 3 steps"):
        minimizer(CG(max_steps=3)).backward()
    minimizer(CG(rtol=1e-3)).backward()  # met as asked: pytest makes warnings errors
    minimizer(CG(rtol=0.0)).backward()  # stops at rounding level, which is good enough


def test_wrong_trees_are_refused() -> None:
    a = torch.tensor(1.0)
    with pytest.raises(ValueError, match="different structures"):
        implicit.custom_root(lambda y, a: y - a)(lambda init, a: {"y": a})(torch.tensor(0.0), a)
    with pytest.raises(
        TypeError, match=r"init must be a tree of floating-point tensors shaped like the solution, got value 0\.0"
    ):
        square_root(0.0, a)
