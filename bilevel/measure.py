"""Curvature of both objectives in y, measured at the start of a run."""

from dataclasses import dataclass

import torch

from bilevel.oracle import Counts, Oracle, new_counts
from bilevel.problem import BilevelProblem
from implicit import GradientDifference, Hessian, lanczos, tree
from implicit.tree import Tree

DRAWS = 8
FLOOR = 1e-3
"""A short Lanczos run overestimates mu, by 27 times at condition 1e4 after ten steps; what it says below this fraction
of L is not believed either."""


@dataclass(frozen=True)
class Curvature:
    """``largest`` and ``smallest`` eigenvalue of g_yy (the smallest at least ``FLOOR * largest`` unless declared), and
    ``upper``, the spectral norm of f_yy. Over minibatches the largest of eight draws."""

    largest: float
    smallest: float
    upper: float


def draw_oracles(problem: BilevelProblem, counts: Counts) -> list[Oracle]:
    """The full data, or several minibatches drawn with a generator of their own: the run's must not move."""
    if not problem.stochastic:
        return [Oracle.full(problem, counts)]
    generator = torch.Generator().manual_seed(0)
    upper, lower = problem.upper_data, problem.lower_data
    up = upper.init(generator) if upper is not None else None
    low = lower.init(generator) if lower is not None else None
    return [
        Oracle(
            problem,
            counts,
            upper.draw(up, generator) if upper is not None else None,
            lower.draw(low, generator) if lower is not None else None,
        )
        for _ in range(DRAWS)
    ]


def measure_curvature(
    problem: BilevelProblem, x: Tree, y: Tree, *, first_order: bool, steps: int = 20, counts: Counts | None = None
) -> Curvature:
    """Extreme curvatures at (x, y) by Lanczos on Hessian products, or on gradient differences (``first_order``)."""
    x = tree.detach(x)
    largest, smallest, upper = 0.0, float("inf"), 0.0
    for oracle in draw_oracles(problem, counts if counts is not None else new_counts()):

        def lower_at(q: Tree, oracle: Oracle = oracle) -> torch.Tensor:
            return oracle.lower(x, q)

        def upper_at(q: Tree, oracle: Oracle = oracle) -> torch.Tensor:
            return oracle.upper(x, q)

        make = GradientDifference if first_order else Hessian
        g, f = lanczos(make(lower_at, y), steps), lanczos(make(upper_at, y), steps)
        largest, smallest = max(largest, g.largest), min(smallest, g.smallest)
        upper = max(upper, abs(f.largest), abs(f.smallest))
    if not largest > 0:
        raise ValueError(
            f"the lower objective has no positive curvature in y at the start (largest eigenvalue {largest:.3g}); "
            "start elsewhere, or add a ridge"
        )
    mu = problem.strong_convexity if problem.strong_convexity is not None else max(smallest, FLOOR * largest)
    return Curvature(largest, mu, upper)
