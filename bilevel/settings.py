"""``key=value`` texts turned into the typed settings of a case and of an algorithm, and back into plain data."""

import ast
import difflib
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import PurePath
from typing import Any

import torch

import bilevel
import constrained
import implicit


class SettingError(ValueError):
    """A setting that does not exist, or a value of the wrong type."""


@dataclass(frozen=True)
class Slot:
    """The declared type and the default of one setting."""

    hint: Any
    default: Any


@dataclass
class _Node:
    text: str | None = None
    children: dict[str, "_Node"] = field(default_factory=dict)


def function_slots(function: Callable[..., Any]) -> dict[str, Slot]:
    """The parameters of ``function`` that have defaults."""
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # an annotation that names something absent; the default then says the type
        hints = {}
    return {
        name: Slot(hints.get(name, type(p.default)), p.default)
        for name, p in inspect.signature(function).parameters.items()
        if p.default is not p.empty
    }


def class_slots(cls: Any) -> dict[str, Slot]:
    """The fields of a dataclass, or of one of its objects with the values it has."""
    hints = typing.get_type_hints(cls if isinstance(cls, type) else type(cls))

    def current(f: Any) -> Any:
        if not isinstance(cls, type):
            return getattr(cls, f.name)
        return f.default_factory() if f.default_factory is not MISSING else None if f.default is MISSING else f.default

    return {f.name: Slot(hints[f.name], current(f)) for f in fields(cls) if f.init}


def split(assignments: Iterable[str]) -> dict[str, str]:
    """``["a=1", "b.c=2"]`` as a dict; of a key given twice the last value holds.

    Raises:
        SettingError: for a text without ``=`` or without a key.
    """
    found = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise SettingError(f"--set {assignment}: write it as key=value, such as --set seed=3")
        found[key] = text.strip()
    return found


def sort_keys(
    texts: Mapping[str, str], owners: Mapping[str, tuple[str, Mapping[str, Slot]]]
) -> dict[str, dict[str, str]]:
    """Which owner each key belongs to.

    Args:
        texts: values by key, as :func:`split` returns them.
        owners: by prefix (``"case"``, ``"algorithm"``) a name for messages and the settings there are.

    Returns:
        For every prefix the texts of its settings, without the prefix.

    Raises:
        SettingError: for a key that nobody has, with the valid ones and the nearest, or that several have.
    """
    result: dict[str, dict[str, str]] = {prefix: {} for prefix in owners}
    for key, text in texts.items():
        head, _, rest = key.partition(".")
        if head in owners and rest:
            prefix, key = head, rest
            matches = [prefix] if key.partition(".")[0] in owners[prefix][1] else []
        else:
            matches = [prefix for prefix, (_, slots) in owners.items() if head in slots]
        if len(matches) > 1:
            cure = " or ".join(f"{prefix}.{key}=... ({owners[prefix][0]})" for prefix in matches)
            raise SettingError(f"--set {key}={text}: both have a setting {head!r}; write {cure}")
        if not matches:
            known = {name: None for _, slots in owners.values() for name in slots}
            listing = "; ".join(f"{label}: {', '.join(slots) or 'none'}" for label, slots in owners.values())
            raise SettingError(
                f"--set {key}={text}: there is no setting {key.partition('.')[0]!r}"
                f"{_meant(key.partition('.')[0], known)} Settings of {listing}"
            )
        result[matches[0]][key] = text
    return result


def arguments(texts: Mapping[str, str], slots: Mapping[str, Slot]) -> dict[str, Any]:
    """Typed values of the settings that are given; keys with dots set a part, such as ``step_size.window``.

    Raises:
        SettingError: naming the key, the value, and what was expected.
    """
    root = _Node()
    for key, text in texts.items():
        node = root
        for part in key.split("."):
            node = node.children.setdefault(part, _Node())
        node.text = text
    return _children(root, slots, "")


def _children(node: _Node, slots: Mapping[str, Slot], above: str) -> dict[str, Any]:
    found = {}
    for name, child in node.children.items():
        key = f"{above}.{name}" if above else name
        if name not in slots:
            raise SettingError(f"{key}: there is no setting {name!r}{_meant(name, slots)} There are {', '.join(slots)}")
        found[name] = _value(child, slots[name], key)
    return found


def _value(node: _Node, slot: Slot, key: str) -> Any:
    value = slot.default if node.text is None else parse(node.text, slot.hint, slot.default, key)
    if not node.children:
        return value
    # All parts at once: one by one they could pass through a combination that the object refuses.
    if isinstance(value, Mapping):
        return {**value, **{name: _literal(child.text or "") for name, child in node.children.items()}}
    if not is_dataclass(value) or isinstance(value, type):
        part = f"{key}.{next(iter(node.children))}"
        raise SettingError(f"{part}: {key} is {show(value)} and has no parts; {_how(slot.hint, key)}")
    parts = _children(node, class_slots(value), key)
    try:
        return replace(value, **parts)
    except (TypeError, ValueError) as error:
        raise SettingError(f"{key}: {error}") from error


