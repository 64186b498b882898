"""The kinds of problems that the command line solves."""

import difflib
from typing import Any

from bilevel.auto import AUTO
from bilevel.kinds.base import EXACT as EXACT
from bilevel.kinds.base import Automatic as Automatic
from bilevel.kinds.base import Chart as Chart
from bilevel.kinds.base import Job as Job
from bilevel.kinds.base import Kind as Kind
from bilevel.kinds.base import Outcome as Outcome
from bilevel.kinds.base import Row as Row
from bilevel.kinds.bilevel import BilevelKind
from bilevel.kinds.constrained import ConstrainedKind

KINDS: dict[str, Kind] = {kind.name: kind for kind in (BilevelKind(), ConstrainedKind())}


def kind_of(problem: Any) -> Kind | None:
    """The kind of problem that ``problem`` declares, if it declares one."""
    return next((kind for kind in KINDS.values() if kind.declares(problem)), None)


def declarations() -> str:
    """What declares a problem, for messages."""
    *names, last = [name for kind in KINDS.values() for name in kind.declarations]
    return f"a {', '.join(names)} or {last}"


def method(name: str) -> type[Any]:
    """The class of the method called ``name``, of any kind; upper and lower case, ``-`` and ``_`` do not matter.

    "auto" is :class:`Automatic`, of every kind.

    Raises:
        ValueError: for an unknown name, with the names there are.
    """
    known = {_plain(key): cls for kind in KINDS.values() for key, cls in kind.methods().items()}
    known[AUTO] = Automatic
    if _plain(name) in known:
        return known[_plain(name)]
    close = difflib.get_close_matches(_plain(name), known, n=1)
    hint = f"; did you mean {known[close[0]]().name}?" if close else "."
    lists = "; ".join(f"for {kind.name} problems {', '.join(kind.methods())}" for kind in KINDS.values())
    raise ValueError(f"unknown algorithm {name!r}{hint} Known: {lists}; and auto")


def require_kind(cls: type[Any], kind: Kind, label: str) -> None:
    """Refuse a method of another kind.

    Raises:
        ValueError: naming the methods that there are for ``label``, a problem of this kind.
    """
    if cls is Automatic or cls in kind.methods().values():
        return
    other = next(k.name for k in KINDS.values() if cls in k.methods().values())
    raise ValueError(
        f"--algorithm {cls.__name__} solves {other} problems, but {label} is a {kind.name} problem; use one of "
        f"{', '.join(kind.methods())}"
    )


def _plain(text: str) -> str:
    return text.lower().replace("_", "").replace("-", "")
