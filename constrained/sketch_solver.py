"""Sketch-and-project: linear systems by random projections (Gower and Richtarik 2015)."""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from constrained.sketches import Kaczmarz, Sketch
from implicit import LinearOperator, LinearSolver, Status
from implicit.linear_solvers.base import (
    FlatSolution,
    check_positive_int,
    check_tolerances,
    default_rtol,
    power_of_two,
    relative,
)
from implicit.random import new_generator

CHUNK = 128
"""Steps that are taken together, by one triangular solve."""
GRAM_ROWS = 1000
"""Largest number of rows for which all inner products of rows are kept."""
VECTOR_STEPS, BLOCK_STEPS = 100_000, 10_000
"""Step limits for sketches of one column and of several."""


@dataclass(frozen=True, kw_only=True)
class SketchAndProject(LinearSolver):
    """Projects the iterate on the solutions of a few random combinations of the equations ``A z = b``, again and again:

    .. math:: z \\leftarrow z - A^T S (S^T A A^T S)^\\dagger S^T (A z - b).

    For any consistent system, square or not, symmetric or not; from a zero start the answer has minimum norm. The
    distance to the solution never grows and falls at a rate of about ``sigma_min^2 / ||A||_F^2`` per row, so that
    ``kappa_F^2 ln(1 / tolerance)`` steps are needed: far more than a Krylov method takes, which is what to use unless
    the random method itself is wanted.

    Steps with sketches of one column are taken many at a time without changing the result: if ``S`` holds the next K
    columns, the K successive step lengths solve ``L alpha = S^T r``, L being the lower triangle of ``S^T A A^T S``
    with its diagonal. The true residual is computed every ``check_every`` steps, and ends the iteration there. A start
    ``x0`` is always continued from, even where its residual is larger than b: the distance to the solution is what
    counts.

    ``init(operator, generator)`` draws from that generator from then on (a state's own, say); without one each ``init``
    starts a fresh one from ``seed``, so that every solve repeats itself. Solving again with what it returned continues
    the sequence of draws.

    Args:
        sketch: what is drawn.
        rtol: relative tolerance on the true residual; None means ``sqrt(eps)`` of the dtype.
        atol: absolute tolerance on the true residual.
        max_steps: step limit; None means 100,000 for sketches of one column, 10,000 for others.
        check_every: steps between two looks at the true residual; None means 1 for sketches of several columns, and
            for those of one column the number of rows rounded up to a multiple of 128, what is taken together.
        seed: of the draws.
        dense_size: largest dimension for which the matrix is written down once. Beyond, each step costs a product with
            ``A^T`` for every column of S.

    Raises:
        TypeError: if ``sketch`` is no Sketch.
        ValueError: if a number is out of its range.

    Example:
        >>> import torch, implicit, constrained
        >>> A = implicit.Dense(torch.tensor([[2.0, 1.0], [1.0, -1.0]]), positive_definite=False)
        >>> found = constrained.SketchAndProject().solve(A, torch.tensor([3.0, 0.0]))
        >>> found.success, torch.round(found.value, decimals=2)
        (True, tensor([1., 1.]))
    """

    sketch: Sketch = field(default_factory=Kaczmarz)
    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None
    check_every: int | None = None
    seed: int = 0
    dense_size: int = 2000

    def __post_init__(self) -> None:
        if not isinstance(self.sketch, Sketch):
            raise TypeError(f"sketch must be a Sketch such as Kaczmarz(), got {self.sketch!r}")
        check_tolerances(self.rtol, self.atol, self.max_steps)
        if self.check_every is not None:
            check_positive_int(self.check_every, "check_every", "None or ")
        check_positive_int(self.dense_size, "dense_size")

    def init(self, operator: LinearOperator, generator: torch.Generator | None = None) -> "SketchedSystem":
        """The matrix where it is small enough, and the generator of the draws."""
        generator = new_generator(self.seed, operator.device) if generator is None else generator
        dense = max(operator.shape, default=0) <= self.dense_size
        return SketchedSystem(operator.to_dense() if dense else None, generator)

    def transpose(self, prepared: "SketchedSystem") -> "SketchedSystem":
        """The same for ``A^T``, with the same generator."""
        return prepared.turned()

    def solve_flat(
        self, operator: LinearOperator, prepared: "SketchedSystem", b: Tensor, x0: Tensor | None
    ) -> FlatSolution:
        """Solve for the rows of ``b``, shape ``(k, m)``; all rows see the same draws."""
        backward = operator.T
        before = 0 if backward is operator else backward.products
        run = _Run(self, operator, backward, prepared, b, x0)
        status, message = run.loop()
        spent = 0 if backward is operator else backward.products - before
        scale = run.scale
        sizes, norms = run.sizes * scale[:, 0], run.norms * scale[:, 0]
        return FlatSolution(run.z * scale, sizes, norms, run.steps, status, False, message, transposed_products=spent)


