"""Conic programs whose data are affine in parameters, with their optimality conditions.

    minimize 1/2 x' P x + q' x   subject to   A x + s = b,  s in K,        P, q, A, b affine in theta,

with z the multipliers in the dual cone. With ``s = proj_K(u)`` and ``z = proj_K(u) - u`` the optimality conditions
become one square system in (x, z, u):

    c (P x + q) + (E A)' z = 0,    E A x + proj_K(u) - E b = 0,    z - proj_K(u) + u = 0.

The weights c > 0 of the objective and E of the rows (one for each cone) change neither x nor its derivative. They are
chosen at the solution, so that slacks and multipliers are comparable whatever the units of the problem, and then held.

References:
    A. Agrawal, S. Barratt, S. Boyd, E. Busseti, W. Moursi, "Differentiating through a cone program", J. Appl. Numer.
        Optim. 1(2), 2019 (the same with a homogeneous embedding, for linear objectives).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.cvx.cones import Cone
from implicit.cvx.factorization import Factorizations
from implicit.cvx.pattern import AffineMap, Pattern


@dataclass(frozen=True)
class Limits:
    """Declared bounds of one parameter, and which entries of theta it fills."""

    name: str
    entries: slice
    lower: Tensor
    upper: Tensor
    strict: bool

    def check(self, theta: Tensor) -> None:
        """Refuse values beyond the bounds, for which the problem need not be convex."""
        values = theta[:, self.entries]
        inside = (
            (self.lower < values) & (values < self.upper)
            if self.strict
            else (self.lower <= values) & (values <= self.upper)
        )
        outside = (~(inside | values.isnan())).nonzero()
        if len(outside):
            i, j = outside[0].tolist()
            where = f" of element {i} of the batch" if len(theta) > 1 else ""
            raise ValueError(
                f"parameter {self.name}{where} has the value {float(values[i, j]):g}, outside what it was declared to "
                f"be ({float(self.lower[j]):g} to {float(self.upper[j]):g}): correct the value or the declaration"
            )


@dataclass(frozen=True)
class Scales:
    """Weights of the objective, ``(batch, 1)``, and of the rows, and their distances that count as zero at kinks."""

    objective: Tensor
    rows: Tensor
    tolerance: Tensor

    def pack(self) -> Tensor:
        """As one tensor; see :meth:`Program.scales`."""
        return torch.cat([self.objective, self.rows, self.tolerance], 1)


@dataclass(frozen=True)
class Data:
    """Nonzeros and vectors of one batch of weighted programs."""

    P: Tensor
    q: Tensor
    A: Tensor
    b: Tensor


class Program:
    """The structure that all programs of a batch share.

    Args:
        maps: the affine maps of P, q, A and b; P with both triangles.
        P: where the nonzeros of P are.
        A: the same for A.
        families: the cones, in the order of their rows.
        parameters: the number of entries of theta.
        limits: bounds of the parameters that were declared with some.
        outputs: the entries of x whose derivatives are asked for.
    """

    def __init__(
        self,
        maps: tuple[AffineMap, ...],
        P: Pattern,
        A: Pattern,
        families: list[Cone],
        parameters: int,
        limits: list[Limits],
        outputs: list[int],
    ) -> None:
        self.limits, self.outputs = limits, outputs
        self.maps, self.P, self.A, self.families, self.parameters = maps, P, A, families, parameters
        self.m, self.n = A.shape
        self.size = self.n + 2 * self.m
        self.jacobian_pattern = self._jacobian_pattern()
        self.factorizations = Factorizations(self.jacobian_pattern)

    def data(self, theta: Tensor, scales: Scales) -> Data:
        """The weighted programs for the rows of theta."""
        return Data(*self._weighted(scales, tuple(affine(theta) for affine in self.maps)))

    def scales(self, packed: Tensor) -> Scales:
        """The scales in a tensor of shape ``(batch, 1 + 2 m)``."""
        return Scales(*packed.split([1, self.m, self.m], dim=1))

    def _weighted(self, scales: Scales, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        P, q, A, b = values
        return P * scales.objective, q * scales.objective, A * scales.rows[:, self.A.rows], b * scales.rows

    def split(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, z and u, each ``(batch, ...)``."""
        x, z, u = point.split([self.n, self.m, self.m], dim=1)
        return x, z, u

    def project(self, u: Tensor) -> Tensor:
        """The projection onto K, ``(batch, m)``."""
        return torch.cat([c.project(self.of(c, u)).flatten(1) for c in self.families], 1) if self.families else u

    def residual(self, data: Data, point: Tensor) -> Tensor:
        """The optimality conditions, ``(batch, n + 2 m)``."""
        x, z, u = self.split(point)
        s = self.project(u)
        gradient = self.P.product(data.P, x) + data.q + self.A.transposed_product(data.A, z)
        return torch.cat([gradient, self.A.product(data.A, x) + s - data.b, z - s + u], 1)

    def jacobian(self, data: Data, point: Tensor, tolerance: Tensor) -> Tensor:
        """Nonzeros of the derivative of the residual in (x, z, u)."""
        u = self.split(point)[2]
        slopes = [c.derivative(self.of(c, u), self.of(c, tolerance).amax(-1)) for c in self.families]
        identities = [
            torch.eye(c.size, dtype=u.dtype).expand(s.shape) for c, s in zip(self.families, slopes, strict=True)
        ]
        gaps = [(i - s).flatten(1) for i, s in zip(identities, slopes, strict=True)]
        flat = [s.flatten(1) for s in slopes]
        return torch.cat([data.P, data.A, data.A, *flat, torch.ones_like(u), *gaps], 1)

    def kinks(self, point: Tensor, tolerance: Tensor) -> Tensor:
        """Which rows belong to a cone whose projection has a kink at u, ``(batch, m)``."""
        u = self.split(point)[2]
        return self.by_cones(u, lambda c, v: c.kinks(v, self.of(c, tolerance).amax(-1))).bool()

    def by_cones(self, rows: Tensor, reduce: Callable[[Cone, Tensor], Tensor]) -> Tensor:
        """One number for each cone, ``(batch, count, size) -> (batch, count)``, at all of its rows."""
        found = [reduce(c, self.of(c, rows))[..., None].expand(-1, -1, c.size).flatten(1) for c in self.families]
        return torch.cat(found, 1) if found else rows

    def pull(self, w: Tensor, point: Tensor, scales: Scales) -> Tensor:
        """``w' F_theta``: the transposed derivative of the residual in theta, ``(batch, n + 2 m) -> (batch, p)``."""
        x, z, _ = self.split(point)
        first, second, _ = self.split(w)
        cotangents = self._weighted(
            scales,
            (
                first[:, self.P.rows] * x[:, self.P.columns],
                first,
                second[:, self.A.rows] * x[:, self.A.columns] + z[:, self.A.rows] * first[:, self.A.columns],
                -second,
            ),
        )
        parts = [m.pull(c, self.parameters) for m, c in zip(self.maps, cotangents, strict=True)]
        return sum(parts[1:], parts[0])

    def push(self, tangent: Tensor, point: Tensor, scales: Scales) -> Tensor:
        """``F_theta tangent``: the derivative of the residual in theta along rows of tangents."""
        x, z, _ = self.split(point)
        P, q, A, b = self._weighted(scales, tuple(affine.linear(tangent) for affine in self.maps))
        first = self.P.product(P, x) + q + self.A.transposed_product(A, z)
        return torch.cat([first, self.A.product(A, x) - b, torch.zeros_like(z)], 1)

    def of(self, cone: Cone, u: Tensor) -> Tensor:
        """The part of the rows u that belongs to a family, ``(batch, count, size)``."""
        return u[:, cone.start : cone.start + cone.count * cone.size].unflatten(1, (cone.count, cone.size))

    def _jacobian_pattern(self) -> Pattern:
        n, m = self.n, self.m
        blocks = [(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))]
        for c in self.families:
            index = c.start + torch.arange(c.count * c.size).reshape(c.count, c.size)
            rows, columns = torch.broadcast_tensors(index[:, :, None], index[:, None, :])
            blocks.append((rows.flatten(), columns.flatten()))
        rows, columns = (torch.cat(part) for part in zip(*blocks, strict=True))
        diagonal = torch.arange(m)
        pieces = [
            (self.P.rows, self.P.columns),
            (self.A.columns, n + self.A.rows),
            (n + self.A.rows, self.A.columns),
            (n + rows, n + m + columns),
            (n + m + diagonal, n + diagonal),
            (n + m + rows, n + m + columns),
        ]
        return Pattern(torch.cat([r for r, _ in pieces]), torch.cat([c for _, c in pieces]), (self.size, self.size))
