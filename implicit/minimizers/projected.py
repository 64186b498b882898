"""Spectral projected gradient for smooth objectives over a closed convex set (Birgin, Martinez and Raydan 2000)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit.iterate import Values
from implicit.minimizers.base import ROUNDING, Evaluation, Minimizer, Objective, PointState
from implicit.status import Status


@dataclass
class ProjectedObjective:
    """An objective together with the Euclidean projection onto its set, both over ravelled points."""

    objective: Objective
    project: Callable[[Tensor], Tensor]

    def __call__(self, point: Tensor) -> Evaluation:
        return self.objective(point)

    def residual(self, point: Tensor, gradient: Tensor) -> Tensor:
        """``(x - P(x - s grad)) / s``: zero exactly at stationary points.

        s is 1, unless a step of that length would vanish in the rounding of x.
        """
        floor = torch.finfo(point.dtype).eps ** 0.5 * float(torch.linalg.vector_norm(point))
        size = float(torch.linalg.vector_norm(gradient))
        s = floor / size if 0.0 < size < floor else 1.0
        return (point - self.project(point - s * gradient)) / s


@dataclass(kw_only=True)
class SpectralState(PointState):
    """``spectral`` is the Barzilai-Borwein step, ``recent`` the last values for the nonmonotone test."""

    spectral: float = 0.0
    recent: list[float]


@dataclass(frozen=True, kw_only=True)
class SpectralProjectedGradient(Minimizer[SpectralState]):
    """Projected gradient with Barzilai-Borwein steps and a nonmonotone line search.

    Stops when ``||x - P(x - grad)|| <= max(atol, rtol * reference)``. The problem handed to it is a
    :class:`ProjectedObjective`; the starting point is projected first.

    Args:
        rtol: relative tolerance on the projected gradient residual.
        atol: absolute tolerance on it.
        max_steps: step limit.
        window: how many past values the line search may not exceed.
    """

    max_steps: int = 10_000
    window: int = 10

    def init(self, problem: Any, *start: Tensor | float, generator: torch.Generator | None = None) -> SpectralState:
        """Project and evaluate the starting point.

        Raises:
            TypeError: if the problem brings no projection.
        """
        if not isinstance(problem, ProjectedObjective):
            raise TypeError(
                "SpectralProjectedGradient needs a ProjectedObjective(objective, project); without a set use LBFGS"
            )
        point = problem.project(torch.as_tensor(start[0]).detach()).clone()
        evaluation = problem(point)
        reference = float(start[1]) if len(start) > 1 else 0.0
        return self.start(evaluation, point, self.tolerance(problem.residual(point, evaluation.gradient), reference))

    def start(self, evaluation: Evaluation, point: Tensor, tolerance: float) -> SpectralState:
        """A state at an evaluated feasible point."""
        return SpectralState(
            point=point,
            value=evaluation.value,
            gradient=evaluation.gradient,
            tolerance=tolerance,
            extra=evaluation.extra,
            recent=[evaluation.value],
        )

    def step(self, problem: ProjectedObjective, state: SpectralState) -> Values:
        """One projected step."""
        eps = float(torch.finfo(state.point.dtype).eps)
        if state.spectral == 0.0:
            size = float(torch.linalg.vector_norm(state.gradient))
            state.spectral = min(1.0, 1.0 / size) if size > 0 else 1.0
        direction = problem.project(state.point - state.spectral * state.gradient) - state.point
        slope = float(state.gradient @ direction)
        ceiling = max(state.recent)
        slack = ROUNDING * eps * abs(state.value)
        length, trial, candidate = 1.0, None, state.point
        for _ in range(40):
            candidate = state.point + length * direction
            trial = problem(candidate)
            state.evaluations += 1
            if math.isfinite(trial.value) and trial.value <= ceiling + 1e-4 * length * slope + slack:
                break
            length *= 0.5 if math.isfinite(trial.value) else 0.1
            trial = None
        before = float(torch.linalg.vector_norm(problem.residual(state.point, state.gradient)))
        if trial is None:
            state.stalled = True
            return {"value": state.value, "gradient_norm": before, "step_length": 0.0}
        s, y = candidate - state.point, trial.gradient - state.gradient
        curvature, size = float(s @ y), float(s @ s)
        state.spectral = min(max(size / curvature, 1e-12), 1e12) if curvature > 0 else min(10 * state.spectral, 1e12)
        self.accept(state, trial, candidate)
        state.recent = [*state.recent, trial.value][-self.window :]
        after = float(torch.linalg.vector_norm(problem.residual(state.point, state.gradient)))
        # A step within rounding of the point that improves nothing is the end of the road.
        state.stalled = math.sqrt(size) <= eps * float(torch.linalg.vector_norm(candidate)) and after >= before
        return {"value": state.value, "gradient_norm": after, "step_length": length}

    def terminate(self, problem: Any, state: SpectralState) -> Status:
        """Measured projected-gradient residual against the tolerance."""
        norm = float(torch.linalg.vector_norm(problem.residual(state.point, state.gradient)))
        if not (math.isfinite(norm) and math.isfinite(state.value)):
            return Status.NONFINITE
        if norm <= state.tolerance:
            return Status.CONVERGED
        return Status.STALLED if state.stalled else Status.RUNNING
