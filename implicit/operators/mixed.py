"""Mixed second derivatives of an objective as rectangular operators."""

from torch import Tensor

from implicit import tree
from implicit.derivatives import GradientGraph, ScalarFunction
from implicit.operators.base import LinearOperator
from implicit.operators.jacobian import block_size, in_blocks
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
        TypeError: at the first product, if g does not return a tensor.
        ValueError: there, if g does not return a scalar, or torch has no second derivative of it or a wrong one.

    Example:
        >>> import torch, implicit
        >>> x, y = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
        >>> M = implicit.MixedDerivative(lambda x, y: (x**2).sum() * y, x, y)
        >>> M @ torch.tensor(1.0), M.T @ torch.tensor([1.0, 1.0])
        (tensor([2., 4.]), tensor(6.))
    """

    def __init__(self, g: ScalarFunction, x: Tree, y: Tree) -> None:
        self._attach(g, tree.detach(x), tree.detach(y), {}, False)

    def _attach(self, g: ScalarFunction, x: Tree, y: Tree, graphs: dict[bool, GradientGraph], turned: bool) -> None:
        super().__init__(x if turned else y, y if turned else x)
        self._g, self._x, self._y = g, x, y
        self._graphs, self._turned = graphs, turned  # both directions share the graphs

    def _graph(self) -> GradientGraph:
        """The gradient in the domain's variable, with its graph back to the other."""
        if self._turned not in self._graphs:
            g = self._g
            fn = (lambda q, p: g(p, q)) if self._turned else g
            self._graphs[self._turned] = GradientGraph(fn, self.out, self.like, "the objective")
        return self._graphs[self._turned]

    def mv(self, v: Tree) -> Tree:
        return self._graph().mixed_vjp(v)

    def _flat_block(self, rows: Tensor) -> Tensor:
        return in_blocks(self, rows, self._batch, block_size(None, self._graph().traffic, self.device))

    def _batch(self, vectors: Tree, *, batched: bool) -> Tree:
        graph = self._graph()
        cotangents, own = tree.leaves(vectors), tree.leaves(graph.x)
        found = graph.differentiate([cotangents[i] for i in graph.active], own, batched=batched)
        lead = cotangents[0].shape[:1]
        filled = [o.new_zeros(*lead, *o.shape) if f is None else f for f, o in zip(found, own, strict=True)]
        return tree.unflatten(filled, tree.structure(graph.x))

    @property
    def T(self) -> "MixedDerivative":
        """:math:`\\nabla^2_{yx} g`, from trees shaped like x to trees shaped like y."""
        turned = MixedDerivative.__new__(MixedDerivative)
        turned._attach(self._g, self._x, self._y, self._graphs, not self._turned)
        return turned
