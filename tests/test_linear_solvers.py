"""Linear solvers against dense algebra and scipy; residuals are always recomputed from the matrix itself."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from implicit import CG, LU, Cholesky, Dense, Hessian, Jacobi, LinearOperator, Shifted, Status


def spd(n: int, condition: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
    matrix = (q * torch.logspace(0, math.log10(condition), n)) @ q.T
    return 0.5 * (matrix + matrix.T)


def vector(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def true_relative(matrix: Tensor, x: Tensor, b: Tensor) -> float:
    return float((b - matrix @ x).norm() / b.norm())


class Counting(LinearOperator):
    """A diagonal operator that records how many rows each product took."""

    symmetric = positive_definite = True

    def __init__(self, diagonal):
        super().__init__(torch.zeros_like(diagonal))
        self.diagonal = diagonal

    def mv(self, v):
        return self.diagonal * v


# ---------------------------------------------------------------- CG


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("rtol", [1e-4, 1e-8])
def test_cg_takes_the_steps_of_scipy_and_means_what_it_reports(condition, rtol) -> None:
    matrix, b = spd(150, condition), vector(150)
    operator = Dense(matrix)
    found = CG(rtol=rtol, max_steps=10_000).solve(operator, b)
    calls = []
    scipy.sparse.linalg.cg(
        matrix.numpy(), b.numpy(), rtol=rtol, atol=0.0, maxiter=10_000, callback=lambda _: calls.append(1)
    )
    assert found.status is Status.CONVERGED
    assert found.success
    assert true_relative(matrix, found.value, b) <= rtol
    assert found.relative_residual == pytest.approx(true_relative(matrix, found.value, b), rel=1e-6)
    assert found.residual == pytest.approx(found.relative_residual * float(b.norm()), rel=1e-9)
    assert abs(found.steps - len(calls)) <= max(1, 0.2 * len(calls))
    assert found.products == operator.products
    # Beyond its steps, only a few products checked the residual.
    assert found.steps < found.products <= found.steps + 3


@pytest.mark.parametrize("condition", [1e1, 1e3])
def test_cg_solution_is_the_dense_one(condition) -> None:
    matrix, b = spd(60, condition), vector(60)
    found = CG(rtol=1e-13).solve(Dense(matrix), b)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-11)


def test_status_never_depends_on_the_step_count() -> None:
    matrix, b = spd(40, 100.0), vector(40)
    needed = CG(rtol=1e-8).solve(Dense(matrix), b).steps
    exact = CG(rtol=1e-8, max_steps=needed).solve(Dense(matrix), b)
    assert (exact.status, exact.steps) == (Status.CONVERGED, needed)
    short = CG(rtol=1e-8, max_steps=needed - 1).solve(Dense(matrix), b)
    assert (short.status, short.steps) == (Status.STEP_LIMIT, needed - 1)
    assert short.relative_residual == pytest.approx(true_relative(matrix, short.value, b), rel=1e-6)
    assert short.relative_residual > 1e-8
    identity = CG(max_steps=1).solve(Dense(torch.eye(5)), vector(5))
    assert (identity.status, identity.steps, identity.residual) == (Status.CONVERGED, 1, 0.0)


def test_three_by_three_is_solved_exactly_within_three_steps() -> None:
    matrix = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 2.0]])
    for limit in (3, 4, 30):
        found = CG(rtol=1e-12, max_steps=limit).solve(Dense(matrix), torch.tensor([1.0, 2.0, 3.0]))
        assert (found.status, found.steps) == (Status.CONVERGED, 3)


def test_many_right_hand_sides_of_very_different_size() -> None:
    matrix, b = spd(50, 1e3), vector(5, 50)
    b = b * torch.tensor([1.0, 1e-12, 0.0, 1e9, 1e-150])[:, None]
    operator = Dense(matrix)
    found = CG(rtol=1e-9).solve(operator, b, batched=True)
    assert found.status is Status.CONVERGED
    assert torch.equal(found.value[2], torch.zeros(50))
    residuals = (b - found.value @ matrix).norm(dim=1)
    for i in (0, 1, 3, 4):
        assert true_relative(matrix, found.value[i] / b[i].norm(), b[i] / b[i].norm()) <= 1e-9
        alone = CG(rtol=1e-9).solve(Dense(matrix), b[i])
        torch.testing.assert_close(found.value[i], alone.value, rtol=1e-6, atol=0.0)
    assert found.residual == pytest.approx(float(residuals.max()), rel=1e-6)
    assert found.relative_residual <= 1e-9
    assert found.products == operator.products < 5 * (found.steps + 1)  # finished rows cost nothing


def test_converged_rows_are_frozen() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 1e5, 3e5]))
    easy, hard = torch.eye(6)[0] * 5.0, torch.ones(6)
    found = CG(rtol=1e-10).solve(Dense(matrix), torch.stack([easy, hard]), batched=True)
    assert found.status is Status.CONVERGED
    assert 6 <= found.steps <= 9
    assert torch.equal(found.value[0], easy)


def test_exact_zeros_in_the_right_hand_side_and_zero_itself() -> None:
    matrix, b = spd(30, 50.0), vector(30)
    b[::2] = 0.0
    found = CG(rtol=1e-10).solve(Dense(matrix), b)
    assert true_relative(matrix, found.value, b) <= 1e-10
    operator = Dense(matrix)
    for start in (None, vector(30)):
        zero = CG().solve(operator, torch.zeros(30), x0=start)
        assert (zero.status, zero.steps, zero.residual, zero.relative_residual) == (Status.CONVERGED, 0, 0.0, 0.0)
        assert torch.equal(zero.value, torch.zeros(30))


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_scaling_the_right_hand_side_changes_nothing(size) -> None:
    matrix, b = spd(30, 1e3), vector(30)
    plain, scaled = CG(rtol=1e-8).solve(Dense(matrix), b), CG(rtol=1e-8).solve(Dense(matrix), b * size)
    assert (scaled.status, scaled.indefinite) == (Status.CONVERGED, False)
    assert abs(scaled.steps - plain.steps) <= 0.1 * plain.steps
    torch.testing.assert_close(scaled.value / size, plain.value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e20, 1e30])
def test_scaling_in_float32(size) -> None:
    matrix, b = spd(30, 1e2).float(), vector(30).float()
    found = CG().solve(Dense(matrix), b * size)
    assert found.status is Status.CONVERGED
    scaled = found.value.double() / size
    assert found.value.dtype == torch.float32
    assert true_relative(matrix.double(), scaled, b.double()) <= 4e-4


def test_default_tolerance_is_the_root_of_the_precision() -> None:
    for dtype, rtol in ((torch.float64, 1.5e-8), (torch.float32, 3.5e-4)):
        matrix, b = spd(80, 1e4).to(dtype), vector(80).to(dtype)
        found = CG().solve(Dense(matrix), b)
        assert found.status is Status.CONVERGED
        assert rtol / 100 < true_relative(matrix.double(), found.value.double(), b.double()) < 1.1 * rtol


def test_absolute_tolerance_and_the_larger_of_both() -> None:
    matrix, b = spd(50, 1e3), vector(50)
    b = b / b.norm()
    loose = CG(rtol=1e-12, atol=1e-2).solve(Dense(matrix), b)
    assert loose.success
    assert 1e-12 < loose.residual <= 1e-2
    assert CG(rtol=1e-2, atol=1e-12).solve(Dense(matrix), b).steps == loose.steps
    small = CG(rtol=0.0, atol=1e-2).solve(Dense(matrix), 1e-3 * b)
    assert (small.status, small.steps, float(small.value.norm())) == (Status.CONVERGED, 0, 0.0)


def test_indefinite_operators_are_reported() -> None:
    matrix = spd(20, 10.0)
    shifted = matrix - 5.0 * torch.eye(20)
    found = CG().solve(Dense(shifted), vector(20))
    assert (found.status, found.indefinite, found.success) == (Status.LINEAR_SOLVE_FAILED, True, False)
    assert "not positive definite: p.Ap = -" in found.message
    assert found.relative_residual == pytest.approx(true_relative(shifted, found.value, vector(20)), rel=1e-6)
    negative = CG().solve(Dense(-torch.eye(3)), torch.ones(3))
    assert (negative.status, negative.steps, float(negative.value.norm())) == (Status.LINEAR_SOLVE_FAILED, 0, 0.0)
    singular = CG().solve(Dense(torch.diag(torch.tensor([1.0, 0.0]))), torch.tensor([0.0, 1.0]))
    assert (singular.status, singular.indefinite) == (Status.LINEAR_SOLVE_FAILED, True)
    assert CG().solve(Dense(torch.diag(torch.tensor([1.0, 0.0]))), torch.tensor([1.0, 0.0])).success


def test_one_indefinite_row_fails_even_at_the_step_limit_and_the_others_go_on() -> None:
    matrix = torch.diag(torch.cat([torch.linspace(1.0, 30.0, 19), torch.tensor([-1.0])]))
    bad, good = torch.eye(20)[19], torch.cat([torch.ones(19), torch.zeros(1)])
    found = CG(rtol=1e-10).solve(Dense(matrix), torch.stack([bad, good]), batched=True)
    assert (found.status, found.indefinite) == (Status.LINEAR_SOLVE_FAILED, True)
    torch.testing.assert_close(matrix @ found.value[1], good, rtol=0.0, atol=1e-8)
    limited = CG(rtol=1e-10, max_steps=2).solve(Dense(matrix), torch.stack([bad, good]), batched=True)
    assert limited.status is Status.LINEAR_SOLVE_FAILED


@pytest.mark.parametrize("rtol", [0.0, 1e-17, 1e-15])
def test_rounding_level_is_a_stall_and_not_an_endless_run(rtol) -> None:
    matrix, b = spd(60, 1e5), vector(60)
    operator = Dense(matrix)
    found = CG(rtol=rtol, max_steps=100_000).solve(operator, b)
    assert (found.status, found.indefinite) == (Status.STALLED, False)
    assert found.relative_residual < 1e-9
    assert found.relative_residual == pytest.approx(true_relative(matrix, found.value, b), rel=1e-3)
    assert operator.products < 2_000


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite(bad) -> None:
    matrix, b = spd(5, 10.0), vector(5)
    b[2] = bad
    for solver in (CG(), Cholesky(), LU()):
        assert solver.solve(Dense(matrix), b).status is Status.NONFINITE
    broken = matrix.clone()
    broken[1, 1] = bad
    for solver in (CG(), Cholesky(), LU()):
        found = solver.solve(Dense(broken), vector(5))
        assert found.status is Status.NONFINITE
        assert not found.indefinite
        assert bool(torch.isfinite(found.value).all())


def test_a_warm_start_saves_steps_and_a_bad_one_is_dropped() -> None:
    matrix, b = spd(60, 1e3), vector(60)
    solver = CG(rtol=1e-8)
    cold = solver.solve(Dense(matrix), b)
    solution = torch.linalg.solve(matrix, b)
    warm = solver.solve(Dense(matrix), b, x0=solution + 1e-7 * vector(60, seed=2))
    assert warm.success
    assert warm.steps < 0.6 * cold.steps
    perfect = solver.solve(Dense(matrix), b, x0=solution)
    assert (perfect.steps, perfect.products) == (0, 1)
    bad_starts = (1e6 * vector(60), torch.full((60,), math.nan), torch.full((60,), math.inf), torch.full((60,), 1e308))
    for bad in bad_starts:
        found = solver.solve(Dense(matrix), b, x0=bad)
        assert (found.status, found.steps) == (Status.CONVERGED, cold.steps)
        assert torch.equal(found.value, cold.value)
    start = vector(60)
    before = start.clone()
    solver.solve(Dense(matrix), b, x0=start)
    assert torch.equal(start, before)


def test_each_row_judges_its_own_warm_start() -> None:
    matrix, b = spd(30, 1e2), vector(2, 30)
    start = torch.stack([torch.linalg.solve(matrix, b[0]), 1e9 * torch.ones(30)])
    found = CG(rtol=1e-8).solve(Dense(matrix), b, x0=start, batched=True)
    assert found.success
    assert torch.equal(found.value[0], start[0])


def test_jacobi_cures_bad_scaling() -> None:
    diagonal = torch.logspace(0, 6, 60)
    matrix = torch.diag(diagonal.sqrt()) @ spd(60, 3.0) @ torch.diag(diagonal.sqrt())
    b = vector(60)
    plain = CG(rtol=1e-8).solve(Dense(matrix), b)
    helped = CG(rtol=1e-8, preconditioner=Jacobi(diagonal=matrix.diag())).solve(Dense(matrix), b)
    assert true_relative(matrix, helped.value, b) <= 1e-8
    assert helped.steps < 0.25 * plain.steps
    exact = CG(preconditioner=Jacobi(diagonal=diagonal)).solve(Counting(diagonal), b)
    assert (exact.status, exact.steps) == (Status.CONVERGED, 1)


def test_jacobi_refuses_what_is_not_positive_or_does_not_fit() -> None:
    for bad in (torch.tensor([1.0, 0.0]), torch.tensor([1.0, math.nan]), {"a": torch.tensor([-1.0])}):
        with pytest.raises(ValueError, match="diagonal must be positive everywhere"):
            Jacobi(diagonal=bad)
    with pytest.raises(ValueError, match="diagonal has 2 entries, the operator acts on 3"):
        CG(preconditioner=Jacobi(diagonal=torch.ones(2))).solve(Dense(torch.eye(3)), torch.ones(3))


# ---------------------------------------------------------------- trees


def tree_problem():
    like = {"w": torch.zeros(2, 3), "none": torch.zeros(0, 4), "parts": [torch.zeros(()), torch.zeros(5)]}
    return like, Dense(spd(12, 20.0), like)


@pytest.mark.parametrize("solver", [CG(rtol=1e-12), Cholesky(), LU()], ids=lambda s: type(s).__name__)
def test_nested_trees_with_empty_leaves(solver) -> None:
    _, operator = tree_problem()
    b = {"parts": [torch.tensor(1.0), vector(5)], "none": torch.zeros(0, 4), "w": vector(2, 3)}  # another key order
    found = solver.solve(operator, b)
    flat = torch.cat([b["w"].reshape(-1), b["parts"][0].reshape(1), b["parts"][1]])
    ordered = [found.value["w"].reshape(-1), found.value["parts"][0].reshape(1), found.value["parts"][1]]
    assert found.value["none"].shape == (0, 4)
    torch.testing.assert_close(torch.cat(ordered), torch.linalg.solve(operator.matrix, flat), rtol=1e-10, atol=1e-11)
    many = {"w": vector(4, 2, 3), "none": torch.zeros(4, 0, 4), "parts": [vector(4), vector(4, 5)]}
    block = solver.solve(operator, many, batched=True)
    assert block.success
    assert block.value["parts"][0].shape == (4,)
    one = solver.solve(operator, {"w": many["w"][2], "none": many["none"][2], "parts": [m[2] for m in many["parts"]]})
    torch.testing.assert_close(block.value["w"][2], one.value["w"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", [CG(), Cholesky(), LU()], ids=lambda s: type(s).__name__)
def test_nothing_to_solve(solver) -> None:
    empty = solver.solve(Dense(torch.zeros(0, 0)), torch.zeros(0))
    assert (empty.status, empty.residual, empty.value.shape) == (Status.CONVERGED, 0.0, (0,))
    none = solver.solve(Dense(torch.eye(3)), torch.zeros(0, 3), batched=True)
    assert (none.status, none.residual, none.value.shape) == (Status.CONVERGED, 0.0, (0, 3))


def test_right_hand_sides_that_do_not_fit_are_refused() -> None:
    like, operator = tree_problem()
    transposed = {"w": torch.zeros(3, 2), "none": torch.zeros(0, 4), "parts": [torch.zeros(()), torch.zeros(5)]}
    with pytest.raises(ValueError, match=r"b is .*\['w'\] \(3, 2\).*the operator acts on .*\['w'\] \(2, 3\)"):
        CG().solve(operator, transposed)
    with pytest.raises(ValueError, match="x0 is "):
        CG().solve(operator, like, x0=transposed)
    with pytest.raises(ValueError, match="different structures"):
        CG().solve(operator, torch.zeros(12))
    with pytest.raises(ValueError, match=r"torch.float32.*the operator acts on .*torch.float64"):
        CG().solve(Dense(torch.eye(2)), torch.zeros(2, dtype=torch.float32))
    with pytest.raises(ValueError, match="with a leading axis"):
        CG().solve(Dense(torch.eye(2)), torch.tensor(1.0), batched=True)
    with pytest.raises(ValueError, match="b is "):
        CG().solve(Dense(torch.eye(2)), torch.zeros(2), batched=True)


# ---------------------------------------------------------------- dense factorisations


@pytest.mark.parametrize("condition", [1e1, 1e6, 1e10])
def test_cholesky_and_lu_are_exact(condition) -> None:
    matrix, b = spd(40, condition), vector(3, 40)
    expected = torch.linalg.solve(matrix, b.T).T
    for solver in (Cholesky(rtol=1e-6), LU(rtol=1e-6)):
        operator = Dense(matrix)
        found = solver.solve(operator, b, batched=True)
        assert found.success
        assert (found.products, operator.products) == (40, 40)
        assert float((found.value - expected).norm() / expected.norm()) <= 1e-15 * condition + 1e-13
        assert found.residual == pytest.approx(float((b - found.value @ matrix).norm(dim=1).max()), rel=0.5, abs=1e-13)


def test_lu_solves_nonsymmetric_and_indefinite_systems() -> None:
    matrix, b = vector(25, 25, seed=5), vector(25)
    found = LU().solve(Dense(matrix, symmetric=False), b)
    assert found.success
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-10)
    transposed = LU().solve(Dense(matrix, symmetric=False).T, b)
    torch.testing.assert_close(transposed.value, torch.linalg.solve(matrix.T, b), rtol=1e-9, atol=1e-10)


def test_cholesky_reports_what_is_not_positive_definite() -> None:
    indefinite = spd(10, 10.0) - 3.0 * torch.eye(10)
    found = Cholesky().solve(Dense(indefinite), vector(10))
    assert (found.status, found.indefinite) == (Status.LINEAR_SOLVE_FAILED, True)
    assert float(found.value.norm()) == 0.0
    assert found.residual == pytest.approx(float(vector(10).norm()))
    assert LU().solve(Dense(indefinite), vector(10)).success


def test_lu_reports_singular_systems() -> None:
    singular = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    found = LU().solve(Dense(singular), torch.ones(3))
    assert (found.status, found.indefinite, found.singular) == (Status.STALLED, False, True)
    assert "singular" in found.message
    assert found.relative_residual == pytest.approx(3**-0.5)


@pytest.mark.parametrize("solver", [Cholesky(), LU()], ids=lambda s: type(s).__name__)
def test_hopeless_conditioning_is_not_success(solver) -> None:
    grid = torch.arange(1.0, 16.0)
    hilbert = 1.0 / (grid[:, None] + grid[None, :] - 1.0) + 1e-16 * torch.eye(15)
    b = vector(15)
    found = solver.solve(Dense(hilbert), b)
    measured = true_relative(hilbert, found.value, b) if found.status is not Status.LINEAR_SOLVE_FAILED else 1.0
    assert found.success == (measured <= 1.5e-8)
    assert not found.success


def test_factorisation_limits_and_settings() -> None:
    with pytest.raises(ValueError, match=r"Cholesky would form a 3 x 3 matrix, above max_size=2; use CG, or raise"):
        Cholesky(max_size=2).solve(Dense(torch.eye(3)), torch.ones(3))
    with pytest.raises(ValueError, match=r"LU would form a 3 x 3 matrix, above max_size=2; use an iterative"):
        LU(max_size=2).solve(Dense(torch.eye(3)), torch.ones(3))
    for solver in (Cholesky, LU):
        for size in (0, None, 2.5, True):
            with pytest.raises(ValueError, match="max_size must be a positive integer"):
                solver(max_size=size)
    for bad in ({"rtol": -1.0}, {"rtol": math.nan}, {"atol": -1e-3}, {"atol": math.nan}, {"max_steps": 0}):
        name = next(iter(bad))
        with pytest.raises(ValueError, match=f"{name} must be"):
            CG(**bad)
    with pytest.raises(ValueError, match=r"max_steps must be None or a positive integer, got 1\.5"):
        CG(max_steps=1.5)


# ---------------------------------------------------------------- with real operators


def test_newton_system_of_a_logistic_model_against_scipy() -> None:
    features, labels = vector(80, 12, seed=3), torch.sign(vector(80, seed=4))

    def loss(y):
        return torch.nn.functional.softplus(-labels * (features @ y)).sum() + 0.05 * y @ y

    hessian = Hessian(loss, 0.1 * vector(12))
    b = vector(12, seed=6)
    dense = torch.func.hessian(loss)(0.1 * vector(12))
    expected, info = scipy.sparse.linalg.cg(hessian.to_scipy(), b.numpy(), rtol=1e-12, atol=0.0)
    assert info == 0
    for solver in (CG(rtol=1e-12), Cholesky(), LU()):
        found = solver.solve(hessian, b)
        assert true_relative(dense, found.value, b) < 1e-11
        np.testing.assert_allclose(found.value.numpy(), expected, rtol=1e-8, atol=1e-10)
        assert not found.value.requires_grad


def test_damping_makes_an_indefinite_system_solvable() -> None:
    matrix, b = spd(15, 10.0) - 3.0 * torch.eye(15), vector(15)
    assert CG().solve(Dense(matrix), b).status is Status.LINEAR_SOLVE_FAILED
    found = CG(rtol=1e-12).solve(Shifted(Dense(matrix), 4.0), b)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix + 4.0 * torch.eye(15), b), rtol=1e-9, atol=1e-10)
