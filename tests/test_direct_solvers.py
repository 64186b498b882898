"""Cholesky, LDL^T and LU: exactness, inertia, and what is done where the matrix is singular."""

import pytest
import torch
from torch import Tensor

from implicit import LDLT, LU, Cholesky, ConvergenceWarning, Dense, LinearOperator, Status
from implicit.linear_solvers.dense import DenseSolver
from tests.systems import indefinite, name, nonsymmetric, normal, operator, orthogonal, relative, spd, symmetric

KIND = {Cholesky: "definite", LDLT: "indefinite", LU: "nonsymmetric"}


@pytest.mark.parametrize("condition", [1e1, 1e6, 1e10])
@pytest.mark.parametrize("solver", KIND, ids=name)
def test_factorisations_are_exact(solver, condition) -> None:
    matrix = {Cholesky: spd, LDLT: indefinite, LU: nonsymmetric}[solver](40, condition)
    b = normal(3, 40)
    expected = torch.linalg.solve(matrix, b.T).T
    acting = operator(KIND[solver], matrix)
    found = solver(rtol=1e-6).solve(acting, b, batched=True)
    assert found.success
    assert (found.products, acting.products, found.steps) == (40, 40, 1)
    assert float((found.value - expected).norm() / expected.norm()) <= 1e-15 * condition + 1e-13
    measured = float((b - found.value @ matrix.T).norm(dim=1).max())
    assert found.residual == pytest.approx(measured, rel=0.5, abs=1e-13)


def test_refinement_takes_the_last_digits() -> None:
    """One step of it in the working precision makes a backward stable solve componentwise so."""
    scales = torch.logspace(0, 12, 30)
    matrix = scales[:, None] * normal(30, 30, seed=5)
    found = LU(rtol=1e-12).solve(operator("nonsymmetric", matrix), matrix @ torch.ones(30))
    rows = (matrix @ torch.ones(30) - matrix @ found.value).abs() / (matrix.abs() @ found.value.abs())
    assert float(rows.max()) < 1e-15


# ---------------------------------------------------------------- inertia


@pytest.mark.parametrize("seed", range(6))
def test_inertia_is_that_of_the_eigenvalues(seed) -> None:
    matrix = normal(31, 31, seed=seed)
    matrix = matrix + matrix.T
    if seed % 2:
        matrix.diagonal().zero_()  # forces blocks of two
    values = torch.linalg.eigvalsh(matrix)
    found = LDLT().solve(operator("indefinite", matrix), normal(31))
    assert found.success
    assert found.inertia == (int((values > 0).sum()), int((values < 0).sum()), 0)
    assert found.indefinite


