"""Penalties that grow on a schedule: F2SA and F3SA.

Source: Kwon, Kwon, Wright, Nowak, "A fully first-order method for stochastic bilevel optimization" (ICML 2023).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from bilevel.algorithms import penalty_storm
from bilevel.algorithms.base import require_positive
from bilevel.algorithms.penalty_scheme import (
    Move,
    PenaltyState,
    Scheme,
    Sizes,
    descend,
    draw_pair,
    hypergradient,
    penalised,
)
from bilevel.estimators import Storm
from bilevel.problem import BilevelProblem
from implicit import tree
from implicit.tree import Tree

if TYPE_CHECKING:
    from bilevel.algorithms.penalty import Penalty

Noise = Literal["none", "upper", "both"]


@dataclass(frozen=True, kw_only=True)
class F2SA(Scheme):
    """A penalty that grows with the step: ``gamma_k ~ k^-c``, ``alpha_k ~ k^-a``, ``lambda_k = gamma_k / (2 alpha_k)``.

    At step k, with ``s = 1 + k / offset``, ``gamma_k = s^-c / (2 L_g)`` and ``lambda_k = lambda_0 s^(a - c)`` (lambda_0
    is ``penalty``), T times

    .. math::
        z \\leftarrow z - \\gamma_k \\nabla_y g(x, z), \\quad
        y \\leftarrow y - \\alpha_k (\\nabla_y f(x, y) + \\lambda_k \\nabla_y g(x, y)),

    then ``x <- x - ratio alpha_k G`` (all projected). Steps and penalty are the paper's and depend on nothing measured
    after the start: there is no bias floor, but the steps of x shrink, so the last digits are slow.

    Args:
        noise: which levels are noisy, which sets the exponents (a, c): "both" (5/7, 4/7), "upper" (3/5, 2/5), "none"
            (1/3, 0); None looks at the declared batches.
        offset: k at which the schedule has begun to fall.
        ratio: xi; None means 1, or 0.3 at T = 1.
    """

    noise: Noise | None = None
    offset: float = 10.0
    ratio: float | None = None

    scheduled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)

    def refuses(self, settings: "Penalty") -> str | None:
        """Steps of x have a schedule of their own."""
        return _refuses_step_size(settings, "F2SA")

    def resolve(self, settings: "Penalty", problem: BilevelProblem, sizes: Sizes) -> "F2SA":
        """With noise and ratio."""
        ratio = self.ratio or (1.0 if (settings.lower_steps or 2) > 1 else 0.3)
        return replace(self, noise=self.noise or _find_noise(problem), ratio=ratio)

    def default_penalty(self, sizes: Sizes) -> float:
        """``max(1, 2 L_f / mu)``."""
        return _first_penalty(sizes)

    def default_steps(self, problem: BilevelProblem) -> int:
        """T = 10."""
        return 10

    def exponents(self) -> tuple[float, float]:
        """(a, c)."""
        return {"both": (5 / 7, 4 / 7), "upper": (3 / 5, 2 / 5), "none": (1 / 3, 0.0)}[self.noise or "both"]

    def init(self, settings: "Penalty", problem: BilevelProblem, x: Tree, y: Tree) -> dict[str, Tree]:
        """Nothing: x, y and z are all there is."""
        return {}

    def step(self, settings: "Penalty", problem: BilevelProblem, state: PenaltyState) -> Move:
        """T steps of z and y, then G at their ends."""
        assert settings.lower_steps is not None and self.ratio is not None
        gamma, alpha, p = _schedule(settings, state, self.offset, *self.exponents())
        x, y, z = state.x, state.y, state.z
        pair = draw_pair(settings, problem, state)
        for k in range(settings.lower_steps):
            pair = draw_pair(settings, problem, state) if k else pair
            z, _ = descend(problem, lambda q, o=pair.z: o.lower(x, q), z, gamma)
            y, _ = descend(problem, penalised(pair.y, x, p), y, alpha)
        if not settings.common_batches:
            pair = draw_pair(settings, problem, state)
        values, gradient = hypergradient(pair, x, y, z, p)
        return Move(
            y=y,
            z=z,
            gradient=gradient,
            values=values,
            curvature=state.curvature,
            penalty=p,
            length=self.ratio * alpha,
        )


@dataclass(frozen=True, kw_only=True)
class F3SA(Scheme):
    """F2SA as a single loop (T = 1), each of the six oracles replaced by a :class:`Storm` estimate.

    Args:
        noise: as in :class:`F2SA`, with exponents "both" (3/5, 2/5), "upper" (1/2, 1/4), "none" (1/3, 0).
        offset: k at which the schedule has begun to fall.
        ratio: xi.
        estimator: None means weights ``k^(-2c)``, which fall like gamma_k squared; on full data no momentum.
    """

    noise: Noise | None = None
    offset: float = 10.0
    ratio: float = 0.3
    estimator: Storm | None = None

    scheduled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)

    def refuses(self, settings: "Penalty") -> str | None:
        """One inner step, and steps of x with a schedule of their own."""
        return penalty_storm.refuses_loops(settings, "F3SA") or _refuses_step_size(settings, "F3SA")

    def resolve(self, settings: "Penalty", problem: BilevelProblem, sizes: Sizes) -> "F3SA":
        """With noise and estimator."""
        known = replace(self, noise=self.noise or _find_noise(problem))
        return replace(known, estimator=self.estimator or Storm(exponent=2.0 * known.exponents()[1]))

    def default_penalty(self, sizes: Sizes) -> float:
        """``max(1, 2 L_f / mu)``."""
        return _first_penalty(sizes)

    def default_steps(self, problem: BilevelProblem) -> int:
        """T = 1."""
        return 1

    def exponents(self) -> tuple[float, float]:
        """(a, c)."""
        return {"both": (3 / 5, 2 / 5), "upper": (1 / 2, 1 / 4), "none": (1 / 3, 0.0)}[self.noise or "both"]

    def init(self, settings: "Penalty", problem: BilevelProblem, x: Tree, y: Tree) -> dict[str, Tree]:
        """Six estimates and the previous iterate."""
        assert self.estimator is not None
        return penalty_storm.allocate(self.estimator, x, y)

    def step(self, settings: "Penalty", problem: BilevelProblem, state: PenaltyState) -> Move:
        """One step of z and y, then G at their ends."""
        assert self.estimator is not None
        storm, project = self.estimator, problem.lower_set.project
        gamma, alpha, p = _schedule(settings, state, self.offset, *self.exponents())
        point = (state.x, state.y, state.z)
        pair = draw_pair(settings, problem, state)
        inner = penalty_storm.estimate_inner(storm, state.extra, pair, point, state.step)
        z = project(tree.axpy(-gamma, inner["g_z"], state.z))
        y = project(tree.axpy(-alpha, tree.axpy(p, inner["g_y"], inner["f"]), state.y))
        if not settings.common_batches:
            pair = draw_pair(settings, problem, state)
        oracle = penalty_storm.OuterOracle(pair)
        outer = penalty_storm.estimate_outer(storm, state.extra, oracle, point, (y, z), state.step)
        return Move(
            y=y,
            z=z,
            gradient=penalty_storm.combine(p, outer),
            values=oracle.report(p),
            curvature=state.curvature,
            penalty=p,
            extra=penalty_storm.keep(storm, inner, outer, point),
            length=self.ratio * alpha,
        )


def _schedule(
    settings: "Penalty", state: PenaltyState, offset: float, a: float, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """gamma_k, alpha_k and ``lambda_k = gamma_k / (2 alpha_k)``."""
    assert settings.penalty is not None
    late = 1.0 + state.step / offset
    gamma = 0.5 / state.curvature * late**-c
    alpha = 0.25 / (state.curvature * settings.penalty) * late**-a
    return gamma, alpha, gamma / (2.0 * alpha)


def _first_penalty(sizes: Sizes) -> float:
    return max(1.0, 2.0 * sizes.upper / (sizes.largest if sizes.flat else sizes.modulus))


def _find_noise(problem: BilevelProblem) -> Noise:
    """Noise in the lower level reaches y and z and counts as both."""
    if problem.lower_data is not None and problem.lower_data.stochastic:
        return "both"
    return "upper" if problem.stochastic else "none"


def _check(scheme: F2SA | F3SA) -> None:
    require_positive(scheme, "offset", "ratio")
    if scheme.noise not in (None, "none", "upper", "both"):
        raise ValueError(f'noise must be "none", "upper", "both" or None, got {scheme.noise!r}')


def _refuses_step_size(settings: "Penalty", name: str) -> str | None:
    if not isinstance(settings.step_size, float | int):
        return None
    return (
        f"{name} takes the steps of x from its schedule; step_size = {settings.step_size} belongs to the others: "
        f"set {name}(ratio=...)"
    )
