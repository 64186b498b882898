"""Breaks one line of KKTRelaxation at a time and asserts that a small problem with a known solution notices."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar

import bilevel
import constrained
from bilevel import BilevelProblem, Status
from bilevel.algorithms import kkt_relaxation
from implicit import Run, tree
from implicit.iterate import iterate
from tests.mutation import mutated

ALGORITHM = "bilevel.algorithms.kkt_relaxation"
PROGRAM = "bilevel.algorithms.relaxed_kkt"

Check = Callable[[Any], None]


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def nearest(upper: Any, scale: float = 1.0, **more: Any) -> BilevelProblem:
    """Below: the y nearest to x that the constraints allow."""
    return BilevelProblem(upper=upper, lower=lambda x, y: scale * 0.5 * ((y - x) ** 2).sum(), **more)


def solved(method: Any, problem: BilevelProblem, x: torch.Tensor, y: torch.Tensor) -> bilevel.Solution:
    """By three relaxed programs and one piece: later ones make good for many mistakes."""
    found = bilevel.solve(problem, method(restarts=0), x, y, max_steps=4)
    assert found.status is Status.CONVERGED, found.message
    assert [entry["relaxation"] for entry in found.history] == pytest.approx([1e-1, 1e-3, 1e-5, 0.0])
    return found


def near(a: Any, b: torch.Tensor, tolerance: float = 1e-7) -> None:
    assert float(tree.max_abs(tree.sub(a, b))) <= tolerance


def row(method: Any) -> None:
    """y = max(x, 0); f pulls x to -1 and y to 1. With y free, or with a wrong multiplier, it would go elsewhere."""
    problem = nearest(lambda x, y: ((x + 1) ** 2 + 0.25 * (y - 1) ** 2).sum(), lower_inequality=lambda x, y: -y)
    found = solved(method, problem, vector(-0.5), vector(0.5))
    near(found.x, vector(-1.0))
    near(found.y, vector(0.0))
    near(found.multipliers["lower_inequality"], vector(1.0))


def slack(method: Any) -> None:
    """y = max(x, 0); f would have y above x, which y (y - x) <= t allows up to t."""
    problem = nearest(lambda x, y: ((x - 1) ** 2 + (y - 2) ** 2).sum(), lower_inequality=lambda x, y: -y)
    found = solved(method, problem, vector(1.0), vector(1.0))
    near(found.x, vector(1.5))
    near(found.multipliers["lower_inequality"], vector(0.0), 1e-9)
    for entry in found.history[:3]:
        t = entry["relaxation"]
        best = minimize_scalar(
            lambda y, t=t: (y - t / y - 1) ** 2 + (y - 2) ** 2, (1.0, 1.5, 2.0), options={"xtol": 1e-12}
        )
        assert entry["upper_value"] == pytest.approx(float(best.fun), abs=1e-7)


def sign(method: Any) -> None:
    """y = max(x, 0); f would have y below x, which a negative multiplier allows."""
    problem = nearest(lambda x, y: ((x - 1) ** 2 + y**2).sum(), lower_inequality=lambda x, y: -y)
    near(solved(method, problem, vector(1.0), vector(1.0)).x, vector(0.5))


def equation(method: Any) -> None:
    """y1 + y2 = x makes y = (x + (1, -1)) / 2, its multiplier is -x / 2; f is smallest at x = 5/3."""
    problem = BilevelProblem(
        upper=lambda x, y: ((x - 2) ** 2).sum() + (y[0] - 0.75) ** 2 + (y[1] - 0.25) ** 2,
        lower=lambda x, y: 0.5 * (y**2).sum() - 0.5 * (y[0] - y[1]),
        lower_equality=lambda x, y: y.sum() - x[0],
    )
    found = solved(method, problem, vector(0.3), vector(0.0, 0.0))
    near(found.x, vector(5 / 3))
    near(found.y, vector(4 / 3, 1 / 3))
    near(found.multipliers["lower_equality"], torch.tensor(-5 / 6))


def bounds(method: Any) -> None:
    """y = x clipped to [0, 1]; f pulls y inside and x outside, more strongly."""
    target = vector(-1.0, 2.0)
    problem = nearest(
        lambda x, y: ((x - target) ** 2).sum() + ((y - 0.5) ** 2).sum(), lower_set=constrained.Box(0.0, 1.0)
    )
    found = solved(method, problem, vector(-0.5, 1.5), vector(0.5, 0.5))
    near(found.x, target)
    near(found.y, vector(0.0, 1.0))
    near(found.multipliers["lower_set"], vector(-1.0, 1.0))


def scaled(method: Any) -> None:
    """The row's multiplier is that of the lower objective as declared: 1e6 (y - x)."""
    problem = nearest(lambda x, y: ((x + 1) ** 2 + y**2).sum(), 1e6, lower_inequality=lambda x, y: -y)
    found = solved(method, problem, vector(-0.5), vector(0.5))
    near(found.multipliers["lower_inequality"], vector(1e6), 1.0)


def above(method: Any) -> None:
    """F = 2 |x - 1|^2, and an upper row and an upper equation."""
    problem = nearest(
        lambda x, y: ((x - 1) ** 2 + (y - 1) ** 2).sum(),
        lower_inequality=lambda x, y: -y,
        upper_inequality=lambda x, y: x[:1] - 0.5,
        upper_equality=lambda x, y: 2 * (x[1:] + y[1:]) - 6,
    )
    found = solved(method, problem, vector(0.25, 0.25), vector(1.0, 1.0))
    near(found.x, vector(0.5, 1.5))
    near(found.multipliers["upper_inequality"], vector(2.0))
    near(found.multipliers["upper_equality"], vector(-0.5))


