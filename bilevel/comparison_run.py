"""Runs of a comparison: each one safely, one after the other or in several processes, written down as they finish."""

import contextlib
import json
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bilevel.comparison import ERROR, REFUSED, UNKNOWN, Comparison, Trial
from bilevel.kinds import Job
from bilevel.threads import chosen_threads
from implicit import SolveError, Status, StepInfo


@dataclass(frozen=True)
class Source:
    """A case that is built when it is needed: ``build(seed)``, where None means its own."""

    name: str
    build: Callable[[int | None], Job]


@dataclass(frozen=True)
class Entrant:
    """A method under its label; ``method`` None lets ``solve`` choose."""

    label: str
    method: Any


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be run.

    Attributes:
        sources, entrants: every entrant runs on every source.
        seeds: for each of these; ``(None,)`` is seed 0 of the run, and the case's own.
        max_steps, time_limit: of every run; None means what the case suggests, else the method's own.
    """

    sources: tuple[Source, ...]
    entrants: tuple[Entrant, ...]
    seeds: tuple[int | None, ...] = (None,)
    max_steps: int | None = None
    time_limit: float | None = None

    def order(self) -> list[tuple[str, str, int]]:
        """Keys of all trials."""
        return [(s.name, e.label, seed or 0) for s in self.sources for e in self.entrants for seed in self.seeds]


class WorkerDied(RuntimeError):
    """A process of a comparison ended without a result."""


class Interrupted(Exception):
    """Ctrl-C came during a run: what it returned is not its result."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One run; all of it can be sent to another process if the source can."""

    source: Source
    entrant: Entrant
    seed: int | None
    max_steps: int | None
    time_limit: float | None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.source.name, self.entrant.label, self.seed or 0


class Journal:
    """Finished runs in a file, one JSON object per line; a line that a kill cut off is left out when it is read."""

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self.path, self.request = path, request
        self.done: dict[tuple[str, str, int], Trial] = {}

    def begin(self) -> None:
        """Start the file with what was asked."""
        self.path.write_text(json.dumps({"request": self.request}, allow_nan=False) + "\n")

    def read(self) -> None:
        """Take over what is in the file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it was made with other settings, or is no such file.
        """
        if not self.path.exists():
            raise FileNotFoundError(f"--resume: there is no {self.path}; start the comparison without --resume")
        lines = self.path.read_text().splitlines(keepends=True)
        try:
            then = json.loads(lines[0])["request"]
        except (IndexError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"--resume: {self.path} is damaged ({error}); start a new comparison") from None
        different = [f"{k} is {now!r}, was {then.get(k)!r}" for k, now in self.request.items() if now != then.get(k)]
        if different:
            raise ValueError(
                f"--resume: the comparison in {self.path.parent} was started differently ({'; '.join(different)}); "
                "leave these as they were to go on with it, or start a new one without --resume"
            )
        whole = [text for text in lines[1:] if text.endswith("\n")]
        if len(whole) < len(lines) - 1:
            self.path.write_text("".join([lines[0], *whole]))
        for text in whole:
            trial = Trial.from_record(json.loads(text))
            self.done[trial.key] = trial

    def add(self, trial: Trial) -> None:
        """Write one run down."""
        with self.path.open("a") as file:
            file.write(json.dumps(trial.record(), allow_nan=False) + "\n")


def run_plan(
    plan: Plan,
    *,
    kind: str,
    journal: Journal | None = None,
    progress: Callable[[Trial, int, int], None] | None = None,
    jobs: int = 1,
) -> Comparison:
    """Everything in ``plan`` that ``journal`` does not have yet; Ctrl-C ends it early with what is done.

    Raises:
        WorkerDied: if a process does; the journal has what was done until then.
    """
    known = {} if journal is None else journal.done
    done = {key: known[key] for key in plan.order() if key in known}
    tasks = [task for task in _tasks(plan) if task.key not in done]
    total = len(tasks) + len(done)
    try:
        for trial in _in_turn(tasks) if jobs == 1 else _at_once(tasks, jobs):
            done[trial.key] = trial
            if journal is not None:
                journal.add(trial)
            if progress is not None:
                progress(trial, len(done), total)
    except (KeyboardInterrupt, Interrupted):
        pass
    trials = tuple(done[key] for key in plan.order() if key in done)
    return Comparison(trials, missing=total - len(trials), kind=kind)


def _tasks(plan: Plan) -> list[_Task]:
    """By case and seed, so that a case is built once."""
    return [
        _Task(source=source, entrant=entrant, seed=seed, max_steps=plan.max_steps, time_limit=plan.time_limit)
        for source in plan.sources
        for seed in plan.seeds
        for entrant in plan.entrants
    ]


def _in_turn(tasks: Sequence[_Task]) -> Iterator[Trial]:
    built: tuple[Any, Job | Exception] | None = None
    for task in tasks:
        which = (task.source.name, task.seed)
        if built is None or built[0] != which:
            built = which, _build(task)
        yield run_one(task, built[1])


