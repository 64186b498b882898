"""The one entry point: check, resolve, drive, measure, return."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from bilevel.algorithms.base import Algorithm, BilevelState
from bilevel.auto import AUTO, solve_automatically
from bilevel.oracle import Oracle, new_counts
from bilevel.problem import BilevelProblem
from bilevel.registry import algorithm as registered
from bilevel.registry import algorithms
from bilevel.solution import Accuracy, Solution
from implicit import Run, SaveCheckpoint, SolveError, Status, runs, tree
from implicit.iterate import Callback, StepInfo, iterate
from implicit.tree import Tree


def solve(
    problem: BilevelProblem,
    algorithm: Algorithm | str | None = None,
    x0: Tree | None = None,
    y0: Tree | None = None,
    *,
    max_steps: int | None = None,
    time_limit: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    generator: torch.Generator | None = None,
    callbacks: Iterable[Callback] = (),
    checkpoint: dict[str, Any] | None = None,
    metrics_every: int | None = None,
    raise_on_failure: bool = True,
    **unknown: Any,
) -> Solution:
    """Solve a bilevel problem.

    Args:
        problem: what to solve; it is validated at the start before the first step.
        algorithm: how, such as ``ImplicitGradient()`` or ``Penalty()``; ``"auto"`` takes what :func:`bilevel.choose`
            picks, and a second algorithm if the first ends without a verified point; ``solution.choice`` says why.
        x0, y0: where to start; they fix structure, shapes, dtype and device. Not modified.
        max_steps: steps of the whole run, counting those before a resumption; None means the algorithm's own default.
        time_limit: seconds of this call, without the final accuracy report.
        rtol, atol: override the algorithm's tolerances on its stationarity measure.
        generator: a CPU generator for everything random; one seeded with 0 by default. Its state is copied.
        callbacks: called after every look at the state; ``Progress()``, ``SaveCheckpoint(path)``, or any function of a
            ``StepInfo``; returning True stops the run.
        checkpoint: resume this run, bitwise; x0, y0 and generator are refused then, algorithm may be left out.
        metrics_every: evaluate the problem's metrics for the history at most every so many steps; None means at the
            end only.
        raise_on_failure: raise :class:`SolveError` (with ``.solution``) on a numerical failure instead of returning.

    Returns:
        The solution; budgets and interrupts do not raise. Where the objective of the run is known at every step
        (ImplicitGradient on full data), a run that stops early returns its best point.

    Raises:
        TypeError, ValueError: for misuse, before the first step.
        SolveError: for a numerical failure, or an exception inside an objective after the first step.
    """
    runs.refuse_unknown(unknown)
    if not isinstance(problem, BilevelProblem):
        raise TypeError(f"problem must be a bilevel.BilevelProblem, got {type(problem).__name__}")
    listeners = runs.check_callbacks(callbacks)
    runs.check_budgets(max_steps, time_limit=time_limit, rtol=rtol, atol=atol)
    own = runs.own_generator(generator)
    if isinstance(algorithm, str):
        if algorithm.lower() != AUTO:
            _require_algorithm(algorithm)
        if checkpoint is None:
            begin = _start(problem, x0, y0)

            def attempt(chosen: Algorithm, steps: int | None, seconds: float | None) -> Solution:
                return solve(
                    problem, chosen, *begin, max_steps=steps, time_limit=seconds, rtol=rtol, atol=atol,
                    generator=own, callbacks=callbacks, metrics_every=metrics_every, raise_on_failure=False,
                )  # fmt: skip

            return _raised(solve_automatically(problem, *begin, attempt, max_steps, time_limit), raise_on_failure)
        algorithm = None
    if checkpoint is not None or any(isinstance(c, SaveCheckpoint) for c in listeners):
        problem.require_resumable()
    if checkpoint is not None:
        if x0 is not None or y0 is not None or generator is not None:
            raise ValueError("a checkpoint brings its own point and generator; leave out x0, y0 and generator")
        method, run = _restore(problem, algorithm, checkpoint, rtol, atol)
    else:
        method, run = _begin(problem, algorithm, x0, y0, rtol, atol, own, max_steps)
    limit = max_steps if max_steps is not None else method.default_max_steps
    if problem.metrics and metrics_every is not None:
        listeners.insert(0, _Metrics(problem, run, metrics_every))
    iterate(
        method,
        problem,
        run,
        max_steps=limit,
        time_limit=time_limit,
        callbacks=listeners,
        capture=lambda r: _capture(problem, method, r),
        interruptible=True,
    )
    solution = _finish(problem, method, run)
    if run.error is not None:
        raise SolveError(
            f"{run.culprit} raised {type(run.error).__name__}: {run.error}; .solution holds the last point",
            solution,
        ) from run.error
    return _raised(solution, raise_on_failure)


def _raised(solution: Solution, raise_on_failure: bool) -> Solution:
    if solution.status.is_failure and raise_on_failure:
        raise SolveError(f"{solution.status.name} after {solution.steps} steps: {solution.message}", solution)
    return solution


def _start(problem: BilevelProblem, x0: Tree | None, y0: Tree | None) -> tuple[Tree, Tree]:
    start = getattr(problem, "start", None)
    if x0 is None and y0 is None and start is not None:
        x0, y0 = start
    if x0 is None or y0 is None:
        raise TypeError(f"{'x0' if x0 is None else 'y0'} is missing: where should the run start?")
    return x0, y0


def _begin(
    problem: BilevelProblem,
    algorithm: Algorithm | None,
    x0: Tree | None,
    y0: Tree | None,
    rtol: float | None,
    atol: float | None,
    own: torch.Generator,
    max_steps: int | None,
) -> tuple[Algorithm, Run[Any]]:
    x0, y0 = _start(problem, x0, y0)
    algorithm = _with_tolerances(_require_algorithm(algorithm), rtol, atol)
    reason = algorithm.refuses(problem)
    if reason is not None:
        raise ValueError(reason)
    problem.validate(x0, y0)
    x0, y0 = tree.detach(x0), tree.detach(y0)
    method = algorithm.resolve(problem, x0, y0, max_steps=max_steps)
    return method, Run(method.init(problem, x0, y0, generator=own))


def _require_algorithm(algorithm: Any) -> Algorithm:
    if isinstance(algorithm, Algorithm):
        return algorithm
    if isinstance(algorithm, type) and issubclass(algorithm, Algorithm):
        raise TypeError(f"algorithm must be an object, not the class: {algorithm.__name__}()")
    known = ", ".join(f"bilevel.{name}()" for name in algorithms())
    raise TypeError(f"algorithm must be {AUTO!r} or an object such as {known}, got {algorithm!r}")


def _with_tolerances(algorithm: Algorithm, rtol: float | None, atol: float | None) -> Algorithm:
    if rtol is not None:
        algorithm = replace(algorithm, rtol=rtol)
    return replace(algorithm, atol=atol) if atol is not None else algorithm


def _data_of(problem: BilevelProblem) -> dict[str, list[int | None] | None]:
    """Rows and batch size of each level."""
    levels = {"upper_data": problem.upper_data, "lower_data": problem.lower_data}
    return {name: None if d is None else [d.rows, d.batch_size] for name, d in levels.items()}


def _capture(problem: BilevelProblem, method: Algorithm, run: Run[Any]) -> dict[str, Any]:
    """The whole run as plain data."""
    return {**runs.capture_run(method, run, x=run.state.x, y=run.state.y), "data": _data_of(problem)}


def _restore(
    problem: BilevelProblem,
    algorithm: Algorithm | None,
    checkpoint: dict[str, Any],
    rtol: float | None,
    atol: float | None,
) -> tuple[Algorithm, Run[Any]]:
    runs.check_format(checkpoint, "bilevel")
    given = None if algorithm is None else _require_algorithm(algorithm)
    if given is not None and given.name != checkpoint["name"]:
        raise ValueError(f"the checkpoint is a run of {checkpoint['name']}, not of {given.name}")
    for name, now in _data_of(problem).items():
        then = checkpoint["data"][name]
        if then != now:
            raise ValueError(
                f"the checkpoint was made with {name} of [rows, batch_size] = {then}, this problem has {now}; "
                "resume with the same data and batch size, or start a new run from its x and y"
            )
    settings, method = runs.restore_settings(checkpoint, given)
    method = registered(checkpoint["name"])(**settings) if method is None else method
    method = _with_tolerances(method, rtol, atol)
    x, y = runs.restore_start(checkpoint)
    problem.validate(x, y)
    state: BilevelState = method.init(problem, x, y, generator=torch.Generator())
    return method, runs.restore_run(checkpoint, method, state)


class _Metrics:
    """Adds the problem's metrics to the history."""

    def __init__(self, problem: BilevelProblem, run: Run[Any], every: int) -> None:
        self.problem, self.run, self.every, self.last = problem, run, every, -math.inf

    def __call__(self, info: StepInfo) -> None:
        if info.step - self.last >= self.every:
            self.last = info.step
            found = evaluate_metrics(self.problem, info.state.x, info.state.y)
            self.run.history[-1].update(found)
            info.values.update(found)


