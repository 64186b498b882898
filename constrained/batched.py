"""Many small problems of one shape at once: check, drive all elements together, measure, return."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from constrained.batch.active import Solved, inspect
from constrained.batch.derivative import Conditions, Implicit, followed
from constrained.batch.elements import CODE, residual
from constrained.batch.functions import BatchFunctions
from constrained.batch.newton import BatchedNewton, BatchState, is_minimum
from constrained.batch.solution import BatchSolution, describe
from constrained.multipliers import FlatMultipliers, Multipliers
from constrained.problem import Problem
from constrained.sets.base import check_fit
from implicit import Run, SolveError, Status, runs, tree
from implicit.iterate import Callback, iterate
from implicit.tree import Tree


def solve_batch(
    problem: Problem,
    x0: Tree | None = None,
    data: Any = (),
    *,
    shared: Any = (),
    method: BatchedNewton | None = None,
    max_steps: int | None = None,
    time_limit: float | None = None,
    atol: float | None = None,
    callbacks: Iterable[Callback] = (),
    checkpoint: dict[str, Any] | None = None,
    **unknown: Any,
) -> BatchSolution:
    """Solve B problems that differ in their data and starts, each until it is done.

    Args:
        problem: an :class:`EqualityProblem` or :class:`ConstrainedProblem`, whose functions are written for one
            element and called as ``f(x, *data, *shared)`` (supplied derivatives likewise, data last); they must work
            under ``torch.func.vmap``. Bounds are those of one element and serve all.
        x0: the starts, a tree with leaves of shape (B, ...). Not modified.
        data: a tuple of trees with leaves of shape (B, ...); anything else counts as a tuple of one.
        shared: a tuple of trees that all elements see unchanged, without a batch axis.
        method: settings; ``BatchedNewton()`` by default.
        max_steps: steps of the whole run; every unfinished element moves in each.
        time_limit: seconds of this call.
        atol: overrides the method's tolerance on the KKT residual of every element.
        callbacks: as for :func:`constrained.solve`; values are the numbers of elements "unfinished" and "converged".
        checkpoint: resume this run, bitwise, with the same problem and data; x0 is refused then.

    Returns:
        The solution. Elements that fail do not raise: their status says how they ended, and they do not disturb the
        others. x and the multipliers are differentiable in the floating-point leaves of data and shared, in reverse
        and forward mode (not forward over forward) and to any order, by the implicit function theorem: one batched
        linear solve per derivative. Constraints that depend on each other are left out of it as far as they do.

    Raises:
        TypeError, ValueError: for misuse, before the first step.
        SolveError: if a function of the problem raises after the first step, with ``.solution``.

    Warns:
        ConvergenceWarning: when differentiating, with the number of elements where there is no derivative: not
            converged (NaN), a constraint without force that holds with equality, dependent active constraints that the
            data may move apart, a solution that is not unique to first order.

    Example:
        >>> import torch, constrained
        >>> disc = constrained.ConstrainedProblem(
        ...     objective=lambda x, p: ((x - p) ** 2).sum(), inequality=lambda x, p: (x**2).sum() - 1
        ... )
        >>> points = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> constrained.solve_batch(disc, torch.zeros(2, 2), points).x.round(decimals=3)
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    runs.refuse_unknown(unknown)
    if not isinstance(problem, Problem):
        found = type(problem).__name__
        raise TypeError(f"problem must be a constrained.EqualityProblem or a ConstrainedProblem, got {found}")
    if method is not None and not isinstance(method, BatchedNewton):
        raise TypeError(f"method must be a constrained.BatchedNewton, got {method!r}")
    listeners = runs.check_callbacks(callbacks)
    runs.check_budgets(max_steps, time_limit=time_limit, atol=atol)
    data, shared = (value if isinstance(value, tuple) else (value,) for value in (data, shared))
    settings: dict[str, Any] = {}
    if checkpoint is not None:
        if x0 is not None:
            raise ValueError("a checkpoint brings its own points; leave out x0")
        settings, method, x0 = _stored(checkpoint, method)
    if x0 is None:
        raise TypeError("x0 is missing: where should the runs start?")
    _check(problem, x0, data, shared)
    start = tree.detach(x0)
    _check_sides(problem, start)
    functions = BatchFunctions(problem, start, data, shared)
    chosen = method or BatchedNewton(**settings)
    chosen = (chosen if atol is None else replace(chosen, atol=atol)).resolve(functions)
    ended: list[BatchSolution] = []

    def run(leaves: Sequence[Tensor]) -> Solved:
        own = functions.using([leaf.detach() for leaf in leaves])
        own.first().validate(own.like)
        ended.append(_run(own, chosen, start, checkpoint, max_steps, time_limit, listeners))
        return _solved(own, ended[0])

    leaves = functions.leaves
    if not followed(leaves):
        run(leaves)
        return ended[0]
    y = Implicit.apply(Conditions(functions, run), *leaves)
    return _attach(functions, ended[0], y)


