"""Hypergradients through pseudo-inverses against derivatives of the exactly solved problem."""

import functools
from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

import constrained
from bilevel import BilevelProblem, singular_hypergradient
from tests.mutation import mutated


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differences(psi: Callable[[Tensor], float], x: Tensor, h: float = 1e-3) -> Tensor:
    """Central differences of order six."""
    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    found = []
    for unit in torch.eye(len(x)):
        found.append(sum(w * (psi(x + k * h * unit) - psi(x - k * h * unit)) for k, w in weights.items()) / h)
    return torch.tensor(found)


class ManySolutions:
    """``g = |A y - phi(x)|^2 / 2`` with a wide A: a plane of solutions, on which f is quadratic."""

    def __init__(self) -> None:
        self.A, self.B, self.C = draw(3, 5, seed=1), draw(3, 2, seed=2), draw(5, 2, seed=3)
        self.x = torch.tensor([0.3, -0.7])
        self.null = torch.linalg.svd(self.A).Vh[3:].T
        self.problem = BilevelProblem(self.f, self.g)

    def phi(self, x: Tensor) -> Tensor:
        return torch.sin(self.B @ x) + x.sum() ** 2

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((y - self.C @ x) ** 2).sum() + (x**3).sum() + y[0] * x[1]

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((self.A @ y - self.phi(x)) ** 2).sum()

    def best(self, x: Tensor) -> Tensor:
        """The solution that is best for f: the stationary point on the plane."""
        some = torch.linalg.pinv(self.A) @ self.phi(x)
        wanted = self.C @ x - x[1] * torch.eye(5)[0]
        return some + self.null @ (self.null.T @ (wanted - some))

    def psi(self, x: Tensor) -> float:
        return float(self.f(x, self.best(x)))


def check_many_solutions(find: Any = singular_hypergradient) -> None:
    case = ManySolutions()
    found = find(case.problem, case.x, case.best(case.x))
    expected = differences(case.psi, case.x)
    assert torch.allclose(found.value, expected, rtol=0, atol=2e-11)
    assert (found.rank, found.size) == (3, 5) and found.residual < 1e-12 and found.motion < 1e-12
    assert found.notes == () and found.upper_value == pytest.approx(case.psi(case.x), rel=1e-14)


def test_many_solutions() -> None:
    check_many_solutions()


def test_another_lower_solution_gives_another_value_and_says_so() -> None:
    case = ManySolutions()
    elsewhere = case.best(case.x) + case.null @ torch.tensor([1.0, -0.5])
    assert float(case.g(case.x, elsewhere)) < 1e-28
    found = singular_hypergradient(case.problem, case.x, elsewhere)
    assert float((found.value - differences(case.psi, case.x)).abs().max()) > 0.1
    assert found.residual > 0.1
    assert any("not the lower solution that is best for upper" in note for note in found.notes)


def test_solutions_on_a_circle() -> None:
    """S(x) is the circle of radius x; the nearest point of it to b is best."""
    b = torch.tensor([1.0, 2.0])
    problem = BilevelProblem(
        upper=lambda x, y: 0.5 * ((y - b) ** 2).sum(), lower=lambda x, y: ((y**2).sum() - x[0] ** 2) ** 2
    )
    x = torch.tensor([1.3])
    found = singular_hypergradient(problem, x, b * x / b.norm())
    assert float(found.value[0]) == pytest.approx(float(x[0] - b.norm()), abs=1e-12)
    assert (found.rank, found.size) == (1, 2)


def test_strongly_convex_is_the_implicit_hypergradient() -> None:
    import implicit

    H = draw(4, 4, seed=5)
    H = H @ H.T + torch.eye(4)
    B = draw(4, 3, seed=6)
    problem = BilevelProblem(
        upper=lambda x, y: (y**3).sum() + (x * y[:3]).sum(),
        lower=lambda x, y: 0.5 * y @ H @ y - (x**2) @ B.T @ y,
    )
    x = draw(3, seed=7)
    y = torch.linalg.solve(H, B @ x**2)
    expected = implicit.hypergradient(problem.upper, problem.lower, x, y, linear_solver=implicit.LU())
    found = singular_hypergradient(problem, x, y)
    assert torch.allclose(found.value, expected.value, atol=1e-12) and found.rank == found.size == 4


