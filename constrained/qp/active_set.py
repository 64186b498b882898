"""Active sets: a dual method for strictly convex programs, and the polishing of any solution to rounding.

Both guess which inequalities hold with equality, solve the equations, and correct the guess: a multiplier below zero
leaves, a violated row enters. That is a semismooth Newton method, which from the right set needs one factorization.

References:
    M. Hintermueller, K. Ito, K. Kunisch, "The primal-dual active set strategy as a semismooth Newton method", SIAM J.
        Optim. 13(3), 2002.
    B. Stellato et al., "OSQP: an operator splitting solver for quadratic programs", Math. Program. Comput. 12, 2020,
        section 4 (polishing).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from constrained.qp.program import Program, largest, product


@dataclass(frozen=True)
class Dual:
    """What the dual method keeps of the matrices: ``Q = L L'`` and ``S = C Q^-1 C'``."""

    gram: Tensor  # (1 or batch, rows, rows)
    factor: Tensor | None = None  # (1 or batch, n, n); None where Q is the identity

    @classmethod
    def of(cls, C: Tensor, factor: Tensor | None = None) -> "Dual":
        half = C.mT if factor is None else torch.linalg.solve_triangular(factor, C.mT, upper=False)
        return cls(half.mT @ half, factor)

    def invert(self, right: Tensor) -> Tensor:
        """``Q^-1 right``."""
        if self.factor is None:
            return right
        if len(self.factor) == 1:
            return torch.cholesky_solve(right.mT, self.factor[0]).mT
        return torch.cholesky_solve(right[..., None], self.factor)[..., 0]


@dataclass(frozen=True)
class Point:
    """A primal-dual point with the rows taken as active and its error as in :meth:`Program.error`."""

    x: Tensor  # (batch, n)
    multiplier: Tensor  # (batch, rows)
    active: Tensor  # (batch, rows), bool
    error: Tensor  # (batch,)

    def take(self, index: Tensor) -> "Point":
        return Point(self.x[index], self.multiplier[index], self.active[index], self.error[index])

    def put(self, index: Tensor, other: "Point") -> "Point":
        parts = zip(
            (self.x, self.multiplier, self.active, self.error),
            (other.x, other.multiplier, other.active, other.error),
            strict=True,
        )
        return Point(*[mine.index_copy(0, index, theirs) for mine, theirs in parts])


def gather(active: Tensor) -> tuple[Tensor, Tensor]:
    """Indices ``(batch, k)`` of active rows, filled up with others, and which are active; k is the largest count."""
    count = active.sum(1)
    width = int(count.max()) if len(count) else 0
    index = active.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return index, torch.arange(width, device=active.device) < count[:, None]


def accuracy(dtype: torch.dtype) -> float:
    """An error that counts as rounding: 7e-13 in float64."""
    return float(torch.finfo(dtype).eps ** 0.777)


def dual_active_set(program: Program, dual: Dual, active: Tensor, max_steps: int) -> Point:
    """Semismooth Newton steps on the dual of a strictly convex program, from a first guess of the active rows.

    Elements whose error stays above :func:`accuracy` were not solved: their sets cycle, or their rows are dependent.
    """
    free, centre = program.free, dual.invert(-program.q)
    found = (active | free) & program.present
    index = torch.arange(program.batch, device=program.q.device)
    gram, height, present, now = dual.gram, program.gap(centre), program.present, found.clone()
    for _ in range(max_steps):
        multiplier = _dual_solve(gram, height, now, 1)
        gap = torch.where(present, height - product(gram, multiplier), 0.0)
        tolerance = accuracy(gap.dtype) * (1 + largest(height))[:, None]
        changed = (free | torch.where(now, multiplier > 0, gap > tolerance)) & present
        keep = (changed != now).any(1).nonzero()[:, 0]  # the one host read of a step
        found[index] = now
        if not len(keep):
            break
        gram = gram if len(gram) == 1 < len(index) else gram[keep]
        height, present, now, index = height[keep], present[keep], changed[keep], index[keep]
    multiplier = _dual_solve(dual.gram, program.gap(centre), found, 3)
    x = centre - dual.invert(program.pull(multiplier))
    return Point(x, multiplier, found, program.error(x, multiplier))


def _dual_solve(gram: Tensor, height: Tensor, active: Tensor, rounds: int) -> Tensor:
    """``S_WW multiplier_W = height_W``, zero elsewhere; dependent rows share, by a shift that refinement removes."""
    index, valid = gather(active)
    if not index.shape[1]:
        return torch.zeros_like(height)
    block = torch.where(valid[:, :, None] & valid[:, None, :], submatrix(gram, index), 0.0)
    size = block.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
    shift = torch.where(valid, torch.finfo(gram.dtype).eps ** 0.8 * size, 1.0)
    block.diagonal(dim1=1, dim2=2).add_(shift)
    factor, _ = torch.linalg.cholesky_ex(block)
    right = torch.where(valid, height.gather(1, index), 0.0)
    found = torch.cholesky_solve(right[..., None], factor)[..., 0]
    for _ in range(rounds - 1):
        residual = right - product(block, found) + shift * found
        found = found + torch.cholesky_solve(residual[..., None], factor)[..., 0]
    return torch.zeros_like(height).scatter(1, index, torch.where(valid, found, 0.0))


def submatrix(matrix: Tensor, index: Tensor) -> Tensor:
    """``matrix[index, index]`` for each element, ``(batch, k, k)``."""
    if len(matrix) == 1:
        return matrix[0][index[:, :, None], index[:, None, :]]
    each = torch.arange(len(matrix), device=index.device)[:, None, None]
    return matrix[each, index[:, :, None], index[:, None, :]]


def select(matrix: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """The chosen rows of C, ``(batch, k, n)``, zero where not valid."""
    if len(matrix) == 1:
        rows = matrix[0][index]
    else:
        rows = matrix.gather(1, index[..., None].expand(-1, -1, matrix.shape[2]))
    return torch.where(valid[..., None], rows, 0.0)


def kkt_matrix(Q: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
    """``[[Q, W'], [W, 0]]``, with -1 on the diagonal where a row is only filled in."""
    batch = len(rows)
    top = torch.cat([Q.expand(batch, -1, -1), rows.mT], 2)
    return torch.cat([top, torch.cat([rows, -torch.diag_embed((~valid).to(rows.dtype))], 2)], 1)


def polish(program: Program, point: Point, max_steps: int = 10) -> Point:
    """Newton corrections on the active rows, which change where signs are wrong; the best point of each element.

    Singular systems, of dependent rows or of a solution that is not unique, are corrected by the shortest step.
    """
    result, index = point, torch.arange(program.batch, device=program.q.device)
    running = torch.ones_like(index, dtype=torch.bool)
    goal = 8 * torch.finfo(program.q.dtype).eps
    for _ in range(max_steps):
        here = _correct(program, point)
        now = result.take(index)
        better = here.error < now.error
        result = result.put(index, choose(better, here, now))
        gap, scale = program.gap(here.x), accuracy(here.x.dtype)
        keep = torch.where(
            here.active,
            here.multiplier >= -scale * (1 + largest(here.multiplier))[:, None],
            gap > scale * (1 + largest(here.x))[:, None],
        )
        changed = (keep | program.free) & program.present
        same = (changed == here.active).all(1)
        running = (here.error > goal) & here.error.isfinite() & (~same | (here.error < 0.5 * now.error))
        kept = running.nonzero()[:, 0]
        if not len(kept):
            break
        point = replace(here, active=changed).take(kept)
        program, index = program.take(kept), index[kept]
    return result


def _correct(program: Program, point: Point) -> Point:
    index, valid = gather(point.active)
    rows = select(program.C, index, valid)
    matrix = kkt_matrix(program.Q, rows, valid)
    multiplier = torch.where(point.active, point.multiplier, 0.0)
    slope = program.slope(point.x, multiplier)
    gap = torch.where(valid, program.gap(point.x).gather(1, index), 0.0)
    step = solve_symmetric(matrix, -torch.cat([slope, gap], 1))
    x = point.x + step[:, : program.n]
    multiplier = multiplier.scatter_add(1, index, torch.where(valid, step[:, program.n :], 0.0))
    return Point(x, multiplier, point.active, program.error(x, multiplier))


def solve_symmetric(matrix: Tensor, right: Tensor) -> Tensor:
    """LU, and the least-squares solution of smallest norm for the elements that are singular."""
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    found = torch.linalg.lu_solve(factors, pivots, right[..., None])[..., 0]
    index = suspects(factors)
    if len(index):
        values, vectors, kept = _spectrum(matrix[index])
        inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
        short = vectors @ (inverse[..., None] * (vectors.mT @ right[index][..., None]))
        found = found.index_copy(0, index, short[..., 0])
    return found


def suspects(factors: Tensor) -> Tensor:
    """Elements with a pivot so small that their rank has to be looked at."""
    if not factors.shape[1]:
        return torch.arange(0, device=factors.device)
    pivots = factors.diagonal(dim1=1, dim2=2).abs()
    small = ~(pivots.amin(1) > torch.finfo(factors.dtype).eps ** 0.6 * pivots.amax(1))
    return small.nonzero()[:, 0]


def _spectrum(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    cutoff = torch.finfo(matrix.dtype).eps ** 0.75 * values.abs().amax(1, keepdim=True)
    return values, vectors, values.abs() > cutoff


def kernel(matrix: Tensor) -> Tensor:
    """Orthonormal bases of the null spaces, ``(batch, size, c)``, with zero columns where one is smaller."""
    batch, size = matrix.shape[:2]
    index = suspects(torch.linalg.lu_factor_ex(matrix)[0])
    if not len(index):
        return matrix.new_zeros(batch, size, 0)
    _, vectors, kept = _spectrum(matrix[index])
    width = int((~kept).sum(1).max())
    order = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    chosen = vectors.gather(2, order[:, None].expand(-1, size, -1)) * ~kept.gather(1, order)[:, None]
    return matrix.new_zeros(batch, size, width).index_copy(0, index, chosen)


def choose(flag: Tensor, new: Point, old: Point) -> Point:
    """``new`` where ``flag``, else ``old``."""
    wide = flag[:, None]
    return Point(
        torch.where(wide, new.x, old.x),
        torch.where(wide, new.multiplier, old.multiplier),
        torch.where(wide, new.active, old.active),
        torch.where(flag, new.error, old.error),
    )
