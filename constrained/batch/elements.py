"""The iterates of a batch, one row per element, and how far each is from its solution."""

from typing import NamedTuple

import torch
from torch import Tensor

from constrained.batch.functions import BatchFunctions, Derivatives
from implicit import Status

OUTCOMES = (
    Status.RUNNING,
    Status.CONVERGED,
    Status.STEP_LIMIT,
    Status.TIME_LIMIT,
    Status.STOPPED,
    Status.STALLED,
    Status.NONFINITE,
    Status.INFEASIBLE,
    Status.UNBOUNDED,
)
FILTER = 5
"""Pairs that are kept; entries are made by a few steps of each barrier problem."""
CODE = {status: code for code, status in enumerate(OUTCOMES)}
"""Statuses as integers, so that a tensor can hold one per element."""


class Elements(NamedTuple):
    """Rows of iterates and of what the method remembers about each; k rows in all fields.

    Attributes:
        x: (k, n).
        slack: of ``c(x) + slack = 0``, positive, (k, p).
        equality, inequality, lower, upper: multipliers of h, c and the bounds: (k, m), (k, p), (k, n), (k, n).
        barrier: the weight of the logarithms.
        filter: pairs of misfit and merit that a trial point must improve on, (k, FILTER, 2); see ``search``.
        place: how many pairs have been entered; the oldest are overwritten.
        scale: the misfit at the start, at least one.
        shift: added to the Hessian after steps that failed.
        restoring: whether the element is leaving the objective aside to regain feasibility.
        entry: the violation when it began to.
        least: the least violation so far.
        since: steps since that last fell.
        failures: steps in a row that were refused or very short.
        code: the status, see ``OUTCOMES``.
        saddle: whether it ended at a stationary point that is no minimum.
        steps: completed steps.
        objective: f at the last evaluated x.
        first: f at the start.
        residual: stationarity, feasibility, complementarity at the last evaluated x, (k, 3).
    """

    x: Tensor
    slack: Tensor
    equality: Tensor
    inequality: Tensor
    lower: Tensor
    upper: Tensor
    barrier: Tensor
    filter: Tensor
    place: Tensor
    scale: Tensor
    shift: Tensor
    restoring: Tensor
    entry: Tensor
    least: Tensor
    since: Tensor
    failures: Tensor
    code: Tensor
    saddle: Tensor
    steps: Tensor
    objective: Tensor
    first: Tensor
    residual: Tensor

    @property
    def multipliers(self) -> Tensor:
        """Those of h and c side by side, (k, m + p)."""
        return torch.cat([self.equality, self.inequality], dim=1)

    def rows(self, index: Tensor | slice) -> "Elements":
        """Some elements."""
        return Elements(*(field[index] for field in self))

    def put(self, index: Tensor | slice, rows: "Elements") -> None:
        """Write some elements back."""
        for field, row in zip(self, rows, strict=True):
            field[index] = row

    def choose(self, flag: Tensor, other: "Elements") -> "Elements":
        """``other`` where the flag, shape (k,), is set."""
        return Elements(*(old if new is old else pick(flag, new, old) for new, old in zip(other, self, strict=True)))


def pick(flag: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Rows of ``new`` where the flag, shape (k,), is set, else of ``old``."""
    return torch.where(flag.reshape(-1, *[1] * (old.dim() - 1)), new, old)


def largest(*parts: Tensor) -> Tensor:
    """The largest entry in size of every row; zero for rows without entries, NaN where there is one."""
    sizes = [part.abs().amax(dim=1) for part in parts if part.shape[1]]
    if not sizes:
        return parts[0].new_zeros(len(parts[0]))
    found = sizes[0]
    for size in sizes[1:]:
        found = torch.maximum(found, size)
    return found


def violation(functions: BatchFunctions, x: Tensor, constraints: Tensor) -> Tensor:
    """The largest violation of ``h = 0``, ``c <= 0`` and the bounds, shape (k,)."""
    m = functions.equalities
    parts = [constraints[:, :m], constraints[:, m:].clamp(min=0)]
    if functions.bounded:
        parts += [(functions.lower - x).clamp(min=0), (x - functions.upper).clamp(min=0)]
    return largest(*parts)


def residual(functions: BatchFunctions, e: Elements, d: Derivatives) -> Tensor:
    """The three numbers of :class:`constrained.KKTResidual` for every element, shape (k, 3)."""
    c = d.constraints[:, functions.equalities :]
    duals, products = [e.inequality], [e.inequality * c]
    total = d.slope
    if functions.bounded:
        total = total - e.lower + e.upper
        for dual, gap in ((e.lower, functions.lower - e.x), (e.upper, e.x - functions.upper)):
            duals.append(dual)
            # No bound, no product: inf * 0 is not a number, and a multiplier without its bound is an error by itself.
            products.append(torch.where(torch.isinf(gap), dual, dual * gap))
    rows = torch.cat([e.equality, e.inequality], dim=1)
    if rows.shape[1]:
        rows = rows * d.jacobian.abs().amax(dim=2).clamp(max=1.0)
    scale = largest(d.gradient, rows, *duals[1:]).clamp(min=1.0)
    negative = [dual.clamp(max=0) for dual in duals]
    reach = largest(d.gradient).clamp(min=1.0)[:, None]
    own = [product / torch.maximum(dual.abs(), reach) for product, dual in zip(products, duals, strict=True)]
    lowest = largest(*negative) / scale
    parts = [largest(total) / scale, violation(functions, e.x, d.constraints), torch.maximum(largest(*own), lowest)]
    return torch.stack(parts, dim=1)


def least_squares(functions: BatchFunctions, d: Derivatives) -> Tensor:
    """Multipliers of h that make ``grad f + J_h^T l`` small, shape (k, m); zero where they would be enormous."""
    rows = d.jacobian[:, : functions.equalities]
    gram = rows @ rows.mT
    size = gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=torch.finfo(gram.dtype).tiny)
    ridge = torch.finfo(gram.dtype).eps ** 0.5 * size
    gram = gram + torch.diag_embed(ridge[:, None].expand(-1, functions.equalities))
    right = (rows @ d.gradient.unsqueeze(2)).squeeze(2)
    found = -torch.linalg.solve_ex(gram, right)[0]
    # A start far from any solution would otherwise begin with a Hessian that is all constraint.
    sound = torch.isfinite(found).all(dim=1) & (largest(found) <= 1e3)
    return pick(sound, found, torch.zeros_like(found))
