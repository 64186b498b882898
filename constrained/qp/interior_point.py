"""Mehrotra's predictor-corrector method for a batch of convex quadratic programs.

All elements take their steps together, in one batched factorization per step; those that are done are set aside, and
the batch is compacted when a quarter of it is.

References:
    S. Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 2(4), 1992.
    J. Nocedal, S. Wright, "Numerical Optimization", 2nd edition, 2006, section 16.6 (quadratic programs).
    A. Altman, J. Gondzio, "Regularized symmetric indefinite systems in interior point methods", Optim. Methods Softw.
        11, 1999.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from constrained.qp.program import Program, largest, product


@dataclass
class Iterate:
    """A strictly interior point: slacks and multipliers of present inequalities are positive."""

    x: Tensor  # (batch, n)
    y: Tensor  # (batch, equalities)
    s: Tensor  # (batch, inequalities); one where absent
    z: Tensor  # (batch, inequalities); zero where absent

    @property
    def multiplier(self) -> Tensor:
        return torch.cat([self.y, self.z], 1)

    def take(self, index: Tensor) -> "Iterate":
        return Iterate(*[getattr(self, f.name)[index] for f in fields(self)])

    def put(self, index: Tensor, other: "Iterate") -> None:
        for f in fields(self):
            getattr(self, f.name)[index] = getattr(other, f.name)


def interior_point(program: Program, max_steps: int, forceful: bool = False) -> tuple[Iterate, Tensor]:
    """The last iterates and, of each element, the number of steps.

    An element stops at the accuracy ``eps ** 0.65`` (float64: 7e-11), where no step helps any more, or where a ray
    shows that it has no solution; what it is worth is for the caller to measure. ``forceful`` starts with multipliers
    that do not fall with the distance to a constraint: slower, and safer where the nearest one is far away.
    """
    eps = torch.finfo(program.q.dtype).eps
    size = largest(program.q).clamp(min=1)[:, None]  # multipliers of moderate size
    program = replace(program, Q=program.Q / size[..., None], q=program.q / size)
    point = _start(program, forceful)
    found, steps = point.take(torch.arange(program.batch, device=program.q.device)), program.q.new_zeros(program.batch)
    index = torch.arange(program.batch, device=program.q.device)
    running = torch.ones_like(index, dtype=torch.bool)
    best, since = torch.full_like(steps, torch.inf), torch.zeros_like(steps)
    for _ in range(max_steps):
        error = _error(program, point)
        better = error < 0.9 * best
        best, since = torch.where(better, error, best), torch.where(better, 0.0, since + 1)
        running = running & ~(error <= eps**0.65) & error.isfinite() & (since < 12) & ~_ray(program, point, eps**0.5)
        count = int(running.sum())  # the one host read of a step
        if not count:
            break
        if count <= 0.75 * len(running):
            keep = running.nonzero()[:, 0]
            found.put(index, point)
            program, point, index = program.take(keep), point.take(keep), index[keep]
            best, since, running = best[keep], since[keep], running[keep]
        moved = _step(program, point)
        running = running & _finite(moved)
        point = _choose(running, moved, point)
        steps[index] += running
    found.put(index, point)
    return replace(found, y=size * found.y, z=size * found.z), steps


def _start(program: Program, forceful: bool) -> Iterate:
    """A minimizer on the equations alone, pulled towards zero, and slacks and multipliers on the central path."""
    m, inside = program.equalities, program.present[:, program.equalities :]
    zero = torch.zeros_like(program.d[:, m:])
    system = _System(program, zero, 1.0)
    x, y = system.solve(-program.q, program.d[:, :m])
    slack = -program.gap(x)[:, m:]
    size = (1 + largest((-slack).clamp(min=0)))[:, None]
    s = torch.where(inside, slack.maximum(size), 1.0)
    z = size.expand_as(s) if forceful else size * (size / s).sqrt()
    return Iterate(x, y, s, torch.where(inside, z, 0.0))


class _System:
    """``[[Q + C' W C, A'], [A, 0]]``, factored with a small shift and solved with one step of refinement."""

    def __init__(self, program: Program, weight: Tensor, ridge: float = 0.0) -> None:
        self.program, self.weight, self.ridge = program, weight, ridge
        n, m = program.n, program.equalities
        shift = torch.finfo(program.q.dtype).eps ** 0.6
        dense = program.C[:, m : program.rows - program.bounds]
        hessian = program.Q + (dense * weight[:, : dense.shape[1], None]).mT @ dense
        diagonal = torch.full_like(program.q, shift + ridge)
        if program.bounds:
            for part in range(program.bounds // n):
                start = program.rows - program.bounds + part * n
                diagonal = diagonal + weight[:, start - m : start - m + n]  # the rows of bounds are +-1
        matrix = program.q.new_zeros(program.batch, n + m, n + m)
        matrix[:, :n, :n] = hessian
        matrix[:, n:, :n] = program.C[:, :m]
        matrix[:, :n, n:] = program.C[:, :m].mT
        matrix.diagonal(dim1=1, dim2=2)[:, :n] += diagonal
        matrix.diagonal(dim1=1, dim2=2)[:, n:] -= shift
        self.factors = torch.linalg.lu_factor_ex(matrix)[:2]

    def solve(self, top: Tensor, bottom: Tensor) -> tuple[Tensor, Tensor]:
        dx, dy = self._once(top, bottom)
        back = product(self.program.C[:, : self.program.equalities].mT, dy)
        ahead = self.program.multiply(dx)
        m = self.program.equalities
        weighted = torch.cat([torch.zeros_like(dy), self.weight * ahead[:, m:]], 1)
        residual = top - self.program.curve(dx) - self.ridge * dx - self.program.pull(weighted) - back
        cx, cy = self._once(residual, bottom - ahead[:, :m])
        return dx + cx, dy + cy

    def _once(self, top: Tensor, bottom: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.linalg.lu_solve(*self.factors, torch.cat([top, bottom], 1)[..., None])[..., 0]
        return found[:, : top.shape[1]], found[:, top.shape[1] :]


def _step(program: Program, point: Iterate) -> Iterate:
    m = program.equalities
    inside = program.present[:, m:]
    slope, gap = program.slope(point.x, point.multiplier), program.gap(point.x)
    excess = torch.where(inside, gap[:, m:] + point.s, 0.0)
    system = _System(program, point.z / point.s)

    def direction(target: Tensor) -> Iterate:
        """Newton's step for ``s z = target``-like complementarity, given the residual of it."""
        force = (point.z * excess - target) / point.s
        dx, dy = system.solve(-slope - program.pull(torch.cat([torch.zeros_like(point.y), force], 1)), -gap[:, :m])
        ahead = program.multiply(dx)[:, m:]
        return Iterate(dx, dy, torch.where(inside, -excess - ahead, 0.0), force + point.z / point.s * ahead)

    count = inside.sum(1).clamp(min=1)
    mean = (point.s * point.z).sum(1) / count
    predicted = direction(point.s * point.z)
    reach = _longest(point, predicted)[:, None]
    ahead = ((point.s + reach * predicted.s) * (point.z + reach * predicted.z)).sum(1) / count
    centre = (ahead / mean.clamp(min=torch.finfo(mean.dtype).tiny)).clamp(max=1.0) ** 3 * mean
    target = point.s * point.z + predicted.s * predicted.z - centre[:, None]
    step = direction(torch.where(inside, target, 0.0))
    length = (0.995 * _longest(point, step)).clamp(max=1.0)[:, None]
    return Iterate(*[getattr(point, f.name) + length * getattr(step, f.name) for f in fields(point)])