def test_the_kkt_matrix_of_a_minimum_has_as_many_negative_eigenvalues_as_constraints() -> None:
    hessian, jacobian = spd(12, 20.0), normal(4, 12)
    kkt = torch.cat([torch.cat([hessian, jacobian.T], 1), torch.cat([jacobian, torch.zeros(4, 4)], 1)])
    assert LDLT().solve(operator("indefinite", kkt), normal(16)).inertia == (12, 4, 0)
    curved = kkt.clone()
    null = torch.linalg.svd(jacobian)[2][4]  # tangent to the constraints
    curved[:12, :12] -= 1e3 * torch.outer(null, null)
    assert LDLT().solve(operator("indefinite", curved), normal(16)).inertia == (11, 5, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inertia_of_definite_and_singular_matrices(dtype) -> None:
    for signs, expected in (((3, 0, 0), (3, 0, 0)), ((0, 4, 0), (0, 4, 0)), ((5, 2, 3), (5, 2, 3))):
        values = torch.cat([torch.full((count,), s) for count, s in zip(signs, (2.0, -1.0, 0.0), strict=True)])
        matrix = symmetric(values * torch.linspace(1.0, 2.0, len(values))).to(dtype)
        b = matrix @ normal(len(values)).to(dtype)
        if expected[2]:
            with pytest.warns(ConvergenceWarning, match="rank 7 of 10"):
                found = LDLT().solve(operator("indefinite", matrix), b)
        else:
            found = LDLT().solve(operator("indefinite", matrix), b)
        assert (found.inertia, found.success) == (expected, True)
        assert found.indefinite == (expected[1] > 0)
    assert LU().solve(operator("nonsymmetric", torch.eye(2)), torch.ones(2)).inertia is None
    assert Cholesky().solve(Dense(torch.eye(2)), torch.ones(2)).inertia == (2, 0, 0)


def test_cholesky_reports_what_is_not_positive_definite() -> None:
    matrix = spd(10, 10.0) - 3.0 * torch.eye(10)
    values = torch.linalg.eigvalsh(matrix)
    found = Cholesky().solve(Dense(matrix), normal(10))
    assert (found.status, found.indefinite) == (Status.LINEAR_SOLVE_FAILED, True)
    assert f"its smallest eigenvalue is {float(values[0]):.3g}" in found.message
    assert found.inertia == (int((values > 0).sum()), int((values < 0).sum()), 0)
    assert float(found.value.norm()) == 0.0
    assert found.residual == pytest.approx(float(normal(10).norm()))
    assert LU().solve(Dense(matrix), normal(10)).success
    assert LDLT().solve(Dense(matrix), normal(10)).success


# ---------------------------------------------------------------- singular matrices


def singular(solver: type[DenseSolver], n: int, rank: int) -> Tensor:
    values = torch.linspace(1.0, 9.0, rank)
    if solver is LU:
        return (orthogonal(n, 1)[:, :rank] * values) @ orthogonal(n, 2)[:, :rank].T
    signs = torch.where(torch.arange(rank) % 2 == 0, 1.0, -1.0 if solver is LDLT else 1.0)
    return symmetric(torch.cat([values * signs, torch.zeros(n - rank)]))


@pytest.mark.parametrize("solver", KIND, ids=name)
@pytest.mark.parametrize("rank", [1, 15, 19])
def test_singular_systems_with_a_solution_have_the_smallest_one_with_a_warning(solver, rank) -> None:
    matrix = singular(solver, 20, rank)
    b = (matrix @ normal(20, 3)).T * torch.tensor([1.0, 1e-30, 1e20])[:, None]
    inverse = torch.linalg.pinv(matrix, rtol=1e-10)
    with pytest.warns(ConvergenceWarning, match=f"{solver.__name__}: the matrix is singular .*rank {rank} of 20"):
        found = solver().solve(operator(KIND[solver], matrix), b, batched=True)
    assert (found.status, found.singular) == (Status.CONVERGED, True)
    for own, row in zip(found.value, b, strict=True):
        assert relative(matrix, own, row) < 1e-12
        torch.testing.assert_close(own, inverse @ row, rtol=0.0, atol=1e-11 * float((inverse @ row).norm()))


@pytest.mark.parametrize("solver", KIND, ids=name)
def test_singular_systems_without_a_solution_are_fitted_and_stalled(solver) -> None:
    matrix, b = singular(solver, 20, 15), normal(20)
    found = solver().solve(operator(KIND[solver], matrix), b)
    expected = torch.linalg.pinv(matrix, rtol=1e-10) @ b
    best = float((b - matrix @ expected).norm() / b.norm())
    assert (found.status, found.singular) == (Status.STALLED, True)
    assert "rank 15 of 20) and the system has no solution: least-squares answer" in found.message
    assert f"relative residual {best:.3g}" in found.message
    assert found.relative_residual == pytest.approx(best, rel=1e-9)
    torch.testing.assert_close(found.value, expected, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("solver", KIND, ids=name)
def test_exact_zeros_on_the_diagonal(solver) -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    found = solver().solve(operator(KIND[solver], matrix), torch.ones(3))
    assert (found.status, found.indefinite, found.singular) == (Status.STALLED, False, True)
    torch.testing.assert_close(found.value, torch.tensor([1.0, 0.0, 0.5]))
    assert found.relative_residual == pytest.approx(3**-0.5)
    zero = solver().solve(operator(KIND[solver], torch.zeros(3, 3)), torch.ones(3))
    assert (zero.status, float(zero.value.norm())) == (Status.STALLED, 0.0)


def test_a_pivot_at_rounding_level_is_noticed_although_cholesky_succeeds() -> None:
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2.3e-16]])
    assert int(torch.linalg.cholesky_ex(matrix)[1]) == 0
    with pytest.warns(ConvergenceWarning, match="rank 1 of 2"):
        found = Cholesky().solve(Dense(matrix), torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(found.value, torch.ones(2))


@pytest.mark.parametrize("solver", KIND, ids=name)
def test_a_matrix_that_is_only_badly_scaled_is_solved(solver) -> None:
    matrix = torch.diag(torch.tensor([1.0, 1e-20]))
    found = solver().solve(operator(KIND[solver], matrix), torch.tensor([1.0, 1.0]))
    assert (found.status, found.singular) == (Status.CONVERGED, False)
    torch.testing.assert_close(found.value, torch.tensor([1.0, 1e20]))


def test_the_transpose_of_a_singular_matrix_has_its_own_least_squares_answer() -> None:
    matrix, b = singular(LU, 20, 15), normal(20)
    acting = operator("nonsymmetric", matrix)
    prepared = LU().init(acting)
    found = LU().solve(acting.T, b, prepared=LU().transpose(prepared))
    torch.testing.assert_close(found.value, torch.linalg.pinv(matrix.T, rtol=1e-10) @ b, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("solver", KIND, ids=name)
def test_hopeless_conditioning_is_not_success(solver) -> None:
    grid = torch.arange(1.0, 16.0)
    hilbert = 1.0 / (grid[:, None] + grid[None, :] - 1.0)
    b = normal(15)
    found = solver().solve(operator(KIND[solver], hilbert), b)
    assert not found.success
    assert found.status is Status.STALLED or solver is Cholesky
    assert relative(hilbert, found.value, b) > 1.5e-8


# ---------------------------------------------------------------- declarations and limits


class Wrong(LinearOperator):
    """Declared symmetric, and not."""

    symmetric = positive_definite = True

    def mv(self, v: Tensor) -> Tensor:
        return torch.tensor([[2.0, 1.0], [0.0, 2.0]]) @ v


@pytest.mark.parametrize("solver", [Cholesky, LDLT], ids=name)
def test_a_false_declaration_of_symmetry_shows_in_the_residual(solver) -> None:
    found = solver().solve(Wrong(torch.zeros(2)), torch.ones(2))
    assert not found.success
    assert found.relative_residual > 0.01


def test_factorisation_limits_and_settings() -> None:
    for solver, instead in ((Cholesky, "CG"), (LDLT, "MINRES"), (LU, "an iterative solver")):
        message = f"{solver.__name__} would form a 3 x 3 matrix, above max_size=2; use {instead}, or raise max_size"
        with pytest.raises(ValueError, match=message):
            solver(max_size=2).solve(Dense(torch.eye(3)), torch.ones(3))
        for size in (0, None, 2.5, True):
            with pytest.raises(ValueError, match="max_size must be a positive integer"):
                solver(max_size=size)
