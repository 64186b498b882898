"""Whether a lower level has other minima than the one beside y, which a local method cannot see."""

import torch

from bilevel.accuracy import lowest_curvature, twice_differentiable
from bilevel.oracle import Oracle, new_counts
from bilevel.problem import BilevelProblem
from bilevel.verify import verify
from implicit import tree
from implicit.tree import Tree

NEIGHBOURS = 2
"""Points around y where curvature is looked at."""
STARTS = 2
"""Random starts of the lower level where it is not convex."""


def bends_down(problem: BilevelProblem, x: Tree, y: Tree) -> bool:
    """Whether g_yy has a negative eigenvalue at points around y, as far as some Lanczos products tell."""
    oracle = Oracle.full(problem, new_counts())
    generator = torch.Generator().manual_seed(0)
    for _ in range(NEIGHBOURS):
        noise = tree.randn_like(y, generator)
        near = tree.map(lambda leaf, e: leaf + (1.0 + leaf.abs()) * e, y, noise)
        if not bool(torch.isfinite(oracle.lower(x, near))) or not twice_differentiable(oracle, x, near):
            continue
        if lowest_curvature(oracle.graph(x, near)) < 0:
            return True
    return False


def better_response(problem: BilevelProblem, x: Tree, y: Tree) -> str | None:
    """Why :func:`bilevel.verify` does not accept (x, y), where the lower level is not convex around y; or None."""
    if not bends_down(problem, x, y):
        return None
    found = verify(problem, x, y, starts=STARTS)
    return None if found.accepted else found.reasons[0]
