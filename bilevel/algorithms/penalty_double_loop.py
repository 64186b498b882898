"""Double loops of the penalty method: F2BA, and the proximal form of Kwon et al.

Sources: Chen, Ma, Zhang, "Near-optimal nonconvex-strongly-convex bilevel optimization with fully first-order oracles"
(arXiv 2306.14853); Kwon, Kwon, Wright, Nowak, "On penalty methods for nonconvex bilevel optimization and first-order
stochastic approximation" (ICLR 2024), algorithm 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel.algorithms.penalty_scheme import (
    Move,
    Pair,
    PenaltyState,
    Scheme,
    Sizes,
    central_hypergradient,
    draw_pair,
    hypergradient,
    penalised,
)
from bilevel.oracle import Oracle
from bilevel.problem import BilevelProblem
from implicit import tree
from implicit.derivatives import value_and_gradient
from implicit.tree import Tree

if TYPE_CHECKING:
    from bilevel.algorithms.penalty import Penalty

TRACK_EVERY = 5
SETTLED = 0.1
STEEPER = 1.05


@dataclass(frozen=True, kw_only=True)
class F2BA(Scheme):
    """Fixed penalty, two time scales, no prox: the default.

    Each step takes T projected gradient steps on z (step ``1/L_g``, objective g) and on y (step ``1/(p L_g + L_f)``,
    objective ``f + p g``), warm-started, and one step of x along G, whose length does not depend on p. On full data the
    inner steps are accelerated.

    Args:
        central: track w in argmin of ``-f + p g`` in the place of z, and take central differences: the same cost, bias
            O(1/p^2). Needs a strongly convex lower level with ``p mu > L_f``.
    """

    central: bool = False

    def resolve(self, settings: "Penalty", problem: BilevelProblem, sizes: Sizes) -> "F2BA":
        """Refuses central differences where ``-f + p g`` has no minimizer.

        Raises:
            ValueError: naming what was measured.
        """
        if self.central and not (settings.penalty or math.inf) * sizes.smallest > sizes.upper:
            raise ValueError(
                f"F2BA(central=True) minimizes -f + p g, which needs p mu > L_f; measured mu = {sizes.smallest:.3g} "
                f"and L_f = {sizes.upper:.3g} at penalty {settings.penalty}: raise penalty, or use F2BA()"
            )
        return self

    def init(self, settings: "Penalty", problem: BilevelProblem, x: Tree, y: Tree) -> dict[str, Tree]:
        """Previous inner iterates for acceleration; on minibatches the direction that probes L_g."""
        return _probe(y) if problem.stochastic else {"y_before": tree.clone(y), "z_before": tree.clone(y)}

    def step(self, settings: "Penalty", problem: BilevelProblem, state: PenaltyState) -> Move:
        """Inner steps, then G at their ends."""
        loop = _Loop(settings, problem, state, None, self.central)
        if problem.stochastic:
            return loop.plain()
        walk = _Walk(state.y, state.z, state.extra["y_before"], state.extra["z_before"])
        move, walk = loop.accelerated(walk)
        return replace(move, extra={"y_before": walk.y_before, "z_before": walk.z_before})


@dataclass(frozen=True, kw_only=True)
class Proximal(Scheme):
    """Algorithm 1 of Kwon et al.: y and z are the centres of proximal problems, w and u their inner iterates.

    With ``sigma = 1/p`` and starting at ``w = y``, ``u = z``, T times

    .. math::
        w \\leftarrow \\Pi_Y(w - \\gamma [\\sigma \\nabla_y f(x, w) + \\nabla_y g(x, w) + (w - y)/\\rho]), \\quad
        u \\leftarrow \\Pi_Y(u - \\gamma [\\nabla_y g(x, u) + (u - z)/\\rho]),

    then ``y <- (1 - beta) y + beta w``, z likewise, and a step of x along G at (w, u), projected on X. The prox makes
    the inner problems strongly convex where g is not, at the price of slower tracking.

    Args:
        rho: prox parameter; None means ``100 / L_g``, and ``1 / (2 |curvature|)`` where g shows negative curvature at
            the start.
        beta: how far the centres move, in (0, 1].
    """

    rho: float | None = None
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_prox(self.rho, self.beta)

    def resolve(self, settings: "Penalty", problem: BilevelProblem, sizes: Sizes) -> "Proximal":
        """With rho."""
        return replace(self, rho=self.rho or default_rho(sizes))

    def init(self, settings: "Penalty", problem: BilevelProblem, x: Tree, y: Tree) -> dict[str, Tree]:
        """On minibatches the direction that probes L_g; w and u live within a step."""
        return _probe(y) if problem.stochastic else {}

    def step(self, settings: "Penalty", problem: BilevelProblem, state: PenaltyState) -> Move:
        """Inner steps from the centres, G at their ends, and the new centres."""
        assert self.rho is not None
        loop = _Loop(settings, problem, state, self.rho, False)
        if problem.stochastic:
            move = loop.plain()
        else:
            move, _ = loop.accelerated(_Walk(state.y, state.z, state.y, state.z))
        drift = prox_drift(move.penalty, self.rho, tree.sub(move.y, state.y), tree.sub(move.z, state.z))
        centre_y = tree.axpy(self.beta, tree.sub(move.y, state.y), state.y)
        centre_z = tree.axpy(self.beta, tree.sub(move.z, state.z), state.z)
        return replace(move, y=centre_y, z=centre_z, drift=drift)


def check_prox(rho: float | None, beta: float) -> None:
    """Refuse a rho that is not positive and a beta outside of (0, 1]."""
    if rho is not None and not rho > 0:
        raise ValueError(f"rho must be positive or None, got {rho}")
    if not 0 < beta <= 1:
        raise ValueError(f"beta must lie in (0, 1], got {beta}")


def default_rho(sizes: Sizes) -> float:
    """``100 / L_g``; where the start shows negative curvature c, ``1 / (2 |c|)``."""
    return 100.0 / sizes.largest if sizes.smallest >= -1e-6 * sizes.largest else -0.5 / sizes.smallest


def prox_drift(p: Tensor, rho: float, *moves: Tree) -> Tensor:
    """``p ||w - y|| / rho + p ||u - z|| / rho``: the lower residuals, as errors of G relative to L_g."""
    return p / rho * torch.stack([tree.norm(m) for m in moves]).sum()


def _probe(y: Tree) -> dict[str, Tree]:
    return {"probe": tree.randn_like(y, torch.Generator().manual_seed(0))}


@dataclass
class _Walk:
    """The inner iterates with their predecessors."""

    y: Tree
    z: Tree
    y_before: Tree
    z_before: Tree


class _Loop:
    """The inner steps of one outer step at fixed x, around fixed prox centres if there is a rho."""

    def __init__(
        self, settings: "Penalty", problem: BilevelProblem, state: PenaltyState, rho: float | None, central: bool
    ) -> None:
        assert settings.upper_curvature is not None and settings.lower_steps is not None
        self.settings, self.problem, self.state = settings, problem, state
        self.x, self.p, self.rho, self.central = state.x, state.penalty, rho, central
        self.upper_curvature, self.steps = settings.upper_curvature, settings.lower_steps

    def objectives(self, pair: Pair) -> tuple[Callable[[Tree], Tensor], Callable[[Tree], Tensor]]:
        """What y minimizes and what z minimizes, without the prox."""
        x, p = self.x, self.p
        if self.central:
            return penalised(pair.y, x, p), lambda q: p * pair.z.lower(x, q) - pair.z.upper(x, q)
        return penalised(pair.y, x, p), lambda q: pair.z.lower(x, q)

    def sizes(self, curvature: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
        """Step lengths of y and z."""
        total = curvature + (1.0 / self.rho if self.rho is not None else 0.0)
        length = shrink / (self.p * total + self.upper_curvature)
        return length, length if self.central else shrink / total

    def descend(
        self, fn: Callable[[Tree], Tensor], point: Tree, centre: Tree, weight: Tensor | float, step: Tensor
    ) -> tuple[Tree, Tree]:
        """One projected step on ``fn + weight/(2 rho) ||. - centre||^2``; and the gradient of fn."""
        _, slope = value_and_gradient(fn, point)
        pull = slope if self.rho is None else tree.axpy(weight / self.rho, tree.sub(point, centre), slope)
        return self.problem.lower_set.project(tree.axpy(-step, pull, point)), slope

    def gradient(self, pair: Pair, y: Tree, z: Tree) -> tuple[dict[str, Tensor], Tree]:
        """G."""
        if self.central:
            return central_hypergradient(pair.y, self.x, y, z, self.p)
        return hypergradient(pair, self.x, y, z, self.p)

    def move(self, y: Tree, z: Tree, found: tuple[dict[str, Tensor], Tree], curvature: Tensor) -> Move:
        """The outcome; the gap of central differences has no sign to look at."""
        values, gradient = found
        gap = None if self.central else values["penalty_gap"]
        return Move(y=y, z=z, gradient=gradient, values=values, curvature=curvature, penalty=self.p, gap=gap)

    def plain(self) -> Move:
        """T plain steps, each on fresh batches; no host synchronisation."""
        settings, state = self.settings, self.state
        pair = draw_pair(settings, self.problem, state)
        curvature, probe = track_curvature(state, pair.z)
        length_y, length_z = self.sizes(curvature, settings.shrink(state.step))
        y, z = state.y, state.z
        for k in range(self.steps):
            pair = draw_pair(settings, self.problem, state) if k else pair
            up, low = self.objectives(pair)
            z, _ = self.descend(low, z, state.z, 1.0, length_z)
            y, _ = self.descend(up, y, state.y, self.p, length_y)
        if not settings.common_batches:  # the last inner batches have shaped y and z
            pair = draw_pair(settings, self.problem, state)
        move = self.move(y, z, self.gradient(pair, y, z), curvature)
        return replace(move, extra={"probe": probe})

    def accelerated(self, walk: _Walk) -> tuple[Move, _Walk]:
        """T accelerated steps, again and again until G settles: lower errors enter G times the penalty.

        How far a chunk moves G takes a look before the first: one joint pass more than the published step, which has
        ``lower_chunks=1``. The G of the step before is no substitute, since x has moved.
        """
        curvature, settings = self.state.curvature, self.settings
        pair = draw_pair(settings, self.problem, self.state)
        found = self.gradient(pair, walk.y, walk.z) if settings.lower_chunks > 1 else None
        for _ in range(settings.lower_chunks):
            moved, seen = self.chunk(pair, walk, curvature)
            if bool(seen > STEEPER * curvature):
                # The lower level has become steeper than the steps assume (penalties such as exp(x) grow): take back.
                curvature = 1.2 * seen
                walk = _Walk(walk.y, walk.z, walk.y, walk.z)
                continue
            walk, before = moved, found
            found = self.gradient(pair, walk.y, walk.z)
            if before is None or not bool(tree.norm(tree.sub(found[1], before[1])) > SETTLED * tree.norm(found[1])):
                break
        found = self.gradient(pair, walk.y, walk.z) if found is None else found
        return self.move(walk.y, walk.z, found, curvature), walk

    def chunk(self, pair: Pair, walk: _Walk, curvature: Tensor) -> tuple[_Walk, Tensor]:
        """T accelerated steps, and the largest curvature of g that consecutive gradients showed."""
        up, low = self.objectives(pair)
        length_y, length_z = self.sizes(curvature, 1.0)
        beta = self.momentum(curvature)  # one for both: their errors cancel in G as far as they are equal
        scale = self.p if self.central else 1.0
        seen = torch.zeros_like(curvature)
        last: tuple[Tree, Tree] | None = None
        for _ in range(self.steps):
            ahead_z = tree.axpy(beta, tree.sub(walk.z, walk.z_before), walk.z)
            ahead_y = tree.axpy(beta, tree.sub(walk.y, walk.y_before), walk.y)
            z, slope = self.descend(low, ahead_z, self.state.z, 1.0, length_z)
            y, _ = self.descend(up, ahead_y, self.state.y, self.p, length_y)
            if last is not None:
                distance = tree.norm(tree.sub(ahead_z, last[0]))
                far = distance > 1e-6 * (1.0 + tree.norm(ahead_z))  # closer, rounding would pose as curvature
                ratio = tree.norm(tree.sub(slope, last[1])) / (scale * torch.where(far, distance, 1.0))
                seen = torch.where(far, torch.maximum(seen, ratio), seen)
            last = ahead_z, slope
            walk = _Walk(y, z, walk.y, walk.z)
        return walk, torch.where(torch.isfinite(seen), seen, 10.0 * curvature)

    def momentum(self, curvature: Tensor) -> Tensor | float:
        """Nesterov's constant for the condition number of the lower level, which the prox lowers."""
        condition: Tensor | float = self.settings.lower_condition or 1.0
        if self.rho is not None:
            condition = (curvature + 1.0 / self.rho) / (curvature / condition + 1.0 / self.rho)
        root = condition**0.5
        return (root - 1.0) / (root + 1.0)


def track_curvature(state: PenaltyState, oracle: Oracle) -> tuple[Tensor, Tree]:
    """Raise L_g where minibatches have become steeper: now and then a power step on gradient differences. Returns the
    estimate and the next direction."""
    probe = state.extra["probe"]
    if state.step % TRACK_EVERY or state.step == 0:  # measured just now
        return state.curvature, probe
    size = tree.norm(probe)
    width = float(torch.finfo(tree.common_dtype(state.z)).eps) ** 0.5 * (1.0 + tree.norm(state.z))
    ahead = tree.axpy(width / torch.where(size > 0, size, 1.0), probe, state.z)
    _, here = value_and_gradient(lambda q: oracle.lower(state.x, q), state.z)
    _, there = value_and_gradient(lambda q: oracle.lower(state.x, q), ahead)
    change = tree.scale(1.0 / width, tree.sub(there, here))
    seen = tree.norm(change)
    usable = torch.isfinite(seen) & (seen > 0)
    return torch.where(usable, torch.maximum(state.curvature, seen), state.curvature), tree.where(usable, change, probe)
