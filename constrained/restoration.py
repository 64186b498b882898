"""The restoration phases: towards feasibility, from where the line search failed."""

from abc import abstractmethod

import torch
from torch import Tensor

from constrained.barrier import BarrierModel, Evaluation, ScaledEvaluation, ScaledProblem
from constrained.barrier_step import BarrierState, longest
from constrained.filter import Filter
from implicit import LinearOperator

WEIGHT = 1e3
LARGE_MULTIPLIER = 1e3
SQUARES_BARRIER = 1e-3


class RestorationModel(BarrierModel):
    """Makes the constraints of another problem elastic; its first variables are those of that problem."""

    base: ScaledProblem

    def at(self, w: Tensor) -> "RestorationEvaluation":
        return self.around(self.base.at(w[: self.base.size]), w)

    @abstractmethod
    def around(self, inner: ScaledEvaluation, w: Tensor) -> "RestorationEvaluation":
        """The evaluation at w, where the problem has been evaluated at ``w[:base.size]`` already."""


class RestorationEvaluation(Evaluation):
    """At one w, with the evaluation of the problem that it rests on."""

    inner: ScaledEvaluation

    def jacobian(self) -> LinearOperator:
        return self.inner.jacobian()

    def hessian(self, y: Tensor) -> LinearOperator:
        return self.inner.weighted_hessian(y, 0.0)


class Restoration(RestorationModel):
    """``min rho sum(n + p) + zeta / 2 ||D (w - r)||^2 s.t. C(w) + n - p = 0, n, p >= 0, bounds on w``.

    The l1 norm of the constraints, made smooth by their positive and negative parts, with a pull towards the point r
    where the phase began (Waechter and Biegler 2006, section 3.3).

    Args:
        base: the problem whose constraints are to be satisfied.
        reference: r, shape (base.size,); ``D = 1 / max(1, |r|)``.
        mu: the phase's barrier parameter; ``zeta = sqrt(mu)``.
    """

    def __init__(self, base: ScaledProblem, reference: Tensor, mu: float) -> None:
        self.base, self.reference = base, reference
        self.n, self.m = base.n, base.m
        self.sides = base.sides.extended(2 * base.m)
        rows = torch.arange(base.m, device=base.row.device)
        ones = reference.new_ones(base.m)
        self.row, self.sign = torch.cat([base.row, rows, rows]), torch.cat([base.sign, ones, -ones])
        self.weights = mu**0.5 / reference.abs().clamp(min=1.0) ** 2

    def around(self, inner: ScaledEvaluation, w: Tensor) -> "_L1Evaluation":
        return _L1Evaluation(self, inner, w)


class _L1Evaluation(RestorationEvaluation):
    def __init__(self, model: Restoration, inner: ScaledEvaluation, w: Tensor) -> None:
        self.model, self.inner, self.w, self.point = model, inner, w, inner.point
        size, m = model.base.size, model.m
        self.offset = w[:size] - model.reference
        n, p = w[size : size + m], w[size + m :]
        self.objective = float(WEIGHT * (n + p).sum() + 0.5 * (model.weights * self.offset**2).sum())
        self.constraints = inner.constraints + n - p
        self.finite = inner.finite

    def gradient_of_objective(self) -> Tensor:
        return torch.cat([self.model.weights * self.offset, self.w.new_full((2 * self.model.m,), WEIGHT)])

    def diagonal(self) -> Tensor:
        return torch.cat([self.model.weights, self.w.new_zeros(2 * self.model.m)])


class LeastSquares(RestorationModel):
    """``min 1/2 sum_i (weight_i r_i)^2 s.t. C(w) - r = 0, bounds on w``.

    The sum of squares of the violations as the user states them. Where the l1 norm has a minimum that is none of the
    squares, this goes on; where it has not, the point is infeasible in both senses.
    """

    def __init__(self, base: ScaledProblem) -> None:
        self.base, self.n, self.m = base, base.n, base.m
        self.sides = base.sides.widened(base.m)
        rows = torch.arange(base.m, device=base.row.device)
        ones = base.constraint_scale.new_ones(base.m)
        self.row, self.sign = torch.cat([base.row, rows]), torch.cat([base.sign, -ones])
        scale = base.constraint_scale
        self.weights = (scale.min() / scale) ** 2

    def around(self, inner: ScaledEvaluation, w: Tensor) -> "_SquaresEvaluation":
        return _SquaresEvaluation(self, inner, w)


class _SquaresEvaluation(RestorationEvaluation):
    def __init__(self, model: LeastSquares, inner: ScaledEvaluation, w: Tensor) -> None:
        self.model, self.inner, self.w, self.point = model, inner, w, inner.point
        self.residuals = w[model.base.size :]
        self.objective = 0.5 * float((model.weights * self.residuals**2).sum())
        self.constraints = inner.constraints - self.residuals
        self.finite = inner.finite

    def gradient_of_objective(self) -> Tensor:
        return torch.cat([self.w.new_zeros(self.model.base.size), self.model.weights * self.residuals])

    def diagonal(self) -> Tensor:
        return torch.cat([self.w.new_zeros(self.model.base.size), self.model.weights])


def elastic(constraints: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """The n and p that minimise the barrier function of the l1 phase for fixed w, with ``C + n - p = 0``."""
    a = (mu - WEIGHT * constraints) / (2 * WEIGHT)
    b = mu * constraints / (2 * WEIGHT)
    root = torch.sqrt(a**2 + b)
    # For large C the two terms of a + root cancel; their product with a - root is -b.
    n = torch.where(a < 0, b / torch.where(a < 0, root - a, 1.0), a + root).clamp(min=torch.finfo(a.dtype).tiny)
    return n, (constraints + n).clamp(min=torch.finfo(a.dtype).tiny)


def begin_l1(evaluation: ScaledEvaluation, state: BarrierState, inner: BarrierState) -> None:
    """Fill ``inner`` with a start of :class:`Restoration` at ``state.w``."""
    constraints = evaluation.constraints
    inner.mu = max(state.mu, float(constraints.abs().amax()))
    n, p = elastic(constraints, inner.mu)
    inner.w, inner.y = torch.cat([state.w, n, p]), torch.zeros_like(state.y)
    inner.z = torch.cat([state.z.clamp(max=WEIGHT), inner.mu / n, inner.mu / p])
    _fresh(inner)


def begin_squares(model: LeastSquares, evaluation: ScaledEvaluation, squares: BarrierState) -> None:
    """Fill ``squares`` with a start of :class:`LeastSquares` at the point of ``evaluation``."""
    residuals = evaluation.constraints
    squares.mu = SQUARES_BARRIER
    squares.w, squares.y = torch.cat([evaluation.w, residuals]), model.weights * residuals
    squares.z = squares.mu / model.sides.gaps(squares.w)
    _fresh(squares)


def _fresh(state: BarrierState) -> None:
    state.filter, state.shift, state.tiny = Filter(), 0.0, 0
    state.filter.limit(0.0)


def leave(base: ScaledProblem, state: BarrierState, w: Tensor) -> None:
    """Put the end of a phase into ``state``; its constraint multipliers are left to be estimated."""
    gaps = base.sides.gaps(state.w)
    dz = state.mu / gaps - state.z - state.z / gaps * base.sides.along(w - state.w)
    z = state.z + longest(state.z, dz, state.boundary) * dz
    state.z = torch.ones_like(z) if len(z) and float(z.max()) > LARGE_MULTIPLIER else z
    state.w = w
