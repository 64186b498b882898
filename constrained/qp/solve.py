"""A solve as autograd sees it: a part that nothing follows, and the derivative on the active rows."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from constrained.qp.active_set import Dual, gather, kernel, kkt_matrix, select
from constrained.qp.arguments import tracked
from constrained.qp.derivative import Found, Watch, follow, follow_projection
from constrained.qp.program import Program, largest, product
from constrained.qp.scaling import Data, Scale, scaled
from constrained.qp.solution import QPSolution, describe, split
from constrained.qp.solver import CONVERGED, NONFINITE, STALLED, STEP_LIMIT, Outcome, solve_program
from implicit.status import ConvergenceWarning, SolveError


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked for, apart from tensors.

    Attributes:
        atol: what the residuals must not exceed, or None.
        max_steps: of the interior-point method.
        raises: the codes that raise.
        differentiable: whether derivatives may be asked for.
        guessed: whether a guess of the active rows comes along.
        single: whether the batch axis is of our making.
        projection: whether Q is the identity.
        dual: the matrices of the dual method, where they are known.
    """

    atol: float | None
    max_steps: int
    raises: tuple[int, ...]
    differentiable: bool
    guessed: bool
    single: bool
    projection: bool = False
    dual: Dual | None = None


def solve_data(task: Task, data: Data, guess: Tensor | None) -> QPSolution:
    """Solve, and connect the solution to the arguments."""
    blank = torch.zeros(1, 0, dtype=torch.bool, device=data.q.device) if guess is None else guess
    found = Solve.apply(task, blank, *data.tensors)
    x, multiplier, active, ray, residual, codes, steps, row, objective, unit, index, valid, null, doubts = found
    if task.differentiable:
        good = codes == CONVERGED
        values = Found(x, multiplier, Scale(row, objective, unit), index, valid, null, good)
        x, multiplier = (follow_projection if task.projection else follow)(data, values)
        n = x.shape[1]
        moves = tracked(data.A, data.b, data.G, data.h, data.lower, data.upper)
        weak = doubts[:, 0] | (doubts[:, 2] & tracked(data.lower, data.upper))
        columns = [weak, doubts[:, 1] & moves, ~good]
        both = Watch.apply(
            torch.cat([x, multiplier], 1), _slides(null, n, multiplier.shape[1]), torch.stack(columns, 1)
        )
        x, multiplier = both[:, :n], both[:, n:]
    value = (x * (product(data.symmetric(), x) / 2 + data.q)).sum(1)
    solution = _pack(data, x, multiplier, active, ray, residual, codes, steps, value)
    return _squeeze(solution) if task.single else solution


def _slides(null: Tensor, n: int, rows: int) -> Tensor:
    """The directions of x in the null space, with zeros for the multipliers."""
    part = null[:, :n]
    return torch.cat([part, part.new_zeros(part.shape[0], rows, part.shape[2])], 1)


def _pack(
    data: Data,
    x: Tensor,
    multiplier: Tensor,
    active: Tensor,
    ray: Tensor,
    residual: Tensor,
    codes: Tensor,
    steps: Tensor,
    value: Tensor,
) -> QPSolution:
    stationarity, feasibility, complementarity = residual.unbind(1)
    return QPSolution(
        x=x,
        **split(multiplier, data.counts, x.detach()),
        objective=value,
        ray=ray,
        stationarity=stationarity,
        feasibility=feasibility,
        complementarity=complementarity,
        codes=codes,
        steps=steps,
        active=active,
    )


def _squeeze(solution: QPSolution) -> QPSolution:
    return replace(solution, **{name: value[0] for name, value in vars(solution).items()})


