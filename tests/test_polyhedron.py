"""Projections onto polyhedra: against cvxpy, closed forms, and the inequality that characterises them."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from constrained import Affine, Box, HalfSpace, Polyhedron, Simplex
from implicit import ConvergenceWarning, SolveError, tree


def sets(generator: torch.Generator, n: int = 6) -> dict[str, Polyhedron]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A, b, G, h = normal(2, n), normal(2), normal(9, n), torch.rand(9, generator=generator) + 0.1
    feasible = G @ torch.linalg.lstsq(A, b).solution
    return {
        "inequalities": Polyhedron(G=G, h=h),
        "redundant": Polyhedron(G=torch.cat([G, G]), h=torch.cat([h, h + 0.1])),
        "everything": Polyhedron(A=A, b=b, G=G, h=feasible + h, lower=-3.0, upper=torch.full((n,), 3.0)),
        "absent": Polyhedron(G=G, h=torch.where(torch.arange(9) < 3, torch.inf, h), lower=-torch.inf),
        "box": Polyhedron(lower=-0.5, upper=torch.full((n,), 0.25)),
        "equations": Polyhedron(A=A, b=b),
        "dependent equations": Polyhedron(A=torch.cat([A, A[:1]]), b=torch.cat([b, b[:1]])),
        "half-space": Polyhedron(G=G[:1], h=h[:1] - 5),
        "simplex": Polyhedron(A=torch.ones(1, n), b=torch.ones(1), lower=0.0),
    }


NAMES = list(sets(torch.Generator().manual_seed(0)))


def by_cvxpy(chosen: Polyhedron, point: Tensor) -> np.ndarray:
    x = cp.Variable(point.numel())
    constraints = []
    if chosen.A is not None and chosen.b is not None:
        constraints.append(chosen.A.numpy() @ x == chosen.b.numpy())
    if chosen.G is not None and chosen.h is not None:
        kept = chosen.h.isfinite()
        constraints.append(chosen.G[kept].numpy() @ x <= chosen.h[kept].numpy())
    for bound, sign in ((chosen.lower, -1), (chosen.upper, 1)):
        if bound is not None and torch.as_tensor(bound).isfinite().all():
            constraints.append(sign * x <= sign * torch.as_tensor(bound).numpy())
    accuracy = {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}
    objective = cp.Minimize(0.5 * cp.sum_squares(x - point.numpy()))
    cp.Problem(objective, constraints).solve(solver=cp.CLARABEL, **accuracy)
    assert x.value is not None
    return x.value


@pytest.mark.parametrize("name", NAMES)
def test_the_projection(generator: torch.Generator, name: str) -> None:
    chosen = sets(generator)[name]
    point = 3 * torch.randn(6, generator=generator)
    projected = chosen.project(point)
    np.testing.assert_allclose(projected, by_cvxpy(chosen, point), atol=1e-6)
    assert chosen.contains(projected, atol=1e-12)
    assert not chosen.contains(point)
    torch.testing.assert_close(chosen.project(projected), projected, rtol=0, atol=1e-12)
    assert float(chosen.distance(point)) == pytest.approx(float(torch.linalg.vector_norm(point - projected)))
    # <point - projected, z - projected> <= 0 for every z of the set, to rounding.
    others = torch.stack([chosen.project(2 * torch.randn(6, generator=generator)) for _ in range(10)])
    assert ((others - projected) @ (point - projected)).max() <= 1e-11


@pytest.mark.parametrize("total", [1.0, 1e-8, 1e-12])
def test_small_sets(generator: torch.Generator, total: float) -> None:
    chosen = Polyhedron(A=torch.ones(1, 4), b=torch.tensor([total]), lower=0.0)
    for point in (torch.tensor([1.0, -1.0, 0.3, 0.0]), total * torch.randn(4, generator=generator)):
        found = chosen.project(point)
        torch.testing.assert_close(found / total, Simplex(total).project(point) / total, rtol=0, atol=1e-10)


def test_closed_forms_agree_with_the_general_method(generator: torch.Generator) -> None:
    n, point = 6, 3 * torch.randn(6, generator=generator)
    given = sets(generator)
    for name in ("box", "equations", "half-space"):
        chosen = given[name]
        assert isinstance(chosen._closed, (Box, Affine, HalfSpace))
        torch.testing.assert_close(chosen.project(point), chosen.solve(point).x, rtol=0, atol=1e-12)
    matrix, offset = given["equations"].A, given["equations"].b
    assert matrix is not None
    assert offset is not None
    reference = Affine(matrix, offset).project(point)
    torch.testing.assert_close(given["equations"].project(point), reference)
    several = torch.randn(4, n, generator=generator)
    for name in ("box", "equations", "half-space"):
        rows = torch.stack([given[name].project(row) for row in several])
        torch.testing.assert_close(given[name].project(several), rows, rtol=0, atol=1e-13)


def test_rows_are_projected_together(generator: torch.Generator) -> None:
    for name, chosen in sets(generator).items():
        points = 3 * torch.randn(2, 5, 6, generator=generator)
        rows = torch.stack([chosen.project(row) for row in points.reshape(10, 6)])
        torch.testing.assert_close(chosen.project(points), rows.reshape(2, 5, 6), rtol=0, atol=1e-11, msg=name)
        assert chosen.contains(chosen.project(points))
        one = chosen.project(points)
        one[1, 3] = points[1, 3]
        assert not chosen.contains(one)


def test_trees_are_ravelled(generator: torch.Generator) -> None:
    chosen = sets(generator)["everything"]
    flat = 2 * torch.randn(6, generator=generator)
    point = {"w": flat[:4].reshape(2, 2), "b": [flat[4:]]}
    order = tree.ravel(point)
    projected = chosen.project(point)
    assert projected["w"].shape == (2, 2)
    torch.testing.assert_close(tree.ravel(projected), chosen.project(order))
    start = chosen.project(tree.map(lambda leaf: leaf + 1e-3, point))
    torch.testing.assert_close(tree.ravel(chosen.project(point, start)), tree.ravel(projected), rtol=0, atol=1e-12)
    assert chosen.contains(projected)


def test_a_start_does_not_change_the_projection(generator: torch.Generator) -> None:
    n = 40
    chosen = Polyhedron(G=torch.randn(60, n, generator=generator), h=torch.rand(60, generator=generator))
    first, point = torch.randn(2, n, generator=generator)
    cold = chosen.project(point)
    for start in (chosen.project(first), chosen.solve(first), chosen.solve(point), cold, torch.zeros(n)):
        torch.testing.assert_close(chosen.project(point, start), cold, rtol=0, atol=1e-11)
    again = chosen.solve(point, chosen.solve(point))
    assert int(again.steps) == 0


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_in_the_point(generator: torch.Generator, name: str) -> None:
    chosen = sets(generator)[name]
    point = (3 * torch.randn(6, generator=generator)).requires_grad_()
    assert gradcheck(chosen.project, point, check_forward_ad=True)
    jacobian = torch.func.jacrev(chosen.project)(point.detach())
    torch.testing.assert_close(jacobian, jacobian @ jacobian, rtol=0, atol=1e-10)  # a projection, too
    rows = 3 * torch.randn(3, 6, generator=generator)
    each = torch.stack([torch.func.jacrev(chosen.project)(row) for row in rows])
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(chosen.project))(rows), each, rtol=0, atol=1e-10)


def test_derivatives_in_the_set(generator: torch.Generator) -> None:
    point = 3 * torch.randn(4, generator=generator)
    G, h = torch.randn(5, 4, generator=generator), torch.rand(5, generator=generator)
    A, b = torch.randn(1, 4, generator=generator), torch.zeros(1)

    def project(p: Tensor, *data: Tensor) -> Tensor:
        G, h, A, b, upper = data
        return Polyhedron(G=G, h=h, A=A, b=b, upper=upper).project(p)

    theta = tuple(t.requires_grad_() for t in (point, G, h, A, b, torch.full((4,), 0.3)))
    assert gradcheck(project, theta, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(project, theta, fast_mode=True)
    direct = torch.func.jacrev(project, argnums=1)(*[t.detach() for t in theta])
    backward = torch.autograd.functional.jacobian(lambda G: project(theta[0].detach(), G, *theta[2:]), theta[1])
    torch.testing.assert_close(direct, backward)


def test_kinks_warn(generator: torch.Generator) -> None:
    chosen = Polyhedron(G=torch.eye(3), h=torch.ones(3))
    point = torch.tensor([1.0, 2.0, 0.0], requires_grad=True)
    with pytest.warns(ConvergenceWarning, match="strict complementarity"):
        chosen.project(point).sum().backward()


def test_an_empty_set_and_points_that_are_not_finite() -> None:
    empty = Polyhedron(G=torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), h=torch.tensor([0.0, -1.0]))
    with pytest.raises(SolveError, match="INFEASIBLE"):
        empty.project(torch.zeros(2))
    chosen = Polyhedron(G=torch.eye(2), h=torch.ones(2))
    found = chosen.project(torch.tensor([[2.0, torch.nan], [2.0, 0.0]]))
    assert found[0].isnan().any()
    torch.testing.assert_close(found[1], torch.tensor([1.0, 0.0]))


def test_float32(generator: torch.Generator) -> None:
    G, h = torch.randn(9, 6, generator=generator), torch.rand(9, generator=generator)
    point = 3 * torch.randn(6, generator=generator)
    found = Polyhedron(G=G.float(), h=h.float()).project(point.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), Polyhedron(G=G, h=h).project(point), rtol=1e-4, atol=1e-4)


def test_many_constraints(generator: torch.Generator) -> None:
    n = 120
    chosen = Polyhedron(G=torch.randn(300, n, generator=generator), h=torch.rand(300, generator=generator))
    points = 2 * torch.randn(3, n, generator=generator)
    found = chosen.solve(points)
    assert found.success
    assert max(found.stationarity.max(), found.feasibility.max(), found.complementarity.max()) <= 1e-10
    assert found.active.sum() > 100


def test_misuse_is_named(generator: torch.Generator) -> None:
    G, h = torch.eye(3), torch.ones(3)
    with pytest.raises(ValueError, match="Polyhedron has no constraint"):
        Polyhedron()
    with pytest.raises(ValueError, match="h is missing: give G and h together"):
        Polyhedron(G=G)
    with pytest.raises(ValueError, match=r"right-hand side of shape \(3,\) without its matrix"):
        Polyhedron(h=h)
    with pytest.raises(ValueError, match="without a batch axis"):
        Polyhedron(G=G, h=h.expand(2, 3))
    with pytest.raises(ValueError, match=r"h has shape \(2,\): give it \(3,\)"):
        Polyhedron(G=G, h=h[:2])
    with pytest.raises(ValueError, match="point has 4 entries, but Polyhedron constrains 3"):
        Polyhedron(G=G, h=h).project(torch.ones(4))
    with pytest.raises(ValueError, match=r"q is torch\.float32"):
        Polyhedron(G=G, h=h).project(torch.ones(3, dtype=torch.float32))
    with pytest.raises(TypeError, match="point"):
        Polyhedron(G=G, h=h).project([1.0, 2.0, 3.0])
    torch.testing.assert_close(Polyhedron(lower=0.0).project(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))
