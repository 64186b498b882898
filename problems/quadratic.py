"""Quadratic bilevel problems: the hyper-objective is quadratic and its minimizer one linear solve."""

import torch
from torch import Tensor

from implicit import tree
from problems.case import Case, answered
from problems.registry import register


def _matrices(
    n: int, m: int, condition: float, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """H (m, m) with eigenvalues from 1 to ``condition``, B (m, n), c (m,), a (m,), b (n,), D (n, m)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(normal(m, m))[0]
    eigenvalues = torch.logspace(
        0, torch.log10(torch.tensor(condition, dtype=torch.float64)).item(), m, dtype=torch.float64
    )
    matrix = (basis * eigenvalues) @ basis.T
    parts = ((matrix + matrix.T) / 2, normal(m, n), normal(m), normal(m), normal(n), 0.3 * normal(n, m))
    return tuple(p.to(dtype) for p in parts)  # type: ignore[return-value]


def _build(n: int, m: int, condition: float, seed: int, dtype: torch.dtype, device: str, split: bool) -> Case:
    hessian, b_matrix, c, a, b, d = (t.to(device) for t in _matrices(n, m, condition, seed, dtype))

    def flat_y(y: tree.Tree) -> Tensor:
        return torch.cat([y["a"].reshape(-1), y["rest"][0]["b"]]) if split else y

    def flat_x(x: tree.Tree) -> Tensor:
        return torch.cat([x["scale"].reshape(1), x["others"][0].reshape(-1)]) if split else x

    def upper(x: tree.Tree, y: tree.Tree) -> Tensor:
        p, q = flat_x(x), flat_y(y)
        return 0.5 * ((q - a) ** 2).sum() + 0.5 * ((p - b) ** 2).sum() + p @ d @ q

    def lower(x: tree.Tree, y: tree.Tree) -> Tensor:
        p, q = flat_x(x), flat_y(y)
        return 0.5 * q @ hessian @ q - q @ (b_matrix @ p + c)

    # y* = M x + k turns F into a quadratic in x alone.
    m_matrix, k = torch.linalg.solve(hessian, b_matrix), torch.linalg.solve(hessian, c)
    curvature = m_matrix.T @ m_matrix + torch.eye(n, dtype=dtype, device=device) + d @ m_matrix + (d @ m_matrix).T
    slope = m_matrix.T @ (k - a) - b + d @ k
    x_star = -torch.linalg.solve(curvature, slope)
    y_star = m_matrix @ x_star + k

    def x_penalized(sigma: float) -> tree.Tree:
        # y_s = (H + s I)^-1 (B x + c + s (a - D' x)), so that the hypergradient x - b + D y_s + B' (y* - y_s) / s is
        # affine in x.
        damped = hessian + sigma * torch.eye(m, dtype=dtype, device=device)
        slope_y = torch.linalg.solve(damped, b_matrix - sigma * d.T)
        shift_y = torch.linalg.solve(damped, c + sigma * a)
        matrix = torch.eye(n, dtype=dtype, device=device) + d @ slope_y + b_matrix.T @ (m_matrix - slope_y) / sigma
        return shape_x(torch.linalg.solve(matrix, b - d @ shift_y - b_matrix.T @ (k - shift_y) / sigma))

    def shape_x(p: Tensor) -> tree.Tree:
        return {"scale": p[0], "others": (p[1:].reshape(-1, 2),)} if split else p

    def shape_y(q: Tensor) -> tree.Tree:
        return {"a": q[:4].reshape(2, 2), "rest": [{"b": q[4:]}]} if split else q

    return answered(
        "quadratic",
        upper,
        lower,
        (shape_x(torch.zeros_like(x_star)), shape_y(torch.zeros_like(y_star))),
        (shape_x(x_star), shape_y(y_star)),
        source="closed form: y* = H^-1 (B x + c), grad F affine in x",
        lower_class="strongly convex",
        x_penalized=x_penalized,
    )


@register("quadratic", "coupled quadratics, condition 10, one linear solve away from the answer", "exact")
def quadratic(
    *,
    n: int = 5,
    m: int = 8,
    condition: float = 10.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Case:
    """g = y'Hy/2 - y'(Bx + c), f = |y - a|²/2 + |x - b|²/2 + x'Dy."""
    return _build(n, m, condition, seed, dtype, device, split=False)


@register("quadratic_ill_conditioned", "the same with lower condition number 1e4", "exact", "ill-conditioned")
def quadratic_ill_conditioned(
    *,
    n: int = 5,
    m: int = 20,
    condition: float = 1e4,
    seed: int = 1,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Case:
    """The coupled quadratic with eigenvalues of g_yy from 1 to 1e4."""
    return _build(n, m, condition, seed, dtype, device, split=False)


@register("quadratic_pytree", "the same with both variables as nested pytrees", "exact", "pytree")
def quadratic_pytree(
    *, condition: float = 10.0, seed: int = 2, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Case:
    """The coupled quadratic with x = {scale, (matrix,)} and y = {matrix, [{vector}]}."""
    return _build(5, 8, condition, seed, dtype, device, split=True)
