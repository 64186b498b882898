"""The stages of a solve: dual active sets, interior point, polishing, and proofs that there is no solution."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from constrained.qp.active_set import Dual, Point, accuracy, choose, dual_active_set, polish
from constrained.qp.interior_point import Iterate, interior_point
from constrained.qp.program import Program, equilibrated, largest
from implicit.status import Status

CODES = (Status.CONVERGED, Status.STEP_LIMIT, Status.STALLED, Status.NONFINITE, Status.INFEASIBLE, Status.UNBOUNDED)
CONVERGED, STEP_LIMIT, STALLED, NONFINITE, INFEASIBLE, UNBOUNDED = range(len(CODES))
FAILURES = (NONFINITE, INFEASIBLE, UNBOUNDED)


@dataclass(frozen=True)
class Outcome:
    """What was found, in the scale of the program."""

    x: Tensor  # (batch, n)
    multiplier: Tensor  # (batch, rows); of an infeasible element, the weights that prove it
    active: Tensor  # (batch, rows), bool
    ray: Tensor  # (batch, n): along it an unbounded element falls for ever; zero elsewhere
    code: Tensor  # (batch,), indices into CODES
    steps: Tensor  # (batch,)

    def put(self, index: Tensor, other: "Outcome") -> "Outcome":
        """With other elements at ``index``."""
        names = [f.name for f in fields(self)]
        return Outcome(*[getattr(self, name).index_copy(0, index, getattr(other, name)) for name in names])


def solve_program(program: Program, dual: Dual | None, max_steps: int, guess: Tensor | None = None) -> Outcome:
    """Solve every element.

    Args:
        program: scaled, finite, with positive semidefinite Q.
        dual: the matrices of the dual method, or None where Q is not definite.
        max_steps: of the interior-point method.
        guess: rows that may be active, ``(batch, rows)``, bool.
    """
    eps, like = torch.finfo(program.q.dtype).eps, program.q
    start = torch.zeros_like(program.present) if guess is None else guess
    blank = torch.full_like(like[:, 0], torch.inf)
    point = Point(torch.zeros_like(like), torch.zeros_like(program.d), start, blank)
    steps = torch.zeros_like(blank)
    if dual is not None:
        point = dual_active_set(program, dual, start, 12)
    elif guess is not None:
        point = polish(program, replace(point, active=(start | program.free) & program.present))
    left = (~(point.error <= accuracy(like.dtype))).nonzero()[:, 0]
    if len(left):
        found, count = _from_inside(program.take(left), max_steps, forceful=False)
        point, steps = point.put(left, found), steps.index_copy(0, left, count)
    rough = (~(point.error <= 16 * eps)).nonzero()[:, 0]
    if len(rough):
        point = point.put(rough, polish(program.take(rough), point.take(rough)))
    outcome = _judge(program, point, steps, max_steps)
    bad = (outcome.code != CONVERGED).nonzero()[:, 0]
    if len(bad):
        outcome = _explain(program, outcome, bad)
        bad = ((outcome.code == STALLED) | (outcome.code == STEP_LIMIT)).nonzero()[:, 0]
    if len(bad):
        again, count = _from_inside(program.take(bad), max_steps, forceful=True)
        better = again.error < point.error[bad]
        again = choose(better, again, point.take(bad))
        outcome = outcome.put(bad, _judge(program.take(bad), again, steps[bad] + count, 2 * max_steps))
    return outcome


def _from_inside(program: Program, max_steps: int, forceful: bool) -> tuple[Point, Tensor]:
    """The interior-point method; the second, forceful try is in other units."""
    if not forceful:
        found, count = interior_point(program, max_steps)
        return _point(program, found), count
    changed, columns, rows = equilibrated(program)
    found, count = interior_point(changed, max_steps, forceful=True)
    point = polish(changed, _point(changed, found))
    x, multiplier = columns * point.x, rows * point.multiplier
    return Point(x, multiplier, point.active, program.error(x, multiplier)), count


def _point(program: Program, found: Iterate) -> Point:
    active = torch.cat([torch.ones_like(found.y, dtype=torch.bool), found.z > found.s], 1) & program.present
    return Point(found.x, found.multiplier, active, program.error(found.x, found.multiplier))


def _judge(program: Program, point: Point, steps: Tensor, limit: int) -> Outcome:
    good = point.error <= torch.finfo(point.x.dtype).eps ** 0.55
    code = torch.where(good, CONVERGED, torch.where(steps >= limit, STEP_LIMIT, STALLED))
    return Outcome(point.x, point.multiplier, point.active, torch.zeros_like(point.x), code, steps)


def _explain(program: Program, outcome: Outcome, index: Tensor) -> Outcome:
    """Prove that the elements have no feasible point or no bound, where that is so."""
    part, eps = program.take(index), torch.finfo(program.q.dtype).eps
    nearest, weight = least_violation(part)
    size = 1 + largest(nearest)
    pull = largest(part.pull(weight))  # zero in exact arithmetic
    proved = (pull * size <= eps**0.25 * weight.square().sum(1)) | (pull <= 4 * eps * size)
    violated = (largest(weight) > eps**0.5 * size) & proved
    ray = steepest_ray(part)
    feasible = largest(weight) <= eps**0.5 * size
    falls = feasible & ((part.q * ray).sum(1) < -(eps**0.4) * largest(part.q) * largest(ray))
    code = torch.where(violated, INFEASIBLE, torch.where(falls, UNBOUNDED, outcome.code[index]))
    wide = violated[:, None]
    # An unbounded element is left at a feasible point.
    x = torch.where(wide | falls[:, None], nearest, outcome.x[index])
    multiplier = torch.where(wide, weight, torch.where(falls[:, None], 0.0, outcome.multiplier[index]))
    return Outcome(
        outcome.x.index_copy(0, index, x),
        outcome.multiplier.index_copy(0, index, multiplier),
        outcome.active,
        outcome.ray.index_copy(0, index, torch.where(falls[:, None], ray, 0.0)),
        outcome.code.index_copy(0, index, code),
        outcome.steps,
    )


def least_violation(program: Program, max_steps: int = 200) -> tuple[Tensor, Tensor]:
    """A minimizer of ``||v(x)||^2 / 2``, v the violation of every row at x, and v there; by Newton's method.

    At the minimizer ``C' v = 0``, with v >= 0 on inequalities. Where v is not zero ``d' v = -||v||^2 < 0`` proves that
    there is no feasible point.
    """
    x = torch.zeros_like(program.q)
    index = torch.arange(program.batch, device=x.device)
    found, eps = x.clone(), torch.finfo(x.dtype).eps
    eye = torch.eye(program.n, dtype=x.dtype, device=x.device)
    part, value = program, program.violation(x).square().sum(1)
    for _ in range(max_steps):
        violation = part.violation(x)
        slope = part.pull(violation)
        chosen = part.C * ((violation != 0) | part.free)[..., None]
        curvature = chosen.mT @ chosen
        ridge = eps**0.7 * (1 + curvature.diagonal(dim1=1, dim2=2).amax(1))[:, None, None]
        factor, _ = torch.linalg.cholesky_ex(curvature + ridge * eye)
        step = -torch.cholesky_solve(slope[..., None], factor)[..., 0]
        gap, along = part.gap(x), part.multiply(step)
        length = _exact_length(gap, along, part.free)
        ahead = x + length[:, None] * step
        least = part.violation(ahead).square().sum(1)
        better = least < value
        x = torch.where(better[:, None], ahead, x)
        found[index] = x
        small = largest(slope) <= 8 * eps * largest(violation)
        kept = (better & ~small & (least > 0)).nonzero()[:, 0]
        if not len(kept):
            break
        part, x, value, index = part.take(kept), x[kept], least[kept], index[kept]
    return found, program.violation(found)


def _exact_length(gap: Tensor, along: Tensor, free: Tensor) -> Tensor:
    """The minimizer over [0, 1] of the convex ``||v(x + t step)||^2`` by bisection of its derivative."""
    low, high = gap.new_zeros(len(gap)), gap.new_ones(len(gap))
    middle = high
    for _ in range(50):
        value = gap + middle[:, None] * along
        slope = (torch.where(free, value, value.clamp(min=0)) * along).sum(1)
        low, high = torch.where(slope <= 0, middle, low), torch.where(slope <= 0, high, middle)
        middle = (low + high) / 2
    return torch.where(low > 0, low, high)


def steepest_ray(program: Program, max_steps: int = 100) -> Tensor:
    """The projection of -q onto the directions v with ``Q v = 0``, ``C v = 0`` (equations) and ``C v <= 0``."""
    m, n, eps = program.equalities, program.n, torch.finfo(program.q.dtype).eps
    lead = max(len(program.C), len(program.Q))
    flat = torch.cat([program.Q.expand(lead, -1, -1), program.C.expand(lead, -1, -1)], 1)
    zero = torch.zeros_like(program.q)
    cone = Program(
        Q=torch.eye(n, dtype=zero.dtype, device=zero.device)[None],
        q=program.q,
        C=flat,
        d=torch.cat([zero, torch.zeros_like(program.d)], 1),
        present=torch.cat([torch.ones_like(zero, dtype=torch.bool), program.present], 1),
        equalities=n + m,
    )
    found, _ = interior_point(cone, max_steps)
    point = polish(cone, _point(cone, found))
    # A direction counts only as far as it is one: a curvature above rounding would stop the fall.
    straight = largest(program.curve(point.x)) <= 64 * n * eps * largest(program.Q.flatten(1)) * largest(point.x)
    out = largest(torch.where(program.free, program.multiply(point.x), program.multiply(point.x).clamp(min=0)))
    return torch.where((straight & (out <= eps**0.5 * largest(point.x)))[:, None], point.x, 0.0)
