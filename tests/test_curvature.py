"""Lanczos extremes against dense eigenvalues, and the ceiling against what it promises."""

import math

import pytest
import torch

from implicit import Dense, GradientDifference, Hessian, lanczos


def symmetric(eigenvalues: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator))
    matrix = (q * eigenvalues) @ q.T
    return 0.5 * (matrix + matrix.T)


def test_extremes_of_a_spread_spectrum(generator) -> None:
    matrix = symmetric(torch.linspace(-3.0, 11.0, 40), generator)
    operator = Dense(matrix)
    found = lanczos(operator, 40)
    assert found.smallest == pytest.approx(-3.0, abs=1e-9)
    assert found.largest == found.ceiling == pytest.approx(11.0, abs=1e-9)
    assert found.products == operator.products == 40


def test_reorthogonalization_keeps_the_small_end_of_a_wide_spectrum(generator) -> None:
    matrix = symmetric(torch.logspace(0, 8, 30), generator)
    found = lanczos(Dense(matrix), 30)
    values = torch.linalg.eigvalsh(matrix)
    assert found.products == 30
    assert found.smallest == pytest.approx(float(values[0]), abs=1e-6)
    assert found.largest == pytest.approx(1e8, rel=1e-12)


def test_ritz_values_lie_inside_the_spectrum(generator) -> None:
    for steps in (1, 2, 5, 15):
        matrix = symmetric(torch.logspace(-3, 3, 60), generator)
        values = torch.linalg.eigvalsh(matrix)
        found = lanczos(Dense(matrix), steps, generator)
        assert float(values[0]) - 1e-9 <= found.smallest <= found.largest <= float(values[-1]) + 1e-9
        assert found.products == steps


def test_the_ceiling_is_above_the_largest_eigenvalue_in_200_trials(generator) -> None:
    for trial in range(200):
        n = 20 + trial
        spectrum = [
            torch.logspace(-4, 2, n),
            torch.cat([torch.ones(n - 1), torch.tensor([1.5])]),
            1.0 - torch.linspace(0, 1, n) ** 2,
            torch.rand(n, generator=generator),
        ][trial % 4]
        matrix = symmetric(spectrum, generator)
        largest = float(torch.linalg.eigvalsh(matrix)[-1])
        found = lanczos(Dense(matrix), 12, generator)
        assert found.ceiling >= largest * (1 - 1e-12)
        assert found.largest >= 0.85 * largest


def test_the_ceiling_follows_the_theorem() -> None:
    n, steps = 500, 20
    found = lanczos(Dense(torch.diag(torch.linspace(0.0, 1.0, n))), steps)
    gap = (math.log(1.648 * math.sqrt(n) / 1e-6) / (2 * steps - 1)) ** 2
    assert found.ceiling == pytest.approx(found.largest / (1 - gap), rel=1e-12)
    assert found.ceiling < 1.5
    few = lanczos(Dense(torch.diag(torch.linspace(0.0, 1.0, n))), 3)
    assert few.ceiling == pytest.approx(10 * few.largest, rel=1e-12)


def test_an_exhausted_krylov_space_is_exact(generator) -> None:
    matrix = symmetric(torch.cat([torch.full((20,), 2.0), torch.full((15,), 5.0), torch.full((15,), 7.0)]), generator)
    operator = Dense(matrix)
    found = lanczos(operator, 30)
    assert operator.products == found.products == 3
    assert found.smallest == pytest.approx(2.0, abs=1e-9)
    assert found.largest == found.ceiling == pytest.approx(7.0, abs=1e-9)
    identity = lanczos(Dense(4.0 * torch.eye(30)), 10)
    assert (identity.products, identity.ceiling) == (1, pytest.approx(4.0))
    zero = lanczos(Dense(torch.zeros(6, 6)))
    assert (zero.smallest, zero.largest, zero.ceiling, zero.products) == (0.0, 0.0, 0.0, 1)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiny_operators_are_exact(n, generator) -> None:
    matrix = symmetric(torch.linspace(-1.0, 2.0, n) if n > 1 else torch.tensor([-1.0]), generator)
    values = torch.linalg.eigvalsh(matrix)
    found = lanczos(Dense(matrix))
    assert found.smallest == pytest.approx(float(values[0]), abs=1e-12)
    assert found.largest == found.ceiling == pytest.approx(float(values[-1]), abs=1e-12)
    assert found.products <= n


def test_nothing_and_nonsense() -> None:
    empty = lanczos(Dense(torch.zeros(0, 0)))
    assert (empty.smallest, empty.largest, empty.ceiling, empty.products) == (0.0, 0.0, 0.0, 0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        lanczos(Dense(torch.eye(2)), 0)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite; check the objective at this point"):
            lanczos(Dense(torch.diag(torch.tensor([1.0, bad]))))


def test_repeated_calls_agree_and_leave_the_global_generator_alone(generator) -> None:
    matrix = Dense(symmetric(torch.logspace(-2, 2, 50), generator))
    before = torch.random.get_rng_state()
    assert lanczos(matrix, 8) == lanczos(matrix, 8)
    own = torch.Generator().manual_seed(5)
    assert lanczos(matrix, 8, own) != lanczos(matrix, 8, own)
    assert torch.equal(before, torch.random.get_rng_state())


def test_other_operators_and_float32(generator) -> None:
    matrix = symmetric(torch.linspace(0.5, 20.0, 30), generator)
    at = {"a": torch.randn(10, generator=generator), "b": torch.randn(4, 5, generator=generator)}

    def fn(y):
        flat = torch.cat([y["a"], y["b"].reshape(-1)])
        return 0.5 * flat @ matrix @ flat

    assert lanczos(Hessian(fn, at), 30).largest == pytest.approx(20.0, rel=1e-9)
    differences = lanczos(GradientDifference(fn, at), 20)
    assert differences.largest == pytest.approx(20.0, rel=1e-2)
    single = lanczos(Dense(matrix.float()), 30)
    assert single.largest == pytest.approx(20.0, rel=1e-5)
    assert single.smallest == pytest.approx(0.5, rel=1e-4)
