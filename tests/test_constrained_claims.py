"""What the methods say about how they ended is true, whatever the problem, measured by plain autograd and numpy.

Random problems whose outcome is known by construction, through every method that takes them. The measurement is that of
the comparisons: dense, with the multipliers of the solution, and nothing of the package in it.
"""

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import constrained
from constrained import ConstrainedProblem, EqualityProblem
from implicit import Status

METHODS = {
    "AdaSketchNewton": constrained.AdaSketchNewton,
    "InteriorPoint": constrained.InteriorPoint,
    "AugmentedLagrangian": constrained.AugmentedLagrangian,
}
ATOL = 1e-8


@dataclass(frozen=True)
class Known:
    """A problem with what must come out of it.

    Attributes:
        ends: the statuses that are right; empty: any whose claim holds.
        x: the only solution, where there is one.
    """

    problem: EqualityProblem | ConstrainedProblem
    x0: Tensor
    ends: frozenset[Status] = frozenset()
    x: Tensor | None = None


Build = Callable[[torch.Generator], Known]
BUILDERS: dict[str, Build] = {}


def known(build: Build) -> Build:
    BUILDERS[build.__name__] = build
    return build


def ends(*names: str) -> frozenset[Status]:
    return frozenset(Status[name] for name in names)


def rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def symmetric(generator: torch.Generator, n: int, lowest: float) -> Tensor:
    """A symmetric matrix with eigenvalues between ``lowest`` and 3."""
    basis, _ = torch.linalg.qr(rand(generator, n, n))
    return basis @ torch.diag(torch.linspace(lowest, 3.0, n)) @ basis.T


