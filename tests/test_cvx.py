"""Convex layers against closed forms, in every mode of differentiation, and what they say where none exists."""

import copy
import math
import pickle
import re
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import implicit
from constrained import Ball, HalfSpace, Nonnegative, Simplex
from implicit.cvx import Layer, interior_point
from implicit.cvx.cones import Nonnegative as NonnegativeCone
from implicit.cvx.cones import SecondOrder
from implicit.cvx.exponential import Exponential
from implicit.cvx.factorization import Factorization
from implicit.cvx.semidefinite import Semidefinite
from implicit.status import ConvergenceWarning, SolveError

N = 4


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projection(*constraints):
    """The layer that projects p onto ``{x : constraint(x) for all of them}``."""
    x, p = cp.Variable(N, name="x"), cp.Parameter(N, name="p")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [c for make in constraints for c in make(x)])
    return Layer(problem, parameters=[p], variables=[x])


# -- closed forms: name -> (layer, the closed form, parameters) --------------------------------------------------------

DESIGN, TARGET = randn(8, N, seed=1), randn(8, seed=2)
SIDES = torch.cat([torch.eye(N, dtype=torch.float64), -torch.eye(N, dtype=torch.float64), randn(2, N, seed=3)])


def simplex():
    return projection(lambda x: [x >= 0, cp.sum(x) == 1]), Simplex().project, (randn(N),)


def nonnegative():
    return projection(lambda x: [x >= 0]), Nonnegative().project, (randn(N),)


def equality_qp():
    x, q, b = cp.Variable(N), cp.Parameter(N), cp.Parameter(2)
    root, a = cp.Parameter((N, N)), cp.Parameter((2, N))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(root @ x) / 2 + q @ x), [a @ x == b])

    def exact(root, q, a, b):
        matrix = torch.cat([torch.cat([root.T @ root, a.T], 1), torch.cat([a, torch.zeros(2, 2)], 1)])
        return torch.linalg.solve(matrix, torch.cat([-q, b]))[:N]

    values = (randn(N, N, seed=4) + 2 * torch.eye(N), randn(N, seed=5), randn(2, N, seed=6), randn(2, seed=7))
    return Layer(problem, parameters=[root, q, a, b], variables=[x]), exact, values


def ball():
    return projection(lambda x: [cp.norm(x) <= 1]), Ball(1.0).project, (3 * randn(N),)


def inside_the_ball():
    return projection(lambda x: [cp.norm(x) <= 1]), Ball(1.0).project, (0.1 * randn(N),)


def half_space():
    x, p, a, b = cp.Variable(N), cp.Parameter(N), cp.Parameter(N), cp.Parameter()
    layer = Layer(cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [a @ x <= b]), parameters=[p, a, b], variables=[x])
    p, a = randn(N), randn(N, seed=1)
    return layer, lambda p, a, b: HalfSpace(a, b).project(p), (p, a, a @ p - 1.0)


def ridge():
    x, penalty = cp.Variable(N), cp.Parameter(nonneg=True)
    loss = cp.sum_squares(DESIGN.numpy() @ x - TARGET.numpy()) + penalty * cp.sum_squares(x)
    gram = DESIGN.T @ DESIGN
    layer = Layer(cp.Problem(cp.Minimize(loss)), parameters=[penalty], variables=[x])
    return layer, lambda t: torch.linalg.solve(gram + t * torch.eye(N), DESIGN.T @ TARGET), (torch.tensor(0.3),)


def soft_threshold():
    x, p, width = cp.Variable(N), cp.Parameter(N), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p) / 2 + width * cp.norm1(x)))
    layer = Layer(problem, parameters=[p, width], variables=[x])
    return layer, lambda p, t: p.sign() * (p.abs() - t).clamp(min=0), (randn(N), torch.tensor(0.5))


def entropic_simplex():
    x, p = cp.Variable(N), cp.Parameter(N)
    problem = cp.Problem(cp.Maximize(p @ x + cp.sum(cp.entr(x))), [cp.sum(x) == 1])
    return Layer(problem, parameters=[p], variables=[x]), lambda p: p.softmax(0), (2 * randn(N),)


def analytic_centre():
    x, h = cp.Variable(N), cp.Parameter(len(SIDES))
    problem = cp.Problem(cp.Maximize(cp.sum(cp.log(h - SIDES.numpy() @ x))))

    def exact(h):
        centre = torch.zeros(N)
        for _ in range(40):  # damped Newton, to rounding, unrolled
            weights = 1 / (h - SIDES @ centre)
            step = torch.linalg.solve(SIDES.T @ (weights[:, None] ** 2 * SIDES), SIDES.T @ weights)
            decrement = torch.linalg.vector_norm(weights * (SIDES @ step)).detach()
            centre = centre - step / (1 + decrement * (decrement > 1e-3))
        return centre

    return Layer(problem, parameters=[h], variables=[x]), exact, (1 + torch.rand(len(SIDES), generator=seeded()),)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(8)


