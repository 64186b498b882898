"""Points that solve a bilevel problem are accepted, others are not, and the report says why."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
import constrained
import problems
from bilevel import Batches, BilevelProblem, verify
from bilevel.flat import FlatProblem
from bilevel.lower_multipliers import recover_multipliers
from bilevel.lower_search import Search, search_lower_level
from bilevel.upper_stationarity import upper_stationarity
from tests.mutation import mutated


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def wells(*, box: bool = False) -> BilevelProblem:
    """Two minimizers of g in y at x = 1: -1.0122 with the lower value, and 0.98725; a maximizer near 0.025."""
    return BilevelProblem(
        upper=lambda x, y: ((x - 1) ** 2 + y**2).sum(),
        lower=lambda x, y: ((y**2 - x) ** 2 + y / 10).sum(),
        lower_set=constrained.Box(-2.0, 2.0) if box else constrained.WholeSpace(),
    )


def minimizers() -> list[float]:
    """Stationary points of the wells at x = 1: roots of ``4 y^3 - 4 y + 1/10``, the global minimizer first."""
    import numpy as np

    return sorted(np.roots([4.0, 0.0, -4.0, 0.1]).real.tolist())


def check_wells(find: Any = verify) -> None:
    best, top, local = minimizers()
    accepted = find(wells(), vector(1), vector(best))
    assert accepted.accepted and bool(accepted) and accepted.reasons == () and accepted.better_y is None
    assert not accepted.proved and abs(accepted.optimality_gap) < 1e-14 and accepted.lower_kkt.largest < 1e-13
    for other, problem in ((top, wells()), (local, wells(box=True))):
        found = find(problem, vector(1), vector(other))
        assert not found.accepted and not bool(found) and len(found.reasons) == 1 and found.proved
        assert float(found.better_y) == pytest.approx(best, abs=1e-7)
        expected = float(problem.lower(vector(1), vector(other)) - problem.lower(vector(1), vector(best)))
        assert found.optimality_gap == pytest.approx(expected, abs=1e-13)
        assert found.reasons[0].startswith("y is not a minimizer of lower at x: y = [-1.01227] has a value lower by ")
        assert found.lower_value == pytest.approx(float(problem.lower(vector(1), vector(other))))
    small = find(wells(), vector(1), vector(best + 2e-3))  # a gap of 4 (2e-3)^2
    assert small.optimality_gap == pytest.approx(1.6e-5, rel=0.1) and not small.accepted


def test_the_better_of_two_wells() -> None:
    check_wells()


def test_the_tolerance_is_on_the_gap_relative_to_the_value() -> None:
    problem = BilevelProblem(lambda x, y: (y**2).sum(), lambda x, y: ((y - x) ** 2).sum() + 100 * (x**2).sum())
    for off, expected in ((9e-3, True), (1.1e-2, False)):  # gap 8.1e-5 and 1.21e-4, beside 1e-6 * 100
        assert verify(problem, vector(1), vector(1 + off)).accepted is expected
        assert verify(problem, vector(1), vector(1 + off), tolerance=1e-9).accepted is False
        assert verify(problem, vector(1), vector(1 + off), tolerance=1e-5).accepted is True


LOWER_SETS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float, float]] = {
    # lower objective, bounds of y, x
    "cubic": (lambda x, y: x * y * (y / 2 - x**2), -1, 1, -0.5),
    "concave": (lambda x, y: -(x * y**2) / 2 - y**4 / 4, -1, 1, -0.4),
    "quartic": (lambda x, y: x * y**2 - y**4 / 2, -1, 1, 0.4),
    "ripples": (lambda x, y: torch.sin(40 * y) / 10 + (y - x) ** 2 / 5, -3, 3, 0.7),
    "needle": (lambda x, y: y**2 - 6 * torch.exp(-200 * (y - x) ** 2), -2, 2, 1.3),
}


@pytest.mark.parametrize("name", LOWER_SETS)
def test_stationary_points_on_an_interval_against_a_grid(name: str) -> None:
    """Every local minimizer, maximizer and end of the interval: accepted where the grid says so."""
    g, low, high, at = LOWER_SETS[name]
    x = vector(at)
    grid = torch.linspace(low, high, 400_001)
    values = g(x, grid)
    best = float(values.min())
    turns = ((values[1:-1] - values[:-2]) * (values[2:] - values[1:-1]) <= 0).nonzero().reshape(-1) + 1
    picked = torch.cat([grid[turns], grid[[0, -1]]])
    problem = BilevelProblem(
        lambda x, y: (x - y).sum(), lambda x, y: g(x, y).sum(), lower_set=constrained.Box(float(low), float(high))
    )
    outcomes = []
    for y in picked[:: max(1, len(picked) // 6)].tolist() + [float(grid[values.argmin()])]:
        gap = float(g(x, vector(y))) - best
        found = verify(problem, x, vector(y))
        assert found.accepted is (gap <= 1e-6), (y, gap, str(found))
        outcomes.append(found.accepted)
    assert any(outcomes) and not all(outcomes)


@pytest.mark.parametrize(
    "name",
    ["DempeDutta2012Ex31", "NieWangYe2017Ex52", "FrankeEtal2018Ex513", "Bard1988Ex2"],
)
def test_best_known_points_of_difficult_problems(name: str) -> None:
    case = problems.case(f"bolib-{name}")
    assert case.x_star is not None
    found = verify(case.problem, case.x_star, case.y_star)
    assert found.accepted, str(found)


@pytest.mark.slow
def test_best_known_points_of_the_library() -> None:
    for case in problems.cases("bolib"):
        assert verify(case.problem, case.x_star, case.y_star).accepted, case.name


def check_no_constraint_qualification(find: Any = verify) -> None:
    """``y^2 <= x`` at x = 0 leaves y = 0, where no multiplier exists: interior points end at 7e-5 and are no better."""
    problem = BilevelProblem(
        lambda x, y: (y**2).sum(), lambda x, y: ((y - 3) ** 2).sum(), lower_inequality=lambda x, y: y**2 - x
    )
    found = find(problem, vector(0), vector(0))
    assert found.accepted and found.optimality_gap < 1e-12 and found.lower_kkt.stationarity == pytest.approx(1.0)
    assert any("no constraint qualification" in note for note in found.notes)
    assert found.stationarity is None and any("no KKT point" in note for note in found.notes)


def test_no_constraint_qualification() -> None:
    check_no_constraint_qualification()


def coupled() -> BilevelProblem:
    """y* = min(x, 1) with multiplier x - 1 of the row; the upper level wants x + y <= 3 and 0 <= x <= 2.5."""
    return BilevelProblem(
        upper=lambda x, y: ((x - 4) ** 2).sum() + (y**2).sum(),
        lower=lambda x, y: ((y - x) ** 2).sum() / 2,
        lower_inequality=lambda x, y: {"cap": 10 * (y - 1)},
        upper_inequality=lambda x, y: x + y - 3,
        upper_set=constrained.Box(0.0, 2.5),
    )


def check_feasibility(find: Any = verify) -> None:
    found = find(coupled(), vector(2), vector(1))
    assert found.accepted and found.proved and found.stationarity == pytest.approx(0.0, abs=1e-12)
    assert str(found).startswith("accepted, with proof, at tolerance 1e-06")
    assert found.multipliers["lower_inequality"]["cap"] == pytest.approx(vector(0.1), abs=1e-12)
    assert (found.upper_feasibility, found.lower_feasibility) == (0.0, 0.0)
    upper = find(coupled(), vector(2.2), vector(1))
    assert not upper.accepted and upper.upper_feasibility == pytest.approx(0.2 / math.sqrt(2))
    assert "the upper constraints are violated by 0.141 at (x, y), which exceeds 1e-06" in upper.reasons[0]
    bound = find(coupled(), vector(2.75), vector(0.25))
    assert bound.upper_feasibility == pytest.approx(0.25) and not bound.accepted
    lower = find(coupled(), vector(1.5), vector(1.2))
    assert not lower.accepted and lower.lower_feasibility == pytest.approx(0.2)
    (reason,) = lower.reasons
    assert reason.startswith("the lower constraints are violated by 0.2 at (x, y)")
    assert lower.optimality_gap < 0 and lower.better_y is None
    inside = find(coupled(), vector(1.5), vector(0.9))
    assert float(inside.better_y) == pytest.approx(1.0) and "y = [1] has a value lower by 0.055" in inside.reasons[0]


def test_feasibility_of_both_levels() -> None:
    check_feasibility()


def test_an_x_without_a_feasible_y() -> None:
    problem = BilevelProblem(
        lambda x, y: (y - x).sum() ** 2,
        lambda x, y: (y**2).sum(),
        lower_inequality=lambda x, y: torch.cat([y - x, 1 + x - y]),
    )
    found = verify(problem, vector(0), vector(0.5))
    assert not found.accepted and found.optimality_gap is None
    assert any(
        "no y was found that is lower feasible at x (the least violation found is 0.354)" in r for r in found.reasons
    )


def test_a_lower_level_without_a_minimum() -> None:
    found = verify(BilevelProblem(lambda x, y: (y**2).sum(), lambda x, y: -(x * y).sum()), vector(1, 2), vector(0, 0))
    assert not found.accepted and "lower seems to be unbounded below at x" in found.reasons[0]


def test_nan() -> None:
    nan = vector(math.nan)
    for x, y, reason in (
        (nan, vector(1), "x contains NaN or infinity"),
        (vector(1), nan, "y contains NaN or infinity"),
    ):
        found = verify(wells(), x, y)
        assert not found.accepted and found.reasons == (reason,) and math.isnan(found.lower_value)
    undefined = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - torch.log(x)).sum() ** 2)
    found = verify(undefined, vector(-1), vector(0))
    assert not found.accepted and found.reasons == ("lower(x, y) is nan",) and "not known" in str(found)


def test_float32_raises_the_tolerance() -> None:
    best, _, local = minimizers()
    found = verify(wells(), torch.ones(1, dtype=torch.float32), torch.tensor([best], dtype=torch.float32))
    assert found.accepted and found.tolerance == pytest.approx(1e3 * torch.finfo(torch.float32).eps)
    assert not verify(wells(), torch.ones(1, dtype=torch.float32), torch.tensor([local], dtype=torch.float32)).accepted
    circle = BilevelProblem(
        lambda x, y: (y**2).sum(), lambda x, y: y.sum(), lower_inequality=lambda x, y: (y**2).sum() - x
    )
    at = -torch.ones(2, dtype=torch.float32)
    assert verify(circle, torch.tensor([2.0], dtype=torch.float32), at).accepted
    assert not verify(circle, torch.tensor([2.0], dtype=torch.float32), -at).accepted


def test_minibatch_problems_are_checked_on_all_data() -> None:
    data = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = BilevelProblem(
        lambda x, y: ((y - x) ** 2).sum(),
        lambda x, y, *, batch: ((batch - y) ** 2).mean() + 0.5 * (y**2).sum() * x.exp().sum(),
        lower_data=Batches(data, 4),
    )
    for rows, expected in ((data, True), (data[:4], False)):
        # The mean over rows and both columns has the gradient y - mean(rows), the other term y.
        assert verify(problem, vector(0), rows.mean(dim=0) / 2).accepted is expected


def test_trees_and_the_generator() -> None:
    problem = BilevelProblem(
        upper=lambda x, y: x["a"].sum() + (y[1] ** 2).sum(),
        lower=lambda x, y: ((y[0] - x["a"]) ** 2).sum() + ((y[1] ** 2 - 1) ** 2).sum() + y[1].sum() / 10,
    )
    best, _, local = minimizers()
    x, good = {"a": vector(1, 2)}, [vector(1, 2), vector(best, best)]
    generator = torch.Generator().manual_seed(3)
    before, everywhere = generator.get_state(), torch.get_rng_state()
    assert verify(problem, x, good, generator=generator).accepted
    found = verify(problem, x, [vector(1, 2), vector(best, local)], generator=generator)
    better: Any = found.better_y
    assert not found.accepted and torch.allclose(better[1], vector(best, best), atol=1e-6)
    assert torch.equal(generator.get_state(), before) and torch.equal(torch.get_rng_state(), everywhere)
    again = verify(problem, x, [vector(1, 2), vector(best, local)], generator=generator)
    assert str(again) == str(found)


def test_functions_that_cannot_be_batched() -> None:
    def lower(x: Tensor, y: Tensor) -> Tensor:
        return (
            (y**2 - x).square().sum() + y.sum() / 10
            if float(x.detach()) > 0 and float(y.detach().sum()) < 99
            else y.sum()
        )

    best, _, local = minimizers()
    problem = BilevelProblem(lambda x, y: (y**2).sum(), lower)
    good, bad = (verify(problem, vector(1), vector(y)) for y in (best, local))
    better: Any = bad.better_y
    assert good.accepted and not bad.accepted and float(better) == pytest.approx(best, abs=1e-6)
    assert any("torch.func.vmap refuses the lower level" in note for note in good.notes)


class Once(torch.autograd.Function):
    """``sum (y^2 - x)^2 + y / 10`` with a backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return ((y**2 - x) ** 2 + y / 10).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # type: ignore[override]
        x, y = ctx.saved_tensors
        inner = y**2 - x
        return grad_outputs[0] * (-2 * inner).sum().reshape(x.shape), grad_outputs[0] * (4 * inner * y + 0.1)


