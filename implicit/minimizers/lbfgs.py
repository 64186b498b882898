"""Limited-memory BFGS (Nocedal 1980; Liu and Nocedal 1989)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicit.iterate import Values
from implicit.minimizers.base import Evaluation, Minimizer, Objective, PointState
from implicit.minimizers.line_search import wolfe_search

PATIENCE = 50


@dataclass(kw_only=True)
class LBFGSState(PointState):
    """``changes`` and ``yields`` are ring buffers of s and y, shape ``(memory, n)``; ``stored`` counts pairs ever kept.

    ``scale`` is ``s.y / y.y`` of the last pair.
    """

    changes: Tensor
    yields: Tensor
    stored: int = 0
    scale: float = 0.0
    restarted: bool = False


@dataclass(frozen=True, kw_only=True)
class LBFGS(Minimizer[LBFGSState]):
    """L-BFGS with a line search that keeps working at rounding level.

    A step whose line search fails is tried once more from the steepest descent direction with an empty memory; if
    that fails too, the state is marked as stalled.

    Args:
        rtol: relative tolerance on the gradient norm.
        atol: absolute tolerance on the gradient norm.
        max_steps: step limit.
        memory: how many pairs to keep; 20 costs ``40 n`` numbers.
        first_length: length of the first step tried, relative to ``||y|| + sqrt(n)``; None means ``min(||grad||, 1)``.
    """

    memory: int = 20
    first_length: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.memory, int) or self.memory < 1:
            raise ValueError(f"memory must be a positive integer, got {self.memory}")
        if self.first_length is not None and not self.first_length > 0:
            raise ValueError(f"first_length must be positive or None, got {self.first_length}")

    def start(self, evaluation: Evaluation, point: Tensor, tolerance: float) -> LBFGSState:
        """A state with an empty memory."""
        empty = point.new_zeros(self.memory, point.numel())
        return LBFGSState(
            point=point,
            value=evaluation.value,
            gradient=evaluation.gradient,
            tolerance=tolerance,
            extra=evaluation.extra,
            changes=empty,
            yields=empty.clone(),
        )

    def step(self, problem: Objective, state: LBFGSState) -> Values:
        """One quasi-Newton step."""
        direction = self._direction(state)
        slope = float(state.gradient @ direction)
        norm = float(torch.linalg.vector_norm(state.gradient))
        if norm == 0:
            return {"value": state.value, "gradient_norm": 0.0, "step_length": 0.0}
        if not slope < 0:
            self._forget(state)
            direction, slope = -state.gradient, -norm * norm
        first = 1.0 if state.stored else self._first(state, norm)
        eps = float(torch.finfo(state.point.dtype).eps)
        trial, used = wolfe_search(problem, state.point, state.value, slope, direction, first, eps)
        state.evaluations += used
        if trial is None or trial.evaluation is None or trial.point is None:
            state.stalled = state.restarted or not state.stored
            state.restarted = True
            self._forget(state)
            self.watch(state, norm, used, PATIENCE)
            return {"value": state.value, "gradient_norm": norm, "step_length": 0.0}
        state.restarted = False
        s, y = trial.point - state.point, trial.evaluation.gradient - state.gradient
        curvature, square = float(s @ y), float(y @ y)
        if square > 0 and curvature > eps * float(torch.linalg.vector_norm(s)) * square**0.5:
            slot = state.stored % self.memory
            state.changes[slot], state.yields[slot] = s, y
            state.stored += 1
            state.scale = curvature / square
        self.accept(state, trial.evaluation, trial.point)
        norm = float(torch.linalg.vector_norm(state.gradient))
        self.watch(state, norm, used, PATIENCE)
        return {"value": state.value, "gradient_norm": norm, "step_length": trial.length}

    def _first(self, state: LBFGSState, norm: float) -> float:
        if state.scale > 0:  # restarting: the size of the last curvature seen still holds
            return state.scale
        if self.first_length is None:
            return min(1.0, 1.0 / norm)
        return self.first_length * (float(torch.linalg.vector_norm(state.point)) + state.point.numel() ** 0.5) / norm

    @staticmethod
    def _forget(state: LBFGSState) -> None:
        state.stored = 0

    def _direction(self, state: LBFGSState) -> Tensor:
        """Minus the inverse-Hessian approximation times the gradient, by the two-loop recursion."""
        q = -state.gradient
        kept = min(state.stored, self.memory)
        if kept == 0:
            return q
        order = [(state.stored - 1 - i) % self.memory for i in range(kept)]  # newest first
        rho = 1.0 / torch.linalg.vecdot(state.changes, state.yields)
        alphas = []
        for i in order:
            alpha = rho[i] * (state.changes[i] @ q)
            q = q - alpha * state.yields[i]
            alphas.append(alpha)
        newest = order[0]
        q = q / (rho[newest] * (state.yields[newest] @ state.yields[newest]))
        for i, alpha in zip(reversed(order), reversed(alphas), strict=True):
            q = q + (alpha - rho[i] * (state.yields[i] @ q)) * state.changes[i]
        return q
