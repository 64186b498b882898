"""What every linear solver takes and returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.operators import LinearOperator
from implicit.status import Status
from implicit.tree import Tree

Apply = Callable[[Tensor], Tensor]
"""Maps the rows of a ``(k, n)`` matrix."""


@dataclass(frozen=True)
class LinearSolution:
    """The answer to ``A v = b`` and how good it is.

    Attributes:
        value: v, with the structure of b.
        residual: ``||b - A v||``, computed from A itself; for k right-hand sides the largest.
        relative_residual: ``residual / ||b||`` (the largest over right-hand sides; zero for b = 0).
        steps: iterations.
        products: products with A, including those that checked the residual.
        status: CONVERGED, STEP_LIMIT, STALLED, NONFINITE or LINEAR_SOLVE_FAILED, read off the true residual.
        indefinite: whether a direction of non-positive curvature was met.
        message: one sentence.
    """

    value: Tree
    residual: float
    relative_residual: float
    steps: int
    products: int
    status: Status
    indefinite: bool = False
    message: str = ""

    @property
    def success(self) -> bool:
        """Whether the requested residual was reached."""
        return self.status is Status.CONVERGED


@dataclass(frozen=True)
class FlatSolution:
    """The same for ravelled right-hand sides of shape ``(k, n)``; used inside the engine."""

    value: Tensor  # (k, n)
    residuals: Tensor  # (k,)
    norms: Tensor  # (k,) of the right-hand sides
    steps: int
    status: Status
    indefinite: bool
    message: str


class Preconditioner(ABC):
    """Builds an approximation of ``A^{-1}`` for CG and its relatives."""

    @abstractmethod
    def init(self, operator: LinearOperator) -> Apply:
        """A map of rows ``(k, n)``, symmetric positive definite, close to the inverse of ``operator``."""


class LinearSolver(ABC):
    """Solves ``A v = b`` for operators on trees.

    ``init`` prepares (factorises, builds a preconditioner) once per operator; ``solve_flat`` answers any number of
    right-hand sides with it; :meth:`solve` does both.
    """

    @abstractmethod
    def init(self, operator: LinearOperator) -> Any:
        """Whatever can be reused between right-hand sides."""

    @abstractmethod
    def solve_flat(self, operator: LinearOperator, prepared: Any, b: Tensor, x0: Tensor | None) -> FlatSolution:
        """Solve for the rows of ``b``, shape ``(k, n)``."""

    def solve(
        self, operator: LinearOperator, b: Tree, *, x0: Tree | None = None, batched: bool = False
    ) -> LinearSolution:
        """Solve ``A v = b``.

        Args:
            operator: A.
            b: the right-hand side, shaped like the operator's domain; with ``batched=True`` its leaves carry a leading
                axis of k right-hand sides.
            x0: a starting point; zero by default. Direct solvers ignore it.
            batched: whether b holds k right-hand sides.

        Raises:
            ValueError: if b or x0 does not have the structure, shapes and dtype of the operator's domain.
        """
        rows = _rows(operator, b, batched, "b")
        start = None if x0 is None else _rows(operator, x0, batched, "x0")
        before = operator.products
        with torch.no_grad():
            flat = self.solve_flat(operator, self.init(operator), rows.detach(), start)
        value = tree.unravel(flat.value if batched else flat.value[0], operator.like)
        worst = float(flat.residuals.max()) if len(flat.residuals) else 0.0
        return LinearSolution(
            value=value,
            residual=worst,
            relative_residual=_relative(flat.residuals, flat.norms),
            steps=flat.steps,
            products=operator.products - before,
            status=flat.status,
            indefinite=flat.indefinite,
            message=flat.message,
        )


def _rows(operator: LinearOperator, value: Tree, batched: bool, name: str) -> Tensor:
    """``value`` as the rows of a ``(k, n)`` matrix."""
    aligned = tree.map(lambda _, leaf: leaf, operator.like, value)
    for own, leaf in zip(tree.leaves(operator.like), tree.leaves(aligned), strict=True):
        shape = leaf.shape[1:] if batched and leaf.ndim else leaf.shape
        if shape != own.shape or leaf.dtype != own.dtype or (batched and not leaf.ndim):
            expected = tree.describe(operator.like) + (", each with a leading axis" if batched else "")
            raise ValueError(f"{name} is {tree.describe(aligned)}; the operator acts on {expected}")
    return tree.ravel_batch(aligned) if batched else tree.ravel(aligned)[None]


def _relative(residuals: Tensor, norms: Tensor) -> float:
    if not len(residuals):
        return 0.0
    zero = norms == 0
    return float(torch.where(zero, residuals, residuals / torch.where(zero, 1.0, norms)).max())


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
