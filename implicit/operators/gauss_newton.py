"""The generalized Gauss-Newton matrix (Schraudolph 2002)."""

from collections.abc import Callable

from torch import Tensor

from implicit.derivatives import GradientGraph, ScalarFunction
from implicit.operators.base import LinearOperator
from implicit.operators.hessian import Hessian
from implicit.operators.jacobian import Jacobian, Order
from implicit.tree import Tree


class GaussNewton(LinearOperator):
    """:math:`J^T \\, \\nabla^2 \\ell \\, J` for the objective :math:`\\ell(m(y))`, J the Jacobian of the model m.

    The Hessian of the objective without the curvature of the model: positive semidefinite wherever the loss is convex
    in the outputs, and equal to the Hessian where the model is linear or fits perfectly. A product is one product with
    J, one with the loss's Hessian and one with :math:`J^T`, all on kept graphs, for one vector or a batch.

    Terms of the objective that do not pass through the model are operators of their own:
    ``GaussNewton(m, l, y) + Hessian(regularizer, y)``. Minibatches add up likewise.

    Args:
        model: maps y to its outputs, any pytree of floating point tensors.
        loss: maps these outputs to a scalar.
        y: where.
        order, block_bytes: how products with J are computed, see :class:`Jacobian`.
        positive_definite: a declaration that solvers rely on; right for a convex loss once J has full column rank or a
            regularizer is added.

    Attributes:
        outputs: ``model(y)``, detached.
        jacobian: J.
        value: the objective at y.
        gradient: its gradient at y; one backward pass.

    Raises:
        TypeError: if the model returns anything but floating point tensors, or the loss no tensor.
        ValueError: if the loss does not return a scalar.

    Example:
        >>> import torch, implicit
        >>> x, t = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
        >>> G = implicit.GaussNewton(lambda y: (y * x).exp(), lambda z: 0.5 * ((z - t) ** 2).sum(), torch.tensor(0.0))
        >>> G @ torch.tensor(1.0)
        tensor(5.)
    """

    symmetric = True

    def __init__(
        self,
        model: Callable[[Tree], Tree],
        loss: ScalarFunction,
        y: Tree,
        *,
        order: Order = "auto",
        block_bytes: int | None = None,
        positive_definite: bool = True,
    ) -> None:
        self.jacobian = Jacobian(model, y, order=order, block_bytes=block_bytes)
        self.outputs = self.jacobian.value
        self._graph = GradientGraph(lambda _, z: loss(z), (), self.outputs, "the loss")
        self._curvature = Hessian.of(self._graph)
        self.positive_definite = positive_definite
        super().__init__(y)

    @property
    def value(self) -> Tensor:
        """The objective where the operator was taken."""
        return self._graph.value

    @property
    def gradient(self) -> Tree:
        """Its gradient there."""
        return self.jacobian.pull(self._graph.gradient)

    def mv(self, v: Tree) -> Tree:
        return self.jacobian.pull(self._graph.hvp(self.jacobian.mv(v)))

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        curved = self._curvature.flat_mm(self.jacobian.flat_mm(rows))
        return self.jacobian.T.flat_mm(curved)
