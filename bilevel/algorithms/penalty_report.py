"""The accuracy report of the penalty method, and what decides whether its runs have converged."""

from dataclasses import replace
from typing import TYPE_CHECKING

from bilevel.accuracy import (
    QUICK,
    SAFETY,
    assess_implicit,
    distance_budget,
    distance_to_solution,
    lower_residual,
    saddle_note,
    stationarity,
    twice_differentiable,
)
from bilevel.algorithms.lower_optimality import STARTS, bends_down
from bilevel.algorithms.penalty_bias import ExactPenalty, Measured, kink, measure
from bilevel.algorithms.penalty_scheme import PenaltyState
from bilevel.oracle import Oracle, new_counts
from bilevel.problem import BilevelProblem
from bilevel.solution import Accuracy
from bilevel.verify import verify
from implicit import Status, tree
from implicit.tree import Tree

if TYPE_CHECKING:
    from bilevel.algorithms.penalty import Penalty

VERIFIABLE = 64
"""Up to this many entries of y :func:`bilevel.verify` is asked before convergence is claimed; beyond, where the lower
level shows negative curvature around y."""
FAR = 0.5
"""Estimated distances to the solution beyond this fraction of the size of x contradict convergence."""

Report = tuple[Accuracy, Status, str]


def on_minibatches(settings: "Penalty", problem: BilevelProblem, state: PenaltyState, status: Status) -> Report:
    """A rough implicit hypergradient on all data, where it applies: the report must not cost more than the run."""
    oracle = Oracle.full(problem, new_counts())
    if not problem.lower_set.is_whole_space:
        why = "a lower set is declared"
    elif not twice_differentiable(oracle, state.x, state.y):
        why = "the lower level has no second derivatives"
    else:
        return assess_implicit(problem, oracle, state.x, state.y, QUICK, None)[0], status, status.value
    residual = lower_residual(problem, oracle, state.x, state.y)
    note = f"no hypergradient was measured on all data: {why}"
    return Accuracy(lower_residual=residual, notes=(note,)), status, status.value


