"""The exponential cone: logarithms, entropies, logistic losses.

Reference:
    H. Friberg, "Projection onto the exponential cone: a univariate root-finding problem", Optim. Methods Softw. 38(3),
        2023 (the parametrization of the curved boundary by rho = r / s).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit.cvx.cones import Cone, step


@dataclass(frozen=True)
class Exponential(Cone):
    """The closure of ``{(r, s, t) : s > 0, s exp(r / s) <= t}``."""

    def project(self, u: Tensor) -> Tensor:
        """Case by case; on the curved part of the boundary by one scalar root."""
        return _ExponentialProjection.apply(u)

    def derivative(self, u: Tensor, tolerance: Tensor) -> Tensor:
        """On the curved part from the optimality conditions of the projection: ``p + mu grad g(p) = u, g(p) = 0``."""
        return _exponential_derivative(u, self.project(u), tolerance)

    def kinks(self, u: Tensor, tolerance: Tensor) -> Tensor:
        """On the boundaries between the cases."""
        inside, polar, face = _exponential_regions(u)
        r, s, t = u.unbind(-1)
        moved, near = (u - self.project(u)).norm(dim=-1), self.project(u).norm(dim=-1)
        depth = _depth(r, s, t)
        dual_depth = _depth(s - r, r, -t)
        edges = torch.stack([r.abs(), s.abs(), t.abs()]).amin(0) <= tolerance
        curved = ~(inside | polar | face)
        return (
            (inside & (depth <= tolerance))
            | (polar & (dual_depth <= tolerance))
            | (face & edges)
            | (curved & ((moved <= tolerance) | (near <= tolerance)))
        )


def _in_cone(r: Tensor, s: Tensor, t: Tensor) -> Tensor:
    interior = (s > 0) & (s * (r / torch.where(s > 0, s, 1.0)).exp() <= t)
    return interior | ((s == 0) & (r <= 0) & (t >= 0))


def _exponential_regions(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether u is in the cone, in its polar, or projects onto the flat face ``s = 0``; else on the curved part."""
    r, s, t = u.unbind(-1)
    inside = _in_cone(r, s, t)
    polar = _in_cone(s - r, r, -t) & ~inside
    return inside, polar, (r <= 0) & (s <= 0) & ~inside & ~polar


