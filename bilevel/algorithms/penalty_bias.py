"""How far the penalised hypergradient is from the true one, from two penalties and from an independent formula."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from bilevel.accuracy import (
    ImplicitMap,
    assess_implicit,
    lower_residual,
    solve_lower,
    stationarity,
    twice_differentiable,
)
from bilevel.algorithms.penalty_scheme import Pair, central_hypergradient, hypergradient
from bilevel.oracle import Oracle
from bilevel.problem import BilevelProblem
from bilevel.singular_hypergradient import singular_hypergradient
from bilevel.solution import Accuracy
from implicit import CG, Hessian, lanczos, tree
from implicit.derivatives import value_and_gradient
from implicit.tree import Tree

SINGULAR = 1e-6
"""A Ritz value of g_yy below this fraction of the largest counts as zero."""
SMALL = 500
"""Up to this many entries of y the KKT matrix of the lower level is formed for the final check."""
DOUBTFUL = 1e-3
"""Relative residual of the pseudo-inverse formula above which it is not used."""
DOUBLINGS = 9
HALVINGS = 6
"""Of the interval in which the hypergradient turns: a jump stays as large as it was, a slope shrinks 64 times."""
JUMP = 0.25
"""What must be left of the turn after these for it to be a jump."""


class ExactPenalty:
    """x -> G at a multiple of the penalty, both inner problems solved near rounding, warm-started.

    Attributes:
        z: argmin g(x, .) at the last x, next to where y or z came from.
        second_order: whether implicit differentiation gives the hypergradient: g is differentiable twice, and there is
            no lower set.
        newton: whether f is so too, and the inner problems are solved by Newton's method.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        oracle: Oracle,
        penalty: float,
        x: Tree,
        y: Tree,
        z: Tree,
        *,
        central: bool = False,
    ) -> None:
        self.problem, self.oracle, self.penalty, self.central = problem, oracle, penalty, central
        _, slope = value_and_gradient(lambda q: oracle.upper(x, q), y)
        self.reference = float(tree.norm(slope)) / penalty  # what grad_y g is worth at y
        self.second_order = problem.lower_set.is_whole_space and twice_differentiable(oracle, x, y)
        self.newton = self.second_order and twice_differentiable(oracle, x, y, "upper")
        self.y = {1.0: y, 2.0: y}
        self.w = {1.0: z, 2.0: z}
        self.z = z

    def _solve(self, fn: Callable[[Tree], Tensor], y: Tree) -> Tree:
        return solve_lower(fn, y, self.problem, self.reference, first_order=not self.newton)

    def __call__(self, x: Tree, factor: float = 1.0) -> Tree:
        """G at ``factor`` times the penalty, 1 or 2."""
        p, oracle = factor * self.penalty, self.oracle
        # Scaled by 1/p, so that tolerances mean the same at every penalty.
        y = self.y[factor] = self._solve(lambda q: oracle.upper(x, q) / p + oracle.lower(x, q), self.y[factor])
        if self.central:
            w = self.w[factor] = self._solve(lambda q: oracle.lower(x, q) - oracle.upper(x, q) / p, self.w[factor])
            return central_hypergradient(oracle, x, y, w, p)[1]
        self.z = self._solve(lambda q: oracle.lower(x, q), self.z)
        return hypergradient(Pair(oracle, oracle), x, y, self.z, p)[1]

    @property
    def order(self) -> int:
        """G is off by O(p^-order)."""
        return 2 if self.central else 1

    def bias(self, once: Tree, twice: Tree) -> float:
        """The error of ``once``, from how much doubling the penalty changes it."""
        return float(tree.norm(tree.sub(twice, once))) / (1.0 - 0.5**self.order)

    def lower_solution(self, x: Tree) -> Tree:
        """The lower solution next to y.

        y itself minimizes f + p g and is off by O(1/p), its extrapolation over two penalties by O(1/p^2). Minimizing g
        from there, and not from z, keeps the choice that f made where there are several lower solutions.
        """
        start = self.problem.lower_set.project(tree.axpy(-1.0, self.y[1.0], tree.scale(2.0, self.y[2.0])))
        if self.central:
            start = tree.scale(0.5, tree.add(self.y[2.0], self.w[2.0]))
        return self._solve(lambda q: self.oracle.lower(x, q), start)

    def extrapolated(self, x: Tree) -> Tree:
        """G with its leading error cancelled: ``2 G_2p - G_p``, or ``(4 G_2p - G_p) / 3`` of central differences."""
        twice, once = self(x, 2.0), self(x, 1.0)
        return self.richardson(once, twice)

    def richardson(self, once: Tree, twice: Tree) -> Tree:
        """G at both penalties with the leading error cancelled."""
        factor = 2.0**self.order
        return tree.scale(1.0 / (factor - 1.0), tree.sub(tree.scale(factor, twice), once))


@dataclass(frozen=True)
class Measured:
    """The bias at a point.

    Attributes:
        once: G there with both inner problems solved.
        two: bias from two penalties.
        disagreement: distance of G from the hypergradient ``value``.
        value: the hypergradient by a formula that uses no penalty; where none applies, by extrapolation.
        scale: sizes of the two parts of the hypergradient, which cancel at a solution.
        map: x -> hypergradient nearby.
        y: the lower solution next to y.
        accuracy: the report, without distance.
        independent: whether ``value`` uses no penalty.
    """

    once: Tree
    two: float
    disagreement: float
    value: Tree
    scale: float
    map: Callable[[Tree], Tree]
    y: Tree
    accuracy: Accuracy
    independent: bool

    @property
    def bias(self) -> float:
        """The larger of the two estimates: two penalties that are both far too small agree with each other."""
        return max(self.two, self.disagreement)


