"""The Newton systems of a batch: condensed, convexified where needed, factored by one call."""

from typing import NamedTuple

import torch
from torch import Tensor

from constrained.batch.elements import Elements, largest
from constrained.batch.functions import BatchFunctions, Derivatives, apply, combine


class Direction(NamedTuple):
    """A step of every element: of x, the slacks, and the multipliers."""

    x: Tensor
    slack: Tensor
    equality: Tensor
    inequality: Tensor
    lower: Tensor
    upper: Tensor


class System:
    """``[[W + D + J_c^T S J_c + shift, J_h^T], [J_h, -r]]`` of every element, factored.

    W is the Hessian of the Lagrangian, D = z / (distance to the bound), S = v / slack: slacks and bound multipliers are
    eliminated. The shift is zero where ``W + D + J_c^T S J_c`` is positive definite on the null space of J_h, which
    one Cholesky factorisation of that matrix plus a large multiple of ``J_h^T J_h`` tells. Elsewhere the smallest
    eigenvalue gives it. r is tiny, and makes up for dependent rows of J_h.

    Elements that are restoring feasibility have ``1/2 ||h||^2 + 1/2 ||max(c, 0)||^2`` in place of the objective, and no
    constraints but the bounds.

    Args:
        functions: for sizes and bounds.
        e: the iterates.
        d: derivatives there.
        room: their distances to the bounds.
        restoring: whether any element is.
    """

    def __init__(
        self, functions: BatchFunctions, e: Elements, d: Derivatives, room: tuple[Tensor, Tensor], *, restoring: bool
    ) -> None:
        assert d.hessian is not None
        self.functions, self.e = functions, e
        m, eps = functions.equalities, torch.finfo(e.x.dtype).eps
        self.h, self.c = d.constraints[:, :m], d.constraints[:, m:]
        self.rows, self.sides = d.jacobian[:, :m], d.jacobian[:, m:]
        self.slope, hessian = d.slope, d.hessian
        if restoring:
            hessian = self._leave_objective(e, d)
        self.below, self.above = room
        n, k = functions.n, len(e.x)
        self.keep = (~e.restoring).to(e.x.dtype)[:, None]
        self.ratio = self.keep * e.inequality / e.slack
        size = largest(hessian.flatten(1))
        reach = largest(d.gradient) / largest(e.x).clamp(min=1.0)
        self.size = torch.maximum(size, 1e-2 * reach).clamp(min=torch.finfo(e.x.dtype).tiny ** 0.5)
        # One block of memory: blocks of small matrices are large, and fresh memory is slower than arithmetic.
        matrix = e.x.new_zeros(k, n + m, n + m)
        block = matrix[:, :n, :n]
        block.copy_(self._condense(hessian))
        lengths = torch.linalg.vector_norm(self.rows, dim=2)
        self.shift = self._find_shift(block, lengths, eps)
        diagonal(block).add_(self.shift[:, None])
        if m:
            matrix[:, n:, :n] = self.rows
            matrix[:, :n, n:] = self.rows.mT
            relaxation = eps**0.6 * largest(lengths).clamp(min=1e-3).square() / self.size
            diagonal(matrix)[:, n:] = -relaxation[:, None]
        self._factors = torch.linalg.lu_factor_ex(matrix)[:2]

    def direction(self, barrier: Tensor) -> Direction:
        """The primal-dual Newton step towards the given barrier weights, shape (k,)."""
        e, functions, weight = self.e, self.functions, barrier[:, None]
        right = -self.slope
        if functions.bounded:
            right = right + weight / self.below - weight / self.above
        if functions.inequalities:
            right = right - combine(self.sides, self.ratio * self.c + self.keep * weight / e.slack)
        dx, dy = self._solve(self._free(right), -self.h)
        slack, inequality = e.slack, e.inequality
        if functions.inequalities:
            moved = apply(self.sides, dx)
            inequality = self.ratio * (moved + self.c) + self.keep * weight / e.slack
            slack = -self.keep * (self.c + e.slack + moved)
        lower, upper = e.lower, e.upper
        if functions.bounded:
            lower = -e.lower + (weight - e.lower * dx) / self.below
            upper = -e.upper + (weight + e.upper * dx) / self.above
        return Direction(dx, slack, dy, inequality, lower, upper)

    def correction(self, index: Tensor, constraints: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
        """For some elements, steps of x and slack that take off what h and c + slack have left at a trial point."""
        m, sides, keep = self.functions.equalities, self.sides[index], self.keep[index]
        over = (constraints[:, m:] + slack) * keep
        right = -combine(sides, self.ratio[index] * over)
        factors, pivots = (f[index] for f in self._factors)
        bottom = -constraints[:, :m] * keep
        dx = torch.linalg.lu_solve(factors, pivots, torch.cat([self._free(right), bottom], dim=1).unsqueeze(2))
        dx = dx.squeeze(2)[:, : self.functions.n]
        return dx, -over - apply(sides, dx) * keep

    def _free(self, right: Tensor) -> Tensor:
        return right * self.functions.free if self.functions.fixed else right

    def _leave_objective(self, e: Elements, d: Derivatives) -> Tensor:
        """The system of the elements that are restoring feasibility, put in place of theirs."""
        flag = e.restoring
        weights = torch.cat([torch.ones_like(self.h), (self.c > 0).to(self.c.dtype)], dim=1)
        normal = (d.jacobian * (weights * flag[:, None])[:, :, None]).mT @ d.jacobian
        on = (~flag).to(e.x.dtype)
        self.h, self.rows = self.h * on[:, None], self.rows * on[:, None, None]
        assert d.hessian is not None
        return d.hessian + normal

    def _condense(self, hessian: Tensor) -> Tensor:
        """Owns its memory, or is the Hessian itself."""
        e, functions = self.e, self.functions
        matrix = hessian
        if functions.inequalities:
            matrix = torch.baddbmm(matrix, (self.sides * self.ratio[:, :, None]).mT, self.sides)
        if functions.bounded:
            matrix = matrix.clone() if matrix is hessian else matrix
            diagonal(matrix).add_(e.lower / self.below + e.upper / self.above)
        if functions.fixed:
            # The row of a fixed variable says that it does not move.
            free = functions.free
            matrix = matrix * (free[:, None] * free) + torch.diag(1.0 - free)
            self.rows = self.rows * free
        return matrix

    def _find_shift(self, matrix: Tensor, lengths: Tensor, eps: float) -> Tensor:
        e = self.e
        if self.functions.equalities:
            unit = self.rows / lengths.clamp(min=torch.finfo(matrix.dtype).tiny)[:, :, None]
            test = torch.baddbmm(matrix, (unit * (self.size / eps**0.45)[:, None, None]).mT, unit)
        else:
            test = matrix.clone()
        diagonal(test).add_((e.shift - eps**0.5 * self.size)[:, None])
        index = (torch.linalg.cholesky_ex(test)[1] != 0).nonzero().squeeze(1)
        if not len(index):
            return e.shift
        wrong = test[index]
        sound = torch.isfinite(wrong).flatten(1).all(dim=1)
        below = -torch.linalg.eigvalsh(torch.where(sound[:, None, None], wrong, 0.0))[:, 0]
        return e.shift.index_add(0, index, torch.maximum(2 * below, 1e-4 * self.size[index]))

    def _solve(self, top: Tensor, bottom: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.linalg.lu_solve(*self._factors, torch.cat([top, bottom], dim=1).unsqueeze(2)).squeeze(2)
        return found[:, : self.functions.n], found[:, self.functions.n :]


def gaps(functions: BatchFunctions, x: Tensor) -> tuple[Tensor, Tensor]:
    """Distances to the bounds, infinite where there is none and where the variable is fixed."""
    below, above = x - functions.lower, functions.upper - x
    if not functions.fixed:
        return below, above
    free = functions.free > 0
    return torch.where(free, below, torch.inf), torch.where(free, above, torch.inf)


def diagonal(matrices: Tensor) -> Tensor:
    """A view of the diagonals, (k, n)."""
    return matrices.diagonal(dim1=1, dim2=2)
