"""Projections against cvxpy, the inequalities that characterise them, their derivatives, and every error message."""

import math
import re
from collections import OrderedDict, namedtuple

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from constrained.sets import (
    Affine,
    Ball,
    Box,
    ConvexSet,
    HalfSpace,
    Nonnegative,
    Product,
    SecondOrderCone,
    Simplex,
    WholeSpace,
)
from implicit import tree

DTYPE = torch.float64
INF, NAN = math.inf, math.nan


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def vector(*values: float, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def bounds(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lower = torch.randn(*shape, generator=generator, dtype=DTYPE) - 0.5
    return lower, lower + torch.rand(*shape, generator=generator, dtype=DTYPE)


LOWER, UPPER = bounds(3, 4, seed=1)
NESTED = {"w": (3, 4), "rest": [(4,), {"deep": (2, 2)}]}
Pair = namedtuple("Pair", ["z", "t"])  # shapes of a tuple, which is itself the notation of a shape

NORMAL, _ = bounds(3, 4, seed=2)
MATRIX, _ = bounds(3, 12, seed=3)
RIGHT = vector(0.5, -1.0, 2.0)
REDUNDANT = torch.cat([MATRIX, MATRIX[:1] + 2 * MATRIX[1:2]])
REDUNDANT_RIGHT = torch.cat([RIGHT, RIGHT[:1] + 2 * RIGHT[1:2]])
BLOCKS = {
    "rest": [torch.ones(2, 4, dtype=DTYPE), {"deep": bounds(2, 2, 2, seed=4)[0]}],
    "w": bounds(2, 3, 4, seed=5)[0],
}


def draw(shapes: object, generator: torch.Generator, scale: float = 2.0, dtype: torch.dtype = DTYPE) -> object:
    """Random tensors for a nesting of shapes."""
    if isinstance(shapes, dict):
        return {key: draw(value, generator, scale, dtype) for key, value in shapes.items()}
    if isinstance(shapes, list):
        return [draw(value, generator, scale, dtype) for value in shapes]
    if isinstance(shapes, Pair):
        return tuple(draw(value, generator, scale, dtype) for value in shapes)
    return scale * torch.randn(shapes, generator=generator, dtype=dtype)


# name: (set, shapes of the point, the constraints in cvxpy given one flat variable per leaf)
CASES = {
    "whole": (WholeSpace(), (3, 4), lambda p: []),
    "box numbers": (Box(-0.5, 1), (3, 4), lambda p: [p[0] >= -0.5, p[0] <= 1]),
    "box one-sided": (Box(upper=0.25), NESTED, lambda p: [v <= 0.25 for v in p]),
    "box tensors": (Box(LOWER, UPPER), (3, 4), lambda p: [p[0] >= flat(LOWER), p[0] <= flat(UPPER)]),
    "box broadcast": (
        Box(LOWER[0], UPPER[0] + 1),
        (3, 4),
        lambda p: [p[0] >= np.tile(flat(LOWER[0]), 3), p[0] <= np.tile(flat(UPPER[0] + 1), 3)],
    ),
    "box tree": (
        Box({"rest": [None, {"deep": 0.1}], "w": LOWER}, {"w": UPPER, "rest": [INF, {"deep": 0.3}]}),
        NESTED,
        lambda p: [p[0] >= flat(LOWER), p[0] <= flat(UPPER), p[2] >= 0.1, p[2] <= 0.3],
    ),
    "nonnegative": (Nonnegative(), NESTED, lambda p: [v >= 0 for v in p]),
    "ball": (Ball(1.5), (3, 4), lambda p: [cp.norm(p[0]) <= 1.5]),
    "ball tree": (Ball(2.5), NESTED, lambda p: [cp.norm(cp.hstack(p)) <= 2.5]),
    "ball center": (
        Ball(1.25, {"rest": [None, {"deep": 0.5}], "w": LOWER}),
        NESTED,
        lambda p: [cp.norm(cp.hstack([p[0] - flat(LOWER), p[1], p[2] - 0.5])) <= 1.25],
    ),
    "simplex": (Simplex(), (6,), lambda p: [p[0] >= 0, cp.sum(p[0]) == 1]),
    "simplex rows": (
        Simplex(2.5),
        (3, 4),
        lambda p: [p[0] >= 0, *(cp.sum(p[0][4 * i : 4 * i + 4]) == 2.5 for i in range(3))],
    ),
    "simplex columns": (
        Simplex(0.5, dim=0),
        (9, 4),
        lambda p: [p[0] >= 0, *(cp.sum(p[0][j::4]) == 0.5 for j in range(4))],
    ),
    "simplex middle": (
        Simplex(1.0, dim=-2),
        (2, 3, 2),
        lambda p: [p[0] >= 0, *(cp.sum(p[0][6 * i + k : 6 * i + 6 : 2]) == 1 for i in range(2) for k in range(2))],
    ),
    "simplex tree": (
        Simplex(),
        {"a": (5,), "b": [(1, 3)]},
        lambda p: [p[0] >= 0, p[1] >= 0, cp.sum(p[0]) == 1, cp.sum(p[1]) == 1],
    ),
    "half-space": (HalfSpace(NORMAL, 0.3), (3, 4), lambda p: [flat(NORMAL) @ p[0] <= 0.3]),
    "half-space tree": (
        HalfSpace({"rest": [None, {"deep": 0.5}], "w": NORMAL}, vector(-1.0)[0]),
        NESTED,
        lambda p: [flat(NORMAL) @ p[0] + 0.5 * cp.sum(p[2]) <= -1],
    ),
    "affine": (Affine(MATRIX.reshape(3, 3, 4), RIGHT), (3, 4), lambda p: [MATRIX.numpy() @ p[0] == flat(RIGHT)]),
    "affine redundant": (
        Affine(REDUNDANT, REDUNDANT_RIGHT),
        (12,),
        lambda p: [MATRIX.numpy() @ p[0] == flat(RIGHT)],
    ),
    "affine tree": (
        Affine(BLOCKS, 0.5),
        NESTED,
        lambda p: [
            rows(BLOCKS["w"]) @ p[0] + rows(BLOCKS["rest"][0]) @ p[1] + rows(BLOCKS["rest"][1]["deep"]) @ p[2] == 0.5
        ],
    ),
    "second-order cone": (SecondOrderCone(), Pair((5,), ()), lambda p: [cp.norm(p[0]) <= p[1][0]]),
    "second-order cone tree": (
        SecondOrderCone(),
        Pair(NESTED, (1,)),
        lambda p: [cp.norm(cp.hstack(p[:3])) <= p[3][0]],
    ),
    "product": (
        Product({"rest": [Ball(1.0), {"deep": Nonnegative()}], "w": Simplex(dim=0)}),
        NESTED,
        lambda p: [p[0] >= 0, *(cp.sum(p[0][j::4]) == 1 for j in range(4)), cp.norm(p[1]) <= 1, p[2] >= 0],
    ),
    "product of cones": (
        Product({"a": SecondOrderCone(), "b": [Affine(torch.ones(1, 3, dtype=DTYPE), 1.0), HalfSpace(1.0, -1.0)]}),
        {"a": Pair((2,), ()), "b": [(3,), (4,)]},
        lambda p: [cp.norm(p[0]) <= p[1][0], cp.sum(p[2]) == 1, cp.sum(p[3]) <= -1],
    ),
    "product prefix": (
        Product({"rest": Ball(1.0), "w": WholeSpace()}),
        NESTED,
        lambda p: [cp.norm(cp.hstack([p[1], p[2]])) <= 1],
    ),
}


def flat(value: Tensor) -> np.ndarray:
    return value.reshape(-1).numpy()


def rows(matrix: Tensor) -> np.ndarray:
    return matrix.reshape(len(matrix), -1).numpy()


def reference(point: object, constraints: object) -> list[np.ndarray]:
    """The projection as a quadratic program, solved by an interior-point method."""
    targets = [flat(leaf) for leaf in tree.leaves(point)]
    variables = [cp.Variable(len(target)) for target in targets]
    objective = sum(cp.sum_squares(v - t) for v, t in zip(variables, targets, strict=True))
    problem = cp.Problem(cp.Minimize(objective), constraints(variables))
    for tolerance in (1e-13, 1e-11, 1e-9, 1e-8):  # as tight as the solver can reach
        try:
            problem.solve(cp.CLARABEL, tol_gap_abs=tolerance, tol_gap_rel=tolerance, tol_feas=tolerance)
        except cp.error.SolverError:
            continue
        if problem.status == cp.OPTIMAL:
            break
    assert problem.status == cp.OPTIMAL
    return [v.value for v in variables]


def parametrize_cases(skip: tuple[str, ...] = ()):
    names = [name for name in CASES if name not in skip]
    return pytest.mark.parametrize(("convex", "shapes", "constraints"), [CASES[n] for n in names], ids=names)


@parametrize_cases()
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")  # then the next tolerance is tried
def test_projection_matches_cvxpy(convex, shapes, constraints, generator):
    for scale in (0.2, 2.0):
        point = draw(shapes, generator, scale)
        expected = reference(point, constraints)
        for got, want in zip(tree.leaves(convex.project(point)), expected, strict=True):
            np.testing.assert_allclose(flat(got), want, atol=1e-7, rtol=0)


@parametrize_cases()
def test_projection_is_characterised_by_its_inequalities(convex, shapes, constraints, generator):
    inside = [convex.project(draw(shapes, generator, 1.0)) for _ in range(5)]
    for _ in range(10):
        point, other = draw(shapes, generator), draw(shapes, generator)
        projected = convex.project(point)
        assert convex.contains(projected)
        assert convex.contains(projected, atol=1e-12)
        assert tree.norm(tree.sub(convex.project(projected), projected)) < 1e-14
        moved, gap = tree.sub(projected, convex.project(other)), tree.sub(point, other)
        assert tree.dot(moved, moved) <= tree.dot(moved, gap) + 1e-12  # firmly nonexpansive
        for member in inside:  # <point - P point, member - P point> <= 0
            assert tree.dot(tree.sub(point, projected), tree.sub(member, projected)) <= 1e-12


@parametrize_cases()
def test_projection_keeps_its_input_structure_and_dtype(convex, shapes, constraints, generator):
    point = draw(shapes, generator)
    before = tree.clone(point)
    projected = convex.project(point)
    assert tree.structure(projected) == tree.structure(point)
    assert all(torch.equal(u, v) for u, v in zip(tree.leaves(before), tree.leaves(point), strict=True))
    assert [v.shape for v in tree.leaves(projected)] == [v.shape for v in tree.leaves(point)]


def as_function(convex: ConvexSet, point: object):
    spec = tree.structure(point)
    return lambda *v: tuple(tree.leaves(convex.project(tree.unflatten(v, spec)))), tree.leaves(tree.variables(point))


forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own


@forward_mode
@parametrize_cases()
def test_derivatives_at_generic_points(convex, shapes, constraints, generator):
    for scale in (0.1, 2.0):
        function, inputs = as_function(convex, draw(shapes, generator, scale))
        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, inputs)


@forward_mode
@parametrize_cases()
def test_works_under_vmap_and_jacrev(convex, shapes, constraints, generator):
    points = [draw(shapes, generator) for _ in range(3)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *points)
    for i, got in enumerate(zip(*tree.leaves(torch.vmap(convex.project)(stacked)), strict=True)):
        for u, v in zip(got, tree.leaves(convex.project(points[i])), strict=True):
            torch.testing.assert_close(u, v, rtol=0, atol=1e-14)
    function, inputs = as_function(convex, points[0])
    forward = torch.func.jacfwd(function)(*inputs)
    reverse = torch.func.jacrev(function)(*inputs)
    for u, v in zip(tree.leaves(forward), tree.leaves(reverse), strict=True):
        torch.testing.assert_close(u, v, rtol=0, atol=1e-14)


class NoHostReads(TorchDispatchMode):
    """Refuses whatever waits for the device: ``item``, ``bool``, ``nonzero``, boolean masks."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "aten.equal", "masked_select")), name
        return func(*args, **(kwargs or {}))


@parametrize_cases()
def test_projecting_reads_nothing_on_the_host(convex, shapes, constraints, generator):
    point = tree.variables(draw(shapes, generator))
    with NoHostReads():
        total = sum(leaf.square().sum() for leaf in tree.leaves(convex.project(point)))
        torch.autograd.grad(total, tree.leaves(point), allow_unused=True)
        convex.check(point, "point")


def test_the_guard_against_host_reads_works():
    with NoHostReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        bool(torch.ones(()))


# -- dtypes, shapes, special values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "convex",
    [
        WholeSpace(),
        Box(-0.5, 0.5),
        Nonnegative(),
        Ball(1.0),
        Ball(1.0, 0.5),
        Simplex(),
        Simplex(60.0),
        HalfSpace(-0.25, -20.0),
    ],
    ids=repr,
)
def test_low_precision_is_preserved_and_close_to_float64(convex, dtype, generator):
    point = {"a": draw((200,), generator, dtype=dtype), "b": draw((3, 50), generator, dtype=dtype)}
    projected = convex.project(point)
    exact = convex.project(tree.map(Tensor.double, point))
    assert all(leaf.dtype == dtype for leaf in tree.leaves(projected))
    for got, want in zip(tree.leaves(projected), tree.leaves(exact), strict=True):
        eps = torch.finfo(dtype).eps
        if dtype == torch.float32:
            torch.testing.assert_close(got.double(), want, rtol=0, atol=8 * eps)
        else:  # computed in float32 and rounded once
            torch.testing.assert_close(got.double(), want, rtol=0.51 * eps, atol=1e-6)
    assert convex.contains(projected)
    assert not convex.contains(tree.map(lambda v: v - 5, projected)) or convex.is_whole_space


def test_ball_keeps_mixed_dtypes():
    point = {"a": vector(3.0, 0.0), "b": vector(4.0, dtype=torch.float32)}
    projected = Ball(1.0).project(point)
    assert projected["a"].dtype == torch.float64
    assert projected["b"].dtype == torch.float32
    torch.testing.assert_close(projected["a"], vector(0.6, 0.0))
    torch.testing.assert_close(projected["b"], vector(0.8, dtype=torch.float32))
    assert Ball(1.0).contains(projected)


@pytest.mark.parametrize("convex", [WholeSpace(), Box(-0.5, 0.5), Nonnegative(), Ball(0.5), Ball(0.5, -0.5)], ids=repr)
def test_scalars_and_empty_leaves(convex):
    point = {"scalar": torch.tensor(2.0, dtype=DTYPE), "empty": torch.zeros(0, 3, dtype=DTYPE)}
    projected = convex.project(point)
    want = {Box: 0.5, Ball: 0.5 if getattr(convex, "center", None) is None else 0.0}.get(type(convex), 2.0)
    assert projected["scalar"].shape == ()
    assert projected["scalar"] == want
    assert projected["empty"].shape == (0, 3)
    assert convex.contains(projected)
    assert convex.contains(point) == (want == 2.0)
    only_empty = {"empty": torch.zeros(0, dtype=torch.float32)}
    assert convex.project(only_empty)["empty"].dtype == torch.float32
    assert convex.contains(only_empty)
    assert convex.project({}) == {}
    assert convex.contains({})
    function, inputs = as_function(convex, point)
    assert gradcheck(function, inputs)


def test_simplex_without_slices():
    assert Simplex().project(torch.zeros(0, 3)).shape == (0, 3)
    assert Simplex().contains(torch.zeros(0, 3))
    assert torch.equal(Simplex(2.0).project(vector(-7.0)), vector(2.0))


@pytest.mark.parametrize(
    ("convex", "expected"),
    [
        (WholeSpace(), [True, False, False, False]),
        (Box(-1, 1), [True, False, False, False]),
        (Box(vector(-1.0, 0.0), vector(1.0, 0.0)), [True, False, False, False]),
        (Box(vector(0.0, 0.0), 0.0), [True, False, False, False]),
        (Box(0, 0), [True, False, False, False]),
        (Nonnegative(), [True, False, False, False]),
        (Simplex(), [True, True, False, False]),
        (Ball(1.0), [True, True, True, True]),
        (Ball(1e9), [True, True, True, True]),
        (HalfSpace(1.0, 9.0), [True, True, True, True]),
        (Affine([torch.ones(1, 2, dtype=DTYPE)] * 2), [True, True, True, True]),
    ],
    ids=repr,
)
def test_nan_is_never_repaired(convex, expected):
    point = [vector(NAN, 0.25), vector(0.25, 0.25)]
    found = torch.cat(convex.project(point)).isnan().tolist()
    assert found == expected
    assert not convex.contains(point)
    assert not convex.contains(point, atol=INF)


@pytest.mark.parametrize("convex", [WholeSpace(), Box(-1, 1), Nonnegative(), Ball(1.0), Simplex()], ids=repr)
def test_infinite_points_are_not_contained(convex):
    assert not convex.contains(vector(INF, 0.0))
    assert not convex.contains(vector(-INF, 0.0), atol=INF)


def test_infinities_project_where_the_projection_has_a_limit():
    assert torch.equal(Box(-1, 2).project(vector(INF, -INF)), vector(2.0, -1.0))
    assert torch.equal(Simplex().project(vector(-INF, 0.3, 0.3)), vector(0.0, 0.5, 0.5))
    assert Simplex().project(vector(INF, 0.0)).isnan().all()
    assert Ball(1.0).project(vector(INF, 0.0)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cones_and_affine_sets_in_low_precision(dtype, generator):
    eps = torch.finfo(dtype).eps
    matrix = torch.ones(1, 40, dtype=dtype)
    for convex, exact, shapes in (
        (Affine(matrix, 3.0), Affine(matrix.double(), 3.0), (40,)),
        (SecondOrderCone(), SecondOrderCone(), Pair((40,), ())),
    ):
        point = draw(shapes, generator, dtype=dtype)
        projected, want = convex.project(point), exact.project(tree.map(Tensor.double, point))
        assert all(leaf.dtype == dtype for leaf in tree.leaves(projected))
        for got, expected in zip(tree.leaves(projected), tree.leaves(want), strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=0.51 * eps, atol=1e-6)  # rounded once
        assert convex.contains(projected)


# -- one set at a time -------------------------------------------------------------------------------------------------


def jacobian(convex: ConvexSet, point: Tensor) -> Tensor:
    return torch.func.jacrev(convex.project)(point)


def test_simplex_jacobian(generator):
    for total in (0.4, 1.0, 3.0):
        for _ in range(20):
            point = draw((7,), generator, 1.0)
            support = (Simplex(total).project(point) > 0).double()
            expected = support.diag() - torch.outer(support, support) / support.sum()
            torch.testing.assert_close(jacobian(Simplex(total), point), expected, rtol=0, atol=1e-15)
    vertex, middle = vector(5.0, 0.0, -1.0), vector(0.2, 0.2, 0.2)
    assert jacobian(Simplex(), vertex).abs().max() == 0
    torch.testing.assert_close(jacobian(Simplex(), middle), torch.eye(3, dtype=DTYPE) - 1 / 3)


def test_simplex_is_accurate_for_large_shifts_and_long_slices(generator):
    point = draw((5,), generator, 1.0)
    torch.testing.assert_close(Simplex().project(point + 2.0**30), Simplex().project(point), rtol=0, atol=1e-6)
    torch.testing.assert_close(Simplex().project(vector(1e300, -1e300, 0.0)), vector(1.0, 0.0, 0.0), rtol=0, atol=0)
    long = torch.randn(300_000, generator=generator) * 1e-3
    projected = Simplex(1.0).project(long)
    torch.testing.assert_close(projected.double(), Simplex(1.0).project(long.double()), rtol=0, atol=1e-8)
    assert abs(projected.double().sum() - 1) < 1e-6
    assert projected.min() >= 0
    ties = torch.randint(-8, 8, (20_000, 16), generator=generator).float() * 0.1  # entries that sit on the threshold
    assert Simplex().project(ties).min() >= 0


def test_ball_inside_center_and_boundary():
    center = vector(1.0, -2.0)
    ball = Ball(0.5, center)
    inside = vector(1.1, -2.1)
    assert torch.equal(ball.project(inside), inside)
    for point in (inside, center.clone()):
        assert torch.equal(jacobian(ball, point), torch.eye(2, dtype=DTYPE))
    assert torch.equal(jacobian(Ball(1.0), torch.zeros(3, dtype=DTYPE)), torch.eye(3, dtype=DTYPE))
    unit = vector(0.6, 0.8)
    expected = 0.1 * (torch.eye(2, dtype=DTYPE) - torch.outer(unit, unit))
    torch.testing.assert_close(jacobian(ball, center + 5 * unit), expected)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_ball_norm_neither_overflows_nor_underflows(size):
    point = vector(3 * size, 4 * size, dtype=torch.float32)
    torch.testing.assert_close(Ball(size).project(point) / size, vector(0.6, 0.8, dtype=torch.float32))
    assert torch.equal(Ball(6 * size).project(point), point)
    top = vector(3e38, 3e38, dtype=torch.float32)  # the norm itself is infinite
    torch.testing.assert_close(Ball(1.0).project(top), vector(0.5**0.5, 0.5**0.5, dtype=torch.float32))


def test_ball_center_receives_gradients():
    center = vector(0.3, -0.2, 0.1).requires_grad_()
    point = vector(2.0, 1.0, -3.0).requires_grad_()
    assert gradcheck(lambda c, p: Ball(0.7, c).project(p), (center, point))


@pytest.mark.parametrize("outside", [True, False])
def test_ball_radius_receives_gradients(outside):
    center, radius = vector(0.3, -0.2, 0.1).requires_grad_(), torch.tensor(0.7, dtype=DTYPE, requires_grad=True)
    point = (vector(2.0, 1.0, -3.0) if outside else vector(0.4, -0.1, 0.0)).requires_grad_()
    assert gradcheck(lambda c, r, p: Ball(r, c).project(p), (center, radius, point))
    assert gradgradcheck(lambda c, r, p: Ball(r, c).project(p), (center, radius, point))
    gradient = torch.func.grad(lambda r: Ball(r).project(point.detach()).norm())(radius.detach())
    torch.testing.assert_close(gradient, vector(1.0 if outside else 0.0)[0])
    assert Ball(torch.tensor(2.0, dtype=DTYPE)).contains(vector(2.0, 0.0))
    assert not Ball(torch.tensor(2.0, dtype=DTYPE)).contains(vector(2.0, 0.1))


@pytest.mark.parametrize("outside", [True, False])
def test_half_space_data_receive_gradients(outside):
    normal, point = vector(0.5, -2.0, 0.0, 1.0).requires_grad_(), vector(1.0, -1.0, 0.5, 2.0).requires_grad_()
    offset = torch.tensor(1.0 if outside else 6.0, dtype=DTYPE, requires_grad=True)
    assert gradcheck(lambda p, a, b: HalfSpace(a, b).project(p), (point, normal, offset))
    assert gradgradcheck(lambda p, a, b: HalfSpace(a, b).project(p), (point, normal, offset))
    a, p = normal.detach(), point.detach()
    norm, excess = a @ a, a @ p - 1.0
    by_hand = {  # p - (a'p - b) a / a'a by the product rule
        "p": torch.eye(4) - torch.outer(a, a) / norm,
        "a": -(excess * torch.eye(4) + torch.outer(a, p)) / norm + 2 * excess * torch.outer(a, a) / norm**2,
        "b": a / norm,
    }
    if not outside:
        by_hand = {"p": torch.eye(4), "a": torch.zeros(4, 4), "b": torch.zeros(4)}
    found = torch.func.jacrev(lambda p, a, b: HalfSpace(a, b).project(p), argnums=(0, 1, 2))(p, a, offset.detach())
    for got, want in zip(found, by_hand.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_half_space_keeps_points_inside_and_survives_extreme_scales():
    inside = vector(0.1, 0.2)
    assert torch.equal(HalfSpace(vector(3.0, 4.0), 1.1).project(inside), inside)
    assert torch.equal(jacobian(HalfSpace(vector(3.0, 4.0), 1.1), inside), torch.eye(2))  # on the boundary, too
    for size in (1e-30, 1e30):
        normal = vector(3 * size, 4 * size, dtype=torch.float32)
        projected = HalfSpace(normal).project(vector(3.0, 4.0, dtype=torch.float32))
        assert projected.abs().max() < 1e-6
        assert HalfSpace(normal).contains(projected)


def test_affine_data_receive_gradients():
    matrix, right = MATRIX.clone().requires_grad_(), RIGHT.clone().requires_grad_()
    point = draw((12,), torch.Generator().manual_seed(1)).requires_grad_()
    assert gradcheck(lambda A, b, p: Affine(A, b).project(p), (matrix, right, point))
    assert gradgradcheck(lambda A, b, p: Affine(A, b).project(p), (matrix, right, point))
    kept = Affine(matrix, right)
    for _ in range(2):  # the kept factorization is no graph that a first backward frees
        (gradient,) = torch.autograd.grad(kept.project(point).sum(), right)
    torch.testing.assert_close(gradient, torch.linalg.pinv(MATRIX).T.sum(1))


def test_affine_jacobian_with_redundant_rows():
    convex = Affine(REDUNDANT, REDUNDANT_RIGHT)
    point = draw((12,), torch.Generator().manual_seed(1))
    gram = MATRIX @ MATRIX.T
    projector = torch.eye(12) - MATRIX.T @ torch.linalg.solve(gram, MATRIX)
    torch.testing.assert_close(jacobian(convex, point), projector, rtol=0, atol=1e-13)

    def of_right(b):  # moves along right-hand sides that have a solution
        return Affine(REDUNDANT, torch.cat([b, b[:1] + 2 * b[1:2]])).project(point)

    assert gradcheck(of_right, RIGHT.clone().requires_grad_())


def test_affine_keeps_feasible_points_and_reads_key_order():
    convex = Affine({"a": vector(1.0, 2.0)[None], "b": vector(-1.0)[None]}, 1.0)
    point = {"b": vector(0.0), "a": vector(1.0, 0.0)}
    assert list(convex.project(point)) == ["b", "a"]
    assert all(torch.equal(v, point[k]) for k, v in convex.project(point).items())
    torch.testing.assert_close(convex.project({"b": vector(0.0), "a": vector(0.0, 0.0)})["a"], vector(1 / 6, 2 / 6))


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((vector(3.0, 4.0), vector(6.0)), "identity"),
        ((vector(3.0, 4.0), vector(5.0)), "identity"),
        ((vector(0.0, 0.0), vector(0.0)), "identity"),
        ((vector(0.0, 0.0), vector(-1.0)), "zero"),
        ((vector(3.0, 4.0), vector(-6.0)), "zero"),
        ((vector(3.0, 4.0), vector(-5.0)), "zero"),
        ((vector(3.0, 4.0), vector(1.0)), "curved"),
        ((vector(3.0, 4.0), vector(-4.0)), "curved"),
    ],
)
def test_second_order_cone_jacobian(point, expected):
    z, t = point
    unit = vector(0.6, 0.8)
    ratio = t / 5
    upper = (1 + ratio) * torch.eye(2) - ratio * torch.outer(unit, unit)
    curved = torch.cat([torch.cat([upper, unit[:, None]], 1), torch.cat([unit[None], vector(1.0)[None]], 1)]) / 2
    want = {"identity": torch.eye(3), "zero": torch.zeros(3, 3), "curved": curved}[expected]
    rows = torch.func.jacrev(lambda v: torch.cat(SecondOrderCone().project((v[:2], v[2:]))))(torch.cat([z, t]))
    torch.testing.assert_close(rows, want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_second_order_cone_neither_overflows_nor_underflows(size):
    z, t = SecondOrderCone().project(
        (vector(3 * size, 4 * size, dtype=torch.float32), torch.tensor(0.0, dtype=torch.float32))
    )
    torch.testing.assert_close(z / size, vector(1.5, 2.0, dtype=torch.float32))
    torch.testing.assert_close(t / size, torch.tensor(2.5, dtype=torch.float32))


def test_second_order_cone_of_special_values():
    cone = SecondOrderCone()
    for bad in ((vector(NAN, 1.0), vector(1.0)), (vector(0.0, 1.0), vector(NAN)), (vector(INF, 1.0), vector(1.0))):
        assert torch.cat(cone.project(bad)).isnan().all()
        assert not cone.contains(bad)
    assert torch.equal(cone.project((vector(), vector(-2.0)))[1], vector(0.0))  # no z: the half-line t >= 0
    assert not cone.is_whole_space
    assert not HalfSpace(1.0).is_whole_space
    assert not Affine(MATRIX, RIGHT).is_whole_space
    assert Affine(torch.zeros(1, 3)).is_whole_space
    assert isinstance(cone.project([vector(1.0), vector(0.0)]), list)


@parametrize_cases(skip=("whole",))
def test_distance_and_its_gradient(convex, shapes, constraints, generator):
    point = tree.variables(draw(shapes, generator))
    distance = convex.distance(point)
    gap = tree.sub(point, convex.project(point))
    torch.testing.assert_close(distance, torch.cat([leaf.reshape(-1) for leaf in tree.leaves(gap)]).norm())
    assert distance > 0
    gradients = torch.autograd.grad(distance, tree.leaves(point), allow_unused=True, materialize_grads=True)
    for gradient, part in zip(gradients, tree.leaves(gap), strict=True):
        torch.testing.assert_close(gradient, part.detach() / distance.detach(), rtol=0, atol=1e-12)


def test_distance_is_zero_inside_with_a_zero_gradient():
    for convex, point in ((Ball(1.0), vector(0.1, 0.2)), (HalfSpace(1.0), {"a": vector(-1.0), "b": vector(-2.0)})):
        point = tree.variables(point)
        distance = convex.distance(point)
        assert distance == 0
        assert all(g.abs().max() == 0 for g in torch.autograd.grad(distance, tree.leaves(point)))


def test_box_derivative_at_and_between_bounds():
    point = vector(-1.0, 0.0, 0.5, 1.0, 2.0)
    assert torch.equal(jacobian(Box(0, 1), point).diag(), vector(0.0, 1.0, 1.0, 1.0, 0.0))
    assert torch.equal(jacobian(Nonnegative(), vector(-1.0, 0.0, 1.0)).diag(), vector(0.0, 1.0, 1.0))


HALF = vector(0.5)


@pytest.mark.parametrize("fixed", [Box(0.5, 0.5), Box(HALF, 0.5), Box(0.5, HALF), Box(HALF, HALF)], ids=repr)
def test_a_fixed_entry_is_constant(fixed):
    for value in (0.0, 0.5, 1.0):
        point = vector(value).requires_grad_()
        result = fixed.project(point)
        assert result == 0.5
        assert torch.autograd.grad(result.sum(), point, allow_unused=True)[0] == 0


def test_box_bounds_receive_gradients():
    lower, upper = vector(-1.0, -1.0, -1.0).requires_grad_(), vector(1.0, 1.0, 1.0).requires_grad_()
    point = vector(-2.0, 0.0, 2.0).requires_grad_()
    assert gradcheck(lambda lo, hi, p: Box(lo, hi).project(p), (lower, upper, point))


def test_box_mixes_numbers_and_tensors():
    point = vector(-3.0, 0.0, 3.0)
    expected = vector(-1.0, 0.0, 2.0)
    for lower in (-1, np.float32(-1), vector(-1.0, -1.0, -1.0), vector(-1.0), torch.tensor(-1.0, dtype=DTYPE)):
        for upper in (2.0, vector(2.0, 2.0, 2.0)):
            assert torch.equal(Box(lower, upper).project(point), expected)
    assert torch.equal(Box(None, vector(INF, INF, 2.0)).project(point), vector(-3.0, 0.0, 2.0))


def test_key_order_does_not_matter():
    point = {"a": vector(-5.0), "b": vector(5.0)}
    swapped = {"b": point["b"], "a": point["a"]}
    box = Box({"b": vector(-1.0), "a": vector(-3.0)}, {"a": vector(2.0), "b": vector(4.0)})
    product = Product({"b": Box(-1, 4), "a": Box(-3, 2)})
    ball = Ball(0.5, {"b": vector(5.0), "a": 0})
    for convex, want in ((box, (-3.0, 4.0)), (product, (-3.0, 4.0))):
        for given in (point, swapped):
            projected = convex.project(given)
            assert list(projected) == list(given)
            assert (projected["a"].item(), projected["b"].item()) == want
            assert convex.contains(projected)
            assert not convex.contains(given)
    assert torch.equal(ball.project(point)["a"], ball.project(swapped)["a"])
    assert ball.project(swapped)["b"] == 5.0
    assert ball.project(swapped)["a"] == -0.5
    assert Box({"a": 0.0, "b": 5.0}, {"b": 6.0, "a": 1.0}).contains({"b": vector(5.5), "a": vector(0.5)})


def test_product_of_other_containers():
    Pair = namedtuple("Pair", ["u", "v"])
    point = Pair(vector(-1.0, 3.0), [vector(-1.0), OrderedDict(z=vector(9.0))])
    projected = Product(Pair(Simplex(), [Nonnegative(), OrderedDict(z=Box(0, 1))])).project(point)
    assert isinstance(projected, Pair)
    assert torch.equal(projected.u, vector(0.0, 1.0))
    assert torch.equal(projected.v[0], vector(0.0))
    assert isinstance(projected.v[1], OrderedDict)
    assert torch.equal(projected.v[1]["z"], vector(1.0))
    nested = Product((WholeSpace(), Product([Nonnegative(), WholeSpace()])))
    assert torch.equal(nested.project((vector(-1.0), [vector(-1.0), vector(-2.0)]))[1][0], vector(0.0))


def test_is_whole_space():
    free = [WholeSpace(), Box(), Box(-INF, INF), Box(vector(-INF, -INF), None), Box({"a": None}, {"a": INF})]
    bound = [Box(0), Box(None, vector(INF, 1.0)), Box({"a": None, "b": 0}), Nonnegative(), Ball(1e300), Simplex()]
    assert all(convex.is_whole_space for convex in free)
    assert not any(convex.is_whole_space for convex in bound)
    assert Product({"a": WholeSpace(), "b": [Box()]}).is_whole_space
    assert not Product({"a": WholeSpace(), "b": [Simplex()]}).is_whole_space


CONTAINS = [
    (Box(0, 1), vector(0.0, 1.0), 0.0, True),
    (Box(0, 1), vector(-1e-9, 1.0), None, True),
    (Box(0, 1), vector(-1e-9, 1.0), 0.0, False),
    (Box(0, 1), vector(-1e-7, 1.0), None, False),
    (Box(0, 1), vector(-0.1, 1.1), 0.2, True),
    (Box(0, 1), vector(-0.15, 1.15), 0.2, True),  # entry by entry, not in norm
    (Nonnegative(), vector(-1e-3, 1e12), None, False),  # a large entry does not excuse another
    (Nonnegative(), vector(-1e-9, 1e12), None, True),
    (Box(upper=1e6), vector(1e6 + 1e-3), None, True),  # relative to the bound
    (Box(upper=1e6), vector(1e6 + 1.0), None, False),
    (Box(upper=1e6), vector(1e6 + 1.0), 0.5, False),  # a given tolerance is absolute
    (Ball(1.0), vector(0.6, 0.8 + 1e-9), None, True),
    (Ball(1.0), vector(0.6, 0.8 + 1e-6), None, False),
    (Ball(1e-6), vector(0.0, 1.1e-6), None, False),  # relative to the radius
    (Ball(1e-9), vector(0.0, 2e-9), None, False),
    (Ball(1e6), vector(0.0, 1e6 + 1e-3), None, True),
    (Ball(1e6), vector(0.0, 1e6 + 1e-1), None, False),
    (Ball(1.0, 1e8), vector(1e8 + 1.5, 1e8), None, True),  # rounding of the center
    (Simplex(), vector(0.5, 0.5 + 1e-9), None, True),
    (Simplex(), vector(0.5, 0.5 + 1e-6), None, False),
    (Simplex(), vector(1.001, -0.001), None, False),
    (Simplex(1e-9), vector(0.0, 0.0), None, False),  # relative to the total
    (Simplex(1e6), vector(1e6 + 1e-3, 0.0), None, True),
    (Simplex(), torch.tensor([[0.5, 0.5], [0.5, 0.6]], dtype=DTYPE), None, False),
    (Simplex(), torch.full((100, 2), 0.5 + 7e-9, dtype=DTYPE), None, True),  # slice by slice, not in norm
    (Simplex(dim=0), torch.tensor([[0.5, 0.4], [0.5, 0.6]], dtype=DTYPE), None, True),
    (Product([Simplex(), WholeSpace()]), [vector(0.5, 0.6), vector(1e30)], None, False),
    (Product([Simplex(), WholeSpace()]), [vector(0.5, 0.5), vector(1e30)], None, True),
    (Product([Simplex(), WholeSpace()]), [vector(0.5, 0.6), vector(1e30)], 0.1, True),
]


@pytest.mark.parametrize(("convex", "point", "atol", "expected"), CONTAINS)
def test_contains(convex, point, atol, expected):
    assert convex.contains(point, atol) is expected


def test_a_users_own_set_needs_only_a_projection():
    class Hyperplane(ConvexSet):  # {p : sum p = 0}
        def project(self, point):
            self.check(point, "point")
            return point - point.mean()

    plane = Hyperplane()
    assert plane.contains(vector(1.0, -1.0))
    assert plane.contains(vector(1e9, 1e-3 - 1e9))  # relative to the norm of the projection
    assert not plane.contains(vector(1.0, -1.0 + 1e-6))
    assert not plane.is_whole_space
    assert torch.equal(Product({"a": plane}).project({"a": vector(1.0, 3.0)})["a"], vector(-1.0, 1.0))
    with pytest.raises(TypeError, match=re.escape("point has dtype torch.int64")):
        plane.project(torch.arange(3))
    with pytest.raises(TypeError, match="abstract"):
        ConvexSet()  # type: ignore[abstract]


def test_sets_are_frozen_and_printable():
    with pytest.raises(AttributeError):
        Simplex().total = 2.0  # type: ignore[misc]
    assert repr(Simplex(total=2.0)) == "Simplex(total=2.0, dim=-1)"
    assert Simplex() == Simplex(total=1.0)
    box = Box(lower=vector(0.0, 0.0), upper=1)
    assert box == box  # with tensor fields: identity, and no ambiguous truth value
    assert len({box, Box(0, 1), Ball(1.0, vector(0.0, 0.0)), Product({"a": box})}) == 4


# -- errors ------------------------------------------------------------------------------------------------------------

VALUE_ERRORS = [
    (lambda: Box(1, 0), "Box.lower = 1 exceeds Box.upper = 0: swap them"),
    (lambda: Box(vector(0.0, 2.0, 3.0), 1), "Box.lower[1] = 2 exceeds Box.upper[1] = 1"),
    (lambda: Box(0.0, torch.tensor([[1.0, 1.0], [-1.0, 1.0]])), "Box.lower[1, 0] = 0 exceeds Box.upper[1, 0] = -1"),
    (lambda: Box({"a": 0, "b": vector(0.0, 5.0)}, 1), "Box.lower['b'][1] = 5 exceeds Box.upper['b'][1] = 1"),
    (lambda: Box(1, {"a": None, "b": 0}), "Box.lower['b'] = 1 exceeds Box.upper['b'] = 0"),
    (lambda: Box({"a": 0, "b": 9}, {"b": 10, "a": -1}), "Box.lower['a'] = 0 exceeds Box.upper['a'] = -1"),
    (lambda: Box({"a": 0}, {"c": 1}), "Box.upper has the entries ['c'], which do not match those of Box.lower ("),
    (lambda: Box(vector(0.0, 0.0), vector(1.0, 1.0, 1.0)), "Box.lower of shape (2,) on cpu and Box.upper of shape"),
    (lambda: Box(NAN, 1), "Box.lower contains nan: use None or -inf for no bound"),
    (lambda: Box(0, {"a": vector(NAN)}), "Box.upper['a'] contains nan: use None or inf"),
    (lambda: Box(lower=INF), "Box.lower contains inf: use None or -inf for no bound"),
    (lambda: Box(upper=vector(0.0, -INF)), "Box.upper contains -inf: use None or inf for no bound"),
    (lambda: Ball(0.0), "Ball.radius = 0.0: give a positive finite number"),
    (lambda: Ball(-1), "Ball.radius = -1: give a positive finite number"),
    (lambda: Ball(INF), "Ball.radius = inf: give a positive finite number"),
    (lambda: Ball(NAN), "Ball.radius = nan: give a positive finite number"),
    (lambda: Ball(1.0, vector(INF)), "Ball.center contains inf: give finite values"),
    (lambda: Ball(1.0, {"a": -INF}), "Ball.center['a'] contains -inf: give finite values"),
    (lambda: Ball(1.0, NAN), "Ball.center contains nan: give finite values"),
    (lambda: Ball(torch.tensor(-1.0)), "Ball.radius = -1.0: give a positive finite number"),
    (lambda: Ball(torch.tensor(NAN)), "Ball.radius = nan: give a finite value"),
    (lambda: HalfSpace(0.0), "HalfSpace.normal is zero: give a normal with a nonzero entry"),
    (lambda: HalfSpace({"a": None, "b": vector(0.0)}), "HalfSpace.normal is zero"),
    (lambda: HalfSpace(vector(1.0, NAN)), "HalfSpace.normal contains nan: give finite values"),
    (lambda: HalfSpace(1.0, INF), "HalfSpace.offset = inf: give a finite value"),
    (lambda: Affine(vector(1.0, INF)[None]), "Affine.matrix contains inf: give finite values"),
    (lambda: Affine(MATRIX, NAN), "Affine.offset contains nan: give finite values"),
    (lambda: Affine(torch.tensor(1.0)), "Affine.matrix has shape (): give it (m, *leaf shape), m > 0"),
    (lambda: Affine(torch.zeros(0, 3)), "Affine.matrix has shape (0, 3): give it (m, *leaf shape), m > 0"),
    (
        lambda: Affine({"a": torch.ones(1, 3), "b": torch.ones(2, 3)}),
        "the entries of Affine.matrix differ in their numbers of rows, {\"Affine.matrix['a']\": 1, "
        "\"Affine.matrix['b']\": 2}: give all m rows",
    ),
    (
        lambda: Affine(MATRIX, vector(1.0, 2.0)),
        "Affine.offset has shape (2,), but Affine.matrix has 3 rows: give a tensor of shape (3,), or a number",
    ),
    (
        lambda: Affine(torch.ones(2, 3), vector(1.0, 2.0)),
        "Affine: the 2 equations contradict each other (the nearest right-hand side that has a solution is 0.707 away",
    ),
    (lambda: Affine(torch.zeros(1, 3), 1.0), "Affine: the 1 equations contradict each other"),
    (
        lambda: Affine(torch.ones(2, 3, requires_grad=True), 1.0),
        "Affine.matrix requires gradients and has redundant rows, where the projection is not differentiable in it",
    ),
    (lambda: Simplex(0.0), "Simplex.total = 0.0: give a positive finite number"),
    (lambda: Simplex(-2.0), "Simplex.total = -2.0: give a positive finite number"),
    (lambda: Box(0, 1).contains(vector(0.0), atol=-1.0), "atol = -1.0: give a nonnegative number"),
    (lambda: Box(0, 1).contains(vector(0.0), atol=NAN), "atol = nan: give a nonnegative number"),
    # points that do not fit
    (
        lambda: Box(vector(0.0, 0.0)).check({"w": torch.zeros(3, dtype=DTYPE)}, "y0"),
        "Box.lower of shape (2,) does not broadcast to y0['w'] of shape (3,): give it the shape of the leaf",
    ),
    (
        lambda: Box(None, torch.zeros(1, 3, dtype=DTYPE)).check(torch.zeros(3, dtype=DTYPE), "y0"),
        "Box.upper of shape (1, 3) does not broadcast to y0 of shape (3,)",
    ),
    (
        lambda: Box(vector(0.0, 0.0)).project(vector(1.0)),  # would broadcast the point, not the bound
        "Box.lower of shape (2,) does not broadcast to point of shape (1,)",
    ),
    (
        lambda: Box({"w": vector(0.0)}).check({"w": torch.zeros(3, dtype=torch.float32)}, "y0"),
        "Box.lower is torch.float64 on cpu, but y0['w'] is torch.float32 on cpu: convert one of them",
    ),
    (
        lambda: Box(torch.zeros(3)).check(torch.zeros(3, device="meta"), "y0"),
        "Box.lower is torch.float64 on cpu, but y0 is torch.float64 on meta",
    ),
    (
        lambda: Box({"w": 0}).check({"v": vector(0.0), "b": vector(0.0)}, "y0"),
        "Box.lower has the entries ['w'], which do not match those of y0 (['v'], ['b']): give one value for all leaves",
    ),
    (lambda: Box([0, 1]).check(vector(0.0), "y0"), "Box.lower has the entries [0], [1], which do not match"),
    (lambda: Box({"w": {"x": 0}}).check({"w": vector(0.0)}, "y0"), "Box.lower has the entries ['w']['x'], which"),
    (lambda: Box({"w": 0}).check({"w": {"x": vector(0.0)}}, "y0"), "Box.lower has the entries ['w'], which"),
    (lambda: Ball(1.0, vector(0.0, 0.0)).check(vector(0.0), "x0"), "Ball.center of shape (2,) does not broadcast to"),
    (lambda: Ball(1.0, [0.0]).check({"a": vector(0.0)}, "x0"), "Ball.center has the entries [0], which do not match"),
    (
        lambda: Simplex().check({"w": torch.tensor(1.0)}, "x0"),
        "Simplex.dim = -1 needs at least one entry to sum, but x0['w'] has shape (): reshape it (a scalar to (1,))",
    ),
    (lambda: Simplex().check([torch.zeros(2, 0)], "x0"), "but x0[0] has shape (2, 0)"),
    (lambda: Simplex(dim=1).check(torch.zeros(3), "x0"), "Simplex.dim = 1 needs at least one entry to sum, but"),
    (lambda: Simplex(dim=-2).check(torch.zeros(3), "x0"), "Simplex.dim = -2 needs at least one entry to sum, but"),
    (lambda: HalfSpace(vector(1.0, 0.0)).check(vector(0.0), "x0"), "HalfSpace.normal of shape (2,) does not broadcast"),
    (
        lambda: HalfSpace(1.0, torch.tensor(1.0)).check(torch.zeros(2, dtype=torch.float32), "x0"),
        "HalfSpace.offset is torch.float64 on cpu, but x0 is torch.float32 on cpu: convert one of them",
    ),
    (
        lambda: Ball(torch.tensor(1.0)).check(torch.zeros(2, dtype=torch.float32), "x0"),
        "Ball.radius is torch.float64 on cpu, but x0 is torch.float32 on cpu: convert one of them",
    ),
    (
        lambda: Affine(MATRIX).check({"w": torch.zeros(12)}, "x0"),
        "Affine.matrix has the entries one entry, which do not match those of x0 (['w']): give one entry for each leaf",
    ),
    (
        lambda: Affine({"w": MATRIX}).check({"w": torch.zeros(3, 4)}, "x0"),
        "Affine.matrix['w'] is torch.float64 of shape (3, 12) on cpu, but x0['w'] is torch.float64 of shape (3, 4) on",
    ),
    (
        lambda: Affine(MATRIX).check(torch.zeros(12, dtype=torch.float32), "x0"),
        "Affine.matrix is torch.float64 of shape (3, 12) on cpu, but x0 is torch.float32 of shape (12,) on cpu",
    ),
    (
        lambda: SecondOrderCone().check(vector(1.0, 2.0), "x0"),
        "SecondOrderCone needs a pair (z, t), but x0 is",
    ),
    (lambda: SecondOrderCone().check((vector(1.0),), "x0"), "SecondOrderCone needs a pair (z, t), but x0 is"),
    (
        lambda: SecondOrderCone().check((vector(1.0), vector(1.0, 2.0)), "x0"),
        "SecondOrderCone needs one entry in t, but x0[1] is",
    ),
    (lambda: SecondOrderCone().check((vector(1.0), {"t": vector(1.0)}), "x0"), "needs one entry in t, but x0[1] is"),
    (
        lambda: Product({"w": Simplex(), "b": WholeSpace()}).check({"w": torch.ones(2), "c": torch.ones(2)}, "x0"),
        "Product.sets has the entries ['w'], ['b'], which do not match those of x0 (['w'], ['c']): "
        "give one set for each part of x0, under the same keys",
    ),
    (lambda: Product([Simplex()]).check([torch.ones(2), torch.ones(2)], "x0"), "do not match those of x0 ([0], [1])"),
    (lambda: Product([Simplex()]).check((torch.ones(2),), "x0"), "Product.sets has the entries [0], which do not"),
    (lambda: Product([Simplex()]).project(torch.ones(2)), "do not match those of point (one entry)"),
    (lambda: Product({"w": [Simplex()]}).check({"w": [torch.tensor(1.0)]}, "x0"), "but x0['w'][0] has shape ()"),
    (lambda: Product({"w": [Simplex()]}).contains({"w": [torch.tensor(1.0)]}), "but point['w'][0] has shape ()"),
]

TYPE_ERRORS = [
    (lambda: Box("0", 1), "Box.lower = '0': give a number, a floating-point tensor or None"),
    (lambda: Box(0, True), "Box.upper = True: give a number"),
    (lambda: Box({"a": np.zeros(2)}), "Box.lower['a'] is a numpy array: give a number"),
    (lambda: Box(torch.zeros(2, dtype=torch.int64)), "Box.lower has dtype torch.int64: convert it to the dtype"),
    (lambda: Ball("1"), "Ball.radius = '1': give a positive number"),
    (lambda: Ball(True), "Ball.radius = True: give a positive number"),
    (lambda: Ball(1.0, {"a": "x"}), "Ball.center['a'] = 'x': give a number, a floating-point tensor or None"),
    (lambda: Ball(torch.tensor([1.0])), "Ball.radius has dtype torch.float64 and shape (1,): give a number, or a"),
    (lambda: Ball(torch.tensor(1)), "Ball.radius has dtype torch.int64 and shape ()"),
    (lambda: HalfSpace("1"), "HalfSpace.normal = '1': give a number, a floating-point tensor or None"),
    (lambda: HalfSpace(1.0, "1"), "HalfSpace.offset = '1': give a number, or a floating-point tensor of shape ()"),
    (lambda: HalfSpace(1.0, True), "HalfSpace.offset = True: give a number"),
    (lambda: Affine([[1.0, 2.0]]), "Affine.matrix[0][0] = 1.0: give a floating-point tensor of shape (m, *leaf shape)"),
    (lambda: Affine(torch.ones(1, 2, dtype=torch.int64)), "Affine.matrix = tensor([[1, 1]]): give a floating-point"),
    (lambda: Affine(torch.ones(1, 2), "1"), "Affine.offset = '1': give a tensor of shape (1,), or a number"),
    (lambda: Affine(torch.ones(1, 2), torch.ones(1, dtype=torch.int64)), "Affine.offset has dtype torch.int64"),
    (lambda: Simplex(total=torch.tensor(1.0)), "Simplex.total = tensor(1.): give a positive number"),
    (lambda: Simplex(dim=1.0), "Simplex.dim = 1.0: give an int"),
    (lambda: Simplex(dim=True), "Simplex.dim = True: give an int"),
    (
        lambda: Product({"w": Simplex, "b": WholeSpace()}),
        "Product.sets['w'] = <class 'constrained.sets.simplex",
    ),
    (lambda: Product([None]), "Product.sets[0] = None: give a set, such as WholeSpace() for a free part"),
    (lambda: Product({"a": WholeSpace()}).check({"a": torch.arange(2)}, "x0"), "x0['a'] has dtype torch.int64"),
    (lambda: WholeSpace().project({"a": 1.0}), "point['a'] = 1.0: give a floating-point tensor"),
]


def _identifier(value: object) -> str | None:
    return value[:50] if isinstance(value, str) else ""


@pytest.mark.parametrize(("action", "message"), VALUE_ERRORS, ids=_identifier)
def test_value_errors(action, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        action()


@pytest.mark.parametrize(("action", "message"), TYPE_ERRORS, ids=_identifier)
def test_type_errors(action, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        action()


@pytest.mark.parametrize("convex", [WholeSpace(), Box(0, 1), Nonnegative(), Ball(1.0), Simplex()], ids=repr)
@pytest.mark.parametrize("leaf", [torch.ones(3, dtype=d) for d in (torch.int64, torch.bool, torch.complex64)])
def test_leaves_that_are_not_real_floats_are_refused(convex, leaf):
    for action in (convex.project, convex.contains, lambda point: convex.check(point, "point")):
        message = f"point['w'] has dtype {leaf.dtype}: convert it to a real floating dtype"
        with pytest.raises(TypeError, match=re.escape(message)):
            action({"b": torch.zeros(2), "w": leaf})
    with pytest.raises(TypeError, match=re.escape("y0[1] has dtype")):
        convex.check([torch.ones(2), leaf], "y0")
