"""The iterative solvers one by one: step counts of scipy, preconditioners, breakdowns, indefiniteness."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from implicit import (
    CG,
    GMRES,
    LSMR,
    MINRES,
    BiCGSTAB,
    Dense,
    Jacobi,
    LinearOperator,
    Neumann,
    NormalCG,
    Preconditioner,
    Status,
)
from tests.systems import (
    Counting,
    indefinite,
    name,
    nonsymmetric,
    normal,
    operator,
    orthogonal,
    relative,
    spd,
    symmetric,
)


class StepsOfScipy:
    """A callback that notes the first of scipy's iterates whose true residual is at most ``rtol``."""

    def __init__(self, matrix: Tensor, b: Tensor, rtol: float) -> None:
        self.matrix, self.b, self.rtol = matrix.numpy(), b.numpy(), rtol
        self.calls, self.reached = 0, 0

    def __call__(self, x: np.ndarray) -> None:
        self.calls += 1
        if not self.reached and np.linalg.norm(self.b - self.matrix @ x) <= self.rtol * np.linalg.norm(self.b):
            self.reached = self.calls


def within(found: int, expected: int) -> bool:
    return expected > 0 and abs(found - expected) <= max(1, 0.2 * expected)


# ---------------------------------------------------------------- step counts


@pytest.mark.parametrize(("condition", "rtol"), [(1.0, 1e-8), (1e2, 1e-8), (1e4, 1e-4), (1e4, 1e-8), (1e6, 1e-6)])
@pytest.mark.parametrize("solver", [CG, MINRES], ids=name)
def test_steps_of_scipy_on_definite_systems(solver, condition, rtol) -> None:
    matrix, b = spd(80, condition), normal(80)
    acting = Dense(matrix)
    found = solver(rtol=rtol, max_steps=10_000).solve(acting, b)
    theirs = StepsOfScipy(matrix, b, rtol)
    if solver is CG:
        scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=rtol / 10, atol=0.0, maxiter=10_000, callback=theirs)
    else:
        scipy.sparse.linalg.minres(matrix.numpy(), b.numpy(), rtol=1e-15, maxiter=10_000, callback=theirs)
    assert found.status is Status.CONVERGED
    assert relative(matrix, found.value, b) <= rtol
    assert within(found.steps, theirs.reached)
    assert found.products == acting.products
    # Beyond its steps, only a few products checked the residual.
    assert found.steps < found.products <= found.steps + 3


@pytest.mark.parametrize(("condition", "rtol"), [(10.0, 1e-8), (1e3, 1e-8), (1e4, 1e-6), (1e6, 1e-2)])
def test_minres_takes_the_steps_of_scipy_on_indefinite_systems(condition, rtol) -> None:
    matrix, b = indefinite(60, condition), normal(60)
    found = MINRES(rtol=rtol, max_steps=20_000).solve(operator("indefinite", matrix), b)
    theirs = StepsOfScipy(matrix, b, rtol)
    scipy.sparse.linalg.minres(matrix.numpy(), b.numpy(), rtol=1e-15, maxiter=20_000, callback=theirs)
    assert (found.status, found.indefinite) == (Status.CONVERGED, True)
    assert within(found.steps, theirs.reached)
    assert found.products <= found.steps + 3


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("kind", ["definite", "indefinite", "nonsymmetric"])
def test_full_gmres_takes_the_steps_of_scipy(kind, condition) -> None:
    make = {"definite": spd, "indefinite": indefinite, "nonsymmetric": nonsymmetric}[kind]
    matrix, b = make(100, condition), normal(100)
    norms = []
    scipy.sparse.linalg.gmres(
        matrix.numpy(), b.numpy(), rtol=1e-8, atol=0.0, restart=100, callback=norms.append, callback_type="pr_norm"
    )
    found = GMRES(rtol=1e-8, restart=100).solve(operator(kind, matrix), b)
    assert found.status is Status.CONVERGED
    assert relative(matrix, found.value, b) <= 1e-8
    assert within(found.steps, len(norms))
    assert found.products <= found.steps + 2


@pytest.mark.parametrize(("condition", "restart"), [(10.0, 10), (1e2, 20), (1e3, 30)])
def test_restarted_gmres_takes_the_steps_of_scipy(condition, restart) -> None:
    matrix, b = nonsymmetric(100, condition), normal(100)
    norms = []
    scipy.sparse.linalg.gmres(
        matrix.numpy(),
        b.numpy(),
        rtol=1e-8,
        atol=0.0,
        restart=restart,
        maxiter=200,
        callback=norms.append,
        callback_type="pr_norm",
    )
    found = GMRES(rtol=1e-8, restart=restart, max_steps=5_000).solve(operator("nonsymmetric", matrix), b)
    assert found.status is Status.CONVERGED
    assert within(found.steps, len(norms))
    assert len(norms) > restart
    assert found.products == found.steps + math.ceil(found.steps / restart)  # one per cycle


