"""Scales of objectives and rows, against dense linear algebra."""

import math

import pytest
import torch
from torch import Tensor

from bilevel import Batches, BilevelProblem
from bilevel.flat import FlatProblem
from bilevel.joint_scaling import joint_curvature, row_weights
from bilevel.measure import draw_oracles
from bilevel.oracle import new_counts


def test_curvature_is_the_largest_eigenvalue_in_both_variables() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator)
    matrix = root + root.T

    def upper(x: Tensor, y: Tensor) -> Tensor:
        z = torch.cat([x, y])
        return 0.5 * z @ matrix @ z

    problem = BilevelProblem(upper, lambda x, y: 3.5 * y.square().sum())
    x, y = torch.zeros(2), torch.zeros(3)
    flat, oracles = FlatProblem(problem, x, y), draw_oracles(problem, new_counts())
    expected = float(torch.linalg.eigvalsh(matrix).abs().max())
    assert joint_curvature(flat, "upper", x, y, oracles) == pytest.approx(expected, rel=1e-6)
    assert joint_curvature(flat, "lower", x, y, oracles) == pytest.approx(7.0, rel=1e-6)


def test_linear_objectives_are_scaled_by_their_slope() -> None:
    problem = BilevelProblem(lambda x, y: 300.0 * x.sum() + 400.0 * y.sum(), lambda x, y: y.square().sum())
    x, y = torch.tensor([3.0]), torch.tensor([4.0])
    flat = FlatProblem(problem, x, y)
    found = joint_curvature(flat, "upper", x, y, draw_oracles(problem, new_counts()))
    assert found == pytest.approx(0.1 * 500.0 / (1.0 + 5.0), rel=1e-3)


def test_minibatches_count_by_their_steepest() -> None:
    rows = torch.cat([torch.ones(9), torch.tensor([100.0])])
    problem = BilevelProblem(
        lambda x, y: x.square().sum() + y.square().sum(),
        lambda x, y, *, batch: 0.5 * (batch.mean() * (y - x).square()).sum(),
        lower_data=Batches(rows, 1),
    )
    zero = torch.zeros(1)
    flat = FlatProblem(problem, zero, zero)
    oracles = draw_oracles(problem, new_counts())
    seen = max(float(oracle.lower_batch.mean()) for oracle in oracles)
    assert joint_curvature(flat, "lower", zero, zero, oracles) == pytest.approx(2.0 * seen, rel=1e-5)


def test_rows_get_unit_length_and_their_jacobian_unit_norm() -> None:
    """Two rows of very different length at a right angle: each unit; three parallel ones share."""
    x, y = torch.zeros(1), torch.zeros(2)
    apart = BilevelProblem(
        lambda x, y: y.sum(),
        lambda x, y: y.square().sum() - x.sum(),
        lower_inequality=lambda x, y: torch.stack([3.0 * x[0] + 4.0 * y[0], 1e-3 * y[1]]),
    )
    torch.testing.assert_close(row_weights(FlatProblem(apart, x, y), x, y), torch.tensor([0.2, 1e3]))
    parallel = BilevelProblem(
        lambda x, y: y.sum(),
        lambda x, y: y.square().sum() - x.sum(),
        lower_inequality=lambda x, y: torch.stack([10.0 * y[0], y[0] - 1.0]),
        lower_equality=lambda x, y: 5.0 * y[0] - 2.0,
    )
    expected = torch.tensor([0.1, 1.0, 0.2]) / math.sqrt(3)
    torch.testing.assert_close(row_weights(FlatProblem(parallel, x, y), x, y), expected)


def test_a_row_without_gradient_at_the_point_is_measured_beside_it() -> None:
    problem = BilevelProblem(
        lambda x, y: y.sum(),
        lambda x, y: y.square().sum() - x.sum(),
        lower_inequality=lambda x, y: 1e4 * (y.square().sum() - 1.0),
    )
    zero = torch.zeros(2)
    weights = row_weights(FlatProblem(problem, zero, zero), zero, zero)
    assert 1e-6 < float(weights) < 1e-3


def test_without_rows_there_are_no_weights() -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum())
    zero = torch.zeros(2)
    assert row_weights(FlatProblem(problem, zero, zero), zero, zero).shape == (0,)