def measure(exact: ExactPenalty, x: Tree) -> Measured:
    """Both estimates of the bias at x."""
    oracle = exact.oracle
    once, twice = exact(x, 1.0), exact(x, 2.0)
    two = exact.bias(once, twice)
    y = exact.lower_solution(x)
    _, direct = value_and_gradient(lambda q: oracle.upper(q, y), x)
    formula = _independent(exact, x, y)
    value, accuracy, nearby = formula or _by_extrapolation(exact, x, y, exact.richardson(once, twice), two)
    disagreement = float(tree.norm(tree.sub(value, once)))
    scale = float(tree.norm(direct)) + float(tree.norm(tree.sub(value, direct)))
    accuracy = replace(accuracy, bias=max(two, disagreement))
    return Measured(once, two, disagreement, value, scale, nearby, y, accuracy, formula is not None)


_Found = tuple[Tree, Accuracy, Callable[[Tree], Tree]]


def _independent(exact: ExactPenalty, x: Tree, y: Tree) -> _Found | None:
    """The hypergradient at the lower solution y by implicit differentiation: with the inverse of g_yy where there is
    one, with pseudo-inverses where lower solutions are many or a set is declared."""
    problem, oracle = exact.problem, exact.oracle
    small = tree.size(y) <= SMALL
    if exact.second_order:
        spectrum = lanczos(Hessian.of(oracle.graph(x, y)))
        if abs(spectrum.smallest) > SINGULAR * spectrum.largest or not small:
            accuracy, found = assess_implicit(problem, oracle, x, y, CG(rtol=1e-10), None)
            nearby = ImplicitMap(problem, oracle, y, found.adjoint, CG(rtol=1e-10), exact.reference)
            return found.value, accuracy, nearby
    elif problem.lower_set.is_whole_space or not small:
        return None
    return _pseudo_inverse(exact, x, y)


def _by_extrapolation(exact: ExactPenalty, x: Tree, y: Tree, value: Tree, two: float) -> _Found:
    problem, oracle = exact.problem, exact.oracle
    note = "stationarity by extrapolation in the penalty: the lower level has no second derivatives, or is too large"
    accuracy = Accuracy(
        lower_residual=lower_residual(problem, oracle, x, y),
        stationarity=stationarity(problem, x, value),
        hypergradient_error=two / exact.penalty,
        hypergradient_error_kind="estimate",
        notes=(note,),
    )
    return value, accuracy, exact.extrapolated


def _pseudo_inverse(exact: ExactPenalty, x: Tree, y: Tree) -> _Found | None:
    problem, oracle = exact.problem, exact.oracle
    try:
        found = singular_hypergradient(problem, x, y)
    except (RuntimeError, TypeError, ValueError):  # a set without rows, a kernel without second derivatives
        return None
    if not found.residual <= DOUBTFUL:
        return None
    accuracy = Accuracy(
        lower_residual=lower_residual(problem, oracle, x, y),
        stationarity=stationarity(problem, x, found.value),
        hypergradient_error=found.residual * float(tree.norm(found.value)),
        hypergradient_error_kind="estimate",
    )
    return found.value, accuracy, exact.extrapolated


def kink(
    problem: BilevelProblem, hyper: Callable[[Tree], Tree], x: Tree, h: Tree, reach: float, tolerance: float
) -> tuple[float, float] | None:
    """Whether the hyper-objective has a kink next to x at which it is stationary.

    Looks along ``-h`` for a point where the hypergradient turns against h, halves the interval in which it turns, and
    takes the shortest vector in the convex hull of the hypergradients at its ends (Goldstein's subdifferential). A
    hypergradient that turns without a jump has a zero there and no kink.

    Args:
        problem: for the upper set.
        hyper: x -> accurate hypergradient, kinks not smoothed.
        x, h: the point, and the hypergradient there.
        reach: first distance looked at; it doubles nine times at most.
        tolerance: what the shortest vector may be.

    Returns:
        The distance of the far end of the last interval, and the length of that vector, or None.
    """
    size = float(tree.norm(h))
    if not size > 0 or not math.isfinite(size):
        return None

    def at(distance: float) -> tuple[Tree, bool]:
        found = hyper(problem.upper_set.project(tree.axpy(-distance / size, h, x)))
        return found, float(tree.dot(found, h)) < 0

    near, far, here = 0.0, reach, h
    there, turned = at(far)
    while not turned:
        if far >= reach * 2.0**DOUBLINGS:
            return None
        near, far, here = far, 2.0 * far, there
        there, turned = at(far)
    turn = float(tree.norm(tree.sub(there, here)))
    for _ in range(HALVINGS):
        middle = 0.5 * (near + far)
        between, turned = at(middle)
        if turned:
            far, there = middle, between
        else:
            near, here = middle, between
    gap = tree.sub(there, here)
    jump = float(tree.norm(gap))
    if jump <= JUMP * turn:
        return None
    share = min(1.0, max(0.0, -float(tree.dot(here, gap)) / jump**2))
    shortest = float(tree.norm(tree.axpy(share, gap, here)))
    return (far, shortest) if shortest <= tolerance else None
