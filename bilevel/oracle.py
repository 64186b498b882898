"""Both objectives of a problem on one batch, with every evaluation counted."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel.problem import BilevelProblem, evaluate
from implicit import GradientGraph
from implicit.tree import Tree

Counts = dict[str, int]


def new_counts() -> Counts:
    """``upper`` and ``lower`` count evaluations of f and g (each is followed by one backward pass through it);
    ``products`` counts second-order products."""
    return {"upper": 0, "lower": 0, "products": 0}


@dataclass
class Oracle:
    """``problem`` on given batches; evaluations go to ``counts``.

    Attributes:
        upper_batch, lower_batch: passed to the objectives that declare data.
    """

    problem: BilevelProblem
    counts: Counts
    upper_batch: Any = None
    lower_batch: Any = None

    @classmethod
    def full(cls, problem: BilevelProblem, counts: Counts) -> "Oracle":
        """On all data of both levels."""
        upper = problem.upper_data.full() if problem.upper_data is not None else None
        lower = problem.lower_data.full() if problem.lower_data is not None else None
        return cls(problem, counts, upper, lower)

    def upper(self, x: Tree, y: Tree) -> Tensor:
        """f(x, y)."""
        self.counts["upper"] += 1
        return self.problem.value("upper", x, y, self.upper_batch)

    def lower(self, x: Tree, y: Tree) -> Tensor:
        """g(x, y)."""
        self.counts["lower"] += 1
        return self.problem.value("lower", x, y, self.lower_batch)

    def data_term(self, x: Tree, y: Tree) -> Tensor:
        """g(x, y) without its regularizer; counts as an evaluation of g."""
        self.counts["lower"] += 1
        return evaluate(self.problem.lower, "lower", x, y, self.lower_batch)

    def regularizer(self, x: Tree, y: Tree) -> Tensor:
        """The declared regularizer; not counted, since it touches no data."""
        assert self.problem.regularizer is not None
        return evaluate(self.problem.regularizer, "regularizer", x, y, None)

    def graph(self, x: Tree, y: Tree) -> GradientGraph:
        """The kept gradient graph of g at (x, y)."""
        return GradientGraph(self.lower, x, y, "lower")
