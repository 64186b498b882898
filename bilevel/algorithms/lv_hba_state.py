"""What an LV-HBA run keeps, and what is rebuilt from that."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel.algorithms.base import BilevelState
from bilevel.algorithms.lv_hba_stages import StagesState
from bilevel.anderson import AndersonState
from bilevel.flat import FlatProblem
from bilevel.joint_projection import JointProjection
from bilevel.problem import BilevelProblem
from implicit import State
from implicit.tree import Tree


@dataclass(kw_only=True)
class Positions(State):
    """Where the samplers of both levels stand."""

    upper_position: Any
    lower_position: Any


@dataclass(kw_only=True)
class LVHBAState(BilevelState):
    """The state of a run; everything in scaled units, see :class:`LVHBA`.

    Attributes:
        origin: the start, from which the constraints are resolved, also after a load.
        point: ``(x, y), theta, lambda, z`` one after the other before their projections.
        accepted: the same after their projections, where the acceleration accepted it last; x and y are from there.
        weights: factors on the rows of the lower level.
        duals: multipliers of the last projection.
        projection_error: how far the last projection was from its optimality conditions.
        radius: r.
        truncations: how often r had to grow.
        damping: factor on all step sizes.
        steepest: largest change of the vector field over a step, relative to it, since the last look.
        seen, motion: where the field was evaluated last, and what it was; ``comparable`` if the steps were the same.
        surrogate: residual of the fixed point over the step size; an upper bound on R_k.
        refused: how many updates in a row were not finite.
        infeasible: whether C is empty.
        anderson, stages, positions: of the acceleration, of the sequence of c, of the samplers.
    """

    origin: tuple[Tree, Tree]
    point: Tensor
    accepted: Tensor
    weights: Tensor
    duals: Tensor
    projection_error: float
    radius: Tensor
    truncations: Tensor
    damping: Tensor
    steepest: Tensor
    seen: Tensor
    motion: Tensor
    comparable: Tensor
    surrogate: Tensor
    refused: Tensor
    infeasible: bool
    anderson: AndersonState
    stages: StagesState
    positions: Positions
    work: Any = field(default=None, metadata={"transient": True})
    verdict: Any = field(default=None, metadata={"transient": True})


@dataclass(frozen=True, eq=False)
class Work:
    """What is rebuilt from the state: the flat problem and the projection onto C."""

    flat: FlatProblem
    projection: JointProjection
    inequalities: int
    sizes: tuple[int, int, int, int]

    @classmethod
    def of(cls, problem: BilevelProblem, origin: tuple[Tree, Tree], counts: dict[str, int]) -> "Work":
        flat = FlatProblem(problem, origin[0], origin[1], counts)
        projection = JointProjection(flat, flat.flat_x(flat.x_like), flat.flat_y(flat.y_like))
        level = flat.lower_level
        rows = level.inequalities + level.equalities
        return cls(flat, projection, level.inequalities, (flat.n + flat.m, flat.m, rows, rows))

    def rows(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The scaled rows of the lower level, inequalities first."""
        level = self.flat.lower_level
        parts = [level.inequality(x, y)] if level.inequalities else []
        parts += [level.equality(x, y)] if level.equalities else []
        return weights * torch.cat(parts) if parts else weights


@dataclass(frozen=True, eq=False)
class Iterate:
    """A projected point."""

    x: Tensor
    y: Tensor
    theta: Tensor
    lam: Tensor
    z: Tensor

    @property
    def flat(self) -> Tensor:
        return torch.cat([self.x, self.y, self.theta, self.lam, self.z])