def _at_once(tasks: Sequence[_Task], jobs: int) -> Iterator[Trial]:
    waiting = list(reversed(tasks))
    running: dict[Future[Trial], _Task] = {}
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop()
                with _uninterrupted():
                    running[pool.submit(_work, task)] = task
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                task = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool as error:
                    names = sorted({" on ".join((t.entrant.label, t.source.name)) for t in (task, *running.values())})
                    raise WorkerDied(
                        f"a worker process died, perhaps for want of memory, while these ran: {', '.join(names)}"
                    ) from error
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()  # solve takes a polite request as one to finish the step, and what it finds is dropped
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes that start in here never see the Ctrl-C that a terminal sends to all; this one sees it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def _work(task: _Task) -> Trial:
    return run_one(task, _build(task))


def _build(task: _Task) -> Job | Exception:
    try:
        return task.source.build(task.seed)
    except (Exception, SystemExit) as error:
        return error if isinstance(error, Exception) else RuntimeError(f"SystemExit: {error}")


class _Recorder:
    """Writes down value, time and oracle calls at every look of the run."""

    def __init__(self, job: Job) -> None:
        self.kind, self.trace = job.kind, []
        self.seconds, self.calls = 0.0, 0.0

    def start(self, info: StepInfo) -> None:
        """The second run of an automatic choice goes on where the first one ended."""
        if self.trace:
            _, self.seconds, _, self.calls = self.trace[-1]

    def __call__(self, info: StepInfo) -> None:
        value = info.values.get(self.kind.chart.value, float("nan"))
        calls = self.calls + sum(self.kind.evaluations(info).values())
        self.trace.append((float(info.step), self.seconds + info.seconds, value, float(calls)))


def run_one(task: _Task, job: Job | Exception) -> Trial:
    """Solve and check, whatever happens.

    Raises:
        Interrupted: if Ctrl-C ended the run.
    """
    blank = Trial(case=task.source.name, algorithm=task.entrant.label, seed=task.seed or 0, status=ERROR)
    if isinstance(job, Exception):
        return replace(blank, message=f"the case cannot be built: {_describe(job)}")
    blank = replace(blank, lower_class=job.lower_class or UNKNOWN, best_known=job.best_known)
    reason = _refusal(job, task.entrant.method)
    if reason is not None:
        return replace(blank, status=REFUSED, message=reason)
    recorder = _Recorder(job)
    with warnings.catch_warnings(record=True) as caught, chosen_threads(job.start[-1], None):
        warnings.simplefilter("always")
        trial = _solve(task, job, blank, recorder)
    texts = dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, UserWarning))
    return replace(trial, warnings="; ".join(texts))


def _refusal(job: Job, method: Any) -> str | None:
    """Why the method does not fit; for the automatic choice, why none does."""
    if method is not None:
        return method.refuses(job.problem)
    reasons = [cls().refuses(job.problem) for cls in job.kind.methods().values()]
    return None if None in reasons else f"no algorithm fits: {'; '.join(map(str, reasons))}"


def _solve(task: _Task, job: Job, blank: Trial, recorder: _Recorder) -> Trial:
    kind, error = job.kind, None
    began = time.perf_counter()
    try:
        solution = kind.solve(
            job.problem,
            kind.automatic() if task.entrant.method is None else task.entrant.method,
            *job.start,
            max_steps=task.max_steps if task.max_steps is not None else job.max_steps,
            time_limit=task.time_limit,
            generator=torch.Generator().manual_seed(task.seed or 0),
            callbacks=[recorder],
            raise_on_failure=False,
        )
    except SolveError as failure:
        solution, error = failure.solution, failure
    except (Exception, SystemExit) as failure:
        solution, error = None, failure
    seconds = time.perf_counter() - began
    if solution is None:
        assert error is not None
        return replace(blank, seconds=seconds, message=_describe(error), trace=tuple(recorder.trace))
    if error is None and solution.status is Status.STOPPED:
        raise Interrupted
    outcome = kind.outcome(job, solution)
    try:
        verified, reasons = kind.verdict(job, solution)
    except Exception as failure:
        verified, reasons = False, f"the check failed: {_describe(failure)}"
    last = (float(solution.steps), solution.seconds, outcome.headline.value, float(sum(solution.counts.values())))
    return replace(
        blank,
        status=ERROR if error is not None else solution.status.name,
        verified=verified and error is None,
        value=outcome.headline.value,
        steps=solution.steps,
        seconds=seconds,
        counts=dict(solution.counts),
        starts=max(1, len(getattr(solution, "starts", ()))),
        chosen=outcome.method.name,
        message=solution.message if error is None else _describe(error),
        choice=getattr(solution, "choice", ""),
        reasons=reasons,
        trace=(*recorder.trace, last),
    )


def _describe(error: BaseException) -> str:
    """Kind, message and, for errors of ours, the place."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, (SolveError, ValueError, TypeError, OSError)):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text
