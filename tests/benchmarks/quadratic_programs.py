"""Quadratic programs: batches of small ones, a large one, and projections onto a polyhedron.

    python tests/benchmarks/quadratic_programs.py [--rounds 5] [--quick] [--no-peers] [--json FILE]

Small: batches of strictly convex programs with 10 variables, 5 equations and 10 inequalities, float64. Large: one with
500 variables and 500 inequalities. Projection: onto 500 inequalities in 500 dimensions, from nothing, from the
projection of a point nearby, and with a backward pass. Residuals are the largest of stationarity, violation and
complementarity over all elements, in the units of the data (of a projection: violation). A loop over cvxpy uses one
parametrized problem, so that it is compiled once; it is run on at most 100 elements and its time is scaled up. Peers
run with their default accuracy unless the row says otherwise; qpth does not return multipliers.
"""

import argparse
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import peers
import torch
from peers import Cell, Comparison, Row
from torch import Tensor

import constrained

SAMPLE = 100


class Batch:
    """Random feasible programs, most with several active inequalities."""

    def __init__(self, count: int, n: int, m: int, p: int) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        factor, point = normal(count, n, n), normal(count, n)
        self.count, self.n = count, n
        self.Q = factor @ factor.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)
        self.q, self.A, self.G = normal(count, n), normal(count, m, n), normal(count, p, n)
        self.b = (self.A @ point[..., None])[..., 0]
        room = torch.rand(count, p, generator=generator, dtype=torch.float64)
        self.h = (self.G @ point[..., None])[..., 0] + room

    def residual(self, found: tuple[Tensor, Tensor, Tensor]) -> float:
        """The largest residual of (x, equality, inequality), for the elements that are there."""
        x, y, z = (t.detach() for t in found)
        k = len(x)
        slope = (self.Q[:k] @ x[..., None])[..., 0] + self.q[:k]
        slope += (self.A[:k].mT @ y[..., None])[..., 0] + (self.G[:k].mT @ z[..., None])[..., 0]
        gap = (self.G[:k] @ x[..., None])[..., 0] - self.h[:k]
        equation = (self.A[:k] @ x[..., None])[..., 0] - self.b[:k]
        parts = (slope, equation, gap.clamp(min=0), gap * z, z.clamp(max=0))
        return max(float(part.abs().max()) for part in parts if part.numel())


def our_row(batch: Batch) -> Row:
    def run() -> tuple[Tensor, Tensor, Tensor]:
        solution = constrained.solve_qp(batch.Q, batch.q, A=batch.A, b=batch.b, G=batch.G, h=batch.h)
        return solution.x, solution.equality, solution.inequality

    return Row("ours: solve_qp", run)


def cvxpy_rows(batch: Batch) -> list[Row]:
    import cvxpy as cp

    n, m, p = batch.n, batch.A.shape[1], batch.G.shape[1]
    x, q, b, h = cp.Variable(n), cp.Parameter(n), cp.Parameter(m), cp.Parameter(p)
    root, A, G = cp.Parameter((n, n)), cp.Parameter((m, n)), cp.Parameter((p, n))
    constraints = ([A @ x == b] if m else []) + [G @ x <= h]
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(root @ x) + q @ x), constraints)
    data = [t.numpy() for t in (torch.linalg.cholesky(batch.Q).mT, batch.q, batch.A, batch.b, batch.G, batch.h)]

    def run() -> tuple[Tensor, Tensor, Tensor]:
        found: list[tuple[Any, Any, Any]] = []
        for i in range(min(batch.count, SAMPLE)):
            for parameter, value in zip((root, q, A, b, G, h), data, strict=True):
                if parameter.size:
                    parameter.value = value[i]
            problem.solve(solver=cp.CLARABEL)
            y = constraints[0].dual_value if m else np.zeros(0)
            found.append((x.value, y, constraints[-1].dual_value))
        x_, y_, z_ = (torch.as_tensor(np.stack(part)) for part in zip(*found, strict=True))
        return x_, y_, z_

    return [Row("cvxpy + Clarabel, one by one", run)]


def qpth_rows(batch: Batch) -> list[Row]:
    from qpth.qp import QPFunction

    solve = QPFunction(verbose=-1, check_Q_spd=False, maxIter=30)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        empty = torch.zeros(0, dtype=torch.float64)
        m = batch.A.shape[1]
        equations = (batch.A, batch.b) if m else (empty, empty)
        x = solve(batch.Q, batch.q, batch.G, batch.h, *equations)
        blank = torch.full((batch.count, m), torch.nan, dtype=torch.float64)
        return x, blank, torch.full_like(batch.h, torch.nan)  # its multipliers stay inside

    return [Row("qpth", run)]


def jaxopt_rows(batch: Batch) -> list[Row]:
    import jax

    jax.config.update("jax_enable_x64", True)
    from jaxopt import OSQP

    names = ("Q", "q", "A", "b", "G", "h")
    Q, q, A, b, G, h = (jax.numpy.asarray(getattr(batch, name).numpy()) for name in names)
    solver = OSQP(tol=1e-6, maxiter=4000)

    def one(Q: Any, q: Any, A: Any, b: Any, G: Any, h: Any) -> Any:
        found = solver.run(params_obj=(Q, q), params_eq=(A, b), params_ineq=(G, h)).params
        return found.primal, found.dual_eq, found.dual_ineq

    every = jax.jit(jax.vmap(one))

    def run() -> tuple[Tensor, Tensor, Tensor]:
        x, y, z = (torch.as_tensor(np.asarray(part)) for part in every(Q, q, A, b, G, h))
        return x, y, z

    return [Row("jaxopt OSQP, vmapped (tol 1e-6)", run)]


