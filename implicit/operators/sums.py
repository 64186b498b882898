"""Sums, multiples and compositions of operators."""

from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from operator import add, matmul
from typing import Any

from torch import Tensor

from implicit import tree
from implicit.operators.base import LinearOperator, aligned_spaces
from implicit.tree import Tree


class Sum(LinearOperator):
    """``A_1 + ... + A_k``; symmetric or positive definite where every term is.

    Args:
        terms: operators on the same domain with the same range.

    Raises:
        TypeError: if a term is no operator.
        ValueError: if there is no term, or the spaces differ.

    Example:
        >>> import torch, implicit
        >>> H = implicit.Hessian(lambda y: (y**4).sum() / 12, torch.tensor([1.0, 2.0]))
        >>> (H + 3 * implicit.Identity(H.like)) @ torch.ones(2)
        tensor([4., 7.])
    """

    def __init__(self, *terms: LinearOperator) -> None:
        _require_operators(terms, "Sum")
        first = terms[0]
        super().__init__(first.like, None if first.out is first.like else first.out)
        self.terms = terms
        self.symmetric = all(term.symmetric for term in terms)
        self.positive_definite = all(term.positive_definite for term in terms)
        domains = [aligned_spaces(first.like, term.like, "the domains of the terms") for term in terms[1:]]
        ranges = [aligned_spaces(first.out, term.out, "the ranges of the terms") for term in terms[1:]]
        self._aligned = all(domains + ranges)

    def mv(self, v: Tree) -> Tree:
        total = self.terms[0].mv(v)
        for term in self.terms[1:]:
            total = tree.add(total, term @ v)
        return total

    def flat_mv(self, vector: Tensor) -> Tensor:
        if not self._aligned:
            return super().flat_mv(vector)
        self.products += 1
        return self._total(lambda term: term.flat_mv(vector))

    def _flat_block(self, rows: Tensor) -> Tensor:
        if not self._aligned:
            return super()._flat_block(rows)
        self.products += rows.shape[0]
        return self._total(lambda term: term.flat_mm(rows))

    def _total(self, product: Callable[[LinearOperator], Tensor]) -> Tensor:
        total = product(self.terms[0])
        for term in self.terms[1:]:
            total = total + product(term)
        return total

    def to_sparse(self) -> Any:
        return _combined(add, self.terms) if self._aligned else None

    @property
    def T(self) -> LinearOperator:
        return self if self.symmetric else Sum(*(term.T for term in self.terms))


class Scaled(LinearOperator):
    """``alpha * A``; positive definite where A is and alpha is positive.

    Args:
        alpha: a number.
        operator: A.

    Raises:
        TypeError: if ``alpha`` is no number or ``operator`` no operator.
    """

    def __init__(self, alpha: float, operator: LinearOperator) -> None:
        _require_operators((operator,), "Scaled")
        if isinstance(alpha, Tensor) and alpha.numel() == 1:
            alpha = float(alpha)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise TypeError(f"alpha must be a number, got {type(alpha).__name__}; operators compose with @")
        super().__init__(operator.like, None if operator.out is operator.like else operator.out)
        self.alpha, self.operator = float(alpha), operator
        self.symmetric = operator.symmetric
        self.positive_definite = operator.positive_definite and alpha > 0

    def mv(self, v: Tree) -> Tree:
        return tree.scale(self.alpha, self.operator.mv(v))

    def flat_mv(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.alpha * self.operator.flat_mv(vector)

    def _flat_block(self, rows: Tensor) -> Tensor:
        self.products += rows.shape[0]
        return self.alpha * self.operator.flat_mm(rows)

    def to_sparse(self) -> Any:
        matrix = self.operator.to_sparse()
        return None if matrix is None else self.alpha * matrix

    @property
    def T(self) -> LinearOperator:
        return self if self.symmetric else Scaled(self.alpha, self.operator.T)


class Product(LinearOperator):
    """The composition ``A_1 A_2 ... A_k``, applied from the right.

    A product reads the same backwards if its factors are symmetric and mirror each other, as in ``A B A``; only then
    is it known to be symmetric, and positive definite where all factors are. Declare what else is known, such as
    ``Product(J.T, W, J, symmetric=True, positive_definite=True)``.

    Args:
        factors: operators, the range of each the domain of the one before it.
        symmetric: declares the product symmetric.
        positive_definite: declares it symmetric and positive definite.

    Raises:
        TypeError: if a factor is no operator.
        ValueError: if there is no factor, the spaces do not fit, or a product that is not square is declared symmetric.
    """

    def __init__(self, *factors: LinearOperator, symmetric: bool = False, positive_definite: bool = False) -> None:
        _require_operators(factors, "Product")
        domain, codomain = factors[-1].like, factors[0].out
        mirrored = all(f is g and f.symmetric for f, g in zip(factors, reversed(factors), strict=True))
        square = mirrored or symmetric or positive_definite
        super().__init__(domain, None if square else codomain)
        inner = [
            aligned_spaces(left.like, right.out, "the spaces between two factors") for left, right in pairwise(factors)
        ]
        if square:
            inner.append(aligned_spaces(domain, codomain, "the domain and the range of a symmetric product"))
        self.factors = factors
        self.symmetric = square
        self.positive_definite = positive_definite or (mirrored and all(f.positive_definite for f in factors))
        self._aligned = all(inner)

    def mv(self, v: Tree) -> Tree:
        for factor in reversed(self.factors):
            v = factor @ v
        return tree.map(lambda _, leaf: leaf, self.out, v)

    def flat_mv(self, vector: Tensor) -> Tensor:
        if not self._aligned:
            return super().flat_mv(vector)
        self.products += 1
        for factor in reversed(self.factors):
            vector = factor.flat_mv(vector)
        return vector

    def _flat_block(self, rows: Tensor) -> Tensor:
        if not self._aligned:
            return super()._flat_block(rows)
        self.products += rows.shape[0]
        for factor in reversed(self.factors):
            rows = factor.flat_mm(rows)
        return rows

    def to_sparse(self) -> Any:
        return _combined(matmul, self.factors) if self._aligned else None

    @property
    def T(self) -> LinearOperator:
        return self if self.symmetric else Product(*(factor.T for factor in reversed(self.factors)))


def _require_operators(parts: tuple[LinearOperator, ...], name: str) -> None:
    if not parts:
        raise ValueError(f"{name} needs at least one operator")
    for part in parts:
        if not isinstance(part, LinearOperator):
            raise TypeError(f"{name} is made of linear operators, got {type(part).__name__}")


def _combined(operation: Callable[[Any, Any], Any], parts: tuple[LinearOperator, ...]) -> Any:
    """The sparse matrices of the parts, added or multiplied; None where one of them has none."""
    matrices = [part.to_sparse() for part in parts]
    return None if any(matrix is None for matrix in matrices) else reduce(operation, matrices)
