"""Ways to get the adjoint v of a hypergradient, :math:`g_{yy} v = \\nabla_y f`, from exact to one step.

What they share is the second term :math:`\\nabla^2_{xy} g\\, v`; they differ in v and in how products with the second
derivatives of g are formed. An unrolled lower level has no adjoint; see :mod:`implicit.unroll`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from implicit import tree
from implicit.curvature import lanczos
from implicit.derivatives import GradientGraph, ScalarFunction, value_and_gradients
from implicit.linear_solvers import CG, LinearSolution, LinearSolver
from implicit.linear_solvers.base import check_positive_int, check_tolerances, default_rtol
from implicit.operators import Hessian, LinearOperator
from implicit.status import Status
from implicit.tree import Tree


class LowerPoint(Protocol):
    """A lower objective at one point: its gradient in y, and products with its second derivatives."""

    x: Tree
    y: Tree
    gradient: Tree

    def hvp(self, v: Tree) -> Tree:
        """:math:`\\nabla^2_{yy} g\\, v`, with the structure of y."""
        ...

    def mixed_vjp(self, v: Tree) -> Tree:
        """:math:`\\nabla^2_{xy} g\\, v`, with the structure of x."""
        ...


class GradientDifferences:
    """The products of a :class:`GradientGraph` from central differences of first derivatives.

    With ``h = width (1 + ||y||) / ||v||`` and both gradients of g taken at ``y + h v`` and ``y - h v``, half the
    difference over h is :math:`(\\nabla^2_{xy} g\\, v, \\nabla^2_{yy} g\\, v)`: two first-order passes a product.

    Args:
        fn: g(x, y), a scalar.
        x: upper variable.
        y: lower variable.
        width: relative displacement; None means ``eps^(1/3)``, which balances truncation against rounding: products
            are then good to about ``eps^(2/3)``, 4e-11 in float64 and 2e-5 in float32.
    """

    def __init__(self, fn: ScalarFunction, x: Tree, y: Tree, width: float | None = None) -> None:
        self.x, self.y = tree.detach(x), tree.detach(y)
        self._fn = fn
        eps = float(torch.finfo(tree.common_dtype(self.y, "y")).eps)
        self._length = (eps ** (1 / 3) if width is None else width) * (1.0 + float(tree.norm(self.y)))
        self.value, _, self.gradient = self._gradients(self.y)

    def _gradients(self, y: Tree) -> tuple[Tensor, Tree, Tree]:
        return value_and_gradients(self._fn, self.x, y, "the lower objective")

    def joint(self, v: Tree) -> tuple[Tree, Tree]:
        """:math:`(\\nabla^2_{xy} g\\, v, \\nabla^2_{yy} g\\, v)` from the same two passes."""
        norm = tree.norm(v)
        h = self._length / torch.where(norm > 0, norm, 1.0)
        ahead = self._gradients(tree.axpy(h, v, self.y))[1:]
        behind = self._gradients(tree.axpy(-h, v, self.y))[1:]
        return tree.scale(0.5 / h, tree.sub(ahead, behind))

    def hvp(self, v: Tree) -> Tree:
        """:math:`\\nabla^2_{yy} g\\, v`, with the structure of y."""
        return self.joint(v)[1]

    def mixed_vjp(self, v: Tree) -> Tree:
        """:math:`\\nabla^2_{xy} g\\, v`, with the structure of x."""
        return self.joint(v)[0]


class _Curvature(LinearOperator):
    symmetric = True
    positive_definite = True

    def __init__(self, point: LowerPoint) -> None:
        super().__init__(point.y)
        self._point = point

    def mv(self, v: Tree) -> Tree:
        return self._point.hvp(v)


def curvature_at(point: LowerPoint, expected_products: int | None = None) -> LinearOperator:
    """:math:`g_{yy}` at a point as an operator."""
    if isinstance(point, GradientGraph):
        return Hessian.of(point, expected_products=expected_products)
    return _Curvature(point)


class Estimator(ABC):
    """How :func:`implicit.hypergradient` gets its adjoint.

    Attributes:
        second_order: whether the lower objective is differentiated twice by autograd.
    """

    second_order: ClassVar[bool] = True

    def reference(self, linear: LinearSolution, dtype: torch.dtype) -> LinearSolver:
        """The solver behind the accuracy report; ``CG()``, as the report must not share what it judges."""
        return CG()

    def expand(self, lower: ScalarFunction, x: Tree, y: Tree) -> LowerPoint:
        """The lower level at a point; a kept graph of reverse passes by default."""
        return GradientGraph(lower, x, y)

    @abstractmethod
    def adjoint(self, point: LowerPoint, gradient_y: Tree, start: Tree | None) -> LinearSolution:
        """v with ``g_yy v = grad_y f``, or an approximation, with its true residual."""


@dataclass(frozen=True, kw_only=True)
class LinearSolve(Estimator):
    """v from a linear solver: the hypergradient itself, to the solver's tolerance.

    Args:
        linear_solver: for :math:`g_{yy} v = \\nabla_y f`.
    """

    linear_solver: LinearSolver = field(default_factory=CG)

    def __post_init__(self) -> None:
        _check_solver(self.linear_solver)

    def reference(self, linear: LinearSolution, dtype: torch.dtype) -> LinearSolver:
        """The same solver, unless its step limit was too low: that would make the error look small as well."""
        return CG() if linear.status is Status.STEP_LIMIT else self.linear_solver

    def adjoint(self, point: LowerPoint, gradient_y: Tree, start: Tree | None) -> LinearSolution:
        """One solve, started at ``start``. From zero it takes up to n products, which may pay for recording one."""
        expected = max(tree.size(gradient_y), 1) if start is None else None
        return self.linear_solver.solve(curvature_at(point, expected), gradient_y, x0=start)


@dataclass(frozen=True, kw_only=True)
class NeumannSeries(Estimator):
    """v from the first terms of the Neumann series (Lorraine, Vicol and Duvenaud 2020, algorithm 3):

    .. math:: v_K = s \\sum_{k < K} (I - s\\, g_{yy})^k\\, \\nabla_y f .

    This is what differentiating the last K of many gradient steps of length s at the lower solution gives. The error
    falls like :math:`(1 - s \\mu)^K`: 96 terms leave a quarter of it at condition number 800. The linear residual
    reported is measured from :math:`v_K`, not assumed; a series that grows is a failed solve.

    Args:
        terms: K, at least 1; K products.
        step: s; None measures ``1 / L`` with L the ceiling of a 20-step Lanczos run (20 more products).
        rtol: the relative residual that counts as solved; None means ``sqrt(eps)`` of the dtype.

    A given starting adjoint is refined: the series then sums what it leaves over. For a series that runs until a
    tolerance is met there is ``LinearSolve(linear_solver=Neumann())``.
    """

    terms: int
    step: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        check_positive_int(self.terms, "terms")
        check_tolerances(self.rtol, 0.0, None)
        if self.step is not None:
            _check_positive(self.step, "step")

    def adjoint(self, point: LowerPoint, gradient_y: Tree, start: Tree | None) -> LinearSolution:
        """K terms, and one product for the true residual."""
        operator = curvature_at(point)
        b = _flat(operator, gradient_y)
        step = self.step if self.step is not None else _inverse_curvature(operator)
        v = torch.zeros_like(b) if start is None else _flat(operator, start)
        rest = b if start is None else b - operator.flat_mv(v)
        first = torch.linalg.vector_norm(rest)
        for term in range(self.terms):
            v = torch.add(v, rest, alpha=step)
            if term + 1 < self.terms:
                rest = torch.sub(rest, operator.flat_mv(rest), alpha=step)
        return _judged(operator, b, v, float(first), self.terms, self.rtol)


@dataclass(frozen=True, kw_only=True)
class FiniteDifference(Estimator):
    """The hypergradient from first derivatives alone, for models whose backward pass cannot be differentiated.

    Products with :math:`g_{yy}` inside the linear solver and the final :math:`\\nabla^2_{xy} g\\, v` are central
    differences of gradients; so are those of the accuracy report. Two gradients a product, and no kept graph.

    Args:
        linear_solver: ``CG(rtol=10 eps^(2/3))`` by default (3.7e-10 in float64, 2.4e-4 in float32): differences carry
            no more digits. One that cannot reach its tolerance stalls and says so.
        width: relative displacement; None means ``eps^(1/3)``; see :class:`GradientDifferences`.
    """

    linear_solver: LinearSolver | None = None
    width: float | None = None

    second_order: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.linear_solver is not None:
            _check_solver(self.linear_solver)
        if self.width is not None:
            _check_positive(self.width, "width")

    def reference(self, linear: LinearSolution, dtype: torch.dtype) -> LinearSolver:
        """The same solver, unless its step limit was too low."""
        return _difference_solver(dtype) if linear.status is Status.STEP_LIMIT else self._solver(dtype)

    def _solver(self, dtype: torch.dtype) -> LinearSolver:
        return _difference_solver(dtype) if self.linear_solver is None else self.linear_solver

    def expand(self, lower: ScalarFunction, x: Tree, y: Tree) -> LowerPoint:
        """The lower level at a point, by differences."""
        return GradientDifferences(lower, x, y, self.width)

    def adjoint(self, point: LowerPoint, gradient_y: Tree, start: Tree | None) -> LinearSolution:
        """One solve, started at ``start``."""
        operator = curvature_at(point)
        return self._solver(operator.dtype).solve(operator, gradient_y, x0=start)


@dataclass(frozen=True, kw_only=True)
class OneStep(Estimator):
    """``v = step grad_y f``: the inverse Hessian replaced by a multiple of the identity (DARTS, Liu, Simonyan and Yang
    2019, equation 8; SAMA uses the same with the optimizer's metric).

    The first term of :class:`NeumannSeries`, with the mixed product from differences of gradients: no second
    derivatives. It is the cheapest estimator and by far the least accurate, often more than 90 % off in norm: read the
    accuracy report (the reason to leave it on once) before trusting its direction.

    Args:
        step: the step size of the lower level, :math:`\\xi` of DARTS.
        width: relative displacement; None means ``eps^(1/3)``; see :class:`GradientDifferences`.
    """

    step: float
    width: float | None = None

    second_order: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive(self.step, "step")
        if self.width is not None:
            _check_positive(self.width, "width")

    def reference(self, linear: LinearSolution, dtype: torch.dtype) -> LinearSolver:
        """CG at the accuracy of differences."""
        return _difference_solver(dtype)

    def expand(self, lower: ScalarFunction, x: Tree, y: Tree) -> LowerPoint:
        """The lower level at a point, by differences."""
        return GradientDifferences(lower, x, y, self.width)

    def adjoint(self, point: LowerPoint, gradient_y: Tree, start: Tree | None) -> LinearSolution:
        """One multiple of the gradient; ``start`` is not used."""
        operator = curvature_at(point)
        b = _flat(operator, gradient_y)
        return _judged(operator, b, self.step * b, float(torch.linalg.vector_norm(b)), 1, None)


def _difference_solver(dtype: torch.dtype) -> LinearSolver:
    return CG(rtol=10.0 * float(torch.finfo(dtype).eps) ** (2 / 3))


def _inverse_curvature(operator: LinearOperator) -> float:
    ceiling = lanczos(operator).ceiling
    return 1.0 / ceiling if ceiling > 0 else 1.0


def _flat(operator: LinearOperator, value: Tree) -> Tensor:
    return tree.ravel(tree.map(lambda _, leaf: leaf, operator.like, tree.detach(value)))


def _judged(
    operator: LinearOperator, b: Tensor, v: Tensor, first: float, steps: int, rtol: float | None
) -> LinearSolution:
    """An approximation v with the residual it truly has; ``first`` is that of the point it started from."""
    what = f"a Neumann series of {steps} term{'s' if steps > 1 else ''}"
    residual = float(torch.linalg.vector_norm(b - operator.flat_mv(v)))
    norm = float(torch.linalg.vector_norm(b))
    relative = residual / norm if norm else residual
    status, message = Status.STEP_LIMIT, f"{what} leaves a relative residual of {relative:.3g}"
    if not math.isfinite(relative):
        status = Status.NONFINITE
    elif relative <= (default_rtol(b.dtype) if rtol is None else rtol):
        status = Status.CONVERGED
    elif residual > first:
        status = Status.LINEAR_SOLVE_FAILED
        message += ", more than it began with: the step is longer than 2 / L, or g_yy is not positive definite"
    return LinearSolution(
        value=tree.unravel(v, operator.like),
        residual=residual,
        relative_residual=relative,
        steps=steps,
        products=operator.products,
        status=status,
        message=message,
    )


def _check_solver(value: object) -> None:
    if not isinstance(value, LinearSolver):
        raise TypeError(f"linear_solver must be a LinearSolver such as CG(), got {value!r}")


def _check_positive(value: float, name: str) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
