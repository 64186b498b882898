"""Every method for constrained problems against every small case that it fits, from the published start, untuned."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.func import grad, vjp

import constrained
import problems
from implicit import ConvergenceWarning, Status, tree

NAMES = sorted(problems.entries("constrained"))
SMALL = [name for name in NAMES if not problems.entry(name).tags & {"external-data", "large"}]
UNSOLVED = {("AugmentedLagrangian", "bt8"): {"STALLED"}}
"""Pairs that end otherwise, with the statuses that tell the truth there. The constraints of bt8 have parallel gradients
at its solution: not all multipliers that satisfy the first-order conditions show that it is a minimum."""
LOOSE = {"hs13": 1e-2}
"""Tolerances on f, where they are wider: at the solution of hs13 there are no multipliers, so that small residuals are
reached far from it."""

SOLVED: dict[tuple[str, str], tuple[problems.ConstrainedCase, constrained.Solution]] = {}


def pairs() -> list[tuple[str, str]]:
    built = {name: problems.case(name).problem for name in SMALL}
    found = [(m, n) for m, cls in constrained.methods().items() for n in SMALL if cls().refuses(built[n]) is None]
    assert len(found) > 2 * len(SMALL)
    return found


def solve(method: str, name: str) -> tuple[problems.ConstrainedCase, constrained.Solution]:
    """One run per pair serves all tests of this module."""
    if (method, name) not in SOLVED:
        case = problems.case(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            chosen = constrained.methods()[method]()
            SOLVED[method, name] = case, constrained.solve(case.problem, chosen, case.start, raise_on_failure=False)
    return SOLVED[method, name]


def residuals(case: problems.ConstrainedCase, found: constrained.Solution) -> tuple[float, float, float, float]:
    """Stationarity, violation, complementarity and the smallest multiplier of a sign constraint, all from scratch."""
    problem, x, duals = case.problem, found.x, found.multipliers
    slope = tree.ravel(grad(problem.objective)(x))
    parts, sides, products = [slope.new_zeros(1)], [slope.new_zeros(1)], [slope.new_zeros(1)]
    total, sizes = slope, [slope.abs().max(), slope.new_ones(())]

    def add(multiplier: Tensor, pulled: Tensor) -> None:
        nonlocal total
        total = total + pulled
        sizes.append(multiplier.abs().max())

    if problem.equality is not None:
        value, pull = vjp(problem.equality, x)
        add(tree.ravel(duals.equality), tree.ravel(pull(duals.equality)[0]))
        parts.append(tree.ravel(value).abs())
    if problem.inequality is not None:
        value, pull = vjp(problem.inequality, x)
        flat = tree.ravel(duals.inequality)
        add(flat, tree.ravel(pull(duals.inequality)[0]))
        parts.append(tree.ravel(value).clamp(min=0))
        sides.append(flat)
        products.append((flat * tree.ravel(value)).abs())
    for bound, sign, dual in ((problem.lower, -1, duals.lower), (problem.upper, 1, duals.upper)):
        if bound is not None:
            flat, gap = tree.ravel(dual), sign * (tree.ravel(x) - torch.as_tensor(bound).expand(tree.ravel(x).shape))
            add(flat, sign * flat)
            parts.append(gap.clamp(min=0))
            sides.append(flat)
            products.append(torch.where(torch.isinf(gap), flat, gap * flat).abs())
    scale = float(torch.stack(sizes).max())
    return (
        float(total.abs().max()) / scale,
        float(torch.cat(parts).max()),
        float(torch.cat(products).max()) / scale,
        float(torch.cat(sides).min()) / scale,
    )


def test_misfits_are_refused_by_name() -> None:
    case = problems.case("hs71")
    with pytest.raises(ValueError, match=r"AdaSketchNewton .*(inequality|bounds|lower).*InteriorPoint"):
        constrained.solve(case.problem, constrained.AdaSketchNewton(), case.start)


@pytest.mark.parametrize(("method", "name"), pairs())
def test_ends_at_a_known_minimum_or_tells_the_truth(method: str, name: str) -> None:
    case, found = solve(method, name)
    if (method, name) in UNSOLVED:
        assert found.status.name in UNSOLVED[method, name]
        return
    assert found.status is Status.CONVERGED, f"{found.message} {found.residual}"
    stationarity, violation, complementarity, smallest = residuals(case, found)
    assert stationarity <= 1.01e-8
    assert violation <= 1e-8
    assert complementarity <= 1.01e-8
    assert smallest >= -1e-8
    case.check(found, any_minimum=True, rtol=LOOSE.get(name, 1e-6))


@pytest.mark.parametrize("method", list(constrained.methods()))
def test_most_cases_end_at_the_published_minimum(method: str) -> None:
    """A method that often finds another one would be of little use."""
    ended = [solve(method, name) for m, name in pairs() if m == method and (m, name) not in UNSOLVED]
    published = [case.is_known_minimum(found.x) and abs(case.gap(found.x)) <= 1e-6 for case, found in ended]
    assert sum(published) >= 0.9 * len(published)


@pytest.mark.parametrize("method", list(constrained.methods()))
@pytest.mark.parametrize("name", ["hs7", "hs26", "bt11", "hs71", "hs113"])
def test_a_run_resumes_bitwise(method: str, name: str) -> None:
    case = problems.case(name)
    chosen = constrained.methods()[method]()
    if chosen.refuses(case.problem) is not None:
        with pytest.raises(ValueError, match=method):
            constrained.solve(case.problem, chosen, case.start)
        return
    _, whole = solve(method, name)
    half = constrained.solve(case.problem, chosen, case.start, max_steps=max(1, whole.steps // 2))
    rest = constrained.solve(case.problem, checkpoint=half.checkpoint)
    assert rest.steps == whole.steps
    assert torch.equal(tree.ravel(rest.x), tree.ravel(whole.x))
    for mine, theirs in zip(rest.multipliers, whole.multipliers, strict=True):
        assert torch.equal(tree.ravel(mine), tree.ravel(theirs)) if tree.leaves(mine) else not tree.leaves(theirs)