Measured = tuple[Comparison, list[dict[str, Cell]]]


def small(arguments: argparse.Namespace, count: int, sizes: tuple[int, int, int]) -> Measured:
    """A batch of programs of one size."""
    batch = Batch(count, *sizes)
    comparison = Comparison([our_row(batch)])
    kinds: list[tuple[str, Callable[[Batch], list[Row]]]] = [("cvxpy", cvxpy_rows), ("qpth", qpth_rows)]
    if sizes[1] and count < 10_000:
        kinds.append(("jaxopt", jaxopt_rows))
    for name, build in kinds:
        comparison.add_peer(name, functools.partial(build, batch), arguments.peers)
    comparison.run(arguments, budget=30.0)
    exact = comparison.rows[0].answer[0]
    lines: list[dict[str, Cell]] = []
    for row in comparison.rows:
        share = len(row.answer[0]) / count
        row.name += f", {count} x n = {sizes[0]}"
        lines.append(
            {
                "row": row.name,
                "ms": 1e3 * row.median / share,
                "runs": len(row.seconds),
                "residual": batch.residual(row.answer),
                "distance": float((row.answer[0].detach() - exact[: len(row.answer[0])]).abs().max()),
            }
        )
    return comparison, lines


def projections(arguments: argparse.Namespace, n: int, p: int) -> Measured:
    """Projections onto ``{G x <= h}``."""
    generator = torch.Generator().manual_seed(1)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    G, h = normal(p, n), 5 * torch.rand(p, generator=generator, dtype=torch.float64)
    before = 3 * normal(n)
    point = before + 0.01 * normal(n)
    chosen = constrained.Polyhedron(G=G, h=h)
    near, nearby = chosen.project(before), chosen.solve(before)
    followed = point.clone().requires_grad_()

    def forward_backward() -> Tensor:
        found = chosen.project(followed, nearby)
        found.square().sum().backward()
        return found.detach()

    comparison = Comparison(
        [
            Row("ours: projection, cold", lambda: chosen.project(point)),
            Row("ours: projection, from one nearby", lambda: chosen.project(point, near)),
            Row("ours: projection, from a solution nearby", lambda: chosen.project(point, nearby)),
            Row("ours: projection, from a solution nearby, with backward", forward_backward),
            Row(f"unit: one product of {n} x {n} matrices", functools.partial(_square, normal(n, n))),
        ]
    )
    comparison.add_peer("cvxpy", functools.partial(cvxpy_projection, G, h, point), arguments.peers)
    comparison.run(arguments, budget=30.0)
    exact = comparison.rows[0].answer
    lines: list[dict[str, Cell]] = []
    for row in comparison.rows:
        unit = row.name.startswith("unit")
        residual = None if unit else float((G @ row.answer - h).clamp(min=0).max())
        distance = None if unit else float((row.answer - exact).abs().max())
        measured: list[Cell] = [1e3 * row.median, len(row.seconds), residual, distance]
        lines.append({"row": row.name} | dict(zip(("ms", "runs", "residual", "distance"), measured, strict=True)))
    return comparison, lines


def _square(matrix: Tensor) -> Tensor:
    return matrix @ matrix


def cvxpy_projection(G: Tensor, h: Tensor, point: Tensor) -> list[Row]:
    import cvxpy as cp

    x, target = cp.Variable(G.shape[1]), cp.Parameter(G.shape[1])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - target)), [G.numpy() @ x <= h.numpy()])
    target.value = point.numpy()

    def run(**accuracy: float) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem.solve(solver=cp.CLARABEL, **accuracy)
        return torch.as_tensor(np.asarray(x.value))

    tight = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}
    return [
        Row("cvxpy + Clarabel, default accuracy", run),
        Row("cvxpy + Clarabel, accuracy 1e-12", functools.partial(run, **tight)),
    ]


def table(arguments: argparse.Namespace) -> list[dict[str, Cell]]:
    """Run everything and print; returns the table."""
    sizes, counts, large = ((3, 1, 4), (1, 5), 12) if arguments.toy else ((10, 5, 10), (1, 100, 10_000), 500)
    parts = [small(arguments, count, sizes) for count in counts]
    parts += [small(arguments, 1, (large, 0, large)), projections(arguments, large, large)]
    together = Comparison([row for part, _ in parts for row in part.rows])
    for part, _ in parts:
        together.missing |= part.missing
    lines = [line for _, found in parts for line in found]
    title = "Quadratic programs, float64; distance: of x to that of our first row of the group"
    peers.finish(arguments, title, together, lines)
    return lines


def main() -> None:
    peers.settle()
    table(peers.parser(__doc__ or "", rounds=5).parse_args())


if __name__ == "__main__":
    main()
