"""The declaration of a constrained problem, and the checks that find a wrong one before the first step."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from constrained.sets.base import Bound, check_fit, check_values, not_a_tensor, spread
from implicit import tree
from implicit.derivatives import require_scalar
from implicit.tree import Tree

Function = Callable[[Tree], Any]
Matrix = Any
"""A tensor (dense or sparse), a scipy sparse matrix, or an :class:`implicit.LinearOperator` on ravelled points."""


class Problem(ABC):
    """``min f(x) s.t. h(x) = 0, c(x) <= 0, lower <= x <= upper``; what does not apply is None."""

    objective: Function
    equality: Function | None
    inequality: Function | None = None
    lower: Bound = None
    upper: Bound = None
    gradient: Callable[[Tree], Tree] | None
    equality_jacobian: Callable[[Tree], Matrix] | None
    inequality_jacobian: Callable[[Tree], Matrix] | None = None
    name: str

    @abstractmethod
    def lagrangian_hessian(self, x: Tree, equality: Tree, inequality: Tree) -> Matrix | None:
        """The supplied Hessian of ``f + <equality, h> + <inequality, c>`` at x, or None."""

    @property
    def has_hessian(self) -> bool:
        """Whether the Hessian of the Lagrangian is supplied."""
        return getattr(self, "hessian", None) is not None

    def __post_init__(self) -> None:
        functions = ("objective", "equality", "inequality", "gradient", "equality_jacobian", "inequality_jacobian")
        for name in (*functions, "hessian"):
            function = getattr(self, name, None)
            if (function is not None and not callable(function)) or (function is None and name == "objective"):
                field = "jacobian" if name == "equality_jacobian" and isinstance(self, EqualityProblem) else name
                raise TypeError(f"{field} must be a function of x, got {type(function).__name__}")
        for kind in ("equality", "inequality"):
            if getattr(self, kind) is None and getattr(self, f"{kind}_jacobian") is not None:
                raise TypeError(f"{kind}_jacobian is given, but there is no {kind}: give both or neither")
        for side, other in (("lower", float("inf")), ("upper", -float("inf"))):
            check_values(side, getattr(self, side), (other,), f"give finite numbers, {-other}, or None")

    def validate(self, x0: Tree, name: str = "x0") -> None:
        """Evaluate everything at the start and refuse what cannot be solved; values may be infinite or NaN there.

        Raises:
            TypeError: for leaves that are no floating-point tensors, or functions that return the wrong kind.
            ValueError: for mixed dtypes or devices, a start that is not finite, bounds that do not fit or cross, and
                values that have lost their graph. Supplied derivatives are looked at by :func:`constrained.solve`.
        """
        _check_point(x0, name)
        for side in ("lower", "upper"):
            check_fit(side, getattr(self, side), x0, name)
        self._check_bounds(x0, name)
        own = tree.variables(x0)
        with torch.enable_grad():
            value = require_scalar(self.objective(own), "objective")
        _check_value("objective", value, x0, name)
        _require_graph("objective", "gradient", self.objective, self.gradient, value, x0)
        for kind in ("equality", "inequality"):
            function = getattr(self, kind)
            if function is None:
                continue
            with torch.enable_grad():
                found = function(own)
            _check_constraint(kind, found, x0, name)
            jacobian = getattr(self, f"{kind}_jacobian")
            field = "jacobian" if isinstance(self, EqualityProblem) else f"{kind}_jacobian"
            _require_graph(kind, field, function, jacobian, found, x0)

    def _check_bounds(self, x0: Tree, name: str) -> None:
        lows, highs = spread("lower", self.lower, x0, name), spread("upper", self.upper, x0, name)
        for path, leaf, low, high in zip(tree.paths(x0), tree.leaves(x0), lows, highs, strict=True):
            if low is None or high is None:
                continue
            crossed = (torch.as_tensor(low) > torch.as_tensor(high)).expand(leaf.shape)
            if bool(crossed.any()):
                raise ValueError(
                    f"lower{path} is above upper{path} in {int(crossed.sum())} entries: no point satisfies both; "
                    "exchange them or loosen one"
                )


@dataclass(frozen=True)
class EqualityProblem(Problem):
    """``min f(x) s.t. h(x) = 0``.

    Args:
        objective: f(x), a scalar tensor, twice differentiable.
        equality: h(x), a tensor or a tree of tensors, twice differentiable; m numbers in all.
        gradient: grad f(x), shaped like x; by automatic differentiation if None.
        jacobian: the Jacobian of h at x, of shape (m, n) over the ravelled x and h: a dense or sparse tensor, a scipy
            sparse matrix, or a linear operator; by automatic differentiation if None.
        hessian: ``(x, multiplier)`` to the Hessian of ``f + <multiplier, h>``, of shape (n, n), of the same kinds.
        name: for reports.

    x is any pytree of floating-point tensors of one dtype. The Lagrangian is ``f + <multiplier, h>``.

    Raises:
        TypeError: if a field is no function.

    Example:
        >>> import torch, constrained
        >>> circle = constrained.EqualityProblem(lambda x: x.sum(), lambda x: (x**2).sum() - 2)
        >>> constrained.kkt_residual(circle, torch.tensor([-1.0, -1.0]), torch.tensor(0.5)).stationarity
        0.0
    """

    objective: Function
    equality: Function  # type: ignore[assignment]
    _: KW_ONLY
    gradient: Callable[[Tree], Tree] | None = None
    jacobian: Callable[[Tree], Matrix] | None = None
    hessian: Callable[[Tree, Tree], Matrix] | None = None
    name: str = "problem"

    def __post_init__(self) -> None:
        if self.equality is None:
            raise TypeError(
                "equality must be a function of x, got None; minimize an unconstrained f by implicit.minimize"
            )
        super().__post_init__()

    @property
    def equality_jacobian(self) -> Callable[[Tree], Matrix] | None:  # type: ignore[override]
        """The supplied Jacobian, under the name that all problems share."""
        return self.jacobian

    def lagrangian_hessian(self, x: Tree, equality: Tree, inequality: Tree) -> Matrix | None:
        """The supplied Hessian of ``f + <equality, h>``, or None."""
        return None if self.hessian is None else self.hessian(x, equality)


@dataclass(frozen=True, kw_only=True)
class ConstrainedProblem(Problem):
    """``min f(x) s.t. h(x) = 0, c(x) <= 0, lower <= x <= upper``.

    Args:
        objective: f(x), a scalar tensor, twice differentiable.
        equality: h(x), a tensor or a tree of tensors, or None.
        inequality: c(x), a tensor or a tree of tensors, feasible where it is at most zero, or None. ``scipy.optimize``
            has dict constraints with the opposite sign: see :func:`constrained.from_scipy`.
        lower, upper: bounds on x: None, a number, a tensor that broadcasts, or a tree like x of these; an entry of
            infinite size is no bound.
        gradient: grad f(x), shaped like x.
        equality_jacobian, inequality_jacobian: Jacobians of shape (m, n) over the ravelled x: dense or sparse tensors,
            scipy sparse matrices, or linear operators.
        hessian: ``(x, equality multiplier, inequality multiplier)`` to the Hessian of ``f + <., h> + <., c>``.
        name: for reports.

    Derivatives that are None are computed by automatic differentiation. x is any pytree of floating-point tensors of
    one dtype. Multipliers of ``c <= 0`` and of bounds are at least zero.

    Raises:
        TypeError, ValueError: if a field is misdeclared.
    """

    objective: Function
    equality: Function | None = None
    inequality: Function | None = None
    lower: Bound = None
    upper: Bound = None
    gradient: Callable[[Tree], Tree] | None = None
    equality_jacobian: Callable[[Tree], Matrix] | None = None
    inequality_jacobian: Callable[[Tree], Matrix] | None = None
    hessian: Callable[[Tree, Tree, Tree], Matrix] | None = None
    name: str = "problem"

    def lagrangian_hessian(self, x: Tree, equality: Tree, inequality: Tree) -> Matrix | None:
        """The supplied Hessian of ``f + <equality, h> + <inequality, c>``, or None."""
        return None if self.hessian is None else self.hessian(x, equality, inequality)


def _check_point(x0: Tree, name: str) -> None:
    leaves = tree.leaves(x0)
    if not leaves:
        raise ValueError(f"{name} holds no tensor")
    for path, leaf in zip(tree.paths(x0), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise not_a_tensor(f"{name}{path}", leaf, "give a floating-point tensor")
        if not leaf.is_floating_point():
            cure = "" if leaf.is_complex() else f", such as {name}{path}.double()"
            raise TypeError(f"{name}{path} has dtype {leaf.dtype}: convert it to a real floating dtype{cure}")
        if not bool(torch.isfinite(leaf).all()):
            raise ValueError(f"{name}{path} is not finite: start from numbers")
        if leaf.device != leaves[0].device:
            raise ValueError(f"{name} has leaves on {leaves[0].device} and on {leaf.device}: move them to one device")
    tree.common_dtype(x0, name)


def _check_value(field: str, value: Tensor, x0: Tree, name: str) -> None:
    like = tree.leaves(x0)[0]
    if value.dtype != like.dtype or value.device != like.device:
        raise ValueError(
            f"{field} returns {value.dtype} on {value.device}, but {name} is {like.dtype} on {like.device}: convert one"
        )


def _check_constraint(kind: str, found: Any, x0: Tree, name: str) -> None:
    leaves = tree.leaves(found)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"{kind} must return a tensor or a tree of tensors, got {type(found).__name__}")
    for leaf in leaves:
        _check_value(kind, leaf, x0, name)


def _require_graph(field: str, derivative: str, function: Function, supplied: Any, found: Any, x0: Tree) -> None:
    """A value that does not carry a graph is a constant, or its derivatives would silently be zero."""
    if supplied is not None or all(leaf.requires_grad for leaf in tree.leaves(found)):
        return
    generator = torch.Generator().manual_seed(0)
    moved = tree.axpy(1e-2, tree.randn_like(x0, generator), x0)
    with torch.no_grad():
        there = function(moved)
    for leaf, other in zip(tree.leaves(found), tree.leaves(there), strict=True):
        same = torch.equal(torch.nan_to_num(leaf.detach()), torch.nan_to_num(other.detach()))
        if not leaf.requires_grad and not same:
            raise ValueError(
                f"{field} depends on x, but its value has no graph (numpy, .item(), .detach() or torch.tensor() inside "
                f"it?): compute it with torch operations, or supply {derivative}"
            )
