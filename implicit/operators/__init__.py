"""Linear operators on pytrees, one family per file."""

from implicit.operators.base import LinearOperator as LinearOperator
from implicit.operators.dense import Dense as Dense
from implicit.operators.dense import Shifted as Shifted
from implicit.operators.difference import GradientDifference as GradientDifference
from implicit.operators.hessian import Hessian as Hessian

__all__ = ["Dense", "GradientDifference", "Hessian", "LinearOperator", "Shifted"]
