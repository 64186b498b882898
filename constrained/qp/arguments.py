"""The arguments of a quadratic program: their checks, and their uniform layout."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from constrained.qp.program import largest, product
from constrained.qp.scaling import Data
from constrained.qp.solution import QPSolution
from implicit.transforms import is_dual, transforms_active

Bound = Tensor | float | None


def collect(Q: Any, q: Any, A: Any, b: Any, G: Any, h: Any, lower: Any, upper: Any) -> tuple[Data, bool]:
    """The arguments in a uniform layout, and whether none of them has a batch axis."""
    if not isinstance(q, Tensor) or not q.is_floating_point():
        raise TypeError(f"q = {_show(q)}: give a floating-point tensor of shape (n,) or (batch, n)")
    if q.ndim not in (1, 2) or not q.shape[-1]:
        raise ValueError(f"q has shape {tuple(q.shape)}: give it (n,) or (batch, n) with n > 0")
    n = q.shape[-1]
    for one, other, given in (("A", "b", (A, b)), ("G", "h", (G, h))):
        if (given[0] is None) != (given[1] is None):
            missing = one if given[0] is None else other
            raise ValueError(f"{missing} is missing: give {one} and {other} together")
    m, p = (t.shape[-2] if isinstance(t, Tensor) and t.ndim >= 2 else 0 for t in (A, G))
    lower, upper = (_bound(name, v, q) for name, v in (("lower", lower), ("upper", upper)))
    shapes = {"Q": (n, n), "q": (n,), "A": (m, n), "b": (m,), "G": (p, n), "h": (p,), "lower": (n,), "upper": (n,)}
    given = {"Q": Q, "q": q, "A": A, "b": b, "G": G, "h": h, "lower": lower, "upper": upper}
    found, sizes = [], {}
    for name, shape in shapes.items():
        value = given[name]
        if value is None:
            empty = {"Q": (n, n), "A": (0, n), "G": (0, n)}.get(name, (0,))
            found.append(torch.zeros(1, *empty, dtype=q.dtype, device=q.device))  # q.new_zeros would follow its vmap
            continue
        _check_tensor(name, value, shape, q)
        if value.ndim > len(shape):
            sizes[name] = len(value)
        found.append(value if value.ndim > len(shape) else value[None])
    if len(set(sizes.values()) - {1}) > 1 or 0 in sizes.values():
        raise ValueError(f"the batch sizes {sizes} do not fit together: give equal sizes, of at least one")
    return Data(*found), not sizes


def _bound(name: str, value: Any, q: Tensor) -> Any:
    if isinstance(value, bool) or not (value is None or isinstance(value, (Tensor, Real))):
        raise TypeError(f"{name} = {_show(value)}: give a number, a floating-point tensor or None")
    if isinstance(value, Real):
        return torch.full(q.shape[-1:], float(value), dtype=q.dtype, device=q.device)
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.expand(q.shape[-1:])
    return value


def _check_tensor(name: str, value: Any, shape: tuple[int, ...], q: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} = {_show(value)}: give a floating-point tensor of shape {shape}")
    if tuple(value.shape) != shape and (value.ndim != len(shape) + 1 or tuple(value.shape[1:]) != shape):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: give it {shape}, or one more axis in front for a batch"
        )
    if (value.dtype, value.device) != (q.dtype, q.device):
        raise ValueError(
            f"{name} is {value.dtype} on {value.device}, but q is {q.dtype} on {q.device}: convert one of them"
        )


def _show(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else repr(value)


def check_options(atol: Any, max_steps: Any) -> None:
    if atol is not None and not (isinstance(atol, Real) and not isinstance(atol, bool) and float(atol) > 0):
        raise ValueError(f"atol = {atol!r}: give a positive number, or None for the default")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps = {max_steps!r}: give a positive integer")


def guess_active(start: Any, data: Data) -> Tensor | None:
    """Rows that may be active, from an earlier solution or a point."""
    if start is None:
        return None
    rows, n = sum(data.counts), data.q.shape[1]
    if isinstance(start, QPSolution):
        active = start.active if start.active.ndim == 2 else start.active[None]
        if active.shape[1] != rows or len(active) not in (1, data.batch):
            raise ValueError(
                f"start has {active.shape[1]} constraints in a batch of {len(active)}, the program {rows} in one of "
                f"{data.batch}: give a solution of the same shape"
            )
        return active
    if not isinstance(start, Tensor):
        raise TypeError(f"start = {start!r}: give a QPSolution or a point")
    _check_tensor("start", start, (n,), data.q)
    point = start.detach() if start.ndim == 2 else start.detach()[None]
    C, d = data.rows()
    gap = product(C.detach(), point) - d.detach()
    tolerance = torch.finfo(point.dtype).eps ** 0.4
    return gap.abs() <= tolerance * (1 + torch.linalg.vector_norm(C.detach(), dim=2) * largest(point)[:, None])


def tracked(*tensors: Tensor) -> bool:
    return any(t.requires_grad or is_dual(t) for t in tensors)


def followed(data: Data) -> bool:
    """Whether derivatives may be asked for."""
    if transforms_active():
        return True
    return any(is_dual(t) for t in data.tensors) or (torch.is_grad_enabled() and tracked(*data.tensors))
