"""Problems from and to the conventions of ``scipy.optimize``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import BFGS, Bounds, HessianUpdateStrategy, LinearConstraint, NonlinearConstraint
from torch import Tensor

from constrained.lagrangian import Lagrangian, Point
from constrained.problem import ConstrainedProblem, Problem
from constrained.scipy_pieces import Piece, numpy_piece, sum_matrices, torch_piece
from implicit import LinearOperator
from implicit.tree import Tree

_SCHEMES = ("2-point", "3-point", "cs")
_make_bounds: Any = Bounds  # the stubs know neither arrays as bounds nor functions as jac
_make_constraint: Any = NonlinearConstraint


def from_scipy(
    fun: Callable[..., Any],
    x0: Any = None,
    *,
    jac: Any = None,
    hess: Any = None,
    bounds: Any = None,
    constraints: Any = (),
    args: Any = (),
    finite_differences: bool = False,
) -> ConstrainedProblem:
    """The problem of a call ``scipy.optimize.minimize(fun, x0, jac=..., constraints=...)``, over vectors x.

    A function whose derivative is given is called with a float64 numpy array, as scipy does, and needs ``hess`` too. A
    function without is called with a tensor: written with torch operations, it is differentiated exactly. The default
    ``jac="2-point"`` of ``NonlinearConstraint`` counts as not given.

    Args:
        fun: the objective.
        x0: if given, everything is evaluated and checked there at once; hand it to :func:`constrained.solve` as well.
        jac: its gradient; True if ``fun`` returns the pair (value, gradient).
        hess: its Hessian, a matrix of any kind.
        bounds: a ``Bounds`` object, or a pair (low, high) for every entry, None being no bound.
        constraints: one or several of ``LinearConstraint``, ``NonlinearConstraint``, and dicts with "type", "fun" and
            optionally "jac", "hess" (of x and v: the Hessian of ``<v, fun>``, as in ``NonlinearConstraint``), "args",
            which all three get last. **Dict constraints of type "ineq" mean fun(x) >= 0**, the opposite of
            ``c(x) <= 0`` here: they become ``c = -fun``.
        args: further arguments of ``fun``, ``jac`` and ``hess``: a tuple, or a single one.
        finite_differences: take functions without derivatives as numpy functions and difference them, and gradients
            without Hessians too: about 10 and 6 digits.

    Returns:
        A problem whose constraints are lists with one tensor for each of scipy's that has equality rows
        (``lb == ub``), or inequality rows: first those of upper bounds, ``fun - ub``, then of lower ones, ``lb - fun``.
        Multipliers come in the same lists; those of inequalities are at least zero.

    Raises:
        TypeError: for quasi-Newton Hessians, which these methods do not use, and what is no constraint.
        ValueError: for constraints with ``lb > ub`` or none but infinite values between them, dicts of another type,
            and, once x0 is known, bounds that cross or do not broadcast to x; a single pair bounds all entries, as in
            scipy.

    Example:
        >>> import constrained, torch
        >>> problem = constrained.from_scipy(
        ...     lambda x: (x**2).sum(), constraints={"type": "ineq", "fun": lambda x: x[0] - 2}
        ... )
        >>> found = constrained.solve(problem, constrained.AugmentedLagrangian(), torch.tensor([3.0, 1.0]))
        >>> round(float(found.x[0]), 3), round(float(found.multipliers.inequality[0]), 3)
        (2.0, 4.0)
    """
    objective = _piece("fun", fun, jac, hess, _as_tuple(args), finite_differences, scalar=True)
    rows = [_rows(c, i, finite_differences) for i, c in enumerate(_as_list(constraints))]
    equal, unequal = [r for r in rows if r.equal.any()], [r for r in rows if r.sided.any()]
    outside = not objective.graph or any(not r.piece.graph for r in rows)
    low, high = _bounds(bounds)

    def hessian(x: Tensor, equality: list[Tensor], inequality: list[Tensor]) -> Any:
        parts = [objective.hessian(x, x.new_ones(1))]
        parts += [r.piece.hessian(x, r.spread_equality(x, v)) for r, v in zip(equal, equality, strict=True)]
        parts += [r.piece.hessian(x, r.spread_inequality(x, v)) for r, v in zip(unequal, inequality, strict=True)]
        return sum_matrices(parts)

    problem = ConstrainedProblem(
        objective=lambda x: objective.value(x)[0],
        equality=(lambda x: [r.equality(x) for r in equal]) if equal else None,
        inequality=(lambda x: [r.inequality(x) for r in unequal]) if unequal else None,
        lower=low,
        upper=high,
        gradient=None if objective.graph else lambda x: objective.jacobian(x)[0],
        equality_jacobian=_stack([(r, r.equality_rows) for r in equal]),
        inequality_jacobian=_stack([(r, r.inequality_rows) for r in unequal]),
        hessian=hessian if outside else None,
    )
    if x0 is not None:
        start = torch.as_tensor(x0)
        problem.validate(start if start.is_floating_point() else start.double())
    return problem


@dataclass(frozen=True)
class _Rows:
    """A vector function between bounds, as equalities and one-sided inequalities."""

    piece: Piece
    low: np.ndarray
    high: np.ndarray

    @property
    def equal(self) -> np.ndarray:
        return self.low == self.high

    @property
    def sided(self) -> np.ndarray:
        return ~self.equal & (np.isfinite(self.low) | np.isfinite(self.high))

    def _index(self, size: int, which: str) -> Tensor:
        low, high = np.broadcast_to(self.low, size), np.broadcast_to(self.high, size)
        kept = {
            "equal": low == high,
            "high": (low != high) & np.isfinite(high),
            "low": (low != high) & np.isfinite(low),
        }
        return torch.as_tensor(np.flatnonzero(kept[which]))

    def _bound(self, values: Tensor, side: np.ndarray, index: Tensor) -> Tensor:
        return torch.as_tensor(np.broadcast_to(side, len(values)).copy()).to(values)[index]

    def equality(self, x: Tensor) -> Tensor:
        values = self.piece.value(x)
        index = self._index(len(values), "equal")
        return values[index] - self._bound(values, self.low, index)

    def inequality(self, x: Tensor) -> Tensor:
        values = self.piece.value(x)
        above, below = self._index(len(values), "high"), self._index(len(values), "low")
        over = values[above] - self._bound(values, self.high, above)
        return torch.cat([over, self._bound(values, self.low, below) - values[below]])

    def equality_rows(self, matrix: Any) -> Any:
        index = self._index(matrix.shape[0], "equal")
        return matrix.tocsr()[index.numpy()] if scipy.sparse.issparse(matrix) else matrix[index]

    def inequality_rows(self, matrix: Any) -> Any:
        above, below = self._index(matrix.shape[0], "high"), self._index(matrix.shape[0], "low")
        if scipy.sparse.issparse(matrix):
            rows = matrix.tocsr()
            return scipy.sparse.vstack([rows[above.numpy()], -rows[below.numpy()]], format="csr")
        return torch.cat([matrix[above], -matrix[below]])

    def spread_equality(self, x: Tensor, multiplier: Tensor) -> Tensor:
        """Multipliers of the function's own rows, shape (k,)."""
        size = len(self.piece.value(x))
        return x.new_zeros(size).index_add(0, self._index(size, "equal"), multiplier)

    def spread_inequality(self, x: Tensor, multiplier: Tensor) -> Tensor:
        size = len(self.piece.value(x))
        above, below = self._index(size, "high"), self._index(size, "low")
        total = x.new_zeros(size).index_add(0, above, multiplier[: len(above)])
        return total.index_add(0, below, -multiplier[len(above) :])