class Coupled:
    """A strictly convex lower program with rows and bounds that move with x; two rows and a bound are active."""

    def __init__(self) -> None:
        self.square, self.low = 0.3, -0.4
        H = draw(5, 5, seed=511)
        self.H = H @ H.T + torch.eye(5)
        self.B, self.A, self.C = draw(5, 3, seed=512), draw(4, 5, seed=513), draw(4, 3, seed=514)
        self.x = draw(3, seed=515)
        self.problem = BilevelProblem(
            upper=self.f,
            lower=self.g,
            lower_inequality=lambda x, y: {"rows": self.rows(x, y), "ball": self.ball(x, y)},
            lower_equality=self.h,
            lower_set=constrained.Box(self.low, 10.0),
        )
        solve = constrained.differentiable(
            lambda y, x: self.g(x, y),
            inequality=lambda y, x: (self.rows(x, y), self.ball(x, y)),
            equality=lambda y, x: self.h(x, y),
            lower=self.low,
            upper=10.0,
            atol=1e-10,
        )
        self.solve = functools.partial(solve, torch.zeros(5))
        self.y = self.solve(self.x).x.detach()

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((y - 1.0) ** 2).sum() + (x * y[:3]).sum() + (x**2).sum()

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * y @ self.H @ y + 5 * y @ (self.B @ torch.sin(x)) + (y**4).sum() / 10

    def rows(self, x: Tensor, y: Tensor) -> Tensor:
        """Bilinear in (x, y): the cross derivative needs the multipliers."""
        return self.A @ y + self.C @ x * (1 + 0.2 * y[0]) - 0.5

    def ball(self, x: Tensor, y: Tensor) -> Tensor:
        return (y**2).sum() - self.square - 0.1 * x[0] ** 2

    def h(self, x: Tensor, y: Tensor) -> Tensor:
        return y.sum() + 0.3 * x[1]

    def multipliers(self) -> dict[str, Any]:
        solved = self.solve(self.x)
        return {
            "lower_inequality": {"rows": solved.inequality[0].detach(), "ball": solved.inequality[1].detach()},
            "lower_equality": solved.equality.detach(),
            "lower_set": (solved.upper - solved.lower).detach(),
        }

    def psi_gradient(self) -> Tensor:
        own = self.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.f(own, self.solve(own).x), own)
        return gradient


@functools.cache
def coupled() -> Coupled:
    return Coupled()


def check_coupled_constraints(find: Any = singular_hypergradient) -> None:
    case = coupled()
    found = find(case.problem, case.x, case.y)
    assert int(found.active["lower_inequality"]["rows"].sum()) == 1 and bool(found.active["lower_inequality"]["ball"])
    assert bool(found.active["lower_equality"]) and int(found.active["lower_set"].sum()) == 1
    assert torch.allclose(found.value, case.psi_gradient(), rtol=0, atol=1e-9), (found.value, case.psi_gradient())
    assert found.residual < 1e-10 and found.rank == found.size


def test_coupled_constraints_equal_the_derivative_of_the_solved_program() -> None:
    check_coupled_constraints()


def test_the_reference_of_the_coupled_test_agrees_with_differences() -> None:
    case = coupled()
    psi = lambda x: float(case.f(x, case.solve(x).x))  # noqa: E731
    assert torch.allclose(case.psi_gradient(), differences(psi, case.x, 2e-4), rtol=0, atol=2e-7)


def test_without_the_active_rows_the_value_is_wrong() -> None:
    case = coupled()
    ignored = BilevelProblem(case.f, case.g)
    found = singular_hypergradient(ignored, case.x, case.y)
    assert float((found.value - case.psi_gradient()).abs().max()) > 0.1


def test_given_multipliers_are_used() -> None:
    case = coupled()
    given = case.multipliers()
    found = singular_hypergradient(case.problem, case.x, case.y, multipliers=given)
    assert torch.allclose(found.value, case.psi_gradient(), rtol=0, atol=1e-9)
    rows = given["lower_inequality"]
    turned = {**given, "lower_inequality": {"ball": rows["ball"], "rows": rows["rows"]}}
    again = singular_hypergradient(case.problem, case.x, case.y, multipliers=turned)
    assert torch.equal(again.value, found.value) and found.notes == again.notes == ()
    wrong = {
        **given,
        "lower_equality": given["lower_equality"] * 0,
        "lower_inequality": {"rows": 0 * given["lower_inequality"]["rows"], "ball": torch.tensor(5.0)},
    }
    moved = singular_hypergradient(case.problem, case.x, case.y, multipliers=wrong)
    assert float((moved.value - case.psi_gradient()).abs().max()) > 1e-2
    assert any("does not satisfy the lower optimality conditions" in note for note in moved.notes)


