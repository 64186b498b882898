"""What all methods for constrained problems share: settings, state, and the measurement at the end."""

from abc import abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from constrained.lagrangian import Lagrangian, Point
from constrained.multipliers import FlatMultipliers
from constrained.problem import Problem
from constrained.residual import KKTResidual, bound_gaps, measure
from implicit import IterativeMethod, State, Status
from implicit.tree import Tree

_EIGEN_LIMIT = 500  # a dense eigenvalue problem of this size takes a tenth of a second


@dataclass(kw_only=True)
class ConstrainedState(State):
    """Fields that every method has; all vectors are ravelled.

    Attributes:
        x: the iterate, shape (n,).
        equality, inequality: multipliers of h, shape (m,), and of c, shape (p,).
        lower, upper: multipliers of the bounds, shape (n,), at least zero.
        generator: the only one of the run.
        point: values and derivatives at x; not saved, evaluated again when it is None.
        verdict: a status that the step has established, by name; empty while there is none.
    """

    x: Tensor
    equality: Tensor
    inequality: Tensor
    lower: Tensor
    upper: Tensor
    generator: torch.Generator
    point: Point | None = field(default=None, metadata={"transient": True})
    verdict: str = ""

    @property
    def multipliers(self) -> FlatMultipliers:
        """All multipliers."""
        return FlatMultipliers(self.equality, self.inequality, self.lower, self.upper)

    def at(self, lagrangian: Lagrangian) -> Point:
        """The point at x."""
        if self.point is None:
            self.point = lagrangian.at(self.x)
        return self.point


C = TypeVar("C", bound=ConstrainedState)


@dataclass(frozen=True, kw_only=True)
class ConstrainedMethod(IterativeMethod[C], Generic[C]):
    """Base of the methods: frozen settings, validated when built, resolved against a problem.

    What the driver calls the problem is a :class:`constrained.Lagrangian`: flat vectors, counted evaluations.

    Args:
        atol: the largest :class:`constrained.KKTResidual` that counts as solved; None means 1e-8 in float64 and 1e-4
            in float32.
    """

    atol: float | None = None

    default_max_steps: ClassVar[int]

    def __post_init__(self) -> None:
        if self.atol is not None and not self.atol > 0:
            raise ValueError(f"atol must be positive or None, got {self.atol!r}")

    @property
    def name(self) -> str:
        """The class name."""
        return type(self).__name__

    def refuses(self, problem: Problem) -> str | None:
        """Why this method does not fit ``problem``, naming the field and a method that does; None if it fits."""
        return None

    def resolve(self, problem: Lagrangian, *start: Tensor, max_steps: int | None = None) -> Self:
        """The same method with every None filled in."""
        return self if self.atol is not None else replace(self, atol=default_atol(problem.dtype))

    @abstractmethod
    def init(self, problem: Lagrangian, *start: Any, generator: torch.Generator | None = None) -> C:
        """A state at ``start = (x0, multipliers)``: a vector, and :class:`FlatMultipliers` or None to estimate them."""

    def merit(self, problem: Lagrangian) -> str | None:
        """The value by which the best point of a run that ends early is chosen."""
        return "residual"

    def point(self, state: C) -> Tree:
        """The iterate with its multipliers."""
        return (state.x, *state.multipliers)

    def settings(self) -> dict[str, Any]:
        """Fields and values, for reports."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def assess(
        self, problem: Lagrangian, x: Tensor, multipliers: FlatMultipliers, status: Status
    ) -> tuple[KKTResidual, float | None, Status, str]:
        """Measure the end point afresh, and confirm or correct the status; with a sentence about it."""
        assert self.atol is not None
        point = problem.at(x)
        residual = KKTResidual(*measure(problem, point, multipliers).tolist())
        curvature = smallest_curvature(problem, point, multipliers) if point.finite else None
        solved = residual.largest <= self.atol
        negative = curvature is not None and curvature < -(self.atol**0.5)
        text = f"KKT residual {residual.largest:.3g}"
        if status is Status.CONVERGED and not solved:
            return residual, curvature, Status.STALLED, f"{text} when measured again, above atol = {self.atol:.3g}"
        if status is Status.CONVERGED and negative:
            message = f"stopped at a KKT point that is no minimum: relative curvature {curvature:.3g}; start elsewhere"
            return residual, curvature, Status.STALLED, message
        if status in (Status.STALLED, Status.STEP_LIMIT, Status.TIME_LIMIT) and solved and not negative:
            status = Status.CONVERGED
        return residual, curvature, status, f"{status.value}; {text}"


def default_atol(dtype: torch.dtype) -> float:
    """1e-8 in float64, 1e-4 in float32: about the square root of the rounding unit."""
    return 1e-8 if dtype == torch.float64 else 1e-4


def smallest_curvature(
    problem: Lagrangian, point: Point, multipliers: FlatMultipliers, noise: float = 1e-4
) -> float | None:
    """The smallest eigenvalue of ``Z^T H Z`` relative to the size of H; Z spans the null space of the gradients of h
    and of the active constraints and bounds. None if matrices are not formed or too large.

    The size is the largest entry of H, or of the constraints' Hessians times ``noise`` if that is more: multipliers
    that are zero up to rounding have no curvature.
    """
    if not problem.dense or problem.n > _EIGEN_LIMIT:
        return None
    hessian = point.hessian(torch.cat([multipliers.equality, multipliers.inequality])).to_dense()
    jacobian = point.jacobian.to_dense()
    if not bool(torch.isfinite(hessian).all() & torch.isfinite(jacobian).all()):
        return None
    tolerance = float(torch.finfo(hessian.dtype).eps) ** (1 / 3)
    rows = torch.linalg.vector_norm(jacobian, dim=1)
    active = torch.ones_like(rows, dtype=torch.bool)
    active[problem.equalities :] = point.inequality >= -tolerance * torch.clamp(rows[problem.equalities :], min=1.0)
    fixed = torch.stack([gap >= -tolerance for gap in bound_gaps(problem, point.x)]).any(dim=0)
    hessian, normals = hessian[~fixed][:, ~fixed], jacobian[active][:, ~fixed]
    basis = null_space(normals)
    if not basis.shape[1]:
        return float("inf")
    values = torch.linalg.eigvalsh(basis.T @ hessian @ basis)
    size = hessian.abs().amax()
    if problem.constraints:
        unit = point.hessian(point.constraints.new_ones(problem.constraints), 0.0).to_dense()
        size = torch.maximum(size, noise * unit.abs().amax())
    return float(values[0] / size.clamp(min=torch.finfo(values.dtype).tiny))


def null_space(rows: Tensor) -> Tensor:
    """An orthonormal basis of ``{v : rows v = 0}``, shape (n, n - rank); rows count by direction, not by size."""
    n = rows.shape[1]
    sizes = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    scaled = rows / torch.where(sizes > 0, sizes, 1.0)
    if not len(rows):
        return torch.eye(n, dtype=rows.dtype, device=rows.device)
    _, values, right = torch.linalg.svd(scaled, full_matrices=True)
    rank = int((values > max(rows.shape) * torch.finfo(rows.dtype).eps * values.amax()).sum()) if len(values) else 0
    return right[rank:].T
