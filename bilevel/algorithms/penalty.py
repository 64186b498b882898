"""The fully first-order penalty method F2BA.

Source: Chen, Ma, Zhang, "Near-optimal nonconvex-strongly-convex bilevel optimization with fully first-order oracles"
(arXiv 2306.14853); the penalty and its projections are those of Kwon, Kwon, Wright, Nowak 2023.
"""

import math
from collections.abc import Callable
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
    lower_residual,
    saddle_note,
    solve_lower,
    stationarity,
    twice_differentiable,
)
from bilevel.algorithms.base import Algorithm, BilevelState, require_positive, require_positive_int
from bilevel.algorithms.minibatch import MinibatchState, commit, draw, init_minibatch, normalised_step
from bilevel.measure import measure_curvature
from bilevel.oracle import Oracle, new_counts
from bilevel.problem import BilevelProblem
from bilevel.solution import Accuracy
from bilevel.step_sizes import PathEfficiency
from implicit import CG, Status, tree
from implicit.derivatives import value_and_gradient
from implicit.iterate import Values
from implicit.tree import Tree

FLOAT32_CAP = 1e3
"""In float32 the difference of two lower objectives drowns in rounding beyond this penalty (measured: 4.6e-4 at 1e3,
5.4e-4 at 1e4, 5.9e-3 at 1e5)."""
TRACK_EVERY = 5
CONFIRM = 20
SETTLED = 0.1
STEEPER = 1.05


@dataclass(kw_only=True)
class PenaltyState(BilevelState):
    """The state of a run.

    Attributes:
        z: tracks argmin g(x, .); ``y`` tracks argmin f(x, .) + penalty g(x, .).
        y_before, z_before: previous inner iterates, for acceleration on full data.
        curvature: current estimate of L_g, raised when the path shows more.
        probe: a direction near the top eigenvector of g_yy, for that estimate.
        surrogate: ``||x - P_X(x - G)||`` at the last step, ``first`` that of the first.
        small: how many steps in a row it was below the tolerance.
        gap: moving average of ``p (g(x, y) - g(x, z))``; negative only where z has lost track, and then x slows down.
        inner: samplers, momentum and step length of x.
    """

    z: Tree
    y_before: Tree
    z_before: Tree
    curvature: Tensor
    probe: Tree
    surrogate: Tensor
    first: Tensor
    small: Tensor
    gap: Tensor
    inner: MinibatchState


@dataclass
class _Pair:
    """y and z with their predecessors."""

    y: Tree
    z: Tree
    y_before: Tree
    z_before: Tree

    @classmethod
    def of(cls, state: PenaltyState) -> "_Pair":
        return cls(state.y, state.z, state.y_before, state.z_before)


_Result = tuple[_Pair, Tensor, dict[str, Tensor], Tree]


def _descend(problem: BilevelProblem, fn: Callable[[Tree], Tensor], point: Tree, step: Tensor) -> tuple[Tree, Tree]:
    """One projected gradient step, and the gradient it took."""
    _, slope = value_and_gradient(fn, point)
    return problem.lower_set.project(tree.axpy(-step, slope, point)), slope


