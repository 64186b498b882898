"""Vector functions with their derivatives, from torch or from numpy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

Matrix = Any
"""A dense tensor or a scipy sparse matrix."""


@dataclass(frozen=True)
class Piece:
    """A function from (n,) to (k,).

    Attributes:
        value: x to the values; carries a graph if ``graph``.
        jacobian: x to a matrix of shape (k, n).
        hessian: (x, v) to the Hessian of ``<v, values>``, shape (n, n).
        graph: whether torch differentiates the values.
        sparse: whether the Jacobian is known to be sparse.
    """

    value: Callable[[Tensor], Tensor]
    jacobian: Callable[[Tensor], Matrix]
    hessian: Callable[[Tensor, Tensor], Matrix]
    graph: bool
    sparse: bool = False


def torch_piece(name: str, fun: Callable[[Tensor], Any]) -> Piece:
    """A function written with torch operations.

    Raises:
        TypeError: when it is called and returns something else.
    """

    def value(x: Tensor) -> Tensor:
        try:
            found = fun(x)
        except (TypeError, RuntimeError) as error:
            if "numpy" not in str(error):
                raise
            raise TypeError(f"{name} failed on a tensor ({error}); {_cure(name)}") from error
        if not isinstance(found, Tensor):
            raise TypeError(f"{name} returned {type(found).__name__} for a tensor; {_cure(name)}")
        return found.reshape(-1)

    return Piece(
        value,
        lambda x: torch.func.jacrev(value)(x),
        lambda x, v: torch.func.hessian(lambda q: v @ value(q))(x),
        graph=True,
    )


def _cure(name: str) -> str:
    return (
        f"as jac is not given, {name} must be written with torch operations: do that, give jac and hess for a numpy "
        "function, or pass finite_differences=True"
    )


def numpy_piece(
    fun: Callable[[np.ndarray], Any], jac: Any, hess: Callable[[np.ndarray, np.ndarray], Any] | None
) -> Piece:
    """A numpy function; derivatives that are None are differenced.

    Args:
        fun: the values, or the pair (values, Jacobian) if ``jac`` is True.
        jac: x to the Jacobian, True, or None.
        hess: (x, v) to the Hessian of ``<v, values>``, or None.
    """
    both = _remembered(fun)

    def values(x: np.ndarray) -> np.ndarray:
        found = both(x)
        return np.atleast_1d(np.asarray(found[0] if jac is True else found, float)).reshape(-1)

    def slopes(x: np.ndarray) -> Any:
        if jac is None:
            return _differences(values, x)
        found = both(x)[1] if jac is True else jac(x)
        return found if scipy.sparse.issparse(found) else np.atleast_2d(np.asarray(found, float))

    def bend(x: np.ndarray, v: np.ndarray) -> Any:
        if hess is not None:
            found = hess(x, v)
            if isinstance(found, scipy.sparse.linalg.LinearOperator):
                found = found @ np.eye(len(x))
            return found if scipy.sparse.issparse(found) else np.atleast_2d(np.asarray(found, float))
        width = 1e-3 if jac is None else None
        found = _differences(lambda q: np.asarray(slopes(q).T @ v).reshape(-1), x, width)
        return 0.5 * (found + found.T)

    def value(x: Tensor) -> Tensor:
        return torch.as_tensor(values(_array(x))).to(x.detach())

    def hessian(x: Tensor, v: Tensor) -> Matrix:
        return _tensor(bend(_array(x), _array(v)), x)

    return Piece(value, lambda x: _tensor(slopes(_array(x)), x), hessian, graph=False)


def _remembered(fun: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
    """The function, with the last point and its result kept: value and gradient are asked for one after the other."""
    last: list[tuple[np.ndarray, Any]] = []

    def call(x: np.ndarray) -> Any:
        if not last or not np.array_equal(last[0][0], x):
            last[:] = [(x.copy(), fun(x.copy()))]
        return last[0][1]

    return call


def _differences(fun: Callable[[np.ndarray], np.ndarray], x: np.ndarray, width: float | None = None) -> np.ndarray:
    """Central differences, shape (k, n), with steps of ``eps^(1/3)`` (or ``width``) relative to the size of x."""
    steps = (np.finfo(float).eps ** (1 / 3) if width is None else width) * np.maximum(1.0, np.abs(x))
    columns = []
    for i, step in enumerate(steps):
        ahead, behind = x.copy(), x.copy()
        ahead[i] += step
        behind[i] -= step
        columns.append((fun(ahead) - fun(behind)) / (ahead[i] - behind[i]))
    return np.stack(columns, axis=1)


def sum_matrices(parts: list[Matrix]) -> Matrix:
    """The sum, sparse where all are."""
    if all(scipy.sparse.issparse(part) for part in parts):
        return scipy.sparse.csr_array(sum(parts[1:], start=parts[0]))
    dense = [torch.as_tensor(p.toarray()) if scipy.sparse.issparse(p) else p for p in parts]
    like = next(p for p in parts if isinstance(p, Tensor))
    return torch.stack([p.to(like) for p in dense]).sum(dim=0)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def _tensor(matrix: Any, like: Tensor) -> Matrix:
    if scipy.sparse.issparse(matrix):
        return scipy.sparse.csr_array(matrix)
    return torch.as_tensor(matrix).to(like.detach())
