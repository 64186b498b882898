"""Derivatives of the solution of a quadratic program: the equations of its active rows, solved once more.

With the active rows W known, (x, multiplier) solves ``[[Q, W'], [W, 0]] (x, multiplier) = (-q, d_W)``, and so do its
derivatives of every order: the system is assembled from the arguments with ordinary operations, whose own derivatives
do the rest. Where it is singular its null space, which is held fixed, is taken out.

Reference:
    B. Amos, J. Z. Kolter, "OptNet: differentiable optimization as a layer in neural networks", ICML 2017, section 3.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from constrained.qp.active_set import kkt_matrix, select
from constrained.qp.program import product
from constrained.qp.scaling import Data, Scale
from implicit.root_checks import refuse_nested_forward
from implicit.status import ConvergenceWarning
from implicit.transforms import vmapped


@dataclass(frozen=True)
class Found:
    """The solution of a batch, which nothing follows.

    Attributes:
        x: ``(batch, n)``.
        multiplier: in the units of the arguments, ``(batch, rows)``.
        scale: of rows and objective.
        index: the active rows, ``(batch, k)``.
        valid: which of them are more than filling, ``(batch, k)``.
        kernel: a basis of the null space of the scaled system, ``(batch, n + k, c)``.
        good: which elements were solved, ``(batch,)``.
    """

    x: Tensor
    multiplier: Tensor
    scale: Scale
    index: Tensor
    valid: Tensor
    kernel: Tensor
    good: Tensor

    def active(self, data: Data) -> tuple[Tensor, Tensor, Tensor]:
        """The active rows ``(batch, k, n)`` and their right-hand sides, followed, and their multipliers, all scaled."""
        C, d = data.rows()
        factor = self.scale.row.gather(1, self.index)
        rows = factor[..., None] * select(C, self.index, self.valid)
        # Absent rows are never active; their infinity must not meet a zero.
        sides = torch.where(self.valid, torch.where(d.isfinite(), d, 0.0).gather(1, self.index), 0.0)
        scaled = self.scale.objective[:, None] * self.multiplier.gather(1, self.index) / factor
        return rows, factor * sides, torch.where(self.valid, scaled, 0.0)

    def spread(self, scaled: Tensor) -> Tensor:
        """Multipliers of all rows from scaled ones of the active rows."""
        factor = self.scale.row.gather(1, self.index)
        back = torch.where(self.valid, scaled * factor / self.scale.objective[:, None], 0.0)
        return torch.zeros_like(self.multiplier).scatter_add(1, self.index, back)


def follow(data: Data, found: Found) -> tuple[Tensor, Tensor]:
    """(x, multiplier) as a differentiable function of the data; fixed where nothing was solved."""
    rows, sides, scaled = found.active(data)
    n, good = found.x.shape[1], found.good[:, None]
    Q = found.scale.objective[:, None, None] * data.symmetric()
    matrix = kkt_matrix(Q, rows, found.valid)
    here = torch.cat([found.x, scaled], 1)
    residual = torch.cat([-found.scale.objective[:, None] * data.q, sides], 1) - product(matrix, here)
    step = _solve(matrix, torch.where(good, residual, 0.0), found.kernel, found.good)
    x, multiplier = found.x + step[:, :n], found.spread(scaled + step[:, n:])
    return torch.where(good, x, found.x), torch.where(good, multiplier, found.multiplier)


def follow_projection(data: Data, found: Found) -> tuple[Tensor, Tensor]:
    """The same where Q is the identity: ``x = -q - W' multiplier`` leaves a system in the multipliers."""
    rows, sides, scaled = found.active(data)
    n, good = found.x.shape[1], found.good[:, None]
    slope = torch.where(good, -data.q - found.x - product(rows.mT, scaled), 0.0)
    gap = torch.where(good, sides - product(rows, found.x), 0.0)
    matrix = rows @ rows.mT + torch.diag_embed((~found.valid).to(rows.dtype))
    step = _solve(matrix, product(rows, slope) - gap, found.kernel[:, n:], found.good)
    x, multiplier = found.x + slope - product(rows.mT, step), found.spread(scaled + step)
    return torch.where(good, x, found.x), torch.where(good, multiplier, found.multiplier)