def lp_vertex():
    x, c, h = cp.Variable(N), cp.Parameter(N), cp.Parameter(len(SIDES))
    layer = Layer(cp.Problem(cp.Minimize(c @ x), [SIDES.numpy() @ x <= h]), parameters=[c, h], variables=[x])
    cost, heights = randn(N, seed=9), 0.5 + torch.rand(len(SIDES), generator=seeded())
    # the vertex by trying all bases
    bases = torch.combinations(torch.arange(len(SIDES)), N)
    bases = bases[torch.linalg.det(SIDES[bases]).abs() > 1e-9]
    corners = torch.linalg.solve(SIDES[bases], heights[bases])
    feasible = (corners @ SIDES.T <= heights + 1e-9).all(1)
    basis = bases[feasible][(corners[feasible] @ cost).argmin()]
    return layer, lambda c, h: torch.linalg.solve(SIDES[basis], h[basis]) + 0 * c, (cost, heights)


def semidefinite():
    x, p = cp.Variable((3, 3), PSD=True), cp.Parameter((3, 3))

    def exact(p):
        values, vectors = torch.linalg.eigh((p + p.T) / 2)
        return vectors @ torch.diag(values.clamp(min=0)) @ vectors.T

    matrix = randn(3, 3)
    return Layer(cp.Problem(cp.Minimize(cp.sum_squares(x - p))), parameters=[p], variables=[x]), exact, (matrix,)


