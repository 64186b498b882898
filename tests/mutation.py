"""Modules with one line broken on purpose, to see whether a test notices."""

import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def mutated(name: str, old: str, new: str) -> Iterator[Any]:
    """The module ``name`` with the only occurrence of ``old`` in its source replaced by ``new``, as another module.

    The real one stays as it is, and so does everything that imported it: take the broken class from what is yielded.

    Raises:
        ValueError: if ``old`` does not occur exactly once.
    """
    source = inspect.getsource(importlib.import_module(name))
    if source.count(old) != 1:
        raise ValueError(f"{old!r} occurs {source.count(old)} times in {name}, not once")
    broken = types.ModuleType(f"{name}_mutated")
    broken.__package__ = name.rpartition(".")[0]
    sys.modules[broken.__name__] = broken  # dataclasses look their module up
    try:
        exec(compile(source.replace(old, new), f"<{name} with {new!r}>", "exec"), vars(broken))
        yield broken
    finally:
        del sys.modules[broken.__name__]
