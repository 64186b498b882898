"""Mixed second derivatives of an objective as rectangular operators."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from implicit import tree
from implicit.derivatives import ScalarFunction, require_scalar
from implicit.operators.base import LinearOperator
from implicit.operators.jacobian import Jacobian
from implicit.tree import Tree


class MixedDerivative(LinearOperator):
    """:math:`\\nabla^2_{xy} g(x, y)`, from trees shaped like y to trees shaped like x.

    .. math:: v \\mapsto \\nabla_x \\langle \\nabla_y g(x, y), v \\rangle, \\qquad
              \\text{transposed: } w \\mapsto \\nabla_y \\langle \\nabla_x g(x, y), w \\rangle .

    In an implicit hypergradient this operator maps the adjoint to x; its transpose maps a change of x to the change of
    the lower gradient, as forward mode needs. Each direction keeps one graph of its own, built at its first product.

    Args:
        g: the objective g(x, y), a scalar.
        x: first variable, any pytree.
        y: second variable, any pytree.

    Raises:
        TypeError, ValueError: at the first product, if g does not return a scalar tensor.
        RuntimeError: there, if g contains an operation marked ``once_differentiable``.

    Example:
        >>> import torch, implicit
        >>> x, y = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
        >>> M = implicit.MixedDerivative(lambda x, y: (x**2).sum() * y, x, y)
        >>> M @ torch.tensor(1.0), M.T @ torch.tensor([1.0, 1.0])
        (tensor([2., 4.]), tensor(6.))
    """

    def __init__(self, g: ScalarFunction, x: Tree, y: Tree) -> None:
        self._attach(g, tree.detach(x), tree.detach(y), {}, False)

    def _attach(self, g: ScalarFunction, x: Tree, y: Tree, maps: dict[bool, LinearOperator], turned: bool) -> None:
        super().__init__(x if turned else y, y if turned else x)
        self._g, self._x, self._y = g, x, y
        self._maps, self._turned = maps, turned  # both directions share the graphs

    def _map(self) -> LinearOperator:
        if self._turned not in self._maps:
            g, x, y = self._g, self._x, self._y  # not self: a cycle would keep the graphs alive
            if self._turned:
                gradient = Jacobian(lambda q: _gradient(lambda p: g(p, q), x), y)
            else:
                gradient = Jacobian(lambda p: _gradient(lambda q: g(p, q), y), x)
            self._maps[self._turned] = gradient.T
        return self._maps[self._turned]

    def mv(self, v: Tree) -> Tree:
        return self._map().mv(v)

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        return self._map().flat_mm(rows)

    @property
    def T(self) -> "MixedDerivative":
        """:math:`\\nabla^2_{yx} g`, from trees shaped like x to trees shaped like y."""
        turned = MixedDerivative.__new__(MixedDerivative)
        turned._attach(self._g, self._x, self._y, self._maps, not self._turned)
        return turned


def _gradient(g: ScalarFunction, y: Tree) -> Tree:
    """The gradient of g with its graph."""
    variables = tree.variables(y)
    own, spec = tree.flatten(variables)
    value = require_scalar(g(variables), "the objective")
    if not value.requires_grad or not own:
        return tree.zeros_like(tree.detach(y))
    culprit = _once_differentiable(value)
    if culprit is not None:
        raise RuntimeError(
            f"{culprit} is marked once_differentiable: it has no second derivative, and torch would take zero for it; "
            "write it with a differentiable backward pass"
        )
    return tree.unflatten(torch.autograd.grad(value, own, create_graph=True, materialize_grads=True), spec)


def _once_differentiable(value: Tensor) -> str | None:
    """The name of such a function in the graph of ``value``: where its incoming gradient is constant, ``autograd.grad``
    differentiates its backward pass without an error."""
    pending, seen = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _ONCE:
            return function.__name__
        pending.extend(parent for parent, _ in node.next_functions)
    return None


# All of its wrappers share one code object.
_ONCE = once_differentiable(lambda *_: None).__code__
