"""What torch cannot differentiate twice, found on the graph of an objective before a product fails or is wrong.

Some kernels have no second derivative, and another kernel for the same operation has one: the objective is evaluated
again with that one. Some operations have a second derivative that is wrong, or is taken to be zero without a word;
those are refused.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION = {
    "ScaledDotProductFlashAttentionForCpuBackward0",
    "ScaledDotProductFlashAttentionBackward0",
    "ScaledDotProductEfficientAttentionBackward0",
    "ScaledDotProductCudnnAttentionBackward0",
}
CUDNN = {"CudnnRnnBackward0"}
WRONG = {
    # torch.autograd.gradgradcheck of torch._weight_norm(v, g, dim=0) fails in torch 2.13
    "WeightNormInterfaceBackward0": "torch's fused weight norm has wrong second derivatives; write g * v / v.norm() "
    "with elementary operations",
}


@dataclass(frozen=True)
class Evaluation:
    """An objective evaluated for second derivatives.

    Attributes:
        value: what the objective returned, with its graph.
        attention: whether attention had to be moved to the MATH kernel.
        recurrent: whether cuDNN had to be turned off.
        obstacle: why second derivatives would fail or be wrong, with the cure; None if nothing is known.
    """

    value: Tensor
    attention: bool = False
    recurrent: bool = False
    obstacle: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about kernels that were exchanged."""
        exact = "attention runs on the MATH kernel, the only one that can be differentiated twice"
        plain = "cuDNN is off, whose recurrent layers cannot be differentiated twice"
        return (exact,) * self.attention + (plain,) * self.recurrent

    def kernels(self) -> ExitStack:
        """A context in which the objective runs on the same kernels again."""
        stack = ExitStack()
        if self.attention:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if self.recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        return stack


def evaluate(fn: Callable[[], Tensor], variables: Sequence[Tensor] | None = None) -> Evaluation:
    """``fn()`` with its graph, on kernels that can be differentiated twice.

    The objective is evaluated a second time only where the first evaluation met a kernel that has a substitute.

    Args:
        fn: the objective, as a function of nothing.
        variables: the leaves of its graph in which it must be differentiable twice; all of them by default.
    """
    with torch.enable_grad():
        found = Evaluation(fn())
        graph = nodes([found.value.grad_fn])
        names = {type(node).__name__ for node in graph}
        if names & (ATTENTION | CUDNN):
            found = replace(found, attention=bool(names & ATTENTION), recurrent=bool(names & CUDNN))
            with found.kernels():
                found = replace(found, value=fn())
            graph = nodes([found.value.grad_fn])
    said: dict[type, str | None] = {kind: _objection(kind) for kind in {type(node) for node in graph}}
    own = None if variables is None else {id(v) for v in variables}
    for node in graph:
        # What does not depend on the variables is differentiated once at most.
        if (why := said[type(node)]) and (
            own is None or own & {id(getattr(n, "variable", None)) for n in nodes([node])}
        ):
            return replace(found, obstacle=why)
    return found


def nodes(roots: Iterable[Any]) -> set[Any]:
    """Every node of the graph behind ``roots``."""
    stack = [root for root in roots if root is not None]
    seen = set(stack)
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return seen


def foreign_leaf(outputs: Iterable[Tensor], own: Iterable[Tensor]) -> Tensor | None:
    """A leaf that ``outputs`` depend on and that is none of ``own``: a tensor captured by the function between them."""
    known = {id(leaf) for leaf in own}
    for node in nodes(leaf.grad_fn for leaf in outputs):
        variable = getattr(node, "variable", None)  # of AccumulateGrad, the leaf itself
        if isinstance(variable, Tensor) and id(variable) not in known:
            return variable
    return None


def traffic(roots: Iterable[Any]) -> int:
    """Bytes of the cotangents that flow through the graph behind ``roots`` in one backward pass."""
    entries = (entry for node in nodes(roots) for entry in node._input_metadata)
    return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries)


UNFINISHED = (
    "torch::autograd::NotImplemented",
    "torch::autograd::Error",
    "EmbeddingBagBackwardBackward0",
    "CdistBackwardBackward0",
)
"""Nodes that throw when they are run: some operations have a backward pass and no backward pass of that."""


def missing(roots: Iterable[Any]) -> str | None:
    """A sentence if the graph of a gradient ends in an operation whose derivative torch does not have."""
    for node in nodes(roots):
        if node.name() in UNFINISHED:
            return "an operation of the objective has no second derivative in torch"
    return None


def _objection(kind: Any) -> str | None:
    """What is wrong with the second derivative of an operation, by the type of its node."""
    name = kind.__name__
    if name in WRONG:
        return WRONG[name]
    if name in ATTENTION:
        return "the objective pins attention to a kernel without second derivatives; pin SDPBackend.MATH"
    if name in CUDNN:
        return "the objective turns cuDNN on for a recurrent layer; cuDNN cannot differentiate it twice"
    if issubclass(kind, BackwardCFunction) and _differentiable_once(kind):
        return (
            f"{kind._forward_cls.__name__} is an autograd.Function marked once_differentiable; "  # type: ignore[attr-defined]
            "write its backward with differentiable operations and drop the mark"
        )
    return None


def _differentiable_once(kind: Any) -> bool:
    # Where its cotangent needs no gradient such a Function looks linear, and its second derivative zero.
    return getattr(kind._forward_cls.backward, "__code__", None) is _ONCE


_ONCE = once_differentiable(lambda ctx: None).__code__


REFUSALS = (
    "is not implemented",
    "once_differentiable",
    "has not been implemented",
    "Double backwards is not supported",
)


def first_line(error: Exception) -> str:
    """What torch says before its advice and its stack, without the full stop."""
    return str(error).split("\n")[0].rstrip(".")


def explain(error: RuntimeError) -> str | None:
    """A clause with the cure for torch's refusal of a second-order product; None for other errors."""
    text = str(error)
    first = first_line(error)
    if "modified by an inplace operation" in text:
        return (
            "a tensor that the kept graph needs was changed in place; build the operator anew after every change of "
            f"the point, the data or the buffers ({first})"
        )
    if "mutate a captured Tensor" in text:
        return (
            "it changes a tensor in place, as batch norm in training mode does with its buffers; for an nn.Module use "
            "implicit.module_objective, which clones them"
        )
    if "ZeroTensors" in text:
        return "torch has no forward mode for the backward pass of F.mse_loss; write ((a - b) ** 2).mean()"
    if "doesn't have storage" in text:
        return "torch.func cannot transform packed sequences; use implicit.Hessian with order='reverse-over-reverse'"
    if any(refusal in text for refusal in REFUSALS):
        return f"torch cannot differentiate an operation of the objective twice: {first}"
    return None
