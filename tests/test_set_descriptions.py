"""Sets as constraints: the description holds exactly where the projection leaves a point alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

import constrained
from constrained import (
    Affine,
    Ball,
    Box,
    HalfSpace,
    Nonnegative,
    Polyhedron,
    Product,
    SecondOrderCone,
    Simplex,
    WholeSpace,
)
from constrained.sets import Description, describe
from implicit import tree

VECTOR = torch.zeros(4, dtype=torch.float64)
PAIR = (torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
NESTED = {"b": torch.zeros(2, 3, dtype=torch.float64), "a": PAIR}


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SETS: dict[str, tuple[Any, Any]] = {
    "whole space": (WholeSpace(), NESTED),
    "box": (Box(-1.0, t(0.5, float("inf"), 0.0, 2.0)), VECTOR),
    "box of a tree": (Box({"b": 0.0, "a": (None, -1.0)}, {"b": None, "a": (1.0, 1.0)}), NESTED),
    "orthant": (Nonnegative(), NESTED),
    "half-space": (HalfSpace(t(1.0, -2.0, 0.0, 1.0), 0.3), VECTOR),
    "half-space of a tree": (HalfSpace({"b": 1.0, "a": (t(1.0, 2.0, 3.0), None)}, -1.0), NESTED),
    "affine": (Affine(torch.stack([t(1, 2, 3, 4), t(0, 1, 0, -1)]), t(1.0, -1.0)), VECTOR),
    "ball": (Ball(1.5, t(1.0, 0.0, 0.0, -1.0)), VECTOR),
    "cone": (SecondOrderCone(), PAIR),
    "simplex": (Simplex(2.0), VECTOR),
    "simplices along a dimension": (Product({"b": Simplex(1.0, dim=0), "a": WholeSpace()}), NESTED),
    "polyhedron": (
        Polyhedron(
            A=torch.ones(1, 4, dtype=torch.float64),
            b=t(1.0),
            G=torch.stack([t(1, -1, 0, 0), t(0, 0, 1, 1)]),
            h=t(0.5, float("inf")),
            lower=-2.0,
        ),
        VECTOR,
    ),
    "product": (Product({"a": SecondOrderCone(), "b": Ball(1.0)}), NESTED),
}


def violation(found: Description, z: Tensor) -> Tensor:
    parts = [found.lower - z, z - found.upper, found.inequality(z), found.equality(z).abs()]
    return torch.cat(parts).clamp(min=0).amax()


@pytest.mark.parametrize("name", SETS)
def test_a_description_says_what_the_projection_says(name: str) -> None:
    chosen, like = SETS[name]
    found = describe(chosen, like)
    generator = torch.Generator().manual_seed(0)
    outside = 0
    for _ in range(20):
        point = tree.map(lambda leaf: 2 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype), like)
        landed = chosen.project(point)
        assert violation(found, tree.ravel(landed)) <= 1e-12
        moved = float(tree.norm(tree.sub(point, landed)))
        assert (moved > 1e-9) == (float(violation(found, tree.ravel(point))) > 1e-9)
        outside += moved > 1e-9
    assert (outside > 0) == (name != "whole space")


@pytest.mark.parametrize("name", ["ball", "cone", "product"])
def test_curved_rows_are_convex_and_have_slopes(name: str) -> None:
    chosen, like = SETS[name]
    found = describe(chosen, like)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        a, b = (torch.randn(tree.size(like), generator=generator, dtype=torch.float64) for _ in range(2))
        middle = found.inequality(0.5 * (a + b))
        assert bool((middle <= 0.5 * (found.inequality(a) + found.inequality(b)) + 1e-12).all())
    slope = torch.autograd.functional.jacobian(found.inequality, torch.zeros(tree.size(like), dtype=torch.float64))
    assert bool(torch.isfinite(slope).all())


def test_balls_have_slope_one_on_their_boundary() -> None:
    found = describe(Ball(2.5), VECTOR)
    (slope,) = torch.autograd.functional.jacobian(found.inequality, t(0.0, 2.5, 0.0, 0.0))
    torch.testing.assert_close(slope, t(0.0, 1.0, 0.0, 0.0))


def test_rows_without_a_side_are_left_out() -> None:
    found = describe(Polyhedron(G=torch.eye(4, dtype=torch.float64), h=t(1.0, float("inf"), 2.0, 3.0)), VECTOR)
    assert found.h.tolist() == [1.0, 2.0, 3.0]
    assert found.G.shape == (3, 4)


def test_a_set_known_by_its_projection_only_is_refused() -> None:
    class Circle(constrained.ConvexSet):
        def project(self, point: Any) -> Any:
            return point

    with pytest.raises(TypeError, match="Circle is known by its projection only"):
        describe(Circle(), VECTOR)
