"""AdaSketchNewton: closed forms, rates, penalties, every status, oracle counts, resumption."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import constrained
import implicit
from constrained import AdaSketchNewton, EqualityProblem, Solution
from implicit import Status

Start = list[float]


def solve(problem: EqualityProblem, x0: Any, method: AdaSketchNewton | None = None, **options: Any) -> Solution:
    start = torch.tensor(x0) if isinstance(x0, list) else x0
    return constrained.solve(problem, method or AdaSketchNewton(), start, raise_on_failure=False, **options)


def hs7() -> EqualityProblem:
    return EqualityProblem(
        lambda x: torch.log(1 + x[0] ** 2) - x[1], lambda x: (1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4, name="HS7"
    )


def hs40() -> EqualityProblem:
    return EqualityProblem(
        lambda x: -x.prod(),
        lambda x: torch.stack([x[0] ** 3 + x[1] ** 2 - 1, x[0] ** 2 * x[3] - x[2], x[3] ** 2 - x[1]]),
        name="HS40",
    )


def hs42() -> EqualityProblem:
    return EqualityProblem(
        lambda x: ((x - torch.arange(1.0, 5.0)) ** 2).sum(),
        lambda x: torch.stack([x[0] - 2, x[2] ** 2 + x[3] ** 2 - 2]),
        name="HS42",
    )


def hs52() -> EqualityProblem:
    return EqualityProblem(
        lambda x: (4 * x[0] - x[1]) ** 2 + (x[1] + x[2] - 2) ** 2 + (x[3] - 1) ** 2 + (x[4] - 1) ** 2,
        lambda x: torch.stack([x[0] + 3 * x[1], x[2] + x[3] - 2 * x[4], x[1] - x[4]]),
        name="HS52",
    )


def sphere(a: Tensor) -> EqualityProblem:
    return EqualityProblem(lambda x: a @ x, lambda x: x @ x - 1)


ROOT2 = math.sqrt(2.0)
CLOSED: dict[str, tuple[Callable[[], EqualityProblem], Start, Start, float]] = {
    "HS7": (hs7, [2.0, 2.0], [0.0, math.sqrt(3.0)], -math.sqrt(3.0)),
    "HS40": (hs40, [0.8] * 4, [2 ** (-1 / 3), 2 ** (-1 / 2), 2 ** (-11 / 12), 2 ** (-1 / 4)], -0.25),
    "HS42": (hs42, [1.0] * 4, [2.0, 2.0, 0.6 * ROOT2, 0.8 * ROOT2], 28 - 10 * ROOT2),
    "HS52": (hs52, [2.0] * 5, [v / 349 for v in (-33.0, 11.0, 180.0, -158.0, 11.0)], 1859 / 349),
}

SOLVERS: dict[str, Callable[[], implicit.LinearSolver]] = {
    "LDLT": implicit.LDLT,
    "LU": implicit.LU,
    "SparseLU": implicit.SparseLU,
    "MINRES": implicit.MINRES,
    "GMRES": implicit.GMRES,
    "Kaczmarz": constrained.SketchAndProject,
    "GaussianVector": lambda: constrained.SketchAndProject(sketch=constrained.GaussianVector()),
    "BlockGaussian": lambda: constrained.SketchAndProject(sketch=constrained.BlockGaussian()),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name: str) -> None:
    build, start, x, value = CLOSED[name]
    found = solve(build(), start, atol=1e-11)
    assert found.success, found.message
    torch.testing.assert_close(found.x, torch.tensor(x), rtol=1e-9, atol=1e-9)
    assert found.objective == pytest.approx(value, rel=1e-10)
    assert found.curvature is not None and found.curvature > 0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["HS7", "HS40", "HS42"])
def test_every_linear_solver_finds_the_same_point(name: str, solver: str) -> None:
    build, start, x, _ = CLOSED[name]
    found = solve(build(), start, AdaSketchNewton(linear_solver=SOLVERS[solver]()))
    assert found.success, found.message
    torch.testing.assert_close(found.x, torch.tensor(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", ["MINRES", "GMRES"])
def test_matrix_free(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix is written down, and the method without inertia stops at the same minimum."""
    monkeypatch.setattr("constrained.lagrangian.DENSE_LIMIT", 0)
    for kind in ("Hessian", "Jacobian"):
        monkeypatch.setattr(getattr(implicit, kind), "to_dense", lambda *a, **k: pytest.fail("a matrix was formed"))
    for build, start, x, _ in (CLOSED["HS7"], CLOSED["HS40"], CLOSED["HS42"]):
        found = solve(build(), start, AdaSketchNewton(linear_solver=SOLVERS[solver]()))
        assert found.success and found.curvature is None
        assert found.counts["hessian"] == 0 and found.counts["products"] > 0
        torch.testing.assert_close(found.x, torch.tensor(x), rtol=1e-7, atol=1e-7)