class Units:
    """A quadratic program whose objective, rows and variables are measured in any units; y has one entry fixed."""

    def __init__(self, objective: float = 1.0, row: float = 1.0) -> None:
        H = draw(5, 5, seed=21)
        self.H, self.B, self.a = H @ H.T + torch.eye(5), draw(5, 2, seed=22), draw(2, 5, seed=23)
        self.x = torch.tensor([0.4, 0.7])
        self.problem = BilevelProblem(
            upper=lambda x, y: ((y - 1) ** 2).sum() / 2 + (x * y[:2]).sum(),
            lower=lambda x, y: objective * (0.5 * y @ self.H @ y - (self.B @ x) @ y),
            lower_equality=lambda x, y: row * (self.a[0] @ y - x[0] - x[1] ** 2),
            lower_inequality=lambda x, y: (self.a[1] @ y - 5 * x[1] + 4).reshape(1) / row,
            lower_set=constrained.Box(torch.tensor([-9.0, -9.0, 0.2, -9, -9]), torch.tensor([9.0, 9.0, 0.2, 9, 9])),
        )

    def solved(self, x: Tensor) -> Tensor:
        """y, and the multipliers: both rows are tight, and y_2 is 0.2."""
        rows = torch.cat([self.a, torch.eye(5)[2:3]])
        system = torch.cat([torch.cat([self.H, rows.T], 1), torch.cat([rows, torch.zeros(3, 3)], 1)])
        right = torch.cat([self.B @ x, torch.stack([x[0] + x[1] ** 2, 5 * x[1] - 4, torch.tensor(0.2)])])
        return torch.linalg.solve(system, right)

    def psi(self, x: Tensor) -> float:
        return float(self.problem.upper(x, self.solved(x)[:5]))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("objective", "row"), [(1.0, 1.0), (1e9, 1.0), (1e3, 1e5), (1e-4, 1e-3)])
def test_units_do_not_matter(objective: float, row: float, dense: bool) -> None:
    check_units(singular_hypergradient, objective, row, dense)


def check_units(find: Any, objective: float = 1e6, row: float = 1.0, dense: bool = True) -> None:
    case = Units(objective, row)
    solution = case.solved(case.x)
    assert float(solution[6]) > 0.1  # the inequality has a force
    found = find(case.problem, case.x, solution[:5], dense=dense)
    assert torch.allclose(found.value, differences(case.psi, case.x), rtol=0, atol=1e-9), found
    assert found.active["lower_set"].tolist() == [False, False, True, False, False]
    assert found.residual < 1e-9 and found.notes == ()


def test_a_vertex_of_a_linear_program() -> None:
    """The Hessian is zero, and y solves the active rows."""
    A, c = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([-1.0, -1.0])
    problem = BilevelProblem(
        upper=lambda x, y: (y**2).sum() * x[0],
        lower=lambda x, y: c @ y,
        lower_inequality=lambda x, y: torch.cat([A @ y - x**2, -y]),
    )
    vertex = lambda x: torch.linalg.solve(A, x**2)  # noqa: E731
    x = torch.tensor([1.5, 1.7])
    v = cp.Variable(2, nonneg=True)
    cp.Problem(cp.Minimize(c.numpy() @ v), [A.numpy() @ v <= x.numpy() ** 2]).solve()
    np.testing.assert_allclose(np.asarray(v.value), vertex(x).numpy(), atol=1e-7)
    found = singular_hypergradient(problem, x, vertex(x))
    expected = differences(lambda x: float(problem.upper(x, vertex(x))), x)
    assert torch.allclose(found.value, expected, rtol=0, atol=1e-9) and (found.rank, found.size) == (4, 4)
    assert found.active["lower_inequality"].tolist() == [True, True, False, False] and found.notes == ()


