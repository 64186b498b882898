"""KKT residuals at points where they are known, and how each condition, sign and scale shows when it is broken."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from constrained import ConstrainedProblem, EqualityProblem, Lagrangian, Multipliers, kkt_residual
from constrained.multipliers import FlatMultipliers
from constrained.residual import bound_gaps, largest, measure, violation

# min (x0 - 3)^2 + (x1 + 1)^2 + x2^2  s.t.  x0 + x2 = 2,  x0 x0 <= 1,  x1 >= 0,  x2 <= 1/2 (inactive at first sight):
# x = (1, 0, 1) violates x2 <= 1/2, so bound 2 is used and x = (1, 0, 1) is the solution.
PROBLEM = ConstrainedProblem(
    objective=lambda x: (x[0] - 3) ** 2 + (x[1] + 1) ** 2 + x[2] ** 2,
    equality=lambda x: x[0] + x[2] - 2,
    inequality=lambda x: x[:1] ** 2 - 1,
    lower=torch.tensor([-math.inf, 0.0, -5.0], dtype=torch.float64),
    upper=torch.tensor([math.inf, math.inf, 2.0], dtype=torch.float64),
)
POINT = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
# grad f = (-4, 2, 2); l on x0 + x2: 2 + l = 0; -4 + l + 2 v = 0; 2 - z_lower = 0.
MULTIPLIERS = Multipliers(
    torch.tensor(-2.0, dtype=torch.float64),
    torch.tensor([3.0], dtype=torch.float64),
    torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64),
    torch.zeros(3, dtype=torch.float64),
)


def at(x: Tensor = POINT, **changes: Any) -> tuple[float, float, float]:
    residual = kkt_residual(PROBLEM, x, **{**MULTIPLIERS._asdict(), **changes})
    return residual.stationarity, residual.feasibility, residual.complementarity


def test_a_known_point() -> None:
    assert at() == (0.0, 0.0, 0.0)
    assert kkt_residual(PROBLEM, POINT, *MULTIPLIERS).largest == 0.0


def test_every_sign_and_multiplier_matters() -> None:
    """Scale 4 = |grad f|: the residual is the change of grad L over it."""
    assert at(equality=-MULTIPLIERS.equality) == (1.0, 0.0, 0.0)
    assert at(equality=None) == (0.5, 0.0, 0.0)
    assert at(inequality=None) == (1.5, 0.0, 0.0)
    assert at(inequality=-MULTIPLIERS.inequality) == (3.0, 0.0, 0.75)
    assert at(lower=None) == (0.5, 0.0, 0.0)
    assert at(lower=-MULTIPLIERS.lower) == (1.0, 0.0, 0.5)
    # A force from the other side: grad L changes, and so does complementarity, for x1 has no upper bound.
    assert at(lower=None, upper=MULTIPLIERS.lower) == (1.0, 0.0, 0.5)
    # upper - x = 1 at x2: the product is 1 times 0.25, over 4.
    moved = torch.tensor([0.0, 0.0, 0.25])
    assert at(upper=moved) == (0.0625, 0.0, 0.0625)
    # x - lower = 6 at x2.
    assert at(lower=MULTIPLIERS.lower + moved) == (0.0625, 0.0, 0.375)


def test_every_violation_counts_as_declared() -> None:
    def violated(*x: float) -> float:
        return at(torch.tensor(x))[1]

    assert violated(1.0, 0.0, 1.5) == 0.5  # h
    assert violated(1.0, 0.0, 0.5) == 0.5  # h from below
    assert violated(2.0, 0.0, 0.0) == 3.0  # c
    assert violated(0.5, 0.0, 1.5) == 0.0  # c inside is no violation
    assert violated(1.0, -0.25, 1.0) == 0.25  # lower
    assert violated(-1.0, 0.0, 3.0) == 1.0  # upper
    assert violated(8.0, 0.0, -6.0) == 63.0


def test_complementarity_of_an_inactive_constraint() -> None:
    """c = -3/4 at x0 = 1/2 with multiplier 3; grad f = (-5, 2, 3) there."""
    stationarity, feasibility, complementarity = at(torch.tensor([0.5, 0.0, 1.5]))
    assert feasibility == 0.0
    assert complementarity == pytest.approx(0.75 * 3 / 5)
    assert stationarity == pytest.approx(4 / 5)  # (-5 - 2 + 3, 0, 3 - 2)


def test_the_scale_is_the_largest_of_one_the_gradient_and_the_multipliers() -> None:
    def line(slope: float, x: Tensor, multiplier: float, row: float = 2.0) -> float:
        problem = EqualityProblem(lambda x: slope * x.sum(), lambda x: row * x.sum())
        return kkt_residual(problem, x, torch.tensor(multiplier)).stationarity

    x = torch.zeros(2)
    assert line(0.01, x, 0.0) == 0.01
    assert line(50.0, x, 0.0) == 1.0
    assert line(0.01, x, 1e3) == pytest.approx((0.01 + 2e3) / 1e3)
    assert line(0.01, x, 1e3, row=1e-3) == pytest.approx(1.01)  # a multiplier counts as much as its row is long
    assert line(0.5, x, 1e9, row=0.0) == 0.5


def test_a_huge_multiplier_does_not_excuse_other_products() -> None:
    problem = ConstrainedProblem(
        objective=lambda x: 0.5 * (x - 1).square().sum(), inequality=lambda x: torch.cat([0 * x, x - 5])
    )
    found = kkt_residual(problem, torch.full((1,), 0.5), inequality=torch.tensor([1e8, 0.5]))
    assert found.complementarity == pytest.approx(2.25)
    assert found.stationarity == pytest.approx(0.0)
    far = kkt_residual(problem, torch.full((1,), 1.0), inequality=torch.tensor([0.0, 1e8]))
    assert far.complementarity == pytest.approx(4.0)
    steep = ConstrainedProblem(objective=problem.objective, inequality=lambda x: torch.cat([x - 1, x - 5]))
    found = kkt_residual(steep, torch.ones(1), inequality=torch.tensor([1e8, 0.5]))
    assert found.complementarity == pytest.approx(2.0)


def test_a_constraint_is_measured_as_declared() -> None:
    """Feasibility is in the user's units, whatever the multipliers."""
    problem = EqualityProblem(lambda x: x.sum(), lambda x: 1e-3 * (x - 1))
    assert kkt_residual(problem, torch.zeros(2), torch.full((2,), -1e3)).feasibility == 1e-3


