"""Solutions of a batch of quadratic programs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from constrained.qp.solver import CODES, CONVERGED
from implicit.status import Status


@dataclass(frozen=True, kw_only=True, eq=False)
class QPSolution:
    """Minimizers of a batch of quadratic programs, with what proves them; without the batch axis for a single one.

    Attributes:
        x: the minimizers, ``(batch, n)``; the least infeasible point where there is no feasible one, a feasible point
            where the objective has no bound, NaN where the arguments are not finite.
        equality: multipliers of ``A x = b``, ``(batch, m)``.
        inequality: multipliers of ``G x <= h``, at least zero, ``(batch, p)``.
        lower: multipliers of ``lower <= x``, at least zero, ``(batch, n)``.
        upper: multipliers of ``x <= upper``, at least zero, ``(batch, n)``. The Lagrangian is ``1/2 x'Qx + q'x +
            <equality, A x - b> + <inequality, G x - h> + <lower, lower bound - x> + <upper, x - upper bound>``. Of an
            infeasible element they are a certificate instead: ``A' equality + G' inequality + upper - lower = 0`` and
            ``<b, equality> + <h, inequality> + <upper bound, upper> - <lower bound, lower> < 0``.
        objective: ``1/2 x'Qx + q'x``, ``(batch,)``.
        ray: where the objective has no bound, a direction v with ``Q v = 0``, ``A v = 0``, ``G v <= 0``, within the
            bounds, and ``q'v < 0``; zero elsewhere, ``(batch, n)``.
        stationarity, feasibility, complementarity: as in :class:`constrained.KKTResidual`, ``(batch,)``.
        codes: what :attr:`status` reads, ``(batch,)``.
        steps: of the interior-point method, zero where active sets sufficed, ``(batch,)``.
        active: the rows that are active, in the order equations, inequalities, upper, lower; for ``start``.
    """

    x: Tensor
    equality: Tensor
    inequality: Tensor
    lower: Tensor
    upper: Tensor
    objective: Tensor
    ray: Tensor
    stationarity: Tensor
    feasibility: Tensor
    complementarity: Tensor
    codes: Tensor
    steps: Tensor
    active: Tensor

    @property
    def status(self) -> "Status | list[Status]":
        """The outcome, or a list of one for each element; reads them on the host."""
        codes = self.codes.tolist()
        return [CODES[code] for code in codes] if isinstance(codes, list) else CODES[codes]

    @property
    def success(self) -> bool:
        """Whether every element converged."""
        return bool((self.codes == CONVERGED).all())

    @property
    def message(self) -> str:
        """How many elements ended how, and what that means."""
        return describe(self.codes)


MEANINGS = {
    Status.NONFINITE: "an argument is NaN or infinite, and so is what is returned",
    Status.INFEASIBLE: "no point satisfies the constraints; the least infeasible one is returned, and the multipliers "
    "prove it",
    Status.UNBOUNDED: "the objective falls for ever along .ray; a feasible point is returned. Add bounds, or check the "
    "sign of the objective",
    Status.STALLED: "no further progress is possible at this precision; the best point found is returned. Scale the "
    "program, use float64, or loosen atol",
    Status.STEP_LIMIT: "max_steps was used up; the best point found is returned. Raise max_steps",
}
"""What a status means here, where it is not what it means of an iteration."""


def describe(codes: Tensor) -> str:
    """Each outcome that occurs, with the elements it occurs at unless it is success."""
    values: Sequence[int] = codes.reshape(-1).tolist()
    parts = []
    for code in sorted(set(values)):
        where = [i for i, value in enumerate(values) if value == code]
        chosen = ", ".join(map(str, where[:5])) + (f" and {len(where) - 5} more" if len(where) > 5 else "")
        prefix = "" if len(values) == 1 else f"{len(where)} of {len(values)} elements"
        prefix += f" ({chosen}): " if prefix and code != CONVERGED else ": " if prefix else ""
        status = CODES[code]
        parts.append(f"{prefix}{status.name}: {MEANINGS.get(status, status.value)}")
    return "; ".join(parts)


def split(multiplier: Tensor, counts: tuple[int, int, int, int], x: Tensor) -> dict[str, Tensor]:
    """The multipliers by kind; zeros for bounds that were not given."""
    equality, inequality, upper, lower = multiplier.split(counts, 1)
    zero = torch.zeros_like(x)
    return {
        "equality": equality,
        "inequality": inequality,
        "upper": upper if counts[2] else zero,
        "lower": lower if counts[3] else zero,
    }
