"""A problem on ravelled points: rows, bounds, and which level they belong to."""

import math
from typing import Any

import pytest
import torch

from bilevel import BilevelProblem
from bilevel.flat import FlatProblem
from bilevel.lower_level import solve_lower_level
from constrained import Ball, Box
from implicit import Status, tree
from tests.mutation import mutated

B = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
X0 = {"b": torch.tensor([0.5, -1.0], dtype=torch.float64), "a": torch.tensor(2.0, dtype=torch.float64)}
Y0 = (torch.zeros(3, dtype=torch.float64),)


def declared(**changes: Any) -> BilevelProblem:
    given: dict[str, Any] = {
        "lower_inequality": lambda x, y: {
            "lin": B @ y[0] - x["b"].sum(),
            "curved": (y[0] ** 2).sum() - 1,
            "far": torch.relu(y[0][:1] - 500.0),
        },
        "lower_equality": lambda x, y: y[0].sum() - x["a"],
        "upper_inequality": lambda x, y: x["b"] - 1,
        "lower_set": Box(-1.0, 2.0),
        "upper_set": Ball(4.0),
    }
    return BilevelProblem(
        lambda x, y: (x["b"] ** 2).sum() + x["a"] ** 2 + y[0].sum(),
        lambda x, y: ((y[0] - x["b"].sum()) ** 2).sum(),
        **{**given, **changes},
    )


def test_rows_without_y_go_to_the_upper_level() -> None:
    flat = FlatProblem(declared(), X0, Y0)
    assert flat.notes == ("lower_inequality: row 2 does not depend on y and was moved to the upper level",)
    low, up = flat.lower_level, flat.upper_level
    assert (low.inequalities, low.equalities, up.inequalities, up.equalities) == (4, 1, 1 + 2 + 1, 0)
    x, y = flat.flat_x(X0), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    sums = torch.tensor(-0.5, dtype=torch.float64)
    expected = torch.cat([(B @ y - sums)[:2], (y**2).sum()[None] - 1, y.new_zeros(1)])
    torch.testing.assert_close(low.inequality(x, y), expected)
    torch.testing.assert_close(low.equality(x, y), y.sum()[None] - 2.0)
    ball = (0.25 + 1 + 4 - 16) / 8.0
    torch.testing.assert_close(up.inequality(x, y), torch.tensor([0.5, -0.5, -2.0, ball], dtype=torch.float64))
    assert low.lower.tolist() == [-1.0] * 3 and low.upper.tolist() == [2.0] * 3 and not up.bounded
    assert not low.affine and low.affine_equality and not up.affine  # a sphere below, a ball above


def test_affine_levels_are_recognised() -> None:
    flat = FlatProblem(declared(lower_inequality=lambda x, y: B[:2] @ y[0] - x["a"], upper_set=Box(0.0, 1.0)), X0, Y0)
    assert flat.lower_level.affine and flat.upper_level.affine and not flat.notes
    product = FlatProblem(declared(lower_inequality=lambda x, y: y[0] * x["a"] - 1), X0, Y0)
    assert not product.lower_level.affine, "affine in y alone is not enough"
    bent = FlatProblem(declared(lower_equality=lambda x, y: y[0][:1] ** 2), X0, Y0)
    assert not bent.lower_level.affine_equality


def test_violations_are_those_of_rows_of_length_one() -> None:
    flat = FlatProblem(declared(lower_inequality=lambda x, y: 100.0 * (y[0] - x["a"])), X0, Y0)
    x = flat.flat_x(X0)
    y = torch.tensor([2.0, 2.0, 5.0], dtype=torch.float64)
    found = flat.violations(x, y)
    # 300 over a row of length 141; sum 9 - 2 over sqrt(4); the bound 2 of y.
    assert found["lower"] == pytest.approx(max(300 / (100 * math.sqrt(2)), 7 / 2, 3.0))
    assert found["upper"] == 0.0
    assert flat.violation(x, y) == found["lower"]
    assert math.isnan(flat.violation(x, y * math.nan))


def test_multipliers_return_under_the_names_of_the_declaration() -> None:
    flat = FlatProblem(declared(), X0, Y0)
    rows = torch.arange(1.0, 5.0, dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    found = flat.multipliers(rows, torch.tensor([7.0], dtype=torch.float64), 3 * ones, ones)
    assert found["lower_inequality"]["lin"].tolist() == [1.0, 2.0, 0.0]
    assert float(found["lower_inequality"]["curved"]) == 3.0
    assert found["lower_inequality"]["far"].tolist() == [4.0]
    assert found["lower_equality"].shape == () and float(found["lower_equality"]) == 7.0
    assert found["lower_set"][0].tolist() == [-2.0] * 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"lower_inequality": lambda x, y: x["b"]},
            ValueError,
            "lower_inequality does not depend on y in any of its 2",
        ),
        ({"lower_equality": lambda x, y: y[0].detach().sum() + x["a"]}, ValueError, "lower_equality does not depend"),
        ({"upper_inequality": lambda x, y: torch.zeros(2).double()}, ValueError, "depends neither on x nor on y"),
        ({"lower_inequality": lambda x, y: (y[0] - 1).log()}, ValueError, r"NaN at \(x0, y0\) in rows \[0, 1, 2\]"),
        ({"lower_inequality": lambda x, y: y[0].float()}, ValueError, "returns torch.float32 on cpu, but y is"),
        ({"lower_inequality": lambda x, y: y[0][:0]}, ValueError, "lower_inequality has no rows"),
        ({"lower_inequality": lambda x, y: y[0] <= 1}, TypeError, "not a comparison"),
        ({"lower_equality": lambda x, y: 3.0}, TypeError, "must be a tensor, got float"),
        ({"lower_equality": lambda x, y: B[:, :2] @ y[0]}, ValueError, "lower_equality.* failed with RuntimeError"),
    ],
)
def test_misdeclared_rows_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FlatProblem(declared(**changes), X0, Y0)