def _stack(parts: Sequence[tuple[_Rows, Callable[[Any], Any]]]) -> Callable[[Tensor], Any] | None:
    """Jacobians below each other; None where torch differentiates all of them, and none is sparse."""
    if all(rows.piece.graph and not rows.piece.sparse for rows, _ in parts):
        return None

    def jacobian(x: Tensor) -> Any:
        found = [take(rows.piece.jacobian(x)) for rows, take in parts]
        if any(scipy.sparse.issparse(m) for m in found):
            return scipy.sparse.vstack(
                [m if scipy.sparse.issparse(m) else scipy.sparse.csr_array(m.numpy()) for m in found], format="csr"
            )
        return torch.cat(found)

    return jacobian


def _as_list(constraints: Any) -> list[Any]:
    single = isinstance(constraints, dict | LinearConstraint | NonlinearConstraint)
    return [constraints] if single else list(constraints)


def _rows(constraint: Any, index: int, finite_differences: bool) -> _Rows:
    name = f"constraints[{index}]"
    if isinstance(constraint, LinearConstraint):
        return _Rows(_linear(constraint.A), *_sides(name, constraint.lb, constraint.ub))
    if isinstance(constraint, NonlinearConstraint):
        jac, hess = constraint.jac, constraint.hess
        if isinstance(hess, HessianUpdateStrategy) and (finite_differences or isinstance(jac, str)):
            hess = None  # scipy's own default where none is given
        if type(hess) is BFGS and not isinstance(jac, str):
            raise TypeError(
                f"hess of {name} is missing (scipy then takes BFGS(), which the methods here do not use): give a "
                "function (x, v), write the function in torch and leave jac out, or pass finite_differences=True"
            )
        piece = _piece(f"{name}.fun", constraint.fun, jac, hess, (), finite_differences, scalar=False)
        return _Rows(piece, *_sides(name, constraint.lb, constraint.ub))
    if not isinstance(constraint, dict):
        raise TypeError(
            f"{name} is a {type(constraint).__name__}: give a LinearConstraint, a NonlinearConstraint or a dict"
        )
    kind = constraint.get("type")
    kind = kind.lower() if isinstance(kind, str) else kind
    if kind not in ("eq", "ineq") or "fun" not in constraint:
        raise ValueError(f"{name} = {constraint!r}: a dict needs 'fun' and 'type', which is 'eq' or 'ineq'")
    args = constraint.get("args", ())
    given = tuple(args) if isinstance(args, list) else _as_tuple(args)  # scipy unpacks a list here, but not in args
    jac, hess = constraint.get("jac"), constraint.get("hess")
    piece = _piece(f"{name}['fun']", constraint["fun"], jac, hess, given, finite_differences, scalar=False)
    return _Rows(piece, *_sides(name, 0.0, 0.0 if kind == "eq" else np.inf))