def _run(
    functions: BatchFunctions,
    method: BatchedNewton,
    start: Tree,
    checkpoint: dict[str, Any] | None,
    max_steps: int | None,
    time_limit: float | None,
    listeners: list[Callback],
) -> BatchSolution:
    state = method.init(functions, tree.ravel_batch(start))
    run = Run(state) if checkpoint is None else runs.restore_run(checkpoint, method, state)
    if checkpoint is not None:
        functions.counts.update(checkpoint["counts"])

    def capture(run: Run[BatchState]) -> dict[str, Any]:
        return {**runs.capture_run(method, run, x=start), "counts": dict(functions.counts)}

    iterate(
        method,
        functions,
        run,
        max_steps=max_steps if max_steps is not None else method.default_max_steps,
        time_limit=time_limit,
        callbacks=listeners,
        capture=capture,
        interruptible=True,
    )
    solution = _finish(functions, method, run, capture(run))
    if run.error is not None:
        raise SolveError(
            f"{run.culprit} raised {type(run.error).__name__}: {run.error}; .solution holds the last points", solution
        ) from run.error
    return solution


def _solved(functions: BatchFunctions, solution: BatchSolution) -> Solved:
    x = tree.ravel_batch(solution.x)
    flat = [tree.ravel_batch(v) if tree.leaves(v) else x[:, :0] for v in solution.multipliers]
    return inspect(functions, x, FlatMultipliers(*flat), solution.converged, solution.method.atol)


def _attach(functions: BatchFunctions, solution: BatchSolution, y: Tensor) -> BatchSolution:
    """The solution with x, multipliers and objective as functions of the data."""
    m, p, n = functions.equalities, functions.inequalities, functions.n
    x, equality, inequality, z = torch.split(y, [n, m, p, n], dim=1)
    parts = (equality, inequality, (-z).clamp(min=0), z.clamp(min=0))
    likes = (*functions.constraint_like, functions.like, functions.like)
    trees = Multipliers(*(functions.trees(v, like) for v, like in zip(parts, likes, strict=True)))
    objective = functions.evaluate(x, functions.leaves).objective
    return replace(solution, x=functions.trees(x, functions.like), multipliers=trees, objective=objective)


def _stored(checkpoint: dict[str, Any], method: BatchedNewton | None) -> tuple[dict[str, Any], Any, Tree]:
    runs.check_format(checkpoint, "implicit")
    if checkpoint["name"] != BatchedNewton.__name__:
        raise ValueError(f"the checkpoint is a run of {checkpoint['name']}, not of BatchedNewton")
    settings, method = runs.restore_settings(checkpoint, method)
    (x0,) = runs.restore_start(checkpoint)
    return settings, method, x0


