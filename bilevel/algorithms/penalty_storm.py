"""Single loops of the penalty method: one recursive-momentum estimate for each of the six oracles."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from bilevel.algorithms.penalty_scheme import Pair
from bilevel.estimators import Storm
from implicit import tree
from implicit.derivatives import value_and_gradient
from implicit.tree import Tree

if TYPE_CHECKING:
    from bilevel.algorithms.penalty import Penalty

Point = tuple[Tree, Tree, Tree]
"""x, and where f and g of the one and g of the other lower problem are evaluated."""


def refuses_loops(settings: "Penalty", name: str) -> str | None:
    """Why there is no inner loop to set."""
    if settings.lower_steps in (None, 1):
        return None
    return f"{name} is a single loop: lower_steps must be 1 or None, got {settings.lower_steps}"


def inner_oracle(pair: Pair) -> Callable[[Point], Tree]:
    """``(x, y, z) -> grad_y f(x, y), grad_y g(x, y), grad_y g(x, z)`` on one sample, one backward pass."""

    def evaluate(point: Point) -> Tree:
        x, y, z = point

        def total(q: Tree) -> Tensor:
            return pair.y.upper(x, q["f"]) + pair.y.lower(x, q["g_y"]) + pair.z.lower(x, q["g_z"])

        return value_and_gradient(total, {"f": y, "g_y": y, "g_z": z})[1]

    return evaluate


class OuterOracle:
    """``(x, y, z) -> grad_x f(x, y), grad_x g(x, y), grad_x g(x, z)`` on one sample, one backward pass; ``values`` of
    f, g at y and g at z are those of the first call."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.values = pair, dict[str, Tensor]()

    def __call__(self, point: Point) -> Tree:
        x, y, z = point
        parts: dict[str, Tensor] = {}

        def total(q: Tree) -> Tensor:
            parts["f"] = self.pair.y.upper(q["f"], y)
            parts["g_y"], parts["g_z"] = self.pair.y.lower(q["g_y"], y), self.pair.z.lower(q["g_z"], z)
            return parts["f"] + parts["g_y"] + parts["g_z"]

        gradients = value_and_gradient(total, {"f": x, "g_y": x, "g_z": x})[1]
        self.values = self.values or {k: v.detach() for k, v in parts.items()}
        return gradients

    def report(self, p: Tensor) -> dict[str, Tensor]:
        """The values for the history."""
        gap = p * (self.values["g_y"] - self.values["g_z"])
        return {"upper_value": self.values["f"], "penalty_gap": gap}


def allocate(storm: Storm, x: Tree, y: Tree) -> dict[str, Tree]:
    """Three estimates shaped like y, three shaped like x, and the previous iterate; nothing where the weight is one."""
    if storm.plain:
        return {}
    inner, outer = {"f": y, "g_y": y, "g_z": y}, {"f": x, "g_y": x, "g_z": x}
    before = tree.clone({"x": x, "y": y, "z": y})
    return {"inner": storm.init(inner), "outer": storm.init(outer), "before": before}


def estimate_inner(storm: Storm, extra: dict[str, Tree], pair: Pair, point: Point, step: int) -> Tree:
    """Estimates of the gradients in y at ``point``."""
    if storm.plain:
        return inner_oracle(pair)(point)
    before = extra["before"]
    last = (before["x"], before["y"], before["z"])
    return storm.update(extra["inner"], inner_oracle(pair), point, last, step)


def estimate_outer(
    storm: Storm, extra: dict[str, Tree], oracle: OuterOracle, point: Point, moved: tuple[Tree, Tree], step: int
) -> Tree:
    """Estimates of the gradients in x at x and the ``moved`` lower iterates: those of ``point`` belonged to the x
    before."""
    if storm.plain:
        return oracle((point[0], *moved))
    last = (extra["before"]["x"], point[1], point[2])
    return storm.update(extra["outer"], oracle, (point[0], *moved), last, step)


def keep(storm: Storm, inner: Tree, outer: Tree, point: Point) -> dict[str, Tree]:
    """What the next step needs; a copy of x, which is updated in place."""
    if storm.plain:
        return {}
    return {"inner": inner, "outer": outer, "before": tree.clone(dict(zip("xyz", point, strict=True)))}


def combine(p: Tensor, outer: Tree) -> Tree:
    """``G = f + p (g_y - g_z)`` of the gradients in x."""
    return tree.axpy(p, tree.sub(outer["g_y"], outer["g_z"]), outer["f"])
