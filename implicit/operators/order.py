"""The orders in which a Hessian product can be differentiated, and the choice between them.

Each class here has the objective's ``value`` and ``gradient`` at the point, ``flat(vector)`` and ``block(rows)`` for
products with ravelled vectors, the name of its ``order`` and a sentence with its ``reason``.
"""

import math
from dataclasses import replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from implicit import tree
from implicit.derivatives import GradientGraph, ScalarFunction, require_scalar, value_and_gradient
from implicit.differentiability import evaluate, explain, first_line, traffic
from implicit.operators.difference import GradientDifference
from implicit.tree import Tree

ORDERS = ("reverse-over-reverse", "linearize", "forward-over-reverse", "finite-difference")

RECORD_AFTER = 24
"""Products after which one is recorded. Recording costs some 20 products of a very small problem, 8 of a small one, 4
of a large one, and saves a third, a third and a twentieth of each later one: large ones are recorded on demand only."""

CPU_BLOCK_BYTES = 2**24
BLOCK_BYTES = 2**30
"""Memory of the cotangents of one batched pass. On a CPU larger blocks leave the cache and lose to one pass per vector;
elsewhere this is only a limit on memory."""

SMALLEST_BLOCK = 8
"""A problem is small if at least that many vectors fit a block; then a batched pass pays for four vectors or more."""


class Products(Protocol):
    """What a Hessian asks of an order."""

    @property
    def value(self) -> Tensor:
        """The objective at the point."""
        ...

    @property
    def gradient(self) -> Tree:
        """Its gradient there."""
        ...

    @property
    def order(self) -> str:
        """One of :data:`ORDERS`."""
        ...

    @property
    def reason(self) -> str:
        """Why, in one sentence."""
        ...

    def flat(self, vector: Tensor) -> Tensor:
        """The product with a vector of shape ``(n,)``."""
        ...

    def block(self, rows: Tensor) -> Tensor:
        """The products with the rows of a ``(k, n)`` matrix."""
        ...


