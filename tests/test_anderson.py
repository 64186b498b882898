"""Anderson acceleration against direct solutions and the plain iteration."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bilevel.anderson import Anderson, AndersonState

Map = Callable[[Tensor], Tensor]
Merit = Callable[[Tensor], Tensor]


def flat(point: Tensor) -> Tensor:
    return point.new_zeros(())


def run(
    method: Anderson, step: Map, point: Tensor, count: int, merit: Merit = flat
) -> tuple[Tensor, AndersonState, list[bool]]:
    state, refused = method.init(point), []
    for _ in range(count):
        point, flag = method.advance(state, point, step(point), merit(point), point.new_zeros(()))
        refused.append(bool(flag))
    return point, state, refused


def linear(n: int = 6, slow: float = 0.99) -> tuple[Map, Tensor]:
    """A contraction with a rotation in it, and its fixed point."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    inner = torch.diag(torch.linspace(0.1, slow, n))
    inner[0, 1], inner[1, 0] = 0.5, -0.5
    matrix = basis @ inner @ basis.T
    shift = torch.randn(n, generator=generator)
    return lambda s: matrix @ s + shift, torch.linalg.solve(torch.eye(n) - matrix, shift)


def test_a_linear_iteration_ends_after_as_many_steps_as_it_has_dimensions() -> None:
    step, answer = linear()
    found, _, refused = run(Anderson(memory=6), step, torch.zeros(6), 9)
    torch.testing.assert_close(found, answer, rtol=1e-6, atol=0)
    assert not any(refused)
    plain, _, _ = run(Anderson(memory=0), step, torch.zeros(6), 9)
    assert float((plain - answer).norm()) > 0.1 * float(answer.norm())


def test_without_memory_it_is_the_iteration_itself() -> None:
    step, _ = linear()
    point = torch.zeros(6)
    found, _, refused = run(Anderson(memory=0), step, point, 5)
    for _ in range(5):
        point = step(point)
    assert torch.equal(found, point)
    assert not any(refused)


def test_it_does_not_climb_to_a_maximum() -> None:
    """Gradient steps on s⁴/4 - s²/2 from beside the maximum at 0: the residual alone would lead there."""

    def value(s: Tensor) -> Tensor:
        return (s**4 / 4 - s**2 / 2).sum()

    def step(s: Tensor) -> Tensor:
        return s - 0.1 * (s**3 - s)

    start = torch.tensor([0.05])
    found, _, refused = run(Anderson(memory=3), step, start, 60, value)
    assert float(found) == pytest.approx(1.0, abs=1e-8)
    assert any(refused)
    misled, _, _ = run(Anderson(memory=3), step, start, 60)
    assert float(misled) == pytest.approx(0.0, abs=1e-8)


def test_a_refused_point_is_replaced_by_the_plain_step_and_pauses() -> None:
    method, point = Anderson(memory=2), torch.zeros(1)
    state = method.init(point)
    zero = torch.zeros(())
    images = [torch.tensor([1.0]), torch.tensor([1.5])]
    for image in images:
        point, _ = method.advance(state, point, image, zero, zero)
    # Residuals 1 and 0.5 at 0 and 1: the secant meets zero at 2.
    assert float(point) == pytest.approx(2.0, abs=1e-6)
    for image in (torch.tensor([9.0]), torch.tensor([torch.nan])):
        other = copy.copy(state)
        after, refused = method.advance(other, point, image, zero, zero)
        assert bool(refused) and torch.equal(after, images[-1])
        assert float(other.wait) == 1.0 and float(other.pause) == 2.0
        assert bool(torch.isfinite(other.residuals).all())


def test_a_lower_merit_excuses_a_larger_residual() -> None:
    method, point, zero = Anderson(memory=2), torch.zeros(1), torch.zeros(())
    state = method.init(point)
    for image in (torch.tensor([1.0]), torch.tensor([1.5])):
        point, _ = method.advance(state, point, image, zero, zero)
    _, refused = method.advance(state, point, point + 7.0, torch.tensor(-1.0), torch.tensor(0.5))
    assert not bool(refused)


def test_forgetting_leaves_the_plain_step() -> None:
    step, _ = linear()
    method = Anderson(memory=4)
    point, state, _ = run(method, step, torch.zeros(6), 5)
    method.forget(state, torch.tensor(True))
    after, refused = method.advance(state, point, step(point), torch.zeros(()), torch.zeros(()))
    assert torch.equal(after, step(point)) and not bool(refused)


def test_residuals_alone_lead_uphill_for_a_while_only() -> None:
    """Residuals that shrink by a thousandth with a merit that rises by less than its error, memory 2."""
    method, point = Anderson(memory=2), torch.zeros(2)
    state, slack = method.init(point), torch.tensor(1.0)
    flags = []
    for k in range(44):
        angle = torch.tensor(0.3 * k)
        residual = (1.0 - 0.001 * k) * torch.stack([angle.cos(), angle.sin()])
        _, refused = method.advance(state, point, point + residual, torch.tensor(0.01 * k), slack)
        flags.append(bool(refused))
    # Two plain points, forty extrapolated ones, and then the merit would have to speak.
    assert flags == 42 * [False] + [True, False]
    assert float(state.credit) == 0.0
    other = copy.copy(state)
    other.extrapolated = torch.tensor(True)
    small = torch.tensor([0.1, 0.0])  # a new smallest residual, but not from a point that is accepted
    _, refused = method.advance(other, point, point + small, torch.tensor(0.2), slack)
    assert bool(refused) and float(other.credit) == 0.0
    other.extrapolated = torch.tensor(False)
    method.advance(other, point, point + small, torch.tensor(0.2), slack)
    assert float(other.credit) == 40.0
