"""Randomized Nystrom preconditioning (Frangella, Tropp and Udell 2021, arXiv 2110.02820)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.linear_solvers.base import Apply, check_positive_int
from implicit.operators import LinearOperator
from implicit.preconditioners.base import Keepable, Regularizer, Tensors, regularizer_diagonal


@dataclass(frozen=True, kw_only=True)
class Nystrom(Keepable):
    """The largest eigenvalues of the operator, found from one block of random products, taken out of the spectrum.

    With a declared regularizer of diagonal R the operator is ``A = R + M`` with a positive semidefinite data term M.
    Products with an orthonormal random basis Q of ``rank`` vectors give the Nystrom approximation

    .. math:: \\hat B = (BQ)(Q^T B Q)^{+}(BQ)^T = U \\Lambda U^T, \\qquad B = R^{-1/2} M R^{-1/2},

    and with mu = 1 and the least of its eigenvalues :math:`\\lambda_\\ell`

    .. math:: P^{-1} = R^{-1/2} \\bigl[(\\lambda_\\ell + \\mu)\\, U (\\Lambda + \\mu I)^{-1} U^T + I - U U^T\\bigr]
              R^{-1/2} .

    Without one, B = A, mu = 0 and R = I. A rank of about twice the effective dimension ``tr B (B + mu I)^{-1}`` makes
    the condition number a small constant (their theorem 1.1). Declaring the regularizer matters most where its
    entries differ: then the scaling by R does more than the rank.

    Parameters without a penalty (zero in R) are scaled by the mean of the other penalties. Directions of negative
    curvature in the sketch are left out, so the result is positive definite even where the operator is not.

    Args:
        rank: products, taken as one batch; at most n are used.
        regularizer: a number (a constant ridge), a nonnegative diagonal shaped like the domain, or the function
            r(x, y), a sum over single entries of y, evaluated where the Hessian was taken.
        max_rank: doubles the rank, up to this, until :math:`\\lambda_\\ell \\le 10 \\mu` (their section 5.4); needs a
            regularizer. None keeps ``rank``.
        seed: of the random basis; the same at every point, so that a resumed run repeats itself.
        chunk: products taken at a time; all by default.

    Raises:
        ValueError: in ``init``, if the regularizer does not fit the operator, or is zero.

    Example:
        >>> import torch, implicit
        >>> ridge = torch.logspace(-2, 2, 50)
        >>> A = implicit.Dense(torch.diag(ridge) + 100 * torch.ones(50, 50))
        >>> plain = implicit.CG(rtol=1e-4).solve(A, torch.ones(50))
        >>> helped = implicit.CG(rtol=1e-4, preconditioner=implicit.Nystrom(rank=3, regularizer=ridge))
        >>> helped.solve(A, torch.ones(50)).steps < plain.steps / 5
        True
    """

    rank: int = 20
    regularizer: Regularizer | None = None
    max_rank: int | None = None
    seed: int = 0
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_positive_int(self.rank, "rank")
        for name in ("max_rank", "chunk"):
            if getattr(self, name) is not None:
                check_positive_int(getattr(self, name), name, "None or ")
        if self.max_rank is not None and self.regularizer is None:
            raise ValueError("max_rank compares eigenvalues with the regularizer; declare it, or leave max_rank=None")
        if self.max_rank is not None and self.max_rank < self.rank:
            raise ValueError(f"max_rank must be at least rank={self.rank}, got {self.max_rank}")

    def prepare(self, operator: LinearOperator) -> Tensors:
        """The scaling ``R^{-1/2}`` (n,), the basis U (n, r) and the weights of its columns (r,)."""
        n = operator.size
        scale = torch.ones(n, dtype=operator.dtype, device=operator.device)
        shift, mu = torch.zeros_like(scale), 0.0
        if self.regularizer is not None:
            shift, mu = regularizer_diagonal(self.regularizer, operator), 1.0
            scale = _filled(shift).rsqrt()
        sketch = _Sketch(operator, scale, shift, self.seed, self.chunk)
        sketch.extend(min(self.rank, n))
        basis, eigenvalues = sketch.decompose()
        limit = min(self.max_rank or self.rank, n)
        while sketch.rank < limit and len(eigenvalues) and float(eigenvalues.min()) > 10.0 * mu:
            sketch.extend(min(sketch.rank, limit - sketch.rank))
            basis, eigenvalues = sketch.decompose()
        weights = eigenvalues  # none where nothing positive was found
        if len(eigenvalues):
            weights = (eigenvalues.min() + mu) / (eigenvalues + mu) - 1.0
        return {"scale": scale, "basis": basis.to(scale.dtype), "weights": weights.to(scale.dtype)}

    def action(self, prepared: Tensors) -> Apply:
        """Two thin products per row."""
        scale, basis, weights = prepared["scale"], prepared["basis"], prepared["weights"]
        columns, rows_of_basis = basis * weights, basis.T.contiguous()

        def apply(rows: Tensor) -> Tensor:
            scaled = rows * scale
            return torch.addmm(scaled, scaled @ columns, rows_of_basis) * scale

        return apply


def _filled(diagonal: Tensor) -> Tensor:
    positive = diagonal > 0
    if diagonal.numel() and not bool(positive.any()):
        raise ValueError("the regularizer's Hessian is zero; leave regularizer=None")
    return torch.where(positive, diagonal, diagonal[positive].mean())


class _Sketch:
    """``B Q`` for a growing random orthonormal basis Q, both of shape (n, rank)."""

    def __init__(self, operator: LinearOperator, scale: Tensor, shift: Tensor, seed: int, chunk: int | None) -> None:
        self.operator, self.scale, self.shift, self.chunk = operator, scale, shift, chunk
        self.generator = torch.Generator().manual_seed(seed)
        # Small factorizations want at least float32.
        self.dtype = torch.float32 if scale.dtype in (torch.bfloat16, torch.float16) else scale.dtype
        self.basis = torch.zeros(len(scale), 0, dtype=self.dtype, device=scale.device)
        self.image = self.basis

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def extend(self, count: int) -> None:
        drawn = torch.randn(len(self.scale), count, generator=self.generator, dtype=self.dtype).to(self.scale.device)
        for _ in range(2 if self.rank else 1):  # twice is enough
            drawn = torch.linalg.qr(drawn - self.basis @ (self.basis.T @ drawn)).Q
        vectors = (drawn.T * self.scale).to(self.scale.dtype)
        products = self.operator.flat_mm(vectors, self.chunk) - self.shift * vectors
        self.basis = torch.cat([self.basis, drawn], dim=1)
        self.image = torch.cat([self.image, (products * self.scale).T.to(self.dtype)], dim=1)

    def decompose(self) -> tuple[Tensor, Tensor]:
        """U (n, r) and the eigenvalues (r,) of the Nystrom approximation, r the numerical rank of the sketch."""
        # What is not finite is the solver's to report: it meets the same products.
        if not self.rank or not bool(torch.isfinite(self.image).all()):
            return self.basis[:, :0], self.basis.new_zeros(0)
        core = (self.basis.T @ self.image).double()
        values, vectors = torch.linalg.eigh(0.5 * (core + core.T))
        # The image is known to eps of its size only; smaller eigenvalues of the core are rounding, or negative.
        size = float(torch.linalg.matrix_norm(self.image))
        kept = values > self.rank * torch.finfo(self.dtype).eps * size
        half = self.image @ (vectors[:, kept] * values[kept].rsqrt()).to(self.dtype)
        basis, singular, _ = torch.linalg.svd(half, full_matrices=False)
        return basis, singular**2
