"""A test problem as a public object: declaration, start, exact answer, and how often its objectives are called."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel import BilevelProblem, Solution
from implicit import tree
from implicit.tree import Tree


@dataclass
class OracleCounter:
    """How often the objectives of a case were called, counted at the functions themselves."""

    upper: int = 0
    lower: int = 0

    def watch(self, level: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, counting its calls under ``level``."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            setattr(self, level, getattr(self, level) + 1)
            return function(*args, **kwargs)

        return counted


@dataclass(frozen=True)
class Report:
    """What a case adds to a run: a text to print, numbers for ``result.json``, and the files it wrote."""

    text: str
    metrics: dict[str, float]
    files: list[Path] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem to run an algorithm on.

    Attributes:
        name: as in the registry.
        problem: the declaration; its objectives count their calls in ``counter``.
        start: ``(x0, y0)``.
        source: where the problem or its data come from.
        tags: such as ``exact`` (the answer is known), ``real-data``, ``set``, ``pytree``.
        x_star, y_star: the solution, or None.
        upper_star: the optimal upper value, or None.
        multipliers_star: the multipliers of the lower constraints at the solution, named and shaped as in
            ``Solution.multipliers``, or None.
        local_minima: x at the other local minima, where there are several and all are known.
        x_penalized: a function of sigma to the minimizer of the penalised hyper-objective
            ``min_y max_z f(x, y) + (g(x, y) - g(x, z)) / sigma``, where it has a closed form.
        lower_class: what the lower level is in y, ``"strongly convex"``, ``"convex"`` or ``"nonconvex"``; None where
            nothing is stated.
        max_steps: the step budget that ``bilevel run`` uses; None means the algorithm's own.
        report: called with the solution and a directory after a run.
        settings: the parameters the case was built with.
        counter: calls of both objectives.
    """

    name: str
    problem: BilevelProblem
    start: tuple[Tree, Tree]
    source: str
    tags: frozenset[str] = frozenset()
    x_star: Tree = None
    y_star: Tree = None
    upper_star: float | None = None
    multipliers_star: dict[str, Tree] | None = None
    local_minima: tuple[Tree, ...] = ()
    x_penalized: Callable[[float], Tree] | None = None
    lower_class: str | None = None
    max_steps: int | None = None
    report: Callable[[Solution, Path], Report] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    counter: OracleCounter = field(default_factory=OracleCounter)

    def distance(self, solution: Solution) -> float:
        """``||x - x*||``, with the nearest of all known minima as ``x*``.

        Raises:
            ValueError: if the case has no exact answer.
        """
        return min(self._distances(solution))

    def error(self, solution: Solution) -> float:
        """``||x - x*|| / ||x*||`` with the nearest known minimum, or the absolute distance where that is zero."""
        known = (self.x_star, *self.local_minima)
        distance, nearest = min(zip(self._distances(solution), known, strict=True), key=lambda pair: pair[0])
        size = float(tree.norm(nearest))
        return distance / (size if size > 0 else 1.0)

    def _distances(self, solution: Solution) -> list[float]:
        if self.x_star is None:
            raise ValueError(f"case {self.name} has no exact answer")
        known = (self.x_star, *self.local_minima)
        return [float(tree.norm(tree.sub(solution.x, minimum))) for minimum in known]

    def check(self, solution: Solution, rtol: float = 1e-6) -> None:
        """Compare with the exact answer.

        Raises:
            AssertionError: if the relative error of x exceeds ``rtol``.
        """
        error = self.error(solution)
        if not error <= rtol:
            raise AssertionError(
                f"{self.name}: relative error of x is {error:.3g}, above {rtol:.3g} "
                f"(status {solution.status.name}, {solution.steps} steps)"
            )


def answered(
    name: str,
    upper: Callable[[Any, Any], Tensor],
    lower: Callable[[Any, Any], Tensor],
    start: tuple[Tree, Tree],
    best: tuple[Tree, Tree],
    *,
    source: str = "closed form",
    lower_class: str,
    multipliers_star: dict[str, Tree] | None = None,
    local_minima: tuple[Tree, ...] = (),
    x_penalized: Callable[[float], Tree] | None = None,
    **constraints: Any,
) -> Case:
    """A case whose solution ``best = (x*, y*)`` is known; ``constraints`` are fields of its declaration."""
    counter = OracleCounter()
    return Case(
        name=name,
        problem=BilevelProblem(counter.watch("upper", upper), counter.watch("lower", lower), name=name, **constraints),
        start=start,
        source=source,
        x_star=best[0],
        y_star=best[1],
        upper_star=float(upper(*best)),
        multipliers_star=multipliers_star,
        local_minima=local_minima,
        x_penalized=x_penalized,
        lower_class=lower_class,
        counter=counter,
    )
