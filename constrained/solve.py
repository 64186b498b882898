"""The one entry point: check, resolve, drive, measure, return."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from constrained.lagrangian import Lagrangian
from constrained.method import ConstrainedMethod
from constrained.multipliers import FlatMultipliers
from constrained.problem import Problem
from constrained.registry import default_method, methods
from constrained.residual import KKTResidual
from constrained.solution import Solution
from constrained.supplied import check_supplied
from implicit import Run, SolveError, Status, runs, tree
from implicit.iterate import Callback, iterate
from implicit.tree import Tree

RENAMED = {
    "tol": "atol",
    "gtol": "atol",
    "rtol": "atol, on the scaled KKT residual",
    "options": "by the fields of the method, such as constrained.InteriorPoint(barrier=0.1), and max_steps, atol",
    "bounds": "lower and upper, of the problem",
    "constraints": "equality and inequality, of the problem; see constrained.from_scipy",
    "jac": "gradient, of the problem",
    "hess": "hessian (of the Lagrangian), of the problem",
}


def solve(
    problem: Problem,
    method: ConstrainedMethod[Any] | None = None,
    x0: Tree | None = None,
    *,
    multipliers: Any = None,
    max_steps: int | None = None,
    time_limit: float | None = None,
    atol: float | None = None,
    generator: torch.Generator | None = None,
    callbacks: Iterable[Callback] = (),
    checkpoint: dict[str, Any] | None = None,
    raise_on_failure: bool = True,
    **unknown: Any,
) -> Solution:
    """Solve a constrained problem.

    Args:
        problem: an :class:`EqualityProblem` or a :class:`ConstrainedProblem`.
        method: how; None means :class:`AdaSketchNewton` for equality constraints alone and :class:`InteriorPoint`
            otherwise.
        x0: where to start; fixes structure, shapes, dtype and device. Not modified.
        multipliers: a start for the multipliers, such as ``solution.multipliers`` of a problem close by; parts that
            are None or ``()`` are zero. If None, the method's own choice: least squares at x0, or zero for
            :class:`AugmentedLagrangian`.
        max_steps: steps of the whole run, counting those before a resumption; None means the method's own default.
        time_limit: seconds of this call.
        atol: overrides the method's tolerance on the KKT residual.
        generator: a CPU generator for everything random; one seeded with 0 by default. Its state is copied.
        callbacks: called after every step; ``implicit.Progress()``, ``implicit.SaveCheckpoint(path)``, or any function
            of an ``implicit.StepInfo``; returning True stops the run.
        checkpoint: resume this run, bitwise; x0, multipliers and generator are refused then, method may be left out.
        raise_on_failure: raise :class:`implicit.SolveError` (with ``.solution``) on a numerical failure (NONFINITE,
            INFEASIBLE, UNBOUNDED, LINEAR_SOLVE_FAILED) instead of returning.

    Returns:
        The solution; budgets and interrupts do not raise. A run that stops early returns its best point.

    Raises:
        TypeError, ValueError: for misuse, before the first step.
        SolveError: for a numerical failure, or an exception inside a function of the problem after the first step.

    Warns:
        UserWarning: where a supplied derivative disagrees with differences at x0.

    Example:
        >>> import torch, constrained
        >>> circle = constrained.EqualityProblem(lambda x: x.sum(), lambda x: (x**2).sum() - 2)
        >>> found = constrained.solve(circle, x0=torch.tensor([-1.5, -0.5]))
        >>> found.success, bool((found.x + 1).abs().max() < 1e-3), round(float(found.multipliers.equality), 3)
        (True, True, 0.5)
    """
    runs.refuse_unknown(unknown, **RENAMED)
    if not isinstance(problem, Problem):
        found = type(problem).__name__
        raise TypeError(f"problem must be a constrained.EqualityProblem or a ConstrainedProblem, got {found}")
    listeners = runs.check_callbacks(callbacks)
    runs.check_budgets(max_steps, time_limit=time_limit, atol=atol)
    own = runs.own_generator(generator)
    if checkpoint is not None:
        if x0 is not None or multipliers is not None or generator is not None:
            raise ValueError("a checkpoint brings its own point and generator; leave out x0, multipliers and generator")
        lagrangian, chosen, run = _restore(problem, method, checkpoint, atol)
    else:
        lagrangian, chosen, run = _begin(problem, method, x0, multipliers, atol, own, max_steps)
    limit = max_steps if max_steps is not None else chosen.default_max_steps
    iterate(
        chosen,
        lagrangian,
        run,
        max_steps=limit,
        time_limit=time_limit,
        callbacks=listeners,
        capture=lambda r: _capture(lagrangian, chosen, r),
        interruptible=True,
    )
    solution = _finish(lagrangian, chosen, run)
    if run.error is not None:
        raise SolveError(
            f"{run.culprit} raised {type(run.error).__name__}: {run.error}; .solution holds the last point", solution
        ) from run.error
    if solution.status.is_failure and raise_on_failure:
        raise SolveError(f"{solution.status.name} after {solution.steps} steps: {solution.message}", solution)
    return solution


def _begin(
    problem: Problem,
    method: Any,
    x0: Tree | None,
    multipliers: Any,
    atol: float | None,
    generator: torch.Generator,
    max_steps: int | None,
) -> tuple[Lagrangian, ConstrainedMethod[Any], Run[Any]]:
    chosen = _with_atol(_require_method(method, problem), atol)
    if x0 is None:
        raise TypeError("x0 is missing: where should the run start?")
    reason = chosen.refuses(problem)
    if reason is not None:
        raise ValueError(reason)
    problem.validate(x0)
    lagrangian = Lagrangian(problem, x0)
    start = lagrangian.flat(x0).clone()
    check_supplied(lagrangian, start)
    flat = None if multipliers is None else lagrangian.flat_multipliers(*_require_multipliers(multipliers))
    resolved = chosen.resolve(lagrangian, start, max_steps=max_steps)
    return lagrangian, resolved, Run(resolved.init(lagrangian, start, flat, generator=generator))


def _require_multipliers(multipliers: Any) -> tuple[Any, ...]:
    if isinstance(multipliers, tuple) and len(multipliers) <= len(FlatMultipliers._fields):
        return multipliers
    raise TypeError(
        f"multipliers must be constrained.Multipliers(equality=..., inequality=..., lower=..., upper=...), got "
        f"{type(multipliers).__name__}"
    )


def _require_method(method: Any, problem: Problem) -> ConstrainedMethod[Any]:
    if method is None:
        return default_method(problem)
    if isinstance(method, ConstrainedMethod):
        return method
    if isinstance(method, type) and issubclass(method, ConstrainedMethod):
        raise TypeError(f"method must be an object, not the class: {method.__name__}()")
    if hasattr(method, "__array__") or isinstance(method, list | tuple | dict):
        raise TypeError("the second argument is the method; write constrained.solve(problem, x0=...)")
    if isinstance(method, str):
        named = [name for name in methods() if name.lower() == method.lower()]
        if named:
            raise TypeError(f"method must be an object, not its name {method!r}: constrained.{named[0]}()")
    raise TypeError(f"method must be such as constrained.InteriorPoint(), got {method!r}")


def _with_atol(method: ConstrainedMethod[Any], atol: float | None) -> ConstrainedMethod[Any]:
    return method if atol is None else replace(method, atol=atol)


def _capture(lagrangian: Lagrangian, method: ConstrainedMethod[Any], run: Run[Any]) -> dict[str, Any]:
    captured = runs.capture_run(method, run, x=lagrangian.tree(run.state.x))
    return {**captured, "counts": dict(lagrangian.counts), "constraints": _sizes(lagrangian)}


def _sizes(lagrangian: Lagrangian) -> list[int]:
    return [lagrangian.n, lagrangian.equalities, lagrangian.inequalities]


def _restore(
    problem: Problem, method: Any, checkpoint: dict[str, Any], atol: float | None
) -> tuple[Lagrangian, ConstrainedMethod[Any], Run[Any]]:
    runs.check_format(checkpoint, "implicit")
    given = None if method is None else _require_method(method, problem)
    if given is not None and given.name != checkpoint["name"]:
        raise ValueError(f"the checkpoint is a run of {checkpoint['name']}, not of {given.name}")
    settings, chosen = runs.restore_settings(checkpoint, given)
    if chosen is None:
        if checkpoint["name"] not in methods():
            raise ValueError(f"the checkpoint is a run of {checkpoint['name']}, which is no method of constrained")
        chosen = methods()[checkpoint["name"]](**settings)
    chosen = _with_atol(chosen, atol)
    (x,) = runs.restore_start(checkpoint)
    problem.validate(x, "the checkpoint's x")
    lagrangian = Lagrangian(problem, x)
    if _sizes(lagrangian) != checkpoint["constraints"]:
        raise ValueError(
            f"the checkpoint has [n, equalities, inequalities] = {checkpoint['constraints']}, this problem has "
            f"{_sizes(lagrangian)}; resume with the same problem"
        )
    state = chosen.init(lagrangian, lagrangian.flat(x).clone(), None, generator=torch.Generator())
    run = runs.restore_run(checkpoint, chosen, state)
    lagrangian.counts.update(checkpoint["counts"])
    return lagrangian, chosen, run


def _finish(lagrangian: Lagrangian, method: ConstrainedMethod[Any], run: Run[Any]) -> Solution:
    captured = _capture(lagrangian, method, run)
    counts = dict(lagrangian.counts)
    x, multipliers = _end_point(method, run)
    try:
        residual, curvature, status, message = method.assess(lagrangian, x, multipliers, run.status)
    except Exception as error:  # a report must never lose the run
        residual, curvature, status = KKTResidual(math.nan, math.nan, math.nan), None, Status.STALLED
        message = f"the final measurement failed: {type(error).__name__}: {error}"
    if run.error is not None:
        status, message = Status.STOPPED, f"{run.culprit} raised {type(run.error).__name__}: {run.error}"
    return Solution(
        x=tree.clone(lagrangian.tree(x)),
        multipliers=lagrangian.multiplier_trees(FlatMultipliers(*(v.clone() for v in multipliers))),
        status=status,
        message=message,
        method=method,
        residual=residual,
        objective=_objective(lagrangian, x),
        curvature=curvature,
        counts=counts,
        history=run.history,
        steps=run.state.step,
        seconds=run.seconds,
        checkpoint=captured,
    )


def _end_point(method: ConstrainedMethod[Any], run: Run[Any]) -> tuple[Tensor, FlatMultipliers]:
    """The last point, or the best one of a run that ended early."""
    state = run.state
    early = run.status in (Status.STEP_LIMIT, Status.TIME_LIMIT, Status.STOPPED, Status.NONFINITE, Status.STALLED)
    last = run.history[-1].get("residual", math.inf) if run.history else math.inf
    if early and run.best.point is not None and not last <= run.best.merit:
        x, *multipliers = run.best.point
        return x, FlatMultipliers(*multipliers)
    return state.x, state.multipliers


def _objective(lagrangian: Lagrangian, x: Tensor) -> float:
    try:
        with torch.no_grad():
            return float(lagrangian.problem.objective(lagrangian.tree(x)))
    except Exception:
        return math.nan
