"""Bilevel optimization on PyTorch: declare a problem once, solve it with interchangeable algorithms."""

import implicit as _implicit

if getattr(_implicit, "ENGINE_OF", None) != "bilevel":
    raise ImportError(
        f"the package 'implicit' that was found at {getattr(_implicit, '__file__', '?')} is not part of bilevel; an "
        "unrelated distribution has the same name. Cure: pip uninstall implicit, then pip install --force-reinstall "
        "bilevel (or remove a local implicit.py)"
    )

from bilevel import testing as testing
from bilevel.algorithms import F2BA as F2BA
from bilevel.algorithms import F2SA as F2SA
from bilevel.algorithms import F3SA as F3SA
from bilevel.algorithms import LVHBA as LVHBA
from bilevel.algorithms import Algorithm as Algorithm
from bilevel.algorithms import ImplicitGradient as ImplicitGradient
from bilevel.algorithms import KKTRelaxation as KKTRelaxation
from bilevel.algorithms import Penalty as Penalty
from bilevel.algorithms import Proximal as Proximal
from bilevel.algorithms import SingleLoop as SingleLoop
from bilevel.auto import Choice as Choice
from bilevel.auto import choose as choose
from bilevel.compare import compare as compare
from bilevel.comparison import Comparison as Comparison
from bilevel.data import Batches as Batches
from bilevel.estimators import Momentum as Momentum
from bilevel.estimators import Storm as Storm
from bilevel.from_cvxpy import CvxpyProblem as CvxpyProblem
from bilevel.from_cvxpy import from_cvxpy as from_cvxpy
from bilevel.modules import ModuleProblem as ModuleProblem
from bilevel.modules import from_modules as from_modules
from bilevel.problem import BilevelProblem as BilevelProblem
from bilevel.registry import algorithm as algorithm
from bilevel.registry import algorithms as algorithms
from bilevel.singular_hypergradient import SingularHypergradient as SingularHypergradient
from bilevel.singular_hypergradient import singular_hypergradient as singular_hypergradient
from bilevel.solution import Accuracy as Accuracy
from bilevel.solution import Solution as Solution
from bilevel.solve import solve as solve
from bilevel.step_sizes import PathEfficiency as PathEfficiency
from bilevel.verify import Verification as Verification
from bilevel.verify import verify as verify
from implicit import ConvergenceWarning as ConvergenceWarning
from implicit import Progress as Progress
from implicit import SaveCheckpoint as SaveCheckpoint
from implicit import SolveError as SolveError
from implicit import Status as Status
from implicit import load_checkpoint as load_checkpoint

__all__ = [
    "LVHBA",
    "Accuracy",
    "Algorithm",
    "Batches",
    "BilevelProblem",
    "Choice",
    "Comparison",
    "ConvergenceWarning",
    "CvxpyProblem",
    "F2BA",
    "F2SA",
    "F3SA",
    "ImplicitGradient",
    "KKTRelaxation",
    "ModuleProblem",
    "Momentum",
    "PathEfficiency",
    "Penalty",
    "Progress",
    "Proximal",
    "SaveCheckpoint",
    "SingleLoop",
    "SingularHypergradient",
    "Solution",
    "SolveError",
    "Status",
    "Storm",
    "Verification",
    "algorithm",
    "algorithms",
    "choose",
    "compare",
    "from_cvxpy",
    "from_modules",
    "load_checkpoint",
    "singular_hypergradient",
    "solve",
    "testing",
    "verify",
]