FORMS = [
    simplex,
    nonnegative,
    equality_qp,
    ball,
    inside_the_ball,
    half_space,
    ridge,
    soft_threshold,
    entropic_simplex,
    analytic_centre,
    lp_vertex,
    semidefinite,
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


def everything(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def compare(found, expected, atol: float) -> None:
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


@forms
def test_solutions_and_jacobians_meet_the_closed_forms_by_default(form):
    layer, exact, values = form()
    torch.testing.assert_close(layer(*values)[0], exact(*values), rtol=0, atol=1e-12)  # asked: 1e-6
    expected = torch.func.jacrev(exact, everything(len(values)))(*values)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        found = transform(lambda *v: layer(*v)[0], everything(len(values)))(*values)
        compare(found, expected, 1e-11)  # asked: 1e-5


@forms
def test_gradcheck_to_second_order(form):
    layer, _, values = form()
    inputs = tuple(v.clone().requires_grad_() for v in values)
    assert gradcheck(lambda *v: layer(*v)[0], inputs)
    small = inputs[-1:] if len(inputs) == 4 else inputs  # the equality QP has 30 entries
    assert gradgradcheck(lambda *v: layer(*inputs[: len(inputs) - len(small)], *v)[0], small)


@forms
def test_a_batch_is_solved_element_by_element(form):
    layer, exact, values = form()
    moved = [tuple(v + 0.01 * k * randn(*v.shape, seed=k) for v in values) for k in range(3)]
    stacked = [torch.stack(group).requires_grad_() for group in zip(*moved, strict=True)]
    (batch,) = layer(*stacked)
    weights = randn(*batch.shape, seed=11)
    gradients = torch.autograd.grad((weights * batch).sum(), stacked)
    for k, one in enumerate(moved):
        torch.testing.assert_close(batch[k], exact(*one), rtol=0, atol=1e-12)
        _, pull = torch.func.vjp(exact, *one)
        compare([g[k] for g in gradients], pull(weights[k]), 1e-11)


def test_transforms_compose():
    layer, exact, _ = entropic_simplex()
    rows, point = randn(3, N), randn(N, seed=2)
    J, F, vmap = torch.func.jacrev, torch.func.jacfwd, torch.vmap

    def own(p):
        return layer(p)[0]

    for build, argument in (
        (lambda f: vmap(f), rows),
        (lambda f: vmap(J(f)), rows),
        (lambda f: J(vmap(f)), rows),
        (lambda f: F(vmap(f)), rows),
        (lambda f: J(J(f)), point),
        (lambda f: F(J(f)), point),
        (lambda f: J(F(f)), point),
        (lambda f: vmap(torch.func.hessian(f)), rows),
        (lambda f: J(J(J(f))), point),
    ):
        torch.testing.assert_close(build(own)(argument), build(exact)(argument), rtol=0, atol=1e-11)
    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        F(F(own))(point)


def test_second_derivatives_of_a_semidefinite_projection():
    layer, exact, (matrix,) = semidefinite()
    found = torch.func.hessian(lambda p: (layer(p)[0] ** 3).sum())(matrix)
    expected = torch.func.hessian(lambda p: (exact(p) ** 3).sum())(matrix)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("option", ["batched", "vectorized"])
def test_the_older_batched_gradients_work(option):
    layer, exact, (point,) = entropic_simplex()
    if option == "batched":
        assert gradcheck(lambda p: layer(p)[0], point.requires_grad_(), check_batched_grad=True, check_forward_ad=True)
    else:
        found = torch.autograd.functional.jacobian(lambda p: layer(p)[0], point, vectorize=True)
        torch.testing.assert_close(found, torch.func.jacrev(exact)(point))


# -- batches, shapes, dtypes, attributes -------------------------------------------------------------------------------


def test_parameters_without_a_batch_serve_every_element():
    layer, exact, (p, a, b) = half_space()
    rows = p + 0.1 * randn(5, N, seed=3)
    shared = a.clone().requires_grad_()
    (batch,) = layer(rows, shared, b)
    batch.sum().backward()
    reference = a.clone().requires_grad_()
    expected = torch.vmap(lambda row: exact(row, reference, b))(rows)
    expected.sum().backward()
    compare([batch, shared.grad], [expected, reference.grad], 1e-11)


def test_matrices_keep_their_orientation():
    x, p = cp.Variable((2, 3)), cp.Parameter((2, 3))
    y, q = cp.Variable(), cp.Parameter()
    z = cp.Variable((1, 1))
    cost = cp.sum_squares(x - p) + cp.sum_squares(y - 2 * q) + cp.sum_squares(z - q)
    layer = Layer(cp.Problem(cp.Minimize(cost), [x[0] >= 0]), parameters=[q, p], variables=[z, x, y])
    matrix, number = randn(2, 3), torch.tensor(0.7)
    small, found, double = layer(number, matrix)
    torch.testing.assert_close(found, torch.cat([matrix[:1].clamp(min=0), matrix[1:]]), rtol=0, atol=1e-13)
    assert (small.shape, double.shape) == ((1, 1), ())
    torch.testing.assert_close(double, 2 * number)
    small, found, double = layer(number.expand(2), matrix)
    assert (small.shape, found.shape, double.shape) == ((2, 1, 1), (2, 2, 3), (2,))


def test_float32_is_computed_in_float64():
    layer, exact, (point,) = ball()
    single = point.float().requires_grad_()
    (found,) = layer(single)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact(single.detach().double()).float(), rtol=0, atol=6e-8)
    found.sum().backward()
    assert single.grad.dtype == torch.float32
    expected = torch.func.grad(lambda p: exact(p).sum())(single.detach().double())
    torch.testing.assert_close(single.grad, expected.float(), rtol=0, atol=6e-8)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"nonneg": True}, lambda p: p.clamp(min=0)),
        ({"nonpos": True}, lambda p: p.clamp(max=0)),
        ({"bounds": [-0.2, 0.3]}, lambda p: p.clamp(-0.2, 0.3)),
        ({"symmetric": True}, lambda p: (p + p.T) / 2),
        ({"diag": True}, lambda p: torch.diag(torch.diag(p))),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_variables_with_attributes(attributes, expected):
    x, p = cp.Variable((3, 3), **attributes), cp.Parameter((3, 3))
    layer = Layer(cp.Problem(cp.Minimize(cp.sum_squares(x - p))), parameters=[p], variables=[x])
    point = randn(3, 3)
    compare(layer(point), [expected(point)], 1e-12)
    compare([torch.func.jacrev(lambda v: layer(v)[0])(point)], [torch.func.jacrev(expected)(point)], 1e-11)


def test_problems_without_constraints_and_with_a_full_quadratic():
    x, q = cp.Variable(N), cp.Parameter(N)
    root = randn(N, N, seed=3)
    curvature = root @ root.T + torch.eye(N)
    layer = Layer(
        cp.Problem(cp.Minimize(cp.quad_form(x, curvature.numpy()) / 2 + q @ x)), parameters=[q], variables=[x]
    )
    point = randn(N)
    compare(layer(point), [-torch.linalg.solve(curvature, point)], 1e-13)
    compare([torch.func.jacrev(lambda v: layer(v)[0])(point)], [-torch.linalg.inv(curvature)], 1e-12)


