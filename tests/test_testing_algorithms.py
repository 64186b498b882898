"""Conformance of bilevel algorithms: ours pass in both precisions; broken ones fail with the sentence they earn."""

import inspect
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

import bilevel
import implicit
from bilevel.testing import check_algorithm
from implicit import Status, tree
from implicit.testing import ConformanceError

DOUBLE = [torch.float64]

ALGORITHMS: dict[str, list[tuple[bilevel.Algorithm[Any], tuple[str, ...]]]] = {
    "ImplicitGradient": [
        (bilevel.ImplicitGradient(), ("upper_optimizer", "lower_step_size")),
        (bilevel.ImplicitGradient(keep_hessian=0), ("upper_optimizer", "lower_step_size")),
    ],
    "KKTRelaxation": [(bilevel.KKTRelaxation(restarts=0), ())],
    "LVHBA": [(bilevel.LVHBA(), ())],
    "Penalty": [(bilevel.Penalty(rtol=3e-2, lower_steps=3, check_every=5), ())],
}


def rows() -> list[Any]:
    """Every row of the table by name and position."""
    found = []
    for name, entries in ALGORITHMS.items():
        for index in range(len(entries)):
            found.append(pytest.param(name, index, id=f"{name}-{index}"))
    return found


def test_whatever_is_exported_is_in_the_table() -> None:
    found = {name: getattr(bilevel, name) for name in bilevel.__all__}
    base = bilevel.Algorithm
    classes = {n for n, c in found.items() if inspect.isclass(c) and issubclass(c, base) and not inspect.isabstract(c)}
    assert classes == set(ALGORITHMS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "index"), rows())
def test_our_algorithms_conform(name: str, index: int, dtype: torch.dtype) -> None:
    algorithm, optional = ALGORITHMS[name][index]
    assert type(algorithm).__name__ == name
    check_algorithm(algorithm, optional=optional, dtypes=[dtype])


class DoubleOnly(bilevel.ImplicitGradient):
    """Refuses single precision, with or without a name."""

    said: ClassVar[str] = "x0 is torch.float32: not here"

    def resolve(self, problem: Any, *start: Any, max_steps: int | None = None) -> Any:
        if tree.common_dtype(start[0]) == torch.float32:
            raise ValueError(self.said)
        return super().resolve(problem, *start, max_steps=max_steps)


class DoubleOnlyMutely(DoubleOnly):
    said = "not here"


def test_a_dtype_may_be_refused_by_name() -> None:
    check_algorithm(DoubleOnly(), dtypes=[torch.float32])
    with pytest.raises(ConformanceError, match=r"it refuses torch\.float32 starts by 'not here', which does not name"):
        check_algorithm(DoubleOnlyMutely(), dtypes=[torch.float32])


def test_double_precision_may_not_be_refused() -> None:
    class SingleOnly(bilevel.ImplicitGradient):
        def resolve(self, problem: Any, *start: Any, max_steps: int | None = None) -> Any:
            raise ValueError("x0 is torch.float64: not here")

    with pytest.raises(ConformanceError, match=r"x0 is torch\.float64: not here"):
        check_algorithm(SingleOnly(), dtypes=DOUBLE)


def test_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match="algorithm must be an Algorithm"):
        check_algorithm(implicit.LBFGS())  # type: ignore[arg-type]


# ---------------------------------------------------------------- broken algorithms


class NoParentCheck(bilevel.ImplicitGradient):
    def __post_init__(self) -> None: ...


class Surrogate(bilevel.ImplicitGradient):
    """Confirms whatever it claims itself."""

    def terminate(self, problem: Any, state: Any) -> Status:
        return Status.CONVERGED if state.step >= 2 else Status.RUNNING

    def assess(self, problem: Any, state: Any, status: Status) -> Any:
        accuracy, _, message = super().assess(problem, state, status)
        return replace(accuracy, distance=None), status, message


class Flatters(bilevel.ImplicitGradient):
    def assess(self, problem: Any, state: Any, status: Status) -> Any:
        accuracy, status, message = super().assess(problem, state, status)
        return replace(accuracy, stationarity=0.0, hypergradient_error=0.0), status, message


class RefusesMutely(bilevel.ImplicitGradient):
    def refuses(self, problem: Any) -> str | None:
        return None if problem.lower_set.is_whole_space else "no"


class Bypasses(bilevel.ImplicitGradient):
    def step(self, problem: Any, state: Any) -> Any:
        problem.upper(state.x, state.y)
        return super().step(problem, state)


class ForgetsReference(bilevel.ImplicitGradient):
    """A setting changed behind the checkpoint's back."""

    def step(self, problem: Any, state: Any) -> Any:
        found = super().step(problem, state)
        seen = state.__dict__.setdefault("_seen", 0) + 1
        state.__dict__["_seen"] = seen
        tree.copy_(state.y, tree.scale(1.0 + 1e-13 * seen, state.y))
        return found


class Vague(bilevel.ImplicitGradient):
    guarantee: ClassVar[str] = "GOOD"


