"""Linear systems with known answers, by what a solver must claim to be held to them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit import tree
from implicit.operators import LinearOperator
from implicit.testing.spaces import nested, normal, spaces
from implicit.tree import Tree

KINDS = ("spd", "symmetric", "general", "singular", "rectangular")
"""What a solver can be for: symmetric positive definite, symmetric indefinite, nonsymmetric, symmetric positive
semidefinite with a right-hand side in the range, and least squares."""


@dataclass(frozen=True, kw_only=True)
class System:
    """``A v = b`` over trees.

    Attributes:
        name: for messages.
        kind: one of ``KINDS``; what a solver must be for to be held to it.
        matrix: A, shape ``(m, n)``.
        b: the right-hand side, a ravelled vector of shape ``(m,)``.
        like: the domain; one vector by default.
        easy: whether every solver for this kind must reach its tolerance; from the others only the truth is asked.
        declares_definite: whether the operator says that it is positive definite (it may be lying).
    """

    name: str
    kind: str
    matrix: Tensor
    b: Tensor
    like: Tree = None
    easy: bool = True
    declares_definite: bool | None = None

    def operator(self) -> "CountedMatrix":
        """A fresh operator with its counts at zero."""
        symmetric = self.kind in ("spd", "symmetric", "singular")
        definite = self.kind == "spd" if self.declares_definite is None else self.declares_definite
        rows, columns = self.matrix.shape
        like = self.matrix.new_zeros(columns) if self.like is None else self.like
        out = None if rows == columns else self.matrix.new_zeros(rows)
        return CountedMatrix(self.matrix.clone(), like, out, symmetric=symmetric, positive_definite=definite)


class CountedMatrix(LinearOperator):
    """A matrix that counts for itself how many vectors it was applied to, whoever asked.

    Attributes:
        applied: products so far, with this operator alone.
    """

    def __init__(self, matrix: Tensor, like: Tree, out: Tree, *, symmetric: bool, positive_definite: bool) -> None:
        super().__init__(like, out)
        self.matrix, self.symmetric, self.positive_definite = matrix, symmetric, positive_definite
        self.applied = 0
        self._turned: CountedMatrix | None = None

    def mv(self, v: Tree) -> Tree:
        self.applied += 1
        return tree.unravel(self.matrix @ tree.ravel(v), self.out)

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += len(rows)
        self.applied += len(rows)
        return rows @ self.matrix.T

    @property
    def total(self) -> int:
        """Products with this operator and with its transpose."""
        return self.applied + (self._turned.applied if self._turned is not None else 0)

    @property
    def T(self) -> "CountedMatrix":
        if self.symmetric:
            return self
        if self._turned is None:
            turned = CountedMatrix(self.matrix.T, self.out, self.like, symmetric=False, positive_definite=False)
            self._turned, turned._turned = turned, self
        return self._turned


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors, shape ``(n, n)``."""
    n = len(values)
    q, _ = torch.linalg.qr(normal(100 + seed, n, n))
    matrix = (q * values.double()) @ q.T
    return 0.5 * (matrix + matrix.T)


def systems(dtype: torch.dtype) -> list[System]:
    """Every system in one dtype; each is made in float64 and rounded."""
    found = [*_definite(), *_indefinite(), *_general(), *_singular(), *_rectangular()]
    if torch.finfo(dtype).eps < 1e-12:  # rounded to less, this would not be definite
        found.append(_diagonal("condition 1e10", 10))
    return [_cast(system, dtype) for system in found]


def _diagonal(name: str, decades: int) -> System:
    """Eigenvalues from 1 up, evenly spread over so many decades."""
    values = torch.logspace(0, decades, 20, dtype=torch.float64)
    return System(name=name, kind="spd", matrix=with_eigenvalues(values), b=normal(24, 20), easy=False)


def _cast(system: System, dtype: torch.dtype) -> System:
    values = {name: getattr(system, name) for name in ("name", "kind", "easy", "declares_definite")}
    like = None if system.like is None else tree.map(lambda leaf: leaf.to(dtype), system.like)
    return System(matrix=system.matrix.to(dtype), b=system.b.to(dtype), like=like, **values)


