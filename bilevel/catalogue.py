"""What there is to run: every case and method, and which fit together."""

import contextlib
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from bilevel.kinds import KINDS, Kind
from bilevel.settings import class_slots, function_slots, listing, plain, show

_HEADINGS = {
    "bilevel": "Bilevel problems (bilevel run NAME): minimize f(x, y*(x)), where y*(x) minimizes g(x, .)",
    "constrained": "Constrained problems (bilevel run NAME): minimize f(x) s.t. h(x) = 0, c(x) <= 0, bounds",
}
_FAMILIES = {
    "hock-schittkowski": "Hock-Schittkowski",
    "boggs-tolle": "Boggs-Tolle",
    "cutest": "CUTEst",
    "bolib": "BOLIB",
}
_STRUCTURE = ("equality", "inequality", "bounds", "upper-set", "lower-set", "upper-inequality", "lower-inequality")


def catalogue(problems: ModuleType) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """``cases`` and ``algorithms`` of every kind, as plain data.

    Args:
        problems: the package of that name, which this one must not import.
    """
    return {
        name: {
            "cases": [_case(problems, kind, entry) for entry in problems.entries(name).values()],
            "algorithms": [_method(key, cls) for key, cls in kind.methods().items()],
        }
        for name, kind in KINDS.items()
    }


def _case(problems: ModuleType, kind: Kind, entry: Any) -> dict[str, Any]:
    fits, note = None, "needs --data-dir"
    if "external-data" not in entry.tags:
        with contextlib.suppress(FileNotFoundError):
            problem = problems.case(entry.name).problem
            fits = [name for name, cls in kind.methods().items() if cls().refuses(problem) is None]
            note = None
    defaults = {name: slot.default for name, slot in function_slots(entry.factory).items()}
    return {
        "name": entry.name,
        "summary": entry.summary,
        "tags": sorted(entry.tags - {kind.name}),
        "settings": plain(defaults),
        "fits": fits,
        "note": note,
    }


def _method(name: str, cls: type[Any]) -> dict[str, Any]:
    found = {
        "name": name,
        "summary": (inspect.getdoc(inspect.getmodule(cls)) or "").partition("\n")[0],
        "settings": plain({key: slot.default for key, slot in class_slots(cls).items()}),
    }
    guarantee = getattr(cls, "guarantee", None)
    return found if guarantee is None else {**found, "guarantee": guarantee}


def overview(found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """The catalogue as a text; cases of one family, with the same settings, on one line."""
    lines = []
    for name, kind in KINDS.items():
        lines += ["", "", _HEADINGS[name]] if lines else [_HEADINGS[name]]
        for group in _groups(found[name]["cases"]):
            lines += ["", *_group(group)]
        lines += ["", f"Algorithms for {name} problems (--algorithm NAME):"]
        lines += ["", f"  auto: {kind.automatic_text}"]
        for method in found[name]["algorithms"]:
            guarantee = f" ({method['guarantee']})" if "guarantee" in method else ""
            defaults = listing(class_slots(kind.methods()[method["name"]]))
            lines += ["", f"  {method['name']}{guarantee}: {method['summary']}", *_field("settings", defaults)]
    return "\n".join(lines)


def _groups(cases: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Single cases, then members of one family that are alike in everything that is shown, together."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for case in cases:
        family = _family(case)
        alike = (family, str(case["fits"]), str(case["settings"])) if family else case["name"]
        groups.setdefault(alike, []).append(case)
    return sorted(groups.values(), key=lambda group: _family(group[0]) is not None)


def _family(case: Mapping[str, Any]) -> str | None:
    return next((title for tag, title in _FAMILIES.items() if tag in case["tags"]), None)


def _group(group: Sequence[Mapping[str, Any]]) -> list[str]:
    first = group[0]
    family = _family(first)
    defaults = [f"{key}={show(value)}" for key, value in first["settings"].items()]
    fits = ", ".join(first["fits"]) or "none" if first["fits"] is not None else first["note"]
    tags = f"  [{', '.join(first['tags'])}]" if first["tags"] else ""
    head = [f"  {first['name']}: {first['summary']}{tags}"]
    if family is not None:
        has = [tag for tag in _STRUCTURE if any(tag in case["tags"] for case in group)]
        head = [
            f"  {family}, {len(group)} cases  [{', '.join(has)}]",
            *_field("names", [case["name"] for case in group]),
        ]
    return [*head, f"      fits      {fits}", *_field("settings", defaults)]


def _field(name: str, words: Sequence[str]) -> list[str]:
    return textwrap.wrap(
        " ".join(words) or "none", 110, initial_indent=f"      {name:<10}", subsequent_indent=" " * 16,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
