"""How a run ended, and the error and warning that report it."""

from enum import Enum
from typing import Any


class Status(Enum):
    """The numerical outcome of a run, computed from measured residuals and never from a step count.

    The value of each member says what happened and what to do about it.
    """

    RUNNING = "still running"
    CONVERGED = "the requested accuracy was reached and checked"
    STEP_LIMIT = "max_steps was used up; raise max_steps, or start again from the solution"
    TIME_LIMIT = "time_limit was used up; raise time_limit, or resume from the checkpoint"
    STOPPED = "stopped by a callback or by an interrupt; the best point known, else the last one, is returned"
    STALLED = "no further progress is possible at this precision; loosen rtol/atol, scale the problem, or use float64"
    NONFINITE = (
        "an objective, gradient or iterate became NaN or infinite; the best finite point known, else the last one, is "
        "returned. Check the objectives near it, scale the data, or start closer"
    )
    INFEASIBLE = "the constraints could not be satisfied; the least infeasible point is returned"
    UNBOUNDED = (
        "the objective decreases without bound over points that satisfy the constraints; the lowest finite point is "
        "returned. Add bounds, or check the sign of the objective"
    )
    LINEAR_SOLVE_FAILED = (
        "a linear system that the method depends on could not be solved. For implicit gradients: check that the lower "
        "objective is strongly convex in y (add a ridge), or use a solver for indefinite systems"
    )

    @property
    def is_failure(self) -> bool:
        """Whether this outcome raises :class:`SolveError` by default; limits and stops are not failures."""
        return self in (Status.NONFINITE, Status.INFEASIBLE, Status.UNBOUNDED, Status.LINEAR_SOLVE_FAILED)


class SolveError(RuntimeError):
    """A run failed numerically. ``.solution`` holds everything that was found until then."""

    def __init__(self, message: str, solution: Any = None) -> None:
        super().__init__(message)
        self.solution = solution


class ConvergenceWarning(UserWarning):
    """A result is returned that is less accurate than it looks."""
