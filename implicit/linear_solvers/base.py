"""What every linear solver takes and returns."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit import tree
from implicit.operators import LinearOperator
from implicit.status import ConvergenceWarning, Status
from implicit.tree import Tree

Apply = Callable[[Tensor], Tensor]
"""Maps the rows of a ``(k, n)`` matrix."""


@dataclass(frozen=True)
class LinearSolution:
    """The answer to ``A v = b`` and how good it is.

    Attributes:
        value: v, with the structure of A's domain.
        residual: ``||b - A v||``, computed from A itself; for k right-hand sides the largest.
        relative_residual: ``residual / ||b||`` (the largest over right-hand sides; zero for b = 0).
        steps: iterations.
        products: products with A and with its transpose, including those that checked the residual.
        status: CONVERGED, STEP_LIMIT, STALLED, NONFINITE or LINEAR_SOLVE_FAILED, read off the true residual; the
            worst over right-hand sides.
        indefinite: whether a direction of negative (CG: non-positive) curvature was met.
        message: one sentence.
        singular: whether A was found to be singular to working precision (direct solvers) or the system to have no
            solution; v is then a least-squares solution, of minimum norm where the solver promises it.
        inertia: numbers of positive, negative and zero eigenvalues, from solvers that find them.
        method: the solver that answered; :class:`AutoSolver` adds why it was chosen.
    """

    value: Tree
    residual: float
    relative_residual: float
    steps: int
    products: int
    status: Status
    indefinite: bool = False
    message: str = ""
    singular: bool = False
    inertia: tuple[int, int, int] | None = None
    method: str = ""

    @property
    def success(self) -> bool:
        """Whether the requested residual was reached."""
        return self.status is Status.CONVERGED


@dataclass(frozen=True)
class FlatSolution:
    """The same for ravelled right-hand sides of shape ``(k, m)``; used inside the engine."""

    value: Tensor  # (k, n)
    residuals: Tensor  # (k,)
    norms: Tensor  # (k,) of the right-hand sides
    steps: int
    status: Status
    indefinite: bool
    message: str
    singular: bool = False
    inertia: tuple[int, int, int] | None = None
    method: str = ""
    transposed_products: int = 0  # with an A^T that keeps a count of its own


class Preconditioner(ABC):
    """Builds an approximation of ``A^{-1}`` for CG and its relatives."""

    @abstractmethod
    def init(self, operator: LinearOperator) -> Apply:
        """A map of rows ``(k, n)``, symmetric positive definite, close to the inverse of ``operator``."""


class LinearSolver(ABC):
    """Solves ``A v = b`` for operators on trees.

    ``init`` prepares (factorises, builds a preconditioner) once per operator; ``solve_flat`` answers any number of
    right-hand sides with it; :meth:`solve` does both. ``transpose`` turns what was prepared for A into what
    ``A^T u = c`` needs, without preparing again.
    """

    @abstractmethod
    def init(self, operator: LinearOperator) -> Any:
        """Whatever can be reused between right-hand sides."""

    @abstractmethod
    def solve_flat(self, operator: LinearOperator, prepared: Any, b: Tensor, x0: Tensor | None) -> FlatSolution:
        """Solve for the rows of ``b``, shape ``(k, n)``."""

    def transpose(self, prepared: Any) -> Any:
        """What ``init(operator.T)`` would return, from ``prepared = init(operator)``."""
        return prepared

    def solve(
        self,
        operator: LinearOperator,
        b: Tree,
        *,
        x0: Tree | None = None,
        batched: bool = False,
        prepared: Any = None,
    ) -> LinearSolution:
        """Solve ``A v = b``.

        Args:
            operator: A.
            b: the right-hand side, shaped like what the operator returns; with ``batched=True`` its leaves carry a
                leading axis of k right-hand sides.
            x0: a starting point; zero by default. Direct solvers ignore it.
            batched: whether b holds k right-hand sides.
            prepared: what :meth:`init` returned for this operator (or :meth:`transpose` of what it returned for the
                transposed one), so that it is not computed again.

        Raises:
            ValueError: if b or x0 does not have the structure, shapes and dtype that the operator asks for, or the
                solver is not made for this kind of operator.

        Warns:
            ConvergenceWarning: if A is singular to working precision, so that v is one solution of many.

        Example:
            >>> import torch, implicit
            >>> A = implicit.Dense(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), symmetric=False)
            >>> solver = implicit.LU()
            >>> factors = solver.init(A)
            >>> solver.solve(A, torch.tensor([3.0, 1.0]), prepared=factors).value
            tensor([1., 1.])
            >>> solver.solve(A.T, torch.tensor([2.0, 2.0]), prepared=solver.transpose(factors)).value
            tensor([1., 1.])
        """
        rows = _rows(operator.out, b, batched, "b")
        start = None if x0 is None else _rows(operator.like, x0, batched, "x0")
        before = operator.products
        with torch.no_grad():
            ready = self.init(operator) if prepared is None else prepared
            flat = self.solve_flat(operator, ready, rows.detach(), start)
        if flat.singular and flat.status is Status.CONVERGED:
            warnings.warn(f"{type(self).__name__}: {flat.message}", ConvergenceWarning, stacklevel=2)
        value = tree.unravel(flat.value if batched else flat.value[0], operator.like)
        worst = float(flat.residuals.max()) if len(flat.residuals) else 0.0
        return LinearSolution(
            value=value,
            residual=worst,
            relative_residual=relative(flat.residuals, flat.norms),
            steps=flat.steps,
            products=operator.products - before + flat.transposed_products,
            status=flat.status,
            indefinite=flat.indefinite,
            message=flat.message,
            singular=flat.singular,
            inertia=flat.inertia,
            method=flat.method or type(self).__name__,
        )


def _rows(like: Tree, value: Tree, batched: bool, name: str) -> Tensor:
    """``value`` as the rows of a ``(k, n)`` matrix."""
    aligned = tree.map(lambda _, leaf: leaf, like, value)
    for own, leaf in zip(tree.leaves(like), tree.leaves(aligned), strict=True):
        shape = leaf.shape[1:] if batched and leaf.ndim else leaf.shape
        if shape != own.shape or leaf.dtype != own.dtype or (batched and not leaf.ndim):
            expected = tree.describe(like) + (", each with a leading axis" if batched else "")
            raise ValueError(f"{name} is {tree.describe(aligned)}; the operator acts on {expected}")
    return tree.ravel_batch(aligned) if batched else tree.ravel(aligned)[None]


def relative(residuals: Tensor, norms: Tensor) -> float:
    """The largest residual relative to its right-hand side; as it is where that is zero."""
    if not len(residuals):
        return 0.0
    zero = norms == 0
    return float(torch.where(zero, residuals, residuals / torch.where(zero, 1.0, norms)).max())


def power_of_two(b: Tensor) -> Tensor:
    """The size of each row rounded to a power of two, shape (k, 1): dividing by it is exact."""
    if not b.numel():
        return b.new_ones(b.shape[0], 1)
    largest = b.abs().amax(dim=1, keepdim=True)
    usable = torch.isfinite(largest) & (largest > 0)
    # The exponents at both ends of the range have no representable reciprocal.
    end = math.floor(math.log2(torch.finfo(b.dtype).max))
    return torch.exp2(torch.log2(torch.where(usable, largest, 1.0)).floor().clamp(2.0 - end, end - 1.0))


def require_square(operator: LinearOperator, name: str) -> None:
    """Refuse a rectangular operator."""
    rows, columns = operator.shape
    if rows != columns:
        raise ValueError(f"{name} needs a square operator, got {rows} x {columns}; use LSMR or NormalCG")


def require_symmetric(operator: LinearOperator, name: str, instead: str) -> None:
    """Refuse an operator that is not declared symmetric."""
    require_square(operator, name)
    if not operator.symmetric:
        raise ValueError(
            f"{name} needs a symmetric operator, {type(operator).__name__} is not declared so; set symmetric=True if "
            f"it is, or use {instead}"
        )


class Normalised(NamedTuple):
    """Right-hand sides divided by powers of two, with what a direct solver compares their residuals with.

    Attributes:
        b: ``(k, n)``.
        scale: ``(k, 1)``; what b was divided by.
        norms: of the rows of b.
        targets: residuals that are small enough.
    """

    b: Tensor
    scale: Tensor
    norms: Tensor
    targets: Tensor


def normalised(b: Tensor, rtol: float | None, atol: float) -> Normalised:
    """``b`` with entries of size one, so that neither overflow nor underflow decides."""
    scale = power_of_two(b)
    b = b / scale
    norms = torch.linalg.vector_norm(b, dim=1)
    targets = torch.clamp((default_rtol(b.dtype) if rtol is None else rtol) * norms, min=atol / scale[:, 0])
    return Normalised(b, scale, norms, targets)


def default_rtol(dtype: torch.dtype) -> float:
    """``sqrt(eps)`` of the dtype: 1.5e-8 in float64, 3.5e-4 in float32."""
    return float(torch.finfo(dtype).eps) ** 0.5


def check_tolerances(rtol: float | None, atol: float, max_steps: int | None) -> None:
    """Validation shared by the solvers' ``__post_init__``."""
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"rtol must be None or >= 0, got {rtol}")
    if not atol >= 0:
        raise ValueError(f"atol must be >= 0, got {atol}")
    if max_steps is not None:
        check_positive_int(max_steps, "max_steps", "None or ")


def check_positive_int(value: object, name: str, otherwise: str = "") -> None:
    """Refuse anything but a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be {otherwise}a positive integer, got {value!r}")
