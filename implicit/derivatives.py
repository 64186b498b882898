"""First and second derivatives of objectives over pytrees.

Two forms, chosen by cost. :class:`GradientGraph` keeps one eager backward pass alive and answers many products at
about 1.5 gradients each. :func:`hvp`, :func:`mixed_vjp` and :func:`joint_product` are single products written with
``torch.func``; they compose with its transforms and can be differentiated again.

Conventions: ``g(x, y)`` is a scalar; ``mixed_vjp`` is :math:`\\nabla^2_{xy} g\\, v`, the gradient in x of
:math:`\\langle \\nabla_y g(x, y), v \\rangle` with v held fixed; the joint product adds
:math:`\\nabla^2_{yy} g\\, v` from the same reverse pass.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from implicit import tree
from implicit.differentiability import evaluate, explain, missing, traffic
from implicit.recorded import Recorded, Unrecordable
from implicit.transforms import batched as batched_call
from implicit.tree import Tree

ScalarFunction = Callable[..., Tensor]


def require_scalar(value: object, name: str) -> Tensor:
    """``value`` as a 0-d tensor.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it holds more than one number.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a scalar tensor, got {type(value).__name__}; return a torch.Tensor")
    if value.numel() != 1:
        raise ValueError(
            f"{name} must return a scalar, got shape {tuple(value.shape)}; reduce it with .mean() or .sum()"
        )
    return value.reshape(())


def value_and_gradient(fn: ScalarFunction, y: Tree, name: str = "the objective") -> tuple[Tensor, Tree]:
    """``fn(y)`` and its gradient, both detached. Leaves that do not enter get zeros."""
    variables = tree.variables(y)
    with torch.enable_grad():
        value = require_scalar(fn(variables), name)
        gradient = _gradients(value, variables, create_graph=False)
    return value.detach(), gradient


def value_and_gradients(fn: ScalarFunction, x: Tree, y: Tree, name: str = "the objective") -> tuple[Tensor, Tree, Tree]:
    """``fn(x, y)``, its gradient in x and its gradient in y, detached, from one pass."""
    value, (gradient_x, gradient_y) = value_and_gradient(lambda both: fn(*both), (x, y), name)
    return value, gradient_x, gradient_y


def _gradients(value: Tensor, variables: Tree, *, create_graph: bool) -> Tree:
    own, spec = tree.flatten(variables)
    if not value.requires_grad:  # constant in every variable
        return tree.zeros_like(tree.detach(variables))
    found = torch.autograd.grad(value, own, create_graph=create_graph, materialize_grads=True)
    return tree.unflatten(found, spec)


