"""Polyhedra: linear equations, inequalities and bounds."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from constrained.qp.active_set import Dual
from constrained.qp.arguments import Bound, collect, followed, guess_active
from constrained.qp.scaling import Data, scaled
from constrained.qp.solution import QPSolution
from constrained.qp.solve import Task, solve_data
from constrained.qp.solver import INFEASIBLE
from constrained.sets.affine import Affine, HalfSpace
from constrained.sets.base import ConvexSet, Gaps
from constrained.sets.box import Box
from implicit import tree
from implicit.transforms import is_tracked
from implicit.tree import Tree


@dataclass(frozen=True, eq=False, kw_only=True)
class Polyhedron(ConvexSet):
    """A polyhedron, ``C = {z : A z = b, G z <= h, lower <= z <= upper}``, in the ravelled point.

    A projection is a quadratic program with ``Q = I``, solved on its dual by active sets to rounding; ``G G'`` and
    the like are computed once. From an earlier projection it needs one or two factorizations of the active rows.
    Where only bounds, only equations, or one inequality are given, the closed form is used.

    Args:
        A: ``(m, n)``, for the ravelled point.
        b: ``(m,)``.
        G: ``(p, n)``.
        h: ``(p,)``, ``inf`` where there is no constraint.
        lower: a number or ``(n,)``.
        upper: likewise.

    Raises:
        TypeError: if an argument is not a floating-point tensor (or, for bounds, a number).
        ValueError: if nothing is given, if shapes, dtypes or devices do not fit together, or if A comes without b or G
            without h.

    Example:
        >>> import torch
        >>> box_and_plane = Polyhedron(A=torch.ones(1, 3), b=torch.tensor([1.0]), lower=0.0, upper=0.5)
        >>> box_and_plane.project(torch.tensor([2.0, 0.4, 0.0]))
        tensor([0.5000, 0.4500, 0.0500])
    """

    A: Tensor | None = None
    b: Tensor | None = None
    G: Tensor | None = None
    h: Tensor | None = None
    lower: Bound = None
    upper: Bound = None
    _size: int | None = field(init=False, repr=False)  # n, None where numbers fit any point
    _closed: Box | Affine | HalfSpace | None = field(init=False, repr=False)
    _gram: Dual | None = field(init=False, repr=False)  # None where it has to follow the arguments

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("A", "b", "G", "h", "lower", "upper")}
        if all(value is None for value in given.values()):
            raise ValueError("Polyhedron has no constraint: give A and b, G and h, lower or upper, or use WholeSpace()")
        like = next((v for v in given.values() if isinstance(v, Tensor) and v.ndim), None)
        object.__setattr__(self, "_size", None if like is None else self._width(like))
        object.__setattr__(self, "_gram", None)
        if like is not None:
            data, single = self._data(like.new_zeros(self._width(like)))
            if not single:
                raise ValueError("Polyhedron describes one set: give its arguments without a batch axis")
            if not any(is_tracked(t) for t in data.tensors):
                with torch.no_grad():
                    object.__setattr__(self, "_gram", Dual.of(scaled(data)[0].C))
        object.__setattr__(self, "_closed", self._closed_form())

    def _width(self, like: Tensor) -> int:
        matrix = next((m for m in (self.A, self.G) if isinstance(m, Tensor) and m.ndim), None)
        vectors = [v for v in (self.lower, self.upper) if isinstance(v, Tensor) and v.ndim]
        if matrix is None and not vectors:
            raise ValueError(
                f"Polyhedron has a right-hand side of shape {tuple(like.shape)} without its matrix: give both"
            )
        return int((vectors[0] if matrix is None else matrix).shape[-1])

    def _closed_form(self) -> Box | Affine | HalfSpace | None:
        unbounded = self.lower is None and self.upper is None
        if self.A is None and self.G is None:
            return Box(self.lower, self.upper)
        if unbounded and self.G is None and self.A is not None and self.b is not None:
            return Affine(self.A, self.b)
        if not unbounded or self.A is not None or self.G is None or self.h is None or len(self.G) != 1:
            return None
        usable = bool(self.h.isfinite().all()) and bool(self.G.any())
        return HalfSpace(self.G[0], self.h[0]) if usable else None

    def _data(self, flat: Tensor) -> tuple[Data, bool]:
        return collect(None, -flat, self.A, self.b, self.G, self.h, self.lower, self.upper)

    def project(self, point: Tree, start: Tree | QPSolution | None = None) -> Tree:
        """``argmin_{p in C} ||p - point||_2``, accurate to rounding; see :meth:`ConvexSet.project`.

        Differentiable, any number of times, in the point and in the tensors of the set, and under ``torch.func``;
        with a warning where it has a kink, or where dependent constraints are active. Reads on the host.

        Args:
            point: a tree with n entries; or one tensor ``(..., n)``, whose rows are projected together.
            start: where to look first: the projection of a point nearby, shaped like ``point``, or what :meth:`solve`
                returned. It saves time and does not change the result.

        Raises:
            SolveError: if the set is empty.

        Warns:
            ConvergenceWarning: where rounding keeps the result from the usual accuracy.
        """
        if self._closed is not None:
            return self._project_closed(self._closed, point)
        found = self.solve(point, start).x
        return tree.unravel(found, point) if found.ndim == 1 else found.reshape(point.shape)

    def _project_closed(self, closed: Box | Affine | HalfSpace, point: Tree) -> Tree:
        flat = self._flat(point, "point")
        if flat.ndim == 1 or isinstance(closed, Box):
            projected = closed.project(flat)
        else:
            projected = torch.func.vmap(closed.project)(flat)
        return tree.unravel(projected, point) if flat.ndim == 1 else projected.reshape(point.shape)

    def solve(self, point: Tree, start: Tree | QPSolution | None = None) -> QPSolution:
        """The projection as a quadratic program, with multipliers; in the ravelled point, ``(n,)`` or ``(rows, n)``.

        Arguments as in :meth:`project`.
        """
        flat = self._flat(point, "point")
        data, single = self._data(flat)
        data = replace(data, Q=torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)[None])
        near = start if start is None or isinstance(start, QPSolution) else self._flat(start, "start")
        guess = guess_active(near, data)
        task = Task(
            atol=None,
            max_steps=100,
            raises=(INFEASIBLE,),
            differentiable=followed(data),
            guessed=guess is not None,
            single=single,
            projection=True,
            dual=self._gram,
        )
        return solve_data(task, data, guess)

    def _flat(self, point: Tree, name: str) -> Tensor:
        self.check(point, name)
        if self._rows(point):
            return point.reshape(-1, point.shape[-1])
        return tree.ravel(point)

    def _rows(self, point: Tree) -> bool:
        """Whether the point is one tensor that holds several points."""
        return (
            isinstance(point, Tensor)
            and point.ndim > 1
            and point.shape[-1] == self._size
            and point.numel() != self._size
        )

    def check(self, point: Tree, name: str) -> None:
        """See :meth:`ConvexSet.check`; the point must have n entries, or be one tensor of shape (..., n)."""
        super().check(point, name)
        tree.common_dtype(point, name)
        if self._size is not None and not self._rows(point) and tree.size(point) != self._size:
            raise ValueError(
                f"{name} has {tree.size(point)} entries, but Polyhedron constrains {self._size}: give a point with "
                f"{self._size} entries, or one tensor of shape (..., {self._size})"
            )

    def _gaps(self, point: Tree, projected: Tree) -> Gaps:
        if not self._rows(point):
            return super()._gaps(point, projected)
        distance = torch.linalg.vector_norm(point - projected, dim=-1)
        return [(distance, torch.linalg.vector_norm(projected, dim=-1).clamp(min=1))]
