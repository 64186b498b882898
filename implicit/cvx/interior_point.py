"""Solving batches of conic programs to rounding.

Clarabel (an interior-point method) gives a solution and its multipliers to 1e-10 or better; Newton steps on the
optimality conditions then bring them to rounding, which costs little and frees the user from choosing a tolerance.

Reference:
    P. Goulart, Y. Chen, "Clarabel: An interior-point solver for conic programs with quadratic objectives",
        arXiv 2405.12762, 2024.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit.cvx import cones, exponential, semidefinite
from implicit.cvx.factorization import listed, name
from implicit.cvx.pattern import Pattern
from implicit.cvx.program import Data, Program, Scales
from implicit.status import ConvergenceWarning, SolveError

TOLERANCES = (1e-14, 1e-10)
"""Asked of Clarabel: first as much as it can give, and where that breaks down (which is measured) what is usual."""
BOOSTS = (1.0, 1e5, 1e-5)
"""Further weights of multipliers against slacks: where both are small, they decide which constraints look active."""
ROUNDING = 1e-12
"""Relative residual above which the next weight or tolerance is tried."""
ACCEPTED = 1e-6
"""Largest relative residual of the optimality conditions that counts as a solution."""
EXPECTED = 1e-9
"""Largest relative residual without a warning."""
POLISHED = 1e-15
"""Relative residual at which polishing stops."""
MAX_POLISH = 20
"""Newton steps at most; two or three are usual."""
KINK = 1e-11
"""Distance to a kink, relative to the size of the slacks, below which the two sides are averaged."""

INFEASIBLE = {
    "PrimalInfeasible": "infeasible: no point satisfies the constraints",
    "AlmostPrimalInfeasible": "infeasible: no point satisfies the constraints",
    "DualInfeasible": "unbounded: the objective falls without limit, or the constraints leave a direction free",
    "AlmostDualInfeasible": "unbounded: the objective falls without limit, or the constraints leave a direction free",
}


def solve(program: Program, theta: Tensor) -> tuple[Tensor, Scales]:
    """Solutions and multipliers for the rows of theta.

    Returns:
        The points (x, z, u), ``(batch, n + 2 m)``, and the scales to which they belong.

    Raises:
        ValueError: if a parameter is outside its declared bounds.
        SolveError: if an element is infeasible, unbounded, not finite, or could not be solved.

    Warns:
        ConvergenceWarning: if the optimality conditions hold to between 1e-9 and 1e-6 only.
    """
    for limits in program.limits:
        limits.check(theta)
    names = [name(i, len(theta)) for i in range(len(theta))]
    found = _attempt(program, theta, names, TOLERANCES[0])
    for tolerance in TOLERANCES[1:]:
        found.improve(lambda i, tolerance=tolerance: _attempt(program, theta[i], [names[k] for k in i], tolerance))
    _judge(found, names)
    tolerance = found.sizes * (10 * found.error[:, None]).clamp(min=KINK)
    return found.point, Scales(found.objective, found.rows, tolerance)


@dataclass
class _Found:
    """Points with their residuals relative to ``sizes``, and the weights of the objective and of the rows."""

    point: Tensor
    objective: Tensor
    rows: Tensor
    sizes: Tensor
    error: Tensor
    outcomes: list[str]

    def improve(self, again: Callable[[list[int]], "_Found"]) -> None:
        """Try the elements that miss rounding again, and keep what became better."""
        index = (~(self.error <= ROUNDING)).nonzero().flatten()
        if not len(index):
            return
        other = again(index.tolist())
        better = ~(self.error[index] <= other.error)
        for field in ("point", "objective", "rows", "sizes", "error"):
            getattr(self, field)[index[better]] = getattr(other, field)[better]
        for i in better.nonzero().flatten().tolist():
            self.outcomes[int(index[i])] = other.outcomes[i]


def _attempt(program: Program, theta: Tensor, names: list[str], tolerance: float) -> _Found:
    scales = _equilibrated(program, theta, names)
    data = program.data(theta, scales)
    starts, outcomes = zip(*(_interior_point(program, data, i, n, tolerance) for i, n in enumerate(names)), strict=True)
    start = torch.as_tensor(np.stack(starts))

    def polished(index: list[int], boost: float) -> _Found:
        here = Scales(scales.objective[index], scales.rows[index], scales.tolerance[index])
        chosen = [names[i] for i in index], [outcomes[i] for i in index]
        return _weighted(program, theta[index], here, start[index], boost, *chosen)

    found = polished(list(range(len(names))), BOOSTS[0])
    for boost in BOOSTS[1:]:
        found.improve(lambda index, boost=boost: polished(index, boost))
    return found


def _weighted(
    program: Program,
    theta: Tensor,
    scales: Scales,
    start: Tensor,
    boost: float,
    names: list[str],
    outcomes: list[str],
) -> _Found:
    """Weigh the objective so that multipliers become comparable to slacks, and polish."""
    data = program.data(theta, scales)
    x, z, s = start.split([program.n, program.m, program.m], dim=1)
    sizes = _sizes(program, data, x, z)
    weight = boost * sizes.slack[:, None] / sizes.multiplier[:, None]
    rows = program.by_cones(sizes.slack[:, None].maximum(data.b.abs()), lambda _, v: v.amax(-1))
    scales = Scales(scales.objective * weight, scales.rows, torch.zeros_like(rows))
    point = torch.cat([x, z * weight, s - z * weight], 1)
    largest = torch.cat([(sizes.gradient[:, None] * weight).expand(-1, program.n), rows, max(boost, 1.0) * rows], 1)
    point, error = _polish(program, program.data(theta, scales), point, largest, names)
    return _Found(point, scales.objective, scales.rows, rows, error, outcomes)


def _judge(found: _Found, names: list[str]) -> None:
    error = found.error
    for reached, outcome, called in zip(error.tolist(), found.outcomes, names, strict=True):
        if not reached <= ACCEPTED:
            raise SolveError(
                f"{called} could not be solved: Clarabel stopped with {outcome!r}, the optimality conditions hold to "
                f"{reached:.1e} only; scale the data, or check that a solution is attained"
            )
    doubtful = (error > EXPECTED).nonzero().flatten().tolist()
    if doubtful:
        warnings.warn(
            f"{listed(doubtful, len(names))}: the optimality conditions hold to {float(error.max()):.1e} only; the "
            "solution, and its derivative more so, are less accurate than usual",
            ConvergenceWarning,
            stacklevel=2,
        )


def _equilibrated(program: Program, theta: Tensor, names: list[str]) -> Scales:
    """Weights that bring the largest coefficient of every row (of every cone) to 1."""
    batch = len(theta)
    ones = Scales(*(theta.new_ones(batch, k) for k in (1, program.m, program.m)))
    data = program.data(theta, ones)
    for values in (data.P, data.q, data.A, data.b):
        finite = torch.isfinite(values).all(1)
        if not bool(finite.all()):
            called = names[int((~finite).nonzero()[0])]
            raise SolveError(f"{called}: the parameters make the problem's data infinite or NaN")
    index = program.A.rows.expand(batch, -1)
    largest = theta.new_zeros(batch, program.m).scatter_reduce(1, index, data.A.abs(), "amax")
    rows = program.by_cones(largest, lambda _, v: v.amax(-1))
    return Scales(ones.objective, 1 / _positive(rows), ones.tolerance)


def _positive(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, 1.0)


def _interior_point(program: Program, data: Data, index: int, called: str, tolerance: float) -> tuple[np.ndarray, str]:
    """(x, z, s) and the solver's status."""
    import scipy.sparse

    clarabel: Any = importlib.import_module("clarabel")  # has no type information
    P, q, A, b = (values[index].numpy() for values in (data.P, data.q, data.A, data.b))
    # The solver's own tolerances are absolute below 1: it gets a typical length and the objective brought to 1.
    length = float(np.median(np.abs(b[b != 0]))) if b.any() else 1.0
    size = max(np.abs(values).max(initial=0.0) for values in (length * P, q)) or 1.0
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_threads = 1
    settings.tol_feas = settings.tol_gap_abs = settings.tol_gap_rel = tolerance
    kinds = {
        cones.Zero: lambda c: [clarabel.ZeroConeT(c.count)],
        cones.Nonnegative: lambda c: [clarabel.NonnegativeConeT(c.count)],
        cones.SecondOrder: lambda c: [clarabel.SecondOrderConeT(c.size)] * c.count,
        semidefinite.Semidefinite: lambda c: [clarabel.PSDTriangleConeT(c.order)] * c.count,
        exponential.Exponential: lambda c: [clarabel.ExponentialConeT()] * c.count,
    }
    families = [cone for c in program.families for cone in kinds[type(c)](c)]
    upper = scipy.sparse.triu(_csc(program.P, length / size * P), format="csc")
    found = clarabel.DefaultSolver(upper, q / size, _csc(program.A, A), b / length, families, settings).solve()
    status = str(found.status)
    if status in INFEASIBLE:
        raise SolveError(f"{called} is {INFEASIBLE[status]}")
    x, z, s = (np.asarray(part) for part in (found.x, found.z, found.s))
    return np.concatenate([length * x, size * z, length * s]), status


