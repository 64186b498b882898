"""Differentiable solution maps by the implicit function theorem (Blondel et al. 2021).

Where ``F(y, *theta) = 0`` defines y, with A the derivative of F in y and B that in theta, the Jacobian of the
solution is ``-A^{-1} B``. Two autograd functions do the work: ``Root`` returns the solution and pulls cotangents
back, ``LinearSolve`` is a linear solve that can itself be differentiated, which is what second derivatives need.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.derivatives import vjp
from implicit.linear_solvers import CG, LinearSolver
from implicit.linear_solvers.base import default_rtol
from implicit.linear_solvers.lu import LU
from implicit.operators import LinearOperator
from implicit.status import ConvergenceWarning, SolveError
from implicit.tree import Structure, Tree

Residual = Callable[..., Tree]
Solver = Callable[..., Tree]


@dataclass(frozen=True)
class _Setup:
    """What both functions need beside floating tensors: never a template tensor, which would pin a functorch level."""

    residual: Residual
    solver: Solver
    linear_solver: LinearSolver
    symmetric: bool
    start_spec: Structure
    start_count: int
    theta_spec: Structure
    statics: tuple[Any, ...]
    tensor_slots: tuple[int, ...]

    def theta(self, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        values = list(self.statics)
        for slot, value in zip(self.tensor_slots, tensors, strict=True):
            values[slot] = value
        return tree.unflatten(values, self.theta_spec)

    def evaluate(self, y: tuple[Tensor, ...], theta: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """F as a function of leaves, aligned with the structure of y."""
        found = self.residual(tree.unflatten(y, self.start_spec), *self.theta(theta))
        return tuple(tree.aligned_leaves(found, self.start_spec))


class _Derivative(LinearOperator):
    """A^T (rows of the residual's Jacobian in y, transposed) or, with ``transposed=False``, A itself."""

    def __init__(self, setup: _Setup, y: tuple[Tensor, ...], theta: tuple[Tensor, ...], *, transposed: bool) -> None:
        super().__init__(y)
        self.setup, self.y, self.theta, self.transposed = setup, y, theta, transposed
        self.symmetric = self.positive_definite = setup.symmetric
        _, self._pullback = vjp(lambda *q: setup.evaluate(q, theta), *y)

    def mv(self, v: Tree) -> Tree:
        if self.transposed or self.symmetric:
            return self._pullback(tuple(v))
        # A w is the transpose of the pullback, which is linear: forward mode is not needed.
        zeros = tuple(torch.zeros_like(leaf) for leaf in self.y)
        _, push = vjp(self._pullback, zeros)
        return push(tuple(v))[0]

    @property
    def T(self) -> LinearOperator:
        if self.symmetric:
            return self
        return _Derivative(self.setup, self.y, self.theta, transposed=not self.transposed)


class _LinearSolve(torch.autograd.Function):
    """``u`` with ``A(y, theta)^T u = b`` (or ``A u = b``), differentiable in b, y and theta."""

    @staticmethod
    def forward(setup: _Setup, transposed: bool, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        b, y, theta = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        operator = _Derivative(setup, y, theta, transposed=transposed)
        found = setup.linear_solver.solve(operator, b)
        if found.status.is_failure:
            raise SolveError(f"implicit differentiation failed: {found.message}")
        # A tolerance that rounding cannot meet is no reason to warn.
        if not found.success and not found.relative_residual <= default_rtol(operator.dtype):
            warnings.warn(
                f"the linear system of an implicit gradient was solved to a relative residual of "
                f"{found.relative_residual:.3g} only: {found.message}",
                ConvergenceWarning,
                stacklevel=2,
            )
        return tuple(found.value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.setup, ctx.transposed, ctx.n, *tensors = inputs
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        n, setup, transposed = ctx.n, ctx.setup, ctx.transposed
        u, tensors = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        y, theta = tensors[n : 2 * n], tensors[2 * n :]
        w = _LinearSolve.apply(setup, not transposed, n, *cotangents, *y, *theta)
        # <w, A^T u> as a function of (y, theta), u and w fixed; A^T u for one direction, A u for the other.
        left, right = (u, w) if transposed else (w, u)

        def product(*point: Tensor) -> tuple[Tensor, ...]:
            _, pullback = vjp(lambda *q: setup.evaluate(q, point[n:]), *point[:n])
            return pullback(tuple(left))

        _, pull = vjp(product, *y, *theta)
        point_grads = [-g for g in pull(tuple(right))]
        return (None, None, None, *w, *point_grads)


class _Root(torch.autograd.Function):
    """The solution of ``F(y, theta) = 0`` found by any solver."""

    @staticmethod
    def forward(setup: _Setup, *tensors: Tensor) -> tuple[Tensor, ...]:
        start = tree.unflatten(tensors[: setup.start_count], setup.start_spec)
        with torch.enable_grad():  # solvers differentiate inside
            found = setup.solver(start, *setup.theta(tensors[setup.start_count :]))
        return tuple(leaf.detach().clone() for leaf in tree.aligned_leaves(found, setup.start_spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.setup = inputs[0]
        # The saved output re-enters this function when differentiated again: that makes second derivatives right.
        ctx.save_for_backward(*output, *inputs[1 + ctx.setup.start_count :])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        setup = ctx.setup
        n = setup.start_count
        y, theta = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        u = _LinearSolve.apply(setup, True, n, *[-c for c in cotangents], *y, *theta)
        _, pull = vjp(lambda *t: setup.evaluate(y, t), *theta)
        return (None, *([None] * n), *pull(tuple(u)))


def custom_root(
    residual: Residual, *, linear_solver: LinearSolver | None = None, symmetric: bool = False
) -> Callable[[Solver], Solver]:
    """Make any solver of ``F(y, *theta) = 0`` differentiable in theta, to first and second order in eager mode.

    Args:
        residual: F(y, *theta), with the structure of y.
        linear_solver: for systems with the derivative of F in y; the dense ``LU()`` by default, which needs no
            symmetry. ``CG()`` is right only where that derivative is symmetric positive definite.
        symmetric: whether the derivative of F in y is symmetric.

    Returns:
        A decorator for ``solver(init, *theta) -> y``, the signature of jaxopt and TorchOpt. The gradient in ``init``
        is zero. Every tensor that should receive a gradient must be an argument: those captured by closure get none.
        Arguments may also be integer tensors, numbers or any other object.

    Raises:
        TypeError: when the result is called with an ``init`` that has leaves other than tensors.
        SolveError: in the backward pass, if the linear system cannot be solved.

    Warns:
        ConvergenceWarning: in the backward pass, if the solver misses its tolerance and ``sqrt(eps)`` of the dtype.

    Example:
        >>> import torch, implicit
        >>> @implicit.custom_root(lambda y, a: y**2 - a)
        ... def square_root(init, a):
        ...     return a.sqrt()
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> square_root(torch.tensor(1.0), a).backward()
        >>> a.grad
        tensor(0.2500)
    """
    chosen = linear_solver if linear_solver is not None else LU()

    def decorate(solver: Solver) -> Solver:
        def solve(init: Tree, *theta: Any) -> Tree:
            start, start_spec = tree.flatten(init)
            if not all(isinstance(leaf, Tensor) for leaf in start):
                raise TypeError(f"init must be a tree of tensors shaped like the solution, got {tree.describe(init)}")
            values, theta_spec = tree.flatten(theta)
            # Labels and masks have no gradient, and torch.func refuses to look for one.
            slots = tuple(i for i, v in enumerate(values) if isinstance(v, Tensor) and v.is_floating_point())
            statics = tuple(None if i in slots else v for i, v in enumerate(values))
            setup = _Setup(residual, solver, chosen, symmetric, start_spec, len(start), theta_spec, statics, slots)
            found = _Root.apply(setup, *[s.detach() for s in start], *[values[i] for i in slots])
            return tree.unflatten(found, start_spec)

        return solve

    return decorate


def custom_argmin(
    objective: Callable[..., Tensor], *, linear_solver: LinearSolver | None = None
) -> Callable[[Solver], Solver]:
    """Make any minimizer of ``g(y, *theta)`` over y differentiable in theta.

    The optimality condition is ``grad_y g = 0``, whose derivative is the symmetric Hessian.

    Args:
        objective: g(y, *theta), a scalar; y comes first. ``custom_argmin(lambda y, x: g(x, y))`` fits a declared
            lower level.
        linear_solver: for Hessian systems; ``CG()`` by default.

    Returns:
        A decorator for ``solver(init, *theta) -> y``; see :func:`custom_root`.
    """

    def stationarity(y: Tree, *theta: Any) -> Tree:
        return torch.func.grad(objective)(y, *theta)

    return custom_root(stationarity, linear_solver=linear_solver or CG(), symmetric=True)
