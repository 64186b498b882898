"""Joint projections: against cvxpy, closed forms, quadratic programs, and the inequality that characterises them."""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import bilevel.curved_projection
from bilevel import BilevelProblem
from bilevel.curved_projection import CurvedProjection, _Cuts
from bilevel.flat import FlatProblem
from bilevel.joint_projection import JointPoint, JointProjection
from constrained import Ball, Box, HalfSpace, Nonnegative, Polyhedron, Product, Simplex, WholeSpace, solve_qp
from constrained.qp.row_interior import interior_sets
from constrained.qp.row_projection import RowProjection
from constrained.qp.row_structure import RowStructure
from constrained.qp.row_system import RowSystem
from implicit import Status, tree

N, M = 3, 4


def upper(x: Tensor, y: Tensor) -> Tensor:
    return (x.sum() - y.sum()) ** 2


def lower(x: Tensor, y: Tensor) -> Tensor:
    return y.square().sum() + x.sum() * y.sum()


def declared(x: Tensor | None = None, y: Tensor | None = None, **constraints: Any) -> JointProjection:
    x, y = torch.zeros(N) if x is None else x, torch.zeros(M) if y is None else y
    scale = constraints.pop("scale", None)
    return JointProjection(FlatProblem(BilevelProblem(upper, lower, **constraints), x, y), x, y, scale=scale)


def by_cvxpy(x: Tensor, y: Tensor, constraints: Callable[[Any, Any], list[Any]], scale: Any = (1.0, 1.0)) -> np.ndarray:
    u, v = cp.Variable(len(x)), cp.Variable(len(y))
    inverse = [1 / np.asarray(s) * np.ones(k) for s, k in zip(scale, (len(x), len(y)), strict=True)]
    away = cp.sum_squares(cp.multiply(inverse[0], u - x.numpy())) + cp.sum_squares(
        cp.multiply(inverse[1], v - y.numpy())
    )
    accuracy = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cones are not solved to that accuracy
        cp.Problem(cp.Minimize(away), constraints(u, v)).solve(solver=cp.CLARABEL, **accuracy)
    assert u.value is not None
    assert v.value is not None
    return np.concatenate([u.value, v.value])


def joined(found: JointPoint) -> Tensor:
    return torch.cat([found.x, found.y])


