"""Minimization in a box by a trust-region Newton method with projected searches (Lin and More 1999)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from implicit import Status
from implicit.minimizers.base import ROUNDING

_DECREASE = 0.01  # of the decrease that the slope promises; mu_0 of the paper
_FORCING = 0.1  # reduction of the free gradient that conjugate gradients stop at
_PRODUCTS = 1_000  # Hessian products per linear system
_FACES = 10  # times that a subspace step may stop at new bounds before the model is left


class Expansion(Protocol):
    """A smooth function around one point."""

    x: Tensor

    @property
    def value(self) -> float:
        """The function, NaN or infinite where it is not defined."""
        ...

    @property
    def gradient(self) -> Tensor:
        """Shape (n,)."""
        ...

    def product(self, v: Tensor) -> Tensor:
        """The Hessian times v, shape (n,)."""
        ...


@dataclass(frozen=True)
class BoxMinimum:
    """How a minimization ended.

    Attributes:
        at: the last accepted point.
        status: CONVERGED (measured), STEP_LIMIT, STALLED (rounding), NONFINITE (no step to a point with a finite value
            and gradient), or UNBOUNDED (the value fell below the floor).
        radius: of the trust region, to start the next minimization with.
        steps: evaluations of the function.
    """

    at: Expansion
    status: Status
    radius: float
    steps: int


@dataclass
class _Box:
    lower: Tensor
    upper: Tensor

    def clip(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def inside(self, x: Tensor) -> Tensor:
        """Which entries lie strictly between their bounds."""
        return (x > self.lower) & (x < self.upper)


def projected_gradient(x: Tensor, gradient: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """``x - P(x - gradient)``, zero exactly where x is stationary in the box, without its rounding at large x."""
    return torch.minimum(torch.maximum(gradient, x - upper), x - lower)


def minimize_in_box(
    evaluate: Callable[[Tensor], Expansion],
    start: Expansion,
    lower: Tensor,
    upper: Tensor,
    *,
    tolerance: float,
    radius: float,
    max_steps: int,
    floor: float = -math.inf,
    scale: float = 1.0,
) -> BoxMinimum:
    """Find a point of the box with ``max |x - P(x - grad / scale)| <= tolerance``.

    Every step minimizes a quadratic model in the trust region: a projected gradient step identifies bounds, then
    truncated conjugate gradients on the entries that are free, with searches along the projected path, which may meet
    many new bounds at once. Negative curvature is followed to the edge of the region. Only Hessian products are used.

    Args:
        evaluate: the function around any point of the box.
        start: the same at the start, which lies in the box; its value and gradient are finite.
        lower, upper: shape (n,), may be infinite.
        tolerance: on the largest entry of the projected gradient.
        radius: Euclidean trust radius to begin with.
        max_steps: evaluations of the function at most.
        floor: the value at which to give up.
        scale: the size of a gradient that counts as one: no entry of the measure exceeds the width of the box.
    """
    box, at = _Box(lower, upper), start
    eps = float(torch.finfo(start.x.dtype).eps)
    size = _size(at, box, scale)
    finite = True
    for steps in range(max_steps + 1):
        if size <= tolerance:
            return BoxMinimum(at, Status.CONVERGED, radius, steps)
        if at.value < floor:
            return BoxMinimum(at, Status.UNBOUNDED, radius, steps)
        if steps == max_steps:
            break
        if not math.isfinite(size):
            return BoxMinimum(at, Status.NONFINITE, radius, steps)
        move, promised = _model_step(at, box, radius)
        length = float(torch.linalg.vector_norm(move))
        finite = finite and math.isfinite(promised)
        if length <= eps * float(torch.linalg.vector_norm(at.x)) or not promised > 0:
            return BoxMinimum(at, Status.STALLED if finite else Status.NONFINITE, radius, steps)
        trial = evaluate(box.clip(at.x + move))
        finite = math.isfinite(trial.value) and bool(torch.isfinite(trial.gradient).all())
        if not finite:
            radius = 0.1 * length
            continue
        fallen = at.value - trial.value
        if max(promised, abs(fallen)) <= ROUNDING * eps * max(abs(at.value), abs(trial.value)):
            after = _size(trial, box, scale)
            if not after < size:
                return BoxMinimum(at, Status.STALLED, radius, steps + 1)
            at, size = trial, after
            continue
        ratio = fallen / promised
        if ratio < 0.25:
            radius = 0.25 * length
        elif ratio > 0.75 and length > 0.8 * radius:
            radius = 3.0 * radius
        if ratio > 1e-4:
            at, size = trial, _size(trial, box, scale)
    return BoxMinimum(at, Status.STEP_LIMIT, radius, max_steps)


def _size(at: Expansion, box: _Box, scale: float) -> float:
    gradient = projected_gradient(at.x, at.gradient / scale, box.lower, box.upper)
    return float(gradient.abs().amax()) if len(gradient) else 0.0


def _model_step(at: Expansion, box: _Box, radius: float) -> tuple[Tensor, float]:
    """A step within the box and the radius, and by how much the quadratic model falls along it."""
    gradient = at.gradient
    move, curved = _cauchy_step(at, box, radius)
    free = box.inside(at.x + move)
    size = float(torch.linalg.vector_norm(torch.where(free, gradient, 0.0)))
    goal = min(_FORCING, math.sqrt(size)) * size
    for _ in range(_FACES):
        slope = gradient + curved
        direction, bent, ended = _truncated_cg(at, slope, free, move, radius, goal)
        if not bool(direction.any()):
            break
        move, curved, clipped = _projected_search(at, box, slope, move, curved, direction, bent)
        if ended or not clipped:
            break
        free = free & box.inside(at.x + move)
        left = torch.where(free, gradient + curved, 0.0)
        if float(torch.linalg.vector_norm(left)) <= goal:
            break
    promised = -float(gradient @ move + 0.5 * (move @ curved))
    return move, promised


def _cauchy_step(at: Expansion, box: _Box, radius: float) -> tuple[Tensor, Tensor]:
    """A projected gradient step with sufficient decrease of the model, and its Hessian product."""
    gradient = at.gradient
    blocked = ((at.x <= box.lower) & (gradient > 0)) | ((at.x >= box.upper) & (gradient < 0))
    direction = -torch.where(blocked, 0.0, gradient)
    product = at.product(direction)
    square, curvature = float(direction @ direction), float(direction @ product)
    length = radius / math.sqrt(square)
    if curvature > 0:
        length = min(length, square / curvature)
    move = length * direction
    curved = length * product
    clipped = box.clip(at.x + move) - at.x
    while bool((clipped != move).any()):
        # A step that bounds cut short is no multiple of the direction: its curvature must be asked for.
        # What is not a number must end the loop: hence the negated comparisons.
        if not float(torch.linalg.vector_norm(clipped - move)) > _tiny(move):
            return clipped, curved
        curved = at.product(clipped)
        promise = float(gradient @ clipped)
        if not promise + 0.5 * float(clipped @ curved) > _DECREASE * promise:
            return clipped, curved
        length *= 0.25
        move = length * direction
        curved = length * product
        clipped = box.clip(at.x + move) - at.x
    return move, curved


def _tiny(v: Tensor) -> float:
    return 10.0 * float(torch.finfo(v.dtype).eps) * float(torch.linalg.vector_norm(v))


def _truncated_cg(
    at: Expansion, slope: Tensor, free: Tensor, move: Tensor, radius: float, goal: float
) -> tuple[Tensor, Tensor, bool]:
    """A direction d on the free entries that lowers the model, with H d; stops at the radius around the point.

    Returns:
        d, H d, and whether the radius or negative curvature ended it.
    """
    direction, bent = torch.zeros_like(slope), torch.zeros_like(slope)
    residual = -torch.where(free, slope, 0.0)
    search = residual.clone()
    square = float(residual @ residual)
    for _ in range(min(2 * int(free.sum()), _PRODUCTS)):
        if math.sqrt(square) <= goal or square == 0.0:
            return direction, bent, False
        product = at.product(search)
        curvature = float(search @ product)
        if not math.isfinite(curvature):
            return direction, bent, True
        length = square / curvature if curvature > 0 else math.inf
        edge = _to_edge(move + direction, search, radius)
        if length >= edge:
            return direction + edge * search, bent + edge * product, True
        direction = direction + length * search
        bent = bent + length * product
        residual = residual - length * torch.where(free, product, 0.0)
        before, square = square, float(residual @ residual)
        search = residual + (square / before) * search
    return direction, bent, False


def _to_edge(at: Tensor, direction: Tensor, radius: float) -> float:
    """The largest t >= 0 with ``||at + t direction|| <= radius``."""
    a, b = float(direction @ direction), float(at @ direction)
    c = min(float(at @ at) - radius * radius, 0.0)
    root = math.sqrt(max(b * b - a * c, 0.0))
    return -c / (b + root) if b > 0 else (root - b) / a


def _projected_search(
    at: Expansion, box: _Box, slope: Tensor, move: Tensor, curved: Tensor, direction: Tensor, bent: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """Along ``P(x + move + t direction)`` to a sufficient decrease of the model; whether bounds cut it short."""
    here = at.x + move
    whole = box.clip(here + direction) - here
    if float(torch.linalg.vector_norm(whole - direction)) <= _tiny(direction):
        return move + whole, curved + bent, False
    first = _to_first_bound(box, here, direction)
    length = 1.0
    while length > first:
        step = box.clip(here + length * direction) - here
        product = at.product(step)
        promise = float(slope @ step)
        if promise + 0.5 * float(step @ product) <= _DECREASE * min(promise, 0.0) and promise < 0:
            return move + step, curved + product, True
        length *= 0.5
    step = box.clip(here + first * direction) - here
    return move + step, curved + first * bent, True


def _to_first_bound(box: _Box, here: Tensor, direction: Tensor) -> float:
    room = torch.where(direction > 0, box.upper - here, here - box.lower)
    steps = torch.where(direction != 0, room / direction.abs(), torch.inf)
    return min(float(steps.amin()), 1.0)
