"""The penalty method on closed forms: which point it reaches, and what it then claims."""

from typing import Any

import pytest
import torch

import bilevel
import problems
from bilevel import F2SA, Penalty, Proximal, SingleLoop
from constrained import Box
from implicit import tree
from tests import penalty_checks as checks


def quadratic(**settings: Any) -> tuple[problems.Case, bilevel.Solution]:
    steps = settings.pop("max_steps", None)
    case = problems.case("quadratic")
    return case, bilevel.solve(case.problem, Penalty(**settings), *case.start, max_steps=steps)


def test_f2ba_as_published_reaches_the_penalised_minimizer() -> None:
    checks.reaches_penalised_minimizer()


@pytest.mark.parametrize("inner", [1, 10])
@pytest.mark.parametrize(("p", "steps"), [(100.0, 400), (1000.0, 1_500)])
def test_one_inner_step_is_as_good_as_ten(p: float, steps: int, inner: int) -> None:
    """The error is the bias, c / p. One inner step moves x no further than ten, since warm starts carry over."""
    case, found = quadratic(
        penalty=p, lower_steps=inner, max_steps=steps if inner == 1 else 120, rtol=1e-7, **checks.PAPER
    )
    assert case.distance(found) == pytest.approx(0.58 / p, rel=0.03)


@pytest.mark.parametrize("name", ["many_solutions_selected", "nonconvex_lower_far"])
def test_many_and_nonconvex_lower_levels(name: str) -> None:
    """y is the lower solution that f prefers, to the accuracy of x."""
    found = checks.reaches(name, rtol=1e-3)
    case = problems.case(name)
    assert float(tree.norm(tree.sub(found.y, case.y_star))) <= 2.0 * case.distance(found) + 1e-6


def test_the_choice_of_f_among_lower_solutions_is_kept() -> None:
    """From lower starts far along the line of solutions the same y is found; the component off the line is exact."""
    case = problems.case("many_solutions_selected")
    ends = []
    for shift in (-3.0, 4.0):
        x0, y0 = case.start
        found = bilevel.solve(case.problem, Penalty(penalty=30.0, rtol=3e-3), x0, y0 + shift)
        assert found.success, found.message
        assert float(case.problem.lower(found.x, found.y)) < 1e-16
        ends.append(found.y)
    assert float((ends[0] - ends[1]).norm()) < 2e-3


def test_local_lower_solutions_are_not_claimed() -> None:
    """g has two wells; y starts in the higher one, whose curvature is positive everywhere the run goes."""
    problem = bilevel.BilevelProblem(
        lambda x, y: (y - 2) ** 2 + (x - 0.5) ** 2,
        lambda x, y: 0.25 * (y**2 - 4) ** 2 + 0.5 * y + 0.01 * (x - y) ** 2,
    )
    found = bilevel.solve(problem, Penalty(rtol=1e-3), torch.tensor(0.0), torch.tensor(2.0))
    assert found.status is bilevel.Status.STALLED
    assert found.message.startswith("not verified: y is not a minimizer of lower at x")
    start = bilevel.solve(problem, Penalty(rtol=1e-3), torch.tensor(0.0), torch.tensor(-2.0))
    assert start.success, start.message


@pytest.mark.parametrize(("target", "weight", "status"), [(10.0, 1e-3, "STALLED"), (0.2, 0.05, "CONVERGED")])
def test_a_small_gradient_far_from_the_solution_is_not_claimed(target: float, weight: float, status: str) -> None:
    """The gradient at 0 is 0.01 both times, a tenth of the tolerance; the solution that it and the curvature predict
    lies at 10, and at 0.2."""
    problem = bilevel.BilevelProblem(lambda x, y: 0.5 * weight * (y - target) ** 2, lambda x, y: 0.5 * (y - x) ** 2)
    zero = torch.tensor(0.0)
    found = bilevel.solve(problem, Penalty(atol=0.1, step_size=0.01), zero, zero)
    assert found.status.name == status
    assert found.accuracy.distance == pytest.approx(2.0 * (target - float(found.x)), rel=1e-2)
    if status == "STALLED":
        assert "away from the solution that its slope and curvature predict; lower rtol" in found.message


