"""What a run of :class:`bilevel.KKTRelaxation` says about its end."""

import math

from bilevel.algorithms.kkt_relaxation_state import OUTCOMES, VERIFIED, KKTRelaxationState
from bilevel.solution import Accuracy, Start
from bilevel.verify import Verification
from implicit import Status


def finished_starts(state: KKTRelaxationState, restarts: int) -> tuple[Start, ...]:
    """One entry per finished start: the given one, random ones, and those that verification found."""
    found = []
    for k, (status, value, outcome) in enumerate(zip(state.statuses, state.values, state.outcomes, strict=True)):
        name = "given" if k == 0 else f"random {k}"
        found.append(
            Start(
                name=name if k <= restarts else f"better y {k - restarts}",
                status=list(Status)[status],
                upper_value=value,
                accepted=outcome == VERIFIED,
                note=OUTCOMES[outcome],
            )
        )
    return tuple(found)


def accuracy_of(found: Verification) -> Accuracy:
    """What verification measured."""
    return Accuracy(
        stationarity=found.stationarity,
        feasibility=max(found.upper_feasibility, found.lower_feasibility),
        optimality_gap=found.optimality_gap,
        lower_kkt=found.lower_kkt,
        notes=found.notes,
    )


def conclusion(state: KKTRelaxationState, found: Verification, status: Status) -> tuple[Status, str]:
    """The status that the end deserves, and a sentence about it."""
    verified = math.isfinite(state.best_value)
    if verified and not found.accepted:
        return Status.STALLED, f"verified before, but not again: {found.reasons[0]}"
    if verified:
        how = "exact complementarity" if not state.best_relaxation else f"products up to {state.best_relaxation:.0e}"
        tried = f"{len(state.outcomes)} starts, {state.outcomes.count(VERIFIED)} accepted as better than those before"
        text = f"verified; KKT residual {state.best_residual:.3g} with {how}; {tried}"
        if state.unexplored:
            text += "; multipliers say that f falls where the other side of a pair becomes positive"
        return status, text if status is Status.CONVERGED else f"{status.value}; {text}"
    if status is Status.INFEASIBLE:
        least = state.least_violation
        return status, f"every start ended at a point that is infeasible; the least violation is {least:.3g}"
    reasons = ", ".join(sorted({OUTCOMES[v] for v in state.outcomes})) or "no start is finished"
    return status, f"no point was verified; {reasons}" + (f"; {state.said}" if state.said else "")
