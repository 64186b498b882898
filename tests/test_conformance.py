"""Every algorithm against every exact case that it fits, with no tuning argument, from one table.

The numbers are the relative errors of x that each pair has to reach, with status CONVERGED and a point that
``bilevel.verify`` accepts. For Penalty they are its O(1/penalty) bias, measured in the same run from a second penalty.
A name instead of a number is a status: where an algorithm cannot reach the solution, it has to say so.
"""

import itertools
import warnings

import pytest
import torch

import bilevel
import problems
from implicit import tree

REFUSED = "refused"
CONSTRAINED = {
    "coupled_scalar_active": 1e-8,
    "coupled_scalar_inactive": 1e-8,
    "coupled_scalar_degenerate": 1e-5,
    "coupled_scalar_shifted": 1e-8,
    "coupled_sum": 1e-5,
    "coupled_sum_bilinear": 1e-6,
    "coupled_segment": 1e-5,
    "coupled_waves_1": 1e-5,
    "coupled_waves_2": 1e-5,
    "coupled_waves_3": 1e-5,
    "coupled_waves_4": 1e-5,
    "coupled_polyhedral": 1e-5,
    "stackelberg_pricing": 1e-6,
}
EXPECTED: dict[str, dict[str, float | str]] = {
    "ImplicitGradient": {
        **dict.fromkeys(CONSTRAINED, REFUSED),
        **dict.fromkeys(("box", "box_active", "box_kink", "discontinuous"), REFUSED),
        "quadratic": 1e-6,
        "quadratic_ill_conditioned": 1e-6,
        "quadratic_pytree": 1e-6,
        "ridge_penalties": 1e-6,
        "many_solutions": 1e-6,
        "many_solutions_selected": "LINEAR_SOLVE_FAILED",  # g_yy is singular where f sees it
        "nonconvex_lower": 1e-6,
        "nonconvex_lower_far": 1e-6,
    },
    "Penalty": {
        **dict.fromkeys(CONSTRAINED, REFUSED),
        "quadratic": 1e-2,
        "quadratic_ill_conditioned": 5e-3,
        "quadratic_pytree": 5e-3,
        "ridge_penalties": 5e-3,
        "box": 1e-2,
        "box_active": 1e-9,
        "box_kink": 1e-3,
        "many_solutions": 1e-2,
        "many_solutions_selected": 5e-3,
        "nonconvex_lower": 1e-3,
        "nonconvex_lower_far": 1e-3,
        "discontinuous": "STEP_LIMIT",  # the surrogate has slopes of the penalty on both sides of the jump
    },
    "LVHBA": {
        **CONSTRAINED,
        "stackelberg_pricing": "a local solution",
        "quadratic": "STEP_LIMIT",
        "quadratic_ill_conditioned": "STEP_LIMIT",
        "quadratic_pytree": 1e-4,
        "ridge_penalties": "STEP_LIMIT",
        "box": 1e-6,
        "box_active": 1e-6,
        "box_kink": 1e-5,
        "many_solutions": 1e-5,
        "many_solutions_selected": 1e-5,
        "nonconvex_lower": 1e-5,
        "nonconvex_lower_far": 1e-5,
        "discontinuous": 1e-6,
    },
    "KKTRelaxation": {
        **{name: min(tolerance, 1e-5) for name, tolerance in CONSTRAINED.items()},
        **dict.fromkeys(
            (
                "quadratic",
                "quadratic_ill_conditioned",
                "quadratic_pytree",
                "ridge_penalties",
                "box",
                "box_active",
                "box_kink",
                "many_solutions",
                "many_solutions_selected",
                "nonconvex_lower",
                "nonconvex_lower_far",
                "discontinuous",
            ),
            1e-8,
        ),
    },
}
STEPS = {
    **{("LVHBA", name): 2_000 for name in ("quadratic", "quadratic_ill_conditioned", "ridge_penalties")},
    ("Penalty", "discontinuous"): 300,
}
"""Budgets of runs that would not end in reasonable time."""
NOTED = {
    ("Penalty", "box_kink"): "kink",
}
LONG = ("quadratic_pytree", "quadratic_ill_conditioned")
"""Cases whose second run with Penalty would be a quarter of the whole module; their first one is compared like all."""
DISTANT = ("ImplicitGradient", "Penalty")
"""Algorithms that estimate the distance to the solution."""

SOLVED: dict[tuple[str, str], tuple[problems.Case, bilevel.Solution]] = {}


def solve(algorithm: str, name: str) -> tuple[problems.Case, bilevel.Solution]:
    """One run per pair serves all tests of this module."""
    pair = algorithm, name
    if pair not in SOLVED:
        case = problems.case(name)
        method = bilevel.algorithm(algorithm)()
        SOLVED[pair] = (
            case,
            bilevel.solve(case.problem, method, *case.start, max_steps=STEPS.get(pair), raise_on_failure=False),
        )
    return SOLVED[pair]