@dataclass(frozen=True, kw_only=True)
class Penalty(Algorithm[PenaltyState]):
    """F2BA: gradient steps on the penalised problem, no second derivatives.

    With the penalty p fixed, :math:`F_p(x) = \\min_y [f + p g](x, y) - p \\min_z g(x, z)` has the gradient
    (Danskin)

    .. math:: G = \\nabla_x f(x, y) + p\\,[\\nabla_x g(x, y) - \\nabla_x g(x, z)],

    and differs from F by O(1/p). Each step takes T projected gradient steps on z (step ``1/L_g``) and on y (step
    ``1/(p L_g + L_f)``), warm-started, and one normalised momentum step of x along G, at a length that the path itself
    adapts. y and z, and both terms of the difference, always see the same lower minibatch: independent ones would
    multiply their noise by p. On full data the inner steps are accelerated. Guarantee: BIAS.

    Args:
        penalty: p; None means ``100 max(1, L_f / mu)``, at most 1e3 in float32.
        lower_steps: T; None means 10 on full data, 5 on minibatches.
        lower_chunks: on full data the T steps are repeated, at most so many times, until G changes by under a tenth.
        lower_curvature: L_g; None measures it. It is raised when the path shows more.
        lower_condition: ``L_g / mu``, which sets the acceleration on full data; None measures it, 1 turns it off.
        upper_curvature: L_f; None measures it.
        lower_decay: on minibatches the inner steps shrink by ``(1 + t / lower_decay)^(-1/2)``; None keeps them.
        step_size: rule for the length of the steps of x.
        momentum: of the direction of x.
        rtol: relative tolerance on ``||x - P_X(x - G)||``; None means 1e-5 (float32: 1e-3).
        atol: absolute tolerance on it.
        check_every: steps between looks; None means 20 on full data, 50 on minibatches.
    """

    penalty: float | None = None
    lower_steps: int | None = None
    lower_chunks: int = 50
    lower_curvature: float | None = None
    lower_condition: float | None = None
    upper_curvature: float | None = None
    lower_decay: float | None = 20.0
    step_size: PathEfficiency = field(default_factory=PathEfficiency)
    momentum: float = 0.9

    guarantee: ClassVar[str] = "BIAS"
    handles: ClassVar[frozenset[str]] = frozenset({"upper_set", "lower_set"})
    default_max_steps: ClassVar[int] = 5_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int(self, "lower_steps", "lower_chunks")
        require_positive(self, "penalty", "lower_curvature", "upper_curvature", "lower_decay")
        if self.lower_condition is not None and not self.lower_condition >= 1:
            raise ValueError(f"lower_condition must be at least 1, got {self.lower_condition}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")

    def resolve(self, problem: BilevelProblem, *start: Any, max_steps: int | None = None) -> "Penalty":
        """Measure curvatures by gradient differences and size the penalty."""
        x, y = problem.upper_set.project(start[0]), problem.lower_set.project(start[1])
        half = torch.finfo(tree.common_dtype(y, "y0")).eps > 1e-10
        found = measure_curvature(problem, x, y, first_order=True)
        largest = self.lower_curvature or found.largest
        condition = self.lower_condition or max(1.0, found.largest / found.smallest)
        upper = self.upper_curvature if self.upper_curvature is not None else found.upper
        penalty = self.penalty or 100.0 * max(1.0, upper * condition / largest)
        return replace(
            self,
            penalty=min(penalty, FLOAT32_CAP) if half and self.penalty is None else penalty,
            lower_steps=self.lower_steps or (5 if problem.stochastic else 10),
            lower_curvature=largest,
            lower_condition=1.0 if problem.stochastic else condition,
            upper_curvature=max(upper, 1e-12 * largest),
            step_size=self.step_size.resolve(x, problem.stochastic),
            rtol=(1e-3 if half else 1e-5) if self.rtol is None else self.rtol,
            check_every=self.check_every or (50 if problem.stochastic else 20),
        )

    def init(self, problem: BilevelProblem, *start: Any, generator: torch.Generator | None = None) -> PenaltyState:
        """Projected copies of the start; y and z begin together."""
        x = tree.clone(problem.upper_set.project(start[0]))
        y = tree.clone(problem.lower_set.project(start[1]))
        zero = tree.norm(x).detach() * 0.0
        base = BilevelState(x=x, y=y, generator=generator or torch.Generator().manual_seed(0))
        return PenaltyState(
            x=x,
            y=y,
            generator=base.generator,
            counts=base.counts,
            z=tree.clone(y),
            y_before=tree.clone(y),
            z_before=tree.clone(y),
            curvature=zero + (self.lower_curvature or 0.0),
            probe=tree.randn_like(y, torch.Generator().manual_seed(0)),
            surrogate=zero + math.inf,
            first=zero.clone(),
            small=zero.clone(),
            gap=zero.clone(),
            inner=init_minibatch(problem, base, self.step_size),
        )

    def step(self, problem: BilevelProblem, state: PenaltyState) -> Values:
        """T inner steps on z and y, one step of x."""
        assert self.rtol is not None
        inner = state.inner
        if problem.stochastic:
            pair, curvature, values, gradient = self._minibatch_steps(problem, state)
        else:
            pair, curvature, values, gradient = self._full_steps(problem, state)
        gap = 0.9 * state.gap + 0.1 * values["penalty_gap"]
        lost = ~(gap >= 0)
        warm = tree.axpy(self.momentum, inner.momentum, tree.scale(1.0 - self.momentum, gradient))
        x_next = normalised_step(problem, state.x, warm, inner.path.length)
        residual = tree.norm(tree.sub(state.x, problem.upper_set.project(tree.sub(state.x, gradient))))
        updates = {"x": x_next, "y": pair.y, "z": pair.z, "y_before": pair.y_before, "z_before": pair.z_before}
        flag = commit(state, inner, self.step_size, updates, lost)
        # A refused step must leave no trace: a momentum of 1e150 would last forever.
        inner.momentum = tree.where(flag, warm, tree.zeros_like(warm))
        state.gap = torch.where(flag, gap, 0.0)
        state.curvature = torch.where(torch.isfinite(curvature), curvature, state.curvature)
        state.surrogate = torch.where(flag, residual, math.inf)
        if state.step == 0:
            state.first = residual
        reached = state.surrogate <= torch.clamp(self.rtol * state.first, min=self.atol)
        state.small = torch.where(reached, state.small + 1, 0.0)
        return {**values, "stationarity": state.surrogate, "step_length": inner.path.length}

    def _sizes(self, curvature: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
        """Step lengths of z and y."""
        assert self.penalty is not None and self.upper_curvature is not None
        return shrink / curvature, shrink / (self.penalty * curvature + self.upper_curvature)

    def _penalised(self, oracle: Oracle, x: Tree) -> Callable[[Tree], Tensor]:
        assert self.penalty is not None
        p = self.penalty
        return lambda q: oracle.upper(x, q) + p * oracle.lower(x, q)

    def _minibatch_steps(self, problem: BilevelProblem, state: PenaltyState) -> "_Result":
        """T plain steps, each on a fresh batch that y and z share; no host synchronisation."""
        assert self.lower_steps is not None
        x, pair = state.x, _Pair.of(state)
        oracle = draw(problem, state, state.inner)
        curvature = self._track(state, oracle)
        shrink = (1.0 + state.step / self.lower_decay) ** -0.5 if self.lower_decay is not None else 1.0
        step_z, step_y = self._sizes(curvature, shrink)
        for k in range(self.lower_steps):
            oracle = draw(problem, state, state.inner) if k else oracle
            z, _ = _descend(problem, lambda q, o=oracle: o.lower(x, q), pair.z, step_z)
            y, _ = _descend(problem, self._penalised(oracle, x), pair.y, step_y)
            pair = _Pair(y, z, pair.y, pair.z)
        values, gradient = self._hypergradient(oracle, x, pair.y, pair.z)
        return pair, curvature, values, gradient

    def _full_steps(self, problem: BilevelProblem, state: PenaltyState) -> "_Result":
        """T accelerated steps, again and again until G settles: lower errors enter G times the penalty."""
        assert self.lower_steps is not None
        x, pair, curvature = state.x, _Pair.of(state), state.curvature
        oracle = draw(problem, state, state.inner)
        values, gradient = self._hypergradient(oracle, x, pair.y, pair.z)
        for _ in range(self.lower_chunks):
            before = gradient
            moved, seen = self._chunk(problem, oracle, x, pair, curvature)
            if bool(seen > STEEPER * curvature):
                # The lower level has become steeper than the steps assume (penalties such as exp(x) grow): take back.
                curvature = 1.2 * seen
                pair = _Pair(pair.y, pair.z, pair.y, pair.z)
                continue
            pair = moved
            values, gradient = self._hypergradient(oracle, x, pair.y, pair.z)
            if not bool(tree.norm(tree.sub(gradient, before)) > SETTLED * tree.norm(gradient)):
                break
        return pair, curvature, values, gradient

    def _chunk(
        self, problem: BilevelProblem, oracle: Oracle, x: Tree, pair: "_Pair", curvature: Tensor
    ) -> tuple["_Pair", Tensor]:
        """T accelerated steps, and the largest curvature of g that consecutive gradients showed."""
        assert self.lower_steps is not None
        root = math.sqrt(self.lower_condition or 1.0)
        beta = (root - 1.0) / (root + 1.0)
        step_z, step_y = self._sizes(curvature, 1.0)
        penalised = self._penalised(oracle, x)
        seen = torch.zeros_like(curvature)
        last: tuple[Tree, Tree] | None = None
        for _ in range(self.lower_steps):
            ahead_z = tree.axpy(beta, tree.sub(pair.z, pair.z_before), pair.z) if beta > 0 else pair.z
            ahead_y = tree.axpy(beta, tree.sub(pair.y, pair.y_before), pair.y) if beta > 0 else pair.y
            z, slope = _descend(problem, lambda q: oracle.lower(x, q), ahead_z, step_z)
            y, _ = _descend(problem, penalised, ahead_y, step_y)
            if last is not None:
                distance = tree.norm(tree.sub(ahead_z, last[0]))
                far = distance > 1e-6 * (1.0 + tree.norm(ahead_z))  # closer, rounding would pose as curvature
                ratio = tree.norm(tree.sub(slope, last[1])) / torch.where(far, distance, 1.0)
                seen = torch.where(far, torch.maximum(seen, ratio), seen)
            last = ahead_z, slope
            pair = _Pair(y, z, pair.y, pair.z)
        return pair, torch.where(torch.isfinite(seen), seen, 10.0 * curvature)

    def _hypergradient(self, oracle: Oracle, x: Tree, y: Tree, z: Tree) -> tuple[dict[str, Tensor], Tree]:
        """G and the values it is made of, from one backward pass."""
        assert self.penalty is not None
        p = self.penalty
        parts: dict[str, Tensor] = {}

        def joint(q: Tree) -> Tensor:
            parts["upper_value"] = oracle.upper(q, y)
            gap = oracle.lower(q, y) - oracle.lower(q, z)
            parts["penalty_gap"] = p * gap
            return parts["upper_value"] + p * gap

        _, gradient = value_and_gradient(joint, x)
        return {k: v.detach() for k, v in parts.items()}, gradient

    @staticmethod
    def _track(state: PenaltyState, oracle: Oracle) -> Tensor:
        """Raise L_g where minibatches have become steeper: now and then a power step on gradient differences."""
        if state.step % TRACK_EVERY or state.step == 0:  # measured just now
            return state.curvature
        size = tree.norm(state.probe)
        width = float(torch.finfo(tree.common_dtype(state.z)).eps) ** 0.5 * (1.0 + tree.norm(state.z))
        ahead = tree.axpy(width / torch.where(size > 0, size, 1.0), state.probe, state.z)
        _, here = value_and_gradient(lambda q: oracle.lower(state.x, q), state.z)
        _, there = value_and_gradient(lambda q: oracle.lower(state.x, q), ahead)
        change = tree.scale(1.0 / width, tree.sub(there, here))
        seen = tree.norm(change)
        usable = torch.isfinite(seen) & (seen > 0)
        state.probe = tree.where(usable, change, state.probe)
        return torch.where(usable, torch.maximum(state.curvature, seen), state.curvature)

    def terminate(self, problem: BilevelProblem, state: PenaltyState) -> Status:
        """On full data: the surrogate ``||x - P_X(x - G)||`` small for twenty steps; the report checks it again."""
        if not bool(state.finite):
            return Status.NONFINITE
        if not problem.stochastic and float(state.small) >= CONFIRM:
            return Status.CONVERGED
        return Status.RUNNING

    def assess(self, problem: BilevelProblem, state: PenaltyState, status: Status) -> tuple[Accuracy, Status, str]:
        """Bias from a second penalty; stationarity by the implicit hypergradient, or where Y is a set by extrapolation.

        On full data y is polished to the lower solution next to it. CONVERGED is confirmed only if G with both inner
        problems solved to rounding is still small, and the two independent hypergradients agree up to the bias.
        """
        if status.is_failure:
            return Accuracy(notes=("not measured after a numerical failure",)), status, status.value
        assert self.penalty is not None and self.rtol is not None
        if problem.stochastic:
            found, _ = assess_implicit(problem, Oracle.full(problem, new_counts()), state.x, state.y, QUICK, None)
            return found, status, status.value
        oracle = Oracle.full(problem, new_counts())
        whole = problem.lower_set.is_whole_space
        second_order = whole and twice_differentiable(oracle, state.x, state.z)
        _, slope = value_and_gradient(lambda q: oracle.upper(state.x, q), state.y)
        reference = float(tree.norm(slope)) / self.penalty  # what grad_y g is worth at y
        exact = _ExactPenalty(problem, oracle, self.penalty, state.y, state.z, reference, first_order=not second_order)
        once, twice = exact(state.x, 1.0), exact(state.x, 2.0)
        bias = 2.0 * float(tree.norm(tree.sub(twice, once)))
        if second_order:
            accuracy, found = assess_implicit(problem, oracle, state.x, exact.z, CG(rtol=1e-10), None)
            h, hyper = found.value, ImplicitMap(problem, oracle, exact.z, found.adjoint, CG(rtol=1e-10), reference)
        else:
            h, hyper = exact.extrapolated(state.x), exact.extrapolated
            note = "stationarity by extrapolation in the penalty: the lower objective refuses second derivatives"
            accuracy = Accuracy(
                lower_residual=lower_residual(problem, oracle, state.x, exact.z),
                stationarity=stationarity(problem, state.x, h),
                hypergradient_error=bias / self.penalty,
                hypergradient_error_kind="estimate",
                notes=(note,) if whole else (),
            )
        disagreement = float(tree.norm(tree.sub(h, once)))
        accuracy = replace(accuracy, bias=max(bias, disagreement))
        tree.copy_(state.y, exact.polished(state.x, state.y))
        distance, note = distance_to_solution(problem, hyper, state.x, h, distance_budget(state.x, state.step // 10))
        accuracy = replace(accuracy, distance=distance, notes=accuracy.notes + ((note,) if note else ()))
        if status is not Status.CONVERGED:
            return accuracy, status, status.value
        if (saddle := saddle_note(accuracy)) is not None:
            return accuracy, Status.STALLED, f"{saddle}; start y elsewhere"
        limit = max(self.atol, self.rtol * float(state.first))
        surrogate = stationarity(problem, state.x, once)
        if surrogate > 10.0 * limit + 0.5 * bias:
            message = f"with both inner problems solved the surrogate gradient is {surrogate:.3g}; raise lower_steps"
            return accuracy, Status.STALLED, message
        if disagreement > 2.0 * bias + 10.0 * limit:
            message = (
                f"the implicit hypergradient differs from the surrogate by {disagreement:.3g}, more than the bias "
                f"{bias:.3g} explains: the penalty is too small, the lower level has several solutions, or rounding "
                "drowns the difference of lower values: scale the objectives to similar sizes"
            )
            return accuracy, Status.STALLED, message
        return (
            accuracy,
            status,
            (
                f"surrogate stationarity {surrogate:.3g}, tolerance {limit:.3g} at penalty {self.penalty:.3g}; "
                f"hypergradient bias {accuracy.bias:.3g}"
            ),
        )


class _ExactPenalty:
    """x -> G at a multiple of the penalty with both inner problems solved near rounding, warm-started."""

    def __init__(
        self,
        problem: BilevelProblem,
        oracle: Oracle,
        penalty: float,
        y: Tree,
        z: Tree,
        reference: float,
        *,
        first_order: bool,
    ) -> None:
        self.problem, self.oracle, self.penalty = problem, oracle, penalty
        self.y = {1.0: y, 2.0: y}
        self.z, self.reference, self.first_order = z, reference, first_order

    def _solve(self, fn: Callable[[Tree], Tensor], y: Tree) -> Tree:
        return solve_lower(fn, y, self.problem, self.reference, first_order=self.first_order)

    def __call__(self, x: Tree, factor: float) -> Tree:
        p, oracle = factor * self.penalty, self.oracle
        self.z = self._solve(lambda q: oracle.lower(x, q), self.z)
        # Scaled by 1/p, so that tolerances mean the same at every penalty.
        y = self.y[factor] = self._solve(lambda q: oracle.upper(x, q) / p + oracle.lower(x, q), self.y[factor])
        return Penalty(penalty=p)._hypergradient(oracle, x, y, self.z)[1]

    def polished(self, x: Tree, y: Tree) -> Tree:
        """The lower solution nearest to y downhill: y itself minimizes f + p g and is off by O(1/p). Starting at y and
        not at z keeps the choice that f made where there are several lower solutions."""
        return self._solve(lambda q: self.oracle.lower(x, q), y)

    def extrapolated(self, x: Tree) -> Tree:
        """``2 G_2p - G_p``: the O(1/p) term cancels."""
        return tree.sub(tree.scale(2.0, self(x, 2.0)), self(x, 1.0))