def _depth(r: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Distance of a member to the curved boundary, to first order; 0 on the flat face."""
    ratio = r / torch.where(s > 0, s, 1.0)
    growth = ratio.exp()
    slope = (growth.square() * (1 + (1 - ratio).square()) + 1).sqrt()
    return torch.where(s > 0, (t - s * growth) / slope, 0.0)


def _curve(u: Tensor, rho: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lengths a and c of ``u = a (rho, 1, e^rho) + c (1, 1 - rho, -e^-rho)`` by its first two entries.

    With them the third entry is an increasing function of rho; its excess and its derivative come divided by
    ``e^|rho|``, so that nothing overflows.
    """
    r, s, t = u.unbind(-1)
    bottom, size = rho.square() - rho + 1, rho.abs()
    a, c = ((rho - 1) * r + s) / bottom, (r - rho * s) / bottom
    da, dc = (r - a * (2 * rho - 1)) / bottom, (-s - c * (2 * rho - 1)) / bottom
    up, down = (rho - size).exp(), (-rho - size).exp()
    return torch.stack([a, c]), a * up - c * down - t * (-size).exp(), (a + da) * up + (c - dc) * down


def _bracket(u: Tensor) -> tuple[Tensor, Tensor]:
    """An interval of rho with lengths a, c >= 0 at whose ends the residual has different signs."""
    r, s, _ = u.unbind(-1)
    by_a = 1 - s / torch.where(r == 0, 1.0, r)
    by_mu = r / torch.where(s == 0, 1.0, s)
    low = torch.where(r > 0, by_a, -torch.inf)  # a >= 0
    high = torch.where(s > 0, by_mu, torch.inf)  # c >= 0
    width = torch.ones_like(r)
    for _ in range(11):  # reaches 2^10 > log(1.8e308)
        if not bool((low.isinf() | high.isinf()).any()):
            break
        width = 2 * width
        probe = torch.where(low.isinf(), high - width, low + width)
        value = _curve(u, probe)[1]
        low = torch.where(low.isinf() & (value < 0), probe, low)
        high = torch.where(high.isinf() & (value > 0), probe, high)
    return low, high


def _root(u: Tensor) -> Tensor:
    """rho on the curved part, by Newton steps that fall back on bisection."""
    low, high = _bracket(u)
    rho = (low + high) / 2
    before = high - low
    for _ in range(200):
        _, value, slope = _curve(u, rho)
        low, high = torch.where(value < 0, rho, low), torch.where(value < 0, high, rho)
        newton = rho - value / slope
        # Newton must stay inside and halve the last step
        good = (newton > low) & (newton < high) & ((newton - rho).abs() <= before / 2)
        settled = (newton - rho).abs() <= 1e-15 * (1 + rho.abs())
        moved = torch.where(settled, rho, torch.where(good, newton, (low + high) / 2))
        before, rho = (moved - rho).abs(), moved
        if bool((before <= 4e-16 * (1 + rho.abs())).all()):
            break
    return rho


class _ExponentialProjection(torch.autograd.Function):
    """The projection onto exponential cones, ``(..., 3)``."""

    @staticmethod
    def forward(u: Tensor) -> Tensor:
        inside, polar, face = _exponential_regions(u)
        scale = u.abs().amax(-1, keepdim=True)
        curved = ~(inside | polar | face)
        example = torch.tensor([1.0, 1.0, 0.0], dtype=u.dtype)  # any point of the curved case: keeps the others finite
        scaled = torch.where(curved[..., None], u / torch.where(scale > 0, scale, 1.0), example)
        rho = _root(scaled)
        (a, c), _, _ = _curve(scaled, rho)
        top = torch.where(rho > 0, scaled[..., 2] + c * (-rho).exp(), a * rho.exp()).clamp(min=0)
        a = torch.where(rho > 0, top * (-rho).exp(), a).clamp(min=0)  # a cancels for large rho
        p = scale * torch.stack([a * rho, a, top], -1)
        r, _, t = u.unbind(-1)
        flat = torch.stack([r, torch.zeros_like(r), t.clamp(min=0)], -1)
        p = torch.where(face[..., None], flat, torch.where(polar[..., None], 0.0, p))
        return torch.where(inside[..., None], u, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        u, p = ctx.saved_tensors  # p re-enters this function when differentiated again
        derivative = _exponential_derivative(u, p, torch.zeros_like(u[..., 0]))
        return (derivative @ cotangents[0][..., None])[..., 0]  # symmetric

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _ExponentialProjection.backward(ctx, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        return _ExponentialProjection.apply(args[0].movedim(in_dims[0], 0)), 0


def _exponential_derivative(u: Tensor, p: Tensor, tolerance: Tensor) -> Tensor:
    with torch.no_grad():
        inside, polar, face = _exponential_regions(u)
        curved = ~(inside | polar | face) & (p[..., 1] > 0)  # p_s underflows next to the ray (0, 0, t)
        moved, near = (u - p).norm(dim=-1) <= tolerance, p.norm(dim=-1) <= tolerance
    example = torch.tensor([0.0, 1.0, 1.0], dtype=u.dtype)
    safe = torch.where(curved[..., None], p, example)
    rho = safe[..., 0] / safe[..., 1]
    kappa = torch.where(curved, (u[..., 0] - p[..., 0]), 1.0) / safe[..., 1]  # mu e^rho / a
    one, none = torch.ones_like(rho), torch.zeros_like(rho)
    h = torch.stack([one, -rho, none], -1)
    # the normal e^-rho grad g, for rho > 0, and grad g below
    weight = (-rho.abs()).exp()
    up, down = torch.where(rho > 0, one, weight), torch.where(rho > 0, weight, one)
    normal = torch.stack([up, (1 - rho) * up, -down], -1)
    shrink = kappa / (1 + kappa * (1 + rho.square()))
    inverse = torch.eye(3, dtype=u.dtype) - shrink[..., None, None] * h[..., :, None] * h[..., None, :]
    image = (inverse @ normal[..., None])[..., 0]
    ratio = (normal * image).sum(-1)
    result = inverse - image[..., :, None] * image[..., None, :] / ratio[..., None, None]
    identity = torch.eye(3, dtype=u.dtype).expand(result.shape)
    result = torch.where((curved & moved)[..., None, None], (result + identity) / 2, result)
    result = torch.where((curved & near)[..., None, None], result / 2, result)
    flat = torch.diag_embed(torch.stack([step(-u[..., 0], tolerance), none, step(u[..., 2], tolerance)], -1))
    result = torch.where(curved[..., None, None], result, torch.where(polar[..., None, None], 0.0, flat))
    return torch.where(inside[..., None, None], identity, result)
