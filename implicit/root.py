"""Differentiable solution maps by the implicit function theorem (Blondel et al., NeurIPS 2022).

Where ``F(y, *theta) = 0`` defines y, with A the derivative of F in y and B that in theta, the Jacobian of the
solution is ``-A^{-1} B``, whatever solver found y. Time and memory do not depend on how many steps it took.
"""

from collections.abc import Callable

from torch import Tensor

from implicit.linear_solvers import CG, AutoSolver, LinearSolver
from implicit.optimality import fixed_point, stationary
from implicit.root_checks import check_tolerance
from implicit.root_functions import solve_implicitly
from implicit.root_system import Problem, Residual, Solver
from implicit.tree import Tree


def custom_root(
    residual: Residual,
    *,
    linear_solver: LinearSolver | None = None,
    symmetric: bool = False,
    residual_tolerance: float | None = 1e-2,
    batched_solver: Solver | None = None,
) -> Callable[[Solver], Solver]:
    """Make any solver of ``F(y, *theta) = 0`` differentiable in theta, to any order.

    Reverse mode, forward mode, ``torch.func`` transforms and ``vmap`` compose, except forward mode over forward mode,
    which raises.

    Args:
        residual: F(y, *theta), with the structure and shapes of y.
        linear_solver: for systems with the derivative of F in y; ``AutoSolver()`` by default: LU for small systems,
            GMRES for large ones, LDL^T and MINRES for symmetric ones. ``CG()`` is right only where that derivative is
            symmetric positive definite.
        symmetric: whether the derivative of F in y is symmetric.
        residual_tolerance: the largest Newton correction of y, relative to the norm of y, that passes without a
            warning: the derivative is wrong by about that much. Where y is close to zero the correction may also be
            the square of this tolerance times the distance from ``init`` to y. None turns the check off.
        batched_solver: called by ``vmap`` in place of a loop over the batch: every tensor of ``init`` and theta has a
            leading batch axis then, and so has the solution.

    Returns:
        A decorator for ``solver(init, *theta) -> y``, the signature of jaxopt and TorchOpt. The gradient in ``init``
        is zero. Every tensor that should receive a gradient must be an argument; F is refused where its graph shows
        that it captured one. Arguments may also be integer tensors, numbers or any other object.

    Raises:
        TypeError: when the result is called with an ``init`` that has leaves other than floating-point tensors.
        ValueError: if the solver or F returns another structure or other shapes than ``init``; if F captured a tensor
            that requires a gradient.
        SolveError: if the solution is not finite, or, when differentiating, the linear system cannot be solved.
        NotImplementedError: for forward mode over forward mode.

    Warns:
        ConvergenceWarning: when differentiating, if y is no solution of ``F = 0``, or if the linear solver misses both
            its tolerance and ``sqrt(eps)`` of the dtype.

    Example:
        >>> import torch, implicit
        >>> @implicit.custom_root(lambda y, a: y**2 - a)
        ... def square_root(init, a):
        ...     return a.sqrt()
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> square_root(torch.tensor(1.0), a).backward()
        >>> a.grad
        tensor(0.2500)
        >>> torch.func.hessian(lambda a: square_root(torch.tensor(1.0), a))(torch.tensor(4.0))
        tensor(-0.0312)
    """
    check_tolerance(residual_tolerance)

    def decorate(solver: Solver) -> Solver:
        problem = Problem(
            residual=residual,
            solver=solver,
            linear_solver=linear_solver if linear_solver is not None else AutoSolver(),
            symmetric=symmetric,
            residual_tolerance=residual_tolerance,
            batched_solver=batched_solver,
        )
        return lambda init, *theta: solve_implicitly(problem, init, theta)

    return decorate


def custom_fixed_point(
    iteration: Callable[..., Tree],
    *,
    linear_solver: LinearSolver | None = None,
    residual_tolerance: float | None = 1e-2,
    batched_solver: Solver | None = None,
) -> Callable[[Solver], Solver]:
    """Make any solver of ``y = T(y, *theta)`` differentiable in theta.

    The residual is ``T(y, *theta) - y``.

    Args:
        iteration: T(y, *theta), with the structure and shapes of y.
        linear_solver: for systems with the derivative of T minus the identity, which need not be symmetric;
            ``AutoSolver()`` by default.
        residual_tolerance: see :func:`custom_root`.
        batched_solver: see :func:`custom_root`.

    Returns:
        A decorator for ``solver(init, *theta) -> y``; see :func:`custom_root`.

    Example:
        >>> import torch, implicit
        >>> @implicit.custom_fixed_point(lambda y, a: torch.cos(a * y))
        ... def solve(init, a):
        ...     y = init
        ...     for _ in range(100):
        ...         y = torch.cos(a * y)
        ...     return y
        >>> a = torch.tensor(1.0, requires_grad=True)
        >>> solve(torch.tensor(1.0), a).backward()
        >>> a.grad  # -y sin(y) / (1 + sin(y))
        tensor(-0.2975)
    """
    return custom_root(
        fixed_point(iteration),
        linear_solver=linear_solver,
        residual_tolerance=residual_tolerance,
        batched_solver=batched_solver,
    )


def custom_argmin(
    objective: Callable[..., Tensor],
    *,
    linear_solver: LinearSolver | None = None,
    residual_tolerance: float | None = 1e-2,
    batched_solver: Solver | None = None,
) -> Callable[[Solver], Solver]:
    """Make any minimizer of ``g(y, *theta)`` over y differentiable in theta.

    The optimality condition is ``grad_y g = 0``, whose derivative is the symmetric Hessian.

    Args:
        objective: g(y, *theta), a scalar; y comes first. ``custom_argmin(lambda y, x: g(x, y))`` fits a declared
            lower level.
        linear_solver: for Hessian systems; ``CG()`` by default.
        residual_tolerance: see :func:`custom_root`.
        batched_solver: see :func:`custom_root`.

    Returns:
        A decorator for ``solver(init, *theta) -> y``; see :func:`custom_root`.

    Example:
        >>> import torch, implicit
        >>> @implicit.custom_argmin(lambda y, x: ((y - x) ** 2).sum() + (y**2).sum())
        ... def shrink(init, x):
        ...     return x / 2
        >>> torch.func.jacrev(lambda x: shrink(torch.zeros(2), x))(torch.ones(2)).diagonal()
        tensor([0.5000, 0.5000])
    """
    check_tolerance(residual_tolerance)

    def decorate(solver: Solver) -> Solver:
        problem = Problem(
            residual=stationary(objective),
            objective=objective,
            solver=solver,
            linear_solver=linear_solver if linear_solver is not None else CG(),
            symmetric=True,
            residual_tolerance=residual_tolerance,
            batched_solver=batched_solver,
        )
        return lambda init, *theta: solve_implicitly(problem, init, theta)

    return decorate
