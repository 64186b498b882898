"""One problem with many parameters: values and derivatives of all elements of a batch at once."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from constrained.problem import ConstrainedProblem, EqualityProblem, Problem
from constrained.sets.base import spread
from implicit import tree
from implicit.derivatives import require_scalar
from implicit.pullback import gradients
from implicit.transforms import batched
from implicit.tree import Tree


class Values(NamedTuple):
    """f, shape (k,), and h followed by c, shape (k, m + p)."""

    objective: Tensor
    constraints: Tensor


class Derivatives(NamedTuple):
    """What a step needs at k points.

    Attributes:
        objective: f, shape (k,).
        constraints: h and c, shape (k, m + p).
        gradient: of f, shape (k, n).
        slope: of ``f + <multipliers, (h, c)>``, shape (k, n).
        jacobian: of (h, c), shape (k, m + p, n).
        hessian: of ``f + <multipliers, (h, c)>``, shape (k, n, n); None if it was not asked for.
    """

    objective: Tensor
    constraints: Tensor
    gradient: Tensor
    slope: Tensor
    jacobian: Tensor
    hessian: Tensor | None


class BatchFunctions:
    """The functions of a problem at rows of points, each row with its own data.

    Args:
        problem: its functions are called as ``f(x, *data, *shared)`` for one element, without a batch axis.
        x0: the starts, leaves of shape (B, ...).
        data: trees with leaves of shape (B, ...).
        shared: trees that all elements see unchanged.

    Attributes:
        n, equalities, inequalities: the sizes of one element.
        size: B.
        lower, upper: bounds of one element, shape (n,), infinite where there is none.
        free: one where they differ, zero where they fix a variable, shape (n,).
        bounded, fixed: whether there is any bound, and any that fixes a variable.
        compact: whether every variable has two.
        like, constraint_like: one element's x, and its (h, c), as trees.
        leaves: of data and shared.
        in_dims: of x and those leaves, for ``torch.func.vmap``.
        counts: evaluations, one per element: of f with h and c, of gradients, Jacobians and Hessians.
    """

    def __init__(self, problem: Problem, x0: Tree, data: tuple[Tree, ...], shared: tuple[Tree, ...]) -> None:
        self.problem, self.data, self.shared = problem, data, shared
        flat = tree.ravel_batch(x0)
        self.size, self.n = flat.shape
        self.dtype, self.device = flat.dtype, flat.device
        self.like = tree.map(lambda leaf: leaf[0].detach(), x0)
        self.leaves, self._spec = tree.flatten((data, shared))
        self._rows = len(tree.leaves(data))
        self.in_dims = (0,) * (1 + self._rows) + (None,) * (len(self.leaves) - self._rows)
        self.lower, self.upper = self._bound("lower", -torch.inf), self._bound("upper", torch.inf)
        self.free = (self.lower < self.upper).to(self.dtype)
        self.fixed = bool((self.lower >= self.upper).any())
        self.bounded = bool((torch.isfinite(self.lower) | torch.isfinite(self.upper)).any())
        self.compact = bool((torch.isfinite(self.lower) & torch.isfinite(self.upper)).all())
        with torch.no_grad():
            one = [leaf[0] if i < self._rows else leaf for i, leaf in enumerate(self.leaves)]
            own = self.arguments(one)
            found = [self._example(kind, own) for kind in ("equality", "inequality")]
        self.constraint_like = tuple(tree.map(torch.zeros_like, value) for value in found)
        self.equalities, self.inequalities = (tree.size(value) for value in self.constraint_like)
        self.counts: dict[str, int] = dict.fromkeys(("objective", "gradient", "jacobian", "hessian"), 0)

    @property
    def constraints(self) -> int:
        """m + p."""
        return self.equalities + self.inequalities

    def using(self, leaves: Sequence[Tensor]) -> "BatchFunctions":
        """The same with other tensors in data and shared, of the same shapes."""
        other = copy.copy(self)
        other.leaves, other.counts = list(leaves), dict.fromkeys(self.counts, 0)
        return other

    def arguments(self, leaves: list[Tensor]) -> tuple[Any, ...]:
        """What a function gets behind x, from the leaves of data and shared."""
        data, shared = tree.unflatten(leaves, self._spec)
        return (*data, *shared)

    def first(self) -> Problem:
        """The problem of the first element, as one without a batch."""
        arguments = self.arguments([leaf[0] if i < self._rows else leaf for i, leaf in enumerate(self.leaves)])

        def bind(function: Any) -> Any:
            return None if function is None else lambda *x: function(*x, *arguments)

        names = ("objective", "equality", "inequality", "gradient", "equality_jacobian", "inequality_jacobian")
        fields = {name: bind(getattr(self.problem, name)) for name in names}
        return ConstrainedProblem(**fields, lower=self.problem.lower, upper=self.problem.upper)

    def at(self, rows: "Tensor | slice") -> list[Tensor]:
        """The leaves of the data of some elements, and the shared ones."""
        return [leaf[rows] if i < self._rows else leaf for i, leaf in enumerate(self.leaves)]

    def values(self, x: Tensor, data: list[Tensor]) -> Values:
        """f, h and c at the rows of x, shape (k, n)."""
        self.counts["objective"] += len(x)
        with torch.no_grad():
            return self.evaluate(x, data)

    def derivatives(
        self,
        x: Tensor,
        multipliers: Tensor,
        data: list[Tensor],
        *,
        hessian: bool = True,
        violated: Tensor | None = None,
    ) -> Derivatives:
        """Everything at the rows of x with multipliers of (h, c), shape (k, m + p).

        Rows flagged by ``violated``, shape (k,), get slope and Hessian of ``<w, (h, c)>`` with w the current values of
        h and of ``max(c, 0)`` held fixed: those of half the squared violation, but for the squares of its slopes.
        """
        for name in ("objective", "gradient", "jacobian") + (("hessian",) if hessian else ()):
            self.counts[name] += len(x)
        problem = self.problem
        with torch.enable_grad():
            own = x.detach().requires_grad_()
            objective, constraints = self.evaluate(own, data)
            weight = torch.ones_like(objective)
            if violated is not None:
                weight = (~violated).to(weight.dtype)
                multipliers = torch.where(violated[:, None], self.excess(constraints.detach()), multipliers)
            jacobian = self._jacobian(own, constraints, data)
            supplied = hessian and problem.has_hessian
            again = hessian and not supplied
            if problem.gradient is not None and not again:
                gradient = self._supplied_gradient(own, data)
                slope = weight[:, None] * gradient + combine(jacobian, multipliers)
            else:
                slope = gradients([objective, constraints], [own], [weight, multipliers], create_graph=again)[0]
                gradient = slope.detach() - combine(jacobian, multipliers)
            second = None
            if supplied:
                second = self._supplied_hessian(own, multipliers, data)
                if violated is not None:
                    alone = self._supplied_hessian(own, torch.zeros_like(multipliers), data)
                    second = second - (1.0 - weight)[:, None, None] * alone
            elif hessian:
                second = _rows(slope, own)
        finished = (objective, constraints, gradient, slope, jacobian)
        return Derivatives(*[value.detach() for value in finished], hessian=second)

    def some(self, data: list[Tensor], index: Tensor) -> list[Tensor]:
        """Rows of data that are already those of a part of the batch."""
        return [leaf[index] if i < self._rows else leaf for i, leaf in enumerate(data)]

    def excess(self, constraints: Tensor) -> Tensor:
        """h and ``max(c, 0)``, shape (k, m + p)."""
        m = self.equalities
        return torch.cat([constraints[:, :m], constraints[:, m:].clamp(min=0)], dim=1)

    def trees(self, flat: Tensor, like: Tree) -> Tree:
        """Rows as a tree with leaves of shape (B, ...)."""
        return tree.unravel(flat, like) if tree.leaves(like) else ()

    def evaluate(self, x: Tensor, data: Sequence[Tensor]) -> Values:
        """f, h and c at the rows of x, differentiable."""

        def one(x: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
            return self.element(x, list(leaves))

        return Values(*torch.func.vmap(one, in_dims=self.in_dims)(x, *data))

    def element(self, x: Tensor, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        """f and (h, c) of one element as functions of the ravelled x and the leaves of its data."""
        problem, arguments = self.problem, self.arguments(leaves)
        point = tree.unravel(x, self.like)
        parts = []
        for function, like in zip((problem.equality, problem.inequality), self.constraint_like, strict=True):
            if function is not None:
                parts.append(tree.ravel(tree.map(lambda _, leaf: leaf, like, function(point, *arguments))))
        constraints = torch.cat(parts) if parts else x.new_zeros(0)
        return require_scalar(problem.objective(point, *arguments), "objective"), constraints

    def _jacobian(self, x: Tensor, constraints: Tensor, data: list[Tensor]) -> Tensor:
        problem = self.problem
        if not self.constraints:
            return x.new_zeros(len(x), 0, self.n)
        given = (problem.equality_jacobian, problem.inequality_jacobian)
        needed = (problem.equality, problem.inequality)
        if any(n is not None and g is None for g, n in zip(given, needed, strict=True)):
            return _rows(constraints, x)
        sizes = (self.equalities, self.inequalities)
        parts = [self._supplied(g, x, data, (s, self.n)) for g, s in zip(given, sizes, strict=True) if g is not None]
        return torch.cat(parts, dim=1)

    def _supplied_gradient(self, x: Tensor, data: list[Tensor]) -> Tensor:
        def one(x: Tensor, *leaves: Tensor) -> Tensor:
            found = self.problem.gradient(tree.unravel(x, self.like), *self.arguments(list(leaves)))  # type: ignore[misc]
            return tree.ravel(tree.map(lambda _, leaf: leaf, self.like, found))

        return torch.func.vmap(one, in_dims=self.in_dims)(x.detach(), *data)

    def _supplied(self, function: Any, x: Tensor, data: list[Tensor], shape: tuple[int, int]) -> Tensor:
        def one(x: Tensor, *leaves: Tensor) -> Tensor:
            return _matrix(function(tree.unravel(x, self.like), *self.arguments(list(leaves))), shape)

        return torch.func.vmap(one, in_dims=self.in_dims)(x.detach(), *data)

    def _supplied_hessian(self, x: Tensor, multipliers: Tensor, data: list[Tensor]) -> Tensor:
        def one(x: Tensor, weights: Tensor, *leaves: Tensor) -> Tensor:
            parts = torch.split(weights, [self.equalities, self.inequalities])
            trees = [self.trees(v, like) for v, like in zip(parts, self.constraint_like, strict=True)]
            arguments = self.arguments(list(leaves))
            function: Any = self.problem.hessian  # type: ignore[attr-defined]
            # An equality problem's Hessian has no argument for inequalities.
            own = trees[:1] if isinstance(self.problem, EqualityProblem) else trees
            return _matrix(function(tree.unravel(x, self.like), *own, *arguments), (self.n, self.n))

        return torch.func.vmap(one, in_dims=(0, *self.in_dims))(x.detach(), multipliers, *data)

    def _example(self, kind: str, arguments: tuple[Any, ...]) -> Tree:
        function = getattr(self.problem, kind)
        found = () if function is None else function(self.like, *arguments)
        for leaf in tree.leaves(found):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{kind} must return a tensor or a tree of tensors, got {type(leaf).__name__}")
        return found

    def _bound(self, side: str, default: float) -> Tensor:
        entries = spread(side, getattr(self.problem, side), self.like, "x0")
        parts = []
        for entry, leaf in zip(entries, tree.leaves(self.like), strict=True):
            value = torch.as_tensor(default if entry is None else entry, dtype=leaf.dtype, device=leaf.device)
            parts.append(value.detach().expand(leaf.shape).reshape(-1))
        return torch.cat(parts)


def combine(jacobian: Tensor, multipliers: Tensor) -> Tensor:
    """``J^T v`` for every element: (k, r, n) and (k, r) to (k, n)."""
    return (multipliers.unsqueeze(1) @ jacobian).squeeze(1)


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """``A v`` for every element: (k, r, n) and (k, n) to (k, r)."""
    return (matrix @ vector.unsqueeze(2)).squeeze(2)


def _rows(outputs: Tensor, x: Tensor) -> Tensor:
    """Jacobians (k, r, n) of outputs (k, r), which depend on their own rows of x alone, in one batched pass."""
    k, r = outputs.shape
    if not outputs.requires_grad:
        return x.new_zeros(k, r, x.shape[1])
    basis = torch.eye(r, dtype=x.dtype, device=x.device)[:, None, :].expand(r, k, r)
    return batched(lambda c: gradients([outputs], [x], [c])[0], basis).detach().transpose(0, 1)


def _matrix(found: Any, shape: tuple[int, int]) -> Tensor:
    if not isinstance(found, Tensor):
        raise TypeError(f"a supplied derivative returns {type(found).__name__}: in a batch, give dense tensors")
    if tuple(found.shape) != shape:
        raise ValueError(f"a supplied derivative returns shape {tuple(found.shape)}, expected {shape}")
    return found