def on_full_data(
    settings: "Penalty", problem: BilevelProblem, state: PenaltyState, status: Status, exact: ExactPenalty
) -> Report:
    """Measure at x, polish y, and confirm or correct the status."""
    assert settings.rtol is not None
    limit = max(settings.atol, settings.rtol * float(state.first))
    found = measure(exact, state.x)
    notes: tuple[str, ...] = ()
    before = found
    if settings.extrapolate and status is Status.CONVERGED:
        found, notes = _extrapolate(problem, state, exact, found)
    tree.copy_(state.y, found.y)
    budget = distance_budget(state.x, state.step // 10)
    distance, note = distance_to_solution(problem, found.map, state.x, found.value, budget)
    notes = found.accuracy.notes + notes + ((note,) if note else ())
    accuracy = replace(found.accuracy, distance=distance, notes=notes)
    if status is not Status.CONVERGED:
        return accuracy, status, status.value
    if (saddle := saddle_note(accuracy)) is not None:
        return accuracy, Status.STALLED, f"{saddle}; start y elsewhere"
    return _judge(settings, problem, state, exact, found, accuracy, limit, found is not before)


def _extrapolate(
    problem: BilevelProblem, state: PenaltyState, exact: ExactPenalty, found: Measured
) -> tuple[Measured, tuple[str, ...]]:
    """Move x to the limit of the penalties if they approach it as they should; the measurements there, and a note."""
    (x_1, y_1), (x_2, y_2) = state.stages
    first, second = (float(tree.norm(tree.sub(a, b))) for a, b in ((x_1, x_2), (x_2, state.x)))
    expected = 0.5**exact.order
    if second == 0.0:
        return found, ()
    if not 0.6 * expected <= second / first <= 1.4 * expected if first > 0 else True:
        return found, (
            f"not extrapolated: doubling the penalty moved x by {first:.3g} and then by {second:.3g}, not by "
            f"{expected} of that: a kink, a change of the active set, or a tolerance that is too coarse",
        )
    weights = (1 / 3, -2.0, 8 / 3) if exact.order == 1 else (0.0, -1 / 3, 4 / 3)
    tree.copy_(state.x, problem.upper_set.project(_mix(weights, (x_1, x_2, state.x))))
    y = problem.lower_set.project(_mix(weights, (y_1, y_2, state.y)))
    exact.y = {1.0: y, 2.0: y}
    return measure(exact, state.x), ()


def _mix(weights: tuple[float, float, float], points: tuple[Tree, Tree, Tree]) -> Tree:
    total = tree.scale(weights[0], points[0])
    for weight, point in zip(weights[1:], points[1:], strict=True):
        total = tree.axpy(weight, point, total)
    return total


def _judge(
    settings: "Penalty",
    problem: BilevelProblem,
    state: PenaltyState,
    exact: ExactPenalty,
    found: Measured,
    accuracy: Accuracy,
    limit: float,
    extrapolated: bool,
) -> Report:
    """Whether a run that came to rest has converged."""
    target = (settings.bias_rtol or 0.0) * found.scale
    p = exact.penalty
    surrogate = stationarity(problem, state.x, found.once)
    if extrapolated:
        accuracy = replace(accuracy, bias=accuracy.stationarity)
        if not (accuracy.stationarity or 0.0) <= 10.0 * limit + 0.1 * found.bias:
            message = f"the extrapolated point has stationarity {accuracy.stationarity:.3g}; lower rtol"
            return accuracy, Status.STALLED, message
    elif surrogate > 10.0 * limit + 0.5 * min(found.two, target):
        message = f"with both inner problems solved the surrogate gradient is {surrogate:.3g}; raise lower_steps"
        return accuracy, Status.STALLED, message
    corner = None
    if found.bias > 1.5 * target + 10.0 * limit:
        size = 1.0 + float(tree.norm(state.x))
        reach, allowed = 0.1 * size / p, max(target, 10.0 * limit)
        # found.map may be extrapolated from penalties, which smooth a kink over a distance of 1/p.
        corner = kink(problem, lambda q: measure(exact, q).value, state.x, found.value, reach, allowed)
        if corner is None:
            return accuracy, Status.STALLED, _biased(found, target, p)
        distance, shortest = SAFETY * corner[0], corner[1]
        note = f"the hyper-objective has a kink within {distance:.3g} of x; stationarity is that of both of its sides"
        accuracy = replace(accuracy, stationarity=shortest, distance=distance, notes=(*found.accuracy.notes, note))
    elif found.disagreement > max(2.0 * found.two, target if target < float("inf") else 0.0) + 10.0 * limit:
        return accuracy, Status.STALLED, _biased(found, target, p)
    if accuracy.distance is not None and accuracy.distance > FAR * (1.0 + float(tree.norm(state.x))):
        message = f"x is still some {accuracy.distance:.3g} away from the solution that its slope and curvature predict"
        return accuracy, Status.STALLED, f"{message}; lower rtol"
    small = tree.size(state.y) <= VERIFIABLE
    if small or bends_down(problem, state.x, state.y):
        checked = verify(problem, state.x, state.y, starts=5 if small else STARTS)
        accuracy = replace(accuracy, optimality_gap=checked.optimality_gap)
        if not checked.accepted:
            return accuracy, Status.STALLED, f"not verified: {checked.reasons[0]}"
    what = (
        "extrapolated from penalties up to" if extrapolated else f"surrogate stationarity {surrogate:.3g}, at penalty"
    )
    return (
        accuracy,
        Status.CONVERGED,
        f"{what} {p:.3g}, tolerance {limit:.3g}; hypergradient bias {accuracy.bias:.3g}",
    )


def _biased(found: Measured, target: float, p: float) -> str:
    wanted = f", more than {target:.3g}" if target < float("inf") else ""
    return (
        f"at penalty {p:.3g} the hypergradient is biased by {found.two:.3g} measured by doubling the penalty and by "
        f"{found.disagreement:.3g} measured by implicit differentiation{wanted}: the penalty is too small, the "
        "hyper-objective has a kink or a jump here, or rounding drowns the difference of lower values: scale the "
        "objectives to similar sizes"
    )
