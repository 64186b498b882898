"""The driver: order of events, budgets, callbacks, interrupts, the best point, failures, progress."""

import io
import math
import os
import signal
import threading
from dataclasses import dataclass, field

import pytest
import torch

import implicit
from implicit import Progress, Run, SaveCheckpoint, State, Status, iterate
from implicit.iterate import Best, to_floats


@dataclass(kw_only=True)
class Counter(State):
    value: torch.Tensor = field(default_factory=lambda: torch.tensor(0.0))


@dataclass(frozen=True, kw_only=True)
class Count(implicit.IterativeMethod):
    """Adds one per step and converges at ``goal``; ``values`` replaces the reported merit."""

    goal: int = 10**9
    check_every: int | None = 1
    values: tuple = ()
    raise_at: int | None = None
    nan_at: int | None = None
    hook: object = None

    def init(self, problem, *start, generator=None):
        return Counter()

    def step(self, problem, state):
        if self.hook is not None:
            self.hook(state)
        if state.step + 1 == self.raise_at:
            raise RuntimeError("objective broke")
        if state.step + 1 == self.nan_at:
            state.finite = torch.tensor(False)
        else:
            state.value += 1
        merit = self.values[state.step] if self.values else -float(state.value)
        return {"merit": merit, "twice": 2 * state.value}

    def terminate(self, problem, state):
        return Status.CONVERGED if float(state.value) >= self.goal else Status.RUNNING

    def merit(self, problem):
        return "merit"

    def point(self, state):
        return state.value


def drive(method, run=None, **options):
    run = run or Run(method.init(None))
    return iterate(method, None, run, **options)


class Recorder:
    """A callback that writes down everything it sees."""

    def __init__(self, stop_at=None):
        self.events, self.stop_at = [], stop_at

    def start(self, info):
        self.events.append(("start", info.step))

    def __call__(self, info):
        self.events.append(("step", info.step))
        self.last = info
        return info.step == self.stop_at

    def end(self, info, status):
        self.events.append(("end", info.step, status))
        self.final = info


def test_events_come_in_order_and_history_holds_floats() -> None:
    seen = Recorder()
    run = drive(Count(goal=3), callbacks=[seen])
    assert seen.events == [("start", 0), ("step", 1), ("step", 2), ("step", 3), ("end", 3, Status.CONVERGED)]
    assert run.status is Status.CONVERGED
    assert [row["step"] for row in run.history] == [1, 2, 3]
    assert run.history[-1]["twice"] == 6.0
    assert type(run.history[-1]["twice"]) is float
    assert list(run.history[-1]) == ["step", "seconds", "merit", "twice"]
    assert seen.final.values == {"merit": -3.0, "twice": 6.0}
    assert seen.last.max_steps is None
    assert 0 <= run.history[0]["seconds"] <= run.history[-1]["seconds"] <= run.seconds


@pytest.mark.parametrize("record", [True, False])
def test_a_start_that_is_already_optimal_takes_no_step(record) -> None:
    seen = Recorder()
    run = drive(Count(goal=0), callbacks=[seen], record=record)
    assert run.status is Status.CONVERGED
    assert run.state.step == 0
    assert run.history == []
    assert seen.events == [("start", 0), ("end", 0, Status.CONVERGED)]


def test_step_budget_counts_the_whole_run() -> None:
    run = drive(Count(), max_steps=4)
    assert (run.status, run.state.step) == (Status.STEP_LIMIT, 4)
    run = drive(Count(), run, max_steps=4)
    assert (run.status, run.state.step) == (Status.STEP_LIMIT, 4)
    run = drive(Count(), run, max_steps=6)
    assert (run.status, run.state.step) == (Status.STEP_LIMIT, 6)
    assert [row["step"] for row in run.history] == [1, 2, 3, 4, 5, 6]
    run = drive(Count(), max_steps=0)
    assert (run.status, run.state.step, run.history) == (Status.STEP_LIMIT, 0, [])


def test_convergence_in_the_last_allowed_step_is_convergence() -> None:
    assert drive(Count(goal=4), max_steps=4).status is Status.CONVERGED
    assert drive(Count(goal=4, check_every=3), max_steps=4).status is Status.CONVERGED
    finished = drive(Count(goal=4), max_steps=4)
    assert drive(Count(goal=4), finished, max_steps=9).state.step == 4


def test_looks_happen_every_few_steps_and_at_the_end() -> None:
    run = drive(Count(check_every=4), max_steps=10)
    assert [row["step"] for row in run.history] == [4, 8, 10]
    assert drive(Count(goal=5, check_every=4)).state.step == 8
    assert drive(Count(goal=2, check_every=None)).state.step == 2