@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_units_of_the_objective_and_of_the_constraints_do_not_matter(scale):
    x, p = cp.Variable(N), cp.Parameter(N)
    point = randn(N)
    for objective, constraint in ((scale, 1.0), (1.0, scale)):
        problem = cp.Problem(
            cp.Minimize(objective * cp.sum_squares(x - p)), [constraint * x >= 0, constraint * cp.sum(x) == constraint]
        )
        layer = Layer(problem, parameters=[p], variables=[x])
        compare(layer(point), [Simplex().project(point)], 1e-10)
        found = torch.func.jacrev(lambda v, layer=layer: layer(v)[0])(point)
        compare([found], [torch.func.jacrev(Simplex().project)(point)], 1e-10)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_units_of_the_variables_do_not_matter(scale):
    layer, exact, (cost, heights) = lp_vertex()
    heights = scale * heights
    compare([layer(cost, heights)[0] / scale], [exact(cost, heights) / scale], 1e-12)
    found = torch.func.jacrev(lambda h: layer(cost, h)[0])(heights)
    compare([found], [torch.func.jacrev(lambda h: exact(cost, h))(heights)], 1e-12)


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3])
def test_tiny_multipliers_are_told_from_inactive_constraints(size):
    """A lasso with a penalty so small that its multipliers are close to the accuracy of interior-point methods."""
    x, t = cp.Variable(N), cp.Parameter(nonneg=True)
    loss = cp.sum_squares(DESIGN.numpy() @ x - TARGET.numpy()) + t * cp.norm1(x)
    layer = Layer(cp.Problem(cp.Minimize(loss)), parameters=[t], variables=[x])
    inverse = torch.linalg.inv(DESIGN.T @ DESIGN)
    least_squares = inverse @ DESIGN.T @ TARGET
    slope = -inverse @ least_squares.sign() / 2
    found, jacobian = outcome(layer, torch.tensor(size))
    compare([found, jacobian], [least_squares + size * slope, slope], 1e-12)


def test_a_vacuous_constraint_does_not_spoil_the_derivative():
    """A bound of 1e6 that is never active made another layer's derivative wrong by a factor of 6e7."""
    x, logs = cp.Variable(N), cp.Parameter(N, nonneg=True)
    loss = cp.sum_squares(DESIGN.numpy() @ x - TARGET.numpy()) / 2 + cp.sum_squares(cp.multiply(logs, x)) / 2
    layer = Layer(cp.Problem(cp.Minimize(loss), [cp.sum(x) <= 1e6]), parameters=[logs], variables=[x])

    def exact(t):
        return torch.linalg.solve(DESIGN.T @ DESIGN + torch.diag(t**2), DESIGN.T @ TARGET)

    point = randn(N).abs() + 0.1
    compare(layer(point), [exact(point)], 1e-11)
    compare([torch.func.jacrev(lambda v: layer(v)[0])(point)], [torch.func.jacrev(exact)(point)], 1e-11)


def test_the_problem_keeps_its_values_and_the_layer_can_be_copied():
    x, p, q = cp.Variable(2), cp.Parameter(2), cp.Parameter(pos=True)
    p.value = np.array([3.0, 4.0])
    layer = Layer(cp.Problem(cp.Minimize(q * cp.sum_squares(x) - p @ x)), parameters=[p, q], variables=[x])
    assert p.value.tolist() == [3.0, 4.0]
    assert q.value is None
    point, weight = randn(2).requires_grad_(), torch.tensor(2.0)
    first = torch.autograd.grad(layer(point, weight)[0].sum(), point)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        compare(torch.autograd.grad(twin(point, weight)[0].sum(), point), first, 0.0)
    assert re.fullmatch(r"Layer\(param\d+\(2,\), param\d+\(\) -> var\d+\(2,\)\)", repr(layer))


def test_a_layer_inside_an_outer_minimization():
    """The penalty of a ridge regression, tuned on other data through the layer."""
    layer, exact, _ = ridge()
    features, targets = randn(20, N, seed=21), randn(20, seed=22)

    def outer(solution):
        return lambda log: ((features @ solution(log.exp()) - targets) ** 2).mean() + 0.1 * log**2

    found, expected = (
        implicit.minimize(outer(solution), torch.zeros(()), implicit.LBFGS(rtol=1e-9)).point
        for solution in (lambda t: layer(t)[0], exact)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


# -- problems without a solution, solutions without a derivative -------------------------------------------------------


def outcome(layer: Layer, *values: Tensor) -> tuple[Tensor, Tensor]:
    """The solution and its Jacobian in the first parameter."""
    return layer(*values)[0], torch.func.jacrev(lambda v: layer(v, *values[1:])[0])(values[0])


def linear(*constraints):
    x, p = cp.Variable(N), cp.Parameter(N)
    return Layer(
        cp.Problem(cp.Minimize(p @ x), [c for make in constraints for c in make(x)]), parameters=[p], variables=[x]
    )


def bounded_by_parameter() -> Layer:
    x, p = cp.Variable(N), cp.Parameter(N)
    return Layer(cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= 1, x <= p]), parameters=[p], variables=[x])


