"""The end of an LV-HBA run: lower solutions at the points it reached, the better one, and whether it holds."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.algorithms.lv_hba_stages import Outcome, StagesState
from bilevel.flat import FlatProblem
from bilevel.nearest_response import Response, respond
from bilevel.solution import Accuracy
from bilevel.verify import Verification, verify
from implicit import Status
from implicit.tree import Tree

FEASIBLE = 1e-6


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
    curvature: float,
    rtol: float,
) -> Verdict:
    """Take the best of the ends after solving the lower level there, and confirm or correct the status."""
    if status in (Status.INFEASIBLE, Status.NONFINITE):
        return _failed(flat, ends[-1], status)
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
    status, message = _decide(status, best, checked, stages, ends[0], rtol)
    return Verdict(response=best, multipliers=multipliers, accuracy=accuracy, status=status, message=message)


def _rank(response: Response) -> tuple[float, float]:
    """Feasible ones first, by their upper value; the others by their violation."""
    violation = response.violation if response.violation == response.violation else math.inf
    excess = violation if violation > FEASIBLE else 0.0
    return excess, response.upper if response.upper == response.upper else math.inf


def _decide(
    status: Status,
    best: Response,
    checked: Verification | None,
    stages: StagesState,
    limit: tuple[Tensor, Tensor],
    rtol: float,
) -> tuple[Status, str]:
    c = float(stages.penalty)
    found = f"after {stages.step} values of c, the last {c:.3g}, the extrapolated (x, y) changed by {stages.change:.3g}"
    if status is Status.STALLED:
        if Outcome(stages.outcome) is Outcome.DIVERGED:
            return status, f"the iterates left for infinity at every c up to {c:.3g}; raise penalty"
        if not math.isfinite(stages.change):
            return status, "fewer than three values of c give no estimate of the bias; raise stages or max_steps"
        return status, f"{found}, above the tolerance; raise stages or stage_steps, or start elsewhere"
    if checked is None:
        return status, status.value
    if not checked.accepted:
        return Status.STALLED, f"{found}, but the point is not verified: {checked.reasons[0]}"
    moved = float(torch.linalg.vector_norm(torch.cat([best.x - limit[0], best.y - limit[1]])))
    size = 1.0 + float(torch.linalg.vector_norm(torch.cat(limit)))
    if moved > 100.0 * rtol * size:
        return Status.STALLED, (
            f"{found}, but solving the lower level again moved it by {moved:.3g}: the lower level is not convex, or "
            "has solutions between which the upper level does not decide"
        )
    return status, f"{found}; bias {stages.bias:.3g} at the last c, extrapolated; verified"


def _failed(flat: FlatProblem, end: tuple[Tensor, Tensor], status: Status) -> Verdict:
    violation = flat.violation(*end)
    if status is Status.INFEASIBLE:
        message = (
            f"no (x, y) satisfies all sets and constraints; the least infeasible one violates them by {violation:.3g}"
        )
    else:
        message = f"{status.value}; not measured after a numerical failure"
    accuracy = Accuracy(feasibility=violation, notes=flat.notes)
    return Verdict(response=None, multipliers={}, accuracy=accuracy, status=status, message=message)
