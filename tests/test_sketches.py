"""Sketches: what they draw, and the rates that theory gives for a known spectrum."""

from typing import Any

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from constrained import BlockGaussian, BlockKaczmarz, GaussianVector, Kaczmarz, Sketch, SketchAndProject
from implicit import Dense
from tests.systems import normal, orthogonal

SKETCHES: list[Sketch] = [
    Kaczmarz(),
    Kaczmarz(weighted=False),
    GaussianVector(),
    BlockGaussian(),
    BlockGaussian(size=3),
    BlockKaczmarz(size=2),
]
RUNS = 300


def with_singular_values(values: Tensor) -> Tensor:
    n = len(values)
    return (orthogonal(n, 1) * values) @ orthogonal(n, 2).T


def errors(matrix: Tensor, exact: Tensor, sketch: Sketch, steps: int) -> Tensor:
    """Squared distances to the solution after so many steps from zero, over seeds, shape (RUNS,)."""
    operator = Dense(matrix, symmetric=False)
    found = []
    for seed in range(RUNS):
        solver = SketchAndProject(sketch=sketch, rtol=0.0, max_steps=steps, check_every=steps, seed=seed)
        solution = solver.solve(operator, matrix @ exact)
        assert solution.steps == steps
        found.append((solution.value - exact).square().sum())
    return torch.stack(found)


def standard_error(samples: Tensor) -> float:
    return float(samples.std() / len(samples) ** 0.5)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("sketch", SKETCHES, ids=repr)
def test_draws_repeat_and_resume(sketch: Sketch) -> None:
    squares = torch.linspace(1.0, 2.0, 7)
    first = torch.Generator().manual_seed(3)
    drawn = [sketch.draw(4, squares, first) for _ in range(3)]
    again = torch.Generator().manual_seed(3)
    torch.testing.assert_close(sketch.draw(4, squares, again), drawn[0], rtol=0, atol=0)
    resumed = torch.Generator()
    resumed.set_state(again.get_state())
    torch.testing.assert_close(sketch.draw(4, squares, resumed), drawn[1], rtol=0, atol=0)
    assert not torch.equal(drawn[0], drawn[1])
    width = sketch.width(7)
    shape = (4, width, 7) if drawn[0].is_floating_point() else (4, width)
    assert tuple(drawn[0].shape) == shape
    state = torch.get_rng_state()
    sketch.draw(2, squares, first)
    assert torch.equal(state, torch.get_rng_state())


def test_widths() -> None:
    assert [s.width(7) for s in SKETCHES] == [1, 1, 1, 4, 3, 2]
    assert BlockGaussian(size=9).width(7) == 9
    assert BlockKaczmarz(size=9).width(7) == 7
    assert BlockKaczmarz().width(7) == 4
    assert [s.needs_squares for s in SKETCHES] == [True, False, False, False, False, False]


@pytest.mark.parametrize("kind", [BlockGaussian, BlockKaczmarz])
@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_sizes_are_checked(kind: Any, size: Any) -> None:
    with pytest.raises(ValueError, match="size must be None or a positive integer"):
        kind(size=size)


def test_kaczmarz_weights_pass_a_chi_square_test() -> None:
    squares = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])
    draws = 20_000

    def frequencies(weighted: bool) -> Any:
        drawn = Kaczmarz(weighted=weighted).draw(draws, squares, torch.Generator().manual_seed(0))
        return torch.bincount(drawn.flatten(), minlength=5).numpy()

    norm = (draws * squares / squares.sum()).numpy()
    weighted, uniform = frequencies(True), frequencies(False)
    assert weighted[0] == 0
    assert scipy.stats.chisquare(weighted[1:], norm[1:]).pvalue > 1e-3
    assert scipy.stats.chisquare(uniform).pvalue > 1e-3
    assert scipy.stats.chisquare(uniform[1:], norm[1:] * uniform[1:].sum() / draws).pvalue < 1e-12


def test_weights_of_a_zero_matrix_are_equal() -> None:
    drawn = Kaczmarz().draw(2_000, torch.zeros(4), torch.Generator().manual_seed(0))
    assert scipy.stats.chisquare(torch.bincount(drawn.flatten(), minlength=4).numpy()).pvalue > 1e-3


def test_blocks_of_rows_are_sets_and_all_alike() -> None:
    drawn = BlockKaczmarz(size=2).draw(6_000, torch.zeros(4), torch.Generator().manual_seed(0)).sort(dim=1).values
    assert bool((drawn[:, 0] < drawn[:, 1]).all())
    pairs = torch.bincount(4 * drawn[:, 0] + drawn[:, 1], minlength=16)
    assert scipy.stats.chisquare(pairs[pairs > 0].numpy()).pvalue > 1e-3
    assert int((pairs > 0).sum()) == 6


def test_gaussian_entries_are_standard_normal() -> None:
    for sketch in (GaussianVector(), BlockGaussian(size=3)):
        drawn = sketch.draw(2_000, torch.zeros(5), torch.Generator().manual_seed(1))
        assert scipy.stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3


# ---------------------------------------------------------------- rates


