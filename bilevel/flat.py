"""A bilevel problem on ravelled points, with every declared constraint and set resolved into rows and bounds."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.oracle import Counts, Oracle, new_counts
from bilevel.probes import displacement, same
from bilevel.problem import BilevelProblem
from constrained import ConstrainedProblem, ConvexSet
from constrained.sets import Description, describe
from implicit import Jacobian, tree
from implicit.tree import Tree

Rows = Callable[[Tensor, Tensor], Tensor]
REACHES = (0.0, 1.0, -1.0, 30.0, -30.0, 1e3, -1e3)
"""How far from the start, relative to its size, rows are looked at for their dependence on x and y."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The rows of one declared function that stay with a level.

    Attributes:
        field: the function's name in the declaration.
        rows: their places among the function's values.
        total: how many values it has.
    """

    field: str
    rows: Tensor
    total: int


@dataclass(frozen=True, kw_only=True)
class Level:
    """The constraints of one level: ``inequality(x, y) <= 0``, ``equality(x, y) = 0``, bounds on its own variable.

    Attributes:
        inequality, equality: functions of ravelled points with values of shapes ``(p,)`` and ``(q,)``: declared rows
            first, then rows that describe the set of the level.
        inequalities, equalities: p and q.
        lower, upper: bounds on the own variable (x above, y below), infinite where there is none.
        affine: whether all rows are affine in (x, y) together.
        affine_equality: whether those of the equality are.
        kept_inequality, kept_equality: where the declared rows come from.
    """

    inequality: Rows
    equality: Rows
    inequalities: int
    equalities: int
    lower: Tensor
    upper: Tensor
    affine: bool
    affine_equality: bool
    kept_inequality: tuple[Kept, ...]
    kept_equality: tuple[Kept, ...]

    @property
    def bounded(self) -> bool:
        """Whether any bound is finite."""
        return bool((torch.isfinite(self.lower) | torch.isfinite(self.upper)).any())

    @property
    def free(self) -> bool:
        """Whether the level has no constraint at all."""
        return not (self.inequalities or self.equalities or self.bounded)


class FlatProblem:
    """``problem`` as functions of vectors x, ``(n,)``, and y, ``(m,)``.

    Rows of lower constraints that do not depend on y restrict x alone: they are moved to the upper level, where they
    belong, and ``notes`` says so. Which rows those are, and which are affine, is found from exact directional
    derivatives at several random points near and far from the start.

    Args:
        problem: the declaration.
        x0, y0: fix structure, shapes, dtype and device; validated before.
        counts: where evaluations of the objectives are counted.

    Attributes:
        n, m, dtype, device: of the vectors.
        upper_level, lower_level: the constraints.
        notes: sentences about what was changed.

    Raises:
        ValueError: if a lower constraint depends on y in no row, or values have the wrong dtype or are NaN.
        TypeError: if a constraint returns something that is no tensor, or a set cannot be written as constraints.
    """

    def __init__(self, problem: BilevelProblem, x0: Tree, y0: Tree, counts: Counts | None = None) -> None:
        self.problem, self.counts = problem, new_counts() if counts is None else counts
        self.x_like, self.y_like = tree.detach(x0), tree.detach(y0)
        x, y = tree.ravel(self.x_like), tree.ravel(self.y_like)
        self.n, self.m, self.dtype, self.device = len(x), len(y), y.dtype, y.device
        self.oracle = Oracle.full(problem, self.counts)
        self._likes: dict[str, Tree] = {}
        looks = {field: self._look(field, x, y) for field in problem.constraints}
        self.notes = tuple(note for field, look in looks.items() for note in _moved_note(field, look))
        self.lower_level = self._level("lower", looks, problem.lower_set, self.y_like)
        self.upper_level = self._level("upper", looks, problem.upper_set, self.x_like)

    def x_tree(self, x: Tensor) -> Tree:
        """x shaped as declared."""
        return tree.unravel(x, self.x_like)

    def y_tree(self, y: Tensor) -> Tree:
        """y shaped as declared."""
        return tree.unravel(y, self.y_like)

    def flat_x(self, x: Tree) -> Tensor:
        """A tree shaped like x as a vector."""
        return tree.ravel(tree.map(lambda _, leaf: leaf, self.x_like, x))

    def flat_y(self, y: Tree) -> Tensor:
        """A tree shaped like y as a vector."""
        return tree.ravel(tree.map(lambda _, leaf: leaf, self.y_like, y))

    def upper(self, x: Tensor, y: Tensor, oracle: Oracle | None = None) -> Tensor:
        """f(x, y), on all data or on those of ``oracle``."""
        return (oracle or self.oracle).upper(self.x_tree(x), self.y_tree(y))

    def lower(self, x: Tensor, y: Tensor, oracle: Oracle | None = None) -> Tensor:
        """g(x, y), on all data or on those of ``oracle``."""
        return (oracle or self.oracle).lower(self.x_tree(x), self.y_tree(y))

    def lower_problem(self, x: Tensor) -> ConstrainedProblem:
        """``min g(x, .)`` over the lower constraints, in the vector y."""
        x, level = x.detach(), self.lower_level
        return ConstrainedProblem(
            objective=lambda y: self.lower(x, y),
            inequality=(lambda y: level.inequality(x, y)) if level.inequalities else None,
            equality=(lambda y: level.equality(x, y)) if level.equalities else None,
            lower=level.lower if bool(torch.isfinite(level.lower).any()) else None,
            upper=level.upper if bool(torch.isfinite(level.upper).any()) else None,
            name=f"the lower level of {self.problem.name}",
        )

    def violations(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """The largest violation at each level, ``"upper"`` and ``"lower"``: rows are divided by ``max(1, |gradient|)``
        with the gradient in (x, y)."""
        found = {}
        for name, level, own in (("upper", self.upper_level, x), ("lower", self.lower_level, y)):
            parts = [(level.lower - own).clamp(min=0), (own - level.upper).clamp(min=0)]
            for rows, count, sign in (
                (level.inequality, level.inequalities, 0.0),
                (level.equality, level.equalities, -torch.inf),
            ):
                if count:
                    sizes, values = row_sizes(rows, x, y)
                    parts.append(values.clamp(min=sign).abs() / sizes.clamp(min=1.0))
            largest = torch.cat(parts).amax()
            found[name] = float(largest) if bool(torch.isfinite(largest)) else math.nan
        return found

    def violation(self, x: Tensor, y: Tensor) -> float:
        """The largest of :meth:`violations`; NaN if one is."""
        values = list(self.violations(x, y).values())
        return max(values) if all(v == v for v in values) else math.nan

    def multipliers(
        self, inequality: Tensor, equality: Tensor, bounds_lower: Tensor, bounds_upper: Tensor, level: str = "lower"
    ) -> dict[str, Tree]:
        """Multipliers of a level's rows and bounds under the names of the declaration.

        ``lower_inequality`` and the like are shaped like the values of the functions, with zeros in rows that were
        moved to the other level; ``lower_set`` has those of the set, shaped like y: upper minus lower bound's.
        """
        chosen = self.lower_level if level == "lower" else self.upper_level
        found: dict[str, Tree] = {}
        for values, kept in ((inequality, chosen.kept_inequality), (equality, chosen.kept_equality)):
            place = 0
            for part in kept:
                own = found.get(part.field)
                flat = values.new_zeros(part.total) if own is None else tree.ravel(own)
                flat[part.rows] = values[place : place + len(part.rows)]
                found[part.field] = tree.unravel(flat, self._likes[part.field])
                place += len(part.rows)
        if chosen.bounded:
            found[f"{level}_set"] = (self.y_tree if level == "lower" else self.x_tree)(bounds_upper - bounds_lower)
        return found

    def _values(self, field: str, x: Tensor, y: Tensor) -> Tensor:
        return tree.ravel(self.problem.constraint(field, self.x_tree(x), self.y_tree(y)))

    def _look(self, field: str, x: Tensor, y: Tensor) -> "_Look":
        """How the rows of one function depend on x and y."""
        with torch.no_grad():
            self._likes[field] = like = self.problem.constraint(field, self.x_like, self.y_like)
        first = tree.ravel(like)
        if x.dtype != y.dtype:
            raise ValueError(
                f"x0 is {x.dtype} and y0 is {y.dtype}: {field} depends on both as one vector; convert one of them, "
                "such as with .double()"
            )
        if not len(first):
            raise ValueError(f"{field} has no rows; leave it out")
        if first.dtype != self.dtype or first.device != self.device:
            raise ValueError(
                f"{field} returns {first.dtype} on {first.device}, but y is {self.dtype} on {self.device}; "
                "convert its constants with .to(y)"
            )
        if bool(torch.isnan(first).any()):
            where = torch.isnan(first).nonzero().reshape(-1).tolist()
            raise ValueError(f"{field} is NaN at (x0, y0) in rows {where[:5]}; start where it is defined")
        generator = torch.Generator().manual_seed(0)
        directions = tree.randn_like((x, y), generator)
        in_x, in_y = (torch.zeros(len(first), dtype=torch.bool, device=self.device) for _ in range(2))
        affine = torch.ones_like(in_x)
        before: tuple[Tensor, Tensor] | None = None
        step = torch.zeros_like(x), torch.zeros_like(y)
        for reach in REACHES:
            if reach >= 0:  # and then the mirror image of the same point
                step = displacement((x, y), generator)
            slopes = self._slopes(field, x + reach * step[0], y + reach * step[1], directions)
            # A slope that is not finite tells nothing but that the row is not constant there.
            in_x, in_y = in_x | (slopes[0] != 0), in_y | (slopes[1] != 0)
            if before is not None:
                for now, then in zip(slopes, before, strict=True):
                    affine &= same(now, then, then.abs())
            before = slopes
        if field.startswith("lower") and not bool(in_y.any()):
            raise ValueError(
                f"{field} does not depend on y in any of its {len(first)} rows, so that it does not restrict the lower "
                f"problem: declare it as upper_{field.partition('_')[2]}, check the order of the arguments (x, y), and "
                "that the graph is not cut by .item(), .detach() or numpy"
            )
        if not bool((in_x | in_y).any()):
            raise ValueError(f"{field} depends neither on x nor on y; remove it, or check that the graph is not cut")
        return _Look(in_y=in_y, affine=affine, total=len(first))

    def _slopes(self, field: str, x: Tensor, y: Tensor, directions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Derivatives along a direction of x and one of y; zeros where the function has no graph to that one."""
        found = []
        for k, direction in enumerate(directions):

            def rows(v: Tensor, k: int = k) -> Tensor:
                values = self._values(field, v, y) if k == 0 else self._values(field, x, v)
                return values + 0.0 * v.sum().nan_to_num(0.0, 0.0, 0.0)  # keeps a graph for rows without v

            found.append(Jacobian(rows, x if k == 0 else y) @ direction)
        return found[0], found[1]

    def _level(self, name: str, looks: "dict[str, _Look]", chosen: ConvexSet, like: Tree) -> Level:
        own = describe(chosen, like)
        parts: dict[str, list[tuple[Kept, Tensor]]] = {"inequality": [], "equality": []}
        for kind, found in parts.items():
            for source in ("lower", "upper"):
                field = f"{source}_{kind}"
                if field not in looks:
                    continue
                look = looks[field]
                mine = look.in_y if source == "lower" else torch.ones_like(look.in_y)
                if name == "upper" and source == "lower":
                    mine = ~mine
                elif name != source:
                    continue
                if bool(mine.any()):
                    rows = mine.nonzero().reshape(-1)
                    found.append((Kept(field=field, rows=rows, total=look.total), look.affine[rows]))
        kept = {kind: tuple(k for k, _ in found) for kind, found in parts.items()}
        straight = {kind: all(bool(a.all()) for _, a in found) for kind, found in parts.items()}
        sizes = {kind: sum(len(k.rows) for k in found) for kind, found in kept.items()}
        return Level(
            inequality=self._stacked(kept["inequality"], own, "inequality", name),
            equality=self._stacked(kept["equality"], own, "equality", name),
            inequalities=sizes["inequality"] + len(own.h) + _curved(own, tree.ravel(like)),
            equalities=sizes["equality"] + len(own.b),
            lower=own.lower,
            upper=own.upper,
            affine=straight["inequality"] and straight["equality"] and not own.curved,
            affine_equality=straight["equality"],
            kept_inequality=kept["inequality"],
            kept_equality=kept["equality"],
        )

    def _stacked(self, kept: tuple[Kept, ...], own: Description, kind: str, name: str) -> Rows:
        of_set = getattr(own, kind)

        def rows(x: Tensor, y: Tensor) -> Tensor:
            parts = []
            for part in kept:
                values = self._values(part.field, x, y)
                parts.append(values if len(part.rows) == part.total else values[part.rows])
            return torch.cat([*parts, of_set(y if name == "lower" else x)])

        return rows


@dataclass(frozen=True, kw_only=True)
class _Look:
    """Which rows depend on y, and which are affine in (x, y)."""

    in_y: Tensor
    affine: Tensor
    total: int


def _moved_note(field: str, look: _Look) -> list[str]:
    if not field.startswith("lower") or bool(look.in_y.all()):
        return []
    rows = (~look.in_y).nonzero().reshape(-1).tolist()
    shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    said = "row {} does" if len(rows) == 1 else "rows {} do"
    moved = "was" if len(rows) == 1 else "were"
    return [f"{field}: {said.format(shown)} not depend on y and {moved} moved to the upper level"]


def _curved(own: Description, flat: Tensor) -> int:
    return sum(len(rows(flat)) for rows in own.curved)


def row_sizes(rows: Rows, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean norms of the gradients of the rows in (x, y), and their values."""
    both = Jacobian(lambda z: rows(z[: len(x)], z[len(x) :]) + 0.0 * z.sum(), torch.cat([x, y]))
    matrix: Any = both.to_dense()
    return torch.linalg.vector_norm(matrix, dim=1), both.value