@pytest.mark.parametrize("m", [2, 250])
def test_without_second_derivatives(m: int) -> None:
    best, _, local = minimizers()
    problem = BilevelProblem(lambda x, y: (y**2).sum() + (x**2).sum(), lambda x, y: Once.apply(x, y))
    good, bad = (verify(problem, vector(1), torch.full((m,), y)) for y in (best, local))
    assert good.accepted and not bad.accepted and good.stationarity is None
    assert any("stationarity was not measured" in note for note in good.notes)


def many_wells(m: int) -> tuple[BilevelProblem, Tensor, Tensor]:
    best, _, local = minimizers()
    problem = BilevelProblem(lambda x, y: (x**2).sum() + y.sum(), lambda x, y: ((y**2 - x) ** 2).sum() + y.sum() / 10)
    return problem, torch.full((m,), best), torch.full((m,), local)


@pytest.mark.parametrize("m", [30, 400])
def test_many_unknowns(m: int) -> None:
    """Starts elsewhere find better wells for some of the entries: enough to refuse, not to name the best."""
    problem, best, local = many_wells(m)
    assert verify(problem, vector(1), best).accepted
    found = verify(problem, vector(1), local)
    assert not found.accepted and (found.optimality_gap or 0.0) > 0.1


def test_many_unknowns_with_bounds() -> None:
    """A concave quadratic over a box: corners are local minimizers, and one of them is the best."""
    weights = torch.linspace(0.5, 1.5, 12)
    problem = BilevelProblem(
        lambda x, y: y.sum(),
        lambda x, y: -((y**2) * weights).sum() - x * (y * weights).sum() / 5,
        lower_set=constrained.Box(-1.0, 1.0),
    )
    assert verify(problem, torch.tensor(1.0), torch.ones(12)).accepted
    assert not verify(problem, torch.tensor(1.0), -torch.ones(12)).accepted