def _check(problem: Problem, x0: Tree, data: tuple[Tree, ...], shared: tuple[Tree, ...]) -> None:
    """Refuse what cannot be a batch."""
    leaves = tree.leaves(x0)
    if not leaves:
        raise ValueError("x0 holds no tensor")
    if any(isinstance(leaf, Tensor) and leaf.dim() and not len(leaf) for leaf in leaves):
        raise ValueError("x0 holds a batch of no elements: give at least one start")
    for path, leaf in zip(tree.paths(x0), leaves, strict=True):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise TypeError(f"x0{path} = {leaf!r}: give a floating-point tensor with a leading batch axis")
        if leaf.dim() == 0 or len(leaf) != len(leaves[0]):
            raise ValueError(f"x0{path} has shape {tuple(leaf.shape)}: every leaf needs the same leading batch axis")
        if not bool(torch.isfinite(leaf).all()):
            raise ValueError(f"x0{path} is not finite: start from numbers")
    tree.common_dtype(x0, "x0")
    size, like = len(leaves[0]), leaves[0]
    for name, value in (("data", data), ("shared", shared)):
        for path, leaf in zip(tree.paths(value), tree.leaves(value), strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name}{path} = {leaf!r}: give a tensor; close over what is the same for all elements")
            if leaf.device != like.device:
                raise ValueError(f"{name}{path} is on {leaf.device}, x0 on {like.device}: move one of them")
            if name == "data" and (leaf.dim() == 0 or len(leaf) != size):
                raise ValueError(
                    f"data{path} has shape {tuple(leaf.shape)}, but the batch has {size} elements: give one row per "
                    "element, or pass it in shared"
                )


def _check_sides(problem: Problem, start: Tree) -> None:
    one = tree.map(lambda leaf: leaf[0], start)
    for side in ("lower", "upper"):
        check_fit(side, getattr(problem, side), one, "x0 of one element")


def _finish(
    functions: BatchFunctions, method: BatchedNewton, run: Run[BatchState], checkpoint: dict[str, Any]
) -> BatchSolution:
    """Measure every element where it ended; budgets that ended the run end the elements that were on their way."""
    assert method.atol is not None and method.chunk is not None
    e, counts = run.state.elements, dict(functions.counts)
    everything = torch.arange(functions.size, device=functions.device)
    ended = Status.STOPPED if run.error is not None else run.status
    codes, saddle, measured, objective = e.code.clone(), e.saddle.clone(), e.residual.clone(), e.objective.clone()
    if run.error is None:
        for index in everything.split(method.chunk):
            rows, data = e.rows(index), functions.at(index)
            running = rows.code == CODE[Status.RUNNING]
            d = functions.derivatives(rows.x, rows.multipliers, data, hessian=bool(running.any()))
            found = residual(functions, rows, d)
            solved = running & (found.amax(dim=1) <= method.atol) & ~rows.restoring
            minimum = is_minimum(functions, rows, d, solved, method.atol) if d.hessian is not None else solved
            code = torch.where(running, CODE[ended], rows.code)
            code = torch.where(solved & minimum, CODE[Status.CONVERGED], code)
            codes[index], measured[index], objective[index] = code, found, d.objective
            saddle[index] |= solved & ~minimum
    else:
        codes = torch.where(codes == CODE[Status.RUNNING], CODE[ended], codes)
    all_solved = bool((codes == CODE[Status.CONVERGED]).all())
    unfinished = ended in (Status.STEP_LIMIT, Status.TIME_LIMIT, Status.STOPPED)
    status = Status.CONVERGED if all_solved else ended if unfinished else Status.STALLED
    parts = [e.equality, e.inequality, e.lower, e.upper]
    likes = (*functions.constraint_like, functions.like, functions.like)
    return BatchSolution(
        x=functions.trees(e.x.clone(), functions.like),
        multipliers=Multipliers(*(functions.trees(v.clone(), like) for v, like in zip(parts, likes, strict=True))),
        codes=codes,
        saddle=saddle,
        residual=measured,
        objective=objective,
        steps=e.steps.clone(),
        status=status,
        message=describe(codes),
        method=method,
        counts=counts,
        history=run.history,
        seconds=run.seconds,
        checkpoint=checkpoint,
    )
