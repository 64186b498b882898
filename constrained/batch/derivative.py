"""Derivatives of the solutions of a batch in its data, by the implicit function theorem."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from constrained.batch.functions import BatchFunctions
from implicit import ConvergenceWarning
from implicit.pullback import push
from implicit.root_checks import refuse_nested_forward
from implicit.transforms import is_tracked


@dataclass
class Conditions:
    """The optimality conditions of every element at its solution, equations in ``y = (x, l, v, z)``.

    ``grad_x (f + <l, h> + <v, c>) + z = 0``, ``h = 0``, and for every inequality ``c_i = 0`` where it is active and
    ``v_i = 0`` elsewhere; for every variable ``x_i = bound`` where it is at a bound and ``z_i = 0`` elsewhere.

    Args:
        functions: the problem.
        solve: runs the solver on plain leaves of data and shared, and returns a ``Solved``.

    Attributes:
        solved: what the solver returned, once it has run.
    """

    functions: BatchFunctions
    solve: Callable[[Sequence[Tensor]], "Solved"]
    solved: "Solved | None" = field(default=None)

    def run(self, leaves: Sequence[Tensor]) -> Tensor:
        """y of every element, shape (B, N)."""
        self.solved = self.solve(leaves)
        return self.solved.y

    def residuals(self, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """Left-hand sides at every element, shape (B, N)."""
        return torch.func.vmap(self._element, in_dims=self._in_dims)(y, *self._masks, *leaves)

    def matrix(self, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """Their Jacobians in y, shape (B, N, N)."""
        return torch.func.vmap(torch.func.jacrev(self._element), in_dims=self._in_dims)(y, *self._masks, *leaves)

    def solution(self, matrix: Tensor, right: Tensor) -> Tensor:
        """``matrix^{-1} right`` for every element, one batched factorisation; NaN where that means nothing.

        Elements that did not converge, or whose system is singular, get zeros for zeros and NaN otherwise.
        """
        usable = self._solved.converged[:, None]
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        found, _ = torch.linalg.solve_ex(torch.where(usable[:, :, None], matrix, eye), right.unsqueeze(-1))
        found = found.squeeze(-1)
        usable = usable & torch.isfinite(found).all(dim=-1, keepdim=True)
        nothing = torch.where((right == 0).all(dim=-1, keepdim=True), 0.0, torch.nan)
        return torch.where(usable, found, nothing.to(found.dtype))

    def examine(self) -> None:
        """Warn about elements whose derivatives are not defined."""
        lost, degenerate = torch.stack([(~self._solved.converged).sum(), self._solved.degenerate.sum()]).tolist()
        if lost:
            _warn(f"{lost} elements have not converged: their derivatives are NaN; mask them by .converged")
        if degenerate:
            _warn(
                f"strict complementarity fails in {degenerate} elements (a constraint and its multiplier are both "
                "zero): they have one-sided derivatives only, and what is returned is one of them"
            )

    @property
    def _solved(self) -> "Solved":
        assert self.solved is not None
        return self.solved

    @property
    def _masks(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._solved.active, self._solved.held, self._solved.bound

    @property
    def _in_dims(self) -> tuple[int | None, ...]:
        return (0, 0, 0, 0, *self.functions.in_dims[1:])

    def _element(self, y: Tensor, active: Tensor, held: Tensor, bound: Tensor, *leaves: Tensor) -> Tensor:
        functions, n, m = self.functions, self.functions.n, self.functions.equalities
        x, multipliers, z = torch.split(y, [n, functions.constraints, n])

        def total(x: Tensor) -> tuple[Tensor, Tensor]:
            value, constraints = functions.element(x, list(leaves))
            return value + multipliers @ constraints, constraints

        slope, constraints = torch.func.grad(total, has_aux=True)(x)
        c = torch.where(active, constraints[m:], multipliers[m:])
        return torch.cat([slope + z, constraints[:m], c, torch.where(held, x - bound, z)])


@dataclass(frozen=True)
class Solved:
    """The end of a run as the optimality conditions see it.

    Attributes:
        y: x, multipliers of h and c, and of the upper minus those of the lower bounds, shape (B, n + m + p + n).
        active: inequalities that hold with equality, (B, p).
        held: variables at a bound, (B, n).
        bound: the value of that bound, (B, n).
        converged, degenerate: flags of elements, (B,).
    """

    y: Tensor
    active: Tensor
    held: Tensor
    bound: Tensor
    converged: Tensor
    degenerate: Tensor


class Implicit(torch.autograd.Function):
    """``y(leaves)``; the saved output enters again when differentiated again, which makes higher orders right."""

    @staticmethod
    def forward(conditions: Conditions, *leaves: Tensor) -> Tensor:
        return conditions.run(leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.conditions, *leaves = inputs
        ctx.save_for_backward(output, *leaves)
        ctx.save_for_forward(output, *leaves)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (cotangent,) = cotangents
        conditions: Conditions = ctx.conditions
        y, *leaves = ctx.saved_tensors
        conditions.examine()
        wanted = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point() and ctx.needs_input_grad[1 + i]]
        u = conditions.solution(conditions.matrix(y, leaves).mT, -cotangent)

        def at(*values: Tensor) -> Tensor:
            return conditions.residuals(y, _placed(leaves, wanted, values))

        slopes = torch.func.vjp(at, *[leaves[i] for i in wanted])[1](u)
        found: list[Tensor | None] = [None] * len(leaves)
        for i, slope in zip(wanted, slopes, strict=True):
            found[i] = slope
        return (None, *found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        refuse_nested_forward()
        conditions: Conditions = ctx.conditions
        y, *leaves = ctx.saved_tensors
        conditions.examine()
        moving = [i for i, t in enumerate(tangents[1:]) if t is not None and leaves[i].is_floating_point()]

        def at(*values: Tensor) -> tuple[Tensor]:
            return (conditions.residuals(y, _placed(leaves, moving, values)),)

        along = [t for t in (tangents[1 + i] for i in moving) if t is not None]
        change = push(at, [leaves[i] for i in moving], along, [y])[0]
        return conditions.solution(conditions.matrix(y, leaves), -change)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        if any(dim is not None for dim in in_dims[1:]):
            raise NotImplementedError(
                "solve_batch under torch.func.vmap: make the vmapped axis part of the batch axis instead"
            )
        return Implicit.apply(*args), None


def followed(leaves: Sequence[Tensor]) -> bool:
    """Whether anything differentiates through these tensors."""
    return any((t.requires_grad and torch.is_grad_enabled()) or is_tracked(t) for t in leaves)


def _placed(leaves: Sequence[Tensor], index: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    everything = list(leaves)
    for i, value in zip(index, values, strict=True):
        everything[i] = value
    return everything


def _warn(text: str) -> None:
    warnings.warn(text, ConvergenceWarning, stacklevel=3)
