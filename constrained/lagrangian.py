"""A problem at ravelled points: values, derivatives and products of its Lagrangian, counted."""

import functools
from typing import Any

import scipy.sparse
import torch
from torch import Tensor

from constrained.multipliers import FlatMultipliers, Multipliers
from constrained.problem import Matrix, Problem
from constrained.sets.base import spread
from constrained.stacked import Stacked
from implicit import Dense, Hessian, Jacobian, LinearOperator, Sparse, tree
from implicit.derivatives import require_scalar
from implicit.pullback import gradients
from implicit.transforms import batched
from implicit.tree import Tree

DENSE_LIMIT = 2_000
"""Up to this many variables and constraints together, matrices are formed: a factorisation of one then takes less than
about a second, and answers questions (inertia, exact steps) that products do not."""


class Lagrangian:
    """``f + <l, h> + <v, c>`` over vectors: what the methods see of a problem.

    Points are ravelled, shape (n,); the constraints are the m entries of h followed by the p entries of c, and so are
    their multipliers.

    Args:
        problem: the declaration.
        x0: fixes structure, shapes, dtype and device.
        dense: whether Jacobians and Hessians are formed as matrices; None decides by size (``n + m + p`` up to 2,000)
            and by what is supplied.

    Attributes:
        n, equalities, inequalities: the sizes n, m, p.
        lower, upper: bounds, shape (n,), infinite where there is none.
        counts: evaluations of f with h and c ("objective"), gradients, Jacobians, Hessians, and "products" with
            Hessians that are not formed.
    """

    def __init__(self, problem: Problem, x0: Tree, *, dense: bool | None = None) -> None:
        self.problem, self.like = problem, tree.detach(x0)
        flat = tree.ravel(self.like)
        self.n, self.dtype, self.device = len(flat), flat.dtype, flat.device
        self.lower, self.upper = self._bound("lower", -torch.inf), self._bound("upper", torch.inf)
        with torch.no_grad():
            values = [f(self.like) if f is not None else () for f in (problem.equality, problem.inequality)]
        # Shapes alone: values at the start are not needed, and may be NaN.
        self.constraint_like = tuple(tree.map(lambda v: torch.zeros_like(v), value) for value in values)
        self.equalities, self.inequalities = (tree.size(value) for value in self.constraint_like)
        self.counts: dict[str, int] = dict.fromkeys(("objective", "gradient", "jacobian", "hessian", "products"), 0)
        size = self.n + self.equalities + self.inequalities
        self.dense = size <= DENSE_LIMIT if dense is None else dense

    @property
    def constraints(self) -> int:
        """m + p."""
        return self.equalities + self.inequalities

    @functools.cached_property
    def bounded(self) -> bool:
        """Whether any bound is finite."""
        return bool((torch.isfinite(self.lower) | torch.isfinite(self.upper)).any())

    @functools.cached_property
    def compact(self) -> bool:
        """Whether every variable has two finite bounds."""
        return bool((torch.isfinite(self.lower) & torch.isfinite(self.upper)).all())

    def clip(self, x: Tensor) -> Tensor:
        """The nearest point within the bounds."""
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def at(self, x: Tensor) -> "Point":
        """Values at x, shape (n,), from one evaluation; the derivatives follow when they are asked for."""
        return Point(self, x.detach())

    def tree(self, x: Tensor) -> Tree:
        """A vector shaped like the start."""
        return tree.unravel(x, self.like)

    def flat(self, x: Tree) -> Tensor:
        """A tree shaped like the start as a vector."""
        return tree.ravel(tree.map(lambda _, leaf: leaf, self.like, x))

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The parts, shapes (m,) and (p,), that belong to h and to c."""
        return values[: self.equalities], values[self.equalities :]

    def flat_multipliers(
        self, equality: Tree = None, inequality: Tree = None, lower: Tree = None, upper: Tree = None
    ) -> FlatMultipliers:
        """Multipliers as vectors; None and ``()`` become zeros.

        Raises:
            ValueError: if one does not have the structure and shapes of what it multiplies.
        """
        likes = (*self.constraint_like, self.like, self.like)
        given = zip(FlatMultipliers._fields, (equality, inequality, lower, upper), likes, strict=True)
        return FlatMultipliers(*(self._flat_multiplier(name, value, like) for name, value, like in given))

    def multiplier_trees(self, flat: FlatMultipliers) -> Multipliers:
        """Vectors shaped like what they multiply."""
        likes = (*self.constraint_like, self.like, self.like)
        parts = [tree.unravel(v, like) if tree.leaves(like) else () for v, like in zip(flat, likes, strict=True)]
        return Multipliers(*parts)

    def _flat_multiplier(self, name: str, value: Tree, like: Tree) -> Tensor:
        if value is None or (isinstance(value, tuple) and not value) or not (tree.leaves(like) or tree.leaves(value)):
            return torch.zeros(tree.size(like), dtype=self.dtype, device=self.device)
        try:
            aligned = tree.map(lambda _, leaf: leaf, like, value)
            fits = tree.describe(aligned) == tree.describe(like)
        except ValueError:
            aligned, fits = value, False
        if not fits:
            raise ValueError(
                f"multipliers.{name} is {tree.describe(value)}, but what it multiplies is "
                f"{tree.describe(like)}: give it that structure"
            )
        return tree.ravel(aligned).detach()

    def _bound(self, side: str, default: float) -> Tensor:
        entries = spread(side, getattr(self.problem, side), self.like, "x0")
        parts = []
        for entry, leaf in zip(entries, tree.leaves(self.like), strict=True):
            value = torch.as_tensor(default if entry is None else entry, dtype=leaf.dtype, device=leaf.device)
            parts.append(value.detach().expand(leaf.shape).reshape(-1))
        return torch.cat(parts)


class Point:
    """One point with its values; derivatives are computed once, when first used, on the graph of that evaluation.

    Attributes:
        x: shape (n,).
        objective: f(x), 0-d.
        constraints: h(x) and c(x), shape (m + p,).
    """

    def __init__(self, lagrangian: Lagrangian, x: Tensor) -> None:
        self.lagrangian, self.x = lagrangian, x
        lagrangian.counts["objective"] += 1
        problem = lagrangian.problem
        with torch.enable_grad():
            self._x = x.detach().requires_grad_()
            self._tree = lagrangian.tree(self._x)
            self._objective = require_scalar(problem.objective(self._tree), "objective")
            self._constraints = self._evaluate_constraints(self._tree)
        self.objective, self.constraints = self._objective.detach(), self._constraints.detach()

    def _evaluate_constraints(self, x: Tree) -> Tensor:
        own, problem = self.lagrangian, self.lagrangian.problem
        parts = []
        for function, like in zip((problem.equality, problem.inequality), own.constraint_like, strict=True):
            if function is not None:
                parts.append(tree.ravel(tree.map(lambda _, leaf: leaf, like, function(x))))
        return torch.cat(parts) if parts else own.lower.new_zeros(0)

    @property
    def equality(self) -> Tensor:
        """h(x), shape (m,)."""
        return self.constraints[: self.lagrangian.equalities]

    @property
    def inequality(self) -> Tensor:
        """c(x), shape (p,)."""
        return self.constraints[self.lagrangian.equalities :]

    @functools.cached_property
    def finite(self) -> bool:
        """Whether f, h and c are numbers; reads the result on the host."""
        return bool(torch.isfinite(self.objective) & torch.isfinite(self.constraints).all())

    @functools.cached_property
    def gradient(self) -> Tensor:
        """grad f, shape (n,)."""
        self.lagrangian.counts["gradient"] += 1
        supplied = self.lagrangian.problem.gradient
        if supplied is not None:
            return self._supplied_gradient(supplied(tree.detach(self._tree)))
        return self._pull(self._objective, None)

    @functools.cached_property
    def jacobian(self) -> LinearOperator:
        """The Jacobian of h and c, of shape (m + p, n)."""
        own, problem = self.lagrangian, self.lagrangian.problem
        own.counts["jacobian"] += 1
        supplied = (problem.equality_jacobian, problem.inequality_jacobian)
        if not own.constraints:
            return Dense(own.lower.new_zeros(0, own.n), symmetric=False)
        if any(s is not None for s in supplied):
            return self._supplied_jacobian()
        if own.dense:
            return Dense(self._rows(self._constraints), symmetric=False)
        return Jacobian(lambda x: self._evaluate_constraints(own.tree(x)), self.x)

    def lagrangian_gradient(self, multiplier: Tensor) -> Tensor:
        """``grad f + J^T multiplier``, shape (n,)."""
        own = self.lagrangian
        supplied = own.problem.equality_jacobian is not None or own.problem.inequality_jacobian is not None
        if not own.constraints:
            return self.gradient
        if own.dense or supplied or "jacobian" in self.__dict__:
            rows = self.jacobian
            return self.gradient + (rows.matrix.T @ multiplier if isinstance(rows, Dense) else rows.T @ multiplier)
        return self.gradient + self._pull(self._constraints, multiplier)

    def hessian(self, multiplier: Tensor, weight: float = 1.0) -> LinearOperator:
        """``weight * Hess f + sum_i multiplier_i Hess (h, c)_i``, of shape (n, n)."""
        own = self.lagrangian
        if own.problem.has_hessian:
            return self._supplied_hessian(multiplier, weight)

        def value(x: Tree, objective: Tensor, constraints: Tensor) -> Tensor:
            return weight * objective + constraints @ multiplier

        if own.dense:
            own.counts["hessian"] += 1
            self._require_differentiable()
            with torch.enable_grad():
                total = value(self._tree, self._objective, self._constraints)
                slope = self._x.new_zeros(own.n)
                if total.requires_grad:
                    (slope,) = torch.autograd.grad(total, self._x, create_graph=True, materialize_grads=True)
            matrix = self._rows(slope)
            return Dense(0.5 * (matrix + matrix.T), positive_definite=False)

        def lagrangian(x: Tensor) -> Tensor:
            at = own.tree(x)
            return value(at, require_scalar(own.problem.objective(at), "objective"), self._evaluate_constraints(at))

        return _Counted(Hessian(lagrangian, self.x, positive_definite=False), own.counts)

    def _supplied_gradient(self, found: Tree) -> Tensor:
        like = self.lagrangian.like
        try:
            aligned = tree.map(lambda _, leaf: leaf, like, found)
            fits = tree.describe(aligned) == tree.describe(like)
        except ValueError:
            aligned, fits = found, False
        if not fits:
            raise ValueError(f"gradient returns {tree.describe(found)}, but x is {tree.describe(like)}")
        return tree.ravel(aligned).detach()

    def _require_differentiable(self) -> None:
        """Second derivatives come from the values' graphs; supplied first derivatives do not have one."""
        problem = self.lagrangian.problem
        for field, value, supplied in (
            ("gradient", self._objective, problem.gradient),
            ("jacobian", self._constraints, problem.equality_jacobian or problem.inequality_jacobian),
        ):
            if supplied is not None and value.numel() and not value.requires_grad:
                raise ValueError(f"{field} is supplied for values without a graph: supply hessian too")

    def _supplied_jacobian(self) -> LinearOperator:
        own, problem = self.lagrangian, self.lagrangian.problem
        at, parts = tree.detach(self._tree), []
        bounds = ((0, own.equalities), (own.equalities, own.constraints))
        for kind, (start, end) in zip(("equality", "inequality"), bounds, strict=True):
            if start == end:
                continue
            supplied = getattr(problem, f"{kind}_jacobian")
            if supplied is not None:
                parts.append(as_operator(f"{kind}_jacobian", supplied(at), (end - start, own.n), self.x))
            elif own.dense:
                parts.append(Dense(self._rows(self._constraints[start:end]), symmetric=False))
            else:
                parts.append(Jacobian(lambda x, s=start, e=end: self._evaluate_constraints(own.tree(x))[s:e], self.x))
        return Stacked.of(parts)

    def _supplied_hessian(self, multiplier: Tensor, weight: float) -> LinearOperator:
        own = self.lagrangian
        own.counts["hessian"] += 1
        at = tree.detach(self._tree)

        def at_multiplier(value: Tensor) -> LinearOperator:
            parts = own.split(value)
            trees = [
                tree.unravel(v, like) if tree.leaves(like) else ()
                for v, like in zip(parts, own.constraint_like, strict=True)
            ]
            found = own.problem.lagrangian_hessian(at, *trees)
            return as_operator("hessian", found, (own.n, own.n), self.x, symmetric=True)

        # The supplied function has weight one; the Lagrangian is linear in its weights.
        if weight == 1.0:
            return at_multiplier(multiplier)
        if weight:
            return weight * at_multiplier(multiplier / weight)
        return at_multiplier(multiplier) - at_multiplier(torch.zeros_like(multiplier))

    def _pull(self, outputs: Tensor, cotangent: Tensor | None) -> Tensor:
        cotangent = torch.ones_like(outputs) if cotangent is None else cotangent
        return gradients([outputs], [self._x], [cotangent])[0].detach()

    def _rows(self, outputs: Tensor) -> Tensor:
        """The Jacobian of a vector on the graph of this point, all rows in one batched pass."""
        if not outputs.requires_grad or not len(outputs):
            return outputs.new_zeros(len(outputs), self.lagrangian.n)
        basis = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
        return batched(lambda c: gradients([outputs], [self._x], [c])[0], basis).detach()


