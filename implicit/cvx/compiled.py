"""From cvxpy's compiled problem to a conic program whose data are affine in the parameters."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from implicit.cvx import cones, exponential, semidefinite
from implicit.cvx.cones import Cone
from implicit.cvx.pattern import AffineMap, Pattern
from implicit.cvx.program import Limits, Program


def from_cvxpy(compiled: Any, parameters: Sequence[Any], outputs: list[int]) -> Program:
    """The structure of a compiled cvxpy problem.

    Args:
        compiled: a ``ParamConeProg`` formatted for Clarabel; its tensors map (parameters, 1) to the data.
        parameters: the cvxpy parameters in the order in which theta holds them, each by columns.
        outputs: the entries of the compiled variable that are returned.
    """
    starts = _starts(parameters)
    limits = [found for p, start in zip(parameters, starts, strict=False) if (found := _limits(p, int(start)))]
    n = compiled.x.size
    place = _places(compiled, parameters)
    linear = _objective(compiled)
    keep = linear.row < n  # the last row is the constant of the objective
    q = _affine(linear.row[keep], linear.col[keep], linear.data[keep], n, place)
    tensor = compiled.A.tocoo()
    m = compiled.A.shape[0] // (n + 1)
    row, column = tensor.row % max(m, 1), tensor.row // max(m, 1)
    inner = column < n
    A, A_pattern = _matrix(row[inner], column[inner], tensor.col[inner], -tensor.data[inner], (m, n), place)
    b = _affine(row[~inner], tensor.col[~inner], tensor.data[~inner], m, place)
    P, P_pattern = _quadratic(compiled.P, n, place)
    return Program((P, q, A, b), P_pattern, A_pattern, _families(compiled.cone_dims), int(starts[-1]), limits, outputs)


def objective_constant(compiled: Any, parameters: Sequence[Any]) -> AffineMap:
    """The term of the compiled objective that no variable enters, which a :class:`Program` leaves out."""
    linear = _objective(compiled)
    last = linear.row == compiled.x.size
    return _affine(
        np.zeros(int(last.sum()), dtype=np.int64), linear.col[last], linear.data[last], 1, _places(compiled, parameters)
    )


def _objective(compiled: Any) -> Any:
    return (compiled.q if hasattr(compiled, "q") else compiled.c).tocoo()  # c before cvxpy 1.8


def _starts(parameters: Sequence[Any]) -> np.ndarray:
    return np.cumsum([0, *[p.size for p in parameters]])


def _places(compiled: Any, parameters: Sequence[Any]) -> np.ndarray:
    """The entry of theta for each column of cvxpy's tensors; -1 for the column of the constants."""
    columns = {p.id: int(start) for p, start in zip(parameters, _starts(parameters), strict=False)}
    place = np.full(compiled.A.shape[1], -1)
    for identifier, start in compiled.param_id_to_col.items():
        if identifier in columns:
            size = compiled.param_id_to_size[identifier]
            place[start : start + size] = columns[identifier] + np.arange(size)
    return place


def _limits(parameter: Any, start: int) -> Limits | None:
    signs = {"nonneg": (0.0, np.inf), "pos": (0.0, np.inf), "nonpos": (-np.inf, 0.0), "neg": (-np.inf, 0.0)}
    ranges = [signs[name] for name in signs if parameter.attributes.get(name)]
    if parameter.attributes.get("bounds") is not None:
        ranges.append(tuple(parameter.attributes["bounds"]))
    if not ranges:
        return None
    lower, upper = (
        torch.as_tensor(np.broadcast_to(np.asarray(bound, dtype=np.float64), parameter.shape).flatten(order="F"))
        for bound in (np.max([r[0] for r in ranges], axis=0), np.min([r[1] for r in ranges], axis=0))
    )
    strict = bool(parameter.attributes.get("pos") or parameter.attributes.get("neg"))
    return Limits(parameter.name(), slice(start, start + parameter.size), lower, upper, strict)


def _quadratic(tensor: Any, n: int, place: np.ndarray) -> tuple[AffineMap, Pattern]:
    if tensor is None:
        none = np.zeros(0, dtype=np.int64)
        return _matrix(none, none, none, np.zeros(0), (n, n), place)
    tensor = tensor.tocoo()
    row, column = tensor.row % n, tensor.row // n
    upper, off = row <= column, row < column  # the solver reads the upper triangle; the other is its mirror image
    return _matrix(
        np.concatenate([row[upper], column[off]]),
        np.concatenate([column[upper], row[off]]),
        np.concatenate([tensor.col[upper], tensor.col[off]]),
        np.concatenate([tensor.data[upper], tensor.data[off]]),
        (n, n),
        place,
    )


def _matrix(
    row: np.ndarray,
    column: np.ndarray,
    source: np.ndarray,
    values: np.ndarray,
    shape: tuple[int, int],
    place: np.ndarray,
) -> tuple[AffineMap, Pattern]:
    keys, entry = np.unique(column.astype(np.int64) * max(shape[0], 1) + row, return_inverse=True)  # by columns
    pattern = Pattern(torch.as_tensor(keys % max(shape[0], 1)), torch.as_tensor(keys // max(shape[0], 1)), shape)
    return _affine(entry, source, values, len(keys), place), pattern


def _affine(row: np.ndarray, source: np.ndarray, values: np.ndarray, size: int, place: np.ndarray) -> AffineMap:
    constant = np.zeros(size)
    fixed = place[source] < 0
    np.add.at(constant, row[fixed], values[fixed])
    moving = ~fixed
    return AffineMap(
        torch.as_tensor(constant),
        torch.as_tensor(row[moving].astype(np.int64)),
        torch.as_tensor(place[source[moving]]),
        torch.as_tensor(values[moving].astype(np.float64)),
    )


def _families(dims: Any) -> list[Cone]:
    """The cones in Clarabel's order of rows: zero, nonnegative, second-order, semidefinite, exponential."""
    found: list[Cone] = []
    start = 0

    def add(make: Any, count: int, size: int, *rest: int) -> None:
        nonlocal start
        if count * size:
            found.append(make(start, count, size, *rest))
            start += count * size

    add(cones.Zero, dims.zero, 1)
    add(cones.Nonnegative, dims.nonneg, 1)
    for size, count in _runs(dims.soc):
        add(cones.SecondOrder if size > 1 else cones.Nonnegative, count, size)
    for order, count in _runs(dims.psd):
        add(semidefinite.Semidefinite, count, order * (order + 1) // 2, order)
    add(exponential.Exponential, dims.exp, 3)
    return found


def _runs(sizes: list[int]) -> list[tuple[int, int]]:
    """Equal neighbours together, as (size, count)."""
    runs: list[tuple[int, int]] = []
    for size in sizes:
        if runs and runs[-1][0] == size:
            runs[-1] = (size, runs[-1][1] + 1)
        else:
            runs.append((size, 1))
    return runs
