"""What must hold for every scheme of the penalty method: called by its tests, and by the tests that break its lines."""

from typing import Any

import torch
from torch import Tensor

import bilevel
import problems
from bilevel.algorithms.penalty_bias import kink
from implicit import tree
from tests import penalty_reference as reference
from tests.penalty_reference import Setting

SETTINGS = {
    "full": Setting(None, False),
    "full-sets": Setting(None, True),
    "batches": Setting(4, False),
    "batches-sets": Setting(4, True),
    "independent": Setting(4, True, common=False),
}
PAPER = {"step_size": 0.1, "lower_chunks": 1, "lower_condition": 1.0}
"""Plain steps, no acceleration, nothing repeated: F2BA as published."""


def same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(found[:2], expected, strict=True):
        assert float((a - b).norm()) <= 1e-12 * (1.0 + float(b.norm()))


def follows_f2ba(name: str, scheme: Any = bilevel.F2BA, kind: Any = bilevel.Penalty, inner: int = 3) -> None:
    setting = SETTINGS[name]
    method = reference.algorithm(scheme(), kind, step_size=0.05, lower_steps=inner, common_batches=setting.common)
    same(reference.run(method, setting), reference.f2ba(setting, p=8.0, eta=0.05, inner=inner))


def follows_central(name: str, scheme: Any = bilevel.F2BA) -> None:
    setting = SETTINGS[name]
    method = reference.algorithm(scheme(central=True), penalty=20.0, step_size=0.05, lower_steps=3)
    same(reference.run(method, setting), reference.f2ba(setting, p=20.0, eta=0.05, inner=3, central=True))


def follows_proximal(name: str, scheme: Any = bilevel.Proximal) -> None:
    setting = SETTINGS[name]
    method = reference.algorithm(
        scheme(rho=0.5, beta=0.7), step_size=0.05, lower_steps=3, common_batches=setting.common
    )
    expected = reference.proximal(setting, p=8.0, eta=0.05, inner=3, rho=0.5, beta=0.7)
    same(reference.run(method, setting), expected)


def follows_single_loop(name: str, scheme: Any = bilevel.SingleLoop) -> None:
    setting = SETTINGS[name]
    for exponent in (0.0, 0.8):
        chosen = scheme(rho=0.5, beta=0.7, estimator=bilevel.Storm(exponent=exponent))
        method = reference.algorithm(chosen, step_size=0.05, common_batches=setting.common)
        expected = reference.single_loop(setting, p=8.0, eta=0.05, rho=0.5, beta=0.7, exponent=exponent)
        same(reference.run(method, setting), expected)


def follows_f2sa(name: str, scheme: Any = bilevel.F2SA) -> None:
    setting = SETTINGS[name]
    for noise, exponents in {"both": (5 / 7, 4 / 7), "upper": (3 / 5, 2 / 5), "none": (1 / 3, 0.0)}.items():
        method = reference.algorithm(
            scheme(noise=noise, ratio=0.8), penalty=3.0, lower_steps=2, common_batches=setting.common
        )
        expected = reference.f2sa(setting, first=3.0, inner=2, ratio=0.8, exponents=exponents)
        same(reference.run(method, setting), expected)


def follows_f3sa(name: str, scheme: Any = bilevel.F3SA) -> None:
    setting = SETTINGS[name]
    for noise, exponents in {"both": (3 / 5, 2 / 5), "upper": (1 / 2, 1 / 4), "none": (1 / 3, 0.0)}.items():
        method = reference.algorithm(scheme(noise=noise), penalty=3.0, common_batches=setting.common)
        expected = reference.f3sa(setting, first=3.0, ratio=0.3, exponents=exponents)
        same(reference.run(method, setting), expected)


def reaches_penalised_minimizer(scheme: Any = bilevel.F2BA, kind: Any = bilevel.Penalty, steps: int = 120) -> None:
    """F2BA as published against the closed form, and the bias of the closed form against the exact answer."""
    case = problems.case("quadratic")
    method = kind(scheme=scheme(), penalty=1000.0, lower_steps=10, rtol=1e-9, **PAPER)
    found = bilevel.solve(case.problem, method, *case.start, max_steps=steps)
    assert case.x_penalized is not None
    off = float(tree.norm(tree.sub(found.x, case.x_penalized(1e-3))))
    assert off <= 1e-5 * float(tree.norm(case.x_star)), off
    assert case.error(found) <= 1e-3


def reaches(name: str, kind: Any = bilevel.Penalty, **settings: Any) -> bilevel.Solution:
    """The closed-form minimizer of the penalised problem, at the penalty of the run, and y at the right solution."""
    case = problems.case(name)
    found = bilevel.solve(case.problem, kind(**settings), *case.start)
    reached = 3.0 * found.algorithm.rtol
    assert found.status is bilevel.Status.CONVERGED, found.message
    p = found.history[-1]["penalty"]
    if case.x_penalized is not None:
        away = float(tree.norm(tree.sub(found.x, case.x_penalized(1 / p))))
        assert away <= reached, away
    assert case.distance(found) <= (found.accuracy.distance or 0.0) + 1e-14
    assert case.distance(found) <= 1e-2 * (1.0 + float(torch.as_tensor(case.x_star).norm()))
    assert bilevel.verify(case.problem, found.x, found.y).accepted
    return found


def tells_kinks_from_slopes(find: Any = kink) -> None:
    """``find`` on the hypergradients of |x_0| + x_1^2 / 2 and of |x|^2 / 2."""
    problem = bilevel.BilevelProblem(lambda x, y: x.sum() + y, lambda x, y: y**2)

    def ridge(x: Tensor) -> Tensor:
        return torch.stack([x[0].sign(), x[1]])

    x = torch.tensor([1e-3, 0.0])
    found = find(problem, ridge, x, ridge(x), 1e-4, 1e-6)
    assert found is not None
    assert 1e-3 <= found[0] <= 1.02e-3  # the interval in which it turns has been halved six times
    assert found[1] < 1e-12
    assert find(problem, lambda x: x, x, x, 1e-4, 1e-2) is None  # smooth, and stationary at 0
    assert find(problem, torch.ones_like, x, torch.ones(2), 1e-4, 1e-6) is None  # turns nowhere
    tilted = x + torch.tensor([0.0, 0.5])
    assert find(problem, ridge, tilted, ridge(tilted), 1e-4, 1e-2) is None  # a kink along which F falls
