"""A linear map computed by autograd, recorded once and replayed without autograd.

One backward pass over a kept graph spends a part of its time on what does not depend on the direction: walking the
graph, unpacking saved tensors, and the factors of the derivative at the point. :class:`Recorded` runs the pass once,
notes the tensor operations that depend on the direction, keeps everything else as constants, and replays the rest as
straight-line code. On small problems a replayed Hessian product costs about three quarters of one on the graph; the
operations are the same, and so are the results.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from implicit import tree

Map = Callable[..., Sequence[Tensor | None]]


class Unrecordable(Exception):
    """Raised where a computation is more than a fixed list of tensor operations; the message says why."""


class _Recorder(TorchDispatchMode):
    """Notes every operation that depends on the inputs, and the tensors that came from outside."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.dependent = {id(v) for v in inputs}
        self.fresh: set[int] = set()  # made by a recorded operation, sharing memory with nothing else
        self.seen: dict[int, Tensor] = {id(v): v for v in inputs}  # keeps every tensor alive: ids stay unique
        self.sources: dict[int, Tensor] = {}
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler at the first use, a second or more

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [a for a in tree.leaves((args, kwargs)) if isinstance(a, Tensor)]
        for a in given:
            if a.layout is not torch.strided or type(a) not in (Tensor, torch.nn.Parameter):
                raise Unrecordable(f"{func} acts on a {type(a).__name__} of layout {a.layout}")
            if id(a) not in self.seen:
                self.seen[id(a)] = self.sources[id(a)] = a
        depends = any(id(a) in self.dependent for a in given)
        if depends:
            self._check(func, args, kwargs)
        out = func(*args, **kwargs)
        outputs = [o for o in tree.leaves(out) if isinstance(o, Tensor)]
        if depends and (not outputs or any(not isinstance(o, Tensor | None) for o in tree.leaves(out))):
            raise Unrecordable(f"{func} turns tensors into numbers")
        for o in outputs:
            self.seen[id(o)] = o
            if depends:
                self.dependent.add(id(o))
        if depends:
            self.calls.append((func, args, kwargs, out))
            if not any(returned.alias_info for returned in func._schema.returns):
                self.fresh.update(id(o) for o in outputs)
        return out

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Unrecordable(f"{func} draws random numbers")
        if not func._schema.is_mutable:
            return
        for place, declared in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(declared.name)
            written = declared.alias_info is not None and declared.alias_info.is_write
            if written and not all(id(v) in self.fresh for v in tree.leaves(value)):
                raise Unrecordable(f"{func} writes into memory that it shares")


class Recorded:
    """``function`` as straight-line code; it must be linear in its arguments and otherwise a constant.

    Args:
        function: maps tensors to tensors (None for zero).
        inputs: tensors of the shapes it will be called with; the record is taken from one call with them.

    Attributes:
        first: the result of that call.

    Raises:
        Unrecordable: if the operations depend on the values, draw random numbers or write into shared memory.

    Calls return new tensors, and raise ValueError once a tensor that the record rests on has been changed in place.
    """

    def __init__(self, function: Map, inputs: Sequence[Tensor]) -> None:
        recorder = _Recorder(inputs)
        with torch.no_grad(), recorder:
            found = function(*inputs)
        self.first = found
        self._nonzero = [o is not None for o in found]
        self._sources = list(recorder.sources.values())
        self._versions = [s._version for s in self._sources]
        self._run = _compile(recorder, inputs, found)

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor | None]:
        self._require_unchanged()
        with torch.no_grad():
            return self._run(*tensors)

    def batch(self, *tensors: Tensor) -> Sequence[Tensor | None]:
        """The same for tensors with a leading axis of k; results carry it too.

        Raises:
            RuntimeError: if torch cannot batch one of the operations.
        """
        self._require_unchanged()
        if not tensors:
            return [None] * len(self._nonzero)
        with torch.no_grad():
            found = iter(torch.func.vmap(lambda *v: tuple(o for o in self._run(*v) if o is not None))(*tensors))
        return [next(found) if k else None for k in self._nonzero]

    def _require_unchanged(self) -> None:
        if [s._version for s in self._sources] != self._versions:
            raise ValueError(
                "a tensor that a recorded product rests on was changed in place since; build the operator anew after "
                "every change of the point, the data or the buffers"
            )


