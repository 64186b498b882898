"""Public conformance checks: third-party code passes, or fails with one sentence.

Each check takes an object, tries everything that the library relies on, and raises :class:`ConformanceError` for the
first promise that is broken. They need no test framework: call them from a test of your own.
"""

from implicit.testing.derivatives import check_derivatives as check_derivatives
from implicit.testing.linear_solvers import check_linear_solver as check_linear_solver
from implicit.testing.methods import check_method as check_method
from implicit.testing.minimizers import check_minimizer as check_minimizer
from implicit.testing.operators import check_operator as check_operator
from implicit.testing.preconditioners import check_preconditioner as check_preconditioner
from implicit.testing.spaces import spaces as spaces
from implicit.testing.systems import CountedMatrix as CountedMatrix
from implicit.testing.systems import System as System
from implicit.testing.systems import systems as systems
from implicit.testing.verdict import ConformanceError as ConformanceError

__all__ = [
    "ConformanceError",
    "CountedMatrix",
    "System",
    "check_derivatives",
    "check_linear_solver",
    "check_method",
    "check_minimizer",
    "check_operator",
    "check_preconditioner",
    "spaces",
    "systems",
]