def test_quadratic_program_takes_one_step() -> None:
    """T1: ``Gamma (x, l) = (-q, d)``; the multiplier is not an increment."""
    generator = torch.Generator().manual_seed(0)
    root, e = torch.randn(6, 6, generator=generator), torch.randn(2, 6, generator=generator)
    q, d = torch.randn(6, generator=generator), torch.randn(2, generator=generator)
    hessian = root @ root.T + torch.eye(6)
    problem = EqualityProblem(lambda x: 0.5 * x @ hessian @ x + q @ x, lambda x: e @ x - d)
    matrix = torch.cat([torch.cat([hessian, e.T], 1), torch.cat([e, torch.zeros(2, 2)], 1)])
    expected = torch.linalg.solve(matrix, torch.cat([-q, d]))
    zero = torch.zeros(6)
    for multipliers in (None, constrained.Multipliers(torch.tensor([5.0, -7.0]), (), zero, zero)):
        found = solve(problem, torch.randn(6, generator=generator), multipliers=multipliers)
        assert found.success and found.steps == 1
        torch.testing.assert_close(torch.cat([found.x, found.multipliers.equality]), expected, rtol=1e-9, atol=1e-9)


def test_circle_with_its_multiplier_over_a_tree() -> None:
    """T3: (-1, -1) with multiplier 1/2, x being a dict and c a tuple."""
    problem = EqualityProblem(lambda x: x["b"] + x["a"].sum(), lambda x: (x["a"].square().sum() + x["b"] ** 2 - 2,))
    found = solve(problem, {"b": torch.tensor(-0.5), "a": torch.tensor([-1.5])})
    assert found.success
    torch.testing.assert_close(found.x["a"], torch.tensor([-1.0]))
    torch.testing.assert_close(found.x["b"], torch.tensor(-1.0))
    torch.testing.assert_close(found.multipliers.equality[0], torch.tensor(0.5))


def test_linear_function_on_the_sphere() -> None:
    """T4: ``x = -a/|a|``, ``l = |a|/2``."""
    a = torch.tensor([3.0, -4.0, 12.0])
    found = solve(sphere(a), [1.0, 0.0, 0.0])
    torch.testing.assert_close(found.x, -a / 13)
    torch.testing.assert_close(found.multipliers.equality, torch.tensor(6.5))