class _Code:
    """Source text of a function of constants and inputs, and the names its values go by."""

    def __init__(self, recorder: _Recorder, inputs: Sequence[Tensor]) -> None:
        self.dependent = recorder.dependent
        self.scope: dict[str, Any] = {}
        self.names = {id(v): f"v{i}" for i, v in enumerate(inputs)}
        self.turned: dict[int, str] = {}  # the name of x for every value that is x.T
        self.lines: list[str] = []

    def constant(self, value: Any) -> str:
        name = f"c{len(self.scope)}"
        self.scope[name] = value
        return name

    def refer(self, value: Any) -> str:
        """An expression for an argument."""
        if isinstance(value, Tensor):
            if id(value) not in self.names:
                self.names[id(value)] = self.constant(value.detach())
            return self.names[id(value)]
        if isinstance(value, list | tuple):
            return f"[{', '.join(self.refer(v) for v in value)}]"
        return repr(value) if value is None or type(value) in (bool, int, str) else self.constant(value)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """One operation; transposes of transposes, which backward passes are full of, become what they undo."""
        if _transposes(func, args):
            if id(args[0]) in self.turned:
                self.names[id(out)] = self.turned[id(args[0])]
                return
            self.turned[id(out)] = self.refer(args[0])
        given = [self.refer(a) for a in args] + [f"{key}={self.refer(a)}" for key, a in kwargs.items()]
        parts = [out] if isinstance(out, Tensor) else list(out)
        targets = []
        for part in parts:
            if id(part) not in self.names:  # an operation in place returns what it was given
                self.names[id(part)] = f"v{len(self.names)}"
            targets.append(self.names[id(part)] if isinstance(part, Tensor) else "_")
        assigned = targets[0] if isinstance(out, Tensor) else f"({', '.join(targets)},)"
        self.lines.append(f"{assigned} = {self.constant(func)}({', '.join(given)})")

    def compile(self, inputs: Sequence[Tensor], results: list[str]) -> Callable[..., Any]:
        """The function, with every value dropped after its last use."""
        signature = ", ".join(self.names[id(v)] for v in inputs)
        last: dict[str, int] = {}
        for position, line in enumerate([*self.lines, " ".join(results)]):
            last.update((name, position) for name in re.findall(r"\bv\d+\b", line))
        dead: dict[int, list[str]] = {}
        for name, position in last.items():
            dead.setdefault(position, []).append(name)
        body = []
        for position, line in enumerate(self.lines):
            body += [line] + ([f"del {', '.join(dead[position])}"] if position in dead else [])
        text = "\n    ".join([f"def run({signature}):", *body, f"return [{', '.join(results)}]"])
        exec(text, self.scope)
        return self.scope.pop("run")  # a function in its own globals would be a cycle that holds the constants


def _transposes(func: Any, args: tuple[Any, ...]) -> bool:
    if func is torch.ops.aten.permute.default:
        return list(args[1]) == [1, 0]
    return func is torch.ops.aten.t.default


def _compile(
    recorder: _Recorder, inputs: Sequence[Tensor], outputs: Sequence[Tensor | None]
) -> Callable[..., Sequence[Tensor | None]]:
    code = _Code(recorder, inputs)
    for call in recorder.calls:
        code.call(*call)
    results = []
    for o in outputs:
        name = "None" if o is None else code.refer(o)
        shared = o is not None and id(o) not in recorder.fresh
        results.append(f"{code.constant(torch.clone)}({name})" if shared else name)
    return code.compile(inputs, results)
