"""The schemes of the penalty method written down a second time, on matrices, as their papers state them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bilevel
from constrained import Box, WholeSpace

STEPS = 12
L_G, L_F = 9.0, 2.0
"""Curvatures that are handed to the algorithm: above the true ones, so that it has nothing to raise."""


@dataclass(frozen=True)
class Data:
    """``g = mean (a.y - c - e.x)^2 / 2 + |y|^2 / 4`` and ``f = mean (v.y - t)^2 / 2 + |x - b|^2 / 2 + x.D y``."""

    lower: dict[str, Tensor]
    upper: dict[str, Tensor]
    b: Tensor
    d: Tensor

    def f(self, x: Tensor, y: Tensor, *, batch: Any) -> Tensor:
        rest = batch["v"] @ y - batch["t"]
        return 0.5 * (rest**2).mean() + 0.5 * ((x - self.b) ** 2).sum() + x @ self.d @ y

    def g(self, x: Tensor, y: Tensor, *, batch: Any) -> Tensor:
        rest = batch["a"] @ y - batch["c"] - batch["e"] @ x
        return 0.5 * (rest**2).mean() + 0.25 * (y**2).sum()

    def f_x(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return x - self.b + self.d @ y

    def f_y(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return batch["v"].T @ (batch["v"] @ y - batch["t"]) / len(batch["t"]) + self.d.T @ x

    def g_x(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return -batch["e"].T @ (batch["a"] @ y - batch["c"] - batch["e"] @ x) / len(batch["c"])

    def g_y(self, x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return batch["a"].T @ (batch["a"] @ y - batch["c"] - batch["e"] @ x) / len(batch["c"]) + 0.5 * y


def data(n: int = 3, m: int = 4, rows: int = 12) -> Data:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lower = {"a": 0.7 * normal(rows, m), "c": normal(rows), "e": normal(rows, n)}
    upper = {"v": 0.5 * normal(rows, m), "t": normal(rows)}
    return Data(lower, upper, normal(n), 0.3 * normal(n, m))


@dataclass
class Setting:
    """A problem, whether it is drawn in batches, and the sets."""

    size: int | None
    box: bool
    common: bool = True

    def batches(self, own: Data) -> tuple[bilevel.Batches, bilevel.Batches]:
        return bilevel.Batches(own.upper, self.size), bilevel.Batches(own.lower, self.size)

    def problem(self) -> bilevel.BilevelProblem:
        own = data()
        upper, lower = self.batches(own)
        upper_set = Box(-0.05, 0.3) if self.box else WholeSpace()
        lower_set = Box(-0.08, 0.15) if self.box else WholeSpace()
        return bilevel.BilevelProblem(
            own.f, own.g, upper_data=upper, lower_data=lower, upper_set=upper_set, lower_set=lower_set
        )

    def project_x(self, x: Tensor) -> Tensor:
        return x.clamp(-0.05, 0.3) if self.box else x

    def project_y(self, y: Tensor) -> Tensor:
        return y.clamp(-0.08, 0.15) if self.box else y

    def draws(self) -> Iterator[tuple[Any, Any, Any]]:
        """Batches of f, of g at y and of g at z, as one run draws them."""
        upper, lower = self.batches(data())
        generator = torch.Generator().manual_seed(3)
        up, low = upper.init(generator), lower.init(generator)
        while True:
            one, two = upper.draw(up, generator), lower.draw(low, generator)
            yield one, two, two if self.common else lower.draw(low, generator)


def start() -> tuple[Tensor, Tensor]:
    return torch.full((3,), 0.2, dtype=torch.float64), torch.full((4,), 0.1, dtype=torch.float64)


def run(method: bilevel.Penalty, setting: Setting, steps: int = STEPS) -> tuple[Tensor, Tensor, Any]:
    """x and y after some steps, and the state."""
    problem = setting.problem()
    resolved = method.resolve(problem, *start())
    state = resolved.init(problem, *start(), generator=torch.Generator().manual_seed(3))
    for _ in range(steps):
        resolved.step(problem, state)
        state.step += 1
    return state.x, state.y, state


def algorithm(scheme: Any, kind: Any = bilevel.Penalty, **settings: Any) -> bilevel.Penalty:
    """Everything given, nothing adapted: what the papers write."""
    fixed = {
        "lower_curvature": L_G,
        "upper_curvature": L_F,
        "lower_condition": 1.0,
        "lower_chunks": 1,
        "lower_decay": None,
        "penalty": 8.0,
        "rtol": 0.0,
    }
    return kind(scheme=scheme, **{**fixed, **settings})


def f2ba(setting: Setting, *, p: float, eta: float, inner: int, central: bool = False) -> tuple[Tensor, Tensor]:
    """Chen, Ma, Zhang: T steps of 1/L_g on z and 1/(p L_g + L_f) on y, then x."""
    own, (x, y), draws = data(), start(), setting.draws()
    z = y
    for _ in range(STEPS):
        a, b, c = next(draws)
        for k in range(inner):
            if k and setting.size:
                a, b, c = next(draws)
            if central:
                w = own.f_y(x, z, a)
                z = setting.project_y(z - (p * own.g_y(x, z, c) - w) / (p * L_G + L_F))
            else:
                z = setting.project_y(z - own.g_y(x, z, c) / L_G)
            y = setting.project_y(y - (own.f_y(x, y, a) + p * own.g_y(x, y, b)) / (p * L_G + L_F))
        if not setting.common:
            a, b, c = next(draws)
        slope = own.f_x(x, y, a) + p * (own.g_x(x, y, b) - own.g_x(x, z, c))
        if central:
            slope = (own.f_x(x, y, a) + own.f_x(x, z, a) + p * (own.g_x(x, y, b) - own.g_x(x, z, c))) / 2
        x = setting.project_x(x - eta * slope)
    return x, y


def proximal(setting: Setting, *, p: float, eta: float, inner: int, rho: float, beta: float) -> tuple[Tensor, Tensor]:
    """Kwon et al. 2024, algorithm 1, with sigma = 1/p and gamma_y = 1 / (L_g + sigma L_f + 1/rho)."""
    own, (x, y), draws = data(), start(), setting.draws()
    z, sigma = y, 1.0 / p
    for _ in range(STEPS):
        w, u = y, z
        a, b, c = next(draws)
        for k in range(inner):
            if k and setting.size:
                a, b, c = next(draws)
            slope = sigma * own.f_y(x, w, a) + own.g_y(x, w, b) + (w - y) / rho
            w = setting.project_y(w - slope / (L_G + sigma * L_F + 1 / rho))
            u = setting.project_y(u - (own.g_y(x, u, c) + (u - z) / rho) / (L_G + 1 / rho))
        if not setting.common:
            a, b, c = next(draws)
        y, z = (1 - beta) * y + beta * w, (1 - beta) * z + beta * u
        x = setting.project_x(x - eta * (own.f_x(x, w, a) + (own.g_x(x, w, b) - own.g_x(x, u, c)) / sigma))
    return x, y


class Recursion:
    """One recursive-momentum estimate of the paper: the last point and the last estimate."""

    def __init__(self, weight: Callable[[int], float]) -> None:
        self.weight, self.value, self.last = weight, torch.zeros(()), ()

    def __call__(self, k: int, oracle: Callable[..., Tensor], point: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        fresh = oracle(*point, batch)
        if k:
            fresh = fresh + (1 - self.weight(k)) * (self.value - oracle(*self.last, batch))
        self.value, self.last = fresh, point
        return fresh


def recursions(exponent: float) -> list[Recursion]:
    return [Recursion(lambda k: (k + 1.0) ** -exponent) for _ in range(6)]


def single_loop(
    setting: Setting, *, p: float, eta: float, rho: float, beta: float, exponent: float
) -> tuple[Tensor, Tensor]:
    """Kwon et al. 2024, algorithm 2: T = 1, w and u carried over, six estimates."""
    own, (x, y), draws = data(), start(), setting.draws()
    w = u = z = y
    sigma, r = 1.0 / p, recursions(exponent)
    gamma = 1 / (L_G + sigma * L_F + 1 / rho)
    for k in range(STEPS):
        a, b, c = next(draws)
        up = sigma * r[0](k, own.f_y, (x, w), a) + r[1](k, own.g_y, (x, w), b) + (w - y) / rho
        low = r[2](k, own.g_y, (x, u), c) + (u - z) / rho
        w, u = setting.project_y(w - gamma * up), setting.project_y(u - gamma * low)
        y, z = (1 - beta) * y + beta * w, (1 - beta) * z + beta * u
        if not setting.common:
            a, b, c = next(draws)
        difference = r[4](k, own.g_x, (x, w), b) - r[5](k, own.g_x, (x, u), c)
        x = setting.project_x(x - eta * (r[3](k, own.f_x, (x, w), a) + p * difference))
    return x, y


def f2sa(setting: Setting, *, first: float, inner: int, ratio: float, exponents: tuple[float, float]) -> Any:
    """Kwon et al. 2023: gamma_k, alpha_k and lambda_k = gamma_k / (2 alpha_k)."""
    own, (x, y), draws = data(), start(), setting.draws()
    z = y
    for k in range(STEPS):
        gamma = (1 + k / 10) ** -exponents[1] / (2 * L_G)
        alpha = (1 + k / 10) ** -exponents[0] / (4 * L_G * first)
        p = gamma / (2 * alpha)
        a, b, c = next(draws)
        for t in range(inner):
            if t and setting.size:
                a, b, c = next(draws)
            z = setting.project_y(z - gamma * own.g_y(x, z, c))
            y = setting.project_y(y - alpha * (own.f_y(x, y, a) + p * own.g_y(x, y, b)))
        if not setting.common:
            a, b, c = next(draws)
        slope = own.f_x(x, y, a) + p * (own.g_x(x, y, b) - own.g_x(x, z, c))
        x = setting.project_x(x - ratio * alpha * slope)
    return x, y


def f3sa(setting: Setting, *, first: float, ratio: float, exponents: tuple[float, float]) -> Any:
    """F2SA with T = 1 and six estimates of weights k^(-2 c)."""
    own, (x, y), draws = data(), start(), setting.draws()
    z, r = y, recursions(2 * exponents[1])
    for k in range(STEPS):
        gamma = (1 + k / 10) ** -exponents[1] / (2 * L_G)
        alpha = (1 + k / 10) ** -exponents[0] / (4 * L_G * first)
        p = gamma / (2 * alpha)
        a, b, c = next(draws)
        up = r[0](k, own.f_y, (x, y), a) + p * r[1](k, own.g_y, (x, y), b)
        z = setting.project_y(z - gamma * r[2](k, own.g_y, (x, z), c))
        y = setting.project_y(y - alpha * up)
        if not setting.common:
            a, b, c = next(draws)
        difference = r[4](k, own.g_x, (x, y), b) - r[5](k, own.g_x, (x, z), c)
        x = setting.project_x(x - ratio * alpha * (r[3](k, own.f_x, (x, y), a) + p * difference))
    return x, y
