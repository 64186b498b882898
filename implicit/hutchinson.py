"""The diagonal of an operator from products with random signs (Hutchinson's estimator).

Sources: Bekas, Kokiopoulou, Saad 2007 (diagonal estimator); Yao et al. 2021 (ADAHESSIAN, averaging within blocks).
"""

from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.operators import LinearOperator
from implicit.tree import Tree

Average = Any
"""None, ``"kernel"``, ``"leaf"``, a block length, or a tree of block lengths shaped like the domain."""


def hutchinson_diagonal(
    operator: LinearOperator,
    samples: int = 10,
    generator: torch.Generator | None = None,
    *,
    average: Average = None,
    chunk: int | None = None,
) -> Tree:
    """An unbiased estimate of the diagonal of a square operator from ``samples`` products.

    .. math:: D = \\frac1k \\sum_{i=1}^k z_i \\odot A z_i, \\qquad
              \\mathrm{Var}\\, D_j = \\frac1k \\sum_{l \\ne j} A_{jl}^2 \\;\\text{(A symmetric)},

    with independent random signs z: exact after one sample where A is diagonal, and useless where a row's
    off-diagonal norm dwarfs its diagonal entry. Averaging within blocks of entries whose diagonals are alike divides
    the variance by about the length of the block.

    Args:
        operator: square.
        samples: k, the number of products.
        generator: for the signs; a generator seeded with 0 by default, so that repeated calls agree.
        average: replaces the estimate by its means over blocks. ``"kernel"``: the trailing axes, from the third on, of
            leaves that have them (the windows of convolutions, as ADAHESSIAN does); ``"leaf"``: whole leaves; an
            integer b: every b successive entries of a leaf (the last block may be shorter); a tree of integers shaped
            like the domain: one block length per leaf, 1 for none. None averages nothing.
        chunk: how many products to take at a time; all by default.

    Returns:
        A tree shaped like the domain.

    Raises:
        ValueError: if the operator is not square, ``samples`` is not positive, or ``average`` is none of these.

    Example:
        >>> import torch, implicit
        >>> H = implicit.Hessian(lambda y: (y**4).sum() / 12, torch.tensor([1.0, 2.0]))
        >>> implicit.hutchinson_diagonal(H, samples=1)
        tensor([1., 4.])
    """
    found = diagonal_samples(operator, samples, generator, chunk).mean(dim=0)
    return average_blocks(tree.unravel(found, operator.like), average)


def diagonal_samples(
    operator: LinearOperator, samples: int, generator: torch.Generator | None = None, chunk: int | None = None
) -> Tensor:
    """The single estimates ``z_i * (A z_i)``, shape ``(samples, n)``."""
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a positive integer, got {samples!r}")
    if operator.shape[0] != operator.shape[1]:
        raise ValueError(f"only a square operator has a diagonal, got shape {operator.shape}")
    generator = generator or torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (samples, operator.size), generator=generator, device=generator.device)
    signs = (2 * bits - 1).to(dtype=operator.dtype, device=operator.device)
    return signs * operator.flat_mm(signs, chunk)


def average_blocks(diagonal: Tree, average: Average) -> Tree:
    """Block means of a tree; see :func:`hutchinson_diagonal`."""
    if average is None:
        return diagonal
    if average == "kernel":
        return tree.map(lambda leaf: _mean_over(leaf, leaf[0, 0].numel()) if leaf.ndim > 2 else leaf, diagonal)
    if average == "leaf":
        return tree.map(lambda leaf: _mean_over(leaf, leaf.numel()), diagonal)
    if isinstance(average, int):
        return tree.map(lambda leaf: _mean_over(leaf, average), diagonal)
    if isinstance(average, str):
        raise ValueError(f'average must be "kernel", "leaf", an integer or a tree of integers, got {average!r}')
    return tree.map(_mean_over, diagonal, average)


def _mean_over(leaf: Tensor, length: int) -> Tensor:
    if isinstance(length, bool) or not isinstance(length, int) or (length < 1 and leaf.numel()):
        raise ValueError(f"average: a block length must be a positive integer, got {length!r}")
    if not leaf.numel():
        return leaf
    flat = leaf.reshape(-1)
    means = torch.stack([part.mean() for part in torch.split(flat, length)])
    return means.repeat_interleave(min(length, len(flat)))[: len(flat)].reshape(leaf.shape)
