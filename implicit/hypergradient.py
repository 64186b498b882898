"""The implicit hypergradient and what is known about its error.

For a lower level solved at y, with :math:`g_{yy} v = \\nabla_y f`:

.. math:: h(x, y) = \\nabla_x f(x, y) - \\nabla^2_{xy} g(x, y)\\, v .

At :math:`y = y^*(x)` this is the gradient of :math:`F(x) = f(x, y^*(x))`.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit import tree
from implicit.curvature import lanczos
from implicit.derivatives import GradientGraph, ScalarFunction, value_and_gradients
from implicit.linear_solvers import CG, LinearSolution, LinearSolver
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
            Infinite where the linear solver failed.
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
        linear_solver: for :math:`g_{yy} v = \\nabla_y f`; ``CG()`` by default.
        adjoint: a starting v, such as that of a nearby point.
        graph: the kept graph of ``lower`` at this very point, where a lower-level solver left one.
        accuracy: whether to measure the error; costs two more linear solves and one more graph.
        strong_convexity: mu, where it is known: turns the estimate into a bound.

    Returns:
        The hypergradient; a failed linear solve is in ``.linear``, not raised.

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
    solver = linear_solver if linear_solver is not None else CG()
    graph = graph if graph is not None else GradientGraph(lower, x, y)
    value, gradient_x, gradient_y = value_and_gradients(upper, x, y, "the upper objective")
    linear = solver.solve(Hessian.of(graph), gradient_y, x0=adjoint)
    mixed = graph.mixed_vjp(linear.value)
    found = tree.sub(gradient_x, mixed)
    scale = float(tree.norm(gradient_x)) + float(tree.norm(mixed))
    report = None
    if accuracy:
        report = measure_accuracy(upper, lower, x, y, graph, found, linear, solver, strong_convexity)
        size = float(tree.norm(found))
        if not report.error <= max(0.01 * size, torch.finfo(tree.common_dtype(y)).eps):  # NaN warns too
            warnings.warn(
                f"the hypergradient has norm {size:.3g} and {report.kind} of its error {report.error:.3g}: the lower "
                f"level (residual {report.lower_residual:.3g}) or the linear system (relative residual "
                f"{report.linear_residual:.3g}) is not solved well enough",
                ConvergenceWarning,
                stacklevel=2,
            )
    return Hypergradient(found, float(value), linear.value, linear, scale, report)


def measure_accuracy(
    upper: ScalarFunction,
    lower: ScalarFunction,
    x: Tree,
    y: Tree,
    graph: GradientGraph,
    found: Tree,
    linear: LinearSolution,
    solver: LinearSolver,
    strong_convexity: float | None = None,
) -> HypergradientAccuracy:
    """The accuracy of an already computed hypergradient ``found``; see :class:`HypergradientAccuracy`."""
    residual = float(tree.norm(graph.gradient))
    correction = solver.solve(Hessian.of(graph), graph.gradient)
    moved = GradientGraph(lower, x, tree.sub(y, correction.value))
    _, gradient_x, gradient_y = value_and_gradients(upper, x, moved.y, "the upper objective")
    # Solved for what v leaves over: started at v, a solver of the same tolerance would return v and hide its error.
    rest = solver.solve(Hessian.of(moved), tree.sub(gradient_y, moved.hvp(linear.value)))
    corrected = tree.sub(gradient_x, moved.mixed_vjp(tree.add(linear.value, rest.value)))
    error = float("inf") if linear.status.is_failure else float(tree.norm(tree.sub(corrected, found)))
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
    graph: GradientGraph,
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
