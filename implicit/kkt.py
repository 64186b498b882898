"""Differentiable solutions of constrained problems, through their Karush-Kuhn-Tucker conditions."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.linear_solvers import LU, FlatSolution, LinearSolver
from implicit.operators import Dense, LinearOperator
from implicit.optimality import KKTPoint, Objective, kkt, stationary
from implicit.pullback import pullback
from implicit.root_checks import check_tolerance
from implicit.root_functions import solve_implicitly
from implicit.root_system import Problem, Solver
from implicit.status import ConvergenceWarning
from implicit.tree import Tree

Constraint = Callable[..., Tree]


def custom_kkt(
    objective: Objective,
    equality: Constraint | None = None,
    inequality: Constraint | None = None,
    *,
    linear_solver: LinearSolver | None = None,
    residual_tolerance: float | None = 1e-2,
    active_tolerance: float | None = None,
) -> Callable[[Solver], Callable[..., KKTPoint]]:
    """Make any solver of ``min g(y) s.t. h(y) = 0, c(y) <= 0`` differentiable in its other arguments.

    The conditions of :func:`implicit.optimality.kkt` are differentiated, for the primal solution and for the
    multipliers at once. With the Lagrangian ``g + <equality, h> + <inequality, c>`` the multipliers of ``c <= 0`` are
    at least zero.

    Args:
        objective: g(y, *theta), a scalar.
        equality: h(y, *theta), any tree of tensors, or None.
        inequality: c(y, *theta), any tree of tensors, or None.
        linear_solver: for the KKT systems, which are indefinite and, with inequalities, not symmetric. The default is
            dense: LU after scaling rows and columns, and where the system is singular the least-squares solution of
            smallest norm, with a warning.
        residual_tolerance: see :func:`implicit.custom_root`; measured on y alone.
        active_tolerance: an inequality counts as active where its distance ``|c_i| / ||grad c_i||`` from y, relative
            to the norm of y, is at most this, and its force ``multiplier * ||grad c_i||`` as zero where it is at most
            this relative to the gradient of g; ``eps ** (1/3)`` of the dtype by default.

    Returns:
        A decorator for ``solver(init, *theta)`` that returns y alone, a tuple (y, equality multipliers, inequality
        multipliers) or a :class:`KKTPoint`. Multipliers that it leaves out are recovered by nonnegative least squares
        on the active constraints. The decorated function takes the start of y and returns a :class:`KKTPoint`.

    Raises:
        ValueError: if the solver returns something else.

    Warns:
        ConvergenceWarning: when differentiating, where strict complementarity fails (a constraint and its multiplier
            are both zero: the solution has one-sided derivatives only, and what is returned lies between them), where
            the KKT system is singular, where a constraint is violated or a multiplier negative, and where y or the
            multipliers do not satisfy the conditions.

    Example:
        >>> import torch, implicit
        >>> @implicit.custom_kkt(lambda y, a: 0.5 * ((y - a) ** 2).sum(), inequality=lambda y, a: y - 1)
        ... def clip(init, a):
        ...     return a.clamp(max=1.0)
        >>> clip(torch.zeros(2), torch.tensor([0.5, 3.0])).inequality
        tensor([0., 2.])
        >>> torch.func.jacrev(lambda a: clip(torch.zeros(2), a).y)(torch.tensor([0.5, 3.0])).diagonal().abs()
        tensor([1., 0.])
    """
    check_tolerance(residual_tolerance)
    if active_tolerance is not None and not active_tolerance > 0:
        raise ValueError(f"active_tolerance must be None or > 0, got {active_tolerance}")
    program = _Program(objective, equality, inequality, residual_tolerance, active_tolerance)

    def decorate(solver: Solver) -> Callable[..., KKTPoint]:
        problem = Problem(
            residual=kkt(objective, equality, inequality),
            solver=lambda start, *theta: program.complete(solver(start.y, *theta), start, theta),
            linear_solver=linear_solver if linear_solver is not None else EquilibratedLU(),
            residual_tolerance=residual_tolerance,
            examine=program.examine,
        )

        def solve(init: Tree, *theta: Any) -> KKTPoint:
            start = program.start(init, theta)
            return solve_implicitly(problem, start, theta, primal=len(tree.leaves(init)))

        return solve

    return decorate


@dataclass(frozen=True)
class _Program:
    """The problem with its tolerances; everything here sees plain tensors, except ``start``."""

    objective: Objective
    equality: Constraint | None
    inequality: Constraint | None
    residual_tolerance: float | None
    active_tolerance: float | None

    def start(self, init: Tree, theta: tuple[Any, ...]) -> KKTPoint:
        """``init`` with multipliers of the right shapes, all zero."""

        def zeros(constraint: Constraint | None) -> Tree:
            if constraint is None:
                return ()
            with torch.no_grad():
                value = constraint(tree.detach(init), *theta)
            # From shapes alone: a tensor made from another can carry a transform that has ended.
            return tree.map(lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device), value)

        return KKTPoint(init, zeros(self.equality), zeros(self.inequality))

    def complete(self, found: Any, start: KKTPoint, theta: tuple[Any, ...]) -> KKTPoint:
        """What the solver returned, with the multipliers it left out."""
        if isinstance(found, KKTPoint):
            point = found
        elif _fits(found, start.y):
            point = KKTPoint(found)
        elif isinstance(found, tuple | list) and len(found) == 3:
            point = KKTPoint(*found)
        else:
            raise ValueError(
                "the solver must return y, a tuple (y, equality multipliers, inequality multipliers) or a KKTPoint, "
                f"got {tree.structure(found)}"
            )
        given = {"equality": point.equality, "inequality": point.inequality}
        point = point._replace(**{name: () if value is None else value for name, value in given.items()})
        missing = [name for name in ("equality", "inequality") if _left_out(getattr(point, name), getattr(start, name))]
        if not missing:
            return point
        blank = point._replace(**{name: getattr(start, name) for name in missing})
        with torch.no_grad():
            return self._recover(blank, missing, theta)

    def _recover(self, point: KKTPoint, missing: list[str], theta: tuple[Any, ...]) -> KKTPoint:
        """The missing multipliers, zero in ``point``, from ``min || grad L ||`` over those that may be nonzero."""
        slope = tree.ravel(kkt(self.objective, self.equality, self.inequality)(point, *theta).y)
        rows, lower, places = [], [], []
        for name in missing:
            constraint = self.equality if name == "equality" else self.inequality
            assert constraint is not None
            values, jacobian = _linearize(constraint, point.y, theta)
            index = torch.arange(len(values), device=values.device)
            if name == "inequality":
                index = index[values >= -self._tolerance(values) * self._reach(jacobian, point.y)]
            rows.append(jacobian[index])
            lower += [-float("inf") if name == "equality" else 0.0] * len(index)
            places.append((name, index, torch.zeros_like(values)))
        solved = _bounded_least_squares(torch.cat(rows), -slope, lower)
        parts = torch.split(solved, [len(index) for _, index, _ in places])
        found = {
            name: tree.unravel(blank.index_copy(0, index, part), getattr(point, name))
            for (name, index, blank), part in zip(places, parts, strict=True)
        }
        return point._replace(**found)

    def _tolerance(self, like: Tensor) -> float:
        return self.active_tolerance or float(torch.finfo(like.dtype).eps) ** (1 / 3)

    @staticmethod
    def _reach(jacobian: Tensor, y: Tree) -> Tensor:
        """What a constraint value is compared with: its slope times the size of y."""
        size = tree.norm(y)
        return torch.linalg.vector_norm(jacobian, dim=1) * torch.where(size > 0, size, 1.0)

    def examine(self, point: KKTPoint, *theta: Any) -> None:
        """Name what leaves the derivative undefined, or meaningless."""
        scale = self._slope(point, theta)
        if self.inequality is not None:
            self._examine_inequality(self.inequality, point, theta, scale)
        if self.residual_tolerance is None:
            return
        left = tree.norm(kkt(self.objective, self.equality, self.inequality)(point, *theta).y)
        if bool(left > self.residual_tolerance * scale):
            _warn(
                "the multipliers do not balance the objective:",
                f"||grad L|| = {float(left):.3g} against terms of size {float(scale):.3g}",
                "tighten the solver, check the signs in L = g + <equality, h> + <inequality, c>, or return y alone",
            )

    def _examine_inequality(
        self, inequality: Constraint, point: KKTPoint, theta: tuple[Any, ...], scale: Tensor
    ) -> None:
        like = inequality(point.y, *theta)
        values, jacobian = _linearize(inequality, point.y, theta)
        names, multipliers = _entries(like), _ravel_like(point.inequality, like)
        reach = self._reach(jacobian, point.y)
        forces = multipliers * torch.linalg.vector_norm(jacobian, dim=1)
        tolerance = self._tolerance(values)
        degenerate = (values.abs() <= tolerance * reach) & (forces.abs() <= tolerance * scale)
        if bool(degenerate.any()):
            _warn(
                "strict complementarity fails: constraint and multiplier are both zero for",
                _chosen(names, degenerate),
                "the solution has one-sided derivatives only, and what is returned lies between them",
            )
        if self.residual_tolerance is None:
            return
        violated = values > self.residual_tolerance * reach
        negative = forces < -self.residual_tolerance * scale
        cure = "the solver's point is no minimizer; tighten the solver, or check the sign convention c(y) <= 0"
        if bool(violated.any()):
            _warn("constraints are violated:", _chosen(names, violated), cure)
        if bool(negative.any()):
            _warn("multipliers are negative:", _chosen(names, negative), cure)

    def _slope(self, point: KKTPoint, theta: tuple[Any, ...]) -> Tensor:
        """The size of the terms of grad g, which may cancel: ``||grad g|| + ||grad2 g y||``."""
        leaves, spec = tree.flatten(point.y)
        slope = stationary(self.objective)

        def gradient(*q: Tensor) -> tuple[Tensor, ...]:
            return tuple(tree.aligned_leaves(slope(tree.unflatten(q, spec), *theta), spec))

        value, pull = pullback(gradient, leaves)
        return tree.norm(tree.detach(value)) + tree.norm(pull(*leaves))


def _left_out(given: Tree, like: Tree) -> bool:
    return bool(tree.leaves(like)) and isinstance(given, tuple) and not given


def _fits(found: Any, like: Tree) -> bool:
    try:
        leaves = tree.aligned_leaves(found, tree.structure(like))
    except ValueError:
        return False
    return all(isinstance(leaf, Tensor) for leaf in leaves)


def _ravel_like(value: Tree, like: Tree) -> Tensor:
    """``value`` as a vector in the order of ``like``."""
    return tree.ravel(tree.map(lambda _, leaf: leaf, like, value))


def _linearize(constraint: Constraint, y: Tree, theta: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Values, shape (m,), and Jacobian, shape (m, n), of a constraint."""
    leaves, spec = tree.flatten(y)
    (values,), pull = pullback(lambda *q: (tree.ravel(constraint(tree.unflatten(q, spec), *theta)),), leaves)
    values = values.detach()
    if not len(values):
        return values, values.new_zeros(0, tree.size(y))
    rows = torch.func.vmap(pull)(torch.eye(len(values), dtype=values.dtype, device=values.device))
    return values, tree.ravel_batch(rows)


