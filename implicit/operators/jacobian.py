"""Jacobians of functions between trees, with both products."""

import functools
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from implicit import tree
from implicit.differentiability import REFUSALS, evaluate, traffic
from implicit.operators.base import LinearOperator
from implicit.operators.order import BLOCK_BYTES, CPU_BLOCK_BYTES
from implicit.pullback import gradients
from implicit.transforms import batched as batched_call
from implicit.tree import Tree

Order = Literal["auto", "reverse", "forward", "linearize"]
"""How ``J v`` is computed; see :class:`Jacobian`."""

Products = Callable[[Tree, bool], Tree]


class Jacobian(LinearOperator):
    """The Jacobian J of ``fn`` at y, from trees shaped like y to trees shaped like ``fn(y)``; ``J.T`` is its transpose.

    The function is evaluated once and its graph kept. ``J.T @ u`` is one backward pass over it, whatever the order.
    ``J @ v`` is, by ``order``:

    - ``"reverse"``: one backward pass over the backward pass. :math:`u \\mapsto J^T u` is linear, so its own pullback
      at any u is J; that second graph is kept too. Costs about one gradient per product, needs every operation of fn
      to be differentiable twice, and works where forward mode does not (LSTM and GRU on the CPU, packed sequences).
    - ``"forward"``: forward mode, with fn evaluated again for every product, so fn must be a fixed function of y. Keeps
      nothing, and needs no second derivative.
    - ``"linearize"``: ``torch.func.linearize``: the cheapest product and the dearest start (some fifty gradients).
    - ``"auto"`` (the default): reverse, and forward where an operation refuses to be differentiated twice.

    The first product with J is preceded by one more product each way, which have to agree: torch passes over some
    operations that it cannot differentiate twice, in silence. Blocks of vectors go through one batched pass. Attention
    and cuDNN's recurrent layers run on kernels that have second derivatives (``notes`` says so).

    Args:
        fn: maps a tree to a tree of floating point tensors, such as a model's outputs in its parameters.
        y: where.
        order: how products with J are computed.
        block_bytes: memory that one batched pass may take; by default 16 MiB on a CPU, where more is slower, and 1 GiB
            elsewhere.

    Attributes:
        value: ``fn(y)``, detached.
        order: the order in use; "auto" until the first product with J decides.
        notes: sentences about kernels that were exchanged.

    Raises:
        ValueError: if ``order`` is none of these, ``block_bytes`` is not positive, or the outputs have another dtype
            than y.
        TypeError: if fn returns anything but floating point tensors.
        RuntimeError: from the first product with J, if torch cannot compute it, with the cure.

    Example:
        >>> import torch, implicit
        >>> J = implicit.Jacobian(lambda y: {"sum": y.sum(), "squares": y**2}, torch.tensor([1.0, 2.0, 3.0]))
        >>> J @ torch.tensor([1.0, 0.0, 1.0])
        {'sum': tensor(2.), 'squares': tensor([2., 0., 6.])}
        >>> J.T @ {"sum": torch.tensor(1.0), "squares": torch.tensor([0.0, 1.0, 0.0])}
        tensor([1., 5., 1.])
    """

    def __init__(
        self, fn: Callable[[Tree], Tree], y: Tree, *, order: Order = "auto", block_bytes: int | None = None
    ) -> None:
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {order!r}")
        if block_bytes is not None and not (type(block_bytes) is int and block_bytes >= 1):
            raise ValueError(f"block_bytes must be None or a positive integer, got {block_bytes!r}")
        self._fn, self._block_bytes = fn, block_bytes
        self.order: Order = order
        self._y = tree.variables(y)
        self._outputs: Tree = None
        self._evaluation = evaluate(self._total, tree.leaves(self._y))
        self.value, self.notes = tree.detach(self._outputs), self._evaluation.notes
        self._range = tree.structure(self.value)
        self._push: Products | None = None
        super().__init__(self._y, self.value)

    def _total(self) -> Tensor:
        """Evaluates fn; the sum of its outputs has their graph."""
        self._outputs = _check_outputs(self._fn(self._y))
        return torch.stack([leaf.sum() for leaf in tree.leaves(self._outputs)] or [torch.zeros(())]).sum()

    def mv(self, v: Tree) -> Tree:
        return self._along(v, batched=False)

    def _flat_block(self, rows: Tensor) -> Tensor:
        return in_blocks(self, rows, self._along, self._block_size)

    @functools.cached_property
    def _block_size(self) -> int:
        """How many vectors one batched pass takes."""
        flow = traffic(leaf.grad_fn for leaf in tree.leaves(self._outputs))
        return block_size(self._block_bytes, flow, self.device)

    @property
    def T(self) -> LinearOperator:
        """The transpose, on the same graph."""
        return _Transposed(self)

    def pull(self, u: Tree, *, batched: bool = False) -> Tree:
        """``J^T u``; with ``batched``, leaves carry a leading axis."""
        return _pullback(self._outputs, self._y, u, batched)

    def _along(self, v: Tree, *, batched: bool) -> Tree:
        if self._push is None:
            self._push, self.order = self._choose()
        return self._push(v, batched)

    def _choose(self) -> tuple[Products, Order]:
        if self.order != "auto":
            return self._tried(self.order), self.order
        try:
            return self._tried("reverse"), "reverse"
        except RuntimeError as refused:
            if not isinstance(refused, _Disagreement) and not any(sign in str(refused) for sign in REFUSALS):
                raise
            try:
                return self._tried("forward"), "forward"
            except RuntimeError as again:
                raise RuntimeError(
                    f"J @ v failed: fn can be differentiated neither twice ({refused}) nor in forward mode ({again})"
                ) from refused

    def _tried(self, order: Order) -> Products:
        """Products in this order, once they have agreed with the transpose: an operation that torch cannot
        differentiate twice may contribute zero without a word."""
        push = {"reverse": self._reverse, "forward": self._forward, "linearize": self._linearize}[order]()
        generator = torch.Generator().manual_seed(0)
        u = tree.randn_like(self.out, generator)
        pulled = self.pull(u)
        v = pulled  # a random v would be nearly orthogonal to J^T u where there are many inputs
        pushed = push(v, False)
        gap = float(tree.dot(u, pushed) - tree.dot(pulled, v))
        size = float(tree.norm(u) * tree.norm(pushed) + tree.norm(pulled) * tree.norm(v))
        if abs(gap) > torch.finfo(self.dtype).eps ** 0.5 * size:
            reason = self._evaluation.obstacle or (
                "a backward pass is not differentiable, or fn returns something else every time"
            )
            raise _Disagreement(f"J @ v in {order} order disagrees with the transpose: {reason}")
        return push

    def _reverse(self) -> Products:
        cotangents = tree.map(lambda leaf: torch.zeros_like(leaf).requires_grad_(), self.value)
        with torch.enable_grad():
            pulled = _pullback(self._outputs, self._y, cotangents, False, create_graph=True)
        return lambda v, batched: _pullback(pulled, cotangents, v, batched)

    def _forward(self) -> Products:
        point = tree.detach(self._y)

        def push(v: Tree) -> Tree:
            with torch.no_grad(), self._evaluation.kernels():
                return torch.func.jvp(self._fn, (point,), (v,))[1]

        return lambda v, batched: torch.func.vmap(push)(v) if batched else push(v)

    def _linearize(self) -> Products:
        with warnings.catch_warnings(), self._evaluation.kernels():  # about its own graph
            warnings.simplefilter("ignore")
            _, push = torch.func.linearize(self._fn, tree.detach(self._y))
            # Where fn works in place (recurrent layers), every call after the first is silently wrong (torch 2.13).
            push(tree.zeros_like(self.like))

        def products(v: Tree, batched: bool) -> Tree:
            with torch.no_grad():
                if not batched:
                    return push(v)
                rows = [tree.leaves(push(tree.map(lambda leaf, i=i: leaf[i], v))) for i in range(_lead(v))]
                return tree.unflatten([torch.stack(group) for group in zip(*rows, strict=True)], self._range)

        return products


