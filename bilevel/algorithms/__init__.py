"""Algorithms, one per file."""

from bilevel.algorithms.base import Algorithm as Algorithm
from bilevel.algorithms.implicit_gradient import ImplicitGradient as ImplicitGradient
from bilevel.algorithms.kkt_relaxation import KKTRelaxation as KKTRelaxation
from bilevel.algorithms.lv_hba import LVHBA as LVHBA
from bilevel.algorithms.penalty import Penalty as Penalty
from bilevel.algorithms.penalty_double_loop import F2BA as F2BA
from bilevel.algorithms.penalty_double_loop import Proximal as Proximal
from bilevel.algorithms.penalty_schedules import F2SA as F2SA
from bilevel.algorithms.penalty_schedules import F3SA as F3SA
from bilevel.algorithms.penalty_single_loop import SingleLoop as SingleLoop

__all__ = [
    "LVHBA",
    "Algorithm",
    "F2BA",
    "F2SA",
    "F3SA",
    "ImplicitGradient",
    "KKTRelaxation",
    "Penalty",
    "Proximal",
    "SingleLoop",
]
