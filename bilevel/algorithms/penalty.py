"""Penalty methods: gradients of both objectives and no second derivatives.

Sources: Kwon, Kwon, Wright, Nowak 2023 (F2SA, F3SA) and 2024 (proximal, single loop); Chen, Ma, Zhang,
"Near-optimal nonconvex-strongly-convex bilevel optimization with fully first-order oracles" (arXiv 2306.14853: F2BA).
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.algorithms import penalty_report
from bilevel.algorithms.base import Algorithm, BilevelState, require_positive, require_positive_int
from bilevel.algorithms.minibatch import commit, init_minibatch, normalised_step
from bilevel.algorithms.penalty_bias import ExactPenalty, measure
from bilevel.algorithms.penalty_double_loop import F2BA
from bilevel.algorithms.penalty_scheme import Move, PenaltyState, Scheme, Sizes, measure_sizes
from bilevel.estimators import Momentum
from bilevel.oracle import Oracle, new_counts
from bilevel.problem import BilevelProblem
from bilevel.solution import Accuracy
from bilevel.step_sizes import PathEfficiency
from implicit import Status, tree
from implicit.iterate import Values
from implicit.tree import Tree

CONFIRM = 20
FIRST = 0.35
"""The first penalty is at most ``FIRST / sqrt(eps)``, 1e3 in float32: there the difference of two lower objectives
begins to drown in rounding (measured in float32: 4.6e-4 at 1e3, 5.4e-4 at 1e4, 5.9e-3 at 1e5). What is measured decides
how far it grows, at most to ``LAST / sqrt(eps)``."""
LAST = 35.0
WORSE = 1.2
STAGES = 2
"""Doublings of the penalty for extrapolation."""


@dataclass(frozen=True, kw_only=True)
class Penalty(Algorithm[PenaltyState]):
    """Gradient steps on the penalised problem, no second derivatives.

    With the penalty p, :math:`F_p(x) = \\min_y [f + p g](x, y) - p \\min_z g(x, z)` has the gradient (Danskin)

    .. math:: G = \\nabla_x f(x, y) + p\\,[\\nabla_x g(x, y) - \\nabla_x g(x, z)],

    and differs from F by O(1/p). y and z follow x by projected gradient steps, as ``scheme`` says; x takes normalised
    momentum steps along G at a length that the path itself adapts, projected on X. Where the lower level has several
    solutions, y is the one that f prefers. Guarantee: BIAS.

    **The bias is measured.** On full data, once x has settled, G is compared at p and 2p, and with the hypergradient by
    implicit differentiation, both inner problems solved to rounding; p grows until the larger difference is at most
    ``bias_rtol`` times the sizes of the two parts of the hypergradient, or until growing no longer lowers
    it, which is where rounding takes over (between 1e3 and 1e4 in float32). ``accuracy.bias`` reports it.

    Args:
        scheme: ``F2BA()`` (the default: fixed penalty, accelerated on full data), ``F2SA()``, ``F3SA()`` (penalties on
            a schedule), ``Proximal()``, ``SingleLoop()`` (proximal centres).
        penalty: p at the start; None means ``100 max(1, L_f / mu)`` (schedules: ``max(1, 2 L_f / mu)``).
        bias_rtol: when p has grown enough; None means 1e-2 where ``penalty`` is None, and that a given penalty stays.
        extrapolate: on full data, solve at 2p and 4p too and return ``(x_p - 6 x_2p + 8 x_4p) / 3``, whose error is
            O(1/p^3) where the active sets do not change.
        lower_steps: T; None means 10 on full data, 5 on minibatches, 1 for single loops.
        lower_chunks: on full data the T steps are repeated, at most so many times, until G changes by under a tenth.
        lower_curvature: L_g; None measures it. It is raised when the path shows more.
        lower_condition: ``L_g / mu``, which sets the acceleration on full data; None measures it, 1 turns it off.
        upper_curvature: L_f; None measures it.
        lower_decay: on minibatches the inner steps shrink by ``(1 + t / lower_decay)^(-1/2)``; None keeps them.
        step_size: rule for the length of the steps of x, or a number eta for plain steps ``x - eta G``, about 1 / L_F.
        momentum: of the direction of normalised steps.
        common_batches: y and z, and both terms of the difference in G, see the same lower minibatch. Independent ones
            (the theory's) multiply their noise by p.
        rtol: relative tolerance on ``||x - P_X(x - G)||``; None means 1e-5 (float32: 1e-3).
        atol: absolute tolerance on it.
        check_every: steps between looks; None means 20 on full data, 50 on minibatches.

    Example:
        >>> import torch, bilevel
        >>> problem = bilevel.BilevelProblem(lambda x, y: (y - 1) ** 2 + x**2 / 4, lambda x, y: (y - x) ** 2)
        >>> zero = torch.zeros((), dtype=torch.float64)
        >>> found = bilevel.solve(problem, bilevel.Penalty(extrapolate=True), zero, zero)
        >>> round(float(found.x), 4), found.status.name
        (0.8, 'CONVERGED')
    """

    scheme: Scheme = field(default_factory=F2BA)
    penalty: float | None = None
    bias_rtol: float | None = None
    extrapolate: bool = False
    lower_steps: int | None = None
    lower_chunks: int = 50
    lower_curvature: float | None = None
    lower_condition: float | None = None
    upper_curvature: float | None = None
    lower_decay: float | None = 20.0
    step_size: PathEfficiency | float = field(default_factory=PathEfficiency)
    momentum: float = 0.9
    common_batches: bool = True

    guarantee: ClassVar[str] = "BIAS"
    handles: ClassVar[frozenset[str]] = frozenset({"upper_set", "lower_set"})
    default_max_steps: ClassVar[int] = 5_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int(self, "lower_steps", "lower_chunks")
        require_positive(self, "penalty", "bias_rtol", "lower_curvature", "upper_curvature", "lower_decay")
        if self.lower_condition is not None and not self.lower_condition >= 1:
            raise ValueError(f"lower_condition must be at least 1, got {self.lower_condition}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        if not isinstance(self.scheme, Scheme):
            raise TypeError(f"scheme must be an object such as bilevel.F2BA(), got {self.scheme!r}")
        if not isinstance(self.step_size, PathEfficiency):
            require_positive(self, "step_size")
        if self.extrapolate and self.scheme.scheduled:
            raise ValueError(f"extrapolate compares fixed penalties, and {type(self.scheme).__name__} has a schedule")
        if (reason := self.scheme.refuses(self)) is not None:
            raise ValueError(reason)

    def resolve(self, problem: BilevelProblem, *start: Any, max_steps: int | None = None) -> "Penalty":
        """Measure curvatures by gradient differences and size the penalty."""
        x, y = problem.upper_set.project(start[0]), problem.lower_set.project(start[1])
        half = torch.finfo(tree.common_dtype(y, "y0")).eps > 1e-10
        sizes = self._sizes(problem, x, y)
        chosen = min(self.scheme.default_penalty(sizes), FIRST * _resolution(y))
        steps = self.lower_steps or self.scheme.default_steps(problem)
        stays = self.penalty is not None and not self.scheme.scheduled
        known = replace(
            self,
            penalty=self.penalty or chosen,
            bias_rtol=self.bias_rtol or (math.inf if stays else 1e-2),
            lower_steps=steps,
            lower_curvature=sizes.largest,
            lower_condition=1.0 if problem.stochastic else self.lower_condition or sizes.largest / sizes.modulus,
            upper_curvature=max(sizes.upper, 1e-12 * sizes.largest),
            step_size=self._rule().resolve(x, problem.stochastic)
            if isinstance(self.step_size, PathEfficiency)
            else self.step_size,
            rtol=(1e-3 if half else 1e-5) if self.rtol is None else self.rtol,
            check_every=self.check_every or (50 if problem.stochastic else 20),
        )
        return replace(known, scheme=self.scheme.resolve(known, problem, sizes))

    def _sizes(self, problem: BilevelProblem, x: Tree, y: Tree) -> Sizes:
        """Measured, or as given."""
        given, condition, upper = self.lower_curvature, self.lower_condition, self.upper_curvature
        if given is not None and condition is not None and upper is not None:
            return Sizes(given, given / condition, upper)
        found = measure_sizes(problem, x, y)
        largest = given or found.largest
        smallest = found.smallest if condition is None else largest / condition
        return Sizes(largest, smallest, found.upper if upper is None else upper)

    def _rule(self) -> PathEfficiency:
        return self.step_size if isinstance(self.step_size, PathEfficiency) else PathEfficiency()

    def shrink(self, step: int) -> float:
        """Factor on the inner steps on minibatches."""
        return (1.0 + step / self.lower_decay) ** -0.5 if self.lower_decay is not None else 1.0

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
            extra=self.scheme.init(self, problem, x, y),
            penalty=zero + (self.penalty or 0.0),
            curvature=zero + (self.lower_curvature or 0.0),
            surrogate=zero + math.inf,
            first=zero.clone(),
            small=zero.clone(),
            gap=zero.clone(),
            bias=zero + math.inf,
            measured=zero.clone(),
            stages=[tree.clone((x, y)) for _ in range(STAGES)] if self.extrapolate else [],
            inner=init_minibatch(problem, base, self._rule()),
        )

    def step(self, problem: BilevelProblem, state: PenaltyState) -> Values:
        """Inner steps on z and y, one step of x."""
        assert self.rtol is not None
        full = not problem.stochastic
        move = self.scheme.step(self, problem, state)
        gap = state.gap if move.gap is None else 0.9 * state.gap + 0.1 * move.gap
        warm, x_next, rule = self._step_of_x(problem, state, move)
        residual = tree.norm(tree.sub(state.x, problem.upper_set.project(tree.sub(state.x, move.gradient))))
        updates = {"x": x_next, "y": move.y, "z": move.z, "extra": move.extra}
        flag = commit(state, state.inner, rule, updates, self._lost(move, gap))
        # A refused step must leave no trace: a momentum of 1e150 would last forever.
        state.inner.momentum = tree.where(flag, warm, tree.zeros_like(warm))
        state.gap = torch.where(flag, gap, 0.0)
        state.penalty = torch.where(flag, move.penalty, state.penalty)
        state.curvature = torch.where(torch.isfinite(move.curvature), move.curvature, state.curvature)
        state.surrogate = torch.where(flag, residual if move.drift is None else residual + move.drift, math.inf)
        if state.step == 0:
            state.first = residual
        reached = state.surrogate <= torch.clamp(self.rtol * state.first, min=self.atol)
        state.small = torch.where(reached, state.small + 1, 0.0)
        if full and not state.done and float(state.small) >= CONFIRM:
            self._settled(problem, state)
        shown = {"stationarity": state.surrogate, "step_length": state.inner.path.length, "penalty": state.penalty}
        return {**move.values, **shown}

    @staticmethod
    def _lost(move: Move, gap: Tensor) -> Tensor:
        """Whether y and z have lost track of x: z by the gap (where y = z nobody has), single loops by their drift."""
        lost = ~(gap >= 0)
        if move.gap is not None:
            lost = lost & (move.gap != 0)
        return lost if move.behind is None else lost | move.behind

    def _step_of_x(
        self, problem: BilevelProblem, state: PenaltyState, move: Move
    ) -> tuple[Tree, Tree, PathEfficiency | None]:
        """The next direction, the next x, and the rule that learns from the step."""
        length = move.length if move.length is not None else self.step_size
        if not isinstance(length, PathEfficiency):
            plain = problem.upper_set.project(tree.axpy(-length, move.gradient, state.x))
            return state.inner.momentum, plain, None
        warm = Momentum(decay=self.momentum).update(state.inner.momentum, move.gradient)
        return warm, normalised_step(problem, state.x, warm, state.inner.path.length), length

    def _settled(self, problem: BilevelProblem, state: PenaltyState) -> None:
        """x has come to rest at this penalty: raise it for the bias, then for the extrapolation, or be done."""
        state.small = torch.zeros_like(state.small)
        if state.growing and math.isfinite(self.bias_rtol or math.inf) and self._grow(problem, state):
            return
        state.growing = False
        if self.extrapolate and state.stage < STAGES:
            tree.copy_(state.stages[state.stage], (state.x, state.y))
            state.stage += 1
            _raise(state, 2.0)
            return
        state.done = True

    def _grow(self, problem: BilevelProblem, state: PenaltyState) -> bool:
        """Measure the bias; whether the run goes on with another penalty, or with the schedule."""
        assert self.bias_rtol is not None
        p = float(state.penalty)
        if self.scheme.scheduled and p < 1.5 * float(state.measured):
            return True
        found = measure(self._exact(problem, state, Oracle.full(problem, state.counts)), state.x)
        before, last, target = float(state.bias), state.measured, self.bias_rtol * found.scale
        state.bias, state.measured = torch.full_like(state.bias, found.bias), state.penalty.clone()
        enough = found.bias <= max(target, self.atol)
        if self.scheme.scheduled:
            return not enough
        factor = min(max(1.5 * found.bias / max(target, 1e-300), 2.0), 10.0, LAST * _resolution(state.y) / p)
        if found.bias > WORSE * before:
            state.penalty, state.growing = last, False
            return True
        if enough or found.bias > 0.7 * before or factor <= 1.0:
            return False
        _raise(state, factor)
        return True

    def _exact(self, problem: BilevelProblem, state: PenaltyState, oracle: Oracle) -> ExactPenalty:
        central = isinstance(self.scheme, F2BA) and self.scheme.central
        p = float(state.penalty)
        return ExactPenalty(problem, oracle, p, state.x, state.y, state.z, central=central)

    def terminate(self, problem: BilevelProblem, state: PenaltyState) -> Status:
        """On full data: the surrogate ``||x - P_X(x - G)||`` small for twenty steps at the last penalty; the report
        checks it again."""
        if not bool(state.finite):
            return Status.NONFINITE
        return Status.CONVERGED if state.done else Status.RUNNING

    def assess(self, problem: BilevelProblem, state: PenaltyState, status: Status) -> tuple[Accuracy, Status, str]:
        """Bias from a second penalty and from an independent hypergradient.

        On full data y is polished to the lower solution next to it. CONVERGED is confirmed only if G with both inner
        problems solved to rounding is still small, the two hypergradients agree up to the bias, and
        :func:`bilevel.verify` accepts the point where it is small enough to be asked.
        """
        if status.is_failure:
            return Accuracy(notes=("not measured after a numerical failure",)), status, status.value
        if problem.stochastic:
            return penalty_report.on_minibatches(self, problem, state, status)
        exact = self._exact(problem, state, Oracle.full(problem, new_counts()))
        return penalty_report.on_full_data(self, problem, state, status, exact)


def _raise(state: PenaltyState, factor: float) -> None:
    """Go on at a larger penalty."""
    state.penalty = state.penalty * factor
    state.gap = torch.zeros_like(state.gap)


def _resolution(y: Tree) -> float:
    """``1 / sqrt(eps)``."""
    return float(torch.finfo(tree.common_dtype(y)).eps) ** -0.5
