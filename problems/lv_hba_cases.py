"""Lower levels with coupled constraints and known answers: what methods for constrained lower levels are tested on.

The scalar problem, the linearly constrained ones with 100 variables, the one with many lower solutions, the one with
several local minima and the random polyhedral one are the test set of the proximal Lagrangian value-function method,
W. Yao, C. Yu, S. Zeng, J. Zhang, "Constrained bi-level optimization: proximal Lagrangian value function approach and
Hessian-free algorithm", ICLR 2024 (``coupled_sum``), and of its relatives.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import root_scalar
from torch import Tensor

from constrained import Affine, Box, HalfSpace
from implicit.tree import Tree
from problems.case import Case, answered
from problems.registry import register

Level = Callable[[Tree, Tree], Tensor]


# A scalar problem whose lower constraint is active, inactive or on the edge.


def _scalar(name: str, a: float, b: float, c: float, dtype: torch.dtype, device: str) -> Case:
    # y* = min(c, x): below c the levels agree on y = x, above it y stays at c.
    pinned = min((a + b) / 2, c)
    candidates = [(pinned, pinned), (max(a, c), c)]
    x, y = min(candidates, key=lambda z: (z[0] - a) ** 2 + (z[1] - b) ** 2)

    def place(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=device)

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (x - a) ** 2 + 0.5 * (y - b) ** 2

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y - c) ** 2

    return answered(
        name,
        upper,
        lower,
        (place(0.0), place(0.0)),
        (place(x), place(y)),
        lower_class="strongly convex",
        multipliers_star={"lower_inequality": place(max(c - x, 0.0))},
        lower_inequality=lambda x, y: y - x,
        joint_set=HalfSpace((-1.0, 1.0), 0.0),
    )


def _register_scalar(name: str, summary: str, targets: tuple[float, float, float]) -> None:
    @register(name, f"scalar, y <= x {summary}", "exact", "constraints", "lv_hba")
    def build(
        *,
        a: float = targets[0],
        b: float = targets[1],
        c: float = targets[2],
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
    ) -> Case:
        """g = (y - c)²/2 with y <= x, f = (x - a)²/2 + (y - b)²/2."""
        return _scalar(name, a, b, c, dtype, device)


_register_scalar("coupled_scalar_active", "active at the solution", (0.0, 1.0, 2.0))  # x* = y* = 1/2, multiplier 3/2
_register_scalar("coupled_scalar_inactive", "inactive at the solution", (3.0, 0.0, 1.0))  # x* = 3, y* = 1, multiplier 0
_register_scalar("coupled_scalar_degenerate", "active without force", (1.0, 2.0, 1.5))  # x* = y* = 3/2, multiplier 0
_register_scalar("coupled_scalar_shifted", "active, both targets beyond it", (0.5, 0.0, 1.0))  # x* = y* = 1/4, 3/4


# One equation that couples all variables; y2 enters the lower level through its sum only.


def _sum(name: str, upper: Level, answer: tuple[float, float, float], n: int, dtype: torch.dtype, device: str) -> Case:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    ones = torch.ones(n, dtype=dtype, device=device)

    def lower(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return 0.5 * (y["y1"] ** 2).sum() - x @ y["y1"] + y["y2"].sum()

    def total(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return x.sum() + y["y1"].sum() + y["y2"].sum()

    return answered(
        name,
        upper,
        lower,
        (0 * ones, {"y1": 0 * ones, "y2": 0 * ones}),
        (answer[0] * ones, {"y1": answer[1] * ones, "y2": answer[2] * ones}),
        lower_class="convex",
        multipliers_star={"lower_equality": -torch.ones((), dtype=dtype, device=device)},
        lower_equality=total,
        joint_set=Affine((ones[None], {"y1": ones[None], "y2": ones[None]})),
    )


@register("coupled_sum", "one equation over all variables, many lower solutions", "exact", "constraints", "lv_hba")
def coupled_sum(*, n: int = 100, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
    """g = |y1|²/2 - x'y1 + 1'y2 with 1'(x + y1 + y2) = 0, f = |x - y2|²/2 + |y1 - 1|²/2; x, y1, y2 of size n.

    x* = -0.3, y1* = 0.7, y2* = -0.4 in every entry, f* = 0.05 n, and the multiplier of the equation is -1.
    """

    def upper(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return 0.5 * ((x - y["y2"]) ** 2).sum() + 0.5 * ((y["y1"] - 1) ** 2).sum()

    return _sum("coupled_sum", upper, (-0.3, 0.7, -0.4), n, dtype, device)


@register("coupled_sum_bilinear", "the same lower level, an upper value of zero", "exact", "constraints", "lv_hba")
def coupled_sum_bilinear(*, n: int = 100, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
    """The lower level of ``coupled_sum`` with f = (y1 - 2)'(x - 1) + |y2 + 3|²: x* = 1, y1* = 2, y2* = -3.

    The gradient of f vanishes at the solution, so that a finite penalty has no bias. From W. Yao, H. Yin, S. Zeng,
    J. Zhang, "Overcoming lower-level constraints in bilevel optimization", 2024.
    """

    def upper(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return (y["y1"] - 2) @ (x - 1) + ((y["y2"] + 3) ** 2).sum()

    return _sum("coupled_sum_bilinear", upper, (1.0, 2.0, -3.0), n, dtype, device)


# Many lower solutions under an inequality.


@register("coupled_segment", "a half-line of lower solutions under y1 <= 1", "exact", "constraints", "lv_hba")
def coupled_segment(*, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
    """g = (y1 + y2 - x)²/2 with y1 <= 1, f = (y1 - 2)²/2 + y2²/2 + (x - 4)²/2: x* = 5/2, y* = (1, 3/2), f* = 11/4."""

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y[0] - 2) ** 2 + 0.5 * y[1] ** 2 + 0.5 * (x - 4) ** 2

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (y.sum() - x) ** 2

    zeros = torch.zeros(2, dtype=dtype, device=device)
    return answered(
        "coupled_segment",
        upper,
        lower,
        (zeros[0].clone(), zeros),
        (zeros.new_tensor(2.5), zeros.new_tensor([1.0, 1.5])),
        lower_class="convex",
        multipliers_star={"lower_inequality": zeros[0].clone()},
        lower_inequality=lambda x, y: y[0] - 1,
        joint_set=HalfSpace((None, zeros.new_tensor([1.0, 0.0])), 1.0),
    )


# One constraint, four local minima.

_BRACKETS = ((0.9, 1.1), (0.1, 0.2), (1.9, 2.1), (2.9, 3.0))  # around the minima in (0, 3), the lowest first


def _wave_slope(x: float) -> float:
    """The derivative of F(x) = exp(2 - x) / (2 + cos 6x) + log((4x - 2)² + 1)/2."""
    width = 2 + np.cos(6 * x)
    return float(np.exp(2 - x) * (6 * np.sin(6 * x) - width) / width**2 + 4 * (4 * x - 2) / ((4 * x - 2) ** 2 + 1))


def _waves(name: str, start: float, dtype: torch.dtype, device: str) -> Case:
    def place(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=device)

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(2 - y) / (2 + torch.cos(6 * x)) + 0.5 * torch.log((4 * x - 2) ** 2 + 1)

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return (y - 2 * x) ** 2

    minima = [place(root_scalar(_wave_slope, bracket=bracket, xtol=1e-15).root) for bracket in _BRACKETS]
    return answered(
        name,
        upper,
        lower,
        (place(start), place(start)),
        (minima[0], minima[0].clone()),
        lower_class="strongly convex",
        multipliers_star={"lower_inequality": 2 * minima[0]},
        source="y* = x in closed form; the minima of F by bracketing its derivative",
        local_minima=tuple(minima[1:]),
        upper_set=Box(0.0, 3.0),
        lower_inequality=lambda x, y: y - x,
    )


def _register_waves(number: int, place: float) -> None:
    @register(
        f"coupled_waves_{number}",
        f"four local minima, from x = {place:g}",
        "exact",
        "constraints",
        "upper-set",
        "lv_hba",
    )
    def build(*, start: float = place, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Case:
        """g = (y - 2x)² with y <= x, f = exp(2 - y) / (2 + cos 6x) + log((4x - 2)² + 1)/2, 0 <= x <= 3.

        y* = x with multiplier 2x; local minima at 0.149, 0.986 (the global one), 2.020 and 2.991.
        """
        return _waves(f"coupled_waves_{number}", start, dtype, device)


for _number, _place in enumerate((0.2, 1.0, 1.9, 2.9), start=1):
    _register_waves(_number, _place)


# A random polyhedron.


@register(
    "coupled_polyhedral", "a random polyhedron moved by x, strongly convex levels", "exact", "constraints", "lv_hba"
)
def coupled_polyhedral(
    *,
    n: int = 3,
    m: int = 4,
    rows: int = 3,
    seed: int = 12,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Case:
    """g = |y - Px|²/2 with B x + A y <= b, f = |x - a|²/2 + |y - c|²/2, everything drawn at random.

    The answer is the best of all pieces of the graph of y*: on each, the set of active rows is fixed, y is affine in
    (x, multipliers), and f is minimized over a polyhedron, again by going through all sets of tight rows.

    Args:
        n: entries of x.
        m: entries of y.
        rows: number of constraints, 1 to 6.
        seed: of the data; with the default two rows have multipliers, the third is slack, and F has one local minimum.
        dtype: of the data and the variables; the answer is computed in float64.
        device: of the data and the variables.

    Raises:
        ValueError: for another number of rows.
    """
    if not 1 <= rows <= 6:
        raise ValueError(f"rows must be 1 to 6, got {rows}: the answer is found by going through 4**rows cases")
    generator = np.random.default_rng(seed)
    P, B, A = (generator.normal(size=shape) for shape in ((m, n), (rows, n), (rows, m)))
    b, a, c = (generator.normal(size=size) for size in (rows, n, m))
    x, y, multipliers = _best_piece(P, A, B, b, a, c)

    def place(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device=device, dtype=dtype)

    p_, a_, b_, offset, target_x, target_y = map(place, (P, A, B, b, a, c))

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((x - target_x) ** 2).sum() + 0.5 * ((y - target_y) ** 2).sum()

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((y - p_ @ x) ** 2).sum()

    return answered(
        "coupled_polyhedral",
        upper,
        lower,
        (torch.zeros_like(target_x), torch.zeros_like(target_y)),
        (place(x), place(y)),
        lower_class="strongly convex",
        multipliers_star={"lower_inequality": place(multipliers)},
        source="drawn at random; the answer by enumeration of active sets",
        lower_inequality=lambda x, y: b_ @ x + a_ @ y - offset,
    )


def _best_piece(
    P: np.ndarray, A: np.ndarray, B: np.ndarray, b: np.ndarray, a: np.ndarray, c: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(x, y, multipliers)`` of the best point with ``y = Px - A'm``, ``m >= 0 >= s = Bx + Ay - b`` and ``m's = 0``.

    Raises:
        RuntimeError: if no piece has a minimizer.
    """
    rows, n = B.shape
    # In v = (x, m): y = Y v, and every row of [-m; s] is affine, at most zero.
    Y = np.hstack([P, -A.T])
    G = np.vstack([np.hstack([np.zeros((rows, n)), -np.eye(rows)]), np.hstack([B, np.zeros((rows, rows))]) + A @ Y])
    h = np.concatenate([np.zeros(rows), b])
    R = np.vstack([np.eye(n, n + rows), Y])  # f = |R v - (a, c)|²/2
    best: tuple[float, np.ndarray] = np.inf, np.empty(0)
    for zero, more in itertools.product(itertools.product((0, 1), repeat=rows), repeat=2):
        # Row i has m_i = 0 or s_i = 0, and perhaps both.
        tight = [i + rows * s for i, s in enumerate(zero)] + [i + rows * (1 - zero[i]) for i in range(rows) if more[i]]
        E = G[tight]
        system = np.block([[R.T @ R, E.T], [E, np.zeros((len(E), len(E)))]])
        solved = np.linalg.lstsq(system, np.concatenate([R.T @ np.concatenate([a, c]), h[tight]]), rcond=None)[0]
        v = solved[: n + rows]
        value = 0.5 * float(np.sum((R @ v - np.concatenate([a, c])) ** 2))
        if np.all(G @ v - h <= 1e-10) and np.allclose(E @ v, h[tight], atol=1e-10) and value < best[0]:
            best = value, v
    if not np.isfinite(best[0]):
        raise RuntimeError("no active set gives a feasible point; choose another seed")
    v = best[1]
    return v[:n], Y @ v, np.maximum(v[n:], 0.0)
