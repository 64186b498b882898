"""Derivatives of the solutions of a batch in its data, by the implicit function theorem."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from constrained.batch.active import Solved, scaled, without
from constrained.batch.functions import BatchFunctions
from implicit import ConvergenceWarning
from implicit.pullback import push
from implicit.root_checks import refuse_nested_forward
from implicit.transforms import is_tracked

APART = 1e-5
"""What is left of terms that cancel, relative to them, at an approximate solution."""
REASONS = (
    "{} elements have not converged: their derivatives are NaN; mask them by .converged",
    "strict complementarity fails in {} elements (a constraint and its multiplier are both zero): they have one-sided "
    "derivatives only, and what is returned is one of them",
    "active constraints are linearly dependent in {} elements, and the data move them apart: there is no derivative, "
    "and a least-squares one is returned. Remove redundant constraints",
    "the solution is not unique to first order in {} elements: the derivative of smallest norm is returned. Add a "
    "strongly convex term to the objective",
)


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
        plain: y and the leaves it ran on, which nothing follows.
    """

    functions: BatchFunctions
    solve: Callable[[Sequence[Tensor]], Solved]
    solved: Solved | None = field(default=None)
    plain: tuple[Tensor, list[Tensor]] = field(init=False)

    def run(self, leaves: Sequence[Tensor]) -> Tensor:
        """y of every element, shape (B, N)."""
        self.solved = self.solve(leaves)
        self.plain = self.solved.y, [leaf.detach() for leaf in leaves]
        return self.solved.y

    def residuals(self, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """Left-hand sides at every element, shape (B, N)."""
        return torch.func.vmap(self._element, in_dims=self._in_dims)(y, *self._masks, *leaves)

    def matrix(self, y: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """Their Jacobians in y, shape (B, N, N)."""
        return torch.func.vmap(torch.func.jacrev(self._element), in_dims=self._in_dims)(y, *self._masks, *leaves)

    def solution(self, matrix: Tensor, right: Tensor) -> Tensor:
        """``matrix^{-1} right`` for every element, one batched factorisation.

        Multipliers of inactive constraints get ``right`` itself. Where the system is singular, the solution of smallest
        norm without what does not fit; elements that did not converge get zeros for zeros and NaN otherwise.
        """
        solved, usable = self._solved, self._solved.converged[:, None]
        unit = torch.where(solved.present, solved.unit, 1.0)
        system, wanted = scaled(matrix, solved.present & usable, solved.unit), unit * right
        for basis in (solved.dependent, solved.loose):
            system = without(system, basis)
            if basis.shape[2]:
                wanted = wanted - (basis @ (basis.mT @ wanted.unsqueeze(-1))).squeeze(-1)
        found, _ = torch.linalg.solve_ex(system, wanted.unsqueeze(-1))
        nothing = torch.where((right == 0).all(dim=-1, keepdim=True), 0.0, torch.nan)
        return torch.where(usable, unit * found.squeeze(-1), nothing.to(found.dtype))

    def examine(self, followed: Sequence[int]) -> None:
        """Warn about elements without derivatives in the leaves of data and shared with these numbers."""
        solved = self._solved
        stuck = (solved.loose != 0).flatten(1).any(dim=1)
        flags = [~solved.converged, solved.degenerate, self._moves(followed), stuck]
        for count, reason in zip(torch.stack([flag.sum() for flag in flags]).tolist(), REASONS, strict=True):
            if count:
                warnings.warn(reason.format(count), ConvergenceWarning, stacklevel=3)

    def _moves(self, followed: Sequence[int]) -> Tensor:
        """Elements where the leaves move dependent constraints apart, shape (B,).

        A combination of constraints whose gradients in x cancel must not change with the leaves either.
        """
        basis, size = self._solved.dependent, len(self._solved.y)
        apart = torch.zeros(size, dtype=torch.bool, device=basis.device)
        if not basis.shape[2]:
            return apart
        y, leaves = self.plain

        def at(*values: Tensor) -> Tensor:
            return self.residuals(y, _placed(leaves, followed, values))

        pull = torch.func.vjp(at, *[leaves[i] for i in followed])[1]
        # Unequal weights show the size of the terms that are to cancel.
        uneven = torch.linspace(1, 2, basis.shape[1], dtype=basis.dtype, device=basis.device)
        for column in (self._solved.unit[:, :, None] * basis).unbind(2):
            for i, left, terms in zip(followed, pull(column), pull(column * uneven), strict=True):
                own = self.functions.in_dims[1 + i] == 0
                left, terms = (t.abs().reshape(size if own else 1, -1).amax(dim=1) for t in (left, terms))
                apart = apart | ((left > APART * terms) & (column != 0).any(dim=1))
        return apart

    @property
    def _solved(self) -> Solved:
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
        ctx.set_materialize_grads(False)  # a leaf without a tangent does not move

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (cotangent,) = cotangents
        conditions: Conditions = ctx.conditions
        y, *leaves = ctx.saved_tensors
        wanted = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point() and ctx.needs_input_grad[1 + i]]
        conditions.examine(wanted)
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
        moving = [i for i, t in enumerate(tangents[1:]) if t is not None and leaves[i].is_floating_point()]
        conditions.examine(moving)

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