@pytest.mark.parametrize(
    ("chosen", "good", "bad"),
    [
        (constrained.Simplex(), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)),
        (constrained.Ball(2.0), (-2 / math.sqrt(14), -4 / math.sqrt(14), 6 / math.sqrt(14)), (0.0, 0.0, 2.0)),
        (constrained.Box(0.0, 1.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.0)),
    ],
)
def test_sets(chosen: constrained.ConvexSet, good: tuple[float, ...], bad: tuple[float, ...]) -> None:
    slope = vector(1, 2, -3) if not isinstance(chosen, constrained.Simplex) else vector(1, -2, 3)
    problem = BilevelProblem(lambda x, y: (y**2).sum(), lambda x, y: x * (slope @ y), lower_set=chosen)
    assert verify(problem, torch.tensor(1.0), vector(*good)).accepted
    assert not verify(problem, torch.tensor(1.0), vector(*bad)).accepted
    outside = verify(problem, torch.tensor(1.0), 3 * vector(*good))
    assert not outside.accepted and outside.lower_feasibility > 0.1


def check_stationarity(find: Any = verify) -> None:
    """y* = x: F = (x - 3)^2 + x^2 / 2, F' = 3 x - 6 on [0, 1.5] and everywhere."""
    upper, lower = lambda x, y: ((x - 3) ** 2 + y**2 / 2).sum(), lambda x, y: ((y - x) ** 2).sum()
    free = BilevelProblem(upper, lower)
    assert find(free, vector(2), vector(2)).stationarity == pytest.approx(0.0, abs=1e-14)
    assert find(free, vector(1), vector(1)).stationarity == pytest.approx(3.0)
    slight = BilevelProblem(lambda x, y: (x + y).sum() * 1e-9, lower)
    assert find(slight, vector(1e8), vector(1e8)).stationarity == pytest.approx(
        2e-9
    )  # and not rounded off at a large x
    box = BilevelProblem(upper, lower, upper_set=constrained.Box(0.0, 1.5))
    assert find(box, vector(1.5), vector(1.5)).stationarity == pytest.approx(0.0, abs=1e-14)
    assert find(box, vector(1), vector(1)).stationarity == pytest.approx(0.5)  # to the bound and no further
    rows = BilevelProblem(upper, lower, upper_inequality=lambda x, y: x + y - 3)
    assert find(rows, vector(1.5), vector(1.5)).stationarity == pytest.approx(0.0, abs=1e-14)
    assert find(rows, vector(1), vector(1)).stationarity == pytest.approx(3.0)
    wrong = BilevelProblem(upper, lower, upper_inequality=lambda x, y: 3 - x - y)
    assert find(wrong, vector(1.5), vector(1.5)).stationarity == pytest.approx(1.5)  # the multiplier would be negative
    plane = BilevelProblem(
        lambda x, y: ((x - 2) ** 2).sum() / 2, lower, upper_inequality=lambda x, y: x[0] + y[1] - 2
    )  # whose gradient is (1, 1) where y follows x
    assert find(plane, vector(1, 1), vector(1, 1)).stationarity == pytest.approx(0.0, abs=1e-14)
    equal = BilevelProblem(upper, lower, upper_equality=lambda x, y: 3 - x - y)
    assert find(equal, vector(1.5), vector(1.5)).stationarity == pytest.approx(0.0, abs=1e-14)  # and has any sign here


