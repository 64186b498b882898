"""Implicit hypergradient descent: differentiate through the lower solution by the implicit function theorem.

Sources: Pedregosa 2016 (hyperparameter optimization with approximate gradient); Blondel et al. 2021; the minibatch
form is that of ``minibatch.py``.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.accuracy import (
    QUICK,
    ImplicitMap,
    assess_implicit,
    distance_budget,
    distance_to_solution,
    saddle_note,
    stationarity,
)
from bilevel.algorithms.base import Algorithm, BilevelState, require_positive, require_positive_int
from bilevel.algorithms.kept import DEFAULT_SIZE, KeptLower, KeptLowerState, Reused, preconditioned, takes_factor
from bilevel.algorithms.lower_optimality import better_response
from bilevel.algorithms.minibatch import MinibatchState, init_minibatch, soba_step
from bilevel.measure import measure_curvature
from bilevel.oracle import Oracle
from bilevel.problem import BilevelProblem
from bilevel.solution import Accuracy
from bilevel.step_sizes import PathEfficiency
from implicit import (
    CG,
    LBFGS,
    LinearSolver,
    Minimizer,
    NewtonCG,
    SpectralProjectedGradient,
    Status,
    tree,
)
from implicit.hypergradient import hypergradient
from implicit.iterate import Values
from implicit.minimizers import Evaluation, ProjectedObjective, expanded_objective, gradient_objective, graph_objective
from implicit.tree import Tree

UNSOLVED = 0.1
"""Relative residual of the adjoint system from which on its solution is none."""


@dataclass(kw_only=True)
class ImplicitGradientState(BilevelState):
    """The state of a run.

    Attributes:
        adjoint: v, the solution of the linear system.
        gradient: the hypergradient at x (full data).
        value: F(x) (full data).
        stationarity: ``||x - P_X(x - h)||`` (full data).
        reference: the first stationarity measured; the tolerance is relative to it (full data).
        scale: size of the terms that cancel in h; no stationarity below ``sqrt(eps)`` of it means much.
        lower_reference: the largest lower gradient norm met; lower tolerances refer to it.
        hypergradients: how many were evaluated.
        failure: why the last evaluation failed, or empty.
        kept: what is kept of the lower level between points (full data).
        upper: state of the upper minimizer, or the torch optimizer.
        minibatch: samplers and momentum of the minibatch form.
    """

    adjoint: Tree
    gradient: Tree
    value: float = math.inf
    stationarity: float = math.inf
    reference: float = 0.0
    scale: float = 0.0
    lower_reference: float = 0.0
    hypergradients: int = 0
    failure: str = ""
    stalled: bool = False
    upper: Any = None
    minibatch: MinibatchState | None = None
    kept: KeptLowerState | None = None


@dataclass
class _Point:
    """An evaluated upper point with its lower solution and adjoint."""

    x: Tree
    y: Tree
    adjoint: Tree
    value: float
    gradient: Tree
    scale: float


@dataclass(frozen=True, kw_only=True)
class ImplicitGradient(Algorithm[ImplicitGradientState]):
    """Descend :math:`F(x) = f(x, y^*(x))` along the implicit hypergradient
    :math:`h = \\nabla_x f - \\nabla^2_{xy} g\\, v`, where :math:`\\nabla^2_{yy} g\\, v = \\nabla_y f`.

    On full data the lower problem and the linear system are solved to near rounding at every point, warm-started,
    and the upper step is L-BFGS with a line search on F (spectral projected gradient where X is a set). On minibatches
    every step takes ``lower_steps`` gradient steps on y, as many on v, and one step of x.

    Needs a lower level that is strongly convex in y near the path and has no set. Guarantee: EXACT on full data.

    Args:
        lower_solver: minimizer of the lower level on full data; ``NewtonCG(rtol=1e-12)`` by default (float32: 1.2e-6).
        linear_solver: for the adjoint system on full data; ``CG(rtol=1e-10)`` by default (float32: 1.2e-6).
        keep_hessian: on full data, the largest lower level (numbers in y) of which a quadratic data term is replaced by
            its Gram matrix, and a Hessian that changes on its diagonal only is kept as a matrix whose Cholesky factor
            preconditions; 0 never. None means 1,000, or 0 where a solver is given. What was kept is in
            ``solution.message``.
        upper_optimizer: None, or any ``torch.optim`` class such as ``torch.optim.Adam``; its steps are projected
            where X is a set.
        upper_options: keyword arguments of that class, such as ``{"lr": 1e-2}``.
        lower_steps: minibatch steps on y and v per step of x.
        lower_step_size: their length; None measures 1/L, with the largest L of eight minibatches.
        lower_decay: these steps shrink by ``(1 + t / lower_decay)^(-1/2)``; None keeps them constant, and then the
            noise of y biases x.
        step_size: rule for the length of the steps of x on minibatches.
        momentum: of the direction of x on minibatches.
        rtol: relative tolerance on ``||x - P_X(x - h)||``; None means ``sqrt(eps)`` of the dtype.
        atol: absolute tolerance on it.
        check_every: steps between looks; None means 1 on full data, 50 on minibatches.
    """

    lower_solver: Minimizer[Any] | None = None
    linear_solver: LinearSolver | None = None
    keep_hessian: int | None = None
    upper_optimizer: type[torch.optim.Optimizer] | None = None
    upper_options: Mapping[str, Any] = field(default_factory=dict)
    lower_steps: int = 1
    lower_step_size: float | None = None
    lower_decay: float | None = 20.0
    step_size: PathEfficiency = field(default_factory=PathEfficiency)
    momentum: float = 0.9

    guarantee: ClassVar[str] = "EXACT"
    handles: ClassVar[frozenset[str]] = frozenset({"upper_set"})
    default_max_steps: ClassVar[int] = 1_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int(self, "lower_steps")
        require_positive(self, "lower_step_size", "lower_decay")
        keep = self.keep_hessian
        if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 0):
            raise ValueError(f"keep_hessian must be None or an integer >= 0, got {keep!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        if self.lower_solver is not None and not isinstance(self.lower_solver, Minimizer):
            raise TypeError(f"lower_solver must be a Minimizer such as NewtonCG(), got {self.lower_solver!r}")
        if self.linear_solver is not None and not isinstance(self.linear_solver, LinearSolver):
            raise TypeError(f"linear_solver must be a LinearSolver such as CG(), got {self.linear_solver!r}")
        if keep and not takes_factor(self.lower_solver, self.linear_solver):
            raise ValueError(
                f"keep_hessian={keep} preconditions NewtonCG and CG, here the solvers are {self.lower_solver!r} and "
                f"{self.linear_solver!r}: leave keep_hessian=None, or these without preconditioners of their own"
            )
        if self.upper_optimizer is not None:
            if not (isinstance(self.upper_optimizer, type) and issubclass(self.upper_optimizer, torch.optim.Optimizer)):
                raise TypeError(f"upper_optimizer must be a torch.optim class, got {self.upper_optimizer!r}")
            if self.upper_optimizer is torch.optim.LBFGS:
                raise ValueError("torch.optim.LBFGS needs a closure; leave upper_optimizer=None for our own L-BFGS")
            known = list(inspect.signature(self.upper_optimizer).parameters)[1:]
            for name in self.upper_options:
                if name not in known:
                    owner = self.upper_optimizer.__name__
                    raise ValueError(f"upper_options: {owner} has no option {name!r}; it has {', '.join(known)}")
        elif self.upper_options:
            raise ValueError(
                f"upper_options={dict(self.upper_options)} needs upper_optimizer, such as torch.optim.Adam"
            )

    def resolve(self, problem: BilevelProblem, *start: Any, max_steps: int | None = None) -> "ImplicitGradient":
        """Fill in tolerances from the dtype, and on minibatches the measured step size."""
        x, y = start
        eps = float(torch.finfo(tree.common_dtype(y, "y0")).eps)
        tree.common_dtype(x, "x0")
        keep = DEFAULT_SIZE if self.lower_solver is None and self.linear_solver is None else 0
        size = self.lower_step_size
        if size is None and problem.stochastic:
            size = 1.0 / measure_curvature(problem, x, y, first_order=False).largest
        return replace(
            self,
            lower_solver=self.lower_solver or NewtonCG(rtol=max(1e-12, 10 * eps)),
            linear_solver=self.linear_solver or CG(rtol=max(1e-10, 10 * eps)),
            keep_hessian=keep if self.keep_hessian is None else self.keep_hessian,
            rtol=eps**0.5 if self.rtol is None else self.rtol,
            check_every=self.check_every or (50 if problem.stochastic else 1),
            step_size=self.step_size.resolve(x, problem.stochastic),
            lower_step_size=size,
        )

    def init(
        self, problem: BilevelProblem, *start: Any, generator: torch.Generator | None = None
    ) -> ImplicitGradientState:
        """Copies of the start; on full data the lower level is solved there."""
        x, y = tree.clone(problem.upper_set.project(start[0])), tree.clone(start[1])
        state = ImplicitGradientState(
            x=x,
            y=y,
            generator=generator or torch.Generator().manual_seed(0),
            adjoint=tree.zeros_like(y),
            gradient=tree.zeros_like(x),
        )
        if self.upper_optimizer is not None:
            state.upper = self.upper_optimizer(tree.leaves(state.x), **self.upper_options)
        if problem.stochastic:
            state.minibatch = init_minibatch(problem, state, self.step_size)
            return state
        assert self.keep_hessian is not None and self.lower_solver is not None
        if tree.size(y) <= self.keep_hessian and tree.common_dtype(y) in (torch.float32, torch.float64):
            state.kept = KeptLowerState(x=tree.clone(x), y=tree.clone(y))
        state.lower_reference = float(tree.norm(Oracle.full(problem, state.counts).graph(x, y).gradient))
        found = self._evaluate(problem, state, state.x)
        if found is not None:
            self._adopt(problem, state, found)
        state.reference = state.stationarity if math.isfinite(state.stationarity) else 0.0
        if self.upper_optimizer is None:
            first = Evaluation(state.value, tree.ravel(state.gradient))
            state.upper = self._upper_method(problem).start(first, tree.ravel(state.x).clone(), 0.0)
        return state

    @staticmethod
    def _upper_method(problem: BilevelProblem) -> Minimizer[Any]:
        return (
            LBFGS(rtol=0.0, first_length=0.1)
            if problem.upper_set.is_whole_space
            else SpectralProjectedGradient(rtol=0.0)
        )

    def _evaluate(self, problem: BilevelProblem, state: ImplicitGradientState, x: Tree) -> _Point | None:
        """F and its gradient at x, lower level and adjoint warm-started from the state; None if that fails."""
        assert self.lower_solver is not None and self.linear_solver is not None
        oracle = Oracle.full(problem, state.counts)
        state.hypergradients += 1
        kept = KeptLower(oracle, state.kept, x, state.y) if state.kept is not None else None
        flat = tree.ravel(state.y)
        if kept is not None:
            objective = expanded_objective(kept.expand, state.y)
        elif self.lower_solver.needs_graph:
            objective = graph_objective(oracle.lower, x, state.y, "lower")
        else:
            objective = gradient_objective(lambda y: oracle.lower(x, y), state.y, "lower")
        lower_solver, linear_solver = self.lower_solver, self.linear_solver
        if kept is not None:
            first = objective(flat)
            objective = Reused(objective, first)
            lower_solver, linear_solver = preconditioned(lower_solver, linear_solver, kept.preconditioner(first.extra))
        lower, status = lower_solver.run(objective, flat, state.lower_reference)
        state.counts["products"] += (spent := getattr(lower, "products", 0))
        if status is Status.NONFINITE:
            state.failure = "the lower objective or its gradient became non-finite"
            return None
        y = tree.unravel(lower.point, state.y)
        if kept is not None and kept.settle(lower.extra):
            state.hypergradients -= 1
            return self._evaluate(problem, state, x)
        found = hypergradient(
            oracle.upper,
            oracle.lower,
            x,
            y,
            linear_solver=linear_solver,
            adjoint=state.adjoint,
            graph=lower.extra,
            accuracy=False,
        )
        state.counts["products"] += found.linear.products + 1
        if kept is not None:
            kept.account(spent + found.linear.products + 1, y)
        if found.linear.status.is_failure:
            state.failure = f"{found.linear.status.name}: {found.linear.message}"
            return None
        if not found.linear.relative_residual <= UNSOLVED:
            state.failure = f"{Status.LINEAR_SOLVE_FAILED.name}: {found.linear.message}"
            return None
        # f alone errs in first order of the lower error, which line searches would feel; this errs in second order.
        value = found.upper_value - float(tree.ravel(found.adjoint) @ lower.gradient)
        if not (math.isfinite(value) and bool(tree.all_finite(found.value))):
            state.failure = "the upper objective or its gradient became non-finite"
            return None
        return _Point(x, y, found.adjoint, value, found.value, found.scale)

    def _adopt(self, problem: BilevelProblem, state: ImplicitGradientState, found: _Point) -> None:
        """Make an evaluated point the current one."""
        tree.copy_(state.x, found.x)
        state.y, state.adjoint = tree.clone(found.y), tree.clone(found.adjoint)
        state.value, state.gradient, state.failure = found.value, tree.clone(found.gradient), ""
        state.stationarity, state.scale = stationarity(problem, state.x, state.gradient), found.scale

    def step(self, problem: BilevelProblem, state: ImplicitGradientState) -> Values:
        """One step of x."""
        if state.minibatch is not None:
            assert self.lower_step_size is not None
            shrink = 1.0 if self.lower_decay is None else (1.0 + state.step / self.lower_decay) ** -0.5
            return soba_step(
                problem,
                state,
                state.minibatch,
                lower_steps=self.lower_steps,
                lower_step_size=shrink * self.lower_step_size,
                rule=self.step_size,
                beta=self.momentum,
                optimizer=state.upper,
            )
        if self.upper_optimizer is not None:
            self._optimizer_step(problem, state)
        else:
            self._line_search_step(problem, state)
        return {"upper_value": state.value, "stationarity": state.stationarity}

    def _line_search_step(self, problem: BilevelProblem, state: ImplicitGradientState) -> None:
        warm = state.y, state.adjoint

        def evaluate(flat: Tensor) -> Evaluation:
            found = self._evaluate(problem, state, tree.unravel(flat, state.x))
            if found is None:  # the search takes a shorter step
                return Evaluation(math.nan, torch.full_like(flat, math.nan))
            state.y, state.adjoint = found.y, found.adjoint  # the next trial starts here
            return Evaluation(found.value, tree.ravel(found.gradient), found)

        def project(flat: Tensor) -> Tensor:
            return tree.ravel(problem.upper_set.project(tree.unravel(flat, state.x)))

        state.failure = ""
        whole = problem.upper_set.is_whole_space
        self._upper_method(problem).step(evaluate if whole else ProjectedObjective(evaluate, project), state.upper)
        accepted: _Point | None = state.upper.extra
        state.upper.extra = None
        if accepted is None:
            state.y, state.adjoint = warm
        else:
            self._adopt(problem, state, accepted)
        state.stalled = state.upper.stalled

    def _optimizer_step(self, problem: BilevelProblem, state: ImplicitGradientState) -> None:
        before = tree.clone(state.x)
        for leaf, slope in zip(tree.leaves(state.x), tree.leaves(state.gradient), strict=True):
            leaf.grad = slope
        state.upper.step()
        tree.copy_(state.x, problem.upper_set.project(tree.clone(state.x)))
        found = self._evaluate(problem, state, tree.clone(state.x))
        if found is None:
            tree.copy_(state.x, before)
            state.stalled = True
        else:
            self._adopt(problem, state, found)

    def terminate(self, problem: BilevelProblem, state: ImplicitGradientState) -> Status:
        """On full data: measured stationarity against the tolerance."""
        if not bool(state.finite):
            return Status.NONFINITE
        if state.minibatch is not None:
            return Status.RUNNING
        if not math.isfinite(state.value) or (state.stalled and state.failure):
            return Status.LINEAR_SOLVE_FAILED if state.failure.startswith("LINEAR") else Status.NONFINITE
        return (
            Status.CONVERGED
            if state.stationarity <= self._limit(state)
            else (Status.STALLED if state.stalled else Status.RUNNING)
        )

    def _limit(self, state: ImplicitGradientState, *, last: bool = False) -> float:
        """The tolerance. Relative to the first stationarity, which a warm start can make unreachably small: a run that
        can go no further, and the last look at its end, are measured against the terms that cancel in h as well."""
        assert self.rtol is not None
        return max(self.atol, self.rtol * max(state.reference, state.scale if state.stalled or last else 0.0))

    def merit(self, problem: BilevelProblem) -> str | None:
        """F on full data; a minibatch's value says too little."""
        return None if problem.stochastic else "upper_value"

    def point(self, state: ImplicitGradientState) -> Tree:
        """The pair (x, y)."""
        return state.x, state.y

    def _map(self, problem: BilevelProblem, scratch: ImplicitGradientState) -> Callable[[Tree], Tree]:
        """x -> hypergradient with everything that is kept; moves the scratch state only."""

        def hyper(x: Tree) -> Tree:
            found = self._evaluate(problem, scratch, x)
            if found is None:
                return tree.map(lambda leaf: torch.full_like(leaf, math.nan), x)
            scratch.y, scratch.adjoint = found.y, found.adjoint
            return found.gradient

        return hyper

    def assess(
        self, problem: BilevelProblem, state: ImplicitGradientState, status: Status
    ) -> tuple[Accuracy, Status, str]:
        """One more hypergradient with its error, and the distance to the solution."""
        assert self.linear_solver is not None
        scratch = copy.copy(state)
        scratch.counts = dict(state.counts)
        oracle = Oracle.full(problem, scratch.counts)
        solver = self.linear_solver if state.minibatch is None else QUICK
        kept, used = state.kept, ""
        if kept is not None and not status.is_failure:
            lower = KeptLower(oracle, kept, state.x, state.y)
            factor = lower.preconditioner(lower.expand(state.y))
            solver = preconditioned(NewtonCG(), solver, factor)[1]
            used = f"; {kept.note}" if kept.note else ""
        accuracy, found = assess_implicit(problem, oracle, state.x, state.y, solver, state.adjoint)
        if state.minibatch is not None or status.is_failure:
            return accuracy, status, state.failure or status.value
        budget = distance_budget(state.x, state.hypergradients)
        if kept is not None and kept.hessian is not None:
            hyper = self._map(problem, scratch)
        else:
            hyper = ImplicitMap(problem, oracle, state.y, found.adjoint, self.linear_solver, state.lower_reference)
        distance, note = distance_to_solution(problem, hyper, state.x, found.value, budget)
        accuracy = replace(accuracy, distance=distance, notes=accuracy.notes + ((note,) if note else ()))
        limit = self._limit(state, last=True)
        measured = (accuracy.stationarity or 0.0) + (accuracy.hypergradient_error or 0.0)
        if status is Status.CONVERGED and (saddle := saddle_note(accuracy)) is not None:
            return accuracy, Status.STALLED, f"{saddle}; start y elsewhere"
        if status is Status.CONVERGED and not measured <= 2.0 * limit:
            message = f"the hypergradient measured again is {measured:.3g}, above the tolerance {limit:.3g}"
            return accuracy, Status.STALLED, message + used
        if status is Status.CONVERGED and (reason := better_response(problem, state.x, state.y)) is not None:
            return accuracy, Status.STALLED, f"not verified: {reason}"
        if status is Status.CONVERGED:
            return accuracy, status, f"stationarity {accuracy.stationarity:.3g}, tolerance {limit:.3g}{used}"
        return accuracy, status, status.value + used
