"""Linear solvers, one method per file."""

from implicit.linear_solvers.auto import AutoSolver as AutoSolver
from implicit.linear_solvers.base import FlatSolution as FlatSolution
from implicit.linear_solvers.base import LinearSolution as LinearSolution
from implicit.linear_solvers.base import LinearSolver as LinearSolver
from implicit.linear_solvers.base import Preconditioner as Preconditioner
from implicit.linear_solvers.bicgstab import BiCGSTAB as BiCGSTAB
from implicit.linear_solvers.cg import CG as CG
from implicit.linear_solvers.cholesky import Cholesky as Cholesky
from implicit.linear_solvers.gmres import GMRES as GMRES
from implicit.linear_solvers.ldlt import LDLT as LDLT
from implicit.linear_solvers.lsmr import LSMR as LSMR
from implicit.linear_solvers.lu import LU as LU
from implicit.linear_solvers.minres import MINRES as MINRES
from implicit.linear_solvers.neumann import Neumann as Neumann
from implicit.linear_solvers.normal_cg import NormalCG as NormalCG
from implicit.linear_solvers.sparse_lu import SparseLU as SparseLU

__all__ = [
    "CG",
    "GMRES",
    "LDLT",
    "LSMR",
    "LU",
    "MINRES",
    "AutoSolver",
    "BiCGSTAB",
    "Cholesky",
    "FlatSolution",
    "LinearSolution",
    "LinearSolver",
    "Neumann",
    "NormalCG",
    "Preconditioner",
    "SparseLU",
]
