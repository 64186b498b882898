"""The problem that the interior-point method sees: equality constraints, bounds, and variables that enter linearly."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import scipy.sparse
import torch
from torch import Tensor

from constrained.lagrangian import Lagrangian, Point
from implicit import Dense, LinearOperator, Product, Sparse

PUSH = 1e-2
DAMPING = 1e-5


@dataclass(frozen=True)
class Sides:
    """All finite bounds on w in one list: ``sign * (w[index] - bound) >= 0``.

    Attributes:
        index: which variable, shape (k,).
        sign: +1 for lower, -1 for upper bounds.
        bound: shape (k,).
        damped: 1 for the only bound of a variable, else 0: its barrier term alone would let the variable run away.
        size: of w.
    """

    index: Tensor
    sign: Tensor
    bound: Tensor
    damped: Tensor
    size: int

    @classmethod
    def between(cls, lower: Tensor, upper: Tensor) -> "Sides":
        """Of variables with these bounds, which are infinite where there is none."""
        low, high = torch.isfinite(lower), torch.isfinite(upper)
        below, above = torch.nonzero(low)[:, 0], torch.nonzero(high)[:, 0]
        index = torch.cat([below, above])
        sign = torch.cat([torch.ones_like(lower[low]), -torch.ones_like(upper[high])])
        single = (low != high).to(lower.dtype)
        return cls(index, sign, torch.cat([lower[low], upper[high]]), single[index], len(lower))

    def extended(self, count: int) -> "Sides":
        """With as many variables more, all at least zero."""
        ones = self.sign.new_ones(count)
        more = torch.arange(self.size, self.size + count, device=self.index.device)
        return replace(
            self,
            index=torch.cat([self.index, more]),
            sign=torch.cat([self.sign, ones]),
            bound=torch.cat([self.bound, 0 * ones]),
            damped=torch.cat([self.damped, ones]),
            size=self.size + count,
        )

    def widened(self, count: int) -> "Sides":
        """With as many variables more that have no bounds."""
        return replace(self, size=self.size + count)

    def gaps(self, w: Tensor) -> Tensor:
        """Distances to the bounds, at least the rounding of a bound."""
        info = torch.finfo(w.dtype)
        floor = 0.5 * info.eps * self.bound.abs() + info.tiny
        return torch.maximum(self.sign * (w[self.index] - self.bound), floor)

    def along(self, v: Tensor) -> Tensor:
        """How fast the gaps change along v, shape (k,)."""
        return self.sign * v[self.index]

    def gather(self, values: Tensor) -> Tensor:
        """Sums over the bounds of each variable, shape (size,)."""
        return values.new_zeros(self.size).index_add(0, self.index, values)

    def inside(self, w: Tensor, push: float = PUSH) -> Tensor:
        """The nearest point whose gaps are at least ``push max(1, |bound|)``, or that share of the distance of two."""
        low, high = w.new_full((self.size,), -torch.inf), w.new_full((self.size,), torch.inf)
        lower, upper = self.sign > 0, self.sign < 0
        low[self.index[lower]], high[self.index[upper]] = self.bound[lower], self.bound[upper]
        width = push * (high - low)
        start = low + torch.minimum(push * low.abs().clamp(min=1.0), width)
        end = high - torch.minimum(push * high.abs().clamp(min=1.0), width)
        start, end = (torch.where(torch.isfinite(v), v, bound) for v, bound in ((start, low), (end, high)))
        return torch.minimum(torch.maximum(w, start), end)


class Evaluation(ABC):
    """Values at one w; derivatives follow when asked for.

    Attributes:
        w: shape (size,).
        objective: a number.
        constraints: shape (m,).
        finite: whether both are numbers.
        point: the evaluation of the problem behind.
    """

    w: Tensor
    objective: float
    constraints: Tensor
    finite: bool
    point: Point

    @cached_property
    def gradient(self) -> Tensor:
        """Of the objective, shape (size,)."""
        return self.gradient_of_objective()

    @abstractmethod
    def gradient_of_objective(self) -> Tensor:
        """The same, computed."""

    @abstractmethod
    def jacobian(self) -> LinearOperator:
        """Of the constraints, with respect to the first variables only; shape (m, n)."""

    @abstractmethod
    def hessian(self, y: Tensor) -> LinearOperator:
        """Of ``objective + <y, constraints>`` with respect to the first variables, but for :attr:`diagonal`."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """What is to be added to the diagonal of the Hessian, shape (size,)."""


class BarrierModel(ABC):
    """``min F(w) s.t. C(w) = 0, bounds on w`` with ``w = (u, e)``: u enters anyhow, e_j in one row linearly.

    Slacks are such e, and so are the violations of a restoration phase. A Newton system in (u, e) and the multipliers
    reduces to one in u and the multipliers, with the e in its second block's diagonal.

    Attributes:
        n: of u.
        m: constraints.
        sides: all bounds.
        row, sign: where each e_j enters, and with which sign, shape (size - n,).
    """

    n: int
    m: int
    sides: Sides
    row: Tensor
    sign: Tensor

    @abstractmethod
    def at(self, w: Tensor) -> Evaluation:
        """Evaluate once."""

    @property
    def size(self) -> int:
        """Of w."""
        return self.sides.size

    def pull(self, evaluation: Evaluation, y: Tensor) -> Tensor:
        """The transposed Jacobian of C times y, shape (size,)."""
        head = evaluation.jacobian().T @ y if self.m else y.new_zeros(self.n)
        return torch.cat([head, self.sign * y[self.row]])

    def push(self, evaluation: Evaluation, v: Tensor) -> Tensor:
        """The Jacobian of C times v, shape (m,)."""
        head = evaluation.jacobian() @ v[: self.n] if self.m else v.new_zeros(0)
        return head.index_add(0, self.row, self.sign * v[self.n :])

    def lagrangian_gradient(self, evaluation: Evaluation, y: Tensor, z: Tensor) -> Tensor:
        """``grad F + A^T y - z`` with the multipliers of all bounds, shape (size,)."""
        return evaluation.gradient + self.pull(evaluation, y) - self.sides.gather(self.sides.sign * z)

    def barrier(self, evaluation: Evaluation, mu: float) -> float:
        """``F - mu sum log gap``, and a little more where a variable has one bound only."""
        gaps = self.sides.gaps(evaluation.w)
        return evaluation.objective - mu * float(gaps.log().sum() - DAMPING * (gaps * self.sides.damped).sum())

    def barrier_gradient(self, evaluation: Evaluation, mu: float) -> Tensor:
        """Its gradient, shape (size,)."""
        sides = self.sides
        return evaluation.gradient - mu * sides.gather(
            sides.sign / sides.gaps(evaluation.w) - DAMPING * sides.sign * sides.damped
        )


class ScaledProblem(BarrierModel):
    """A problem over ``w = (x without fixed variables, slacks)``: ``scale_f f``, ``scale_c (h, c) + (0, slacks) = 0``.

    Args:
        lagrangian: the problem.
        scales: of the objective and of the constraints, shape (1 + m,).
        margin: by how much bounds and inequalities may be violated; more than zero where they leave no interior.
    """

    def __init__(self, lagrangian: Lagrangian, scales: Tensor, margin: float = 0.0) -> None:
        self.lagrangian = lagrangian
        self.objective_scale, self.constraint_scale = float(scales[0]), scales[1:]
        lower, upper = lagrangian.lower, lagrangian.upper
        fixed = lower == upper
        self.free = torch.nonzero(~fixed)[:, 0]
        self.base = torch.where(fixed, lower, 0.0)
        self.n, self.m, slacks = len(self.free), lagrangian.constraints, lagrangian.inequalities
        zeros = lower.new_zeros(slacks)
        least = torch.cat([lower[self.free], zeros])
        margins = margin * torch.cat([torch.ones_like(lower[self.free]), self.constraint_scale[self.m - slacks :]])
        most = torch.cat([upper[self.free], zeros + torch.inf])
        self.sides = Sides.between(least - margins, most + margins)
        self.row = torch.arange(lagrangian.equalities, self.m, device=self.free.device)
        self.sign = zeros + 1.0

    def at(self, w: Tensor) -> "ScaledEvaluation":
        return ScaledEvaluation(self, w, self.lagrangian.at(self.x(w)))

    def x(self, w: Tensor) -> Tensor:
        """The variables of the problem, fixed ones included."""
        return self.base.index_copy(0, self.free, w[: self.n]) if self.n < len(self.base) else w[: self.n]

    @cached_property
    def selection(self) -> Sparse:
        """``S v`` puts free variables at their places."""
        n = self.n
        entries = (torch.ones(n, dtype=self.base.dtype).numpy(), (self.free.cpu().numpy(), range(n)))
        matrix = scipy.sparse.csr_array(entries, shape=(len(self.base), n))
        like = self.base.new_zeros(n)
        return Sparse(matrix, symmetric=False, like=like, out=self.base)

    @property
    def reduced(self) -> bool:
        """Whether there are fixed variables."""
        return self.n < len(self.base)


class ScaledEvaluation(Evaluation):
    """See :class:`ScaledProblem`."""

    def __init__(self, model: ScaledProblem, w: Tensor, point: Point) -> None:
        self.model, self.w, self.point = model, w, point
        self.finite = point.finite
        self.objective = model.objective_scale * float(point.objective)
        self.constraints = (model.constraint_scale * point.constraints).index_add(0, model.row, w[model.n :])

    def gradient_of_objective(self) -> Tensor:
        head = self.model.objective_scale * self.point.gradient[self.model.free]
        return torch.cat([head, torch.zeros_like(self.w[self.model.n :])])

    def jacobian(self) -> LinearOperator:
        return self._jacobian

    @cached_property
    def _jacobian(self) -> LinearOperator:
        model, found = self.model, self.point.jacobian
        scale = model.constraint_scale
        if isinstance(found, Dense):
            return Dense(scale[:, None] * found.matrix[:, model.free], symmetric=False)
        matrix = found.to_sparse()
        if matrix is not None:
            rows = scipy.sparse.diags_array(scale.cpu().numpy()) @ matrix
            rows = rows[:, model.free.cpu().numpy()] if model.reduced else rows
            return Sparse(rows, symmetric=False, like=self.w[: model.n].detach(), out=scale)
        rows = RowScaled(found, scale)
        return Product(rows, model.selection) if model.reduced else rows

    def hessian(self, y: Tensor) -> LinearOperator:
        return self.weighted_hessian(y, self.model.objective_scale)

    def weighted_hessian(self, y: Tensor, weight: float) -> LinearOperator:
        """The same with another weight on f."""
        model = self.model
        found = self.point.hessian(model.constraint_scale * y, weight)
        if not model.reduced:
            return found
        if isinstance(found, Dense):
            return Dense(found.matrix[model.free][:, model.free], symmetric=True, positive_definite=False)
        return Product(model.selection.T, found, model.selection, symmetric=True)

    def diagonal(self) -> Tensor:
        return torch.zeros_like(self.w)


class RowScaled(LinearOperator):
    """``diag(scale) J`` for a J that is known by its products."""

    def __init__(self, operator: LinearOperator, scale: Tensor) -> None:
        super().__init__(operator.like, scale)
        self.operator, self.scale = operator, scale

    def mv(self, v: Tensor) -> Tensor:
        return self.scale * self.operator.flat_mv(v)

    @property
    def T(self) -> LinearOperator:
        return ColumnScaled(self)


class ColumnScaled(LinearOperator):
    """The transpose of :class:`RowScaled`."""

    def __init__(self, rows: RowScaled) -> None:
        super().__init__(rows.out, rows.like)
        self.rows = rows

    def mv(self, v: Tensor) -> Tensor:
        return self.rows.operator.T.flat_mv(self.rows.scale * v)

    @property
    def T(self) -> LinearOperator:
        return self.rows
