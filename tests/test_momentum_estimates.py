"""Momentum and STORM against their closed recursions, and what each does to noise."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Momentum, Storm
from implicit import tree


def point(generator: torch.Generator) -> dict[str, Any]:
    return {"a": torch.randn(2, 3, generator=generator), "b": [torch.randn((), generator=generator)]}


def apart(a: Any, b: Any) -> float:
    return float(tree.norm(tree.sub(a, b)))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_momentum_is_the_exponential_average(decay: float, generator: torch.Generator) -> None:
    """After k samples: sum over j of (1 - decay) decay^(k - 1 - j) q_j."""
    samples = [point(generator) for _ in range(7)]
    rule = Momentum(decay=decay)
    estimate = rule.init(samples[0])
    assert float(tree.norm(estimate)) == 0.0
    for sample in samples:
        estimate = rule.update(estimate, sample)
    expected = tree.zeros_like(samples[0])
    for j, sample in enumerate(samples):
        expected = tree.axpy((1.0 - decay) * decay ** (len(samples) - 1 - j), sample, expected)
    assert apart(estimate, expected) < 1e-14


@pytest.mark.parametrize(("weight", "exponent"), [(1.0, 0.8), (1.0, 0.0), (0.3, 0.5), (5.0, 1.0)])
def test_storm_obeys_its_closed_recursion(weight: float, exponent: float, generator: torch.Generator) -> None:
    """``d_k - q_k(v_k) = sum_j prod_{i > j} (1 - eta_i) ...`` unrolled by hand over stored samples."""
    storm = Storm(weight=weight, exponent=exponent)
    matrices = [torch.randn(4, 4, generator=generator) for _ in range(6)]
    points = [torch.randn(4, generator=generator) for _ in range(6)]
    estimate, before = storm.init(points[0]), points[0]
    for k, (matrix, at) in enumerate(zip(matrices, points, strict=True)):
        estimate = storm.update(estimate, lambda v, m=matrix: m @ v, at, before, k)
        before = at
    etas = [min(1.0, weight * (k + 1) ** -exponent) for k in range(6)]
    expected = torch.zeros(4)
    for k in range(6):
        keep = torch.tensor(1.0)
        for i in range(k + 1, 6):
            keep = keep * (1.0 - etas[i])
        stale = (1.0 - etas[k]) * matrices[k] @ points[k - 1] if k else torch.zeros(4)  # the first is the sample
        expected = expected + keep * (matrices[k] @ points[k] - stale)
    assert apart(estimate, expected) < 1e-13
    assert [storm.eta(k) for k in range(6)] == etas


def test_storm_with_an_exact_oracle_is_exact(generator: torch.Generator) -> None:
    storm, before = Storm(exponent=0.5), point(generator)
    estimate = storm.init(before)
    for k in range(20):
        at = tree.axpy(0.1, point(generator), before)
        estimate = storm.update(estimate, lambda v: tree.scale(3.0, v), at, before, k)
        assert apart(estimate, tree.scale(3.0, at)) < 1e-12
        before = at


@pytest.mark.parametrize(("exponent", "calls"), [(0.0, 10), (0.8, 19)])
def test_storm_asks_twice_only_where_it_remembers(exponent: float, calls: int) -> None:
    seen: list[Tensor] = []

    def oracle(v: Tensor) -> Tensor:
        seen.append(v)
        return v

    storm, estimate = Storm(exponent=exponent), torch.zeros(1)
    for k in range(10):
        estimate = storm.update(estimate, oracle, torch.full((1,), float(k)), torch.full((1,), k - 1.0), k)
    assert len(seen) == calls
    assert storm.plain == (exponent == 0.0)


def test_storm_beats_momentum_where_the_iterate_moves_slowly(generator: torch.Generator) -> None:
    """Gradient of (v - s)^2 / 2 along a slow line: STORM averages the noise and does not lag, momentum does one."""
    storm, average = Storm(exponent=0.8), Momentum(decay=0.99)
    recursive, plain, before = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    wrong = {"storm": 0.0, "momentum": 0.0, "sample": 0.0}
    for k in range(4_000):
        at, noise = torch.full((1,), 0.01 * k), torch.randn(1, generator=generator)
        recursive = storm.update(recursive, lambda v, s=noise: v - s, at, before, k)
        plain = average.update(plain, at - noise)
        before = at
        if k >= 2_000:
            for name, found in (("storm", recursive), ("momentum", plain), ("sample", at - noise)):
                wrong[name] += float((found - at) ** 2) / 2_000
    assert wrong["storm"] < 0.01 * wrong["sample"]
    assert wrong["momentum"] == pytest.approx(0.99**2, rel=0.1)  # lags 99 steps of 0.01


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Momentum(decay=1.0), r"decay must lie in \[0, 1\), got 1.0"),
        (lambda: Momentum(decay=-0.1), r"decay must lie in \[0, 1\), got -0.1"),
        (lambda: Storm(weight=0.0), r"weight must be positive, got 0.0"),
        (lambda: Storm(exponent=-1.0), r"exponent must be >= 0, got -1.0"),
        (lambda: Storm(weight=float("nan")), r"weight must be positive, got nan"),
    ],
)
def test_wrong_settings_are_refused(build: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()