def test_infeasible_unbounded_and_undefined_problems_are_named():
    ones, rows = torch.ones(N), torch.ones(3, N)
    rows[1, 2] = 0.0
    with pytest.raises(SolveError, match=r"^the problem is infeasible: no point satisfies the constraints$"):
        bounded_by_parameter()(0 * ones)
    with pytest.raises(SolveError, match=r"^element 1 of the batch is infeasible"):
        bounded_by_parameter()(rows + rows)
    with pytest.raises(SolveError, match=r"^the problem is unbounded: the objective falls without limit"):
        linear(lambda x: [x >= 0])(-ones)
    with pytest.raises(
        SolveError, match=r"^element 2 of the batch: the parameters make the problem's data infinite or NaN"
    ):
        linear(lambda x: [x >= 0])(torch.stack([ones, ones, ones * math.nan]))


def test_accuracy_that_is_missed_is_reported(monkeypatch):
    layer, _, (point,) = simplex()
    monkeypatch.setattr(interior_point, "EXPECTED", -1.0)
    with pytest.warns(ConvergenceWarning, match=r"^the problem: the optimality conditions hold to .* only"):
        layer(point)
    with pytest.warns(ConvergenceWarning, match=r"^elements \[0, 1\] of the batch: the optimality conditions hold"):
        layer(point.expand(2, -1))
    monkeypatch.setattr(interior_point, "ACCEPTED", -1.0)
    with pytest.raises(
        SolveError, match=r"^the problem could not be solved: Clarabel stopped with 'Solved', the optima"
    ):
        layer(point)


def test_polishing_reaches_rounding_from_a_rough_start(monkeypatch):
    layer, exact, (point,) = analytic_centre()
    monkeypatch.setattr(interior_point, "TOLERANCES", (1e-4,))
    compare(layer(point), [exact(point)], 1e-13)


def test_a_solution_that_is_not_unique_is_named():
    layer = linear(lambda x: [x >= 0, cp.sum(x) == 1])
    costs = torch.tensor([0.0, 0.0, 1.0, 2.0])
    assert not _warnings(lambda: layer(costs))  # a solution is fine
    with pytest.warns(
        ConvergenceWarning, match=r"^the problem: the solution is not unique, so that it has no derivative"
    ):
        outcome(layer, costs)
    rows = torch.stack([costs + torch.arange(4.0), costs, torch.arange(4.0), costs]).requires_grad_()
    with pytest.warns(ConvergenceWarning, match=r"^elements \[1, 3\] of the batch: the solution is not unique"):
        layer(rows)[0][:, 0].sum().backward()


def _warnings(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning)]


def test_a_kink_is_named_and_lies_between_its_sides():
    layer = projection(lambda x: [x <= 1])
    point = torch.tensor([1.0, 2.0, 0.0, 0.5])
    with pytest.warns(
        ConvergenceWarning, match=r"^the problem: strict complementarity fails, so that the solution has a"
    ):
        found, jacobian = outcome(layer, point)
    torch.testing.assert_close(found, point.clamp(max=1), rtol=0, atol=1e-12)
    assert 0.2 < jacobian[0, 0] < 0.8
    torch.testing.assert_close(jacobian[1:, 1:], torch.diag(torch.tensor([0.0, 1.0, 1.0])), rtol=0, atol=1e-12)
    free = point.clone().requires_grad_()
    assert not _warnings(lambda: layer(free)[0][1:].sum().backward())  # other entries do not feel the kink


@pytest.mark.parametrize("size", [1e-6, 1e-2])
def test_close_to_a_kink_is_no_kink(size):
    layer = projection(lambda x: [x <= 1])
    point = torch.tensor([1.0 + size, 1.0 - size, 0.0, 5.0])
    _, jacobian = outcome(layer, point)
    torch.testing.assert_close(jacobian, torch.diag(torch.tensor([0.0, 1.0, 1.0, 0.0])), rtol=0, atol=1e-9)


def test_kinks_of_cones_are_named():
    x, p = cp.Variable(N), cp.Parameter(N)
    shrink = Layer(cp.Problem(cp.Minimize(cp.sum_squares(x - p) / 2 + cp.norm(x))), parameters=[p], variables=[x])
    unit = torch.eye(N)[0]
    with pytest.warns(ConvergenceWarning, match="strict complementarity fails"):
        outcome(shrink, unit)
    for size, factor in ((0.5, 0.0), (2.0, 0.5)):
        found, _ = outcome(shrink, size * unit)
        torch.testing.assert_close(found, factor * size * unit, rtol=0, atol=1e-12)
    layer, _, _ = semidefinite()
    with pytest.warns(ConvergenceWarning, match="strict complementarity fails"):
        outcome(layer, torch.diag(torch.tensor([1.0, 0.0, -1.0])))


