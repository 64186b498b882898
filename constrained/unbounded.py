"""When an objective counts as unbounded below."""

import torch

from constrained.lagrangian import Lagrangian, Point

DEPTH = 1e16
"""A value that many times below the sizes of f and its slope at the start; nothing can be told from less than that."""


def unbounded_below(lagrangian: Lagrangian, point: Point) -> float:
    """``-1e16 max(1, |f|, |grad f|)`` at the start; minus infinity where every variable has two bounds."""
    if lagrangian.compact or not point.finite:
        return -torch.inf
    return -DEPTH * max(1.0, abs(float(point.objective)), float(point.gradient.abs().amax()))
