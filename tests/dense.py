"""Bilevel settings solved to rounding, and their derivatives as dense matrices: what the engine is compared with."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jacrev
from torch.nn.functional import cross_entropy

import implicit
from implicit import NewtonCG, tree
from implicit.tree import Tree

Objective = Callable[[Tree, Tree], Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Flat:
    """A function of two trees over ravelled vectors, with its dense derivatives."""

    def __init__(self, fn: Objective, x: Tree, y: Tree) -> None:
        self.fn, self.like = fn, (x, y)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fn(tree.unravel(x, self.like[0]), tree.unravel(y, self.like[1]))

    def gradient(self, x: Tensor, y: Tensor, level: int) -> Tensor:
        return grad(self, argnums=level)(x, y)

    def hessian(self, x: Tensor, y: Tensor) -> Tensor:  # (m, m)
        return jacrev(grad(self, argnums=1), argnums=1)(x, y)

    def mixed(self, x: Tensor, y: Tensor) -> Tensor:  # (m, n): row i is the gradient in x of dg/dy_i
        return jacrev(grad(self, argnums=1), argnums=0)(x, y)


@dataclass(frozen=True)
class Setting:
    """A bilevel problem at a point: x arbitrary, y the lower solution to rounding."""

    upper: Objective
    lower: Objective
    x: Tree
    y: Tree

    @property
    def flat(self) -> tuple[Flat, Flat, Tensor, Tensor]:
        f, g = Flat(self.upper, self.x, self.y), Flat(self.lower, self.x, self.y)
        return f, g, tree.ravel(self.x), tree.ravel(self.y)

    def dense(self, y: Tree | None = None) -> Tensor:
        """The implicit hypergradient by dense matrices."""
        f, g, x, best = self.flat
        at = best if y is None else tree.ravel(y)
        adjoint = torch.linalg.solve(g.hessian(x, at), f.gradient(x, at, 1))
        return f.gradient(x, at, 0) - g.mixed(x, at).T @ adjoint

    def solved(self, x: Tensor) -> Tensor:
        """The lower solution at another x by dense Newton steps from y."""
        _, g, _, y = self.flat
        for _ in range(6):
            y = y - torch.linalg.solve(g.hessian(x, y), g.gradient(x, y, 1))
        return y

    def differences(self, width: float = 1e-4) -> Tensor:
        """Central differences of F(x) = f(x, y*(x)) with the lower level solved anew."""
        f, _, x, _ = self.flat
        steps = width * torch.eye(len(x))
        values = [f(x + s, self.solved(x + s)) - f(x - s, self.solved(x - s)) for s in steps]
        return torch.stack(values) / (2 * width)


def settle(upper: Objective, lower: Objective, x: Tree, y: Tree) -> Setting:
    """Solve the lower level to rounding: Newton-CG for the way, dense Newton steps for the last digits."""
    rough = implicit.minimize(lambda q: lower(x, q), y, NewtonCG(rtol=1e-9))
    setting = Setting(upper, lower, x, rough.point)
    done = Setting(upper, lower, x, tree.unravel(setting.solved(tree.ravel(x)), y))
    _, g, at, point = done.flat
    assert float(g.gradient(at, point, 1).norm()) < 1e-12
    assert float(torch.linalg.eigvalsh(g.hessian(at, point))[0]) > 0
    return done


def condition(setting: Setting) -> float:
    _, g, x, y = setting.flat
    eigenvalues = torch.linalg.eigvalsh(g.hessian(x, y))
    return float(eigenvalues[-1] / eigenvalues[0])


def ridge() -> Setting:
    """One penalty per feature, features on scales from 1 to 1/300."""
    scales = torch.logspace(0, -2.5, 25)
    train, held = normal(1, 60, 25) * scales, normal(2, 40, 25) * scales
    target, held_target = train @ (normal(3, 25) / scales) + 0.3 * normal(4, 60), held @ (normal(3, 25) / scales)

    def upper(x: Tree, w: Tree) -> Tensor:
        return 0.5 * ((held @ w - held_target) ** 2).mean() + 0.01 * (x**2).sum()

    def lower(x: Tree, w: Tree) -> Tensor:
        return 0.5 * ((train @ w - target) ** 2).mean() + 0.5 * (torch.exp(x) * w**2).sum()

    return settle(upper, lower, -9 + 0.3 * normal(5, 25), torch.zeros(25))


def logistic() -> Setting:
    """Three classes, a log-penalty per feature and one for the intercept; the trees of x and y have keys in common."""
    train, held = normal(6, 80, 6), normal(7, 50, 6)
    truth = normal(8, 6, 3)
    labels, held_labels = ((part @ truth + normal(9, len(part), 3)).argmax(dim=1) for part in (train, held))

    def upper(x: Tree, y: Tree) -> Tensor:
        return cross_entropy(held @ y["w"] + y["b"], held_labels) + 0.01 * (x["w"] ** 2).sum()

    def lower(x: Tree, y: Tree) -> Tensor:
        ridge = (torch.exp(x["w"])[:, None] * y["w"] ** 2).sum() + torch.exp(x["b"]) * (y["b"] ** 2).sum()
        return cross_entropy(train @ y["w"] + y["b"], labels) + 0.5 * ridge

    x = {"w": -6 + normal(10, 6), "b": torch.tensor(-5.0)}
    return settle(upper, lower, x, {"b": torch.zeros(3), "w": torch.zeros(6, 3)})


def network() -> Setting:
    """Two layers with tanh: a log weight decay per layer and a log weight per training row."""
    train, held = normal(11, 40, 3), normal(12, 30, 3)
    target, held_target = (torch.sin(2 * part).sum(dim=1) + 0.1 * normal(13, len(part)) for part in (train, held))

    def output(y: Tree, rows: Tensor) -> Tensor:
        hidden = torch.tanh(rows @ y["first"]["weight"] + y["first"]["bias"])
        return hidden @ y["second"][0] + y["second"][1]

    def upper(x: Tree, y: Tree) -> Tensor:
        return 0.5 * ((output(y, held) - held_target) ** 2).mean()

    def lower(x: Tree, y: Tree) -> Tensor:
        data = 0.5 * (torch.exp(x["rows"]) * (output(y, train) - target) ** 2).mean()
        sizes = torch.stack([tree.dot(y[layer], y[layer]) for layer in ("first", "second")])
        return data + 0.5 * (torch.exp(x["decay"]) * sizes).sum()

    x = {"rows": 0.3 * normal(14, 40), "decay": torch.tensor([-6.5, -6.5])}
    y = {"second": [normal(15, 4), torch.zeros(())], "first": {"weight": normal(16, 3, 4), "bias": 0.1 * normal(17, 4)}}
    return settle(upper, lower, x, y)


SETTINGS = {"ridge": ridge, "logistic": logistic, "network": network}


@functools.cache
def setting_of(name: str) -> Setting:
    return SETTINGS[name]()


def swapped(value: Tree) -> Tree:
    """The same tree with the keys of every dict in the other order."""
    if isinstance(value, dict):
        return {key: swapped(value[key]) for key in reversed(value)}
    return [swapped(v) for v in value] if isinstance(value, list) else value
