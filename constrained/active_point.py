"""Solutions on their active constraints: from the end of a central path to the point it leads to."""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from constrained.kkt_system import KKTSystem
from constrained.lagrangian import Lagrangian, Point
from constrained.multipliers import FlatMultipliers
from constrained.residual import measure
from implicit import ConvergenceWarning, Dense
from implicit.kkt import EquilibratedLU

_ROUNDS = 5
"""Active sets that are tried, each with so many Newton steps:"""
_STEPS = 3


def on_active_constraints(
    lagrangian: Lagrangian, x: Tensor, multipliers: FlatMultipliers
) -> tuple[Tensor, FlatMultipliers]:
    """The solution with ``c_i = 0`` or ``v_i = 0`` for every i, to rounding.

    A method ends where products ``v_i c_i`` are small, which determines neither factor well where both are: the
    derivative of such a point lies between those of the two cases. An inequality is taken as active where its force
    ``v_i |grad c_i|`` exceeds its distance ``|c_i| / |grad c_i|``, both relative. Newton's method on the conditions
    with these as equalities then finds the point, and the signs of multipliers and inactive constraints confirm or
    correct the choice. Entries with equal bounds are equalities.

    Args:
        lagrangian: the problem, with matrices that can be formed.
        x: a point close to the solution, shape (n,).
        multipliers: its multipliers.

    Returns:
        The point and its multipliers, nonnegative where they must be. If no choice is confirmed, or the conditions
        would be satisfied less well than before, the given point, with zero for multipliers of inactive constraints.
        Where a constraint and its multiplier are both zero, the given point as it is: its derivative lies between the
        one-sided ones, whereas that of the exact point would be that of a singular system.
    """
    rows = _Rows(lagrangian, lagrangian.lower == lagrangian.upper)
    start = rows.state(x, multipliers)
    first = active = rows.identify(start)
    before = rows.residual(start)
    allowed = max(before, 100 * float(torch.finfo(x.dtype).eps))
    for _ in range(_ROUNDS):
        found = rows.newton(start, active)
        if found is None:
            break
        negative, violated = rows.wrong(found, active)
        if not bool((negative | violated).any()):
            found = replace(found, y=torch.where(rows.signed, found.y.clamp(min=0), found.y))
            if rows.residual(found) > allowed:
                break
            chosen = start if rows.kinked(found) else found
            return chosen.point.x, rows.multipliers(chosen.y)
        active = (active & ~negative) | violated
    return x, rows.multipliers(torch.where(first, start.y, 0.0))


@dataclass(frozen=True)
class _State:
    point: Point
    y: Tensor  # multipliers of all rows


class _Rows:
    """All constraints as rows: h, c, ``lower - x``, ``x - upper``; of equal bounds the last, as an equality."""

    def __init__(self, lagrangian: Lagrangian, pinned: Tensor) -> None:
        self.lagrangian, self.pinned = lagrangian, pinned
        free = ~pinned
        sizes = lagrangian.equalities, lagrangian.inequalities
        first = torch.arange(sum(sizes), device=pinned.device) < sizes[0]
        self.signed = torch.cat([~first, free, free])
        self.equal = torch.cat([first, torch.zeros_like(pinned), pinned])
        self.split = [*sizes, lagrangian.n, lagrangian.n]

    def state(self, x: Tensor, given: FlatMultipliers) -> _State:
        upper = torch.where(self.pinned, given.upper - given.lower, given.upper)
        lower = torch.where(self.pinned, 0.0, given.lower)
        return _State(self.lagrangian.at(x), torch.cat([given.equality, given.inequality, lower, upper]))

    def multipliers(self, y: Tensor) -> FlatMultipliers:
        equality, inequality, lower, upper = torch.split(y, self.split)
        lower = torch.where(self.pinned, (-upper).clamp(min=0), lower)
        return FlatMultipliers(equality, inequality, lower, torch.where(self.pinned, upper.clamp(min=0), upper))

    def residual(self, state: _State) -> float:
        """The largest residual of the conditions; infinite where it is not a number."""
        found = float(measure(self.lagrangian, state.point, self.multipliers(state.y)).amax())
        return found if found == found else float("inf")

    def values(self, point: Point) -> Tensor:
        return torch.cat([point.constraints, self.lagrangian.lower - point.x, point.x - self.lagrangian.upper])

    def jacobian(self, point: Point) -> Tensor:
        unit = torch.eye(len(point.x), dtype=point.x.dtype, device=point.x.device)
        return torch.cat([point.jacobian.to_dense(), -unit, unit])

    def relative(self, state: _State) -> tuple[Tensor, Tensor]:
        """Signed distances ``c_i / |grad c_i|`` and forces ``y_i |grad c_i|``, over the sizes of x and grad f."""
        point = state.point
        norms = torch.linalg.vector_norm(point.jacobian.to_dense(), dim=1)
        sizes = torch.cat([norms, norms.new_ones(2 * len(point.x))])
        distances = self.values(point) / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
        reach = torch.linalg.vector_norm(point.x).clamp(min=1.0)
        return distances / reach, state.y * sizes / torch.linalg.vector_norm(point.gradient).clamp(min=1.0)

    def identify(self, state: _State) -> Tensor:
        """Which rows are taken as equalities, shape (m + p + 2n,)."""
        distance, force = self.relative(state)
        return self.equal | (self.signed & (force > distance.abs()))

    def wrong(self, state: _State, active: Tensor) -> tuple[Tensor, Tensor]:
        """Active rows that pull, and inactive ones that are violated, beyond rounding."""
        distance, force = self.relative(state)
        rounding = 100 * torch.finfo(distance.dtype).eps
        return self.signed & active & (force < -rounding), self.signed & ~active & (distance > rounding)

    def kinked(self, state: _State) -> bool:
        """Whether a constraint and its multiplier are both zero to half of the digits."""
        distance, force = self.relative(state)
        small = float(torch.finfo(distance.dtype).eps) ** 0.5
        return bool((self.signed & (distance.abs() <= small) & (force.abs() <= small)).any())

    def newton(self, state: _State, active: Tensor) -> _State | None:
        """Newton's method on ``grad L = 0, c_A = 0``; least squares where rows depend on each other."""
        y, point = torch.where(active, state.y, 0.0), state.point
        which = active.nonzero()[:, 0]
        *_, low, high = torch.split(active, self.split)
        for _ in range(_STEPS):
            jacobian = self.jacobian(point)[which]
            hessian = point.hessian(y[: self.lagrangian.constraints])
            system = KKTSystem(hessian, Dense(jacobian, symmetric=False))
            rest = torch.cat([point.gradient + jacobian.T @ y[which], self.values(point)[which]])
            with warnings.catch_warnings():
                # Dependent rows have no unique multipliers; those closest to the given ones are as good as any.
                warnings.simplefilter("ignore", ConvergenceWarning)
                step = EquilibratedLU().solve(system, -rest).value
            x = point.x + step[: len(point.x)]
            x = torch.where(low, self.lagrangian.lower, torch.where(high, self.lagrangian.upper, x))
            y = y.index_add(0, which, step[len(point.x) :])
            if not bool(torch.isfinite(x).all() & torch.isfinite(y).all()):
                return None
            point = self.lagrangian.at(x)
            if not point.finite:
                return None
        return _State(point, y)
