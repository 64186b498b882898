"""How far off each hypergradient estimator is on job 1, and what it reports about itself.

    python tests/benchmarks/estimators.py [--toy] [--data-dir DIR]

The lower solution is given, except where a row starts from zero. Errors are measured against dense float64 algebra.
"""

import warnings
from collections.abc import Callable
from typing import Any

import job1_hypergradient as job1
import peers
import torch

import implicit
from implicit import CG, SGD, FiniteDifference, LinearSolve, NeumannSeries, OneStep

Call = Callable[[], Any]


def rows(problem: job1.Problem) -> dict[str, Call]:
    """Every estimator with its accuracy report."""
    f, g, x, y, step = problem.upper, problem.lower, problem.x, problem.y, 1.0 / problem.largest
    zero = torch.zeros_like(y)

    def solved(estimator: implicit.Estimator) -> Call:
        return lambda: implicit.hypergradient(f, g, x, y, estimator=estimator)

    def unrolled(steps: int, start: torch.Tensor, momentum: float = 0.0) -> Call:
        optimizer = SGD(lr=step, momentum=momentum)
        return lambda: implicit.unrolled(f, g, x, start, steps=steps, optimizer=optimizer)

    return {
        "LinearSolve(linear_solver=CG(rtol=1e-8))": solved(LinearSolve(linear_solver=CG(rtol=1e-8))),
        "LinearSolve(linear_solver=CG(rtol=1e-4))": solved(LinearSolve(linear_solver=CG(rtol=1e-4))),
        "FiniteDifference()": solved(FiniteDifference()),
        "NeumannSeries(terms=1000, step=1 / L)": solved(NeumannSeries(terms=1000, step=step)),
        "NeumannSeries(terms=96, step=1 / L)": solved(NeumannSeries(terms=96, step=step)),
        "NeumannSeries(terms=1)": solved(NeumannSeries(terms=1)),
        "OneStep(step=1 / L)": solved(OneStep(step=step)),
        "unrolled, 1000 steps of SGD(lr=1 / L, momentum=0.9) from zero": unrolled(1000, zero, 0.9),
        "unrolled, 1000 steps of SGD(lr=1 / L) from zero": unrolled(1000, zero),
        "unrolled, 100 steps of SGD(lr=1 / L) from zero": unrolled(100, zero),
        "unrolled, 100 steps of SGD(lr=1 / L) from the lower solution": unrolled(100, y),
        "unrolled, 10 steps of SGD(lr=1 / L) from zero": unrolled(10, zero),
    }


def main() -> None:
    """Print the table."""
    arguments = peers.parser(__doc__ or "", rounds=1).parse_args()
    peers.settle()
    problem = job1.load(arguments)
    print(table(problem))


def table(problem: job1.Problem) -> str:
    """Products, true and reported relative error of every row, as markdown."""
    lines = ["| estimator | products | true relative error | reported |", "|---|---|---|---|"]
    size = float(torch.linalg.vector_norm(problem.exact))
    for name, call in rows(problem).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", implicit.ConvergenceWarning)
            found = call()
        linear = getattr(found, "linear", None)
        products = linear.products if linear is not None else ""
        lines.append(
            f"| `{name}` | {products} | {problem.error(found.value):.2g} | {found.accuracy.error / size:.2g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
