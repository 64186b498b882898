"""A batch of quadratic programs as the solvers see it: one stack of normalised rows, one scale of the objective."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Program:
    """``min 1/2 x' Q x + q' x  s.t.  C x = d`` in the first ``equalities`` rows and ``C x <= d`` in the others.

    ``Q`` and ``C`` have a leading axis of size one where the whole batch shares them. Rows are ordered: equalities,
    inequalities, upper bounds, lower bounds; the last ``bounds`` rows of C have one nonzero entry each.
    """

    Q: Tensor  # (1 or batch, n, n)
    q: Tensor  # (batch, n)
    C: Tensor  # (1 or batch, rows, n)
    d: Tensor  # (batch, rows), zero where absent
    present: Tensor  # (batch, rows), bool: whether the right-hand side is finite
    equalities: int
    bounds: int = 0

    @property
    def batch(self) -> int:
        return len(self.q)

    @property
    def n(self) -> int:
        return self.q.shape[1]

    @property
    def rows(self) -> int:
        return self.d.shape[1]

    @property
    def free(self) -> Tensor:
        """Which rows are equations, ``(rows,)``."""
        return torch.arange(self.rows, device=self.q.device) < self.equalities

    def take(self, index: Tensor) -> "Program":
        """Some elements of the batch."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {k: v if len(v) == 1 < self.batch else v[index] for k, v in chosen.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def multiply(self, x: Tensor) -> Tensor:
        """``C x``, ``(batch, rows)``, zero for absent rows."""
        return product(self.C, x) * self.present

    def pull(self, multiplier: Tensor) -> Tensor:
        """``C' multiplier``, ``(batch, n)``."""
        return product(self.C.mT, multiplier)

    def curve(self, x: Tensor) -> Tensor:
        """``Q x``, ``(batch, n)``."""
        return product(self.Q, x)

    def gap(self, x: Tensor) -> Tensor:
        """``C x - d``: at most zero, or equal to zero, where x is feasible."""
        return self.multiply(x) - self.d

    def slope(self, x: Tensor, multiplier: Tensor) -> Tensor:
        """The gradient of the Lagrangian."""
        return self.curve(x) + self.q + self.pull(multiplier)

    def violation(self, x: Tensor) -> Tensor:
        """``C x - d``, without the part of inequalities that is allowed."""
        gap = self.gap(x)
        return torch.where(self.free, gap, gap.clamp(min=0))

    def error(self, x: Tensor, multiplier: Tensor) -> Tensor:
        """How far (x, multiplier) is from the optimality conditions, relative to their terms, ``(batch,)``.

        NaN where the point is.
        """
        curve, pull = self.curve(x), self.pull(multiplier)
        size = largest(self.q)
        terms = largest(curve) + torch.where(size > 0, size, 1.0) + largest(pull)
        stationarity = largest(curve + self.q + pull) / terms
        gap, reach = self.gap(x), 1 + largest(x)
        feasibility = largest(torch.where(self.free, gap, gap.clamp(min=0))) / reach
        force = 1 + largest(multiplier)
        sign = largest(torch.where(self.free, 0.0, multiplier.clamp(max=0))) / force
        slack = torch.minimum(gap.abs() / reach[:, None], multiplier.abs() / force[:, None])
        complementarity = largest(torch.where(self.free, 0.0, slack))
        return torch.stack([stationarity, feasibility, sign, complementarity]).amax(0)


def product(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector`` for each element; a shared matrix is one matrix product for the whole batch."""
    if len(matrix) == 1:
        return vector @ matrix[0].mT
    return (matrix @ vector[..., None])[..., 0]


def largest(values: Tensor) -> Tensor:
    """The largest absolute entry of each row, zero where there is none."""
    if not values.shape[1]:
        return values.new_zeros(len(values))
    return values.abs().amax(1)


def equilibrated(program: Program, sweeps: int = 10) -> tuple[Program, Tensor, Tensor]:
    """The program in variables ``x / columns`` and with rows times ``rows``, its entries brought close to one.

    Reference:
        D. Ruiz, "A scaling algorithm to equilibrate both rows and columns norms in matrices", RAL-TR-2001-034, 2001.
    """
    columns, rows = torch.ones_like(program.q), torch.ones_like(program.d)
    Q, C = program.Q.abs(), program.C.abs()
    for _ in range(sweeps):
        scaled_Q = columns[:, :, None] * Q * columns[:, None, :]
        scaled_C = rows[:, :, None] * C * columns[:, None, :]
        height = torch.cat([scaled_Q, scaled_C], 1).amax(1)
        width = scaled_C.amax(2)
        columns = columns / torch.where(height > 0, height, 1.0).sqrt()
        rows = rows / torch.where(width > 0, width, 1.0).sqrt()
    changed = replace(
        program,
        Q=columns[:, :, None] * program.Q * columns[:, None, :],
        q=columns * program.q,
        C=rows[:, :, None] * program.C * columns[:, None, :],
        d=rows * program.d,
        bounds=0,
    )
    return changed, columns, rows
