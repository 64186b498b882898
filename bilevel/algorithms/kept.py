"""What implicit hypergradient descent keeps of the lower level between points on full data.

A declared regularizer leaves a data term that often is quadratic in y and free of x: its Gram matrix then replaces
the data. Any lower level that turns out to be quadratic, and any with a declared regularizer whose Hessian is
diagonal, keeps one Hessian as a matrix; its Cholesky factor at each x preconditions all systems there. The matrix is
built once the products spent would have paid for it, and rebuilt by the same rule.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from bilevel.oracle import Oracle
from implicit import CG, GradientGraph, LinearSolver, Minimizer, NewtonCG, State, tree
from implicit.minimizers import Evaluation
from implicit.minimizers.base import Objective
from implicit.structure import Factorized, FormGraph, KeptHessian, QuadraticForm, depends_on
from implicit.tree import Tree

DEFAULT_SIZE = 1_000
"""Largest n by default: one Cholesky factorization per x costs n³/3 flops."""
USUAL = 8
"""Products that a solve with a fresh factor needs anyway; only those beyond it speak for a new one."""

SHRUNK = 0.25
"""A value of the form below this share of that at its center moves the center."""


@dataclass(kw_only=True)
class KeptLowerState(State):
    """Which point the kept Hessian belongs to, and what was spent since; the matrices are rebuilt from it on resuming.

    Attributes:
        x, y: the point of reference (of a quadratic form: its center), which means nothing before ``placed``.
        placed: whether there is one.
        refused: whether a quadratic form was found and turned out to be none.
        spent: products beyond the usual ones.
        searched: whether the data term was tried as a quadratic form.
        note: what was found, one sentence; ``off`` if nothing can be kept.
    """

    x: Tree
    y: Tree
    placed: bool = False
    spent: int = 0
    searched: bool = False
    refused: bool = False
    off: bool = False
    note: str = ""
    hessian: Any = field(default=None, metadata={"transient": True})
    form: Any = field(default=None, metadata={"transient": True})
    looked: bool = field(default=False, metadata={"transient": True})


class Reused:
    """An objective whose value at the starting point is known already."""

    def __init__(self, objective: Objective, first: Evaluation) -> None:
        self.objective, self.first = objective, first

    def __call__(self, point: Tensor) -> Evaluation:
        first, self.first = self.first, None
        return first if first is not None else self.objective(point)


class KeptLower:
    """The lower level of one evaluation: its objective and a preconditioner, from what the state keeps."""

    def __init__(self, oracle: Oracle, state: KeptLowerState, x: Tree, y: Tree) -> None:
        self.oracle, self.state, self.x = oracle, state, x
        self.declared = oracle.problem.regularizer is not None
        if not state.looked:
            state.looked = True
            # Matrices are not saved: what a resumed run computes again was counted before.
            counted = oracle if not state.searched else replace(oracle, counts=dict(oracle.counts))
            self._look(counted, x, y)
            state.searched = True

    def _look(self, oracle: Oracle, x: Tree, y: Tree) -> None:
        """The quadratic data term, which needs no point of reference; and on resuming, the Hessian kept before."""
        state = self.state
        if self.declared and not state.refused and not depends_on(oracle.data_term, x, y):
            state.form = self._form(lambda q: oracle.data_term(x, q), oracle, y)
        if state.form is not None:
            n = len(state.form.vector)
            if state.placed:
                state.form = state.form.recentred(lambda q: oracle.data_term(state.x, q), state.y)
            else:
                state.note = f"the quadratic data term was replaced by its {n} x {n} matrix"
            if not state.off:
                state.hessian = KeptHessian(state.form.matrix, declared=True)
        elif state.placed and not state.off:
            state.hessian = self._matrix(oracle, state.x, state.y)

    def settle(self, graph: GradientGraph) -> bool:
        """Move the center of the quadratic form to the point of ``graph`` (one of :meth:`expand`) where its rounding
        shows, and compare it with the data there.

        Returns:
            Whether something changed, so that the lower level has to be solved again.
        """
        state = self.state
        if state.form is None or not isinstance(graph, FormGraph):
            return False
        y, value = tree.detach(graph.y), float(graph.value - graph.rest.value)
        if state.placed and not abs(value) < SHRUNK * abs(float(state.form.constant)):
            return False
        state.form = state.form.recentred(lambda q: self.oracle.data_term(self.x, q), y)
        if state.form is None:
            state.refused, state.placed, state.hessian, state.note = True, False, None, ""
        else:
            state.x, state.y, state.placed = tree.clone(self.x), tree.clone(y), True
        return True

    def _matrix(self, oracle: Oracle, x: Tree, y: Tree) -> KeptHessian | None:
        if self.declared:
            oracle.counts["products"] += tree.size(y)
            return KeptHessian.at(oracle.data_term, x, y, declared=True)
        form = self._form(lambda q: oracle.lower(x, q), oracle, y)
        return KeptHessian(form.matrix, declared=False) if form is not None else None

    @staticmethod
    def _form(fn: Callable[[Tree], Tensor], oracle: Oracle, y: Tree) -> QuadraticForm | None:
        form = QuadraticForm.find(fn, y)
        oracle.counts["products"] += 3 + (tree.size(y) if form is not None else 0)
        return form

    def _build(self, x: Tree, y: Tree) -> None:
        state, n = self.state, tree.size(y)
        state.spent, state.hessian = 0, self._matrix(self.oracle, x, y)
        if state.hessian is None:
            state.off, state.note = True, ""
        else:
            state.x, state.y, state.placed = tree.clone(x), tree.clone(y), True
            what = "data term" if self.declared else "lower objective, which is quadratic in y,"
            state.note = f"the {n} x {n} Hessian of the {what} was kept between steps"

    def expand(self, y: Tree) -> GradientGraph:
        """The kept graph of g at y, with the quadratic form in place of its data term where there is one."""
        if self.state.form is None:
            return self.oracle.graph(self.x, y)
        return FormGraph(self.state.form, self.oracle.regularizer, self.x, y)

    def preconditioner(self, graph: GradientGraph) -> Factorized | None:
        """The factor at x. ``graph`` is what :meth:`expand` gave at the point to start from."""
        state = self.state
        if state.hessian is None and not state.off and 4 * state.spent >= tree.size(graph.y):
            self._build(self.x, graph.y)
        if state.hessian is None:
            return None
        varying = graph
        if self.declared:
            whole = isinstance(graph, FormGraph)
            varying = graph.rest if whole else GradientGraph(self.oracle.regularizer, self.x, graph.y)
        found = state.hessian.preconditioner(varying)
        self.oracle.counts["products"] += 0 if self.declared else 2
        if isinstance(found, str):
            state.off, state.hessian, state.note = True, None, f"no Hessian is kept: {found}"
            return None
        return found

    def account(self, products: int, y: Tree) -> None:
        """Charge what one evaluation used; where a fresh matrix would have been cheaper, take one at (x, y)."""
        state = self.state
        state.spent += max(0, products - USUAL)
        stale = state.hessian is not None and state.form is None and self.declared
        if stale and 4 * state.spent >= tree.size(y):
            self._build(self.x, y)


def takes_factor(lower_solver: Minimizer[Any] | None, linear_solver: LinearSolver | None) -> bool:
    """Whether both solvers are those that a kept factor preconditions, and have no preconditioner of their own."""
    newton = lower_solver is None or (isinstance(lower_solver, NewtonCG) and lower_solver.preconditioner is None)
    return newton and (
        linear_solver is None or (isinstance(linear_solver, CG) and linear_solver.preconditioner is None)
    )


def preconditioned(
    lower_solver: Minimizer[Any], linear_solver: LinearSolver, factor: Factorized | None
) -> tuple[Minimizer[Any], LinearSolver]:
    """Both solvers with the factor as their preconditioner."""
    if factor is None or not isinstance(lower_solver, NewtonCG) or not isinstance(linear_solver, CG):
        return lower_solver, linear_solver
    return replace(lower_solver, preconditioner=factor), replace(linear_solver, preconditioner=factor)
