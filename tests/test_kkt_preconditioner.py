"""Matrices recovered from products, and KKT systems solved with them."""

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

import problems
from constrained import AdaSketchNewton, KKTSystem, ProbedKKT, solve
from constrained.kkt_preconditioner import ProbedSystem
from constrained.sparse_recovery import recover
from implicit import Dense, Hessian, Jacobian, LinearOperator, Sparse, Status

Matrix = sp.csr_array


def random_rows(m: int, n: int, entries: int, seed: int) -> Matrix:
    rng = np.random.default_rng(seed)
    i = np.repeat(np.arange(m), entries)
    j = np.concatenate([rng.choice(n, entries, replace=False) for _ in range(m)])
    return Matrix((rng.standard_normal(m * entries) * 10.0 ** rng.uniform(-3, 3, m * entries), (i, j)), shape=(m, n))


def bands(values: Any, offsets: Any, shape: tuple[int, int]) -> Matrix:
    return Matrix(sp.diags_array(values, offsets=offsets, shape=shape))


def chain(m: int, n: int) -> Matrix:
    return bands([1.0, -2.0, 1.0], [0, 1, 2], (m, n))


def stacked(*parts: Matrix) -> Matrix:
    return Matrix(sp.vstack(parts))


RECOVERED = {
    "diagonal": (Matrix(sp.diags_array(np.arange(1.0, 41.0))), 3),
    "equal entries, exact cancellation": (chain(200, 202), 140),
    "6 per row over six decades": (random_rows(150, 400, 6, 0), 140),
    "empty rows and columns": (stacked(Matrix((3, 60)), random_rows(20, 60, 2, 1)), 60),
    "two full rows": (stacked(Matrix(np.ones((1, 300))), chain(50, 300), Matrix(np.arange(1.0, 301.0)[None])), 140),
    "one column": (Matrix(np.array([[3.0], [0.0], [-2.0]])), 3),
    "no row": (Matrix((0, 5)), 1),
    "zero": (Matrix((5, 7)), 3),
}


@pytest.mark.parametrize("name", RECOVERED)
def test_a_sparse_matrix_is_recovered_from_products(name: str) -> None:
    matrix, products = RECOVERED[name]
    operator = Dense(torch.tensor(matrix.toarray()))
    found = recover(operator)
    assert found is not None
    exact = matrix.toarray()
    size = np.abs(exact).max(axis=1, initial=0.0)[:, None]
    assert (np.abs(found.toarray() - exact) <= 1e-8 * size).all()
    assert operator.products <= products


def test_a_full_matrix_is_given_up_early() -> None:
    operator = Dense(torch.randn(100, 200, generator=torch.Generator().manual_seed(0)))
    assert recover(operator) is None
    assert operator.products == 38


def test_single_precision_is_given_up_at_once() -> None:
    operator = Dense(torch.eye(5, dtype=torch.float32))
    assert recover(operator) is None
    assert operator.products == 0


class Inconsistent(Dense):
    """Products that change from one call to the next."""

    def _flat_block(self, rows: Tensor) -> Tensor:
        return super()._flat_block(rows) * (1.0 + 1e-3 * (self.products > 2))


def test_what_the_check_refuses_is_not_returned() -> None:
    matrix = torch.diag(torch.arange(1.0, 11.0))
    assert recover(Dense(matrix)) is not None
    assert recover(Inconsistent(matrix)) is None


def test_what_is_not_finite_is_not_recovered() -> None:
    assert recover(Dense(torch.diag(torch.tensor([1.0, float("nan"), 2.0])))) is None


def test_automatic_derivatives_are_recovered() -> None:
    x = torch.linspace(-1.0, 2.0, 90)
    found = recover(Hessian(lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(), x))
    assert found is not None
    entries = found.toarray()
    middle = 1200 * x[1:-1] ** 2 - 400 * x[2:] + 202
    assert np.allclose(entries.diagonal()[1:-1], middle.numpy(), rtol=1e-9)
    assert np.allclose(entries.diagonal(1), (-400 * x[:-1]).numpy(), rtol=1e-9)
    assert np.abs(entries - entries.T).max() <= 1e-8
    jacobian = recover(Jacobian(lambda x: x[2:] * x[:-2], x))
    assert jacobian is not None
    assert np.allclose(jacobian.toarray(), bands([x[2:], x[:-2]], [0, 2], (88, 90)).toarray())


def spread(n: int, decades: float) -> Matrix:
    return Matrix(sp.diags_array(np.logspace(0.0, decades, n)))


def low_rank(n: int) -> Matrix:
    factors = np.random.default_rng(1).standard_normal((n, 3))
    return Matrix(spread(n, 3.0).toarray() + factors @ factors.T)


def network(nodes: int, edges: int) -> Matrix:
    """An incidence matrix; the rows of every connected part add up to zero."""
    ends = np.random.default_rng(2).integers(0, nodes, (2, edges))
    places = np.arange(edges)
    signs = np.concatenate([np.ones(edges), -np.ones(edges)])
    return Matrix((signs, (ends.reshape(-1), np.concatenate([places, places]))), shape=(nodes, edges))


