"""Sketching against the linear solvers that win in practice, on Newton systems of equality-constrained problems.

Each system is ``[[H, J^T], [J, 0]] z = b`` with H of condition number 10, definite, and a normal J with a third as many
rows, so that its condition number grows slowly with N; and, as the sparse case, the control problem of the Poisson
equation on a square grid. Every solver is run to the relative residuals 0.1, 1e-2 and 1e-8 from zero. A step is a
projection for the sketches, a product for the Krylov solvers and one factorisation for the direct ones.

    python sketching.py [--quick] [--rounds N]
    python sketching.py paper [--quick] [--data-dir DIR] [--seconds LIMIT]

The second form is the comparison of Hong, Na, Mahoney and Kolar (ICML 2023): their 47 problems of CUTEst and a
constrained logistic regression, by :class:`constrained.AdaSketchNewton` with every linear solver, to a KKT residual of
1e-4, beside what they recorded. A problem counts as solved where the residual that is measured at the end is small
enough. Sketches to the accuracy of the theory, which few of them reach, are limited to a quarter of the time.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import equality_table
import peers
import scipy.sparse as sp
import torch
from peers import Cell, Comparison, Row
from torch import Tensor

import constrained
import problems
from constrained import AdaSketchNewton, BlockGaussian, BlockKaczmarz, GaussianVector, Kaczmarz, SketchAndProject
from implicit import GMRES, LDLT, MINRES, Dense, LinearOperator, LinearSolution, Sparse, SparseLU

TOLERANCES = (0.1, 1e-2, 1e-8)
SKETCHES = {
    "Kaczmarz": Kaczmarz(),
    "Kaczmarz, rows drawn alike": Kaczmarz(weighted=False),
    "Gaussian vector": GaussianVector(),
    "block Gaussian": BlockGaussian(),
    "block Kaczmarz": BlockKaczmarz(),
}
TOY_STEPS = 2_000
"""Steps of the sketches in a toy run; otherwise their own limits."""
OURS = {"BAmL1SP": "ba-l1sp"}
"""Where the name of a problem differs from the case's."""
TOYS = ("hs6", "hs28", "hs40")
INNER = {
    "LDLT": LDLT(),
    "MINRES": MINRES(),
    "GMRES": GMRES(),
    "Kaczmarz": SketchAndProject(sketch=Kaczmarz()),
    "Gaussian vector": SketchAndProject(sketch=GaussianVector()),
    "block Gaussian": SketchAndProject(sketch=BlockGaussian()),
}
RECORDED: dict[str, dict[str, Cell]] = {
    "authors: Gaussian vector or Kaczmarz": {"solved": 45, "steps": 5, "evaluations": 22, "gradients": 24, "unit": 87},
    "authors: adaptive GMRES, l1 merit": {"solved": 47, "steps": 6, "evaluations": 28, "gradients": 14},
    "authors: GMRES, l1 merit": {"solved": 46, "steps": 50, "evaluations": 194, "gradients": 102},
}
"""What the authors' stored results say: of 47 problems, medians, and the percentage of unit steps."""


@dataclass(frozen=True)
class System:
    """A KKT system whose solution is known."""

    name: str
    operator: LinearOperator
    matrix: Tensor
    exact: Tensor

    @property
    def b(self) -> Tensor:
        return self.matrix @ self.exact

    def condition(self) -> float:
        return float(torch.linalg.cond(self.matrix))

    def frobenius(self) -> float:
        """``||A||_F^2 / sigma_min^2``, what theory counts the steps of a row sketch in."""
        return float(self.matrix.square().sum() / torch.linalg.svdvals(self.matrix)[-1] ** 2)


def random_system(size: int) -> System:
    """n : m = 3 : 1."""
    generator = torch.Generator().manual_seed(size)
    m = size // 4
    n = size - m
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    hessian = (q * torch.logspace(0, 1, n, dtype=torch.float64)) @ q.T
    jacobian = torch.randn(m, n, generator=generator, dtype=torch.float64) / n**0.5
    corner = torch.zeros(m, m, dtype=torch.float64)
    matrix = torch.cat([torch.cat([0.5 * (hessian + hessian.T), jacobian.T], 1), torch.cat([jacobian, corner], 1)])
    exact = torch.randn(size, generator=generator, dtype=torch.float64)
    return System(f"random, N = {size}", Dense(matrix, symmetric=True, positive_definite=False), matrix, exact)


