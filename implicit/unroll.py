"""Differentiating through the steps of a lower-level optimizer instead of through its solution.

With :math:`y_{t+1} = \\Phi_t(x, y_t)`, the unrolled hypergradient is that of :math:`f(x, y_T(x))`: exact for the map
that was run, and biased against :math:`f(x, y^*(x))` by as much as the steps have not forgotten. Memory grows with the
steps that are differentiated, unless they are checkpointed (square root) or differentiated forwards (flat).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.curvature import lanczos
from implicit.derivatives import GradientGraph, ScalarFunction, require_scalar
from implicit.differentiability import foreign_leaf
from implicit.inner_optimizers import SGD, InnerOptimizer
from implicit.linear_solvers.base import check_positive_int
from implicit.operators import Hessian
from implicit.tree import Structure, Tree

Step = Callable[[Tree, Tree, int], Tree]
"""``step(x, y, t) -> y``: one step of a method, differentiable in x and y."""
Batches = Sequence[Any] | Callable[[int], Any]
"""What the lower objective receives as ``batch`` in step t: ``batches[t]`` or ``batches(t)``."""


def unroll_map(
    step: Step,
    x: Tree,
    y0: Tree,
    *,
    steps: int,
    truncation: int | None = None,
    checkpointing: bool | int = False,
) -> Tree:
    """The point that ``steps`` steps of any differentiable map lead to, as a differentiable function of x and y0.

    Args:
        step: ``step(x, y, t)`` returns the next y, t counting from zero. With checkpointing it is called again for the
            same t, and must then do the same.
        x: parameters of the map, any pytree.
        y0: the start, any pytree of tensors; may have a graph of its own.
        steps: T, how many.
        truncation: differentiate the last K steps only, as if y had been given before them; None for all.
        checkpointing: keep y every n-th step only and repeat the steps between when differentiating: n states and one
            stretch of n steps in memory, for about one more forward pass. True takes n near ``sqrt(T)``.

    Returns:
        y after T steps, with the structure of y0. Differentiable to any order.

    Raises:
        ValueError: if ``steps``, ``truncation`` or ``checkpointing`` is out of range; with checkpointing, if the map
            captures a tensor that requires a gradient (it would get none).

    Example:
        >>> import torch, implicit
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> implicit.unroll_map(lambda x, y, t: 0.5 * (y + x / y), x, torch.tensor(1.0), steps=6).backward()
        >>> x.grad                                   # Heron's square root: 1 / (2 sqrt(3))
        tensor(0.2887)
    """
    kept = kept_steps(steps, truncation)
    length = _segment_length(checkpointing, kept)
    y = y0
    if kept < steps:
        frozen, y = tree.detach(x), tree.detach(y)
        for t in range(steps - kept):
            y = tree.detach(step(frozen, y, t))
    if length is None:
        for t in range(steps - kept, steps):
            y = step(x, y, t)
        return y
    _refuse_captures(step, x, y, steps - kept)
    for first in range(steps - kept, steps, length):
        y = _run_segment(step, x, y, range(first, min(first + length, steps)))
    return y


def kept_steps(steps: int, truncation: int | None) -> int:
    """How many of the steps are differentiated."""
    check_positive_int(steps, "steps")
    if truncation is None:
        return steps
    check_positive_int(truncation, "truncation", "None or ")
    return min(truncation, steps)


def _segment_length(checkpointing: bool | int, kept: int) -> int | None:
    if checkpointing is False:
        return None
    if checkpointing is True:
        return math.isqrt(kept - 1) + 1
    check_positive_int(checkpointing, "checkpointing", "True, False or ")
    return checkpointing


@dataclass(frozen=True)
class _Segment:
    """Consecutive steps as a function of the tensors of x and y."""

    step: Step
    x_spec: Structure
    x_count: int
    y_spec: Structure
    times: range

    def run(self, tensors: Sequence[Any]) -> list[Tensor]:
        x = tree.unflatten(tensors[: self.x_count], self.x_spec)
        y = tree.unflatten(tensors[self.x_count :], self.y_spec)
        for t in self.times:
            y = self.step(x, y, t)
        return tree.aligned_leaves(y, self.y_spec)


class _Checkpointed(torch.autograd.Function):
    """A segment that keeps its inputs alone and runs again when differentiated."""

    @staticmethod
    def forward(ctx: Any, segment: _Segment, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.segment = segment
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():  # the step takes gradients
            return tuple(segment.run([t.detach() for t in tensors]))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        again = torch.is_grad_enabled()  # whether this pass will be differentiated itself
        wanted = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [
                (t.view_as(t) if again else t.detach().requires_grad_()) if need else t.detach()
                for t, need in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            outputs = ctx.segment.run(inputs)
            pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
            own = [t for t, need in zip(inputs, wanted, strict=True) if need]
            found = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    own,
                    [c for _, c in pairs],
                    create_graph=again,
                    materialize_grads=True,
                )
                if pairs
                else [torch.zeros_like(t) for t in own]
            )
        return (None, *[next(found) if need else None for need in wanted])


def _run_segment(step: Step, x: Tree, y: Tree, times: range) -> Tree:
    own, x_spec = tree.flatten(x)
    state, y_spec = tree.flatten(y)
    segment = _Segment(step, x_spec, len(own), y_spec, times)
    return tree.unflatten(_Checkpointed.apply(segment, *own, *state), y_spec)


def _refuse_captures(step: Step, x: Tree, y: Tree, t: int) -> None:
    """A gradient of a tensor that the step captures is lost when the step is repeated in isolation: say so."""
    with torch.enable_grad():
        x, y = tree.variables(x), tree.variables(y)
        captured = foreign_leaf(tree.leaves(step(x, y, t)), tree.leaves((x, y)))
    if captured is not None:
        raise ValueError(
            f"the lower level captures a tensor of shape {tuple(captured.shape)} that requires a gradient, and "
            "checkpointing would lose that gradient: put the tensor into x, detach it, or use checkpointing=False"
        )


@dataclass(frozen=True)
class Descent:
    """One optimizer step on a lower objective; the carry is ``(y, buffers)``."""

    lower: ScalarFunction
    optimizer: InnerOptimizer | Callable[[Tree], InnerOptimizer]
    batches: Batches | None
    first_order: bool
    functional: bool

    def start(self, x: Tree, y: Tree) -> Tree:
        """The first carry."""
        return y, self._method(x).init(y)

    def __call__(self, x: Tree, carry: Tree, t: int) -> Tree:
        y, buffers = carry
        options = {} if self.batches is None else {"batch": _batch(self.batches, t)}

        def objective(q: Tree) -> Tensor:
            return require_scalar(self.lower(x, q, **options), "the lower objective")

        gradient = torch.func.grad(objective)(y) if self.functional else _gradient(objective, x, y)
        if self.first_order:
            gradient = tree.detach(gradient)
        return self._method(x).update(gradient, buffers, y, t)

    def _method(self, x: Tree) -> InnerOptimizer:
        return self.optimizer if isinstance(self.optimizer, InnerOptimizer) else self.optimizer(x)


def _gradient(objective: Callable[[Tree], Tensor], x: Tree, y: Tree) -> Tree:
    """The gradient at y, with a graph if anything upstream has one."""
    alive = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in _tensors((x, y)))
    with torch.enable_grad():
        # Views of its own: y may be a leaf of x itself, or upstream of one.
        q = tree.map(lambda leaf: leaf.view_as(leaf) if alive and leaf.requires_grad else _variable(leaf), y)
        value = objective(q)
        if not value.requires_grad:
            return tree.zeros_like(tree.detach(y))
        own, spec = tree.flatten(q)
        found = torch.autograd.grad(value, own, create_graph=alive, allow_unused=True)
    # Zeros made by autograd itself would be leaves that require gradients.
    return tree.unflatten([torch.zeros_like(o) if g is None else g for g, o in zip(found, own, strict=True)], spec)


def _variable(leaf: Tensor) -> Tensor:
    return leaf.detach().requires_grad_()


def _tensors(value: Tree) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(value) if isinstance(leaf, Tensor)]


def _batch(batches: Batches, t: int) -> Any:
    return batches(t) if callable(batches) else batches[t]


def unroll(
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
    functional: bool = False,
) -> Tree:
    """y after ``steps`` steps of an optimizer on g(x, y), as a differentiable function of x (and of y0).

    Args:
        lower: g(x, y), a scalar; with ``batches`` it is called as ``lower(x, y, batch=...)``.
        x: upper variable, any pytree; leaves that require gradients receive them.
        y0: the start: a tree, with or without a graph, or a function of x that makes one (MAML: x is the start).
        steps: T, how many.
        optimizer: :class:`SGD`, :class:`Adam`, :class:`RMSprop`, :class:`Adagrad`, or a function of x that makes one,
            where step sizes are part of x; None means ``SGD(lr=1 / L)`` with L the ceiling of a Lanczos run on
            :math:`g_{yy}` at y0, a number without a gradient.
        batches: what step t receives as ``batch``: a sequence with at least T items, or a function of t.
        truncation: differentiate the last K steps only; None for all. See :func:`unroll_map`.
        checkpointing: keep every n-th point only (True: n near ``sqrt(T)``) and repeat the steps between. See
            :func:`unroll_map`.
        first_order: treat the gradients of g as constants (first-order MAML): x then acts through y0 and the
            optimizer alone.
        functional: take gradients by ``torch.func``, so that the whole composes with ``torch.func.vmap`` over tasks
            and with forward mode; slower by about 0.2 ms a step.

    Returns:
        y, with the structure of y0; differentiable to any order.

    Raises:
        TypeError: if ``optimizer`` is neither an optimizer nor a function that makes one.
        ValueError: if a number is out of range, ``batches`` is too short, or the optimizer is left out where the
            curvature cannot be measured.

    Example:
        One step of MAML: x is the start, f is evaluated after the step.

        >>> import torch, implicit
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> y = implicit.unroll(lambda x, y: y**2, x, lambda x: x, steps=1, optimizer=implicit.SGD(lr=0.1))
        >>> (y**2).backward()
        >>> x.grad                                   # 2 x (1 - 0.2)^2
        tensor(2.5600)
    """
    start = y0(x) if callable(y0) else y0
    method = descent(lower, x, start, steps, optimizer, batches, first_order=first_order, functional=functional)
    carry = unroll_map(
        method, x, method.start(x, start), steps=steps, truncation=truncation, checkpointing=checkpointing
    )
    return carry[0]


def descent(
    lower: ScalarFunction,
    x: Tree,
    y0: Tree,
    steps: int,
    optimizer: InnerOptimizer | Callable[[Tree], InnerOptimizer] | None,
    batches: Batches | None,
    *,
    first_order: bool,
    functional: bool,
) -> Descent:
    """The optimizer's step on ``lower``, checked; see :func:`unroll`."""
    if isinstance(batches, Sequence) and len(batches) < steps:
        raise ValueError(f"batches holds {len(batches)} items, {steps} steps need as many; or pass a function of t")
    if optimizer is None:
        if batches is not None:
            raise ValueError("optimizer must be given with batches: curvature is measured on the full objective only")
        optimizer = SGD(lr=_measured_step(lower, x, y0))
    if not isinstance(optimizer, InnerOptimizer) and (isinstance(optimizer, type) or not callable(optimizer)):
        raise TypeError(f"optimizer must be one such as SGD(lr=0.1), or a function x -> optimizer, got {optimizer!r}")
    return Descent(lower, optimizer, batches, first_order, functional)


def _measured_step(lower: ScalarFunction, x: Tree, y0: Tree) -> float:
    ceiling = lanczos(Hessian.of(GradientGraph(lower, x, y0))).ceiling
    if not ceiling > 0:
        raise ValueError("g has no positive curvature at y0, so no step size follows from it: give an optimizer")
    return 1.0 / ceiling