def control(n: int) -> tuple[Matrix, Matrix]:
    line = 250.0 * bands([1.0, -2.0, 1.0], [-1, 0, 1], (n, n))
    return Matrix(sp.diags_array(np.repeat([1.0, 0.1], n))), Matrix(sp.hstack([line, sp.eye_array(n)]))


SYSTEMS = {
    "control": control(120),
    "spread, chain": (spread(300, 6.0), chain(150, 300)),
    "dependent rows": (spread(300, 3.0), stacked(chain(100, 300), chain(50, 300))),
    "network": (spread(300, 4.0), network(80, 300)),
    "diagonal and low rank": (low_rank(300), chain(150, 300)),
    "indefinite": (Matrix(spread(300, 3.0) - 20.0 * sp.eye_array(300)), chain(290, 300)),
    "sum of all": (spread(300, 5.0), stacked(Matrix(np.ones((1, 300))), chain(150, 300))),
    "random": (spread(300, 6.0), random_rows(100, 300, 6, 3)),
}


def system_of(name: str, **shifts: Any) -> KKTSystem:
    hessian, jacobian = SYSTEMS[name]
    return KKTSystem(Sparse(hessian, symmetric=True), Sparse(jacobian), **shifts)


def right_hand_side(system: LinearOperator) -> Tensor:
    return system @ torch.randn(system.size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_are_solved_with_few_steps_after_recovery(name: str) -> None:
    system = system_of(name)
    b = right_hand_side(system)
    prepared = ProbedSystem()
    found = ProbedKKT(rtol=1e-8, patience=5).solve(system, b, prepared=prepared)
    assert found.success
    assert found.residual <= 1e-8 * float(b.norm())
    residual = system.to_dense() @ found.value - b
    assert float(residual.norm()) <= 1.001e-8 * float(b.norm())
    assert prepared.probed and prepared.apply is not None
    assert 5 < found.steps <= 65, found.steps
    again = ProbedKKT(rtol=1e-8, patience=5).solve(system, -b, prepared=prepared)
    assert again.success and again.steps <= 60


def test_easy_systems_are_not_probed() -> None:
    system = KKTSystem(Sparse(spread(300, 0.1), symmetric=True), Sparse(Matrix(sp.eye_array(50, 300))))
    prepared = ProbedSystem()
    found = ProbedKKT(rtol=1e-6).solve(system, right_hand_side(system), prepared=prepared)
    assert found.success and not prepared.probed
    assert found.products == found.steps + 1 <= 100


def test_a_full_jacobian_is_left_to_minres() -> None:
    jacobian = torch.randn(60, 200, generator=torch.Generator().manual_seed(1))
    hessian = torch.logspace(0, 4, 200).diag()
    system = KKTSystem(Dense(hessian, symmetric=True), Dense(jacobian))
    b, prepared = right_hand_side(system), ProbedSystem()
    found = ProbedKKT(rtol=1e-8, patience=5).solve(system, b, prepared=prepared)
    assert found.success and prepared.probed and prepared.apply is None
    assert system.jacobian.products <= found.steps + 45


def test_a_useless_factorisation_costs_sixty_steps() -> None:
    system = system_of("spread, chain")
    prepared = ProbedSystem(probed=True, apply=lambda rows: torch.zeros_like(rows))
    found = ProbedKKT(rtol=1e-6).solve(system, right_hand_side(system), prepared=prepared)
    assert found.success and found.relative_residual <= 1e-6


def test_shifts_are_part_of_the_preconditioner() -> None:
    solver = ProbedKKT(rtol=1e-8, patience=5)
    system = system_of("indefinite")
    prepared = solver.init(system)
    assert solver.solve(system, right_hand_side(system), prepared=prepared).success
    shifted = system_of("indefinite", primal_shift=7.0, dual_shift=0.3)
    known = solver.init(shifted, prepared)
    before = shifted.jacobian.products, shifted.hessian.products
    assert before == (0, 0) and known.probed
    found = solver.solve(shifted, right_hand_side(shifted), prepared=known)
    assert found.success and found.steps <= 20
    fresh = solver.init(shifted, ProbedSystem())
    assert not fresh.probed


def test_what_is_not_finite_is_reported() -> None:
    system = system_of("control")
    b = right_hand_side(system)
    b[3] = float("nan")
    assert ProbedKKT().solve(system, b).status is Status.NONFINITE


def test_step_limit() -> None:
    system = system_of("control")
    found = ProbedKKT(max_steps=3).solve(system, right_hand_side(system))
    assert (found.status, found.steps) == (Status.STEP_LIMIT, 3)


def test_the_control_problem_without_matrices() -> None:
    case = problems.case("poisson_control", n=26)
    found = solve(case.problem, AdaSketchNewton(linear_solver=ProbedKKT()), case.start)
    assert found.success and abs(case.gap(found.x)) <= 1e-10
    assert found.counts["products"] <= 500  # MINRES takes some 4,000


@pytest.mark.parametrize(
    ("field", "value"),
    [("patience", 0), ("fill", 0.5), ("drop", 1.0), ("drop", -0.1), ("rtol", -1.0), ("max_steps", 0)],
)
def test_fields_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        ProbedKKT(**{field: value})


def test_other_operators_are_refused() -> None:
    with pytest.raises(TypeError, match="KKTSystem"):
        ProbedKKT().solve(Dense(torch.eye(3)), torch.ones(3))
