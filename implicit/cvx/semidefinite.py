"""The cone of positive semidefinite matrices.

Reference:
    J. Malick, H. Sendov, "Clarke generalized Jacobian of the projection onto the cone of positive semidefinite
        matrices", Set-Valued Anal. 14, 2006.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit.cvx.cones import Cone


@dataclass(frozen=True)
class Semidefinite(Cone):
    """Positive semidefinite matrices, as scaled upper triangles by columns: entries off the diagonal times sqrt(2)."""

    order: int = 0

    def project(self, u: Tensor) -> Tensor:
        """``(U + |U|) / 2``."""
        matrix = self._unpack(u)
        return self._pack((matrix + _MatrixAbs.apply(matrix)) / 2)

    def derivative(self, u: Tensor, tolerance: Tensor) -> Tensor:
        """``E -> (E + X) / 2`` with ``|U| X + X |U| = E U + U E``, on the basis of the scaled triangles."""
        matrix = self._unpack(u)[..., None, :, :]
        basis = self._unpack(torch.eye(self.size, dtype=u.dtype))
        absolute = _MatrixAbs.apply(self._unpack(u))
        moved = _sylvester(absolute[..., None, :, :], basis @ matrix + matrix @ basis, tolerance[..., None])
        return self._pack((basis + moved) / 2)

    def kinks(self, u: Tensor, tolerance: Tensor) -> Tensor:
        """Where an eigenvalue is 0."""
        return torch.linalg.eigvalsh(self._unpack(u)).abs().amin(-1) <= tolerance

    def _indices(self) -> tuple[Tensor, Tensor, Tensor]:
        columns, rows = torch.tril_indices(self.order, self.order)
        return rows, columns, torch.where(rows == columns, 1.0, 0.5**0.5)

    def _unpack(self, u: Tensor) -> Tensor:
        rows, columns, weights = self._indices()
        place = torch.empty(self.order, self.order, dtype=torch.long)
        place[rows, columns] = place[columns, rows] = torch.arange(self.size)
        return (u * weights.to(u.dtype))[..., place]

    def _pack(self, matrix: Tensor) -> Tensor:
        rows, columns, weights = self._indices()
        return matrix[..., rows, columns] / weights.to(matrix.dtype)


class _MatrixAbs(torch.autograd.Function):
    """``|U|`` of symmetric matrices: the positive semidefinite root of ``U^2``."""

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.abs()[..., None, :]) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        matrix, absolute = ctx.saved_tensors  # dH H + H dH = dU U + U dU
        c = tangents[0] @ matrix + matrix @ tangents[0]
        return _sylvester(absolute, c, torch.zeros_like(matrix[..., 0, 0]))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        matrix, absolute = ctx.saved_tensors
        symmetric = (cotangents[0] + cotangents[0].mT) / 2
        x = _sylvester(absolute, symmetric, torch.zeros_like(matrix[..., 0, 0]))
        return x @ matrix + matrix @ x

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        return _MatrixAbs.apply(args[0].movedim(in_dims[0], 0)), 0


def _sylvester(h: Tensor, c: Tensor, tolerance: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(h.shape[:-2], c.shape[:-2], tolerance.shape)
    size = h.shape[-2:]
    return _Sylvester.apply(h.expand(batch + size), c.expand(batch + size), tolerance.expand(batch))


class _Sylvester(torch.autograd.Function):
    """X with ``H X + X H = C`` for symmetric C and positive semidefinite H; zero on the kernel of the map."""

    @staticmethod
    def forward(h: Tensor, c: Tensor, tolerance: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(h)
        sums = values[..., :, None] + values[..., None, :]
        regular = sums > 2 * tolerance[..., None, None]
        inner = vectors.mT @ c @ vectors
        return vectors @ torch.where(regular, inner / torch.where(regular, sums, 1.0), 0.0) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        h, _, tolerance = inputs
        ctx.save_for_backward(h, output, tolerance)
        ctx.save_for_forward(h, output, tolerance)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        h, x, tolerance = ctx.saved_tensors
        right = torch.zeros_like(x) if tangents[1] is None else tangents[1]
        if tangents[0] is not None:
            right = right - tangents[0] @ x - x @ tangents[0]
        return _sylvester(h, right, tolerance)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor, None]:
        h, x, tolerance = ctx.saved_tensors
        y = _sylvester(h, (cotangents[0] + cotangents[0].mT) / 2, tolerance)
        return -(y @ x + x @ y), y, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        moved = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(args, in_dims, strict=True)
        ]
        return _Sylvester.apply(*moved), 0