def test_time_limit_belongs_to_the_call_and_seconds_to_the_run() -> None:
    run = drive(Count(check_every=10**6), time_limit=1e-9)
    assert (run.status, run.state.step) == (Status.TIME_LIMIT, 1)
    assert len(run.history) == 1
    run.seconds = 1000.0
    run = drive(Count(check_every=10**6), run, time_limit=1e-9)
    assert (run.status, run.state.step) == (Status.TIME_LIMIT, 2)
    assert 1000.0 < run.history[-1]["seconds"] <= run.seconds < 1100.0
    assert drive(Count(goal=1), time_limit=1e-9).status is Status.CONVERGED


def test_a_callback_stops_the_run_and_the_others_are_still_called() -> None:
    first, second = Recorder(stop_at=2), Recorder()
    run = drive(Count(), callbacks=[first, second], max_steps=9)
    assert (run.status, run.state.step) == (Status.STOPPED, 2)
    assert second.events == first.events
    assert drive(Count(goal=2), callbacks=[Recorder(stop_at=2)]).status is Status.CONVERGED
    run = drive(Count(), run, max_steps=5)
    assert (run.status, run.state.step) == (Status.STEP_LIMIT, 5)


def test_the_best_point_is_a_copy_of_the_smallest_finite_merit() -> None:
    values = (3.0, math.nan, 1.0, -math.inf, 2.0, 1.0)
    run = drive(Count(values=values), max_steps=6)
    assert (run.best.merit, run.best.step, float(run.best.point)) == (1.0, 3, 3.0)
    best = Best()
    best.offer(math.inf, 1, lambda: torch.zeros(1))
    assert best.point is None


def test_nonfinite_updates_end_the_run_with_the_last_iterate() -> None:
    seen = Recorder()
    run = drive(Count(nan_at=3), callbacks=[seen])
    assert (run.status, run.state.step, float(run.state.value)) == (Status.NONFINITE, 3, 2.0)
    assert len(run.history) == 3
    assert seen.events[-1] == ("end", 3, Status.NONFINITE)
    assert drive(Count(nan_at=3), record=False).status is Status.NONFINITE


def test_an_exception_in_a_step_is_kept_with_the_state_before_it() -> None:
    seen = Recorder()
    run = drive(Count(raise_at=3), callbacks=[seen])
    assert isinstance(run.error, RuntimeError)
    assert (run.status, run.state.step, len(run.history)) == (Status.RUNNING, 2, 2)
    assert seen.events[-1] == ("end", 2, Status.RUNNING)


@pytest.mark.parametrize("error", [KeyError("callback"), SystemExit(3)])
def test_an_exception_in_a_callback_is_kept_and_frees_the_signals(error: BaseException) -> None:
    def broken(info):
        raise error

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = drive(Count(), callbacks=[broken], interruptible=True)
    assert run.error is error
    assert run.culprit == "a callback after step 1"
    assert run.state.step == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_method_may_not_report_what_the_driver_records() -> None:
    class Overwriting(Count):
        def step(self, problem, state):
            return {**super().step(problem, state), "step": 0.5}

    run = drive(Overwriting(goal=5))
    assert isinstance(run.error, ValueError)
    assert "'step'" in str(run.error)


def test_without_a_record_nothing_is_kept() -> None:
    run = drive(Count(goal=5), record=False)
    assert (run.status, run.state.step, run.history, run.best.point) == (Status.CONVERGED, 5, [], None)
    assert drive(Count(), record=False, max_steps=3).status is Status.STEP_LIMIT
    assert run.seconds > 0


def interrupt(times=1, at=3):
    def hook(state):
        if state.step + 1 == at:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return hook


def test_one_interrupt_finishes_the_step_and_stops() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = Recorder()
    run = drive(Count(hook=interrupt(), check_every=100), interruptible=True, max_steps=50, callbacks=[seen])
    assert (run.status, run.state.step, float(run.state.value)) == (Status.STOPPED, 3, 3.0)
    assert run.history[-1]["step"] == 3
    assert seen.events == [("start", 0), ("step", 3), ("end", 3, Status.STOPPED)]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_within_a_step_is_for_the_outer_run() -> None:
    inner = []

    def hook(state):
        inner.append(drive(Count(goal=6, hook=interrupt() if state.step == 1 else None), interruptible=True))

    before = signal.getsignal(signal.SIGINT)
    run = drive(Count(hook=hook), interruptible=True, max_steps=50)
    assert (run.status, run.state.step) == (Status.STOPPED, 2)
    assert [(r.status, r.state.step) for r in inner] == [(Status.CONVERGED, 6)] * 2, "the step is a whole one"
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_interrupt_within_a_step_raises() -> None:
    with pytest.raises(KeyboardInterrupt):
        drive(Count(hook=lambda _: drive(Count(hook=interrupt(times=2)), interruptible=True)), interruptible=True)


def test_the_second_interrupt_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        drive(Count(hook=interrupt(times=2)), interruptible=True, max_steps=50)
    assert signal.getsignal(signal.SIGINT) is before


