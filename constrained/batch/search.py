"""Step lengths of all elements at once: the merit function, and which of several trial points each one takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from constrained.batch.elements import FILTER, Elements
from constrained.batch.functions import BatchFunctions, Derivatives, Values
from constrained.batch.system import Direction, System, gaps

LENGTHS = (0.5, 0.25, 0.1, 0.03, 0.01, 1e-3, 1e-5)
"""Fractions that are tried together once the full step is refused."""
CORRECTIONS = 3
ARMIJO = 1e-4
GAMMA = 1e-5
"""How much of the misfit counts as progress."""


class Step(NamedTuple):
    """Where the search ended.

    Attributes:
        x, slack: the new ones.
        length: of the step, relative to the longest.
        accepted: whether any was taken.
        entered: whether the old point goes into the filter, as ``entry``, shape (k, 2).
    """

    x: Tensor
    slack: Tensor
    length: Tensor
    accepted: Tensor
    entered: Tensor
    entry: Tensor


def to_boundary(
    e: Elements, functions: BatchFunctions, room: tuple[Tensor, Tensor], step: Direction, tau: Tensor
) -> tuple[Tensor, Tensor]:
    """The longest steps, at most one, that keep the fraction ``1 - tau`` of every slack and of every multiplier."""
    primal, dual = [], []
    if functions.inequalities:
        primal.append(_ratio(e.slack, step.slack))
        dual.append(_ratio(e.inequality, step.inequality))
    if functions.bounded:
        below, above = room
        primal += [_ratio(below, step.x), _ratio(above, -step.x)]
        dual += [_ratio(e.lower, step.lower), _ratio(e.upper, step.upper)]
    if not primal:
        one = torch.ones_like(e.barrier)
        return one, one
    return tuple((1.0 / torch.cat(p, dim=1).amax(dim=1).clamp(min=0) * tau).clamp(max=1.0) for p in (primal, dual))  # type: ignore[return-value]


def _ratio(value: Tensor, change: Tensor) -> Tensor:
    """How fast a positive value falls, relative to itself; zero where it is zero and stays there."""
    return torch.where((change < 0) & torch.isfinite(value), -change / value, 0.0)


class Merit:
    """``f - barrier * (sum of logs)`` of every element.

    Elements that are restoring feasibility have ``1/2 ||h||^2 + 1/2 ||max(c, 0)||^2`` for f and no logs of slacks.
    """

    def __init__(self, functions: BatchFunctions, e: Elements, *, restoring: bool) -> None:
        self.functions, self.e, self.restoring = functions, e, restoring

    def __call__(self, x: Tensor, slack: Tensor, values: Values) -> Tensor:
        """The merit of every row, shape (k,)."""
        e, functions = self.e, self.functions
        total, keep = values.objective, torch.ones_like(e.barrier)
        if self.restoring:
            total = torch.where(e.restoring, 0.5 * functions.excess(values.constraints).square().sum(dim=1), total)
            keep = (~e.restoring).to(x.dtype)
        if functions.inequalities:
            total = total - e.barrier * keep * slack.log().sum(dim=1)
        if functions.bounded:
            for gap in gaps(functions, x):
                total = total - e.barrier * torch.where(torch.isinf(gap), 1.0, gap).log().sum(dim=1)
        return total


def misfit(functions: BatchFunctions, slack: Tensor, constraints: Tensor) -> Tensor:
    """``||(h, c + slack)||_1``, shape (k,)."""
    if not functions.constraints:
        return constraints.new_zeros(len(constraints))
    return _with_slack(functions, slack, constraints).abs().sum(dim=1)


def _with_slack(functions: BatchFunctions, slack: Tensor, constraints: Tensor) -> Tensor:
    m = functions.equalities
    if not functions.inequalities:
        return constraints
    return torch.cat([constraints[:, :m], constraints[:, m:] + slack], dim=1)


class Test:
    """Whether trial points of every element are taken: the filter of Waechter and Biegler.

    A point must lower the misfit ``||(h, c + slack)||_1`` or the merit against the current one and against all pairs
    of the filter. Where the misfit is small and the merit falls, the merit must fall as Armijo has it. Elements that
    are restoring feasibility are held to Armijo's rule alone.
    """

    def __init__(
        self,
        functions: BatchFunctions,
        e: Elements,
        d: Derivatives,
        system: System,
        step: Direction,
        *,
        restoring: bool,
    ) -> None:
        self.functions, self.e, self.restoring = functions, e, restoring
        self.slope = self._slope(d, system, step)
        self.misfit = misfit(functions, e.slack, d.constraints)
        self.merit = Merit(functions, e, restoring=restoring)(e.x, e.slack, Values(d.objective, d.constraints))
        rounding = torch.finfo(self.merit.dtype).eps
        self.noise = 10 * rounding * torch.maximum(self.merit.abs(), d.objective.abs())
        self.down = torch.isfinite(self.slope) & (self.slope <= self.noise)

    def __call__(
        self, x: Tensor, slack: Tensor, values: Values, length: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Flags of the points taken, and of those taken for the merit; ``rows`` are the elements they belong to."""
        e = self.e if rows is None else self.e.rows(rows)
        before, start, slope, noise, down = (
            v if rows is None else v[rows] for v in (self.misfit, self.merit, self.slope, self.noise, self.down)
        )
        merit = Merit(self.functions, e, restoring=self.restoring)(x, slack, values) - noise
        here = misfit(self.functions, slack, values.constraints)
        armijo = down & (merit <= start + ARMIJO * length * slope)
        favoured = down & (before <= 1e-4 * e.scale) & (length * (-slope).clamp(min=0) ** 2.3 > before**1.1)
        taken, for_merit = armijo, armijo
        if self.functions.constraints:
            better = (here <= (1 - GAMMA) * before) | (merit <= start - GAMMA * before)
            against = (here[:, None] <= e.filter[:, :, 0]) | (merit[:, None] <= e.filter[:, :, 1])
            taken = torch.where(favoured, armijo, better) & against.all(dim=1) & (here <= 1e4 * e.scale)
            for_merit = favoured & armijo
            if self.restoring:
                taken = torch.where(e.restoring, armijo, taken)
                for_merit = for_merit | e.restoring
        # A NaN or an infinity in values that nothing above compares.
        return taken & torch.isfinite(merit) & torch.isfinite(here), for_merit

    def _slope(self, d: Derivatives, system: System, step: Direction) -> Tensor:
        e, functions = self.e, self.functions
        slope = (d.gradient * step.x).sum(dim=1)
        if self.restoring:
            slope = torch.where(e.restoring, (system.slope * step.x).sum(dim=1), slope)
        if functions.inequalities:
            # The slacks of restoring elements stand still.
            slope = slope - e.barrier * (step.slack / e.slack).sum(dim=1)
        if functions.bounded:
            slope = slope - e.barrier * (step.x / system.below - step.x / system.above).sum(dim=1)
        return slope


