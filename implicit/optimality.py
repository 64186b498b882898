"""Optimality conditions ``F(y, *theta) = 0``: what :func:`implicit.custom_root` differentiates.

The catalogue of Blondel et al. (NeurIPS 2022), table 1. Where F contains a step size the solution does not depend on
it, and neither does its Jacobian; choose it near the inverse of the curvature so that the linear systems are well
scaled. All of F receives every argument theta.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit import tree
from implicit.pullback import gradient
from implicit.tree import Tree

Objective = Callable[..., Tensor]
Residual = Callable[..., Tree]


def stationary(objective: Objective) -> Residual:
    """``F(y, *theta) = grad_y g(y, *theta)``, the condition of an unconstrained minimizer.

    Args:
        objective: g(y, *theta), a scalar.

    Example:
        >>> import torch, implicit
        >>> implicit.optimality.stationary(lambda y, x: ((y - x) ** 2).sum())(torch.ones(2), torch.zeros(2))
        tensor([2., 2.])
    """

    def residual(y: Tree, *theta: Any) -> Tree:
        leaves, spec = tree.flatten(y)
        return tree.unflatten(gradient(lambda *q: objective(tree.unflatten(q, spec), *theta), leaves), spec)

    return residual


def fixed_point(iteration: Callable[..., Tree]) -> Residual:
    """``F(y, *theta) = T(y, *theta) - y``.

    Args:
        iteration: T(y, *theta), with the structure and shapes of y.
    """

    def residual(y: Tree, *theta: Any) -> Tree:
        return tree.map(lambda before, after: after - before, y, iteration(y, *theta))

    return residual


def proximal_gradient(smooth: Objective, prox: Callable[..., Tree], step: float = 1.0) -> Residual:
    """``prox(y - step grad f(y), step) - y``, for a minimizer of ``f + r`` with r nonsmooth.

    Args:
        smooth: f(y, *theta), a scalar.
        prox: prox(v, step, *theta), the minimizer of ``r(u) + ||u - v||^2 / (2 step)``; see :func:`implicit.prox_l1`.
        step: positive.

    Example:
        >>> import torch, implicit
        >>> lasso = implicit.optimality.proximal_gradient(
        ...     lambda y, data, weight: 0.5 * ((y - data) ** 2).sum(), implicit.prox_l1(lambda data, weight: weight)
        ... )
        >>> @implicit.custom_root(lasso)
        ... def denoise(init, data, weight):
        ...     return implicit.soft_threshold(data, weight)
        >>> data, weight = torch.tensor([3.0, 0.5]), torch.tensor(1.0)
        >>> torch.func.jacrev(lambda w: denoise(torch.zeros(2), data, w))(weight)
        tensor([-1., 0.])
    """
    _check_step("step", step)
    slope = stationary(smooth)

    def iteration(y: Tree, *theta: Any) -> Tree:
        return prox(tree.axpy(-step, slope(y, *theta), y), step, *theta)

    return fixed_point(iteration)


def projected_gradient(smooth: Objective, project: Callable[..., Tree], step: float = 1.0) -> Residual:
    """``project(y - step grad f(y)) - y``, for a minimizer of f over a convex set.

    Args:
        smooth: f(y, *theta), a scalar.
        project: project(v, *theta), the Euclidean projection; for a set without parameters
            ``lambda v, *_: set.project(v)``.
        step: positive.
    """
    return proximal_gradient(smooth, lambda v, _, *theta: project(v, *theta), step)


def mirror_descent(
    smooth: Objective,
    project: Callable[..., Tree],
    mirror_map: Callable[[Tree], Tree],
    step: float = 1.0,
) -> Residual:
    """``project(mirror_map(y) - step grad f(y)) - y``, for a minimizer of f over a convex set.

    Args:
        smooth: f(y, *theta), a scalar.
        project: project(z, *theta), the Bregman projection ``argmin_u phi(u) - <z, u>`` over the set.
        mirror_map: the gradient of phi.
        step: positive.
    """
    _check_step("step", step)
    slope = stationary(smooth)

    def iteration(y: Tree, *theta: Any) -> Tree:
        return project(tree.axpy(-step, slope(y, *theta), mirror_map(y)), *theta)

    return fixed_point(iteration)


def entropic_mirror_descent(smooth: Objective, step: float = 1.0, dim: int = -1) -> Residual:
    """``softmax(log y - step grad f(y)) - y``: mirror descent with the entropy, for a minimizer over the simplex.

    Every leaf of y holds probabilities along ``dim``, all of them positive: at a face of the simplex the map is not
    defined, and :func:`projected_gradient` is the one to use.

    Args:
        smooth: f(y, *theta), a scalar.
        step: positive.
        dim: the axis that sums to one.
    """

    def project(z: Tree, *theta: Any) -> Tree:
        return tree.map(lambda leaf: torch.softmax(leaf, dim), z)

    return mirror_descent(smooth, project, lambda y: tree.map(torch.log, y), step)


def block_proximal_gradient(smooth: Objective, prox: Tree, step: Tree = 1.0) -> Residual:
    """``prox_j(y_j - step_j grad_j f(y), step_j) - y_j`` for every block j, as in block coordinate descent.

    Args:
        smooth: f(y, *theta), a scalar; the leaves of y are the blocks.
        prox: a tree with the structure of y of functions prox_j(v, step, *theta).
        step: one positive number for all blocks, or a tree of them with the structure of y.

    Example:
        >>> import torch, implicit
        >>> residual = implicit.optimality.block_proximal_gradient(
        ...     lambda y, a: 0.5 * ((y["u"] - a) ** 2).sum() + 0.5 * ((y["v"] + a) ** 2).sum(),
        ...     prox={"u": implicit.prox_l1(1.0), "v": lambda v, step, a: v.clamp(min=0)},
        ...     step={"u": 0.5, "v": 2.0},
        ... )
        >>> residual({"u": torch.tensor(2.0), "v": torch.tensor(0.0)}, torch.tensor(3.0))
        {'u': tensor(0.), 'v': tensor(0.)}
    """
    for path, value in zip(tree.paths(step), tree.leaves(step), strict=True):
        _check_step(f"step{path}", value)
    slope = stationary(smooth)

    def iteration(y: Tree, *theta: Any) -> Tree:
        def move(block: Tensor, g: Tensor, operator: Callable[..., Tensor], length: Any) -> Tensor:
            return operator(block - length * g, length, *theta)

        lengths = tree.map(lambda _: step, y) if isinstance(step, float | int) else step
        return tree.map(move, y, slope(y, *theta), prox, lengths)

    return fixed_point(iteration)


class KKTPoint(NamedTuple):
    """A primal point with its multipliers; a pytree.

    Attributes:
        y: the primal variables.
        equality: one multiplier for each entry of the equality constraints, with their structure.
        inequality: one multiplier >= 0 for each entry of the inequality constraints, with their structure.
    """

    y: Tree
    equality: Tree = ()
    inequality: Tree = ()


def kkt(
    objective: Objective, equality: Callable[..., Tree] | None = None, inequality: Callable[..., Tree] | None = None
) -> Residual:
    """The Karush-Kuhn-Tucker conditions of ``min g(y)`` subject to ``h(y) = 0`` and ``c(y) <= 0``.

    With the Lagrangian ``L = g + <equality, h> + <inequality, c>``, on a :class:`KKTPoint`:

        F = (grad_y L,  h(y),  inequality * c(y)).

    The signs ``c <= 0`` and ``inequality >= 0`` are no part of F. The derivative of F is symmetric without inequality
    constraints, and singular where a constraint and its multiplier are both zero (strict complementarity fails).

    Args:
        objective: g(y, *theta), a scalar.
        equality: h(y, *theta), any tree of tensors, or None.
        inequality: c(y, *theta), any tree of tensors, or None.
    """

    def residual(point: KKTPoint, *theta: Any) -> KKTPoint:
        y, nu, lam = point
        h = equality(y, *theta) if equality is not None else ()
        c = inequality(y, *theta) if inequality is not None else ()
        slope = stationary(lambda q, *t: lagrangian(objective, equality, inequality, KKTPoint(q, nu, lam), *t))
        return KKTPoint(slope(y, *theta), h, tree.map(lambda a, b: a * b, c, lam))

    return residual


def lagrangian(
    objective: Objective,
    equality: Callable[..., Tree] | None,
    inequality: Callable[..., Tree] | None,
    point: KKTPoint,
    *theta: Any,
) -> Tensor:
    """``g(y) + <equality, h(y)> + <inequality, c(y)>``, a scalar."""
    value = objective(point.y, *theta)
    for constraint, multiplier in ((equality, point.equality), (inequality, point.inequality)):
        if constraint is not None:
            parts = tree.map(lambda a, b: (a * b).sum(), constraint(point.y, *theta), multiplier)
            value = value + sum(tree.leaves(parts))
    return value


def _check_step(name: str, step: Any) -> None:
    if not isinstance(step, float | int) or not 0 < step < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {step!r}")
