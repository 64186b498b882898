"""Convex sets with Euclidean projections.

The whole space, boxes, the orthant, balls, half-spaces, affine sets, polyhedra, second-order cones, simplices, and
their products.

A point is a pytree of floating-point tensors. Every projection is exact, keeps structure, dtype and device, and
differentiates wherever it is differentiable. All but those onto polyhedra run without iteration and host
synchronisation.

References:
    N. Parikh, S. Boyd, "Proximal algorithms", Found. Trends Optim. 1(3), 2014, sections 2.1, 6.2 and 6.3.
    A. Beck, "First-Order Methods in Optimization", SIAM, 2017, section 6.4.
    M. Held, P. Wolfe, H. P. Crowder, "Validation of subgradient optimization", Math. Programming 6, 1974 (simplex).
    A. Martins, R. Astudillo, "From softmax to sparsemax", ICML 2016 (algorithm 1, the Jacobian for the simplex).
"""

from constrained.sets.affine import Affine as Affine
from constrained.sets.affine import HalfSpace as HalfSpace
from constrained.sets.ball import Ball as Ball
from constrained.sets.base import ConvexSet as ConvexSet
from constrained.sets.box import Box as Box
from constrained.sets.box import Nonnegative as Nonnegative
from constrained.sets.description import Description as Description
from constrained.sets.description import describe as describe
from constrained.sets.polyhedron import Polyhedron as Polyhedron
from constrained.sets.product import Product as Product
from constrained.sets.second_order_cone import SecondOrderCone as SecondOrderCone
from constrained.sets.simplex import Simplex as Simplex
from constrained.sets.whole_space import WholeSpace as WholeSpace

__all__ = [
    "Affine",
    "Ball",
    "Box",
    "ConvexSet",
    "Description",
    "HalfSpace",
    "Nonnegative",
    "Polyhedron",
    "Product",
    "SecondOrderCone",
    "Simplex",
    "WholeSpace",
    "describe",
]
