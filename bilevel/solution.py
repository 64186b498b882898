"""What a solve returns."""

import textwrap
from dataclasses import dataclass, field
from typing import Any

from implicit import tree
from implicit.status import Status
from implicit.tree import Tree


@dataclass(frozen=True)
class Accuracy:
    """How good a solution is, measured once at the end on all data; None where the method cannot know.

    Attributes:
        lower_residual: norm of the lower gradient at (x, y) (with a lower set: of ``y - P(y - grad)``).
        lower_error: distance of y to the lower solution; a bound under declared strong convexity, else an estimate.
        linear_residual: relative residual of the adjoint system.
        stationarity: ``||x - P_X(x - h)||`` with the hypergradient h measured independently of the method's surrogate.
        hypergradient_error: error of that hypergradient.
        hypergradient_error_kind: ``"bound"`` or ``"estimate"``.
        bias: hypergradient bias of a penalty method at its penalty: the larger of twice its change at twice the penalty
            and its distance from the independent hypergradient.
        distance: estimated Euclidean distance of x to the nearest solution, doubled for safety; None if the
            curvature there is not positive or was too costly to measure.
        feasibility: violation of the constraints.
        notes: what could not be measured, and why.
    """

    lower_residual: float | None = None
    lower_error: float | None = None
    linear_residual: float | None = None
    stationarity: float | None = None
    hypergradient_error: float | None = None
    hypergradient_error_kind: str | None = None
    bias: float | None = None
    distance: float | None = None
    feasibility: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Solution:
    """The outcome of :func:`bilevel.solve`.

    Attributes:
        x, y: the point, shaped like the start.
        status: how it ended, from measured residuals.
        message: one sentence.
        algorithm: the algorithm with every setting resolved.
        accuracy: see :class:`Accuracy`.
        counts: evaluations of ``upper`` and ``lower`` and second-order ``products``.
        history: one dict of floats per check.
        steps, seconds: of the whole run.
        upper_value, lower_value: objectives at (x, y) on all data.
        metrics: the problem's metrics at (x, y).
        aux: what the objectives returned beside their values, by level.
        checkpoint: the end of the run as plain data; pass it to ``solve`` to go on.
    """

    x: Tree
    y: Tree
    status: Status
    message: str
    algorithm: Any
    accuracy: Accuracy
    counts: dict[str, int]
    history: list[dict[str, float]]
    steps: int
    seconds: float
    upper_value: float
    lower_value: float
    metrics: dict[str, float] = field(default_factory=dict)
    aux: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        x, y = (textwrap.shorten(tree.describe(part), 120, placeholder=" ...") for part in (self.x, self.y))
        stationarity = self.accuracy.stationarity
        known = "" if stationarity is None else f"stationarity={stationarity:.2g}, "
        return (
            f"Solution({self.status.name}, upper_value={self.upper_value:.8g}, {known}steps={self.steps}, "
            f"x: {x}; y: {y})"
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
        """The upper objective, under scipy's name."""
        return self.upper_value