class GradientGraph:
    """One evaluation of ``g(x, y)`` with its gradient in y, kept for second-order products.

    Attention whose kernel has no second derivative is evaluated on the MATH kernel, cuDNN's recurrent layers without
    cuDNN; ``notes`` says so.

    Attributes:
        value: ``g(x, y)``, detached.
        gradient: :math:`\\nabla_y g(x, y)`, detached, with the structure of y.
        products: how many second-order products were asked for.
        passes: backward passes run for them; several products can share one.
        notes: sentences about the evaluation.
        active: which leaves of the gradient depend on x or y; the others have no second derivatives.

    The graph holds one forward and one backward pass in memory until the object is dropped. Products raise ValueError
    with the reason where torch has no second derivative of the objective or a wrong one (:attr:`obstacle`).
    """

    def __init__(self, fn: ScalarFunction, x: Tree, y: Tree, name: str = "the lower objective") -> None:
        self.x = tree.variables(x)
        self.y = tree.variables(y)
        self.products = self.passes = 0
        evaluation = evaluate(lambda: require_scalar(fn(self.x, self.y), name), tree.leaves(self.y))
        self.notes, self._refused = evaluation.notes, evaluation.obstacle
        with torch.enable_grad():
            self._gradient = _gradients(evaluation.value, self.y, create_graph=True)
        self.value = evaluation.value.detach()
        self.gradient = tree.detach(self._gradient)
        # The gradient is a tuple of outputs; those without a graph (linear in y) contribute zero.
        outputs = tree.leaves(self._gradient)
        self.active = [i for i, o in enumerate(outputs) if o.requires_grad]
        self._outputs = [outputs[i] for i in self.active]
        self.recorded: Recorded | None = None
        self.unrecordable: str | None = None

    @functools.cached_property
    def obstacle(self) -> str | None:
        """Why second-order products fail or would be wrong, with the cure; None if nothing is known."""
        return self._refused or missing(o.grad_fn for o in self._outputs)

    @functools.cached_property
    def traffic(self) -> int:
        """Bytes of the cotangents that flow through the graph in one product."""
        return traffic(o.grad_fn for o in self._outputs)

    def record(self) -> None:
        """Record products in y once: ``recorded`` maps active cotangents to their leaves without autograd.

        ``unrecordable`` says why that is not possible. The record is checked against a product on the graph.
        """
        own = tree.leaves(self.y)
        probes = [
            [torch.linspace(start, end, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in self._outputs]
            for start, end in ((-1.0, 2.0), (1.5, -0.75))
        ]
        try:
            recorded = Recorded(lambda *v: self.differentiate(v, own), probes[0])
        except Unrecordable as error:
            self.unrecordable = str(error)
            return
        for found, expected in zip(recorded(*probes[1]), self.differentiate(probes[1], own), strict=True):
            if expected is not None and expected.numel():
                # Entry by entry: what was missed may be small beside the rest of its leaf.
                eps, size = torch.finfo(expected.dtype).eps, expected.abs()
                if not bool(((found - expected).abs() <= eps**0.5 * size + 64 * eps * size.amax()).all()):
                    self.unrecordable = "the backward pass does more than a fixed list of operations"
                    return
        self.recorded = recorded

    def differentiate(self, cotangents: Sequence[Tensor], wrt: Sequence[Tensor], batched: bool = False) -> Any:
        """Gradients of ``<gradient, cotangents>`` in ``wrt``, leaf by leaf; None where one is zero.

        Args:
            cotangents: one per active leaf of the gradient.
            wrt: leaves of ``x`` or ``y``.
            batched: whether the cotangents, and then the results, carry a leading axis.
        """
        if self._refused:
            raise ValueError(self._refused)
        self.passes += 1
        if not self._outputs or not wrt:
            return [None] * len(wrt)

        def pull(*own: Tensor) -> Any:
            return torch.autograd.grad(self._outputs, wrt, own, retain_graph=True, allow_unused=True)

        def filled(*own: Tensor) -> Any:
            return tuple(torch.zeros_like(w) if f is None else f for f, w in zip(pull(*own), wrt, strict=True))

        try:
            return batched_call(filled, *cotangents) if batched else pull(*cotangents)
        except RuntimeError as error:
            if (reason := explain(error)) is None:
                raise
            raise ValueError(reason) from error

    def _product(self, wrt: Tree, v: Tree, *, batched: bool = False) -> Tree:
        cotangents = tree.aligned_leaves(v, tree.structure(self.gradient))
        own, spec = tree.flatten(wrt)
        lead = (cotangents[0].shape[0],) if batched and cotangents else ()
        self.products += lead[0] if lead else 1
        found = self.differentiate([cotangents[i] for i in self.active], own, batched)
        filled = [f if f is not None else o.new_zeros((*lead, *o.shape)) for f, o in zip(found, own, strict=True)]
        return tree.unflatten([f.detach() for f in filled], spec)

    def hvp(self, v: Tree) -> Tree:
        """:math:`\\nabla^2_{yy} g\\, v`, with the structure of y."""
        return self._product(self.y, v)

    def hvp_batch(self, vectors: Tree) -> Tree:
        """Products with k vectors at once; leaves of shape ``(k, *leaf.shape)`` in and out."""
        return self._product(self.y, vectors, batched=True)

    def mixed_vjp(self, v: Tree) -> Tree:
        """:math:`\\nabla^2_{xy} g\\, v`, with the structure of x."""
        return self._product(self.x, v)

    def joint(self, v: Tree) -> tuple[Tree, Tree]:
        """:math:`(\\nabla^2_{xy} g\\, v, \\nabla^2_{yy} g\\, v)` from one reverse pass."""
        return self._product((self.x, self.y), v)


def vjp(fn: Callable[..., Any], *points: Any) -> tuple[Any, Callable[..., Any]]:
    """Value and pullback of ``fn`` at ``points``, as ``torch.func.vjp``; attention runs on the MATH kernel.

    Raises:
        ValueError: if ``torch.func`` refuses the function, with the cure where one is known.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):  # fn may be a gradient, and no other kernel can be differentiated twice
            found = torch.func.vjp(fn, *points)
    except RuntimeError as error:
        if (reason := explain(error)) is None:
            raise
        raise ValueError(reason) from error
    return found[0], found[1]


def hvp(fn: ScalarFunction, y: Tree, v: Tree) -> Tree:
    """:math:`\\nabla^2 \\mathrm{fn}(y)\\, v` by reverse over reverse with ``torch.func``; differentiable again."""
    _, pullback = vjp(torch.func.grad(fn), y)
    return pullback(_match(v, y))[0]


def mixed_vjp(fn: ScalarFunction, x: Tree, y: Tree, v: Tree) -> Tree:
    """:math:`\\nabla^2_{xy} \\mathrm{fn}(x, y)\\, v` with ``torch.func``; differentiable again."""
    _, pullback = vjp(lambda p: torch.func.grad(fn, argnums=1)(p, y), x)
    return pullback(_match(v, y))[0]


def joint_product(fn: ScalarFunction, x: Tree, y: Tree, v: Tree) -> tuple[Tree, Tree]:
    """:math:`(\\nabla^2_{xy}\\, v, \\nabla^2_{yy}\\, v)` of ``fn(x, y)`` from one reverse pass with ``torch.func``."""
    _, pullback = vjp(torch.func.grad(fn, argnums=1), x, y)
    product_x, product_y = pullback(_match(v, y))
    return product_x, product_y


def _match(v: Tree, like: Tree) -> Tree:
    # torch.func.vjp compares structures literally; a dict in another key order is the same tree to us.
    return tree.map(lambda _, leaf: leaf, like, v)
