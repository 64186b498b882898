"""Curvature measured from products: extreme eigenvalues by Lanczos."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.operators import LinearOperator


@dataclass(frozen=True)
class Spectrum:
    """Extreme Ritz values of a symmetric operator.

    Attributes:
        smallest: an upper bound on the smallest eigenvalue, and no lower bound: after few steps on an ill-conditioned
            operator it is far too large.
        largest: a lower bound on the largest eigenvalue, usually accurate to a few per cent after ten steps.
        ceiling: an upper bound on the largest eigenvalue of a positive semidefinite operator that holds with
            probability ``1 - 1e-6`` over the random start (Kuczynski and Wozniakowski 1992, theorem 4.2). With fewer
            than about ten products that bound says nothing, and the ceiling is ten times ``largest``.
        products: products used.
    """

    smallest: float
    largest: float
    ceiling: float
    products: int


def lanczos(operator: LinearOperator, steps: int = 20, generator: torch.Generator | None = None) -> Spectrum:
    """Extreme eigenvalues of a symmetric operator by Lanczos with full reorthogonalization.

    Args:
        operator: symmetric.
        steps: products to spend; at most n are used, and then the values are exact.
        generator: for the random start; a generator seeded with 0 by default, so that repeated calls agree.

    Returns:
        The extremes; zeros for an empty operator.

    Raises:
        ValueError: if a product is not finite, or ``steps`` is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    n = operator.size
    if n == 0:
        return Spectrum(0.0, 0.0, 0.0, 0)
    generator = generator or torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=generator, dtype=torch.float64, device=generator.device)
    basis = [(start / torch.linalg.vector_norm(start)).to(dtype=operator.dtype, device=operator.device)]
    diagonal: list[float] = []
    offdiagonal: list[float] = []
    exhausted = False
    for _ in range(min(steps, n)):
        w = operator.flat_mv(basis[-1])
        diagonal.append(float(w @ basis[-1]))
        if not math.isfinite(diagonal[-1]):
            raise ValueError("a product with the operator is not finite; check the objective at this point")
        stacked = torch.stack(basis)
        for _ in range(2):  # twice is enough
            w = w - stacked.T @ (stacked @ w)
        beta = float(torch.linalg.vector_norm(w))
        scale = max(abs(d) for d in diagonal) + max(offdiagonal, default=0.0)
        if beta <= float(torch.finfo(operator.dtype).eps) * max(scale, beta) * n**0.5:
            exhausted = True
            break
        offdiagonal.append(beta)
        basis.append(w / beta)
    ritz = _tridiagonal_eigenvalues(diagonal, offdiagonal[: len(diagonal) - 1])
    low, high = float(ritz[0]), float(ritz[-1])
    done = len(diagonal)
    # An exhausted Krylov space of a random start contains every eigenvalue.
    ceiling = high if done == n or exhausted else high / (1.0 - _relative_gap(n, done))
    return Spectrum(low, high, ceiling, done)


def _tridiagonal_eigenvalues(diagonal: list[float], offdiagonal: list[float]) -> Tensor:
    d = torch.tensor(diagonal, dtype=torch.float64)
    e = torch.tensor(offdiagonal, dtype=torch.float64)
    return torch.linalg.eigvalsh(torch.diag(d) + torch.diag(e, 1) + torch.diag(e, -1))


def _relative_gap(n: int, steps: int, probability: float = 1e-6) -> float:
    """The relative error of the largest Ritz value that is exceeded with at most ``probability``."""
    root = math.log(1.648 * math.sqrt(n) / probability) / (2 * steps - 1)
    return min(root * root, 0.9)