class KeptGraph:
    """Reverse over reverse on a graph that is kept, and its record once that pays.

    Args:
        graph: the graph, shared with whoever else uses it.
        record_after: how many products of the graph come before one is recorded; None for never.
        block_bytes: memory of one batched pass.
        why: why this order.
    """

    def __init__(self, graph: GradientGraph, record_after: int | None, block_bytes: int | None, why: str) -> None:
        self.graph, self._record_after, self._why = graph, record_after, why
        self._leaves = tree.leaves(graph.y)
        sizes = [v.numel() for v in self._leaves]
        places = [
            (v.shape, torch.empty(v.shape, device="meta").stride(), start)
            for v, start in zip(self._leaves, accumulate(sizes, initial=0), strict=False)
        ]
        self._places = [places[i] for i in graph.active]
        on_cpu = all(v.device.type == "cpu" for v in self._leaves)
        self._block_bytes = block_bytes or (CPU_BLOCK_BYTES if on_cpu else BLOCK_BYTES)
        self._batchable = True
        self._notes: list[str] = []

    @property
    def value(self) -> Tensor:
        return self.graph.value

    @property
    def gradient(self) -> Tree:
        return self.graph.gradient

    @property
    def _replays(self) -> bool:
        return self._record_after is not None and self.graph.recorded is not None

    @property
    def order(self) -> str:
        return "linearize" if self._replays else "reverse-over-reverse"

    @property
    def reason(self) -> str:
        recorded = [f"recorded after {self._record_after} products"] if self._replays and self._record_after else []
        failed = [f"not recorded: {self.graph.unrecordable}"] if self.graph.unrecordable else []
        return "; ".join([self._why, *recorded, *failed, *self._notes, *self.graph.notes])

    def flat(self, vector: Tensor) -> Tensor:
        return self._into(torch.empty_like(vector), self._runner(1), vector.contiguous())

    def leaves(self, v: list[Tensor]) -> list[Tensor]:
        """The product with a tree, leaf by leaf."""
        found = self._runner(1)(*[v[i] for i in self.graph.active])
        given = {leaf.data_ptr() for leaf in v}
        return [
            torch.zeros_like(leaf) if f is None else f.clone() if f.data_ptr() in given else f
            for f, leaf in zip(found, self._leaves, strict=True)
        ]

    def block(self, rows: Tensor) -> Tensor:
        k = len(rows)
        if not rows.numel():
            return torch.zeros_like(rows)
        if self._in_batches(k):
            stacked = [rows[:, at : at + math.prod(shape)].reshape(k, *shape) for shape, _, at in self._places]
            if (found := self._batches(k, stacked)) is not None:
                return torch.cat([f.reshape(k, -1) for f in found if f.numel()], dim=1)
        run, out = self._runner(k), torch.empty_like(rows)
        for row, target in zip(rows.contiguous(), out, strict=True):
            self._into(target, run, row)
        return out

    def leaves_block(self, stacked: list[Tensor]) -> list[Tensor]:
        """The products with k trees, leaf by leaf: no detour over ravelled vectors, which are copies."""
        k = len(stacked[0])
        active = [stacked[i] for i in self.graph.active]
        if self._in_batches(k) and (found := self._batches(k, active)) is not None:
            return found
        run, out = self._runner(k), [torch.empty_like(v) for v in stacked]
        for row in range(k):
            for target, f in zip(out, run(*[v[row] for v in active]), strict=True):
                target[row] = 0 if f is None else f
        return out

    def _runner(self, k: int) -> Any:
        """What maps cotangents to products, after recording it where that pays for the next k."""
        graph = self.graph
        graph.products += k
        if self._record_after is None:
            return self._differentiate
        if graph.recorded is None and not graph.unrecordable and graph.passes + k > self._record_after and self._small:
            graph.record()
        return graph.recorded or self._differentiate

    def _differentiate(self, *cotangents: Tensor) -> Any:
        return self.graph.differentiate(cotangents, self._leaves)

    @property
    def _small(self) -> bool:
        """Whether overhead is a good part of the cost: what recording and batching save."""
        return self._block_bytes // max(self.graph.traffic, 1) >= SMALLEST_BLOCK

    def _into(self, out: Tensor, run: Any, vector: Tensor) -> Tensor:
        # Strided views straight from the vector: split and view would take three times as long.
        begin = vector.storage_offset()
        found = run(*[vector.as_strided(shape, stride, begin + start) for shape, stride, start in self._places])
        parts = [
            f.reshape(-1) if f is not None else leaf.new_zeros(leaf.numel())
            for f, leaf in zip(found, self._leaves, strict=True)
        ]
        return torch.cat(parts, out=out) if parts else out

    def _in_batches(self, k: int) -> bool:
        return k >= 4 and self._batchable and self._small

    def _batches(self, k: int, active: list[Tensor]) -> list[Tensor] | None:
        """Products in batched passes, leaf by leaf; None where torch cannot batch an operation."""
        size = self._block_bytes // max(self.graph.traffic, 1)
        try:
            parts = [self._batch([v[at : at + size] for v in active]) for at in range(0, k, size)]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:  # an operation has no batching rule
            self._batchable, self._notes = False, [f"one vector at a time: {first_line(error)}"]
            return None
        self.graph.products += k
        return [
            leaf.new_zeros(k, *leaf.shape) if group[0] is None else torch.cat(group)
            for leaf, group in zip(self._leaves, zip(*parts, strict=True), strict=True)
        ]

    def _batch(self, active: list[Tensor]) -> Any:
        if self._replays and self.graph.recorded is not None:
            return self.graph.recorded.batch(*active)
        return self.graph.differentiate(active, self._leaves, batched=True)


