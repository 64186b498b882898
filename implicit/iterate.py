"""The one loop that drives every iterative method, and what it shows to callbacks."""

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from implicit import tree
from implicit.state import State
from implicit.status import Status
from implicit.tree import Tree

S = TypeVar("S", bound=State)
Values = Mapping[str, "Tensor | float"]


class IterativeMethod(ABC, Generic[S]):
    """A method as five functions of a problem and a state; its dataclass fields are its hyperparameters.

    The driver calls ``init`` once, ``step`` in a loop, ``terminate`` after every ``check_every`` steps, and
    ``postprocess`` at the end. Users can call the same functions and own the loop.
    """

    check_every: int | None = 1

    def resolve(self, problem: Any, *start: Any, max_steps: int | None = None) -> Self:
        """The same method with every None filled in; curvature is measured here."""
        return self

    @abstractmethod
    def init(self, problem: Any, *start: Any, generator: torch.Generator | None = None) -> S:
        """A state that owns copies of the starting point."""

    @abstractmethod
    def step(self, problem: Any, state: S) -> Values:
        """Advance ``state`` in place and return scalars that describe the step, on the device."""

    @abstractmethod
    def terminate(self, problem: Any, state: S) -> Status:
        """RUNNING to go on; otherwise why to stop, from measured quantities."""

    def merit(self, problem: Any) -> str | None:
        """Name of the reported value whose smallest point is kept as best so far; None keeps the last point."""
        return None

    def point(self, state: S) -> Tree:
        """The iterate, for keeping the best one."""
        raise NotImplementedError(f"{type(self).__name__} names a merit but no point()")

    def postprocess(self, problem: Any, state: S, status: Status) -> Any:
        """The result of the run; the state itself by default."""
        return state


@dataclass(frozen=True)
class StepInfo:
    """What a callback sees.

    Attributes:
        step: completed steps of the whole run, over all resumptions.
        seconds: time spent in the whole run.
        values: the method's scalars, as floats.
        state: the live state; read it, do not keep it.
        max_steps: the step budget, or None.
        capture: builds a checkpoint of this very moment.
    """

    step: int
    seconds: float
    values: dict[str, float]
    state: Any = field(repr=False)
    max_steps: int | None
    capture: Callable[[], dict[str, Any]] = field(repr=False)


Callback = Callable[[StepInfo], "bool | None"]
"""Called after every check; returning True stops the run. May also have ``start(info)`` and ``end(info, status)``."""


@dataclass
class Best:
    """The point with the smallest merit so far."""

    merit: float = float("inf")
    step: int = 0
    point: Tree = None

    def offer(self, merit: float, step: int, point: Callable[[], Tree]) -> None:
        """Keep a copy if ``merit`` is finite and smaller."""
        if math.isfinite(merit) and merit < self.merit:
            self.merit, self.step, self.point = merit, step, tree.clone(point())


@dataclass
class Run(Generic[S]):
    """A run in progress or finished: what the driver reads and writes."""

    state: S
    status: Status = Status.RUNNING
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    best: Best = field(default_factory=Best)
    error: BaseException | None = None
    culprit: str = ""