def test_rows_that_say_the_same_have_many_multipliers() -> None:
    """K is singular in the multipliers, whose choice changes nothing."""
    H = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    single = lambda x, y: y.sum() - x[0] * x[1]  # noqa: E731
    problem = BilevelProblem(
        upper=lambda x, y: (y**3).sum() + x[1] * y[0],
        lower=lambda x, y: 0.5 * y @ H @ y - y.sum() * 5 - x[1] * y[2],
        lower_inequality=lambda x, y: torch.stack([single(x, y), 3 * single(x, y) + single(x, y) ** 2]),
        lower_equality=lambda x, y: torch.stack([y[0] - y[1], 2 * (y[0] - y[1])]),
    )

    def best(x: Tensor) -> Tensor:
        # y_0 = y_1 = (x_0 x_1 - y_2) / 2: the minimum over y_2.
        total, curve = x[0] * x[1], 3.0 / 4.0
        last = (curve * total + x[1]) / (curve + 3.0)
        return torch.stack([(total - last) / 2, (total - last) / 2, last])

    x = torch.tensor([0.6, 0.9])
    expected = differences(lambda x: float(problem.upper(x, best(x))), x)
    for share in (None, 0.0, 0.5, 1.0):
        force = 5.0 - 0.5 * float(best(x)[0] * 3)  # the y_0 and y_1 rows of stationarity, added
        given = {
            "lower_inequality": torch.tensor([share * force, (1 - share) * force / 3]),
            "lower_equality": torch.tensor([0.5 * float(best(x)[0]), 0.0]),
        } if share is not None else None  # fmt: skip
        found = singular_hypergradient(problem, x, best(x), multipliers=given)
        assert torch.allclose(found.value, expected, rtol=0, atol=1e-9)
        assert found.residual < 1e-10 and found.motion is not None and found.motion < 1e-10
        assert found.rank == 5 and all("kink" in note for note in found.notes)


def test_a_point_that_is_no_lower_solution_is_reported() -> None:
    case = Units()
    (note,) = singular_hypergradient(case.problem, case.x, case.solved(case.x)[:5] + 0.01).notes
    assert "does not satisfy the lower optimality conditions" in note and "solve the lower level" in note


def test_an_equality_without_gradient_is_reported() -> None:
    """x - 1 + (y - 1)^2 = 0 has the solution y = 1 at x = 1, but no multiplier, and no solution at a larger x."""
    problem = BilevelProblem(
        upper=lambda x, y: (y**2).sum(),
        lower=lambda x, y: ((y - 3) ** 2).sum(),
        lower_equality=lambda x, y: x - 1 + (y - 1) ** 2,
    )
    found = singular_hypergradient(problem, torch.ones(1), torch.ones(1))
    assert found.motion == pytest.approx(1.0) and any("do not move smoothly" in note for note in found.notes)
    assert any("does not satisfy the lower optimality conditions" in note for note in found.notes)


def test_a_fixed_entry_without_force_is_no_edge() -> None:
    problem = BilevelProblem(
        upper=lambda x, y: (y**2).sum(),
        lower=lambda x, y: 0.5 * ((y - x) ** 2).sum(),
        lower_set=constrained.Box(torch.tensor([-5.0, 1.0]), torch.tensor([5.0, 1.0])),
    )
    found = singular_hypergradient(problem, torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.0]))
    assert found.value.tolist() == pytest.approx([4.0, 0.0], abs=1e-12) and found.notes == ()
    assert found.active["lower_set"].tolist() == [False, True]


def test_many_unknowns_without_matrices() -> None:
    """300 unknowns, a third without curvature: psi is half the squares of sin x elsewhere."""
    curvature = torch.logspace(-2, 1, 300)
    curvature[::3] = 0.0
    problem = BilevelProblem(
        upper=lambda x, y: 0.5 * (y**2).sum(), lower=lambda x, y: 0.5 * (curvature * (y - x.sin()) ** 2).sum()
    )
    x = draw(300, seed=31)
    kept = curvature > 0
    y = torch.where(kept, x.sin(), 0.0)
    found = singular_hypergradient(problem, x, y, dense=False)
    assert torch.allclose(found.value, torch.where(kept, x.sin() * x.cos(), 0.0), rtol=0, atol=1e-6)
    assert found.residual < 1e-9 and found.notes == ()