def wells(method: Any) -> None:
    """g = x y^2 / 2 - y^3 / 3 over [-1, 1]: KKT points at y = -1 have f = -2, but the lower minimum there is 1."""
    problem = BilevelProblem(
        upper=lambda x, y: (x + y).sum(),
        lower=lambda x, y: (0.5 * x * y**2 - y**3 / 3).sum(),
        upper_set=constrained.Box(-1.0, 1.0),
        lower_set=constrained.Box(-1.0, 1.0),
    )
    found = bilevel.solve(problem, method(restarts=0), vector(0.0), vector(-0.9), max_steps=12)
    assert found.status is Status.CONVERGED
    assert found.upper_value == pytest.approx(0.0, abs=1e-6)
    assert max(entry["cuts"] for entry in found.history) == 1  # one cut is enough


def turned(method: Any) -> None:
    """From the piece y = 0 of y = max(x, 0), f = |x - 1|^2 + |y|^2 falls beyond the kink in both entries."""
    problem = nearest(lambda x, y: ((x - 1) ** 2 + y**2).sum(), lower_inequality=lambda x, y: -y)
    start = vector(-1.0, -1.0), vector(0.0, 0.0)
    resolved = method(restarts=0).resolve(problem, *start)
    state = resolved.init(problem, *start)
    state.point, state.active = torch.cat([*start, vector(1.0, 1.0)]), torch.tensor([True, True])
    state.phase, state.relaxed_value = "piece", math.inf
    run = iterate(resolved, problem, Run(state), max_steps=10)
    assert run.status is Status.CONVERGED
    near(run.state.x, vector(0.5, 0.5))


CHECKS: list[Check] = [row, slack, sign, equation, bounds, scaled, above, wells, turned]

OF_PROGRAM = {
    "products at least t": ("at.multipliers * at.slacks - t", "t - at.multipliers * at.slacks", slack),
    "products free": ("at.multipliers * at.slacks - t", "0.0 * at.multipliers * at.slacks - t", slack),
    "slack of rows with the wrong sign": ("torch.cat([-rows, below", "torch.cat([rows, below", slack),
    "stationarity without rows": ("lower + at.inequality @ rows +", "lower + 0.0 * at.inequality @ rows +", row),
    "stationarity with -rows": ("lower + at.inequality @ rows +", "lower - at.inequality @ rows +", row),
    "stationarity without equations": ("+ at.equality @ equality", "+ 0.0 * at.equality @ equality", equation),
    "lower bounds with the wrong sign": ("owner.low, -at.lower)", "owner.low, at.lower)", bounds),
    "upper bounds with the wrong sign": ("owner.high, at.upper)", "owner.high, -at.upper)", bounds),
    "multipliers of any sign": (
        "flat.lower_level.lower, zeros(p)",
        "flat.lower_level.lower, free((p,), -torch.inf)",
        sign,
    ),
    "multipliers free in the piece": ("upper[self.places[~active]] = 0.0", "pass", slack),
    "y at its lower bound free in the piece": (
        "upper[own] = high.index_copy(0, self.low[at_low], low[self.low[at_low]])",
        "upper[own] = high",
        bounds,
    ),
    "multipliers of the scaled objective": ("at.inequality / self.scale", "at.inequality", scaled),
    "multipliers of other equations": ("begin = flat.m + ", "begin = 0 * ", above),
    "cut with the wrong sign": ("(lower - flat.lower(at.x, y))", "(flat.lower(at.x, y) - lower)", wells),
    "pairs promise with the wrong sign": ("(own < -BIACTIVE), own", "(own > BIACTIVE), -own", turned),
}
OF_ALGORITHM = {
    "t not decreased": (
        "        else:\n            state.relaxation *= self.decrease\n\n",
        "        else:\n            pass\n\n",
        slack,
    ),
    "relaxed end called exact": (
        "        solved = outcome.usable and",
        "        outcome = replace(outcome, z=state.point)\n        solved = outcome.usable and",
        slack,
    ),
    "wrong sides fixed": ("state.active = multipliers > slacks", "state.active = multipliers < slacks", row),
    "no exchange": ("< 0).any()) and state.flips < FLIPS", "< 0).any()) and False", turned),
    "the pair with the smallest promise": ("state.promises.argmin()", "state.promises.argmax()", turned),
    "exchange with what was turned before": ("state.sides.clone()", "~state.sides", turned),
    "whatever ends is accepted": ("        if found.accepted:", "        if True:", wells),
    "no cut": ("state.cuts[state.cut_count] = better", "pass", wells),
}


@pytest.mark.parametrize("name", OF_PROGRAM)
def test_a_broken_line_of_the_program_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, check = OF_PROGRAM[name]
    with mutated(PROGRAM, old, new) as broken:
        monkeypatch.setattr(kkt_relaxation, "RelaxedKKT", broken.RelaxedKKT)
        with pytest.raises((AssertionError, bilevel.SolveError)):
            check(bilevel.KKTRelaxation)


@pytest.mark.parametrize("name", OF_ALGORITHM)
def test_a_broken_line_of_the_algorithm_is_noticed(name: str) -> None:
    old, new, check = OF_ALGORITHM[name]
    with mutated(ALGORITHM, old, new) as broken, pytest.raises((AssertionError, bilevel.SolveError)):
        check(broken.KKTRelaxation)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_real_one_passes(check: Check) -> None:
    check(bilevel.KKTRelaxation)
