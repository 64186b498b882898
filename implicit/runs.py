"""What every ``solve`` does around the driver: check its arguments, and turn a run into plain data and back."""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch

from implicit import tree
from implicit.checkpoint import FORMAT, decode_method, encode_method
from implicit.iterate import Best, Callback, IterativeMethod, Run
from implicit.random import copy_generator
from implicit.tree import Tree

_RENAMED = {
    "maxiter": "max_steps",
    "max_iter": "max_steps",
    "n_steps": "max_steps",
    "tol": "rtol (or atol)",
    "gtol": "atol",
    "timeout": "time_limit",
    "callback": "callbacks=[...]",
    "seed": "generator=torch.Generator().manual_seed(seed)",
}


def refuse_unknown(unknown: dict[str, Any], where: str = "solve", **renamed: str) -> None:
    """Name the argument that does not exist, and what it is called here.

    Args:
        unknown: the arguments that the function does not have.
        where: the function.
        renamed: what arguments are called there, beyond what they are called everywhere.

    Raises:
        TypeError: if ``unknown`` is not empty.
    """
    names = _RENAMED | renamed
    for name in unknown:
        cure = f"; here it is called {names[name]}" if name in names else ""
        raise TypeError(f"{where}() has no argument {name!r}{cure}")


def check_callbacks(callbacks: Any) -> list[Callback]:
    """The callbacks as a list.

    Raises:
        TypeError: if they are no iterable of functions.
    """
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks must be a list of functions, got {callbacks!r}; write callbacks=[...]")
    listeners = list(callbacks)
    for listener in listeners:
        if not callable(listener):
            raise TypeError(f"callbacks must be functions of a StepInfo, got {listener!r}")
    return listeners


def check_budgets(max_steps: int | None, **numbers: float | None) -> None:
    """Refuse budgets and tolerances that are no numbers.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"{name} must be a number or None, got {value!r}")
    if max_steps is not None and (isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0):
        raise ValueError(f"max_steps must be a non-negative integer or None, got {max_steps!r}")
    limit = numbers.get("time_limit")
    if limit is not None and not limit > 0:
        raise ValueError(f"time_limit must be a positive number of seconds or None, got {limit!r}")


def own_generator(generator: Any) -> torch.Generator:
    """A copy of the caller's generator, or one seeded with 0.

    Raises:
        TypeError, ValueError: if it is no generator, or not on the CPU.
    """
    if generator is None:
        return torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}; torch.Generator().manual_seed(seed)")
    if generator.device.type != "cpu":
        raise ValueError(f"generator must live on the CPU, got {generator.device}; samples are moved where needed")
    return copy_generator(generator)


def capture_run(method: IterativeMethod[Any], run: Run[Any], **variables: Tree) -> dict[str, Any]:
    """The whole run as plain data; ``variables`` are what ``init`` starts from, under their names."""
    return {
        "format": FORMAT,
        "name": type(method).__name__,
        "method": {f.name: _encode_setting(getattr(method, f.name)) for f in fields(method)},  # type: ignore[arg-type]
        "state": run.state.state_dict(),
        "start": [[leaf.detach().clone() for leaf in tree.leaves(t)] for t in variables.values()],
        "skeleton": [_skeleton(t) for t in variables.values()],
        "history": [dict(row) for row in run.history],
        "seconds": run.seconds,
        "best": {
            "merit": run.best.merit,
            "step": run.best.step,
            "leaves": [leaf.clone() for leaf in tree.leaves(run.best.point)] if run.best.point is not None else None,
        },
    }


def check_format(checkpoint: Any, where: str) -> None:
    """Refuse what is no checkpoint of this version.

    Raises:
        ValueError: naming ``where`` to get one.
    """
    known = isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT
    if not known or not {"name", "method", "state", "start"} <= checkpoint.keys():
        raise ValueError(f"checkpoint is not one of this version; get it from {where}.load_checkpoint(path)")


def restore_settings(checkpoint: dict[str, Any], given: Any) -> tuple[dict[str, Any], Any]:
    """The fields of the method as it was resolved then; what could not be stored is taken from ``given``.

    Returns:
        The fields, and ``given`` with them (None if there is no ``given``).

    Raises:
        ValueError: if a field could not be stored and no method is given.
    """
    settings = {}
    for name, stored in checkpoint["method"].items():
        if "value" in stored:
            settings[name] = decode_method(stored["value"])
        elif given is None:
            raise ValueError(f"{name}: {stored['missing']}")
        else:
            settings[name] = getattr(given, name)
    return settings, None if given is None else replace(given, **settings)


def restore_start(checkpoint: dict[str, Any]) -> list[Tree]:
    """The variables that ``init`` started from.

    Raises:
        ValueError: if their containers cannot be rebuilt.
    """
    pairs = zip(checkpoint["skeleton"], checkpoint["start"], strict=True)
    return [_rebuild(skeleton, list(leaves)) for skeleton, leaves in pairs]


def restore_run(checkpoint: dict[str, Any], method: IterativeMethod[Any], state: Any) -> Run[Any]:
    """The run as it was; ``state`` is allocated by ``init`` and filled."""
    state.load_state_dict(checkpoint["state"])
    best = checkpoint["best"]
    run = Run(state, history=[dict(row) for row in checkpoint["history"]], seconds=checkpoint["seconds"])
    if best["leaves"] is not None:
        spec = tree.structure(method.point(state))
        run.best = Best(best["merit"], best["step"], tree.unflatten(best["leaves"], spec))
    return run


def _encode_setting(value: Any) -> dict[str, Any]:
    try:
        return {"value": encode_method(value)}
    except TypeError as error:  # the user passes the method again, and this field is taken from there
        return {"missing": str(error)}


def _skeleton(value: Tree) -> Any:
    """The container structure as plain data: dicts, lists and tuples of leaves; None for anything else."""
    if isinstance(value, torch.Tensor):
        return "leaf"
    if type(value) is dict and all(isinstance(k, str) for k in value):
        return {k: _skeleton(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return ["list" if isinstance(value, list) else "tuple", [_skeleton(v) for v in value]]
    return None


def _rebuild(skeleton: Any, leaves: list[torch.Tensor]) -> Tree:
    if skeleton == "leaf":
        return leaves.pop(0)
    if isinstance(skeleton, dict):
        return {k: _rebuild(v, leaves) for k, v in skeleton.items()}
    if isinstance(skeleton, list):
        parts = [_rebuild(v, leaves) for v in skeleton[1]]
        return parts if skeleton[0] == "list" else tuple(parts)
    raise ValueError("the variables use containers that a checkpoint cannot rebuild; use dicts, lists and tuples")
