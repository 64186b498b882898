"""Whether f falls for ever over points that solve the lower level."""

import math
import time

import torch
from torch import Tensor

from bilevel.algorithms.kkt_relaxation_state import CUT_SLACK, TOLERANCE, KKTRelaxationState
from bilevel.algorithms.relaxed_kkt import FALLEN, Outcome, RelaxedKKT
from bilevel.verify import STARTS, Verification, verify_flat
from constrained import ConstrainedProblem, InteriorPoint, Lagrangian
from constrained.unbounded import DEPTH
from implicit import Status
from implicit.iterate import Run, iterate

FURTHER = 1e2
"""Each stage is that many times deeper than the one before."""
FAR = 1e12
"""A fall to so far from the origin, relative to the start, has no end: float64 could not resolve one there."""
DEEPEST = 1e28
"""A value so many times below the sizes of f and its slope at the start has no end either, wherever it is. Polynomials
on bounded sets stay above it, up to the sixth degree within 1e4."""
STEPS = 300
GAP = 1e-3 * TOLERANCE
"""How far y may be from optimal: what the tolerance allows could pay for the whole fall where g is flat."""


def look(
    kkt: RelaxedKKT, state: KKTRelaxationState, outcome: Outcome, *, atol: float, time_limit: float | None
) -> tuple[Tensor, Verification] | None:
    """Unknowns from which f falls for ever, and their verification; None where that is not found.

    Looked at are the points with the exact complementarity that is read off at the end of a program that fell deep.
    """
    multipliers, slacks = kkt.pairs_at(outcome.z)
    program = kkt.piece(multipliers > slacks, state.used_cuts, CUT_SLACK)
    deep = fall(kkt, program, state.point, atol=atol, time_limit=time_limit)
    if deep is None:
        return None
    at = kkt.split(deep)
    found = verify_flat(kkt.flat, at.x, at.y, TOLERANCE, STARTS, torch.Generator().manual_seed(0))
    gap = math.inf if found.optimality_gap is None else found.optimality_gap
    return (deep, found) if found.accepted and gap <= GAP * max(1.0, abs(found.lower_value)) else None


def fall(
    kkt: RelaxedKKT, program: ConstrainedProblem, z: Tensor, *, atol: float, time_limit: float | None
) -> Tensor | None:
    """A point where f is 1e6 times as deep as f and its slope were large, if it falls from there without end.

    The point comes early in the fall: further out the lower level drowns in rounding. The interior-point method goes
    down in stages, each of which ends at a point that satisfies the program up to rounding. Depth alone tells little,
    as ``-x^4`` on a large box shows: the fall has to reach :data:`FAR` or :data:`DEEPEST`.

    Args:
        kkt: whose unknowns z are.
        program: with exact complementarity, so that its points are KKT points of the lower level.
        z: where to begin.
        atol: tolerance on the constraints of the program.
        time_limit: seconds for all of it, or None.

    Returns:
        The point, or None if a stage is not reached.
    """
    own = sum(kkt.parts[:2])
    began, far = time.perf_counter(), FAR * (1.0 + float(z[:own].abs().amax()))
    method, lagrangian = InteriorPoint(atol=atol), Lagrangian(program, z)
    size, first = -method.init(lagrangian, z.clone(), None).floor / DEPTH, None
    if not math.isfinite(size):
        return None
    depth, steps = FALLEN, STEPS
    while True:
        run = Run(method.init(lagrangian, z.clone(), None))  # anew, with scales of the place
        state = run.state
        state.floor = -depth * size
        left = None if time_limit is None else time_limit - (time.perf_counter() - began)
        iterate(method, lagrangian, run, max_steps=steps, time_limit=left, record=False)
        if run.status is not Status.UNBOUNDED:
            return None  # also where a function raised: it need not be defined so far out
        z, steps = state.x, steps - state.step
        first = z.clone() if first is None else first
        depth = max(depth, -float(state.at(lagrangian).objective) / size)
        if float(z[:own].abs().amax()) >= far or depth >= DEEPEST:
            return first
        depth *= FURTHER
