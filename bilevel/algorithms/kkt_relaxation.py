"""The lower level replaced by its relaxed KKT system, solved as a nonlinear program over shrinking relaxations.

Sources: Scholtes, "Convergence properties of a regularization scheme for mathematical programs with complementarity
constraints", SIAM Journal on Optimization 11 (2001); for the cuts Mitsos, Lemonidis and Barton, "Global solution of
bilevel programs with a nonconvex inner program", Journal of Global Optimization 42 (2008).
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.algorithms.base import Algorithm
from bilevel.algorithms.kkt_checks import looks_convex, lower_scale, moves_with_x, require_third_derivatives
from bilevel.algorithms.kkt_relaxation_report import accuracy_of, conclusion, finished_starts
from bilevel.algorithms.kkt_relaxation_state import (
    BEGIN,
    CUT_SLACK,
    CUTS,
    FAILED,
    INFEASIBLE,
    PIECE,
    REJECTED,
    RELAX,
    SAME_PATH,
    TOLERANCE,
    UNBOUNDED,
    VERIFIED,
    WORSE,
    KKTRelaxationState,
)
from bilevel.algorithms.kkt_relaxation_unbounded import look
from bilevel.algorithms.relaxed_kkt import Outcome, RelaxedKKT, solve_program
from bilevel.algorithms.start_points import start_box
from bilevel.flat import FlatProblem
from bilevel.lower_level import solve_lower_level
from bilevel.problem import BilevelProblem
from bilevel.solution import Accuracy, Start
from bilevel.verify import STARTS, verify, verify_flat
from constrained.multipliers import FlatMultipliers
from implicit import Status, tree
from implicit.iterate import Values
from implicit.tree import Tree

LIMIT = 500
"""Unknowns of the nonlinear program; its matrices of third derivatives are dense."""
ROUNDS = 5
"""Times that one start may go on with a cut more."""
CONVEX_RESTARTS, RESTARTS = 5, 9
POLISH = 1e-5
"""The largest relaxation from which the active set is read off."""
SHARPER = 1e-2
"""The last program is solved to this fraction of the tolerance, if it can be: where a constraint holds without force,
the error of a point is the square root of the residual."""
FLIPS = 20
"""Pairs that one path turns over; every one lowers f, or is settled."""
INNER_STEPS, INNER_STEPS_OF_RESTARTS = 300, 150
LOOKS = 2
"""Ends of programs of one start where it is looked whether f has a lower bound."""
LOWER_STEPS = 200
LARGEST = 1e6
"""Starting multipliers beyond this are cut off."""


@dataclass(frozen=True, kw_only=True)
class KKTRelaxation(Algorithm[KKTRelaxationState]):
    """Solve the lower optimality conditions and the upper level as one nonlinear program, for small declared problems.

    The lower level is replaced by its KKT system. For each inequality and bound, multiplier and slack are at least zero
    and their product is at most t (Scholtes 2001); :class:`constrained.InteriorPoint` solves the program for a
    decreasing sequence of t, each from the end of the one before. From ``t <= 1e-5`` on, what is active is read off,
    and a last program with exact complementarity, one side of each pair fixed at zero, gives the final point. Where
    both sides of a pair are zero and its multiplier promises descent, the pair is turned over, and it is solved again.
    CONVERGED is not claimed where such a promise was not looked into.

    One step of the run is one such program. The given start comes first, with the multipliers of the lower level
    solved at x0, then random ones, uniform in the box that bounds and affine constraints leave, or around the given
    start. Ends that are better than the best so far are checked by :func:`bilevel.verify`; the best accepted one is the
    solution, and :attr:`Solution.starts` reports all. A start is given up as soon as it has met the path of another or
    its relaxed value is no better than the best.

    KKT points of a nonconvex lower level need not be lower minima. Where verification finds a better y', the program is
    solved again with ``g(x, y) <= g(x, y')``. That cut is kept for all starts if the lower feasible set does not depend
    on x (it is valid then), and for the one start otherwise; ``(x, y')`` becomes one more start.

    CONVERGED says: all starts are done, the best point is accepted by :func:`bilevel.verify` at 1e-6, and the KKT
    residual of its program is within the tolerance. That is a local solution; more ``restarts`` look further.
    UNBOUNDED says: f is 1e6 times as deep as it was large at the point returned, which verify accepts, and it falls on
    over points with exact complementarity until they are 1e12 times as far out, or f is 1e28 times as deep.
    Guarantee: EXACT where it converges.

    Args:
        restarts: random starts besides the given one; None means 5 where the lower level looks convex in y, 9 else.
        relaxation: the first t.
        decrease: what t is multiplied by.
        smallest: the last t, used where no active set can be read off before.
        rtol: tolerance on the :class:`constrained.KKTResidual` of the programs, which is relative by itself; None means
            1e-8.
        atol: the same; the larger one counts.
        check_every: steps between looks; None means 1.

    Raises:
        ValueError: if a setting is out of range; and from ``solve`` for minibatches, numbers other than float64, more
            than 500 unknowns (x, y and the lower multipliers together), and lower functions that torch cannot
            differentiate three times.

    Example:
        >>> import torch, bilevel
        >>> problem = bilevel.BilevelProblem(
        ...     upper=lambda x, y: ((x - 3) ** 2 + y**2).sum(),
        ...     lower=lambda x, y: ((y - 1) ** 2).sum(),
        ...     lower_inequality=lambda x, y: y - x,
        ... )
        >>> start = torch.zeros(1, dtype=torch.float64)
        >>> found = bilevel.solve(problem, bilevel.KKTRelaxation(), start, start)
        >>> found.success, round(float(found.x), 4), round(float(found.y), 4)
        (True, 3.0, 1.0)
    """

    restarts: int | None = None
    relaxation: float = 0.1
    decrease: float = 1e-2
    smallest: float = 1e-10

    guarantee: ClassVar[str] = "EXACT"
    handles: ClassVar[frozenset[str]] = frozenset(
        {"upper_set", "lower_set", "lower_inequality", "lower_equality", "upper_inequality", "upper_equality"}
    )
    default_max_steps: ClassVar[int] = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        restarts = self.restarts
        if restarts is not None and (not isinstance(restarts, int) or isinstance(restarts, bool) or restarts < 0):
            raise ValueError(f"restarts must be None or an integer >= 0, got {restarts!r}")
        if not 0 < self.decrease < 1:
            raise ValueError(f"decrease must lie in (0, 1), got {self.decrease!r}")
        if not 0 < self.smallest <= self.relaxation < math.inf:
            raise ValueError(
                f"0 < smallest <= relaxation must hold, got smallest={self.smallest!r} and "
                f"relaxation={self.relaxation!r}"
            )

    def refuses(self, problem: BilevelProblem) -> str | None:
        """Minibatches have no KKT system."""
        for level in ("upper", "lower"):
            data = getattr(problem, f"{level}_data")
            if data is not None and data.stochastic:
                return (
                    f"KKTRelaxation needs the exact functions, and {level}_data draws minibatches: leave batch_size "
                    "out, or use Penalty or LVHBA"
                )
        return super().refuses(problem)

    def resolve(self, problem: BilevelProblem, *start: Any, max_steps: int | None = None) -> "KKTRelaxation":
        """Fill in the tolerance and the number of starts, and refuse what is too large or not smooth."""
        x, y = start
        for name, point in (("x0", x), ("y0", y)):
            dtype = tree.common_dtype(point, name)
            if dtype != torch.float64:
                raise ValueError(
                    f"{name} is {dtype}: KKTRelaxation follows products down to {self.smallest:.0e}, which needs "
                    "float64; convert both starts and the data with .double()"
                )
        flat = FlatProblem(problem, x, y)
        kkt = RelaxedKKT(flat, 1.0)
        if kkt.size > LIMIT:
            raise ValueError(
                f"x, y and the lower multipliers are {kkt.size} unknowns, above the limit of {LIMIT}: KKTRelaxation "
                "forms dense matrices of third derivatives. Use LVHBA or Penalty, or ImplicitGradient where the lower "
                "level is unconstrained"
            )
        origin = torch.cat([flat.flat_x(x), flat.flat_y(y)])
        require_third_derivatives(kkt, origin)
        restarts = self.restarts
        if restarts is None:
            restarts = CONVEX_RESTARTS if looks_convex(flat, origin) else RESTARTS
        return replace(
            self, restarts=restarts, rtol=1e-8 if self.rtol is None else self.rtol, check_every=self.check_every or 1
        )

    @property
    def tolerance(self) -> float:
        """On KKT residuals."""
        assert self.rtol is not None
        return max(self.atol, self.rtol)

    def init(
        self, problem: BilevelProblem, *start: Any, generator: torch.Generator | None = None
    ) -> KKTRelaxationState:
        """Room for the unknowns and everything that is kept of them; nothing is solved yet."""
        x, y = tree.clone(start[0]), tree.clone(start[1])
        flat = FlatProblem(problem, x, y)
        origin = torch.cat([flat.flat_x(x), flat.flat_y(y)])
        kkt = RelaxedKKT(flat, lower_scale(flat, origin))
        zeros = origin.new_zeros
        lower, upper = flat.lower_level, flat.upper_level
        own = generator or torch.Generator().manual_seed(0)
        assert self.restarts is not None
        stages = 1 + math.ceil(math.log(self.smallest / self.relaxation) / math.log(self.decrease))
        state = KKTRelaxationState(
            x=x,
            y=y,
            generator=own,
            seed=int(torch.randint(2**31, (), generator=own)),
            counts=flat.counts,
            origin=origin,
            scale=kkt.scale,
            fixed=not moves_with_x(flat, origin),
            point=zeros(kkt.size),
            equality=zeros(flat.m + lower.equalities + upper.equalities),
            inequality=zeros(upper.inequalities + lower.inequalities + kkt.pairs + CUTS),
            below=zeros(kkt.size),
            above=zeros(kkt.size),
            active=torch.zeros(kkt.pairs, dtype=torch.bool, device=origin.device),
            candidate=zeros(kkt.size),
            sides=torch.zeros(kkt.pairs, dtype=torch.bool, device=origin.device),
            promises=zeros(kkt.pairs),
            upper_duals=_no_duals(kkt),
            cuts=zeros(CUTS, flat.m),
            extra=zeros(CUTS, len(origin)),
            trail=zeros(stages * (1 + self.restarts + CUTS) * (1 + ROUNDS), len(origin)),
            best=zeros(kkt.size),
            best_upper_duals=_no_duals(kkt),
            least=origin.clone(),
        )
        state.kkt = kkt
        return state

    def _kkt(self, problem: BilevelProblem, state: KKTRelaxationState) -> RelaxedKKT:
        if state.kkt is None:
            flat = FlatProblem(problem, state.x, state.y)
            flat.counts = flat.oracle.counts = state.counts
            state.kkt = RelaxedKKT(flat, state.scale)
        return state.kkt

    def step(self, problem: BilevelProblem, state: KKTRelaxationState) -> Values:
        """One nonlinear program of one start."""
        kkt = self._kkt(problem, state)
        if state.phase == BEGIN:
            self._begin(kkt, state)
        index, relaxed = state.index, state.phase == RELAX
        t = state.relaxation if relaxed else 0.0
        if relaxed:
            program = kkt.relaxed(t, state.used_cuts, CUT_SLACK)
        else:
            program = kkt.piece(state.active, state.used_cuts, CUT_SLACK)
        outcome = solve_program(
            program,
            state.point,
            self._multipliers_at(state) if relaxed else None,
            atol=self.tolerance if relaxed else SHARPER * self.tolerance,
            max_steps=INNER_STEPS if state.index == 0 else INNER_STEPS_OF_RESTARTS,
            time_limit=_left(state),
        )
        value = kkt.value(outcome.z)
        if outcome.status is Status.TIME_LIMIT or self._falls(kkt, state, outcome):
            pass  # the run ends here; out of time it would solve this program again if it is resumed
        elif relaxed:
            self._after_relaxed(kkt, state, outcome, value)
        else:
            self._after_piece(kkt, state, outcome, value)
        return {
            "upper_value": value,
            "relaxation": t,
            "residual": outcome.residual.largest,
            "feasibility": outcome.residual.feasibility,
            "start": float(index),
            "cuts": float(state.cut_count),
            "inner_steps": float(outcome.steps),
        }

    def _multipliers_at(self, state: KKTRelaxationState) -> FlatMultipliers | None:
        if not state.known:
            return None
        rows = len(state.inequality) - CUTS + state.cut_count
        return FlatMultipliers(state.equality, state.inequality[:rows], state.below, state.above)

    def _begin(self, kkt: RelaxedKKT, state: KKTRelaxationState) -> None:
        """The next start: the given one, random ones, and those found on the way."""
        assert self.restarts is not None
        flat = kkt.flat
        if state.index == 0:
            both = state.origin
        elif state.index <= self.restarts:
            if state.box is None:
                state.box = start_box(flat, state.origin)
            both = state.box.draw(state.index, state.seed)
        else:
            both = state.extra[state.index - self.restarts - 1]
        if not state.fixed:
            state.cut_count = 0
        state.rounds = state.looks = 0
        wide = state.index <= self.restarts and state.index % 2 == 0
        self._from(kkt, state, both[: flat.n], both[flat.n :], self.relaxation if wide else self._narrow)

    @property
    def _narrow(self) -> float:
        """The first relaxation where the neighbourhood of a start is to be kept: with the largest, paths meet."""
        return max(self.relaxation * self.decrease, self.smallest)

    def _from(self, kkt: RelaxedKKT, state: KKTRelaxationState, x: Tensor, y: Tensor, relaxation: float) -> None:
        """Begin at x and the lower solution next to y, with its multipliers."""
        found = solve_lower_level(kkt.flat, x, y, max_steps=LOWER_STEPS)
        point = kkt.join(x, found.y, found.multipliers)
        if not bool(torch.isfinite(point).all()):
            point = kkt.join(x, y, FlatMultipliers(*(torch.zeros_like(v) for v in found.multipliers)))
        duals = slice(kkt.flat.n + kkt.flat.m, None)
        point[duals] = point[duals].clamp(-LARGEST, LARGEST)
        self._restart_at(state, point, relaxation)

    def _restart_at(self, state: KKTRelaxationState, point: Tensor, relaxation: float) -> None:
        state.point, state.known, state.phase = point, False, RELAX
        state.relaxation, state.reached, state.relaxed_value, state.flips = relaxation, 0.0, -math.inf, 0
        state.candidate_value = math.inf

    def _falls(self, kkt: RelaxedKKT, state: KKTRelaxationState, outcome: Outcome) -> bool:
        """Whether f has no lower bound next to where a program ended; if so, that is the end of the run."""
        if not outcome.fell or state.looks >= LOOKS:
            return False
        state.looks += 1
        found = look(kkt, state, outcome, atol=self.tolerance, time_limit=_left(state))
        if found is None:
            return False
        at = kkt.split(found[0])
        state.best_value, state.verification = -math.inf, found[1]
        tree.copy_(state.x, kkt.flat.x_tree(at.x))
        tree.copy_(state.y, kkt.flat.y_tree(at.y))
        self._end(state, Status.UNBOUNDED, kkt.value(found[0]), UNBOUNDED)
        return True

    def _after_relaxed(self, kkt: RelaxedKKT, state: KKTRelaxationState, outcome: Outcome, value: float) -> None:
        if not outcome.usable:
            if state.reached:
                state.relaxation = self.smallest
                self._begin_piece(kkt, state)
            else:
                self._fail(kkt, state, outcome, value)
            return
        state.point, state.known = outcome.z, True
        state.reached, state.relaxed_value, state.relaxed_residual = state.relaxation, value, outcome.residual.largest
        state.equality, state.below, state.above = outcome.multipliers.equality, *outcome.multipliers[2:]
        rows = outcome.multipliers.inequality
        state.inequality[: len(rows)] = rows
        if self._no_better(state, value):
            self._end(state, outcome.status, value, WORSE)
        elif state.met():
            self._end(state, outcome.status, value, SAME_PATH)
        elif self._last(state) or state.relaxation <= POLISH < state.relaxation / self.decrease:
            self._begin_piece(kkt, state)
        else:
            state.relaxation *= self.decrease

    def _last(self, state: KKTRelaxationState) -> bool:
        """Whether this is the smallest relaxation."""
        return state.relaxation * self.decrease < 0.99 * self.smallest

    def _begin_piece(self, kkt: RelaxedKKT, state: KKTRelaxationState) -> None:
        multipliers, slacks = kkt.pairs_at(state.point)
        state.active = multipliers > slacks
        state.phase = PIECE

    def _after_piece(self, kkt: RelaxedKKT, state: KKTRelaxationState, outcome: Outcome, value: float) -> None:
        solved = outcome.usable and outcome.residual.largest <= self.tolerance
        near = value <= state.relaxed_value + 10.0 * state.reached**0.5 * max(1.0, abs(value))
        least = state.candidate_value - self.tolerance * max(1.0, abs(value)) * (state.flips > 0)
        if solved and value < least and (near or state.flips):
            state.candidate, state.candidate_value = outcome.z, value
            state.candidate_residual = outcome.residual.largest
            state.upper_duals = kkt.upper_multipliers(outcome.multipliers)
            state.sides, state.promises = state.active, kkt.promises(outcome, state.active)
        elif solved and state.flips:
            state.promises[state.turned] = 0.0  # there f does not fall
        if math.isfinite(state.candidate_value):
            if bool((state.promises < 0).any()) and state.flips < FLIPS and (solved or not state.flips):
                self._turn(state)
            else:
                self._judge(kkt, state, 0.0)
        elif not self._last(state):
            state.relaxation *= self.decrease
            state.phase = RELAX
        else:
            state.candidate, state.candidate_value = state.point, state.relaxed_value
            state.candidate_residual, state.promises = state.relaxed_residual, torch.zeros_like(state.promises)
            duals = FlatMultipliers(state.equality, state.inequality, state.below, state.above)
            state.upper_duals = kkt.upper_multipliers(duals)
            self._judge(kkt, state, state.reached)

    def _turn(self, state: KKTRelaxationState) -> None:
        """Go on from the candidate with the pair turned over that promises most."""
        state.turned, state.flips = int(state.promises.argmin()), state.flips + 1
        state.point, state.active = state.candidate, state.sides.clone()
        state.active[state.turned] = ~state.active[state.turned]

    def _judge(self, kkt: RelaxedKKT, state: KKTRelaxationState, relaxation: float) -> None:
        """What becomes of the end of a path."""
        value, at = state.candidate_value, kkt.split(state.candidate)
        if self._no_better(state, value):
            self._end(state, Status.CONVERGED, value, WORSE)
            return
        x, y = kkt.flat.x_tree(at.x), kkt.flat.y_tree(at.y)
        found = verify_flat(kkt.flat, at.x, at.y, TOLERANCE, STARTS, torch.Generator().manual_seed(0))
        if found.accepted:
            state.best, state.best_value = state.candidate, value
            state.best_residual, state.best_relaxation = state.candidate_residual, relaxation
            state.best_upper_duals, state.unexplored = state.upper_duals, bool((state.promises < 0).any())
            state.verification = found
            tree.copy_(state.x, x)
            tree.copy_(state.y, y)
            self._end(state, Status.CONVERGED, value, VERIFIED)
            return
        state.said = found.reasons[0]
        if found.better_y is None or state.cut_count >= CUTS or state.rounds >= ROUNDS:
            self._end(state, Status.STALLED, value, REJECTED)
            return
        better = kkt.flat.flat_y(found.better_y)
        if state.extra_count < CUTS:
            state.extra[state.extra_count] = torch.cat([at.x, better])
            state.extra_count += 1
        state.cuts[state.cut_count] = better
        state.cut_count, state.rounds = state.cut_count + 1, state.rounds + 1
        self._restart_at(state, state.candidate, self._narrow)

    def _no_better(self, state: KKTRelaxationState, value: float) -> bool:
        return value >= state.best_value - TOLERANCE * max(1.0, abs(state.best_value))

    def _fail(self, kkt: RelaxedKKT, state: KKTRelaxationState, outcome: Outcome, value: float) -> None:
        """Where not even the first program could be solved: how near to feasible is its end?"""
        at, flat = kkt.split(outcome.z), kkt.flat
        infeasible = outcome.status is Status.INFEASIBLE
        if bool(torch.isfinite(outcome.z).all()):
            lower = solve_lower_level(flat, at.x, at.y, max_steps=LOWER_STEPS)
            y = lower.y if bool(torch.isfinite(lower.y).all()) else at.y
            violation = flat.violation(at.x, y)
            # A lower level without multipliers has a program without solutions, although it has some itself.
            infeasible = infeasible and not violation <= TOLERANCE
            if violation < state.least_violation:
                state.least, state.least_violation = torch.cat([at.x, y]), violation
                if not math.isfinite(state.best_value):
                    tree.copy_(state.x, flat.x_tree(at.x))
                    tree.copy_(state.y, flat.y_tree(y))
        self._end(state, outcome.status, value, INFEASIBLE if infeasible else FAILED)

    def _end(self, state: KKTRelaxationState, status: Status, value: float, outcome: int) -> None:
        state.statuses.append(list(Status).index(status))
        state.values.append(value)
        state.outcomes.append(outcome)
        state.index, state.phase = state.index + 1, BEGIN

    def terminate(self, problem: BilevelProblem, state: KKTRelaxationState) -> Status:
        """After the last start: from what the verified, or the least infeasible point is worth."""
        assert self.restarts is not None
        if state.best_value == -math.inf:
            return Status.UNBOUNDED
        if state.index <= self.restarts + state.extra_count:
            return Status.RUNNING
        if math.isfinite(state.best_value):
            solved = state.best_residual <= self.tolerance and not state.unexplored
            return Status.CONVERGED if solved else Status.STALLED
        return Status.INFEASIBLE if all(v == INFEASIBLE for v in state.outcomes) else Status.STALLED

    def multipliers(self, problem: BilevelProblem, state: KKTRelaxationState) -> dict[str, Tree]:
        """At the best point: of the lower level, and those of the upper constraints in the last program."""
        if not math.isfinite(state.best_value):
            return {}
        kkt = self._kkt(problem, state)
        named: dict[str, Tree] = {}
        for level, found in (("upper", state.best_upper_duals), ("lower", kkt.multipliers(state.best))):
            for name, value in kkt.flat.multipliers(
                found.inequality, found.equality, found.lower, found.upper, level
            ).items():
                # Rows of a lower function may belong to both levels, each has zeros in those of the other.
                named[name] = tree.add(named[name], value) if name in named else value
        return named

    def starts(self, problem: BilevelProblem, state: KKTRelaxationState) -> tuple[Start, ...]:
        """One entry per finished start."""
        assert self.restarts is not None
        return finished_starts(state, self.restarts)

    def assess(
        self, problem: BilevelProblem, state: KKTRelaxationState, status: Status
    ) -> tuple[Accuracy, Status, str]:
        """Verification of the end point, and what became of the starts."""
        found = state.verification or verify(problem, state.x, state.y, tolerance=TOLERANCE)
        return accuracy_of(found), *conclusion(self._kkt(problem, state).flat, state, found, status)


def _left(state: KKTRelaxationState) -> float | None:
    """Seconds of the time limit."""
    return None if state.deadline is None else state.deadline - time.perf_counter()


def _no_duals(kkt: RelaxedKKT) -> FlatMultipliers:
    upper, zeros = kkt.flat.upper_level, kkt.flat.upper_level.lower.new_zeros
    return FlatMultipliers(zeros(upper.equalities), zeros(upper.inequalities), zeros(kkt.flat.n), zeros(kkt.flat.n))
