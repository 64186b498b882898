"""Cases by name, with typed parameters."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Factory = Callable[..., Any]
"""A function of keyword arguments with defaults to a ``Case`` or a ``ConstrainedCase``."""


@dataclass(frozen=True)
class Entry:
    """A registered family member: how to build it and what it is."""

    name: str
    factory: Factory
    summary: str
    tags: frozenset[str]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The keyword parameters of the factory."""
        return dict(inspect.signature(self.factory).parameters)

    @property
    def kind(self) -> str:
        """``"bilevel"`` or ``"constrained"``."""
        return "constrained" if "constrained" in self.tags else "bilevel"


_ENTRIES: dict[str, Entry] = {}


def register(name: str, summary: str, *tags: str) -> Callable[[Factory], Factory]:
    """Add a case factory, a function of keyword arguments with defaults.

    Raises:
        ValueError: if the name is taken.
    """

    def decorate(factory: Factory) -> Factory:
        if name in _ENTRIES:
            raise ValueError(f"a case called {name!r} is registered already")
        _ENTRIES[name] = Entry(name, factory, summary, frozenset(tags))
        return factory

    return decorate


def entries(kind: str = "bilevel") -> dict[str, Entry]:
    """Every registered case of a kind, ``"bilevel"`` or ``"constrained"``, under its name.

    Raises:
        ValueError: for another kind.
    """
    if kind not in ("bilevel", "constrained"):
        raise ValueError(f"kind must be 'bilevel' or 'constrained', got {kind!r}")
    return {name: found for name, found in _ENTRIES.items() if found.kind == kind}


def entry(name: str) -> Entry:
    """The entry called ``name``; upper and lower case, ``-`` and ``_`` do not matter.

    Raises:
        ValueError: for an unknown name, with the names there are.
    """

    def plain(text: str) -> str:
        return text.lower().replace("-", "_")

    known = {plain(key): value for key, value in _ENTRIES.items()}
    if plain(name) in known:
        return known[plain(name)]
    close = difflib.get_close_matches(plain(name), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    bilevel = entries()
    single = sorted(key for key, value in bilevel.items() if "bolib" not in value.tags)
    raise ValueError(
        f"unknown case {name!r}{hint} Known: {', '.join(single)}; {len(bilevel) - len(single)} problems of the BOLIB "
        f"library and {len(entries('constrained'))} constrained problems: `bilevel list` in a shell, "
        "list(problems.entries()) and list(problems.entries('constrained')) in Python, name them"
    )


def case(name: str, **settings: Any) -> Any:
    """Build a case: a ``Case``, or for a constrained problem a ``ConstrainedCase``.

    Raises:
        ValueError: for an unknown name or setting; the message lists the valid ones.
    """
    found = entry(name)
    for key in settings:
        if key not in found.parameters:
            raise ValueError(
                f"case {found.name} has no setting {key!r}; it has: {', '.join(found.parameters) or 'none'}"
            )
    built = found.factory(**settings)
    values = {k: settings.get(k, p.default) for k, p in found.parameters.items()}
    return replace(built, name=found.name, tags=built.tags | found.tags, settings=values)


def cases(*tags: str) -> list[Any]:
    """Every bilevel case that carries all ``tags``, or with ``"constrained"`` among them every constrained one, built
    with its defaults; data that must be fetched are not touched unless the tag ``external-data`` is asked for."""
    wanted = {t for t in tags if t != "bilevel"}
    return [
        case(e.name)
        for e in entries("constrained" if "constrained" in wanted else "bilevel").values()
        if wanted <= e.tags and ("external-data" in wanted or "external-data" not in e.tags)
    ]
