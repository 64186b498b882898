"""The filter: pairs of violation and barrier value that a trial point must not be dominated by."""

from dataclasses import dataclass, field

from implicit import State

THETA_MARGIN = 1e-5
PHI_MARGIN = 1e-8
ARMIJO = 1e-8
SWITCH_THETA = 1.1
SWITCH_PHI = 2.3
SHORTEST = 0.05
ROUNDING = 10.0
HUGE = 1e100


@dataclass(kw_only=True)
class Filter(State):
    """Pairs (theta, phi), and limits that the violation at the start sets (Waechter and Biegler 2006, section 2.3).

    Attributes:
        thetas, phis: the entries.
        largest: no trial point may be more infeasible.
        smallest: below it, a step that promises descent of phi must deliver it.
    """

    thetas: list[float] = field(default_factory=list)
    phis: list[float] = field(default_factory=list)
    largest: float = float("inf")
    smallest: float = 0.0

    def reset(self) -> None:
        """Forget the entries, as for another barrier parameter."""
        self.thetas, self.phis = [], []

    def limit(self, theta: float) -> None:
        """Set the limits from the violation at the start."""
        self.largest, self.smallest = 1e4 * max(1.0, theta), 1e-4 * max(1.0, theta)

    def accepts(self, theta: float, phi: float, eps: float) -> bool:
        """Whether no entry is as good in both respects."""
        if not (theta <= self.largest and phi < float("inf")):
            return False
        pairs = zip(self.thetas, self.phis, strict=True)
        return all(theta <= t or phi <= p + ROUNDING * eps * max(1.0, abs(p)) for t, p in pairs)

    def add(self, theta: float, phi: float) -> None:
        """An entry with its margins; entries that it dominates go."""
        t, p = (1 - THETA_MARGIN) * theta, phi - PHI_MARGIN * theta
        kept = [(a, b) for a, b in zip(self.thetas, self.phis, strict=True) if not (a >= t and b >= p)]
        self.thetas, self.phis = [a for a, _ in kept] + [t], [b for _, b in kept] + [p]

    def switches(self, theta: float, slope: float, alpha: float) -> bool:
        """Whether a step of this length promises more descent than the violation is worth."""
        return slope < 0 and alpha * _power(-slope, SWITCH_PHI) > _power(theta, SWITCH_THETA)

    def shortest(self, theta: float, slope: float) -> float:
        """Below this step length the restoration phase takes over."""
        least = THETA_MARGIN
        if slope < 0:
            least = min(least, PHI_MARGIN * theta / -slope)
            if theta <= self.smallest:
                least = min(least, _power(theta, SWITCH_THETA) / _power(-slope, SWITCH_PHI))
        return SHORTEST * least


def _power(base: float, exponent: float) -> float:
    """Python raises where the result is too large."""
    return base**exponent if base < HUGE else HUGE
