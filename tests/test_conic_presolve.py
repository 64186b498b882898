"""Taking columns out of conic programs: small programs written down by hand, with the answer known."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from bilevel.conic_lower import ConicLower
from implicit.cvx.cones import Cone, Nonnegative, SecondOrder, Zero
from implicit.cvx.pattern import AffineMap, Pattern
from implicit.cvx.program import Program

LIKE = torch.zeros(0, dtype=torch.float64)


def affine(values: np.ndarray, moves: Sequence[int] = ()) -> AffineMap:
    """The values, and theta added to some entries."""
    count = len(moves)
    ones = torch.ones(count, dtype=torch.float64)
    return AffineMap(
        torch.as_tensor(values), torch.tensor(list(moves), dtype=torch.long), torch.zeros(count).long(), ones
    )


def lower(
    A: list[list[float]],
    b: list[float],
    families: list[Cone],
    *,
    user: int,
    q: list[float] | None = None,
    moves: Sequence[tuple[int, int]] = (),
    moves_b: Sequence[int] = (),
    moves_q: Sequence[int] = (),
    squares: Sequence[int] = (),
) -> ConicLower:
    """Columns from ``user`` on are added ones; theta, one number, is added to the entries ``moves`` of A, b and q.

    The squares of some columns are halved and added to the objective.
    """
    dense = np.array(A, dtype=float)
    columns, rows = np.nonzero(dense.T)
    n = dense.shape[1]
    entries = [k for k, place in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)) if place in moves]
    diagonal = torch.tensor(list(squares), dtype=torch.long)
    program = Program(
        (
            affine(np.ones(len(squares))),
            affine(np.array(q or [0.0] * n), moves_q),
            affine(dense[rows, columns], entries),
            affine(np.array(b, dtype=float), moves_b),
        ),
        Pattern(diagonal, diagonal, (n, n)),
        Pattern(torch.as_tensor(rows), torch.as_tensor(columns), dense.shape),
        families,
        1,
        [],
        list(range(user)),
    )
    return ConicLower(program, affine(np.zeros(1)), np.arange(user), LIKE)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_tie_is_one_column() -> None:
    families, rows, q = [Zero(0, 1, 1), Nonnegative(1, 1, 1)], [[1, -1, 0], [0, 1, 1]], [0.0, 0.0, 1.0]
    found = lower(rows, [0, 3], families, user=1, q=q)
    assert (found.added, found.equalities) == (1, 0)
    assert found.columns(vector(0), vector(5, 7)).tolist() == [5, 5, 7]
    unequal = lower([[2, -1, 0], *rows[1:]], [0, 3], families, user=1, q=q)
    assert unequal.columns(vector(0), vector(5, 7)).tolist() == [5, 10, 7]
    # A difference that is not zero, or a parameter, is no tie, but an equality all the same.
    for b, moves in (([1, 3], []), ([0, 3], [0])):
        found = lower(rows, b, families, user=1, q=q, moves_b=moves)
        expected = 5 - (b[0] + (2.0 if moves else 0.0))
        assert found.columns(vector(2), vector(5, 7)).tolist() == [5, expected, 7]


def test_a_chain_is_followed_from_its_end() -> None:
    """2 t1 = t2 + x0 and t2 = 2 t3 + x1 and t3 = 3 x0: each occurs in the next row."""
    rows = [[-1, 0, 2, -1, 0], [0, -1, 0, 1, -2], [-3, 0, 0, 0, 1]]
    found = lower(rows, [0, 0, 0.5], [Zero(0, 3, 1)], user=2)
    assert (found.added, found.equalities) == (0, 0)
    z = found.columns(vector(0), vector(1, 10))
    torch.testing.assert_close(z, vector(1, 10, 9, 17, 3.5))


def test_an_equality_is_used_once() -> None:
    """t = 2 x0 + 1 and t = x1 + 3 determine t, and leave 2 x0 + 1 = x1 + 3."""
    found = lower([[-2, 0, 1], [0, -1, 1], [0, 0, 1]], [1, 3, 9], [Zero(0, 2, 1), Nonnegative(2, 1, 1)], user=2)
    assert (found.added, found.equalities) == (1, 2)  # t occurs in two rows and stays
    torch.testing.assert_close(found.equality(vector(0), vector(2, 4, 5)), vector(0, -2))


@pytest.mark.parametrize("theta", [0.0, 2.0])
def test_a_coefficient_with_a_parameter_determines_nothing(theta: float) -> None:
    """(1 + theta) t = x, which at theta = -1 does not determine t."""
    found = lower([[-1, 1]], [0], [Zero(0, 1, 1)], user=1, moves=[(0, 1)])
    assert (found.added, found.equalities) == (1, 1)
    torch.testing.assert_close(found.equality(vector(theta), vector(3, 5)), vector(5 * (1 + theta) - 3))


def test_bounds() -> None:
    families = [Nonnegative(0, 5, 1)]
    rows = [[2, 0], [-1, 0], [-4, 0], [0, 3], [1, 1]]
    found = lower(rows, [6, 1, 8, 9, 4], families, user=2, moves_b=[3])
    assert (found.lower.tolist(), found.upper.tolist()) == ([-1, -np.inf], [3, np.inf])
    torch.testing.assert_close(found.inequality(vector(1), vector(2, 5)), vector(15 - 10, 7 - 4))
    moving = lower(rows, [6, 1, 8, 9, 4], families, user=2, moves=[(0, 0)])
    assert moving.upper.tolist() == [np.inf, 3]
    assert moving.inequalities == 2


def test_a_bound_of_a_determined_column_stays_a_row() -> None:
    """t = x0 + x1 <= 3."""
    found = lower([[-1, -1, 1], [0, 0, 1]], [0, 3], [Zero(0, 1, 1), Nonnegative(1, 1, 1)], user=2)
    assert (found.added, found.inequalities) == (0, 1)
    torch.testing.assert_close(found.inequality(vector(0), vector(2, 4)), vector(3))


def test_a_radius_grows_to_its_limit() -> None:
    """|x| <= t <= 2 + theta is |x| <= 2 + theta, whose radius is a matter of the upper level."""
    rows = [[0, 1], [0, -1], [-1, 0]]
    families = [Nonnegative(0, 1, 1), SecondOrder(1, 1, 2)]
    found = lower(rows, [2, 0, 0], families, user=1, moves_b=[0])
    assert (found.added, found.inequalities, found.parameter_inequalities) == (0, 1, 1)
    torch.testing.assert_close(found.inequality(vector(1), vector(5)), vector(25 - 9))
    torch.testing.assert_close(found.parameter_inequality(vector(1), vector(5)), vector(-3))
    constant = lower(rows, [2, 0, 0], families, user=1)
    assert (constant.inequalities, constant.parameter_inequalities) == (1, 0)


def test_cones_of_parameters_and_of_constants() -> None:
    """|1 + theta| <= 3, |x| <= 2 + theta and |1| <= 3: one for each level, and nothing."""
    rows, families = [[0], [0], [0], [-1], [0], [0]], [SecondOrder(0, 3, 2)]
    found = lower(rows, [3, 1, 2, 0, 3, 1], families, user=1, moves_b=[1, 2])
    assert (found.inequalities, found.parameter_inequalities) == (1, 2)
    torch.testing.assert_close(found.inequality(vector(1), vector(5)), vector(25 - 9))
    torch.testing.assert_close(found.parameter_inequality(vector(1), vector(5)), vector(-3, 4 - 9))


@pytest.mark.parametrize(
    ("rows", "b", "families", "q"),
    [
        ([[0, 1], [0, -1], [-1, 0]], [2, 0, 0], [Nonnegative(0, 1, 1), SecondOrder(1, 1, 2)], [0.0, 1.0]),  # a cost
        ([[0, 1], [0, 1], [-1, 0]], [2, 0, 0], [Nonnegative(0, 1, 1), SecondOrder(1, 1, 2)], None),  # -t is the radius
        ([[0, 1], [0, 0], [-1, -1]], [2, 3, 0], [Nonnegative(0, 1, 1), SecondOrder(1, 1, 2)], None),  # |x + t| <= 3
        ([[-1, 1], [-2, 1], [0, -1]], [0, 0, 0], [Nonnegative(0, 3, 1)], None),  # t <= x and t <= 2 x
    ],
)
def test_a_column_that_something_keeps_from_growing_stays(
    rows: list[list[float]], b: list[float], families: list[Cone], q: list[float] | None
) -> None:
    assert lower(rows, b, families, user=1, q=q).added == 1


@pytest.mark.parametrize("more", [{"moves_q": [1]}, {"squares": [1]}, {"moves": [(2, 1)]}, {"moves": [(0, 1)]}])
def test_a_column_with_a_cost_or_parameters_does_not_grow(more: dict[str, Any]) -> None:
    """|x| <= t and t <= 2, where t has a linear cost, a square or a coefficient with theta."""
    rows, families = [[0, 1], [0, -1], [-1, 0.5]], [Nonnegative(0, 1, 1), SecondOrder(1, 1, 2)]
    assert lower(rows, [2, 0, 0], families, user=1).added == 0
    assert lower(rows, [2, 0, 0], families, user=1, **more).added == 1


def test_columns_that_grow_do_not_use_each_other() -> None:
    """s <= t and t <= x, where -s <= 1: one of them grows, and the other is left as it is."""
    rows = [[0, 1, -1], [-1, 0, 1], [0, -1, 0]]
    found = lower(rows, [0, 0, 1], [Nonnegative(0, 3, 1)], user=1)
    assert found.added == 1
    z = found.columns(vector(0), vector(5, 3))
    torch.testing.assert_close(z, vector(5, 3, 3))
    torch.testing.assert_close(found.inequality(vector(0), vector(5, 3)), vector(-2, -4))
