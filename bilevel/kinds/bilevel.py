"""Bilevel problems on the command line."""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.algorithms.base import restrictions
from bilevel.auto import AUTO
from bilevel.kinds.base import Chart, Job, Kind, Outcome, Row, amount, count
from bilevel.problem import BilevelProblem
from bilevel.registry import algorithms
from bilevel.solution import Accuracy, Solution
from bilevel.solve import solve
from bilevel.verify import verify
from implicit import StepInfo, tree
from implicit.tree import Tree

_EXPLAINED = {
    "stationarity": "norm of the hypergradient at x; projected where x is in a set",
    "hypergradient_error": "how far that hypergradient is from the true one",
    "bias": "how far the penalty alone moves the hypergradient",
    "lower_residual": "norm of the lower gradient at (x, y); projected where y is in a set",
    "lower_error": "distance of y to the lower solution",
    "linear_residual": "relative residual of the adjoint system",
    "distance": "estimated distance of x to the nearest solution, doubled for safety",
    "feasibility": "largest violation of any constraint or set",
    "optimality_gap": "g(x, y) minus the smallest lower value that was found at x",
}


class BilevelKind(Kind):
    """``min_x f(x, y*(x))``."""

    name = "bilevel"
    declarations = ("bilevel.BilevelProblem",)
    starts = ("x0", "y0")
    tolerances: ClassVar = {"rtol": "relative to the first stationarity", "atol": "on the stationarity"}
    chart = Chart(
        value="upper_value",
        label="upper value",
        residuals={"stationarity": "stationarity", "hypergradient": "norm of the minibatch hypergradient"},
        optimum="optimal_upper_value",
    )
    accuracy_title = "How accurate it is, measured at the end on all data:"
    counted: ClassVar = {
        "upper": "upper evaluations (each with a gradient)",
        "lower": "lower evaluations (each with a gradient)",
        "products": "second-order products",
    }
    automatic_text = "picked by what is declared and by the curvature of the lower level, and it says why"
    solve = staticmethod(solve)

    def declares(self, value: Any) -> bool:
        """Whether ``value`` is a :class:`BilevelProblem`."""
        return isinstance(value, BilevelProblem)

    def methods(self) -> dict[str, type[Any]]:
        """The registered algorithms."""
        return dict(algorithms())

    def default(self, problem: BilevelProblem) -> Any:
        """The first registered algorithm that fits."""
        reasons = []
        for cls in algorithms().values():
            reason = cls().refuses(problem)
            if reason is None:
                return cls()
            reasons.append(reason)
        raise ValueError(f"no algorithm fits this problem: {'; '.join(reasons)}")

    def automatic(self) -> str:
        """The name that chooses by the structure of the problem."""
        return AUTO

    def entrants(self) -> tuple[str, ...]:
        """Every registered algorithm, and the automatic choice."""
        return (*algorithms(), AUTO)

    def job(self, case: Any) -> Job:
        """The case with its budget, its report, and its exact answer."""
        return Job(
            kind=self,
            problem=case.problem,
            start=case.start,
            settings=case.settings,
            max_steps=case.max_steps,
            report=case.report,
            exact=functools.partial(_compare, case) if case.x_star is not None else None,
            source=case.source,
            best_known=case.upper_star,
            lower_class=case.lower_class or _declared_class(case.problem),
        )

    def start(self, problem: BilevelProblem) -> tuple[Tree, ...] | None:
        """Where the modules of a module problem are."""
        return getattr(problem, "start", None)

    def resumable(self, problem: BilevelProblem) -> bool:
        """Whether its data can be saved and restored."""
        return problem.resumable

    def opening(self, job: Job, state: Any) -> tuple[list[str], Tensor]:
        """Sizes of both levels, and their data."""
        parts = [f"x has {count(state.x)}", f"y has {count(state.y)}"]
        for level in ("upper", "lower"):
            data = getattr(job.problem, f"{level}_data")
            if data is not None:
                rows = f"{data.rows:,}" if data.rows is not None else "unknown"
                batches = f" in batches of {data.batch_size:,}" if data.stochastic and data.batch_size else ""
                parts.append(f"{level} data: {rows} rows{batches}")
        for name in restrictions(job.problem):
            parts.append(_restriction(job, name))
        return parts, tree.leaves(state.y)[0]

    def evaluations(self, info: StepInfo) -> dict[str, int]:
        """Those of the run."""
        return dict(info.state.counts)

    def verdict(self, job: Job, solution: Solution) -> tuple[bool, str]:
        """That of :func:`bilevel.verify` at its default tolerance."""
        found = verify(job.problem, solution.x, solution.y)
        return found.accepted, "; ".join(found.reasons)

    def outcome(self, job: Job, solution: Solution) -> Outcome:
        """Both values, the metrics and the accuracy report."""
        return Outcome(
            method=solution.algorithm,
            headline=Row("upper value", solution.upper_value),
            numbers={
                "upper_value": solution.upper_value,
                "lower_value": solution.lower_value,
                "accuracy": {**vars(solution.accuracy), "lower_kkt": _kkt(solution.accuracy)},
                "metrics": solution.metrics,
                "starts": [{**vars(start), "status": start.status.name} for start in solution.starts],
                "choice": solution.choice,
            },
            variables={
                "x": solution.x,
                "y": solution.y,
                **{f"multipliers.{name}": part for name, part in solution.multipliers.items()},
            },
            rows=[Row("lower value", solution.lower_value), *(Row(*item) for item in solution.metrics.items())],
            accuracy=_accuracy(solution.accuracy),
            notes=((f"auto chose {solution.choice}",) if solution.choice else ()) + solution.accuracy.notes,
            like=tree.leaves(solution.y)[0],
        )


def _declared_class(problem: BilevelProblem) -> str:
    return "strongly convex" if problem.strong_convexity is not None else ""


def _restriction(job: Job, name: str) -> str:
    if name.endswith("_set"):
        return f"{name.replace('_', ' ')}: {type(getattr(job.problem, name)).__name__}"
    with torch.no_grad():
        rows = tree.size(job.problem.constraint(name, *job.start))
    level, kind = name.split("_")
    return f"{level} level: " + amount(rows, kind, "inequalities" if kind == "inequality" else "equalities")


def _compare(case: Any, solution: Solution) -> dict[str, float]:
    found = {"distance_to_exact_x": case.distance(solution), "relative_error_of_x": case.error(solution)}
    return found if case.upper_star is None else {**found, "optimal_upper_value": case.upper_star}


def _kkt(accuracy: Accuracy) -> dict[str, float] | None:
    return None if accuracy.lower_kkt is None else {**vars(accuracy.lower_kkt), "largest": accuracy.lower_kkt.largest}


def _accuracy(accuracy: Accuracy) -> list[Row]:
    rows = []
    if accuracy.lower_kkt is not None:
        rows.append(
            Row("lower kkt", accuracy.lower_kkt.largest, "residual of the lower optimality conditions at (x, y)")
        )
    for name, meaning in _EXPLAINED.items():
        value = getattr(accuracy, name)
        if value is not None:
            kind = accuracy.hypergradient_error_kind if name == "hypergradient_error" else None
            rows.append(Row(name.replace("_", " "), value, f"{meaning} ({kind})" if kind else meaning))
    return rows
