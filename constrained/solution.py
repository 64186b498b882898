"""What a solve returns."""

import textwrap
from dataclasses import dataclass, field
from typing import Any

from constrained.multipliers import Multipliers
from constrained.residual import KKTResidual
from implicit import tree
from implicit.status import Status
from implicit.tree import Tree


@dataclass(frozen=True, repr=False)
class Solution:
    """The outcome of :func:`constrained.solve`.

    Attributes:
        x: the point, shaped like the start.
        multipliers: see :class:`constrained.Multipliers`.
        status: how it ended, from measured residuals.
        message: one sentence.
        method: the method with every setting resolved.
        residual: of the optimality conditions at (x, multipliers), measured independently at the end.
        objective: f(x).
        curvature: the smallest eigenvalue of the Hessian of the Lagrangian on the tangent space of the constraints
            that are active, relative to its largest in size; at a minimum it is not negative. None where it was not
            measured (matrices are not formed), infinity where that space is a point.
        counts: evaluations, see :class:`constrained.Lagrangian`.
        history: one dict of floats per step.
        steps, seconds: of the whole run.
        checkpoint: the end of the run as plain data; pass it to ``solve`` to go on.
    """

    x: Tree
    multipliers: Multipliers
    status: Status
    message: str
    method: Any
    residual: KKTResidual
    objective: float
    curvature: float | None
    counts: dict[str, int]
    history: list[dict[str, float]]
    steps: int
    seconds: float
    checkpoint: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        x = textwrap.shorten(tree.describe(self.x), 120, placeholder=" ...")
        return (
            f"Solution({self.status.name}, objective={self.objective:.8g}, residual={self.residual.largest:.2g}, "
            f"steps={self.steps}, x: {x})"
        )

    @property
    def success(self) -> bool:
        """Whether the requested accuracy was reached."""
        return self.status is Status.CONVERGED

    @property
    def nit(self) -> int:
        """Steps, under scipy's name."""
        return self.steps

    @property
    def fun(self) -> float:
        """f(x), under scipy's name."""
        return self.objective

    @property
    def nfev(self) -> int:
        """Evaluations of the objective and the constraints, under scipy's name."""
        return self.counts["objective"]
