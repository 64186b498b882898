"""What every linear solver promises, on every kind of system it is made for; residuals come from the matrix."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from implicit import (
    CG,
    GMRES,
    LDLT,
    LSMR,
    LU,
    MINRES,
    AutoSolver,
    BiCGSTAB,
    Cholesky,
    Dense,
    Hessian,
    Neumann,
    NormalCG,
    Shifted,
    Status,
)
from tests.systems import DIRECT, ITERATIVE, KINDS, MATRICES, PAIRS, Counting, name, normal, operator, relative, spd

pairs = pytest.mark.parametrize(("solver", "kind"), PAIRS, ids=name)
iterative = pytest.mark.parametrize(("solver", "kind"), ITERATIVE, ids=name)


def settings(solver: type, rtol: float | None = 1e-9) -> dict[str, object]:
    """Enough steps for methods that square the condition number."""
    return {"rtol": rtol} if solver in DIRECT else {"rtol": rtol, "max_steps": 20_000}


# ---------------------------------------------------------------- the residual and what is said about it


@pairs
def test_the_residual_asked_for_is_reached_and_reported(solver, kind) -> None:
    matrix, b = MATRICES[kind](40, 30.0), normal(40)
    found = solver(**settings(solver)).solve(operator(kind, matrix), b)
    assert (found.status, found.success) == (Status.CONVERGED, True)
    assert relative(matrix, found.value, b) <= 1e-9
    assert found.relative_residual == pytest.approx(relative(matrix, found.value, b), rel=1e-3, abs=1e-14)
    assert found.residual == pytest.approx(found.relative_residual * float(b.norm()), rel=1e-9)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-7)
    assert found.method.startswith(solver.__name__ if solver is not AutoSolver else ("Cholesky", "LDLT", "LU"))
    assert not found.singular
    assert not found.value.requires_grad


@pairs
def test_the_default_tolerance_is_the_root_of_the_precision(solver, kind) -> None:
    for dtype, rtol in ((torch.float64, 1.5e-8), (torch.float32, 3.5e-4)):
        matrix, b = MATRICES[kind](40, 30.0).to(dtype), normal(40).to(dtype)
        found = solver(**settings(solver, None)).solve(operator(kind, matrix), b)
        assert (found.status, found.value.dtype) == (Status.CONVERGED, dtype)
        measured = relative(matrix, found.value, b)
        assert measured < 1.1 * rtol
        assert solver in DIRECT or measured > rtol / 1000


@pairs
def test_rounding_level_is_a_stall_and_not_an_endless_run(solver, kind) -> None:
    matrix, b = MATRICES[kind](30, 20.0), normal(30)
    for rtol in (0.0, 1e-17):
        counting = operator(kind, matrix)
        found = solver(rtol=rtol).solve(counting, b)
        assert found.status in (Status.STALLED, Status.STEP_LIMIT)
        assert found.status is Status.STALLED or solver is Neumann
        assert (found.singular, "rounding" in found.message or "ill-cond" in found.message) == (
            False,
            solver != Neumann,
        )
        assert found.relative_residual < 1e-13 or solver is Neumann
        assert found.relative_residual == pytest.approx(relative(matrix, found.value, b), rel=1e-3, abs=1e-15)
        assert counting.products < 2_000


@iterative
def test_status_never_depends_on_the_step_count(solver, kind) -> None:
    matrix, b = MATRICES[kind](30, 20.0), normal(30)
    needed = solver(rtol=1e-8, max_steps=10_000).solve(operator(kind, matrix), b).steps
    exact = solver(rtol=1e-8, max_steps=needed).solve(operator(kind, matrix), b)
    assert (exact.status, exact.steps) == (Status.CONVERGED, needed)
    short = solver(rtol=1e-8, max_steps=needed - 1).solve(operator(kind, matrix), b)
    assert (short.status, short.steps) == (Status.STEP_LIMIT, needed - 1)
    assert short.relative_residual == pytest.approx(relative(matrix, short.value, b), rel=1e-6)
    assert short.relative_residual > 1e-8
    assert str(needed - 1) in short.message


@pairs
def test_absolute_tolerance_and_the_larger_of_both(solver, kind) -> None:
    matrix, b = MATRICES[kind](30, 20.0), normal(30)
    b = b / b.norm()
    loose = solver(rtol=1e-15, atol=1e-2).solve(operator(kind, matrix), b)
    assert loose.success
    assert loose.residual <= 1e-2
    assert solver in DIRECT or loose.residual > 1e-12
    other = solver(rtol=1e-2, atol=1e-15).solve(operator(kind, matrix), b)
    assert other.steps == loose.steps
    if solver not in DIRECT:
        small = solver(rtol=0.0, atol=1e-2).solve(operator(kind, matrix), 1e-3 * b)
        assert (small.status, small.steps, float(small.value.norm())) == (Status.CONVERGED, 0, 0.0)


@pairs
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite(solver, kind, bad) -> None:
    matrix, b = MATRICES[kind](5, 10.0), normal(5)
    b[2] = bad
    found = solver().solve(operator(kind, matrix), b)
    assert (found.status, float(found.value.norm())) == (Status.NONFINITE, 0.0)
    matrix[1, 1] = bad
    found = solver().solve(operator(kind, matrix), normal(5))
    assert (found.status, found.indefinite) == (Status.NONFINITE, False)
    assert bool(torch.isfinite(found.value).all())
    many = solver().solve(operator(kind, matrix), normal(3, 5), batched=True)
    assert many.status is Status.NONFINITE
    assert bool(torch.isfinite(many.value).all())


# ---------------------------------------------------------------- the right-hand side


@pairs
def test_many_right_hand_sides_of_very_different_size(solver, kind) -> None:
    matrix, b = MATRICES[kind](40, 30.0), normal(5, 40)
    b = b * torch.tensor([1.0, 1e-12, 0.0, 1e9, 1e-150])[:, None]
    found = solver(**settings(solver)).solve(operator(kind, matrix), b, batched=True)
    assert found.status is Status.CONVERGED
    assert torch.equal(found.value[2], torch.zeros(40))
    for i in (0, 1, 3, 4):
        assert relative(matrix, found.value[i], b[i]) <= 1e-9
        alone = solver(**settings(solver)).solve(operator(kind, matrix), b[i])
        torch.testing.assert_close(found.value[i], alone.value, rtol=1e-5, atol=1e-8 * float(b[i].abs().max()))
    assert found.residual == pytest.approx(float((b - found.value @ matrix.T).norm(dim=1).max()), rel=1e-3)
    assert found.relative_residual <= 1e-9


@pairs
@pytest.mark.parametrize("size", [5e-318, 1e-300, 1e-160, 1e-30, 1e160, 1e300])
def test_scaling_the_right_hand_side_changes_nothing(solver, kind, size) -> None:
    matrix = MATRICES[kind](20, 10.0)
    b = torch.where(torch.arange(20) % 3 == 0, 0.0, normal(20).sign())  # exact at every size, with exact zeros
    plain = solver(rtol=1e-10).solve(operator(kind, matrix), b)
    scaled = solver(rtol=1e-10).solve(operator(kind, matrix), b * size)
    assert scaled.status is Status.CONVERGED
    assert abs(scaled.steps - plain.steps) <= max(
        1, 0.15 * plain.steps
    )  # sizes that are no powers of two round differently
    exact = torch.linalg.solve(matrix, b)
    # The smallest numbers have few digits themselves.
    rounding = 1e-8 if size > 1e-307 else 1e-4
    torch.testing.assert_close(scaled.value / size, exact, rtol=0.0, atol=rounding * float(exact.abs().max()))


@pytest.mark.parametrize("solver", KINDS, ids=name)
@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e20, 1e30])
def test_scaling_in_float32(solver, size) -> None:
    matrix, b = spd(30, 30.0).float(), normal(30).float()
    found = solver(**settings(solver, None)).solve(Dense(matrix), b * size)
    assert (found.status, found.value.dtype) == (Status.CONVERGED, torch.float32)
    assert relative(matrix, found.value, b * size) <= 4e-4


@pytest.mark.parametrize("solver", KINDS, ids=name)
def test_exact_zeros_as_in_features_that_never_occur(solver) -> None:
    """Penalised logistic regression with constant pixels: b and all but the diagonal are exactly zero there."""
    features, labels = normal(60, 24, seed=3), torch.sign(normal(60, seed=4))
    features[:, ::4] = 0.0
    penalties = torch.exp(normal(24, seed=5) - 1.0)

    def loss(y: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-labels * (features @ y)).mean() + 0.5 * (penalties * y**2).sum()

    hessian, b = Hessian(loss, 0.1 * normal(24)), features.T @ normal(60, seed=6)
    assert int((b == 0).sum()) == 6
    dense = torch.func.hessian(loss)(0.1 * normal(24))
    for size in (1.0, 1e-30):
        found = solver(rtol=1e-8, **({} if solver in DIRECT else {"max_steps": 5_000})).solve(hessian, size * b)
        assert found.success
        assert relative(dense, found.value, size * b) <= 1e-8
        error = found.value / size - torch.linalg.solve(dense, b)
        assert float(error.norm()) <= 1e-5 * float(b.norm())


@pairs
def test_zero_and_one_by_one(solver, kind) -> None:
    matrix = MATRICES[kind](12, 5.0)
    for start in (None, normal(12)):
        zero = solver().solve(operator(kind, matrix), torch.zeros(12), x0=start)
        assert (zero.status, zero.residual, zero.relative_residual) == (Status.CONVERGED, 0.0, 0.0)
        assert solver in DIRECT or zero.steps == 0
        assert torch.equal(zero.value, torch.zeros(12))
    value = -4.0 if kind == "indefinite" else 4.0
    one = solver().solve(operator(kind, torch.tensor([[value]])), torch.tensor([2.0]))
    assert (one.status, one.steps) == (Status.CONVERGED, 1)
    torch.testing.assert_close(one.value, torch.tensor([2.0 / value]))
    scalar = solver().solve(operator(kind, torch.tensor([[value]]), torch.zeros(())), torch.tensor(2.0))
    assert (scalar.value.shape, scalar.status) == ((), Status.CONVERGED)


@pairs
def test_nothing_to_solve(solver, kind) -> None:
    empty = solver().solve(operator(kind, torch.zeros(0, 0)), torch.zeros(0))
    assert (empty.status, empty.residual, empty.value.shape) == (Status.CONVERGED, 0.0, (0,))
    none = solver().solve(operator(kind, torch.eye(3)), torch.zeros(0, 3), batched=True)
    assert (none.status, none.residual, none.value.shape) == (Status.CONVERGED, 0.0, (0, 3))


# ---------------------------------------------------------------- starting points


@iterative
def test_a_warm_start_saves_steps_and_a_bad_one_is_dropped(solver, kind) -> None:
    matrix, b = MATRICES[kind](40, 30.0), normal(40)
    made = solver(rtol=1e-8, max_steps=20_000)
    cold = made.solve(operator(kind, matrix), b)
    solution = torch.linalg.solve(matrix, b)
    warm = made.solve(operator(kind, matrix), b, x0=solution + 1e-7 * normal(40, seed=2))
    assert warm.success
    assert warm.steps < 0.8 * cold.steps
    perfect = made.solve(operator(kind, matrix), b, x0=solution)
    measured = 0 if solver is not Neumann else 20 if kind == "definite" else 40  # with A^T A, for the step
    assert (perfect.steps, perfect.products, perfect.success) == (0, 1 + measured, True)
    assert torch.equal(perfect.value, solution)
    for bad in (1e6 * normal(40), torch.full((40,), math.nan), torch.full((40,), math.inf), torch.full((40,), 1e308)):
        found = made.solve(operator(kind, matrix), b, x0=bad)
        assert (found.status, found.steps) == (Status.CONVERGED, cold.steps)
        assert torch.equal(found.value, cold.value)
    start = normal(40)
    before = start.clone()
    made.solve(operator(kind, matrix), b, x0=start)
    assert torch.equal(start, before)


@iterative
def test_each_row_judges_its_own_warm_start(solver, kind) -> None:
    matrix, b = MATRICES[kind](20, 10.0), normal(2, 20)
    start = torch.stack([torch.linalg.solve(matrix, b[0]), 1e9 * torch.ones(20)])
    found = solver(rtol=1e-8, max_steps=20_000).solve(operator(kind, matrix), b, x0=start, batched=True)
    assert found.success
    assert torch.equal(found.value[0], start[0])


# ---------------------------------------------------------------- trees and misuse


def tree_problem(kind: str = "definite"):
    like = {"w": torch.zeros(2, 3), "none": torch.zeros(0, 4), "parts": [torch.zeros(()), torch.zeros(5)]}
    return like, operator(kind, MATRICES[kind](12, 20.0), like)


@pairs
def test_nested_trees_with_empty_leaves(solver, kind) -> None:
    _, acting = tree_problem(kind)
    made = solver(**settings(solver, 1e-12))
    b = {"parts": [torch.tensor(1.0), normal(5)], "none": torch.zeros(0, 4), "w": normal(2, 3)}  # another key order
    found = made.solve(acting, b)
    flat = torch.cat([b["w"].reshape(-1), b["parts"][0].reshape(1), b["parts"][1]])
    ordered = [found.value["w"].reshape(-1), found.value["parts"][0].reshape(1), found.value["parts"][1]]
    assert found.value["none"].shape == (0, 4)
    torch.testing.assert_close(torch.cat(ordered), torch.linalg.solve(acting.matrix, flat), rtol=1e-9, atol=1e-10)
    many = {"w": normal(4, 2, 3), "none": torch.zeros(4, 0, 4), "parts": [normal(4), normal(4, 5)]}
    block = made.solve(acting, many, batched=True)
    assert block.success
    assert block.value["parts"][0].shape == (4,)
    one = made.solve(acting, {"w": many["w"][2], "none": many["none"][2], "parts": [m[2] for m in many["parts"]]})
    torch.testing.assert_close(block.value["w"][2], one.value["w"], rtol=1e-8, atol=1e-9)


def test_right_hand_sides_that_do_not_fit_are_refused() -> None:
    like, acting = tree_problem()
    transposed = {"w": torch.zeros(3, 2), "none": torch.zeros(0, 4), "parts": [torch.zeros(()), torch.zeros(5)]}
    with pytest.raises(ValueError, match=r"b is .*\['w'\] \(3, 2\).*the operator acts on .*\['w'\] \(2, 3\)"):
        CG().solve(acting, transposed)
    with pytest.raises(ValueError, match="x0 is "):
        CG().solve(acting, like, x0=transposed)
    with pytest.raises(ValueError, match="different structures"):
        CG().solve(acting, torch.zeros(12))
    with pytest.raises(ValueError, match=r"torch.float32.*the operator acts on .*torch.float64"):
        CG().solve(Dense(torch.eye(2)), torch.zeros(2, dtype=torch.float32))
    with pytest.raises(ValueError, match="with a leading axis"):
        CG().solve(Dense(torch.eye(2)), torch.tensor(1.0), batched=True)
    with pytest.raises(ValueError, match="b is "):
        CG().solve(Dense(torch.eye(2)), torch.zeros(2), batched=True)


@pytest.mark.parametrize("solver", [CG, MINRES, Cholesky, LDLT], ids=name)
def test_solvers_for_symmetric_operators_refuse_others(solver) -> None:
    with pytest.raises(ValueError, match=f"{solver.__name__} needs a symmetric operator, Dense is not declared so"):
        solver().solve(Dense(torch.eye(2), symmetric=False), torch.ones(2))


@pytest.mark.parametrize("solver", [CG, MINRES, GMRES, BiCGSTAB, Neumann, Cholesky, LDLT, LU], ids=name)
def test_solvers_for_square_operators_refuse_others(solver) -> None:
    with pytest.raises(ValueError, match=rf"{solver.__name__} needs a square operator, got 3 x 2; use LSMR"):
        solver().solve(Dense(torch.ones(3, 2)), torch.ones(3))


@pytest.mark.parametrize("solver", KINDS, ids=name)
def test_settings_are_checked(solver) -> None:
    for bad in ({"rtol": -1.0}, {"rtol": math.nan}, {"atol": -1e-3}, {"atol": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            solver(**bad)
    for bad in (0, 1.5, True):
        if "max_steps" in solver.__dataclass_fields__:
            with pytest.raises(ValueError, match=f"max_steps must be None or a positive integer, got {bad}"):
                solver(max_steps=bad)


# ---------------------------------------------------------------- counts, transposes, real operators


COUNTS = {CG: (1, 0), MINRES: (1, 0), GMRES: (1, 0), BiCGSTAB: (2, 0), NormalCG: (1, 1), LSMR: (1, 1)}


@pytest.mark.parametrize("solver", COUNTS, ids=name)
def test_products_per_step(solver) -> None:
    symmetric = solver in (CG, MINRES)
    matrix = spd(30, 20.0) if symmetric else MATRICES["nonsymmetric"](30, 20.0)
    counting = Counting(matrix, symmetric=symmetric)
    found = solver(rtol=1e-8).solve(counting, normal(30))
    forward, backward = COUNTS[solver]
    assert found.success
    assert counting.products == forward * found.steps + 1  # one more checked the residual
    assert counting.T is counting or counting.T.products == backward * (found.steps + 1)
    assert found.products == counting.products + (0 if symmetric else counting.T.products)


@iterative
def test_finished_rows_are_frozen_and_cost_nothing(solver, kind) -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    counting = Counting(matrix, symmetric=kind != "nonsymmetric", positive_definite=kind == "definite")
    b = torch.stack([torch.eye(6)[3] * 4.0, torch.ones(6)])
    found = solver(rtol=1e-10, **({"step": 0.25, "max_steps": 200} if solver is Neumann else {})).solve(
        counting, b, batched=True
    )
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.value[0], torch.eye(6)[3], rtol=0.0, atol=1e-15)
    together = counting.taken.count(2)
    assert together <= 4
    assert counting.taken.count(1) >= found.steps - 1
    assert found.products == sum(counting.taken) + (0 if counting.T is counting else sum(counting.T.taken))


@pairs
def test_what_was_prepared_serves_the_transpose(solver, kind) -> None:
    matrix, b, c = MATRICES[kind](30, 20.0), normal(30), normal(2, 30, seed=9)
    counting = Counting(matrix, symmetric=kind != "nonsymmetric", positive_definite=kind == "definite")
    made = solver(**settings(solver))
    prepared = made.init(counting)
    spent = counting.products
    forward = made.solve(counting, b, prepared=prepared)
    back = made.solve(counting.T, c, prepared=made.transpose(prepared), batched=True)
    assert forward.success and back.success
    torch.testing.assert_close(forward.value, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(back.value, torch.linalg.solve(matrix.T, c.T).T, rtol=1e-6, atol=1e-7)
    if solver in DIRECT:
        assert (spent, forward.products, back.products) == (30, 0, 0)
        again = made.solve(counting, b, prepared=made.transpose(made.transpose(prepared)))
        assert torch.equal(again.value, forward.value)


def test_newton_system_of_a_logistic_model_against_scipy() -> None:
    features, labels = normal(80, 12, seed=3), torch.sign(normal(80, seed=4))

    def loss(y: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-labels * (features @ y)).sum() + 0.05 * y @ y

    hessian = Hessian(loss, 0.1 * normal(12))
    b = normal(12, seed=6)
    dense = torch.func.hessian(loss)(0.1 * normal(12))
    expected, info = scipy.sparse.linalg.cg(hessian.to_scipy(), b.numpy(), rtol=1e-12, atol=0.0)
    assert info == 0
    for solver in KINDS:
        found = solver(**settings(solver, 1e-11)).solve(hessian, b)
        assert relative(dense, found.value, b) < 1e-11
        np.testing.assert_allclose(found.value.numpy(), expected, rtol=1e-8, atol=1e-9)


def test_damping_makes_an_indefinite_system_solvable() -> None:
    matrix, b = spd(15, 10.0) - 3.0 * torch.eye(15), normal(15)
    assert CG().solve(Dense(matrix), b).status is Status.LINEAR_SOLVE_FAILED
    found = CG(rtol=1e-12).solve(Shifted(Dense(matrix), 4.0), b)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix + 4.0 * torch.eye(15), b), rtol=1e-9, atol=1e-10)
