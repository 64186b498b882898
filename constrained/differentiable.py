"""Solutions of constrained problems as differentiable functions of the problem's parameters."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from constrained.method import ConstrainedMethod
from constrained.problem import ConstrainedProblem, EqualityProblem, Problem
from constrained.sets.base import Bound, spread
from constrained.solve import solve
from implicit import ConvergenceWarning, KKTPoint, LinearSolver, SolveError, custom_kkt, tree
from implicit.tree import Tree


class OptimalPoint(NamedTuple):
    """A solution with its multipliers; a pytree, differentiable in all parts.

    Attributes:
        x: the minimizer.
        equality, inequality: multipliers, shaped like the values of the constraints; ``()`` where there are none.
        lower, upper: multipliers of the bounds, shaped like x, zero where there is no bound.
    """

    x: Tree
    equality: Tree
    inequality: Tree
    lower: Tree
    upper: Tree


def differentiable(
    objective: Callable[..., Tensor],
    *,
    equality: Callable[..., Tree] | None = None,
    inequality: Callable[..., Tree] | None = None,
    lower: Bound | Callable[..., Bound] = None,
    upper: Bound | Callable[..., Bound] = None,
    method: ConstrainedMethod[Any] | None = None,
    linear_solver: LinearSolver | None = None,
    max_steps: int | None = None,
    time_limit: float | None = None,
    atol: float | None = None,
    raise_on_failure: bool = True,
) -> Callable[..., OptimalPoint]:
    """``(x0, *theta) -> argmin_x f(x, *theta) s.t. h(x, *theta) = 0, c(x, *theta) <= 0, lower <= x <= upper``.

    The result is differentiable in every tensor of theta, to any order and in every mode of ``torch.func``, by the
    implicit function theorem on the optimality conditions (:func:`implicit.custom_kkt`): a derivative costs one linear
    system of the size of x and the multipliers, whatever the solver did. ``vmap`` solves the elements in turn.

    Args:
        objective: f(x, *theta), a scalar.
        equality, inequality: h(x, *theta) and c(x, *theta), tensors or trees of them, or None.
        lower, upper: bounds on x as in :class:`ConstrainedProblem`, or functions of theta that return them. Which
            entries of a function's value are infinite must not change along a derivative.
        method: see :func:`constrained.solve`.
        linear_solver: for the derivative; dense LU if None, see :func:`implicit.custom_kkt`.
        max_steps, time_limit, atol: of every solve, see :func:`constrained.solve`.
        raise_on_failure: raise when a solve does not converge; otherwise warn, and go on with the best point.

    Returns:
        A function of a start, which fixes structure and dtype and has no influence on the derivative, and theta.

    Raises:
        SolveError: when called, for any status but CONVERGED, with ``.solution``.

    Warns:
        ConvergenceWarning: when differentiating, where the derivative is not defined: a constraint that is active with
            multiplier zero, dependent constraints, or a minimum that is not unique.

    Example:
        >>> import torch, constrained
        >>> nearest = constrained.differentiable(
        ...     lambda x, p: ((x - p) ** 2).sum() / 2, equality=lambda x, p: ((x**2).sum() - 1) / 2
        ... )
        >>> p = torch.tensor([3.0, 4.0], dtype=torch.float64)
        >>> torch.func.jacrev(lambda p: nearest(p, p).x)(p).round(decimals=4)
        tensor([[ 0.1280, -0.0960],
                [-0.0960,  0.0720]], dtype=torch.float64)
    """
    program = _Program(objective, equality, inequality, lower, upper)
    options: dict[str, Any] = {"max_steps": max_steps, "time_limit": time_limit, "atol": atol}

    def solved(init: Tree, *theta: Any) -> KKTPoint:
        found = solve(program.at(theta), method, init, raise_on_failure=False, **options)
        if not found.success:
            message = f"{found.status.name} after {found.steps} steps: {found.message}"
            if raise_on_failure:
                raise SolveError(message, found)
            warnings.warn(f"{message}; its derivative is that of another problem", ConvergenceWarning, stacklevel=2)
        return program.pack(found.x, found.multipliers, theta)

    implicit_solve = custom_kkt(
        objective, equality, program.rows if program.limited else None, linear_solver=linear_solver
    )(solved)

    def run(x0: Tree, *theta: Any) -> OptimalPoint:
        return program.unpack(implicit_solve(x0, *theta), theta)

    return run


@dataclass(frozen=True)
class _Program:
    """The problem as a function of theta; finite bounds are rows after the inequalities."""

    objective: Callable[..., Tensor]
    equality: Callable[..., Tree] | None
    inequality: Callable[..., Tree] | None
    lower: Any
    upper: Any

    @property
    def limited(self) -> bool:
        return any(part is not None for part in (self.inequality, self.lower, self.upper))

    def bound(self, side: str, theta: tuple[Any, ...]) -> Bound:
        value = getattr(self, side)
        return value(*theta) if callable(value) else value

    def at(self, theta: tuple[Any, ...]) -> Problem:
        """The problem to be solved."""
        objective, equality, inequality = self.objective, self.equality, self.inequality
        if equality is not None and not self.limited:
            return EqualityProblem(lambda x: objective(x, *theta), lambda x: equality(x, *theta))
        return ConstrainedProblem(
            objective=lambda x: objective(x, *theta),
            equality=None if equality is None else lambda x: equality(x, *theta),
            inequality=None if inequality is None else lambda x: inequality(x, *theta),
            lower=tree.map(_detached, self.bound("lower", theta)),
            upper=tree.map(_detached, self.bound("upper", theta)),
        )

    def rows(self, x: Tree, *theta: Any) -> dict[str, Tree]:
        """All inequalities: c, and the distances to the bounds."""
        found: dict[str, Tree] = {} if self.inequality is None else {"inequality": self.inequality(x, *theta)}
        for side, sign in (("lower", -1.0), ("upper", 1.0)):
            if getattr(self, side) is not None:
                found[side] = [place.gap(leaf, sign) for place, leaf in self.places(side, x, theta)]
        return found

    def places(self, side: str, x: Tree, theta: tuple[Any, ...]) -> list[tuple["_Place", Tensor]]:
        """Where the bound is, for each leaf of x that has one."""
        entries = spread(side, self.bound(side, theta), x, "x0")
        fixed = not callable(getattr(self, side))
        pairs = zip(entries, tree.leaves(x), strict=True)
        return [(_Place(torch.as_tensor(entry).to(leaf), fixed), leaf) for entry, leaf in pairs if entry is not None]

    def pack(self, x: Tree, multipliers: Any, theta: tuple[Any, ...]) -> KKTPoint:
        """The point with multipliers as :meth:`rows` has them."""
        found = {} if self.inequality is None else {"inequality": multipliers.inequality}
        for side in ("lower", "upper"):
            if getattr(self, side) is not None:
                entries = spread(side, self.bound(side, theta), x, "x0")
                given = tree.leaves(getattr(multipliers, side))
                kept = [value for value, entry in zip(given, entries, strict=True) if entry is not None]
                places = self.places(side, x, theta)
                found[side] = [place.take(value) for (place, _), value in zip(places, kept, strict=True)]
        return KKTPoint(x, multipliers.equality, found if self.limited else ())

    def unpack(self, point: KKTPoint, theta: tuple[Any, ...]) -> OptimalPoint:
        """Multipliers of bounds shaped like x."""
        limits = point.inequality if self.limited else {}
        sides = []
        for side in ("lower", "upper"):
            leaves, spec = tree.flatten(point.y)
            if getattr(self, side) is not None:
                entries = spread(side, self.bound(side, theta), point.y, "x0")
                parts = iter(zip(self.places(side, point.y, theta), limits[side], strict=True))
                leaves = [
                    _blank(leaf) if entry is None else _fill(*next(parts))
                    for leaf, entry in zip(leaves, entries, strict=True)
                ]
            else:
                leaves = [_blank(leaf) for leaf in leaves]
            sides.append(tree.unflatten(leaves, spec))
        return OptimalPoint(point.y, point.equality, limits.get("inequality", ()), *sides)


@dataclass(frozen=True)
class _Place:
    """A bound on one leaf; a fixed one has rows at its finite entries alone, another one everywhere."""

    value: Tensor
    fixed: bool

    def index(self, like: Tensor) -> Tensor:
        return torch.isfinite(self.value).expand(like.shape).reshape(-1).nonzero()[:, 0]

    def gap(self, leaf: Tensor, sign: float) -> Tensor:
        """``sign (leaf - bound)``, and -1, which no multiplier can press against, where there is no bound."""
        distance = sign * (leaf - self.value)
        if self.fixed:
            return distance.reshape(-1)[self.index(leaf)]
        return torch.where(torch.isfinite(self.value), distance, -1.0)

    def take(self, leaf: Tensor) -> Tensor:
        return leaf.reshape(-1)[self.index(leaf)] if self.fixed else leaf

    def put(self, values: Tensor, like: Tensor) -> Tensor:
        if not self.fixed:
            return values
        return _blank(like).reshape(-1).index_copy(0, self.index(like), values).reshape(like.shape)


def _fill(placed: tuple[_Place, Tensor], values: Tensor) -> Tensor:
    place, leaf = placed
    return place.put(values, leaf)


def _blank(leaf: Tensor) -> Tensor:
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
