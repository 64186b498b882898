"""Iterative solvers on systems without a unique solution: singular and rectangular ones."""

import pytest
import torch
from torch import Tensor

from implicit import CG, GMRES, LSMR, MINRES, BiCGSTAB, Dense, Neumann, NormalCG, Status
from tests.systems import name, normal, operator, orthogonal, relative, symmetric


def singular_systems() -> tuple[Tensor, Tensor, Tensor]:
    """A symmetric matrix of rank 40 of 46, a b in its range, and one that is not."""
    signs = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)
    matrix = symmetric(torch.cat([torch.zeros(6), torch.linspace(1.0, 40.0, 40) * signs]))
    return matrix, matrix @ normal(46), normal(46, seed=2)


@pytest.mark.parametrize("solver", [MINRES, LSMR, NormalCG], ids=name)
def test_singular_systems_have_the_answer_of_the_pseudo_inverse(solver) -> None:
    matrix, inside, outside = singular_systems()
    inverse = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10)
    made = solver(rtol=1e-10, max_steps=5_000)
    found = made.solve(operator("indefinite", matrix), inside)
    assert (found.status, found.singular) == (Status.CONVERGED, False)
    torch.testing.assert_close(found.value, inverse @ inside, rtol=0.0, atol=1e-8)
    left = made.solve(operator("indefinite", matrix), outside)
    expected = inverse @ outside
    assert (left.status, left.singular) == (Status.STALLED, True)
    torch.testing.assert_close(left.value, expected, rtol=0.0, atol=1e-6)
    best = float((outside - matrix @ expected).norm() / outside.norm())
    assert left.relative_residual == pytest.approx(best, rel=1e-9)
    assert "the operator is singular and the system has no solution" in left.message
    assert f"relative residual {best:.3g}" in left.message
    both = made.solve(operator("indefinite", matrix), torch.stack([inside, outside]), batched=True)
    assert (both.status, both.singular) == (Status.STALLED, True)
    torch.testing.assert_close(both.value, torch.stack([inverse @ inside, expected]), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("solver", [MINRES, LSMR, NormalCG], ids=name)
def test_nothing_of_b_is_in_the_range(solver) -> None:
    matrix = torch.diag(torch.tensor([1.0, -2.0, 0.0]))
    found = solver().solve(operator("indefinite", matrix), torch.tensor([0.0, 0.0, 5.0]))
    assert (found.status, found.singular, found.relative_residual) == (Status.STALLED, True, 1.0)
    assert torch.equal(found.value, torch.zeros(3))
    zero = solver().solve(operator("indefinite", torch.zeros(3, 3)), torch.ones(3))
    assert (zero.status, float(zero.value.norm())) == (Status.STALLED, 0.0)


@pytest.mark.parametrize("solver", [CG, MINRES, GMRES, BiCGSTAB], ids=name)
def test_semidefinite_systems_with_b_in_the_range(solver) -> None:
    matrix = symmetric(torch.cat([torch.zeros(5), torch.linspace(1.0, 20.0, 25)]))
    b = matrix @ normal(30)
    found = solver(rtol=1e-9).solve(Dense(matrix), b)
    assert found.success
    torch.testing.assert_close(found.value, torch.linalg.pinv(matrix, rtol=1e-10) @ b, rtol=0.0, atol=1e-6)


def test_gmres_does_not_follow_the_null_space() -> None:
    """It cannot tell that there is no solution, but comes as near to one as there is, at a sensible size."""
    matrix, _, outside = singular_systems()
    best = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ outside
    found = GMRES(restart=46).solve(operator("nonsymmetric", matrix), outside)
    assert not found.success
    assert found.residual == pytest.approx(float((outside - matrix @ best).norm()), rel=1e-6)
    assert float(found.value.norm()) < 10 * float(best.norm())


@pytest.mark.parametrize("solver", [LSMR, NormalCG], ids=name)
def test_singular_nonsymmetric_systems(solver) -> None:
    left, right = orthogonal(30, seed=1), orthogonal(30, seed=2)
    matrix = (left[:, :24] * torch.linspace(1.0, 10.0, 24)) @ right[:, :24].T
    for b, status in ((matrix @ normal(30), Status.CONVERGED), (normal(30), Status.STALLED)):
        found = solver(rtol=1e-10, max_steps=2_000).solve(operator("nonsymmetric", matrix), b)
        assert (found.status, found.singular) == (status, status is Status.STALLED)
        torch.testing.assert_close(found.value, torch.linalg.pinv(matrix, rtol=1e-10) @ b, rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("solver", [CG, MINRES, GMRES, BiCGSTAB, Neumann], ids=name)
def test_no_solution_is_never_called_success(solver) -> None:
    matrix = symmetric(torch.cat([torch.zeros(4), torch.linspace(1.0, 9.0, 16)]))
    b = normal(20)
    found = solver(max_steps=2_000).solve(Dense(matrix), b)
    assert not found.success
    assert found.relative_residual == pytest.approx(relative(matrix, found.value, b), rel=1e-3)
    assert float(found.value.norm()) < 1e6 or solver is CG


# ---------------------------------------------------------------- rectangular systems


@pytest.mark.parametrize("solver", [LSMR, NormalCG], ids=name)
@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_rectangular_systems_are_solved_by_least_squares(solver, shape) -> None:
    matrix, b = normal(*shape, seed=3), normal(4, shape[0])
    b = b * torch.tensor([1.0, 1e-20, 0.0, 1e12])[:, None]
    b[0] = matrix @ normal(shape[1])  # this one has a solution, the others do where there are more columns than rows
    found = solver(rtol=1e-10).solve(Dense(matrix), b, batched=True)
    assert (found.status, found.singular) == (Status.CONVERGED, False)
    expected = torch.linalg.lstsq(matrix, b.T, driver="gelsd").solution.T
    for row, (own, other) in enumerate(zip(found.value, expected, strict=True)):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-8 * float(other.norm()), msg=f"row {row}")
    residuals = (b - found.value @ matrix.T).norm(dim=1)
    assert found.residual == pytest.approx(float(residuals.max()), rel=1e-6, abs=1e-14 * float(b.norm()))


def test_a_least_squares_answer_says_so() -> None:
    matrix = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    found = LSMR().solve(Dense(matrix), torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(found.value, torch.ones(2))
    assert found.residual == pytest.approx(3.0)
    assert found.success
    assert found.message.startswith("least-squares solution in 2 steps, relative residual 0.802")
    short = LSMR(max_steps=1).solve(Dense(matrix), torch.tensor([1.0, 2.0, 3.0]))
    assert short.status is Status.STEP_LIMIT


@pytest.mark.parametrize("solver", [LSMR, NormalCG], ids=name)
def test_the_worst_row_decides_the_status(solver) -> None:
    matrix = torch.cat([torch.diag(torch.linspace(1.0, 9.0, 8)), torch.zeros(1, 8)])
    quick, slow = torch.eye(9)[0] + torch.eye(9)[8], torch.ones(9)
    found = solver(max_steps=3).solve(Dense(matrix), torch.stack([quick, slow]), batched=True)
    assert (found.status, found.steps) == (Status.STEP_LIMIT, 3)
    torch.testing.assert_close(found.value[0], torch.eye(8)[0])
    assert solver(max_steps=3).solve(Dense(matrix), quick).message.startswith("least-squares solution in 1 steps")


def test_rectangular_operators_between_trees() -> None:
    like, out = {"a": torch.zeros(2), "b": torch.zeros(())}, {"r": torch.zeros(2, 2)}
    matrix = normal(4, 3, seed=8)
    b = {"r": normal(2, 2)}
    found = LSMR(rtol=1e-12).solve(Dense(matrix, like, out), b, x0={"b": torch.ones(()), "a": torch.ones(2)})
    flat = torch.cat([found.value["a"], found.value["b"].reshape(1)])
    torch.testing.assert_close(flat, torch.linalg.lstsq(matrix, b["r"].reshape(-1)).solution, rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match="different structures"):
        LSMR().solve(Dense(matrix, like, out), like)
