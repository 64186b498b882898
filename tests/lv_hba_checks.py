"""What LV-HBA must find on problems with closed forms; broken versions are held against the same."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import bilevel
import problems
from bilevel import BilevelProblem, Status
from bilevel.algorithms.lv_hba_state import Iterate, LVHBAState
from constrained import Box, Polyhedron
from implicit import tree

TOLERANCE = 1e-4
Method = type[bilevel.LVHBA]


def solve(cls: Method, problem: BilevelProblem, x: tree.Tree, y: tree.Tree, budget: int) -> bilevel.Solution:
    """A run with default arguments.

    Raises:
        AssertionError: if it does not converge within the budget.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of solvers that a broken method hands impossible problems
        solution = bilevel.solve(problem, cls(), x, y, raise_on_failure=False, max_steps=budget)
    assert solution.status is Status.CONVERGED, f"{solution.status.name}: {solution.message}"
    return solution


def close(found: tree.Tree, expected: tree.Tree, what: str) -> None:
    """Agreement up to :data:`TOLERANCE`.

    Raises:
        AssertionError: if not.
    """
    away = float(tree.norm(tree.sub(found, expected)))
    assert away <= TOLERANCE * (1.0 + float(tree.norm(expected))), f"{what} is {away:.3g} away"


def case(cls: Method, name: str, budget: int = 20_000, **settings: int) -> bilevel.Solution:
    """x, y and multipliers of a case with one minimum, x of one with several.

    Raises:
        AssertionError: if they are not found.
    """
    chosen = problems.case(name, **settings)
    solution = solve(cls, chosen.problem, chosen.start[0], chosen.start[1], budget)
    chosen.check(solution, rtol=TOLERANCE)
    if not chosen.local_minima:
        close(solution.y, chosen.y_star, "y")
        close(solution.multipliers, chosen.multipliers_star, "the multipliers")
    return solution


def active(cls: Method) -> None:
    """Scalar, the constraint active at the solution."""
    case(cls, "coupled_scalar_active", 120)


def inactive(cls: Method) -> None:
    """Scalar, the constraint inactive at the solution."""
    case(cls, "coupled_scalar_inactive", 250)


def polyhedral(cls: Method) -> None:
    """Random rows; lower multipliers, mixed derivatives and both levels matter."""
    case(cls, "coupled_polyhedral", 1_500)


def equation(cls: Method) -> None:
    """One equation with a negative multiplier."""
    case(cls, "coupled_sum", 250, n=4)


def bounds(cls: Method) -> None:
    """Bounds on y: g = (y - 2x)²/2 over [0, 1], f = (x - 1)² + (y - 1/2)²/10.

    Up to x = 1/2, y is 2x and f falls; beyond, y = 1 with multiplier 2x - 1, and x = 1.
    """
    problem = BilevelProblem(
        lambda x, y: (x - 1) ** 2 + (y - 0.5) ** 2 / 10,
        lambda x, y: (y - 2 * x) ** 2 / 2,
        lower_inequality=lambda x, y: y - x - 3,
        lower_set=Box(0.0, 1.0),
    )
    zero = torch.zeros(())
    solution = solve(cls, problem, zero, zero, 250)
    close((solution.x, solution.y), (zero + 1, zero + 1), "(x, y)")
    close(solution.multipliers["lower_set"], zero + 1, "the multiplier of the bound")


def scaled(cls: Method) -> None:
    """The active scalar problem in other units: f times 1e4, g times 1e-3, the row times 300."""
    problem = BilevelProblem(
        lambda x, y: 5e3 * x**2 + 5e3 * (y - 1) ** 2,
        lambda x, y: 5e-4 * (y - 2) ** 2,
        lower_inequality=lambda x, y: 300 * (y - x),
    )
    zero = torch.zeros(())
    solution = solve(cls, problem, zero, zero, 250)
    close((solution.x, solution.y), (zero + 0.5, zero + 0.5), "(x, y)")
    multiplier = float(solution.multipliers["lower_inequality"])
    assert abs(multiplier / (1.5e-3 / 300) - 1.0) <= TOLERANCE, multiplier


def without_upper(cls: Method) -> tuple[problems.Case, bilevel.LVHBA, LVHBAState]:
    """The polyhedral case, the method without the upper objective (c is huge) and with unit scales, and a state."""
    case = problems.case("coupled_polyhedral")
    method = cls(penalty=1e20, upper_curvature=1.0, lower_curvature=1.0, lengths=(1.0,), radius=3.0)
    method = method.resolve(case.problem, *case.start)
    state = method.init(case.problem, *case.start)
    state.weights = torch.ones_like(state.weights)
    return case, method, state


def value_function(case: problems.Case, x: Tensor, y: Tensor, z: Tensor, r: float) -> tuple[float, Tensor, Tensor]:
    """v and its saddle point: with the multipliers maximized out in closed form, a smooth problem in theta."""

    def parts(theta: Tensor) -> tuple[Tensor, Tensor]:
        rows = case.problem.lower_inequality(x, theta)  # type: ignore[misc]
        lam = (z + rows).clamp(0.0, r)
        value = case.problem.lower(x, theta) + lam @ rows - (lam - z).square().sum() / 2
        return value + (theta - y).square().sum() / 2, lam

    def smooth(theta: np.ndarray) -> tuple[float, np.ndarray]:
        own = torch.from_numpy(theta).requires_grad_()
        value, _ = parts(own)
        return float(value.detach()), torch.autograd.grad(value, own)[0].numpy()

    found = scipy.optimize.minimize(smooth, y.numpy(), jac=True, method="BFGS", options={"gtol": 1e-12, "maxiter": 500})
    theta = torch.from_numpy(found.x)
    value, lam = parts(theta)
    return float(value), theta, lam


