"""Projections of pairs (x, y) onto everything that a bilevel problem declares about them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel.curved_projection import CurvedProjection, sparse_jacobian
from bilevel.flat import FlatProblem
from constrained.qp.active_set import accuracy
from constrained.qp.row_projection import RowProjection
from constrained.qp.row_structure import RowStructure
from constrained.quadratic_program import solve_qp
from constrained.sets import ConvexSet
from implicit import SolveError, Status

DENSE_LIMIT = 4_000
"""Up to this many variables and rows together an empty set is proved, which needs matrices."""


@dataclass(frozen=True, kw_only=True, eq=False)
class JointPoint:
    """What :meth:`JointProjection.project` found.

    Attributes:
        x, y: the nearest pair, ``(n,)`` and ``(m,)``; the least infeasible one where the set is empty.
        multipliers: of the projection's rows, ``(rows,)``: for the next call. Those of inequalities are at least zero,
            in ``||(z - p) / scale||^2 / 2 + <multipliers, rows>``.
        outcome: status and error; of a closed form, which cannot fail, whether the given point is finite, ``()``, bool.
    """

    x: Tensor
    y: Tensor
    multipliers: Tensor
    outcome: tuple[Status, float] | Tensor

    @property
    def status(self) -> Status:
        """CONVERGED where the optimality conditions of the projection hold; INFEASIBLE where the set is empty, which
        for affine rows is proved and for others found by a local method: on convex rows, to its tolerance; NONFINITE
        where the given point is not finite; STALLED where rounding or rows that are not convex keep it from a verified
        answer.
        """
        return self._read[0]

    @property
    def error(self) -> float:
        """How far the conditions are from holding, relative to ``1 + max |z|``, in rows of length one; NaN where the
        given point is not finite.
        """
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[Status, float]:
        if isinstance(self.outcome, Tensor):
            return (Status.CONVERGED, 0.0) if bool(self.outcome) else (Status.NONFINITE, float("nan"))
        return self.outcome


class JointProjection:
    """The projection onto ``C = {(x, y) : x in X, y in Y, all constraints of both levels}``.

        (x, y) -> argmin over (u, v) in C of  ||(u - x) / scale_x||^2 + ||(v - y) / scale_y||^2

    in the vectors of a :class:`FlatProblem`. How it is computed is found by looking at the problem, once:

    - bounds alone are clipped; sets without constraint functions are projected onto one by one; a declared
      ``joint_set`` is used after it has been compared with what the constraints say at a few points. Whether such a
      call succeeded is read on the host only when it is asked for;
    - affine rows: a semismooth Newton method on the active rows and bounds, which from the multipliers of a projection
      nearby takes one or two linear systems. Variables that enter a single row are eliminated, so that the systems
      are as small as the number of variables that rows share; other factors are kept while the active rows stay;
    - other rows, convex ones: projections onto linearised rows with the exact Hessian of the Lagrangian, with
      :class:`constrained.InteriorPoint` behind them.

    No state is kept that would change a result: what a call starts from is given, and what it returns is for the next.

    Args:
        flat: the problem.
        x, y: a point at which rows are defined and differentiated, ``(n,)`` and ``(m,)``.
        scale: positive lengths ``(scale_x, scale_y)`` by which distances are measured, each ``(n,)``, ``(m,)``, or a
            number; ones by default.

    Attributes:
        method: a word for how it is computed: "bounds", "sets", "joint set", "affine rows" or "curved rows".
        rows: how many multipliers there are, none for the first three methods. Order: equations of the upper level,
            of the lower level, inequalities of the upper level, of the lower level.

    Raises:
        ValueError: if an equation is not affine, ``scale`` is not positive, or ``joint_set`` is not the set that the
            constraints describe.

    Example:
        >>> import torch
        >>> from bilevel import BilevelProblem
        >>> from bilevel.flat import FlatProblem
        >>> problem = BilevelProblem(
        ...     lambda x, y: (x - y).square().sum(), lambda x, y: y.square().sum(), lower_inequality=lambda x, y: x - y
        ... )
        >>> x, y = torch.tensor([1.0]), torch.tensor([0.0])
        >>> projection = JointProjection(FlatProblem(problem, x, y), x, y)
        >>> found = projection.project(x, y, projection.start())
        >>> found.x, found.y, found.multipliers
        (tensor([0.5000]), tensor([0.5000]), tensor([0.5000]))
    """

    def __init__(
        self,
        flat: FlatProblem,
        x: Tensor,
        y: Tensor,
        *,
        scale: tuple[Tensor | float, Tensor | float] | None = None,
    ) -> None:
        self.flat, self.n = flat, flat.n
        z = torch.cat([x, y]).detach()
        self._scale = _lengths(scale, x, y)
        upper, lower = flat.upper_level, flat.lower_level
        if not (upper.affine_equality and lower.affine_equality):
            name = "upper" if not upper.affine_equality else "lower"
            raise ValueError(
                f"{name}_equality is not affine in (x, y) together, so that the pairs that satisfy it form no convex "
                "set and have no projection: use KKTRelaxation, or replace it by a convex inequality"
            )
        self.equalities = upper.equalities + lower.equalities
        count = self.equalities + upper.inequalities + lower.inequalities
        self._lower, self._upper = (
            torch.cat([getattr(upper, side), getattr(lower, side)]) / self._lengths_or_one()
            for side in ("lower", "upper")
        )
        self._affine: RowProjection | None = None
        self._curved: CurvedProjection | None = None
        self._closed: Callable[[Tensor], Tensor] | None = None
        self.method = self._choose(z, count, affine=upper.affine and lower.affine)
        self.rows = count if self.method.endswith("rows") else 0

    def start(self) -> Tensor:
        """Multipliers for a first call, zeros, ``(rows,)``."""
        return torch.zeros(self.rows, dtype=self.flat.dtype, device=self.flat.device)

    def project(self, x: Tensor, y: Tensor, multipliers: Tensor) -> JointPoint:
        """The nearest pair.

        Args:
            x, y: ``(n,)`` and ``(m,)``.
            multipliers: what an earlier call returned, or :meth:`start`. They save time and do not change the result
                beyond rounding.
        """
        with torch.no_grad():
            point = torch.cat([x, y]).detach()
            if self._affine is not None:
                return self._by_rows(self._affine, point, multipliers)
            if self._curved is not None:
                return self._by_curved_rows(self._curved, point, multipliers)
            assert self._closed is not None
            finite = torch.isfinite(point).all()
            near = self._closed(torch.where(finite, point, 0.0))
            return self._found(torch.where(finite, near, point), multipliers, finite)

    def _choose(self, z: Tensor, count: int, affine: bool) -> str:
        problem = self.flat.problem
        if not count:
            own, self._closed = "bounds", self._clip
        elif not affine and not problem.constraints and self._scale is None and _succeeds(self._onto_sets, z):
            own, self._closed = "sets", self._onto_sets
        elif affine:
            own, self._affine = "affine rows", self._row_projection(z)
        else:
            own, unit = "curved rows", z / self._lengths_or_one()
            self._curved = CurvedProjection(self._unit_values, unit, self.equalities, self._lower, self._upper)
        if problem.joint_set is None or self._scale is not None or not _succeeds(self._onto_joint_set, z):
            return own
        self._compare(problem.joint_set, z, count)
        if self._closed is not None:
            return own
        self._affine = self._curved = None
        self._closed = self._onto_joint_set
        return "joint set"

    def _compare(self, chosen: ConvexSet, z: Tensor, count: int) -> None:
        """Refuse a declared set that is not what the constraints say."""
        generator = torch.Generator().manual_seed(0)
        blank = torch.zeros(count, dtype=z.dtype, device=z.device)
        tolerance = float(torch.finfo(z.dtype).eps) ** 0.35
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
        for reach in (0.3, -0.3, 3.0, -3.0, 30.0, -30.0):
            point = z + reach * (1 + z.abs()) * noise
            own = self.project(point[: self.n], point[self.n :], blank)
            here, there = self._onto_joint_set(point), torch.cat([own.x, own.y])
            away = float((here - there).abs().amax() / (1 + there.abs().amax()))
            if own.status is Status.CONVERGED and not away <= tolerance:
                raise ValueError(
                    f"joint_set = {type(chosen).__name__} is not the set of the pairs that satisfy upper_set, "
                    f"lower_set and the constraints: projections of the same pair differ by {away:.3g}; correct it, "
                    "or leave it out"
                )

    def _onto_sets(self, z: Tensor) -> Tensor:
        problem, flat = self.flat.problem, self.flat
        near_x = flat.flat_x(problem.upper_set.project(flat.x_tree(z[: self.n])))
        return torch.cat([near_x, flat.flat_y(problem.lower_set.project(flat.y_tree(z[self.n :])))])

    def _onto_joint_set(self, z: Tensor) -> Tensor:
        flat, chosen = self.flat, self.flat.problem.joint_set
        assert chosen is not None
        near_x, near_y = chosen.project((flat.x_tree(z[: self.n]), flat.y_tree(z[self.n :])))
        return torch.cat([flat.flat_x(near_x), flat.flat_y(near_y)])

    def _by_rows(self, rows: RowProjection, point: Tensor, multipliers: Tensor) -> JointPoint:
        target = point if self._scale is None else point / self._scale
        found = rows.project(target, multipliers / rows.unit)
        status, z, duals, error = Status.CONVERGED, found.z, found.multiplier, found.error
        if not error <= accuracy(z.dtype) ** 0.7:
            finite = torch.isfinite(point).all()
            if not bool(finite):
                return self._found(point, multipliers, finite)
            status, z, duals, error = _by_program(rows, target, found.z, found.multiplier, error)
        return self._found(z if self._scale is None else z * self._scale, duals * rows.unit, (status, error))

    def _by_curved_rows(self, rows: CurvedProjection, point: Tensor, multipliers: Tensor) -> JointPoint:
        finite = torch.isfinite(point).all()
        if not bool(finite):
            return self._found(point, multipliers, finite)
        z, duals, status, error = rows.project(point / self._lengths_or_one(), multipliers)
        return self._found(z * self._lengths_or_one(), duals, (status, error))

    def _found(self, z: Tensor, multipliers: Tensor, outcome: tuple[Status, float] | Tensor) -> JointPoint:
        return JointPoint(x=z[: self.n], y=z[self.n :], multipliers=multipliers, outcome=outcome)

    def _clip(self, z: Tensor) -> Tensor:
        length = self._lengths_or_one()
        return torch.minimum(torch.maximum(z, self._lower * length), self._upper * length)

    def _lengths_or_one(self) -> Tensor | float:
        return 1.0 if self._scale is None else self._scale

    def _values(self, z: Tensor) -> Tensor:
        x, y = z[: self.n], z[self.n :]
        levels = (self.flat.upper_level, self.flat.lower_level)
        return torch.cat([*(lv.equality(x, y) for lv in levels), *(lv.inequality(x, y) for lv in levels)])

    def _unit_values(self, u: Tensor) -> Tensor:
        return self._values(u if self._scale is None else u * self._scale)

    def _row_projection(self, z: Tensor) -> RowProjection:
        u = z / self._lengths_or_one()
        index, entries, values = sparse_jacobian(self._unit_values, u)
        structure = RowStructure.of(index, entries, (len(values), len(u)))
        return RowProjection(
            structure, structure.multiply(u[structure.order]) - values, self.equalities, self._lower, self._upper
        )


def _succeeds(project: Callable[[Tensor], Tensor], z: Tensor) -> bool:
    """Whether sets can be projected onto; an empty one is reported by the general method."""
    try:
        project(z)
    except SolveError:
        return False
    return True


def _by_program(
    rows: RowProjection, target: Tensor, z: Tensor, multiplier: Tensor, error: float
) -> tuple[Status, Tensor, Tensor, float]:
    """The projection by :func:`constrained.solve_qp`, which proves that a set is empty."""
    if len(target) + len(multiplier) > DENSE_LIMIT:
        return Status.STALLED, z, multiplier, error
    J, d, q = rows.program.rows.dense(), rows.program.d, rows.equalities
    found = solve_qp(
        torch.eye(len(target), dtype=target.dtype, device=target.device),
        -target,
        A=J[:q],
        b=d[:q],
        G=J[q:],
        h=d[q:],
        lower=rows.lower,
        upper=rows.upper,
        raise_on_failure=False,
    )
    status = found.status
    assert isinstance(status, Status)
    if status is Status.INFEASIBLE:
        return status, found.x, torch.zeros_like(multiplier), error
    if status is not Status.CONVERGED:
        return Status.STALLED, z, multiplier, error
    residual = float(torch.stack([found.stationarity, found.feasibility, found.complementarity]).amax())
    return status, found.x, torch.cat([found.equality, found.inequality]), residual


def _lengths(scale: tuple[Tensor | float, Tensor | float] | None, x: Tensor, y: Tensor) -> Tensor | None:
    if scale is None:
        return None
    found = torch.cat([torch.zeros_like(v) + length for v, length in zip((x, y), scale, strict=True)]).detach()
    if not bool((torch.isfinite(found) & (found > 0)).all()):
        raise ValueError("scale has entries that are not positive and finite: give lengths of the variables")
    return found