def _csc(pattern: Pattern, values: np.ndarray) -> Any:
    import scipy.sparse

    place = (pattern.rows.numpy(), pattern.columns.numpy())
    return scipy.sparse.csc_matrix((values, place), shape=pattern.shape)


@dataclass(frozen=True)
class _Sizes:
    """Typical magnitudes, ``(batch,)``, positive also where the quantities themselves vanish at the solution."""

    gradient: Tensor
    multiplier: Tensor
    slack: Tensor


def _sizes(program: Program, data: Data, x: Tensor, z: Tensor) -> _Sizes:
    curvature = _largest(data.P)
    # Lengths that the data know of: right-hand sides, and the distance over which the gradient changes by q.
    given = torch.where(data.b == 0, torch.inf, data.b.abs())
    nearest = given.amin(1) if program.m else torch.full_like(curvature, torch.inf)
    travel = torch.where(curvature > 0, _largest(data.q) / _positive(curvature), 0.0)
    length = torch.where(nearest.isinf(), 0.0, nearest).maximum(travel)
    slack = _largest(x).maximum(_positive(length))
    gradient = _largest(data.q, program.P.product(data.P, x), z).maximum(1e-3 * curvature * slack)
    gradient = _positive(gradient)
    return _Sizes(gradient, _largest(z).maximum(1e-3 * gradient), slack)


