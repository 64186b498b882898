"""Where an interior-point run begins: scales, a point inside, and multipliers."""

import torch
from torch import Tensor

from constrained.barrier import Evaluation, ScaledEvaluation, ScaledProblem
from constrained.barrier_step import BarrierState
from constrained.inertia import InertiaCorrection
from constrained.lagrangian import Lagrangian, Point
from constrained.multipliers import FlatMultipliers
from constrained.residual import largest, measure
from constrained.scaling import factors, row_sizes
from implicit import Dense, Diagonal

LARGE_MULTIPLIER = 1e3
DAMPING = 1e-8
WARM = 0.1
CLOSEST = 1e-12


def scales(point: Point) -> Tensor:
    """Factors for f and the constraints that bring steep ones down, shape (1 + m + p,)."""
    return factors(torch.cat([largest(point.gradient)[None], row_sizes(point)]))


def begin(lagrangian: Lagrangian, x0: Tensor, barrier: float) -> tuple[ScaledProblem, ScaledEvaluation, BarrierState]:
    """Scales from x0 moved into the bounds, the nearest point well inside them, and a state there."""
    plain = ScaledProblem(lagrangian, x0.new_ones(1 + lagrangian.constraints))
    slacks = x0.new_ones(lagrangian.inequalities)
    u = plain.sides.inside(torch.cat([x0[plain.free], slacks]))[: plain.n]
    point = lagrangian.at(plain.x(u))
    nearest = lagrangian.clip(x0)
    first = point if torch.equal(point.x, nearest) else lagrangian.at(nearest)
    model = ScaledProblem(lagrangian, scales(first if first.finite else point))
    slacks = -(model.constraint_scale * point.constraints)[lagrangian.equalities :]
    w = model.sides.inside(torch.cat([u, torch.nan_to_num(slacks)]))
    evaluation = ScaledEvaluation(model, w, point)
    state = BarrierState(w=w, y=x0.new_zeros(model.m), z=torch.ones_like(model.sides.bound), mu=barrier)
    return model, evaluation, state


def begin_warm(
    lagrangian: Lagrangian, x0: Tensor, given: FlatMultipliers, least: float, most: float
) -> tuple[ScaledProblem, ScaledEvaluation, BarrierState]:
    """A start next to x0 and the given multipliers, with as small a barrier as their KKT residual allows."""
    x0 = lagrangian.clip(x0)
    point = lagrangian.at(x0)
    model = ScaledProblem(lagrangian, scales(point))
    residual = float(measure(lagrangian, point, given).amax()) if point.finite else most
    mu = min(most, max(least, WARM * residual))
    scale = model.objective_scale
    y = scale * torch.cat([given.equality, given.inequality]) / model.constraint_scale
    lower, upper = (scale * v[model.free] for v in (given.lower, given.upper))
    z = torch.where(
        model.sides.sign > 0,
        torch.cat([lower, y[lagrangian.equalities :]])[model.sides.index],
        torch.cat([upper, torch.zeros_like(model.sign)])[model.sides.index],
    ).clamp(min=0.0)
    slacks = -(model.constraint_scale * point.constraints)[lagrangian.equalities :]
    w = torch.cat([x0[model.free], torch.nan_to_num(slacks)])
    # Gaps and multipliers whose products are about mu.
    wanted = mu / z.clamp(min=mu**0.5)
    push = float(wanted.max()) if len(wanted) else 0.0
    w = _at_least(model, w, wanted.clamp(min=CLOSEST), push)
    z = torch.maximum(z, mu / model.sides.gaps(w))
    evaluation = ScaledEvaluation(model, w, lagrangian.at(model.x(w)))
    return model, evaluation, BarrierState(w=w, y=y, z=z, mu=mu)


def _at_least(model: ScaledProblem, w: Tensor, gaps: Tensor, push: float) -> Tensor:
    """w moved until each gap is at least as wide as asked, or a hundredth of the distance of its two bounds."""
    sides = model.sides
    if not len(gaps):
        return w
    inside = sides.inside(w, min(push, 1e-2))
    step = sides.along(inside - w)
    short = (gaps - sides.sign * (w[sides.index] - sides.bound)).clamp(min=0.0)
    return w + sides.gather(sides.sign * torch.minimum(short, step.clamp(min=0.0)))


def least_squares(
    model: ScaledProblem, evaluation: Evaluation, z: Tensor, rule: InertiaCorrection, damping: float = 0.0
) -> Tensor:
    """The y that makes the gradient of the Lagrangian smallest, shape (m,); zero where it is too large to be of use."""
    if not model.m:
        return z.new_zeros(0)
    right = -model.lagrangian_gradient(evaluation, z.new_zeros(model.m), z)
    ones, jacobian = right.new_ones(model.n), evaluation.jacobian()
    below = right.new_zeros(model.m).index_add(0, model.row, torch.ones_like(model.sign))
    bottom = right.new_zeros(model.m).index_add(0, model.row, -model.sign * right[model.n :])
    identity = Dense(torch.diag(ones)) if isinstance(jacobian, Dense) else Diagonal(ones)
    rhs = torch.cat([right[: model.n], bottom])
    kkt = rule.correct(identity, jacobian, rhs, dual_diagonal=below + damping)
    y = kkt.system.split(kkt.step)[1]
    return y if kkt.success and float(y.abs().amax()) <= LARGE_MULTIPLIER else torch.zeros_like(y)


def shrink_multipliers(
    model: ScaledProblem, evaluation: Evaluation, state: BarrierState, rule: InertiaCorrection
) -> None:
    """Where gradients of constraints depend on each other, huge multipliers may do no more than small ones."""
    if not model.m or not float(state.y.abs().amax()) > LARGE_MULTIPLIER:
        return
    y = least_squares(model, evaluation, state.z, rule, DAMPING)
    sizes = [model.lagrangian_gradient(evaluation, v, state.z).abs().amax() for v in (state.y, y)]
    if float(sizes[1]) <= float(sizes[0]):
        state.y = y
