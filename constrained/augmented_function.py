"""The augmented Lagrangian of Powell, Hestenes and Rockafellar around a point."""

import functools

import torch
from torch import Tensor

from constrained.lagrangian import Lagrangian, Point
from implicit import LinearOperator


class Augmented:
    """``weight f + sum rho/2 (h + lambda/rho)^2 + sum rho/2 max(0, c + mu/rho)^2``, less its constants, at a point.

    Args:
        lagrangian: the problem.
        point: where.
        equality, inequality: lambda, shape (m,), and mu >= 0, shape (p,).
        penalty: rho > 0, shape (m + p,).
        weight: of f; zero leaves the violation alone.

    Attributes:
        x: the point, shape (n,).
        value: infinite or NaN where f or a constraint is not finite.
        multiplier: ``(lambda + rho h, max(0, mu + rho c))``, shape (m + p,): the gradient is that of the Lagrangian.
    """

    def __init__(
        self,
        lagrangian: Lagrangian,
        point: Point,
        equality: Tensor,
        inequality: Tensor,
        penalty: Tensor,
        weight: float = 1.0,
    ) -> None:
        self.lagrangian, self.point, self.x = lagrangian, point, point.x
        self._shift, self._penalty, self._weight = (equality, inequality), penalty, weight
        self._rho = lagrangian.split(penalty)
        pressure = inequality + self._rho[1] * point.inequality
        self.multiplier = torch.cat([equality + self._rho[0] * point.equality, pressure.clamp(min=0)])
        self._active = torch.cat([torch.ones_like(equality, dtype=torch.bool), pressure > 0])
        self.value = self._evaluate()

    def moved(self, x: Tensor) -> "Augmented":
        """The same function at another point."""
        return Augmented(self.lagrangian, self.lagrangian.at(x), *self._shift, self._penalty, self._weight)

    def _evaluate(self) -> float:
        """Written so that large multipliers do not cancel."""
        (equality, inequality), (strict, loose), point = self._shift, self._rho, self.point
        h, c = point.equality, point.inequality
        free = -(inequality**2) / (2.0 * loose)
        pressed = torch.where(inequality + loose * c > 0, c * (inequality + 0.5 * loose * c), free)
        total = h @ (equality + 0.5 * strict * h) + pressed.sum()
        # A NaN in c is not greater than zero.
        total = torch.where(torch.isfinite(point.constraints).all(), total, torch.inf)
        return float(total + self._weight * point.objective) if self._weight else float(total)

    @property
    def gradient(self) -> Tensor:
        """Shape (n,)."""
        return self._gradient

    @functools.cached_property
    def _gradient(self) -> Tensor:
        if self._weight:
            return self.point.lagrangian_gradient(self.multiplier)
        return self.point.jacobian.T @ self.multiplier

    @property
    def progress(self) -> Tensor:
        """``|h|`` and ``|max(c, -mu/rho)|``: zero where the constraints hold and the multipliers fit."""
        slack = torch.maximum(self.point.inequality, -self._shift[1] / self._rho[1])
        return torch.cat([self.point.equality, slack]).abs()

    @functools.cached_property
    def _hessian(self) -> LinearOperator:
        return self.point.hessian(self.multiplier, self._weight)

    def product(self, v: Tensor) -> Tensor:
        """The Hessian of the Lagrangian, and ``rho J^T J`` over equalities and the inequalities that press."""
        curved = self._hessian @ v
        if not len(self.multiplier):
            return curved
        jacobian = self.point.jacobian
        return curved + jacobian.T @ torch.where(self._active, self._penalty * (jacobian @ v), 0.0)
