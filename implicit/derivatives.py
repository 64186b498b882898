"""First and second derivatives of objectives over pytrees.

Two forms, chosen by cost. :class:`GradientGraph` keeps one eager backward pass alive and answers many products at
about 1.5 gradients each. :func:`hvp`, :func:`mixed_vjp` and :func:`joint_product` are single products written with
``torch.func``; they compose with its transforms and can be differentiated again.

Conventions: ``g(x, y)`` is a scalar; ``mixed_vjp`` is :math:`\\nabla^2_{xy} g\\, v`, the gradient in x of
:math:`\\langle \\nabla_y g(x, y), v \\rangle` with v held fixed; the joint product adds
:math:`\\nabla^2_{yy} g\\, v` from the same reverse pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit import tree
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

    Attributes:
        value: ``g(x, y)``, detached.
        gradient: :math:`\\nabla_y g(x, y)`, detached, with the structure of y.
        products: how many second-order products were asked for.

    The graph holds one forward and one backward pass in memory until the object is dropped.
    """

    def __init__(self, fn: ScalarFunction, x: Tree, y: Tree, name: str = "the lower objective") -> None:
        self.x = tree.variables(x)
        self.y = tree.variables(y)
        self.products = 0
        with torch.enable_grad():
            value = require_scalar(fn(self.x, self.y), name)
            self._gradient = _gradients(value, self.y, create_graph=True)
        self.value = value.detach()
        self.gradient = tree.detach(self._gradient)

    def _product(self, wrt: Tree, v: Tree, *, batched: bool = False) -> Tree:
        # The gradient is a tuple of outputs; those without a graph (linear in y) contribute zero.
        outputs, spec = tree.flatten(self._gradient)
        cotangents = tree.aligned_leaves(v, spec)
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        own, wrt_spec = tree.flatten(wrt)
        self.products += cotangents[0].shape[0] if batched and cotangents else 1
        if not pairs or not own:
            return tree.map(lambda leaf: leaf.new_zeros((*self._lead(cotangents, batched), *leaf.shape)), wrt)
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            own,
            grad_outputs=[c for _, c in pairs],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        lead = self._lead(cotangents, batched)
        filled = [f if f is not None else o.new_zeros((*lead, *o.shape)) for f, o in zip(found, own, strict=True)]
        return tree.unflatten([f.detach() for f in filled], wrt_spec)

    @staticmethod
    def _lead(cotangents: list[Tensor], batched: bool) -> tuple[int, ...]:
        return (cotangents[0].shape[0],) if batched and cotangents else ()

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
    """Value and pullback of ``fn`` at ``points``, as ``torch.func.vjp``."""
    found = torch.func.vjp(fn, *points)
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