def random_rows(generator: torch.Generator, p: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return normal(p, N), normal(p, M), torch.rand(p, generator=generator) + 0.05


def affine_case(name: str, generator: torch.Generator) -> tuple[JointProjection, Callable[[Any, Any], list[Any]]]:
    """A declaration and the same in cvxpy."""
    B, A, b = random_rows(generator)
    C, D, _ = random_rows(generator, 1)
    nB, nA, nb, nC, nD = (t.numpy() for t in (B, A, b, C, D))

    def rows(x: Tensor, y: Tensor) -> Tensor:
        return B @ x + A @ y - b

    if name == "inequalities":
        return declared(lower_inequality=rows), lambda u, v: [nB @ u + nA @ v <= nb]
    if name == "both levels, a tree of rows":
        return declared(
            lower_inequality=lambda x, y: {"b": rows(x, y)[:2], "a": [rows(x, y)[2]]},
            upper_inequality=lambda x, y: rows(x, y)[3:],
        ), lambda u, v: [nB @ u + nA @ v <= nb]
    if name == "equations and boxes":
        return declared(
            lower_inequality=rows, lower_equality=lambda x, y: C @ x + D @ y, upper_set=Box(-0.5, 0.4)
        ), lambda u, v: [nB @ u + nA @ v <= nb, nC @ u + nD @ v == 0, u >= -0.5, u <= 0.4]
    if name == "duplicate rows":
        return declared(lower_inequality=lambda x, y: torch.cat([rows(x, y), rows(x, y), 2 * rows(x, y) - 0.1])), (
            lambda u, v: [nB @ u + nA @ v <= nb]
        )
    if name == "dependent equations":
        return declared(lower_equality=lambda x, y: torch.cat([C @ x + D @ y, 3 * (C @ x + D @ y)])), (
            lambda u, v: [nC @ u + nD @ v == 0]
        )
    if name == "a vertex":  # more active rows than variables
        signs = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
        return declared(lower_inequality=lambda x, y: signs @ y - x.sum() - 0.0), (
            lambda u, v: [signs.numpy() @ v <= cp.sum(u)]
        )
    if name == "rows of x alone":
        return declared(lower_inequality=lambda x, y: torch.cat([B[:2] @ x - 0.1, rows(x, y)])), (
            lambda u, v: [nB[:2] @ u <= 0.1, nB @ u + nA @ v <= nb]
        )
    if name == "own slacks":
        return declared(
            lower_inequality=lambda x, y: 1 - y[1:] - B[:3] @ x * y.new_ones(3) - y[0], lower_set=Nonnegative()
        ), lambda u, v: [1 - v[1:] - nB[:3] @ u - v[0] <= 0, v >= 0]
    assert name == "sets with rows"
    simplex, plane = Simplex(), HalfSpace(torch.ones(N), 0.3)
    return declared(upper_set=plane, lower_set=simplex, lower_inequality=lambda x, y: y - x.sum() - 0.4), (
        lambda u, v: [cp.sum(u) <= 0.3, cp.sum(v) == 1, v >= 0, v <= cp.sum(u) + 0.4]
    )


AFFINE = (
    "inequalities",
    "both levels, a tree of rows",
    "equations and boxes",
    "duplicate rows",
    "dependent equations",
    "a vertex",
    "rows of x alone",
    "own slacks",
    "sets with rows",
)


@pytest.mark.parametrize("name", AFFINE)
def test_affine_rows(generator: torch.Generator, name: str) -> None:
    projection, constraints = affine_case(name, generator)
    assert projection.method == "affine rows"
    found = []
    for reach in (0.5, 3.0, 3.0, 30.0):
        x, y = reach * torch.randn(N, generator=generator), reach * torch.randn(M, generator=generator)
        here = projection.project(x, y, projection.start())
        assert here.status is Status.CONVERGED
        np.testing.assert_allclose(joined(here), by_cvxpy(x, y, constraints), atol=2e-7 * max(1, reach))
        assert projection.flat.violation(here.x, here.y) <= 1e-11 * max(1, reach)
        found.append((torch.cat([x, y]), joined(here)))
        # from any other multipliers the same
        again = projection.project(x, y, torch.rand(projection.rows, generator=generator))
        torch.testing.assert_close(joined(again), joined(here), rtol=0, atol=1e-10)
    # <p - z, w - z> <= 0 for every w of the set, to rounding
    for point, z in found:
        for _, w in found:
            assert float((point - z) @ (w - z)) <= 1e-9


def test_rows_of_x_alone_are_projected_with_the_others(generator: torch.Generator) -> None:
    projection, _ = affine_case("rows of x alone", generator)
    assert projection.flat.upper_level.inequalities == 2
    found = projection.project(10 * torch.randn(N, generator=generator), torch.zeros(M), projection.start())
    B, _, _ = random_rows(torch.Generator().manual_seed(0))
    assert float((B[:2] @ found.x).max()) <= 0.1 + 1e-12


@pytest.mark.parametrize("scale", [(0.1, 3.0), (torch.tensor([0.2, 1.0, 5.0]), torch.tensor([1.0, 2.0, 0.5, 1.0]))])
def test_scale(generator: torch.Generator, scale: Any) -> None:
    B, A, b = random_rows(generator)
    for curved in (False, True):
        projection = declared(
            lower_inequality=lambda x, y, curved=curved: torch.cat(
                [B @ x + A @ y - b, (y.square().sum() - 1)[None] if curved else y[:1] - 1]
            ),
            upper_set=Box(-0.5, 0.5),
            scale=scale,
        )
        x, y = 2 * torch.randn(N, generator=generator), 2 * torch.randn(M, generator=generator)
        found = projection.project(x, y, projection.start())
        assert found.status is Status.CONVERGED

        def constraints(u: Any, v: Any, curved: bool = curved) -> list[Any]:
            last = cp.sum_squares(v) <= 1 if curved else v[0] <= 1
            return [B.numpy() @ u + A.numpy() @ v <= b.numpy(), u >= -0.5, u <= 0.5, last]

        np.testing.assert_allclose(joined(found), by_cvxpy(x, y, constraints, scale), atol=5e-5 if curved else 1e-6)


def test_bounds_alone_are_clipped(generator: torch.Generator) -> None:
    projection = declared(lower_set=Box(-1.0, 0.5), scale=(2.0, 0.3))
    x, y = 3 * torch.randn(N, generator=generator), 3 * torch.randn(M, generator=generator)
    found = projection.project(x, y, projection.start())
    assert (projection.method, projection.rows, found.multipliers.shape) == ("bounds", 0, (0,))
    torch.testing.assert_close(found.x, x)
    torch.testing.assert_close(found.y, y.clamp(-1.0, 0.5))


def test_sets_without_functions_are_projected_onto_one_by_one(generator: torch.Generator) -> None:
    projection = declared(upper_set=Ball(0.5), lower_set=Simplex())
    x, y = 3 * torch.randn(N, generator=generator), 3 * torch.randn(M, generator=generator)
    found = projection.project(x, y, projection.start())
    assert projection.method == "sets"
    torch.testing.assert_close(found.x, 0.5 * x / x.norm())
    torch.testing.assert_close(found.y, Simplex().project(y))
    general = declared(upper_set=Ball(0.5), lower_set=Simplex(), scale=(1.0, 1.0))
    assert general.method == "curved rows"
    torch.testing.assert_close(joined(general.project(x, y, general.start())), joined(found), rtol=0, atol=1e-11)


def test_a_half_space_and_an_affine_subspace_have_their_closed_forms(generator: torch.Generator) -> None:
    B, A, _ = random_rows(generator, 2)
    J = torch.cat([B, A], 1)
    x, y = torch.randn(N, generator=generator), torch.randn(M, generator=generator)
    p = torch.cat([x, y])
    plane = declared(lower_inequality=lambda x, y: B[:1] @ x + A[:1] @ y - 0.1)
    a = J[0]
    found = plane.project(x, y, plane.start())
    step = ((a @ p - 0.1) / (a @ a)).clamp(min=0)
    torch.testing.assert_close(joined(found), p - step * a, rtol=0, atol=1e-13)
    torch.testing.assert_close(found.multipliers, step[None], rtol=0, atol=1e-13)
    subspace = declared(lower_equality=lambda x, y: B @ x + A @ y - 0.1)
    found = subspace.project(x, y, subspace.start())
    expected = torch.linalg.solve(J @ J.mT, J @ p - 0.1)
    torch.testing.assert_close(joined(found), p - J.mT @ expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.multipliers, expected, rtol=0, atol=1e-12)


def test_a_declared_joint_set(generator: torch.Generator) -> None:
    rows: dict[str, Any] = {"lower_inequality": lambda x, y: x.sum() + y.sum() - 1}
    normal = (torch.ones(N), torch.ones(M))
    projection = declared(**rows, joint_set=HalfSpace(normal, 1.0))
    assert (projection.method, projection.rows) == ("joint set", 0)
    x, y = 3 + torch.randn(N, generator=generator), torch.randn(M, generator=generator)
    general = declared(**rows)
    there = general.project(x, y, general.start())
    torch.testing.assert_close(joined(projection.project(x, y, projection.start())), joined(there), rtol=0, atol=1e-12)
    for wrong in (HalfSpace(normal, 0.5), Product((Ball(3.0), WholeSpace()))):
        with pytest.raises(ValueError, match=r"joint_set = \w+ is not the set of the pairs"):
            declared(**rows, joint_set=wrong)
    with pytest.raises(ValueError, match=r"joint_set = Product is not the set of the pairs"):
        declared(upper_set=Box(-1.0, 1.0), joint_set=Product((Ball(1.0), WholeSpace())))
    assert declared(upper_set=Box(0.0, 1.0), joint_set=Product((Box(0.0, 1.0), WholeSpace()))).method == "bounds"
    assert declared(**rows, joint_set=HalfSpace(normal, 1.0), scale=(1.0, 2.0)).method == "affine rows"


def curved_case(name: str) -> tuple[JointProjection, Callable[[Any, Any], list[Any]]]:
    if name == "balls and a cone":
        return declared(
            lower_inequality=lambda x, y: torch.stack(
                [torch.linalg.vector_norm(y[:2]) - x[0] - 0.1, y.square().sum() - 2.0]
            ),
            upper_inequality=lambda x, y: x.square().sum() + (y[1] - 1) ** 2 - 3.0,
        ), lambda u, v: [
            cp.norm(v[:2]) <= u[0] + 0.1,
            cp.sum_squares(v) <= 2,
            cp.sum_squares(u) + cp.square(v[1] - 1) <= 3,
        ]
    if name == "a diagonal Hessian":
        return declared(
            lower_inequality=lambda x, y: torch.stack([y.square().sum() - x[0], y[0] - 0.1]), upper_set=Box(-1.0, 1.0)
        ), lambda u, v: [cp.sum_squares(v) <= u[0], v[0] <= 0.1, u <= 1, u >= -1]
    if name == "an equation and an exponential":
        return declared(
            lower_inequality=lambda x, y: torch.exp(y).sum() + (y[0] + y[1]) ** 2 - 5 - x[0],
            lower_equality=lambda x, y: y.sum() - x.sum(),
        ), lambda u, v: [cp.sum(cp.exp(v)) + cp.square(v[0] + v[1]) <= 5 + u[0], cp.sum(v) == cp.sum(u)]
    assert name == "sets with a function"
    return declared(
        upper_set=Ball(1.0), lower_set=Ball(0.7, center=0.2), lower_inequality=lambda x, y: y.sum() - x.sum()
    ), lambda u, v: [cp.norm(u) <= 1, cp.norm(v - 0.2) <= 0.7, cp.sum(v) <= cp.sum(u)]


CURVED = ("balls and a cone", "a diagonal Hessian", "an equation and an exponential", "sets with a function")


@pytest.mark.parametrize("name", CURVED)
def test_curved_rows(generator: torch.Generator, name: str) -> None:
    projection, constraints = curved_case(name)
    assert projection.method == "curved rows"
    assert projection._curved is not None
    assert projection._curved.diagonal == (name in ("a diagonal Hessian", "sets with a function"))
    found = []
    for reach in (0.5, 2.0, 3.0):
        x, y = reach * torch.randn(N, generator=generator), reach * torch.randn(M, generator=generator)
        here = projection.project(x, y, projection.start())
        assert here.status is Status.CONVERGED
        assert here.error <= 1e-12
        np.testing.assert_allclose(joined(here), by_cvxpy(x, y, constraints), atol=5e-5)  # cvxpy's accuracy
        assert projection.flat.violation(here.x, here.y) <= 1e-11
        again = projection.project(x, y, here.multipliers)
        torch.testing.assert_close(joined(again), joined(here), rtol=0, atol=1e-10)
        found.append((torch.cat([x, y]), joined(here)))
    for point, z in found:
        for _, w in found:
            assert float((point - z) @ (w - z)) <= 1e-10


@pytest.mark.parametrize("name", [*AFFINE[:3], *CURVED])
def test_multipliers_prove_the_projection(generator: torch.Generator, name: str) -> None:
    projection, _ = affine_case(name, generator) if name in AFFINE else curved_case(name)
    flat = projection.flat
    x, y = 2 * torch.randn(N, generator=generator), 2 * torch.randn(M, generator=generator)
    found = projection.project(x, y, projection.start())
    z = joined(found).requires_grad_()
    levels = (flat.upper_level, flat.lower_level)
    values = torch.cat(
        [
            *(level.equality(z[:N], z[N:]) for level in levels),
            *(level.inequality(z[:N], z[N:]) for level in levels),
        ]
    )
    (pull,) = torch.autograd.grad(values @ found.multipliers, z)
    target = torch.cat([x, y]) - pull
    box = [torch.cat([getattr(level, side) for level in levels]) for side in ("lower", "upper")]
    torch.testing.assert_close(torch.clamp(target, *box), z.detach(), rtol=0, atol=1e-10)
    signed = found.multipliers[projection.equalities :]
    assert bool((signed >= 0).all())
    assert float((signed * values[projection.equalities :].detach()).abs().max()) <= 1e-10
    assert float(found.multipliers.abs().max()) > 0.01


@pytest.mark.parametrize("name", ["equations and boxes", "own slacks", "a diagonal Hessian", "balls and a cone"])
def test_warm_is_cold_and_a_resumed_run_is_the_same(generator: torch.Generator, name: str) -> None:
    def projection() -> JointProjection:
        fresh = torch.Generator().manual_seed(3)
        return affine_case(name, fresh)[0] if name in AFFINE else curved_case(name)[0]

    steps = 0.3 * torch.randn(8, N + M, generator=generator)

    def walk(chosen: JointProjection, z: Tensor, duals: Tensor, moves: Tensor) -> list[tuple[Tensor, Tensor]]:
        trail = []
        for move in moves:
            p = z + move
            found = chosen.project(p[:N], p[N:], duals)
            cold = chosen.project(p[:N], p[N:], chosen.start())
            assert found.status is cold.status is Status.CONVERGED
            torch.testing.assert_close(joined(found), joined(cold), rtol=0, atol=1e-10)
            z, duals = joined(found), found.multipliers
            trail.append((z, duals))
        return trail

    first = projection()
    trail = walk(first, torch.randn(N + M, generator=generator), first.start(), steps)
    z, duals = trail[3]
    resumed = walk(projection(), z.clone(), duals.clone(), steps[4:])
    for (z, duals), (z_again, duals_again) in zip(trail[4:], resumed, strict=True):
        assert torch.equal(z, z_again)
        assert torch.equal(duals, duals_again)


def test_a_warm_start_needs_one_system(generator: torch.Generator) -> None:
    structure, d, free = machine(generator)
    rows = RowProjection(structure, d, 0, -free, free)
    point = torch.randn(structure.n, generator=generator)
    cold = rows.project(point, torch.zeros_like(d))
    warm = rows.project(point + 1e-6, cold.multiplier)
    assert warm.steps == 1 < cold.steps <= 12
    assert rows.project(point, cold.multiplier).steps == 0
    # multipliers of inequalities are never negative, and equations are active whatever the signs
    inside = point.clone()
    inside[-len(d) :] += 100.0
    assert bool((rows.project(inside, torch.full_like(d, -1e-17)).multiplier >= 0).all())
    equations = RowProjection(structure, d, len(d), -free, free).project(point, torch.zeros_like(d))
    assert equations.steps == 1
    assert int((equations.multiplier < 0).sum()) >= 5


class HostReads(TorchFunctionMode):
    """What is called inside that waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "equal", "nonzero"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_closed_forms_wait_for_no_device(generator: torch.Generator) -> None:
    plane = HalfSpace((torch.ones(N), torch.ones(M)), 1.0)
    declarations: list[dict[str, Any]] = [
        {"lower_set": Box(-1.0, 1.0)},
        {"upper_set": Ball(0.5), "lower_set": Simplex()},
        {"lower_inequality": lambda x, y: x.sum() + y.sum() - 1, "joint_set": plane},
    ]
    for declaration in declarations:
        projection = declared(**declaration)
        x, y = 3 * torch.randn(N, generator=generator), torch.randn(M, generator=generator)
        with HostReads() as reads:
            found = projection.project(x, y, projection.start())
        assert reads.seen == []
        with reads:
            assert (found.status, found.error) == (Status.CONVERGED, 0.0)
        assert reads.seen == ["__bool__"]


def test_a_warm_start_reads_three_times(generator: torch.Generator) -> None:
    projection, _ = affine_case("equations and boxes", generator)
    x, y = 2 * torch.randn(N, generator=generator), 2 * torch.randn(M, generator=generator)
    first = projection.project(x, y, projection.start())
    for change, times in ((0.0, 1), (1e-6, 3)):
        with HostReads() as reads:
            assert projection.project(x + change, y, first.multipliers).status is Status.CONVERGED
        assert len(reads.seen) == times


def machine(generator: torch.Generator, examples: int = 60) -> tuple[RowStructure, Tensor, Tensor]:
    """``1 - slack_i - l_i (<w, a_i> + b) <= 0`` over (c, w, b, slack), c free of rows."""
    A = torch.randn(examples, 4, generator=generator)
    labels = A[:, :1].sign()
    J = torch.cat([torch.zeros(examples, 5), -labels * A, -labels, -torch.eye(examples)], 1)
    index = J.nonzero().mT
    structure = RowStructure.of(index, J[index[0], index[1]], (examples, J.shape[1]))
    assert torch.equal(structure.dense(), J)
    assert (structure.width, len(structure.own), structure.offsets) == (5, examples, None)
    return structure, -torch.ones(examples), torch.full((J.shape[1],), torch.inf)


def test_empty_sets() -> None:
    apart = declared(lower_inequality=lambda x, y: torch.stack([x[0] - y[0] + 1, y[0] - x[0] + 1]))
    found = apart.project(torch.tensor([0.3, 1.0, 2.0]), torch.ones(M), apart.start())
    assert found.status is Status.INFEASIBLE
    assert float((found.x[0] - found.y[0]).abs()) <= 1e-9  # both violated by one, the least squared violation
    assert apart.flat.violation(found.x, found.y) == pytest.approx(1 / 2**0.5)
    box = declared(lower_inequality=lambda x, y: y.sum() + x.sum() + 8, upper_set=Box(-1.0, 1.0), lower_set=Box(-1, 1))
    assert box.project(torch.zeros(N), torch.zeros(M), box.start()).status is Status.INFEASIBLE
    equations = declared(lower_equality=lambda x, y: torch.stack([y.sum() + x[0], y.sum() + x[0] - 1]))
    assert equations.project(torch.zeros(N), torch.zeros(M), equations.start()).status is Status.INFEASIBLE
    discs = declared(
        lower_inequality=lambda x, y: torch.stack(
            [(y**2).sum() - 1 + 0 * x[0], (y[0] - 3) ** 2 + (y[1:] ** 2).sum() - 1]
        )
    )
    found = discs.project(torch.zeros(N), torch.ones(M), discs.start())
    assert found.status is Status.INFEASIBLE
    torch.testing.assert_close(found.y, torch.tensor([1.5, 0.0, 0.0, 0.0]), rtol=0, atol=1e-3)
    nothing = Polyhedron(G=torch.stack([torch.ones(M), -torch.ones(M)]), h=torch.tensor([0.0, -1.0]))
    sets = declared(upper_set=Ball(1.0), lower_set=nothing)
    assert sets.project(torch.zeros(N), torch.zeros(M), sets.start()).status is Status.INFEASIBLE


def test_rows_that_are_not_convex_are_never_claimed_without_proof(generator: torch.Generator) -> None:
    ring = declared(lower_inequality=lambda x, y: 1 - y.square().sum() + 0 * x[0])
    seen = set()
    for reach in (0.1, 0.9):
        y = reach * torch.randn(M, generator=generator)
        found = ring.project(torch.zeros(N), y, ring.start())
        seen.add(found.status)
        if found.status is Status.CONVERGED:
            assert float(found.y.square().sum()) >= 1 - 1e-9
            gradient = -2 * found.y * found.multipliers
            torch.testing.assert_close(found.y - y + gradient, torch.zeros(M), rtol=0, atol=1e-8)
    assert Status.CONVERGED in seen


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="lower_equality is not affine"):
        declared(lower_equality=lambda x, y: y.square().sum() - x[0])
    with pytest.raises(ValueError, match="upper_equality is not affine"):
        declared(upper_equality=lambda x, y: y.square().sum() - x[0])
    for scale in ((0.0, 1.0), (1.0, -torch.ones(M)), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="scale has entries that are not positive"):
            declared(lower_inequality=lambda x, y: y - x.sum(), scale=scale)


@pytest.mark.parametrize(
    "declaration",
    [
        {"lower_set": Box(0.0, 1.0)},
        {"lower_inequality": lambda x, y: y - x.sum()},
        {"lower_inequality": lambda x, y: y.square().sum() - x.sum() - 1},
        {"upper_set": Ball(1.0)},
    ],
)
def test_points_that_are_not_finite(declaration: dict[str, Any]) -> None:
    projection = declared(**declaration)
    for bad in (float("nan"), float("inf")):
        x = torch.tensor([0.0, bad, 1.0])
        found = projection.project(x, torch.zeros(M), projection.start())
        assert found.status is Status.NONFINITE
        torch.testing.assert_close(found.x, x, equal_nan=True)


def test_float32(generator: torch.Generator) -> None:
    B, A, b = random_rows(generator)
    x, y = 2 * torch.randn(N, generator=generator), 2 * torch.randn(M, generator=generator)
    exact = declared(lower_inequality=lambda x, y: B @ x + A @ y - b)
    B32, A32, b32 = B.float(), A.float(), b.float()
    for curve in (0.0, 0.1):
        single = declared(
            torch.zeros(N, dtype=torch.float32),
            torch.zeros(M, dtype=torch.float32),
            lower_inequality=lambda x, y, c=curve: B32 @ x + A32 @ y - b32 + c * y.square().sum(),
        )
        found = single.project(x.float(), y.float(), single.start())
        assert (found.status, found.x.dtype) == (Status.CONVERGED, torch.float32)
        if not curve:
            torch.testing.assert_close(
                joined(found).double(), joined(exact.project(x, y, exact.start())), rtol=0, atol=1e-4
            )
        assert single.flat.violation(found.x, found.y) <= 1e-4


def random_set(generator: torch.Generator) -> tuple[Tensor, Tensor, int, Tensor, Tensor, Tensor]:
    """J, d, equations, bounds and a point: dense, sparse, of integers or with own columns; often degenerate."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < share

    n, q, p = (int(torch.randint(*ends, (1,), generator=generator)) for ends in ((2, 12), (0, 3), (1, 16)))
    q, J = min(q, n - 1), normal(min(q, n - 1) + p, n)
    kind = int(torch.randint(4, (1,), generator=generator))
    if kind == 1:
        J = J * chance(0.3, *J.shape)
    elif kind == 2:
        J = torch.randint(-1, 2, J.shape, generator=generator).to(J)
    elif kind == 3:
        J = torch.cat([J[:, :2], torch.diag(J[:, 0].sign())], 1)
    inside = normal(J.shape[1])
    lower, upper = torch.full_like(inside, -torch.inf), torch.full_like(inside, torch.inf)
    if bool(chance(0.5, 1)):
        lower = torch.where(chance(0.6, len(inside)), inside - torch.rand(len(inside), generator=generator), lower)
        upper = torch.where(chance(0.4, len(inside)), inside + torch.rand(len(inside), generator=generator), upper)
        lower[0] = upper[0] = inside[0]
    room = torch.rand(len(J), generator=generator) * chance(0.6, len(J))
    room[:q] = 0
    d = J @ inside + room
    if bool(chance(0.3, 1)):
        J, d = torch.cat([J, J[-1:]]), torch.cat([d, d[-1:]])
    if bool(chance(0.1, 1)):  # empty
        J, d = torch.cat([J, -J[-1:]]), torch.cat([d, -d[-1:] - 0.5])
    return J, d, q, lower, upper, inside + 3 * normal(len(inside))


def test_random_sets_against_quadratic_programs(generator: torch.Generator) -> None:
    generator.manual_seed(11)  # with sets whose active rows are dependent in several ways
    empty = inner = 0
    for _ in range(80):
        J, d, q, low, high, point = random_set(generator)
        index = J.nonzero().mT
        rows = RowProjection(RowStructure.of(index, J[index[0], index[1]], tuple(J.shape)), d, q, low, high)
        found = rows.project(point, torch.zeros_like(d))
        exact = solve_qp(
            torch.eye(len(point)),
            -point,
            A=J[:q],
            b=d[:q],
            G=J[q:],
            h=d[q:],
            lower=low,
            upper=high,
            raise_on_failure=False,
        )
        if exact.status is Status.INFEASIBLE:
            empty += 1
            assert found.error > 1e-6
            continue
        inner += found.steps > 12
        assert found.error <= 1e-11
        assert bool((found.multiplier[q:] >= 0).all())
        torch.testing.assert_close(found.z, exact.x, rtol=0, atol=1e-8)
        near = rows.project(point + 1e-3 * torch.randn(len(point), generator=generator), found.multiplier)
        back = rows.project(point, near.multiplier)
        torch.testing.assert_close(back.z, found.z, rtol=0, atol=1e-10)
    assert 5 <= empty <= 25
    assert inner >= 10  # interior points are used


def test_interior_points_find_the_active_sets(generator: torch.Generator) -> None:
    for slack_bound in (-torch.inf, 0.0):
        structure, d, free = machine(generator)
        lower, upper = -free, free.clone()
        lower[-len(d) :] = slack_bound
        lower[6] = upper[6] = 0.2  # one weight is fixed
        rows = RowProjection(structure, d, 0, lower, upper)
        point = torch.randn(structure.n, generator=generator)
        multiplier, sets, steps = interior_sets(rows.program, point[structure.order])
        found = rows.project(point, torch.zeros_like(d))
        assert found.error <= 1e-13
        assert 5 <= steps <= 30
        assert int(sets.low.sum()) >= 1
        assert torch.equal(sets.working, found.multiplier > 0)
        assert torch.equal(sets.low, found.z[structure.order] == lower[structure.order])
        torch.testing.assert_close(multiplier, found.multiplier, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["own", "several own", "shared", "narrow", "own and wide"])
def test_structure_and_systems_against_dense_algebra(generator: torch.Generator, kind: str) -> None:
    r = 7
    wide = kind in ("shared", "own and wide")
    U = torch.randn(r, 9 if wide else 3, generator=generator)
    own = torch.diag(torch.randn(r, generator=generator))
    if kind == "several own":
        own = torch.cat([own, 2 * own[:, :2], own[:, 1:2]], 1)[:, 1:]  # two of their own, three, none
    J = U if kind in ("shared", "narrow") else torch.cat([torch.zeros(r, 2), own, U], 1)
    index = J.nonzero().mT
    shuffled = torch.randperm(index.shape[1], generator=generator)
    index = index[:, shuffled]
    rows = RowStructure.of(index, J[index[0], index[1]], tuple(J.shape))
    assert torch.equal(rows.dense(), J)
    assert rows.width == (9 if wide else 3)
    z, multiplier = torch.randn(J.shape[1], generator=generator), torch.randn(r, generator=generator)
    torch.testing.assert_close(rows.multiply(z[rows.order]), J @ z)
    torch.testing.assert_close(rows.spread(rows.pull(multiplier)), J.mT @ multiplier)
    torch.testing.assert_close(rows.lengths(), J.norm(dim=1))
    columns, scale = torch.rand(J.shape[1], generator=generator), torch.rand(r, generator=generator)
    torch.testing.assert_close(rows.scaled(scale, columns).dense(), scale[:, None] * J * columns)
    working = torch.rand(r, generator=generator) < 0.8
    diagonal = torch.rand(r, generator=generator)
    diagonal[1] = 0.0
    right = torch.randn(r, generator=generator)
    C = (columns > 0.3) * columns
    for given in (diagonal, None):
        dense = J @ torch.diag(C) @ J.mT + (0 if given is None else torch.diag(given))
        system = RowSystem(rows, C[rows.order], given, working, None)
        chosen = working.nonzero()[:, 0]
        block = dense[chosen][:, chosen]
        if int(torch.linalg.matrix_rank(block)) < len(chosen):
            continue
        expected = torch.zeros(r)
        expected[chosen] = torch.linalg.solve(block, right[chosen])
        torch.testing.assert_close(system.solve(right), expected, rtol=1e-7, atol=1e-8)


def test_what_newton_cannot_solve_goes_to_the_quadratic_program(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    projection, _ = affine_case("equations and boxes", generator)
    x, y = 2 * torch.randn(N, generator=generator), 2 * torch.randn(M, generator=generator)
    exact = projection.project(x, y, projection.start())
    own = RowProjection.project

    def failing(self: RowProjection, point: Tensor, multiplier: Tensor) -> Any:
        found = own(self, point, multiplier)
        return type(found)(found.z + 0.1, 0 * found.multiplier, 1.0, 12)

    monkeypatch.setattr(RowProjection, "project", failing)
    found = projection.project(x, y, projection.start())
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(joined(found), joined(exact), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.multipliers, exact.multipliers, rtol=0, atol=1e-9)
    monkeypatch.setattr("bilevel.joint_projection.DENSE_LIMIT", 1)
    found = projection.project(x, y, projection.start())
    assert (found.status, found.error) == (Status.STALLED, 1.0)


@pytest.mark.parametrize("stage", ["cuts", "interior points"])
def test_what_newton_steps_cannot_solve_goes_to_cuts_and_interior_points(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    projection, _ = curved_case("an equation and an exponential")
    x, y = 2 * torch.randn(N, generator=generator), 2 * torch.randn(M, generator=generator)
    exact = projection.project(x, y, projection.start())
    own, calls = bilevel.curved_projection.CurvedProjection._correct, []

    def first_fails(self: Any, point: Tensor, z: Tensor, multiplier: Tensor) -> Any:
        calls.append(z)
        return self._at(point, z, multiplier) if len(calls) == 1 else own(self, point, z, multiplier)

    monkeypatch.setattr(bilevel.curved_projection.CurvedProjection, "_correct", first_fails)
    if stage == "interior points":
        monkeypatch.setattr(bilevel.curved_projection, "CUTS", 0)
    found = projection.project(x, y, projection.start())
    assert len(calls) == 2
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(joined(found), joined(exact), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.multipliers, exact.multipliers, rtol=0, atol=1e-9)


def test_errors_of_curved_rows_and_proofs_by_cuts() -> None:
    free = torch.full((2,), torch.inf)
    line = CurvedProjection(lambda z: z[:1] - 1, torch.zeros(2), 0, -free, free)
    p = torch.tensor([0.5, 0.0])
    assert line._at(p, p, torch.zeros(1)).error == 0
    # stationary, but with a multiplier on a row with slack
    assert line._at(p, torch.zeros(2), torch.tensor([0.5])).error == pytest.approx(0.5)
    # the nearest point to two cuts, in front of a row that lies below both there
    ring = CurvedProjection(lambda z: 1 - z.square().sum()[None], torch.ones(2), 0, -free, free)
    cuts = _Cuts(-torch.eye(2), -torch.ones(2), torch.zeros(2, dtype=torch.long), torch.ones(2))
    at = ring._at(torch.zeros(2), torch.ones(2), torch.zeros(1))
    assert ring._refined(torch.zeros(2), at, cuts) is None
    corner = CurvedProjection(lambda z: (1 - z).amax()[None], torch.ones(2), 0, -free, free)
    at = corner._at(torch.zeros(2), torch.ones(2), torch.zeros(1))
    proved = corner._refined(torch.zeros(2), at, cuts)
    assert proved is not None
    torch.testing.assert_close(proved.z, torch.ones(2))
    torch.testing.assert_close(proved.multiplier, torch.tensor([2.0]))
    # two cuts of a row that a third piece violates at their nearest point
    deep = lambda z: torch.stack([1 - z[0], 1 - z[1], 3 - z.sum()]).amax()[None]  # noqa: E731
    deeper = CurvedProjection(deep, torch.ones(2), 0, -free, free)
    assert deeper._refined(torch.zeros(2), deeper._at(torch.zeros(2), torch.ones(2), torch.zeros(1)), cuts) is None


def test_a_hessian_that_is_diagonal_at_one_point_only_is_not_diagonal() -> None:
    free = torch.full((2,), torch.inf)
    assert not CurvedProjection(lambda z: (z.sum() ** 4 - 1)[None], torch.zeros(2), 0, -free, free).diagonal
    assert CurvedProjection(lambda z: ((z**4).sum() - 1)[None], torch.zeros(2), 0, -free, free).diagonal


def test_diagonal_steps_respect_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    free = torch.full((3,), torch.inf)
    own, steps = CurvedProjection._diagonal_step, []

    def counted(self: Any, *arguments: Any) -> Any:
        steps.append(1)
        return own(self, *arguments)

    monkeypatch.setattr(CurvedProjection, "_diagonal_step", counted)
    low = torch.tensor([-0.2, -torch.inf, -torch.inf])
    ball = CurvedProjection(lambda z: (z.square().sum() + 6 * z[0])[None], torch.zeros(3), 0, low, free)
    # the ball about (-3, 0, 0) of radius 3: without the bound (-0.6, 1.8, 0)
    z, multiplier, status, _ = ball.project(torch.tensor([1.0, 3.0, 0.0]), torch.zeros(1))
    assert ball.diagonal
    assert status is Status.CONVERGED
    height = (9 - 2.8**2) ** 0.5
    torch.testing.assert_close(z, torch.tensor([-0.2, height, 0.0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(multiplier, torch.tensor([(3 / height - 1) / 2]), rtol=0, atol=1e-11)
    assert len(steps) <= 8


def test_a_repeated_call_solves_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    projection, _ = affine_case("equations and boxes", generator)
    x, y = 2 * torch.randn(N, generator=generator), 2 * torch.randn(M, generator=generator)
    found = projection.project(x, y, projection.start())
    monkeypatch.delattr(RowProjection, "_system")
    torch.testing.assert_close(joined(projection.project(x, y, found.multipliers)), joined(found), rtol=0, atol=1e-12)


def test_the_apex_of_a_cone(generator: torch.Generator) -> None:
    ball = 1.2
    projection = declared(
        lower_inequality=lambda x, y: torch.stack(
            [torch.linalg.vector_norm(y[:3]) - x[0], x.square().sum() + y[3] ** 2 - ball**2]
        )
    )
    for _ in range(4):
        x, y = torch.randn(N, generator=generator), torch.randn(M, generator=generator)
        x[0] = -y[:3].norm() - 0.5  # in the polar cone
        found = projection.project(x, y, projection.start())
        assert found.status is Status.CONVERGED
        rest = torch.cat([x[1:], y[3:]])
        rest = rest * min(1.0, ball / float(rest.norm()))
        assert float(found.x[0].abs()) <= 1e-9
        assert float(found.y[:3].abs().max()) <= 1e-9
        torch.testing.assert_close(torch.cat([found.x[1:], found.y[3:]]), rest, rtol=0, atol=1e-9)


def test_trees_are_in_the_order_of_the_declaration(generator: torch.Generator) -> None:
    x = {"b": torch.zeros(2), "a": torch.zeros(1)}
    y = [torch.zeros(2, 2)]
    problem = BilevelProblem(
        lambda x, y: x["a"].sum() + y[0].sum() ** 2,
        lambda x, y: (y[0] - x["b"].sum()).square().sum(),
        upper_set=Product({"a": Box(0.0, 1.0), "b": WholeSpace()}),
        lower_inequality=lambda x, y: y[0].sum(0) - x["a"] + x["b"].sum(),
    )
    flat = FlatProblem(problem, x, y)
    projection = JointProjection(flat, flat.flat_x(x), flat.flat_y(y))
    px, py = 2 * torch.randn(3, generator=generator), 2 * torch.randn(4, generator=generator)
    found = projection.project(px, py, projection.start())
    near = flat.x_tree(found.x), flat.y_tree(found.y)
    assert bool((near[1][0].sum(0) - near[0]["a"] + near[0]["b"].sum() <= 1e-12).all())
    assert 0 <= float(near[0]["a"]) <= 1

    def constraints(u: Any, v: Any) -> list[Any]:
        order = flat.x_tree(torch.arange(3.0))
        a, b = (tree.ravel(order[k]).long().tolist() for k in ("a", "b"))
        return [v[0] + v[2] <= u[a[0]] - cp.sum(u[b]), v[1] + v[3] <= u[a[0]] - cp.sum(u[b]), u[a] >= 0, u[a] <= 1]

    np.testing.assert_allclose(joined(found), by_cvxpy(px, py, constraints), atol=1e-7)


def test_the_benchmark_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    script, peers = importlib.import_module("joint_projection"), importlib.import_module("peers")
    record = tmp_path / "record.json"
    rows = script.table(peers.parser("", rounds=1).parse_args(["--toy", "--rounds", "1", "--json", str(record)]))
    assert [row["row"].split(":")[0].split(" ")[0] for row in rows] == ["ours", "ours", "unit", "cvxpy", "cvxpy"]
    assert rows[0]["distance"] <= 1e-12
    assert rows[4]["distance"] <= 1e-8
    assert record.exists()


@pytest.mark.gpu
def test_on_a_device(generator: torch.Generator) -> None:
    B, A, b = random_rows(generator)
    here = declared(lower_inequality=lambda x, y: B @ x + A @ y - b, upper_set=Box(-0.5, 0.4))
    device = torch.device("cuda")
    Bd, Ad, bd = B.to(device), A.to(device), b.to(device)
    there = declared(
        torch.zeros(N, device=device),
        torch.zeros(M, device=device),
        lower_inequality=lambda x, y: Bd @ x + Ad @ y - bd,
        upper_set=Box(-0.5, 0.4),
    )
    x, y = 3 * torch.randn(N, generator=generator), 3 * torch.randn(M, generator=generator)
    found = there.project(x.to(device), y.to(device), there.start())
    assert found.x.device.type == "cuda"
    torch.testing.assert_close(joined(found).cpu(), joined(here.project(x, y, here.start())), rtol=0, atol=1e-11)
