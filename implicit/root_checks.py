"""What is looked at before an implicit derivative is believed."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from implicit import tree
from implicit.differentiability import foreign_leaf
from implicit.linear_solvers import LinearSolution
from implicit.linear_solvers.base import default_rtol
from implicit.pullback import Leaves
from implicit.root_system import Setup, System
from implicit.status import ConvergenceWarning, SolveError
from implicit.transforms import forward_levels, is_tracked


def check_tolerance(residual_tolerance: float | None) -> None:
    """Refuse a tolerance that nothing or everything would meet."""
    if residual_tolerance is not None and not residual_tolerance > 0:
        raise ValueError(f"residual_tolerance must be None or > 0, got {residual_tolerance}")


def check_solution(leaves: Sequence[Tensor]) -> None:
    """Refuse what a diverged solver returned."""
    if not bool(tree.all_finite(tuple(leaves))):
        raise SolveError(
            "the solver returned a solution with NaN or infinite entries, which has no derivative; "
            "check the solver's own status, start closer, or scale the problem"
        )


def check_residual(system: System) -> None:
    """Refuse a point where F is not defined."""
    if not bool(tree.all_finite(system.residual)):
        raise SolveError(
            "the residual function is NaN or infinite at the solution, which therefore has no derivative; "
            "the point may lie on the boundary of the function's domain"
        )


def check_linear(found: LinearSolution, dtype: torch.dtype) -> None:
    """Raise or warn where the linear system was not solved."""
    if found.status.is_failure:
        raise SolveError(f"implicit differentiation failed: {found.message}")
    # A tolerance that rounding cannot meet is no reason to warn.
    if not found.success and not found.relative_residual <= default_rtol(dtype):
        warnings.warn(
            f"the linear system of an implicit gradient was solved to a relative residual of "
            f"{found.relative_residual:.3g} only: {found.message}",
            ConvergenceWarning,
            stacklevel=2,
        )


def check_solved(setup: Setup, system: System, amplification: float) -> None:
    """Warn where y is no solution: one Newton correction ``A^{-1} F`` would move it by more than the tolerance.

    The correction costs a linear solve, so two estimates of its length decide whether to look: ``||F|| ||u|| / ||b||``
    from the system just solved (``amplification`` is the largest ``||u|| / ||b||``), and the lower bound
    ``||F||^2 / ||A^T F||`` (Cauchy-Schwarz) from one product. Neither depends on the units of F.
    """
    tolerance = setup.problem.residual_tolerance
    if tolerance is None:
        return
    residual, size = float(tree.norm(system.residual)), system.size
    if residual == 0.0:
        return
    # Close to zero y is no measure of its own error; how far the solver came is.
    limit = tolerance * max(size, tolerance * system.travel)
    pulled = float(tree.norm(system.matrix_transposed @ system.residual))
    bound = residual * (residual / pulled) if pulled else float("inf")
    if max(bound, residual * amplification) <= limit:
        return
    correction = setup.problem.linear_solver.solve(system.matrix, system.residual)
    length = float("inf") if correction.status.is_failure else float(tree.norm(correction.value[: setup.primal]))
    if not length <= limit:  # NaN warns too
        warnings.warn(
            f"the solver did not solve what is differentiated: ||F(y, theta)|| = {residual:.3g}, and one Newton step "
            f"would move y, of norm {size:.3g}, by {length:.3g}. The implicit derivative has an error of about that "
            f"relative size, {length / size if size else float('inf'):.2g}; tighten the solver, check that F is its "
            f"optimality condition, or raise residual_tolerance = {tolerance:g} if this is accurate enough",
            ConvergenceWarning,
            stacklevel=2,
        )


def refuse_captured(outputs: Leaves, own: Sequence[Tensor]) -> None:
    """Refuse a residual whose graph reaches a tensor that is no argument: its gradient would be missing silently."""
    captured = foreign_leaf(outputs, own)
    if captured is not None:
        raise ValueError(_captured(f"shape {tuple(captured.shape)}"))


def refuse_transformed_captures(*functions: Callable[..., Any] | None) -> None:
    """Refuse functions whose closure holds a tensor that a transform of ``torch.func`` or forward mode is tracking."""
    for leaf in _closure_tensors([fn for fn in functions if fn is not None]):
        if is_tracked(leaf):
            raise ValueError(_captured(f"shape {tuple(leaf.shape)}, which is being differentiated or vmapped,"))


def _closure_tensors(functions: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors that functions, partial functions and callable objects hold, directly or through each other."""
    stack, seen = list(functions), set()
    while stack:
        held = stack.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, Tensor):
            yield held
        elif isinstance(held, partial):
            stack += [held.func, *held.args, *held.keywords.values()]
        elif isinstance(held, dict | list | tuple):
            stack += tree.leaves(held)
        elif isinstance(held, FunctionType):
            stack += [*_cells(held), *(held.__defaults__ or ())]
        elif isinstance(held, MethodType):
            stack += [held.__func__, held.__self__]
        elif callable(held) and not isinstance(held, type | torch.nn.Module):
            stack += getattr(held, "__dict__", {}).values()


def _cells(fn: FunctionType) -> list[Any]:
    found = []
    for cell in fn.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return found


def _captured(what: str) -> str:
    return (
        f"the residual function uses a tensor of {what} that it captured instead of receiving it as an argument, so "
        "that it would get no gradient; pass it through theta, or detach() it if it is a constant"
    )


def refuse_nested_forward() -> None:
    """Refuse forward mode over forward mode.

    PyTorch switches forward mode off while it runs the ``jvp`` of a custom function, so the outer tangent would be
    lost without a word.
    """
    if forward_levels() > 1:
        raise NotImplementedError(
            "forward mode over forward mode (such as jacfwd of jacfwd) of an implicit solution loses the outer tangent "
            "in PyTorch; use forward over reverse (torch.func.hessian), reverse over forward, or reverse over reverse"
        )
