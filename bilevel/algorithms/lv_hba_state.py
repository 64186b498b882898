"""What an LV-HBA run keeps, and what is rebuilt from that."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.algorithms.base import BilevelState
from bilevel.algorithms.lv_hba_stages import StagesState
from bilevel.anderson import AndersonState
from bilevel.flat import FlatProblem
from bilevel.joint_projection import JointPoint, JointProjection
from bilevel.oracle import Oracle
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
        lengths: units of the variables (x, y).
        weights: factors on the rows of the lower level.
        duals: multipliers of the last projection.
        radius: r.
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
    lengths: Tensor
    weights: Tensor
    duals: Tensor
    radius: Tensor
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
    """The problem in scaled units: ``(x, y) = lengths * (u_x, u_y)``. Rebuilt from the state."""

    flat: FlatProblem
    projection: JointProjection
    lengths: Tensor
    sizes: tuple[int, int, int, int]

    @classmethod
    def of(cls, problem: BilevelProblem, origin: tuple[Tree, Tree], counts: dict[str, int]) -> "Work":
        """In the units of the problem."""
        flat = FlatProblem(problem, origin[0], origin[1], counts)
        x, y = flat.flat_x(flat.x_like), flat.flat_y(flat.y_like)
        level = flat.lower_level
        rows = level.inequalities + level.equalities
        sizes = flat.n + flat.m, flat.m, rows, rows
        return cls(flat, JointProjection(flat, x, y), torch.ones_like(torch.cat([x, y])), sizes)

    @property
    def scalable(self) -> bool:
        """Whether the projection can measure each variable in a length of its own; those of given sets cannot."""
        return self.projection.method not in ("sets", "joint set")

    def measured(self, lengths: Tensor) -> "Work":
        """The same in these lengths.

        Where they are no ones and the problem is not :attr:`scalable`, the sets are written as rows.
        """
        if bool((lengths == 1).all()):
            return self
        flat, n = self.flat, self.flat.n
        at = flat.flat_x(flat.x_like), flat.flat_y(flat.y_like)
        projection = JointProjection(flat, *at, scale=(lengths[:n], lengths[n:]))
        return replace(self, projection=projection, lengths=lengths)

    def pair(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(x, y) of the leading entries of a point in scaled units."""
        count = len(self.lengths)
        return (self.lengths * u[:count]).split([self.flat.n, self.flat.m])  # type: ignore[return-value]

    def upper(self, u_x: Tensor, u_y: Tensor, oracle: Oracle) -> Tensor:
        """F, not divided by its scale."""
        n = self.flat.n
        return self.flat.upper(self.lengths[:n] * u_x, self.lengths[n:] * u_y, oracle)

    def lower(self, u_x: Tensor, u_y: Tensor, oracle: Oracle) -> Tensor:
        """f, not divided by its scale."""
        n = self.flat.n
        return self.flat.lower(self.lengths[:n] * u_x, self.lengths[n:] * u_y, oracle)

    def rows(self, weights: Tensor, u_x: Tensor, u_y: Tensor) -> Tensor:
        """The scaled rows of the lower level, inequalities first."""
        level, n = self.flat.lower_level, self.flat.n
        x, y = self.lengths[:n] * u_x, self.lengths[n:] * u_y
        parts = [level.inequality(x, y)] if level.inequalities else []
        parts += [level.equality(x, y)] if level.equalities else []
        return weights * torch.cat(parts) if parts else weights

    def nearest(self, x: Tree, y: Tree) -> JointPoint:
        """The nearest pair in C, in the units of the problem."""
        return self.projection.project(self.flat.flat_x(x), self.flat.flat_y(y), self.projection.start())

    def in_c(self, u: Tensor, duals: Tensor) -> tuple[Tensor, JointPoint]:
        """The nearest pair in C, in scaled units, and all about it."""
        near = self.projection.project(*self.pair(u), duals)
        return torch.cat([near.x, near.y]) / self.lengths, near

    def in_y(self, theta: Tensor) -> Tensor:
        """Within the bounds of the lower level; its other sets are rows."""
        level, own = self.flat.lower_level, self.lengths[self.flat.n :]
        return torch.minimum(torch.maximum(theta, level.lower / own), level.upper / own)

    def in_z(self, multipliers: Tensor, radius: Tensor) -> Tensor:
        """``[0, r]`` for inequalities, ``[-r, r]`` for equations."""
        p = self.flat.lower_level.inequalities
        lowest = torch.cat([radius.new_zeros(p), -radius.expand(len(multipliers) - p)])
        return torch.minimum(torch.maximum(multipliers, lowest), radius)


@dataclass(frozen=True, eq=False)
class Iterate:
    """A projected point, in scaled units."""

    x: Tensor
    y: Tensor
    theta: Tensor
    lam: Tensor
    z: Tensor

    @property
    def flat(self) -> Tensor:
        return torch.cat([self.x, self.y, self.theta, self.lam, self.z])