def test_one_dtype_for_both_variables_of_a_row() -> None:
    x = tree.map(lambda leaf: leaf.float(), X0)
    with pytest.raises(ValueError, match=r"x0 is torch.float32 and y0 is torch.float64: .*\.double\(\)"):
        FlatProblem(declared(), x, Y0)
    free = BilevelProblem(lambda x, y: x + y, lambda x, y: (y - x) ** 2)
    one = torch.tensor(1.0)
    assert FlatProblem(free, one.float(), one.double()).dtype == torch.float64, "without rows each has its own"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lower_inequality": {"type": "ineq", "fun": abs}}, TypeError, "scipy's dict constraints say fun >= 0"),
        ({"upper_equality": 3}, TypeError, "upper_equality must be a function"),
        ({"lower_inequality": lambda x, y, *, batch: y}, TypeError, "constraints are functions of"),
        ({"formulation": "pessimistic"}, ValueError, "only 'optimistic' problems are solved"),
        ({"joint_set": 1}, TypeError, "joint_set must be a set"),
    ],
)
def test_misdeclared_fields_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        declared(**changes)


def test_a_quadratic_lower_level_is_solved_exactly() -> None:
    problem = BilevelProblem(
        lambda x, y: (x**2).sum() + y.sum(),
        lambda x, y: 0.5 * ((y - 2) ** 2).sum(),
        lower_inequality=lambda x, y: y - x,
        lower_equality=lambda x, y: 0.5 * (y.sum() - 1.0),
    )
    one = torch.ones(2, dtype=torch.float64)
    flat = FlatProblem(problem, one, one)
    found = solve_lower_level(flat, torch.tensor([0.2, 3.0], dtype=torch.float64), 0 * one)
    # y = (.2, .8): y_1 - 2 + l / 2 = 0 gives l = 2.4, and y_0 - 2 + l / 2 + v = 0 gives v = .6.
    torch.testing.assert_close(found.y, torch.tensor([0.2, 0.8], dtype=torch.float64))
    torch.testing.assert_close(found.multipliers.equality, torch.tensor([2.4], dtype=torch.float64))
    torch.testing.assert_close(found.multipliers.inequality, torch.tensor([0.6, 0.0], dtype=torch.float64))
    assert found.status is Status.CONVERGED and found.residual.largest <= 1e-12
    assert found.value == pytest.approx(0.5 * (1.8**2 + 1.2**2))


def lower(fn: Any, rows: Any) -> FlatProblem:
    one = torch.ones(2, dtype=torch.float64)
    return FlatProblem(BilevelProblem(lambda x, y: (x + y).sum(), fn, lower_inequality=rows), one, one)


def test_a_curved_lower_level_is_solved() -> None:
    flat = lower(lambda x, y: ((y - 2) ** 4).sum(), lambda x, y: y**2 - x)
    x = torch.tensor([0.25, 1.0], dtype=torch.float64)
    found = solve_lower_level(flat, x, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found.y, x.sqrt(), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.multipliers.inequality, 2 * (2 - x.sqrt()) ** 3 / x.sqrt(), rtol=1e-6, atol=0)
    assert found.status is Status.CONVERGED


def test_an_infeasible_lower_level_is_a_status() -> None:
    flat = lower(lambda x, y: (y**2).sum(), lambda x, y: y**2 + x)
    found = solve_lower_level(flat, torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    assert found.status is Status.INFEASIBLE
    assert found.residual.feasibility == pytest.approx(1.0, abs=1e-4)


def test_a_concave_quadratic_is_no_quadratic_program() -> None:
    flat = lower(lambda x, y: -(y**2).sum() + 0.1 * y.sum(), lambda x, y: torch.cat([y - 1, -1 - y]))
    found = solve_lower_level(flat, torch.ones(2, dtype=torch.float64), torch.full((2,), -0.5, dtype=torch.float64))
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(found.y.abs(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-7)


def test_a_mutated_module_is_another_one() -> None:
    def solved(module: Any) -> float:
        flat = lower(lambda x, y: ((y - 2) ** 2).sum(), lambda x, y: y - x)
        x = torch.tensor([0.25, 1.0], dtype=torch.float64)
        return float((module.solve_lower_level(flat, x, 0 * x).y - x).abs().max())

    import bilevel.lower_level as real

    with mutated("bilevel.lower_level", 'h=sides.get("inequality")', 'h=-sides["inequality"]') as broken:
        assert broken.solve_lower_level is not real.solve_lower_level
        assert solved(broken) > 0.1
    assert solved(real) <= 1e-12
    with pytest.raises(ValueError, match="0 times"), mutated("bilevel.lower_level", "no such line", ""):
        pass