class _Largest(TorchDispatchMode):
    """Remembers the largest dense tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                self.size = max(self.size, value.numel())
        return found


@pytest.mark.parametrize(("solver", "side", "vectors"), [(implicit.MINRES(), 8, 5), (None, 20, 270)])
def test_memory_is_linear_without_matrices(
    monkeypatch: pytest.MonkeyPatch, solver: Any, side: int, vectors: int
) -> None:
    """Control of ``-Laplace(w) + w^3 = z`` on a grid: no tensor larger than some vectors, and the dense answer.

    ProbedKKT keeps up to 268 sums per row while it looks for the entries of the matrices, whatever their size.
    """
    step = 1 / (side + 1)
    first, second = torch.meshgrid(*(step * torch.arange(1.0, side + 1),) * 2, indexing="ij")
    target = torch.sin(3 * first) * second

    def laplace(w: Tensor) -> Tensor:
        p = torch.nn.functional.pad(w, (1, 1, 1, 1))
        return p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * w

    problem = EqualityProblem(
        lambda x: 0.5 * ((x["w"] - target) ** 2).sum() + 0.01 * (x["z"] ** 2).sum(),
        lambda x: laplace(x["w"]) - step**2 * (x["w"] ** 3 - x["z"]),
    )
    start = {name: torch.zeros(side, side) for name in ("w", "z")}
    dense = solve(problem, start)
    monkeypatch.setattr("constrained.lagrangian.DENSE_LIMIT", 0)
    monkeypatch.setattr("constrained.inertia.DENSE", 0)
    monkeypatch.setattr("constrained.inertia.DENSE_IF_SPARSE", 0)
    with _Largest() as largest:
        found = solve(problem, start, AdaSketchNewton(linear_solver=solver))
    assert dense.success and found.success
    torch.testing.assert_close(found.x["w"], dense.x["w"], rtol=1e-6, atol=1e-7)
    size = 2 * side**2 if solver is None else 3 * side**2
    assert largest.size <= vectors * size
    assert vectors * size < (2 * side**2) ** 2


@pytest.mark.parametrize("solver", ["LDLT", "MINRES"])
def test_superlinear_rate(solver: str) -> None:
    """Errors square (exact solves, and inexact ones with theta going to zero), and the last steps are full."""
    build, start, x, _ = CLOSED["HS40"]
    errors: list[float] = []

    def watch(info: Any) -> None:
        errors.append(float((info.state.x - torch.tensor(x)).norm()))

    found = solve(build(), start, AdaSketchNewton(linear_solver=SOLVERS[solver](), atol=1e-13), callbacks=[watch])
    near = [(a, b) for a, b in itertools.pairwise(errors) if 1e-6 < a < 0.1]
    assert near and all(b <= 20 * a**2 for a, b in near)
    assert all(h["step_length"] == 1.0 for h in found.history[-2:])


def test_oracle_counts() -> None:
    """One evaluation per trial; one gradient, Jacobian and Hessian per step that is taken at once."""
    build, start, _, _ = CLOSED["HS42"]
    lagrangian = constrained.Lagrangian(build(), torch.tensor(start))
    method = AdaSketchNewton().resolve(lagrangian, torch.tensor(start))
    state = method.init(lagrangian, torch.tensor(start), None, generator=torch.Generator())
    for step in range(1, 4):
        assert method.terminate(lagrangian, state) is Status.RUNNING
        assert method.step(lagrangian, state)["step_length"] == 1.0
        expected = {"objective": step + 1, "gradient": step + 1, "jacobian": step + 1, "hessian": step}
        assert {k: lagrangian.counts[k] for k in expected} == expected


def test_mu_grows_and_nu_shrinks_where_the_descent_test_fails() -> None:
    """BT1: the multiplier's change outweighs mu |c|^2 at first; a shifted step outweighs nu |grad L|^2."""
    bt1 = EqualityProblem(lambda x: 100 * x @ x - x[0] - 100, lambda x: x @ x - 1)
    found = solve(bt1, [0.08, 0.06])
    assert found.success and found.objective == pytest.approx(-1.0)
    rejected = [h["rejected"] for h in found.history]
    mu = [h["mu"] for h in found.history]
    assert max(rejected) > 0 and mu[-1] > 1.0
    # What is asked for is the paper's factor per rejection, split between the two penalties.
    powers = [math.log(m) / math.log(1.5**2) for m in mu]
    assert all(abs(p - round(p)) < 1e-9 for p in powers)
    hidden = EqualityProblem(lambda x: -(x[0] ** 2) * x[1] ** 2 + x[0] ** 4 + x[1] ** 4, lambda x: x[2] - x[0] * x[1])
    found = solve(hidden, [0.3, 2.0, 0.6], AdaSketchNewton(nu=10.0))
    assert found.success and found.history[-1]["nu"] < 10.0


