"""Points around a start, and whether derivatives there are the same."""

import math

import pytest
import torch

from bilevel.probes import SAME, beside, displacement, same
from implicit import tree

POINT = {"b": torch.tensor([1e6, -1e6, 0.0]), "a": (torch.tensor(3.0),)}
SIZES = {"b": torch.tensor([1e6 + 1, 1e6 + 1, 1.0]), "a": (torch.tensor(4.0),)}


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def test_a_step_is_as_long_as_the_point_is_large() -> None:
    found, e = displacement(POINT, drawn()), tree.randn_like(POINT, drawn())
    torch.testing.assert_close(found, tree.map(torch.mul, SIZES, e))
    for reach in (0.0, 1.0, -30.0):
        torch.testing.assert_close(beside(POINT, drawn(), reach), tree.axpy(reach, found, POINT))
    torch.testing.assert_close(beside(POINT, drawn()), tree.add(POINT, found))


def test_points_follow_one_another_and_carry_no_graph() -> None:
    generator = drawn()
    point = torch.zeros(3, dtype=torch.float32, requires_grad=True)
    first, second = beside(point, generator), beside(point, generator)
    assert first.dtype == torch.float32 and not first.requires_grad
    assert float((first - second).abs().amin()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_explains_is_the_same(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    size = torch.tensor([1.0, 100.0, 1.0, 0.0, 0.0], dtype=dtype)
    change = SAME * eps * torch.tensor([0.5, 50.0, 2.0, 0.0, 1e-6], dtype=dtype)
    assert same(size + change, size, size).tolist() == [True, True, False, True, False]


def test_what_is_not_finite_is_never_the_same() -> None:
    one, bad = torch.ones(2), torch.tensor([math.nan, math.inf])
    for first, second in ((one, bad), (bad, one), (bad, bad)):
        assert not same(first, second, torch.ones(())).any()
    assert not same(one, one, bad[:1]).any()
