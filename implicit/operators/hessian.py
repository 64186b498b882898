"""The Hessian of an objective as an operator."""

from typing import Self

from torch import Tensor

from implicit import tree
from implicit.derivatives import GradientGraph, ScalarFunction
from implicit.operators.base import LinearOperator
from implicit.operators.order import KeptGraph, Products, choose, keep
from implicit.tree import Tree


class Hessian(LinearOperator):
    """:math:`\\nabla^2 \\mathrm{fn}(y)`, products without the matrix.

    The order of differentiation decides the cost of a product, in gradients:

    - ``"reverse-over-reverse"``: one backward pass over a graph that is kept, 1.5 (and one gradient to build it);
    - ``"linearize"``: the same pass recorded once and replayed without autograd, which saves most on small problems;
      recording costs some products, the fewer the larger the problem;
    - ``"forward-over-reverse"``: forward mode through the gradient, 3.5 (less in blocks), nothing kept in memory;
    - ``"finite-difference"``: differences of gradients, 2, accurate to about ``eps^(2/3)``;
    - ``"auto"``: the kept graph, recorded at once if at least 48 products are expected and otherwise after 24 products;
      differences where the objective has no second derivative in torch, or a wrong one.

    Several vectors go through in one batched pass where the problem is small enough for that to be faster, and one by
    one otherwise; results are the same to rounding.

    Args:
        fn: a scalar function of one tree.
        y: where.
        order: one of the above.
        expected_products: how many products will be asked for, if known.
        positive_definite: a declaration that solvers rely on.
        block_bytes: memory that one batched pass may take; by default 16 MiB on a CPU, where more is slower, and 1 GiB
            elsewhere.

    Attributes:
        order: the order in use; ``"auto"`` may go from ``"reverse-over-reverse"`` to ``"linearize"``.
        reason: one sentence that says why.

    Raises:
        ValueError: if ``order`` is unknown or refused by the objective; the message names the cure. An order may be
            found out to be impossible in the first product only.

    Example:
        >>> import torch, implicit
        >>> H = implicit.Hessian(lambda y: (y**4).sum() / 12, torch.tensor([1.0, 2.0]))
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])
        >>> H.order
        'reverse-over-reverse'
    """

    symmetric = True

    def __init__(
        self,
        fn: ScalarFunction,
        y: Tree,
        *,
        order: str = "auto",
        expected_products: int | None = None,
        positive_definite: bool = True,
        block_bytes: int | None = None,
    ) -> None:
        super().__init__(y)
        self._use(choose(fn, y, order, expected_products, block_bytes), positive_definite)

    @classmethod
    def of(
        cls,
        graph: GradientGraph,
        *,
        order: str = "auto",
        expected_products: int | None = None,
        positive_definite: bool = True,
        block_bytes: int | None = None,
    ) -> Self:
        """The Hessian in y of a graph that already exists; nothing is evaluated.

        Raises:
            ValueError: if ``order`` is unknown or would evaluate the objective anew.
        """
        operator = cls.__new__(cls)
        LinearOperator.__init__(operator, graph.y)
        operator._use(keep(graph, order, expected_products, block_bytes), positive_definite)
        return operator

    def _use(self, products: Products, positive_definite: bool) -> None:
        self._products = products
        self.positive_definite = positive_definite

    @property
    def graph(self) -> GradientGraph:
        """The kept graph.

        Raises:
            TypeError: if the order keeps none.
        """
        if not isinstance(self._products, KeptGraph):
            raise TypeError(f"order {self.order!r} keeps no graph")
        return self._products.graph

    @property
    def order(self) -> str:
        """The order in use."""
        return self._products.order

    @property
    def reason(self) -> str:
        """Why that order is in use."""
        return self._products.reason

    @property
    def value(self) -> Tensor:
        """The objective where the Hessian was taken."""
        return self._products.value

    @property
    def gradient(self) -> Tree:
        """The gradient where the Hessian was taken."""
        return self._products.gradient

    @property
    def held_bytes(self) -> int:
        """About what the kept graph takes: the bytes of the cotangents of one pass."""
        return self._products.graph.traffic if isinstance(self._products, KeptGraph) else 0

    def mv(self, v: Tree) -> Tree:
        if isinstance(self._products, KeptGraph):
            spec = tree.structure(self.like)
            return tree.unflatten(self._products.leaves(tree.aligned_leaves(v, spec)), spec)
        return tree.unravel(self._products.flat(tree.ravel(v)), self.like)

    def flat_mv(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self._products.flat(vector)

    def _tree_mm(self, vectors: Tree, chunk: int | None) -> Tree:
        own, spec = tree.flatten(vectors)
        if not isinstance(self._products, KeptGraph) or chunk is not None or not len(own[0]):
            return super()._tree_mm(vectors, chunk)
        self.products += len(own[0])
        return tree.unflatten(self._products.leaves_block(own), spec)

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        return self._products.block(rows)
