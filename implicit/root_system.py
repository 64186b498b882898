"""The linear system of an implicit derivative: the residual at a solution, and its derivative as an operator."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from implicit import tree
from implicit.linear_solvers import LinearSolver
from implicit.operators import LinearOperator
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


class System(LinearOperator):
    """``A^T``, or ``A``, at a point: one evaluation of F, kept as an eager graph, answers every product.

    The last of ``theta`` is no argument of F but the distance from the solver's start to y.

    Attributes:
        residual: F(y, theta), detached.
        wanted: which tensors of theta :meth:`pull_theta` differentiates in.
    """

    def __init__(self, setup: Setup, y: Leaves, theta: Leaves, *, transposed: bool, wanted: Sequence[int] = ()) -> None:
        super().__init__(y)
        self.symmetric = self.positive_definite = setup.problem.symmetric
        self.transposed = transposed
        self.wanted = tuple(wanted)
        self.y = tuple(leaf.detach().requires_grad_() for leaf in y)
        self.theta = tuple(leaf.detach().requires_grad_(index in wanted) for index, leaf in enumerate(theta))
        with torch.enable_grad():
            self.outputs = setup.evaluate(self.y, self.theta)
        self.residual = tuple(leaf.detach() for leaf in self.outputs)
        self._push: tuple[Leaves, Leaves] | None = None

    @property
    def T(self) -> Self:
        """The transpose, on the same graph."""
        if self.symmetric:
            return self
        other = copy.copy(self)
        other.transposed = not self.transposed
        return other

    def _graph(self) -> tuple[Leaves, Leaves]:
        """Outputs and inputs whose vector-Jacobian product is this operator."""
        if self.transposed or self.symmetric:
            return self.outputs, self.y
        if self._push is None:
            # A w is the transpose of v -> A^T v, which is linear in v: its graph serves every product too.
            start = tuple(torch.zeros_like(leaf).requires_grad_() for leaf in self.y)
            self._push = gradients(self.outputs, self.y, start, create_graph=True), start
        return self._push

    def mv(self, v: Tree) -> Tree:
        return gradients(*self._graph(), v)

    def _flat_block(self, rows: Tensor) -> Tensor:
        if rows.shape[0] == 1:
            return self.flat_mv(rows[0])[None]
        self.products += rows.shape[0]
        outputs, inputs = self._graph()

        def product(*v: Tensor) -> Leaves:
            return gradients(outputs, inputs, v)

        return tree.ravel_batch(torch.func.vmap(product)(*tree.unravel(rows, self.like)))

    def pull_theta(self, u: Leaves) -> Leaves:
        """``B^T u`` for the wanted tensors of theta."""
        return gradients(self.outputs, [self.theta[index] for index in self.wanted], u)