def test_redundant_constraints_are_no_obstacle():
    doubled = projection(lambda x: [x >= 0, cp.sum(x) == 1, 2 * cp.sum(x) == 2, x <= 1])
    for point in (randn(N), torch.tensor([5.0, 0.0, 1.0, 0.0])):  # the second at a vertex
        found, jacobian = outcome(doubled, point)
        torch.testing.assert_close(found, Simplex().project(point), rtol=0, atol=1e-12)
        torch.testing.assert_close(jacobian, torch.func.jacrev(Simplex().project)(point), rtol=0, atol=1e-11)


def test_dependent_constraints_that_parameters_move_are_named():
    x, p = cp.Variable(2), cp.Parameter(2)
    layer = Layer(
        cp.Problem(cp.Minimize(cp.sum_squares(x)), [x[0] == p[0], x[0] == p[1]]), parameters=[p], variables=[x]
    )
    point = torch.ones(2).requires_grad_()
    with pytest.warns(
        ConvergenceWarning, match=r"^the problem: active constraints are linearly dependent and the param"
    ):
        layer(point)[0].sum().backward()
    torch.testing.assert_close(point.grad, torch.full((2,), 0.5))  # least squares


def test_second_derivatives_at_degenerate_solutions_are_named():
    layer = linear(lambda x: [x >= 0, cp.sum(x) == 1])
    point = torch.tensor([0.0, 0.0, 1.0, 2.0]).requires_grad_()
    with pytest.warns(ConvergenceWarning, match="not unique"):
        (gradient,) = torch.autograd.grad(layer(point)[0][0], point, create_graph=True)
    with pytest.warns(ConvergenceWarning, match="second derivatives at a degenerate solution are those of the least"):
        gradient[0].backward()


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd], ids=["reverse", "forward"])
def test_both_modes_name_the_same_troubles(transform):
    x, p = cp.Variable(2), cp.Parameter(2)
    dependent = Layer(
        cp.Problem(cp.Minimize(cp.sum_squares(x)), [x[0] == p[0], x[0] == p[1]]), parameters=[p], variables=[x]
    )
    cases = [
        (dependent, torch.ones(2), "linearly dependent and the parameters move them"),
        (linear(lambda x: [x >= 0, cp.sum(x) == 1]), torch.tensor([0.0, 0.0, 1.0, 2.0]), "the solution is not unique"),
        (projection(lambda x: [x <= 1]), torch.tensor([1.0, 2.0, 0.0, 0.5]), "the solution has a kink here"),
        (projection(lambda x: [cp.sum(x) == 1, 2 * cp.sum(x) == 2]), randn(N), None),
        (projection(lambda x: [cp.norm(x) <= 9]), randn(N), None),  # an auxiliary variable that is not unique
    ]
    for layer, point, message in cases:
        found = _warnings(lambda layer=layer, point=point: transform(lambda v: layer(v)[0])(point))
        assert (message in found[0]) if message else not found


def test_a_large_singular_system_is_refused_when_it_is_differentiated(monkeypatch):
    monkeypatch.setattr("implicit.cvx.factorization.MAX_DENSE", 3)
    layer = projection(lambda x: [cp.sum(x) == 1, 2 * cp.sum(x) == 2])
    point = randn(N).requires_grad_()
    (found,) = layer(point)
    torch.testing.assert_close(found, (point - (point.sum() - 1) / N).detach(), rtol=0, atol=1e-8)
    with pytest.raises(
        SolveError, match="the problem: the derivative of the optimality conditions is singular, and with"
    ):
        found.sum().backward()


# -- cones -------------------------------------------------------------------------------------------------------------

CONES = {
    "nonnegative": NonnegativeCone(0, 3, 1),
    "second-order": SecondOrder(0, 2, 4),
    "exponential": Exponential(0, 2, 3),
    "semidefinite": Semidefinite(0, 2, 6, 3),
}
cones = pytest.mark.parametrize("cone", CONES.values(), ids=CONES)


def spread(cone, count: int, seed: int = 0) -> Tensor:
    points = randn(count, cone.count, cone.size, seed=seed)
    return points * (3 * randn(count, cone.count, 1, seed=seed + 1)).exp()


@cones
def test_projections_are_characterised_by_their_inequalities(cone):
    u, other = spread(cone, 300), spread(cone, 300, seed=5)
    p, member = cone.project(u), cone.project(other)
    size = u.norm(dim=-1)
    normal = u - p
    assert ((p * normal).sum(-1).abs() <= 1e-13 * size**2).all()
    assert ((normal * member).sum(-1) <= 1e-12 * size * other.norm(dim=-1)).all()  # in the polar cone
    torch.testing.assert_close(cone.project(p) / size[..., None], p / size[..., None], rtol=0, atol=1e-13)


