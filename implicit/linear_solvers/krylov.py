"""What the iterative solvers share: scaling, the true residual, restarts, and the verdict that is read off it.

A method only knows how to *sweep*: to reduce the residual of ``A d = r`` from a zero start until its own recursive
estimate says so. The loop here scales the right-hand sides, measures the true residual after each sweep, sweeps again
from it while that helps, and names what happened to each row.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicit.linear_solvers.base import (
    FlatSolution,
    LinearSolver,
    check_tolerances,
    default_rtol,
    power_of_two,
    require_square,
)
from implicit.linear_solvers.sweep import End, Sweep, System
from implicit.operators import LinearOperator
from implicit.status import Status

SEVERITY = (Status.NONFINITE, Status.LINEAR_SOLVE_FAILED, Status.STALLED, Status.STEP_LIMIT, Status.CONVERGED)
CONFIRMED = 100.0
"""How far the true normal residual may lie above the recursive one."""
PROGRESS = 0.5
"""A sweep that leaves more than this of the true residual did not help."""
STAGNATION = 1 - 1e-6
"""The same for a cycle of a restarted method, which may converge slowly."""


@dataclass(frozen=True, kw_only=True)
class KrylovSolver(LinearSolver):
    """An iterative solver, for any number of right-hand sides at once.

    Stops when the true residual ``||b - A v||`` is at most ``max(atol, rtol ||b||)``. The recursive residual drifts
    from the true one, so a claim of convergence is checked with one more product; if it fails, the iteration starts
    again from the true residual while that helps. Finished right-hand sides are frozen and cost no more products. The
    status comes from the measured residual alone: reaching it in the very last step is convergence. Right-hand sides
    are scaled to order one and back, so their size, down to the smallest numbers, changes nothing.

    Args:
        rtol: relative tolerance; None means ``sqrt(eps)`` of the dtype, half of its digits: rounding lets a system of
            condition number up to ``1 / sqrt(eps)`` reach it.
        atol: absolute tolerance; zero by default, so that scaling b changes nothing.
        max_steps: step limit; None means ``10 n`` (rounding can need more than n).
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None

    # Properties of the method: whether it takes rectangular operators, whether its residual cannot grow but by
    # rounding, and what to say when it fails.
    rectangular: ClassVar[bool] = False
    monotone: ClassVar[bool] = True
    cure: ClassVar[str] = "use another solver"
    divergence: ClassVar[str] = "the iteration diverges"

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol, self.max_steps)

    @abstractmethod
    def sweep(self, system: System, r: Tensor, goals: Tensor, limit: int) -> Sweep:
        """Reduce the residuals of ``A d = r`` to ``goals``, shape (k,), in at most ``limit`` steps."""

    def init(self, operator: LinearOperator) -> Any:
        """Nothing, unless the method says otherwise."""
        self.check(operator)
        return None

    def check(self, operator: LinearOperator) -> None:
        """Refuse operators that this method is not made for.

        Raises:
            ValueError: naming the solver to use instead.
        """
        if not self.rectangular:
            require_square(operator, type(self).__name__)

    def orthogonal(self, eps: float) -> float:
        """The size of ``||A^T r|| / (||A|| ||r||)`` that the recurrence can tell from zero."""
        return 10.0 * eps

    def minimum_norm(self, x: Tensor, r: Tensor, z: Tensor) -> Tensor | None:
        """The least-squares answers of minimum norm from others with residuals r, z being the preconditioned r; None
        where x is that already."""
        return None

    def solve_flat(self, operator: LinearOperator, prepared: Any, b: Tensor, x0: Tensor | None) -> FlatSolution:
        """Solve for the rows of ``b``, shape ``(k, m)``."""
        rows, columns = operator.shape
        rtol = default_rtol(b.dtype) if self.rtol is None else self.rtol
        orthogonal = self.orthogonal(torch.finfo(b.dtype).eps)
        system = System(operator, prepared, orthogonal if rows == columns else max(rtol, orthogonal))
        limit = 10 * max(rows, columns, 1) if self.max_steps is None else self.max_steps
        run = _Run(self, system, b, limit)
        run.aim(rtol, self.atol)
        if bool(torch.isfinite(run.norms).all()):
            run.start(x0)
            run.loop()
            if run.fitted:
                run.lift(run.fitted)
        else:
            run.verdict(Status.NONFINITE, "the right-hand side is not finite")
        return run.finish()