class Solve(torch.autograd.Function):
    """Everything that derivatives do not pass through; vmapped axes join the batch."""

    @staticmethod
    def forward(task: Task, guess: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        data = Data(*tensors)
        _check_values(data)
        finite = _finite(data)
        good = finite.nonzero()[:, 0]
        whole = len(good) == data.batch
        program, scale = scaled(data)
        part = program if whole else program.take(good)
        expanded = (
            (guess.expand(data.batch, -1) if whole else guess.expand(data.batch, -1)[good]) if task.guessed else None
        )
        dual = task.dual
        if dual is None:
            factor = None if task.projection else _factor(part)
            dual = None if factor is None and not task.projection else Dual.of(part.C, factor)
        outcome = solve_program(part, dual, task.max_steps, expanded)
        if not whole:
            outcome = _restore(program, good, outcome)
        final, residual = _certified(task, program, data, scale, outcome)
        if task.differentiable:
            index, valid = gather(outcome.active)
            rows = select(program.C, index, valid)
            null = _kernel(task, program, rows, valid, final.code)
            doubts = _doubts(program, outcome, null, data.counts)
        else:
            index, valid = gather(outcome.active[:, :0])
            null, doubts = program.q.new_zeros(data.batch, program.n, 0), outcome.active[:, :0]
        return (
            final.x,
            final.multiplier,
            final.active,
            final.ray,
            residual,
            final.code,
            final.steps,
            scale.row.clone(),
            scale.objective.clone(),
            scale.unit.clone(),
            index,
            valid,
            null,
            doubts,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.set_materialize_grads(False)
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[None, ...]:
        return (None,) * ctx.count

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        return (None,) * 14

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        task, *tensors = args
        count = info.batch_size
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims[1:], strict=True)]
        batch = max(t.shape[0 if d is None else 1] for t, d in zip(moved, in_dims[1:], strict=True))

        def fold(t: Tensor, d: int | None) -> Tensor:
            if d is None and len(t) == 1:
                return t  # still shared by all
            wide = t.expand(count, *t.shape) if d is None else t
            return wide.expand(count, batch, *wide.shape[2:]).flatten(0, 1)

        found = Solve.apply(replace(task, single=False), *[fold(t, d) for t, d in zip(moved, in_dims[1:], strict=True)])
        return tuple(f.unflatten(0, (count, batch)) for f in found), (0,) * len(found)


def measure(data: Data, x: Tensor, multiplier: Tensor) -> Tensor:
    """The residuals of :class:`constrained.KKTResidual` in the units of the arguments, ``(batch, 3)``."""
    C, d = data.rows()
    present, m = d.isfinite(), data.counts[0]
    gradient = product(data.symmetric(), x) + data.q
    size = torch.maximum(largest(gradient), largest(multiplier)).clamp(min=1)
    stationarity = largest(gradient + product(C.mT, multiplier)) / size
    gap = torch.where(present, product(C, x) - d, 0.0)
    feasibility = largest(torch.cat([gap[:, :m], gap[:, m:].clamp(min=0)], 1))
    product_ = (gap * multiplier)[:, m:]
    wrong = multiplier[:, m:].clamp(max=0)
    return torch.stack([stationarity, feasibility, torch.maximum(largest(product_), largest(wrong)) / size], 1)


def _certified(task: Task, program: Program, data: Data, scale: Scale, outcome: Outcome) -> tuple[Outcome, Tensor]:
    """The outcome in the units of the arguments, CONVERGED only where its residuals say so; raise for failures."""
    unit, settled = scale.unit[:, None], _settled(program, outcome)
    outcome = replace(outcome, x=unit * outcome.x, multiplier=scale.multiplier(outcome.multiplier))
    residual = measure(data, outcome.x, outcome.multiplier)
    eps = torch.finfo(program.q.dtype).eps
    atol = task.atol if task.atol is not None else (1e-8 if eps < 1e-10 else 1e-4)
    rounding = 64 * eps * scale.unit
    if program.rows:  # of the longest row
        rounding = 64 * eps * (scale.unit + largest(outcome.x)) / scale.row.amin(1)
    # Gaps are lengths, and what counts as small is relative to the unit of x.
    gap = torch.maximum(rounding, atol * scale.unit)
    close = (residual <= torch.stack([torch.full_like(gap, atol), gap, gap], 1)).all(1)
    code = torch.where((outcome.code == CONVERGED) & ~close, STALLED, outcome.code)
    unsure = (outcome.code != CONVERGED) & close & settled & (outcome.code != NONFINITE)
    code = torch.where(unsure & (outcome.ray == 0).all(1), CONVERGED, code)
    outcome = replace(outcome, code=code)
    if task.raises and any(c in task.raises for c in code.unique().tolist()):
        x = outcome.x
        value = (x * (product(data.symmetric(), x) / 2 + data.q)).sum(1)
        found = _pack(data, x, outcome.multiplier, outcome.active, outcome.ray, residual, code, outcome.steps, value)
        raise SolveError(describe(code), _squeeze(found) if task.single else found)
    if task.projection and bool(((code == STALLED) | (code == STEP_LIMIT)).any()):
        warnings.warn(f"projection: {describe(code)}", ConvergenceWarning, stacklevel=2)
    return outcome, residual


def _settled(program: Program, outcome: Outcome) -> Tensor:
    """Whether what is left of the gradient of the Lagrangian is small against the objective, even where x is large."""
    x, curve = outcome.x, program.curve(outcome.x)
    left = (x * program.slope(x, outcome.multiplier)).sum(1).abs()
    return left <= torch.finfo(x.dtype).eps ** 0.25 * ((x * curve).abs() + (x * program.q).abs()).sum(1)


