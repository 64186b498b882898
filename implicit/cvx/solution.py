"""Derivatives of the solutions of conic programs, by the implicit function theorem for their optimality conditions.

Two autograd functions do the work: ``Solution`` solves and pulls cotangents back, ``LinearSolve`` is a linear solve
that can itself be differentiated, which is what second derivatives need. Both fold a vmapped axis into their batch.

Reference:
    A. Agrawal, S. Barratt, S. Boyd, E. Busseti, W. Moursi, "Differentiating through a cone program", J. Appl. Numer.
        Optim. 1(2), 2019 (first derivatives).
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit.cvx.factorization import Factorization, listed, name
from implicit.cvx.interior_point import solve
from implicit.cvx.program import Program
from implicit.root_checks import refuse_nested_forward
from implicit.status import ConvergenceWarning
from implicit.transforms import vmapped


class Solution(torch.autograd.Function):
    """The solutions (x, z, u) of a batch of programs, as a function of theta, with their scales."""

    @staticmethod
    def forward(theta: Tensor, program: Program) -> tuple[Tensor, Tensor]:
        point, scales = solve(program, theta)
        return point, scales.pack()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Program], output: tuple[Tensor, Tensor]) -> None:
        theta, ctx.program = inputs
        ctx.mark_non_differentiable(output[1])
        # The saved output re-enters this function when differentiated again: that makes second derivatives right.
        ctx.save_for_backward(theta, *output)
        ctx.save_for_forward(theta, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        theta, point, packed = ctx.saved_tensors
        program: Program = ctx.program
        scales = program.scales(packed)

        def rule(cotangent: Tensor) -> tuple[Tensor]:
            values = program.jacobian(program.data(theta, scales), point, scales.tolerance)
            task = Task(program, transposed=True, first=True)
            w = LinearSolve.apply(task, values, -cotangent[..., None], point.detach(), packed)
            return (program.pull(w[..., 0], point, scales),)

        return *vmapped(rule, cotangents[:1]), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:
        refuse_nested_forward()
        theta, point, packed = ctx.saved_tensors
        program: Program = ctx.program
        scales = program.scales(packed)

        def rule(tangent: Tensor) -> tuple[Tensor]:
            values = program.jacobian(program.data(theta, scales), point, scales.tolerance)
            task = Task(program, transposed=False, first=True)
            rhs = -program.push(tangent, point, scales)[..., None]
            return (LinearSolve.apply(task, values, rhs, point.detach(), packed)[..., 0],)

        return *vmapped(rule, tangents[:1]), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        theta, program = args
        assert in_dims[0] is not None
        rows = theta.movedim(in_dims[0], 0)
        found = Solution.apply(rows.flatten(0, 1), program)
        return tuple(f.unflatten(0, rows.shape[:2]) for f in found), (0, 0)


@dataclass(frozen=True)
class Task:
    """Which linear systems: with J or its transpose, for a first derivative or a further one."""

    program: Program
    transposed: bool
    first: bool


class LinearSolve(torch.autograd.Function):
    """``J' w = rhs`` (or ``J w = rhs``) for a batch of sparse J and ``(batch, size, k)`` right-hand sides."""

    @staticmethod
    def forward(task: Task, values: Tensor, rhs: Tensor, point: Tensor, scales: Tensor) -> Tensor:
        found = []
        doubts: dict[str, list[int]] = {}
        kinks = task.program.kinks(point, task.program.scales(scales).tolerance)
        for i in range(len(values)):
            factors = task.program.factorizations.get(values[i], i, name(i, len(values)))
            b = rhs[i].numpy()
            w = factors.solve(b, task.transposed)
            for reason in _doubts(task, factors, b, w, kinks[i : i + 1], point[i : i + 1], scales[i : i + 1]):
                doubts.setdefault(reason, []).append(i)
            found.append(w)
        for reason, elements in doubts.items():
            warnings.warn(f"{listed(elements, len(values))}: {reason}", ConvergenceWarning, stacklevel=2)
        return torch.as_tensor(np.stack(found))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.task, values, _, point, scales = inputs
        ctx.save_for_backward(values, output, point, scales)
        ctx.save_for_forward(values, output, point, scales)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        values, w, point, scales = ctx.saved_tensors
        task: Task = ctx.task

        def rule(cotangent: Tensor) -> tuple[Tensor, Tensor]:
            other = replace(task, transposed=not task.transposed, first=False)
            y = LinearSolve.apply(other, values, cotangent, point, scales)
            left, right = (w, y) if task.transposed else (y, w)
            pattern = task.program.jacobian_pattern
            return -(left[:, pattern.rows] * right[:, pattern.columns]).sum(-1), y

        return None, *vmapped(rule, cotangents), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        refuse_nested_forward()
        values, w, point, scales = ctx.saved_tensors
        task: Task = ctx.task
        along, rhs = tangents[1], tangents[2]
        right = torch.zeros_like(w) if rhs is None else rhs
        if along is not None:
            pattern = task.program.jacobian_pattern
            product = pattern.transposed_product if task.transposed else pattern.product
            right = right - torch.stack([product(along, column) for column in w.unbind(-1)], -1)
        return LinearSolve.apply(replace(task, first=False), values, right, point, scales)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        task, values, rhs, point, scales = args
        if in_dims[1] is None and in_dims[3] is None and in_dims[2] is not None:  # many right-hand sides, one matrix
            moved = rhs.movedim(in_dims[2], -1)
            found = LinearSolve.apply(task, values, moved.flatten(-2), point, scales)
            return found.unflatten(-1, moved.shape[-2:]), found.ndim
        rows = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(args[1:], in_dims[1:], strict=True)
        ]
        found = LinearSolve.apply(task, *[r.flatten(0, 1) for r in rows])
        return found.unflatten(0, rows[0].shape[:2]), 0