def test_runs_that_are_not_interruptible_leave_the_signal_alone() -> None:
    # A shell that starts the tests in the background ignores SIGINT for them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            drive(Count(hook=interrupt()), max_steps=50)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_another_thread_does_not_touch_signals() -> None:
    found = []
    worker = threading.Thread(target=lambda: found.append(drive(Count(goal=3), interruptible=True).status))
    worker.start()
    worker.join()
    assert found == [Status.CONVERGED]


def test_nested_runs_do_not_swallow_the_outer_interrupt() -> None:
    inner_runs = []

    def hook(state):
        inner_runs.append(drive(Count(goal=2, hook=interrupt(at=2) if state.step == 1 else None)))

    run = drive(Count(hook=hook), interruptible=True, max_steps=50)
    assert (run.status, run.state.step) == (Status.STOPPED, 2)
    assert [inner.status for inner in inner_runs] == [Status.CONVERGED] * 2


def test_capture_describes_the_moment_of_the_callback() -> None:
    captured = []
    drive(
        Count(goal=3),
        callbacks=[lambda info: captured.append(info.capture()) or False],
        capture=lambda run: {"step": run.state.step, "rows": len(run.history), "seconds": run.seconds},
    )
    assert [(c["step"], c["rows"]) for c in captured] == [(1, 1), (2, 2), (3, 3)]
    assert captured[0]["seconds"] < captured[-1]["seconds"]
    bare = []
    drive(Count(goal=1), callbacks=[lambda info: bare.append(info.capture()) or False])
    assert isinstance(bare[0]["state"], Counter)


def test_to_floats_keeps_order_and_accepts_what_methods_report() -> None:
    values = {"b": torch.tensor([2.5], dtype=torch.float32), "a": 1, "c": torch.tensor(True)}
    assert list(to_floats(values).items()) == [("b", 2.5), ("a", 1.0), ("c", 1.0)]
    assert to_floats({}) == {}
    grown = torch.tensor(3.0, requires_grad=True)
    assert to_floats({"g": 2 * grown}) == {"g": 6.0}


def test_methods_that_name_a_merit_must_name_a_point() -> None:
    class Nameless(Count):
        point = implicit.IterativeMethod.point

    error = drive(Nameless(goal=2)).error
    assert isinstance(error, NotImplementedError)
    assert "Nameless names a merit but no point()" in str(error)


def test_progress_shows_chosen_values_and_resumes_the_count() -> None:
    text = io.StringIO()
    run = drive(Count(), max_steps=3, callbacks=[Progress(file=text, min_seconds=0.0)])
    assert "merit=-3" in text.getvalue()
    assert "twice=6" in text.getvalue()
    assert "3/3" in text.getvalue()
    text = io.StringIO()
    drive(Count(), run, max_steps=5, callbacks=[Progress(names=("twice", "absent"), file=text, min_seconds=0.0)])
    assert "3/5" in text.getvalue().split("\r")[1]
    assert "5/5" in text.getvalue()
    assert "merit" not in text.getvalue()
    text = io.StringIO()
    drive(Count(goal=0), max_steps=3, callbacks=[Progress(file=text)])
    assert "0/3" in text.getvalue()


def test_checkpoints_are_saved_every_few_steps_and_at_the_end(tmp_path) -> None:
    saved = []

    class Spy(SaveCheckpoint):
        def __call__(self, info):
            before = self._saved
            super().__call__(info)
            if self._saved != before:
                saved.append(info.step)

    path = tmp_path / "run.pt"
    keep = {"capture": lambda run: {"format": 1, "step": run.state.step}}
    run = drive(Count(check_every=3), max_steps=20, callbacks=[Spy(path, every=5)], **keep)
    assert saved == [6, 12, 15, 20]
    assert implicit.load_checkpoint(path)["step"] == 20
    drive(Count(check_every=3), run, max_steps=22, callbacks=[Spy(path, every=5)], **keep)
    assert implicit.load_checkpoint(path)["step"] == 22
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        SaveCheckpoint(path, every=0)


@pytest.mark.parametrize("fault", [{"nan_at": 8}, {"raise_at": 8}])
def test_a_broken_step_is_not_saved(tmp_path, fault) -> None:
    path = tmp_path / "run.pt"
    drive(
        Count(**fault),
        callbacks=[SaveCheckpoint(path, every=5)],
        capture=lambda run: {"format": 1, "step": run.state.step},
    )
    assert implicit.load_checkpoint(path)["step"] == 5


def test_a_step_info_prints_without_the_state() -> None:
    seen: list[str] = []
    run = Run(Counter())
    iterate(Count(goal=1), None, run, callbacks=[lambda info: seen.append(repr(info))])
    assert seen and seen[0].startswith("StepInfo(step=1, seconds=") and "Counter" not in seen[0]
    assert "capture" not in seen[0]
