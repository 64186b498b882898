"""Linear solvers, one method per file."""

from implicit.linear_solvers.base import FlatSolution as FlatSolution
from implicit.linear_solvers.base import LinearSolution as LinearSolution
from implicit.linear_solvers.base import LinearSolver as LinearSolver
from implicit.linear_solvers.base import Preconditioner as Preconditioner
from implicit.linear_solvers.cg import CG as CG
from implicit.linear_solvers.dense import Cholesky as Cholesky
from implicit.linear_solvers.lu import LU as LU

__all__ = ["CG", "LU", "Cholesky", "FlatSolution", "LinearSolution", "LinearSolver", "Preconditioner"]
