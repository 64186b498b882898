"""First-order stationarity of the upper level at any bilevel feasible point."""

from dataclasses import dataclass

import torch
from torch import Tensor

import constrained
from bilevel.accuracy import stationarity
from bilevel.flat import FlatProblem
from bilevel.lower_multipliers import nonnegative_least_squares
from bilevel.singular_hypergradient import LowerMotion
from constrained.multipliers import FlatMultipliers
from implicit import Jacobian, Status
from implicit.derivatives import value_and_gradients

CONSISTENT = 1e-4
"""Relative residual of the lower KKT system up to which a hypergradient is taken for one."""
PRODUCTS = 500
"""Steps of the linear solver where the lower KKT matrix is not formed."""
NOT_BEST = "y is not, to first order, the lower solution that is best for upper"


@dataclass(frozen=True, kw_only=True)
class Stationarity:
    """What is known to first order.

    Attributes:
        value: the measure; None if none is available.
        notes: how it was measured, or why not.
    """

    value: float | None
    notes: tuple[str, ...] = ()


def upper_stationarity(
    flat: FlatProblem, x: Tensor, y: Tensor, duals: FlatMultipliers, tolerance: float
) -> Stationarity:
    """How far x is from a first-order stationary point of the bilevel problem, if y is the lower solution there.

    With the hypergradient h of :func:`bilevel.singular_hypergradient`: ``||x - P(x - h)||`` where the upper level has
    no more than its set; otherwise the smallest ``||h + sum_i mu_i dG_i/dx||`` over multipliers of the active upper
    constraints, whose derivatives follow the lower solution as h does.

    Where lower constraints are active without force, or K has no solution, h is not defined. The measure is then the
    residual of strong stationarity of the problem with the lower level replaced by its KKT conditions: with ``w`` for
    ``grad_y L = 0`` and ``s`` for the active rows, the smallest ``||grad_x f + L_xy w + J_x' s + G_x' mu||`` subject to
    ``grad_y f + L_yy w + J_y' s + G_y' mu = 0``, ``J_y w = 0`` for rows with force, and ``J_y w >= 0, s >= 0`` for
    those without; the norm of both where the equation has no solution. Strong stationarity is sufficient to first
    order, not necessary.
    """
    motion = LowerMotion(flat, x, y, duals, max_steps=PRODUCTS)
    _, slope_x, slope_y = value_and_gradients(flat.upper, x, y, "upper")
    upper = _UpperRows(flat, x, y, tolerance)
    pulled, residuals = motion.pull(torch.cat([slope_y[None], upper.in_y]))
    edges = bool(motion.weak.any()) or bool(motion.edge.any())
    smooth = float(residuals.amax()) <= CONSISTENT
    if edges or not smooth:
        if motion.dense:
            return _strong(motion, upper, slope_x, slope_y)
        if not smooth:
            return Stationarity(
                value=None,
                notes=(
                    f"stationarity: {NOT_BEST}, or the linear system was not solved (residual {residuals.amax():.2g})",
                ),
            )
    hypergradient, rows = slope_x + pulled[0], upper.in_x + pulled[1:]
    notes = motion.notes
    if not flat.upper_level.kept_inequality and not flat.upper_level.kept_equality:
        value = stationarity(flat.problem, flat.x_tree(x), flat.x_tree(hypergradient))
        return Stationarity(value=value, notes=notes)
    multipliers = nonnegative_least_squares(rows, -hypergradient, free=upper.equalities)
    return Stationarity(value=float(torch.linalg.vector_norm(hypergradient + multipliers @ rows)), notes=notes)