def quadratic(h: Tensor, g: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: 0.5 * x @ h @ x + g @ x


def linear(a: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: a @ x - b


@known
def equality_qp(generator: torch.Generator) -> Known:
    h, a, g, b = symmetric(generator, 6, 0.5), *(rand(generator, *s) for s in ((3, 6), (6,), (3,)))
    kkt = torch.cat([torch.cat([h, a.T], 1), torch.cat([a, torch.zeros(3, 3)], 1)])
    solution = torch.linalg.solve(kkt, torch.cat([-g, b]))[:6]
    return Known(EqualityProblem(quadratic(h, g), linear(a, b)), rand(generator, 6), ends("CONVERGED"), solution)


@known
def equality_qp_curved_down_off_the_constraints(generator: torch.Generator) -> Known:
    a, g, b = (rand(generator, *s) for s in ((3, 6), (6,), (3,)))
    normals, _ = torch.linalg.qr(a.T)
    h = symmetric(generator, 6, 0.5)
    h = h - 20.0 * normals @ normals.T  # negative across the constraints, as before along them
    kkt = torch.cat([torch.cat([h, a.T], 1), torch.cat([a, torch.zeros(3, 3)], 1)])
    solution = torch.linalg.solve(kkt, torch.cat([-g, b]))[:6]
    return Known(EqualityProblem(quadratic(h, g), linear(a, b)), rand(generator, 6), ends("CONVERGED"), solution)


@known
def quadratic_constraints(generator: torch.Generator) -> Known:
    n, m = 6, 2
    h, g, inside = symmetric(generator, n, -3.0), rand(generator, n), rand(generator, n)
    matrices = torch.stack([symmetric(generator, n, -1.0) for _ in range(m)])
    slopes = rand(generator, m, n)

    def rows(x: Tensor) -> Tensor:
        return torch.stack([x @ q @ x for q in matrices]) + slopes @ x

    level = rows(inside)
    problem = EqualityProblem(lambda x: quadratic(h, g)(x) + (x**4).sum(), lambda x: rows(x) - level)
    return Known(problem, rand(generator, n))


@known
def sphere_with_saddles(generator: torch.Generator) -> Known:
    h = symmetric(generator, 5, -3.0)
    lowest = torch.linalg.eigh(h).eigenvectors
    # A start in the span of the upper eigenvectors: Newton's method would stay there and end at a saddle.
    start = lowest[:, 2:] @ rand(generator, 3)
    return Known(EqualityProblem(lambda x: x @ h @ x, lambda x: (x**2).sum() - 1), start / start.norm())


@known
def dependent_rows(generator: torch.Generator) -> Known:
    h, a, g, b = symmetric(generator, 5, 0.5), *(rand(generator, *s) for s in ((2, 5), (5,), (2,)))
    kkt = torch.cat([torch.cat([h, a.T], 1), torch.cat([a, torch.zeros(2, 2)], 1)])
    solution = torch.linalg.solve(kkt, torch.cat([-g, b]))[:5]
    twice = EqualityProblem(quadratic(h, g), linear(torch.cat([a, a.sum(0)[None]]), torch.cat([b, b.sum()[None]])))
    return Known(twice, rand(generator, 5), ends("CONVERGED"), solution)


@known
def contradicting_rows(generator: torch.Generator) -> Known:
    h, a, b = symmetric(generator, 5, 0.5), rand(generator, 2, 5), rand(generator, 2)
    a, b = torch.cat([a, a.sum(0)[None]]), torch.cat([b, b.sum()[None] + 1.0])
    return Known(EqualityProblem(quadratic(h, b.new_ones(5)), linear(a, b)), rand(generator, 5), ends("INFEASIBLE"))


@known
def no_real_root(generator: torch.Generator) -> Known:
    g = rand(generator, 4)
    problem = EqualityProblem(lambda x: g @ x, lambda x: torch.stack([(x**2).sum() + 1.0, x[0] - x[1]]))
    return Known(problem, rand(generator, 4), ends("INFEASIBLE"))


@known
def disjoint_spheres(generator: torch.Generator) -> Known:
    centre = 3.0 * torch.nn.functional.normalize(rand(generator, 3), dim=0)
    problem = EqualityProblem(
        lambda x: x.sum(), lambda x: torch.stack([(x**2).sum() - 1.0, ((x - centre) ** 2).sum() - 1.0])
    )
    return Known(problem, rand(generator, 3), ends("INFEASIBLE"))


@known
def linear_downhill(generator: torch.Generator) -> Known:
    a, b, g = rand(generator, 2, 5), rand(generator, 2), rand(generator, 5)
    return Known(EqualityProblem(lambda x: g @ x, linear(a, b)), rand(generator, 5), ends("UNBOUNDED"))


@known
def concave_along_the_constraints(generator: torch.Generator) -> Known:
    a, b = rand(generator, 2, 5), rand(generator, 2)
    return Known(EqualityProblem(lambda x: -(x**2).sum(), linear(a, b)), rand(generator, 5), ends("UNBOUNDED"))


@known
def logarithm(generator: torch.Generator) -> Known:
    a = rand(generator, 2, 6).abs()
    b = a @ (rand(generator, 6).abs() + 0.1)
    problem = EqualityProblem(lambda x: x.sum() - 1e-2 * torch.log(x).sum(), linear(a, b))
    return Known(problem, torch.full((6,), 5.0), ends("CONVERGED"))


@known
def not_a_number_at_the_start(generator: torch.Generator) -> Known:
    problem = EqualityProblem(lambda x: torch.log(x).sum(), lambda x: x.sum()[None] - 1.0)
    return Known(problem, -rand(generator, 3).abs(), ends("NONFINITE"))


@known
def square_root_with_its_minimum_at_the_edge(generator: torch.Generator) -> Known:
    problem = EqualityProblem(lambda x: torch.sqrt(x).sum(), lambda x: x.sum()[None] - 1.0)
    start = rand(generator, 3).abs() + 0.1
    return Known(problem, start / start.sum())


@known
def kink(generator: torch.Generator) -> Known:
    a = torch.tensor([[1.0, 2.0]]) + 0.1 * rand(generator, 1, 2)  # the minimum has x_0 = 0, where |.| has no derivative
    return Known(EqualityProblem(lambda x: x.abs().sum(), linear(a, torch.ones(1))), rand(generator, 2))


@known
def convex_qp_with_sides(generator: torch.Generator) -> Known:
    h, a, g = symmetric(generator, 6, 0.5), rand(generator, 4, 6), rand(generator, 6)
    problem = ConstrainedProblem(
        objective=quadratic(h, 3 * g),
        equality=lambda x: x.sum()[None] - 1.0,
        inequality=linear(a, a @ torch.full((6,), 1.0 / 6) + 0.1),
        lower=-0.5,
        upper=1.0,
    )
    return Known(problem, rand(generator, 6), ends("CONVERGED"))


@known
def concave_in_a_box(generator: torch.Generator) -> Known:
    h, g = symmetric(generator, 6, -3.0), rand(generator, 6)
    return Known(ConstrainedProblem(objective=quadratic(h, g), lower=-1.0, upper=2.0), 0.1 * rand(generator, 6))


@known
def box_symmetric_about_a_saddle(generator: torch.Generator) -> Known:
    h = symmetric(generator, 4, -3.0)
    return Known(ConstrainedProblem(objective=quadratic(h, torch.zeros(4)), lower=-1.0, upper=1.0), torch.zeros(4))


@known
def curved_sides(generator: torch.Generator) -> Known:
    h, g = symmetric(generator, 5, -2.0), rand(generator, 5)
    centres = 0.3 * rand(generator, 3, 5)
    problem = ConstrainedProblem(
        objective=quadratic(h, g), inequality=lambda x: ((x - centres) ** 2).sum(1) - 1.0, lower=-0.8
    )
    return Known(problem, rand(generator, 5))


@known
def repeated_sides(generator: torch.Generator) -> Known:
    h, a, g = symmetric(generator, 5, 0.5), rand(generator, 2, 5), rand(generator, 5)
    a = torch.cat([a, a, 2.0 * a])
    problem = ConstrainedProblem(objective=quadratic(h, 3.0 * g), inequality=linear(a, torch.full((6,), -0.5)))
    return Known(problem, rand(generator, 5), ends("CONVERGED"))


@known
def complementary_pair(generator: torch.Generator) -> Known:
    target = rand(generator, 2).abs() + 0.2  # x_0 x_1 <= 0 with x >= 0: no interior, no constraint qualification
    problem = ConstrainedProblem(
        objective=lambda x: ((x - target) ** 2).sum(), inequality=lambda x: (x[0] * x[1])[None], lower=0.0
    )
    return Known(problem, torch.ones(2))


@known
def equality_outside_the_box(generator: torch.Generator) -> Known:
    g = rand(generator, 4)
    problem = ConstrainedProblem(
        objective=lambda x: g @ x, equality=lambda x: x.sum()[None] - 10.0, lower=0.0, upper=1.0
    )
    return Known(problem, torch.full((4,), 0.5), ends("INFEASIBLE"))


@known
def empty_intersection(generator: torch.Generator) -> Known:
    direction = torch.nn.functional.normalize(rand(generator, 4), dim=0)
    problem = ConstrainedProblem(
        objective=lambda x: (x**2).sum(),
        inequality=lambda x: torch.stack([(x**2).sum() - 1.0, 2.0 - direction @ x]),
    )
    return Known(problem, rand(generator, 4), ends("INFEASIBLE"))


@known
def downhill_in_a_cone(generator: torch.Generator) -> Known:
    g = rand(generator, 4).abs() + 0.1
    return Known(ConstrainedProblem(objective=lambda x: -g @ x, lower=0.0), torch.ones(4), ends("UNBOUNDED"))


@known
def kink_with_sides(generator: torch.Generator) -> Known:
    shift = 0.3 * rand(generator, 3)
    problem = ConstrainedProblem(objective=lambda x: (x - shift).abs().sum(), lower=-2.0, upper=2.0)
    return Known(problem, rand(generator, 3))


@known
def logarithmic_sides(generator: torch.Generator) -> Known:
    problem = ConstrainedProblem(
        objective=lambda x: x.sum(), inequality=lambda x: 0.5 - torch.log(x), lower=-1.0, upper=10.0
    )
    return Known(
        problem, torch.full((3,), 2.0) + rand(generator, 3).abs(), ends("CONVERGED"), torch.full((3,), 0.5).exp()
    )


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    return importlib.import_module("constrained_peers")


def plain(peers: ModuleType, name: str, case: Known) -> Any:
    """The problem in numpy, by plain autograd."""
    problem, n = case.problem, len(case.x0)

    def stack(x: Tensor) -> Tensor:
        parts = [f(x) for f in (problem.equality, problem.inequality) if f is not None]
        return torch.cat([part.reshape(-1) for part in parts]) if parts else x.new_zeros(0)

    def values(x: Any) -> Any:
        with torch.no_grad():
            return float(problem.objective(torch.tensor(x))), stack(torch.tensor(x)).numpy()

    def derivatives(x: Any) -> Any:
        at = torch.tensor(x)
        gradient = torch.autograd.functional.jacobian(problem.objective, at)
        rows = torch.autograd.functional.jacobian(stack, at) if len(stack(at)) else at.new_zeros(0, n)
        return gradient.numpy(), rows.numpy()

    def curvature(x: Any, multipliers: Any, weight: float) -> Any:
        def value(x: Tensor) -> Tensor:
            return weight * problem.objective(x) + stack(x) @ torch.as_tensor(multipliers)

        return torch.autograd.functional.hessian(value, torch.tensor(x)).numpy()

    m = problem.equality(case.x0).numel() if problem.equality is not None else 0
    bounds = [
        np.full(n, empty) if bound is None else np.full(n, float(bound))  # type: ignore[arg-type]
        for bound, empty in ((problem.lower, -np.inf), (problem.upper, np.inf))
    ]
    return peers.Case(name, case.x0.numpy(), values, derivatives, curvature, m, len(stack(case.x0)), *bounds)


def cases() -> list[Any]:
    return [pytest.param(name, seed, id=f"{name}-{seed}") for name, seed in itertools.product(BUILDERS, range(2))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "seed"), cases())
def test_what_is_claimed_is_true(peers: ModuleType, method: str, name: str, seed: int) -> None:
    case = BUILDERS[name](torch.Generator().manual_seed(seed))
    chosen = METHODS[method]()
    if chosen.refuses(case.problem) is not None:
        pytest.skip(f"{method} does not take problems of this kind")
    found = constrained.solve(case.problem, chosen, case.x0, raise_on_failure=False, time_limit=10.0)

    assert found.status is not Status.RUNNING
    assert torch.isfinite(found.x).all() or not torch.isfinite(case.x0).all()
    claim = {"CONVERGED": "solved", "INFEASIBLE": "infeasible", "UNBOUNDED": "unbounded"}.get(found.status.name, "")
    numpy_case = plain(peers, name, case)
    parts = [p.numpy() if isinstance(p, Tensor) else np.zeros(0) for p in found.multipliers]
    bounds = tuple(p if p.size else np.zeros(numpy_case.n) for p in parts[2:])
    outcome = peers.Outcome(method, found.x.numpy(), found.status.name, claim, found.steps)
    outcome.measured = peers.measure(
        numpy_case, outcome.x, np.concatenate([p.reshape(-1) for p in parts[:2]]), bounds, fit=claim != "solved"
    )
    assert peers.untrue(numpy_case, outcome, ATOL) == "", (found.status, found.message, outcome.measured)
    if claim != "solved" and outcome.measured.curvature > -1e-4:
        assert not found.residual.largest <= ATOL, (found.status, found.message)
    if case.ends:
        assert found.status in case.ends, (found.status, found.message, outcome.measured)
    if case.x is not None:
        assert float((found.x - case.x).abs().max()) <= 1e-6