class ForwardOverReverse:
    """Forward mode through the gradient: nothing is kept between products, which cost about 3.5 gradients each.

    Several vectors share the primal pass: in blocks a product costs about 1.7.
    """

    order = "forward-over-reverse"

    def __init__(self, fn: ScalarFunction, y: Tree, block_bytes: int | None, why: str) -> None:
        variables = tree.variables(y)
        self._evaluation = evaluate(lambda: require_scalar(fn(variables), "the objective"), tree.leaves(variables))
        if self._evaluation.obstacle:
            raise _refused(self.order, self._evaluation.obstacle)
        value = self._evaluation.value
        self._chunk = max(1, (block_bytes or BLOCK_BYTES) // max(2 * traffic([value.grad_fn]), 1))
        self._evaluation = replace(self._evaluation, value=value.detach())  # nothing is kept
        self.reason = "; ".join([why, *self._evaluation.notes])
        self._point, like = tree.ravel(tree.detach(y)), tree.detach(y)
        self._function = torch.func.grad(lambda q: require_scalar(fn(tree.unravel(q, like)), "the objective"))
        with self._evaluation.kernels():
            self.value, self.gradient = value_and_gradient(fn, y, "the objective")

    def flat(self, vector: Tensor) -> Tensor:
        return self._run(lambda: self._push(vector))

    def block(self, rows: Tensor) -> Tensor:
        return self._run(lambda: torch.func.vmap(self._push, chunk_size=self._chunk)(rows))

    def _push(self, vector: Tensor) -> Tensor:
        return torch.func.jvp(self._function, (self._point,), (vector,))[1]

    def _run(self, product: Any) -> Tensor:
        try:
            with self._evaluation.kernels():
                return product().detach()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # NotImplementedError is one
            raise _refused(self.order, explain(error) or first_line(error)) from error


class Differences:
    """Central differences of gradients: two gradients per product, accurate to about ``eps^(2/3)``."""

    order = "finite-difference"

    def __init__(self, fn: ScalarFunction, y: Tree, why: str) -> None:
        self.value, self.gradient = value_and_gradient(fn, y, "the objective")
        self.reason = f"{why}; accurate to about {torch.finfo(tree.common_dtype(y)).eps ** (2 / 3):.0e} relative"
        self._operator = GradientDifference(fn, y)

    def flat(self, vector: Tensor) -> Tensor:
        return self._operator.flat_mv(vector)

    def block(self, rows: Tensor) -> Tensor:
        return self._operator.flat_mm(rows)


def choose(fn: ScalarFunction, y: Tree, order: str, expected: int | None, block_bytes: int | None) -> Products:
    """The products of the Hessian of ``fn`` at y in the order asked for, or in the cheapest one that is right.

    Raises:
        ValueError: if there is no such order, or the objective does not allow the one asked for.
    """
    _check(order, expected, block_bytes)
    if order == "finite-difference":
        return Differences(fn, y, "asked for")
    if order == "forward-over-reverse":
        return ForwardOverReverse(fn, y, block_bytes, "asked for")
    graph = GradientGraph(lambda _, q: fn(q), (), y, "the objective")
    if graph.obstacle is None:
        return keep(graph, order, expected, block_bytes)
    if order != "auto":
        raise _refused(order, graph.obstacle)
    return Differences(fn, y, f"differences of gradients because {graph.obstacle}")


def keep(graph: GradientGraph, order: str, expected: int | None, block_bytes: int | None) -> KeptGraph:
    """The same on a graph that exists.

    Raises:
        ValueError: if the order does not work on a graph, or the graph cannot be recorded and ``"linearize"`` is asked.
    """
    _check(order, expected, block_bytes)
    if order in ("forward-over-reverse", "finite-difference"):
        raise ValueError(f"order={order!r} evaluates the objective anew; build it with Hessian(fn, y, order={order!r})")
    if order == "reverse-over-reverse":
        return KeptGraph(graph, None, block_bytes, "asked for")
    if order == "linearize":
        if graph.recorded is None:
            graph.record()
        if graph.unrecordable:
            raise _refused(order, graph.unrecordable)
        return KeptGraph(graph, 0, block_bytes, "asked for")
    if expected is not None and expected >= 2 * RECORD_AFTER:
        return KeptGraph(graph, 0, block_bytes, f"{expected} products are expected, which pays for recording one")
    return KeptGraph(graph, RECORD_AFTER, block_bytes, "the graph of the gradient is kept: 1.5 gradients per product")


def _check(order: str, expected: int | None, block_bytes: int | None) -> None:
    if order not in ("auto", *ORDERS):
        raise ValueError(f"order must be 'auto' or one of {', '.join(map(repr, ORDERS))}, got {order!r}")
    for name, value in (("expected_products", expected), ("block_bytes", block_bytes)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be None or a positive integer, got {value!r}")


def _refused(order: str, reason: str) -> ValueError:
    others = {"forward-over-reverse": "order='reverse-over-reverse'"}.get(order, "order='finite-difference'")
    return ValueError(f"order={order!r} does not work for this objective: {reason}. Use order='auto' or {others}")