class _UpperRows:
    """Active rows and bounds of the upper level: derivatives ``(k, n)`` and ``(k, m)``, equalities first."""

    def __init__(self, flat: FlatProblem, x: Tensor, y: Tensor, tolerance: float) -> None:
        level = flat.upper_level
        parts_x, parts_y = [], []
        self.equalities = level.equalities
        if level.equalities + level.inequalities:
            both = Jacobian(
                lambda z: (
                    torch.cat([level.equality(z[: len(x)], z[len(x) :]), level.inequality(z[: len(x)], z[len(x) :])])
                    + 0.0 * z.sum()
                ),
                torch.cat([x, y]),
            )
            matrix = both.to_dense()
            sizes = torch.linalg.vector_norm(matrix, dim=1).clamp(min=1.0)
            active = both.value >= -10.0 * tolerance * sizes
            active[: level.equalities] = True
            parts_x.append(matrix[active][:, : len(x)])
            parts_y.append(matrix[active][:, len(x) :])
        unit = torch.eye(len(x), dtype=x.dtype, device=x.device) if level.bounded else x.new_zeros(0, len(x))
        reach = 10.0 * tolerance * x.abs().clamp(min=1.0)
        for sign, room in ((-1.0, x - level.lower), (1.0, level.upper - x)):
            rows = sign * unit[room <= reach] if level.bounded else unit
            parts_x.append(rows)
            parts_y.append(x.new_zeros(len(rows), len(y)))
        self.in_x, self.in_y = torch.cat(parts_x), torch.cat(parts_y)


def _strong(motion: LowerMotion, upper: _UpperRows, slope_x: Tensor, slope_y: Tensor) -> Stationarity:
    """The residual of strong stationarity, by a quadratic program."""
    flat, x, y = motion.flat, motion.x, motion.y
    m = len(motion.y)
    q = flat.lower_level.equalities
    jacobian = motion.row_slopes() / motion.sizes[:, None] if len(motion.sizes) else x.new_zeros(0, flat.n + m)
    strong = motion.strong
    weak = torch.cat([motion.weak.new_zeros(q), motion.weak])
    bounds = torch.eye(m, dtype=y.dtype, device=y.device)
    at_low = motion.edge & (y - flat.lower_level.lower <= flat.lower_level.upper - y)
    at_high = motion.edge & ~at_low
    held, low, high = bounds[motion.held], -bounds[at_low], bounds[at_high]
    # Unknowns: w at all y; s of strong rows, weak rows, held entries (any sign), edges; mu of upper rows.
    in_y = [jacobian[strong][:, flat.n :], jacobian[weak][:, flat.n :], held, low, high, upper.in_y]
    in_x = [jacobian[strong][:, : flat.n], jacobian[weak][:, : flat.n]]
    in_x += [x.new_zeros(len(part), flat.n) for part in (held, low, high)] + [upper.in_x]
    second_y, second_x = motion.second_derivatives()
    to_y = torch.cat([second_y, *[part.T for part in in_y]], dim=1)
    to_x = torch.cat([second_x, *[part.T for part in in_x]], dim=1)
    counts = [m, *[len(part) for part in in_y]]
    still = torch.cat([in_y[0], held])
    pushed = torch.cat([in_y[1], low, high])
    zero = x.new_zeros(sum(counts))
    signed = [False, False, True, False, True, True, True]
    lower = torch.cat(
        [
            torch.full_like(part, 0.0 if sign else -torch.inf)
            for part, sign in zip(zero.split(counts), signed, strict=True)
        ]
    )
    start = m + sum(counts[1:6])
    lower[start : start + upper.equalities] = -torch.inf
    wide = [torch.nn.functional.pad(rows, (0, len(zero) - m)) for rows in (still, pushed)]
    name = "stationarity: residual of strong stationarity (lower constraints are active without force)"
    for hard in (True, False):
        target, offset = (to_x, slope_x) if hard else (torch.cat([to_x, to_y]), torch.cat([slope_x, slope_y]))
        rows = [*wide[:1], to_y] if hard else wide[:1]
        sides = [x.new_zeros(len(still)), -slope_y] if hard else [x.new_zeros(len(still))]
        found = constrained.solve_qp(
            target.T @ target,
            target.T @ offset,
            A=torch.cat(rows),
            b=torch.cat(sides),
            G=-wide[1],
            h=x.new_zeros(len(pushed)),
            lower=lower,
            raise_on_failure=False,
        )
        if found.status is Status.CONVERGED:
            value = float(torch.linalg.vector_norm(target @ found.x + offset))
            return Stationarity(
                value=value, notes=(name if hard else f"stationarity: {NOT_BEST}; its residual counts",)
            )
    return Stationarity(value=None, notes=("stationarity: the multipliers of the KKT reformulation were not found",))