def pairs(kind: type) -> list[tuple[str, str]]:
    """Those with a number, or those with a name."""
    return [
        (a, n)
        for a, row in EXPECTED.items()
        for n, found in row.items()
        if isinstance(found, kind) and found != REFUSED
    ]


def exact_cases() -> set[str]:
    return {name for name, entry in problems.entries().items() if {"exact"} <= entry.tags and "bolib" not in entry.tags}


def test_the_table_is_complete() -> None:
    assert set(EXPECTED) == set(bilevel.algorithms())
    for algorithm, row in EXPECTED.items():
        assert set(row) == exact_cases(), algorithm


REFUSALS = [(a, n) for a, row in EXPECTED.items() for n, found in row.items() if found == REFUSED]


@pytest.mark.parametrize(("algorithm", "name"), REFUSALS)
def test_misfits_are_refused_by_name(algorithm: str, name: str) -> None:
    case = problems.case(name)
    field = r"(lower_set|lower_inequality|lower_equality|upper_inequality); use (Penalty|LVHBA)"
    message = f"{algorithm} cannot handle {field}"
    with pytest.raises(ValueError, match=message):
        bilevel.solve(case.problem, bilevel.algorithm(algorithm)(), *case.start)


@pytest.mark.parametrize(("algorithm", "name"), pairs(float))
def test_reaches_the_stated_accuracy(algorithm: str, name: str) -> None:
    case, solution = solve(algorithm, name)
    assert solution.status is bilevel.Status.CONVERGED, solution.message
    tolerance = EXPECTED[algorithm][name]
    assert isinstance(tolerance, float)
    case.check(solution, rtol=tolerance)
    assert bilevel.verify(case.problem, solution.x, solution.y)
    if algorithm in DISTANT:
        noted = NOTED.get((algorithm, name))
        assert len(solution.accuracy.notes) == (noted is not None)
        assert noted is None or noted in solution.accuracy.notes[0]


@pytest.mark.parametrize(("algorithm", "name"), pairs(str))
def test_what_is_not_reached_is_not_claimed(algorithm: str, name: str) -> None:
    case, solution = solve(algorithm, name)
    expected = EXPECTED[algorithm][name]
    if expected == "a local solution":
        assert solution.status is bilevel.Status.CONVERGED and case.error(solution) > 0.1
        assert bilevel.verify(case.problem, solution.x, solution.y)
    else:
        assert solution.status.name == expected


ELSEWHERE = {("LVHBA", f"coupled_waves_{k}") for k in (1, 3, 4)}
"""Pairs that end at another local minimum than the one whose multipliers are stated."""
STATED = [
    pair
    for pair in itertools.product(("LVHBA", "KKTRelaxation"), CONSTRAINED)
    if pair[1] != "stackelberg_pricing" and pair not in ELSEWHERE
]


@pytest.mark.parametrize(("algorithm", "name"), STATED)
def test_multipliers_are_those_of_the_lower_level(algorithm: str, name: str) -> None:
    case, solution = solve(algorithm, name)
    assert case.multipliers_star is not None
    for field, expected in case.multipliers_star.items():
        found, stated = tree.ravel(solution.multipliers[field]), tree.ravel(expected)
        torch.testing.assert_close(found, stated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("algorithm", "name"), [pair for pair in pairs(float) if pair[0] in DISTANT])
def test_the_reported_error_covers_the_true_error(algorithm: str, name: str) -> None:
    case, solution = solve(algorithm, name)
    reported = solution.accuracy.distance
    assert reported is not None
    rounding = 1e-14 * float(tree.norm(case.x_star))
    assert case.distance(solution) <= reported + rounding
    # A report that covers by being enormous would be worthless.
    assert reported <= 4.0 * case.distance(solution) + 1e-7


BIASED = [n for a, n in pairs(float) if a == "Penalty" and n not in ("box_kink", *LONG)]


@pytest.mark.parametrize("name", BIASED)
def test_penalty_stays_within_twice_its_measured_bias(name: str) -> None:
    case, once = solve("Penalty", name)
    algorithm = bilevel.Penalty(penalty=2.0 * once.algorithm.penalty)
    twice = bilevel.solve(case.problem, algorithm, once.x, once.y)
    measured = 2.0 * float(tree.norm(tree.sub(once.x, twice.x)))
    assert case.distance(once) <= 2.0 * measured + 1e-9
    if name != "box_active":  # there the bound hides the bias
        assert case.distance(twice) == pytest.approx(0.5 * case.distance(once), rel=0.1), "the bias is O(1/penalty)"


FIRST_PAIRS = [
    (algorithm, name)
    for algorithm in DISTANT
    for name in ("quadratic", "quadratic_ill_conditioned", "quadratic_pytree", "ridge_penalties", "box", "box_active")
    if EXPECTED[algorithm][name] != REFUSED
]


@pytest.mark.parametrize(("algorithm", "name"), FIRST_PAIRS)
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if dtype == torch.float64:
            case, solution = solve(algorithm, "quadratic")
        else:
            case = problems.case("quadratic", dtype=dtype)
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