def _doubts(
    task: Task, factors: Factorization, rhs: np.ndarray, w: np.ndarray, kinks: Tensor, point: Tensor, scales: Tensor
) -> list[str]:
    """Why the derivative that w gives may not be the derivative."""
    if not rhs.any():
        return []
    program, found = task.program, []
    if factors.singular:
        consistent = factors.inconsistency(rhs, task.transposed) <= 1e-8
        if not task.first:
            unique, still = True, True
            if not consistent:
                found.append("second derivatives at a degenerate solution are those of the least-squares derivative")
        elif task.transposed:
            unique, still = consistent, not _moves(program, factors, point, scales)
        else:
            unique, still = not _slides(program, factors), consistent
        if not unique:
            found.append(
                "the solution is not unique, so that it has no derivative; a least-squares one is returned. Add a "
                "strongly convex term to the objective"
            )
        elif not still:
            found.append(
                "active constraints are linearly dependent and the parameters move them, so that the solution has no "
                "derivative; a least-squares one is returned. Remove redundant constraints"
            )
    _, second, third = program.split(torch.as_tensor(w.T))
    felt = second - third if task.transposed else third  # what a change of the projection's derivative would multiply
    if bool((felt.abs() * kinks > 1e-9 * torch.as_tensor(abs(w).max())).any()):
        found.append(
            "strict complementarity fails, so that the solution has a kink here; a derivative between those of its "
            "sides is returned. Move the parameters off the kink, or smooth the problem"
        )
    return found


def _slides(program: Program, factors: Factorization) -> bool:
    """Whether the variables that are returned can move along a kernel of J."""
    kernel = np.abs(factors.right_kernel())
    return bool((kernel[:, program.outputs].max(1) > 1e-8 * kernel.max(1)).any())


def _moves(program: Program, factors: Factorization, point: Tensor, scales: Tensor) -> bool:
    """Whether some parameter moves the residual out of the range of J, so that no derivative exists."""
    kernel = torch.as_tensor(factors.left_kernel())
    count = len(kernel)
    response = program.pull(kernel, point.expand(count, -1), program.scales(scales.expand(count, -1)))
    return bool((response.abs().amax(1) > 1e-8 * kernel.abs().amax(1)).any())