class SketchedSystem:
    """What is kept of a system between right-hand sides.

    Attributes:
        matrix: A, shape ``(m, n)``, or None where it is known by products only.
        generator: of the draws.
    """

    def __init__(self, matrix: Tensor | None, generator: torch.Generator) -> None:
        self.matrix, self.generator = matrix, generator
        self._gram: Tensor | None = None
        self._squares: Tensor | None = None

    def turned(self) -> Self:
        """The same for the transpose."""
        return type(self)(None if self.matrix is None else self.matrix.T.contiguous(), self.generator)

    def gram(self) -> Tensor | None:
        """``A A^T`` where there is a small matrix."""
        if self._gram is None and self.matrix is not None and len(self.matrix) <= GRAM_ROWS:
            self._gram = self.matrix @ self.matrix.T
        return self._gram

    def squares(self, backward: LinearOperator) -> Tensor:
        """The squared norms of the rows, shape ``(m,)``; m products with ``A^T`` where there is no matrix."""
        if self._squares is None:
            rows = backward.shape[1]
            parts = []
            for start in range(0, rows, CHUNK):
                places = torch.arange(start, min(start + CHUNK, rows), device=backward.device)
                parts.append(self.images(places, backward).square().sum(dim=1))
            self._squares = torch.cat(parts) if parts else torch.zeros(0, dtype=backward.dtype)
        return self._squares

    def images(self, drawn: Tensor, backward: LinearOperator) -> Tensor:
        """``S^T A`` for the transpose of S, or for the indices of rows; shape ``(s, n)``."""
        if self.matrix is not None:
            return drawn @ self.matrix if drawn.is_floating_point() else self.matrix[drawn]
        if not drawn.is_floating_point():
            units = torch.zeros(len(drawn), backward.shape[1], dtype=backward.dtype, device=backward.device)
            drawn = units.scatter_(1, drawn[:, None], 1.0)
        return backward.flat_mm(drawn)


