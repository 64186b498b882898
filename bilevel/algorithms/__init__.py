"""Algorithms, one per file."""

from bilevel.algorithms.base import Algorithm as Algorithm
from bilevel.algorithms.implicit_gradient import ImplicitGradient as ImplicitGradient
from bilevel.algorithms.penalty import Penalty as Penalty

__all__ = ["Algorithm", "ImplicitGradient", "Penalty"]
