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
PATIENCE = 6
APART = 0.05
CUTS = 100
INTERIOR_STEPS = 300
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


@dataclass(frozen=True, eq=False)
class _Cuts:
    """Equations and linearised rows ``matrix z = / <= side``, the row that each comes from, and their multipliers."""

    matrix: Tensor
    side: Tensor
    owner: Tensor
    force: Tensor

    @classmethod
    def none(cls, at: _Iterate, equalities: int) -> "_Cuts":
        """The equations alone."""
        equations = torch.arange(equalities, device=at.z.device)
        J = at.structure.dense()[equations]
        return cls(J, J @ at.z - at.values[equations], equations, at.values.new_zeros(equalities))

    def joined(self, at: _Iterate, equalities: int) -> "_Cuts":
        """With the violated rows, linearised at one more point."""
        new = (at.values > 0).nonzero()[:, 0]
        new = new[new >= equalities]
        J = at.structure.dense()[new]
        side = torch.cat([self.side, J @ at.z - at.values[new]])
        force = torch.cat([self.force, at.values.new_zeros(len(new))])
        return _Cuts(torch.cat([self.matrix, J]), side, torch.cat([self.owner, new]), force)

    def projection(self, equalities: int, lower: Tensor, upper: Tensor) -> RowProjection:
        index = self.matrix.nonzero().mT
        shape = (len(self.matrix), self.matrix.shape[1])
        structure = RowStructure.of(index, self.matrix[index[0], index[1]], shape)
        return RowProjection(structure, self.side, equalities, lower, upper)

    def active(self, force: Tensor, equalities: int) -> "_Cuts":
        """Those that hold the point, and the equations."""
        keep = (force > 0) | (torch.arange(len(force), device=force.device) < equalities)
        return _Cuts(self.matrix[keep], self.side[keep], self.owner[keep], force[keep])

    def kinked(self, rows: int) -> Tensor:
        """Which rows hold the point by gradients of different directions, ``(rows,)``."""
        units = torch.nn.functional.normalize(self.matrix, dim=1)
        sums = units.new_zeros(rows, units.shape[1]).index_add(0, self.owner, self.force.abs()[:, None] * units)
        apart = (units - torch.nn.functional.normalize(sums, dim=1)[self.owner]).norm(dim=1) > APART
        return torch.zeros(rows, dtype=torch.bool, device=units.device).index_put((self.owner[apart],), apart[apart])

    def total(self, like: Tensor) -> Tensor:
        """The multipliers summed over the cuts of each row."""
        return torch.zeros(len(like), dtype=self.force.dtype, device=like.device).index_add(0, self.owner, self.force)


