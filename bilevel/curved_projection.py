"""Projections onto convex rows that are not affine: linearised rows and the exact Hessian of the Lagrangian.

Reference:
    J. Nocedal, S. J. Wright, "Numerical Optimization", 2nd ed., Springer, 2006, chapter 18 (sequential quadratic
        programming with an l1 merit function).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import constrained
from constrained.qp.active_set import accuracy
from constrained.qp.row_projection import RowProjection
from constrained.qp.row_structure import RowStructure
from implicit import Hessian, Status
from implicit.transforms import batched

Rows = Callable[[Tensor], Tensor]
STEPS = 40
SHORTEST = 2.0**-20
ARMIJO = 1e-4
DENSE_LIMIT = 2_000
"""Up to this many variables a Hessian that is not diagonal is formed; above it interior points do all of the work."""
CHUNK = 2**24
"""Entries of a Jacobian that are formed at a time."""


def sparse_jacobian(rows: Rows, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places ``(2, entries)`` and values of the nonzero entries of the Jacobian at z, and the rows' values there."""
    own = z.detach().requires_grad_()
    with torch.enable_grad():
        values = rows(own)
    places, entries = [torch.zeros(2, 0, dtype=torch.long, device=z.device)], [z.new_zeros(0)]
    size = max(1, CHUNK // max(len(z), 1))

    def pull(cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(values, own, cotangent, retain_graph=True, materialize_grads=True)[0]

    for first in range(0, len(values), size):
        last = min(first + size, len(values))
        basis = torch.zeros(last - first, len(values), dtype=z.dtype, device=z.device)
        basis[:, first:last].fill_diagonal_(1.0)
        block = batched(pull, basis)
        index = block.nonzero().mT
        entries.append(block[index[0], index[1]])
        places.append(torch.stack([index[0] + first, index[1]]))
    return torch.cat(places, 1), torch.cat(entries), values.detach()


@dataclass(frozen=True, eq=False)
class _Iterate:
    """A point with multipliers, the rows there, and how far it is from the projection."""

    z: Tensor
    multiplier: Tensor
    values: Tensor
    structure: RowStructure
    error: float


class CurvedProjection:
    """``{z : rows(z) = 0`` in the first ``equalities`` rows, ``rows(z) <= 0`` in the others, ``lower <= z <= upper}``.

    Every step projects, in the metric of the Hessian of the Lagrangian, onto the rows linearised at the last point,
    which for convex rows is a larger set: where it is empty, so is the set.

    Args:
        rows: affine in the first ``equalities`` rows, convex in the others.
        z: a point where rows are defined, ``(n,)``; the structure of the Hessian is looked at near it.
        equalities: how many rows are equations.
        lower, upper: bounds, ``(n,)``.
    """

    def __init__(self, rows: Rows, z: Tensor, equalities: int, lower: Tensor, upper: Tensor) -> None:
        self.rows, self.equalities, self.lower, self.upper = rows, equalities, lower, upper
        self.anchor = z.detach()
        with torch.no_grad():
            count = len(rows(self.anchor))
        self.equation = torch.arange(count, device=z.device) < equalities
        self.diagonal = self._is_diagonal()

    def project(self, point: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor, Status, float]:
        """The nearest point, multipliers, status and error; from the multipliers of a projection nearby, or zeros."""
        good = accuracy(point.dtype) ** 0.7
        start = self._clip(point)
        best = self._correct(point, start, multiplier)
        if not best.error <= good:
            found = self._from_inside(point, best.z if best.error == best.error else self.anchor)
            if found.status is Status.INFEASIBLE:
                return found.x, torch.zeros_like(multiplier), Status.INFEASIBLE, best.error
            duals = torch.cat([_flat(found.multipliers.equality, point), _flat(found.multipliers.inequality, point)])
            again = self._correct(point, found.x, duals)
            if not best.error <= again.error:
                best = again
        status = Status.CONVERGED if best.error <= good else Status.STALLED
        return best.z, best.multiplier, status, best.error

    def _correct(self, point: Tensor, z: Tensor, multiplier: Tensor) -> _Iterate:
        """Newton steps with a line search; the best iterate."""
        goal = accuracy(point.dtype)
        here = best = self._at(point, z, multiplier)
        for _ in range(STEPS):
            if not here.error > goal:
                break
            found = self._step(point, here)
            if found is None:
                break
            there = self._searched(point, here, *found)
            if there is None:
                break
            here = there
            best = here if here.error < best.error else best
        return best

    def _at(self, point: Tensor, z: Tensor, multiplier: Tensor) -> _Iterate:
        index, entries, values = sparse_jacobian(self.rows, z)
        structure = RowStructure.of(index, entries, (len(values), len(z)))
        length = structure.lengths()
        away = z - self._clip(point - structure.spread(structure.pull(multiplier)))
        gap = values / torch.where(length > 0, length, 1.0)
        wrong = torch.where(self.equation, gap, torch.maximum(gap, -multiplier * length))
        error = torch.cat([away, wrong]).abs().amax() / (1 + z.abs().amax())
        return _Iterate(z, multiplier, values, structure, float(error))

    def _step(self, point: Tensor, here: _Iterate) -> tuple[Tensor, Tensor] | None:
        """The next point and its multipliers, or None where the linearised rows leave no point."""
        weights = torch.where(self.equation, 0.0, here.multiplier)
        if self.diagonal:
            return self._diagonal_step(point, here, 1.0 + self._curvature(here.z, weights).clamp(min=0.0))
        if len(point) > DENSE_LIMIT:
            return None
        H = torch.eye(len(point), dtype=point.dtype, device=point.device)
        if bool((weights > 0).any()):
            curved = Hessian(lambda u: self.rows(u) @ weights, here.z).to_dense()
            total = H + 0.5 * (curved + curved.mT)
            _, info = torch.linalg.cholesky_ex(total)
            H = total if int(info) == 0 and bool(torch.isfinite(total).all()) else H
        J, q = here.structure.dense(), self.equalities
        found = constrained.solve_qp(
            H,
            here.z - point,
            A=J[:q] if q else None,
            b=-here.values[:q] if q else None,
            G=J[q:] if q < len(J) else None,
            h=-here.values[q:] if q < len(J) else None,
            lower=self.lower - here.z,
            upper=self.upper - here.z,
            raise_on_failure=False,
        )
        if not found.success:
            return None
        return self._clip(here.z + found.x), torch.cat([found.equality[:q], found.inequality[: len(J) - q]])

    def _diagonal_step(self, point: Tensor, here: _Iterate, metric: Tensor) -> tuple[Tensor, Tensor] | None:
        root = metric.sqrt()
        structure = here.structure.scaled(torch.ones_like(here.values), 1 / root)
        lower, upper = (self.lower - here.z) * root, (self.upper - here.z) * root
        rows = RowProjection(structure, -here.values, self.equalities, lower, upper)
        found = rows.project((point - here.z) / root, here.multiplier / rows.unit)
        if not found.error <= accuracy(point.dtype) ** 0.7:
            return None
        return self._clip(here.z + found.z / root), found.multiplier * rows.unit

    def _searched(self, point: Tensor, here: _Iterate, z: Tensor, multiplier: Tensor) -> _Iterate | None:
        """The whole step where it halves the error, else the longest that lowers the l1 merit function."""
        there = self._at(point, z, multiplier)
        if there.error <= 0.5 * here.error:
            return there
        weight = 2.0 * float(torch.maximum(multiplier.abs().amax(), here.multiplier.abs().amax())) + 1e-12
        now, length = self._merit(point, here, weight), 1.0
        slope = float(torch.dot(here.z - point, z - here.z)) - weight * float(self._violation(here))
        while length >= SHORTEST:
            if slope < 0 and self._merit(point, there, weight) <= now + ARMIJO * length * slope:
                return there
            length *= 0.5
            mixed = here.multiplier + length * (multiplier - here.multiplier)
            there = self._at(point, here.z + length * (z - here.z), mixed)
        return None

    def _merit(self, point: Tensor, at: _Iterate, weight: float) -> float:
        away = at.z - point
        return float(torch.dot(away, away) / 2 + weight * self._violation(at))

    def _violation(self, at: _Iterate) -> Tensor:
        return torch.where(self.equation, at.values.abs(), at.values.clamp(min=0)).sum()

    def _from_inside(self, point: Tensor, z: Tensor) -> constrained.Solution:
        q = self.equalities
        problem = constrained.ConstrainedProblem(
            objective=lambda u: (u - point).square().sum() / 2,
            equality=(lambda u: self.rows(u)[:q]) if q else None,
            inequality=(lambda u: self.rows(u)[q:]) if q < len(self.equation) else None,
            lower=self.lower,
            upper=self.upper,
            name="a projection",
        )
        return constrained.solve(problem, constrained.InteriorPoint(), z, raise_on_failure=False)

    def _clip(self, z: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(z, self.lower), self.upper)

    def _curvature(self, z: Tensor, weights: Tensor) -> Tensor:
        """The diagonal of the Hessian of ``<weights, rows>``, where that is all of it."""
        found = Hessian(lambda u: self.rows(u) @ weights, z) @ torch.ones_like(z)
        return found if bool(torch.isfinite(found).all()) else torch.zeros_like(z)

    def _is_diagonal(self) -> bool:
        """Whether the rows' Hessians are diagonal at random points: then ``H v = (H 1) v`` for every v."""
        generator = torch.Generator().manual_seed(0)
        like = self.anchor
        eps = torch.finfo(like.dtype).eps
        for reach in (0.0, 1.0, 10.0):
            weights, noise, probe = (
                torch.randn(size, generator=generator, dtype=like.dtype).to(like.device)
                for size in (len(self.equation), len(like), len(like))
            )
            H = Hessian(lambda u, w=weights: self.rows(u) @ w, like + reach * (1 + like.abs()) * noise)
            ones, found = H @ torch.ones_like(like), H @ probe
            away = (found - ones * probe).abs().amax()
            if not bool(away <= 1e3 * eps * torch.maximum(found.abs().amax(), ones.abs().amax())):
                return False
        return True


def _flat(multiplier: object, like: Tensor) -> Tensor:
    return multiplier.reshape(-1) if isinstance(multiplier, Tensor) else like.new_zeros(0)
