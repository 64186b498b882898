"""The exact augmented Lagrangian in (x, multiplier)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from constrained.lagrangian import Point
from implicit import LinearOperator


@dataclass(frozen=True)
class Slope:
    """The derivative of the merit function along a direction; affine in the two penalties.

    Attributes:
        lagrangian: the part of the Lagrangian itself.
        infeasibility: the factor of mu.
        stationarity: the factor of nu.
    """

    lagrangian: float
    infeasibility: float
    stationarity: float

    def at(self, mu: float, nu: float) -> float:
        """The derivative for these penalties."""
        return self.lagrangian + mu * self.infeasibility + nu * self.stationarity

    @property
    def finite(self) -> bool:
        """Whether all three are numbers."""
        total = self.lagrangian + self.infeasibility + self.stationarity
        return total - total == 0.0


@dataclass(frozen=True)
class Terms:
    """The merit function at one point, before the penalties are chosen.

    Attributes:
        lagrangian: ``w (f + <multiplier, c>)``.
        infeasibility: ``|s c|^2``.
        stationarity: ``w^2 |grad_x L|^2``.
    """

    lagrangian: float
    infeasibility: float
    stationarity: float

    def at(self, mu: float, nu: float) -> float:
        """M for these penalties."""
        return self.lagrangian + 0.5 * mu * self.infeasibility + 0.5 * nu * self.stationarity

    @property
    def residual(self) -> float:
        """``|b|^2``, the squared size of the residual of the Newton system."""
        return self.infeasibility + self.stationarity


@dataclass(frozen=True)
class ExactAugmentedLagrangian:
    """``M(x, l) = w (f + <l, c>) + mu/2 |s c|^2 + nu/2 |w grad_x L|^2``, the terms being kept apart.

    For mu large and nu small enough, both finite, its stationary points in (x, l) are the KKT points. With weights of
    one it is the function of the paper; w and s undo the units of the objective and of the constraints.

    Args:
        objective_weight: w, positive.
        constraint_weights: s, shape (m,), positive.

    References:
        Hong, Na, Mahoney, Kolar: Constrained optimization via exact augmented Lagrangian and randomized iterative
        sketching, ICML 2023, section 2; with H, the Hessian of the Lagrangian, in its gradient.
    """

    objective_weight: float
    constraint_weights: Tensor

    def terms(self, point: Point, multiplier: Tensor) -> Terms:
        """The three terms at one point; one gradient of the Lagrangian."""
        gradient = point.lagrangian_gradient(multiplier)
        w = self.objective_weight
        values = torch.stack(
            [
                w * (point.objective + multiplier @ point.constraints),
                (self.constraint_weights * point.constraints).square().sum(),
                w**2 * gradient.square().sum(),
            ]
        )
        return Terms(*values.tolist())

    def floor(self, point: Point, multiplier: Tensor, mu: float) -> float:
        """M without its last term, a lower bound on M that needs no derivative."""
        w = self.objective_weight
        value = w * (point.objective + multiplier @ point.constraints)
        return float(value + 0.5 * mu * (self.constraint_weights * point.constraints).square().sum())

    def gradient(
        self, point: Point, multiplier: Tensor, hessian: LinearOperator, mu: float, nu: float
    ) -> tuple[Tensor, Tensor]:
        """``grad_x M = w grad L + nu w^2 H grad L + mu J^T s^2 c`` and ``grad_l M = w c + nu w^2 J grad L``."""
        w, c = self.objective_weight, point.constraints
        gradient = point.lagrangian_gradient(multiplier)
        along_x = w * gradient + nu * w**2 * hessian.flat_mv(gradient)
        along_x = along_x + mu * point.jacobian.T.flat_mv(self.constraint_weights**2 * c)
        return along_x, w * c + nu * w**2 * point.jacobian.flat_mv(gradient)

    def slope(
        self, point: Point, multiplier: Tensor, hessian: LinearOperator, step: Tensor, multiplier_step: Tensor
    ) -> Slope:
        """``<grad M, (step, multiplier_step)>``, term by term; one product each with H and J."""
        w, c = self.objective_weight, point.constraints
        gradient = point.lagrangian_gradient(multiplier)
        across = point.jacobian.flat_mv(step)
        bent = hessian.flat_mv(step) + point.jacobian.T.flat_mv(multiplier_step)
        values = torch.stack(
            [
                w * (gradient @ step + c @ multiplier_step),
                (self.constraint_weights**2 * c) @ across,
                w**2 * (gradient @ bent),
            ]
        )
        return Slope(*values.tolist())
