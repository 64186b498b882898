"""Scales of objectives and rows, against dense linear algebra."""

import math

import pytest
import torch
from torch import Tensor

import problems
from bilevel import Batches, BilevelProblem
from bilevel.flat import FlatProblem
from bilevel.joint_scaling import MILD, by_variable, joint_curvature, row_weights, variable_lengths
from bilevel.measure import draw_oracles
from bilevel.oracle import new_counts
from tests.lv_hba_checks import in_units


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


def test_a_row_with_an_infinite_gradient_leaves_the_others_their_weights() -> None:
    problem = BilevelProblem(
        lambda x, y: y.sum(),
        lambda x, y: y.square().sum() - x.sum(),
        lower_inequality=lambda x, y: torch.stack([y[0].sqrt() - 1.0, 4.0 * y[1] - 3.0 * x[0]]),
    )
    x, y = torch.ones(1), torch.tensor([0.0, 1.0])
    weights = row_weights(FlatProblem(problem, x, y), x, y)
    torch.testing.assert_close(weights[1], torch.tensor(0.2))
    assert bool(torch.isfinite(weights).all())


def test_without_rows_there_are_no_weights() -> None:
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (y - x).square().sum())
    zero = torch.zeros(2)
    assert row_weights(FlatProblem(problem, zero, zero), zero, zero).shape == (0,)


def machine(wide: float = 1.0) -> tuple[FlatProblem, Tensor, Tensor]:
    """60 rows that share 3 weights, each with a slack of its own whose price is an entry of x."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(60, 3, generator=generator)

    def lower(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return 0.5 * (wide * y["w"]).square().sum() + 0.5 * (torch.exp(x) * y["slack"].square()).sum()

    problem = BilevelProblem(
        lambda x, y: (y["w"] - 1.0).square().sum() + (table @ y["w"]).sigmoid().mean(),
        lower,
        lower_inequality=lambda x, y: 1.0 - y["slack"] - table @ (wide * y["w"]),
    )
    x, slack = torch.full((60,), -3.0), torch.rand(60, generator=generator)
    y = {"slack": slack, "w": torch.full((3,), 0.1 / wide)}
    flat = FlatProblem(problem, x, y)
    return flat, flat.flat_x(x), flat.flat_y(y)


def leaf_norms(flat: FlatProblem, x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    """Root mean squared column norms of (H_F, H_f, J) in these lengths by leaf, from dense second derivatives."""
    point = torch.cat([x, y])
    n = len(x)
    J = torch.func.jacrev(lambda z: flat.lower_level.inequality(z[:n], z[n:]))(point) * lengths
    J = J / torch.linalg.vector_norm(J, dim=1, keepdim=True)
    columns = J.square().sum(dim=0)
    for objective in (flat.upper, flat.lower):
        H = torch.func.hessian(lambda z, f=objective: f(z[:n], z[n:]))(point)
        columns += ((lengths[:, None] * H * lengths) / torch.linalg.vector_norm(H, dim=0).amax()).square().sum(dim=0)
    return torch.stack([part.mean() for part in columns.split([60, 60, 3])]).sqrt()


def test_lengths_bring_columns_together() -> None:
    for wide in (1.0, 10.0, 100.0):
        flat, x, y = machine(wide)
        lengths = variable_lengths(flat, x, y, [flat.oracle])
        assert all(math.log2(length).is_integer() for length in lengths)
        # Prices matter little and get long lengths; shared weights get short ones in large units.
        price, slack, weight = lengths
        assert price > slack > weight
        before = leaf_norms(flat, x, y, torch.ones(123))
        after = leaf_norms(flat, x, y, by_variable(flat, lengths))
        assert float(after.amax() / after.amin()) <= float(before.amax() / before.amin()) ** 0.75


def test_lengths_count_rows_once() -> None:
    """Weights enter 1,024 rows as slacks enter one: norms 32 times as large, of which the root counts, 5.7."""
    signs = torch.sign(torch.randn(1024, 3, generator=torch.Generator().manual_seed(0)))
    problem = BilevelProblem(
        lambda x, y: x.square().sum(),
        lambda x, y: x.square().sum() + 1e-6 * (y["w"].square().sum() + y["slack"].square().sum()),
        lower_inequality=lambda x, y: signs @ y["w"] - y["slack"],
    )
    flat = FlatProblem(problem, torch.ones(2), {"slack": torch.ones(1024), "w": torch.ones(3)})
    _, slack, weight = variable_lengths(flat, torch.ones(2), torch.ones(1027), [flat.oracle])
    assert 4.0 <= slack / weight <= 8.0


@pytest.mark.parametrize(("big", "small"), [(1.0, 100.0), (100.0, 1.0), (64.0, 64.0), (1 / 30, 1 / 30)])
def test_lengths_follow_the_units(big: float, small: float) -> None:
    """In x / big and small y lengths are 1 / big and small beside each other, up to rounding to powers of two."""
    case = problems.case("coupled_polyhedral")
    problem, x, y = in_units(case, big, small), case.start[0] / big, case.start[1] * small
    flat = FlatProblem(problem, x, y)
    of_x, of_y = variable_lengths(flat, x, y, [flat.oracle])
    assert 0.5 <= of_y / of_x / (big * small) <= 2.0


def test_mild_differences_leave_the_variables_alone() -> None:
    problem = BilevelProblem(
        lambda x, y: x.square().sum() + y.square().sum(),
        lambda x, y: 1.5 * (y - x).square().sum(),
        lower_inequality=lambda x, y: y - 1.2 * x,
    )
    x, y = torch.zeros(2), torch.ones(2)
    flat = FlatProblem(problem, x, y)
    assert variable_lengths(flat, x, y, [flat.oracle]) == (1.0,)
    assert torch.equal(by_variable(flat, (1.0,)), torch.ones(4))
    assert MILD == 4.0


def test_curvature_and_weights_are_those_in_the_lengths() -> None:
    flat, x, y = machine(100.0)
    lengths = by_variable(flat, variable_lengths(flat, x, y, [flat.oracle]))
    n, point = len(x), torch.cat([x, y])
    H = torch.autograd.functional.hessian(lambda z: flat.lower(z[:n], z[n:]), point)
    expected = float(torch.linalg.eigvalsh(lengths[:, None] * H * lengths).abs().max())
    assert joint_curvature(flat, "lower", x, y, [flat.oracle], lengths) == pytest.approx(expected, rel=1e-4)
    J = torch.func.jacrev(lambda z: flat.lower_level.inequality(z[:n], z[n:]))(point) * lengths
    J = J / J.norm(dim=1, keepdim=True)
    weights = row_weights(flat, x, y, lengths)
    unit = weights[:, None] * torch.func.jacrev(lambda z: flat.lower_level.inequality(z[:n], z[n:]))(point) * lengths
    torch.testing.assert_close(unit, J / torch.linalg.matrix_norm(J, 2).clamp(min=1.0))


def test_lengths_are_one_for_every_leaf() -> None:
    flat, _, _ = machine()
    found = by_variable(flat, (2.0, 3.0, 5.0))
    assert torch.equal(found, torch.cat([torch.full((60,), 2.0), torch.full((60,), 3.0), torch.full((3,), 5.0)]))
    with pytest.raises(ValueError, match=r"lengths must have one number for each of the 3 leaves of x and y"):
        by_variable(flat, (1.0, 2.0))
