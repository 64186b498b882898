"""custom_kkt: derivatives of constrained solutions and their multipliers in closed form, and what is named."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicit
from implicit import ConvergenceWarning, KKTPoint, optimality
from implicit.kkt import EquilibratedLU
from implicit.tree import Tree
from tests.dense import normal

ROOT_OF_Q = normal(80, 4, 4)
Q = ROOT_OF_Q @ ROOT_OF_Q.T + torch.eye(4, dtype=torch.float64)
E, C = normal(81, 2, 4), normal(82, 3, 4)


def close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def quadratic(y: Tensor, q: Tensor, p: Tensor, *_: Tensor) -> Tensor:
    return 0.5 * y @ q @ y - p @ y


def equality_solution(q: Tensor, p: Tensor, e: Tensor, b: Tensor) -> KKTPoint:
    """One linear system, differentiable."""
    n, m = len(p), len(b)
    matrix = torch.cat([torch.cat([0.5 * (q + q.T), e.T], 1), torch.cat([e, torch.zeros(m, m)], 1)])
    found = torch.linalg.solve(matrix, torch.cat([p, b]))
    return KKTPoint(found[:n], found[n:])


WHAT_IS_RETURNED: dict[str, Callable[[KKTPoint], Any]] = {
    "y": lambda point: point.y,
    "a point": lambda point: point,
    "a point without multipliers": lambda point: KKTPoint(point.y, None, None),  # pyright: ignore
    "a tuple": tuple,
    "a list": list,
}


@pytest.mark.parametrize("returned", WHAT_IS_RETURNED.values(), ids=WHAT_IS_RETURNED)
def test_an_equality_program_in_all_its_data(returned: Callable[[KKTPoint], Any]) -> None:
    """y and its multipliers, whether or not the solver gives them; first and second derivatives."""
    data = (Q, normal(83, 4), E, normal(84, 2))

    @implicit.custom_kkt(quadratic, equality=lambda y, q, p, e, b: e @ y - b)
    def solve(init: Tensor, *theta: Tensor) -> Any:
        return returned(equality_solution(*theta))

    found = solve(torch.zeros(4), *data)
    close(torch.cat([found.y, found.equality]), torch.cat(equality_solution(*data)[:2]))
    assert found.inequality == ()
    for mode in (jacrev, jacfwd):
        jacobian = mode(lambda *d: solve(torch.zeros(4), *d)[:2], argnums=(0, 1, 2, 3))(*data)
        close(jacobian, jacrev(lambda *d: equality_solution(*d)[:2], argnums=(0, 1, 2, 3))(*data))

    def value(solver: Callable[..., KKTPoint], q: Tensor, e: Tensor, b: Tensor) -> Tensor:
        point = solver(q, data[1], e, b)
        return torch.sin(point.y).sum() + (point.equality**2).sum()

    inner: Callable[..., KKTPoint] = lambda *d: solve(torch.zeros(4), *d)  # noqa: E731
    for second in (hessian, lambda f, argnums: jacrev(jacrev(f, argnums), argnums)):
        every = second(lambda *d: value(inner, *d), argnums=(0, 1, 2))(Q, E, data[3])
        close(every, hessian(lambda *d: value(equality_solution, *d), argnums=(0, 1, 2))(Q, E, data[3]), 1e-9)


def test_the_closed_form_of_the_equality_program() -> None:
    """d(y, multiplier) / d(p, b) = K^-1."""
    kkt = torch.cat([torch.cat([Q, E.T], 1), torch.cat([E, torch.zeros(2, 2)], 1)])
    solve = implicit.custom_kkt(quadratic, equality=lambda y, q, p, e, b: e @ y - b)(
        lambda init, *theta: equality_solution(*theta)
    )

    def stacked(right: Tensor) -> Tensor:
        return torch.cat(solve(torch.zeros(4), Q, right[:4], E, right[4:])[:2])

    close(jacrev(stacked)(torch.cat([normal(83, 4), normal(84, 2)])), torch.linalg.inv(kkt))


def active_set(q: Tensor, p: Tensor, c: Tensor, d: Tensor) -> KKTPoint:
    """min y'qy/2 - p'y, c y <= d by enumeration of active sets; differentiable."""
    m = len(d)
    for mask in range(2**m):
        index = [i for i in range(m) if mask >> i & 1]
        point = equality_solution(q, p, c[index], d[index])
        if bool((c @ point.y <= d + 1e-12).all()) and bool((point.equality >= 0).all()):
            return KKTPoint(point.y, (), torch.zeros(m).index_put((torch.tensor(index),), point.equality))
    raise AssertionError("no active set fits")


INEQUALITY = (Q, 3 * normal(85, 4), C, torch.tensor([0.1, 0.2, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("returned", ["y", "a point", "a tuple"])
def test_an_inequality_program(returned: str) -> None:
    exact = active_set(*INEQUALITY)
    force = exact.inequality
    assert 0 < int((force > 1e-3).sum()) < 3  # some active, some not
    assert float(torch.maximum(force, INEQUALITY[3] - C @ exact.y).min()) > 1e-3  # strict complementarity

    @implicit.custom_kkt(quadratic, inequality=lambda y, q, p, c, d: c @ y - d)
    def solve(init: Tensor, *theta: Tensor) -> Any:
        return WHAT_IS_RETURNED[returned](active_set(*theta))

    def pair(point: KKTPoint) -> tuple[Tensor, Tensor]:
        return point.y, point.inequality

    close(pair(solve(torch.zeros(4), *INEQUALITY)), pair(exact))
    for mode in (jacrev, jacfwd):
        found = mode(lambda *t: pair(solve(torch.zeros(4), *t)), argnums=(0, 1, 2, 3))(*INEQUALITY)
        index = (force > 1e-3).nonzero()[:, 0]

        def smooth(q: Tensor, p: Tensor, c: Tensor, d: Tensor, index: Tensor = index) -> tuple[Tensor, Tensor]:
            point = equality_solution(q, p, c[index], d[index])
            return point.y, torch.zeros(3).index_put((index,), point.equality)

        close(found, jacrev(smooth, argnums=(0, 1, 2, 3))(*INEQUALITY), 1e-9)
    weights = normal(86, 4)
    close(
        hessian(lambda c: weights @ solve(torch.zeros(4), Q, INEQUALITY[1], c, INEQUALITY[3]).y)(C),
        hessian(lambda c: weights @ smooth(Q, INEQUALITY[1], c, INEQUALITY[3])[0])(C),
        1e-9,
    )


def test_gradcheck_in_every_mode() -> None:
    @implicit.custom_kkt(
        quadratic, equality=lambda y, q, p, b: y.sum() - b, inequality=lambda y, q, p, b: {"low": -y, "high": y - 2}
    )
    def solve(init: Tensor, *theta: Tensor) -> Tensor:
        q, p, b = (t.detach() for t in theta)
        stacked = torch.cat([-torch.eye(4), torch.eye(4)])
        best, value = init, torch.tensor(float("inf"))
        for mask in range(2**4):  # which of the lower bounds are active; the upper ones are not
            index = [i for i in range(4) if mask >> i & 1]
            rows = torch.cat([torch.ones(1, 4), stacked[index]])
            y = equality_solution(q, p, rows, torch.cat([b.reshape(1), torch.zeros(len(index))])).y
            if bool((y >= -1e-12).all()) and bool((y < 2).all()) and float(quadratic(y, q, p)) < float(value):
                best, value = y, quadratic(y, q, p)
        return best.detach()

    p, b = torch.tensor([1.0, -6.0, 2.0, 0.5], requires_grad=True), torch.tensor(1.2, requires_grad=True)
    q = 3 * torch.eye(4)

    def fn(p: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        point = solve(torch.full((4,), 0.25), q, p, b)
        return point.y, point.equality, point.inequality["low"]

    y, _, low = fn(p, b)
    assert 0 < int((y > 1e-6).sum()) < 4
    assert bool((low[y <= 1e-6] > 0).all())
    assert gradcheck(fn, (p, b), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(fn, (p, b), check_fwd_over_rev=True)


def bounded(y: Tensor, theta: Tensor) -> Tensor:
    return y - 1


def distance(y: Tensor, theta: Tensor) -> Tensor:
    return 0.5 * ((y - theta) ** 2).sum()


@pytest.mark.parametrize("with_multipliers", [True, False])
def test_the_bound_program(with_multipliers: bool) -> None:
    """min ||y - theta||²/2, y <= 1: dy = 1 below the bound and 0 above; dmultiplier the other way round."""

    @implicit.custom_kkt(distance, inequality=bounded)
    def solve(init: Tensor, theta: Tensor) -> Any:
        y = theta.clamp(max=1)
        return KKTPoint(y, (), (theta - 1).clamp(min=0)) if with_multipliers else y

    for theta, expected in ((0.4, (1.0, 0.0)), (1.7, (0.0, 1.0))):
        point = jacrev(lambda t: solve(torch.zeros(()), t))(torch.tensor(theta))
        close((point.y, point.inequality), tuple(map(torch.tensor, expected)))
    many = torch.tensor([0.4, 1.7, -3.0])
    close(vmap(grad(lambda t: solve(torch.zeros(()), t).y))(many), torch.tensor([1.0, 0.0, 1.0]))


def test_strict_complementarity_is_named() -> None:
    """At theta = 1 the one-sided derivatives are 0 and 1: named, and the least-squares answer lies between."""
    solve = implicit.custom_kkt(distance, inequality=bounded)(lambda init, theta: theta.clamp(max=1))
    theta = torch.tensor([0.2, 1.0, 3.0])
    for mode in (jacrev, jacfwd):
        with pytest.warns(ConvergenceWarning) as caught:
            jacobian = mode(lambda t: solve(torch.zeros(3), t).y)(theta)
        messages = [str(w.message) for w in caught]
        assert any("strict complementarity fails" in m and "both zero for [1];" in m for m in messages)
        close(jacobian, torch.diag(torch.tensor([1.0, 0.5, 0.0])))
    with pytest.warns(ConvergenceWarning) as caught:
        grad(lambda t: solve(torch.zeros(3), t).y.sum())(torch.tensor([1.0, 1.0 + 1e-9, 3.0]))
    assert any("both zero for [0], [1]; the solution has" in str(w.message) for w in caught)


def test_dependent_constraints_are_named() -> None:
    """The same bound twice: y still has its derivative, the multipliers are not unique."""
    solve = implicit.custom_kkt(distance, inequality=lambda y, t: torch.cat([y - 1, y - 1]))(
        lambda init, theta: theta.clamp(max=1)
    )
    theta = torch.tensor([0.3, 2.0])
    with pytest.warns(ConvergenceWarning, match="singular to working precision"):
        jacobian = jacfwd(lambda t: solve(torch.zeros(2), t).y)(theta)
    close(jacobian, torch.diag(torch.tensor([1.0, 0.0])))
    with pytest.warns(ConvergenceWarning, match="singular to working precision"):
        close(grad(lambda t: solve(torch.zeros(2), t).y.sum())(theta), torch.tensor([1.0, 0.0]))


def test_recovered_multipliers_are_not_negative() -> None:
    """y = 1 held from both sides: unbounded least squares would share the force between the two with opposite signs."""
    solve = implicit.custom_kkt(distance, inequality=lambda y, t: torch.stack([y - 1, 1 - y]))(
        lambda init, theta: torch.ones(())
    )
    close(solve(torch.zeros(()), torch.tensor(3.0)).inequality, torch.tensor([2.0, 0.0]))
    close(solve(torch.zeros(()), torch.tensor(-3.0)).inequality, torch.tensor([0.0, 4.0]))


def test_the_scaled_factorization_serves_the_transpose() -> None:
    matrix = torch.tensor([[1e-9, 2.0, 0.0], [3.0, 1e6, 1.0], [0.0, 5e4, 1e-3]])
    operator, solver, b = implicit.Dense(matrix, symmetric=False), EquilibratedLU(), normal(91, 3)
    prepared = solver.init(operator)
    close(solver.solve(operator, b, prepared=prepared).value, torch.linalg.solve(matrix, b))
    turned = solver.solve(operator.T, b, prepared=solver.transpose(prepared)).value
    close(turned, torch.linalg.solve(matrix.T, b))


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "outside": (
        lambda init, t: KKTPoint(t, (), torch.zeros(2)),
        r"constraints are violated: \[1\]; the solver's point",
    ),
    "wrong sign": (
        lambda init, t: KKTPoint(t.clamp(max=1), (), -torch.ones(2)),
        r"multipliers are negative: \[0\], \[1\]; .* sign convention c\(y\) <= 0",
    ),
    "interior": (lambda init, t: 0.5 * t, r"did not solve what is differentiated"),
}


@pytest.mark.parametrize(("solver", "message"), WRONG.values(), ids=WRONG)
def test_points_that_are_no_solution_are_named(solver: Callable[..., Any], message: str) -> None:
    solve = implicit.custom_kkt(distance, inequality=bounded)(solver)
    theta = torch.tensor([0.5, 1.5], requires_grad=True)
    value = solve(torch.zeros(2), theta).y.sum()
    with pytest.warns(ConvergenceWarning) as caught:
        value.backward()
    assert any(re.search(message, str(w.message)) for w in caught)


def test_y_and_multipliers_are_judged_apart() -> None:
    """Multipliers of 1e6 do not hide an error of y, nor does a small error of theirs count against y."""
    custom = implicit.custom_kkt(
        lambda y, t: 1e6 * y[0] + 0.5 * ((y - t) ** 2).sum(), equality=lambda y, t: y[0] - t[0]
    )
    theta = torch.tensor([1.0, 2.0], requires_grad=True)
    wrong = custom(lambda init, t: KKTPoint(t + torch.tensor([0.0, 0.3]), torch.tensor(-1e6)))
    with pytest.warns(ConvergenceWarning, match=r"by 0\.3"):
        wrong(torch.zeros(2), theta).y.sum().backward()
    custom(lambda init, t: KKTPoint(t, torch.tensor(-1.001e6)))(torch.zeros(2), theta).y.sum().backward()


def test_multipliers_of_the_wrong_sign_are_named() -> None:
    """The y of an equality program is right, but its multipliers are those of L = g - <multiplier, h>."""
    data = (Q, normal(83, 4), E, normal(84, 2))

    @implicit.custom_kkt(quadratic, equality=lambda y, q, p, e, b: e @ y - b)
    def solve(init: Tensor, *theta: Tensor) -> KKTPoint:
        exact = equality_solution(*theta)
        return KKTPoint(exact.y, -exact.equality)

    with pytest.warns(ConvergenceWarning, match=r"multipliers do not balance .* check the signs in L = g \+ <equality"):
        grad(lambda p: solve(torch.zeros(4), Q, p, E, data[3]).y.sum())(data[1])


@pytest.mark.parametrize("units", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_active_set_has_no_units(units: float, scale: float) -> None:
    """Neither the units of y nor those of a constraint decide which constraints are active."""
    solve = implicit.custom_kkt(
        lambda y, t: 0.5 * ((y / units - t) ** 2).sum(), inequality=lambda y, t: scale * (y / units - 1)
    )(lambda init, t: units * t.clamp(max=1))
    theta = torch.tensor([0.9, 1.1, 0.999])
    point = solve(torch.zeros(3), theta)
    close(point.inequality * scale, torch.tensor([0.0, 0.1, 0.0]))
    close(jacrev(lambda t: solve(torch.zeros(3), t).y / units)(theta), torch.diag(torch.tensor([1.0, 0.0, 1.0])))


def test_trees_of_variables_and_constraints() -> None:
    """min |u - a|² + |v - b|² with u + v = 1 and u >= 0: dicts in any order, one multiplier given, one recovered."""

    def objective(y: Tree, theta: Tree) -> Tensor:
        return 0.5 * ((y["u"] - theta["a"]) ** 2).sum() + 0.5 * ((y["v"] - theta["b"]) ** 2).sum()

    @implicit.custom_kkt(
        objective, equality=lambda y, t: {"sum": y["u"] + y["v"] - 1}, inequality=lambda y, t: [{"sign": -y["u"]}]
    )
    def solve(init: Tree, theta: Tree) -> Any:
        u = (0.5 * (1 + theta["a"] - theta["b"])).clamp(min=0)
        return KKTPoint({"v": 1 - u, "u": u}, {"sum": theta["b"] - (1 - u)}, None)  # pyright: ignore

    init = {"u": torch.zeros(2), "v": torch.zeros(2)}
    a, b = torch.tensor([0.3, -2.0]), torch.tensor([0.2, 0.5])
    point = solve(init, {"b": b, "a": a})
    close(point.inequality[0]["sign"], torch.tensor([0.0, 1.5]))
    found = jacrev(lambda a, b: solve(init, {"a": a, "b": b}).y["u"], argnums=(0, 1))(a, b)
    close(found, (torch.diag(torch.tensor([0.5, 0.0])), torch.diag(torch.tensor([-0.5, 0.0]))))


def test_another_linear_solver_may_be_chosen() -> None:
    data = (Q, normal(83, 4), E, normal(84, 2))
    solve = implicit.custom_kkt(quadratic, equality=lambda y, q, p, e, b: e @ y - b, linear_solver=implicit.LU())(
        lambda init, *theta: equality_solution(*theta)
    )
    p = data[1].clone().requires_grad_()
    solve(torch.zeros(4), Q, p, E, data[3]).y.sum().backward()
    close(p.grad, grad(lambda p: equality_solution(Q, p, E, data[3]).y.sum())(data[1]))


def test_the_vertex_of_a_linear_program() -> None:
    """min c'y, y >= 0, a'y = 1: the vertex 1/a_j with dy_j/da_j = -1/a_j²; y does not depend on c."""

    @implicit.custom_kkt(lambda y, c, a: c @ y, equality=lambda y, c, a: a @ y - 1, inequality=lambda y, c, a: -y)
    def solve(init: Tensor, c: Tensor, a: Tensor) -> Tensor:
        best = int((c / a).argmin())
        return torch.zeros(3).index_put((torch.tensor([best]),), 1 / a[best])

    c, a = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 0.5])
    found = jacrev(lambda c, a: solve(torch.zeros(3), c, a).y, argnums=(0, 1))(c, a)
    expected = torch.zeros(3, 3)
    expected[1, 1] = -0.25
    close(found, (torch.zeros(3, 3), expected))
    prices = jacrev(lambda c: solve(torch.zeros(3), c, a).equality)(c)
    close(prices, torch.tensor([0.0, -0.5, 0.0]))


def test_the_analytic_centre() -> None:
    """min -sum log(b - A y): smooth, interior; KKT with an inactive bound agrees with plain stationarity."""
    rows = torch.tensor([[1.0, 0.2], [-1.0, 0.1], [0.3, 1.0], [-0.2, -1.0]])

    def barrier(y: Tensor, b: Tensor) -> Tensor:
        return -torch.log(b - rows @ y).sum()

    def centre(b: Tensor) -> Tensor:
        y = torch.zeros(2)
        for _ in range(30):
            y = y - torch.linalg.solve(hessian(barrier)(y, b), grad(barrier)(y, b))
        return y

    b = torch.tensor([1.0, 1.5, 2.0, 1.0])
    free = implicit.custom_argmin(barrier, linear_solver=implicit.Cholesky())(lambda init, b: centre(b))
    boxed = implicit.custom_kkt(barrier, inequality=lambda y, b: y - 100)(lambda init, b: centre(b))
    y = centre(b)
    mixed = jacrev(grad(barrier), argnums=1)(y, b)
    expected = -torch.linalg.solve(hessian(barrier)(y, b), mixed)
    close(jacrev(lambda b: free(torch.zeros(2), b))(b), expected)
    close(jacrev(lambda b: boxed(torch.zeros(2), b).y)(b), expected)


def test_misuse_is_named() -> None:
    theta = torch.zeros(2)
    with pytest.raises(ValueError, match=r"the solver must return y, a tuple \(y, equality multipliers"):
        implicit.custom_kkt(distance, inequality=bounded)(lambda init, t: {"y": t})(torch.zeros(2), theta)
    with pytest.raises(ValueError, match="active_tolerance must be None or > 0, got 0"):
        implicit.custom_kkt(distance, active_tolerance=0.0)
    with pytest.raises(ValueError, match="residual_tolerance must be None or > 0, got -1"):
        implicit.custom_kkt(distance, residual_tolerance=-1.0)
    with pytest.raises(ValueError, match="the solver returned"):
        implicit.custom_kkt(distance, inequality=bounded)(lambda init, t: KKTPoint(t, (), torch.zeros(3)))(
            torch.zeros(2), theta
        )


def test_the_conditions_themselves() -> None:
    """F = (grad L, h, multiplier * c), term by term."""
    condition = optimality.kkt(quadratic, lambda y, *t: E @ y - 1, lambda y, *t: {"c": C @ y - 2})
    y, nu, lam, p = normal(87, 4), normal(88, 2), normal(89, 3), normal(90, 4)
    found = condition(KKTPoint(y, nu, {"c": lam}), Q, p)
    close(found.y, Q @ y - p + E.T @ nu + C.T @ lam)
    close(found.equality, E @ y - 1)
    close(found.inequality["c"], lam * (C @ y - 2))
