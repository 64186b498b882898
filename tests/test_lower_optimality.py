"""Other minima of the lower level than the one beside y: looked for where it bends down, and only there."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import ImplicitGradient, Penalty, Status
from bilevel.algorithms import lower_optimality
from bilevel.algorithms.lower_optimality import bends_down, better_response
from constrained import Nonnegative

X = torch.tensor(1.0)


def problem(lower: Any, **sets: Any) -> bilevel.BilevelProblem:
    return bilevel.BilevelProblem(lambda x, y: ((y - x) ** 2).sum(), lower, **sets)


def wells(x: Tensor, y: Tensor) -> Tensor:
    """Minima beside -1, the lower one, and beside 1 in each entry; convex beyond 1 / sqrt(3) on either side."""
    return ((y**2 - 1) ** 2 + 0.1 * y).sum() + 0.0 * x


def root(x: Tensor, y: Tensor) -> Tensor:
    return (y.sqrt() - x * y).sum()


def bottom(side: float) -> Tensor:
    """A minimizer of ``wells`` in each of three entries, by Newton's iteration."""
    y = side
    for _ in range(20):
        y -= (4 * y * (y**2 - 1) + 0.1) / (12 * y**2 - 4)
    return torch.full((3,), y)


CURVED = {
    "double well": wells,
    "distant wells": lambda x, y: ((y**2 - 9) ** 2).sum() / 9,
    "ripples": lambda x, y: ((y - x) ** 2 + 3 * torch.sin(y - x) ** 2).sum(),
    "one entry of many, 1e-4 of the steepest": lambda x, y: 1e4 * ((y[1:] - x) ** 2).sum() + (y[0] ** 2 - 1) ** 2,
    "no second derivative": lambda x, y: (
        0.01 * ((y - x) ** 2).sum() - (1 + torch.cdist(y[None], torch.eye(len(y)) + x, p=3) ** 2).sqrt().sum()
    ),
}
CONVEX = {
    "quadratic": lambda x, y: (torch.arange(1.0, len(y) + 1) * (y - x) ** 2).sum(),
    "singular": lambda x, y: (y.sum() - x) ** 2,
    "affine": lambda x, y: 1e4 * y.sum() * x,
    "no second derivative": lambda x, y: (torch.cdist(y[None], torch.eye(len(y)).to(y) + x, p=3) ** 2).sum(),
    "steep": lambda x, y: torch.exp(3 * y).sum() - x * y.sum(),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", list(CURVED))
def test_negative_curvature_around_a_minimum_is_seen(name: str, size: int) -> None:
    assert bends_down(problem(CURVED[name]), X, torch.full((size,), 3.0 if name == "distant wells" else 1.0))


@pytest.mark.parametrize("name", ["double well", "distant wells", "ripples"])
def test_it_is_seen_in_many_entries_too(name: str) -> None:
    assert bends_down(problem(CURVED[name]), X, torch.full((300,), 3.0 if name == "distant wells" else 1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 3, 30])
@pytest.mark.parametrize("name", list(CONVEX))
def test_convex_lower_levels_are_not_verified(name: str, size: int, dtype: torch.dtype) -> None:
    y = torch.full((size,), 1.0, dtype=dtype)
    with mock.patch.object(lower_optimality, "verify", side_effect=AssertionError("verified")):
        assert better_response(problem(CONVEX[name]), X.to(dtype), y) is None


def test_curvature_outside_of_the_lower_set_does_not_count() -> None:
    """y^3 + y^2 is convex where y >= 0, and not defined as a function to minimize elsewhere."""
    bent = problem(lambda x, y: (y**3 + y**2 - x * y).sum(), lower_set=Nonnegative())
    assert not bends_down(bent, X, torch.full((3,), 1.0 / 3.0))
    assert bends_down(problem(bent.lower), X, torch.full((3,), 1.0 / 3.0))


def test_points_where_the_lower_level_is_not_finite_are_passed_over() -> None:
    """The root and its gradient are NaN on a third of them."""
    assert not bends_down(problem(lambda x, y: (y - x * y.sqrt()).sum()), X, torch.ones(1))
    for mirrored in (root, lambda x, y: root(x, 4.0 - y)):  # NaN at the first point that is looked at, or not
        assert bends_down(problem(mirrored), X, torch.ones(1))


def test_the_worse_of_two_minima_is_refused_and_the_better_one_is_not() -> None:
    double = problem(wells)
    reason = better_response(double, X, bottom(1.0))
    assert reason is not None
    assert reason.startswith("y is not a minimizer of lower at x")
    assert better_response(double, X, bottom(-1.0)) is None


@pytest.mark.parametrize("method", [ImplicitGradient(), Penalty(penalty=1e3)], ids=["implicit", "penalty"])
@pytest.mark.parametrize(("start", "status"), [(1.1, Status.STALLED), (-1.1, Status.CONVERGED)])
def test_a_run_that_ends_beside_the_worse_minimum_has_not_converged(
    method: bilevel.Algorithm[Any], start: float, status: Status
) -> None:
    """70 entries: too many to verify without a reason to."""
    many = bilevel.BilevelProblem(lambda x, y: ((y - x) ** 2).sum() / 70 + x**2, wells)
    found = bilevel.solve(many, method, torch.zeros(()), torch.full((70,), start), raise_on_failure=False)
    assert found.status is status, found.message
    if status is Status.STALLED:
        assert found.message.startswith("not verified: y is not a minimizer of lower at x")
