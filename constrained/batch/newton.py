"""The primal-dual Newton method on a batch: one step of every unfinished element."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from constrained.batch.elements import (
    CODE,
    FILTER,
    Elements,
    largest,
    least_squares,
    pick,
    residual,
    violation,
)
from constrained.batch.functions import BatchFunctions, Derivatives, combine
from constrained.batch.search import Step, enter, misfit, search, to_boundary
from constrained.batch.system import System, gaps
from constrained.method import default_atol
from constrained.unbounded import DEPTH
from implicit import IterativeMethod, State, Status
from implicit.tree import Tree

FIRST_BARRIER = 0.1
CACHED = 500_000
PATIENCE = 10
"""Steps without a tenth less of a violation that is not small after which the objective is left aside."""


@dataclass(kw_only=True)
class BatchState(State):
    """The elements; ``unfinished`` counts those that go on."""

    elements: Elements
    unfinished: int
    generator: torch.Generator


@dataclass(frozen=True, kw_only=True)
class BatchedNewton(IterativeMethod[BatchState]):
    """Primal-dual interior-point Newton steps for every element of a batch, each with its own everything.

    For ``min f(x) s.t. h(x) = 0, c(x) <= 0, lower <= x <= upper``: slacks ``c(x) + s = 0``, logarithmic barriers on s
    and on the distances to bounds with a weight that falls, superlinearly in the end, whenever the barrier problem is
    solved to its own accuracy, Newton steps on the conditions of the barrier problem with the exact Hessian, shifted
    where its projection on the null space of the constraints is not positive definite, and a line search whose points
    are accepted by a filter on violation and barrier objective, with second-order corrections. Without inequalities and
    bounds this is Newton's method with line search. An element whose steps are refused, or whose violation does not
    fall, minimizes the violation for a while, and is infeasible if that is stationary.

    Args:
        atol: the largest scaled residual that counts as solved, see :class:`constrained.KKTResidual`; None means 1e-8
            in float64 and 1e-4 in float32.
        chunk: elements that are worked on together: large enough that the time of a kernel is its arithmetic, small
            enough that the arrays stay in cache. None means all on an accelerator, and on a CPU as many as have
            500,000 entries in their matrices.

    Raises:
        ValueError: if a field is out of range.

    References:
        A. Waechter, L. T. Biegler, "On the implementation of an interior-point filter line-search algorithm for
            large-scale nonlinear programming", Math. Program. 106, 2006: equation 7 (weight), section 2.3 (filter),
            2.4 (corrections), 3.3 (restoration).
    """

    atol: float | None = None
    chunk: int | None = None

    default_max_steps: ClassVar[int] = 200

    def __post_init__(self) -> None:
        if self.atol is not None and not self.atol > 0:
            raise ValueError(f"atol must be positive or None, got {self.atol!r}")
        if self.chunk is not None and not self.chunk >= 1:
            raise ValueError(f"chunk must be at least 1 or None, got {self.chunk!r}")

    def resolve(self, problem: BatchFunctions, *start: Any, max_steps: int | None = None) -> Self:
        """The same method with every None filled in."""
        entries = (problem.n + problem.equalities) ** 2
        room = max(256, CACHED // entries) if problem.device.type == "cpu" else problem.size
        chunk = self.chunk or room
        return replace(self, atol=self.atol or default_atol(problem.dtype), chunk=max(1, min(chunk, problem.size)))

    def init(self, problem: BatchFunctions, *start: Any, generator: torch.Generator | None = None) -> BatchState:
        """Starts inside the bounds, slacks, and multipliers of h by least squares; ``start = (x0,)``, shape (B, n)."""
        (x0,) = start
        assert self.chunk is not None
        rows = torch.arange(problem.size, device=problem.device)
        parts = [_begin(problem, x0[index], problem.at(index)) for index in rows.split(self.chunk)]
        elements = Elements(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        unfinished = int((elements.code == CODE[Status.RUNNING]).sum())
        return BatchState(
            elements=elements, unfinished=unfinished, generator=generator or torch.Generator().manual_seed(0)
        )

    def step(self, problem: BatchFunctions, state: BatchState) -> dict[str, float]:
        """One step of every unfinished element, in chunks; two numbers are read on the host for all of them."""
        assert self.atol is not None and self.chunk is not None
        running = (state.elements.code == CODE[Status.RUNNING]).nonzero().squeeze(1)
        restoring = bool(state.elements.restoring[running].any())
        for index in _pieces(running, problem.size, self.chunk):
            moved = advance(problem, state.elements.rows(index), problem.at(index), self.atol, restoring=restoring)
            state.elements.put(index, moved)
        codes = state.elements.code
        counts = torch.bincount(codes, minlength=len(CODE)).tolist()
        state.unfinished = counts[CODE[Status.RUNNING]]
        solved = counts[CODE[Status.CONVERGED]]
        return {"unfinished": float(state.unfinished), "converged": float(solved)}

    def terminate(self, problem: BatchFunctions, state: BatchState) -> Status:
        """Until no element goes on."""
        return Status.RUNNING if state.unfinished else Status.CONVERGED

    def point(self, state: BatchState) -> Tree:
        """The iterates."""
        return state.elements.x


def _pieces(running: Tensor, size: int, chunk: int) -> Sequence[Tensor | slice]:
    """The running elements in chunks; slices, which need no copies, as long as all are running."""
    if len(running) == size:
        return [slice(start, start + chunk) for start in range(0, size, chunk)]
    return running.split(chunk)


def _begin(functions: BatchFunctions, x: Tensor, data: list[Tensor]) -> Elements:
    """Elements at their starts, moved inside the bounds by a hundredth of the room there is."""
    k, m = len(x), functions.equalities
    if functions.bounded:
        x = _inside(functions, x)
    d = functions.derivatives(x, x.new_zeros(k, functions.constraints), data, hessian=False)
    c = d.constraints[:, m:]
    barrier = x.new_full((k,), FIRST_BARRIER)
    slack = torch.maximum(torch.nan_to_num(-c, nan=1.0, posinf=1.0, neginf=1.0), x.new_full((), 0.1))
    below, above = gaps(functions, x)
    finite = _finite(d)
    zeros, count = x.new_zeros(k), torch.zeros(k, dtype=torch.int64, device=x.device)
    broken = violation(functions, x, d.constraints)
    return Elements(
        x=x,
        slack=slack,
        equality=pick(finite, least_squares(functions, d), x.new_zeros(k, m)) if m else x.new_zeros(k, 0),
        inequality=FIRST_BARRIER / slack,
        lower=FIRST_BARRIER / below,
        upper=FIRST_BARRIER / above,
        barrier=barrier,
        filter=x.new_full((k, FILTER, 2), torch.inf),
        place=count,
        scale=torch.nan_to_num(misfit(functions, slack, d.constraints), nan=1.0).clamp(min=1.0),
        shift=zeros,
        restoring=torch.zeros(k, dtype=torch.bool, device=x.device),
        entry=broken,
        least=broken.clone(),
        since=count.clone(),
        failures=count.clone(),
        code=torch.where(finite, CODE[Status.RUNNING], CODE[Status.NONFINITE]),
        saddle=torch.zeros(k, dtype=torch.bool, device=x.device),
        steps=count.clone(),
        objective=d.objective,
        first=d.objective.clone(),
        residual=x.new_full((k, 3), torch.nan),
    )


def _inside(functions: BatchFunctions, x: Tensor) -> Tensor:
    """x at least a hundredth of its size, and of the room between the bounds, away from them."""
    lower, upper = functions.lower, functions.upper
    room = 1e-2 * (upper - lower)
    low = lower + torch.minimum(1e-2 * lower.abs().clamp(min=1.0), room)
    high = upper - torch.minimum(1e-2 * upper.abs().clamp(min=1.0), room)
    x = torch.where(torch.isfinite(lower), torch.maximum(x, low), x)
    return torch.where(torch.isfinite(upper), torch.minimum(x, high), x)


def advance(functions: BatchFunctions, e: Elements, data: list[Tensor], atol: float, *, restoring: bool) -> Elements:
    """Look at every element where it is, finish those that are done, and move the others."""
    d = functions.derivatives(e.x, e.multipliers, data, violated=e.restoring if restoring else None)
    finite = _finite(d)
    if functions.fixed:
        e = _fix(functions, e, d)
    e = e._replace(objective=d.objective, residual=residual(functions, e, d))
    e = _judge(functions, e, d, finite, atol)
    room = gaps(functions, e.x)
    if restoring:
        e = _restored(functions, e, d, room)
    system = System(functions, e, d, room, restoring=restoring)
    e = _next_barrier(functions, e, d, room, atol)
    weight = e.barrier
    if restoring:
        # The barrier is small against what is minimized there, and vanishes when that falls no more.
        small = torch.minimum(weight, 1e-2 * _half(functions, d)) * 0.2 ** e.since.to(weight.dtype)
        e = e._replace(barrier=torch.where(e.restoring, small, weight))
    step = system.direction(e.barrier)
    tau = torch.maximum(1.0 - e.barrier, e.barrier.new_full((), 0.99))
    longest, dual = to_boundary(e, functions, room, step, tau)
    taken = search(functions, data, e, d, system, step, longest, restoring=restoring)
    ahead = (dual[:, None], (longest * taken.length)[:, None])
    moved = e._replace(
        x=taken.x,
        slack=taken.slack,
        equality=e.equality + ahead[1] * step.equality,
        inequality=e.inequality + ahead[0] * step.inequality,
        lower=e.lower + ahead[0] * step.lower,
        upper=e.upper + ahead[0] * step.upper,
    )
    if restoring:
        moved = moved._replace(slack=pick(e.restoring, e.slack, moved.slack))
    running = e.code == CODE[Status.RUNNING]
    moved = enter(moved, taken.entered, taken.entry)
    following = e.choose(taken.accepted & running, moved)._replace(barrier=weight)
    return _remember(following, e, system, taken, longest * taken.length, running, atol)


def _finite(d: Derivatives) -> Tensor:
    """Whether all values and derivatives of an element are numbers, shape (k,)."""
    total = d.objective + d.constraints.sum(dim=1) + d.slope.sum(dim=1) + d.jacobian.flatten(1).sum(dim=1)
    if d.hessian is not None:
        total = total + d.hessian.flatten(1).sum(dim=1)
    return torch.isfinite(total)


def _fix(functions: BatchFunctions, e: Elements, d: Derivatives) -> Elements:
    """Multipliers of variables whose bounds meet balance the slope."""
    fixed = functions.lower >= functions.upper
    return e._replace(
        lower=torch.where(fixed, d.slope.clamp(min=0), e.lower),
        upper=torch.where(fixed, -d.slope.clamp(max=0), e.upper),
    )


def _judge(functions: BatchFunctions, e: Elements, d: Derivatives, finite: Tensor, atol: float) -> Elements:
    """End the elements that are solved, lost, infeasible or unbounded."""
    code, broken = e.code, e.residual[:, 1]
    running = code == CODE[Status.RUNNING]
    solved = running & finite & (e.residual.amax(dim=1) <= atol) & ~e.restoring
    minimum = solved & is_minimum(functions, e, d, solved, atol)
    code = torch.where(minimum, CODE[Status.CONVERGED], code)
    code = torch.where(solved & ~minimum, CODE[Status.STALLED], code)
    code = torch.where(running & ~finite, CODE[Status.NONFINITE], code)
    down = (e.objective < -DEPTH * e.first.abs().clamp(min=1.0)) & (not functions.compact)
    feasible = broken <= 1e-6 * largest(e.x).clamp(min=1.0)
    code = torch.where(running & ~solved & down & feasible & ~e.restoring, CODE[Status.UNBOUNDED], code)
    return e._replace(code=code, saddle=e.saddle | (solved & ~minimum))


def is_minimum(functions: BatchFunctions, e: Elements, d: Derivatives, wanted: Tensor, atol: float) -> Tensor:
    """Whether the Hessian has no negative curvature on the tangent space of the active constraints, shape (k,).

    Negative means below ``-sqrt(atol)`` times its largest entry, as in :meth:`constrained.ConstrainedMethod.assess`.
    """
    found = torch.zeros_like(wanted)
    index = wanted.nonzero().squeeze(1)
    if not len(index):
        return found
    assert d.hessian is not None
    m, n, eps = functions.equalities, functions.n, torch.finfo(e.x.dtype).eps
    x, hessian, jacobian, values = e.x[index], d.hessian[index], d.jacobian[index], d.constraints[index]
    lengths = torch.linalg.vector_norm(jacobian, dim=2)
    active = torch.ones_like(values)
    active[:, m:] = (values[:, m:] >= -(eps ** (1 / 3)) * lengths[:, m:].clamp(min=1.0)).to(x.dtype)
    near = torch.maximum(functions.lower - x, x - functions.upper) >= -(eps ** (1 / 3))
    free = (~near).to(x.dtype)
    size = largest(hessian.flatten(1)).clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
    hessian = hessian * free[:, :, None] * free[:, None, :] + torch.diag_embed(size[:, None] * (1 - free))
    normals = jacobian * free[:, None, :] * active[:, :, None]
    normals = normals / torch.linalg.vector_norm(normals, dim=2, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    test = hessian + (size / eps**0.45)[:, None, None] * (normals.mT @ normals)
    test = test + torch.diag_embed((atol**0.5 * size)[:, None].expand(-1, n))
    found[index] = torch.linalg.cholesky_ex(test)[1] == 0
    return found


def _restored(functions: BatchFunctions, e: Elements, d: Derivatives, room: tuple[Tensor, Tensor]) -> Elements:
    """Elements that have regained feasibility go back to the problem; those that cannot are infeasible."""
    broken = e.residual[:, 1]
    running = (e.code == CODE[Status.RUNNING]) & e.restoring
    back = running & (broken <= 0.1 * e.entry)
    balance = d.slope - e.lower + e.upper
    terms = combine(d.jacobian.abs(), functions.excess(d.constraints).abs())
    stuck = running & ~back & (largest(balance) <= 1e-6 * largest(terms))
    if functions.bounded:
        products = [torch.where(torch.isinf(g), 0.0, g * z) for g, z in zip(room, (e.lower, e.upper), strict=True)]
        stuck = stuck & (largest(*products) <= 1e-6 * _half(functions, d))
    code = torch.where(stuck, CODE[Status.INFEASIBLE], e.code)
    c = d.constraints[:, functions.equalities :]
    slack = torch.maximum(-c, (0.1 * broken[:, None]).clamp(min=1e-3))
    fresh = e._replace(
        slack=slack,
        equality=torch.zeros_like(e.equality),
        inequality=e.barrier[:, None] / slack,
        restoring=torch.zeros_like(e.restoring),
        since=torch.zeros_like(e.since),
        failures=torch.zeros_like(e.failures),
        shift=torch.zeros_like(e.shift),
        least=broken,
    )
    return e._replace(code=code).choose(back, fresh)


def _half(functions: BatchFunctions, d: Derivatives) -> Tensor:
    """``1/2 ||h||^2 + 1/2 ||max(c, 0)||^2``, shape (k,)."""
    return 0.5 * functions.excess(d.constraints).square().sum(dim=1)


def _next_barrier(
    functions: BatchFunctions, e: Elements, d: Derivatives, room: tuple[Tensor, Tensor], atol: float
) -> Elements:
    """The weight falls, superlinearly in the end, where the barrier problem is solved to its own accuracy."""
    if not functions.inequalities and not functions.bounded:
        return e._replace(barrier=torch.zeros_like(e.barrier))
    m = functions.equalities
    products = [e.slack * e.inequality]
    total, left = d.slope, [d.constraints[:, :m], d.constraints[:, m:] + e.slack]
    if functions.bounded:
        total = total - e.lower + e.upper
        for gap, dual in zip(room, (e.lower, e.upper), strict=True):
            products.append(torch.where(torch.isinf(gap), torch.nan, gap * dual))
    duals = [e.equality, e.inequality, e.lower, e.upper]
    scale = (torch.cat(duals, dim=1).abs().mean(dim=1) / 100).clamp(min=1.0)
    outer = torch.maximum(largest(total) / scale, largest(*left))
    every, barrier = torch.cat(products, dim=1), e.barrier
    for _ in range(3):
        away = torch.nan_to_num(every - barrier[:, None], nan=0.0)
        close = (torch.maximum(outer, largest(away) / scale) <= 10 * barrier) & ~e.restoring
        lower = torch.minimum(0.2 * barrier, barrier**1.5).clamp(min=atol / 20)
        barrier = torch.where(close, lower, barrier)
    # Another barrier is another merit: its filter is empty.
    fallen = (barrier < e.barrier)[:, None, None]
    return e._replace(barrier=barrier, filter=torch.where(fallen, torch.inf, e.filter))


def _remember(
    e: Elements, old: Elements, system: System, taken: Step, length: Tensor, running: Tensor, atol: float
) -> Elements:
    """Counters and shifts after a step, and who changes course."""
    broken = old.residual[:, 1]
    failures = torch.where(taken.accepted & (length > 1e-2), 0, e.failures + 1)
    floor = 1e-4 * system.size
    shift = torch.where(taken.accepted, 0.1 * e.shift, torch.maximum(10 * e.shift, floor))
    shift = torch.where(shift < 1e-3 * floor, 0.0, shift)
    since = torch.where(broken <= 0.9 * torch.maximum(e.least, 1e-3 * e.scale), 0, e.since + 1)
    lost = (failures >= 3) | (since >= PATIENCE)
    leave = running & lost & (broken > atol) & ~e.restoring
    hopeless = running & (failures >= 8) & ~leave
    e = enter(e, leave, taken.entry)
    # A feasible point that the filter keeps from moving gets a new one.
    blocked = (failures == 4) & ~e.restoring
    return e._replace(
        filter=torch.where(blocked[:, None, None], torch.inf, e.filter),
        failures=torch.where(leave, 0, failures),
        shift=torch.where(leave, 0.0, shift),
        least=torch.minimum(e.least, broken),
        since=torch.where(leave, 0, since),
        restoring=e.restoring | leave,
        entry=torch.where(leave, broken, e.entry),
        code=torch.where(hopeless, CODE[Status.STALLED], e.code),
        steps=e.steps + running.to(e.steps.dtype),
    )