def rounded(x: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Mean squared distance of y from eight points that move with x, in a norm without second derivatives."""
    points = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    return (torch.cdist(y[None], points + scale * x, p=3) ** 2).mean()


def unrounded(x: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The same with second derivatives."""
    points = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    return (((y - points - scale * x).abs() ** 3).sum(1) ** (2 / 3)).mean()


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_objectives_without_second_derivatives(level: str) -> None:
    """A kernel of torch without a second derivative, in either level, against the same function written out."""

    def build(distance: Any) -> bilevel.BilevelProblem:
        if level == "upper":
            return bilevel.BilevelProblem(
                lambda x, y: distance(x, y, 0.1) + 0.5 * ((x - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum()
            )
        return bilevel.BilevelProblem(lambda x, y: ((y - 1) ** 2).sum() + 0.5 * (x**2).sum(), distance)

    found = bilevel.solve(build(rounded), Penalty(rtol=1e-3), torch.zeros(9), torch.zeros(9))
    assert found.success, found.message
    assert any("no second derivatives" in note for note in found.accuracy.notes) == (level == "lower")
    value = bilevel.singular_hypergradient(build(unrounded), found.x, found.y).value
    assert float(value.norm()) == pytest.approx(found.accuracy.stationarity, rel=1e-2)
    assert float(value.norm()) <= 1.1 * (found.accuracy.bias or 0.0) + 1e-2


@pytest.mark.parametrize(
    ("lower_set", "distance", "why"),
    [
        (None, rounded, "the lower level has no second derivatives"),
        (Box(-1.0, 1.0), unrounded, "a lower set is declared"),
    ],
)
def test_reports_on_minibatches_say_what_they_leave_out(lower_set: Any, distance: Any, why: str) -> None:
    weights = {"w": torch.linspace(0.5, 1.5, 6)}
    problem = bilevel.BilevelProblem(
        lambda x, y: ((y - 1) ** 2).sum() + 0.5 * (x**2).sum(),
        lambda x, y, *, batch: batch["w"].mean() * distance(x, y),
        lower_data=bilevel.Batches(weights, 2),
        **({} if lower_set is None else {"lower_set": lower_set}),
    )
    found = bilevel.solve(problem, Penalty(), torch.zeros(9), torch.zeros(9), max_steps=5)
    assert found.accuracy.notes == (f"no hypergradient was measured on all data: {why}",)
    assert found.accuracy.lower_residual is not None


def test_an_affine_lower_objective_over_a_set() -> None:
    """Nothing bends, so that no curvature can be measured: y* = -sign(2 - x) on [-1, 1]."""
    problem = bilevel.BilevelProblem(
        lambda x, y: (x - 1) ** 2 + x * y, lambda x, y: (2 - x) * y, lower_set=Box(-1.0, 1.0), upper_set=Box(0.0, 1.8)
    )
    found = bilevel.solve(problem, Penalty(), torch.tensor(0.3), torch.tensor(0.2))
    assert found.success, found.message
    assert float(found.x) == pytest.approx(1.5, abs=1e-4)
    assert float(found.y) == -1.0
    free = bilevel.BilevelProblem(lambda x, y: (x - 1) ** 2 + x * y, lambda x, y: (2 - x) * y)
    with pytest.raises(ValueError, match="no curvature in y at the start; give lower_curvature"):
        bilevel.solve(free, Penalty(), torch.tensor(0.3), torch.tensor(0.2))


@pytest.mark.parametrize(
    ("scheme", "settings", "bound"),
    [
        (Proximal(), {"rtol": 1e-3}, 1e-2),
        (SingleLoop(), {"rtol": 1e-4}, 1e-2),
        (F2SA(), {"max_steps": 400}, 0.2),
    ],
)
def test_other_schemes_on_the_quadratic(scheme: Any, settings: dict[str, Any], bound: float) -> None:
    case, found = quadratic(scheme=scheme, **settings)
    assert case.error(found) < bound
    assert found.accuracy.stationarity is not None
    if found.success:
        assert case.distance(found) <= (found.accuracy.distance or 0.0)


def test_proximal_centres_slow_the_flat_directions_down() -> None:
    """many_solutions_selected is strongly convex across the line by f alone, sigma times weaker than g."""
    case = problems.case("many_solutions_selected")
    errors = {}
    for rho in (1.0, 100.0):
        method = Penalty(
            scheme=Proximal(rho=rho), penalty=100.0, step_size=0.2, lower_steps=30, rtol=0.0, lower_chunks=1
        )
        errors[rho] = case.distance(bilevel.solve(case.problem, method, *case.start, max_steps=60))
    assert errors[100.0] < 0.02
    assert errors[1.0] > 5.0 * errors[100.0]
