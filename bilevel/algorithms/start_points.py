"""Random starting points inside what bounds and affine constraints leave of x and y."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bilevel.flat import FlatProblem, Rows
from bilevel.probes import beside, same
from implicit import Jacobian

PROGRAMS = 100
"""Linear programs that are solved for the box."""
REACHES = (1.0, 10.0, 3.0)
"""How far from the given start the others are, relative to its size, where there is no box."""
WIDE = 10.0
"""A box with sides beyond this, relative to the size of the start, is looked at near the start as well."""
ROUND = 1e-12
LARGE = 1e6
"""A side beyond this is as good as none."""


@dataclass(frozen=True, kw_only=True)
class StartBox:
    """A box that holds every feasible pair ``(x, y)``, infinite where none is known.

    Attributes:
        center: the given start, shape (n + m,).
        low, high: shape (n + m,).
    """

    center: Tensor
    low: Tensor
    high: Tensor

    def draw(self, index: int, seed: int) -> Tensor:
        """The start with this number, from one, of the sequence with this seed, shape (n + m,).

        A scrambled Sobol sequence fills the box more evenly than independent draws do. Entries with two bounds are
        uniform between them, others normal around the given start; every other start is normal in all entries, but for
        those of a box that is smaller than the start's surroundings.
        """
        like = self.center
        engine = torch.quasirandom.SobolEngine(len(like), scramble=True, seed=seed)
        unit = engine.fast_forward(index - 1).draw(1, dtype=torch.float64)[0].to(like)
        reach = REACHES[(index - 1) % len(REACHES)] * (1.0 + like.abs())
        near = like + reach * torch.special.ndtri(unit.clamp(ROUND, 1.0 - ROUND))
        inside = torch.isfinite(self.low) & torch.isfinite(self.high)
        if index % 2 == 0:
            inside &= self.high - self.low <= 2.0 * WIDE * (1.0 + like.abs())
        anywhere = torch.where(inside, self.low + unit * (self.high - self.low), near)
        return torch.minimum(torch.maximum(anywhere, self.low), self.high)


def start_box(flat: FlatProblem, center: Tensor) -> StartBox:
    """From the bounds of both levels, made smaller by linear programs over the rows that are affine in (x, y)."""
    low = torch.cat([flat.upper_level.lower, flat.lower_level.lower])
    high = torch.cat([flat.upper_level.upper, flat.lower_level.upper])
    if 2 * len(center) <= PROGRAMS:
        low, high = _tightened(flat, center, low, high)
    return StartBox(center=center, low=low, high=high)


def _tightened(flat: FlatProblem, center: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    from scipy.optimize import linprog

    matrices = {"ub": [np.zeros((0, len(center)))], "eq": [np.zeros((0, len(center)))]}
    sides = {"ub": [np.zeros(0)], "eq": [np.zeros(0)]}
    for level in (flat.upper_level, flat.lower_level):
        for kind, rows, count in (
            ("ub", level.inequality, level.inequalities),
            ("eq", level.equality, level.equalities),
        ):
            if count:
                matrix, side = _affine(rows, flat.n, center)
                matrices[kind].append(matrix.cpu().double().numpy())
                sides[kind].append(side.cpu().double().numpy())
    A, b, E, e = (np.concatenate(part[kind]) for kind in ("ub", "eq") for part in (matrices, sides))
    if not len(A) and not len(E):
        return low, high
    bounds = np.stack([low.cpu().double().numpy(), high.cpu().double().numpy()], axis=1)
    ends = bounds.copy()
    for i in range(len(center)):
        for side, sign in enumerate((1.0, -1.0)):
            cost = np.zeros(len(center))
            cost[i] = sign
            found = linprog(cost, A, b, E, e, bounds=bounds)
            if found.status == 0 and abs(found.fun) <= LARGE:
                ends[i, side] = sign * found.fun
    ends[:, 1] = np.maximum(ends[:, 0], ends[:, 1])
    box = torch.as_tensor(ends, dtype=low.dtype, device=low.device)
    return box[:, 0], box[:, 1]


def _affine(rows: Rows, n: int, center: Tensor) -> tuple[Tensor, Tensor]:
    """``(A, b)`` of those rows ``A z - b`` whose gradients are the same at several points."""
    generator = torch.Generator().manual_seed(0)
    first, keep = None, torch.zeros(0)
    for reach in (0.0, 1.0, 30.0):
        at = beside(center, generator, reach)
        found = Jacobian(lambda z: rows(z[:n], z[n:]) + 0.0 * z.sum(), at)
        matrix = found.to_dense()
        if first is None:
            first, keep = (matrix, matrix @ center - found.value), torch.isfinite(matrix).all(dim=1)
        else:
            size = first[0].abs().amax(dim=1, keepdim=True)
            keep &= same(matrix, first[0], size).all(dim=1)
    assert first is not None
    keep &= torch.isfinite(first[1])
    return first[0][keep], first[1][keep]
