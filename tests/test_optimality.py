"""The catalogue of optimality conditions: derivatives against closed forms, whatever the step size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, vmap

import constrained
import implicit
from implicit import optimality
from implicit.tree import Tree
from tests.dense import normal

STEPS = [1.0, 0.3]
MODES = [jacrev, jacfwd]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


ROWS, TARGET = normal(70, 20, 5), normal(71, 20)


def least_squares(y: Tensor, *theta: Tensor) -> Tensor:
    return 0.5 * ((ROWS @ y - TARGET) ** 2).sum()


@pytest.mark.parametrize("mode", MODES)
def test_ridge_in_its_penalty(mode: Callable[..., Any]) -> None:
    """y = (X^T X + t I)^-1 X^T b has dy/dt = -(X^T X + t I)^-1 y and d²y/dt² = 2 (X^T X + t I)^-2 y."""

    def exact(t: Tensor) -> Tensor:
        return torch.linalg.solve(ROWS.T @ ROWS + t * torch.eye(5), ROWS.T @ TARGET)

    def ridge(y: Tensor, t: Tensor) -> Tensor:
        return least_squares(y) + 0.5 * t * (y**2).sum()

    solve = implicit.custom_root(optimality.stationary(ridge), symmetric=True)(lambda init, t: exact(t))
    t = torch.tensor(0.7)
    inverse = torch.linalg.inv(ROWS.T @ ROWS + t * torch.eye(5))
    close(mode(lambda t: solve(torch.zeros(5), t))(t), -inverse @ exact(t))
    close(hessian(lambda t: solve(torch.zeros(5), t))(t), 2 * inverse @ inverse @ exact(t))


def lasso(weight: float) -> Tensor:
    """Proximal gradient to rounding."""
    y, length = torch.zeros(5), 1 / float(torch.linalg.matrix_norm(ROWS, 2) ** 2)
    for _ in range(500):
        y = implicit.soft_threshold(y - length * ROWS.T @ (ROWS @ y - TARGET), length * weight)
    return y


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", MODES)
def test_lasso_in_its_weight(mode: Callable[..., Any], step: float) -> None:
    """On the support S: dy_S/dw = -(X_S^T X_S)^-1 sign(y_S); zero elsewhere."""
    condition = optimality.proximal_gradient(least_squares, implicit.prox_l1(lambda w: w), step)
    solve = implicit.custom_root(condition)(lambda init, w: lasso(float(w)))
    w = torch.tensor(6.0)
    y = solve(torch.zeros(5), w)
    support = y != 0
    assert 0 < int(support.sum()) < 5
    close(condition(y, w), torch.zeros(5))
    columns = ROWS[:, support]
    expected = torch.zeros(5)
    expected[support] = -torch.linalg.solve(columns.T @ columns, torch.sign(y[support]))
    close(mode(lambda w: solve(torch.zeros(5), w))(w), expected)


def distance(y: Tensor, data: Tensor, *_: Tensor) -> Tensor:
    return 0.5 * ((y - data) ** 2).sum()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", MODES)
def test_soft_thresholding(mode: Callable[..., Any], step: float) -> None:
    """The Jacobian in the data is diag(|data| > w), in the weight -sign(data) on the same entries."""
    condition = optimality.proximal_gradient(distance, implicit.prox_l1(lambda data, w: w), step)
    solve = implicit.custom_root(condition)(lambda init, data, w: implicit.soft_threshold(data, w))
    data, w = torch.tensor([3.0, -0.2, 0.5, -2.0]), torch.tensor(0.7)
    kept = (data.abs() > w).double()
    found = mode(lambda data, w: solve(torch.zeros(4), data, w), argnums=(0, 1))(data, w)
    close(found[0], torch.diag(kept))
    close(found[1], -torch.sign(data) * kept)


@pytest.mark.parametrize("step", STEPS)
def test_elastic_net(step: float) -> None:
    """y = ST(data, w) / (1 + r)."""
    prox = implicit.prox_elastic_net(lambda data, w, r: w, lambda data, w, r: r)
    solve = implicit.custom_root(optimality.proximal_gradient(distance, prox, step))(
        lambda init, data, w, r: implicit.soft_threshold(data, w) / (1 + r)
    )
    inputs = torch.tensor([3.0, -0.2, 0.5, -2.0]), torch.tensor(0.4), torch.tensor(0.6)

    def exact(data: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return implicit.soft_threshold(data, w) / (1 + r)

    for derivative in (jacrev, lambda f, argnums: jacfwd(jacrev(f, argnums), argnums)):
        found = derivative(lambda *t: solve(torch.zeros(4), *t), argnums=(0, 1, 2))(*inputs)
        torch.testing.assert_close(found, derivative(exact, argnums=(0, 1, 2))(*inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", STEPS)
def test_group_lasso(step: float) -> None:
    """Blocks that vanish have zero derivatives, without NaN, also at an exactly zero block."""
    prox = implicit.prox_group_lasso(lambda data, w: w)
    solve = implicit.custom_root(optimality.proximal_gradient(distance, prox, step))(
        lambda init, data, w: implicit.block_soft_threshold(data, w)
    )
    data, w = torch.tensor([[3.0, 4.0], [0.3, -0.4], [0.0, 0.0]]), torch.tensor(1.0)
    found = jacrev(lambda data, w: solve(torch.zeros(3, 2), data, w), argnums=(0, 1))(data, w)
    unit = torch.tensor([0.6, 0.8])
    block = torch.eye(2) - (torch.eye(2) - torch.outer(unit, unit)) * w / 5
    expected = torch.zeros(3, 2, 3, 2)
    expected[0, :, 0] = block
    close(found[0], expected)
    close(found[1], torch.stack([-unit, torch.zeros(2), torch.zeros(2)]))


def test_proximal_operators_minimize() -> None:
    """prox(v, s) minimizes r(u) + ||u - v||² / 2s: random neighbours are worse; its derivatives are right."""
    v, s = 2 * normal(72, 4, 3), 0.4
    penalties: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "l1": (implicit.prox_l1(1.5), lambda u: 1.5 * u.abs().sum()),
        "elastic net": (implicit.prox_elastic_net(0.8, 2.0), lambda u: 0.8 * u.abs().sum() + (u**2).sum()),
        "rows": (implicit.prox_group_lasso(2.0), lambda u: 2.0 * u.norm(dim=-1).sum()),
        "matrix": (implicit.prox_group_lasso(2.0, dim=(0, 1)), lambda u: 2.0 * u.norm()),
    }
    for prox, penalty in penalties.values():
        best = prox(v, s)

        def value(u: Tensor, penalty: Callable[..., Tensor] = penalty) -> Tensor:
            return penalty(u) + ((u - v) ** 2).sum() / (2 * s)

        for seed in range(20):
            for width in (1e-3, 0.1):
                assert float(value(best + width * normal(100 + seed, 4, 3))) > float(value(best))
        assert gradcheck(lambda v, prox=prox: prox(v, s), v.clone().requires_grad_())
        assert gradgradcheck(lambda v, prox=prox: prox(v, s), v.clone().requires_grad_())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", MODES)
def test_projection_onto_the_simplex(mode: Callable[..., Any], step: float) -> None:
    """Its Jacobian is diag(s) - s s^T / |s| with s the support."""
    simplex = constrained.Simplex()
    condition = optimality.projected_gradient(distance, lambda v, *_: simplex.project(v), step)
    solve = implicit.custom_root(condition)(lambda init, data: simplex.project(data))
    data = torch.tensor([0.9, 0.5, -1.0, 0.4])
    s = (solve(torch.zeros(4), data) > 0).double()
    assert int(s.sum()) == 3
    close(mode(lambda d: solve(torch.zeros(4), d))(data), torch.diag(s) - torch.outer(s, s) / s.sum())


SETS: dict[str, tuple[constrained.ConvexSet, Callable[[Tensor], Tensor]]] = {
    "nonnegative": (constrained.Nonnegative(), lambda p: torch.diag((p > 0).double())),
    "box": (constrained.Box(-0.5, 0.8), lambda p: torch.diag(((p > -0.5) & (p < 0.8)).double())),
    "ball": (constrained.Ball(1.5), lambda p: 1.5 / p.norm() * (torch.eye(4) - torch.outer(p, p) / (p @ p))),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", SETS)
def test_projections_onto_sets(name: str, step: float) -> None:
    chosen, jacobian = SETS[name]
    condition = optimality.projected_gradient(distance, lambda v, *_: chosen.project(v), step)
    solve = implicit.custom_root(condition)(lambda init, data: chosen.project(data))
    data = torch.tensor([1.0, -2.0, 0.3, -0.1])
    for mode in MODES:
        close(mode(lambda d: solve(torch.zeros(4), d))(data), jacobian(data))


@pytest.mark.parametrize("step", STEPS)
def test_a_set_that_depends_on_theta(step: float) -> None:
    """min ||y - data||² with y <= u: the bound moves the entries that touch it, with their second derivatives."""
    condition = optimality.projected_gradient(
        lambda y, data, u: distance(y, data), lambda v, data, u: torch.minimum(v, torch.exp(u)), step
    )
    solve = implicit.custom_root(condition)(lambda init, data, u: torch.minimum(data, torch.exp(u)))
    data, u = torch.tensor([2.0, 0.1]), torch.tensor([0.2, 0.3])
    touching = torch.diag(torch.tensor([1.0, 0.0]))
    found = jacrev(lambda data, u: solve(torch.zeros(2), data, u), argnums=(0, 1))(data, u)
    close(found[0], torch.eye(2) - touching)
    close(found[1], touching * torch.exp(u))
    curved = hessian(lambda u: solve(torch.zeros(2), data, u)[0])(u)
    close(curved, touching * torch.exp(u))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", MODES)
def test_entropy_on_the_simplex(mode: Callable[..., Any], step: float) -> None:
    """min <y, log y> - <y, data> over the simplex is softmax(data), with Jacobian diag(p) - p p^T."""

    def entropic(y: Tensor, data: Tensor) -> Tensor:
        return (y * torch.log(y)).sum() - (y * data).sum()

    solve = implicit.custom_root(optimality.entropic_mirror_descent(entropic, step))(
        lambda init, data: torch.softmax(data, 0)
    )
    data = normal(73, 5)
    p = torch.softmax(data, 0)
    close(mode(lambda d: solve(torch.full((5,), 0.2), d))(data), torch.diag(p) - torch.outer(p, p))
    weights = normal(74, 5)
    close(
        hessian(lambda d: weights @ solve(torch.full((5,), 0.2), d))(data),
        hessian(lambda d: weights @ torch.softmax(d, 0))(data),
    )


def test_mirror_descent_with_the_euclidean_mirror_is_projected_gradient() -> None:
    simplex, data = constrained.Simplex(), torch.tensor([0.9, 0.5, -1.0, 0.4])
    mirror = optimality.mirror_descent(distance, lambda z, *_: simplex.project(z), lambda y: y, 0.3)
    project = optimality.projected_gradient(distance, lambda v, *_: simplex.project(v), 0.3)
    y = simplex.project(normal(75, 4))
    close(mirror(y, data), project(y, data))


@pytest.mark.parametrize("step", [1.0, {"v": 0.3, "u": 0.5}])
def test_blocks(step: Any) -> None:
    """A lasso block and a nonnegative block, coupled; the joint active set solved in closed form."""
    coupling = 0.3 * normal(76, 3, 3)

    def smooth(y: Tree, a: Tensor, b: Tensor) -> Tensor:
        return distance(y["u"], a) + distance(y["v"], b) + y["u"] @ coupling @ y["v"]

    prox = {"u": implicit.prox_l1(0.2), "v": lambda v, step, *theta: v.clamp(min=0)}
    condition = optimality.block_proximal_gradient(smooth, prox, step)

    def solver(init: Tree, a: Tensor, b: Tensor) -> Tree:
        u, v = init["u"], init["v"]
        for _ in range(200):
            u = implicit.soft_threshold(a - coupling @ v, 0.2)
            v = (b - u @ coupling).clamp(min=0)
        return {"v": v, "u": u}

    solve = implicit.custom_root(condition)(solver)
    init, a, b = (
        {"u": torch.zeros(3), "v": torch.zeros(3)},
        torch.tensor([1.0, -0.75, -1.0]),
        torch.tensor([1.0, -1.0, 0.5]),
    )
    y = solve(init, a, b)
    close(torch.cat([condition(y, a, b)["u"], condition(y, a, b)["v"]]), torch.zeros(6))
    free = torch.cat([y["u"] != 0, y["v"] > 0])
    assert free.tolist() == [True, False, True, True, False, True]
    full = torch.eye(6)
    full[:3, 3:], full[3:, :3] = coupling, coupling.T
    expected = torch.zeros(6, 6)
    expected[free.outer(free)] = torch.linalg.inv(full[free][:, free]).ravel()
    for mode in MODES:
        found = mode(lambda d: torch.cat([(y := solve(init, d[:3], d[3:]))["u"], y["v"]]))(torch.cat([a, b]))
        close(found, expected)


def test_fixed_points_of_trees() -> None:
    condition = optimality.fixed_point(lambda y, a: {"b": y["a"] * a, "a": y["b"] + 1})
    found = condition({"a": torch.tensor(2.0), "b": torch.tensor(3.0)}, torch.tensor(5.0))
    assert {key: float(value) for key, value in found.items()} == {"a": 2.0, "b": 7.0}


def test_conditions_leave_no_graph_behind() -> None:
    """Plain tensors in, plain tensors out: an iteration y <- y - F(y) must not grow a graph."""
    condition = optimality.stationary(lambda y, x: distance(y, x))
    assert not condition(torch.zeros(3), torch.ones(3)).requires_grad
    x = torch.ones(3, requires_grad=True)
    slope = condition(torch.zeros(3), x)
    close(torch.autograd.grad(slope.sum(), x)[0], -torch.ones(3))
    y = torch.zeros(3, requires_grad=True)
    close(torch.autograd.grad(condition(y, x).sum(), (y, x))[0], torch.ones(3))
    with torch.no_grad():
        assert not condition(y, x).requires_grad
    close(vmap(condition)(torch.zeros(2, 3), torch.ones(2, 3)), -torch.ones(2, 3))


def test_entropy_at_a_face_is_named() -> None:
    solve = implicit.custom_root(optimality.entropic_mirror_descent(lambda y, c: y @ c))(
        lambda init, c: torch.tensor([1.0, 0.0])
    )
    with pytest.raises(implicit.SolveError, match="not finite"):
        solve(torch.full((2,), 0.5), torch.tensor([0.0, 1.0], requires_grad=True))[0].backward()


@pytest.mark.parametrize("step", [0.0, -1.0, float("inf"), float("nan"), "1"])
def test_steps_are_checked(step: Any) -> None:
    with pytest.raises(ValueError, match="step must be a positive number"):
        optimality.proximal_gradient(distance, implicit.prox_l1(), step)
    with pytest.raises(ValueError, match=r"step\['u'\] must be a positive number"):
        optimality.block_proximal_gradient(distance, {"u": implicit.prox_l1()}, {"u": step})
    with pytest.raises(ValueError, match="step must be a positive number"):
        optimality.mirror_descent(distance, lambda z: z, lambda y: y, step)