def test_stationarity() -> None:
    check_stationarity()


def check_strong_stationarity(measure: Any = upper_stationarity) -> None:
    """y* = min(x, 1) at x = 1, where F' is x - 2 + r x to the left and r x to the right: r + [-1, 0] together.

    By strong stationarity r = w, 0 <= w <= 1; with the upper row x + y <= 2 in play, w <= 1 - mu and r = w - mu. The
    mirror image has the same at a lower bound.
    """
    kinks: tuple[dict[str, Any], ...] = (
        {"lower_set": constrained.Box(-1.0, 1.0)},
        {"lower_inequality": lambda x, y: 2 * (y.abs() - 1)},
        {"lower_set": constrained.Box(-1.0, 1.0), "upper_inequality": lambda x, y: (x + y).abs() - 2},
    )
    for declared, side in itertools.product(kinks, (1.0, -1.0)):
        for r in (0.5, 2.0, -0.5):
            problem = BilevelProblem(
                lambda x, y, r=r, side=side: ((y - 2 * side) ** 2).sum() / 2 + r * (x**2).sum() / 2,
                lambda x, y: ((y - x) ** 2).sum() / 2,
                **declared,
            )
            at = vector(side)
            flat = FlatProblem(problem, at, at)
            recovered = recover_multipliers(flat, at, at)
            assert recovered is not None and recovered[1].largest < 1e-14
            found = measure(flat, at, at, recovered[0], 1e-6)
            expected = {0.5: 0.0, 2.0: 1.0, -0.5: 0.0 if "upper_inequality" in declared else 0.5}[r]
            assert found.value == pytest.approx(expected, abs=1e-7), (r, declared)
            assert any("strong stationarity" in note for note in found.notes)


