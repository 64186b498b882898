"""Implicit differentiation and curvature products for PyTorch: the engine of ``bilevel``.

Objects here know nothing about bilevel problems: operators, linear solvers, minimizers, implicit gradients, and the
driver with its checkpoints that every method of the library runs on.
"""

from implicit import cvx as cvx
from implicit import optimality as optimality
from implicit import testing as testing
from implicit.checkpoint import SaveCheckpoint as SaveCheckpoint
from implicit.checkpoint import load_checkpoint as load_checkpoint
from implicit.checkpoint import save_checkpoint as save_checkpoint
from implicit.curvature import Spectrum as Spectrum
from implicit.curvature import lanczos as lanczos
from implicit.derivatives import GradientGraph as GradientGraph
from implicit.derivatives import hvp as hvp
from implicit.derivatives import joint_product as joint_product
from implicit.derivatives import mixed_vjp as mixed_vjp
from implicit.estimators import Estimator as Estimator
from implicit.estimators import FiniteDifference as FiniteDifference
from implicit.estimators import LinearSolve as LinearSolve
from implicit.estimators import NeumannSeries as NeumannSeries
from implicit.estimators import OneStep as OneStep
from implicit.hutchinson import hutchinson_diagonal as hutchinson_diagonal
from implicit.hypergradient import Hypergradient as Hypergradient
from implicit.hypergradient import HypergradientAccuracy as HypergradientAccuracy
from implicit.hypergradient import hypergradient as hypergradient
from implicit.inner_optimizers import SGD as SGD
from implicit.inner_optimizers import Adagrad as Adagrad
from implicit.inner_optimizers import Adam as Adam
from implicit.inner_optimizers import InnerOptimizer as InnerOptimizer
from implicit.inner_optimizers import RMSprop as RMSprop
from implicit.iterate import IterativeMethod as IterativeMethod
from implicit.iterate import Run as Run
from implicit.iterate import StepInfo as StepInfo
from implicit.iterate import iterate as iterate
from implicit.kkt import custom_kkt as custom_kkt
from implicit.linear_solvers import CG as CG
from implicit.linear_solvers import GMRES as GMRES
from implicit.linear_solvers import LDLT as LDLT
from implicit.linear_solvers import LSMR as LSMR
from implicit.linear_solvers import LU as LU
from implicit.linear_solvers import MINRES as MINRES
from implicit.linear_solvers import AutoSolver as AutoSolver
from implicit.linear_solvers import BiCGSTAB as BiCGSTAB
from implicit.linear_solvers import Cholesky as Cholesky
from implicit.linear_solvers import LinearSolution as LinearSolution
from implicit.linear_solvers import LinearSolver as LinearSolver
from implicit.linear_solvers import Neumann as Neumann
from implicit.linear_solvers import NormalCG as NormalCG
from implicit.linear_solvers import Preconditioner as Preconditioner
from implicit.linear_solvers import SparseLU as SparseLU
from implicit.minimizers import LBFGS as LBFGS
from implicit.minimizers import GradientRegularizedNewton as GradientRegularizedNewton
from implicit.minimizers import Minimizer as Minimizer
from implicit.minimizers import Minimum as Minimum
from implicit.minimizers import NewtonCG as NewtonCG
from implicit.minimizers import SpectralProjectedGradient as SpectralProjectedGradient
from implicit.minimizers import minimize as minimize
from implicit.modules import ModuleObjective as ModuleObjective
from implicit.modules import module_objective as module_objective
from implicit.operators import Accumulated as Accumulated
from implicit.operators import BlockHessian as BlockHessian
from implicit.operators import Dense as Dense
from implicit.operators import Diagonal as Diagonal
from implicit.operators import Fisher as Fisher
from implicit.operators import GaussNewton as GaussNewton
from implicit.operators import GradientDifference as GradientDifference
from implicit.operators import Hessian as Hessian
from implicit.operators import Identity as Identity
from implicit.operators import Jacobian as Jacobian
from implicit.operators import LinearOperator as LinearOperator
from implicit.operators import MixedDerivative as MixedDerivative
from implicit.operators import Product as Product
from implicit.operators import Scaled as Scaled
from implicit.operators import Shifted as Shifted
from implicit.operators import Sparse as Sparse
from implicit.operators import Sum as Sum
from implicit.optimality import KKTPoint as KKTPoint
from implicit.preconditioners import Factorization as Factorization
from implicit.preconditioners import Jacobi as Jacobi
from implicit.preconditioners import Kept as Kept
from implicit.preconditioners import KeptState as KeptState
from implicit.preconditioners import Nystrom as Nystrom
from implicit.progress import Progress as Progress
from implicit.prox import block_soft_threshold as block_soft_threshold
from implicit.prox import prox_elastic_net as prox_elastic_net
from implicit.prox import prox_group_lasso as prox_group_lasso
from implicit.prox import prox_l1 as prox_l1
from implicit.prox import soft_threshold as soft_threshold
from implicit.random import paired as paired
from implicit.root import custom_argmin as custom_argmin
from implicit.root import custom_fixed_point as custom_fixed_point
from implicit.root import custom_root as custom_root
from implicit.state import State as State
from implicit.status import ConvergenceWarning as ConvergenceWarning
from implicit.status import SolveError as SolveError
from implicit.status import Status as Status
from implicit.structure import KeptHessian as KeptHessian
from implicit.structure import QuadraticForm as QuadraticForm
from implicit.unroll import unroll as unroll
from implicit.unroll import unroll_map as unroll_map
from implicit.unrolled import UnrolledHypergradient as UnrolledHypergradient
from implicit.unrolled import unrolled as unrolled

