"""The lower level replaced by its optimality conditions, with relaxed or exact complementarity.

Source: Scholtes, "Convergence properties of a regularization scheme for mathematical programs with complementarity
constraints", SIAM Journal on Optimization 11 (2001).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.flat import FlatProblem
from constrained import ConstrainedProblem, InteriorPoint, KKTResidual, Lagrangian
from constrained.multipliers import FlatMultipliers
from constrained.unbounded import DEPTH
from implicit import Status
from implicit.iterate import Run, iterate

Function = Callable[[Tensor], Tensor]
BIACTIVE = 1e-6
"""Multipliers and slacks up to this are zero."""
ACCEPTED = 1e-6
"""A run that ends with a KKT residual up to this is worth going on from."""
FALLEN = 1e6
"""A value that many times below the sizes of f and its slope at the start asks whether f is bounded."""


class Unknowns(NamedTuple):
    """The parts of one vector z.

    Attributes:
        x, y: of the bilevel problem, shapes (n,) and (m,).
        inequality, equality: multipliers of the lower rows, shapes (p,) and (q,).
        lower, upper: multipliers of the finite bounds on y, shapes (a,) and (b,).
    """

    x: Tensor
    y: Tensor
    inequality: Tensor
    equality: Tensor
    lower: Tensor
    upper: Tensor


class _Values(NamedTuple):
    """What the functions of one nonlinear program share."""

    objective: Tensor
    upper_inequality: Tensor
    upper_equality: Tensor
    rows: Tensor  # c, (p,)
    equality: Tensor  # h, (q,)
    slope: Tensor  # of the lower Lagrangian in y, (m,)
    multipliers: Tensor  # of the pairs, (k,)
    slacks: Tensor  # of the pairs, (k,)
    cuts: Tensor  # g(x, y) - g(x, y_better)


class RelaxedKKT:
    """Nonlinear programs in ``z = (x, y, multipliers)`` that stand for a bilevel problem.

    .. math:: \\min f(x, y) \\quad\\text{s.t.}\\quad G \\le 0,\\; H = 0,\\; x \\in X,\\quad
              \\nabla_y (s g + \\lambda c + \\mu h)(x, y) - z_l + z_u = 0,\\; c \\le 0,\\; h = 0,\\; l \\le y \\le u,

    with ``lambda, z_l, z_u >= 0`` and, for each of the k pairs (multiplier, slack) of an inequality or a bound, either
    ``multiplier * slack <= t`` (:meth:`relaxed`), or one of the two fixed at zero (:meth:`piece`).

    A point that satisfies the relaxed conditions of a convex lower level is optimal for it within ``k t / s``.

    Args:
        flat: the problem.
        scale: s, brings the lower objective to a size of about one; the multipliers are those of ``s g``.

    Attributes:
        size: of z.
        pairs: k.
        places: of their multipliers in z, shape (k,).
    """

    def __init__(self, flat: FlatProblem, scale: float) -> None:
        self.flat, self.scale = flat, scale
        level = flat.lower_level
        self.low = torch.isfinite(level.lower).nonzero().reshape(-1)
        self.high = torch.isfinite(level.upper).nonzero().reshape(-1)
        self.parts = (flat.n, flat.m, level.inequalities, level.equalities, len(self.low), len(self.high))
        self.size = sum(self.parts)
        self.pairs = level.inequalities + len(self.low) + len(self.high)
        begin, bounds = flat.n + flat.m, len(self.low) + len(self.high)
        places = [*range(begin, begin + level.inequalities), *range(self.size - bounds, self.size)]
        self.places = torch.tensor(places, dtype=torch.long, device=flat.device)

    def split(self, z: Tensor) -> Unknowns:
        """The parts of z."""
        return Unknowns(*z.split(list(self.parts)))

    def join(self, x: Tensor, y: Tensor, multipliers: FlatMultipliers) -> Tensor:
        """z at a point with multipliers of the unscaled lower level."""
        duals = (
            multipliers.inequality,
            multipliers.equality,
            multipliers.lower[self.low],
            multipliers.upper[self.high],
        )
        return torch.cat([x, y, *(self.scale * v for v in duals)]).detach()

    def multipliers(self, z: Tensor) -> FlatMultipliers:
        """Those of the unscaled lower level."""
        at = self.split(z)
        zeros = torch.zeros_like(at.y)
        return FlatMultipliers(
            at.equality / self.scale,
            at.inequality / self.scale,
            zeros.index_copy(0, self.low, at.lower / self.scale),
            zeros.index_copy(0, self.high, at.upper / self.scale),
        )

    def pairs_at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Multipliers and slacks of the complementarity pairs, shape (k,) each."""
        at = self.split(z.detach())
        with torch.no_grad():
            rows = self.flat.lower_level.inequality(at.x, at.y)
        return torch.cat([at.inequality, at.lower, at.upper]), self._slacks(at, rows)

    def relaxed(self, t: float, cuts: Tensor, slack: float) -> ConstrainedProblem:
        """Every product of multiplier and slack at most t.

        Args:
            t: the relaxation.
            cuts: lower feasible points y', shape (j, m): ``s g(x, y) <= s g(x, y') + slack`` for each.
            slack: of the cuts.
        """
        found = _Program(self, cuts)

        def inequality(z: Tensor) -> Tensor:
            at = found.values(z)
            return torch.cat([at.upper_inequality, at.rows, at.multipliers * at.slacks - t, at.cuts - slack])

        lower, upper = self._bounds()
        return self._declare(found, inequality, found.equality, lower, upper)

    def piece(self, active: Tensor, cuts: Tensor, slack: float) -> ConstrainedProblem:
        """Zero slack where ``active``, shape (k,), zero multiplier elsewhere; cuts as in :meth:`relaxed`."""
        found, p = _Program(self, cuts), self.parts[2]
        rows = active[:p]

        def equality(z: Tensor) -> Tensor:
            return torch.cat([found.equality(z), found.values(z).rows[rows]])

        def inequality(z: Tensor) -> Tensor:
            at = found.values(z)
            return torch.cat([at.upper_inequality, at.rows[~rows], at.cuts - slack])

        lower, upper = self._bounds()
        own = slice(self.parts[0], sum(self.parts[:2]))
        low, high = lower[own].clone(), upper[own].clone()
        at_low, at_high = active[p : p + len(self.low)], active[p + len(self.low) :]
        upper[own] = high.index_copy(0, self.low[at_low], low[self.low[at_low]])
        lower[own] = low.index_copy(0, self.high[at_high], high[self.high[at_high]])
        upper[self.places[~active]] = 0.0
        return self._declare(found, inequality, equality, lower, upper)

    def promises(self, outcome: "Outcome", active: Tensor) -> Tensor:
        """How f changes with the fixed side of each pair of a solved piece, shape (k,); zero where it cannot fall.

        Only pairs with both sides at zero can be turned over. Where the slack is fixed, the multiplier of the program
        that would have the wrong sign if the slack could grow tells; where the multiplier is fixed, likewise.
        """
        multipliers, slacks = self.pairs_at(outcome.z)
        p, a = self.parts[2], len(self.low)
        duals = outcome.multipliers
        own = outcome.z.new_zeros(self.pairs)
        rows = active[:p]
        last = len(duals.equality) - int(rows.sum())
        own[:p][rows] = duals.equality[last:]
        at_y = slice(self.parts[0], sum(self.parts[:2]))
        own[p : p + a] = -duals.upper[at_y][self.low]
        own[p + a :] = -duals.lower[at_y][self.high]
        own = torch.where(active, own, -duals.upper[self.places])
        both = (multipliers <= BIACTIVE) & (slacks <= BIACTIVE)
        return torch.where(both & (own < -BIACTIVE), own, 0.0)

    def upper_multipliers(self, multipliers: FlatMultipliers) -> FlatMultipliers:
        """The part of a program's multipliers that belongs to the upper rows and the bounds on x."""
        flat = self.flat
        begin = flat.m + flat.lower_level.equalities
        return FlatMultipliers(
            multipliers.equality[begin : begin + flat.upper_level.equalities],
            multipliers.inequality[: flat.upper_level.inequalities],
            multipliers.lower[: flat.n],
            multipliers.upper[: flat.n],
        )

    def value(self, z: Tensor) -> float:
        """f at z."""
        at = self.split(z.detach())
        with torch.no_grad():
            return float(self.flat.upper(at.x, at.y))

    def _slacks(self, at: Unknowns, rows: Tensor) -> Tensor:
        level = self.flat.lower_level
        below, above = at.y - level.lower, level.upper - at.y
        return torch.cat([-rows, below[self.low], above[self.high]])

    def _bounds(self) -> tuple[Tensor, Tensor]:
        flat, like = self.flat, self.flat.lower_level.lower
        _, _, p, q, a, b = self.parts
        zeros, free = like.new_zeros, like.new_full
        lower = [flat.upper_level.lower, flat.lower_level.lower, zeros(p), free((q,), -torch.inf), zeros(a + b)]
        upper = [flat.upper_level.upper, flat.lower_level.upper, free((p + q + a + b,), torch.inf)]
        return torch.cat(lower), torch.cat(upper)

    def _declare(
        self, found: "_Program", inequality: Function, equality: Function, lower: Tensor, upper: Tensor
    ) -> ConstrainedProblem:
        return ConstrainedProblem(
            objective=lambda z: found.values(z).objective,
            equality=equality,
            inequality=inequality,
            lower=lower,
            upper=upper,
            name=f"the lower optimality conditions of {self.flat.problem.name}",
        )