def evaluate_metrics(problem: BilevelProblem, x: Tree, y: Tree) -> dict[str, float]:
    """Every metric at (x, y), as floats."""
    with torch.no_grad():
        return {name: float(metric(x, y)) for name, metric in problem.metrics.items()}


def _finish(problem: BilevelProblem, method: Algorithm, run: Run[Any]) -> Solution:
    state, status = run.state, run.status
    captured = _capture(problem, method, run) if problem.resumable else {}
    early = status in (Status.STEP_LIMIT, Status.TIME_LIMIT, Status.STOPPED, Status.NONFINITE)
    merit = method.merit(problem)
    last = run.history[-1].get(merit, math.inf) if merit and run.history else math.inf
    if early and run.best.point is not None and run.best.merit < last:
        best_x, best_y = run.best.point
        tree.copy_(state.x, best_x)
        tree.copy_(state.y, best_y)
    try:
        accuracy, status, message = method.assess(problem, state, status)
    except Exception as error:  # a report must never lose the run
        accuracy, message = Accuracy(notes=(f"not measured: {type(error).__name__}: {error}",)), status.value
        if status is Status.CONVERGED:
            status, message = Status.STALLED, f"the accuracy report failed, so convergence is not confirmed: {error}"
    except KeyboardInterrupt:
        accuracy, message = Accuracy(notes=("not measured: interrupted",)), status.value
        if status is Status.CONVERGED:
            status, message = Status.STOPPED, "the accuracy report was interrupted, so convergence is not confirmed"
    if run.error is not None:
        status, message = Status.STOPPED, f"{run.culprit} raised {type(run.error).__name__}: {run.error}"
    values, aux = _final_values(problem, state.x, state.y)
    return Solution(
        x=tree.clone(state.x),
        y=tree.clone(state.y),
        status=status,
        message=message,
        algorithm=method,
        accuracy=accuracy,
        counts=dict(state.counts),
        history=run.history,
        steps=state.step,
        seconds=run.seconds,
        upper_value=values["upper"],
        lower_value=values["lower"],
        metrics=_safe_metrics(problem, state.x, state.y),
        aux=aux,
        multipliers=method.multipliers(problem, state),
        starts=method.starts(problem, state),
        checkpoint=captured,
    )


def _safe_metrics(problem: BilevelProblem, x: Tree, y: Tree) -> dict[str, float]:
    found = {}
    for name in problem.metrics:
        try:
            found.update(evaluate_metrics(replace(problem, metrics={name: problem.metrics[name]}), x, y))
        except Exception:
            found[name] = math.nan
    return found


def _final_values(problem: BilevelProblem, x: Tree, y: Tree) -> tuple[dict[str, float], dict[str, Any]]:
    """Objectives on all data, and what they returned beside."""
    values, aux = {"upper": math.nan, "lower": math.nan}, {}
    for level in values:
        try:
            oracle = Oracle.full(problem, new_counts())
            with torch.no_grad():
                values[level] = float(getattr(oracle, level)(x, y))
                batch = getattr(oracle, f"{level}_batch")
                function = getattr(problem, level)
                found = function(x, y) if batch is None else function(x, y, batch=batch)
                if isinstance(found, tuple):
                    aux[level] = found[1]
        except Exception:
            continue
    return values, aux
