"""The linear system of an implicit derivative: the residual at a solution, and its derivative as an operator."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.derivatives import GradientGraph, ScalarFunction
from implicit.linear_solvers import LinearSolver
from implicit.operators import Hessian, LinearOperator
from implicit.pullback import Leaves, gradients
from implicit.tree import Structure, Tree

Residual = Callable[..., Tree]
Solver = Callable[..., Tree]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is solved and how it is differentiated; see :func:`implicit.custom_root`."""

    residual: Residual
    solver: Solver
    linear_solver: LinearSolver
    symmetric: bool = False
    objective: ScalarFunction | None = None  # whose gradient in y is the residual
    residual_tolerance: float | None = 1e-2
    batched_solver: Solver | None = None
    examine: Callable[..., None] | None = None  # looks at (y, *theta) before they are differentiated


@dataclass(frozen=True)
class Setup:
    """What the autograd functions need beside tensors: never a template tensor, which would pin a functorch level."""

    problem: Problem
    start_spec: Structure
    shapes: tuple[torch.Size, ...]  # of the leaves of y
    primal: int  # how many of those the error of y is measured on; multipliers follow
    theta_spec: Structure
    statics: tuple[Any, ...]
    slots: tuple[int, ...]  # where the tensors of theta stand among its leaves
    floating: tuple[int, ...]  # which of those have derivatives

    @property
    def count(self) -> int:
        """The number of leaves of y."""
        return len(self.shapes)

    def theta(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments after y, from the tensors among their leaves; what follows those is ignored."""
        values = list(self.statics)
        for slot, value in zip(self.slots, tensors, strict=False):
            values[slot] = value
        return tree.unflatten(values, self.theta_spec)

    def evaluate(self, y: Sequence[Tensor], theta: Sequence[Tensor]) -> Leaves:
        """F as a function of leaves, aligned with the structure of y.

        Raises:
            ValueError: if F does not have the structure and shapes of y.
        """
        found = self.problem.residual(tree.unflatten(y, self.start_spec), *self.theta(theta))
        return tuple(self.align(found, "the residual function returned", self.shapes))

    def align(self, value: Tree, what: str, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """The leaves of ``value`` in the order of y's.

        Raises:
            ValueError: if the structure or a shape differs from y's.
        """
        try:
            leaves = tree.aligned_leaves(value, self.start_spec)
        except ValueError as error:
            raise ValueError(f"{what} a tree unlike init: {error}") from error
        for leaf, shape in zip(leaves, shapes, strict=True):
            if not isinstance(leaf, Tensor) or leaf.shape != shape:
                expected = ", ".join(str(tuple(s)) for s in shapes)
                raise ValueError(
                    f"{what} {tree.describe(value)}; its leaves must have the shapes of init's: {expected}"
                )
        return leaves

    def in_y(self, theta: Leaves) -> Callable[..., Leaves]:
        """y -> F(y, theta)."""
        return lambda *y: self.evaluate(y, theta)

    def in_theta(self, y: Leaves, theta: Leaves, wanted: Sequence[int]) -> Callable[..., Leaves]:
        """The wanted tensors of theta -> F(y, theta)."""

        def at(*values: Tensor) -> Leaves:
            everything = list(theta)
            for index, value in zip(wanted, values, strict=True):
                everything[index] = value
            return self.evaluate(y, everything)

        return at


class System(ABC):
    """The linear systems at a point: F evaluated once, its graph kept for every product.

    Attributes:
        matrix: A, the derivative of F in y.
        matrix_transposed: its transpose, on the same graph.
        residual: F(y, theta), detached.
        size: the norm of the primal part of y.
        travel: the distance from the solver's start to y, the last entry of theta.
        outputs: what F returned, with its graph.
        leaves: the tensors that this graph may end in.
    """

    matrix: LinearOperator
    matrix_transposed: LinearOperator
    residual: Leaves
    outputs: Leaves
    leaves: Leaves

    def __init__(self, setup: Setup, y: Leaves, theta: Leaves) -> None:
        self.size = float(tree.norm(y[: setup.primal]))
        self.travel = float(theta[-1])

    def operator(self, *, transposed: bool) -> LinearOperator:
        """The transpose of A, or A."""
        return self.matrix_transposed if transposed else self.matrix

    @abstractmethod
    def pull_theta(self, u: Leaves) -> Leaves:
        """``B^T u`` for the wanted tensors of theta, B the derivative of F in them."""


class RootSystem(System):
    """For a residual function."""

    def __init__(self, setup: Setup, y: Leaves, theta: Leaves, wanted: Sequence[int]) -> None:
        super().__init__(setup, y, theta)
        own = tuple(leaf.detach().requires_grad_() for leaf in y)
        held = tuple(leaf.detach().requires_grad_(index in wanted) for index, leaf in enumerate(theta))
        self._theta = [held[index] for index in wanted]
        with torch.enable_grad():
            self.outputs = setup.evaluate(own, held)
        self.residual = tuple(leaf.detach() for leaf in self.outputs)
        self.leaves = (*own, *held)
        self.matrix_transposed = _Pullback(self.outputs, own)
        self.matrix = self.matrix_transposed
        if setup.problem.symmetric:
            self.matrix.symmetric = True
        else:
            self.matrix = _Pushforward(self.matrix_transposed)

    def pull_theta(self, u: Leaves) -> Leaves:
        return gradients(self.outputs, self._theta, u)


class GradientSystem(System):
    """For an objective whose gradient in y is F: A is its Hessian."""

    def __init__(
        self, setup: Setup, objective: ScalarFunction, y: Leaves, theta: Leaves, wanted: Sequence[int]
    ) -> None:
        super().__init__(setup, y, theta)
        fixed = [leaf.detach() for leaf in theta]

        def value(moving: Leaves, q: Leaves) -> Tensor:
            held = list(fixed)
            for index, leaf in zip(wanted, moving, strict=True):
                held[index] = leaf
            return objective(tree.unflatten(q, setup.start_spec), *setup.theta(held))

        self._graph = GradientGraph(value, tuple(theta[index] for index in wanted), tuple(y), "the objective")
        self.outputs = self._graph._gradient
        self.residual = self._graph.gradient
        self.leaves = (*self._graph.x, *self._graph.y)
        self.matrix = self.matrix_transposed = Hessian.of(self._graph)

    def pull_theta(self, u: Leaves) -> Leaves:
        return self._graph.mixed_vjp(u)


def assemble(setup: Setup, y: Leaves, theta: Leaves, wanted: Sequence[int] = ()) -> System:
    """The systems at a point, for derivatives in the wanted tensors of theta."""
    objective = setup.problem.objective
    if objective is None:
        return RootSystem(setup, y, theta, wanted)
    return GradientSystem(setup, objective, y, theta, wanted)


class _Pullback(LinearOperator):
    """``A^T``, by backward passes over a kept graph."""

    def __init__(self, outputs: Leaves, inputs: Leaves) -> None:
        super().__init__(inputs)
        self.outputs, self.inputs = outputs, inputs

    def mv(self, v: Tree) -> Tree:
        return gradients(self.outputs, self.inputs, v)

    def _flat_block(self, rows: Tensor) -> Tensor:
        if rows.shape[0] == 1:
            return self.flat_mv(rows[0])[None]
        self.products += rows.shape[0]

        def product(*v: Tensor) -> Leaves:
            return gradients(self.outputs, self.inputs, v)

        return tree.ravel_batch(torch.func.vmap(product)(*tree.unravel(rows, self.like)))

    @property
    def T(self) -> LinearOperator:
        return self if self.symmetric else _Pushforward(self)


class _Pushforward(LinearOperator):
    """``A``: ``v -> A^T v`` is linear, so its own pullback at any v is A; that second graph is kept too."""

    def __init__(self, transposed: _Pullback) -> None:
        super().__init__(transposed.like)
        self._transposed = transposed
        self._graph: _Pullback | None = None

    def _pullback(self) -> _Pullback:
        if self._graph is None:
            start = tuple(torch.zeros_like(leaf).requires_grad_() for leaf in self.like)
            forward = self._transposed
            self._graph = _Pullback(gradients(forward.outputs, forward.inputs, start, create_graph=True), start)
        return self._graph

    def mv(self, v: Tree) -> Tree:
        return self._pullback().mv(v)

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        return self._pullback().flat_mm(rows)

    @property
    def T(self) -> LinearOperator:
        return self._transposed
