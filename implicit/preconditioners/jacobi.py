"""Division by a diagonal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit import tree
from implicit.hutchinson import Average, average_blocks, diagonal_samples
from implicit.linear_solvers.base import Apply
from implicit.operators import LinearOperator
from implicit.preconditioners.base import Keepable, Regularizer, Tensors, aligned, regularizer_diagonal
from implicit.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Jacobi(Keepable):
    """Division by a positive diagonal: declared, that of a declared regularizer, estimated, or the sum of both.

    Three forms:

    - ``Jacobi(diagonal=d)`` divides by d.
    - ``Jacobi(regularizer=r, samples=0)`` divides by the regularizer's diagonal alone and costs no product. It is the
      best diagonal where the data term is of low rank compared with n.
    - ``Jacobi(samples=k)`` estimates the diagonal from k products with random signs (:func:`hutchinson_diagonal`),
      ``Jacobi(regularizer=r, samples=k)`` only what the regularizer leaves over:
      ``D = R + max(|E|, standard error of E)`` with E the estimate of ``diag(A) - R``. The standard error keeps noise
      from producing tiny divisors. Worth it for parameters on very different scales; a Hessian with heavy
      off-diagonal rows needs more samples than the diagonal saves.

    Args:
        diagonal: a tree shaped like the operator's domain, positive everywhere; excludes the other fields.
        regularizer: a number, a nonnegative diagonal shaped like the domain, or the function r(x, y), a sum over
            single entries of y, evaluated where the Hessian was taken.
        samples: products for the estimate: 0 (with a regularizer only), or at least 2.
        average: averages the estimate within blocks, see :func:`hutchinson_diagonal`.
        seed: of the random signs; the same at every point, so that a resumed run repeats itself.

    Raises:
        ValueError: in ``init``, if a declaration does not fit the operator.
    """

    diagonal: Tree | None = None
    regularizer: Regularizer | None = None
    samples: int = 10
    average: Average = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.diagonal is not None:
            if self.regularizer is not None:
                raise ValueError("diagonal excludes regularizer; add the regularizer's diagonal to it")
            if not all(bool((leaf > 0).all()) for leaf in tree.leaves(self.diagonal)):
                raise ValueError("diagonal must be positive everywhere; CG needs a positive definite preconditioner")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 0 or self.samples == 1:
            raise ValueError(f"samples must be 0 or at least 2 (one tells nothing of its error), got {self.samples!r}")
        if self.samples == 0 and self.diagonal is None and self.regularizer is None:
            raise ValueError("samples=0 leaves no diagonal; declare diagonal or regularizer, or take 10 samples")
        if self.average is not None and (self.diagonal is not None or self.samples == 0):
            raise ValueError(f"average={self.average!r} needs an estimate: leave diagonal=None and take samples")

    def prepare(self, operator: LinearOperator) -> Tensors:
        """The diagonal, shape ``(n,)``."""
        if self.diagonal is not None:
            return {"diagonal": aligned(self.diagonal, operator, "diagonal")}
        diagonal = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
        if self.regularizer is not None:
            diagonal = regularizer_diagonal(self.regularizer, operator)
        if self.samples and operator.size:
            diagonal = diagonal + self._rest(operator, diagonal)
        return {"diagonal": _positive(diagonal)}

    def _rest(self, operator: LinearOperator, known: Tensor) -> Tensor:
        found = diagonal_samples(operator, self.samples, torch.Generator().manual_seed(self.seed)) - known
        rows = [tree.ravel(average_blocks(tree.unravel(row, operator.like), self.average)) for row in found]
        deviation, mean = torch.std_mean(torch.stack(rows), dim=0)
        return torch.maximum(mean.abs(), deviation / self.samples**0.5)

    def action(self, prepared: Tensors) -> Apply:
        """Row-wise division by the diagonal."""
        inverse = torch.reciprocal(prepared["diagonal"])
        return lambda rows: rows * inverse


def _positive(diagonal: Tensor) -> Tensor:
    """Parameters that do not enter have a zero row; and a solver reports better than we do what is not finite."""
    if not diagonal.numel() or not bool(torch.isfinite(diagonal).all() & (diagonal > 0).any()):
        return torch.ones_like(diagonal)
    return diagonal.clamp(min=float(diagonal.max()) * torch.finfo(diagonal.dtype).eps ** 0.5)
