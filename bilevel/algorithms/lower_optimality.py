"""Whether a lower level has other minima than the one beside y, which a local method cannot see."""

import torch

from bilevel.accuracy import PROBES
from bilevel.oracle import Oracle, new_counts
from bilevel.problem import BilevelProblem
from bilevel.verify import verify
from implicit import GradientDifference, lanczos, tree
from implicit.tree import Tree

PRODUCTS = 60
"""Hessian products spent around y: at three points where y has 20 entries or more, at sixty where it is a scalar. Two
points around a minimum of a double well see its bend once in three times."""
BLURRED = 1e2
"""Negative eigenvalues count beyond this many ``eps^(2/3)`` of the largest, the accuracy of a difference."""
STARTS = 2
"""Random starts of the lower level where it is not convex."""


def bends_down(problem: BilevelProblem, x: Tree, y: Tree) -> bool:
    """Whether g_yy has a negative eigenvalue at random points around y, as far as some Lanczos products tell.

    They are differences of gradients, so that g needs no second derivatives.
    """
    oracle = Oracle.full(problem, new_counts())
    generator = torch.Generator().manual_seed(0)
    visible = BLURRED * float(torch.finfo(tree.common_dtype(y)).eps) ** (2 / 3)
    for _ in range(PRODUCTS // max(1, min(tree.size(y), PROBES))):
        noise = tree.randn_like(y, generator)
        near = problem.lower_set.project(tree.map(lambda leaf, e: leaf + (1.0 + leaf.abs()) * e, y, noise))
        try:
            spectrum = lanczos(GradientDifference(lambda q: oracle.lower(x, q), near), PROBES)
        except ValueError:  # g or its gradient is not finite there
            continue
        if spectrum.smallest < -visible * abs(spectrum.largest):
            return True
    return False


def better_response(problem: BilevelProblem, x: Tree, y: Tree) -> str | None:
    """Why :func:`bilevel.verify` does not accept (x, y), where the lower level is not convex around y; or None."""
    if not bends_down(problem, x, y):
        return None
    found = verify(problem, x, y, starts=STARTS)
    return None if found.accepted else found.reasons[0]
