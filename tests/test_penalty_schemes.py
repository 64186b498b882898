"""Every scheme of the penalty method, step by step against a second implementation on matrices."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

import bilevel
from bilevel import F2BA, F2SA, F3SA, Penalty, Proximal, SingleLoop, Storm
from implicit import tree
from tests import penalty_checks as checks
from tests import penalty_reference as reference
from tests.penalty_reference import Setting

SCHEMES = {
    "f2ba": F2BA(),
    "central": F2BA(central=True),
    "proximal": Proximal(beta=0.8),
    "f2sa": F2SA(),
    "f3sa": F3SA(),
    "single": SingleLoop(),
}


@pytest.mark.parametrize("name", list(checks.SETTINGS))
@pytest.mark.parametrize(
    "check",
    [
        checks.follows_f2ba,
        checks.follows_proximal,
        checks.follows_single_loop,
        checks.follows_f2sa,
        checks.follows_f3sa,
    ],
)
def test_every_step_is_the_published_one(check: Any, name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", ["full", "batches"])
def test_central_differences_are_the_published_ones(name: str) -> None:
    checks.follows_central(name)


@pytest.mark.parametrize("batches", [False, True], ids=["full", "batches"])
@pytest.mark.parametrize("inner", [1, 4])
def test_double_loops_take_one_joint_backward(inner: int, batches: bool) -> None:
    """T gradients of f + p g and T of g, then one pass over f and two g; no second-order product."""
    for scheme in (F2BA(), Proximal(), F2SA()):
        method = reference.algorithm(scheme, lower_steps=inner)
        _, _, state = reference.run(method, Setting(4 if batches else None, False), 4)
        assert state.counts == {"upper": 4 * (inner + 1), "lower": 4 * (2 * inner + 2), "products": 0}


@pytest.mark.parametrize("scheme", [F2BA(), Proximal()])
def test_repeating_the_inner_steps_takes_one_more_look(scheme: Any) -> None:
    """G before the first chunk of T steps, and after each."""
    method = reference.algorithm(scheme, lower_steps=4, lower_chunks=50)
    _, _, state = reference.run(method, Setting(None, False), 6)
    chunks, rest = divmod(state.counts["upper"] - 6, 4 + 1)
    assert rest == 0
    assert 6 <= chunks < 6 * 50
    assert state.counts["lower"] == 2 * state.counts["upper"]


def test_central_differences_swap_z_for_w() -> None:
    """w costs an f more than z does, in each inner step and in the joint pass."""
    method = reference.algorithm(F2BA(central=True), lower_steps=3, penalty=20.0, lower_condition=18.0)
    _, _, state = reference.run(method, Setting(4, False), 4)
    assert state.counts == {"upper": 4 * (6 + 2), "lower": 4 * (6 + 2), "products": 0}


@pytest.mark.parametrize("scheme", [F3SA, SingleLoop])
def test_storm_doubles_every_gradient(scheme: Any) -> None:
    """But for the first step, where the estimate is the sample. No more than two backward passes a sample."""
    for exponent, factor in ((0.0, 1), (0.8, 2)):
        method = reference.algorithm(scheme(estimator=Storm(exponent=exponent)))
        _, _, state = reference.run(method, Setting(4, False), 5)
        visits = 1 + 4 * factor
        assert state.counts == {"upper": 2 * visits, "lower": 4 * visits, "products": 0}


@pytest.mark.parametrize("scheme", [SingleLoop(), F3SA(noise="both")], ids=["single", "f3sa"])
def test_a_refused_first_step_leaves_the_estimates_unbiased(scheme: Any) -> None:
    """An exact oracle's estimates are exact from the first step that is accepted on, whichever it is."""
    own = reference.data()
    broken = [True]

    def lower(x: Any, y: Any) -> Any:
        return own.g(x, y, batch=own.lower) * (float("nan") if broken[0] else 1.0)

    problem = bilevel.BilevelProblem(lambda x, y: own.f(x, y, batch=own.upper), lower)
    ends = []
    for exponent in (0.0, 0.8):
        chosen = replace(scheme, estimator=Storm(exponent=exponent))
        broken[0] = False
        method = reference.algorithm(chosen).resolve(problem, *reference.start())
        state = method.init(problem, *reference.start(), generator=torch.Generator().manual_seed(3))
        for step in range(5):
            broken[0] = step == 0
            method.step(problem, state)
            assert torch.equal(state.x, reference.start()[0]) == (step == 0)
            state.step += 1
        ends.append(torch.cat([state.x, state.y, state.z]))
    assert float((ends[1] - ends[0]).norm()) < 1e-12