def _as_tuple(args: Any) -> tuple[Any, ...]:
    return args if isinstance(args, tuple) else (args,)


def _sides(name: str, low: Any, high: Any) -> tuple[np.ndarray, np.ndarray]:
    found = np.broadcast_arrays(np.atleast_1d(np.asarray(low, float)), np.atleast_1d(np.asarray(high, float)))
    wrong = ~(found[0] <= found[1]) | (found[0] == np.inf) | (found[1] == -np.inf)
    if wrong.any():
        raise ValueError(
            f"{name} has lb = {low} and ub = {high}, which no value satisfies in {int(wrong.sum())} rows: give "
            "lb <= ub, with lb = -inf or ub = inf for no bound"
        )
    return found[0], found[1]


def _linear(matrix: Any) -> Piece:
    if scipy.sparse.issparse(matrix):
        kept = scipy.sparse.csr_array(matrix, dtype=float)
        return numpy_piece(lambda x: kept @ x, lambda x: kept, lambda x, v: scipy.sparse.csr_array((len(x),) * 2))
    dense = torch.as_tensor(np.atleast_2d(np.asarray(matrix, float)))
    return torch_piece("a LinearConstraint", lambda x: dense.to(x) @ x)


def _piece(
    name: str, fun: Any, jac: Any, hess: Any, args: tuple[Any, ...], finite_differences: bool, scalar: bool
) -> Piece:
    if not callable(fun):
        raise TypeError(f"{name} must be a function, got {type(fun).__name__}")
    if isinstance(hess, HessianUpdateStrategy):
        raise TypeError(
            f"hess of {name} is a quasi-Newton strategy ({type(hess).__name__}), which the methods here do not use: "
            "give a function, write the function in torch, or pass finite_differences=True"
        )
    jac, hess = (None if isinstance(d, str) and d in _SCHEMES else d for d in (jac, hess))
    if jac is None or jac is False:
        if hess is not None and not finite_differences:
            raise TypeError(f"hess of {name} is given without jac: give both, or neither for a torch function")
        if not finite_differences:
            return torch_piece(name, lambda x: fun(x, *args))
        jac = None
    elif jac is not True and not callable(jac):
        raise TypeError(f"jac of {name} must be a function, True or None, got {jac!r}")
    if hess is None and not finite_differences:
        raise TypeError(
            f"{name} has jac but no hess, and the methods here need second derivatives: give hess, write the function "
            "in torch and leave jac out, or pass finite_differences=True"
        )

    def bound(function: Any) -> Any:
        return (lambda x: function(x, *args)) if callable(function) else function

    if hess is None:
        weighted = None
    elif scalar:
        weighted = lambda x, v: _matrix_like(hess(x, *args)) * v[0]  # noqa: E731
    else:
        weighted = lambda x, v: _matrix_like(hess(x, v, *args))  # noqa: E731
    return numpy_piece(bound(fun), bound(jac), weighted)


def _matrix_like(found: Any) -> Any:
    """What can be scaled: nested lists become an array."""
    kept = scipy.sparse.issparse(found) or isinstance(found, scipy.sparse.linalg.LinearOperator)
    return found if kept else np.asarray(found, float)


def _bounds(bounds: Any) -> tuple[Tensor | None, Tensor | None]:
    if bounds is None:
        return None, None
    if isinstance(bounds, Bounds):
        low, high = np.broadcast_arrays(np.asarray(bounds.lb, float), np.asarray(bounds.ub, float))
    else:
        pairs = list(bounds)
        if not all(hasattr(pair, "__len__") and len(pair) == 2 for pair in pairs):
            raise ValueError(f"bounds = {bounds!r}: give a Bounds object, or one pair (low, high) for every entry of x")
        low = np.array([-np.inf if a is None else a for a, _ in pairs], float)
        high = np.array([np.inf if b is None else b for _, b in pairs], float)
    return torch.as_tensor(np.array(low)), torch.as_tensor(np.array(high))


