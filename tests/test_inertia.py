"""Inertia correction against eigenvalues and dense solves."""

from typing import Any

import pytest
import scipy.sparse
import torch
from torch import Tensor

from constrained import AdaSketchNewton, InteriorPoint
from constrained.inertia import CorrectedKKT, InertiaCorrection, default_solver
from constrained.kkt_preconditioner import ProbedKKT
from constrained.kkt_system import KKTSystem
from implicit import CG, GMRES, LDLT, MINRES, Cholesky, Dense, LinearSolver, Neumann, Sparse, SparseLU, tree
from tests.systems import normal


def symmetric(values: Tensor, seed: int = 1) -> Tensor:
    """A matrix with these eigenvalues."""
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    matrix = basis @ torch.diag(values) @ basis.T
    return 0.5 * (matrix + matrix.T)


def dense(matrix: Tensor) -> Dense:
    return Dense(matrix, symmetric=True, positive_definite=False)


def inertia(matrix: Tensor) -> tuple[int, int]:
    values = torch.linalg.eigvalsh(matrix)
    return int((values > 0).sum()), int((values < 0).sum())


def correct(rule: InertiaCorrection, h: Tensor, j: Tensor, rhs: Tensor, **more: object) -> CorrectedKKT:
    return rule.correct(dense(h), Dense(j, symmetric=False), rhs, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("owner", [InertiaCorrection, InteriorPoint, AdaSketchNewton])
def test_solvers_that_cannot_do_kkt_systems_are_refused(owner: Any) -> None:
    for solver in (CG(), Cholesky(), Neumann()):
        with pytest.raises(ValueError, match=rf"{type(solver).__name__}\(\): KKT matrices are .*implicit.MINRES"):
            owner(linear_solver=solver)
    for wrong, cure in (("minres", "MINRES"), (LDLT, "LDLT"), ("gmres", "GMRES"), (3, "MINRES")):
        with pytest.raises(TypeError, match=rf"linear_solver must be such as implicit.{cure}\(\), or None; got"):
            owner(linear_solver=wrong)
    assert owner(linear_solver=MINRES()).linear_solver == MINRES()


def test_nothing_is_shifted_where_the_inertia_is_right() -> None:
    """H is indefinite, but positive definite on the null space of J."""
    h, j = torch.diag(torch.tensor([-1.0, 2.0, 3.0])), torch.tensor([[1.0, 0.0, 0.0]])
    rhs = normal(4, seed=2)
    found = correct(InertiaCorrection(), h, j, rhs)
    assert (found.success, found.primal, found.dual, found.inertia, found.attempts) == (True, 0.0, 0.0, (3, 1, 0), 1)
    matrix = torch.cat([torch.cat([h, j.T], 1), torch.cat([j, torch.zeros(1, 1)], 1)])
    torch.testing.assert_close(found.step, torch.linalg.solve(matrix, rhs), rtol=1e-12, atol=1e-12)
    other = normal(4, seed=3)
    torch.testing.assert_close(found.solve(other), torch.linalg.solve(matrix, other), rtol=1e-12, atol=1e-12)


def test_the_shift_grows_by_the_stated_factors_and_remembers() -> None:
    """The smallest eigenvalue on the null space is -5, so that 1e-4 100^k first suffices at 100."""
    h, j = torch.diag(torch.tensor([1.0, -5.0, 3.0])), torch.tensor([[1.0, 0.0, 0.0]])
    rhs = normal(4, seed=2)
    rule = InertiaCorrection()
    first = correct(rule, h, j, rhs)
    assert (first.primal, first.last, first.attempts) == (pytest.approx(100.0), pytest.approx(100.0), 5)
    assert inertia(first.system.to_dense()) == (3, 1)
    second = correct(rule, h, j, rhs, last=first.last)
    assert (second.primal, second.attempts) == (pytest.approx(100 / 3), 2)
    third = correct(rule, h, j, rhs, last=3.0)
    assert (third.primal, third.attempts) == (pytest.approx(8.0), 3)  # 0, 1, 8
    convex = correct(rule, h.abs(), j, rhs, last=3.0)
    assert (convex.primal, convex.last) == (0.0, 3.0)


def test_dependent_constraints_are_shifted_in_the_second_block_alone() -> None:
    row = normal(1, 4, seed=5)
    j = torch.cat([row, 2 * row])
    h, rhs = symmetric(torch.tensor([1.0, 2.0, 3.0, 4.0])), normal(6, seed=6)
    found = correct(InertiaCorrection(), h, j, rhs, dual=1e-6)
    assert (found.success, found.primal, found.dual, found.inertia) == (True, 0.0, 1e-6, (4, 2, 0))
    torch.testing.assert_close(found.system.to_dense()[4:, 4:], -1e-6 * torch.eye(2))
    both = correct(InertiaCorrection(), symmetric(torch.tensor([-1.0, -2.0, -3.0, 4.0])), j, rhs)
    assert both.success and both.primal > 0 and both.dual == 1e-8


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_random_systems_get_the_inertia_of_a_minimum(m: int, seed: int) -> None:
    h, j = symmetric(normal(8, seed=seed), seed + 1), normal(m, 8, seed=seed + 2)
    diagonal, below = normal(8, seed=seed + 3).abs(), normal(m, seed=seed + 4).abs()
    diagonal[:3] *= 1e3
    rhs = normal(8 + m, seed=seed + 5)
    found = correct(InertiaCorrection(), h, j, rhs, diagonal=diagonal, dual_diagonal=below)
    expected = torch.cat(
        [
            torch.cat([h + torch.diag(diagonal + found.primal), j.T], 1),
            torch.cat([j, -torch.diag(below + found.dual)], 1),
        ]
    )
    assert inertia(expected) == (8, m)
    right = inertia(expected - torch.diag(torch.cat([found.primal * torch.ones(8), torch.zeros(m)]))) == (8, m)
    assert right == (found.primal == 0)
    torch.testing.assert_close(found.step, torch.linalg.solve(expected, rhs), rtol=1e-9, atol=1e-9)


def test_bad_scaling_does_not_hide_the_inertia() -> None:
    """Barrier terms of 1e14 next to entries of one: rounding of the largest must not drown the others."""
    h, j = torch.diag(torch.tensor([1.0, 2.0, -1.0])), torch.tensor([[1.0, 1.0, 0.0]])
    diagonal = torch.tensor([1e14, 0.0, 2.0])
    found = correct(InertiaCorrection(), h, j, torch.tensor([1e14, 1.0, 1.0, 1.0]), diagonal=diagonal)
    assert (found.success, found.primal, found.inertia) == (True, 0.0, (3, 1, 0))
    # x0 = (1e14 - y) / 1e14, x1 = 1 - x0, y = 1 - 2 x1, to rounding
    torch.testing.assert_close(found.step, torch.tensor([1.0, 0.0, 1.0, 1.0]), rtol=1e-12, atol=1e-12)
    concave = correct(InertiaCorrection(), h, j, normal(4), diagonal=torch.tensor([1e14, 0.0, 0.5]))
    assert concave.primal >= 0.5


@pytest.mark.parametrize("solver", [SparseLU(), MINRES(rtol=1e-12), GMRES(rtol=1e-12)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("seed", range(3))
def test_solvers_without_inertia_are_judged_by_the_step(solver: LinearSolver, seed: int) -> None:
    """The step then has positive curvature, which the unshifted one has not."""
    values = torch.linspace(-3.0, 4.0, 8)
    h, j = symmetric(values, seed), normal(2, 8, seed=seed + 2)
    null = torch.linalg.svd(j)[2][2:].T
    direction = null @ torch.linalg.eigh(null.T @ h @ null)[1][:, 0]  # of the most negative curvature
    rhs = torch.cat([direction, torch.zeros(2)])
    found = correct(InertiaCorrection(linear_solver=solver), h, j, rhs)
    assert found.success and found.inertia is None and found.primal > 0
    d = found.step[:8]
    assert float(d @ h @ d) + found.primal * float(d @ d) > 0
    assert float(d @ direction) > 0  # descends, where the right-hand side is minus a gradient
    torch.testing.assert_close(found.system @ found.step, rhs, rtol=1e-8, atol=1e-8)
    convex = correct(InertiaCorrection(linear_solver=solver), symmetric(values.abs() + 1, seed), j, rhs)
    assert (convex.primal, convex.attempts) == (0.0, 1)


def test_the_curvature_test_counts_the_second_block_and_the_way_to_feasibility() -> None:
    """With R = 1 and J = 2 the reduced curvature is -1 + 4 > 0; with b the last term decides."""
    h, j = torch.tensor([[-1.0]]), torch.tensor([[2.0]])
    rule = InertiaCorrection(linear_solver=SparseLU())
    assert correct(rule, h, j, torch.tensor([1.0, 0.0]), dual_diagonal=1.0).primal == 0.0
    assert correct(rule, h, torch.tensor([[0.5]]), torch.tensor([1.0, 0.0]), dual_diagonal=1.0).primal > 0.75
    # d = b / 2 is fixed by the constraint; y = (a + d) / 2, y b >= d^2 makes up for the negative curvature
    assert correct(rule, h, j, torch.tensor([1.0, 1.0])).primal == 0.0
    assert correct(rule, h, j, torch.tensor([-3.0, 1.0])).primal > 0.0


def test_singular_systems_of_solvers_without_inertia() -> None:
    row = normal(1, 4, seed=5)
    j, h = torch.cat([row, row]), symmetric(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    found = correct(InertiaCorrection(linear_solver=SparseLU()), h, j, normal(6, seed=6), dual=1e-6)
    assert (found.success, found.primal, found.dual) == (True, 0.0, 1e-6)


def test_what_is_not_finite_or_hopeless_is_reported() -> None:
    h, j = torch.tensor([[torch.nan]]), torch.zeros(0, 1)
    assert not correct(InertiaCorrection(), h, j, torch.ones(1)).finite
    assert not correct(InertiaCorrection(), torch.eye(1), j, torch.tensor([torch.inf])).finite
    hopeless = correct(InertiaCorrection(largest=1.0), -10 * torch.eye(1), j, torch.ones(1))
    assert hopeless.finite and not hopeless.success
    free = correct(InertiaCorrection(), torch.tensor([[2.0]]), j, torch.ones(1))
    torch.testing.assert_close(free.step, torch.tensor([0.5]))


def test_the_solver_follows_size_and_structure() -> None:
    def system(n: int, sparse: bool) -> KKTSystem:
        if not sparse:
            return KKTSystem(dense(torch.eye(n)), Dense(torch.ones(1, n), symmetric=False))
        eye, row = scipy.sparse.eye_array(n, format="csr"), scipy.sparse.csr_array(torch.ones(1, n).numpy())
        return KKTSystem(Sparse(eye, symmetric=True), Sparse(row, symmetric=False))

    assert isinstance(default_solver(system(10, False)), LDLT)
    assert isinstance(default_solver(system(10, True)), LDLT)
    assert isinstance(default_solver(system(500, True)), SparseLU)

    class Big(KKTSystem):
        """Known by products alone."""

        def to_sparse(self) -> None:
            return None

    big = Big(Sparse(scipy.sparse.eye_array(3000, format="csr")), Dense(torch.ones(1, 3000), symmetric=False))
    assert isinstance(default_solver(big), ProbedKKT)
    assert tree.size(big.like) == 3001


@pytest.mark.parametrize(
    "settings",
    [{"first": -1.0}, {"largest": 1e-6}, {"decrease": 2.0}, {"increase": 0.5}, {"dual": 0.0}, {"curvature": -1.0}],
    ids=str,
)
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        InertiaCorrection(**settings)  # type: ignore[arg-type]
