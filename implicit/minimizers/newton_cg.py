"""Newton's method with directions from truncated CG (Dembo, Eisenstat and Steihaug 1982)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit import tree
from implicit.derivatives import GradientGraph
from implicit.iterate import Values
from implicit.linear_solvers.base import Preconditioner
from implicit.linear_solvers.cg import CG
from implicit.minimizers.base import ROUNDING, Evaluation, Minimizer, Objective, PointState
from implicit.minimizers.line_search import wolfe_search
from implicit.operators import Hessian

PATIENCE = 5


@dataclass(kw_only=True)
class NewtonState(PointState):
    """``products`` counts Hessian products, ``reference`` is the first gradient norm."""

    products: int = 0
    reference: float = 0.0


@dataclass(frozen=True, kw_only=True)
class NewtonCG(Minimizer[NewtonState]):
    """Newton-CG with kept graphs: an accepted trial's backward pass is the next step's Hessian.

    The linear system is solved to ``min(0.5, sqrt(||grad|| / reference))``, but never further than the tolerance
    of the whole run needs. Where CG meets non-positive curvature, the direction found until then is used. The
    objective must attach a :class:`GradientGraph` (``implicit.minimize`` does).

    Args:
        rtol: relative tolerance on the gradient norm.
        atol: absolute tolerance on the gradient norm.
        max_steps: step limit.
        max_products: CG steps per Newton step; None means ``10 n``.
        preconditioner: for the inner CG.
    """

    max_steps: int = 200
    max_products: int | None = None
    preconditioner: Preconditioner | None = None

    needs_graph = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_products is not None and (not isinstance(self.max_products, int) or self.max_products < 1):
            raise ValueError(f"max_products must be a positive integer or None, got {self.max_products!r}")

    def start(self, evaluation: Evaluation, point: Tensor, tolerance: float) -> NewtonState:
        """A state at an evaluated point."""
        if not isinstance(evaluation.extra, GradientGraph):
            raise TypeError("NewtonCG needs an objective whose evaluations carry a GradientGraph; use graph_objective")
        return NewtonState(
            point=point,
            value=evaluation.value,
            gradient=evaluation.gradient,
            tolerance=tolerance,
            extra=evaluation.extra,
            reference=float(torch.linalg.vector_norm(evaluation.gradient)),
        )

    def step(self, problem: Objective, state: NewtonState) -> Values:
        """One Newton step."""
        norm = float(torch.linalg.vector_norm(state.gradient))
        if norm == 0:
            return {"value": state.value, "gradient_norm": 0.0, "step_length": 0.0}
        state.reference = max(state.reference, norm)
        if state.extra is None:  # just loaded from a checkpoint
            state.extra = problem(state.point).extra
        direction = self._direction(state, norm)
        slope = float(state.gradient @ direction)
        if not slope < 0:
            direction, slope = -state.gradient, -norm * norm
        eps = float(torch.finfo(state.point.dtype).eps)
        trial, used = wolfe_search(problem, state.point, state.value, slope, direction, 1.0, eps)
        state.evaluations += used
        if trial is None or trial.evaluation is None or trial.point is None:
            state.stalled = True
            return {"value": state.value, "gradient_norm": norm, "step_length": 0.0}
        after = float(torch.linalg.vector_norm(trial.evaluation.gradient))
        undecided = abs(trial.value - state.value) <= ROUNDING * eps * abs(state.value)
        if undecided and after > 0.9 * norm:
            state.stalled = True  # neither values nor gradients improve: this is rounding
            if after >= norm:
                return {"value": state.value, "gradient_norm": norm, "step_length": 0.0}
        self.accept(state, trial.evaluation, trial.point)
        self.watch(state, after, used, PATIENCE)
        return {"value": state.value, "gradient_norm": after, "step_length": trial.length}

    def _direction(self, state: NewtonState, norm: float) -> Tensor:
        hessian = Hessian.of(state.extra)
        forcing = max(math.sqrt(norm / state.reference), 0.5 * state.tolerance / norm)
        cg = CG(rtol=min(forcing, 0.5), max_steps=self.max_products, preconditioner=self.preconditioner)
        found = cg.solve(hessian, tree.unravel(-state.gradient, hessian.like))
        state.products += found.products
        return tree.ravel(found.value)
