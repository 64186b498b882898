"""Preconditioners: cheap approximations of an inverse."""

from dataclasses import dataclass

import torch

from implicit import tree
from implicit.linear_solvers.base import Apply, Preconditioner
from implicit.operators import LinearOperator
from implicit.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Jacobi(Preconditioner):
    """Division by a declared positive diagonal, for instance that of a ridge plus an estimate of the data term.

    Args:
        diagonal: a tree shaped like the operator's domain, positive everywhere.
    """

    diagonal: Tree

    def __post_init__(self) -> None:
        if not all(bool((leaf > 0).all()) for leaf in tree.leaves(self.diagonal)):
            raise ValueError("diagonal must be positive everywhere; CG needs a positive definite preconditioner")

    def init(self, operator: LinearOperator) -> Apply:
        """Row-wise division by the diagonal."""
        diagonal = tree.ravel(tree.map(lambda _, leaf: leaf, operator.like, self.diagonal))
        if diagonal.numel() != operator.size:
            raise ValueError(f"diagonal has {diagonal.numel()} entries, the operator acts on {operator.size}")
        inverse = torch.reciprocal(diagonal)
        return lambda rows: rows * inverse
