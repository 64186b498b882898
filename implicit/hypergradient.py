"""The implicit hypergradient and what is known about its error.

For a lower level solved at y, with :math:`g_{yy} v = \\nabla_y f`:

.. math:: h(x, y) = \\nabla_x f(x, y) - \\nabla^2_{xy} g(x, y)\\, v .

At :math:`y = y^*(x)` this is the gradient of :math:`F(x) = f(x, y^*(x))`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit import tree
from implicit.curvature import lanczos
from implicit.derivatives import GradientGraph, ScalarFunction, value_and_gradients
from implicit.estimators import Estimator, LinearSolve, LowerPoint, curvature_at
from implicit.linear_solvers import LinearSolution, LinearSolver
from implicit.operators import Hessian, LinearOperator
from implicit.status import ConvergenceWarning
from implicit.tree import Tree


@dataclass(frozen=True)
class HypergradientAccuracy:
    """How good a hypergradient is.

    Attributes:
        lower_residual: :math:`\\|\\nabla_y g(x, y)\\|`.
        lower_error: distance of y to the lower solution: ``lower_residual / mu`` where strong convexity mu was
            declared (a bound), else the length of one Newton correction (an estimate).
        linear_residual: ``||g_yy v - grad_y f|| / ||grad_y f||``.
        error: Euclidean error of the hypergradient.
            Infinite where a linear solve failed.
        kind: ``"estimate"``: the change of the hypergradient under one Newton correction of y and one refinement of v;
            ``"bound"``: an upper bound to first order in the residuals under the declared mu, with operator norms
            from Lanczos (probability 1 - 1e-6).
    """

    lower_residual: float
    lower_error: float
    linear_residual: float
    error: float
    kind: str


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient.

    Attributes:
        value: shaped like x.
        upper_value: f(x, y).
        adjoint: v, shaped like y; a warm start for the next point.
        linear: how the linear solve went.
        scale: ``||grad_x f|| + ||grad2_xy g v||``, the size of the two terms that cancel at a solution.
        accuracy: None unless asked for.
    """

    value: Tree
    upper_value: float
    adjoint: Tree
    linear: LinearSolution
    scale: float
    accuracy: HypergradientAccuracy | None = None


def hypergradient(
    upper: ScalarFunction,
    lower: ScalarFunction,
    x: Tree,
    y: Tree,
    *,
    estimator: Estimator | None = None,
    linear_solver: LinearSolver | None = None,
    adjoint: Tree | None = None,
    graph: GradientGraph | None = None,
    accuracy: bool = True,
    strong_convexity: float | None = None,
) -> Hypergradient:
    """The implicit hypergradient at (x, y), with its measured accuracy.

    Args:
        upper: f(x, y), a scalar.
        lower: g(x, y), a scalar, strongly convex in y near the point.
        x: upper variable, any pytree.
        y: lower variable, any pytree, at or near the lower solution.
        estimator: how v is obtained; ``LinearSolve()`` by default, which solves the system. See also
            :class:`NeumannSeries`, :class:`FiniteDifference` and :class:`OneStep`; the accuracy report says what an
            approximation costs.
        linear_solver: short for ``estimator=LinearSolve(linear_solver=...)``.
        adjoint: a starting v, such as that of a nearby point.
        graph: the kept graph of ``lower`` at this very point, where a lower-level solver left one.
        accuracy: whether to measure the error; costs two more linear solves and one more graph.
        strong_convexity: mu, where it is known: turns the estimate into a bound.

    Returns:
        The hypergradient; a failed linear solve is in ``.linear``, not raised.

    Raises:
        TypeError: if ``estimator`` is no estimator.
        ValueError: if both ``estimator`` and ``linear_solver`` are given, or an estimator that takes differences of
            gradients meets ``graph`` or ``strong_convexity``, which need second derivatives.

    Warns:
        ConvergenceWarning: if ``accuracy`` and the error exceeds one per cent of the hypergradient: the lower level
            is not solved well enough.

    Example:
        >>> import torch, implicit
        >>> x, a = torch.tensor(2.0), torch.tensor([1.0, 3.0])
        >>> h = implicit.hypergradient(lambda x, y: y.sum(), lambda x, y: ((y - x * a) ** 2).sum(), x, 2.0 * a)
        >>> round(float(h.value), 6)
        4.0
    """
    chosen = _choose(estimator, linear_solver)
    if not chosen.second_order and (graph is not None or strong_convexity is not None):
        raise ValueError(
            f"graph and strong_convexity need second derivatives, which {type(chosen).__name__} avoids; leave them out"
        )
    point = graph if graph is not None else chosen.expand(lower, x, y)
    value, gradient_x, gradient_y = value_and_gradients(upper, x, y, "the upper objective")
    linear = chosen.adjoint(point, gradient_y, adjoint)
    mixed = point.mixed_vjp(linear.value)
    found = tree.sub(gradient_x, mixed)
    scale = float(tree.norm(gradient_x)) + float(tree.norm(mixed))
    report = None
    if accuracy:
        solver = chosen.reference(linear, tree.common_dtype(y))
        report = measure_accuracy(
            upper, lower, x, y, point, found, linear, solver, strong_convexity, expand=chosen.expand
        )
        warn_if_inaccurate(found, y, report)
    return Hypergradient(found, float(value), linear.value, linear, scale, report)