class _Disagreement(RuntimeError):
    """Two ways to compute a number differ."""


class _Transposed(LinearOperator):
    """``J^T`` on the graph of J."""

    def __init__(self, jacobian: Jacobian) -> None:
        super().__init__(jacobian.out, jacobian.like)
        self.jacobian = jacobian

    def mv(self, v: Tree) -> Tree:
        return self.jacobian.pull(v)

    def _flat_block(self, rows: Tensor) -> Tensor:
        return in_blocks(self, rows, self.jacobian.pull, self.jacobian._block_size)

    @property
    def T(self) -> LinearOperator:
        return self.jacobian


def block_size(budget: int | None, flow: int, device: torch.device) -> int:
    """How many vectors one batched pass takes, where each brings cotangents of ``flow`` bytes."""
    return max((budget or (CPU_BLOCK_BYTES if device.type == "cpu" else BLOCK_BYTES)) // max(flow, 1), 1)


def in_blocks(operator: LinearOperator, rows: Tensor, product: Callable[..., Tree], size: int) -> Tensor:
    """Products with the rows, ``size`` at a time; ``product`` takes stacked trees and ``batched=True``."""
    parts = []
    for part in torch.split(rows, size):
        if len(part) == 1:
            parts.append(operator.flat_mv(part[0])[None])
        else:
            operator.products += len(part)
            parts.append(tree.ravel_batch(product(tree.unravel(part, operator.like), batched=True)))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _pullback(outputs: Tree, variables: Tree, u: Tree, batched: bool, *, create_graph: bool = False) -> Tree:
    """``u`` pulled back from outputs to variables; zeros where nothing depends on a variable."""
    values, spec = tree.flatten(outputs)
    cotangents = tree.aligned_leaves(u, spec)
    own, own_spec = tree.flatten(variables)

    def pull(*c: Tensor) -> tuple[Tensor, ...]:
        return gradients(values, own, c, create_graph=create_graph)

    if batched and cotangents and own:
        try:
            found = batched_call(pull, *cotangents)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):  # an operation has no batching rule
            rows = [pull(*row) for row in zip(*cotangents, strict=True)]
            found = [torch.stack(group) for group in zip(*rows, strict=True)]
    else:
        found = pull(*cotangents)
    given = {c.untyped_storage().data_ptr() for c in cotangents}
    # A product never shares the memory of its argument.
    filled = [f.clone() if f.untyped_storage().data_ptr() in given else f.contiguous() for f in found]
    return tree.unflatten(filled, own_spec)


def _check_outputs(outputs: Tree) -> Tree:
    for path, leaf in zip(tree.paths(outputs), tree.leaves(outputs), strict=True):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"fn must return floating point tensors, got {found} at {path or 'its output'}")
    return outputs


def _lead(v: Tree) -> int:
    return len(tree.leaves(v)[0])
