"""A line search that works down to rounding: strong Wolfe conditions, or Hager and Zhang's approximate ones.

Sources: Nocedal and Wright, Numerical Optimization, algorithms 3.5 and 3.6; Hager and Zhang, SIAM J. Optim. 16 (2005).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from implicit.minimizers.base import Evaluation, Objective

ARMIJO = 1e-4
CURVATURE = 0.9
PATIENCE = 10  # evaluations after which a bracket too small to matter is given up


@dataclass
class Trial:
    """One evaluated step length along the direction."""

    length: float
    value: float
    slope: float
    evaluation: Evaluation | None = None
    point: Tensor | None = None


def wolfe_search(
    objective: Objective,
    point: Tensor,
    value: float,
    slope: float,
    direction: Tensor,
    first: float,
    eps: float,
    max_evaluations: int = 25,
) -> tuple[Trial | None, int]:
    """A step length that decreases the objective enough and flattens the slope.

    Args:
        objective: value and gradient at a ravelled point.
        point, value, slope: where the search starts; ``slope`` is ``gradient . direction`` and must be negative.
        direction: shape ``(n,)``.
        first: the first length tried.
        eps: machine epsilon of the dtype.
        max_evaluations: budget.

    Returns:
        The accepted trial (the best decreasing one if the budget ran out, None if there is none), and the number of
        evaluations used. A length whose value is not finite counts as too long.
    """

    def probe(length: float) -> Trial:
        candidate = point + length * direction
        found = objective(candidate)
        return Trial(length, found.value, float(found.gradient @ direction), found, candidate)

    return _search(probe, value, slope, first, value_noise(value, eps), max_evaluations)


def value_noise(value: float, eps: float) -> float:
    """Differences of values below this are taken for rounding where slopes say otherwise.

    The terms that add up to the objective can be far larger than their sum, so this is well above ``eps * |value|``.
    """
    return eps ** (2 / 3) * abs(value)


def _search(
    probe: Callable[[float], Trial], value: float, slope: float, first: float, rounding: float, budget: int
) -> tuple[Trial | None, int]:
    low, high = Trial(0.0, value, slope), None
    length, limit, width, used = first, math.inf, math.inf, 0
    for used in range(1, budget + 1):
        trial = probe(length)
        if not (math.isfinite(trial.value) and math.isfinite(trial.slope)):
            limit = length
            length = low.length + 0.1 * (length - low.length)
            continue
        decreases = trial.value - value <= ARMIJO * trial.length * slope  # a sum would round the slope away
        # Where values differ by rounding only, slopes still carry information.
        flat = abs(trial.value - value) <= rounding and trial.slope <= (2 * ARMIJO - 1) * slope
        if not (decreases or flat) or trial.value > low.value + rounding:
            high = trial
        elif abs(trial.slope) <= -CURVATURE * slope:
            return trial, used
        else:
            if trial.slope * ((high.length if high else math.inf) - low.length) >= 0:
                high = low
            low = trial
        length = _next_length(low, high, limit, rounding, width)
        if high is not None:
            width = abs(high.length - low.length)
        if length == low.length or (high is not None and length == high.length):
            break
        if used >= PATIENCE and width * abs(slope) <= rounding:
            break
    return (low if low.evaluation is not None and low.value <= value + rounding else None), used


def _next_length(low: Trial, high: Trial | None, limit: float, rounding: float, before: float) -> float:
    if high is None:
        longer = 4.0 * low.length if low.length > 0 else 1.0
        return longer if longer < limit else 0.5 * (low.length + limit)
    width = high.length - low.length
    guess = _secant(low, high) if abs(high.value - low.value) <= rounding else _cubic(low, high)
    # A model that did not halve the bracket is not trusted a second time.
    if guess is None or abs(width) > 0.5 * before:
        return low.length + 0.5 * width
    near, far = sorted((low.length + 0.01 * width, low.length + 0.9 * width))
    return min(max(guess, near), far)


def _secant(a: Trial, b: Trial) -> float | None:
    """Where the slope vanishes, from slopes alone."""
    change = b.slope - a.slope
    return None if change == 0 else a.length - a.slope * (b.length - a.length) / change


def _cubic(a: Trial, b: Trial) -> float | None:
    """Minimizer of the cubic through two values and slopes."""
    width = b.length - a.length
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.length - b.length)
    square = d1 * d1 - a.slope * b.slope
    if not 0 <= square < math.inf:
        return None
    d2 = math.copysign(math.sqrt(square), width)
    bottom = b.slope - a.slope + 2 * d2
    return None if bottom == 0 else b.length - width * (b.slope + d2 - d1) / bottom
