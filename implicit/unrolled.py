"""Hypergradients through an unrolled lower level, in reverse or forward mode, with their measured bias.

Sources: Maclaurin, Duvenaud and Adams 2015; Franceschi et al. 2017 (both modes); Shaban et al. 2019 (truncation); Finn,
Abbeel and Levine 2017 (MAML).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from implicit import tree
from implicit.derivatives import GradientGraph, ScalarFunction, require_scalar, value_and_gradients
from implicit.hypergradient import HypergradientAccuracy, measure_accuracy, warn_if_inaccurate
from implicit.inner_optimizers import InnerOptimizer
from implicit.linear_solvers import CG, LinearSolver
from implicit.operators import Hessian
from implicit.tree import Tree
from implicit.unroll import Batches, descent, kept_steps, unroll


@dataclass(frozen=True)
class UnrolledHypergradient:
    """The hypergradient through an unrolled lower level.

    Attributes:
        value: the gradient of f(x, y_T(x)), shaped like x.
        upper_value: f(x, y_T).
        y: y_T.
        accuracy: how far ``value`` is from the implicit hypergradient at the lower solution, in the same terms as for
            :func:`implicit.hypergradient`; ``linear_residual`` is that of the reference. None unless asked for.
    """

    value: Tree
    upper_value: float
    y: Tree
    accuracy: HypergradientAccuracy | None = None


def unrolled(
    upper: ScalarFunction,
    lower: ScalarFunction,
    x: Tree,
    y0: Tree | Callable[[Tree], Tree],
    *,
    steps: int,
    optimizer: InnerOptimizer | Callable[[Tree], InnerOptimizer] | None = None,
    batches: Batches | None = None,
    truncation: int | None = None,
    checkpointing: bool | int = False,
    first_order: bool = False,
    mode: Literal["reverse", "forward"] = "reverse",
    accuracy: bool = True,
    reference: ScalarFunction | None = None,
    linear_solver: LinearSolver | None = None,
) -> UnrolledHypergradient:
    """The gradient of f(x, y_T(x)) with y_T from ``steps`` optimizer steps, and its distance from the implicit one.

    Args:
        upper: f(x, y), a scalar.
        lower, y0, steps, optimizer, batches, truncation, checkpointing, first_order: as for :func:`unroll`.
        x: upper variable, any pytree of floating tensors.
        mode: ``"reverse"``: one pass back, memory grows with T. ``"forward"``: the derivative of y with respect to
            every entry of x is carried along: memory and time for as many copies of y as x has entries, whatever T.
        accuracy: measure the error against the hypergradient at the lower solution: three linear solves. Leave it out
            where the T steps *are* the lower level, as in MAML.
        reference: the lower objective whose solution counts; needed with ``batches``, else ``lower``.
        linear_solver: for the reference; ``CG()`` by default.

    Returns:
        The hypergradient; a tree y0 is taken as constant.

    Raises:
        TypeError, ValueError: see :func:`unroll`; and for combinations that contradict one another.

    Warns:
        ConvergenceWarning: if ``accuracy`` and the error exceeds one per cent of the hypergradient: too few steps.

    Example:
        >>> import torch, implicit
        >>> x = torch.tensor(2.0)
        >>> h = implicit.unrolled(lambda x, y: y.sum(), lambda x, y: ((y - x) ** 2).sum(), x, torch.zeros(3), steps=1)
        >>> h.value                                  # a step of length 1 / L solves this
        tensor(3.)
    """
    if mode not in ("reverse", "forward"):
        raise ValueError(f"mode must be 'reverse' or 'forward', got {mode!r}")
    if mode == "forward" and (checkpointing or first_order):
        raise ValueError("checkpointing and first_order belong to mode='reverse'; forward mode keeps no graph")
    if accuracy and batches is not None and reference is None:
        raise ValueError("with batches, give the full lower objective as reference, or accuracy=False")
    start = y0 if callable(y0) else _constant(tree.detach(y0))
    options: dict[str, Any] = {"steps": steps, "optimizer": optimizer, "batches": batches, "truncation": truncation}
    if mode == "forward":
        y, value, found = _forward(upper, lower, x, start, **options)
    else:
        p = tree.variables(x)
        with torch.enable_grad():
            q = unroll(lower, p, start, checkpointing=checkpointing, first_order=first_order, **options)
            value = require_scalar(upper(p, q), "the upper objective")
            found = _pull(value, p)
        y = tree.detach(q)
    report = None
    if accuracy:
        report = _accuracy(upper, reference or lower, x, y, found, linear_solver or CG())
        warn_if_inaccurate(found, y, report, cause=BIASED)
    return UnrolledHypergradient(found, float(value.detach()), y, report)


BIASED = (
    "the steps have not reached the lower solution (lower residual {:.3g}), or too few of them were differentiated; "
    "take more, or use accuracy=False if the steps themselves are the lower level"
)


def _constant(y: Tree) -> Callable[[Tree], Tree]:
    return lambda x: y


def _pull(value: Tensor, x: Tree) -> Tree:
    own, spec = tree.flatten(x)
    if not value.requires_grad:
        return tree.zeros_like(tree.detach(x))
    return tree.unflatten(torch.autograd.grad(value, own, materialize_grads=True), spec)


def _forward(
    upper: ScalarFunction,
    lower: ScalarFunction,
    x: Tree,
    start: Callable[[Tree], Tree],
    *,
    steps: int,
    optimizer: InnerOptimizer | Callable[[Tree], InnerOptimizer] | None,
    batches: Batches | None,
    truncation: int | None,
) -> tuple[Tree, Tensor, Tree]:
    """y_T, f and the gradient, with the Jacobian of the carry in x carried along."""
    x = tree.detach(x)
    y = tree.detach(start(x))
    method = descent(lower, x, y, steps, optimizer, batches, first_order=False, functional=True)
    carry, spec = tree.flatten(method.start(x, y))
    flat = tree.ravel(x)
    basis = torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device)
    jacobian = [leaf.new_zeros(len(basis), *leaf.shape) for leaf in carry]

    def begin(p: Tensor) -> tuple[Tensor, ...]:
        q = tree.unravel(p, x)
        return tuple(tree.aligned_leaves(method.start(q, start(q)), spec))

    def advance(t: int, p: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree.aligned_leaves(method(tree.unravel(p, x), tree.unflatten(values, spec), t), spec))

    head = steps - kept_steps(steps, truncation)
    if head == 0:
        carry, jacobian = _push(begin, (flat,), (basis,))
    for t in range(head):
        carry = [leaf.detach() for leaf in advance(t, flat, *carry)]
    for t in range(head, steps):
        carry, jacobian = _push(partial(advance, t), (flat, *carry), (basis, *jacobian))
    y = tree.unflatten(carry, spec)[0]
    tangents = tree.unflatten(jacobian, spec)[0]
    value, gradient_x, gradient_y = value_and_gradients(upper, x, y, "the upper objective")
    own, y_spec = tree.flatten(tangents)
    pairs = zip(own, tree.aligned_leaves(gradient_y, y_spec), strict=True)
    implied = sum((j.reshape(len(basis), -1) @ g.reshape(-1) for j, g in pairs), torch.zeros_like(flat))
    return y, value, tree.add(gradient_x, tree.unravel(implied, x))


def _push(
    fn: Callable[..., tuple[Tensor, ...]], points: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Values of ``fn`` and their derivatives along tangents stacked on a leading axis."""

    def along(*direction: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        value, derivative = torch.func.jvp(fn, points, direction)[:2]
        return value, derivative

    batched: Any = torch.func.vmap  # its stub has no place for outputs without a batch axis
    values, derivatives = batched(along, out_dims=(None, 0))(*tangents)
    return [v.detach() for v in values], [d.detach() for d in derivatives]


def _accuracy(
    upper: ScalarFunction, lower: ScalarFunction, x: Tree, y: Tree, found: Tree, solver: LinearSolver
) -> HypergradientAccuracy:
    """Against the implicit hypergradient after one Newton correction of y."""
    graph = GradientGraph(lower, x, y)
    _, _, gradient_y = value_and_gradients(upper, x, y, "the upper objective")
    linear = solver.solve(Hessian.of(graph), gradient_y)
    return measure_accuracy(upper, lower, x, y, graph, found, linear, solver)