def parse(text: str, hint: Any, default: Any, key: str) -> Any:
    """``text`` as a value of type ``hint`` (of the default's where there is none).

    Raises:
        SettingError: naming the key, the text and what was expected.
    """
    known = _alternatives(hint) if hint not in (Any, None, inspect.Parameter.empty) else [type(default)]
    if known == [type(None)]:
        return _literal(text)
    for kind in sorted(known, key=_rank):
        try:
            return _convert(text, kind)
        except ValueError:
            continue
    expected = " or ".join(dict.fromkeys(_describe(kind) for kind in known))
    names = {name: None for kind in known for name in _classes(kind)}
    raise SettingError(f"{key}={text}: expected {expected}{_meant(text, names)}")


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _alternatives(part)]
    return [hint]


def _rank(kind: Any) -> int:
    """Narrow types first: "3" is an integer before it is a number, and a number before it is a text."""
    order = [type(None), bool, int, float]
    return order.index(kind) if kind in order else 9 if kind is str or _is_path(kind) else 5


def _convert(text: str, kind: Any) -> Any:
    if kind is type(None) or kind is bool:
        words = {"none": None, "null": None} if kind is not bool else {"true": True, "false": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    if kind is int:
        number = float(text)
        if not number.is_integer():
            raise ValueError(text)
        return int(text) if text.lstrip("+-").isdigit() else int(number)
    if kind in (float, str):
        return kind(text)
    if _is_path(kind):
        return text
    if kind is torch.dtype:
        found = getattr(torch, text.removeprefix("torch."), None)
        if not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(text)
        return found
    if typing.get_origin(kind) is typing.Literal:
        choices = {str(choice).lower(): choice for choice in typing.get_args(kind)}
        if text.lower() not in choices:
            raise ValueError(text)
        return choices[text.lower()]
    classes = {name.lower(): cls for name, cls in _classes(kind).items()}
    if text.lower() not in classes:
        raise ValueError(text)
    cls = classes[text.lower()]
    return cls if typing.get_origin(kind) is type else cls()


def _classes(kind: Any) -> dict[str, type]:
    """Public classes by name that fit ``type[Base]``, or whose objects fit ``Base``."""
    if typing.get_origin(kind) is type:
        base, spaces = typing.get_args(kind)[0], [torch.optim]
    else:
        base, spaces = typing.get_origin(kind) or kind, [implicit, constrained, bilevel]
        own = str(getattr(base, "__module__", "")).partition(".")[0] in ("implicit", "constrained", "bilevel")
        if not own or not inspect.isclass(base):
            return {}
    found: dict[str, type] = {}
    for space in spaces:
        found.update({name: value for name, value in vars(space).items() if isinstance(value, type)})
    return {
        name: cls
        for name, cls in found.items()
        if issubclass(cls, base) and not inspect.isabstract(cls) and (spaces[0] is not torch.optim or cls is not base)
    }


def _is_path(kind: Any) -> bool:
    base = typing.get_origin(kind) or kind
    return base is os.PathLike or (inspect.isclass(base) and issubclass(base, PurePath))


def _describe(kind: Any) -> str:
    words = {type(None): "none", bool: "true or false", int: "an integer", float: "a number", str: "a text"}
    if kind in words:
        return words[kind]
    if _is_path(kind):
        return "a path"
    if kind is torch.dtype:
        return "a floating-point type such as float32 or float64"
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is type:
        return "a class of torch.optim such as Adam"
    classes = _classes(kind)
    return (
        f"one of {', '.join(classes)}"
        if classes
        else f"parts ({getattr(kind, '__name__', kind)}), set as key.part=value"
    )


def _how(hint: Any, key: str) -> str:
    names = [name for kind in _alternatives(hint) for name in _classes(kind)]
    return f"choose it first, such as --set {key}={names[0]}" if names else f"write --set {key}=..."


def _literal(text: str) -> Any:
    """A value whose type nothing declares: a Python literal, true, false, none, or else a text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _meant(name: str, known: Iterable[str]) -> str:
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f"; did you mean {lowered[close[0]]}?" if close else "."


def plain(value: Any) -> Any:
    """``value`` as data for strict JSON; NaN and infinities become the texts "nan", "inf" and "-inf"."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, type):
        return value.__name__
    if is_dataclass(value):
        return {"class": type(value).__name__, **{f.name: plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return str(value)


def show(value: Any) -> str:
    """``value`` the way ``--set`` takes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return type(value).__name__ if is_dataclass(value) else str(plain(value))


def listing(slots: Mapping[str, Slot], above: str = "") -> list[str]:
    """``key=default`` for every setting, with the parts of nested ones."""
    lines = []
    for name, slot in slots.items():
        nested = is_dataclass(slot.default) and not isinstance(slot.default, type)
        lines += (
            listing(class_slots(slot.default), f"{above}{name}.") if nested else [f"{above}{name}={show(slot.default)}"]
        )
    return lines
