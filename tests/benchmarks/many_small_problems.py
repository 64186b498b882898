"""10,000 small nonconvex problems in one batch, against a loop of scipy's SLSQP with the same derivatives.

    python tests/benchmarks/many_small_problems.py [--count N] [--sample N] [--clock cpu|wall] [--toy]

One thread. Each family is solved with derivatives in closed form (numpy for SLSQP, torch for the batch) and with those
of automatic differentiation. The residual of every solution is measured by the same code, with the multipliers that
fit it best. Loops over SLSQP run on ``--sample`` problems, and their time is scaled to all.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize, nnls
from torch import Tensor

import constrained

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Family:
    """Problems of one shape.

    Attributes:
        name: for the table.
        numpy: ``(objective, gradient, equality, jacobian, inequality, jacobian)``, functions of x and one row of data.
        closed, automatic: the same for the batch, with and without derivatives.
        x0, data: (B, n), (B, d).
        bounds: of every entry, or None.
    """

    name: str
    numpy: tuple[Any, ...]
    closed: constrained.Problem
    automatic: constrained.Problem
    x0: Tensor
    data: Tensor
    bounds: tuple[float, float] | None = None


def ellipsoid(count: int, generator: torch.Generator) -> Family:
    """The point nearest to p on ``<a, x^2> = 1, <w, x> = 0``; data is (p, a, w)."""

    def f(x: Any, d: Any) -> Any:
        return 0.5 * ((x - d[:5]) ** 2).sum()

    def h(x: Tensor, d: Tensor) -> Tensor:
        return torch.stack([d[5:10] @ (x * x) - 1, d[10:] @ x])

    own = (
        f,
        lambda x, d: x - d[:5],
        lambda x, d: np.array([d[5:10] @ (x * x) - 1, d[10:] @ x]),
        lambda x, d: np.stack([2 * d[5:10] * x, d[10:]]),
        None,
        None,
    )
    closed = constrained.EqualityProblem(
        f,
        h,
        gradient=lambda x, d: x - d[:5],
        jacobian=lambda x, d: torch.stack([2 * d[5:10] * x, d[10:]]),
        hessian=lambda x, dual, d: torch.diag(1 + 2 * dual[0] * d[5:10]),
    )
    p, a, w = (torch.randn(count, 5, generator=generator) for _ in range(3))
    data = torch.cat([2 * p, 1 + a.abs(), w], dim=1)
    return Family(
        "ellipsoid, n = 5, m = 2", own, closed, constrained.EqualityProblem(f, h), torch.full((count, 5), 0.3), data
    )


def product(count: int, generator: torch.Generator) -> Family:
    """Hock and Schittkowski's problem 78 with perturbed right-hand sides."""

    def h(x: Tensor, q: Tensor) -> Tensor:
        return torch.stack([x @ x - 10 * q[0], x[1] * x[2] - 5 * q[1] * x[3] * x[4], x[0] ** 3 + x[1] ** 3 + q[2]])

    def gradient(x: Any, q: Any) -> Any:
        a, b, c, d, e = x
        return np.array([b * c * d * e, a * c * d * e, a * b * d * e, a * b * c * e, a * b * c * d])

    def rows(x: Any, q: Any) -> Any:
        s = 5 * q[1]
        return np.array([2 * x, [0, x[2], x[1], -s * x[4], -s * x[3]], [3 * x[0] ** 2, 3 * x[1] ** 2, 0, 0, 0]])

    def torch_gradient(x: Tensor, q: Tensor) -> Tensor:
        a, b, c, d, e = x.unbind()
        return torch.stack([b * c * d * e, a * c * d * e, a * b * d * e, a * b * c * e, a * b * c * d])

    def torch_rows(x: Tensor, q: Tensor) -> Tensor:
        s, zero = 5 * q[1], torch.zeros_like(x[0])
        second = torch.stack([zero, x[2], x[1], -s * x[4], -s * x[3]])
        return torch.stack([2 * x, second, torch.stack([3 * x[0] ** 2, 3 * x[1] ** 2, zero, zero, zero])])

    def hessian(x: Tensor, dual: Tensor, q: Tensor) -> Tensor:
        a, b, c, d, e = x.unbind()
        zero, s = torch.zeros_like(a), 5 * q[1] * dual[1]
        upper = torch.stack(
            [
                *[3 * dual[2] * a, c * d * e, b * d * e, b * c * e, b * c * d],
                *[zero, 3 * dual[2] * b, a * d * e + dual[1], a * c * e, a * c * d],
                *[zero, zero, zero, a * b * e, a * b * d],
                *[zero, zero, zero, zero, a * b * c - s],
                *[zero, zero, zero, zero, zero],
            ]
        ).reshape(5, 5)
        return upper + upper.mT + 2 * dual[0] * torch.eye(5, dtype=x.dtype, device=x.device)

    own = (
        lambda x, q: x.prod(),
        gradient,
        lambda x, q: np.array([x @ x - 10 * q[0], x[1] * x[2] - 5 * q[1] * x[3] * x[4], x[0] ** 3 + x[1] ** 3 + q[2]]),
        rows,
        None,
        None,
    )
    closed = constrained.EqualityProblem(
        lambda x, q: x.prod(), h, gradient=torch_gradient, jacobian=torch_rows, hessian=hessian
    )
    x0 = torch.tensor([-2, 1.5, 2, -1, -1.0]).expand(count, 5).clone()
    data = 1 + 0.1 * torch.randn(count, 3, generator=generator)
    automatic = constrained.EqualityProblem(lambda x, q: x.prod(), h)
    return Family("HS78, n = 5, m = 3", own, closed, automatic, x0, data)