ENGINE_OF = "bilevel"
"""Marks this package as ours: an unrelated distribution on the package index is also called ``implicit``."""

__all__ = [
    "CG",
    "GMRES",
    "LBFGS",
    "LDLT",
    "LSMR",
    "LU",
    "MINRES",
    "SGD",
    "Accumulated",
    "Adagrad",
    "Adam",
    "AutoSolver",
    "BiCGSTAB",
    "BlockHessian",
    "Cholesky",
    "ConvergenceWarning",
    "Dense",
    "Diagonal",
    "Estimator",
    "Factorization",
    "FiniteDifference",
    "Fisher",
    "GaussNewton",
    "GradientDifference",
    "GradientGraph",
    "GradientRegularizedNewton",
    "Hessian",
    "Hypergradient",
    "HypergradientAccuracy",
    "Identity",
    "InnerOptimizer",
    "IterativeMethod",
    "Jacobi",
    "Jacobian",
    "KKTPoint",
    "Kept",
    "KeptHessian",
    "KeptState",
    "LinearOperator",
    "LinearSolution",
    "LinearSolve",
    "LinearSolver",
    "Minimizer",
    "Minimum",
    "MixedDerivative",
    "ModuleObjective",
    "Neumann",
    "NeumannSeries",
    "NewtonCG",
    "NormalCG",
    "Nystrom",
    "OneStep",
    "Preconditioner",
    "Product",
    "Progress",
    "QuadraticForm",
    "RMSprop",
    "Run",
    "SaveCheckpoint",
    "Scaled",
    "Shifted",
    "SolveError",
    "Sparse",
    "SparseLU",
    "SpectralProjectedGradient",
    "Spectrum",
    "State",
    "Status",
    "StepInfo",
    "Sum",
    "UnrolledHypergradient",
    "block_soft_threshold",
    "custom_argmin",
    "custom_fixed_point",
    "custom_kkt",
    "custom_root",
    "cvx",
    "hutchinson_diagonal",
    "hvp",
    "hypergradient",
    "iterate",
    "joint_product",
    "lanczos",
    "load_checkpoint",
    "minimize",
    "mixed_vjp",
    "module_objective",
    "optimality",
    "paired",
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_l1",
    "save_checkpoint",
    "soft_threshold",
    "testing",
    "unroll",
    "unroll_map",
    "unrolled",
]
