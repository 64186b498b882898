"""What the command line can solve: a registered case, or a problem in a file of the user's."""

import contextlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bilevel.kinds import KINDS, Job, Kind, declarations, kind_of
from bilevel.settings import Slot, function_slots


class TargetError(ValueError):
    """A file, or a name in it, that cannot be solved."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that builds a :class:`Job` from settings.

    Attributes:
        name: for reports and the default output directory.
        identity: what must be the same to resume.
        label: for messages.
        slots: the settings there are.
        build: called with settings.
        kind: where it is known before something is built.
        file: the user's file, or None.
    """

    name: str
    identity: str
    label: str
    slots: Mapping[str, Slot]
    build: Callable[..., Job]
    kind: Kind | None = None
    file: Path | None = None


def load_case(problems: ModuleType, name: str) -> Target:
    """The case ``name`` of the package ``problems``, which this one must not import.

    Raises:
        ValueError: for an unknown name.
    """
    entry = problems.entry(name)
    kind = KINDS[entry.kind]
    return Target(
        name=entry.name,
        identity=f"case {entry.name}",
        label=f"case {entry.name}",
        slots=function_slots(entry.factory),
        build=lambda **given: kind.job(problems.case(entry.name, **given)),
        kind=kind,
    )


def load_target(text: str) -> Target:
    """The target ``FILE.py:NAME``.

    NAME is a problem, or a function without required parameters that returns one, alone or as ``(problem, x0, y0)``,
    for a constrained problem ``(problem, x0)``; its keyword parameters are settings. The start is the returned one, or
    ``problem.start``, or the variables ``x0`` and ``y0`` of the file.

    Raises:
        TargetError: if the file or the name does not exist, the file fails, or NAME is something else.
    """
    place, _, name = text.rpartition(":") if not text.endswith(".py") else (text, "", "")
    file = Path(place)
    if not place or file.suffix != ".py":
        raise TargetError(f"{text!r} is not of the form FILE.py:NAME, such as my_problem.py:problem")
    if not file.is_file():
        raise TargetError(f"there is no file {place}; the current folder is {Path.cwd()}")
    file = file.resolve()
    module = _import(file)
    candidates = [key for key, value in vars(module).items() if _is_candidate(value, module)]
    listing = (
        f"it has: {', '.join(candidates)}" if candidates else "it has neither problems nor functions that make one"
    )
    if not name or not hasattr(module, name):
        reason = f"{place} has no {name!r}" if name else f"which problem of {place}? Write {place}:NAME"
        raise TargetError(f"{reason}; {listing}")
    found = getattr(module, name)
    kind = kind_of(found)
    if kind is None and not callable(found):
        raise TargetError(
            f"{place}:{name} must be {declarations()}, or a function that returns one, got {type(found).__name__}; "
            f"{listing}"
        )
    slots = {}
    if kind is None:
        required = _required(found)
        if required:
            raise TargetError(
                f"{place}:{name} must be callable without arguments, but it requires {', '.join(required)}; give "
                f"defaults (they become settings), or name something else; {listing}"
            )
        slots = function_slots(found)

    def build(**settings: Any) -> Job:
        with _blame(file, f"{place}:{name} failed"):
            made = found(**settings) if kind is None else found
        given = {k: settings.get(k, slot.default) for k, slot in slots.items()}
        return _job(made, module, f"{place}:{name}", given)

    return Target(
        name=f"{file.stem}-{name}",
        identity=f"{file}:{name}",
        label=f"{place}:{name}",
        slots=slots,
        build=build,
        kind=kind,
        file=file,
    )


def _job(made: Any, module: ModuleType, label: str, settings: dict[str, Any]) -> Job:
    problem, *start = made if isinstance(made, tuple) and made else (made,)
    kind = kind_of(problem)
    if kind is None:
        raise TargetError(
            f"{label} must return {declarations()}, alone or followed by its start, got {type(problem).__name__}"
        )
    names = ", ".join(kind.starts)
    if start and len(start) != len(kind.starts):
        raise TargetError(f"{label} must return (problem, {names}) or the problem alone, got {len(start) + 1} things")
    begin = tuple(start) or kind.start(problem)
    if begin is None:
        missing = [name for name in kind.starts if not hasattr(module, name)]
        if missing:
            raise TargetError(
                f"{label}: where should the run start? The file has no variable {' and no '.join(missing)}; define "
                f"{' and '.join(kind.starts)} in it, or let the function return (problem, {names})"
            )
        begin = tuple(vars(module)[name] for name in kind.starts)
    return Job(kind=kind, problem=problem, start=begin, settings=settings)


def _required(function: Callable[..., Any]) -> list[str]:
    """Parameters without a default; none where the signature is hidden."""
    try:
        parameters = inspect.signature(function).parameters.items()
    except (TypeError, ValueError):
        return []
    return [n for n, p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _is_candidate(value: Any, module: ModuleType) -> bool:
    own = inspect.isfunction(value) and value.__module__ == module.__name__
    return kind_of(value) is not None or (own and not _required(value))


def _import(file: Path) -> ModuleType:
    """The file as a module, its folder first on the path meanwhile; under a name that hides no package."""
    name = f"_bilevel_user_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    sys.path.insert(0, str(file.parent))
    try:
        with _blame(file, f"{file.name} cannot be imported"):
            spec.loader.exec_module(module)
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(file.parent))
    return module


@contextlib.contextmanager
def _blame(file: Path, what: str) -> Iterator[None]:
    """Errors of the user's own code as one line that says where."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise TargetError(f"{what}: {describe_error(error, file)}") from error


def describe_error(error: BaseException, file: Path | None) -> str:
    """Type and message of ``error``, after the deepest line of ``file`` that it passed through."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    where = locate(error, file)
    return f"{where}: {text}" if where else text


def locate(error: BaseException | None, file: Path | None) -> str:
    """``FILE:LINE`` of the deepest line of ``file`` that ``error`` or its causes passed through, or nothing."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    found = ""
    while error is not None and file is not None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        found = f"{file}:{frames[-1].lineno}" if frames else found
        error = error.__cause__
    return found