class FlatProgram:
    """A lower quadratic program with a singular Hessian and an active row: a segment of solutions."""

    def __init__(self) -> None:
        self.a = torch.tensor([1.0, 1.0, 0.0])
        self.x = torch.tensor([0.8, 0.3])
        self.problem = BilevelProblem(
            upper=self.f,
            lower=lambda x, y: 0.5 * (self.a @ y - 3 * x[0]) ** 2 - 2.0 * y[2],
            lower_inequality=lambda x, y: y[2] + 0.5 * (y[0] + y[1]) - x[1] - 1.0,
            lower_set=constrained.Box(torch.full((3,), -5.0), torch.full((3,), 5.0)),
        )

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((y - torch.tensor([1.0, -2.0, 0.5])) ** 2).sum() + x[0] * y[1] + x[1] ** 2

    def best(self, x: Tensor) -> Tensor:
        """The lower optimum has a'y = 3 x_0 - 1, y_2 = 1 + x_1 - a'y / 2 (by elimination); then f in y_0 - y_1."""
        total = 3 * x[0] - 1.0
        last = 1.0 + x[1] - 0.5 * total
        # min over y_0 of (y_0 - 1)^2 / 2 + (total - y_0 + 2)^2 / 2 + x_0 (total - y_0)
        first = 0.5 * (1.0 + total + 2.0 + x[0])
        return torch.stack([first, total - first, last])

    def psi(self, x: Tensor) -> float:
        return float(self.f(x, self.best(x)))


def test_a_segment_of_constrained_solutions() -> None:
    case = FlatProgram()
    y = case.best(case.x)
    v, x = cp.Variable(3), case.x.numpy()
    a = case.a.numpy()
    goal = 0.5 * cp.square(a @ v - 3 * x[0]) - 2.0 * v[2]
    cp.Problem(cp.Minimize(goal), [v[2] + 0.5 * (v[0] + v[1]) <= x[1] + 1.0, v >= -5, v <= 5]).solve()
    assert float(case.problem.lower(case.x, y)) == pytest.approx(float(np.asarray(goal.value)), abs=1e-7)
    found = singular_hypergradient(case.problem, case.x, y)
    assert torch.allclose(found.value, differences(case.psi, case.x), rtol=0, atol=1e-10)
    assert (found.rank, found.size) == (3, 4) and found.residual < 1e-10


@pytest.mark.parametrize("build", [ManySolutions, FlatProgram])
def test_without_matrices(build: Callable[[], Any]) -> None:
    case = build()
    found = singular_hypergradient(case.problem, case.x, case.best(case.x), dense=False)
    assert torch.allclose(found.value, differences(case.psi, case.x), rtol=0, atol=1e-7)
    assert found.rank is None and found.motion is None and found.residual < 1e-8


def test_without_matrices_at_another_solution_the_residual_says_so() -> None:
    case = ManySolutions()
    elsewhere = case.best(case.x) + case.null @ torch.tensor([1.0, -0.5])
    dense, free = (singular_hypergradient(case.problem, case.x, elsewhere, dense=d) for d in (True, False))
    assert free.residual == pytest.approx(dense.residual, rel=1e-6)
    assert torch.allclose(free.value, dense.value, atol=1e-6)  # both of minimum norm


def test_trees_and_float32() -> None:
    case = ManySolutions()
    problem = BilevelProblem(
        upper=lambda x, y: case.f(x["a"].double(), torch.cat([y[0], y[1]]).double()).to(x["a"].dtype),
        lower=lambda x, y: case.g(x["a"].double(), torch.cat([y[0], y[1]]).double()).to(x["a"].dtype),
    )
    y = case.best(case.x)
    found = singular_hypergradient(problem, {"a": case.x}, [y[:2], y[2:]])
    assert torch.allclose(found.value["a"], differences(case.psi, case.x), atol=1e-10)
    single = singular_hypergradient(problem, {"a": case.x.float()}, [y[:2].float(), y[2:].float()])
    assert single.value["a"].dtype == torch.float32 and single.rank == 3
    assert torch.allclose(single.value["a"].double(), differences(case.psi, case.x), atol=1e-4)


def test_an_edge_of_the_active_set_is_reported() -> None:
    """y* = min(x, 1): at x = 1 the bound is active without force."""
    problem = BilevelProblem(
        upper=lambda x, y: (y**2).sum(), lower=lambda x, y: 0.5 * ((y - x) ** 2).sum(), lower_set=constrained.Box(0, 1)
    )
    for at, expected, notes in ((0.5, 1.0, 0), (2.0, 0.0, 0), (1.0, 2.0, 1)):
        found = singular_hypergradient(problem, torch.tensor([at]), torch.tensor([min(at, 1.0)]))
        assert float(found.value[0]) == pytest.approx(expected, abs=1e-12)
        assert len(found.notes) == notes and all("kink" in note for note in found.notes)
    inside = BilevelProblem(problem.upper, problem.lower, lower_inequality=lambda x, y: y - 1)
    (note,) = singular_hypergradient(inside, torch.ones(1), torch.ones(1)).notes
    assert "1 lower constraint hold with equality and without force" in note