def iterate(
    method: IterativeMethod[S],
    problem: Any,
    run: Run[S],
    *,
    max_steps: int | None = None,
    time_limit: float | None = None,
    callbacks: Iterable[Callback] = (),
    capture: Callable[[Run[S]], dict[str, Any]] | None = None,
    interruptible: bool = False,
    record: bool = True,
) -> Run[S]:
    """Drive ``method`` from ``run.state`` until it terminates or a budget is used up; updates and returns ``run``.

    Args:
        method: what to drive.
        problem: handed to the method unchanged.
        run: holds the state; continues its step count, history and clock.
        max_steps: steps of the whole run, counting those before a resumption; None for no limit.
        time_limit: seconds of this call; None for no limit.
        callbacks: called after every check with a :class:`StepInfo`.
        capture: turns the run into a checkpoint dict, for callbacks that save.
        interruptible: take over SIGINT and SIGTERM: the first lets the step finish and stops, the second raises. A
            run within a step of another leaves both signals to that one.
        record: keep a history and the best point, and serve callbacks; False spares inner solves that cost.

    A state that already satisfies ``terminate`` is returned without a step. An exception raised by user code inside a
    step or a callback (``sys.exit`` included) is stored in ``run.error``, with ``run.culprit`` saying where; the state
    is the last one committed and the status stays RUNNING.
    """
    listeners = list(callbacks)
    began, before = time.perf_counter(), run.seconds
    state = run.state
    state.deadline = None if time_limit is None else began + time_limit

    def info(values: dict[str, float]) -> StepInfo:
        run.seconds = before + time.perf_counter() - began
        return StepInfo(
            state.step, run.seconds, values, state, max_steps, lambda: capture(run) if capture else {"state": state}
        )

    _notify(listeners, "start", info({}))
    with _interrupt_flag(interruptible) as interrupted:
        run.status = method.terminate(problem, state)
        while run.status is Status.RUNNING:
            if max_steps is not None and state.step >= max_steps:
                run.status = Status.STEP_LIMIT
                break
            try:
                values = method.step(problem, state)
            except (Exception, SystemExit) as error:
                run.error, run.culprit = error, f"step {state.step + 1}"
                break
            state.step += 1
            stop = bool(interrupted)
            late = time_limit is not None and time.perf_counter() - began >= time_limit
            last = max_steps is not None and state.step >= max_steps
            if not (stop or late or last or state.step % (method.check_every or 1) == 0):
                continue
            if record:
                try:
                    run.status = _check(method, problem, run, values, info, listeners)
                except (Exception, SystemExit) as error:
                    run.error, run.culprit = error, f"a callback after step {state.step}"
                    break
            else:
                run.status = method.terminate(problem, state) if bool(state.finite) else Status.NONFINITE
            if run.status is Status.RUNNING:
                run.status = Status.STOPPED if stop else Status.TIME_LIMIT if late else Status.RUNNING
    run.seconds = before + time.perf_counter() - began
    final = info({k: v for k, v in run.history[-1].items() if k not in ("step", "seconds")} if run.history else {})
    _notify(listeners, "end", final, run.status)
    return run


def _check(
    method: IterativeMethod[S],
    problem: Any,
    run: Run[S],
    values: Values,
    info: Callable[[dict[str, float]], StepInfo],
    listeners: list[Callback],
) -> Status:
    """Synchronise once: record, keep the best, ask the method and the callbacks whether to go on."""
    state = run.state
    numbers = to_floats(values)
    if taken := numbers.keys() & {"step", "seconds"}:
        raise ValueError(
            f"{type(method).__name__}.step returns {sorted(taken)}, which the driver itself records; rename"
        )
    shown = info(numbers)
    run.history.append({"step": state.step, "seconds": shown.seconds, **numbers})
    if not bool(state.finite):
        return Status.NONFINITE
    merit = method.merit(problem)
    if merit is not None:
        run.best.offer(numbers.get(merit, float("inf")), state.step, lambda: method.point(state))
    status = method.terminate(problem, state)
    wants_stop = [listener(shown) is True for listener in listeners]
    return Status.STOPPED if status is Status.RUNNING and any(wants_stop) else status


def to_floats(values: Values) -> dict[str, float]:
    """Scalars as Python floats with one transfer per device."""
    tensors = {k: v.detach().double().reshape(()) for k, v in values.items() if isinstance(v, Tensor)}
    result = {k: float(v) for k, v in values.items() if not isinstance(v, Tensor)}
    if tensors:
        device = next(iter(tensors.values())).device
        numbers = torch.stack([t.to(device) for t in tensors.values()]).tolist()
        result.update(zip(tensors, numbers, strict=True))
    return {k: result[k] for k in values}


def _notify(listeners: list[Callback], hook: str, *args: Any) -> None:
    for listener in listeners:
        method = getattr(listener, hook, None)
        if method is not None:
            method(*args)


class _Flag:
    """A signal handler: the first signal is remembered, the second raises."""

    def __init__(self) -> None:
        self.raised = False

    def __bool__(self) -> bool:
        return self.raised

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True


@contextmanager
def _interrupt_flag(active: bool) -> Iterator[_Flag]:
    flag = _Flag()
    if not active or threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if any(isinstance(handler, _Flag) for handler in previous.values()):
        # Within a step of another run: that one stops, after this step, which has to be a whole one.
        yield flag
        return
    for number in previous:
        signal.signal(number, flag)
    try:
        yield flag
    finally:
        for number, before in previous.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
