"""AutoSolver: the choice for every structure and size, and what it says about it."""

import pytest
import torch

from implicit import CG, GMRES, LDLT, LSMR, LU, MINRES, AutoSolver, Cholesky, Dense, Jacobi, Status
from tests.systems import MATRICES, Counting, normal, operator, relative

CHOICES = [
    ("definite", 10, Cholesky, "symmetric positive definite with n = 10 <= dense_size = 15"),
    ("definite", 20, CG, "symmetric positive definite with n = 20 > dense_size = 15"),
    ("indefinite", 10, LDLT, "symmetric with n = 10 <= dense_size = 15"),
    ("indefinite", 20, MINRES, "symmetric with n = 20 > dense_size = 15"),
    ("nonsymmetric", 10, LU, "not declared symmetric with n = 10 <= dense_size = 15"),
    ("nonsymmetric", 20, GMRES, "not declared symmetric with n = 20 > dense_size = 15"),
]


@pytest.mark.parametrize(("kind", "n", "expected", "reason"), CHOICES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_the_choice_follows_what_is_declared(kind, n, expected, reason) -> None:
    matrix, b = MATRICES[kind](n, 8.0), normal(n)
    acting = Counting(matrix, symmetric=kind != "nonsymmetric", positive_definite=kind == "definite")
    auto = AutoSolver(rtol=1e-9, dense_size=15)
    solver, why = auto.choose(acting)
    assert (type(solver), why) == (expected, reason)
    assert (acting.products, solver.rtol, solver.atol) == (0, 1e-9, 0.0)
    found = auto.solve(acting, b)
    assert (found.success, found.method) == (True, f"{expected.__name__}: {reason}")
    assert relative(matrix, found.value, b) <= 1e-9


def test_the_limit_itself_is_still_small() -> None:
    acting = Counting(torch.eye(12))
    assert isinstance(AutoSolver(dense_size=12).choose(acting)[0], Cholesky)
    assert isinstance(AutoSolver(dense_size=11).choose(acting)[0], CG)


def test_a_matrix_that_is_there_already_is_factorised_up_to_a_larger_size() -> None:
    for n, expected in ((20, LDLT), (30, MINRES)):
        matrix = MATRICES["indefinite"](n, 8.0)
        found = AutoSolver(dense_size=15, matrix_size=25).solve(operator("indefinite", matrix), normal(n))
        assert found.success
        assert found.method.startswith(f"{expected.__name__}: symmetric, and a matrix with n = {n}")
        assert found.method.endswith("matrix_size = 25")


def test_rectangular_operators_go_to_lsmr() -> None:
    matrix, b = normal(8, 3), normal(8)
    found = AutoSolver().solve(Dense(matrix), b)
    assert (found.success, found.method) == (True, f"{LSMR.__name__}: rectangular, 8 x 3")
    torch.testing.assert_close(found.value, torch.linalg.lstsq(matrix, b).solution, rtol=1e-6, atol=1e-7)


def test_settings_reach_the_chosen_solver() -> None:
    diagonal = torch.logspace(0, 6, 30)
    acting = Counting(torch.diag(diagonal))
    auto = AutoSolver(rtol=1e-6, atol=1e-9, max_steps=7, preconditioner=Jacobi(diagonal=diagonal), dense_size=1)
    solver, _ = auto.choose(acting)
    assert solver == CG(rtol=1e-6, atol=1e-9, max_steps=7, preconditioner=auto.preconditioner)
    assert (auto.solve(acting, torch.ones(30)).steps, auto.solve(acting, torch.ones(30)).status) == (
        1,
        Status.CONVERGED,
    )
    short = AutoSolver(max_steps=2, dense_size=1).solve(acting, torch.ones(30))
    assert (short.status, short.steps) == (Status.STEP_LIMIT, 2)
    for field in ("dense_size", "matrix_size"):
        with pytest.raises(ValueError, match=f"{field} must be a positive integer, got 0"):
            AutoSolver(**{field: 0})


def test_a_wrong_declaration_ends_as_the_chosen_solver_says() -> None:
    matrix = MATRICES["indefinite"](12, 4.0)
    for size in (5, 20):
        found = AutoSolver(dense_size=size).solve(Counting(matrix), normal(12))
        assert (found.status, found.indefinite) == (Status.LINEAR_SOLVE_FAILED, True)
        assert "not positive definite" in found.message