def test_strong_stationarity_at_a_kink() -> None:
    check_strong_stationarity()


def test_a_lower_solution_that_is_not_the_best_for_upper_is_feasible_and_not_stationary() -> None:
    problem = BilevelProblem(lambda x, y: ((y - 1) ** 2).sum() + (x**2).sum(), lambda x, y: (y.sum() - x.sum()) ** 2)
    # min over y_0 + y_1 = x of |y - 1|^2 + x^2 is (x - 2)^2 / 2 + x^2: x* = 2/3.
    best = verify(problem, vector(2 / 3), vector(1 / 3, 1 / 3))
    assert best.accepted and best.stationarity == pytest.approx(0.0, abs=1e-12)
    other = verify(problem, vector(2 / 3), vector(2 / 3, 0.0))
    assert other.accepted and (other.stationarity or 0.0) > 0.1
    assert any("not, to first order, the lower solution that is best for upper" in note for note in other.notes)


def test_the_report() -> None:
    best, _, local = minimizers()
    text = str(verify(wells(), vector(1), vector(local)))
    assert (
        text.splitlines()[0] == "not accepted at tolerance 1e-06"
        and repr(verify(wells(), vector(1), vector(local))) == text
    )
    for part in ("optimality gap     0.2", "lower KKT", "because: y is not a minimizer", "stationarity       -"):
        assert part in text, text
    assert str(verify(wells(), vector(1), vector(best))).splitlines()[0] == "accepted at tolerance 1e-06"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"problem": "p"}, TypeError, r"problem must be a bilevel.BilevelProblem, got str"),
        ({"tolerance": 0.0}, ValueError, r"tolerance must be a positive number, got 0.0"),
        ({"tolerance": math.inf}, ValueError, r"tolerance must be a positive number"),
        ({"starts": -1}, ValueError, r"starts must be an integer of at least 0, got -1"),
        ({"starts": True}, ValueError, r"starts must be an integer"),
        ({"generator": 3}, TypeError, r"generator must be a torch.Generator on the CPU"),
        ({"x": 1.0}, TypeError, r"x must be a tensor, got float; use torch.tensor"),
        ({"y": torch.ones(1, dtype=torch.int64)}, TypeError, r"y has dtype torch.int64; variables must be floating"),
        ({"y": torch.ones(1, dtype=torch.float16)}, TypeError, r"y has dtype torch.float16, too coarse .*\.float\(\)"),
        ({"y": ()}, ValueError, r"y has no tensors"),
        ({"y": torch.ones(4, 3)}, ValueError, r"lower\(x, y\) failed.*y: .*\(4, 3\)"),
    ],
)
def test_misuse(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = BilevelProblem(lambda x, y: (x * y).sum(), lambda x, y: ((torch.eye(2).to(y) @ y - x) ** 2).sum())
    given = {"problem": problem, "x": vector(1), "y": vector(1, 1), **arguments}
    with pytest.raises(error, match=message):
        verify(**given)


def test_without_starts_the_search_still_begins_at_y_and_at_samples() -> None:
    best, _, local = minimizers()
    assert verify(wells(), vector(1), vector(best), starts=0).accepted
    assert not verify(wells(), vector(1), vector(local), starts=0).accepted


def test_conditions_of_accepted_hold_for_solutions_of_solve() -> None:
    case = problems.case("quadratic")
    found = bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start)
    checked = verify(case.problem, found.x, found.y)
    assert checked.accepted and checked.stationarity is not None and found.accuracy.stationarity is not None
    assert checked.stationarity == pytest.approx(found.accuracy.stationarity, rel=0.1, abs=1e-8)


