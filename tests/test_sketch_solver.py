"""Sketch-and-project: the steps one by one, its ends, and the contract of linear solvers."""

from itertools import pairwise
from typing import Any

import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from constrained import BlockGaussian, BlockKaczmarz, GaussianVector, Kaczmarz, Sketch, SketchAndProject, sketch_solver
from implicit import Dense, Hessian, Sparse, Status
from implicit.testing import check_linear_solver
from tests.systems import indefinite, normal, relative, spd

KINDS: list[Sketch] = [
    Kaczmarz(),
    Kaczmarz(weighted=False),
    GaussianVector(),
    BlockGaussian(size=3),
    BlockKaczmarz(size=3),
    BlockGaussian(size=12),
]


def saddle(n: int = 8, m: int = 3) -> Tensor:
    rows = normal(m, n, seed=4)
    return torch.cat([torch.cat([spd(n, 4.0), rows.T], 1), torch.cat([rows, torch.zeros(m, m)], 1)])


def sequential(matrix: Tensor, b: Tensor, sketch: Sketch, steps: int, seed: int, chunk: int) -> Tensor:
    """``z - A^T S (S^T A A^T S)^+ S^T (A z - b)``, step by step, from the same draws."""
    generator = torch.Generator().manual_seed(seed)
    squares, z, rows = matrix.square().sum(dim=1), torch.zeros(matrix.shape[1]), len(matrix)
    drawn: list[Tensor] = []
    while len(drawn) < steps:
        drawn += list(sketch.draw(min(chunk, steps - len(drawn)), squares, generator))
    for s in drawn:
        turned = s if s.is_floating_point() else torch.eye(rows)[s]
        image = turned @ matrix
        z = z - image.T @ torch.linalg.pinv(image @ image.T, hermitian=True) @ (turned @ (matrix @ z - b))
    return z


@pytest.mark.parametrize("dense", [True, False], ids=["matrix", "products"])
@pytest.mark.parametrize("gram", [True, False], ids=["gram", "rows"])
@pytest.mark.parametrize("sketch", KINDS, ids=repr)
def test_steps_taken_together_are_the_steps_one_by_one(
    sketch: Sketch, gram: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sketch_solver, "GRAM_ROWS", 1000 if gram else 1)
    matrix = torch.cat([saddle(), torch.zeros(1, 11)])  # with a row that tells nothing
    b = torch.cat([matrix[:-1] @ normal(11), torch.zeros(1)])
    chunk = sketch_solver.CHUNK if sketch.width(12) == 1 else 1
    for steps in (1, 7, 300 if sketch.width(12) == 1 else 40):
        solver = SketchAndProject(
            sketch=sketch, rtol=1e-14, max_steps=steps, check_every=steps, seed=5, dense_size=2000 if dense else 1
        )
        found = solver.solve(Dense(matrix, symmetric=False), b)
        expected = sequential(matrix, b, sketch, steps, 5, chunk)
        torch.testing.assert_close(found.value, expected, rtol=1e-11, atol=1e-12)
        true = float((matrix @ found.value - b).norm())
        assert found.residual == pytest.approx(true, rel=1e-10, abs=1e-13)
        assert found.steps == steps


def test_the_first_step_goes_towards_the_solution() -> None:
    matrix, exact = saddle(), normal(11)
    b = matrix @ exact
    for seed in range(20):
        found = SketchAndProject(max_steps=1, seed=seed).solve(Dense(matrix, symmetric=False), b)
        before, after = float(exact.norm()), float((found.value - exact).norm())
        assert after < before
        i = int((matrix @ found.value - b).abs().argmin())  # the equation that now holds
        row = matrix[i]
        torch.testing.assert_close(found.value, row * b[i] / (row @ row), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sketch", KINDS, ids=repr)
def test_the_distance_to_the_solution_never_grows(sketch: Sketch) -> None:
    matrix, exact = indefinite(12, 5.0), normal(12)
    distances = [float(exact.norm())]
    for steps in (1, 2, 5, 20, 60):
        solver = SketchAndProject(sketch=sketch, rtol=1e-14, max_steps=steps, check_every=1)
        found = solver.solve(Dense(matrix, positive_definite=False), matrix @ exact)
        distances.append(float((found.value - exact).norm()))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(distances))
    assert distances[-1] < 0.9 * distances[0]


@pytest.mark.parametrize("sketch", KINDS, ids=repr)
def test_rectangular_consistent_systems_give_the_solution_of_minimum_norm(sketch: Sketch) -> None:
    for matrix in (normal(9, 4), normal(4, 9), torch.cat([normal(4, 9), normal(4, 9)])):
        b = matrix @ normal(matrix.shape[1], seed=2)
        found = SketchAndProject(sketch=sketch, rtol=1e-9).solve(Dense(matrix), b)
        assert found.success
        torch.testing.assert_close(found.value, torch.linalg.pinv(matrix) @ b, rtol=1e-6, atol=1e-6)


