"""The fully single-loop stochastic form of the penalty method.

Source: Kwon, Kwon, Wright, Nowak, "On penalty methods for nonconvex bilevel optimization and first-order stochastic
approximation" (ICLR 2024), algorithm 2.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from bilevel.algorithms import penalty_storm
from bilevel.algorithms.penalty_double_loop import check_prox, default_rho, prox_drift, track_curvature
from bilevel.algorithms.penalty_scheme import Move, PenaltyState, Scheme, Sizes, draw_pair
from bilevel.estimators import Storm
from bilevel.problem import BilevelProblem
from implicit import tree
from implicit.tree import Tree

if TYPE_CHECKING:
    from bilevel.algorithms.penalty import Penalty


LAG = 10.0
"""Lower residuals times p, in units of the norm of G, beyond which x waits for w and u: one inner step cannot follow
the steps that a double loop can. On the case ``quadratic``, 10 took 1,560 steps, 3 over 3,000."""


@dataclass(frozen=True, kw_only=True)
class SingleLoop(Scheme):
    """Algorithm 2 of Kwon et al.: T = 1, the prox iterates w and u carried over, every oracle a :class:`Storm`
    estimate.

    With ``sigma = 1/p``, estimates d and ``gamma = 1 / (L_g + sigma L_f + 1/rho)``

    .. math::
        w \\leftarrow \\Pi_Y(w - \\gamma [\\sigma d_{f_y} + d_{g_y}(w) + (w - y)/\\rho]), \\quad
        u \\leftarrow \\Pi_Y(u - \\gamma [d_{g_y}(u) + (u - z)/\\rho]),

    ``y <- (1 - beta) y + beta w``, z likewise, and a step of x along ``d_{f_x} + p (d_{g_x}(w) - d_{g_x}(u))``.

    Args:
        rho: prox parameter; None means ``100 / L_g``, and ``1 / (2 |curvature|)`` where g shows negative curvature at
            the start.
        beta: how far the centres move, in (0, 1].
        estimator: None means ``Storm()`` on minibatches and no momentum on full data.
    """

    rho: float | None = None
    beta: float = 1.0
    estimator: Storm | None = None

    def __post_init__(self) -> None:
        check_prox(self.rho, self.beta)

    def refuses(self, settings: "Penalty") -> str | None:
        """One inner step."""
        return penalty_storm.refuses_loops(settings, "SingleLoop")

    def resolve(self, settings: "Penalty", problem: BilevelProblem, sizes: Sizes) -> "SingleLoop":
        """With rho and estimator."""
        estimator = self.estimator or (Storm() if problem.stochastic else Storm(exponent=0.0))
        return replace(self, rho=self.rho or default_rho(sizes), estimator=estimator)

    def default_steps(self, problem: BilevelProblem) -> int:
        """T = 1."""
        return 1

    def init(self, settings: "Penalty", problem: BilevelProblem, x: Tree, y: Tree) -> dict[str, Tree]:
        """w, u, the direction that probes L_g, and what the estimates need."""
        assert self.estimator is not None
        own = {"w": tree.clone(y), "u": tree.clone(y), "probe": tree.randn_like(y, torch.Generator().manual_seed(0))}
        return own | penalty_storm.allocate(self.estimator, x, y)

    def step(self, settings: "Penalty", problem: BilevelProblem, state: PenaltyState) -> Move:
        """One step of w and u, the centres, then G at the new w and u."""
        assert self.estimator is not None and self.rho is not None and settings.upper_curvature is not None
        storm, project, p = self.estimator, problem.lower_set.project, state.penalty
        w, u = state.extra["w"], state.extra["u"]
        point = (state.x, w, u)
        pair = draw_pair(settings, problem, state)
        curvature, probe = track_curvature(state, pair.z)
        shrink = settings.shrink(state.step) if problem.stochastic else 1.0
        gamma = shrink / (curvature + settings.upper_curvature / p + 1.0 / self.rho)
        inner = penalty_storm.estimate_inner(storm, state.extra, pair, point, state.step)
        slope_w = tree.axpy(1.0 / p, inner["f"], inner["g_y"])
        pull_w = tree.axpy(1.0 / self.rho, tree.sub(w, state.y), slope_w)
        pull_u = tree.axpy(1.0 / self.rho, tree.sub(u, state.z), inner["g_z"])
        w, u = project(tree.axpy(-gamma, pull_w, w)), project(tree.axpy(-gamma, pull_u, u))
        if not settings.common_batches:
            pair = draw_pair(settings, problem, state)
        oracle = penalty_storm.OuterOracle(pair)
        outer = penalty_storm.estimate_outer(storm, state.extra, oracle, point, (w, u), state.step)
        values = oracle.report(p)
        moved = (tree.sub(w, point[1]), tree.sub(u, point[2]))
        drift = p / gamma * (tree.norm(moved[0]) + tree.norm(moved[1]))
        gradient = penalty_storm.combine(p, outer)
        return Move(
            y=tree.axpy(self.beta, tree.sub(w, state.y), state.y),
            z=tree.axpy(self.beta, tree.sub(u, state.z), state.z),
            gradient=gradient,
            values=values,
            curvature=curvature,
            penalty=p,
            gap=values["penalty_gap"],
            drift=drift + prox_drift(p, self.rho, tree.sub(w, state.y), tree.sub(u, state.z)),
            behind=None if problem.stochastic else drift > LAG * tree.norm(gradient),
            extra={"w": w, "u": u, "probe": probe} | penalty_storm.keep(storm, inner, outer, point),
        )