class Adjusted(bilevel.ImplicitGradient):
    """Changes what the accuracy report says."""

    change: ClassVar[dict[str, Any]] = {}

    def assess(self, problem: Any, state: Any, status: Status) -> Any:
        accuracy, status, message = super().assess(problem, state, status)
        return replace(accuracy, **self.change), status, message


class ClaimsSolvedLower(Adjusted):
    change: ClassVar[dict[str, Any]] = {"lower_residual": 1.0}


class ClaimsNear(Adjusted):
    rough = True
    change: ClassVar[dict[str, Any]] = {"distance": 0.0}

    def terminate(self, problem: Any, state: Any) -> Status:
        return Status.CONVERGED if state.step >= 3 else Status.RUNNING

    def assess(self, problem: Any, state: Any, status: Status) -> Any:
        accuracy, _, message = super().assess(problem, state, status)
        return accuracy, Status.CONVERGED, message


class RefusesAll(bilevel.ImplicitGradient):
    def refuses(self, problem: Any) -> str | None:
        return "not today"


class NeverDone(bilevel.ImplicitGradient):
    def assess(self, problem: Any, state: Any, status: Status) -> Any:
        accuracy, status, message = super().assess(problem, state, status)
        return accuracy, Status.STALLED if status is Status.CONVERGED else status, message


class NamesNoStop(bilevel.ImplicitGradient):
    def assess(self, problem: Any, state: Any, status: Status) -> Any:
        accuracy, status, message = super().assess(problem, state, status)
        return accuracy, Status.STALLED if status is Status.STOPPED else status, message


class NamesNoLimit(bilevel.ImplicitGradient):
    def assess(self, problem: Any, state: Any, status: Status) -> Any:
        accuracy, status, message = super().assess(problem, state, status)
        return accuracy, Status.STALLED if state.step == 1 else status, message


class MovesAtOnce(bilevel.ImplicitGradient):
    def init(self, problem: Any, *start: Any, generator: torch.Generator | None = None) -> Any:
        return super().init(problem, tree.scale(0.5, start[0]), start[1], generator=generator)


class MovesX0(bilevel.ImplicitGradient):
    def init(self, problem: Any, *start: Any, generator: torch.Generator | None = None) -> Any:
        state = super().init(problem, *start, generator=generator)
        for leaf in tree.leaves(start[0]):
            leaf.add_(1.0)
        return state


class LeavesTheSet(bilevel.ImplicitGradient):
    def refuses(self, problem: Any) -> str | None:
        return None


class OpaqueMessage(bilevel.ImplicitGradient):
    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError:
            raise ValueError("bad settings") from None


class Swallowing(bilevel.ImplicitGradient):
    def step(self, problem: Any, state: Any) -> Any:
        try:
            return super().step(problem, state)
        except Exception:
            state.stalled = True
            return {}


BROKEN_ALGORITHMS: list[tuple[type[bilevel.ImplicitGradient], str]] = [
    (ClaimsSolvedLower, r"accuracy\.lower_residual is 1, the true one .*; measure it at the point"),
    (ClaimsNear, r"the status is CONVERGED, but the true hypergradient|accuracy\.distance is 0, but x is .* from the"),
    (RefusesAll, r"it refuses an unconstrained quadratic problem with a strongly convex lower level: not today"),
    (NeverDone, r"this problem is easy, but the run ended as STALLED after \d+ steps"),
    (NamesNoStop, r"a callback that returns True ends the run as STALLED instead of STOPPED"),
    (NamesNoLimit, r"max_steps=1 ends as STALLED"),
    (MovesAtOnce, r"max_steps=0 moves x; init may project the start, and nothing more"),
    (MovesX0, r"the run modifies x0 or y0; init must copy them"),
    (LeavesTheSet, r"it accepts lower_set, but ends .* outside of it"),
    (OpaqueMessage, r"rtol=-1\.0 is refused by 'bad settings', which does not name rtol"),
    (Swallowing, r"it swallows an exception of the objective; let it through"),
    (NoParentCheck, r"rtol=-1\.0 is accepted; call super\(\)\.__post_init__\(\) in yours"),
    (Surrogate, r"the status is CONVERGED, but the true hypergradient has norm .*surrogate"),
    (Flatters, r"accuracy\.stationarity is 0, the true one .*, further apart"),
    (RefusesMutely, r"it refuses a problem with a lower_set by 'no', which does not name lower_set"),
    (Bypasses, r"counts\['upper'\] is \d+ after \d+ steps, upper was called \d+ times; call"),
    (ForgetsReference, r"the resumed run ends with [xy] off by .*; keep everything"),
    (Vague, r"guarantee is 'GOOD'; state EXACT, BIAS or STATISTICAL"),
]


@pytest.mark.parametrize(("broken", "sentence"), BROKEN_ALGORITHMS, ids=[b.__name__ for b, _ in BROKEN_ALGORITHMS])
def test_broken_algorithms_fail_by_name(broken: type[bilevel.ImplicitGradient], sentence: str) -> None:
    with pytest.raises(ConformanceError, match=f"^{broken.__name__}.*: (?:{sentence})"):
        check_algorithm(broken(keep_hessian=0), optional=("upper_optimizer", "lower_step_size"), dtypes=DOUBLE)
