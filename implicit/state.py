"""The state of a run: tensors, counters and one generator, saved as plain data."""

from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from implicit import tree


@runtime_checkable
class Stateful(Protocol):
    """Anything that saves and loads itself: optimizers, modules, samplers."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Restore what :meth:`state_dict` returned."""
        ...


def _true() -> Tensor:
    return torch.ones((), dtype=torch.bool)


@dataclass(kw_only=True)
class State:
    """Base of the states of all methods.

    Fields may hold tensors, pytrees of tensors, numbers, strings, lists of numbers, a ``torch.Generator``, nested
    states, and objects with ``state_dict``. A generator belongs to exactly one field of one state: two references
    would become two generators after a load. A field declared with ``metadata={"transient": True}`` is not saved, and
    is None after a load.

    Attributes:
        step: completed steps.
        finite: a 0-d bool tensor, false once an update was refused because it was not finite.
        deadline: when the driver will stop by its time limit, on the clock of ``time.perf_counter``, for steps that
            take long; None where there is no limit.
    """

    step: int = 0
    finite: Tensor = field(default_factory=_true)
    deadline: float | None = field(default=None, metadata={"transient": True})

    def state_dict(self) -> dict[str, Any]:
        """Plain data that ``torch.load(weights_only=True)`` accepts."""
        return {f.name: _encode(getattr(self, f.name)) for f in fields(self) if not f.metadata.get("transient")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore in place; the state must have been allocated for the same problem and method.

        Tensors keep their memory, because optimizers hold references to them.

        Raises:
            ValueError: if a field is missing or a tensor has another shape.
        """
        _load(self, state_dict, set())


def _load(state: State, saved: dict[str, Any], written: set[int]) -> None:
    for f in fields(state):
        if f.metadata.get("transient"):
            setattr(state, f.name, None)
            continue
        if f.name not in saved:
            raise ValueError(f"the checkpoint has no field {f.name!r} of {type(state).__name__}")
        setattr(state, f.name, _decode(getattr(state, f.name), saved[f.name], f.name, written))


def _is_plain(value: Any) -> bool:
    if not isinstance(value, list | dict):
        return False
    values = value.values() if isinstance(value, dict) else value
    return all(isinstance(v, int | float) for v in values)


def _number(value: Any) -> Any:
    # numpy's float64 is a float, but weights_only loading refuses it.
    return float(value) if isinstance(value, float) else value


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Stateful):
        return value.state_dict()
    if value is None or isinstance(value, bool | int | float | str):
        return _number(value)
    if _is_plain(value):
        return {k: _number(v) for k, v in value.items()} if isinstance(value, dict) else [_number(v) for v in value]
    return [leaf.detach().clone() for leaf in tree.leaves(value)]


def _decode(current: Any, saved: Any, name: str, written: set[int]) -> Any:
    if isinstance(current, torch.Generator):
        current.set_state(saved.cpu())
        return current
    if isinstance(current, State):
        _load(current, saved, written)
        return current
    if isinstance(current, Stateful):
        current.load_state_dict(saved)
        return current
    if current is None and isinstance(saved, list) and any(isinstance(v, Tensor) for v in saved):
        raise TypeError(f"field {name!r} is a tree whose structure is not known on loading; allocate it in init")
    if current is None or isinstance(current, bool | int | float | str):
        return saved
    if _is_plain(current):
        return saved.copy()
    own, spec = tree.flatten(current)
    given = [saved] if isinstance(saved, Tensor) else saved
    if (
        not isinstance(given, list)
        or len(own) != len(given)
        or any(a.shape != b.shape for a, b in zip(own, given, strict=True))
    ):
        shapes = [tuple(t.shape) for t in given] if isinstance(given, list) else given
        raise ValueError(f"field {name!r} of the checkpoint holds {shapes}, this problem has {tree.describe(current)}")
    return tree.unflatten([_fill(a, b, written) for a, b in zip(own, given, strict=True)], spec)


def _fill(own: Tensor, saved: Tensor, written: set[int]) -> Tensor:
    """``saved`` in the memory of ``own``, unless another field of the state has been loaded there."""
    memory = own.untyped_storage().data_ptr()
    if memory in written:
        return saved.to(device=own.device, dtype=own.dtype).clone()
    if memory:
        written.add(memory)
    with torch.no_grad():
        return own.copy_(saved)
