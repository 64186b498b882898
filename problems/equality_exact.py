"""Equality-constrained problems whose solution and multipliers are closed forms."""

import math

import torch
from torch import Tensor

from constrained import EqualityProblem, Multipliers
from implicit import tree
from implicit.tree import Tree
from problems.constrained_case import ConstrainedCase
from problems.registry import register


def _multipliers(equality: Tensor, like: Tree) -> Multipliers:
    return Multipliers(equality, (), tree.zeros_like(like), tree.zeros_like(like))


@register("equality_qp", "convex quadratic program Ex = d, from its KKT system", "constrained", "equality", "exact")
def equality_qp(
    *, n: int = 8, m: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> ConstrainedCase:
    """``min x'Qx/2 + q'x s.t. Ex = d``: one Newton step from anywhere solves it.

    Q = RR'/n + I, and R, q, E, d are standard normal. Solution and multiplier solve [[Q, E'], [E, 0]] (x, l) = (-q, d).

    Args:
        n: number of variables.
        m: number of constraints, 1 <= m <= n.
        seed: of the data and the start.
        dtype: of everything; the data are drawn in float64 and rounded.
        device: of everything.

    Raises:
        ValueError: unless 1 <= m <= n.
    """
    if not 1 <= m <= n:
        raise ValueError(f"m must be in 1..n={n}, got {m}")
    generator = torch.Generator().manual_seed(seed)
    root, e = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for rows in (n, m))
    q, x0 = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    d = torch.randn(m, generator=generator, dtype=torch.float64)
    quadratic = root @ root.T / n + torch.eye(n, dtype=torch.float64)
    system = torch.zeros(n + m, n + m, dtype=torch.float64)
    system[:n, :n], system[n:, :n], system[:n, n:] = quadratic, e, e.T
    answer = torch.linalg.solve(system, torch.cat([-q, d]))
    x_star = answer[:n]
    f_star = float(0.5 * x_star @ quadratic @ x_star + q @ x_star)
    quadratic, e, q, d, x0, answer = (t.to(device=device, dtype=dtype) for t in (quadratic, e, q, d, x0, answer))
    return ConstrainedCase(
        name="equality_qp",
        problem=EqualityProblem(lambda x: 0.5 * x @ quadratic @ x + q @ x, lambda x: e @ x - d, name="equality_qp"),
        start=x0,
        source="KKT system, closed form",
        f_star=f_star,
        x_star=answer[:n],
        multipliers_star=_multipliers(answer[n:], x0),
    )


@register("circle", "a linear function on a circle in the plane", "constrained", "equality", "exact")
def circle(*, dtype: torch.dtype = torch.float64, device: str = "cpu") -> ConstrainedCase:
    """``min x1 + x2 s.t. x1^2 + x2^2 = 2`` at (-1, -1) with multiplier 1/2; (1, 1) is a maximum that satisfies the
    first-order conditions."""
    x0 = torch.tensor([-1.5, 0.5], dtype=dtype, device=device)
    return ConstrainedCase(
        name="circle",
        problem=EqualityProblem(lambda x: x.sum(), lambda x: (x**2).sum()[None] - 2, name="circle"),
        start=x0,
        source="closed form",
        f_star=-2.0,
        x_star=-torch.ones_like(x0),
        multipliers_star=_multipliers(x0.new_full((1,), 0.5), x0),
    )


@register("sphere", "a linear function on the unit sphere, over a pytree", "constrained", "equality", "exact", "pytree")
def sphere(*, n: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> ConstrainedCase:
    """``min <a, x> s.t. ||x||^2 = 1`` at -a / ||a|| with multiplier ||a|| / 2.

    x is ``{"rest": (matrix of 2 columns,), "first": scalar}`` with n entries, n odd or even: the matrix has
    ``(n - 1) // 2`` rows, and a vector ``"last"`` of one entry follows where n is even.

    Args:
        n: number of variables, at least 3.
        seed: of a and of the start, a random point off the sphere.
        dtype: of everything.
        device: of everything.

    Raises:
        ValueError: for n below 3.
    """
    if n < 3:
        raise ValueError(f"n must be at least 3, got {n}")
    generator = torch.Generator().manual_seed(seed)
    flat, begin = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = (n - 1) // 2

    def split(v: Tensor) -> Tree:
        v = v.to(device=device, dtype=dtype)
        parts: dict[str, Tree] = {"rest": (v[: 2 * rows].reshape(rows, 2),), "first": v[2 * rows]}
        return parts if 2 * rows + 1 == n else {**parts, "last": v[2 * rows + 1 :]}

    a, size = split(flat), math.sqrt(float(flat @ flat))
    x0 = split(begin)
    return ConstrainedCase(
        name="sphere",
        problem=EqualityProblem(lambda x: tree.dot(a, x), lambda x: tree.dot(x, x)[None] - 1, name="sphere"),
        start=x0,
        source="closed form",
        f_star=-size,
        x_star=split(-flat / size),
        multipliers_star=_multipliers(tree.leaves(x0)[0].new_full((1,), size / 2), x0),
    )
