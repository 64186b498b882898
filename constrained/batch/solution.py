"""What a batched solve returns."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from constrained.batch.elements import CODE, OUTCOMES
from constrained.multipliers import Multipliers
from implicit.status import Status
from implicit.tree import Tree


@dataclass(frozen=True)
class BatchSolution:
    """The outcome of :func:`constrained.solve_batch`; every tensor has the batch as its leading axis.

    Attributes:
        x: the points, leaves of shape (B, ...); differentiable in data and shared.
        multipliers: see :class:`constrained.Multipliers`; differentiable likewise.
        codes: the status of every element as a position in ``BatchSolution.outcomes``, shape (B,).
        saddle: which elements ended at a stationary point that is no minimum (STALLED), shape (B,).
        residual: stationarity, feasibility and complementarity of every element as in
            :class:`constrained.KKTResidual`, measured afresh at the end, shape (B, 3).
        objective: f, shape (B,).
        steps: steps of every element, shape (B,).
        status: CONVERGED if all elements are; otherwise the budget that ended the run, or STALLED.
        message: one sentence that counts the outcomes.
        method: with every setting resolved.
        counts: evaluations, summed over elements.
        history: one dict of floats per step.
        seconds: of the whole run.
        checkpoint: the end of the run as plain data; pass it to ``solve_batch`` to go on.
    """

    x: Tree
    multipliers: Multipliers
    codes: Tensor
    saddle: Tensor
    residual: Tensor
    objective: Tensor
    steps: Tensor
    status: Status
    message: str
    method: Any
    counts: dict[str, int]
    history: list[dict[str, float]]
    seconds: float
    checkpoint: dict[str, Any] = field(default_factory=dict, repr=False)

    outcomes = OUTCOMES

    @property
    def converged(self) -> Tensor:
        """Which elements reached the requested accuracy at a point without negative curvature, shape (B,)."""
        return self.codes == CODE[Status.CONVERGED]

    @property
    def success(self) -> bool:
        """Whether all did."""
        return self.status is Status.CONVERGED

    @property
    def statuses(self) -> list[Status]:
        """The status of every element; reads the device."""
        return [OUTCOMES[code] for code in self.codes.tolist()]


def describe(codes: Tensor) -> str:
    """Such as ``9990 CONVERGED, 10 INFEASIBLE``."""
    counts = torch.bincount(codes, minlength=len(OUTCOMES)).tolist()
    found = sorted(zip(counts, OUTCOMES, strict=True), key=lambda pair: -pair[0])
    return ", ".join(f"{count} {status.name}" for count, status in found if count)
