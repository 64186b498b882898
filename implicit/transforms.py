"""Which transforms of PyTorch are active: the only place that asks its private interfaces."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad

# The stubs do not export these; torch's own older vmap is built on them.
_remove_batch_dim, _add_batch_dim = torch._remove_batch_dim, torch._add_batch_dim  # pyright: ignore[reportPrivateImportUsage]


def transforms_active() -> bool:
    """Whether a transform of ``torch.func`` is being applied."""
    return bool(get_interpreter_stack())


def forward_levels() -> int:
    """How many forward-mode transforms of ``torch.func`` are being applied."""
    return sum(level.key() == TransformType.Jvp for level in get_interpreter_stack() or ())


def is_dual(value: Tensor) -> bool:
    """Whether ``value`` carries a tangent of ``torch.autograd.forward_ad``."""
    return value.is_floating_point() and forward_ad.unpack_dual(value).tangent is not None


def is_tracked(value: Tensor) -> bool:
    """Whether a transform or forward mode follows ``value``."""
    return is_functorch_wrapped_tensor(value) or is_dual(value)


def batched(fn: Callable[..., Any], *tensors: Tensor) -> Any:
    """``torch.func.vmap(fn)(*tensors)`` without torch's remark that it loops over an operation: the result is right.

    ``is_grads_batched`` of ``torch.autograd.grad`` loops over matrix-vector products, ten times slower.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        return torch.func.vmap(fn)(*tensors)


def vmapped(fn: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``fn(*tensors)``, where ``is_grads_batched`` may have put batches into them.

    That option of ``torch.autograd.grad`` (with it ``jacobian(vectorize=True)`` and gradcheck's batched checks) still
    runs on the older vmap, which knows no rules of autograd functions: its batches are handed to ``torch.func.vmap``.
    """
    batched = [is_legacy_batchedtensor(t) for t in tensors]
    if not any(batched):
        return fn(*tensors)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # For a tensor that has the level the size is not looked at.
    plain = [_remove_batch_dim(t, level, 0, 0) if b else t for t, b in zip(tensors, batched, strict=True)]
    found = torch.func.vmap(fn, in_dims=tuple(0 if b else None for b in batched))(*plain)
    return tuple(_add_batch_dim(leaf, 0, level) for leaf in found)