def _longest(point: Iterate, step: Iterate) -> Tensor:
    """The largest factor, at most ``1 / 0.995``, that keeps slacks and multipliers nonnegative."""
    longest = torch.full_like(point.x[:, 0], 1 / 0.995)
    for value, change in ((point.s, step.s), (point.z, step.z)):
        if value.shape[1]:
            longest = longest.minimum(torch.where(change < 0, -value / change, torch.inf).amin(1))
    return longest


def _error(program: Program, point: Iterate) -> Tensor:
    m = program.equalities
    curve, pull = program.curve(point.x), program.pull(point.multiplier)
    dual = largest(curve + program.q + pull) / (1 + largest(curve) + largest(pull))
    gap = program.gap(point.x)
    excess = torch.where(program.present[:, m:], gap[:, m:] + point.s, 0.0)
    primal = largest(torch.cat([gap[:, :m], excess], 1)) / (1 + largest(point.x))
    objective = (point.x * (curve / 2 + program.q)).sum(1).abs()
    return torch.stack([dual, primal, (point.s * point.z).sum(1) / (1 + objective)]).amax(0)


def _ray(program: Program, point: Iterate, tolerance: float) -> Tensor:
    """Whether the multipliers prove infeasibility, or x unboundedness, closely enough to stop and look."""
    y = point.multiplier
    cost = (program.d * y).sum(1)
    infeasible = (cost < 0) & (largest(program.pull(y)) <= -tolerance * cost) & (largest(y) > 1e4)
    fall = (program.q * point.x).sum(1)
    ahead = torch.where(program.free, program.multiply(point.x).abs(), program.multiply(point.x))
    rise = largest(program.curve(point.x)) + largest(ahead.clamp(min=0))
    return infeasible | ((fall < 0) & (rise <= -tolerance * fall) & (largest(point.x) > 1e4))


def _finite(point: Iterate) -> Tensor:
    return torch.stack([getattr(point, f.name).isfinite().all(1) for f in fields(point)]).all(0)


def _choose(flag: Tensor, new: Iterate, old: Iterate) -> Iterate:
    return Iterate(*[torch.where(flag[:, None], getattr(new, f.name), getattr(old, f.name)) for f in fields(old)])