def pair(case: problems.Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random (x, y) in C, on its boundary more often than not, and z."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(3, generator=generator), torch.randn(4, generator=generator)
    rows = torch.func.jacrev(lambda v: case.problem.lower_inequality(v[:3], v[3:]))(torch.zeros(7))  # type: ignore[misc]
    level = case.problem.lower_inequality(torch.zeros(3), torch.zeros(4))  # type: ignore[misc]
    near = Polyhedron(G=rows, h=-level).project(torch.cat([x, y]))
    return near[:3], near[3:], 2.0 * torch.rand(3, generator=generator)


def field(
    case: problems.Case, method: bilevel.LVHBA, state: LVHBAState, x: Tensor, y: Tensor, z: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Iterate, dict[str, Tensor]]:
    """The method's directions at (x, y, z) once its inner iteration has come to rest there."""
    work = method._work(case.problem, state)
    here = Iterate(x, y, y.clone(), z.clone(), z)
    c, whole = state.stages.penalty, torch.tensor(1.0)
    for _ in range(400):
        image, _ = method._image(work, work.flat.oracle, state, here, c, whole)
        _, theta, lam, _ = image.split(work.sizes)
        here = Iterate(x, y, work.in_y(theta), work.in_z(lam, state.radius), z)
    image, values = method._image(work, work.flat.oracle, state, here, c, whole)
    pair_, _, _, dual = image.split(work.sizes)
    assert method.outer_step and method.dual_step
    steps = (torch.cat([x, y]) - pair_) / method.outer_step
    return (steps[:3], steps[3:], (z - dual) / method.dual_step), here, values


def directions(cls: Method, seed: int = 0) -> None:
    """What (x, y, z) move along without the upper objective is the gradient of f - v by finite differences.

    Raises:
        AssertionError: if not, or if the inner iteration does not find the saddle point.
    """
    case, method, state = without_upper(cls)
    x, y, z = pair(case, seed)
    directions, here, values = field(case, method, state, x, y, z)
    v, theta, lam = value_function(case, x, y, z, 3.0)
    torch.testing.assert_close(here.theta, theta, rtol=0, atol=1e-6)
    torch.testing.assert_close(here.lam, lam, rtol=0, atol=1e-6)
    assert float(lam.max()) > 0.1
    assert float(values["gap"]) == pytest.approx(float(case.problem.lower(x, y)) - v, abs=1e-9)

    def gap(parts: tuple[Tensor, Tensor, Tensor]) -> float:
        return float(case.problem.lower(*parts[:2])) - value_function(case, *parts, 3.0)[0]

    for block, found in enumerate(directions):
        for i in range(len(found)):
            ends = []
            for sign in (1.0, -1.0):
                moved = [part.clone() for part in (x, y, z)]
                moved[block][i] += sign * 1e-5
                ends.append(gap((moved[0], moved[1], moved[2])))
            assert float(found[i]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-6), (block, i)


def large_rows(cls: Method) -> None:
    """One equation with a gradient of length 17 over 300 variables."""
    case(cls, "coupled_sum", 250, n=100)


def in_units(chosen: problems.Case, big: float, small: float, bound: float = math.inf) -> BilevelProblem:
    """The polyhedral case in the variables ``x / big`` and ``small y``, with |y| at most ``bound`` before that."""
    declared = chosen.problem
    return BilevelProblem(
        lambda x, y: declared.upper(big * x, y / small),
        lambda x, y: declared.lower(big * x, y / small),
        lower_inequality=lambda x, y: declared.lower_inequality(big * x, y / small),  # type: ignore[misc]
        lower_set=Box(-bound * small, bound * small),
    )


def lengths(cls: Method) -> None:
    """The polyhedral case with bounds on y, x in units of 64 and y in units of 1/64: only y may reach its bounds.

    Raises:
        AssertionError: if the solution is not the one in other units, or takes many more steps.
    """
    chosen, big = problems.case("coupled_polyhedral"), 64.0
    x, y = chosen.start
    expected = solve(bilevel.LVHBA, in_units(chosen, 1.0, 1.0, 0.5), x, y, 20_000)
    assert float(tree.ravel(expected.y).abs().max()) > 0.5 - 1e-6
    found = solve(cls, in_units(chosen, big, big, 0.5), x / big, y * big, 3 * expected.steps)
    close((big * found.x, found.y / big), (expected.x, expected.y), "(x, y)")


def units(cls: Method, big: float = 1.0, small: float = 100.0) -> None:
    """The polyhedral case in other units: its solution in them, and its multipliers, since rows and f are the same.

    Raises:
        AssertionError: if not.
    """
    chosen = problems.case("coupled_polyhedral")
    x, y = chosen.start
    found = solve(cls, in_units(chosen, big, small), x / big, y * small, 1_500)
    close((big * found.x, found.y / small), (chosen.x_star, chosen.y_star), "(x, y)")
    close(found.multipliers["lower_inequality"], chosen.multipliers_star["lower_inequality"], "the multipliers")  # type: ignore[index]


Check = Callable[[Method], None]
CHECKS: tuple[Check, ...] = (
    active,
    inactive,
    polyhedral,
    equation,
    bounds,
    scaled,
    large_rows,
    directions,
    lengths,
    units,
)
