"""What a run of :class:`bilevel.KKTRelaxation` says about its end."""

import math

import torch
from torch import Tensor

from bilevel.algorithms.kkt_relaxation_state import OUTCOMES, UNBOUNDED, VERIFIED, KKTRelaxationState
from bilevel.flat import FlatProblem, row_sizes
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
                accepted=outcome in (VERIFIED, UNBOUNDED),
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


def conclusion(flat: FlatProblem, state: KKTRelaxationState, found: Verification, status: Status) -> tuple[Status, str]:
    """The status that the end deserves, and a sentence about it."""
    verified = state.best_value < math.inf
    if verified and not found.accepted:
        return Status.STALLED, f"verified before, but not again: {found.reasons[0]}"
    if status is Status.UNBOUNDED:
        return status, (
            f"upper falls without bound over lower solutions: it is {state.values[-1]:.3g} at the point returned, "
            "which is verified. Bound x by upper_set=constrained.Box(...) or a constraint, or check the sign of upper"
        )
    if verified:
        how = "exact complementarity" if not state.best_relaxation else f"products up to {state.best_relaxation:.0e}"
        tried = f"{len(state.outcomes)} starts, {state.outcomes.count(VERIFIED)} accepted as better than those before"
        text = f"verified; KKT residual {state.best_residual:.3g} with {how}; {tried}"
        if state.unexplored:
            text += "; multipliers say that f falls where the other side of a pair becomes positive"
        return status, text if status is Status.CONVERGED else f"{status.value}; {text}"
    if status is Status.INFEASIBLE:
        least = state.least_violation
        where = worst(flat, state.least[: flat.n], state.least[flat.n :])
        text = f"every start ended at a point that is infeasible; the least violation is {least:.3g}"
        return status, f"{text}, largest at {where}"
    reasons = ", ".join(sorted({OUTCOMES[v] for v in state.outcomes})) or "no start is finished"
    return status, f"no point was verified; {reasons}" + (f"; {state.said}" if state.said else "")


def worst(flat: FlatProblem, x: Tensor, y: Tensor) -> str:
    """Which declared field is violated most at (x, y), counted as in :meth:`FlatProblem.violations`, and by how much.

    For example ``"lower_inequality, row 2, by 0.5"``: the row among the function's flattened values, and the declared
    value there, not divided by the size of its gradient.
    """
    found: list[tuple[float, float, str]] = []
    for name, level, own in (("upper", flat.upper_level, x), ("lower", flat.lower_level, y)):
        beyond = torch.maximum(level.lower - own, own - level.upper)
        found += [(v, v, f"{name}_set, entry {k}") for k, v in enumerate(beyond.tolist())]
        for rows, kept, count, sign in (
            (level.inequality, level.kept_inequality, level.inequalities, 0.0),
            (level.equality, level.kept_equality, level.equalities, -math.inf),
        ):
            if not count:
                continue
            sizes, values = row_sizes(rows, x, y)
            raw = values.clamp(min=sign).abs()
            places = [f"{part.field}, row {k}" for part in kept for k in part.rows.tolist()]
            places += [f"{name}_set"] * (count - len(places))
            found += zip((raw / sizes.clamp(min=1.0)).tolist(), raw.tolist(), places, strict=True)
    _, amount, place = max(found)
    return f"{place}, by {amount:.3g}"