class _Counted(LinearOperator):
    """An operator whose products are counted where the problem's evaluations are."""

    def __init__(self, operator: LinearOperator, counts: dict[str, int]) -> None:
        super().__init__(operator.like)
        self.operator, self._counts = operator, counts
        self.symmetric, self.positive_definite = operator.symmetric, False

    def mv(self, v: Tree) -> Tree:
        self._counts["products"] += 1
        return self.operator.mv(v)

    def flat_mv(self, vector: Tensor) -> Tensor:
        self.products += 1
        self._counts["products"] += 1
        return self.operator.flat_mv(vector)

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += len(rows)
        self._counts["products"] += len(rows)
        return self.operator.flat_mm(rows)


def as_operator(
    field: str, matrix: Matrix, shape: tuple[int, int], like: Tensor, *, symmetric: bool = False
) -> LinearOperator:
    """A supplied matrix of any kind as an operator on vectors.

    Raises:
        TypeError: if it is none of the kinds.
        ValueError: if its shape, dtype or device is wrong.
    """
    found: Any = tuple(matrix.shape) if hasattr(matrix, "shape") else None
    if found != shape:
        raise ValueError(f"{field} returns shape {found}, expected {shape}: rows over constraints, columns over x")
    if isinstance(matrix, LinearOperator):
        if symmetric and not matrix.symmetric:
            raise ValueError(f"{field} returns {type(matrix).__name__} that is not declared symmetric: declare it so")
        return matrix
    if scipy.sparse.issparse(matrix):
        out = None if shape[0] == shape[1] else like.new_zeros(shape[0])
        return Sparse(matrix.astype(_numpy_dtype(like)), symmetric=symmetric, like=like, out=out)
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{field} returns {type(matrix).__name__}: give a tensor, a scipy sparse matrix or an operator")
    if matrix.dtype != like.dtype or matrix.device != like.device:
        raise ValueError(f"{field} is {matrix.dtype} on {matrix.device}, x is {like.dtype} on {like.device}")
    if matrix.layout != torch.strided:
        return Sparse(matrix.detach(), symmetric=symmetric)
    return Dense(matrix.detach(), symmetric=symmetric, positive_definite=False)


def _numpy_dtype(like: Tensor) -> Any:
    return torch.empty(0, dtype=like.dtype).numpy().dtype
