"""How far a point is from satisfying the Karush-Kuhn-Tucker conditions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from constrained.lagrangian import Lagrangian, Point
from constrained.multipliers import FlatMultipliers
from constrained.problem import Problem
from implicit import Dense
from implicit.tree import Tree


@dataclass(frozen=True)
class KKTResidual:
    """Scaled residuals of the optimality conditions; all zero at a KKT point.

    With ``L = f + <l, h> + <v, c> + <z_u, x - upper> + <z_l, lower - x>``, all norms being largest entries:

    Attributes:
        stationarity: ``|grad_x L| / s`` with ``s = max(1, |grad f|, |l|, |v|, |z|)``; where the Jacobian is a dense
            matrix, multipliers count as ``|v_i| min(1, |grad c_i|)``: rows without gradient have any.
        feasibility: the largest violation of ``h = 0``, ``c <= 0`` and the bounds, as declared.
        complementarity: the largest of ``|v_i c_i| / max(1, |grad f|, |v_i|)``, the same for bounds, and of negative
            multipliers over s. Each product has its own scale, so that one huge multiplier does not excuse the others.
    """

    stationarity: float
    feasibility: float
    complementarity: float

    @property
    def largest(self) -> float:
        """The largest of the three; NaN if one is."""
        values = (self.stationarity, self.feasibility, self.complementarity)
        return max(values) if all(v == v for v in values) else float("nan")


def largest(*vectors: Tensor) -> Tensor:
    """The largest absolute entry; zero if there is none, NaN if one is."""
    return torch.cat([v.reshape(-1) for v in vectors] + [vectors[0].new_zeros(1)]).abs().amax()


def bound_gaps(lagrangian: Lagrangian, x: Tensor) -> tuple[Tensor, Tensor]:
    """``(lower - x, x - upper)``, negative inside; ``-inf`` where there is no bound."""
    return lagrangian.lower - x, x - lagrangian.upper


def violation(lagrangian: Lagrangian, point: Point) -> Tensor:
    """The largest violation of any constraint or bound, a 0-d tensor."""
    below, above = bound_gaps(lagrangian, point.x)
    sides = torch.cat([point.inequality, below, above]).clamp(min=0)
    return largest(point.equality, sides)


def measure(lagrangian: Lagrangian, point: Point, multipliers: FlatMultipliers) -> Tensor:
    """The three residuals of :class:`KKTResidual` as a tensor of shape (3,); nothing is read on the host."""
    rows = torch.cat([multipliers.equality, multipliers.inequality])
    gradient = point.lagrangian_gradient(rows) - multipliers.lower + multipliers.upper
    if len(rows) and lagrangian.dense and isinstance(point.jacobian, Dense):
        rows = rows * point.jacobian.matrix.abs().amax(dim=1).clamp(max=1.0)
    scale = torch.clamp(largest(point.gradient, rows, multipliers.lower, multipliers.upper), min=1.0)
    stationarity = torch.where(torch.isfinite(point.objective), largest(gradient) / scale, torch.nan)
    gaps = torch.cat([point.inequality, *bound_gaps(lagrangian, point.x)])
    duals = torch.cat(multipliers[1:])
    # No bound, no product: inf * 0 is not a number, and a multiplier without its bound is an error by itself.
    products = torch.where(torch.isinf(gaps), duals, gaps * duals)
    # Each product by its own multiplier: a huge one of a row without gradient must not hide the others.
    own = torch.maximum(duals.abs(), largest(point.gradient)).clamp(min=1.0)
    complementarity = largest(products / own, duals.clamp(max=0) / scale)
    return torch.stack([stationarity, violation(lagrangian, point), complementarity])


def kkt_residual(
    problem: Problem,
    x: Tree,
    equality: Tree = None,
    inequality: Tree = None,
    lower: Tree = None,
    upper: Tree = None,
) -> KKTResidual:
    """The residuals of the optimality conditions at any point with any multipliers.

    Args:
        problem: the declaration.
        x: the point.
        equality, inequality: multipliers, shaped like the values of the constraints; zero if None.
        lower, upper: multipliers of the bounds, shaped like x, at least zero; zero if None.

    Raises:
        TypeError, ValueError: if something does not fit; the message names it.

    Example:
        >>> import torch, constrained
        >>> box = constrained.ConstrainedProblem(objective=lambda x: (x**2).sum(), lower=1.0)
        >>> at = torch.ones(2)
        >>> constrained.kkt_residual(box, at, lower=2 * at)
        KKTResidual(stationarity=0.0, feasibility=0.0, complementarity=0.0)
    """
    problem.validate(x, "x")
    lagrangian = Lagrangian(problem, x)
    multipliers = lagrangian.flat_multipliers(equality, inequality, lower, upper)
    point = lagrangian.at(lagrangian.flat(x))
    return KKTResidual(*measure(lagrangian, point, multipliers).tolist())
