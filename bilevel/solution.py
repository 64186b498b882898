"""What a solve returns."""

import textwrap
from dataclasses import dataclass, field
from typing import Any

from constrained import KKTResidual
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
        feasibility: largest violation of any constraint or set, rows divided by ``max(1, |gradient|)``.
        optimality_gap: g(x, y) minus the smallest lower value that was found at x.
        lower_kkt: residuals of the lower optimality conditions at (x, y), where the lower level is constrained.
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
    optimality_gap: float | None = None
    lower_kkt: KKTResidual | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Start:
    """What one start of several led to.

    Attributes:
        name: which one, such as ``"given"`` or ``"random 2"``.
        status: how it ended.
        upper_value: f at its end, NaN where there is none.
        accepted: whether :func:`bilevel.verify` accepts its end.
        note: one sentence.
    """

    name: str
    status: Status
    upper_value: float
    accepted: bool
    note: str = ""


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
        multipliers: Lagrange multipliers by the name of the constraint (``lower_inequality``, ...) or set, shaped like
            its values; those of a set are upper minus lower bound's. Empty where the algorithm has none.
        starts: what each start led to, where several were tried.
        choice: why "auto" picked the algorithm; empty otherwise.
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
    multipliers: dict[str, Tree] = field(default_factory=dict)
    starts: tuple[Start, ...] = ()
    choice: str = ""
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