@cones
def test_derivatives_of_projections(cone):
    u = spread(cone, 6)
    u = (u / u.norm(dim=-1, keepdim=True)).requires_grad_()
    exact = torch.zeros(6, cone.count)
    assert not cone.kinks(u.detach(), exact + 1e-9).any()
    rows = torch.func.jacrev(cone.project)(u.detach()) if cone.size > 1 else None
    derivative = cone.derivative(u.detach(), exact)
    torch.testing.assert_close(derivative, derivative.mT)
    if rows is not None:
        assert gradcheck(cone.project, u)
        assert gradgradcheck(cone.project, u)
        torch.testing.assert_close(torch.einsum("bcibcj->bcij", rows), derivative, rtol=0, atol=1e-11)
        assert gradcheck(lambda v: cone.derivative(v, exact), u, check_forward_ad=True)


@pytest.mark.parametrize(
    ("point", "kink"),
    [
        ((0.0, 1.0, 2.0), False),
        ((0.0, 1.0, 1.0), True),  # on the curved boundary
        ((1.0, 0.0, -1.0), False),
        ((1.0, 1.0, -1.0), True),  # on the boundary of the polar: e^(1/1 - 1) = 1
        ((-1.0, -1.0, 2.0), False),
        ((-1.0, -1.0, 0.0), True),  # the flat face meets the ray
        ((-1.0, 0.0, 2.0), True),
        ((0.0, -1.0, 2.0), True),
        ((0.5, 1.0, 0.1), False),
    ],
)
def test_kinks_of_the_exponential_cone(point, kink):
    cone, u = Exponential(0, 1, 3), torch.tensor([[point]])
    assert bool(cone.kinks(u, torch.full((1, 1), 1e-9))) is kink


def test_exponential_projection_against_an_interior_point_method():
    u = spread(Exponential(0, 1, 3), 12, seed=3)[:, 0]
    u = u / u.norm(dim=-1, keepdim=True)
    for row, found in zip(u, Exponential(0, 1, 3).project(u[:, None])[:, 0], strict=True):
        x = cp.Variable(3)
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x - row.numpy())), [cp.ExpCone(x[0], x[1], x[2])])
        problem.solve(cp.CLARABEL)
        np.testing.assert_allclose(found, x.value, atol=1e-4)


def test_a_singular_matrix_is_seen_whatever_its_scale():
    from implicit.cvx.pattern import Pattern

    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    pattern = Pattern(rows.flatten(), columns.flatten(), (3, 3))
    left, right = torch.diag(torch.tensor([1e-9, 1.0, 1e9])), torch.diag(torch.tensor([1e5, 1.0, 1e-5]))
    regular, dependent = randn(3, 3), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [5.0, 7.0, 9.0]])
    b = left.numpy() @ randn(3, 1).numpy()
    exact = np.linalg.solve(right, np.linalg.solve(regular, np.linalg.solve(left, b)))
    for matrix, singular in ((left @ regular @ right, False), (left @ dependent @ right, True)):
        factors = Factorization(matrix.flatten(), pattern, "the problem")
        assert factors.singular is singular
        if not singular:
            np.testing.assert_allclose(factors.solve(b, transposed=False), exact, rtol=1e-10)
            twin = Factorization(matrix.T.flatten(), pattern, "the problem")
            np.testing.assert_allclose(twin.solve(b, transposed=True), exact, rtol=1e-10)
        else:
            kernel = factors.left_kernel()
            assert (np.abs(kernel @ matrix.numpy()) < 1e-12 * (np.abs(kernel) @ matrix.abs().numpy())).all()
            kernel = factors.right_kernel().T
            assert (np.abs(matrix.numpy() @ kernel) < 1e-12 * (matrix.abs().numpy() @ np.abs(kernel))).all()
    with pytest.raises(SolveError, match="the problem: the derivative of the optimality conditions is not finite"):
        Factorization(torch.full((9,), math.nan), pattern, "the problem")


# -- misuse ------------------------------------------------------------------------------------------------------------


def build(objective=None, constraints=(), parameters=None, variables=None, **attributes):
    x, p = cp.Variable(2, name="x"), cp.Parameter(2, name="p", **attributes)
    problem = cp.Problem((objective or (lambda x, p: cp.Minimize(cp.sum_squares(x - p))))(x, p), list(constraints))
    return Layer(
        problem,
        parameters=[p] if parameters is None else parameters(p),
        variables=[x] if variables is None else variables(x),
    )


def complex_problem():
    x, p = cp.Variable(2, name="x", complex=True), cp.Parameter(2)
    return Layer(cp.Problem(cp.Minimize(cp.sum_squares(x - p))), parameters=[p], variables=[x])


def integer_problem():
    x, p = cp.Variable(2, name="x", integer=True), cp.Parameter(2)
    return Layer(cp.Problem(cp.Minimize(cp.sum_squares(x - p))), parameters=[p], variables=[x])


