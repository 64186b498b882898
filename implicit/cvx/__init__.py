"""Differentiable convex problems: a cvxpy problem as a torch function of its parameters; see :class:`Layer`."""

from implicit.cvx.layer import Layer as Layer

__all__ = ["Layer"]