def control_system(grid: int) -> System:
    """``min 1/2 ||w - w0||^2 + 0.05 ||z||^2`` subject to ``laplace w + z = 0``."""
    one = sp.diags_array([[1.0] * (grid - 1), [-2.0] * grid, [1.0] * (grid - 1)], offsets=[-1, 0, 1])  # pyright: ignore[reportArgumentType]
    n, step = grid**2, 2.0 / (grid + 1)
    laplace = (sp.kron(one, sp.eye_array(grid)) + sp.kron(sp.eye_array(grid), one)) / step**2
    hessian = sp.block_diag([sp.eye_array(n), 0.1 * sp.eye_array(n)])
    jacobian = sp.hstack([laplace, sp.eye_array(n)])
    operator = Sparse(sp.block_array([[hessian, jacobian.T], [jacobian, None]]))
    exact = torch.randn(operator.size, generator=torch.Generator().manual_seed(grid), dtype=torch.float64)
    return System(f"control, {grid} x {grid} grid, N = {operator.size}", operator, operator.to_dense(), exact)


def solvers(limit: int | None) -> dict[str, Any]:
    """Every solver at its own tolerance; :func:`dataclasses.replace` sets it."""
    found: dict[str, Any] = {
        name: SketchAndProject(sketch=sketch, max_steps=limit) for name, sketch in SKETCHES.items()
    }
    return found | {"MINRES": MINRES(), "GMRES": GMRES(), "LDLT": LDLT(), "SparseLU": SparseLU()}


def rows_of(system: System, quick: bool, limit: int | None) -> dict[str, list[Row]]:
    """For each solver one timed row per tolerance; sketches of one column stop at 1e-2 where quick."""

    def run(solver: Any) -> Callable[[], LinearSolution]:
        return lambda: solver.solve(system.operator, system.b)

    found = {}
    for name, solver in solvers(limit).items():
        slow = quick and name in SKETCHES and not name.startswith("block")
        rows = [
            Row(f"{name}, {system.name}, {rtol:g}", run(replace(solver, rtol=rtol)))
            for rtol in TOLERANCES
            if not (slow and rtol < 1e-2)
        ]
        found[name] = rows
    return found


def table(arguments: argparse.Namespace) -> list[dict[str, Cell]]:
    """Run everything and print; returns the table."""
    sizes, grids = ((12,), (2,)) if arguments.toy else ((16, 64, 256), (3, 8))
    systems = [random_system(size) for size in sizes] + [control_system(grid) for grid in grids]
    limit = TOY_STEPS if arguments.toy else None
    lines: list[tuple[System, str, list[Row]]] = []
    for system in systems:
        lines += [(system, name, rows) for name, rows in rows_of(system, arguments.quick, limit).items()]
    comparison = Comparison([row for _, _, rows in lines for row in rows])
    comparison.missing["other libraries"] = "left out by --no-peers" if not arguments.peers else "none has these"
    comparison.run(arguments, warm_up=False)
    measured = [_line(*line) for line in lines]
    title = "KKT systems to three relative residuals; milliseconds are medians; empty cells were not run"
    peers.finish(arguments, title, comparison, measured)
    return measured


def _line(system: System, name: str, rows: list[Row]) -> dict[str, Cell]:
    line: dict[str, Cell] = {"system": system.name, "solver": name}
    line |= {"condition number": system.condition(), "kappa_F^2": system.frobenius()}
    for place, rtol in enumerate(TOLERANCES):
        row = rows[place] if place < len(rows) else None
        answer = None if row is None else row.answer
        line[f"{rtol:g}: ms"] = None if row is None else 1e3 * row.median
        line[f"{rtol:g}: steps"] = None if answer is None else answer.steps
        line[f"{rtol:g}: relative residual"] = None if answer is None else answer.relative_residual
        gap = None if answer is None else float((answer.value - system.exact).norm() / system.exact.norm())
        line[f"{rtol:g}: relative error"] = gap
    return line


@dataclass(frozen=True)
class Run:
    """A way to solve all problems."""

    name: str
    accuracy: str
    atol: float

    @property
    def sketched(self) -> bool:
        return isinstance(INNER[self.name], SketchAndProject)

    def method(self) -> AdaSketchNewton:
        return AdaSketchNewton(linear_solver=INNER[self.name], accuracy=self.accuracy, atol=self.atol)  # pyright: ignore[reportArgumentType]