def test_descent_test_holds_at_every_step() -> None:
    """Measured afresh with automatic differentiation: ``<grad M, step> <= -nu/2 |b|^2`` with the reported penalties."""
    seen: list[tuple[float, float]] = []
    method, problem = AdaSketchNewton(), hs7()
    lagrangian = constrained.Lagrangian(problem, torch.tensor([2.0, 2.0]))
    method = method.resolve(lagrangian, torch.tensor([2.0, 2.0]))
    state = method.init(lagrangian, torch.tensor([2.0, 2.0]), None, generator=torch.Generator())

    def merit(x: Tensor, multiplier: Tensor, mu: float, nu: float) -> Tensor:
        value = problem.objective(x) + multiplier @ problem.equality(x).reshape(1)
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return value + 0.5 * mu * problem.equality(x) ** 2 + 0.5 * nu * slope @ slope

    while method.terminate(lagrangian, state) is Status.RUNNING:
        x, multiplier = state.x.clone().requires_grad_(), state.equality.clone().requires_grad_()
        values = method.step(lagrangian, state)
        assert state.objective_weight == 1.0 and bool((state.constraint_weights == 1.0).all())
        gradient = torch.autograd.grad(merit(x, multiplier, values["mu"], values["nu"]), (x, multiplier))
        if values["shift"] or not values["step_length"]:
            continue
        step = (
            (state.x - x.detach()) / values["step_length"],
            (state.equality - multiplier.detach()) / values["step_length"],
        )
        (slope,) = torch.autograd.grad(problem.objective(x) + multiplier @ problem.equality(x).reshape(1), x)
        b = float(slope @ slope) + float(problem.equality(x).detach()) ** 2
        seen.append((float(gradient[0] @ step[0] + gradient[1] @ step[1]), -0.5 * values["nu"] * b))
    assert len(seen) >= 4 and all(slope <= bound * (1 - 1e-6) for slope, bound in seen)


def maratos() -> EqualityProblem:
    """Powell's example: full steps from points on the circle raise f and leave the circle."""
    return EqualityProblem(lambda x: 2 * (x @ x - 1) - x[0], lambda x: x @ x - 1)


@pytest.mark.parametrize("angle", [0.01, 0.1, 0.3])
def test_no_maratos_effect(angle: float) -> None:
    """The merit function holds the multiplier, and accepts full steps without a second-order correction."""
    method = AdaSketchNewton(second_order_correction=False)
    found = solve(maratos(), [math.cos(angle), math.sin(angle)], method)
    assert found.success and found.objective == pytest.approx(-1.0)
    assert all(h["step_length"] == 1.0 for h in found.history)


def test_second_order_correction_where_mu_is_far_too_large() -> None:
    """Then mu |c|^2 outweighs the rest, as in other merit functions, and the correction gives the full steps back."""
    start = [math.cos(0.3), math.sin(0.3)]
    plain, corrected = (
        solve(maratos(), start, AdaSketchNewton(mu=1e3, second_order_correction=on)) for on in (False, True)
    )
    assert plain.success and corrected.success
    assert plain.history[0]["step_length"] < 1.0 and all(h["step_length"] == 1.0 for h in corrected.history)
    assert corrected.counts["objective"] < plain.counts["objective"]


@pytest.mark.parametrize("copies", [2, 3])
def test_redundant_constraints(copies: int) -> None:
    """LICQ fails everywhere: the system is regularised, and any multipliers with the right sum will do."""
    problem = EqualityProblem(lambda x: x.sum(), lambda x: torch.stack([x @ x - 2] * copies))
    found = solve(problem, [-1.5, -0.5])
    assert found.success
    torch.testing.assert_close(found.x, -torch.ones(2))
    assert float(found.multipliers.equality.sum()) == pytest.approx(0.5)


def test_dependent_linear_constraints() -> None:
    rows = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
    problem = EqualityProblem(lambda x: x @ x, lambda x: rows @ x - rows @ torch.ones(3))
    found = solve(problem, [4.0, -3.0, 2.0])
    expected = torch.linalg.pinv(rows) @ (rows @ torch.ones(3))
    assert found.success
    torch.testing.assert_close(found.x, expected, rtol=1e-7, atol=1e-7)