class _Program:
    """The functions at one z, evaluated once for all who ask."""

    def __init__(self, owner: RelaxedKKT, cuts: Tensor) -> None:
        self.owner, self.cuts = owner, cuts
        self._last: tuple[Tensor, _Values] | None = None

    def values(self, z: Tensor) -> _Values:
        if self._last is None or self._last[0] is not z:
            self._last = z, self._evaluate(z)
        return self._last[1]

    def equality(self, z: Tensor) -> Tensor:
        at = self.values(z)
        return torch.cat([at.slope, at.equality, at.upper_equality])

    def _evaluate(self, z: Tensor) -> _Values:
        owner, flat = self.owner, self.owner.flat
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            at = owner.split(z)
            rows = flat.lower_level.inequality(at.x, at.y)
            equality = flat.lower_level.equality(at.x, at.y)
            lower = flat.lower(at.x, at.y)
            total = owner.scale * lower + at.inequality @ rows + at.equality @ equality
            (slope,) = torch.autograd.grad(total, at.y, create_graph=True, materialize_grads=True)
            slope = slope.index_add(0, owner.low, -at.lower).index_add(0, owner.high, at.upper)
            cuts = [owner.scale * (lower - flat.lower(at.x, y)) for y in self.cuts]
            return _Values(
                objective=flat.upper(at.x, at.y),
                upper_inequality=flat.upper_level.inequality(at.x, at.y),
                upper_equality=flat.upper_level.equality(at.x, at.y),
                rows=rows,
                equality=equality,
                slope=slope,
                multipliers=torch.cat([at.inequality, at.lower, at.upper]),
                slacks=owner._slacks(at, rows),
                cuts=torch.stack(cuts) if cuts else z.new_zeros(0),
            )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where a nonlinear program ended.

    Attributes:
        z: the point.
        multipliers: of the program itself.
        residual: of its optimality conditions.
        status: how the solver ended.
        steps: of the solver.
        fell: whether it failed with f so deep, at its last point if not at z, that f may have no lower bound.
    """

    z: Tensor
    multipliers: FlatMultipliers
    residual: KKTResidual
    status: Status
    steps: int
    fell: bool

    @property
    def usable(self) -> bool:
        """Whether to go on from here."""
        return bool(torch.isfinite(self.z).all()) and self.residual.feasibility <= ACCEPTED


def solve_program(
    problem: ConstrainedProblem,
    z: Tensor,
    multipliers: FlatMultipliers | None,
    *,
    atol: float,
    max_steps: int,
    time_limit: float | None = None,
) -> Outcome:
    """By the interior-point method. Interrupts are left to the driver of the run, which waits for the step's end."""
    lagrangian = Lagrangian(problem, z)
    method = InteriorPoint(atol=atol)
    run = Run(method.init(lagrangian, z.clone(), multipliers))
    iterate(method, lagrangian, run, max_steps=max_steps, time_limit=time_limit)
    if run.error is not None:
        raise run.error
    state = run.state
    point, duals = state.x, state.multipliers
    if run.status is not Status.CONVERGED and run.best.point is not None and run.best.merit < state.residual:
        point, *parts = run.best.point
        duals = FlatMultipliers(*parts)
    residual, _, status, _ = method.assess(lagrangian, point, duals, run.status)
    deep = float(state.at(lagrangian).objective) < FALLEN / DEPTH * state.floor
    fell = deep and status is not Status.CONVERGED
    return Outcome(z=point.clone(), multipliers=duals, residual=residual, status=status, steps=state.step, fell=fell)
