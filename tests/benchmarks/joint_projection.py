"""The projection of (x, y) onto all constraints, along a run of LV-HBA on a support vector machine.

    python tests/benchmarks/joint_projection.py [--rounds 40] [--quick] [--no-peers] [--json FILE]

One regularisation weight per example (x = c, within bounds), y = (w, b, slacks), 500 constraints
``1 - slack_i - l_i (<w, a_i> + b) <= 0``, random data with 8 features, float64. Points and multipliers of 200 steps of
the single-loop method are recorded; every call projects the next point, from the multipliers that the run had there.
The unit is the time of the three backward passes of a step: of the lower Lagrangian in y, of the same in x, and of both
objectives at (x, y). cvxpy's problem is compiled once, with the point as a parameter. Distances are to our projection
from zero multipliers, the largest over the points looked at.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator

import numpy as np
import peers
import torch
from peers import Cell, Comparison, Row
from torch import Tensor

from bilevel import BilevelProblem
from bilevel.flat import FlatProblem
from bilevel.joint_projection import JointProjection
from constrained import Box

ALPHA, BETA, ETA, GAMMA, FIRST = 0.05, 0.1, 0.1, 1.0, 20
CHECKED = 5


class Machine:
    """The problem, its flat form, and the passes of one step."""

    def __init__(self, examples: int, features: int) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        weights = normal(features)

        def draw(count: int) -> tuple[Tensor, Tensor]:
            points = normal(count, features)
            return points, torch.sign(points @ weights + 0.7 * normal(count))

        (A, labels), (V, truth) = draw(examples), draw(max(examples // 3, 2))
        self.A, self.labels, self.examples, self.features = A, labels, examples, features
        size = (1 + A.square().sum(1) + 1).sqrt()

        def lower(c: Tensor, y: dict[str, Tensor]) -> Tensor:
            return 0.5 * y["w"] @ y["w"] / examples + 0.5 * (c.exp() * y["slack"].square()).sum() / 10

        def upper(c: Tensor, y: dict[str, Tensor]) -> Tensor:
            margin = truth * (V @ y["w"] + y["b"]) / (1e-6 + y["w"].square().sum()).sqrt()
            return torch.nn.functional.leaky_relu(2 * torch.sigmoid(-5 * margin) - 1).mean()

        def rows(c: Tensor, y: dict[str, Tensor]) -> Tensor:
            return (1 - y["slack"] - labels * (A @ y["w"] + y["b"])) / size

        x = torch.zeros(examples, dtype=torch.float64)
        y = {"w": 0.1 * weights, "b": x.new_zeros(()), "slack": torch.ones_like(x)}
        problem = BilevelProblem(upper, lower, upper_set=Box(-4.0, 4.0), lower_inequality=rows)
        self.flat = FlatProblem(problem, x, y)
        self.x, self.y = x, self.flat.flat_y(y)

    def lagrangian(self, x: Tensor, y: Tensor, multiplier: Tensor) -> Tensor:
        return self.flat.lower(x, y) + multiplier @ self.flat.lower_level.inequality(x, y)

    def passes(self, x: Tensor, y: Tensor, theta: Tensor, multiplier: Tensor, weight: float) -> tuple[Tensor, ...]:
        """The three backward passes."""
        own = theta.detach().requires_grad_()
        (in_theta,) = torch.autograd.grad(self.lagrangian(x, own, multiplier), own)
        moving = x.detach().requires_grad_()
        (in_x,) = torch.autograd.grad(self.lagrangian(moving, theta, multiplier), moving)
        both = x.detach().requires_grad_(), y.detach().requires_grad_()
        return in_theta, in_x, *torch.autograd.grad(self.flat.upper(*both) / weight + self.flat.lower(*both), both)

    def run(self, steps: int) -> tuple[JointProjection, list[tuple[Tensor, Tensor, Tensor]]]:
        """The points to be projected at each step, with the multipliers known before."""
        projection = JointProjection(self.flat, self.x, self.y)
        duals, taken = projection.start(), []
        x, y, theta = self.x, self.y, self.y.clone()
        multiplier = centre = torch.zeros(self.examples, dtype=x.dtype)
        for k in range(steps):
            weight = 5.0 * (k + 1) ** 0.25
            in_theta, *_ = self.passes(x, y, theta, multiplier, weight)
            rows = self.flat.lower_level.inequality(x, theta)
            theta = theta - ETA * (in_theta + (theta - y) / GAMMA)
            multiplier = (multiplier + ETA * (rows - (multiplier - centre) / GAMMA)).clamp(min=0)
            _, in_x, both_x, both_y = self.passes(x, y, theta, multiplier, weight)
            taken.append((x - ALPHA * (both_x - in_x), y - ALPHA * (both_y - (y - theta) / GAMMA), duals))
            centre = centre + BETA * (multiplier - centre) / GAMMA
            found = projection.project(*taken[-1])
            x, y, duals = found.x, found.y, found.multipliers
        return projection, taken


def cvxpy_projection(machine: Machine, accuracy: dict[str, float]) -> Callable[[Tensor, Tensor], Tensor]:
    """The projection as a compiled problem of cvxpy."""
    import cvxpy as cp

    n, m, f = machine.examples, machine.flat.m, machine.features
    x, y, p, q = cp.Variable(n), cp.Variable(m), cp.Parameter(n), cp.Parameter(m)
    # The vector y is ordered by the keys of its tree.
    order = machine.flat.y_tree(torch.arange(m, dtype=torch.float64))
    b, slack, w = (order[key].reshape(-1).long().tolist() for key in ("b", "slack", "w"))
    assert len(w) == f
    labels, A = machine.labels.numpy(), machine.A.numpy()
    margins = cp.multiply(labels, A @ y[w] + y[b[0]])
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - p) + cp.sum_squares(y - q)), [1 - y[slack] - margins <= 0, x >= -4, x <= 4]
    )

    def project(u: Tensor, v: Tensor) -> Tensor:
        """NaN where cvxpy gives up."""
        p.value, q.value = u.numpy(), v.numpy()
        problem.solve(solver=cp.CLARABEL, **accuracy)
        if x.value is None or y.value is None:
            return torch.full((n + m,), torch.nan, dtype=torch.float64)
        return torch.as_tensor(np.concatenate([x.value, y.value]))

    return project


def joined(found: object) -> Tensor:
    return torch.cat([found.x, found.y])  # type: ignore[attr-defined]


def table(arguments: argparse.Namespace) -> list[dict[str, Cell]]:
    """Run everything and print; returns the table."""
    machine = Machine(12, 3) if arguments.toy else Machine(500, 8)
    projection, points = machine.run(30 if arguments.toy else 200)
    late = points[FIRST:]

    def following(action: Callable[[Tensor, Tensor, Tensor], object]) -> Callable[[], object]:
        turn: Iterator[tuple[Tensor, Tensor, Tensor]] = itertools.cycle(late)
        return lambda: action(*next(turn))

    def passes(x: Tensor, y: Tensor, duals: Tensor) -> object:
        return machine.passes(x, y, y, duals, 5.0)

    def cold(x: Tensor, y: Tensor, duals: Tensor) -> object:
        return projection.project(x, y, projection.start())

    ours = {"ours: projection, from the step before": projection.project, "ours: projection, from nothing": cold}
    actions: dict[str, Callable[..., object]] = {**ours, "unit: three backward passes": passes}
    comparison = Comparison([Row(name, following(action)) for name, action in actions.items()])

    def build() -> list[Row]:
        tight = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}
        for name, accuracy in (("default accuracy", {}), ("accuracy 1e-12", tight)):
            project = cvxpy_projection(machine, accuracy)  # a solver that is kept keeps its settings
            actions[f"cvxpy + Clarabel, {name}"] = lambda x, y, duals, project=project: project(x, y)
        return [Row(name, following(actions[name])) for name in actions if name.startswith("cvxpy")]

    comparison.add_peer("cvxpy", build, arguments.peers)
    comparison.run(arguments, budget=20.0)
    unit = comparison.rows[2].median
    exact = torch.stack([joined(cold(*point)) for point in late[:: max(1, len(late) // CHECKED)]])
    lines: list[dict[str, Cell]] = []
    for row in comparison.rows:
        distance: Cell = None
        if not row.name.startswith("unit"):
            answers = [actions[row.name](*point) for point in late[:: max(1, len(late) // CHECKED)]]
            found = torch.stack([a if isinstance(a, Tensor) else joined(a) for a in answers])
            distance = float((found - exact).abs().max())
        times: list[Cell] = [1e3 * row.median, row.median / unit, row.median / comparison.rows[0].median]
        names = ("ms", "backward passes (three)", "warm projections")
        lines.append(
            {"row": row.name} | dict(zip(names, times, strict=True)) | {"runs": len(row.seconds), "distance": distance}
        )
    active = statistics.median(float((duals > 0).sum()) for _, _, duals in late)
    title = (
        f"Projection onto {projection.rows} rows and bounds in {machine.flat.n + machine.flat.m} variables, float64; "
        f"{active:.0f} rows active (median over {len(late)} steps); method: {projection.method}"
    )
    peers.finish(arguments, title, comparison, lines)
    return lines


def main() -> None:
    peers.settle()
    table(peers.parser(__doc__ or "", rounds=40).parse_args())


if __name__ == "__main__":
    main()