def _bounded_least_squares(rows: Tensor, target: Tensor, lower: list[float]) -> Tensor:
    """``argmin_m || rows^T m - target ||`` with ``m >= lower``, by an active-set method in double precision."""
    from scipy.optimize import lsq_linear

    if not lower:
        return target.new_zeros(0)
    sizes = torch.linalg.vector_norm(rows, dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
    matrix = (rows / sizes[:, None]).T.detach().cpu().double().numpy()
    found = lsq_linear(matrix, target.detach().cpu().double().numpy(), (lower, float("inf")), method="bvls").x
    return torch.as_tensor(found, dtype=rows.dtype, device=rows.device) / sizes


def _entries(value: Tree) -> list[str]:
    """A name for every entry of a constraint, such as ``['budget'][3]``."""
    found = []
    for path, leaf in zip(tree.paths(value), tree.leaves(value), strict=True):
        found += [
            f"{path}{list(where) if where else ''}" or "the constraint" for where in product(*map(range, leaf.shape))
        ]
    return found


def _chosen(names: list[str], mask: Tensor) -> str:
    picked = [name for name, flag in zip(names, mask.tolist(), strict=True) if flag]
    return ", ".join(picked[:5]) + (f" and {len(picked) - 5} more" if len(picked) > 5 else "")


def _warn(what: str, which: str, consequence: str) -> None:
    warnings.warn(f"{what} {which}; {consequence}", ConvergenceWarning, stacklevel=2)


@dataclass(frozen=True)
class _Scaled:
    left: Tensor  # factors of the rows
    right: Tensor  # factors of the columns
    matrix: Dense  # with those factors
    factors: Any  # of that


@dataclass(frozen=True, kw_only=True)
class EquilibratedLU(LinearSolver):
    """Dense LU of a matrix whose rows and columns have been brought to size one.

    A singular system is solved by least squares, with a warning. Norms and residuals are those of the scaled system:
    the units of variables and constraints, and the sizes of multipliers, do not matter.
    """

    def init(self, operator: LinearOperator) -> _Scaled:
        """The factors."""
        matrix = operator.to_dense()
        left, right = _equilibrate(matrix)
        scaled = Dense(left[:, None] * matrix * right, symmetric=False)
        return _Scaled(left, right, scaled, LU().init(scaled))

    def transpose(self, prepared: _Scaled) -> _Scaled:
        """The same factors, used for the transpose."""
        turned = Dense(prepared.matrix.matrix.T, symmetric=False)
        return _Scaled(prepared.right, prepared.left, turned, LU().transpose(prepared.factors))

    def solve_flat(self, operator: LinearOperator, prepared: _Scaled, b: Tensor, x0: Tensor | None) -> FlatSolution:
        """Solve for the rows of ``b``, shape ``(k, n)``."""
        found = LU().solve_flat(prepared.matrix, prepared.factors, b * prepared.left, None)
        return replace(found, value=found.value * prepared.right)


def _equilibrate(matrix: Tensor, sweeps: int = 5) -> tuple[Tensor, Tensor]:
    """Factors of rows and columns that bring the largest entry of each close to one (Ruiz 2001).

    Exchanging rows and columns exchanges the factors, so that the transposed system is treated alike.
    """
    left, right = torch.ones_like(matrix[:, 0]), torch.ones_like(matrix[0])
    for _ in range(sweeps):
        size = (left[:, None] * matrix * right).abs()
        rows, columns = size.amax(dim=1), size.amax(dim=0)
        left = left / torch.where(rows > 0, rows, 1.0).sqrt()
        right = right / torch.where(columns > 0, columns, 1.0).sqrt()
    return left, right
