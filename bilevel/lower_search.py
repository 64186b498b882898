"""A search for points of the lower level that are better than a given one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import constrained
from bilevel.accuracy import solve_lower, twice_differentiable
from bilevel.flat import FlatProblem
from bilevel.lower_level import LowerSolution, pass_on_interrupt, solve_lower_level
from constrained.multipliers import FlatMultipliers
from implicit import Jacobian, SolveError, Status
from implicit.derivatives import value_and_gradient
from implicit.transforms import batched

SAMPLED = 8
"""Up to so many unknowns the lower objective is sampled before it is minimized."""
SAMPLES = 2_048
LOOPED = 256
"""Samples where the functions cannot be evaluated in batches."""
POLISHED = 32
"""The lowest basins among the samples that are minimized in."""
BATCHED = 64
"""Up to so many unknowns and rows together, all starts are minimized at once."""
NEWTON = 200
"""From so many unknowns on, a level without constraints is minimized by Newton-CG."""
BOXES = ((1.0, 512), (10.0, 512), (100.0, 1_024))
"""Half widths of the sampled boxes relative to the size of the point, where y has no bounds, and samples in each."""
STEPS = 300
"""Of each solver."""
BATCH_STEPS = 50
RESTORATIONS = 40
SAMPLE_RESTORATIONS = 3
ROUNDING = 64.0
"""Multiples of eps by which a row may be violated that counts as satisfied."""
NEARLY = 1e3
"""Multiples of that which still change no value noticeably."""
ENTRIES = 4_000_000
"""Entries of a Jacobian that is formed to restore feasibility."""


LeastSquares = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Search:
    """The best point that was found.

    Attributes:
        y: it, ``(m,)``; None if no feasible point was found.
        value: g(x, y).
        violation: of its rows, each divided by ``max(1, |gradient|)``: rounding, where that can be reached.
        own: where the solver went from the given point.
        tried: points that were compared.
        notes: sentences about how the search was limited.
    """

    y: Tensor | None
    value: float
    violation: float
    own: LowerSolution
    tried: int
    notes: tuple[str, ...] = ()


def search_lower_level(flat: FlatProblem, x: Tensor, y: Tensor, *, starts: int, generator: torch.Generator) -> Search:
    """Minimize g(x, .) from y and from elsewhere, and compare what is feasible to rounding.

    Up to :data:`SAMPLED` unknowns, :data:`SAMPLES` scrambled Sobol points in boxes around y (within its bounds) are
    moved to the constraints and evaluated, and minimization starts at the samples that are lowest among their
    neighbours (topographical search, Toern and Viitanen 1992). Beyond that it starts from ``starts`` random points, at
    a tenth of, once and ten times the size of y, and within the bounds; a convex quadratic program needs none.
    """
    search = _Searcher(flat, x, y, generator)
    own = search.minimize(y)
    candidates = [y, own.y]
    notes: list[str] = []
    if flat.m <= SAMPLED:
        sampled = search.sample()
        candidates += sampled.lowest
        begin, notes = [*sampled.lowest, *search.around(starts)], list(sampled.notes)
    else:
        begin = [] if own.convex and own.status is Status.CONVERGED else search.around(starts)
    ends = search.minimize_all(begin, starts)
    every = torch.stack([c for c in [*candidates, *ends] if bool(torch.isfinite(c).all())] or [y])
    restored, broken = search.restore(every, RESTORATIONS, _least)
    values = search.values(restored)
    values = torch.where(torch.isnan(values), torch.inf, values)
    accurate = broken <= 1.0
    if not bool(accurate.any()):
        # Rows that cannot be satisfied to rounding: the best that any start reached has to do.
        least = float(broken.amin())
        accurate = broken <= (10.0 if least <= NEARLY else 1.001) * least
        notes.append("no start satisfied the lower constraints to rounding")
    ranked = torch.where(accurate, values, torch.inf)
    best = int(ranked.argmin())
    found = bool(torch.isfinite(ranked[best])) or bool(ranked[best] == -torch.inf)
    violation = flat.violations(x, restored[best])["lower"]
    return Search(
        y=restored[best] if found else None,
        value=float(ranked[best]),
        violation=violation,
        own=own,
        tried=len(restored),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Sampled:
    lowest: list[Tensor]
    notes: tuple[str, ...]


class _Searcher:
    def __init__(self, flat: FlatProblem, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        self.flat, self.x, self.y, self.generator = flat, x, y, generator
        self.level = flat.lower_level
        self.rows = self.level.inequalities + self.level.equalities
        self.size = 1.0 + max(float(y.abs().amax()), float(x.abs().amax()) if len(x) else 0.0)
        self.vectorized = self._can_batch()
        self.smooth = not self.level.free or twice_differentiable(flat.oracle, flat.x_tree(x), flat.y_tree(y))

    def _can_batch(self) -> bool:
        both = torch.stack([self.y, self.y])
        try:
            batched(self._value, both)
            if self.rows:
                batched(self._constraints, both)
        except (RuntimeError, ValueError):
            return False
        return True

    def _value(self, y: Tensor) -> Tensor:
        return self.flat.lower(self.x, y)

    def _constraints(self, y: Tensor) -> Tensor:
        """Equalities, then inequalities."""
        return torch.cat([self.level.equality(self.x, y), self.level.inequality(self.x, y)])

    def _clip(self, y: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(y, self.level.lower), self.level.upper)

    def _each(self, fn: Callable[[Tensor], Tensor], ys: Tensor) -> Tensor:
        """``fn`` of every row."""
        if not self.vectorized:
            return torch.stack([fn(y) for y in ys])
        return torch.cat([batched(fn, part) for part in ys.split(256)])

    def values(self, ys: Tensor) -> Tensor:
        """g at every row, shape (k,)."""
        with torch.no_grad():
            return self._each(self._value, ys)

    def minimize(self, y: Tensor) -> LowerSolution:
        """From one start, by the solver that fits."""
        if not self.level.free:
            return solve_lower_level(self.flat, self.x, y, max_steps=STEPS)
        if self.smooth and len(y) < NEWTON:
            return solve_lower_level(self.flat, self.x, y, max_steps=STEPS)
        end = solve_lower(self._value, y, self.flat.problem, first_order=not self.smooth)
        value, slope = value_and_gradient(self._value, end, "lower")
        blank = y.new_zeros(0)
        zeros = torch.zeros_like(y)
        residual = float(slope.abs().amax() / slope.abs().amax().clamp(min=1.0))
        return LowerSolution(
            y=end,
            multipliers=FlatMultipliers(blank, blank, zeros, zeros),
            residual=constrained.KKTResidual(residual, 0.0, 0.0),
            status=Status.CONVERGED,
            value=float(value),
        )

    def minimize_all(self, begin: list[Tensor], limit: int) -> list[Tensor]:
        """From many starts: together where the level is small, otherwise one by one and at most ``limit``."""
        if not begin:
            return []
        if self.vectorized and self.flat.m + self.rows <= BATCHED:
            try:
                found = constrained.solve_batch(
                    self.flat.lower_problem(self.x), torch.stack(begin), max_steps=BATCH_STEPS
                )
            except (RuntimeError, ValueError, SolveError):
                pass  # Backward passes may not batch although values do; one by one, other errors come again.
            else:
                pass_on_interrupt(found.status)
                return list(found.x.detach())
        return [self.minimize(start).y for start in begin[:limit]]

    def around(self, count: int) -> list[Tensor]:
        """Random points: near y, and within the bounds where there are two."""
        low, high = self.level.lower, self.level.upper
        inside = torch.isfinite(low) & torch.isfinite(high)
        found = []
        for k in range(count):
            reach = (0.1, 1.0, 10.0)[k % 3] * (1.0 + self.y.abs())
            moved = self.y + reach * self._draw(torch.randn)
            uniform = low + (high - low) * self._draw(torch.rand)
            found.append(self._clip(torch.where(inside & (k % 2 == 0), uniform, moved)))
        return found

    def _draw(self, kind: Callable[..., Tensor]) -> Tensor:
        return kind(self.y.shape, generator=self.generator, dtype=torch.float64).to(self.y)

    def sample(self) -> _Sampled:
        """The samples that are lowest among their neighbours."""
        limit = SAMPLES if self.vectorized else LOOPED
        points, widths = self._points(limit)
        points, broken = self.restore(points, SAMPLE_RESTORATIONS, _damped)
        values = self.values(points)
        usable = (broken <= 1e6) & torch.isfinite(values)
        points, values, widths = points[usable], values[usable], widths[usable]
        notes = () if self.vectorized else (f"torch.func.vmap refuses the lower level: only {LOOPED} samples",)
        if not len(points):
            return _Sampled([], notes)
        return _Sampled(list(points[_basins(points / widths, values)]), notes)

    def _points(self, limit: int) -> tuple[Tensor, Tensor]:
        """Sobol points in boxes around y, and the widths of their boxes."""
        seed = int(torch.randint(2**31, (), generator=self.generator))
        low, high = self.level.lower, self.level.upper
        total = sum(count for _, count in BOXES)
        points, widths = [], []
        for k, (reach, count) in enumerate(BOXES):
            radius = reach * self.size
            center = self._clip(self.y)
            below, above = torch.maximum(low, center - radius), torch.minimum(high, center + radius)
            if k == len(BOXES) - 1:
                whole = torch.isfinite(low) & torch.isfinite(high)
                below, above = torch.where(whole, low, below), torch.where(whole, high, above)
            engine = torch.quasirandom.SobolEngine(self.flat.m, scramble=True, seed=seed + k)
            unit = engine.draw(count * limit // total, dtype=torch.float64).to(self.y)
            points.append(below + (above - below) * unit)
            widths.append((above - below).clamp(min=1e-300).expand_as(points[-1]))
        return torch.cat(points), torch.cat(widths)

    def restore(self, ys: Tensor, steps: int, least: LeastSquares) -> tuple[Tensor, Tensor]:
        """Gauss-Newton steps of minimum norm onto the violated rows, within the bounds, for every row of ``ys``.

        Returns the points, and their largest violations in units of what rounding explains.
        """
        ys = self._clip(ys)
        if not self.rows or self.rows * self.flat.m > ENTRIES:
            broken = torch.zeros_like(ys[:, 0])
            if self.rows:
                broken = torch.stack([self._broken(self._each(self._constraints, ys), None, ys)]).amax(dim=0)
            return ys, broken
        eps = float(torch.finfo(ys.dtype).eps)
        moving = torch.ones(len(ys), dtype=torch.bool, device=ys.device)
        for _ in range(steps):
            index = moving.nonzero().reshape(-1)
            if not len(index):
                break
            part = ys[index]
            values, slopes = self._linearized(part)
            step = self._step(part, values, slopes, least)
            moved = self._clip(part + step)
            good = torch.isfinite(moved).all(dim=1)
            moved = torch.where(good[:, None], moved, part)
            far = (moved - part).abs().amax(dim=1) > 16 * eps * (self.size + part.abs().amax(dim=1))
            ys = ys.index_copy(0, index, moved)
            moving = moving.index_copy(0, index, far & good)
        values, slopes = self._linearized(ys)
        return ys, self._broken(values, slopes, ys)

    def _linearized(self, ys: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(k, r)`` and Jacobians ``(k, r, m)`` of the rows."""
        if not self.vectorized:
            found = [Jacobian(lambda y: self._constraints(y) + 0.0 * y.sum(), y) for y in ys]
            return torch.stack([j.value for j in found]), torch.stack([j.to_dense() for j in found])
        parts = [batched(_with_jacobian(self._constraints), part) for part in ys.split(SAMPLES)]
        return torch.cat([values for _, values in parts]).detach(), torch.cat([rows for rows, _ in parts]).detach()

    def _step(self, ys: Tensor, values: Tensor, slopes: Tensor, least: LeastSquares) -> Tensor:
        sizes = torch.linalg.vector_norm(slopes, dim=2)
        wrong = self._violations(values)
        usable = (wrong != 0) & (sizes > 0) & torch.isfinite(sizes) & torch.isfinite(wrong)
        scale = torch.where(usable, 1.0 / sizes.clamp(min=torch.finfo(ys.dtype).tiny), 0.0)
        target = torch.where(usable, wrong, 0.0) * scale
        rows = torch.where(usable[..., None], slopes, 0.0) * scale[..., None]
        step = -least(rows, target)
        # What a bound stops must not carry the step: once more without those entries.
        stopped = ((ys <= self.level.lower) & (step < 0)) | ((ys >= self.level.upper) & (step > 0))
        if bool(stopped.any()):
            step = -least(torch.where(stopped[:, None, :], 0.0, rows), target)
        return step

    def _violations(self, values: Tensor) -> Tensor:
        q = self.level.equalities
        return torch.cat([values[..., :q], values[..., q:].clamp(min=0)], dim=-1)

    def _broken(self, values: Tensor, slopes: Tensor | None, ys: Tensor) -> Tensor:
        """The largest violation of any row in units of its rounding error, shape (k,)."""
        eps = float(torch.finfo(ys.dtype).eps)
        reach = self.size + ys.abs().amax(dim=1, keepdim=True)
        slope = 1.0 if slopes is None else torch.linalg.vector_norm(slopes, dim=2)
        rounding = ROUNDING * eps * (1.0 + slope) * reach
        found = (self._violations(values).abs() / rounding).amax(dim=1)
        return torch.where(torch.isnan(found), torch.inf, found)


def _least(rows: Tensor, target: Tensor) -> Tensor:
    """Of minimum norm, exactly."""
    return (torch.linalg.pinv(rows, rtol=1e-10) @ target[..., None])[..., 0]


def _damped(rows: Tensor, target: Tensor) -> Tensor:
    """Nearly so, and much faster for many small systems."""
    turned = rows.transpose(1, 2)
    shift = 1e-4 * torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device)
    return torch.linalg.solve(turned @ rows + shift, turned @ target[..., None])[..., 0]


def _with_jacobian(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def twice(y: Tensor) -> tuple[Tensor, Tensor]:
        value = fn(y)
        return value, value

    return torch.func.jacrev(twice, has_aux=True)


def _basins(points: Tensor, values: Tensor) -> Tensor:
    """Indices of the points with no lower one among their ``2 m + 2`` nearest, the lowest :data:`POLISHED` of them."""
    order = values.argsort()
    near = min(2 * points.shape[1] + 2, len(points) - 1)
    lowest = []
    for index in order.split(512):
        distances = torch.cdist(points[index], points)
        neighbours = distances.topk(near + 1, largest=False).indices
        lowest.append(index[values[index] <= values[neighbours].amin(dim=1)])
    return torch.cat(lowest)[:POLISHED]