@pytest.mark.parametrize("shape", [(40, 40), (60, 25), (25, 60)])
def test_lsmr_takes_the_steps_of_scipy(shape) -> None:
    matrix, b = normal(*shape, seed=4) + 3.0 * torch.eye(*shape), normal(shape[0])
    found = LSMR(rtol=1e-8, max_steps=2_000).solve(Dense(matrix, symmetric=False), b)
    theirs = scipy.sparse.linalg.lsmr(matrix.numpy(), b.numpy(), atol=1e-8, btol=1e-8, conlim=0.0, maxiter=2_000)
    assert found.success
    assert within(found.steps, int(theirs[2]))
    np.testing.assert_allclose(found.value.numpy(), theirs[0], atol=1e-5 * float(found.value.norm()))


def test_bicgstab_takes_about_the_steps_of_scipy() -> None:
    matrix, b = nonsymmetric(80, 100.0), normal(80)
    theirs = StepsOfScipy(matrix, b, 1e-8)
    scipy.sparse.linalg.bicgstab(matrix.numpy(), b.numpy(), rtol=1e-10, atol=0.0, callback=theirs)
    found = BiCGSTAB(rtol=1e-8).solve(operator("nonsymmetric", matrix), b)
    assert found.success
    assert within(found.steps, theirs.reached)


def test_normal_cg_is_cg_on_the_normal_equations() -> None:
    matrix, b = nonsymmetric(40, 20.0), normal(40)
    plain = CG(rtol=1e-3, max_steps=12).solve(Dense(matrix.T @ matrix), matrix.T @ b)
    found = NormalCG(rtol=1e-15, max_steps=plain.steps).solve(operator("nonsymmetric", matrix), b)
    torch.testing.assert_close(found.value, plain.value, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- CG


def test_three_by_three_is_solved_exactly_within_three_steps() -> None:
    matrix = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 2.0]])
    for limit in (3, 4, 30):
        found = CG(rtol=1e-12, max_steps=limit).solve(Dense(matrix), torch.tensor([1.0, 2.0, 3.0]))
        assert (found.status, found.steps) == (Status.CONVERGED, 3)


def test_one_row_and_a_block_of_rows_take_the_same_path() -> None:
    """One right-hand side has code of its own."""
    matrix, b = spd(50, 1e3), normal(50)
    for precondition in (None, Jacobi(diagonal=matrix.diag())):
        solver = CG(rtol=1e-9, preconditioner=precondition)
        alone, block = solver.solve(Dense(matrix), b), solver.solve(Dense(matrix), torch.stack([b, -b]), batched=True)
        assert abs(alone.steps - block.steps) <= 1
        torch.testing.assert_close(block.value[0], alone.value, rtol=1e-6, atol=1e-9)


def test_indefinite_operators_are_reported() -> None:
    matrix = spd(20, 10.0)
    shifted = matrix - 5.0 * torch.eye(20)
    for b in (normal(20), normal(2, 20)):
        found = CG().solve(Dense(shifted), b, batched=b.ndim == 2)
        assert (found.status, found.indefinite, found.success) == (Status.LINEAR_SOLVE_FAILED, True, False)
        assert "not positive definite: p.Ap = -" in found.message
        residuals = (b - found.value @ shifted).norm(dim=-1) / b.norm(dim=-1)
        assert found.relative_residual == pytest.approx(float(residuals.max()), rel=1e-6)
        negative = CG().solve(Dense(-torch.eye(20)), b, batched=b.ndim == 2)
        assert (negative.status, negative.value.norm()) == (Status.LINEAR_SOLVE_FAILED, 0.0)
    singular = CG().solve(Dense(torch.diag(torch.tensor([1.0, 0.0]))), torch.tensor([0.0, 1.0]))
    assert (singular.status, singular.indefinite) == (Status.LINEAR_SOLVE_FAILED, True)
    assert CG().solve(Dense(torch.diag(torch.tensor([1.0, 0.0]))), torch.tensor([1.0, 0.0])).success