def test_nan_is_never_small() -> None:
    for problem in (
        EqualityProblem(lambda x: torch.log(x).sum(), lambda x: x.sum()),
        EqualityProblem(lambda x: x.sum(), lambda x: torch.log(x)),
    ):
        residual = kkt_residual(problem, -torch.ones(2))
        assert math.isnan(residual.largest)


def test_misfits_are_named() -> None:
    with pytest.raises(ValueError, match=r"multipliers\.inequality is"):
        at(inequality=torch.zeros(2))
    with pytest.raises(TypeError, match=r"x = 3\.0"):
        kkt_residual(PROBLEM, 3.0)


def test_a_maximum_is_a_kkt_point_too() -> None:
    """First-order conditions only: what tells them apart is the curvature that ``solve`` reports."""
    circle = EqualityProblem(lambda x: x.sum(), lambda x: (x**2).sum() - 2)
    assert kkt_residual(circle, torch.ones(2), torch.tensor(-0.5)).largest == 0.0
    assert kkt_residual(circle, -torch.ones(2), torch.tensor(0.5)).largest == 0.0
    assert kkt_residual(circle, -torch.ones(2), torch.tensor(-0.5)).stationarity == 2.0


def test_the_pieces() -> None:
    assert float(largest(torch.zeros(0))) == 0.0
    assert float(largest(torch.tensor([1.0, -3.0]), torch.tensor([[2.0]]))) == 3.0
    lagrangian = Lagrangian(PROBLEM, POINT)
    below, above = bound_gaps(lagrangian, POINT)
    assert below.tolist() == [-math.inf, 0.0, -6.0]
    assert above.tolist() == [-math.inf, -math.inf, -1.0]
    assert float(violation(lagrangian, lagrangian.at(POINT))) == 0.0
    flat = lagrangian.flat_multipliers(*MULTIPLIERS)
    assert isinstance(flat, FlatMultipliers)
    assert measure(lagrangian, lagrangian.at(POINT), flat).tolist() == [0.0, 0.0, 0.0]
