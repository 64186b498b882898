"""Linear systems of known spectrum, the solvers that are made for each kind, and residuals measured independently."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit import (
    CG,
    GMRES,
    LDLT,
    LSMR,
    LU,
    MINRES,
    AutoSolver,
    BiCGSTAB,
    Cholesky,
    Dense,
    LinearOperator,
    LinearSolver,
    Neumann,
    NormalCG,
)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    q = orthogonal(len(eigenvalues), seed)
    matrix = (q * eigenvalues) @ q.T
    return 0.5 * (matrix + matrix.T)


def spd(n: int, condition: float, seed: int = 0) -> Tensor:
    return symmetric(torch.logspace(0, math.log10(condition), n), seed)


def indefinite(n: int, condition: float, seed: int = 0) -> Tensor:
    """Every third eigenvalue is negative."""
    signs = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
    return symmetric(torch.logspace(0, math.log10(condition), n) * signs, seed)


def nonsymmetric(n: int, condition: float, seed: int = 0) -> Tensor:
    """A symmetric part of the given condition number, and a skew part of the size of its smallest eigenvalues."""
    skew = normal(n, n, seed=seed + 7)
    return spd(n, condition, seed) + 0.1 * (skew - skew.T)


MATRICES: dict[str, Callable[[int, float], Tensor]] = {
    "definite": spd,
    "indefinite": indefinite,
    "nonsymmetric": nonsymmetric,
}


def operator(kind: str, matrix: Tensor, like: Any = None) -> Dense:
    """A matrix with what its kind declares."""
    return Dense(matrix, like, like, symmetric=kind != "nonsymmetric", positive_definite=kind == "definite")


KINDS: dict[type[LinearSolver], tuple[str, ...]] = {
    CG: ("definite",),
    MINRES: ("definite", "indefinite"),
    GMRES: ("definite", "indefinite", "nonsymmetric"),
    BiCGSTAB: ("definite", "indefinite", "nonsymmetric"),
    NormalCG: ("definite", "indefinite", "nonsymmetric"),
    LSMR: ("definite", "indefinite", "nonsymmetric"),
    Neumann: ("definite", "nonsymmetric"),
    Cholesky: ("definite",),
    LDLT: ("definite", "indefinite"),
    LU: ("definite", "indefinite", "nonsymmetric"),
    AutoSolver: ("definite", "indefinite", "nonsymmetric"),
}
"""Every solver and the systems it is made for."""

DIRECT = (Cholesky, LDLT, LU, AutoSolver)  # AutoSolver factorises what is small
PAIRS = [(solver, kind) for solver, kinds in KINDS.items() for kind in kinds]
ITERATIVE = [(solver, kind) for solver, kind in PAIRS if solver not in DIRECT]


def name(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


def relative(matrix: Tensor, x: Tensor, b: Tensor) -> float:
    """The relative residual of one right-hand side, in float64 and safe from underflow."""
    matrix, x, b = matrix.double(), x.double(), b.double()
    size = float(b.abs().max())
    return float((b / size - matrix @ (x / size)).norm() / (b / size).norm())


class Counting(LinearOperator):
    """A matrix that records how many vectors each product took; its transpose keeps a record of its own."""

    def __init__(self, matrix: Tensor, *, symmetric: bool = True, positive_definite: bool = True) -> None:
        rows, columns = matrix.shape
        super().__init__(matrix.new_zeros(columns), None if rows == columns else matrix.new_zeros(rows))
        self.matrix, self.symmetric = matrix, symmetric
        self.positive_definite = positive_definite and symmetric
        self.taken: list[int] = []
        self._transposed: Counting | None = None

    def mv(self, v: Tensor) -> Tensor:
        self.taken.append(1)
        return self.matrix @ v

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += len(rows)
        self.taken.append(len(rows))
        return rows @ self.matrix.T

    @property
    def T(self) -> "Counting":
        if self.symmetric:
            return self
        if self._transposed is None:
            self._transposed = Counting(self.matrix.T, symmetric=False)
        return self._transposed
