"""Hutchinson's diagonal against closed forms of its mean, variance and block averages."""

import pytest
import torch

from implicit import Dense, Hessian, hutchinson_diagonal
from tests.dense import normal


def symmetric(n: int, seed: int = 0) -> torch.Tensor:
    matrix = normal(seed, n, n)
    return 0.5 * (matrix + matrix.T)


def test_exact_after_one_sample_where_the_operator_is_diagonal(generator) -> None:
    diagonal = torch.linspace(-2.0, 3.0, 7)
    operator = Dense(torch.diag(diagonal))
    torch.testing.assert_close(hutchinson_diagonal(operator, 1, generator), diagonal, rtol=1e-15, atol=0)
    assert operator.products == 1


@pytest.mark.parametrize("samples", [1, 5])
def test_mean_and_variance_are_the_closed_forms(samples: int, generator) -> None:
    matrix = symmetric(6)
    trials = 6_000
    found = torch.stack([hutchinson_diagonal(Dense(matrix), samples, generator) for _ in range(trials)])
    variance = (matrix.square().sum(dim=1) - matrix.diag().square()) / samples
    # Five standard errors of a mean; a variance of this many draws is known to about 2 per cent.
    assert bool(((found.mean(0) - matrix.diag()).abs() <= 5 * (variance / trials).sqrt()).all())
    torch.testing.assert_close(found.var(0), variance, rtol=0.12, atol=0)


def test_nonsymmetric_operators_have_the_variance_of_their_rows(generator) -> None:
    matrix = torch.triu(normal(3, 4, 4))
    found = torch.stack([hutchinson_diagonal(Dense(matrix, symmetric=False), 1, generator) for _ in range(4_000)])
    assert bool((found.var(0)[-1] == 0).all())
    torch.testing.assert_close(found.mean(0), matrix.diag(), rtol=0, atol=0.15)


def test_all_samples_are_one_batch_and_chunks_change_nothing() -> None:
    calls = []

    class Recording(Dense):
        def _flat_block(self, rows):
            calls.append(len(rows))
            return super()._flat_block(rows)

    operator = Recording(symmetric(9))
    whole = hutchinson_diagonal(operator, 7)
    pieces = hutchinson_diagonal(operator, 7, chunk=3)
    torch.testing.assert_close(whole, pieces, rtol=1e-14, atol=1e-14)
    assert calls == [7, 3, 3, 1]
    torch.testing.assert_close(whole, hutchinson_diagonal(operator, 7), rtol=0, atol=0)  # seeded by default
    assert not torch.equal(whole, hutchinson_diagonal(operator, 7, torch.Generator().manual_seed(1)))


def test_trees_keep_their_structure() -> None:
    like = {"w": torch.zeros(2, 3), "none": torch.zeros(0, 4), "b": [torch.zeros(())]}
    operator = Dense(torch.diag(torch.arange(1.0, 8.0)), like)
    found = hutchinson_diagonal(operator, 2)
    assert found["w"].shape == (2, 3) and found["none"].shape == (0, 4) and found["b"][0].shape == ()
    # Dense ravels dicts in the order of their own keys: w, none, b.
    torch.testing.assert_close(found["w"], torch.arange(1.0, 7.0).reshape(2, 3))
    torch.testing.assert_close(found["b"][0], torch.tensor(7.0))


def test_averages_within_blocks() -> None:
    like = {"conv": torch.zeros(2, 2, 2, 1), "flat": torch.zeros(5), "none": torch.zeros(0, 3), "one": torch.zeros(())}
    operator = Dense(torch.diag(torch.arange(14.0)), like)
    kernel = hutchinson_diagonal(operator, 1, average="kernel")
    torch.testing.assert_close(kernel["conv"][:, :, 0, 0], torch.tensor([[0.5, 2.5], [4.5, 6.5]]))
    torch.testing.assert_close(kernel["conv"], kernel["conv"][..., :1, :1].expand(2, 2, 2, 1))
    torch.testing.assert_close(kernel["flat"], torch.arange(8.0, 13.0))
    leaf = hutchinson_diagonal(operator, 1, average="leaf")
    torch.testing.assert_close(leaf["conv"], torch.full((2, 2, 2, 1), 3.5))
    torch.testing.assert_close(leaf["flat"], torch.full((5,), 10.0))
    assert leaf["none"].shape == (0, 3)
    beyond = hutchinson_diagonal(operator, 1, average=10**15)
    torch.testing.assert_close(beyond["conv"], leaf["conv"])
    pairs = hutchinson_diagonal(operator, 1, average=2)
    torch.testing.assert_close(pairs["flat"], torch.tensor([8.5, 8.5, 10.5, 10.5, 12.0]))  # the last block is short
    torch.testing.assert_close(pairs["one"], torch.tensor(13.0))
    mixed = hutchinson_diagonal(operator, 1, average={"one": 1, "none": 1, "flat": 5, "conv": 1})
    torch.testing.assert_close(mixed["flat"], leaf["flat"])
    torch.testing.assert_close(mixed["conv"].reshape(-1), torch.arange(8.0))


def test_averaging_divides_the_variance_by_the_block_length(generator) -> None:
    """Blocks of independent 2 x 2 matrices: the estimates within one average are uncorrelated."""
    operator = Dense(torch.block_diag(*[torch.tensor([[1.0, 2.0], [2.0, 1.0]])] * 10))
    single = torch.stack([hutchinson_diagonal(operator, 1, generator)[::2] for _ in range(1_000)])
    blocks = torch.stack([hutchinson_diagonal(operator, 1, generator, average="leaf")[:1] for _ in range(1_000)])
    assert float(single.var(0).mean()) == pytest.approx(4.0, rel=0.1)
    assert float(blocks.var()) == pytest.approx(4.0 / 10, rel=0.2)  # ten independent blocks, both rows of each agree


def test_hessians_and_half_precision() -> None:
    hessian = Hessian(lambda y: (y**4).sum() / 12, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(hutchinson_diagonal(hessian, 3), torch.tensor([1.0, 4.0]))
    # The mean of 300 bf16 numbers near one is lost when it is accumulated in bf16.
    ones = Dense(torch.eye(4, dtype=torch.bfloat16))
    found = hutchinson_diagonal(ones, 300)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, torch.ones(4, dtype=torch.bfloat16), rtol=0, atol=0)


def test_an_empty_domain() -> None:
    assert hutchinson_diagonal(Dense(torch.zeros(0, 0)), 2).shape == (0,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 0}, "samples must be a positive integer, got 0"),
        ({"samples": True}, "samples must be a positive integer, got True"),
        ({"average": "rows"}, "average must be .*got 'rows'"),
        ({"average": 0}, "block length must be a positive integer, got 0"),
        ({"average": 1.5}, "block length must be a positive integer, got 1.5"),
    ],
)
def test_misuse(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        hutchinson_diagonal(Dense(torch.eye(3)), **given)