def test_curvature_at_rounding_level_is_no_direction_to_take() -> None:
    """The first p.Ap is half an eps of ||p|| ||Ap||: its sign says nothing, and a step would be enormous."""
    matrix, b = torch.diag(torch.tensor([1.0, -1.0])), torch.tensor([1.0, 1.0 - 1e-16])
    assert 0 < float(b @ matrix @ b) < 2.3e-16
    for rows in (b, torch.stack([b, b])):
        found = CG(rtol=1e-10).solve(Dense(matrix), rows, batched=rows.ndim == 2)
        assert (found.status, found.indefinite) == (Status.LINEAR_SOLVE_FAILED, True)
        assert float(found.value.norm()) == 0.0


def test_small_curvature_that_is_exact_is_used() -> None:
    """Penalties on very different scales: the condition number is 1e18, and no digit is lost."""
    diagonal = torch.tensor([1e12, 3.0, 1e-6])
    for b in (torch.ones(3), torch.ones(2, 3)):
        found = CG(rtol=1e-10).solve(Dense(torch.diag(diagonal)), b, batched=b.ndim == 2)
        assert found.success
        torch.testing.assert_close(found.value, b / diagonal, rtol=1e-6, atol=0.0)


def test_an_eigenvalue_that_is_noise_is_never_called_solved() -> None:
    for noise in (1e-18, -1e-18):
        matrix = symmetric(torch.tensor([1.0, 2.0, noise]))
        b = matrix @ normal(3) + 1e-3 * orthogonal(3)[:, 2]
        for rows in (b, torch.stack([b, b])):
            found = CG(rtol=1e-10).solve(Dense(matrix), rows, batched=rows.ndim == 2)
            assert not found.success
            assert found.relative_residual >= 1e-4


def test_one_indefinite_row_fails_even_at_the_step_limit_and_the_others_go_on() -> None:
    matrix = torch.diag(torch.cat([torch.linspace(1.0, 30.0, 19), torch.tensor([-1.0])]))
    bad, good = torch.eye(20)[19], torch.cat([torch.ones(19), torch.zeros(1)])
    found = CG(rtol=1e-10).solve(Dense(matrix), torch.stack([bad, good]), batched=True)
    assert (found.status, found.indefinite) == (Status.LINEAR_SOLVE_FAILED, True)
    torch.testing.assert_close(matrix @ found.value[1], good, rtol=0.0, atol=1e-8)
    limited = CG(rtol=1e-10, max_steps=2).solve(Dense(matrix), torch.stack([bad, good]), batched=True)
    assert limited.status is Status.LINEAR_SOLVE_FAILED


def test_drift_is_caught_by_the_true_residual() -> None:
    """At this condition number the recursive residual reaches the tolerance long before the true one."""
    matrix, b = spd(60, 1e5), normal(60)
    found = CG(rtol=1e-12, max_steps=100_000).solve(Dense(matrix), b)
    assert found.success == (relative(matrix, found.value, b) <= 1e-12)
    assert found.status in (Status.CONVERGED, Status.STALLED)
    stalled = CG(rtol=1e-15, max_steps=100_000).solve(Dense(matrix), b)
    assert (stalled.status, stalled.indefinite) == (Status.STALLED, False)
    assert stalled.relative_residual == pytest.approx(relative(matrix, stalled.value, b), rel=1e-3)


# ---------------------------------------------------------------- preconditioners


@dataclass(frozen=True)
class Known(Preconditioner):
    """A given matrix, whatever the operator."""

    matrix: Tensor

    def init(self, operator: LinearOperator):
        return lambda rows: rows @ self.matrix


@pytest.mark.parametrize("solver", [CG, MINRES, GMRES, BiCGSTAB], ids=name)
def test_jacobi_cures_bad_scaling(solver) -> None:
    diagonal = torch.logspace(0, 4, 60)
    scaling = torch.diag(diagonal.sqrt())
    matrix = scaling @ (spd(60, 3.0) if solver in (CG, MINRES) else nonsymmetric(60, 3.0)) @ scaling
    acting, b = Dense(matrix, symmetric=solver in (CG, MINRES)), normal(60)
    plain = solver(rtol=1e-8, max_steps=2_000).solve(acting, b)
    helped = solver(rtol=1e-8, preconditioner=Jacobi(diagonal=diagonal)).solve(acting, b)
    assert relative(matrix, helped.value, b) <= 1e-8
    assert helped.success
    assert helped.steps < 0.4 * plain.steps
    assert helped.products <= (2 if solver is BiCGSTAB else 1) * helped.steps + 3
    exact = solver(preconditioner=Jacobi(diagonal=diagonal)).solve(Counting(torch.diag(diagonal)), b)
    assert (exact.status, exact.steps) == (Status.CONVERGED, 1)