class _Run:
    """The moving parts of one call, for right-hand sides divided by ``scale``; ``r = A z - b``."""

    def __init__(
        self,
        solver: SketchAndProject,
        operator: LinearOperator,
        backward: LinearOperator,
        prepared: SketchedSystem,
        b: Tensor,
        x0: Tensor | None,
    ) -> None:
        self.solver, self.operator, self.backward, self.prepared = solver, operator, backward, prepared
        self.scale = power_of_two(b)
        self.b = b / self.scale
        self.norms = torch.linalg.vector_norm(self.b, dim=1)
        rtol = default_rtol(b.dtype) if solver.rtol is None else solver.rtol
        self.targets = torch.clamp(rtol * self.norms, min=solver.atol / self.scale[:, 0])
        self.z = b.new_zeros(len(b), operator.shape[1])
        if x0 is not None:  # the solution for b = 0 is known
            usable = torch.isfinite(x0).all(dim=1) & (self.norms > 0)
            self.z = torch.where(usable[:, None], x0.detach() / self.scale, self.z)
        self.r: Tensor  # as measured by the last look, and updated by the steps since
        self.sizes = self.norms
        self.active = torch.ones_like(self.norms)
        self.width = solver.sketch.width(operator.shape[0])
        self.steps = 0

    def residual(self) -> Tensor:
        """``A z - b``, computed anew."""
        matrix = self.prepared.matrix
        return (self.operator.flat_mm(self.z) if matrix is None else self.z @ matrix.T) - self.b

    def look(self) -> bool:
        """Measure the residuals and freeze the rows that are solved; whether the iterate is finite."""
        r = self.residual()
        sizes = torch.linalg.vector_norm(r, dim=1)
        if not bool(torch.isfinite(sizes).all()):
            return False
        self.r, self.sizes = r, sizes
        self.active = (sizes > self.targets).to(r.dtype)
        return True

    def loop(self) -> tuple[Status, str]:
        """Step until every row has reached its target."""
        if not bool(torch.isfinite(self.norms).all()):
            return Status.NONFINITE, "the right-hand side is not finite"
        if not self.look():
            return Status.NONFINITE, "a product with the operator is not finite"
        rows = self.operator.shape[0]
        single = self.width == 1
        limit = self.solver.max_steps or (VECTOR_STEPS if single else BLOCK_STEPS)
        every = self.solver.check_every or (-(-rows // CHUNK) * CHUNK if single else 1)
        like = self.b[0] if not self.solver.sketch.needs_squares else self.prepared.squares(self.backward)
        if not bool(torch.isfinite(like).all()):
            return Status.NONFINITE, "a row of the operator is not finite"
        while bool(self.active.any()):
            if self.steps >= limit:
                return Status.STEP_LIMIT, f"true residual not reached in {limit} steps"
            kept, before = self.z, self.sizes
            until = min(self.steps + every, limit)
            while self.steps < until:
                self.advance(min(CHUNK if single else 1, until - self.steps), like)
            if not self.look():
                self.z = kept
                return Status.NONFINITE, "a product with the operator is not finite"
            if self.width >= rows and bool(((self.sizes > 0.5 * before) & (self.active > 0)).any()):
                worst = relative(self.sizes, self.norms)
                text = f"a sketch of all rows no longer lowers the residual: relative residual {worst:.3g}"
                return Status.STALLED, text
        return Status.CONVERGED, f"true residual reached in {self.steps} steps"

    def advance(self, count: int, like: Tensor) -> None:
        """``count`` steps, or one with a block."""
        drawn = self.solver.sketch.draw(count, like, self.prepared.generator).to(self.z.device)
        self.steps += count
        if self.width == 1:
            self.vectors(drawn[:, 0])
        else:
            self.block(drawn[0])

    def sketched(self, drawn: Tensor) -> Tensor:
        """``S^T r``, shape ``(k, s)``."""
        return self.r @ drawn.T if drawn.is_floating_point() else self.r[:, drawn]

    def vectors(self, drawn: Tensor) -> None:
        """Successive steps with one column each, by forward substitution."""
        gram = None if drawn.is_floating_point() else self.prepared.gram()
        rows = self.prepared.images(drawn, self.backward)
        against = None if gram is None else gram[drawn]
        products = rows @ rows.T if against is None else against[:, drawn]
        pivots = products.diagonal()
        pivots.masked_fill_(pivots == 0, 1.0)  # the pseudo-inverse of zero: such a row of S^T A is zero
        alpha = torch.linalg.solve_triangular(products, self.sketched(drawn).T, upper=False).T * self.active[:, None]
        self.z = self.z - alpha @ rows
        self.r = self.residual() if against is None else self.r - alpha @ against

    def block(self, drawn: Tensor) -> None:
        """One step with several columns: the smallest d with ``S^T A d = S^T r``."""
        rows = self.prepared.images(drawn, self.backward)
        self.z = self.z - _least_squares(rows, self.sketched(drawn)) * self.active[:, None]
        self.r = self.residual()


def _least_squares(matrix: Tensor, b: Tensor) -> Tensor:
    """``b`` times the transposed pseudo-inverse of an ``(s, n)`` matrix: by QR where its rank is full, else by SVD."""
    s, n = matrix.shape
    tolerance = max(s, n) * torch.finfo(matrix.dtype).eps
    wide = s < n
    q, upper = torch.linalg.qr(matrix.T if wide else matrix)
    pivots = upper.diagonal().abs()
    if len(pivots) and bool(pivots.min() > tolerance * pivots.max()):
        if wide:
            return torch.linalg.solve_triangular(upper.T, b.T, upper=False).T @ q.T
        return torch.linalg.solve_triangular(upper, q.T @ b.T, upper=True).T
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    real = values > tolerance * values.max() if len(values) else values > 0
    return ((b @ left[:, real]) / values[real]) @ right[real]
