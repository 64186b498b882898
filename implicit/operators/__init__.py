"""Linear operators on pytrees, one family per file."""

from implicit.operators.accumulated import Accumulated as Accumulated
from implicit.operators.base import LinearOperator as LinearOperator
from implicit.operators.blocks import BlockHessian as BlockHessian
from implicit.operators.dense import Dense as Dense
from implicit.operators.dense import Shifted as Shifted
from implicit.operators.diagonal import Diagonal as Diagonal
from implicit.operators.diagonal import Identity as Identity
from implicit.operators.difference import GradientDifference as GradientDifference
from implicit.operators.fisher import Fisher as Fisher
from implicit.operators.gauss_newton import GaussNewton as GaussNewton
from implicit.operators.hessian import Hessian as Hessian
from implicit.operators.jacobian import Jacobian as Jacobian
from implicit.operators.mixed import MixedDerivative as MixedDerivative
from implicit.operators.sparse import Sparse as Sparse
from implicit.operators.sums import Product as Product
from implicit.operators.sums import Scaled as Scaled
from implicit.operators.sums import Sum as Sum

__all__ = [
    "Accumulated",
    "BlockHessian",
    "Dense",
    "Diagonal",
    "Fisher",
    "GaussNewton",
    "GradientDifference",
    "Hessian",
    "Identity",
    "Jacobian",
    "LinearOperator",
    "MixedDerivative",
    "Product",
    "Scaled",
    "Shifted",
    "Sparse",
    "Sum",
]
