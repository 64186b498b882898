"""Batched, differentiable quadratic programs."""

from torch import Tensor

from constrained.qp.arguments import Bound, check_options, collect, followed, guess_active
from constrained.qp.solution import QPSolution
from constrained.qp.solve import Task, solve_data
from constrained.qp.solver import FAILURES


def solve_qp(
    Q: Tensor | None,
    q: Tensor,
    *,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    lower: Bound = None,
    upper: Bound = None,
    start: QPSolution | Tensor | None = None,
    atol: float | None = None,
    max_steps: int = 100,
    raise_on_failure: bool = True,
) -> QPSolution:
    """Solve convex quadratic or linear programs, one or many at once, with derivatives.

        min_x  1/2 x' Q x + q' x    subject to    A x = b,   G x <= h,   lower <= x <= upper

    Strictly convex programs are tried by a dual active-set method first; the others, and those it does not finish,
    go through Mehrotra's interior-point method. Either way the answer is polished on its active constraints, so that it
    is accurate to rounding and there is no accuracy to choose. The whole batch moves together, and every element stops
    on its own. Redundant rows, bounds that are infinite or never reached, and an empty interior are all fine.

    x and the multipliers can be differentiated in all tensors, any number of times, in reverse and forward mode (not
    forward over forward) and under ``torch.func.vmap``, which solves one larger batch.

    Args:
        Q: ``(n, n)``, positive semidefinite; only its symmetric part matters. None for a linear program.
        q: ``(n,)``. Every tensor may have one more axis in front for a batch; those without serve all elements.
        A: ``(m, n)``.
        b: ``(m,)``.
        G: ``(p, n)``.
        h: ``(p,)``; ``inf`` where there is no constraint.
        lower: a number or ``(n,)``; ``-inf`` where there is no bound.
        upper: likewise, ``inf`` where there is no bound.
        start: an earlier solution of a similar program, whose active rows are tried first, or a point near the
            solution, ``(n,)``, of which the rows that hold with equality are. It saves time and does not change the
            answer where that is unique.
        atol: what the three residuals of :class:`constrained.KKTResidual` must not exceed; 1e-8 in float64 and 1e-4 in
            float32 by default. Rounding of large numbers is allowed for, and where all right-hand sides (of rows of
            length one) are below one, feasibility and complementarity have to be smaller by the largest of them.
        max_steps: of the interior-point method; it usually needs 8 to 25.
        raise_on_failure: whether an element that is infeasible, unbounded or not finite raises.

    Returns:
        A :class:`QPSolution`.

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: if shapes, dtypes or devices do not fit together, if A comes without b or G without h, if a bound
            excludes every number, or if Q is not positive semidefinite.
        SolveError: if an element has no solution (its ``.solution`` holds all that was found).

    Warns:
        ConvergenceWarning: when differentiating, where the solution has no derivative: an active constraint without
            force, dependent active constraints that move, or a solution that is not unique.

    References:
        S. Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 2(4), 1992.
        M. Hintermueller, K. Ito, K. Kunisch, "The primal-dual active set strategy as a semismooth Newton method", SIAM
            J. Optim. 13(3), 2002.

    Example:
        >>> import torch, constrained
        >>> q = torch.tensor([[-3.0, 1.0], [-0.5, -0.25]])
        >>> constrained.solve_qp(torch.eye(2), q, lower=0.0, upper=1.0).x
        tensor([[1.0000, 0.0000],
                [0.5000, 0.2500]])
    """
    data, single = collect(Q, q, A, b, G, h, lower, upper)
    check_options(atol, max_steps)
    guess = guess_active(start, data)
    task = Task(
        atol=atol,
        max_steps=max_steps,
        raises=FAILURES if raise_on_failure else (),
        differentiable=followed(data),
        guessed=guess is not None,
        single=single,
    )
    return solve_data(task, data, guess)