def _definite() -> list[System]:
    own = spaces(torch.float64)
    ones = torch.ones(6, dtype=torch.float64)
    clusters = torch.tensor([2.0, 2.0, 2.0, 5.0, 5.0, 5.0])
    spread = torch.logspace(0, 1, 11, dtype=torch.float64)
    return [
        System(
            name="nested, condition 10",
            kind="spd",
            matrix=with_eigenvalues(spread),
            b=normal(21, 11),
            like=own["nested"],
        ),
        System(
            name="one number", kind="spd", matrix=torch.tensor([[3.0]]).double(), b=normal(22, 1), like=own["scalar"]
        ),
        System(name="tied leaves", kind="spd", matrix=with_eigenvalues(clusters), b=ones, like=own["tied"]),
        System(name="identity", kind="spd", matrix=torch.eye(8).double(), b=normal(23, 8)),
        System(name="no unknowns", kind="spd", matrix=normal(0, 0, 0), b=normal(0, 0), like=own["empty"]),
        _diagonal("condition 1e4", 4),
    ]


def _indefinite() -> list[System]:
    values = torch.tensor([-4.0, -2.0, -1.0, -1.0, 1.0, 1.5, 2.0, 3.0, 3.0, 4.0, 5.0])
    matrix = with_eigenvalues(values, 1)
    rows = normal(31, 2, 4)
    saddle = torch.cat(
        [torch.cat([torch.diag(torch.arange(1.0, 5.0).double()), rows.T], 1), torch.cat([rows, normal(0, 2, 2) * 0], 1)]
    )
    return [
        System(
            name="nested, indefinite", kind="symmetric", matrix=matrix, b=normal(32, 11), like=nested(torch.float64)
        ),
        System(name="minus two", kind="symmetric", matrix=torch.tensor([[-2.0]]).double(), b=normal(33, 1)),
        System(name="saddle point", kind="symmetric", matrix=saddle, b=normal(34, 6)),
        System(
            name="indefinite, though it declares positive_definite",
            kind="symmetric",
            matrix=matrix,
            b=normal(35, 11),
            easy=False,
            declares_definite=True,
        ),
        System(
            name="curvature p.Ap = 0 in the first step",
            kind="symmetric",
            matrix=torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(),
            b=torch.tensor([1.0, 0.0]).double(),
            easy=False,
        ),
    ]


def _general() -> list[System]:
    matrix = 2.0 * torch.eye(11).double() + 0.3 * normal(41, 11, 11)
    skew = normal(42, 6, 6)
    return [
        System(
            name="nested, nonsymmetric", kind="general", matrix=matrix, b=normal(43, 11), like=nested(torch.float64)
        ),
        System(name="one number", kind="general", matrix=torch.tensor([[0.5]]).double(), b=normal(44, 1)),
        System(
            name="far from normal",
            kind="general",
            matrix=torch.eye(12).double() + 1.5 * torch.triu(normal(45, 12, 12), 1),
            b=normal(46, 12),
            easy=False,
        ),
        System(
            name="skew-symmetric plus 1e-2",
            kind="general",
            matrix=skew - skew.T + 1e-2 * torch.eye(6).double(),
            b=normal(47, 6),
            easy=False,
        ),
        System(
            name="cyclic shift",
            kind="general",
            matrix=torch.roll(torch.eye(9).double(), 1, 0),
            b=torch.eye(9).double()[0],
            easy=False,
        ),
    ]


def _singular() -> list[System]:
    values = torch.cat([torch.zeros(3), torch.linspace(1, 5, 8)])
    matrix = with_eigenvalues(values, 2)
    block = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0])).double()
    return [
        System(
            name="nested, rank 8 of 11, consistent",
            kind="singular",
            matrix=matrix,
            b=matrix @ normal(51, 11),
            like=nested(torch.float64),
        ),
        System(name="two free unknowns", kind="singular", matrix=block, b=block @ torch.ones(4).double()),
        System(name="rank 8 of 11, no solution", kind="singular", matrix=matrix, b=normal(52, 11), easy=False),
        System(name="zero, no solution", kind="singular", matrix=0.0 * block, b=normal(53, 4), easy=False),
        System(
            name="two free unknowns, no solution, though it declares positive_definite",
            kind="singular",
            matrix=block,
            b=torch.ones(4).double(),
            easy=False,
            declares_definite=True,
        ),
    ]


def _rectangular() -> list[System]:
    tall, wide = normal(61, 9, 4), normal(62, 4, 9)
    return [
        System(name="tall, consistent", kind="rectangular", matrix=tall, b=tall @ normal(63, 4)),
        System(name="tall, least squares", kind="rectangular", matrix=tall, b=normal(64, 9)),
        System(name="wide", kind="rectangular", matrix=wide, b=normal(65, 4)),
    ]
