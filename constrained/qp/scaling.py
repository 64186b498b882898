"""From the arguments of a quadratic program to the scaled program, and multipliers back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from constrained.qp.program import Program


@dataclass(frozen=True)
class Data:
    """The arguments, each with a leading axis of size one or batch, and no rows where nothing was given."""

    Q: Tensor
    q: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor
    lower: Tensor
    upper: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.Q, self.q, self.A, self.b, self.G, self.h, self.lower, self.upper)

    @property
    def batch(self) -> int:
        return max(len(t) for t in self.tensors)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Numbers of equations, inequalities, upper and lower bounds, in the order of the rows."""
        return self.A.shape[1], self.G.shape[1], self.upper.shape[1], self.lower.shape[1]

    def symmetric(self) -> Tensor:
        """The part of Q that matters."""
        return (self.Q + self.Q.mT) / 2

    def rows(self) -> tuple[Tensor, Tensor]:
        """``C`` with a leading axis of size one or batch, and ``d``, ``(batch, rows)``, infinite where absent."""
        n = self.q.shape[1]
        eye = torch.eye(n, dtype=self.q.dtype, device=self.q.device)[None]
        blocks = [self.A, self.G, eye[:, : self.upper.shape[1]], -eye[:, : self.lower.shape[1]]]
        lead = max(len(block) for block in blocks if block.shape[1]) if any(self.counts) else 1
        C = torch.cat([block.expand(lead, -1, -1) for block in blocks], 1)
        sides = [self.b, self.h, self.upper, -self.lower]
        return C, torch.cat([side.expand(self.batch, -1) for side in sides], 1)


@dataclass(frozen=True)
class Scale:
    """Factors of the rows, ``(batch, rows)``, and of the objective, ``(batch,)``, and the unit of x, ``(batch,)``.

    The objective's is for x in its own units; the program's is that over ``unit``.
    """

    row: Tensor
    objective: Tensor
    unit: Tensor

    def multiplier(self, multiplier: Tensor) -> Tensor:
        """Multipliers of the arguments from those of the program."""
        return multiplier * self.row * (self.unit / self.objective)[:, None]


def scaled(data: Data) -> tuple[Program, Scale]:
    """Rows of length one, x in units of the largest right-hand side, and an objective divided by its largest entry.

    That is the largest entry of Q, or of q where Q is zero. Right-hand sides above one leave x as it is: they are
    often mere safeguards, far from every solution.
    """
    C, d = data.rows()
    Q, q = data.symmetric(), data.q.expand(data.batch, -1)
    row = inverse(torch.linalg.vector_norm(C, dim=2))
    present = d.isfinite()
    d = torch.where(present, row * d, 0.0)
    reach = d.abs().amax(1) if d.shape[1] else torch.zeros_like(q[:, 0])
    unit = torch.where(reach > 0, reach, 1.0).clamp(max=1.0)
    bend = Q.abs().amax((1, 2))
    factor = torch.where(bend > 0, inverse(bend), inverse(q.abs().amax(1)) * unit)
    program = Program(
        Q=inverse(bend)[:, None, None] * Q,
        q=(factor / unit)[:, None] * q,
        C=row[..., None] * C,
        d=d / unit[:, None],
        present=present,
        equalities=data.counts[0],
        bounds=data.counts[2] + data.counts[3],
    )
    return program, Scale(row.expand(data.batch, -1), factor, unit)


def inverse(size: Tensor) -> Tensor:
    """``1 / size``, and one where that is zero."""
    return torch.where(size > 0, 1 / torch.where(size > 0, size, 1.0), 1.0)