def test_preconditioned_minres_on_an_indefinite_system() -> None:
    values = torch.logspace(0, 5, 50) * torch.where(torch.arange(50) % 2 == 0, 1.0, -1.0)
    matrix, b = symmetric(values), normal(50)
    size = symmetric(values.abs().reciprocal())  # the inverse of |A|: two distinct eigenvalues remain
    found = MINRES(rtol=1e-6, preconditioner=Known(size)).solve(operator("indefinite", matrix), b)
    assert (found.success, found.indefinite) == (True, True)
    assert found.steps <= 5
    near = MINRES(rtol=1e-8, preconditioner=Known(size + 1e-2 * spd(50, 2.0, seed=5))).solve(
        operator("indefinite", matrix), torch.stack([b, b.flip(0)]), batched=True
    )
    assert near.success
    assert near.products <= 2 * (near.steps + 1)  # the estimate of the Euclidean residual was right at once


@pytest.mark.parametrize("solver", [CG, MINRES, GMRES], ids=name)
@pytest.mark.parametrize("rtol", [0.5, 0.2, 0.05, 1e-2, 1e-3, 1e-5])
def test_preconditioned_estimates_are_the_euclidean_residual(solver, rtol) -> None:
    """Neither too early, which would cost a second check, nor too late."""
    matrix = spd(50, 1e3) if solver is CG else indefinite(50, 1e3)
    acting, rows = operator("definite" if solver is CG else "indefinite", matrix), normal(3, 50)
    close = Known(symmetric(1.0 / (1.0 + torch.logspace(0, 3, 50))) + 1e-2 * spd(50, 5.0, seed=4))
    for b in rows:
        found = solver(rtol=rtol, preconditioner=close).solve(acting, b)
        checks = math.ceil(found.steps / 30) if solver is GMRES else 1
        assert (found.status, found.products) == (Status.CONVERGED, found.steps + checks)
        short = solver(rtol=rtol, preconditioner=close, max_steps=max(1, found.steps - 1)).solve(acting, b)
        assert short.status is Status.STEP_LIMIT or found.steps == 1


@pytest.mark.parametrize("solver", [CG, MINRES], ids=name)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_preconditioner_that_is_not_positive_definite_is_named(solver, rows) -> None:
    wrong = Known(torch.diag(torch.tensor([1.0, 1.0, -1.0])))
    found = solver(preconditioner=wrong).solve(Dense(spd(3, 5.0)), normal(rows, 3, seed=3), batched=True)
    assert found.status is Status.LINEAR_SOLVE_FAILED
    assert "preconditioner is not positive definite" in found.message
    assert bool(torch.isfinite(found.value).all())


def test_jacobi_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="diagonal has 2 entries, the operator acts on 3"):
        CG(preconditioner=Jacobi(diagonal=torch.ones(2))).solve(Dense(torch.eye(3)), torch.ones(3))


# ---------------------------------------------------------------- MINRES


def test_minres_reports_negative_curvature_without_failing() -> None:
    for seed in range(5):
        definite = MINRES(rtol=1e-12).solve(operator("indefinite", spd(40, 1e4, seed)), normal(40))
        assert not definite.indefinite
        assert MINRES(rtol=1e-8).solve(operator("indefinite", indefinite(40, 30.0, seed)), normal(40)).indefinite
    negative = MINRES().solve(operator("indefinite", -torch.eye(3)), torch.ones(3))
    assert (negative.success, negative.indefinite, negative.steps) == (True, True, 1)


def test_minres_residuals_fall_in_every_step() -> None:
    matrix, b = indefinite(30, 50.0), normal(30)
    sizes = [
        MINRES(rtol=1e-12, max_steps=steps).solve(operator("indefinite", matrix), b).residual for steps in range(1, 40)
    ]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(sizes))
    krylov = torch.stack([torch.linalg.matrix_power(matrix / 50.0, power) @ b for power in range(8)], dim=1)
    basis = torch.linalg.qr(krylov)[0]
    best = torch.linalg.lstsq(matrix @ basis, b).solution
    assert sizes[7] == pytest.approx(float((b - matrix @ basis @ best).norm()), rel=1e-8)


# ---------------------------------------------------------------- GMRES and BiCGSTAB


def test_gmres_stagnates_on_a_cyclic_shift_until_it_may_keep_all_of_it() -> None:
    matrix = torch.eye(12).roll(1, dims=0)
    b = torch.eye(12)[0]
    short = GMRES(restart=5).solve(operator("nonsymmetric", matrix), b)
    assert (short.status, short.relative_residual) == (Status.STALLED, 1.0)
    assert "stagnates" in short.message
    assert "raise restart" in short.message
    full = GMRES(restart=12).solve(operator("nonsymmetric", matrix), b)
    assert (full.status, full.steps) == (Status.CONVERGED, 12)
    assert torch.equal(full.value, torch.eye(12)[11])


