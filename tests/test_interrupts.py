"""Ctrl-C while something inside a run is being solved: the run stops after a whole step, and a check ends at once."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import bilevel
import bilevel.auto
import constrained
import problems
from bilevel import BilevelProblem
from implicit import Status, tree


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[Any]:
    """A shell that starts the tests in the background ignores SIGINT for them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    now = signal.signal(signal.SIGINT, before)
    assert now is signal.default_int_handler, "the handler was not given back"


class Presses:
    """A function that presses Ctrl-C in the first call after ``armed`` is set."""

    def __init__(self, fn: Any) -> None:
        self.fn, self.armed, self.pressed = fn, False, 0

    def __call__(self, *args: Any) -> Any:
        if self.armed:
            self.armed = False
            self.pressed += 1
            signal.raise_signal(signal.SIGINT)
        return self.fn(*args)


class Arm:
    """A callback that arms once a run has begun."""

    def __init__(self, pressing: Presses, when: bool = True) -> None:
        self.pressing, self.when = pressing, when

    def start(self, info: Any) -> None:
        self.pressing.armed = self.when

    def __call__(self, info: Any) -> None: ...


def arm_within(monkeypatch: pytest.MonkeyPatch, name: str, pressing: Presses) -> None:
    """Arm at the beginning of the first run of a solver from ``constrained``."""
    solver, calls = getattr(constrained, name), []

    def watched(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return solver(*args, **options, callbacks=[Arm(pressing, len(calls) == 1)])

    monkeypatch.setattr(constrained, name, watched)


def test_a_solver_within_a_run_ends_and_the_run_stops() -> None:
    case = problems.case("quadratic")
    objective = Presses(lambda x: ((x - 1) ** 4).sum())
    inner: list[Any] = []

    def solve_within(info: Any) -> None:
        if info.step == 2:
            problem = constrained.ConstrainedProblem(objective=objective)
            inner.append(constrained.solve(problem, None, torch.full((2,), 5.0), callbacks=[Arm(objective)]))

    method = bilevel.ImplicitGradient()
    stopped = bilevel.solve(case.problem, method, *case.start, callbacks=[solve_within])
    assert objective.pressed == 1 and inner[0].status is Status.CONVERGED
    assert (stopped.status, stopped.steps) == (Status.STOPPED, 3)
    resumed = bilevel.solve(case.problem, checkpoint=stopped.checkpoint)
    whole = bilevel.solve(case.problem, method, *case.start)
    assert resumed.status is whole.status is Status.CONVERGED
    assert float(tree.norm(tree.sub((resumed.x, resumed.y), (whole.x, whole.y)))) == 0.0


def wells(x: Any, y: Any) -> Any:
    return ((y**2 - x) ** 2).sum() + y.sum() / 10


def disc(x: Any, y: Any) -> Any:
    return (y**2).sum()[None] - 100 * (1 + x)


@pytest.mark.parametrize("declared", [{}, {"lower_inequality": disc}], ids=["free", "with rows"])
@pytest.mark.parametrize("solver", ["solve", "solve_batch"])
def test_a_check_on_its_own_ends_at_once(
    solver: str, declared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = Presses(wells)
    problem = BilevelProblem(lambda x, y: (x * y).sum(), lower, **declared)
    arm_within(monkeypatch, solver, lower)
    with pytest.raises(KeyboardInterrupt):
        bilevel.verify(problem, torch.ones(1), torch.full((2,), -0.5))
    assert lower.pressed == 1


def test_an_interrupted_report_does_not_lose_the_run() -> None:
    case = problems.case("quadratic")
    lower = Presses(case.problem.lower)
    problem = replace(case.problem, lower=lower)

    class AtTheEnd(Arm):
        def start(self, info: Any) -> None: ...

        def end(self, info: Any, status: Status) -> None:
            assert status is Status.CONVERGED
            lower.armed = True

    solution = bilevel.solve(problem, bilevel.ImplicitGradient(), *case.start, callbacks=[AtTheEnd(lower)])
    assert lower.pressed == 1 and solution.status is Status.STOPPED
    assert "the accuracy report was interrupted" in solution.message
    assert solution.accuracy.notes == ("not measured: interrupted",)
    case.check(solution, rtol=1e-6)
    assert bilevel.solve(problem, checkpoint=solution.checkpoint).status is Status.CONVERGED


def test_an_interrupted_check_ends_the_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problems.case("quadratic")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bilevel.auto, "verify", interrupted)
    solution = bilevel.solve(case.problem, "auto", *case.start)
    assert solution.status is Status.STOPPED and "the check of its point was interrupted" in solution.message
    assert solution.algorithm.name == "ImplicitGradient" and not solution.starts, "no second algorithm"
    case.check(solution, rtol=1e-6)


def test_a_solver_of_its_own_returns_what_it_has() -> None:
    objective = Presses(lambda x: ((x - 1) ** 4).sum())
    problem = constrained.ConstrainedProblem(objective=objective, lower=0.0)
    start = torch.full((2,), 5.0)
    solution = constrained.solve(problem, constrained.InteriorPoint(), start, callbacks=[Arm(objective)])
    assert (solution.status, solution.steps) == (Status.STOPPED, 1)
