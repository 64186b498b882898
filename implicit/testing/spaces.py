"""The spaces on which third-party code is tried: one vector, one number, nested containers, ties, nothing at all."""

import torch
from torch import Tensor

from implicit.tree import Tree

DTYPES = (torch.float64, torch.float32)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same in every dtype up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def nested(dtype: torch.dtype) -> Tree:
    """Eleven numbers in a dict with a matrix, an empty leaf, a scalar and a tuple in a list; keys are not sorted."""
    return {
        "weight": normal(1, 2, 3, dtype=dtype),
        "empty": normal(2, 0, 2, dtype=dtype),
        "parts": [normal(3, dtype=dtype), (normal(4, 4, dtype=dtype),)],
    }


def tied(dtype: torch.dtype) -> Tree:
    """Two leaves that are one tensor, all of its entries equal; they are two variables all the same."""
    shared = torch.full((3,), 0.5, dtype=dtype)
    return {"encoder": shared, "decoder": shared}


def spaces(dtype: torch.dtype) -> dict[str, Tree]:
    """Every space by name, filled with numbers of order one.

    Args:
        dtype: of all leaves.
    """
    return {
        "nested": nested(dtype),
        "vector": normal(5, 7, dtype=dtype),
        "scalar": normal(6, dtype=dtype),
        "tied": tied(dtype),
        "empty": {"none": normal(7, 0, dtype=dtype)},
    }
