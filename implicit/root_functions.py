"""The two autograd functions of implicit differentiation: ``Root`` and ``LinearSolve``.

With ``F(y, *theta) = 0``, A the derivative of F in y and B that in theta:

- ``Root`` returns y; its pullback is ``-B^T A^{-T}``, its pushforward ``-A^{-1} B``. The saved *output* re-enters
  ``Root`` when differentiated again, which makes every higher order right.
- ``LinearSolve`` solves with A or its transpose and can itself be differentiated, in every mode.

Behind the tensors of theta goes one more, the distance from the start to y: the scale that the residual at y is
judged by where y is close to zero.

Their ``forward`` sees plain tensors: whatever transforms are active have been peeled off by then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.pullback import Leaves, pullback, push
from implicit.root_checks import (
    check_linear,
    check_residual,
    check_solution,
    check_solved,
    refuse_captured,
    refuse_nested_forward,
    refuse_transformed_captures,
)
from implicit.root_system import Problem, Setup, System, assemble
from implicit.transforms import is_dual, transforms_active, vmapped
from implicit.tree import Tree


@dataclass(frozen=True)
class _Task:
    """Which linear system: ``A^T u = b`` or ``A u = b``, b with ``lead`` leading axes of right-hand sides."""

    setup: Setup
    transposed: bool
    lead: int = 0
    check: bool = False  # whether y is a solution

    def split(self, tensors: Sequence[Tensor]) -> tuple[Leaves, Leaves, Leaves]:
        n = self.setup.count
        return tuple(tensors[:n]), tuple(tensors[n : 2 * n]), tuple(tensors[2 * n :])

    def product(self, v: Leaves, points: Sequence[int], y: Leaves, theta: Leaves) -> Callable[..., Leaves]:
        """``A^T v`` or ``A v`` as a function of the chosen entries of ``(*y, *theta)``."""
        n, setup = self.setup.count, self.setup

        def at(*values: Tensor) -> Leaves:
            everything = [*y, *theta]
            for index, value in zip(points, values, strict=True):
                everything[index] = value
            here, residual = everything[:n], setup.in_y(tuple(everything[n:]))

            def multiply(*w: Tensor) -> Leaves:
                if self.transposed or setup.problem.symmetric:
                    return pullback(residual, here)[1](*w)
                return push(residual, here, w, here)

            for _ in range(self.lead):
                multiply = torch.func.vmap(multiply)
            return multiply(*v)

        return at


def _solve(task: _Task, system: System, b: Leaves) -> Leaves:
    """One linear system on plain tensors, looked at before it is believed."""
    lead = b[0].shape[: task.lead]
    rows = tuple(leaf.reshape((-1, *leaf.shape[task.lead :])) for leaf in b) if task.lead else b
    operator = system.operator(transposed=task.transposed)
    found = task.setup.problem.linear_solver.solve(operator, rows, batched=task.lead > 0)
    check_linear(found, operator.dtype)
    if task.check:
        check_solved(task.setup, system, _amplification(rows, found.value, task.lead > 0))
    return tuple(leaf.reshape((*lead, *leaf.shape[1:])) for leaf in found.value) if task.lead else found.value


def _amplification(b: Leaves, u: Leaves, batched: bool) -> float:
    before, after = (
        torch.linalg.vector_norm(tree.ravel_batch(v) if batched else tree.ravel(v)[None], dim=1) for v in (b, u)
    )
    nonzero = before > 0
    return float((after[nonzero] / before[nonzero]).amax()) if bool(nonzero.any()) else 0.0


def _system(task: _Task, y: Leaves, theta: Leaves, wanted: Sequence[int] = ()) -> System:
    system = assemble(task.setup, y, theta, wanted)
    refuse_captured(system.outputs, system.leaves)
    check_residual(system)
    if task.check and task.setup.problem.examine is not None:
        with torch.no_grad():
            task.setup.problem.examine(tree.unflatten(y, task.setup.start_spec), *task.setup.theta(theta))
    return system


class LinearSolve(torch.autograd.Function):
    """``u`` with ``A(y, theta)^T u = b`` (or ``A u = b``), differentiable in b, y and theta."""

    @staticmethod
    def forward(task: _Task, *tensors: Tensor) -> Leaves:
        b, y, theta = task.split(tensors)
        return _solve(task, _system(task, y, theta), b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        ctx.task, *tensors = inputs
        ctx.set_materialize_grads(False)
        saved = (*output, *tensors[ctx.task.setup.count :])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        task: _Task = ctx.task
        u, y, theta = task.split(ctx.saved_tensors)
        wanted, n = ctx.needs_input_grad[1:], task.setup.count
        if all(c is None for c in cotangents):
            return (None,) * (1 + len(wanted))
        points = [index for index, needed in enumerate(wanted[n:]) if needed]

        def rule(*c: Tensor) -> Leaves:
            w = LinearSolve.apply(replace(task, transposed=not task.transposed, check=False), *c, *y, *theta)
            if not points:
                return w
            # <w, A^T u> as a function of y and theta, u and w fixed; its gradients come with a minus.
            _, pull = pullback(task.product(u, points, y, theta), [(*y, *theta)[index] for index in points])
            return (*w, *[-slope for slope in pull(*w)])

        found: list[Tensor | None] = [None] * len(wanted)
        for index, slope in zip(
            [*range(n), *[n + p for p in points]], vmapped(rule, _filled(cotangents, u)), strict=True
        ):
            found[index] = slope
        return (None, *found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Leaves:
        refuse_nested_forward()
        task: _Task = ctx.task
        u, y, theta = task.split(ctx.saved_tensors)
        n = task.setup.count
        right = _filled(tangents[1 : 1 + n], u)
        moving = {index: t for index, t in enumerate(tangents[1 + n :]) if t is not None}
        if moving:
            at = task.product(u, list(moving), y, theta)
            change = push(at, [(*y, *theta)[index] for index in moving], list(moving.values()), u)
            right = tuple(r - c for r, c in zip(right, change, strict=True))
        return LinearSolve.apply(replace(task, check=False), *right, *y, *theta)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        task, *tensors = args
        n = task.setup.count
        if all(d is None for d in in_dims[1 + n :]):
            # One matrix, many right-hand sides.
            rows = _batch_first(info, in_dims[1 : 1 + n], tensors[:n])
            return LinearSolve.apply(replace(task, lead=task.lead + 1), *rows, *tensors[n:]), (0,) * n
        return _loop(info, in_dims[1:], tensors, lambda *each: LinearSolve.apply(task, *each)), (0,) * n


class Root(torch.autograd.Function):
    """The solution of ``F(y, theta) = 0`` found by any solver.

    The second argument is None, or, for a batched solver, which tensors of theta are shared by the whole batch.
    """

    @staticmethod
    def forward(setup: Setup, shared: tuple[bool, ...] | None, *tensors: Tensor) -> Leaves:
        start, theta = list(tensors[: setup.count]), tensors[setup.count :]
        solver, shapes = setup.problem.solver, setup.shapes
        if shared is not None:
            assert setup.problem.batched_solver is not None
            lead = start[0].shape[:1]
            solver, shapes = setup.problem.batched_solver, tuple(torch.Size((*lead, *s)) for s in setup.shapes)
            theta = [t.expand(*lead, *t.shape) if one else t for t, one in zip(theta, shared, strict=True)]
        with torch.enable_grad():  # solvers differentiate inside
            found = solver(tree.unflatten(start, setup.start_spec), *setup.theta(theta))
        leaves = setup.align(found, "the solver returned", shapes)
        check_solution(leaves)
        axes = 0 if shared is None else 1
        moved = [(leaf.detach() - first).flatten(axes) for leaf, first in zip(leaves, start, strict=True)]
        travel = torch.linalg.vector_norm(torch.cat(moved[: setup.primal], dim=axes), dim=axes)
        return (*(leaf.detach().clone() for leaf in leaves), travel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        ctx.setup, ctx.shared, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[-1])
        # The saved output re-enters this function when differentiated again: that makes second derivatives right.
        saved = (*output[:-1], *tensors[ctx.setup.count :], output[-1])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        setup: Setup = ctx.setup
        n = setup.count
        y, theta = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        needed = ctx.needs_input_grad[2 + n :]
        wanted = [index for index in setup.floating if needed[index]]
        found: list[Tensor | None] = [None] * len(needed)
        if wanted and any(c is not None for c in cotangents[:n]):
            filled, shared = _filled(cotangents[:n], y), ctx.shared
            slopes = vmapped(lambda *c: _pull_back(setup, wanted, c, y, theta, shared), filled)
            for index, slope in zip(wanted, slopes, strict=True):
                found[index] = slope
        return (None, None, *[None] * n, *found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        refuse_nested_forward()
        setup: Setup = ctx.setup
        n = setup.count
        y, theta = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        moving = {index: tangents[2 + n + index] for index in setup.floating}
        moving = {index: t for index, t in moving.items() if t is not None}
        if not moving:
            return (*(torch.zeros_like(leaf) for leaf in y), None)
        points, dims = list(moving), [None if one else 0 for one in (*(ctx.shared or ()), False)]

        def forward(*tensors: Tensor) -> Leaves:
            here, fixed, along = tensors[:n], tensors[n : n + len(theta)], tensors[n + len(theta) :]
            right = push(setup.in_theta(here, fixed, points), [fixed[index] for index in points], along, here)
            return LinearSolve.apply(_Task(setup, False, check=True), *[-r for r in right], *here, *fixed)

        if ctx.shared is not None:
            forward = torch.func.vmap(forward, in_dims=(*[0] * n, *dims, *[dims[index] for index in points]))
        return (*vmapped(lambda *along: forward(*y, *theta, *along), tuple(moving.values())), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        setup, shared, *tensors = args
        n, dims = setup.count, in_dims[2:]
        if setup.problem.batched_solver is None or shared is not None:
            return _loop(info, dims, tensors, lambda *each: Root.apply(setup, shared, *each)), (0,) * (n + 1)
        start = _batch_first(info, dims[:n], tensors[:n])
        theta = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors[n:], dims[n:], strict=True)]
        return Root.apply(setup, tuple(d is None for d in dims[n:]), *start, *theta), (0,) * (n + 1)


def _pull_back(
    setup: Setup,
    wanted: Sequence[int],
    cotangents: Leaves,
    y: Leaves,
    theta: Leaves,
    shared: Sequence[bool] | None = None,
) -> Leaves:
    """``-B^T A^{-T} c`` for the wanted tensors of theta; with ``shared``, for a batch on the leading axis."""
    if shared is not None:
        n = len(y)

        def each(*tensors: Tensor) -> Leaves:
            return _pull_back(setup, wanted, tensors[:n], tensors[n : 2 * n], tensors[2 * n :])

        in_dims = (*[0] * (2 * n), *[None if one else 0 for one in (*shared, False)])
        found = torch.func.vmap(each, in_dims=in_dims)(*cotangents, *y, *theta)
        return tuple(f.sum(0) if shared[index] else f for index, f in zip(wanted, found, strict=True))
    task = _Task(setup, transposed=True, check=True)
    right = tuple(-c for c in cotangents)
    if not _differentiated_again(*cotangents, *y, *theta):
        # One evaluation of F serves the solve and the product with B.
        system = _system(task, y, theta, wanted)
        return system.pull_theta(_solve(task, system, right))
    u = LinearSolve.apply(task, *right, *y, *theta)
    return pullback(setup.in_theta(y, theta, wanted), [theta[index] for index in wanted])[1](*u)


def _differentiated_again(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() or transforms_active() or any(is_dual(t) for t in tensors)


def _filled(values: Sequence[Tensor | None], like: Leaves) -> Leaves:
    return tuple(torch.zeros_like(leaf) if v is None else v for v, leaf in zip(values, like, strict=True))


def _batch_first(info: Any, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> Leaves:
    return tuple(
        t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, dims, strict=True)
    )


def _loop(info: Any, dims: Sequence[int | None], tensors: Sequence[Tensor], fn: Callable[..., Leaves]) -> Leaves:
    """``fn`` for each element of the batch, stacked on a leading axis."""
    found = [
        fn(*[t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True)])
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(leaf) for leaf in zip(*found, strict=True))


def solve_implicitly(problem: Problem, init: Tree, theta: tuple[Any, ...], *, primal: int | None = None) -> Tree:
    """The solver's answer, differentiable in the floating-point tensors of theta.

    Args:
        problem: what is solved.
        init: the start, a tree of floating-point tensors shaped like the solution.
        theta: the other arguments, any trees.
        primal: how many leaves of the solution its error is measured on; all by default.
    """
    refuse_transformed_captures(problem.residual)
    start, start_spec = tree.flatten(init)
    if not start or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in start):
        raise TypeError(
            f"init must be a tree of floating-point tensors shaped like the solution, got {tree.describe(init)}"
        )
    tree.common_dtype(init, "init")
    values, theta_spec = tree.flatten(theta)
    slots = tuple(i for i, v in enumerate(values) if isinstance(v, Tensor))
    tensors = [values[i] for i in slots]
    if any(t.is_complex() for t in tensors):
        raise TypeError("complex arguments have no implicit derivatives here; pass torch.view_as_real of them")
    setup = Setup(
        problem=problem,
        start_spec=start_spec,
        shapes=tuple(leaf.shape for leaf in start),
        primal=len(start) if primal is None else primal,
        theta_spec=theta_spec,
        statics=tuple(None if isinstance(v, Tensor) else v for v in values),
        slots=slots,
        # Labels and masks have no gradient.
        floating=tuple(i for i, t in enumerate(tensors) if t.is_floating_point()),
    )
    *found, _ = Root.apply(setup, None, *[leaf.detach() for leaf in start], *tensors)
    return tree.unflatten(found, start_spec)
