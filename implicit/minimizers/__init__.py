"""Minimizers of smooth functions, one method per file; the usual lower-level solvers."""

from implicit.minimizers.base import Evaluation as Evaluation
from implicit.minimizers.base import Minimizer as Minimizer
from implicit.minimizers.base import Minimum as Minimum
from implicit.minimizers.base import expanded_objective as expanded_objective
from implicit.minimizers.base import gradient_objective as gradient_objective
from implicit.minimizers.base import graph_objective as graph_objective
from implicit.minimizers.base import minimize as minimize
from implicit.minimizers.gradient_regularized_newton import GradientRegularizedNewton as GradientRegularizedNewton
from implicit.minimizers.lbfgs import LBFGS as LBFGS
from implicit.minimizers.newton_cg import NewtonCG as NewtonCG
from implicit.minimizers.projected import ProjectedObjective as ProjectedObjective
from implicit.minimizers.projected import SpectralProjectedGradient as SpectralProjectedGradient

__all__ = [
    "LBFGS",
    "Evaluation",
    "GradientRegularizedNewton",
    "Minimizer",
    "Minimum",
    "NewtonCG",
    "ProjectedObjective",
    "SpectralProjectedGradient",
    "expanded_objective",
    "gradient_objective",
    "graph_objective",
    "minimize",
]