def check_search(search: Any = search_lower_level) -> None:
    """From the wrong side of a circle, far from a needle between wide bounds, and where rows have no interior."""

    def find(lower: Any, y: Tensor, x: float, **declared: Any) -> Search:
        flat = FlatProblem(BilevelProblem(lambda x, y: (x * y.sum()).sum(), lower, **declared), vector(x), y)
        return search(flat, vector(x), y, starts=0, generator=torch.Generator().manual_seed(0))

    circle = find(lambda x, y: y[0] ** 3, vector(1, 0), 2.0, lower_equality=lambda x, y: (y**2).sum() - x)
    assert circle.value == pytest.approx(-(2**1.5), abs=1e-9) and circle.violation < 1e-14
    box = constrained.Box(-1000.0, 1000.0)
    needle = find(
        lambda x, y: (y**2 / 1e6 - torch.exp(-(((y - 700) / 20) ** 2)) * x).sum(), vector(0), 1.0, lower_set=box
    )
    assert needle.y is not None and float(needle.y) == pytest.approx(700, abs=1)
    point = find(lambda x, y: ((y - 3) ** 2).sum(), vector(0), 0.0, lower_inequality=lambda x, y: y**2 - x)
    assert point.value == pytest.approx(9.0, abs=1e-8)
    ripples = find(lambda x, y: (torch.sin(40 * y) / 10 + (y - x) ** 2 / 5).sum(), vector(-2.7), 0.7, lower_set=box)
    trap = find(
        lambda x, y: ((y - 1) ** 2).sum(),
        vector(0.5),
        0.1,
        lower_inequality=lambda x, y: torch.where(
            y > 0, x + 0 * y, y + 2
        ),  # nearly holds where y > 0, and does not move
    )
    assert trap.y is not None and float(trap.y) == pytest.approx(-2, abs=1e-6)
    grid = torch.linspace(0.0, 1.5, 300_001)
    assert ripples.value == pytest.approx(float((torch.sin(40 * grid) / 10 + (grid - 0.7) ** 2 / 5).min()), abs=1e-9)