def search(
    functions: BatchFunctions,
    data: list[Tensor],
    e: Elements,
    d: Derivatives,
    system: System,
    step: Direction,
    longest: Tensor,
    *,
    restoring: bool,
) -> Step:
    """The longest step where it is taken; elsewhere all shorter ones and a correction at once, and the first taken.

    The second-order correction takes off the violation that the full step has left: without it, steps along curved
    constraints are refused close to the solution (Maratos).
    """
    test = Test(functions, e, d, system, step, restoring=restoring)
    x = e.x + longest[:, None] * step.x
    slack = e.slack + longest[:, None] * step.slack
    values = functions.values(x, data)
    slack = _reset(functions, e, slack, values)
    accepted, for_merit = test(x, slack, values, longest)
    # Rounding decides about steps that do not change x.
    still = (step.x.abs() <= 10 * torch.finfo(x.dtype).eps * (1.0 + e.x.abs())).all(dim=1)
    accepted = accepted | (still & torch.isfinite(values.objective) & torch.isfinite(values.constraints).all(dim=1))
    length = torch.ones_like(longest)
    index = (~accepted & torch.isfinite(step.x).all(dim=1)).nonzero().squeeze(1)
    if len(index):
        some, k = e.rows(index), len(index)
        tries, slacks = _corrected(functions, data, e, system, index, x[index], slack[index], values)
        lengths = torch.tensor((*[1.0] * CORRECTIONS, *LENGTHS), dtype=x.dtype, device=x.device)
        reach = lengths * longest[index, None]
        count, shorter = len(lengths), reach[:, CORRECTIONS:, None]
        tries = torch.cat([tries, some.x[:, None] + shorter * step.x[index, None]], dim=1)
        slacks = torch.cat([slacks, some.slack[:, None] + shorter * step.slack[index, None]], dim=1)
        spread = index.repeat_interleave(count)
        many = e.rows(spread)
        flat_x, flat_slack = tries.reshape(k * count, -1), slacks.reshape(k * count, -1)
        inside = _inside(functions, many, flat_x, flat_slack)
        flat_x = torch.where(inside[:, None], flat_x, many.x)
        flat_slack = torch.where(inside[:, None], flat_slack, many.slack)
        found = functions.values(flat_x, functions.some(data, spread))
        flat_slack = _reset(functions, many, flat_slack, found)
        good, merit = test(flat_x, flat_slack, found, reach.reshape(-1), spread)
        good = (good & inside).reshape(k, count)
        choice = good.to(torch.uint8).argmax(dim=1)
        place = torch.arange(k, device=x.device)
        length[index] = lengths[choice]
        x[index] = flat_x.reshape(k, count, -1)[place, choice]
        slack[index] = flat_slack.reshape(k, count, -1)[place, choice]
        accepted[index] = good.any(dim=1)
        for_merit[index] = merit.reshape(k, count)[place, choice]
    entry = torch.stack([(1 - GAMMA) * test.misfit, test.merit - GAMMA * test.misfit], dim=1)
    return Step(x, slack, length, accepted, accepted & ~for_merit, entry)


