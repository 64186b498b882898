"""Randomness without global seeding: one generator per run, and paired draws inside user functions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def new_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded with ``seed``; the global generators are untouched."""
    return torch.Generator(device=device).manual_seed(seed)


def copy_generator(generator: torch.Generator) -> torch.Generator:
    """An independent generator in the same state: drawing from it does not move the original."""
    copy = torch.Generator(device=generator.device)
    copy.set_state(generator.get_state())
    return copy


def draw_seed(generator: torch.Generator) -> int:
    """A fresh seed from ``generator``, which moves by one draw."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device).item())


@contextmanager
def paired(seed: int) -> Iterator[None]:
    """Run user code under a fixed global seed, and restore the global generators afterwards.

    Dropout and its like take no generator. Two evaluations, each under ``paired(seed)`` with the same seed, see the
    same masks, which is what differences of gradients need.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also seed devices that are not forked here, at once or when they wake up.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