def structured_parameter():
    x, p = cp.Variable((2, 2)), cp.Parameter((2, 2), name="p", symmetric=True)
    return Layer(cp.Problem(cp.Minimize(cp.sum_squares(x - p))), parameters=[p], variables=[x])


def power_cone():
    x, p = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [cp.PowCone3D(x[0], x[1], x[2], 0.3)])
    return Layer(problem, parameters=[p], variables=[x])


OTHER, FOREIGN = cp.Parameter(name="q"), cp.Variable(name="w")

VALUE_ERRORS = [
    (lambda: build(lambda x, p: cp.Minimize(-cp.sum_squares(x - p))), "the problem is not convex by cvxpy's rules"),
    (lambda: build(lambda x, p: cp.Minimize(cp.sum_squares(x) + p[0] * p[1] * x[0])), "the problem is not DPP"),
    (integer_problem, "the problem has integer or boolean variables, whose solutions have no derivatives: x"),
    (lambda: build(constraints=[cp.FiniteSet(FOREIGN, [0, 1])]), "have no derivatives: FiniteSet(w"),
    (complex_problem, "the problem has complex variables or parameters: write real and imaginary parts of x as two"),
    (structured_parameter, "parameter p is declared symmetric: declare it without"),
    (power_cone, "the problem compiles to power cones, which have no derivative here"),
    (lambda: build(parameters=lambda p: [p, OTHER]), "parameters: q do not occur in the problem"),
    (lambda: build(variables=lambda x: [x, FOREIGN]), "variables: w do not occur in the problem"),
    (lambda: build(parameters=lambda p: [p, p]), "parameters = ['p', 'p']: give at least one, and none twice"),
    (lambda: build(variables=lambda x: []), "variables = []: give at least one, and none twice"),
    (
        lambda: build(lambda x, p: cp.Minimize(cp.sum_squares(x - p) + OTHER * x[0])),
        "the problem also has the parameters q: list all of them in `parameters`",
    ),
    (lambda: build()(), "got 0 tensors for 1 parameters (p)"),
    (lambda: build()(torch.ones(3)), "parameter p has shape (2,), got a tensor of shape (3,): give that shape, or one"),
    (lambda: build()(torch.ones(1, 1, 2)), "parameter p has shape (2,), got a tensor of shape (1, 1, 2)"),
    (lambda: build()(torch.ones(0, 2)), "parameter p has an empty batch: give at least one element"),
    (lambda: half_space()[0](torch.ones(3, N), torch.ones(2, N), torch.ones(())), "has a batch of 2, but param"),
    (
        lambda: half_space()[0](torch.ones(N), torch.ones(N, dtype=torch.float32), torch.ones(())),
        "is torch.float32 on cpu, but param",
    ),
    (
        lambda: ridge()[0](torch.tensor(-1.0)),
        "has the value -1, outside what it was declared to be (0 to inf): correct",
    ),
    (
        lambda: build(pos=True)(torch.tensor([[1.0, 1.0], [1.0, 0.0]])),
        "parameter p of element 1 of the batch has the value 0, outside what it was declared to be (0 to inf)",
    ),
    (
        lambda: build(nonpos=True)(torch.tensor([-1.0, 1.0])),
        "parameter p has the value 1, outside what it was declared",
    ),
    (
        lambda: build(bounds=[-1, np.array([1, 2])])(torch.tensor([0.0, 3.0])),
        "value 3, outside what it was declared to be (-1",
    ),
]

TYPE_ERRORS = [
    (lambda: Layer("x", parameters=[], variables=[]), "problem = 'x': give a cvxpy.Problem"),
    (lambda: build(parameters=lambda p: p), "give a list of cvxpy.Parameter objects"),
    (lambda: build(variables=lambda x: [1.0]), "variables = [1.0]: give a list of cvxpy.Variable objects"),
    (lambda: build()(np.ones(2)), "parameter p: got array([1., 1.]), give a floating-point tensor"),
    (
        lambda: build()(torch.ones(2, dtype=torch.int64)),
        "parameter p: got dtype torch.int64, give a floating-point tensor",
    ),
]


def _identifier(value: object) -> str:
    return value[:40] if isinstance(value, str) else ""


@pytest.mark.parametrize(("action", "message"), VALUE_ERRORS, ids=_identifier)
def test_value_errors(action, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        action()


@pytest.mark.parametrize(("action", "message"), TYPE_ERRORS, ids=_identifier)
def test_type_errors(action, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        action()


@pytest.mark.gpu
def test_inputs_on_a_gpu_come_back_there():
    layer, exact, (point,) = ball()
    moved = point.cuda().requires_grad_()
    (found,) = layer(moved)
    found.sum().backward()
    assert found.is_cuda and moved.grad.is_cuda
    torch.testing.assert_close(found.cpu(), exact(point), rtol=0, atol=1e-12)
