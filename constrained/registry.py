"""The methods for constrained problems by name."""

from typing import Any

from constrained.augmented_lagrangian import AugmentedLagrangian
from constrained.interior_point import InteriorPoint
from constrained.method import ConstrainedMethod
from constrained.problem import Problem
from constrained.sketch_newton import AdaSketchNewton

_METHODS: dict[str, type[ConstrainedMethod[Any]]] = {
    found.__name__: found for found in (AdaSketchNewton, InteriorPoint, AugmentedLagrangian)
}


def methods() -> dict[str, type[ConstrainedMethod[Any]]]:
    """Every method that :func:`constrained.solve` takes, under its name."""
    return dict(_METHODS)


def default_method(problem: Problem) -> ConstrainedMethod[Any]:
    """:class:`AdaSketchNewton` for equality constraints alone, :class:`InteriorPoint` otherwise."""
    newton = AdaSketchNewton()
    return newton if newton.refuses(problem) is None else InteriorPoint()