def trees_of(state: Any, n: int, m: int) -> tuple[int, int]:
    """How many trees of the size of x and of y the scheme keeps, beyond what the step of x needs."""
    found = tree.leaves([state.x, state.y, state.z, state.extra, state.stages])
    return sum(leaf.numel() == n for leaf in found), sum(leaf.numel() == m for leaf in found)


@pytest.mark.parametrize(
    ("scheme", "size", "expected"),
    [
        (F2BA(), 4, (1, 3)),  # x, y, z and the direction that probes the curvature
        (F2BA(), None, (1, 4)),  # x, y, z and two predecessors for acceleration
        (F2SA(), 4, (1, 2)),
        (Proximal(), None, (1, 2)),  # w and u live within a step
        (SingleLoop(estimator=Storm(exponent=0.0)), 4, (1, 5)),  # x, y, z, w, u and the probe
        (SingleLoop(), 4, (1 + 3 + 1, 5 + 3 + 2)),  # three estimates each, and the previous x, w, u
        (F3SA(), 4, (1 + 3 + 1, 2 + 3 + 2)),
    ],
)
def test_memory_is_what_the_scheme_needs(scheme: Any, size: int | None, expected: tuple[int, int]) -> None:
    _, _, state = reference.run(reference.algorithm(scheme), Setting(size, False), 2)
    assert trees_of(state, 3, 4) == expected


@pytest.mark.parametrize("size", [None, 4], ids=["full", "batches"])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_resumed_runs_are_bitwise_the_same(name: str, size: int | None) -> None:
    problem = Setting(size, name != "central").problem()
    method = Penalty(scheme=SCHEMES[name], common_batches=name != "single", penalty=30.0)
    whole = bilevel.solve(problem, method, *reference.start(), max_steps=50)
    half = bilevel.solve(problem, method, *reference.start(), max_steps=23)
    again = bilevel.solve(problem, checkpoint=half.checkpoint, max_steps=50)
    assert torch.equal(whole.x, again.x)
    assert torch.equal(whole.y, again.y)
    assert whole.counts == again.counts
    assert whole.algorithm == again.algorithm
    assert not torch.equal(half.x, whole.x)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (
            lambda: Penalty(scheme=cast(Any, "F2SA")),
            TypeError,
            r"scheme must be an object such as bilevel.F2BA\(\), got 'F2SA'",
        ),
        (lambda: Penalty(scheme=F3SA(), lower_steps=3), ValueError, "F3SA is a single loop: lower_steps must be 1"),
        (lambda: Penalty(scheme=SingleLoop(), lower_steps=2), ValueError, "SingleLoop is a single loop"),
        (lambda: Penalty(scheme=F2SA(), step_size=0.1), ValueError, r"step_size = 0.1 belongs to .*F2SA\(ratio"),
        (lambda: Penalty(scheme=F2SA(), extrapolate=True), ValueError, "extrapolate .* F2SA has a schedule"),
        (lambda: Penalty(step_size=-1.0), ValueError, "step_size must be positive, got -1.0"),
        (lambda: Penalty(bias_rtol=0.0), ValueError, "bias_rtol must be positive, got 0.0"),
        (lambda: F2SA(noise=cast(Any, "some")), ValueError, 'noise must be "none", "upper", "both" or None'),
        (lambda: F3SA(offset=0.0), ValueError, "offset must be positive, got 0.0"),
        (lambda: Proximal(rho=-1.0), ValueError, "rho must be positive or None, got -1.0"),
        (lambda: SingleLoop(beta=1.5), ValueError, r"beta must lie in \(0, 1\], got 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(build: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()


def test_central_differences_need_strong_convexity() -> None:
    problem = bilevel.BilevelProblem(lambda x, y: (y**2).sum() + x**2, lambda x, y: (y.sum() - x) ** 2)
    zero = torch.zeros(())
    with pytest.raises(ValueError, match="needs p mu > L_f"):
        bilevel.solve(problem, Penalty(scheme=F2BA(central=True)), zero, torch.zeros(3))


def test_the_noise_of_a_schedule_is_that_of_the_data() -> None:
    own = reference.data()
    for up, low, noise in ((None, None, "none"), (4, None, "upper"), (4, 4, "both"), (None, 4, "both")):
        problem = bilevel.BilevelProblem(
            own.f, own.g, upper_data=bilevel.Batches(own.upper, up), lower_data=bilevel.Batches(own.lower, low)
        )
        for scheme in (F2SA(), F3SA()):
            found = Penalty(scheme=scheme).resolve(problem, *reference.start()).scheme
            assert isinstance(found, F2SA | F3SA)
            assert found.noise == noise
