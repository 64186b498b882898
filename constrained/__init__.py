"""Constrained optimization on PyTorch: problems, methods, quadratic programs and convex sets."""

import implicit as _implicit

if getattr(_implicit, "ENGINE_OF", None) != "bilevel":
    raise ImportError(
        f"the package 'implicit' that was found at {getattr(_implicit, '__file__', '?')} is not part of bilevel; an "
        "unrelated distribution has the same name. Cure: pip uninstall implicit, then pip install --force-reinstall "
        "bilevel (or remove a local implicit.py)"
    )

from constrained.augmented_lagrangian import AugmentedLagrangian as AugmentedLagrangian
from constrained.batch.newton import BatchedNewton as BatchedNewton
from constrained.batch.solution import BatchSolution as BatchSolution
from constrained.batched import solve_batch as solve_batch
from constrained.differentiable import OptimalPoint as OptimalPoint
from constrained.differentiable import differentiable as differentiable
from constrained.interior_point import InteriorPoint as InteriorPoint
from constrained.kkt_preconditioner import ProbedKKT as ProbedKKT
from constrained.kkt_system import KKTSystem as KKTSystem
from constrained.lagrangian import Lagrangian as Lagrangian
from constrained.lagrangian import Point as Point
from constrained.method import ConstrainedMethod as ConstrainedMethod
from constrained.method import ConstrainedState as ConstrainedState
from constrained.multipliers import Multipliers as Multipliers
from constrained.problem import ConstrainedProblem as ConstrainedProblem
from constrained.problem import EqualityProblem as EqualityProblem
from constrained.problem import Problem as Problem
from constrained.qp.solution import QPSolution as QPSolution
from constrained.quadratic_program import solve_qp as solve_qp
from constrained.registry import methods as methods
from constrained.residual import KKTResidual as KKTResidual
from constrained.residual import kkt_residual as kkt_residual
from constrained.scipy_interface import from_scipy as from_scipy
from constrained.scipy_interface import to_scipy as to_scipy
from constrained.sets import Affine as Affine
from constrained.sets import Ball as Ball
from constrained.sets import Box as Box
from constrained.sets import ConvexSet as ConvexSet
from constrained.sets import HalfSpace as HalfSpace
from constrained.sets import Nonnegative as Nonnegative
from constrained.sets import Polyhedron as Polyhedron
from constrained.sets import Product as Product
from constrained.sets import SecondOrderCone as SecondOrderCone
from constrained.sets import Simplex as Simplex
from constrained.sets import WholeSpace as WholeSpace
from constrained.sketch_newton import AdaSketchNewton as AdaSketchNewton
from constrained.sketch_solver import SketchAndProject as SketchAndProject
from constrained.sketches import BlockGaussian as BlockGaussian
from constrained.sketches import BlockKaczmarz as BlockKaczmarz
from constrained.sketches import GaussianVector as GaussianVector
from constrained.sketches import Kaczmarz as Kaczmarz
from constrained.sketches import Sketch as Sketch
from constrained.solution import Solution as Solution
from constrained.solve import solve as solve

__all__ = [
    "AdaSketchNewton",
    "Affine",
    "AugmentedLagrangian",
    "Ball",
    "BatchSolution",
    "BatchedNewton",
    "BlockGaussian",
    "BlockKaczmarz",
    "Box",
    "ConstrainedMethod",
    "ConstrainedProblem",
    "ConstrainedState",
    "ConvexSet",
    "EqualityProblem",
    "GaussianVector",
    "HalfSpace",
    "InteriorPoint",
    "KKTResidual",
    "KKTSystem",
    "Kaczmarz",
    "Lagrangian",
    "Multipliers",
    "Nonnegative",
    "OptimalPoint",
    "Point",
    "Polyhedron",
    "Problem",
    "ProbedKKT",
    "Product",
    "QPSolution",
    "SecondOrderCone",
    "Simplex",
    "Sketch",
    "SketchAndProject",
    "Solution",
    "WholeSpace",
    "differentiable",
    "from_scipy",
    "kkt_residual",
    "methods",
    "solve",
    "solve_batch",
    "solve_qp",
    "to_scipy",
]