def test_every_kind_of_operator_takes_the_same_steps() -> None:
    matrix = saddle()
    b = normal(11)
    dense = Dense(matrix, positive_definite=False)
    hessian = Hessian(lambda y: 0.5 * y @ matrix @ y, torch.zeros(11))
    hessian.positive_definite = False
    for sketch in (Kaczmarz(), GaussianVector(), BlockGaussian(), BlockKaczmarz()):
        for size in (1, 2000):
            solver = SketchAndProject(sketch=sketch, rtol=1e-6, dense_size=size)
            values = [solver.solve(operator, b).value for operator in (dense, Sparse(sp.csr_array(matrix)), hessian)]
            assert relative(matrix, values[0], b) <= 1e-6
            torch.testing.assert_close(values[1], values[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(values[2], values[0], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- continuing


def test_a_start_is_continued_from_whatever_its_residual() -> None:
    values = torch.tensor([1e-3, 1.0, 1.0, 2.0])
    matrix = torch.diag(values)
    exact = torch.tensor([1.0, 0.0, 0.0, 0.0])
    near = exact + torch.tensor([0.0, 0.0, 0.0, 0.05])  # nearer than zero, though its residual is larger
    assert float((matrix @ near - matrix @ exact).norm()) > float((matrix @ exact).norm())
    found = SketchAndProject(rtol=1e-3).solve(Dense(matrix), matrix @ exact, x0=near)
    assert found.success
    assert found.steps == sketch_solver.CHUNK
    torch.testing.assert_close(found.value, exact, rtol=1e-6, atol=1e-6)
    bad = SketchAndProject(rtol=1e-3, max_steps=1).solve(Dense(matrix), matrix @ exact, x0=near * torch.nan)
    assert bool(torch.isfinite(bad.value).all())


def test_what_init_returned_continues_the_draws() -> None:
    matrix, b = indefinite(20, 8.0), normal(20)
    operator = Dense(matrix, positive_definite=False)
    parts = SketchAndProject(rtol=1e-12, max_steps=128, check_every=128, seed=3)
    prepared = parts.init(operator)
    half = parts.solve(operator, b, prepared=prepared)
    rest = parts.solve(operator, b, x0=half.value, prepared=prepared)
    whole = SketchAndProject(rtol=1e-12, max_steps=256, check_every=128, seed=3).solve(operator, b)
    torch.testing.assert_close(rest.value, whole.value, rtol=1e-13, atol=1e-13)
    again = parts.solve(operator, b, x0=half.value)  # the first draws once more
    assert not torch.allclose(again.value, rest.value, rtol=1e-6)
    own = torch.Generator().manual_seed(3)
    given = parts.solve(operator, b, prepared=parts.init(operator, own))
    assert torch.equal(given.value, half.value)
    assert not torch.equal(own.get_state(), torch.Generator().manual_seed(3).get_state())


def test_seeds_matter_and_nothing_else_does() -> None:
    matrix, b = indefinite(20, 8.0), normal(20)
    operator = Dense(matrix, positive_definite=False)
    one, same, other = (SketchAndProject(max_steps=128, seed=s).solve(operator, b).value for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("sketch", KINDS, ids=repr)
def test_right_hand_sides_that_are_done_stay_put(sketch: Sketch) -> None:
    matrix = indefinite(10, 4.0)
    operator = Dense(matrix, positive_definite=False)
    exact = normal(3, 10)
    b = exact @ matrix
    b[1] = 0.0
    start = torch.zeros(3, 10)
    start[0] = exact[0] + 1e-9
    start[1] = normal(10)  # the solution is known
    found = SketchAndProject(sketch=sketch, rtol=1e-6).solve(operator, b, x0=start, batched=True)
    assert found.success
    assert torch.equal(found.value[0], start[0])
    assert torch.equal(found.value[1], torch.zeros(10))
    torch.testing.assert_close(found.value[2], exact[2], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- ends


def test_limits_and_looks() -> None:
    matrix, b = indefinite(10, 4.0), normal(10)
    operator = Dense(matrix, positive_definite=False)
    short = SketchAndProject(max_steps=50).solve(operator, b)
    assert (short.status, short.steps) == (Status.STEP_LIMIT, 50)
    assert short.residual == pytest.approx(float((matrix @ short.value - b).norm()), rel=1e-12)
    found = SketchAndProject(rtol=0.5, check_every=1).solve(operator, b)
    assert found.success
    assert found.steps % sketch_solver.CHUNK != 0
    exact_count = SketchAndProject(rtol=0.5, max_steps=found.steps - 1, check_every=1).solve(operator, b)
    assert exact_count.status is Status.STEP_LIMIT
    loose = SketchAndProject(rtol=0.0, atol=0.4 * float(b.norm())).solve(operator, b)
    assert loose.success
    assert 0 < loose.residual <= 0.4 * float(b.norm())


def test_products_are_counted_and_the_matrix_is_written_once() -> None:
    matrix, b = indefinite(10, 4.0), normal(10)
    kept = Dense(matrix, positive_definite=False)
    assert SketchAndProject(max_steps=256).solve(kept, b).products == 10
    by_products = SketchAndProject(max_steps=256, dense_size=1, sketch=Kaczmarz(weighted=False))
    # Each step is one product with A^T; each of two chunks and three looks one with A.
    assert by_products.solve(kept, b).products == 256 + 2 + 3
    turned = Dense(matrix, symmetric=False)
    assert by_products.solve(turned, b).products == 256 + 2 + 3
    weighted = SketchAndProject(max_steps=256, dense_size=1)
    assert weighted.solve(turned, b).products == 10 + 256 + 2 + 3


def test_inconsistent_and_ill_conditioned_systems_do_not_converge() -> None:
    inconsistent = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for sketch in (Kaczmarz(), GaussianVector(), BlockKaczmarz(size=1)):
        found = SketchAndProject(sketch=sketch, max_steps=500).solve(Dense(inconsistent), torch.tensor([1.0, 2.0]))
        assert found.status is Status.STEP_LIMIT
        assert found.relative_residual > 0.1
    found = SketchAndProject(sketch=BlockGaussian(size=2)).solve(Dense(inconsistent), torch.tensor([1.0, 2.0]))
    assert found.status is Status.STALLED
    hilbert = 1.0 / (torch.arange(12.0)[:, None] + torch.arange(12.0) + 1)
    found = SketchAndProject(sketch=BlockGaussian(size=12), rtol=1e-18).solve(Dense(hilbert), torch.ones(12))
    assert found.status is Status.STALLED
    assert "sketch of all rows" in found.message


def test_what_is_not_finite_is_named() -> None:
    matrix = torch.eye(3)
    for sketch in KINDS:
        solver = SketchAndProject(sketch=sketch)
        assert solver.solve(Dense(matrix), torch.full((3,), torch.inf)).status is Status.NONFINITE
        spoiled = matrix.clone()
        spoiled[2, 2] = torch.nan
        for size in (1, 2000):
            solver = SketchAndProject(sketch=sketch, dense_size=size)
            found = solver.solve(Dense(spoiled), torch.ones(3))
            assert found.status is Status.NONFINITE
            assert bool(torch.isfinite(found.value).all())


def test_an_overflow_on_the_way_leaves_the_last_finite_iterate() -> None:
    matrix = torch.diag(torch.tensor([1e200, 1.0]))
    found = SketchAndProject(sketch=Kaczmarz(weighted=False)).solve(Dense(matrix), torch.ones(2))
    assert (found.status, found.value.tolist()) == (Status.NONFINITE, [0.0, 0.0])


MISUSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sketch": "kaczmarz"}, TypeError, "sketch must be a Sketch such as Kaczmarz"),
    ({"rtol": -1.0}, ValueError, "rtol must be None or >= 0"),
    ({"max_steps": 0}, ValueError, "max_steps must be None or a positive integer"),
    ({"check_every": 0}, ValueError, "check_every must be None or a positive integer"),
    ({"dense_size": 0}, ValueError, "dense_size must be a positive integer"),
]


@pytest.mark.parametrize(("options", "kind", "text"), MISUSE, ids=[next(iter(m[0])) for m in MISUSE])
def test_misuse_is_named(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        SketchAndProject(**options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "solver",
    [
        SketchAndProject(sketch=BlockGaussian(size=30), max_steps=50),
        SketchAndProject(sketch=BlockKaczmarz(size=9), max_steps=1_000),
        SketchAndProject(sketch=BlockGaussian(size=30), max_steps=50, dense_size=1),
    ],
    ids=["gaussian", "rows", "products"],
)
def test_blocks_conform(solver: SketchAndProject, dtype: torch.dtype) -> None:
    check_linear_solver(solver, for_=("spd", "symmetric", "general", "singular"), dtypes=[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("sketch", [Kaczmarz(), GaussianVector()], ids=repr)
def test_vectors_conform(sketch: Sketch, dtype: torch.dtype) -> None:
    check_linear_solver(SketchAndProject(sketch=sketch, rtol=1e-3, max_steps=40_000), for_=(), dtypes=[dtype])