def _largest(*values: Tensor) -> Tensor:
    """The largest magnitude of each row, 0 without entries."""
    rows = torch.cat(values, 1).abs()
    return rows.amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def _polish(program: Program, data: Data, point: Tensor, sizes: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
    """Semismooth Newton steps as long as they pay; the points and their residuals relative to ``sizes``."""
    residual = program.residual(data, point)
    error = (residual.abs() / sizes).amax(1)
    pending = error > POLISHED
    no_kinks = torch.zeros_like(data.b)
    for _ in range(MAX_POLISH):
        if not bool(pending.any()):
            break
        values = program.jacobian(data, point, no_kinks)
        step = torch.zeros_like(point)
        for i in pending.nonzero().flatten().tolist():
            try:
                factors = program.factorizations.get(values[i], i, names[i])
            except SolveError:  # the interior point's own accuracy has to do, and is judged by the caller
                continue
            step[i] = torch.as_tensor(factors.solve(residual[i, :, None].numpy(), transposed=False)[:, 0])
        trial = point - step
        trial_residual = program.residual(data, trial)
        trial_error = (trial_residual.abs() / sizes).amax(1)
        better = pending & (trial_error < error)
        pending = better & (trial_error < error / 2) & (trial_error > POLISHED)
        point = torch.where(better[:, None], trial, point)
        residual = torch.where(better[:, None], trial_residual, residual)
        error = torch.where(better, trial_error, error)
    return point, error
