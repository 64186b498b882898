"""Derivatives of constrained solutions: closed forms, re-solves, cvxpy layers, every mode and order, what warns."""

import math
from typing import Any

import cvxpy as cp
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicit
from constrained import AugmentedLagrangian, EqualityProblem, InteriorPoint, OptimalPoint, differentiable
from implicit import ConvergenceWarning, SolveError, Status, tree
from tests.dense import normal

METHODS = [None, AugmentedLagrangian(), InteriorPoint()]
ATOL = 1e-10


def close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


SPHERE: dict[str, Any] = {
    "objective": lambda x, p, r: 0.5 * ((x - p) ** 2).sum(),
    "equality": lambda x, p, r: 0.5 * ((x**2).sum() - r**2),
}


def on_sphere(p: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The projection and its multiplier: x (1 + l) = p."""
    return r * p / p.norm(), p.norm() / r - 1


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name if m else "default")
def test_projection_onto_a_sphere(method: Any) -> None:
    p, r = torch.tensor([3.0, -1.0, 2.0]), torch.tensor(1.5)
    nearest = differentiable(**SPHERE, method=method, atol=ATOL)

    def pair(p: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        found = nearest(torch.tensor([1.0, 0.1, 1.0]), p, r)
        assert isinstance(found, OptimalPoint)
        assert found.inequality == ()
        return found.x, found.equality

    close(pair(p, r), on_sphere(p, r))
    for mode in (jacrev, jacfwd):
        close(mode(pair, argnums=(0, 1))(p, r), jacrev(on_sphere, argnums=(0, 1))(p, r))
    scalar = lambda solve: lambda p, r: torch.sin(solve(p, r)[0]).sum() + solve(p, r)[1] ** 2  # noqa: E731
    close(hessian(scalar(pair), argnums=(0, 1))(p, r), hessian(scalar(on_sphere), argnums=(0, 1))(p, r), 1e-5)
    third = lambda solve: grad(lambda t: hessian(lambda r: scalar(solve)(p, r))(t))(r)  # noqa: E731
    close(third(pair), third(on_sphere), 1e-4)


ROOT, E = normal(1, 4, 4), normal(2, 2, 4)
Q = ROOT @ ROOT.T + torch.eye(4)


def test_an_equality_program_in_all_its_data() -> None:
    def exact(q: Tensor, p: Tensor, e: Tensor, b: Tensor) -> Tensor:
        matrix = torch.cat([torch.cat([0.5 * (q + q.T), e.T], 1), torch.cat([e, torch.zeros(2, 2)], 1)])
        return torch.linalg.solve(matrix, torch.cat([p, b]))

    program = differentiable(
        lambda x, q, p, e, b: 0.5 * x @ q @ x - p @ x, equality=lambda x, q, p, e, b: e @ x - b, atol=ATOL
    )

    def found(*data: Tensor) -> Tensor:
        point = program(torch.zeros(4), *data)
        return torch.cat([point.x, point.equality])

    data = (Q, normal(3, 4), E, normal(4, 2))
    close(found(*data), exact(*data))
    every = (0, 1, 2, 3)
    for mode in (jacrev, jacfwd):
        close(mode(found, argnums=every)(*data), jacrev(exact, argnums=every)(*data))


BOX: dict[str, Any] = {"objective": lambda x, p: 0.5 * ((x - p) ** 2).sum()}
POINT = torch.tensor([2.0, -3.0, 0.25, 0.5], dtype=torch.float64)
UPPER = torch.tensor([1.0, 1.0, 1.0, math.inf], dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name if m else "default")
def test_clipping(method: Any) -> None:
    """Multipliers of bounds have derivatives too, and infinite bounds have none."""
    clip = differentiable(**BOX, lower=-1.0, upper=UPPER, method=method, atol=1e-9)
    point = clip(torch.zeros(4), POINT)
    close(point.x, POINT.clamp(-1, 1))
    close((point.lower, point.upper), (torch.tensor([0.0, 2, 0, 0]), torch.tensor([1.0, 0, 0, 0])))
    jacobians = jacrev(lambda p: tuple(clip(torch.zeros(4), p)[i] for i in (0, 3, 4)))(POINT)
    expected = [torch.diag(torch.tensor(d)) for d in ([0.0, 0, 1, 1], [0.0, -1, 0, 0], [1.0, 0, 0, 0])]
    close(jacobians, tuple(expected), 1e-5)


def test_bounds_that_depend_on_theta() -> None:
    def upper(p: Tensor, s: Tensor) -> Tensor:
        return torch.stack([s, s**2, 3 * s, torch.tensor(math.inf)])

    clip = differentiable(
        lambda x, p, s: 0.5 * ((x - p) ** 2).sum(),
        lower=lambda p, s: -s,
        upper=upper,
        method=InteriorPoint(),
        atol=1e-9,
    )
    s = torch.tensor(1.25)
    found = clip(torch.zeros(4), POINT, s)
    close(found.x, torch.tensor([1.25, -1.25, 0.25, 0.5]))
    close(found.upper, torch.tensor([0.75, 0, 0, 0]))
    for mode in (jacrev, jacfwd):
        slope, force = mode(lambda s: (lambda q: (q.x, q.upper))(clip(torch.zeros(4), POINT, s)))(s)
        close(slope, torch.tensor([1.0, -1.0, 0.0, 0.0]), 1e-5)
        close(force, torch.tensor([-1.0, 0.0, 0.0, 0.0]), 1e-5)
    rows = vmap(lambda s: clip(torch.zeros(4), POINT, s).x)(torch.tensor([0.5, 1.25]))
    close(rows[1], found.x)
    close(rows[0], torch.tensor([0.25 * 0 + 0.5, -0.5, 0.25, 0.5]).clamp(max=torch.tensor([0.5, 0.25, 1.5, math.inf])))


def test_trees_and_partial_bounds() -> None:
    """Bounds on one leaf, theta a dict, an inequality tree; against the sphere in disguise."""
    solve = differentiable(
        lambda x, t: ((x["a"] - t["a"]) ** 2).sum() + (x["b"] - t["b"]) ** 2 * 2,
        inequality=lambda x, t: {"sum": x["a"].sum() + x["b"] - t["b"]},
        lower={"b": 0.5, "a": None},
        method=AugmentedLagrangian(),
        atol=1e-9,
    )
    theta = {"b": torch.tensor(0.25), "a": torch.tensor([1.0, 2.0])}
    start = {"a": torch.zeros(2), "b": torch.ones(())}
    point = solve(start, theta)
    # b sticks to 1/2 and a moves to the plane sum a = b - 1/2.
    close(point.x, {"a": torch.tensor([-0.625, 0.375]), "b": torch.tensor(0.5)})
    close(point.inequality, {"sum": torch.tensor(3.25)})
    close(point.lower, {"a": torch.zeros(2), "b": torch.tensor(1.0 + 3.25)})
    slopes = jacrev(lambda t: solve(start, t).x["a"])(theta)
    close(slopes["a"], torch.eye(2) - 0.5)
    close(slopes["b"], torch.tensor([0.5, 0.5]))
    assert str(tree.structure(point.upper)) == str(tree.structure(start))
    assert float(tree.max_abs(point.upper)) == 0.0


def nonlinear(method: Any = None) -> Any:
    return differentiable(
        lambda x, a, b: (torch.exp(a * x) - x * b).sum() + x.prod() ** 2,
        equality=lambda x, a, b: x[:2].sum() ** 2 - b[0],
        inequality=lambda x, a, b: torch.stack([(x**2).sum() - 2 * b[1], -5 - x[0]]),
        upper=lambda a, b: 0.6 * b[2],
        method=method,
        atol=1e-11,
        max_steps=500,
    )


A, B, X0 = (torch.tensor(values, dtype=torch.float64) for values in (0.7, [1.2, 0.35, 1.0], [0.5, 0.5, 0.2]))


@pytest.mark.parametrize("method", [InteriorPoint(), AugmentedLagrangian()], ids=lambda m: m.name)
def test_differences_of_solutions_found_anew(method: Any) -> None:
    solve = nonlinear(method)
    point = solve(X0, A, B)
    assert bool((point.inequality > 1e-3)[0]) or bool((point.upper > 1e-3).any()), "something is active"
    theta = torch.cat([A[None], B])

    def all_of(t: Tensor) -> Tensor:
        found = solve(X0, t[0], t[1:])
        return torch.cat([found.x, found.equality[None], found.inequality, found.upper])

    width = 1e-4
    rows = [(all_of(theta + width * e) - all_of(theta - width * e)) / (2 * width) for e in torch.eye(4)]
    for mode in (jacrev, jacfwd):
        close(mode(all_of)(theta), torch.stack(rows, dim=1), 1e-4)


def test_gradcheck_to_second_order() -> None:
    solve = nonlinear(InteriorPoint())

    def outputs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        found = solve(X0, a, b)
        return found.x, found.inequality

    inputs = (A.clone().requires_grad_(), B.clone().requires_grad_())
    options: dict[str, Any] = {"eps": 1e-5, "atol": 1e-4, "rtol": 1e-4}
    assert gradcheck(outputs, inputs, check_forward_ad=True, **options)
    assert gradgradcheck(outputs, inputs, **options)


def test_vmap_is_the_loop() -> None:
    solve = differentiable(**SPHERE, method=AugmentedLagrangian(), atol=ATOL)
    points, r = normal(5, 3, 3), torch.tensor(1.1)
    start = torch.tensor([1.0, 0.2, 0.1])
    batch = vmap(lambda p: solve(start, p, r))(points)
    close(batch.x, torch.stack([on_sphere(p, r)[0] for p in points]))
    close(batch.equality, torch.stack([on_sphere(p, r)[1] for p in points]))
    slopes = vmap(jacrev(lambda p: solve(start, p, r).x))(points)
    close(slopes, torch.stack([jacrev(lambda p: on_sphere(p, r)[0])(p) for p in points]))


def test_against_a_cvxpy_layer() -> None:
    c, d = normal(6, 3, 4), torch.tensor([0.2, 0.3, 1.0])
    x, p = cp.Variable(4), cp.Parameter(4)
    sides = [c.numpy() @ x <= d.numpy(), x >= -0.5]
    layer = implicit.cvx.Layer(
        cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - p)), sides), parameters=[p], variables=[x]
    )
    ours = differentiable(
        lambda x, p: 0.5 * ((x - p) ** 2).sum(),
        inequality=lambda x, p: c @ x - d,
        lower=-0.5,
        method=InteriorPoint(),
        atol=ATOL,
    )
    point = 2 * normal(7, 4)
    close(ours(torch.zeros(4), point).x, layer(point)[0])
    close(jacrev(lambda q: ours(torch.zeros(4), q).x)(point), jacrev(lambda q: layer(q)[0])(point), 1e-5)


def test_a_linear_solver_of_the_users_choice() -> None:
    p, r = torch.tensor([3.0, -1.0, 2.0]), torch.tensor(1.5)
    start = torch.tensor([1.0, 0.1, 1.0])
    slopes = jacrev(
        lambda p: differentiable(**SPHERE, linear_solver=implicit.GMRES(rtol=1e-12), atol=ATOL)(start, p, r).x
    )
    close(slopes(p), jacrev(lambda p: on_sphere(p, r)[0])(p))


def test_the_start_has_no_influence_and_no_derivative() -> None:
    solve = differentiable(**SPHERE, method=AugmentedLagrangian(), atol=ATOL)
    p, r = torch.tensor([3.0, -1.0, 2.0]), torch.tensor(1.5)
    start = torch.tensor([1.0, 0.1, 1.0], requires_grad=True)
    assert not solve(start, p, r).x.requires_grad
    close(jacrev(lambda s: solve(s, p, r).x)(start.detach()), torch.zeros(3, 3))


def test_a_kink_is_seen_at_the_accuracy_of_the_default_method() -> None:
    """At p = (0, 1) the bound is active with multiplier zero; an interior point stops at some 1e-5 from it."""
    clip = differentiable(lambda x, p: ((x - p) ** 2).sum(), lower=0.0)
    at_the_kink = torch.tensor([0.0, 1.0], requires_grad=True)
    with pytest.warns(ConvergenceWarning, match="strict complementarity fails"):
        clip(torch.ones(2), at_the_kink).x.sum().backward()


def test_degenerate_solutions_warn() -> None:
    clip = differentiable(**BOX, upper=1.0, method=InteriorPoint(), atol=1e-10)
    at_the_kink = torch.tensor([1.0, 0.3], requires_grad=True)
    with pytest.warns(ConvergenceWarning, match="strict complementarity fails"):
        clip(torch.zeros(2), at_the_kink).x.sum().backward()
    twice = differentiable(
        lambda x, p: 0.5 * ((x - p) ** 2).sum(),
        equality=lambda x, p: torch.stack([x.sum(), 2 * x.sum()]) - p[0] * torch.tensor([1.0, 2.0]),
        method=AugmentedLagrangian(),
        atol=ATOL,
    )
    p = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.warns(ConvergenceWarning, match="singular"):
        twice(torch.zeros(2), p).x.sum().backward()


def test_a_failed_solve_raises_unless_asked_otherwise() -> None:
    fields: dict[str, Any] = {
        "objective": lambda x, p: ((x - p) ** 2).sum(),
        "equality": lambda x, p: (x**2).sum() + p**2 + 1,
        "method": AugmentedLagrangian(),
    }
    start, p = torch.ones(2), torch.tensor(0.5)
    with pytest.raises(SolveError, match="INFEASIBLE after") as caught:
        differentiable(**fields)(start, p)
    assert caught.value.solution.status is Status.INFEASIBLE
    with pytest.warns(ConvergenceWarning, match="INFEASIBLE after"):
        found = differentiable(**fields, raise_on_failure=False)(start, p)
    assert bool(torch.isfinite(found.x).all())
    with pytest.raises(SolveError, match="STEP_LIMIT after 1 steps"):
        differentiable(**SPHERE, max_steps=1)(torch.tensor([1.0, 0.1, 5.0]), torch.tensor([3.0, -1.0, 2.0]), p)


def test_misuse_is_named_as_in_solve() -> None:
    with pytest.raises(TypeError, match="method must be such as"):
        differentiable(**SPHERE, method="newton")(torch.ones(3), torch.ones(3), torch.tensor(1.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lower is above upper"):
        differentiable(**BOX, lower=1.0, upper=0.0)(torch.zeros(2), torch.zeros(2))


def test_an_unconstrained_and_a_single_precision_problem() -> None:
    free = differentiable(lambda x, p: ((x - p) ** 2).sum(), method=AugmentedLagrangian())
    p = torch.tensor([1.0, 2.0])
    close(jacrev(lambda p: free(torch.zeros(2), p).x)(p), torch.eye(2))
    single = differentiable(**BOX, upper=1.0, method=AugmentedLagrangian())
    q = torch.tensor([3.0, 0.5], dtype=torch.float32)
    slope = jacrev(lambda q: single(torch.zeros(2, dtype=torch.float32), q).x)(q)
    assert slope.dtype == torch.float32
    close(slope, torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float32)), 1e-4)


@pytest.mark.parametrize("gap", [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("method", [None, AugmentedLagrangian()], ids=["default", "AugmentedLagrangian"])
@pytest.mark.filterwarnings("ignore:strict complementarity fails")
def test_weakly_active_and_nearly_active_bounds(gap: float, method: Any) -> None:
    """On the central path gap and multiplier are both about 1e-4; the derivative is that of the active set alone."""
    t, other = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.0])
    for sign in (1.0, -1.0):
        bound = torch.stack([t[0] + sign * gap, torch.tensor(-math.inf)])
        fields: list[dict[str, Any]] = [{"lower": bound}, {"inequality": lambda x, t, b=bound: 3 * (b[0] - x[0])}]
        for field in fields:
            clip = differentiable(lambda x, t: ((x - t) ** 2).sum(), **field, method=method)
            point = clip(other, t)
            close(point.x, torch.maximum(t, bound), 1e-12)
            force = point.lower[0] if "lower" in field else 3 * point.inequality
            close(force, torch.tensor(2 * gap if sign > 0 else 0.0), 1e-12)
            expected = torch.diag(torch.tensor([0.0 if sign > 0 else 1.0, 1.0]))
            close(jacrev(lambda t: clip(other, t).x)(t), expected, 1e-6)  # noqa: B023


def test_a_clear_active_set_does_not_warn() -> None:
    for gap, slope in ((1e-3, 0.0), (-1e-3, 1.0)):
        clip = differentiable(lambda x, t: (x - t) ** 2, lower=0.5 + gap)
        close(jacrev(lambda t: clip(torch.tensor(1.0), t).x)(torch.tensor(0.5)), torch.tensor(slope))  # noqa: B023


def test_curved_constraints_are_met_to_rounding() -> None:
    """Newton's method on the active set, nonlinear in x; the multipliers too are those of the exact solution."""
    p = torch.tensor([3.0, -1.0, 2.0])
    ball = differentiable(
        lambda x, p: 0.5 * ((x - p) ** 2).sum(),
        inequality=lambda x, p: torch.stack([0.5 * (x**2).sum() - 0.5, x[0] - 2]),
        lower=-5.0,
    )
    point = ball(torch.full((3,), 0.1), p)
    close(point.x, p / p.norm(), 1e-13)
    close(point.inequality, torch.stack([p.norm() - 1, torch.tensor(0.0)]), 1e-12)
    assert float(point.lower.abs().max()) == 0.0
    close(jacrev(lambda p: ball(torch.full((3,), 0.1), p).x)(p), jacrev(lambda p: p / p.norm())(p), 1e-12)


def test_a_solution_at_zero() -> None:
    """No size of x to compare distances with: the point is all constraints."""
    clip = differentiable(lambda x, t: ((x + t) ** 2).sum(), lower=0.0)
    t = torch.tensor([1.0, 2.0])
    point = clip(torch.ones(2), t)
    assert float(point.x.abs().max()) == 0.0
    close(point.lower, 2 * t, 1e-12)
    close(jacrev(lambda t: clip(torch.ones(2), t).lower)(t), 2 * torch.eye(2), 1e-12)


def test_entries_with_equal_bounds() -> None:
    """Fixed entries are equalities, with a multiplier of either sign, and nothing about them is degenerate."""
    low = torch.tensor([1.0, 1.0, -1.0, 1.0])
    high = torch.tensor([1.0, 1.0, math.inf, 3.0])
    p = torch.tensor([3.0, -2.0, 0.25, 0.5])
    solve = differentiable(
        lambda x, p: 0.5 * ((x["a"] - p) ** 2).sum() + 0.5 * x["a"][0] ** 2 * x["b"] ** 2 - x["b"] * p[2],
        equality=lambda x, p: x["b"] - x["a"][2],
        lower={"a": low, "b": None},
        upper={"a": high, "b": None},
    )
    start = {"a": torch.full((4,), 1.5), "b": torch.tensor(0.1)}
    point = solve(start, p)
    close(point.x["a"], torch.tensor([1.0, 1.0, 0.25, 1.0]), 1e-12)  # x2 = x4: 2 x - 2 p2 = 0
    force = torch.stack([p[0] - 1 - p[2] ** 2, p[1] - 1, torch.tensor(0.0), p[3] - 1])  # presses up where positive
    close(point.upper["a"] - point.lower["a"], force, 1e-9)
    assert float(torch.minimum(point.upper["a"], point.lower["a"]).abs().max()) == 0.0
    close(jacrev(lambda p: solve(start, p).x["a"])(p), torch.diag(torch.tensor([0.0, 0, 1, 0])), 1e-9)
    slopes = jacrev(lambda p: (lambda q: q.upper["a"] - q.lower["a"])(solve(start, p)))(p)
    expected = torch.diag(torch.tensor([1.0, 1, 0, 1]))
    expected[0, 2] = -2 * p[2]
    close(slopes, expected, 1e-9)
    all_fixed = differentiable(lambda x, p: ((x - p) ** 2).sum(), lower=1.0, upper=1.0)
    close(jacrev(lambda p: all_fixed(torch.ones(4), p).x)(p), torch.zeros(4, 4))


def test_dependent_active_constraints_keep_their_point() -> None:
    """Both halves of a doubled constraint are active: no unique multipliers, and the derivative says so."""
    twice = differentiable(
        lambda x, p: 0.5 * ((x - p) ** 2).sum(),
        inequality=lambda x, p: torch.stack([x.sum() - 1, 2 * x.sum() - 2]),
    )
    p = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.warns(ConvergenceWarning, match="singular"):
        twice(torch.zeros(2), p).x[0].backward()
    point = twice(torch.zeros(2), p.detach())
    close(point.x, torch.tensor([0.0, 1.0]), 1e-12)
    close(point.inequality @ torch.tensor([1.0, 2.0]), torch.tensor(1.0), 1e-9)
    assert p.grad is not None
    close(p.grad, torch.tensor([0.5, -0.5]))


def test_a_problem_object_is_refused_at_once() -> None:
    problem = EqualityProblem(lambda x: x.sum(), lambda x: (x**2).sum() - 1)
    with pytest.raises(TypeError, match=r"function \(x, \*theta\), got EqualityProblem; pass its functions"):
        differentiable(problem)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got Tensor$"):
        differentiable(torch.zeros(2))  # type: ignore[arg-type]