def _doubts(program: Program, outcome: Outcome, null: Tensor, counts: tuple[int, int, int, int]) -> Tensor:
    """``(batch, 3)``: whether constraints are active without force, apart from bounds that meet; whether active rows
    are dependent; and whether such bounds are without force."""
    eps = torch.finfo(program.q.dtype).eps
    gap, multiplier, reach = program.gap(outcome.x), outcome.multiplier, (1 + largest(outcome.x))[:, None]
    near = gap.abs() <= eps ** (1 / 3) * reach
    force = largest(program.curve(outcome.x)) + largest(program.q) + largest(multiplier)
    weak = near & (multiplier.abs() <= eps ** (1 / 3) * force[:, None]) & program.present & ~program.free
    met = torch.zeros_like(weak)
    if counts[2] and counts[3]:
        (upper, lower), both = gap[:, -2 * counts[3] :].chunk(2, 1), program.present[:, -2 * counts[3] :].chunk(2, 1)
        # Only one of the two has a force, and the variable stays all the same.
        pair = ((upper + lower).abs() <= 64 * eps * reach) & both[0] & both[1]
        met[:, -2 * counts[3] :] = torch.cat([pair, pair], 1)
    dependent = (null[:, program.n :].abs() > 1e-8).any(2).any(1)
    return torch.stack([(weak & ~met).any(1), dependent, (weak & met).any(1)], 1)


def _kernel(task: Task, program: Program, rows: Tensor, valid: Tensor, code: Tensor) -> Tensor:
    """The null space of the system that derivatives solve."""
    if not task.projection:
        return kernel(_harmless(kkt_matrix(program.Q, rows, valid), code))
    gram = rows @ rows.mT + torch.diag_embed((~valid).to(rows.dtype))
    part = kernel(_harmless(gram, code))
    return torch.cat([part.new_zeros(len(part), program.n, part.shape[2]), part], 1)


def _harmless(matrix: Tensor, code: Tensor) -> Tensor:
    """The identity where nothing was solved, so that no null space is looked for there."""
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    return torch.where((code == CONVERGED)[:, None, None], matrix, eye)


def _restore(program: Program, good: Tensor, part: Outcome) -> Outcome:
    """The outcome with the elements that are not finite."""

    def spread(values: Tensor, fill: float | int | bool) -> Tensor:
        full = torch.full((program.batch, *values.shape[1:]), fill, dtype=values.dtype, device=values.device)
        return full.index_copy(0, good, values)

    nan = float("nan")
    return Outcome(
        spread(part.x, nan),
        spread(part.multiplier, nan),
        spread(part.active, False),
        spread(part.ray, 0.0),
        spread(part.code, NONFINITE),
        spread(part.steps, 0.0),
    )


def _factor(program: Program) -> Tensor | None:
    """Cholesky factors of Q where all are safely definite, else None; indefinite Q is refused."""
    eps = torch.finfo(program.q.dtype).eps
    factor, info = torch.linalg.cholesky_ex(program.Q)
    pivots = factor.diagonal(dim1=1, dim2=2)
    definite = (info == 0) & (pivots.amin(1) > eps**0.3 * pivots.amax(1))
    if bool(definite.all()):
        return factor
    index = (info != 0).nonzero()[:, 0]
    values = torch.linalg.eigvalsh(program.Q[index])
    wrong = (values[:, 0] < -(eps**0.6) * values.abs().amax(1)).nonzero()[:, 0] if len(index) else index
    if len(wrong):
        where = f"[{int(index[wrong[0]])}]" if len(program.Q) > 1 else ""
        ratio = float(values[wrong[0], 0] / values[wrong[0]].abs().amax())
        raise ValueError(
            f"Q{where} is not positive semidefinite: its smallest eigenvalue is {ratio:.3g} times its largest in "
            "size. The program is not convex; add a multiple of the identity to Q, or use constrained.solve"
        )
    return None


def _finite(data: Data) -> Tensor:
    """Which elements have finite arguments; infinite bounds are not arguments."""
    flags = torch.ones(data.batch, dtype=torch.bool, device=data.q.device)
    for tensor in (data.Q, data.q, data.A, data.b, data.G):
        flags = flags & tensor.isfinite().flatten(1).all(1)
    for tensor in (data.h, data.lower, data.upper):
        flags = flags & ~tensor.isnan().any(1)
    return flags


def _check_values(data: Data) -> None:
    sides = (("h", data.h, "-inf"), ("lower", -data.lower, "inf"), ("upper", data.upper, "-inf"))
    for name, tensor, bad in sides:
        if bool((tensor == -torch.inf).any()):
            raise ValueError(f"{name} contains {bad}, which no point satisfies: give a number, or drop the constraint")