def test_jacobian_that_vanishes_at_the_start() -> None:
    """S316: J(0) = 0, so only the curvature of the constraint shows the way."""
    problem = EqualityProblem(
        lambda x: (x[0] - 20) ** 2 + (x[1] + 20) ** 2, lambda x: 0.01 * x[0] ** 2 + 0.01 * x[1] ** 2 - 1
    )
    found = solve(problem, [0.0, 0.0])
    assert found.success
    torch.testing.assert_close(found.x, torch.tensor([1.0, -1.0]) * 10 / ROOT2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_infeasible_ends_at_the_least_violation(scale: float) -> None:
    """x^2 + y^2 = -1 is nowhere; the origin is nearest to it."""
    problem = EqualityProblem(lambda x: x[0], lambda x: scale * (x @ x + 1))
    found = solve(problem, [0.7, -0.4])
    assert found.status is Status.INFEASIBLE
    assert found.x.abs().max() < 1e-3
    with pytest.raises(implicit.SolveError, match="INFEASIBLE"):
        constrained.solve(problem, AdaSketchNewton(), torch.tensor([0.7, -0.4]))


def test_multipliers_are_kept_where_the_jacobian_loses_rank() -> None:
    """HS61: G(0) has rank one and two rows; no mu should outweigh the multipliers of 1e8."""
    problem = EqualityProblem(
        lambda x: 4 * x[0] ** 2 + 2 * x[1] ** 2 + 2 * x[2] ** 2 - 33 * x[0] + 16 * x[1] - 24 * x[2],
        lambda x: torch.stack([3 * x[0] - 2 * x[1] ** 2 - 7, 4 * x[0] - x[2] ** 2 - 11]),
    )
    found = solve(problem, [0.0, 0.0, 0.0])
    assert found.success and found.objective == pytest.approx(-143.6461422)
    assert max(h["mu"] for h in found.history) < 1e4


def test_infeasible_is_what_holds_without_weights() -> None:
    """HIMMELBD: the gradients of the two rows differ by a hundred, and so do the least violations with weights."""
    problem = EqualityProblem(
        lambda x: 0.0 * x.sum(),
        lambda x: torch.stack(
            [x[0] ** 2 + 12 * x[1] - 1, 49 * x[0] ** 2 + 49 * x[1] ** 2 + 84 * x[0] + 2324 * x[1] - 681]
        ),
    )
    found = solve(problem, [1.0, 1.0])
    assert found.status is Status.INFEASIBLE
    c, jacobian = problem.equality(found.x), torch.autograd.functional.jacobian(problem.equality, found.x)
    assert float((jacobian.T @ c).norm()) <= 1e-6 * float(jacobian.norm() * c.norm())


def test_contradicting_linear_constraints() -> None:
    problem = EqualityProblem(lambda x: x @ x, lambda x: torch.stack([x[0] + x[1], x[0] + x[1] - 2]))
    found = solve(problem, [3.0, 1.0])
    assert found.status is Status.INFEASIBLE
    assert float(found.x.sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_unbounded(power: int) -> None:
    problem = EqualityProblem(lambda x: -(x[0] ** power), lambda x: x[1] - 1)
    found = solve(problem, [1.0, 0.0])
    assert found.status is Status.UNBOUNDED, found.message
    assert found.objective < -1e10 and found.residual.feasibility < 1e-4


def test_steps_whose_length_is_that_of_a_shift_are_extended() -> None:
    """A linear function has no curvature to tell a length, and at |x| = 1e8 the rounding of c exceeds atol."""
    rows = torch.tensor([[1.0, 2.0, -1.0], [0.3, -1.0, 2.0]])
    found = solve(EqualityProblem(lambda x: x[0] - x[2], lambda x: rows @ x - 0.7), [1.0, 2.0, 3.0])
    assert found.status is Status.UNBOUNDED and found.steps <= 30
    assert max(h["step_length"] for h in found.history) >= 8.0
    assert not any(h["restoring"] for h in found.history)


def test_rounding_of_the_constraints_is_not_restored() -> None:
    """At |x| = 1e8 the rounding of c exceeds atol; the kink there ends the run, and no restoration is tried."""
    rows = torch.tensor([[1.0, 2.0, -1.0], [0.3, -1.0, 2.0]])
    values = rows @ torch.tensor([1e8, 1e8 / 3, -1e8 / 7])
    problem = EqualityProblem(lambda x: (x[0] - 1.0000001e8).abs(), lambda x: rows @ x - values)
    found = solve(problem, [1.0, 2.0, 3.0])
    assert found.status is Status.STALLED and found.residual.feasibility < 1e-6
    assert not any(h["restoring"] for h in found.history)


def test_nan_at_the_start_ends_nonfinite() -> None:
    found = solve(EqualityProblem(lambda x: torch.log(x[0]) + x[1] ** 2, lambda x: x[1] - x[0]), [-1.0, 1.0])
    assert found.status is Status.NONFINITE and found.steps == 0


def test_derivatives_that_are_no_numbers_end_nonfinite() -> None:
    found = solve(EqualityProblem(lambda x: torch.sqrt(x[0]) + x[1] ** 2, lambda x: x[1] - 1 - x[0]), [0.0, 1.0])
    assert found.status is Status.NONFINITE


def test_nan_beyond_shortens_the_step() -> None:
    """min x - log x on a line: the Newton step from 3 leaves the domain."""
    problem = EqualityProblem(lambda x: x[0] - torch.log(x[0]) + x[1] ** 2, lambda x: x[1] - 1)
    found = solve(problem, [3.0, 1.0])
    assert found.success and found.history[0]["step_length"] < 1.0
    torch.testing.assert_close(found.x, torch.ones(2))


def test_kink_is_never_called_converged() -> None:
    problem = EqualityProblem(lambda x: (x[0] - 0.3).abs() + 0.5 * x[0] + x[1] ** 2, lambda x: x[1] - 1)
    found = solve(problem, [1.0, 1.0])
    assert found.status is Status.STALLED and found.residual.largest > 0.1


def test_saddle_points_are_left() -> None:
    """(0, 1) is a KKT point of min -x^2 + y on y = 1 + x^4, and no minimum; the minima are at x^2 = 1/2."""
    problem = EqualityProblem(lambda x: -(x[0] ** 2) + x[1], lambda x: x[1] - 1 - x[0] ** 4)
    found = solve(problem, [0.0, 1.0])
    assert found.success and found.objective == pytest.approx(0.75)
    assert sum(h["escape"] < 0 for h in found.history) == 1


def test_maximum_on_a_sphere_is_left() -> None:
    a = torch.tensor([1.0, 2.0, 2.0])
    found = solve(sphere(a), a / 3)
    assert found.success and found.objective == pytest.approx(-3.0)


def test_square_systems_are_solved() -> None:
    """Powell's badly scaled function: as many equations as unknowns and no objective."""
    problem = EqualityProblem(
        lambda x: 0.0 * x.sum(),
        lambda x: torch.stack([1e4 * x[0] * x[1] - 1, torch.exp(-x[0]) + torch.exp(-x[1]) - 1.0001]),
    )
    found = solve(problem, [0.0, 1.0])
    assert found.success
    torch.testing.assert_close(found.x, torch.tensor([1.09815933e-5, 9.10614674]), rtol=1e-6, atol=1e-6)


def test_warm_multipliers_are_used() -> None:
    first = solve(hs40(), [0.8] * 4)
    again = solve(hs40(), first.x, multipliers=first.multipliers)
    assert again.success and again.steps == 0


@pytest.mark.parametrize("solver", ["LDLT", "MINRES", "Kaczmarz"])
def test_resumes_bitwise(solver: str) -> None:
    build, start, _, _ = CLOSED["HS7"]
    method = AdaSketchNewton(linear_solver=SOLVERS[solver]())
    whole = solve(build(), start, method, generator=torch.Generator().manual_seed(5))
    half = solve(build(), start, method, generator=torch.Generator().manual_seed(5), max_steps=3)
    rest = constrained.solve(build(), method, checkpoint=half.checkpoint)
    assert half.status is Status.STEP_LIMIT and whole.success and rest.steps == whole.steps
    assert torch.equal(rest.x, whole.x) and torch.equal(rest.multipliers.equality, whole.multipliers.equality)
    for a, b in zip(whole.history[3:], rest.history[3:], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_resumes_in_the_middle_of_a_restoration() -> None:
    problem = EqualityProblem(
        lambda x: (x[0] - 20) ** 2 + (x[1] + 20) ** 2, lambda x: 0.01 * x[0] ** 2 + 0.01 * x[1] ** 2 - 1
    )
    whole = solve(problem, [0.0, 0.0])
    at = next(i for i, h in enumerate(whole.history) if h["restoring"]) + 1
    half = solve(problem, [0.0, 0.0], max_steps=at)
    rest = constrained.solve(problem, AdaSketchNewton(), checkpoint=half.checkpoint)
    assert rest.steps == whole.steps and torch.equal(rest.x, whole.x)


def test_theory_is_exact_newton() -> None:
    """The paper's bound asks for relative residuals below 1e-8, so MINRES takes the steps of a factorisation."""
    build, start, _, _ = CLOSED["HS7"]
    exact = solve(build(), start, AdaSketchNewton(linear_solver=implicit.LU()))
    theory = solve(build(), start, AdaSketchNewton(linear_solver=implicit.MINRES(), accuracy="theory"))
    loose = solve(build(), start, AdaSketchNewton(linear_solver=implicit.MINRES()))
    assert theory.steps == exact.steps
    torch.testing.assert_close(theory.x, exact.x, rtol=1e-7, atol=1e-9)
    assert sum(h["linear_steps"] for h in loose.history) < sum(h["linear_steps"] for h in theory.history)


def test_scaling_undoes_units() -> None:
    """Newton's steps do not depend on the units of f and c; with large ones M has to be scaled to accept them."""
    build, start, x, _ = CLOSED["HS7"]
    plain = build()
    scaled = EqualityProblem(lambda x: 1e4 * plain.objective(x), lambda x: 1e3 * plain.equality(x))
    found = solve(scaled, start)
    assert found.success and found.steps <= solve(plain, start).steps + 5
    torch.testing.assert_close(found.x, torch.tensor(x), rtol=1e-7, atol=1e-7)


def test_float32() -> None:
    problem = EqualityProblem(lambda x: x.sum(), lambda x: (x**2).sum() - 2)
    found = constrained.solve(problem, AdaSketchNewton(), torch.tensor([-1.5, -0.5], dtype=torch.float32))
    assert found.success and found.x.dtype == torch.float32 and found.method.atol == 1e-4
    assert (found.x + 1).abs().max() < 1e-3


def test_refuses_inequalities_and_bounds_by_name() -> None:
    cases: list[tuple[str, Any]] = [("inequality", lambda x: x), ("lower", 0.0), ("upper", 1.0)]
    for field, value in cases:
        fields: dict[str, Any] = {"objective": lambda x: x @ x, "equality": lambda x: x.sum() - 1, field: value}
        problem = constrained.ConstrainedProblem(**fields)
        with pytest.raises(ValueError, match=f"{field}: use InteriorPoint"):
            constrained.solve(problem, AdaSketchNewton(), torch.ones(2))
    with pytest.raises(ValueError, match="needs an equality"):
        constrained.solve(constrained.ConstrainedProblem(objective=lambda x: x @ x), AdaSketchNewton(), torch.ones(2))


@pytest.mark.parametrize(
    ("field", "value"),
    [("mu", 0.0), ("nu", -1.0), ("delta", math.inf), ("xi_b", 0.0), ("beta", 0.5), ("rho", 1.0), ("relative", 1.0)]
    + [("accuracy", "exact"), ("atol", 0.0)],
)
def test_misuse(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        AdaSketchNewton(**{field: value})


def test_misuse_of_the_linear_solver() -> None:
    with pytest.raises(TypeError, match="linear_solver"):
        AdaSketchNewton(linear_solver="minres")  # type: ignore[arg-type]


def test_default_solver_follows_size_and_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    x, problem = torch.ones(4), hs42()
    sparse = EqualityProblem(
        problem.objective,
        problem.equality,
        jacobian=lambda x: torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 1]]).to_sparse(),
        hessian=lambda x, multiplier: torch.eye(4).to_sparse(),
    )
    assert isinstance(AdaSketchNewton().resolve(constrained.Lagrangian(problem, x), x).linear_solver, implicit.LDLT)
    monkeypatch.setattr("constrained.inertia.DENSE", 0)
    monkeypatch.setattr("constrained.inertia.DENSE_IF_SPARSE", 0)
    large = constrained.Lagrangian(problem, x, dense=False)
    assert isinstance(AdaSketchNewton().resolve(large, x).linear_solver, constrained.ProbedKKT)
    large = constrained.Lagrangian(sparse, x, dense=False)
    assert isinstance(AdaSketchNewton().resolve(large, x).linear_solver, implicit.SparseLU)
    with pytest.raises(ValueError, match="theory"):
        AdaSketchNewton(accuracy="theory").resolve(large, x)
