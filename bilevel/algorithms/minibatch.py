"""One minibatch step of implicit hypergradient descent: y, v and x move together.

Source: Dagreou, Ablin, Vaiter, Moreau 2022 (SOBA), with normalised momentum steps in x.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.algorithms.base import BilevelState
from bilevel.oracle import Oracle
from bilevel.problem import BilevelProblem
from bilevel.step_sizes import PathEfficiency, PathState
from implicit import State, tree
from implicit.derivatives import value_and_gradients
from implicit.iterate import Values
from implicit.tree import Tree

PATIENCE = 3
"""Updates refused in a row for not being finite before the run counts as failed: one bad batch is not the end."""


@dataclass(kw_only=True)
class MinibatchState(State):
    """Samplers' positions, the momentum of x, its step-length rule, and how many updates in a row were refused."""

    upper_position: Any
    lower_position: Any
    momentum: Tree
    path: PathState
    refused: Tensor


def draw(problem: BilevelProblem, state: BilevelState, positions: MinibatchState) -> Oracle:
    """Both objectives on the next batches."""
    upper, lower = problem.upper_data, problem.lower_data
    return Oracle(
        problem,
        state.counts,
        upper.draw(positions.upper_position, state.generator) if upper is not None else None,
        lower.draw(positions.lower_position, state.generator) if lower is not None else None,
    )


def init_minibatch(problem: BilevelProblem, state: BilevelState, rule: PathEfficiency) -> MinibatchState:
    """Positions before the first batch; moves the run's generator."""
    upper, lower = problem.upper_data, problem.lower_data
    return MinibatchState(
        upper_position=upper.init(state.generator) if upper is not None else None,
        lower_position=lower.init(state.generator) if lower is not None else None,
        momentum=tree.zeros_like(state.x),
        path=rule.init(state.x),
        refused=tree.norm(state.x).detach() * 0.0,
    )


def move_upper(
    problem: BilevelProblem,
    state: BilevelState,
    inner: MinibatchState,
    h: Tree,
    rule: PathEfficiency,
    beta: float,
    optimizer: torch.optim.Optimizer | None,
) -> Tree:
    """The next x along a stochastic hypergradient: a torch optimizer's step, or a normalised momentum step."""
    if optimizer is not None:
        before = tree.clone(state.x)
        for leaf, slope in zip(tree.leaves(state.x), tree.aligned_leaves(h, tree.structure(state.x)), strict=True):
            leaf.grad = slope
        optimizer.step()
        after = problem.upper_set.project(tree.clone(state.x))
        tree.copy_(state.x, before)
        return after
    mixed = tree.axpy(beta, inner.momentum, tree.scale(1.0 - beta, h))
    inner.momentum = tree.where(tree.all_finite(mixed), mixed, inner.momentum)
    return normalised_step(problem, state.x, inner.momentum, inner.path.length)


def normalised_step(problem: BilevelProblem, x: Tree, direction: Tree, length: Tensor) -> Tree:
    """``P_X(x - length * direction / ||direction||)``, one norm over all of x."""
    size = tree.norm(direction)
    return problem.upper_set.project(tree.axpy(-length / torch.where(size > 0, size, 1.0), direction, x))


def commit(
    state: BilevelState,
    inner: MinibatchState,
    rule: PathEfficiency | None,
    updates: dict[str, Tree],
    lost: Tensor | None = None,
) -> Tensor:
    """Write finite updates, refuse others, on the device; returns whether they were finite.

    ``lost`` tells the step rule that the lower level has lost track of x.
    """
    flag = tree.all_finite(*updates.values())
    before = state.x
    for name, new in updates.items():
        old = getattr(state, name)
        if name == "x":  # optimizers hold references to these tensors
            before = tree.clone(old)
            tree.copy_(old, tree.where(flag, new, old))
        else:
            setattr(state, name, tree.where(flag, new, old))
    if rule is not None:
        rule.update(inner.path, state.x, tree.norm(tree.sub(state.x, before)), lost)
    inner.refused = torch.where(flag, 0.0, inner.refused + 1.0)
    state.finite = inner.refused < PATIENCE
    return flag


def soba_step(
    problem: BilevelProblem,
    state: Any,
    inner: MinibatchState,
    *,
    lower_steps: int,
    lower_step_size: float,
    rule: PathEfficiency,
    beta: float,
    optimizer: torch.optim.Optimizer | None,
) -> Values:
    """``lower_steps`` gradient steps on y and on v (each on fresh batches), then one step of x."""
    x, y, v = state.x, state.y, state.adjoint
    value: Tensor | None = None
    h: Tree = None
    for _ in range(lower_steps):
        oracle = draw(problem, state, inner)
        graph = oracle.graph(x, y)
        value, f_x, f_y = value_and_gradients(oracle.upper, x, y)
        g_xy_v, g_yy_v = graph.joint(v)
        state.counts["products"] += 1
        h = tree.sub(f_x, g_xy_v)
        y = tree.axpy(-lower_step_size, graph.gradient, y)
        v = tree.axpy(-lower_step_size, tree.sub(g_yy_v, f_y), v)
    assert value is not None
    x_next = move_upper(problem, state, inner, h, rule, beta, optimizer)
    commit(state, inner, rule if optimizer is None else None, {"x": x_next, "y": y, "adjoint": v})
    return {"upper_value": value, "hypergradient": tree.norm(h), "step_length": inner.path.length}