def to_scipy(problem: Problem, x0: Tree, *, dict_constraints: bool = False) -> dict[str, Any]:
    """Keyword arguments for ``scipy.optimize.minimize``, with exact derivatives.

    Args:
        problem: any problem; scipy sees the ravelled x, as float64.
        x0: the start, which fixes the structure.
        dict_constraints: constraints as dicts, with ``fun = -c`` for inequalities, and no Hessians: for
            ``method="SLSQP"`` and ``"COBYLA"``. Otherwise ``NonlinearConstraint`` objects, for ``"trust-constr"``.

    Returns:
        ``fun``, ``x0``, ``jac``, ``bounds`` (None if there are none), ``constraints``, and ``hess`` unless dicts are
        asked for. Each point is evaluated once, whatever scipy asks for there.

    Example:
        >>> import constrained, scipy.optimize, torch
        >>> circle = constrained.EqualityProblem(lambda x: x.sum(), lambda x: (x**2).sum() - 2)
        >>> arguments = constrained.to_scipy(circle, torch.tensor([-1.5, -0.5]).double(), dict_constraints=True)
        >>> scipy.optimize.minimize(method="SLSQP", **arguments).x.round(4).tolist()
        [-1.0, -1.0]
    """
    problem.validate(x0)
    lagrangian = Lagrangian(problem, x0)
    at = _Memory(lagrangian)
    m, total = lagrangian.equalities, lagrangian.constraints

    def curvature(x: np.ndarray, v: Any, start: int, weight: float) -> Any:
        multiplier = lagrangian.lower.new_zeros(total)
        values = torch.as_tensor(np.atleast_1d(np.asarray(v, float))).to(multiplier)
        multiplier[start : start + len(values)] = values
        return _matrix(at(x).hessian(multiplier, weight))

    arguments: dict[str, Any] = {
        "fun": lambda x: float(at(x).objective),
        "x0": _numpy(lagrangian.flat(x0)),
        "jac": lambda x: _numpy(at(x).gradient),
        "bounds": _make_bounds(_numpy(lagrangian.lower), _numpy(lagrangian.upper)) if lagrangian.bounded else None,
        "constraints": [],
    }
    kinds = (("eq", 0, m, 0.0, 0.0, 1.0), ("ineq", m, total, -np.inf, 0.0, -1.0))
    for kind, start, end, low, high, sign in kinds:
        if start == end:
            continue

        def values(x: np.ndarray, s: int = start, e: int = end) -> np.ndarray:
            return _numpy(at(x).constraints[s:e])

        def rows(x: np.ndarray, s: int = start, e: int = end) -> Any:
            found = at.jacobian(x)
            return found[s:e]

        if dict_constraints:
            turned = {
                "type": kind,
                "fun": lambda x, f=values, s=sign: s * f(x),
                "jac": lambda x, j=rows, s=sign: s * _full(j(x)),
            }
            arguments["constraints"].append(turned)
        else:
            bent = lambda x, v, s=start: curvature(x, v, s, 0.0)  # noqa: E731
            arguments["constraints"].append(_make_constraint(values, low, high, jac=rows, hess=bent))
    if not dict_constraints:
        arguments["hess"] = lambda x: curvature(x, (), 0, 1.0)
    return arguments


class _Memory:
    """The point that scipy asked for last."""

    def __init__(self, lagrangian: Lagrangian) -> None:
        self._lagrangian = lagrangian
        self._x: np.ndarray | None = None
        self._point: Point | None = None
        self._jacobian: Any = None

    def __call__(self, x: np.ndarray) -> Point:
        if self._point is None or self._x is None or not np.array_equal(x, self._x):
            self._x, self._jacobian = np.array(x), None
            self._point = self._lagrangian.at(torch.as_tensor(self._x).to(self._lagrangian.lower))
        return self._point

    def jacobian(self, x: np.ndarray) -> Any:
        point = self(x)
        if self._jacobian is None:
            operator = point.jacobian
            sparse = operator.to_sparse()
            self._jacobian = _numpy(operator.to_dense()) if sparse is None else sparse
        return self._jacobian


def _matrix(operator: LinearOperator) -> Any:
    sparse = operator.to_sparse()
    if sparse is not None:
        return sparse
    dense = hasattr(operator, "matrix")
    return _numpy(operator.to_dense()) if dense else operator.to_scipy()


def _full(matrix: Any) -> np.ndarray:
    return matrix.toarray() if scipy.sparse.issparse(matrix) else matrix


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().double().numpy()
