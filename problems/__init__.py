"""Test problems with known answers, and real-data problems, as public objects."""

from problems import boggs_tolle as boggs_tolle
from problems import bolib as bolib
from problems import bolib_convex as bolib_convex
from problems import bolib_linear as bolib_linear
from problems import bolib_nonconvex as bolib_nonconvex
from problems import bolib_strongly_convex as bolib_strongly_convex
from problems import box as box
from problems import bundle_adjustment as bundle_adjustment
from problems import constrained_logistic as constrained_logistic
from problems import cutest_equality as cutest_equality
from problems import equality_exact as equality_exact
from problems import hock_schittkowski as hock_schittkowski
from problems import hyper_cleaning as hyper_cleaning
from problems import inequality as inequality
from problems import inequality_larger as inequality_larger
from problems import logistic as logistic
from problems import lv_hba_cases as lv_hba_cases
from problems import penalty_cases as penalty_cases
from problems import poisson_control as poisson_control
from problems import quadratic as quadratic
from problems import ridge as ridge
from problems import sparse_group_lasso as sparse_group_lasso
from problems import stackelberg as stackelberg
from problems import svm as svm
from problems.case import Case as Case
from problems.case import OracleCounter as OracleCounter
from problems.case import Report as Report
from problems.constrained_case import ConstrainedCase as ConstrainedCase
from problems.datasets import Dataset as Dataset
from problems.datasets import MissingDataError as MissingDataError
from problems.external import from_pycutest as from_pycutest
from problems.external import from_s2mpj as from_s2mpj
from problems.registry import Entry as Entry
from problems.registry import case as case
from problems.registry import cases as cases
from problems.registry import entries as entries
from problems.registry import entry as entry
from problems.registry import register as register

__all__ = [
    "Case",
    "ConstrainedCase",
    "Dataset",
    "Entry",
    "MissingDataError",
    "OracleCounter",
    "Report",
    "case",
    "cases",
    "entries",
    "entry",
    "from_pycutest",
    "from_s2mpj",
    "register",
]
