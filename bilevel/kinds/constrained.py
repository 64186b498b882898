"""Constrained problems on the command line."""

import functools
import math
from typing import Any, ClassVar

from torch import Tensor

import constrained
from bilevel.kinds.base import Chart, Job, Kind, Outcome, Row, amount, count
from constrained.registry import default_method, methods
from implicit import StepInfo, tree
from implicit.tree import Tree

_EXPLAINED = {
    "stationarity": "gradient of the Lagrangian, over the largest of 1, |grad f| and the multipliers",
    "feasibility": "largest violation of a constraint or bound",
    "complementarity": "largest product of a multiplier and its constraint, scaled like the stationarity",
}
_PARTS = {"equality": "h(x) = 0", "inequality": "c(x) <= 0", "lower": "lower bounds", "upper": "upper bounds"}
_VERIFIED = 1e-6
_SAME_VALUE = 1e-6  # relative; published values have ten digits, solutions of degenerate problems fewer


class ConstrainedKind(Kind):
    """``min f(x) s.t. h(x) = 0, c(x) <= 0, lower <= x <= upper``."""

    name = "constrained"
    declarations = ("constrained.EqualityProblem", "constrained.ConstrainedProblem")
    starts = ("x0",)
    tolerances: ClassVar = {"atol": "on the scaled residual of the optimality conditions"}
    chart = Chart(
        value="objective", label="objective", residuals={"residual": "KKT residual"}, optimum="optimal_objective"
    )
    accuracy_title = "How well the optimality conditions hold, measured at the end:"
    counted: ClassVar = {
        "objective": "evaluations of objective and constraints",
        "gradient": "gradients",
        "jacobian": "Jacobians",
        "hessian": "Hessians",
        "products": "products with derivatives",
    }
    meanings: ClassVar = {
        "objective_gap": "(f(x) - f*) / max(1, |f*|)",
        "distance_to_known_x": "||x - x*|| / max(1, ||x*||)",
        "optimal_objective": "f*, the best known value",
        "other_known_minimum": "f at a known local minimum, which is where the run ended",
    }
    automatic_text = "AdaSketchNewton for equality constraints alone, InteriorPoint otherwise"
    solve = staticmethod(constrained.solve)

    def declares(self, value: Any) -> bool:
        """Whether ``value`` is a constrained problem."""
        return isinstance(value, constrained.Problem)

    def methods(self) -> dict[str, type[Any]]:
        """The registered methods."""
        return dict(methods())

    def default(self, problem: constrained.Problem) -> Any:
        """What ``constrained.solve`` takes."""
        return default_method(problem)

    def automatic(self) -> None:
        """``constrained.solve`` chooses if it is given none."""
        return None

    def entrants(self) -> tuple[str, ...]:
        """Every registered method; the automatic choice is one of them."""
        return tuple(methods())

    def job(self, case: Any) -> Job:
        """The case with its published start and its best known answer."""
        known = case.f_star is not None or case.x_star is not None
        return Job(
            kind=self,
            problem=case.problem,
            start=(case.start,),
            settings=case.settings,
            exact=functools.partial(_compare, case) if known else None,
            source=case.source,
            best_known=case.f_star,
        )

    def opening(self, job: Job, state: Any) -> tuple[list[str], Tensor]:
        """The size of x and how many constraints there are."""
        numbers = ((state.equality, "equality", "equalities"), (state.inequality, "inequality", "inequalities"))
        found = [amount(v.numel(), noun, plural) for v, noun, plural in numbers if v.numel()]
        bounded = [side for side in ("lower", "upper") if getattr(job.problem, side) is not None]
        found += [f"{' and '.join(bounded)} bounds"] if bounded else []
        return [f"x has {count(job.start[0])}", ", ".join(found) or "no constraints"], state.x

    def evaluations(self, info: StepInfo) -> dict[str, int]:
        """Those of the run; nothing before the first point is evaluated."""
        point = info.state.point
        return {} if point is None else dict(point.lagrangian.counts)

    def verdict(self, job: Job, solution: constrained.Solution) -> tuple[bool, str]:
        """Whether the residual of the optimality conditions, measured again at the end, is at most 1e-6."""
        largest = solution.residual.largest
        accepted = largest <= _VERIFIED
        return accepted, "" if accepted else f"KKT residual {largest:.3g}, above {_VERIFIED:g}"

    def outcome(self, job: Job, solution: constrained.Solution) -> Outcome:
        """Objective, multipliers, residuals and curvature."""
        residual, multipliers = solution.residual, _multipliers(job.problem, solution)
        sizes = {name: _sizes(part) for name, part in multipliers.items()}
        accuracy = [Row(name, getattr(residual, name), meaning) for name, meaning in _EXPLAINED.items()]
        if solution.curvature is not None:
            meaning = "smallest along the active constraints, relative; inf where they leave no direction"
            accuracy.append(Row("curvature", solution.curvature, meaning))
        return Outcome(
            method=solution.method,
            headline=Row("objective", solution.objective),
            numbers={
                "objective": solution.objective,
                "residual": {**vars(residual), "largest": residual.largest},
                "curvature": solution.curvature,
                "multipliers": sizes,
            },
            variables={"x": solution.x, **{f"multipliers.{name}": part for name, part in multipliers.items()}},
            rows=[
                Row(f"largest multiplier, {_PARTS[name]}", size["largest"], f"of {amount(size['count'], 'number')}")
                for name, size in sizes.items()
            ],
            accuracy=accuracy,
            like=tree.leaves(solution.x)[0],
        )


def _multipliers(problem: constrained.Problem, solution: constrained.Solution) -> dict[str, Tree]:
    """Those of the constraints and bounds that the problem has."""
    parts = solution.multipliers._asdict()
    return {name: part for name, part in parts.items() if getattr(problem, name) is not None}


def _sizes(part: Tree) -> dict[str, Any]:
    largest = max((float(leaf.abs().amax()) for leaf in tree.leaves(part) if leaf.numel()), default=0.0)
    return {"count": tree.size(part), "largest": largest}


def _compare(case: Any, solution: constrained.Solution) -> dict[str, float]:
    found = {}
    if case.f_star is not None:
        found = {"objective_gap": case.gap(solution.x), "optimal_objective": case.f_star}
    if case.x_star is not None:
        found["distance_to_known_x"] = case.distance(solution.x)
    if solution.success and case.f_star is not None and abs(found["objective_gap"]) > _SAME_VALUE:
        value = min(case.other_minima, key=lambda other: abs(other - solution.objective), default=math.nan)
        if abs(value - solution.objective) <= _SAME_VALUE * max(1.0, abs(value)):
            found["other_known_minimum"] = value
    return found
