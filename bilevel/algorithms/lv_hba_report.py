"""The end of an LV-HBA run: lower solutions at the points it reached, the better one, and whether it holds."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.algorithms.lv_hba_stages import Outcome, StagesState
from bilevel.flat import FlatProblem
from bilevel.joint_scaling import joint_curvature
from bilevel.nearest_response import Response, respond
from bilevel.singular_hypergradient import singular_hypergradient
from bilevel.solution import Accuracy
from bilevel.verify import Verification, verify
from implicit import Status
from implicit.derivatives import value_and_gradients
from implicit.tree import Tree

FEASIBLE = 1e-6
STEEP = 1e-3
"""A measured stationarity beyond this fraction of the gradient of the upper objective, or beyond the tolerance, is
looked into."""
REACH = 1e-3
"""Length of the longest step that looks, relative to the size of (x, y). Where x is in smaller units than y it may be
longer than all of x: then shorter ones tell."""
SHORTER = 0.1
BEYOND = 30.0
"""Steps that look are at least so many times as long as x may be away from a kink, or F would fall on the way there."""
PROMISED = 0.1
"""Part of the fall promised by the slope that counts as one."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is reported about the end of a run; ``response`` is None where the lower level was not solved."""

    response: Response | None
    multipliers: dict[str, Tree]
    accuracy: Accuracy
    status: Status
    message: str


def judge(
    flat: FlatProblem,
    ends: list[tuple[Tensor, Tensor]],
    status: Status,
    *,
    stages: StagesState,
    rtol: float,
) -> Verdict:
    """Take the best of the ends after solving the lower level there, and confirm or correct the status."""
    if status in (Status.INFEASIBLE, Status.NONFINITE):
        return _failed(flat, ends[-1], status)
    curvature = joint_curvature(flat, "lower", *ends[-1], [flat.oracle])
    responses = [respond(flat, x, y, curvature=curvature) for x, y in ends]
    best = min(responses, key=_rank)
    checked = verify(flat.problem, flat.x_tree(best.x), flat.y_tree(best.y)) if status is Status.CONVERGED else None
    multipliers = flat.multipliers(
        best.lower.multipliers.inequality,
        best.lower.multipliers.equality,
        best.lower.multipliers.lower,
        best.lower.multipliers.upper,
    )
    known = math.isfinite(stages.change)
    accuracy = Accuracy(
        lower_residual=best.lower.residual.stationarity,
        stationarity=None if checked is None else checked.stationarity,
        bias=stages.bias if known else None,
        feasibility=best.violation,
        optimality_gap=None if checked is None else checked.optimality_gap,
        lower_kkt=best.lower.residual,
        notes=(*flat.notes, *(() if checked is None else checked.notes)),
    )
    status, message = _decide(flat, status, best, checked, stages, ends[0], rtol, curvature)
    return Verdict(response=best, multipliers=multipliers, accuracy=accuracy, status=status, message=message)


def _rank(response: Response) -> tuple[float, float]:
    """Feasible ones first, by their upper value; the others by their violation."""
    violation = response.violation if response.violation == response.violation else math.inf
    excess = violation if violation > FEASIBLE else 0.0
    return excess, response.upper if response.upper == response.upper else math.inf


