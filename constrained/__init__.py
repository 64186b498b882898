"""Convex sets and, to come, constrained solvers."""

import implicit as _implicit

if getattr(_implicit, "ENGINE_OF", None) != "bilevel":
    raise ImportError(
        f"the package 'implicit' that was found at {getattr(_implicit, '__file__', '?')} is not part of bilevel; an "
        "unrelated distribution has the same name. Cure: pip uninstall implicit, then pip install --force-reinstall "
        "bilevel (or remove a local implicit.py)"
    )

from constrained.sets import Affine as Affine
from constrained.sets import Ball as Ball
from constrained.sets import Box as Box
from constrained.sets import ConvexSet as ConvexSet
from constrained.sets import HalfSpace as HalfSpace
from constrained.sets import Nonnegative as Nonnegative
from constrained.sets import Product as Product
from constrained.sets import SecondOrderCone as SecondOrderCone
from constrained.sets import Simplex as Simplex
from constrained.sets import WholeSpace as WholeSpace

__all__ = [
    "Affine",
    "Ball",
    "Box",
    "ConvexSet",
    "HalfSpace",
    "Nonnegative",
    "Product",
    "SecondOrderCone",
    "Simplex",
    "WholeSpace",
]
