"""Every algorithm against every exact case that it fits, with no tuning argument, from one table.

The numbers are the relative errors of x that each pair states. For ImplicitGradient that is 1e-6 everywhere; for
Penalty it is the O(1/penalty) bias, measured in the same run from a second penalty, doubled.
"""

import warnings

import pytest
import torch

import bilevel
import problems
from implicit import tree

EXACT = {
    ("ImplicitGradient", "quadratic"): 1e-6,
    ("ImplicitGradient", "quadratic_ill_conditioned"): 1e-6,
    ("ImplicitGradient", "quadratic_pytree"): 1e-6,
    ("ImplicitGradient", "ridge_penalties"): 1e-6,
    ("ImplicitGradient", "box"): None,
    ("ImplicitGradient", "box_active"): None,
    ("Penalty", "quadratic"): 1e-2,
    ("Penalty", "quadratic_ill_conditioned"): 5e-3,
    ("Penalty", "quadratic_pytree"): 5e-3,
    ("Penalty", "ridge_penalties"): 5e-3,
    ("Penalty", "box"): 1e-2,
    ("Penalty", "box_active"): 1e-9,
}
"""None: the algorithm refuses the case by name."""

SOLVED: dict[tuple[str, str], tuple[problems.Case, bilevel.Solution]] = {}


def solve(algorithm: str, name: str) -> tuple[problems.Case, bilevel.Solution]:
    """One run per pair serves all tests of this module."""
    if (algorithm, name) not in SOLVED:
        case = problems.case(name)
        SOLVED[algorithm, name] = case, bilevel.solve(case.problem, bilevel.algorithm(algorithm)(), *case.start)
    return SOLVED[algorithm, name]


def fitting() -> list[tuple[str, str]]:
    return [pair for pair, tolerance in EXACT.items() if tolerance is not None]


def test_the_table_is_complete() -> None:
    exact = {name for name, entry in problems.entries().items() if "exact" in entry.tags}
    assert set(EXACT) == {(algorithm, name) for algorithm in bilevel.algorithms() for name in exact}


@pytest.mark.parametrize(("algorithm", "name"), [pair for pair, tolerance in EXACT.items() if tolerance is None])
def test_misfits_are_refused_by_name(algorithm: str, name: str) -> None:
    case = problems.case(name)
    with pytest.raises(ValueError, match=r"ImplicitGradient cannot handle lower_set; use Penalty"):
        bilevel.solve(case.problem, bilevel.algorithm(algorithm)(), *case.start)


@pytest.mark.parametrize(("algorithm", "name"), fitting())
def test_reaches_the_stated_accuracy(algorithm: str, name: str) -> None:
    case, solution = solve(algorithm, name)
    assert solution.status is bilevel.Status.CONVERGED, solution.message
    tolerance = EXACT[algorithm, name]
    assert tolerance is not None
    case.check(solution, rtol=tolerance)
    assert solution.accuracy.notes == ()


@pytest.mark.parametrize(("algorithm", "name"), fitting())
def test_the_reported_error_covers_the_true_error(algorithm: str, name: str) -> None:
    case, solution = solve(algorithm, name)
    reported = solution.accuracy.distance
    assert reported is not None
    rounding = 1e-14 * float(tree.norm(case.x_star))
    assert case.distance(solution) <= reported + rounding
    # A report that covers by being enormous would be worthless.
    assert reported <= 4.0 * case.distance(solution) + 1e-7


@pytest.mark.parametrize("name", [n for a, n in fitting() if a == "Penalty"])
def test_penalty_stays_within_twice_its_measured_bias(name: str) -> None:
    case, once = solve("Penalty", name)
    algorithm = bilevel.Penalty(penalty=2.0 * once.algorithm.penalty)
    twice = bilevel.solve(case.problem, algorithm, once.x, once.y)
    measured = 2.0 * float(tree.norm(tree.sub(once.x, twice.x)))
    assert case.distance(once) <= 2.0 * measured + 1e-9
    if name != "box_active":  # there the bound hides the bias
        assert case.distance(twice) == pytest.approx(0.5 * case.distance(once), rel=0.1), "the bias is O(1/penalty)"


@pytest.mark.parametrize(("algorithm", "name"), fitting())
def test_counts_agree_with_the_cases_own_counter(algorithm: str, name: str) -> None:
    case = problems.case(name)
    before = case.counter.upper, case.counter.lower
    method = (
        bilevel.algorithm(algorithm)(lower_curvature=10.0) if algorithm == "Penalty" else bilevel.ImplicitGradient()
    )
    resolved = method.resolve(case.problem, *case.start)
    state = resolved.init(case.problem, *case.start)
    before = case.counter.upper - state.counts["upper"], case.counter.lower - state.counts["lower"]
    for _ in range(3):
        resolved.step(case.problem, state)
        state.step += 1
    assert (case.counter.upper - before[0], case.counter.lower - before[1]) == (
        state.counts["upper"],
        state.counts["lower"],
    )
    assert (state.counts["products"] > 0) == (algorithm == "ImplicitGradient")


def test_penalty_oracle_counts_per_step() -> None:
    """T gradients of g, T of f + p g, and one joint backward over f and two g: no second-order product."""
    case = problems.case("quadratic")
    data = bilevel.Batches(torch.arange(100.0), 10)
    problem = bilevel.BilevelProblem(
        lambda x, y, *, batch: case.problem.upper(x, y),
        lambda x, y, *, batch: case.problem.lower(x, y) * (1 + 1e-3 * batch.mean()),
        upper_data=data,
        lower_data=data,
    )
    method = bilevel.Penalty(lower_steps=4).resolve(problem, *case.start)
    state = method.init(problem, *case.start)
    for step in range(1, 4):
        method.step(problem, state)
        state.step += 1
        assert state.counts == {"upper": step * (4 + 1), "lower": step * (4 + 4 + 2), "products": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("algorithm", ["ImplicitGradient", "Penalty"])
def test_dtype_follows_the_inputs(algorithm: str, dtype: torch.dtype) -> None:
    case = problems.case("quadratic", dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = bilevel.solve(case.problem, bilevel.algorithm(algorithm)(), *case.start)
    assert solution.x.dtype == solution.y.dtype == dtype
    assert case.error(solution) < (1e-2 if algorithm == "Penalty" else 2e-3 if dtype == torch.float32 else 1e-6)
    assert solution.status in (bilevel.Status.CONVERGED, bilevel.Status.STALLED)


def test_the_start_is_not_modified() -> None:
    case = problems.case("quadratic_pytree")
    copies = tree.clone(case.start)
    for algorithm in (bilevel.ImplicitGradient(), bilevel.Penalty()):
        bilevel.solve(case.problem, algorithm, *case.start, max_steps=3)
        assert float(tree.norm(tree.sub(copies, case.start))) == 0.0
