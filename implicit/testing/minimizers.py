"""Conformance of minimizers: CONVERGED is a measured gradient, and nothing else."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.derivatives import value_and_gradient
from implicit.minimizers.base import Minimizer, Objective, gradient_objective, graph_objective
from implicit.status import Status
from implicit.testing.methods import check_method
from implicit.testing.spaces import DTYPES, nested, normal, spaces
from implicit.testing.verdict import Verdict, identical, short
from implicit.tree import Tree

Wrap = Callable[[Objective], Any]


def check_minimizer(
    minimizer: Minimizer[Any], *, wrap: Wrap | None = None, dtypes: Sequence[torch.dtype] = DTYPES
) -> None:
    """Whether a minimizer keeps every promise of :class:`implicit.Minimizer`, :func:`check_method` included.

    The check computes the gradient at every end point anew. CONVERGED must mean that its norm is at most
    ``max(atol, rtol * reference)``, on quadratics, a logistic loss, a function that is NaN outside a ball,
    Rosenbrock's, and functions without a minimum; the easy ones must be solved, from nested containers, one number,
    tied leaves and the solution itself. The reported value, gradient norm and number of evaluations must be true, and
    ``max_steps`` obeyed. NaN at the start must end as NONFINITE; NaN later must raise nothing and never replace the
    last finite point.

    Args:
        minimizer: what to check; where its ``rtol`` is below ``sqrt(eps)``, that is used instead.
        wrap: turns an objective over ravelled points into the problem that the minimizer takes; the objective itself by
            default. For a projected method wrap it with the projection onto the whole space.
        dtypes: where it is tried.

    Raises:
        ConformanceError: with one sentence, for the first promise that is broken.
        TypeError: if ``minimizer`` is no Minimizer.

    Example:
        >>> import implicit
        >>> from implicit.testing import check_minimizer
        >>> check_minimizer(implicit.LBFGS())
    """
    if not isinstance(minimizer, Minimizer):
        raise TypeError(f"minimizer must be a Minimizer such as LBFGS(), got {minimizer!r}")
    for dtype in dtypes:
        eased = replace(minimizer, rtol=max(minimizer.rtol, float(torch.finfo(dtype).eps) ** 0.5))
        checks = [
            _Check(
                eased,
                case,
                wrap or (lambda objective: objective),
                Verdict(type(minimizer).__name__, f"{case.name}, {short(dtype)}"),
            )
            for case in _cases(dtype)
        ]
        for check in checks:
            check.solved()
        for aspect in (checks[0].limited, checks[0].poisoned, checks[0].unusable, checks[0].contract):
            aspect()


@dataclass(frozen=True)
class _Case:
    """A function of a tree with a start; ``easy`` ones must be solved."""

    name: str
    fn: Callable[[Tree], Tensor]
    start: Tree
    easy: bool = True
    bounded: bool = True


def _cases(dtype: torch.dtype) -> list[_Case]:
    own = spaces(dtype)
    scales = torch.logspace(0, 2, 11, dtype=torch.float64).to(dtype)
    features, signs = normal(91, 30, 4, dtype=dtype), torch.sign(normal(92, 30, dtype=dtype))

    def quadratic(y: Tree) -> Tensor:
        flat = tree.ravel(y)
        return 0.5 * (scales * flat**2).sum() - flat.sum()

    def logistic(y: Tree) -> Tensor:
        margin = signs * (features @ y["weights"] + y["bias"])
        return torch.nn.functional.softplus(-margin).mean() + 0.05 * tree.dot(y, y)

    def apart(y: Tree) -> Tensor:
        return ((y["encoder"] - 1.0) ** 2).sum() + ((y["decoder"] + 2.0) ** 2).sum()

    def walled(y: Tree) -> Tensor:
        return -torch.log(1.0 - (y**2).sum()) + y.sum()

    def rosenbrock(y: Tree) -> Tensor:
        return 100.0 * (y[1] - y[0] ** 2) ** 2 + (1.0 - y[0]) ** 2

    zeros = {"weights": torch.zeros(4, dtype=dtype), "bias": torch.zeros((), dtype=dtype)}
    return [
        _Case("nested quadratic", quadratic, nested(dtype)),
        _Case("logistic loss", logistic, zeros),
        _Case("one number", lambda y: (y - 3.0) ** 2 + 0.1 * y**4, own["scalar"]),
        _Case("tied leaves", apart, own["tied"]),
        _Case("started at the solution", lambda y: (y**2).sum(), torch.zeros(3, dtype=dtype)),
        _Case("constant", lambda y: 0.0 * y.sum() + 2.0, torch.ones(3, dtype=dtype)),
        _Case("NaN outside a ball", walled, torch.zeros(3, dtype=dtype)),
        _Case("Rosenbrock", rosenbrock, torch.tensor([-1.2, 1.0], dtype=dtype), easy=False),
        _Case("linear, without a minimum", lambda y: y.sum(), torch.zeros(3, dtype=dtype), easy=False, bounded=False),
        _Case("exp(-y), without a minimum", lambda y: torch.exp(-y).sum(), torch.zeros(2, dtype=dtype), easy=False),
    ]


@dataclass
class _Check:
    minimizer: Minimizer[Any]
    case: _Case
    wrap: Wrap
    verdict: Verdict

    def objective(self, fn: Callable[[Tree], Tensor]) -> Any:
        """The problem that the minimizer takes."""
        if self.minimizer.needs_graph:
            return self.wrap(graph_objective(lambda _, y: fn(y), (), self.case.start))
        return self.wrap(gradient_objective(fn, self.case.start))

    def run(self, fn: Callable[[Tree], Tensor], minimizer: Minimizer[Any] | None = None) -> tuple[Any, Status]:
        start = tree.ravel(tree.clone(self.case.start))
        with self.verdict.runs("minimizing"):
            return (minimizer or self.minimizer).run(self.objective(fn), start)

    def gradient(self, flat: Tensor) -> tuple[float, float]:
        """Value and gradient norm, computed anew."""
        value, gradient = value_and_gradient(self.case.fn, tree.unravel(flat, self.case.start))
        return float(value), float(tree.norm(gradient))

    def judge(self, state: Any, status: Status, minimizer: Minimizer[Any]) -> None:
        """Status and reported numbers against a measurement at the end point."""
        verdict = self.verdict
        value, norm = self.gradient(state.point)
        _, first = self.gradient(tree.ravel(self.case.start))
        asked = max(minimizer.atol, minimizer.rtol * first)
        verdict(
            status is not Status.CONVERGED or norm <= 1.001 * asked,
            f"the status is CONVERGED, but the gradient norm is {norm:.3g}, asked was {asked:.3g}; measure it at the "
            "point that is returned",
        )
        limited = status in (Status.STEP_LIMIT, Status.STALLED)
        verdict(
            not (limited and norm <= 0.999 * asked),
            f"the status is {status.name}, but the gradient norm {norm:.3g} is within the tolerance {asked:.3g}; read "
            "the status off the gradient and not off the step count",
        )
        close = abs(state.value - value) <= 1e-5 * abs(value) + 1e-30
        verdict(close, f"the state's value is {state.value:.8g}, the objective at its point {value:.8g}")
        reported = float(torch.linalg.vector_norm(state.gradient))
        close = abs(reported - norm) <= 1e-3 * norm + 1e-30
        verdict(close, f"the state's gradient has norm {reported:.3g}, that at its point {norm:.3g}")

    def solved(self) -> None:
        """One case: truth everywhere, convergence on the easy ones."""
        case, verdict = self.case, self.verdict
        calls: list[int] = []
        kept = tree.clone(case.start)

        def counted(y: Tree) -> Tensor:
            calls.append(1)
            return case.fn(y)

        capped = self.minimizer if case.bounded else replace(self.minimizer, max_steps=20)
        state, status = self.run(counted, capped)
        verdict(identical(kept, case.start), "the run modifies its starting point")
        verdict(
            state.evaluations == len(calls),
            f"it reports {state.evaluations} evaluations, the objective was called {len(calls)} times",
        )
        finite = bool(torch.isfinite(state.point).all())
        verdict(finite, "the point is not finite; accept only trials whose value and gradient are")
        self.judge(state, status, capped)
        verdict(
            not case.easy or status is Status.CONVERGED,
            f"this case is easy, but it ended as {status.name} after {state.step} steps with gradient norm "
            f"{self.gradient(state.point)[1]:.3g}",
        )

    def limited(self) -> None:
        """max_steps is obeyed and says nothing about success."""
        needed = self.run(self.case.fn)[0].step
        for limit in sorted({1, max(1, needed // 2), max(1, needed)}):
            minimizer = replace(self.minimizer, max_steps=limit)
            state, status = self.run(self.case.fn, minimizer)
            self.verdict(state.step <= limit, f"with max_steps={limit} it took {state.step} steps")
            self.judge(state, status, minimizer)
            enough = limit < needed or status is Status.CONVERGED
            self.verdict(enough, f"it converges in {needed} steps, but with max_steps={limit} ended as {status.name}")

    def poisoned(self) -> None:
        """An objective that turns NaN: no exception, a finite point, a true status."""
        for clean in (1, 2, 4):
            calls: list[int] = []

            def failing(y: Tree, seen: list[int] = calls, limit: int = clean) -> Tensor:
                seen.append(1)
                return self.case.fn(y) * (1.0 if len(seen) <= limit else math.nan)

            where = self.verdict.at(f"NaN after {clean} evaluations")
            check = _Check(self.minimizer, self.case, self.wrap, where)
            state, status = check.run(failing)
            finite = bool(torch.isfinite(state.point).all()) and math.isfinite(state.value)
            where(finite, f"NaN replaced the last finite point; its value is {state.value}")
            check.judge(state, status, self.minimizer)

    def unusable(self) -> None:
        """NaN at the start, and an exception in the objective."""
        _, status = self.run(lambda y: self.case.fn(y) * math.nan)
        self.verdict(status is Status.NONFINITE, f"NaN at the start ends as {status.name} instead of NONFINITE")

        class Own(RuntimeError):
            pass

        def raising(y: Tree) -> Tensor:
            raise Own("the objective's own")

        try:
            self.minimizer.run(self.objective(raising), tree.ravel(tree.clone(self.case.start)))
        except Own:
            return
        raise self.verdict.fail("it swallows an exception of the objective; let it through")

    def contract(self) -> None:
        """The contract with the driver, on a case that takes a few steps."""
        case = self.case
        start = tree.ravel(tree.clone(case.start))

        def measure(state: Any) -> tuple[float, float]:
            return self.gradient(state.point)[1], 1.001 * max(
                self.minimizer.atol, self.minimizer.rtol * self.gradient(start)[1]
            )

        check_method(self.minimizer, self.objective(case.fn), (start,), steps=4, measure=measure)
