"""Lagrange multipliers, as trees for users and as vectors for methods."""

from typing import NamedTuple

from torch import Tensor

from implicit.tree import Tree


class Multipliers(NamedTuple):
    """Multipliers of ``L = f + <equality, h> + <inequality, c> + <lower, lower bound - x> + <upper, x - upper bound>``.

    Attributes:
        equality: shaped like h(x), of any sign; ``()`` where the problem has none.
        inequality: shaped like c(x), at least zero; ``()`` where the problem has none.
        lower, upper: shaped like x, at least zero; zero where there is no bound.
    """

    equality: Tree = ()
    inequality: Tree = ()
    lower: Tree = ()
    upper: Tree = ()


class FlatMultipliers(NamedTuple):
    """The same as vectors: of h, shape (m,), of c, shape (p,), of the bounds, shape (n,) each."""

    equality: Tensor
    inequality: Tensor
    lower: Tensor
    upper: Tensor
