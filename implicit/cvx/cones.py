"""Euclidean projections onto the cones of conic programs, and their derivatives.

Each family holds ``count`` cones of dimension ``size``; points are ``(batch, count, size)``, derivatives
``(batch, count, size, size)``. A derivative is itself differentiable, to any order. Where a projection has a kink (to
within ``tolerance``) the mean of the derivatives on its two sides is returned and :meth:`Cone.kinks` says so.

References:
    N. Parikh, S. Boyd, "Proximal algorithms", Found. Trends Optim. 1(3), 2014, section 6.3.
    A. Ali, E. Wong, J. Z. Kolter, "A semismooth Newton method for fast, generic convex programming", ICML 2017
        (derivatives of these projections).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cone(ABC):
    """``count`` cones of dimension ``size``, whose rows start at ``start``."""

    start: int
    count: int
    size: int

    @abstractmethod
    def project(self, u: Tensor) -> Tensor:
        """The nearest points of the cone."""

    @abstractmethod
    def derivative(self, u: Tensor, tolerance: Tensor) -> Tensor:
        """The symmetric derivative of the projection at u."""

    @abstractmethod
    def kinks(self, u: Tensor, tolerance: Tensor) -> Tensor:
        """Whether the projection has a kink within ``tolerance`` of u, ``(batch, count)``."""


@dataclass(frozen=True)
class Zero(Cone):
    """The origin: equality constraints."""

    def project(self, u: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(u)

    def derivative(self, u: Tensor, tolerance: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(u)[..., None]

    def kinks(self, u: Tensor, tolerance: Tensor) -> Tensor:
        """Nowhere."""
        return torch.zeros_like(u[..., 0], dtype=torch.bool)


@dataclass(frozen=True)
class Nonnegative(Cone):
    """The half-line."""

    def project(self, u: Tensor) -> Tensor:
        """``max(u, 0)``."""
        return u.clamp(min=0)

    def derivative(self, u: Tensor, tolerance: Tensor) -> Tensor:
        """0 or 1, and 1/2 at 0."""
        return step(u, tolerance[..., None])[..., None]

    def kinks(self, u: Tensor, tolerance: Tensor) -> Tensor:
        """At 0."""
        return u[..., 0].abs() <= tolerance


@dataclass(frozen=True)
class SecondOrder(Cone):
    """``{(t, v) : ||v|| <= t}``, with spectral values ``t - ||v||`` and ``t + ||v||``."""

    def project(self, u: Tensor) -> Tensor:
        """The positive parts of the spectral values, in the same frame."""
        t, v, norm, _ = _split(u)
        low, high = (t - norm).clamp(min=0), (t + norm).clamp(min=0)
        return torch.cat([(low + high)[..., None] / 2, ((high - low) / (2 * _safe(norm)))[..., None] * v], -1)

    def derivative(self, u: Tensor, tolerance: Tensor) -> Tensor:
        """By divided differences of the positive part."""
        t, v, norm, apart = _split(u)
        low, high = step(t - norm, tolerance), step(t + norm, tolerance)
        middle, half = (low + high) / 2, (high - low) / 2
        slope = ((t + norm).clamp(min=0) - (t - norm).clamp(min=0)) / (2 * _safe(norm))
        slope = torch.where(apart, slope, middle)
        unit = v / _safe(norm)[..., None]
        corner = torch.diag_embed(slope[..., None].expand(v.shape))
        corner = corner + (middle - slope)[..., None, None] * unit[..., :, None] * unit[..., None, :]
        edge = half[..., None] * unit
        top = torch.cat([middle[..., None], edge], -1)[..., None, :]
        return torch.cat([top, torch.cat([edge[..., None], corner], -1)], -2)

    def kinks(self, u: Tensor, tolerance: Tensor) -> Tensor:
        """Where a spectral value is 0."""
        t, _, norm, _ = _split(u)
        return ((t - norm).abs() <= tolerance) | ((t + norm).abs() <= tolerance)


def step(value: Tensor, tolerance: Tensor) -> Tensor:
    """The derivative of ``max(value, 0)``, and 1/2 within ``tolerance`` of the kink."""
    return torch.where(value > tolerance, 1.0, torch.where(value < -tolerance, 0.0, 0.5)).to(value.dtype)


def _safe(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, norm, 1.0)


def _split(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, v = u[..., 0], u[..., 1:]
    squared = v.square().sum(-1)
    apart = squared > 0
    norm = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)  # the inner where avoids sqrt'(0) = inf
    return t, v, norm, apart