def runs() -> list[Run]:
    """Every solver to 1e-4 by both rules of accuracy; what is exact has no use for one, and goes to 1e-8 as well."""
    rules = [Run(name, rule, 1e-4) for name in INNER if name != "LDLT" for rule in ("relative", "theory")]
    exact = [Run("LDLT", "relative", atol) for atol in (1e-4, 1e-8)]
    return exact + rules + [Run("MINRES", "relative", 1e-8), Run("GMRES", "relative", 1e-8)]


def paper(arguments: argparse.Namespace) -> list[dict[str, Cell]]:
    """Solve the problems in every way and print; returns the table."""
    names = TOYS if arguments.toy else [OURS.get(name, name.lower()) for name in equality_table.ICML.split()]
    sets: dict[str, list[Any]] = {f"{len(names)} of CUTEst": [problems.case(name) for name in names]}
    comparison = Comparison()
    if arguments.data_dir and not arguments.toy:
        sets["logistic, mushroom"] = [
            problems.case("constrained_logistic", dataset="mushroom", data_dir=arguments.data_dir)
        ]
    else:
        comparison.missing["logistic regression"] = "not in toy runs" if arguments.toy else "needs --data-dir"
    if not arguments.peers:
        comparison.missing["what the authors recorded"] = "left out by --no-peers"
    lines: list[dict[str, Cell]] = []
    for place, (title, cases) in enumerate(sets.items()):
        for run in runs():
            if not (arguments.quick and run.sketched and run.accuracy == "theory"):
                lines.append(_solved(title, run, cases, arguments.seconds * (1 if place == 0 else 10)))
        if place == 0 and arguments.peers and not arguments.toy:
            lines += [
                {**_columns(title, name, 47, 1e-4, "theory"), **_recorded(seen)} for name, seen in RECORDED.items()
            ]
    title = "AdaSketch-Newton by linear solver; medians over what was solved, seconds of all together"
    peers.finish(arguments, title, comparison, lines)
    return lines


def _solved(title: str, run: Run, cases: Sequence[Any], limit: float) -> dict[str, Cell]:
    limit *= 0.25 if run.accuracy == "theory" else 1.0
    found = [
        constrained.solve(
            case.problem, run.method(), case.start, time_limit=limit if run.sketched else None, raise_on_failure=False
        )
        for case in cases
    ]
    good = [solution for solution in found if solution.success]
    lengths = [step["step_length"] for solution in good for step in solution.history]
    line = _columns(title, run.name, len(cases), run.atol, "exact" if run.name == "LDLT" else run.accuracy)
    line["solved"] = len(good)
    line["steps"] = _median(solution.steps for solution in good)
    line["linear steps"] = _median(sum(step["linear_steps"] for step in solution.history) for solution in good)
    line["evaluations"] = _median(solution.counts["objective"] for solution in good)
    line["gradients"] = _median(solution.counts["gradient"] for solution in good)
    line["unit steps, %"] = 100.0 * sum(length == 1.0 for length in lengths) / len(lengths) if lengths else None
    line["seconds"] = sum(solution.seconds for solution in found)
    return line


def _columns(title: str, solver: str, count: int, atol: float, accuracy: str) -> dict[str, Cell]:
    """A line without figures."""
    line: dict[str, Cell] = {"problems": title, "linear solver": solver, "accuracy": accuracy, "residual": atol}
    figures = ("solved", "steps", "linear steps", "evaluations", "gradients", "unit steps, %", "seconds")
    return {**line, "of": count, **dict.fromkeys(figures)}


def _recorded(seen: dict[str, Cell]) -> dict[str, Cell]:
    return {"unit steps, %" if key == "unit" else key: value for key, value in seen.items()}


def _median(values: Any) -> Cell:
    found = list(values)
    return float(statistics.median(found)) if found else None


def main() -> None:
    """Print one of the tables."""
    peers.settle()
    torch.set_default_dtype(torch.float64)
    parser = peers.parser(__doc__ or "", rounds=3)
    parser.add_argument("part", nargs="?", choices=("systems", "paper"), default="systems", help="which (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of sketches per problem, tenfold for data (%(default)s)"
    )
    arguments = parser.parse_args()
    (paper if arguments.part == "paper" else table)(arguments)


if __name__ == "__main__":
    main()