def expected_kaczmarz(matrix: Tensor, error: Tensor, weights: Tensor, steps: int) -> tuple[float, Tensor]:
    """``E ||e_t||^2`` by the recursion of the second moment, ``E[P M P]``."""
    units = matrix / matrix.norm(dim=1, keepdim=True)
    projections = torch.eye(len(error)) - units[:, :, None] * units[:, None, :]
    moment = torch.outer(error, error)
    for _ in range(steps):
        moment = torch.einsum("i,iab,bc,icd->ad", weights, projections, moment, projections)
    return float(moment.trace()), moment


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("steps", [1, 25])
def test_kaczmarz_converges_at_its_rate(weighted: bool, steps: int) -> None:
    matrix = torch.linspace(0.3, 2.0, 5)[:, None] * with_singular_values(torch.tensor([1.0, 1.5, 2.0, 3.0, 4.0]))
    exact = normal(5)
    weights = matrix.square().sum(dim=1) / matrix.square().sum() if weighted else torch.full((5,), 0.2)
    expected, _ = expected_kaczmarz(matrix, exact, weights, steps)
    samples = errors(matrix, exact, Kaczmarz(weighted=weighted), steps)
    assert abs(float(samples.mean()) - expected) <= 4 * standard_error(samples)
    other, _ = expected_kaczmarz(matrix, exact, weights, steps + max(1, steps // 3))
    assert abs(float(samples.mean()) - other) > 4 * standard_error(samples)  # so that the margin tells the rate
    if weighted:
        share = float(torch.linalg.svdvals(matrix)[-1] ** 2 / matrix.square().sum())
        bound = (1 - share) ** steps * float(exact.square().sum())
        assert expected <= bound
        assert float(samples.mean()) <= bound + 4 * standard_error(samples)


def shares(values: Tensor) -> Tensor:
    """``E[s_i^2 x_i^2 / sum_j s_j^2 x_j^2]`` for normal x, by ``1 / c = int exp(-t c) dt``."""
    squares = values.square().numpy()

    def share(square: float) -> float:
        def density(t: float) -> float:
            return float(square / (1 + 2 * t * square) / ((1 + 2 * t * squares) ** 0.5).prod())

        return scipy.integrate.quad(density, 0, float("inf"))[0]

    return torch.tensor([share(float(square)) for square in squares])


def test_the_gaussian_shares_add_up() -> None:
    found = shares(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-7)
    samples = torch.tensor([1.0, 2.0, 4.0, 8.0]) ** 2 * normal(200_000, 4) ** 2
    samples = samples / samples.sum(dim=1, keepdim=True)
    torch.testing.assert_close(samples.mean(dim=0), found, rtol=0, atol=5e-3)


def test_a_gaussian_vector_shrinks_the_error_by_its_share() -> None:
    values = torch.tensor([1.0, 1.5, 2.0, 3.0, 4.0])
    matrix, found = with_singular_values(values), shares(values)
    right = orthogonal(5, 2)  # the right singular vectors, as columns
    for i in (0, 4):
        samples = errors(matrix, right[:, i], GaussianVector(), 1)
        assert abs(float(samples.mean()) - (1 - float(found[i]))) <= 4 * standard_error(samples)
    assert float(found[4] - found[0]) > 0.3  # the two are told apart
    samples = errors(matrix, right[:, 0], GaussianVector(), 30)
    mean, margin = float(samples.mean()), 4 * standard_error(samples)
    assert mean <= (1 - float(found[0])) ** 30 + margin


@pytest.mark.parametrize("steps", [1, 8])
def test_equal_singular_values_give_the_rate_exactly(steps: int) -> None:
    n, exact = 6, normal(6)
    expected = (1 - 1 / n) ** steps * float(exact.square().sum())
    for sketch in (GaussianVector(), Kaczmarz(), Kaczmarz(weighted=False)):
        samples = errors(3.0 * orthogonal(n, 5), exact, sketch, steps)
        assert abs(float(samples.mean()) - expected) <= 4 * standard_error(samples) + 1e-12
        other = expected * (1 - 1 / n) ** max(1, steps // 3)  # so that the margin tells the rate
        assert abs(float(samples.mean()) - other) > 4 * standard_error(samples)
    for size in (2, 3):  # a projection on size random directions
        rate = (1 - size / n) ** min(steps, 4)
        for sketch in (BlockGaussian(size=size), BlockKaczmarz(size=size)):
            samples = errors(3.0 * orthogonal(n, 5), exact, sketch, min(steps, 4))
            gap = abs(float(samples.mean()) - rate * float(exact.square().sum()))
            assert gap <= 4 * standard_error(samples) + 1e-12


@pytest.mark.parametrize("sketch", [BlockGaussian(size=8), BlockGaussian(size=13), BlockKaczmarz(size=8)], ids=repr)
def test_a_sketch_of_all_rows_solves_in_one_step(sketch: Sketch) -> None:
    matrix = with_singular_values(torch.logspace(0, 3, 8))
    exact = normal(8)
    found = SketchAndProject(sketch=sketch, rtol=1e-11).solve(Dense(matrix, symmetric=False), matrix @ exact)
    assert (found.success, found.steps) == (True, 1)
    torch.testing.assert_close(found.value, exact, rtol=1e-8, atol=1e-8)