def mixed(count: int, generator: torch.Generator) -> Family:
    """A quadratic plus cosines, with an equation, two inequalities and bounds; data is (p, q)."""

    def f(x: Any, d: Any) -> Any:
        cosine = torch.cos if isinstance(x, Tensor) else np.cos
        return ((x - d[:6]) ** 2).sum() + 0.5 * cosine(3 * x).sum() + x[0] * x[1] * d[6]

    def gradient(x: Any, d: Any) -> Any:
        found = 2 * (x - d[:6]) - 1.5 * np.sin(3 * x)
        found[0] += x[1] * d[6]
        found[1] += x[0] * d[6]
        return found

    def h(x: Tensor, d: Tensor) -> Tensor:
        return x.sum() - 1

    def c(x: Tensor, d: Tensor) -> Tensor:
        return torch.stack([x @ x - 4 - d[7], x[0] * x[1] - x[2] - d[8]])

    def torch_gradient(x: Tensor, d: Tensor) -> Tensor:
        cross = torch.stack([x[1], x[0], *[torch.zeros_like(x[0])] * 4])
        return 2 * (x - d[:6]) - 1.5 * torch.sin(3 * x) + cross * d[6]

    def torch_rows(x: Tensor, d: Tensor) -> Tensor:
        zero = torch.zeros_like(x[0])
        return torch.stack([2 * x, torch.stack([x[1], x[0], zero - 1, zero, zero, zero])])

    def hessian(x: Tensor, dual: Tensor, v: Tensor, d: Tensor) -> Tensor:
        place = torch.zeros(6, 6, dtype=x.dtype, device=x.device)
        place[0, 1] = place[1, 0] = 1
        return torch.diag(2 - 4.5 * torch.cos(3 * x) + 2 * v[0]) + place * (d[6] + v[1])

    own = (
        f,
        gradient,
        lambda x, d: np.array([x.sum() - 1]),
        lambda x, d: np.ones((1, 6)),
        lambda x, d: np.array([x @ x - 4 - d[7], x[0] * x[1] - x[2] - d[8]]),
        lambda x, d: np.array([2 * x, [x[1], x[0], -1, 0, 0, 0]]),
    )
    functions: dict[str, Any] = {"objective": f, "equality": h, "inequality": c, "lower": -1.0, "upper": 1.5}
    closed = constrained.ConstrainedProblem(
        **functions,
        gradient=torch_gradient,
        equality_jacobian=lambda x, d: torch.ones(1, 6, dtype=x.dtype, device=x.device),
        inequality_jacobian=torch_rows,
        hessian=hessian,
    )
    data = torch.cat(
        [1.5 * torch.randn(count, 6, generator=generator), torch.rand(count, 3, generator=generator)], dim=1
    )
    automatic = constrained.ConstrainedProblem(**functions)
    name = "equation, 2 inequalities, bounds, n = 6"
    return Family(name, own, closed, automatic, torch.zeros(count, 6), data, (-1.0, 1.5))


FAMILIES: tuple[Callable[[int, torch.Generator], Family], ...] = (ellipsoid, product, mixed)


def numpy_functions(family: Family, row: int) -> tuple[Any, ...]:
    """Functions of x alone, in closed form."""
    d = family.data[row].numpy()
    return tuple(None if f is None else (lambda x, f=f: f(x, d)) for f in family.numpy)


def torch_functions(family: Family, row: int) -> tuple[Any, ...]:
    """The same from the torch functions, derivatives by autograd."""
    d, problem = family.data[row], family.automatic

    def value(function: Any) -> Any:
        if function is None:
            return None
        return lambda x: function(torch.from_numpy(x), d).reshape(-1).numpy()

    def slope(function: Any) -> Any:
        if function is None:
            return None

        def rows(x: Any) -> Any:
            at = torch.from_numpy(x).requires_grad_()
            found = function(at, d).reshape(-1)
            return np.stack([torch.autograd.grad(r, at, retain_graph=True)[0].numpy() for r in found])

        return rows

    f, h, c = problem.objective, problem.equality, problem.inequality
    gradient = slope(f)
    return lambda x: value(f)(x).item(), lambda x: gradient(x)[0], value(h), slope(h), value(c), slope(c)