def _solve(matrix: Tensor, right: Tensor, kernel: Tensor, good: Tensor) -> Tensor:
    """``matrix^-1 right`` outside the null space of the symmetric matrix; zero where nothing was solved."""
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where(good[:, None, None], matrix, eye)
    if kernel.shape[2]:
        project = eye - kernel @ kernel.mT
        matrix = project @ matrix @ project + kernel @ kernel.mT
        right = product(project, right)
    return torch.linalg.solve(matrix, right[..., None])[..., 0]


class Watch(torch.autograd.Function):
    """x itself; differentiating it reports the elements where the derivative is in doubt.

    ``doubts`` has a column for each of :data:`REASONS`; ``slides`` is a basis of the directions in which x is not
    determined, ``(batch, n, c)``.
    """

    @staticmethod
    def forward(x: Tensor, slides: Tensor, doubts: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        slides, doubts = ctx.saved_tensors
        (reported,) = vmapped(lambda c: (_Report.apply(c, slides, doubts, True, 1),), cotangents)
        return reported, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        refuse_nested_forward()
        slides, doubts = ctx.saved_tensors
        return _Report.apply(tangents[0], slides, doubts, False, 1)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
        rows = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(args, in_dims, strict=True)
        ]
        found = Watch.apply(*[row.flatten(0, 1) for row in rows])
        return found.unflatten(0, rows[0].shape[:2]), 0


REASONS = (
    "strict complementarity fails, an active constraint has no force: the solution has one-sided derivatives only, and "
    "what is returned lies between them",
    "active constraints are linearly dependent and the parameters may move them: a least-squares derivative is "
    "returned. Remove redundant constraints",
    "no solution was found, and the derivative returned is zero",
    "the solution is not unique, so that it has no derivative; one within the directions that are determined is "
    "returned. Add a strongly convex term to the objective",
)


class _Report(torch.autograd.Function):
    """A cotangent or tangent itself; ``forward`` sees plain tensors and warns.

    ``copies`` rows in a row belong to one program: one for each cotangent or tangent.
    """

    @staticmethod
    def forward(value: Tensor, slides: Tensor, doubts: Tensor, transposed: bool, copies: int) -> Tensor:
        used = (value != 0).any(1)
        loose = (slides.abs() > 1e-8).any(2).any(1)
        if transposed:  # only what depends on an undetermined direction is in doubt
            along = (value[:, None] @ slides)[:, 0].abs() > 1e-8 * torch.linalg.vector_norm(value, dim=1)[:, None]
            loose = along.any(1)
        found = torch.cat([doubts & used[:, None], (loose & used)[:, None]], 1)
        found = found.unflatten(0, (-1, copies)).any(1)
        if bool(found.any()):
            for reason, column in zip(REASONS, found.unbind(1), strict=True):
                if bool(column.any()):
                    warnings.warn(f"{listed(column)}: {reason}", ConvergenceWarning, stacklevel=2)
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return cotangents[0], None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[0].clone()

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
        # More programs come in front; more cotangents of the same programs next to each other.
        copies, place = args[4], 1 if in_dims[2] is None else 0
        if place:
            copies *= info.batch_size
        rows = [
            t.unsqueeze(place).expand(*t.shape[:place], info.batch_size, *t.shape[place:])
            if d is None
            else t.movedim(d, place)
            for t, d in zip(args[:3], in_dims[:3], strict=True)
        ]
        found = _Report.apply(*[row.flatten(0, 1) for row in rows], args[3], copies)
        return found.unflatten(0, rows[0].shape[:2]), place


def listed(flags: Tensor) -> str:
    """Such as ``quadratic programs 0, 3``; the elements by number."""
    if len(flags) == 1:
        return "the quadratic program"
    chosen = flags.nonzero()[:, 0].tolist()
    more = f" and {len(chosen) - 5} more" if len(chosen) > 5 else ""
    return f"quadratic program{'s' * (len(chosen) > 1)} {', '.join(map(str, chosen[:5]))}{more}"