def _decide(
    flat: FlatProblem,
    status: Status,
    best: Response,
    checked: Verification | None,
    stages: StagesState,
    limit: tuple[Tensor, Tensor],
    rtol: float,
    curvature: float,
) -> tuple[Status, str]:
    c = float(stages.penalty)
    found = f"after {stages.step} values of c, the last {c:.3g}, the extrapolated (x, y) changed by {stages.change:.3g}"
    if status is Status.STALLED:
        if Outcome(stages.outcome) is Outcome.DIVERGED:
            return status, f"the iterates left for infinity at every c up to {c:.3g}; raise penalty"
        if not math.isfinite(stages.change):
            return status, (
                f"after {stages.step} values of c, the last {c:.3g}, no three in a row reached their fixed points, so "
                "that the bias is not known; raise stages or stage_steps"
            )
        allowed = rtol * (1.0 + float(torch.linalg.vector_norm(torch.cat(limit))))
        if stages.change <= allowed < stages.apart:
            return status, (
                f"{found}, but y stays {stages.apart:.3g} away from a lower solution: constraints hold (x, y) there, "
                "or the lower level is not convex or has no multipliers; start elsewhere"
            )
        return status, f"{found}, where {allowed:.3g} is asked for; raise stages or stage_steps, or start elsewhere"
    if checked is None:
        return status, status.value
    if not checked.accepted:
        return Status.STALLED, f"{found}, but the point is not verified: {checked.reasons[0]}"
    in_x = float(torch.linalg.vector_norm(best.x - limit[0]))
    moved = math.hypot(in_x, float(torch.linalg.vector_norm(best.y - limit[1])))
    size = 1.0 + float(torch.linalg.vector_norm(torch.cat(limit)))
    if moved > 10.0 * rtol * size:
        return Status.STALLED, (
            f"{found}, but solving the lower level again moved it by {moved:.3g}: the lower level is not convex, or "
            "has solutions between which the upper level does not decide"
        )
    slope = checked.stationarity
    steep = slope is not None and slope > max(max(STEEP, rtol) * _size_of_gradient(flat, best), _negligible(best, size))
    if steep and _descends(flat, best, size, max(stages.change_x, in_x), curvature):
        return Status.STALLED, (
            f"{found}, and the point is bilevel feasible, but not stationary for the upper level (stationarity "
            f"{slope:.3g}): where constraints become active, penalised problems have saddle points that are none of "
            "the problem itself; start elsewhere, or use KKTRelaxation or Penalty"
        )
    message = f"{found}; bias {stages.bias:.3g} at the last c, extrapolated; verified"
    if steep:
        message += f"; F has a kink there: stationarity {slope:.3g}, and no descent along it"
    return status, message


def _descends(flat: FlatProblem, best: Response, size: float, error: float, curvature: float) -> bool:
    """Whether F falls along its hypergradient by a tenth of what that promises, over any of several step lengths.

    At a kink it does not, over steps that are long beside the ``error`` of x; shorter ones, and those over which
    rounding hides what is promised, are not tried.
    """
    found = singular_hypergradient(flat.problem, flat.x_tree(best.x), flat.y_tree(best.y))
    h = flat.flat_x(found.value)
    slope = float(torch.linalg.vector_norm(h))
    hidden = float(torch.finfo(h.dtype).eps) ** 0.5 * (1.0 + abs(best.upper))
    reach = REACH * size
    while reach >= BEYOND * error and PROMISED * reach * slope >= hidden:
        x = flat.flat_x(flat.problem.upper_set.project(flat.x_tree(best.x - (reach / slope) * h)))
        there = respond(flat, x, best.y, curvature=curvature)
        if there.violation <= FEASIBLE and there.upper < best.upper - PROMISED * float(h @ (best.x - x)):
            return True
        reach *= SHORTER
    return False


def _size_of_gradient(flat: FlatProblem, best: Response) -> float:
    _, in_x, in_y = value_and_gradients(flat.upper, best.x, best.y)
    return float(torch.linalg.vector_norm(torch.cat([in_x, in_y])))


def _negligible(best: Response, size: float) -> float:
    """A slope along which F changes by a relative 1e-4 over the size of the point."""
    return 1e-4 * (1.0 + abs(best.upper)) / size


def _failed(flat: FlatProblem, end: tuple[Tensor, Tensor], status: Status) -> Verdict:
    violation = flat.violation(*end)
    if status is Status.INFEASIBLE:
        convex = flat.upper_level.affine and flat.lower_level.affine
        message = (
            f"no (x, y) {'satisfies' if convex else 'was found that satisfies'} all sets and constraints; the least "
            f"infeasible one violates them by {violation:.3g}"
            + ("" if convex else "; the search is local where constraints are not convex: start elsewhere")
        )
    else:
        message = f"{status.value}; not measured after a numerical failure"
    accuracy = Accuracy(feasibility=violation, notes=flat.notes)
    return Verdict(response=None, multipliers={}, accuracy=accuracy, status=status, message=message)