def _corrected(
    functions: BatchFunctions,
    data: list[Tensor],
    e: Elements,
    system: System,
    index: Tensor,
    x: Tensor,
    slack: Tensor,
    values: Values,
) -> tuple[Tensor, Tensor]:
    """Second-order corrections of refused full steps, each starting from the one before: (r, CORRECTIONS, n or p)."""
    some, own = e.rows(index), functions.some(data, index)
    constraints = values.constraints[index]
    points, slacks = [], []
    for turn in range(CORRECTIONS):
        dx, ds = system.correction(index, constraints, slack)
        x, slack = x + dx, slack + ds
        points.append(x)
        slacks.append(slack)
        if turn + 1 < CORRECTIONS:
            inside = _inside(functions, some, x, slack)
            constraints = functions.values(torch.where(inside[:, None], x, some.x), own).constraints
    return torch.stack(points, dim=1), torch.stack(slacks, dim=1)


def enter(e: Elements, flag: Tensor, entry: Tensor) -> Elements:
    """The elements with one more pair, shape (k, 2), in the filter where the flag is set."""
    slot = torch.arange(FILTER, device=flag.device) == (e.place % FILTER)[:, None]
    write = slot & flag[:, None]
    return e._replace(
        filter=torch.where(write[:, :, None], entry[:, None, :], e.filter), place=e.place + flag.to(e.place.dtype)
    )


def _reset(functions: BatchFunctions, e: Elements, slack: Tensor, values: Values) -> Tensor:
    """Slacks no smaller than ``-c``: both the violation and the barrier fall."""
    if not functions.inequalities:
        return slack
    raised = torch.maximum(slack, -values.constraints[:, functions.equalities :])
    return torch.where(e.restoring[:, None] | ~torch.isfinite(raised), slack, raised)


def _inside(functions: BatchFunctions, e: Elements, x: Tensor, slack: Tensor) -> Tensor:
    """Whether a corrected point keeps a thousandth of every slack and of every distance to a bound."""
    inside = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if functions.inequalities:
        inside = (slack >= 1e-3 * e.slack).all(dim=1)
    if functions.bounded:
        for gap, old in zip(gaps(functions, x), gaps(functions, e.x), strict=True):
            inside = inside & (gap >= 1e-3 * old).all(dim=1)
    return inside
