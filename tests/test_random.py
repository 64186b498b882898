"""Paired randomness: equal draws under one seed, and no trace in the global generators."""

import pytest
import torch

from implicit import paired
from implicit.random import copy_generator, draw_seed, new_generator


def test_dropout_masks_are_equal_under_one_seed_and_differ_under_another() -> None:
    dropout, ones = torch.nn.Dropout(0.5), torch.ones(1000)

    def masks(seed):
        with paired(seed):
            return dropout(ones), dropout(ones)

    first, second, other = masks(3), masks(3), masks(4)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert 400 < int((first[0] == 0).sum()) < 600


def test_differences_of_gradients_see_one_mask() -> None:
    dropout = torch.nn.Dropout(0.5)
    seed = draw_seed(new_generator(0))

    def gradient(y):
        y = y.detach().requires_grad_()
        with paired(seed):
            return torch.autograd.grad(dropout(y).square().sum(), y)[0]

    y, v = torch.ones(50), torch.linspace(0.1, 1.0, 50)
    change = (gradient(y + 1e-6 * v) - gradient(y)) / 1e-6
    mask = gradient(y) / 2
    torch.testing.assert_close(change, 2 * mask * v, rtol=1e-6, atol=1e-8)


def test_the_global_generator_is_untouched_even_after_an_error() -> None:
    before = torch.random.get_rng_state()
    with paired(1):
        torch.rand(10)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="inside"), paired(1):
        torch.rand(10)
        raise RuntimeError("inside")
    assert torch.equal(torch.random.get_rng_state(), before)
    with paired(1):
        outer = torch.rand(1)
        with paired(2):
            torch.rand(7)
        after = torch.rand(1)
    with paired(1):
        assert torch.equal(torch.rand(1), outer)
        assert torch.equal(torch.rand(1), after)


def test_seeding_does_not_reach_devices_that_are_asleep(monkeypatch) -> None:
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with paired(5):
        torch.rand(1)
    assert seeded == []


@pytest.mark.gpu
def test_every_cuda_generator_is_seeded_and_restored() -> None:
    torch.zeros(1, device="cuda")
    before = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
    draws = []
    for _ in range(2):
        with paired(5):
            draws.append([torch.rand(3, device=f"cuda:{i}") for i in range(len(before))])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    assert all(torch.equal(a, torch.cuda.get_rng_state(i)) for i, a in enumerate(before))


def test_generators_are_copied_and_seeded_without_global_state() -> None:
    before = torch.random.get_rng_state()
    generator = new_generator(7)
    torch.rand(3, generator=generator)
    copy = copy_generator(generator)
    assert torch.equal(torch.rand(4, generator=copy), torch.rand(4, generator=generator))
    torch.rand(1, generator=copy)
    seeds = [draw_seed(new_generator(0)), draw_seed(new_generator(0)), draw_seed(new_generator(1))]
    assert seeds[0] == seeds[1] != seeds[2]
    assert 0 <= seeds[0] < 2**62
    moved = new_generator(0)
    assert draw_seed(moved) != draw_seed(moved)
    assert torch.equal(torch.random.get_rng_state(), before)
