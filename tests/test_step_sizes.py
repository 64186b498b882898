"""Path efficiency: what doubles and halves the step, and how far it gets alone."""

import pytest
import torch

from bilevel.step_sizes import PathEfficiency
from implicit import tree

RULE = PathEfficiency(initial=1.0, window=4)


def walk(rule, points, lost=None, start=None):
    """Feed points; returns the lengths after every step."""
    start = torch.zeros_like(points[0]) if start is None else start
    state, before, lengths = rule.init(start), start, []
    for point in points:
        rule.update(state, point, (point - before).norm(), lost)
        before = point
        lengths.append(float(state.length))
    return state, lengths


def straight(count):
    return [torch.tensor([float(i), 2.0 * i]) for i in range(1, count + 1)]


def test_a_straight_path_doubles_once_per_window() -> None:
    _, lengths = walk(RULE, straight(12))
    assert lengths == [1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 8]


def test_a_wandering_path_halves() -> None:
    _, lengths = walk(RULE, [torch.tensor([1.0 if i % 2 == 0 else 0.0]) for i in range(8)])
    assert lengths == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]


def test_between_the_thresholds_nothing_changes() -> None:
    corner = [torch.tensor(p) for p in ([1.0, 0.0], [2.0, 0.0], [2.0, 1.0], [2.0, 2.0])]  # ratio 0.71
    assert walk(RULE, corner)[1][-1] == 1.0
    assert walk(PathEfficiency(initial=1.0, window=4, high=0.7), corner)[1][-1] == 2.0
    assert walk(PathEfficiency(initial=1.0, window=4, low=0.72, high=0.8), corner)[1][-1] == 0.5


def test_a_path_that_does_not_move_halves() -> None:
    assert walk(RULE, [torch.zeros(2)] * 4)[1][-1] == 0.5


def test_a_lost_lower_level_halves_however_straight_the_path() -> None:
    assert walk(RULE, straight(8), lost=torch.tensor(True))[1][-1] == 0.25
    assert walk(RULE, straight(8), lost=torch.tensor(False))[1][-1] == 4.0


def test_each_window_starts_where_the_last_one_ended() -> None:
    there, back = straight(4), [*reversed(straight(3)), torch.zeros(2)]
    state, lengths = walk(RULE, there + back)
    assert lengths[-1] == 4.0
    assert torch.equal(state.anchor, torch.zeros(2))
    assert float(state.path) == 0.0
    assert state.step == 8


def test_each_halving_makes_the_next_window_longer() -> None:
    rule = PathEfficiency(initial=1.0, window=2, growth=2.0)
    wandering = [torch.tensor([1.0 if i % 2 == 0 else 0.0]) for i in range(14)]
    state, lengths = walk(rule, wandering)
    assert lengths == [1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.125]
    assert float(state.window) == 16.0
    assert walk(rule, straight(4))[1] == [1, 2, 2, 4]
    state, lengths = walk(rule, straight(4), lost=torch.tensor(True))
    assert (lengths, float(state.window)) == ([1, 0.5, 0.5, 0.5], 4.0)


def test_a_longer_window_measures_its_whole_path() -> None:
    rule = PathEfficiency(initial=1.0, window=2, growth=2.0)
    points = [torch.tensor([v]) for v in (1.0, 0.0, -1.0, -2.0, -3.0, -4.0)]
    state, lengths = walk(rule, points)  # wanders for two steps, then runs straight for the four of the longer window
    assert lengths == [1, 0.5, 0.5, 0.5, 0.5, 1.0]
    assert float(state.anchor) == -4.0
    assert float(state.path) == float(state.since) == 0.0


def test_trees_are_one_vector_and_the_anchor_is_a_copy() -> None:
    x = {"a": torch.zeros(2), "b": [torch.zeros(())]}
    state = RULE.init(x)
    for _ in range(4):
        x["a"] += 3.0
        x["b"][0] += 4.0
        RULE.update(state, x, torch.tensor((2 * 9.0 + 16.0) ** 0.5))
    assert float(state.length) == 2.0
    x["a"] += 100.0
    assert state.anchor["a"].tolist() == [12.0, 12.0]


def test_defaults_are_resolved_from_the_start_and_the_noise() -> None:
    x = {"a": torch.full((4,), 3.0), "b": torch.zeros(0)}
    full, noisy = PathEfficiency().resolve(x, stochastic=False), PathEfficiency().resolve(x, stochastic=True)
    assert (full.initial, full.window) == (pytest.approx(0.07), 20)
    assert (noisy.initial, noisy.window) == (pytest.approx(0.07), 100)
    assert (full.growth, noisy.growth) == (1.0, 2.0)
    own = PathEfficiency(initial=2.0, window=5, low=0.1, high=0.5, growth=3.0)
    assert own.resolve(x, stochastic=True) == own
    assert float(full.init(x).length) == pytest.approx(0.07)


def test_the_length_keeps_the_dtype_of_the_point() -> None:
    x = torch.zeros(2, dtype=torch.float32)
    state = RULE.init(x)
    for _ in range(4):
        x = x + 1.0
        RULE.update(state, x, torch.tensor(2.0).sqrt().float())
    assert state.length.dtype == state.path.dtype == torch.float32
    assert float(state.length) == 2.0


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"initial": 0.0}, "initial must be positive or None, got 0.0"),
        ({"window": 1}, "window must be an integer of at least 2 or None, got 1"),
        ({"window": 2.5}, "window must be an integer of at least 2 or None, got 2.5"),
        ({"growth": 0.5}, "growth must be at least 1 or None, got 0.5"),
        ({"low": 0.9, "high": 0.9}, "0 < low < high < 1, got 0.9 and 0.9"),
        ({"low": 0.0}, "0 < low < high < 1"),
        ({"high": 1.0}, "0 < low < high < 1"),
    ],
)
def test_settings_are_validated(settings, text) -> None:
    with pytest.raises(ValueError, match=text):
        PathEfficiency(**settings)


@pytest.mark.parametrize("initial", [1e-4, 1.0, 1e3])
def test_normalised_steps_on_a_quadratic_reach_rounding(initial) -> None:
    """From any first length, without any knowledge of the curvature."""
    scales = torch.tensor([1.0, 3.0, 10.0])
    x = torch.tensor([100.0, -30.0, 10.0])
    rule = PathEfficiency(initial=initial, window=20).resolve(x, stochastic=False)
    state, momentum = rule.init(x), torch.zeros(3)
    for _ in range(6_000):
        momentum = 0.9 * momentum + 0.1 * scales * x
        size = tree.norm(momentum)
        if not size > 0:
            break
        after = x - state.length * momentum / size
        rule.update(state, after, (after - x).norm())
        x = after
    assert float(x.norm()) < 1e-12