def test_the_search() -> None:
    check_search()


VERIFY, SEARCH, UPPER = "bilevel.verify", "bilevel.lower_search", "bilevel.upper_stationarity"
MUTATIONS = [
    (VERIFY, "gap = value - search.value if", "gap = search.value - value if", check_wells),
    (VERIFY, "not gap <= tolerance * max(1.0, abs(value))", "not gap <= 100 * tolerance", check_wells),
    (VERIFY, "flat.y_tree(search.y) if better", "flat.y_tree(y) if better", check_wells),
    (VERIFY, 'violations["lower"], search, tolerance)', "0.0, search, tolerance)", check_feasibility),
    (VERIFY, 'flat, violations["upper"], tolerance', "flat, 0.0, tolerance", check_feasibility),
    (VERIFY, "proved=(search.own.convex and", "proved=(True and", check_wells),
    (VERIFY, "accepted=not reasons,", "accepted=not better,", check_feasibility),
    (VERIFY, "flat.multipliers(found.inequality, ", "flat.multipliers(2 * found.inequality, ", check_feasibility),
    (VERIFY, "gap is not None and not kkt", "gap is not None and kkt", check_no_constraint_qualification),
    (SEARCH, "best = int(ranked.argmin())", "best = int(ranked.argmax())", check_search),
    (SEARCH, "accurate = broken <= 1.0", "accurate = broken <= 1e300", check_search),
    (SEARCH, "step = -least(rows, target)", "step = least(rows, target)", check_search),
    (SEARCH, "values[..., q:].clamp(min=0)", "values[..., q:].clamp(max=0)", check_search),
    (SEARCH, "torch.where(whole, high, above)", "above", check_search),
    (SEARCH, "torch.cat(lowest)[:POLISHED]", "torch.cat(lowest)[:0]", check_search),
    (SEARCH, "torch.linalg.pinv(rows, rtol=1e-10)", "torch.linalg.pinv(rows, rtol=1e-10) / 100", check_search),
    (UPPER, "slope_x + pulled[0], upper.in_x + pulled[1:]", "slope_x + pulled[0], upper.in_x", check_stationarity),
    (UPPER, "slope_x + pulled[0], upper.in_x + pulled[1:]", "slope_x, upper.in_x + pulled[1:]", check_stationarity),
    (UPPER, "free=upper.equalities)", "free=len(rows))", check_stationarity),
    (UPPER, "flat.x_tree(hypergradient)", "flat.x_tree(-hypergradient)", check_stationarity),
    (
        UPPER,
        "held, low, high = bounds[motion.held], -bounds[at_low]",
        "held, low, high = bounds[motion.held], bounds[at_low]",
        check_strong_stationarity,
    ),
    (UPPER, "G=-wide[1],", "G=wide[1],", check_strong_stationarity),
    (UPPER, "signed = [False, False, True,", "signed = [False, False, False,", check_strong_stationarity),
    (UPPER, "for hard in (True, False)", "for hard in (False,)", check_strong_stationarity),
    (UPPER, "target.T @ offset,", "-target.T @ offset,", check_strong_stationarity),
]


@pytest.mark.parametrize(("module", "old", "new", "check"), MUTATIONS)
def test_a_broken_line_is_noticed(module: str, old: str, new: str, check: Callable[[Any], None]) -> None:
    name = {VERIFY: "verify", SEARCH: "search_lower_level", UPPER: "upper_stationarity"}[module]
    with mutated(module, old, new) as broken, pytest.raises((AssertionError, TypeError)):
        check(getattr(broken, name) if check is not check_stationarity else _verify_with(broken.upper_stationarity))


def _verify_with(measure: Any) -> Any:
    """``verify`` with another measure of stationarity."""

    def find(problem: BilevelProblem, x: Tensor, y: Tensor) -> Any:
        flat = FlatProblem(problem, x, y)
        recovered = recover_multipliers(flat, x, y)
        assert recovered is not None
        found = measure(flat, x, y, recovered[0], 1e-6)
        return replace(verify(problem, x, y), stationarity=found.value)

    return find