class CurvedProjection:
    """``{z : rows(z) = 0`` in the first ``equalities`` rows, ``rows(z) <= 0`` in the others, ``lower <= z <= upper}``.

    Every step projects, in the metric of the Hessian of the Lagrangian, onto the rows linearised at the last point,
    which for convex rows is a larger set: where it is empty, so is the set.

    Args:
        rows: affine in the first ``equalities`` rows, convex in the others.
        z: a point where rows are defined, ``(n,)``; the structure of the Hessian is looked at near it.
        equalities: how many rows are equations.
        lower, upper: bounds, ``(n,)``.
        diagonal: whether the Hessian of every row is diagonal; None looks.
    """

    def __init__(
        self,
        rows: Rows,
        z: Tensor,
        equalities: int,
        lower: Tensor,
        upper: Tensor,
        *,
        diagonal: bool | None = None,
    ) -> None:
        self.rows, self.equalities, self.lower, self.upper = rows, equalities, lower, upper
        self.anchor = z.detach()
        with torch.no_grad():
            count = len(rows(self.anchor))
        self.equation = torch.arange(count, device=z.device) < equalities
        self.diagonal = self._is_diagonal() if diagonal is None else diagonal

    def project(self, point: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor, Status, float]:
        """The nearest point, multipliers, status and error; from the multipliers of a projection nearby, or zeros.

        INFEASIBLE is what :class:`constrained.InteriorPoint` reports at a stationary point of the squared violation,
        which for convex rows is its least value; no certificate is computed.
        """
        good = accuracy(point.dtype) ** 0.7
        start = self._clip(point)
        best = self._correct(point, start, multiplier)
        if not best.error <= good:
            cut = self._by_cuts(point, start)
            if cut is not None:
                return cut.z, cut.multiplier, Status.CONVERGED, cut.error
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
        idle = 0
        for _ in range(STEPS):
            if not here.error > goal or idle >= PATIENCE:
                break
            found = self._step(point, here)
            if found is None:
                break
            there = self._searched(point, here, *found)
            if there is None:
                break
            here, idle = there, 0 if there.error < 0.5 * best.error else idle + 1
            best = here if here.error < best.error else best
        return best

    def _by_cuts(self, point: Tensor, start: Tensor) -> _Iterate | None:
        """The projection onto rows linearised at all points met, until it satisfies the rows; None where that fails.

        The way to where rows have kinks, such as the apex of a cone, which no multipliers of one gradient describe.
        Linearised convex rows hold in the whole set, so that the nearest point to satisfy them is the projection as
        soon as it is in the set.
        """
        q, good = self.equalities, accuracy(point.dtype) ** 0.7
        at = self._at(point, start, torch.zeros_like(self.equation, dtype=point.dtype))
        cuts = _Cuts.none(at, q)
        for _ in range(CUTS):
            cuts = cuts.joined(at, q)
            rows = cuts.projection(q, self.lower, self.upper)
            found = rows.project(point, cuts.force / rows.unit)
            if not found.error <= good:
                return None
            cuts = cuts.active(found.multiplier * rows.unit, q)
            at = self._at(point, found.z, cuts.total(self.equation))
            if float(self._relative(at).amax()) <= good**0.75:
                return self._refined(point, at, cuts)
        return None

    def _refined(self, point: Tensor, at: _Iterate, cuts: _Cuts) -> _Iterate | None:
        """Newton steps with the cuts in place of the rows that have kinks; None unless that proves the projection."""
        kinked = cuts.kinked(len(self.equation)) & ~self.equation
        smooth, chosen = (~kinked).nonzero()[:, 0], kinked[cuts.owner]
        matrix, side, owner = cuts.matrix[chosen], cuts.side[chosen], cuts.owner[chosen]

        def rows(z: Tensor) -> Tensor:
            return torch.cat([self.rows(z)[smooth], matrix @ z - side])

        inner = CurvedProjection(rows, at.z, self.equalities, self.lower, self.upper, diagonal=self.diagonal)
        best = inner._correct(point, at.z, torch.cat([at.multiplier[smooth], cuts.force[chosen]]))
        count = len(smooth)
        multiplier = torch.zeros_like(at.multiplier).index_copy(0, smooth, best.multiplier[:count])
        end = self._at(point, best.z, multiplier.index_add(0, owner, best.multiplier[count:]))
        left = self._relative(end)
        error = max(best.error, float(left.amax()))
        good = accuracy(point.dtype) ** 0.7
        # A row below its own linearisation is not convex.
        proved = error <= good and bool((left[owner] >= -good).all())
        return _Iterate(end.z, end.multiplier, end.values, end.structure, error) if proved else None

    def _relative(self, at: _Iterate) -> Tensor:
        """Values of the rows, of equations their size, as distances relative to ``1 + max |z|``."""
        values = torch.where(self.equation, at.values.abs(), at.values)
        return values / (at.structure.lengths().clamp(min=1.0) * (1 + at.z.abs().amax()))

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
            A=J[:q],
            b=-here.values[:q],
            G=J[q:],
            h=-here.values[q:],
            lower=self.lower - here.z,
            upper=self.upper - here.z,
            raise_on_failure=False,
        )
        if not found.success:
            return None
        return self._clip(here.z + found.x), torch.cat([found.equality, found.inequality])

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
        return constrained.solve(
            problem, constrained.InteriorPoint(), z, max_steps=INTERIOR_STEPS, raise_on_failure=False
        )

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