def test_solutions_that_do_not_move_smoothly_are_reported() -> None:
    """g = x y has lower solutions at x = 0 alone."""
    problem = BilevelProblem(upper=lambda x, y: (y - x).sum() * 0 + (x**2).sum(), lower=lambda x, y: (x * y).sum())
    found = singular_hypergradient(problem, torch.zeros(1), torch.zeros(1))
    assert found.motion == pytest.approx(1.0) and found.rank == 0
    assert any("do not move smoothly" in note for note in found.notes)


def test_a_rank_in_doubt_is_reported() -> None:
    scale = torch.tensor([1.0, 3e-9])
    problem = BilevelProblem(upper=lambda x, y: (y**2).sum(), lower=lambda x, y: (scale * (y - x) ** 2).sum())
    x = torch.tensor([1.0, 1.0])
    found = singular_hypergradient(problem, x, x)
    assert any("rank is in doubt" in note for note in found.notes) and found.rank == 1
    sharp = singular_hypergradient(problem, x, x, rtol=1e-12)
    assert sharp.notes == () and torch.allclose(sharp.value, 2 * x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lower_equality": None}, r"multipliers\['lower_equality'\] is missing: give all .* or multipliers=None"),
        ({"lower_set": None}, r"multipliers\['lower_set'\] is missing"),
        (
            {"lower_inequality": torch.ones(5)},
            r"multipliers\['lower_inequality'\] must .* \['rows'\] \(4,\).*got tensor",
        ),
        ({"lower_set": torch.ones(3)}, r"multipliers\['lower_set'\] must .* tensor \(5,\) .*, got tensor \(3,\)"),
        ({"lower_equalities": torch.ones(1)}, r"'lower_equalities', which is none of lower_inequality, .*: rename it"),
    ],
)
def test_multipliers_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    case = coupled()
    given = {key: value for key, value in {**case.multipliers(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        singular_hypergradient(case.problem, case.x, case.y, multipliers=given)


def test_misuse() -> None:
    case = coupled()
    with pytest.raises(ValueError, match=r"rtol must lie in \(0, 1\)"):
        singular_hypergradient(case.problem, case.x, case.y, rtol=0.0)
    with pytest.raises(TypeError, match=r"problem must be a bilevel.BilevelProblem, got str"):
        singular_hypergradient("problem", case.x, case.y)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"y must have floating-point tensors only, got .* torch.int64: .*double"):
        singular_hypergradient(case.problem, case.x, torch.ones(5, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x must have floating-point tensors only, got .*0.3"):
        singular_hypergradient(case.problem, [0.3, 0.4, 0.5], case.y)


MUTATIONS = [
    ("return -self.cross.flat_mm(solved), residuals", "return self.cross.flat_mm(solved), residuals"),
    ("value=flat.x_tree(slope_x + pulled[0])", "value=flat.x_tree(pulled[0])"),
    ("return value + self._rows(x, y) @ forces", "return value"),
    ("if size > float(torch.finfo(self.y.dtype).eps) * self.force else 1.0", "if size < 0 else 1.0"),
    ("+ self.weight * (self", "+ 0.0 * (self"),
    ("self.held = self.held | (", "self.held = self.held & ("),
    ("strong = (force > distance) & ~self.weak", "strong = force < distance"),
    ("vectors, values.abs() > self.rtol * largest(values)", "vectors, values > self.rtol * largest(values)"),
    (
        "inverse = torch.where(kept, 1.0 / torch.where(kept, values, 1.0), 0.0)",
        "inverse = 1.0 / (values + 1e-3)",
    ),
    (
        "rhs = torch.cat([vectors[:, self.free], vectors.new_zeros",
        "rhs = torch.cat([vectors[:, self.free], vectors.new_ones",
    ),
]


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_a_broken_line_is_noticed(old: str, new: str) -> None:
    with mutated("bilevel.singular_hypergradient", old, new) as broken, pytest.raises(AssertionError):
        check_many_solutions(broken.singular_hypergradient)
        check_coupled_constraints(broken.singular_hypergradient)
        check_units(broken.singular_hypergradient)
