"""Conformance of iterative methods: the contract with the driver, and bitwise resumption."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.iterate import IterativeMethod, Run, StepInfo, iterate
from implicit.state import State
from implicit.status import Status
from implicit.testing.verdict import Verdict, identical
from implicit.tree import Tree

Measure = Callable[[Any], tuple[float, float]]


def check_method(
    method: IterativeMethod[Any],
    problem: Any,
    start: Sequence[Tree],
    *,
    steps: int = 6,
    optional: Sequence[str] = (),
    measure: Measure | None = None,
) -> None:
    """Whether a method keeps every promise of :class:`implicit.IterativeMethod` on one problem.

    It must be a frozen dataclass of settings; ``resolve`` must return the same class with every None filled in and
    change nothing when called again; ``init`` must copy the start; ``step`` must leave the step count to the driver and
    depend on nothing but problem, state and the state's generator; ``terminate`` must only look; a state that was
    saved, loaded with ``weights_only`` into a fresh one and continued must end bitwise where the uninterrupted run
    ends, so it must hold everything and no generator twice; a callback that returns True must stop the run with
    STOPPED, in a state from which it continues bitwise.

    Args:
        method: what to check.
        problem: handed to the method unchanged.
        start: the starting point, as ``init`` takes it.
        steps: length of the runs that are compared.
        optional: settings in which None has a meaning, so that ``resolve`` may leave it.
        measure: of a state: the measured residual and the tolerance asked for. Where the run ends as CONVERGED, the
            first must not exceed the second.

    Raises:
        ConformanceError: with one sentence, for the first promise that is broken.
        TypeError: if ``method`` is no IterativeMethod.
    """
    if not isinstance(method, IterativeMethod):
        raise TypeError(f"method must be an IterativeMethod, got {method!r}")
    verdict = Verdict(type(method).__name__)
    _settings(method, verdict)
    kept, random = tree.clone(list(start)), torch.get_rng_state()
    with verdict.runs("resolve"):
        resolved = method.resolve(problem, *start, max_steps=steps)
    _resolved(method, resolved, problem, start, steps, optional, verdict)
    check = _Check(resolved, problem, start, steps, verdict)
    check.fresh()
    check.repeated()
    check.resumed()
    check.stopped()
    if measure is not None:
        check.truthful(measure)
    verdict(identical(kept, list(start)), "the run modifies its starting point; init must copy it")
    untouched = torch.equal(random, torch.get_rng_state())
    verdict(untouched, "it draws from the global random generator; draw from the state's own")


def _settings(method: Any, verdict: Verdict) -> None:
    frozen = is_dataclass(method) and type(method).__dataclass_params__.frozen  # pyright: ignore
    verdict(frozen, "it is not a frozen dataclass; settings that can change are not those that a checkpoint stores")


def _resolved(
    method: Any,
    resolved: Any,
    problem: Any,
    start: Sequence[Tree],
    steps: int,
    optional: Sequence[str],
    verdict: Verdict,
) -> None:
    found = type(resolved).__name__
    verdict(type(resolved) is type(method), f"resolve returns {found}; it must return the same class")
    if type(method).resolve is IterativeMethod.resolve:
        return
    for field in fields(resolved):
        left = getattr(resolved, field.name) is None and field.name not in optional
        verdict(not left, f"resolve leaves {field.name}=None; fill it in, so that the solution shows what was used")
    again = resolved.resolve(problem, *start, max_steps=steps)
    verdict(again == resolved, f"resolving twice changes the settings from {resolved} to {again}")


@dataclass
class _Check:
    method: Any
    problem: Any
    start: Sequence[Tree]
    steps: int
    verdict: Verdict

    def state(self, seed: int = 0) -> State:
        """A fresh state with a generator of its own."""
        with self.verdict.runs("init"):
            return self.method.init(self.problem, *self.start, generator=torch.Generator().manual_seed(seed))

    def advance(self, state: State, upto: int) -> None:
        """Drive the state to a step count; it may end earlier."""
        run = iterate(self.method, self.problem, Run(state), max_steps=upto, record=False)
        if run.error is not None:
            what = f"{run.culprit} raised {type(run.error).__name__}: {run.error}"
            raise self.verdict.fail(what) from run.error

    def plain(self, state: State) -> dict[str, Any]:
        """The state's tensors and numbers."""
        with self.verdict.runs("state_dict"):
            return state.state_dict()

    def saved(self, state: State) -> dict[str, Any]:
        """What a checkpoint file would hold."""
        buffer = io.BytesIO()
        with self.verdict.runs("saving the state"):
            torch.save(self.plain(state), buffer)
        buffer.seek(0)
        with self.verdict.runs("loading the state with weights_only=True"):
            return torch.load(buffer, weights_only=True)

    def loaded(self, saved: dict[str, Any]) -> State:
        """A state that was allocated anew, with another seed, and filled."""
        state = self.state(seed=1)
        with self.verdict.runs("load_state_dict"):
            state.load_state_dict(saved)
        return state

    def fresh(self) -> None:
        """A state of its own, one step, one look."""
        verdict = self.verdict
        state = self.state()
        verdict(isinstance(state, State), f"init returns {type(state).__name__}, which is no implicit.State")
        verdict(state.step == 0, f"a fresh state has step = {state.step} instead of 0")
        starts = {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(list(self.start)) if leaf.numel()}
        for path, value in walk(state):
            if isinstance(value, Tensor) and value.numel() and value.untyped_storage().data_ptr() in starts:
                raise verdict.fail(f"state.{path} lives in the memory of the starting point; init must copy it")
        _generators(state, verdict)
        with verdict.runs("step"):
            values = self.method.step(self.problem, state)
        verdict(state.step == 0, f"step sets state.step to {state.step}; the driver counts")
        for name, value in values.items():
            scalar = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
            verdict(scalar, f"step reports {name}={value!r}; values must be numbers or 0-d tensors")
        before = self.plain(state)
        with verdict.runs("terminate"):
            status = self.method.terminate(self.problem, state)
        verdict(isinstance(status, Status), f"terminate returns {status!r}, which is no implicit.Status")
        changed = difference(before, self.plain(state))
        verdict(changed is None, f"terminate changes state.{changed}; it may only look")

    def repeated(self) -> None:
        """The same run twice."""
        first, second = self.state(), self.state()
        self.advance(first, self.steps)
        self.advance(second, self.steps)
        self.same(first, second, "two runs from one start with one seed", "draw from the state's generator only")

    def same(self, a: State, b: State, what: str, cure: str) -> None:
        name = difference(self.plain(a), self.plain(b))
        self.verdict(name is None, f"{what} differ in state.{name}; {cure}")

    def resumed(self) -> None:
        """Save, load, go on."""
        whole = self.state()
        half = max(1, self.steps // 2)
        self.advance(whole, half)
        saved = self.saved(whole)
        loaded = self.loaded(saved)
        name = difference(saved, self.plain(loaded))
        self.verdict(name is None, f"state.{name} is not what was saved once the state is loaded")
        self.advance(whole, self.steps)
        self.advance(loaded, self.steps)
        cure = "keep everything that a step depends on in the state, each thing once"
        self.same(whole, loaded, "the resumed and the uninterrupted run", cure)

    def stopped(self) -> None:
        """Stopped by a callback, continued."""
        whole, state = self.state(), self.state()
        self.advance(whole, self.steps)
        seen: list[int] = []

        def stop(info: StepInfo) -> bool:
            seen.append(info.step)
            return True

        run = iterate(self.method, self.problem, Run(state), max_steps=self.steps, callbacks=[stop])
        if not seen or run.status is not Status.STOPPED:
            return  # over before the first look
        once = len(seen) == 1 and state.step == seen[0]
        self.verdict(once, f"a callback stopped the run in step {seen[0]}, the state has step {state.step}")
        self.advance(state, self.steps)
        cure = "a callback must find the state complete after every step"
        self.same(whole, state, "the run that a callback interrupted and the uninterrupted one", cure)

    def truthful(self, measure: Measure) -> None:
        """CONVERGED against a measurement."""
        state = self.state()
        run = iterate(self.method, self.problem, Run(state), max_steps=10_000, record=False)
        if run.error is not None or run.status is not Status.CONVERGED:
            return
        residual, tolerance = measure(state)
        self.verdict(
            residual <= tolerance,
            f"the status is CONVERGED, but the measured residual is {residual:.3g}, asked was {tolerance:.3g}; measure "
            "it at the final point",
        )


def walk(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and generator in a state with its path, through nested states and containers."""
    if isinstance(state, Tensor | torch.Generator):
        yield path, state
    elif is_dataclass(state) and not isinstance(state, type):
        for field in fields(state):
            if not field.metadata.get("transient"):
                yield from walk(getattr(state, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from walk(value, f"{path}[{key!r}]")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from walk(value, f"{path}[{index}]")


def _generators(state: State, verdict: Verdict) -> None:
    owners: dict[int, str] = {}
    for path, value in walk(state):
        if isinstance(value, torch.Generator):
            first = owners.setdefault(id(value), path)
            verdict(
                first == path,
                f"state.{first} and state.{path} are one generator, which becomes two after a load; keep it in one "
                "field",
            )


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where two state dicts differ bitwise, as a path; None if nowhere."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
        return None if same and identical(a, b) else path
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return path
        found = (difference(a[key], b[key], f"{path}.{key}" if path else str(key)) for key in a)
        return next((name for name in found if name is not None), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return path
        found = (difference(p, q, f"{path}[{i}]") for i, (p, q) in enumerate(zip(a, b, strict=True)))
        return next((name for name in found if name is not None), None)
    return None if a == b or (a != a and b != b) else path