def _choose(estimator: Estimator | None, linear_solver: LinearSolver | None) -> Estimator:
    if estimator is None:
        return LinearSolve() if linear_solver is None else LinearSolve(linear_solver=linear_solver)
    if not isinstance(estimator, Estimator):
        raise TypeError(f"estimator must be an Estimator such as LinearSolve(linear_solver=...), got {estimator!r}")
    if linear_solver is not None:
        raise ValueError("give either estimator or linear_solver: LinearSolve(linear_solver=...) holds both")
    return estimator


UNSOLVED = "the lower level (residual {:.3g}) or the linear system (relative residual {:.3g}) is not solved well enough"


def warn_if_inaccurate(found: Tree, y: Tree, report: HypergradientAccuracy, cause: str = UNSOLVED) -> None:
    """Warn the caller's caller where the error exceeds one per cent of the hypergradient."""
    size = float(tree.norm(found))
    if report.error <= max(0.01 * size, torch.finfo(tree.common_dtype(y)).eps):  # NaN warns too
        return
    why = cause.format(report.lower_residual, report.linear_residual)
    warnings.warn(
        f"the hypergradient has norm {size:.3g} and {report.kind} of its error {report.error:.3g}: {why}",
        ConvergenceWarning,
        stacklevel=3,
    )


def measure_accuracy(
    upper: ScalarFunction,
    lower: ScalarFunction,
    x: Tree,
    y: Tree,
    graph: LowerPoint,
    found: Tree,
    linear: LinearSolution,
    solver: LinearSolver,
    strong_convexity: float | None = None,
    *,
    expand: Callable[[ScalarFunction, Tree, Tree], LowerPoint] = GradientGraph,
) -> HypergradientAccuracy:
    """The accuracy of an already computed hypergradient ``found``; see :class:`HypergradientAccuracy`.

    ``graph`` is the lower level at (x, y), ``expand`` makes the same of another y.
    """
    residual = float(tree.norm(graph.gradient))
    correction = solver.solve(curvature_at(graph), graph.gradient)
    moved = expand(lower, x, tree.sub(y, correction.value))
    _, gradient_x, gradient_y = value_and_gradients(upper, x, moved.y, "the upper objective")
    # Solved for what v leaves over: started at v, a solver of the same tolerance would return v and hide its error.
    rest = solver.solve(curvature_at(moved), tree.sub(gradient_y, moved.hvp(linear.value)))
    corrected = tree.sub(gradient_x, moved.mixed_vjp(tree.add(linear.value, rest.value)))
    failed = any(solution.status.is_failure for solution in (linear, correction, rest))
    error = float("inf") if failed else float(tree.norm(tree.sub(corrected, found)))
    lower_error, kind = float(tree.norm(correction.value)), "estimate"
    if strong_convexity is not None:
        kind = "bound"
        lower_error = residual / strong_convexity
        error = max(error, _first_order_bound(upper, lower, x, y, graph, linear, strong_convexity))
    return HypergradientAccuracy(residual, lower_error, linear.relative_residual, error, kind)


class _Gram(LinearOperator):
    """``B^T B`` for ``B = grad^2_xy phi`` acting on y: its largest eigenvalue is the squared norm of B."""

    symmetric = True

    def __init__(self, fn: ScalarFunction, x: Tree, y: Tree) -> None:
        super().__init__(y)
        self._along_y = GradientGraph(fn, x, y)
        self._along_x = GradientGraph(lambda q, p: fn(p, q), y, x)

    def mv(self, v: Tree) -> Tree:
        return self._along_x.mixed_vjp(self._along_y.mixed_vjp(v))


def _first_order_bound(
    upper: ScalarFunction,
    lower: ScalarFunction,
    x: Tree,
    y: Tree,
    graph: LowerPoint,
    linear: LinearSolution,
    mu: float,
) -> float:
    """With phi(x, y) = f - <grad_y g, v>, v fixed: the derivative of h in y has norm at most
    ``||phi_xy|| + ||g_xy|| ||phi_yy|| / mu``, and the linear residual enters through ``||g_xy|| / mu``."""
    v = tree.detach(linear.value)

    def phi(p: Tree, q: Tree) -> Tensor:
        value = upper(p, q)
        own, spec = tree.flatten(q)
        with torch.enable_grad():
            inner = lower(p, q)
            gradients = torch.autograd.grad(inner, own, create_graph=True, materialize_grads=True)
        return value - tree.dot(tree.unflatten(gradients, spec), v)

    def norm(operator: LinearOperator) -> float:
        return lanczos(operator, steps=40).ceiling

    mixed = norm(_Gram(lower, x, y)) ** 0.5
    phi_mixed = norm(_Gram(phi, x, y)) ** 0.5
    curved = GradientGraph(phi, x, y)
    phi_yy = norm(_Square(Hessian.of(curved, positive_definite=False))) ** 0.5
    distance = float(tree.norm(graph.gradient)) / mu
    return (phi_mixed + mixed * phi_yy / mu) * distance + mixed * linear.residual / mu


class _Square(LinearOperator):
    """``A^2`` of a symmetric operator: positive semidefinite, so that the ceiling of Lanczos applies."""

    symmetric = True

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.like)
        self.operator = operator

    def mv(self, v: Tree) -> Tree:
        return self.operator.mv(self.operator.mv(v))
