"""Optimal control of the Poisson equation on a grid: two variables and one linear constraint per grid point."""

import math

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import pad

from constrained import EqualityProblem, Multipliers
from implicit.tree import Tree
from problems.constrained_case import ConstrainedCase
from problems.registry import register

WEIGHT = 0.05
"""Of the squared control."""


def laplacian(w: Tensor) -> Tensor:
    """The five-point Laplacian on the interior (N, N) grid of (-1, 1)^2, h = 2 / (N + 1), zero on the boundary."""
    padded = pad(w, (1, 1, 1, 1))
    around = padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2]
    return (around - 4 * w) * ((w.shape[0] + 1) / 2) ** 2


@register(
    "poisson_control",
    "optimal control of the Poisson equation on a grid",
    "constrained",
    "equality",
    "exact",
    "pytree",
    "large",
)
def poisson_control(
    *, n: int = 16, supply_derivatives: bool = False, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> ConstrainedCase:
    """``min ||w - target||^2 / 2 + 0.05 ||z||^2 s.t. laplacian(w) + z = 0``, x = {"w": (n, n), "z": (n, n)}.

    The target is sin(4 + e (i - (n + 1) / 2)) + cos(3 + e (j - (n + 1) / 2)) at row i and column j, from 1 to n, with
    e = 0.1 / sqrt(15). The optimality conditions are z = -laplacian(w), multiplier = -0.1 z and
    w - target + laplacian(multiplier) = 0; sine transforms diagonalize them, which gives the stated answer.

    Args:
        n: grid points per side, at least 2; there are 2 n^2 variables and n^2 constraints.
        supply_derivatives: whether the Jacobian and the Hessian are supplied as sparse matrices of scipy, on the host.
            Otherwise automatic differentiation gives their products, and memory is linear in the grid.
        dtype: of everything.
        device: of everything.

    Raises:
        ValueError: for n below 2.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    shift = (torch.arange(1, n + 1, dtype=torch.float64) - (n + 1) / 2) * (0.1 / math.sqrt(15))
    exact = torch.sin(4 + shift)[:, None] + torch.cos(3 + shift)
    w_star, z_star = _solution(exact)
    f_star = float(0.5 * ((w_star - exact) ** 2).sum() + WEIGHT * (z_star**2).sum())
    target, w_star, z_star = (t.to(device=device, dtype=dtype) for t in (exact, w_star, z_star))
    jacobian, hessian = _matrices(n) if supply_derivatives else (None, None)

    def objective(x: Tree) -> Tensor:
        return 0.5 * ((x["w"] - target) ** 2).sum() + WEIGHT * (x["z"] ** 2).sum()

    zeros = {"w": torch.zeros_like(target), "z": torch.zeros_like(target)}
    return ConstrainedCase(
        name="poisson_control",
        problem=EqualityProblem(
            objective,
            lambda x: laplacian(x["w"]) + x["z"],
            jacobian=None if jacobian is None else lambda x: jacobian,
            hessian=None if hessian is None else lambda x, multiplier: hessian,
            name=f"poisson_control {n}x{n}",
        ),
        start={"w": torch.ones_like(target), "z": torch.ones_like(target)},
        source="I. Hong, S. Na, M. W. Mahoney, M. Kolar, ICML 2023, released code",
        f_star=f_star,
        x_star={"w": w_star, "z": z_star},
        multipliers_star=Multipliers(-2 * WEIGHT * z_star, (), zeros, zeros),
    )


def _solution(target: Tensor) -> tuple[Tensor, Tensor]:
    """``w = (I + 2 WEIGHT laplacian^2)^-1 target`` and ``z = -laplacian w`` in the sine basis, which diagonalizes."""
    n = len(target)
    k = torch.arange(1, n + 1, dtype=target.dtype)
    sines = torch.sin(math.pi / (n + 1) * k[:, None] * k) * math.sqrt(2 / (n + 1))  # symmetric and orthogonal
    line = -((n + 1) ** 2) * torch.sin(0.5 * math.pi / (n + 1) * k) ** 2
    eigenvalues = line[:, None] + line
    w = (sines @ target @ sines) / (1 + 2 * WEIGHT * eigenvalues**2)
    return sines @ w @ sines, sines @ (-eigenvalues * w) @ sines


def _matrices(n: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """The Jacobian (n^2, 2 n^2) and the Hessian (2 n^2, 2 n^2) over the ravelled (w, z)."""
    eye = sparse.identity(n)
    line = (sparse.eye(n, k=1) + sparse.eye(n, k=-1) - 2 * eye) * ((n + 1) / 2) ** 2
    stencil = sparse.kron(line, eye) + sparse.kron(eye, line)
    jacobian = sparse.csr_matrix(sparse.hstack([stencil, sparse.identity(n * n)]))
    return jacobian, sparse.csr_matrix(sparse.diags(np.repeat([1.0, 2 * WEIGHT], n * n)))
