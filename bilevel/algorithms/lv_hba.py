"""LV-HBA: the proximal Lagrangian value function, in a single loop.

Source: W. Yao, C. Yu, S. Zeng, J. Zhang, "Constrained bi-level optimization: proximal Lagrangian value function
approach and Hessian-free algorithm", ICLR 2024 (arXiv 2401.16164).
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.algorithms.base import Algorithm, require_positive, require_positive_int
from bilevel.algorithms.lv_hba_report import FEASIBLE, Verdict, judge
from bilevel.algorithms.lv_hba_stages import Measured, Outcome, Stages
from bilevel.algorithms.lv_hba_state import Iterate, LVHBAState, Positions, Work
from bilevel.algorithms.minibatch import draw
from bilevel.anderson import Anderson
from bilevel.flat import FlatProblem
from bilevel.joint_projection import JointPoint
from bilevel.joint_scaling import by_variable, joint_curvature, row_weights, variable_lengths
from bilevel.lower_level import solve_lower_level
from bilevel.measure import draw_oracles
from bilevel.oracle import Oracle, new_counts
from bilevel.problem import BilevelProblem
from bilevel.solution import Accuracy
from implicit import Status, tree
from implicit.derivatives import value_and_gradient, value_and_gradients
from implicit.iterate import Values
from implicit.tree import Tree

STEEP = 1.5
"""A plain step is too long where the vector field changes by more than this over it: explicit steps need less than 2
on gradients and less than that on saddles."""
GENTLE = 0.5
RADIUS = 10.0
WIDER = 4.0
ROUNDING = 20.0
HALVINGS = 30
"""How often in a row steps are halved because their end is not finite before the run counts as failed."""


@dataclass(frozen=True, kw_only=True)
class LVHBA(Algorithm[LVHBAState]):
    """Gradient steps on the penalised proximal Lagrangian value function; first derivatives only.

    With F the upper objective, f the lower one and g <= 0, h = 0 the constraints of the lower level, the function

    .. math:: v(x, y, z) = \\min_{\\theta \\in Y} \\max_{\\lambda \\in Z} f(x, \\theta) + \\lambda^T g(x, \\theta)
        + \\|\\theta - y\\|^2 / 2\\gamma_1 - \\|\\lambda - z\\|^2 / 2\\gamma_2

    lies below f on C, the set of all (x, y) that satisfy the constraints of both levels, and touches it where y solves
    the lower level with the multipliers z. A step moves (theta, lambda) towards the saddle point (step eta), then
    (x, y) and z down the gradient of ``F / c + f - v`` (steps alpha, beta), with (x, y) projected onto C:

    .. math:: d_x &= \\nabla_x F / c + \\nabla_x f(x, y) - \\nabla_x f(x, \\theta) - \\nabla_x g(x, \\theta)^T \\lambda
        \\\\ d_y &= \\nabla_y F / c + \\nabla_y f(x, y) - (y - \\theta) / \\gamma_1
        \\\\ d_z &= -(\\lambda - z) / \\gamma_2

    Multipliers of equations may have either sign. That takes three backward passes and one projection, and no
    second-order product. The variables are measured in lengths in which the derivatives of all of them are about as
    large, the objectives divided by their curvatures, the rows by the lengths of their gradients, which decides whether
    the method converges; gamma, r, c and the steps are in these units, the solution and its multipliers are not.

    Beyond the paper: the step is a fixed-point map, which :class:`Anderson` acceleration speeds up; at the end of each
    stage c grows, from where the last two stages lead; the limit ``c -> inf`` is extrapolated from the last stages; r
    grows where multipliers reach it; steps shrink where the objectives have become steeper. At the end the lower level
    is solved once more at the extrapolated x and at the last one, and the better one that :func:`verify` accepts is the
    solution. Guarantee: BIAS, with the bias extrapolated away and the extrapolation error as tolerance.

    Minibatches: both terms of ``f(x, y) - f(x, theta)`` see the same batch, steps shrink, c grows with every step, and
    there is no acceleration, no extrapolation and no test for convergence, so that x keeps a bias of the order 1 / c.
    This form is an extension without a theory, tried on small problems only.

    Args:
        penalty: c_0; None means 1 on full data, 3 on minibatches.
        exponent: p in ``c_k = c_0 (k + 1)^p`` within a stage; None means 0 on full data, 0.45 on minibatches.
        growth: factor on c from stage to stage.
        stages: how many values of c are tried at most; None means 12 on full data (6 in float32), 1 on minibatches.
            Three at least are needed to converge.
        stage_steps: steps of a stage at most.
        proximal: gamma_1.
        dual_proximal: gamma_2.
        inner_step: eta; None means ``1.8 rho / (2 + max(1 / gamma_1, 1 / gamma_2))^2`` with
            ``rho = 1 / max(gamma_1, gamma_2)``.
        outer_step: alpha; None means ``0.2 / max(1, gamma_1, gamma_2)``.
        dual_step: beta; None means ``gamma_2 / 2``.
        radius: r, in scaled units, at the start.
        acceleration: memory of the acceleration; None means 20 on full data, 0 (the iteration of the paper) on
            minibatches.
        upper_curvature, lower_curvature: what F and f are divided by; None measures them at the start.
        lengths: units in which the leaves of x and then of y are measured, or one for all, ``(1.0,)``. None means
            :func:`bilevel.joint_scaling.variable_lengths` at the start, and (1.0,) for a ``joint_set``, and for sets
            that are no boxes where there are no constraint functions: projections onto them know no other units.
        decay: on minibatches the steps shrink by ``(1 + k / decay)^(-1/2)``; None keeps them.
        rtol: on the distance of the extrapolated (x, y) from that of the stage before, relative to ``1 + |(x, y)|``;
            None means 1e-4 (float32: 1e-2).
        atol: absolute tolerance on the same.
        check_every: steps between looks; None means 10 on full data, 50 on minibatches.

    Example:
        >>> import torch, bilevel
        >>> problem = bilevel.BilevelProblem(
        ...     upper=lambda x, y: x**2 / 2 + (y - 1) ** 2 / 2,
        ...     lower=lambda x, y: (y - 2) ** 2 / 2,
        ...     lower_inequality=lambda x, y: y - x,
        ... )
        >>> zero = torch.zeros((), dtype=torch.float64)
        >>> solution = bilevel.solve(problem, bilevel.LVHBA(), zero, zero)
        >>> round(float(solution.x), 4), round(float(solution.multipliers["lower_inequality"]), 4)
        (0.5, 1.5)
    """

    penalty: float | None = None
    exponent: float | None = None
    growth: float = 3.0
    stages: int | None = None
    stage_steps: int = 2_000
    proximal: float = 1.0
    dual_proximal: float = 1.0
    inner_step: float | None = None
    outer_step: float | None = None
    dual_step: float | None = None
    radius: float = RADIUS
    acceleration: int | None = None
    upper_curvature: float | None = None
    lower_curvature: float | None = None
    lengths: tuple[float, ...] | None = None
    decay: float | None = 2_000.0

    guarantee: ClassVar[str] = "BIAS"
    default_max_steps: ClassVar[int] = 20_000
    handles: ClassVar[frozenset[str]] = frozenset(
        {
            "upper_set",
            "lower_set",
            "lower_inequality",
            "lower_equality",
            "upper_inequality",
            "upper_equality",
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int(self, "stages", "stage_steps")
        require_positive(self, "penalty", "proximal", "dual_proximal", "inner_step", "outer_step", "dual_step")
        require_positive(self, "radius", "upper_curvature", "lower_curvature", "decay")
        if self.lengths is not None:
            if not isinstance(self.lengths, tuple):
                raise TypeError(f"lengths must be a tuple of numbers, such as (1.0,), got {self.lengths!r}")
            if not (self.lengths and all(0 < length < math.inf for length in self.lengths)):
                raise ValueError(f"lengths must be positive numbers, one or one for every leaf, got {self.lengths}")
        if self.exponent is not None and not 0 <= self.exponent < 0.5:
            raise ValueError(f"exponent must lie in [0, 0.5), got {self.exponent}")
        if not self.growth > 1:
            raise ValueError(f"growth must be greater than 1, got {self.growth}")
        if self.acceleration is not None and (not isinstance(self.acceleration, int) or self.acceleration < 0):
            raise ValueError(f"acceleration must be an integer of at least 0, got {self.acceleration!r}")

    def resolve(self, problem: BilevelProblem, *start: Any, max_steps: int | None = None) -> "LVHBA":
        """Measure the units of the variables and both objectives at the start, and pick step sizes."""
        half = torch.finfo(tree.common_dtype(start[1], "y0")).eps > 1e-10
        batches = problem.stochastic
        work = Work.of(problem, (start[0], start[1]), new_counts())
        flat, oracles = work.flat, draw_oracles(problem, new_counts())
        near = work.nearest(start[0], start[1])
        lengths = self.lengths or (variable_lengths(flat, near.x, near.y, oracles) if work.scalable else (1.0,))
        units = by_variable(flat, lengths)
        rho = 1.0 / max(self.proximal, self.dual_proximal)
        return replace(
            self,
            penalty=self.penalty or (3.0 if batches else 1.0),
            exponent=(0.45 if batches else 0.0) if self.exponent is None else self.exponent,
            stages=self.stages or (1 if batches else 6 if half else 12),
            inner_step=self.inner_step or 1.8 * rho / (2.0 + 1.0 / min(self.proximal, self.dual_proximal)) ** 2,
            outer_step=self.outer_step or 0.2 / max(1.0, self.proximal, self.dual_proximal),
            dual_step=self.dual_step or 0.5 * self.dual_proximal,
            acceleration=(0 if batches else 20) if self.acceleration is None else self.acceleration,
            lengths=lengths,
            upper_curvature=self.upper_curvature or joint_curvature(flat, "upper", near.x, near.y, oracles, units),
            lower_curvature=self.lower_curvature or joint_curvature(flat, "lower", near.x, near.y, oracles, units),
            rtol=(1e-2 if half else 1e-4) if self.rtol is None else self.rtol,
            check_every=self.check_every or (50 if batches else 10),
        )

    def init(self, problem: BilevelProblem, *start: Any, generator: torch.Generator | None = None) -> LVHBAState:
        """The start projected onto C, where the lower level is solved: y, theta and the multipliers begin there."""
        generator = generator or torch.Generator().manual_seed(0)
        origin = tree.clone((tree.detach(start[0]), tree.detach(start[1])))
        counts = new_counts()
        plain = Work.of(problem, origin, counts)
        near = plain.nearest(*origin)
        work = plain.measured(by_variable(plain.flat, self.lengths or (1.0,)))
        weights = row_weights(work.flat, near.x, near.y, work.lengths)
        point = self._start(work, weights, near)
        lam = point.split(work.sizes)[2]
        x, y = work.pair(point)
        zero = point.new_zeros(())
        reach = torch.cat([lam, lam.new_zeros(1)]).abs().amax()
        upper, lower = problem.upper_data, problem.lower_data
        return LVHBAState(
            x=tree.clone(work.flat.x_tree(x)),
            y=tree.clone(work.flat.y_tree(y)),
            generator=generator,
            counts=counts,
            origin=origin,
            point=point,
            accepted=point.clone(),
            lengths=work.lengths,
            weights=weights,
            duals=work.projection.start(),
            radius=torch.clamp(2.0 * reach, min=self.radius),
            damping=zero + 1.0,
            steepest=zero.clone(),
            seen=torch.zeros_like(point),
            motion=torch.zeros_like(point),
            comparable=zero > 0,
            surrogate=zero + math.inf,
            refused=zero.clone(),
            infeasible=near.status is Status.INFEASIBLE,
            anderson=self._anderson.init(point),
            stages=self._stages.init(point, self.penalty or 1.0),
            positions=Positions(
                upper_position=upper.init(generator) if upper is not None else None,
                lower_position=lower.init(generator) if lower is not None else None,
            ),
            work=work,
        )

    def _start(self, work: Work, weights: Tensor, near: JointPoint) -> Tensor:
        """A point in scaled units: y and theta are the lower solution at x, lambda and z its multipliers.

        Where that cannot be found y stays as it is, and the multipliers are zero.
        """
        flat, y, lam = work.flat, near.y, torch.zeros_like(weights)
        if near.status not in (Status.INFEASIBLE, Status.NONFINITE):
            found = solve_lower_level(flat, near.x, near.y)
            if found.status is Status.CONVERGED and flat.violation(near.x, found.y) <= FEASIBLE:
                duals = torch.cat([found.multipliers.inequality, found.multipliers.equality])
                y, lam = found.y.detach(), duals / (weights * (self.lower_curvature or 1.0))
        return torch.cat([torch.cat([near.x, y]) / work.lengths, y / work.lengths[flat.n :], lam, lam])

    @property
    def _anderson(self) -> Anderson:
        return Anderson(memory=self.acceleration or 0)

    @property
    def _stages(self) -> Stages:
        return Stages(
            growth=self.growth, count=self.stages or 1, steps=self.stage_steps, rtol=self.rtol or 0.0, atol=self.atol
        )

    def _work(self, problem: BilevelProblem, state: LVHBAState) -> Work:
        if state.work is None:
            state.work = Work.of(problem, state.origin, state.counts).measured(state.lengths)
        return state.work

    def step(self, problem: BilevelProblem, state: LVHBAState) -> Values:
        """One step of the paper, then the acceleration's choice of the next point."""
        work = self._work(problem, state)
        batches = problem.stochastic
        oracle = draw(problem, state, state.positions) if batches else work.flat.oracle  # type: ignore[arg-type]
        c = state.stages.penalty * (state.step - state.stages.began + 1) ** (self.exponent or 0.0)
        shrink = (1.0 + state.step / self.decay) ** -0.5 if batches and self.decay is not None else 1.0
        here = self._projected(work, state)
        image, values = self._image(work, oracle, state, here, c, state.damping * shrink)
        self._move(work, state, here, image, values, shrink, compare=not batches)
        if (state.step + 1) % (self.check_every or 1) == 0 and not batches:
            self._look(state)
        return {
            **values,
            "stationarity": state.surrogate,
            "penalty": c,
            "damping": state.damping,
            "radius": state.radius,
        }

    @staticmethod
    def _projected(work: Work, state: LVHBAState) -> Iterate:
        u, theta, lam, z = state.point.split(work.sizes)
        u, near = work.in_c(u, state.duals)
        state.duals = near.multipliers
        u_x, u_y = u.split([work.flat.n, work.flat.m])
        return Iterate(u_x, u_y, work.in_y(theta), work.in_z(lam, state.radius), work.in_z(z, state.radius))

    def _image(
        self, work: Work, oracle: Oracle, state: LVHBAState, here: Iterate, c: Tensor | float, shrink: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One iteration of the method, before projections."""
        assert self.inner_step and self.outer_step and self.dual_step
        eta, alpha, beta = shrink * self.inner_step, shrink * self.outer_step, shrink * self.dual_step
        theta_free, lam_free = self._saddle_step(work, oracle, state.weights, here, eta)
        theta, lam = work.in_y(theta_free), work.in_z(lam_free, state.radius)
        slack = ((theta - here.theta).square().sum() + (lam - here.lam).square().sum()) / eta**2
        there = replace(here, theta=theta, lam=lam)
        (d_x, d_y, d_z), values = self._directions(work, oracle, state.weights, there, c)
        values["slack"] = values["slack"] + slack
        image = torch.cat([here.x - alpha * d_x, here.y - alpha * d_y, theta_free, lam_free, here.z - beta * d_z])
        return image, values

    def _saddle_step(
        self, work: Work, oracle: Oracle, weights: Tensor, here: Iterate, eta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """theta and lambda one step on, both from the old point, not projected."""
        assert self.lower_curvature
        scale_lower = self.lower_curvature
        found: list[Tensor] = []

        def lagrangian(q: Tensor) -> Tensor:
            found.append(work.rows(weights, here.x, q))
            return work.lower(here.x, q, oracle) / scale_lower + here.lam @ found[-1]

        _, slope = value_and_gradient(lagrangian, here.theta)
        rows = found[0].detach()
        d_theta = slope + (here.theta - here.y) / self.proximal
        d_lam = -rows + (here.lam - here.z) / self.dual_proximal
        return here.theta - eta * d_theta, here.lam - eta * d_lam

    def _directions(
        self, work: Work, oracle: Oracle, weights: Tensor, here: Iterate, c: Tensor | float
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """What x, y and z move against, and values at the point; ``slack`` is what rounding does to the merit."""
        assert self.upper_curvature and self.lower_curvature
        scale_upper, scale_lower = self.upper_curvature, self.lower_curvature
        x, y, theta, lam, z = here.x, here.y, here.theta, here.lam, here.z
        parts: dict[str, Tensor] = {}

        def lagrangian(p: Tensor) -> Tensor:
            return work.lower(p, theta, oracle) / scale_lower + lam @ work.rows(weights, p, theta)

        def joint(p: Tensor, q: Tensor) -> Tensor:
            parts["upper_value"] = work.upper(p, q, oracle)
            parts["lower_value"] = work.lower(p, q, oracle) / scale_lower
            return parts["upper_value"] / scale_upper / c + parts["lower_value"]

        below, lagrangian_x = value_and_gradient(lagrangian, x)
        _, joint_x, joint_y = value_and_gradients(joint, x, y)
        d_x = joint_x - lagrangian_x
        d_y = joint_y - (y - theta) / self.proximal
        d_z = -(lam - z) / self.dual_proximal
        upper, lower = parts["upper_value"].detach(), parts["lower_value"].detach()
        gap = lower - below - (theta - y).square().sum() / (2 * self.proximal)
        gap = gap + (lam - z).square().sum() / (2 * self.dual_proximal)
        largest = torch.stack([upper / scale_upper / c, below, lower]).abs().amax()
        values = {
            "upper_value": upper,
            "gap": gap,
            "merit": upper / scale_upper / c + gap,
            "slack": ROUNDING * torch.finfo(x.dtype).eps * largest,
        }
        return (d_x, d_y, d_z), values

    def _move(
        self,
        work: Work,
        state: LVHBAState,
        here: Iterate,
        image: Tensor,
        values: dict[str, Tensor],
        shrink: float,
        *,
        compare: bool,
    ) -> None:
        """The next point: the acceleration's, or after a step that was too long the last good one, at half the step."""
        memory = state.anderson
        finite = torch.isfinite(image).all()
        steep = ~memory.extrapolated & (~finite | (self._steepness(state, here.flat, image) > STEEP) & compare)
        last = torch.where(memory.kept > 0, memory.images[-1] - memory.residuals[-1], state.point)
        proposed, refused = self._anderson.advance(memory, state.point, image, values["merit"], values["slack"])
        state.point = torch.where(steep, last, proposed)
        if compare:  # a bad minibatch says nothing about the steps
            state.damping = torch.where(steep, 0.5 * state.damping, state.damping)
        state.comparable = ~steep
        self._anderson.forget(memory, steep)
        state.refused = torch.where(finite, 0.0, state.refused + 1.0)
        state.finite = state.refused < HALVINGS
        state.accepted = torch.where(steep | refused, state.accepted, here.flat)
        x, y = work.pair(state.accepted)
        tree.copy_(state.x, work.flat.x_tree(x))
        tree.copy_(state.y, work.flat.y_tree(y))
        if self.outer_step is not None:
            state.surrogate = memory.norm / (self.outer_step * shrink * state.damping)
        reached = torch.cat([here.lam, here.z, state.radius.new_zeros(1)]).abs().amax() >= state.radius
        state.radius = torch.where(reached, WIDER * state.radius, state.radius)

    @staticmethod
    def _steepness(state: LVHBAState, here: Tensor, image: Tensor) -> Tensor:
        """How much the steps changed since the last evaluation, relative to the distance from there."""
        motion = image - here
        distance = torch.linalg.vector_norm(here - state.seen)
        rounding = 1e3 * torch.finfo(here.dtype).eps * (1.0 + torch.linalg.vector_norm(here))
        far = state.comparable & (distance > rounding)
        change = torch.linalg.vector_norm(motion - state.motion)
        ratio = torch.where(far, change / torch.where(far, distance, 1.0), 0.0)
        state.seen, state.motion = here, motion
        state.steepest = torch.maximum(state.steepest, ratio.nan_to_num(0.0, 0.0, 0.0))
        return ratio

    def _look(self, state: LVHBAState) -> None:
        """On the host, now and then: the next stage, longer steps again."""
        eps = float(torch.finfo(state.point.dtype).eps)
        image = state.anderson.images[-1]
        surrogate, merit, damping, steepest, c, size, pair = torch.stack(
            [
                state.surrogate,
                state.anderson.merit,
                state.damping,
                state.steepest,
                state.stages.penalty,
                torch.linalg.vector_norm(image),
                torch.linalg.vector_norm(state.accepted[: len(state.lengths)]),
            ]
        ).tolist()
        state.steepest = torch.zeros_like(state.steepest)
        tolerance = 0.01 * (self.rtol or 0.0) * (1.0 + pair) / c + ROUNDING * eps * (1.0 + size)
        everywhere = torch.ones_like(state.comparable)
        measured = Measured(residual=surrogate, tolerance=tolerance, merit=merit)
        moved = self._stages.look(
            state.stages, state.accepted, image, state.step + 1, state.lengths, tree.size(state.x), measured
        )
        if moved is not None:
            state.point = moved
        if moved is not None or (damping < 1.0 and steepest < GENTLE):
            state.damping = state.damping * (2.0 if damping < 1.0 and steepest < GENTLE else 1.0)
            state.comparable = ~everywhere
            self._anderson.forget(state.anderson, everywhere)

    def terminate(self, problem: BilevelProblem, state: LVHBAState) -> Status:
        """Where the stages ended; minibatch runs use their budget."""
        if state.infeasible:
            return Status.INFEASIBLE
        if not bool(state.finite):
            return Status.NONFINITE
        outcome = Outcome(state.stages.outcome)
        if outcome is Outcome.CONVERGED:
            return Status.CONVERGED
        return Status.RUNNING if outcome is Outcome.RUNNING else Status.STALLED

    def assess(self, problem: BilevelProblem, state: LVHBAState, status: Status) -> tuple[Accuracy, Status, str]:
        """Solve the lower level again at the extrapolated and at the last x, take the better one, verify it."""
        work = self._work(problem, state)
        flat = FlatProblem(problem, state.origin[0], state.origin[1])
        ends = self._ends(work, state)
        verdict = judge(
            flat,
            ends,
            status,
            stages=state.stages,
            rtol=self.rtol or 0.0,
        )
        state.verdict = verdict
        if verdict.response is not None:
            tree.copy_(state.x, flat.x_tree(verdict.response.x))
            tree.copy_(state.y, flat.y_tree(verdict.response.y))
        return verdict.accuracy, verdict.status, verdict.message

    def _ends(self, work: Work, state: LVHBAState) -> list[tuple[Tensor, Tensor]]:
        """The last point, and the extrapolated one."""
        flat = work.flat
        ends = [(flat.flat_x(state.x), flat.flat_y(state.y))]
        limit = self._stages.limit(state.stages)
        if limit is not None:
            near = work.projection.project(*work.pair(limit), state.duals)
            ends.insert(0, (near.x, near.y))
        return ends

    def multipliers(self, problem: BilevelProblem, state: LVHBAState) -> dict[str, Tree]:
        """Of the lower level at the solution, as :func:`constrained.solve` found them there."""
        verdict: Verdict | None = state.verdict
        return verdict.multipliers if verdict is not None else {}