def slsqp(family: Family, functions: tuple[Any, ...], row: int) -> Any:
    """One problem; SLSQP has the opposite sign of inequalities."""
    f, gradient, h, jacobian, c, slopes = functions
    constraints = [{"type": "eq", "fun": h, "jac": jacobian}]
    if c is not None:
        constraints.append({"type": "ineq", "fun": lambda x: -c(x), "jac": lambda x: -slopes(x)})
    n = family.x0.shape[1]
    bounds = None if family.bounds is None else [family.bounds] * n
    options = {"ftol": 1e-12, "maxiter": 200}
    start = family.x0[row].numpy()
    return minimize(f, start, jac=gradient, constraints=constraints, bounds=bounds, method="SLSQP", options=options).x


def residual(family: Family, x: Any, row: int) -> float:
    """The scaled residual of the optimality conditions with the nonnegative multipliers that fit best."""
    _, gradient, h, jacobian, c, slopes = numpy_functions(family, row)
    g, values, rows = gradient(x), h(x), jacobian(x)
    n = len(x)
    low, high = family.bounds or (-np.inf, np.inf)
    sides, over = [-np.eye(n), np.eye(n)], [low - x, x - high]
    if c is not None:
        sides.append(slopes(x))
        over.append(c(x))
    sides, over = np.concatenate(sides), np.concatenate(over)
    sides, over = sides[np.isfinite(over)], over[np.isfinite(over)]
    normals = np.concatenate([rows, -rows, sides])
    distances = np.concatenate([np.zeros(2 * len(rows)), np.abs(over)])
    # Stationarity and complementarity together.
    multipliers, _ = nnls(np.concatenate([normals.T, np.diag(distances)]), np.concatenate([-g, 0 * distances]))
    scale = max(1.0, np.abs(g).max(), multipliers.max())
    left = np.abs(g + normals.T @ multipliers).max() / scale
    return max(left, (multipliers * distances).max() / scale, np.abs(values).max(), over.max(initial=0.0))


def main() -> None:
    """Print the table."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--count", type=int, default=10_000, help="problems in the batch (%(default)s)")
    made.add_argument("--sample", type=int, default=1_000, help="of these given to SLSQP (%(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="repetitions of the batch; the median counts (%(default)s)")
    made.add_argument("--clock", choices=CLOCKS, default="cpu")
    made.add_argument("--toy", action="store_true", help="a few problems, which only show that the script runs")
    arguments = made.parse_args()
    if arguments.toy:
        arguments.count, arguments.sample, arguments.rounds = 8, 4, 1
    print(table(arguments))


def table(arguments: argparse.Namespace) -> str:
    """One line per family and kind of derivative, as markdown."""
    clock = CLOCKS[arguments.clock]
    lines = [
        "| problems | derivatives | batch, s | SLSQP, s | ratio | batch at 1e-6 / 1e-8 | SLSQP at 1e-6 / 1e-8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for build in FAMILIES:
        family = build(arguments.count, torch.Generator().manual_seed(0))
        rows = range(min(arguments.sample, arguments.count))
        for kind, problem, functions in (
            ("closed form", family.closed, numpy_functions),
            ("automatic", family.automatic, torch_functions),
        ):
            constrained.solve_batch(problem, family.x0[:4], family.data[:4])  # imports of torch happen once
            times = []
            for _ in range(arguments.rounds):
                began = clock()
                found = constrained.solve_batch(problem, family.x0, family.data)
                times.append(clock() - began)
            some = rows if kind == "closed form" else rows[: max(1, len(rows) // 5)]
            began = clock()
            loop = [slsqp(family, functions(family, row), row) for row in some]
            slow = (clock() - began) * arguments.count / len(some)
            ours = [residual(family, found.x[row].numpy(), row) for row in some]
            theirs = [residual(family, x, row) for x, row in zip(loop, some, strict=True)]
            fast = float(np.median(times))
            cells = [
                family.name,
                kind,
                f"{fast:.3f}",
                f"{slow:.1f}",
                f"{slow / fast:.0f}",
                shares(ours),
                shares(theirs),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shares(residuals: list[float]) -> str:
    """How many percent are below 1e-6 and 1e-8."""
    return " / ".join(f"{100 * np.mean([r <= bound for r in residuals]):.1f} %" for bound in (1e-6, 1e-8))


if __name__ == "__main__":
    main()