class _Run:
    """The moving parts of one call, for right-hand sides divided by ``scale``."""

    def __init__(self, solver: KrylovSolver, system: System, b: Tensor, limit: int) -> None:
        self.solver, self.system, self.limit = solver, system, limit
        self.scale = power_of_two(b)
        self.b = self.r = b / self.scale
        self.x = b.new_zeros(b.shape[0], system.operator.shape[1])
        self.norms = torch.linalg.vector_norm(self.b, dim=1)
        self.sizes: list[float] = self.norms.tolist()  # of the true residuals, on the host
        self.normals = [math.inf] * len(b)  # of A^T r
        self.targets: list[float] = []
        self.given_up: set[int] = set()
        self.fitted: list[int] = []  # rows of square systems that have a least-squares answer only
        self.verdicts: dict[Status, str] = {}
        self.steps = 0
        self.indefinite = self.singular = False

    def aim(self, rtol: float, atol: float) -> None:
        """Set the residual that each row must reach."""
        self.targets = torch.clamp(rtol * self.norms, min=atol / self.scale[:, 0]).tolist()

    def start(self, x0: Tensor | None) -> None:
        """Take the starting point where it is better than zero; a stale one, or one that is not finite, is not."""
        if x0 is None:
            return
        x = x0.detach() / self.scale
        r = self.b - self.system.apply(x)
        size = torch.linalg.vector_norm(r, dim=1)
        better = size <= self.norms
        self.x, self.r = torch.where(better[:, None], x, self.x), torch.where(better[:, None], r, self.r)
        self.sizes = torch.where(better, size, self.norms).tolist()

    def loop(self) -> None:
        """Sweep until every row has reached its target or been given up."""
        while True:
            open_rows = [i for i, target in enumerate(self.targets) if self.sizes[i] > target]
            rows = [i for i in open_rows if i not in self.given_up]
            if not rows:
                if not open_rows:
                    self.verdict(Status.CONVERGED, f"true residual reached in {self.steps} steps")
                return
            if self.steps >= self.limit:
                return self.verdict(Status.STEP_LIMIT, f"true residual not reached in {self.limit} steps")
            self.improve(rows)

    def improve(self, rows: list[int]) -> None:
        """One sweep over ``rows``, and what the true residual says of it."""
        everything = len(rows) == len(self.sizes)
        index = slice(None) if everything else torch.tensor(rows, device=self.b.device)
        eps = torch.finfo(self.b.dtype).eps
        # Beyond eps of its start the recursion is fiction: look at the true residual then, whatever was asked for.
        goals = self.b.new_tensor([max(self.targets[i], eps * self.sizes[i]) for i in rows])
        sweep = self.solver.sweep(self.system, self.r[index], goals, self.limit - self.steps)
        self.steps += sweep.steps
        self.indefinite |= End.INDEFINITE in sweep.ends or bool((sweep.curvature <= 0).any())
        x = self.x[index] + sweep.correction
        r = self.b[index] - self.system.apply(x)
        sizes = torch.linalg.vector_norm(r, dim=1).tolist()
        better = [self.judge(row, sweep, place, sizes[place], r[place]) for place, row in enumerate(rows)]
        if not all(better):
            take = torch.tensor(better, device=r.device)[:, None]
            x, r = torch.where(take, x, self.x[index]), torch.where(take, r, self.r[index])
        if isinstance(index, slice):
            self.x, self.r = x, r
        else:
            self.x, self.r = self.x.index_copy(0, index, x), self.r.index_copy(0, index, r)

    def judge(self, row: int, sweep: Sweep, place: int, size: float, r: Tensor) -> bool:
        """Whether the correction of one row is kept; gives the row up where another sweep would not help."""
        end, before = sweep.ends[place], self.sizes[row]
        finite = math.isfinite(size)
        keep = finite and (size <= before or not (self.solver.monotone or end is End.TARGET))
        if not size <= self.targets[row]:
            if end is End.NONFINITE or not finite:
                self.verdict(Status.NONFINITE, "a product with the operator is not finite", row)
            elif end is End.LEAST_SQUARES and keep:
                self.judge_fit(row, float(sweep.norm[place]), size, r)
            else:
                self.judge_end(row, end, size / before, float(sweep.curvature[place]))
        if keep:
            self.sizes[row] = size
        return keep

    def judge_end(self, row: int, end: End, ratio: float, curvature: float) -> None:
        """What an end short of the target means, ``ratio`` being what is left of the residual."""
        solver, failed = self.solver, Status.LINEAR_SOLVE_FAILED
        name = type(solver).__name__
        if end is End.INDEFINITE:
            text = f"the operator is not positive definite: p.Ap = {curvature:.3g} in step {self.steps}"
            self.verdict(failed, text, row)
        elif end is End.PRECONDITIONER:
            self.verdict(failed, "the preconditioner is not positive definite", row)
        elif end is End.DIVERGED:
            self.verdict(failed, solver.divergence, row)
        elif end is End.BREAKDOWN and ratio > PROGRESS:
            text = f"{name} broke down in step {self.steps} and starting again does not help; {solver.cure}"
            self.verdict(failed, text, row)
        elif end is End.RESTART and ratio > STAGNATION:
            text = f"{name} stagnates: a cycle no longer lowers the residual; {solver.cure}"
            self.verdict(Status.STALLED, text, row)
        elif (end is End.TARGET and ratio > PROGRESS) or (solver.monotone and ratio > 1):
            # Only rounding separates the recursion from the truth here.
            self.verdict(Status.STALLED, "the true residual stopped falling: rounding level reached", row)

    def judge_fit(self, row: int, norm: float, size: float, r: Tensor) -> None:
        """Whether ``A^T r`` is zero although r is not."""
        normal = float(torch.linalg.vector_norm(self.system.apply_transpose(self.system.precondition(r[None]))))
        rows, columns = self.system.operator.shape
        found = f"relative residual {size / float(self.norms[row]):.3g}"
        if normal <= CONFIRMED * self.system.ls_rtol * norm * size:
            if rows == columns:
                self.singular = True
                self.fitted.append(row)
                text = f"the operator is singular and the system has no solution: least-squares answer, {found}"
                self.verdict(Status.STALLED, text, row)
            else:
                self.verdict(Status.CONVERGED, f"least-squares solution in {self.steps} steps, {found}", row)
        elif normal > PROGRESS * self.normals[row]:
            text = f"the normal residual stopped falling: rounding level reached, {found}"
            self.verdict(Status.STALLED, text, row)
        self.normals[row] = normal

    def lift(self, rows: list[int]) -> None:
        """Take the null space out of least-squares answers, where the method knows it, and measure them again."""
        index = torch.tensor(rows, device=self.b.device)
        x, r = self.x[index], self.r[index]
        lifted = self.solver.minimum_norm(x, r, self.system.precondition(r))
        if lifted is not None:
            self.x = self.x.index_copy(0, index, lifted)
            self.r = self.r.index_copy(0, index, self.b[index] - self.system.apply(lifted))

    def verdict(self, status: Status, message: str, row: int | None = None) -> None:
        """Remember the first reason for each status; a row that is named is given up."""
        self.verdicts.setdefault(status, message)
        if row is not None:
            self.given_up.add(row)

    def finish(self) -> FlatSolution:
        """The answer in the units of the caller, with the worst verdict over rows."""
        status = next((s for s in SEVERITY if s in self.verdicts), Status.CONVERGED)
        residuals = torch.linalg.vector_norm(self.r, dim=1) * self.scale[:, 0]
        return FlatSolution(
            self.x * self.scale,
            residuals,
            self.norms * self.scale[:, 0],
            self.steps,
            status,
            self.indefinite,
            self.verdicts.get(status, ""),
            singular=self.singular,
            transposed_products=self.system.transposed_products,
        )