def test_gmres_names_a_breakdown() -> None:
    nilpotent = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    found = GMRES().solve(operator("nonsymmetric", nilpotent), torch.tensor([1.0, 0.0]))
    assert (found.status, float(found.value.norm())) == (Status.LINEAR_SOLVE_FAILED, 0.0)
    assert "GMRES broke down in step 1" in found.message
    assert LSMR().solve(operator("nonsymmetric", nilpotent), torch.tensor([1.0, 0.0])).success


def test_gmres_ends_early_where_the_krylov_space_does() -> None:
    matrix = torch.diag(torch.tensor([2.0, 2.0, 2.0, 5.0, 5.0]))
    found = GMRES(rtol=1e-14).solve(operator("nonsymmetric", matrix), torch.ones(5))
    assert (found.status, found.steps) == (Status.CONVERGED, 2)


def test_bicgstab_names_a_breakdown_and_returns_its_best_iterate() -> None:
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    found = BiCGSTAB().solve(operator("nonsymmetric", skew), torch.ones(2))
    assert found.status is Status.LINEAR_SOLVE_FAILED
    assert "BiCGSTAB broke down" in found.message
    assert found.relative_residual <= 1.0
    rough, b = nonsymmetric(60, 30.0), normal(60)  # its residual rises ninefold in step 15
    sizes = [
        BiCGSTAB(max_steps=steps).solve(operator("nonsymmetric", rough), b).relative_residual for steps in range(1, 20)
    ]
    assert all(after <= before for before, after in itertools.pairwise([1.0, *sizes]))


# ---------------------------------------------------------------- Neumann


def test_neumann_is_the_truncated_series() -> None:
    matrix, b = spd(15, 5.0) / 6.0, normal(15)
    for terms in (1, 2, 7):
        found = Neumann(rtol=0.0, step=0.9, max_steps=terms).solve(Dense(matrix), b)
        remainder = torch.eye(15) - 0.9 * matrix
        expected = 0.9 * sum(torch.linalg.matrix_power(remainder, power) @ b for power in range(terms))
        torch.testing.assert_close(found.value, expected, rtol=1e-12, atol=1e-13)
        assert (found.status, found.steps, found.products) == (Status.STEP_LIMIT, terms, terms + 1)


def test_neumann_measures_its_step() -> None:
    matrix, b = spd(50, 8.0), normal(50)
    found = Neumann().solve(Dense(matrix), b)
    assert found.success
    assert found.products == found.steps + 1 + 20
    best = Neumann(step=1.0 / 8.0).solve(Dense(matrix), b)
    assert best.steps <= found.steps <= 1.5 * best.steps
    prepared = Neumann().init(Dense(matrix))
    assert 1 / 16 < prepared <= 1 / 8
    skewed = nonsymmetric(50, 8.0)
    assert Neumann().init(operator("nonsymmetric", skewed)) <= 1 / float(torch.linalg.matrix_norm(skewed, 2))
    assert Neumann().solve(Dense(torch.zeros(3, 3)), torch.zeros(3)).success


def test_neumann_reports_divergence() -> None:
    matrix, b = spd(20, 10.0), normal(20)
    fast = Neumann(step=1.0).solve(Dense(matrix), b)
    assert fast.status is Status.LINEAR_SOLVE_FAILED
    assert "diverges" in fast.message
    slow = Neumann(step=0.2002, max_steps=200).solve(Dense(matrix), b * 0 + torch.linalg.eigh(matrix)[1][:, -1])
    assert (slow.status, slow.steps) == (Status.LINEAR_SOLVE_FAILED, 200)
    lasting = Neumann(max_steps=500).solve(operator("indefinite", indefinite(20, 10.0)), b)
    assert lasting.status is Status.LINEAR_SOLVE_FAILED


def test_neumann_survives_growth_that_passes() -> None:
    """Far from normal: the powers of I - A grow a thousandfold before they vanish."""
    shift = torch.diag(torch.full((11,), 4.0), 1)
    found = Neumann(step=1.0, rtol=1e-10).solve(operator("nonsymmetric", torch.eye(12) - shift), torch.ones(12))
    assert (found.status, found.steps) == (Status.CONVERGED, 12)


def test_settings_of_single_solvers() -> None:
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"step must be None or a positive number, got {bad}"):
            Neumann(step=bad)
    for bad in (0, 2.5, None):
        with pytest.raises(ValueError, match=f"restart must be a positive integer, got {bad}"):
            GMRES(restart=bad)
