"""Solutions of constrained problems as differentiable functions of the problem's parameters."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from constrained.active_point import on_active_constraints
from constrained.lagrangian import Lagrangian
from constrained.method import ConstrainedMethod, default_atol
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
    system of the size of x and the multipliers, whatever the solver did. ``vmap`` solves the elements in turn. Where
    there are inequalities or bounds, the solution is moved onto those that are active, by some Newton steps with dense
    matrices; with a ``linear_solver`` for the derivative, only up to 2,000 variables and constraints.

    Args:
        objective: f(x, *theta), a scalar.
        equality, inequality: h(x, *theta) and c(x, *theta), tensors or trees of them, or None.
        lower, upper: bounds on x as in :class:`ConstrainedProblem`, or functions of theta that return them. Which
            entries of a function's value are infinite must not change along a derivative. Entries whose two bounds are
            equal are fixed, without a warning only if neither bound is a function: write others as equalities.
        method: see :func:`constrained.solve`.
        linear_solver: for the derivative; dense LU if None, see :func:`implicit.custom_kkt`.
        max_steps, time_limit, atol: of every solve, see :func:`constrained.solve`.
        raise_on_failure: raise when a solve does not converge; otherwise warn, and go on with the best point.

    Returns:
        A function of a start, which fixes structure and dtype and has no influence on the derivative, and theta.

    Raises:
        TypeError: if ``objective`` is no function.
        SolveError: when called, for any status but CONVERGED, with ``.solution``.

    Warns:
        ConvergenceWarning: when differentiating, where the derivative is not defined: a constraint that is active with
            multiplier zero, or both nearly so, dependent constraints, or a minimum that is not unique.

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
    if not callable(objective):
        cure = ""
        if isinstance(objective, Problem):
            cure = "; pass its functions: differentiable(problem.objective, equality=problem.equality, ...)"
        raise TypeError(f"objective must be a function (x, *theta), got {type(objective).__name__}{cure}")
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
        # Without a solver of the user's choice the derivative forms its matrix, of whatever size; so may this.
        lagrangian = Lagrangian(program.at(theta), found.x, dense=True if linear_solver is None else None)
        if not (program.limited and lagrangian.dense):
            return program.pack(found.x, found.multipliers, theta)
        given = lagrangian.flat_multipliers(*found.multipliers)
        x, multipliers = on_active_constraints(lagrangian, lagrangian.flat(found.x), given)
        return program.pack(lagrangian.tree(x), lagrangian.multiplier_trees(multipliers), theta)

    @functools.cache
    def implicit_solve(dtype: torch.dtype) -> Callable[..., KKTPoint]:
        # Where the active set stays in doubt, gap and multiplier may each be the square root of atol, their product.
        reach = 2 * (default_atol(dtype) if atol is None else atol) ** 0.5
        return custom_kkt(
            objective,
            program.equalities if equality is not None or program.pinning else None,
            program.rows if program.limited else None,
            linear_solver=linear_solver,
            active_tolerance=max(reach, float(torch.finfo(dtype).eps) ** (1 / 3)),
        )(solved)

    def run(x0: Tree, *theta: Any) -> OptimalPoint:
        return program.unpack(implicit_solve(tree.common_dtype(x0, "x0"))(x0, *theta), theta)

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

    @property
    def pinning(self) -> bool:
        """Whether bounds may fix entries: two that do not depend on theta."""
        return not any(side is None or callable(side) for side in (self.lower, self.upper))

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

    def equalities(self, x: Tree, *theta: Any) -> dict[str, Tree]:
        """All equalities: h, and entries at the bounds that fix them."""
        found: dict[str, Tree] = {} if self.equality is None else {"equality": self.equality(x, *theta)}
        if self.pinning:
            lows = spread("lower", self.lower, x, "x0")
            found["pinned"] = [
                _entries(leaf if low is None else leaf - torch.as_tensor(low).to(leaf), pins)
                for leaf, low, pins in zip(tree.leaves(x), lows, self.pinned(x), strict=True)
                if bool(pins.any())
            ]
        return found

    def rows(self, x: Tree, *theta: Any) -> dict[str, Tree]:
        """All inequalities: c, and the distances to the bounds."""
        found: dict[str, Tree] = {} if self.inequality is None else {"inequality": self.inequality(x, *theta)}
        for side, sign in (("lower", -1.0), ("upper", 1.0)):
            if getattr(self, side) is not None:
                pairs = zip(self.places(side, x, theta), tree.leaves(x), strict=True)
                found[side] = [place.gap(leaf, sign) for place, leaf in pairs if place is not None]
        return found

    def places(self, side: str, x: Tree, theta: tuple[Any, ...]) -> list["_Place | None"]:
        """Where the bound is, for each leaf of x; None if it has no rows."""
        entries = spread(side, self.bound(side, theta), x, "x0")
        fixed = not callable(getattr(self, side))
        places: list[_Place | None] = []
        for entry, leaf, pins in zip(entries, tree.leaves(x), self.pinned(x), strict=True):
            place = None if entry is None else _Place(torch.as_tensor(entry).to(leaf), fixed, pins)
            empty = place is not None and fixed and not bool(place.mask(leaf).any())
            places.append(None if empty else place)
        return places

    def pinned(self, x: Tree) -> list[Tensor]:
        """For each leaf of x, which entries its bounds fix."""
        leaves = tree.leaves(x)
        masks = [torch.zeros(leaf.shape, dtype=torch.bool, device=leaf.device) for leaf in leaves]
        if not self.pinning:
            return masks
        lows, highs = spread("lower", self.lower, x, "x0"), spread("upper", self.upper, x, "x0")
        return [
            mask if low is None or high is None else mask | (torch.as_tensor(low) == torch.as_tensor(high)).to(mask)
            for mask, low, high in zip(masks, lows, highs, strict=True)
        ]

    def pack(self, x: Tree, multipliers: Any, theta: tuple[Any, ...]) -> KKTPoint:
        """The point with multipliers as :meth:`equalities` and :meth:`rows` have them."""
        equal = {} if self.equality is None else {"equality": multipliers.equality}
        if self.pinning:
            forces = tree.leaves(tree.sub(multipliers.upper, multipliers.lower))
            equal["pinned"] = [
                _entries(force, pins) for force, pins in zip(forces, self.pinned(x), strict=True) if bool(pins.any())
            ]
        found = {} if self.inequality is None else {"inequality": multipliers.inequality}
        for side in ("lower", "upper"):
            if getattr(self, side) is not None:
                pairs = zip(self.places(side, x, theta), tree.leaves(getattr(multipliers, side)), strict=True)
                found[side] = [place.take(value) for place, value in pairs if place is not None]
        return KKTPoint(x, equal or (), found if self.limited else ())

    def unpack(self, point: KKTPoint, theta: tuple[Any, ...]) -> OptimalPoint:
        """Multipliers of bounds shaped like x."""
        limits = point.inequality if self.limited else {}
        sides = []
        for side, sign in (("lower", -1.0), ("upper", 1.0)):
            leaves, spec = tree.flatten(point.y)
            places: list[_Place | None] = [None] * len(leaves)
            if getattr(self, side) is not None:
                places = self.places(side, point.y, theta)
            parts = iter(limits.get(side, ()))
            values = [
                _blank(x) if place is None else place.put(next(parts), x)
                for place, x in zip(places, leaves, strict=True)
            ]
            if self.pinning:
                # One multiplier of any sign holds a fixed entry; it is that of the side it presses against.
                forces = iter(point.equality["pinned"])
                masks = self.pinned(point.y)
                values = [
                    value + _placed((sign * next(forces)).clamp(min=0), mask) if bool(mask.any()) else value
                    for value, mask in zip(values, masks, strict=True)
                ]
            sides.append(tree.unflatten(values, spec))
        equality = () if self.equality is None else point.equality["equality"]
        return OptimalPoint(point.y, equality, limits.get("inequality", ()), *sides)


@dataclass(frozen=True)
class _Place:
    """A bound on one leaf; a fixed one has rows at its finite entries alone, another one everywhere."""

    value: Tensor
    fixed: bool
    pins: Tensor  # entries that are equalities instead

    def mask(self, like: Tensor) -> Tensor:
        return torch.isfinite(self.value).expand(like.shape) & ~self.pins

    def gap(self, leaf: Tensor, sign: float) -> Tensor:
        """``sign (leaf - bound)``, and -1, which no multiplier can press against, where there is no bound."""
        distance = sign * (leaf - self.value)
        if self.fixed:
            return _entries(distance, self.mask(leaf))
        return torch.where(torch.isfinite(self.value), distance, -1.0)

    def take(self, leaf: Tensor) -> Tensor:
        return _entries(leaf, self.mask(leaf)) if self.fixed else leaf

    def put(self, values: Tensor, like: Tensor) -> Tensor:
        return _placed(values, self.mask(like)) if self.fixed else values


def _entries(leaf: Tensor, mask: Tensor) -> Tensor:
    return leaf.reshape(-1)[mask.reshape(-1).nonzero()[:, 0]]


def _placed(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is set, in order, and zeros elsewhere."""
    blank = torch.zeros(mask.numel(), dtype=values.dtype, device=values.device)
    return blank.index_copy(0, mask.reshape(-1).nonzero()[:, 0], values).reshape(mask.shape)


def _blank(leaf: Tensor) -> Tensor:
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
