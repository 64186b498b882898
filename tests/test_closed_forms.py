"""The closed forms of the cases for penalty and value-function methods, against answers found without them."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, jacrev

import constrained
import problems
from implicit import tree
from problems.case import Case

FAMILIES = {"penalty", "lv_hba"}
NAMES = sorted(name for name, found in problems.entries().items() if FAMILIES & found.tags)
SMALL = {"coupled_sum": {"n": 3}, "coupled_sum_bilinear": {"n": 3}}
OTHER = {"nonconvex_lower", "nonconvex_lower_far", "discontinuous", "coupled_polyhedral"}
KKT = [name for name in NAMES if name not in OTHER]
"""Convex lower levels without a set: (x, y) is feasible exactly where multipliers exist."""
SCALAR = [name for name in NAMES if tree.size(problems.case(name).start) == 2]
PENALIZED = ["box", "box_active", "box_kink", "quadratic", "quadratic_pytree", "many_solutions"]
PENALIZED += ["many_solutions_selected", "discontinuous"]


def build(name: str) -> Case:
    return problems.case(name, **SMALL.get(name, {}))


class Flat:
    """A case on ravelled points."""

    def __init__(self, case: Case) -> None:
        self.case, self.problem = case, case.problem
        self.x, self.y = tree.ravel(case.x_star), tree.ravel(case.y_star)

    def trees(self, x: Tensor, y: Tensor) -> tuple[tree.Tree, tree.Tree]:
        return tree.unravel(x, self.case.x_star), tree.unravel(y, self.case.y_star)

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return self.problem.upper(*self.trees(x, y))

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return self.problem.lower(*self.trees(x, y))

    def rows(self, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """Lower constraints and how many of them, the last ones, are equations."""
        found = [x.new_zeros(0), x.new_zeros(0)]
        for k, name in enumerate(("lower_inequality", "lower_equality")):
            function = getattr(self.problem, name)
            if function is not None:
                found[k] = tree.ravel(function(*self.trees(x, y)))
        return torch.cat(found), len(found[1])

    @property
    def multipliers(self) -> Tensor:
        declared = self.case.multipliers_star or {}
        parts = [tree.ravel(declared[key]) for key in ("lower_inequality", "lower_equality") if key in declared]
        return torch.cat([*parts, self.x.new_zeros(0)])

    def stationarity(self, x: Tensor, y: Tensor, multipliers: Tensor) -> Tensor:
        return grad(lambda y: self.lower(x, y) + multipliers @ self.rows(x, y)[0])(y)


def test_every_problem_of_the_families_is_there() -> None:
    plain = {"many_solutions", "many_solutions_selected", "nonconvex_lower", "nonconvex_lower_far", "discontinuous"}
    assert plain == {n for n in NAMES if "penalty" in problems.entry(n).tags}
    coupled = {"scalar_active", "scalar_inactive", "scalar_degenerate", "scalar_shifted", "sum", "sum_bilinear"}
    coupled |= {"segment", "waves_1", "waves_2", "waves_3", "waves_4", "polyhedral"}
    assert {f"coupled_{name}" for name in coupled} == {n for n in NAMES if "lv_hba" in problems.entry(n).tags}


@pytest.mark.parametrize("name", NAMES)
def test_the_declaration_is_consistent(name: str) -> None:
    case = problems.case(name)
    case.problem.validate(*case.start)
    assert tree.describe(case.x_star) == tree.describe(case.start[0])
    assert tree.describe(case.y_star) == tree.describe(case.start[1])
    assert case.problem.upper_set.contains(case.x_star)
    assert case.problem.lower_set.contains(case.y_star)
    assert float(case.problem.upper(case.x_star, case.y_star)) == case.upper_star
    assert case.lower_class in ("strongly convex", "convex", "nonconvex")
    assert ("constraints" in case.tags) == bool(case.problem.constraints)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "discontinuous"])
def test_the_lower_class_is_what_the_hessian_says(name: str, generator: torch.Generator) -> None:
    flat = Flat(build(name))
    curvature = jacrev(grad(flat.lower, argnums=1), argnums=1)
    split = [len(flat.x), len(flat.y)]
    draws = [torch.randn(sum(split), generator=generator).mul(3) for _ in range(20)]
    lowest = min(float(torch.linalg.eigvalsh(curvature(*z.split(split)))[0]) for z in draws)
    found = "strongly convex" if lowest > 1e-8 else "convex" if lowest > -1e-8 else "nonconvex"
    assert found == flat.case.lower_class


@pytest.mark.parametrize("name", NAMES)
def test_the_multipliers_satisfy_the_kkt_conditions(name: str) -> None:
    flat = Flat(problems.case(name))
    rows, equations = flat.rows(flat.x, flat.y)
    inequalities, signed = rows[: len(rows) - equations], flat.multipliers[: len(rows) - equations]
    assert float(flat.stationarity(flat.x, flat.y, flat.multipliers).abs().max()) < 1e-12
    assert float(rows[len(rows) - equations :].abs().sum()) < 1e-12
    assert bool((inequalities < 1e-12).all())
    assert bool((signed >= 0).all())
    assert float((inequalities * signed).abs().sum()) < 1e-11


def smallest_piece(case: Case, generator: torch.Generator, starts: int) -> tuple[float, np.ndarray]:
    """The least f over all points that satisfy the lower KKT system, by SLSQP on each set of active rows."""
    flat = Flat(case)
    n, m = len(flat.x), len(flat.y)
    count, equations = len(flat.rows(flat.x, flat.y)[0]), flat.rows(flat.x, flat.y)[1]
    free = count - equations

    def split(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, multipliers = z.split([n, m, count])
        return x, y, multipliers

    def numeric(function: Callable[[Tensor], Tensor]) -> tuple[Callable, Callable]:
        return (
            lambda z: function(torch.from_numpy(z)).detach().numpy(),
            lambda z: jacrev(function)(torch.from_numpy(z)).detach().numpy(),
        )

    value, slope = numeric(lambda z: flat.upper(*split(z)[:2]))
    best = np.inf, np.empty(0)
    box = case.problem.upper_set
    for active in itertools.product((False, True), repeat=free):
        mask = torch.tensor([*active, *[True] * equations], dtype=torch.bool)

        def equal(z: Tensor, mask: Tensor = mask) -> Tensor:
            x, y, multipliers = split(z)
            rows = flat.rows(x, y)[0]
            return torch.cat([flat.stationarity(x, y, multipliers), rows[mask], multipliers[~mask]])

        def least(z: Tensor, mask: Tensor = mask) -> Tensor:
            x, y, multipliers = split(z)
            rows = [-flat.rows(x, y)[0][~mask], multipliers[:free]]
            if isinstance(box, constrained.Box):
                rows += [x - box.lower, box.upper - x]
            return torch.cat(rows)

        equation, slack = numeric(equal), numeric(least)
        # Where g sees y in few directions only, stationarity repeats itself, which SLSQP cannot bear.
        sides, sizes, _ = np.linalg.svd(equation[1](np.ones(n + m + count)))
        keep = sides[:, : int((sizes > 1e-10).sum())].T
        conditions: list[dict[str, object]] = [
            {
                "type": "eq",
                "fun": lambda z, keep=keep, f=equation[0]: keep @ f(z),
                "jac": lambda z, keep=keep, f=equation[1]: keep @ f(z),
            }
        ]
        if len(slack[0](np.zeros(n + m + count))):
            conditions.append({"type": "ineq", "fun": slack[0], "jac": slack[1]})
        for k in range(starts):
            z0 = torch.randn(n + m + count, generator=generator).numpy() + k % 3
            found = scipy.optimize.minimize(
                value, z0, jac=slope, method="SLSQP", constraints=conditions, options={"ftol": 1e-14, "maxiter": 300}
            )
            violation = max(np.abs(equation[0](found.x)).max(), -slack[0](found.x).min(initial=0.0))
            if violation < 1e-7 and found.fun < best[0]:
                best = float(found.fun), found.x[:n]
    return best


@pytest.mark.parametrize("name", KKT)
def test_nothing_feasible_is_better(name: str, generator: torch.Generator) -> None:
    case = build(name)
    value, x = smallest_piece(case, generator, starts=8 if "waves" in name else 2)
    assert case.upper_star is not None
    assert value == pytest.approx(case.upper_star, rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(
        x, tree.ravel(case.x_star).numpy(), atol=2e-3 if name == "coupled_sum_bilinear" else 1e-5
    )


# Scalar problems: both levels on a grid.


def grid_values(case: Case, xs: Tensor, ys: Tensor) -> Tensor:
    """psi at each x: the least f among the y whose g is the least up to the resolution, within the constraints."""
    pairs = xs[:, None].expand(-1, len(ys)), ys.expand(len(xs), -1)
    values, width = case.problem.lower(*pairs), float(ys[1] - ys[0])
    if case.problem.lower_inequality is not None:
        values = values.where(case.problem.lower_inequality(*pairs) <= 1e-9, torch.inf)
    lower_set = case.problem.lower_set
    if isinstance(lower_set, constrained.Box):
        values = values.where((pairs[1] >= lower_set.lower) & (pairs[1] <= lower_set.upper), torch.inf)
    near = values <= values.amin(dim=1, keepdim=True) + 0.25 * width**2
    return case.problem.upper(*pairs).where(near, torch.inf).amin(dim=1)


@pytest.mark.parametrize("name", [n for n in SCALAR if n != "discontinuous"])
def test_scalar_problems_on_a_grid(name: str) -> None:
    case = problems.case(name)
    low, high = (0.0, 3.0) if "waves" in name else (-2.0, 4.0)
    xs, ys = torch.linspace(low, high, 1201), torch.linspace(-3.0, 5.0, 3201)
    psi = grid_values(case, xs, ys)
    best = int(psi.argmin())
    assert case.upper_star is not None
    assert float(psi[best]) == pytest.approx(case.upper_star, abs=5e-3)
    assert abs(float(xs[best] - case.x_star)) < 0.02
    inside = (psi[1:-1] < psi[:-2]) & (psi[1:-1] < psi[2:])
    minima = sorted(xs[1:-1][inside].tolist())
    np.testing.assert_allclose(minima, sorted(map(float, (case.x_star, *case.local_minima))), atol=0.02)


def test_the_discontinuous_one_on_a_grid() -> None:
    case = problems.case("discontinuous")
    xs = torch.linspace(-2.0, 2.0, 401)
    psi = grid_values(case, xs, torch.linspace(-1.0, 1.0, 201))
    torch.testing.assert_close(psi, (xs**2 + 1).where(xs.abs() > 1e-12, 0.0))
    assert (case.upper_star, float(case.x_star)) == (0.0, 0.0)


@pytest.mark.parametrize("name", [n for n in NAMES if "waves" in n])
def test_the_four_minima_have_no_slope(name: str) -> None:
    case = problems.case(name)

    def psi(x: Tensor) -> Tensor:
        return case.problem.upper(x, x)  # y* = x, which the grid test confirms

    minima = torch.stack([case.x_star, *case.local_minima])
    assert float(torch.stack([grad(psi)(x) for x in minima]).abs().max()) < 1e-12
    assert bool((torch.stack([grad(grad(psi))(x) for x in minima]) > 1).all())
    assert all(float(psi(x)) > float(psi(case.x_star)) for x in minima[1:])
    assert float(case.start[0]) == (0.2, 1.0, 1.9, 2.9)[int(name[-1]) - 1]


# The random polyhedron.


def polyhedral(case: Case) -> Callable[[Tensor], Tensor]:
    """psi on rows of x, with y* from quadratic programs."""
    zero_x, zero_y = case.start
    rows = case.problem.lower_inequality
    assert rows is not None
    B, A = jacrev(rows, argnums=(0, 1))(zero_x, zero_y)
    b = -rows(zero_x, zero_y)
    P = -jacrev(grad(case.problem.lower, argnums=1))(zero_x, zero_y)

    def psi(xs: Tensor) -> Tensor:
        y = constrained.solve_qp(torch.eye(len(P)), -xs @ P.T, G=A, h=b - xs @ B.T).x
        return torch.stack([case.problem.upper(*pair) for pair in zip(xs, y, strict=True)])

    return psi


@pytest.mark.filterwarnings("ignore::implicit.ConvergenceWarning")  # BFGS may try a point on a kink
def test_the_polyhedral_problem_has_one_minimum(generator: torch.Generator) -> None:
    case = problems.case("coupled_polyhedral")
    psi = polyhedral(case)
    assert case.upper_star is not None
    draws = case.x_star + torch.logspace(-2, 1, 300)[:, None] * torch.randn(300, 3, generator=generator)
    assert float(psi(draws).min()) > case.upper_star

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(x).requires_grad_(True)
        found = psi(point[None])[0]
        return float(found.detach()), torch.autograd.grad(found, point)[0].numpy()

    for _ in range(3):
        start = 2 * torch.randn(3, generator=generator).numpy()
        found = scipy.optimize.minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(found.x, case.x_star.numpy(), atol=1e-7)
        assert found.fun == pytest.approx(case.upper_star, rel=1e-10)


def test_the_polyhedral_problem_has_rows_of_both_kinds() -> None:
    case = problems.case("coupled_polyhedral")
    assert case.multipliers_star is not None
    multipliers = case.multipliers_star["lower_inequality"]
    assert sorted(multipliers > 0.1) == [False, True, True]
    assert case.problem.lower_inequality is not None
    rows = case.problem.lower_inequality(case.x_star, case.y_star)
    assert float(rows[multipliers == 0]) < -0.5


@pytest.mark.parametrize("seed", range(6))
def test_the_enumeration_for_other_seeds(seed: int, generator: torch.Generator) -> None:
    case = problems.case("coupled_polyhedral", seed=seed)
    psi = polyhedral(case)
    flat = Flat(case)
    assert case.upper_star is not None
    assert float(psi(case.x_star[None])[0]) == pytest.approx(case.upper_star, rel=1e-9)
    assert float(flat.stationarity(flat.x, flat.y, flat.multipliers).abs().max()) < 1e-9
    draws = case.x_star + torch.logspace(-2, 1, 200)[:, None] * torch.randn(200, 3, generator=generator)
    assert float(psi(draws).min()) > case.upper_star


def test_the_polyhedral_problem_limits_its_enumeration() -> None:
    with pytest.raises(ValueError, match=r"rows must be 1 to 6, got 7"):
        problems.case("coupled_polyhedral", rows=7)
    with pytest.raises(ValueError, match=r"n must be at least 1, got 0"):
        problems.case("coupled_sum", n=0)
    with pytest.raises(ValueError, match=r"r = 0.5 is too small for c = 2.0"):
        problems.case("many_solutions_selected", c=2.0, r=0.5)


# The joint sets.


@pytest.mark.parametrize("name", [n for n in NAMES if problems.case(n).problem.joint_set is not None])
def test_joint_sets_say_what_the_constraints_say(name: str, generator: torch.Generator) -> None:
    flat = Flat(problems.case(name))
    chosen = flat.problem.joint_set
    assert chosen is not None
    inside, split = 0, [len(flat.x), len(flat.y)]
    for _ in range(20):
        z = torch.randn(sum(split), generator=generator)
        rows, equations = flat.rows(*z.split(split))
        feasible = bool((rows[: len(rows) - equations] <= 0).all()) and equations == 0
        point = flat.trees(*z.split(split))
        projected = tree.ravel(chosen.project(point))
        assert feasible == (float((projected - z).norm()) == 0.0)
        # The nearest point lies on the constraint, in the direction of its gradient.
        assert feasible or float(flat.rows(*projected.split(split))[0].abs().max()) < 1e-11
        normal = jacrev(lambda z: flat.rows(*z.split(split))[0])(z)
        moved = z - projected
        torch.testing.assert_close(moved, normal.T @ torch.linalg.lstsq(normal.T, moved).solution)
        inside += feasible
    assert inside == 0 if "sum" in name else 0 < inside < 20


# The penalised hyper-objective.


def penalized(case: Case, sigma: float, x: Tensor) -> float:
    """psi_sigma at ravelled x, by minimizing f + g / sigma and g over the lower set with scipy."""
    flat = Flat(case)
    box = case.problem.lower_set
    bounds = [(box.lower, box.upper)] * len(flat.y) if isinstance(box, constrained.Box) else None

    def least(function: Callable[[Tensor], Tensor]) -> float:
        def value(y: np.ndarray) -> tuple[float, np.ndarray]:
            point = torch.from_numpy(y)
            return float(function(point)), grad(function)(point).numpy()

        tight = {"ftol": 1e-16, "gtol": 1e-12, "maxiter": 1000, "maxcor": 30}
        found = scipy.optimize.minimize(
            value, flat.y.numpy() + 0.5, jac=True, method="L-BFGS-B", bounds=bounds, options=tight
        )
        return float(found.fun)

    return least(lambda y: flat.upper(x, y) + flat.lower(x, y) / sigma) - least(lambda y: flat.lower(x, y)) / sigma


@pytest.mark.parametrize("sigma", [0.3, 0.05])
@pytest.mark.parametrize("name", PENALIZED)
def test_the_penalised_minimizer(name: str, sigma: float, generator: torch.Generator) -> None:
    case = problems.case(name)
    assert case.x_penalized is not None
    x = tree.ravel(case.x_penalized(sigma))
    assert tree.describe(case.x_penalized(sigma)) == tree.describe(case.x_star)
    box = case.problem.upper_set
    upper = box.upper if isinstance(box, constrained.Box) else torch.inf
    best = penalized(case, sigma, x)
    for width in (1e-3, 1e-1):
        for _ in range(3):
            step = width * torch.nn.functional.normalize(torch.randn(len(x), generator=generator), dim=0)
            ahead, behind = ((x + s * step).clamp(max=upper) for s in (1, -1))
            values = penalized(case, sigma, ahead), penalized(case, sigma, behind)
            assert min(values) > best - 1e-10
            if width == 1e-3 and name not in ("box_active", "discontinuous"):  # smooth there
                assert abs(values[0] - values[1]) < 1e-5 * width


@pytest.mark.parametrize("name", [n for n in PENALIZED if n not in ("box_active", "discontinuous")])
def test_the_bias_is_proportional_to_sigma(name: str) -> None:
    case = problems.case(name)
    assert case.x_penalized is not None
    once, half = (float(tree.norm(tree.sub(case.x_penalized(s), case.x_star))) for s in (1e-3, 5e-4))
    assert 0 < half < once
    assert once / half == pytest.approx(2.0, rel=0.01)


def test_the_penalised_values_have_the_stated_closed_form() -> None:
    case, sigma = problems.case("discontinuous"), 0.3
    for x in torch.linspace(-1.2, 1.2, 13):
        inside = x**2 - x**2 / (4 * sigma**2) + x.abs() / sigma
        stated = inside if abs(float(x)) <= 2 * sigma else x**2 + 1
        assert penalized(case, sigma, x[None]) == pytest.approx(float(stated), abs=1e-9)


def test_the_gradient_of_the_penalised_value(generator: torch.Generator) -> None:
    """``f_x(x, y) + (g_x(x, y) - g_x(x, z)) / sigma`` with y = (H + sI)^-1 (Bx + c + s(a - D'x)), z = H^-1 (Bx + c)."""
    case, sigma = problems.case("quadratic"), 0.1
    f, g = case.problem.upper, case.problem.lower
    x, zero = torch.randn(5, generator=generator), torch.zeros(8)
    hessian = jacrev(grad(g, argnums=1), argnums=1)(x, zero)
    z = torch.linalg.solve(hessian, -grad(g, argnums=1)(x, zero))
    y = torch.linalg.solve(
        hessian + sigma * torch.eye(8), -grad(g, argnums=1)(x, zero) - sigma * grad(f, argnums=1)(x, zero)
    )
    stated = grad(f)(x, y) + (grad(g)(x, y) - grad(g)(x, z)) / sigma
    steps = 1e-3 * torch.eye(5)
    found = [(penalized(case, sigma, x + e) - penalized(case, sigma, x - e)) / 2e-3 for e in steps]
    np.testing.assert_allclose(found, stated.numpy(), atol=1e-7)
