"""The state of a run of :class:`bilevel.KKTRelaxation`: the current start's path, and what is known from all."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel.algorithms.base import BilevelState
from bilevel.algorithms.relaxed_kkt import RelaxedKKT
from bilevel.algorithms.start_points import StartBox
from bilevel.verify import Verification
from constrained.multipliers import FlatMultipliers

TOLERANCE = 1e-6
"""At which points are verified."""
CUT_SLACK = 0.1 * TOLERANCE
"""By how much cuts may be violated: at the better point itself they would leave no interior."""
CUTS = 12
"""Better lower points that are kept."""
SAME = 1e-5
"""Starts whose points at the same relaxation are so close end at the same point."""
BEGIN, RELAX, PIECE = "begin", "relax", "piece"

VERIFIED, WORSE, SAME_PATH, REJECTED, FAILED, INFEASIBLE, UNBOUNDED = range(7)
OUTCOMES = (
    "verified",
    "given up: not better than the best point",
    "given up: at the same point as an earlier start",
    "a KKT point that verify does not accept",
    "its nonlinear program could not be solved",
    "no point that satisfies all constraints",
    "f falls without bound",
)


@dataclass(kw_only=True)
class KKTRelaxationState(BilevelState):
    """The state of a run.

    Attributes:
        origin: the given start ``(x0, y0)``, shape (n + m,).
        seed: of the sequence of random starts.
        scale: of the lower objective.
        fixed: whether the lower feasible set is the same for every x, so that cuts hold everywhere.
        index: of the current start, its ``phase``, and how many ``rounds`` of cuts, ``flips`` of pairs, and
            ``looks`` for a lower bound of f it has had.
        point: the current unknowns; ``known`` says whether ``equality``, ``inequality``, ``below`` and ``above`` are
            multipliers of the program there.
        relaxation: of the products; ``reached`` is the last one whose program was solved, with ``relaxed_value`` and
            ``relaxed_residual``, f and the KKT residual at its end.
        active: which slacks are zero in the current piece.
        candidate: the best end of a piece, with f and its KKT residual, the pairs whose slacks were zero (``sides``),
            the multipliers of the upper constraints (``upper_duals``), and how f changes with the fixed sides of its
            pairs (``promises``), as far as pieces beyond them have not been looked at; ``turned`` is the pair whose
            other side is looked at now.
        cuts: better lower points, ``cut_count`` of them.
        extra: starts that were found on the way, shape (CUTS, n + m), ``extra_count`` of them.
        trail: where relaxed programs ended, and ``trail_keys`` at which relaxation and number of cuts.
        best: the best verified unknowns, with f, KKT residual, relaxation and multipliers of the upper constraints;
            ``unexplored`` says that f promises to fall on sides of its pairs that were not looked at. The value is
            minus infinity once f is found to have no lower bound.
        least: the least infeasible pair ``(x, y)``, shape (n + m,), while nothing is verified.
        statuses, values, outcomes: one entry per finished start.
        said: why the last rejected point was rejected.
    """

    origin: Tensor
    seed: int
    scale: float
    fixed: bool
    index: int = 0
    phase: str = BEGIN
    rounds: int = 0
    looks: int = 0
    flips: int = 0
    point: Tensor
    known: bool = False
    equality: Tensor
    inequality: Tensor
    below: Tensor
    above: Tensor
    relaxation: float = 0.0
    reached: float = 0.0
    relaxed_value: float = -math.inf
    relaxed_residual: float = math.inf
    active: Tensor
    candidate: Tensor
    candidate_value: float = math.inf
    candidate_residual: float = math.inf
    sides: Tensor
    promises: Tensor
    turned: int = 0
    upper_duals: FlatMultipliers
    cuts: Tensor
    cut_count: int = 0
    extra: Tensor
    extra_count: int = 0
    trail: Tensor
    trail_keys: list[float] = field(default_factory=list)
    best: Tensor
    best_value: float = math.inf
    best_residual: float = math.inf
    best_relaxation: float = 0.0
    best_upper_duals: FlatMultipliers
    unexplored: bool = False
    least: Tensor
    least_violation: float = math.inf
    statuses: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    outcomes: list[int] = field(default_factory=list)
    said: str = ""
    kkt: RelaxedKKT | None = field(default=None, metadata={"transient": True})
    box: StartBox | None = field(default=None, metadata={"transient": True})
    verification: Verification | None = field(default=None, metadata={"transient": True})

    @property
    def used_cuts(self) -> Tensor:
        """The cuts in force, shape (j, m)."""
        return self.cuts[: self.cut_count]

    def met(self) -> bool:
        """Whether an earlier program with the same relaxation and cuts ended at the point; remembers this one."""
        at = self.point[: len(self.origin)]
        key = math.log10(self.relaxation) - 100.0 * self.cut_count
        found = self.trail[: len(self.trail_keys)]
        close = (found - at).abs().amax(dim=1) <= SAME * (1.0 + float(at.abs().amax()))
        same = torch.tensor([k == key for k in self.trail_keys], dtype=torch.bool, device=at.device)
        comparable = self.fixed or not self.cut_count
        if comparable and bool((close & same).any()):
            return True
        if len(self.trail_keys) < len(self.trail):
            self.trail[len(self.trail_keys)] = at
            self.trail_keys.append(key)
        return False
