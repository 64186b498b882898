"""Exact cases are what they claim to be, real-data cases compute what they declare, the registry explains itself."""

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.special import log_softmax
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor
from torch.func import grad, jacrev

import bilevel
import problems
from implicit import tree
from problems import registry
from problems.case import Case, Report

EXACT = sorted(name for name, found in problems.entries().items() if "exact" in found.tags)
DIRECT = [name for name in EXACT if not problems.entry(name).tags & {"constraints", "penalty"}]
"""Those whose lower level is strongly convex and has a set at most; test_closed_forms.py has the others."""


def curvature(lower: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The dense Hessian of g(x, y) in y (reverse mode twice: forward mode warns in current torch)."""
    return jacrev(grad(lower, argnums=1), argnums=1)


class Hyper:
    """The hyper-objective of a case over ravelled x, with the lower level solved anew by dense linear algebra."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.x0, self.y0 = case.start

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        return self.case.problem.upper(tree.unravel(x, self.x0), tree.unravel(y, self.y0))

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        return self.case.problem.lower(tree.unravel(x, self.x0), tree.unravel(y, self.y0))

    def project(self, level: str, flat: Tensor) -> Tensor:
        like = self.x0 if level == "upper" else self.y0
        return tree.ravel(getattr(self.case.problem, f"{level}_set").project(tree.unravel(flat, like)))

    def solve_lower(self, x: Tensor) -> Tensor:
        """Newton's method with the dense Hessian; a set is met by projecting, which is exact in one dimension only."""
        assert self.case.problem.lower_set.is_whole_space or tree.size(self.y0) == 1
        y = tree.ravel(self.y0)
        for _ in range(20):
            slope = grad(self.lower, argnums=1)(x, y)
            if float(slope.norm()) < 1e-12:
                break
            y = y - torch.linalg.solve(curvature(self.lower)(x, y), slope)
        return self.project("lower", y)

    def __call__(self, x: Tensor) -> float:
        return float(self.upper(x, self.solve_lower(x)))

    def gradient(self, x: Tensor, width: float = 1e-4) -> Tensor:
        steps = width * torch.eye(len(x), dtype=x.dtype)
        return torch.tensor([(self(x + step) - self(x - step)) / (2 * width) for step in steps], dtype=x.dtype)


@pytest.fixture(params=DIRECT)
def hyper(request: pytest.FixtureRequest) -> Hyper:
    return Hyper(problems.case(request.param))


def test_the_exact_cases_are_there() -> None:
    expected = {"quadratic", "quadratic_ill_conditioned", "quadratic_pytree", "box", "box_active", "ridge_penalties"}
    assert expected <= set(DIRECT)


def test_value_at_the_solution(hyper: Hyper) -> None:
    case = hyper.case
    assert case.upper_star is not None
    value = float(case.problem.upper(case.x_star, case.y_star))
    assert value == pytest.approx(case.upper_star, rel=1e-12, abs=1e-13)


def test_the_start_fits_the_problem(hyper: Hyper) -> None:
    case = hyper.case
    case.problem.validate(*case.start)
    assert case.problem.upper_set.contains(hyper.x0)
    assert case.problem.lower_set.contains(hyper.y0)
    assert tree.describe(case.x_star) == tree.describe(hyper.x0)
    assert tree.describe(case.y_star) == tree.describe(hyper.y0)


def test_y_star_solves_the_lower_level(hyper: Hyper) -> None:
    x, y = tree.ravel(hyper.case.x_star), tree.ravel(hyper.case.y_star)
    slope = grad(hyper.lower, argnums=1)(x, y)
    assert float((y - hyper.project("lower", y - slope)).norm()) < 1e-10
    torch.testing.assert_close(y, hyper.solve_lower(x), rtol=1e-10, atol=1e-10)


def test_x_star_is_stationary(hyper: Hyper) -> None:
    if hyper.case.name == "box_kink":  # no derivative there: the next test compares values
        return
    x = tree.ravel(hyper.case.x_star)
    residual = x - hyper.project("upper", x - hyper.gradient(x))
    start = hyper.gradient(tree.ravel(hyper.x0))
    assert float(residual.norm()) < 1e-7 * max(1.0, float(start.norm()))


def test_other_feasible_points_are_worse(hyper: Hyper, generator: torch.Generator) -> None:
    x, best = tree.ravel(hyper.case.x_star), hyper(tree.ravel(hyper.case.x_star))
    for radius in (1e-2, 1e-1, 1.0):
        for _ in range(10):
            other = hyper.project("upper", x + radius * torch.randn(len(x), generator=generator))
            distance = float((other - x).norm())
            assert distance == 0 or hyper(other) > best + 1e-5 * distance**2


def test_ridge_solution_from_other_starts(generator: torch.Generator) -> None:
    hyper = Hyper(problems.case("ridge_penalties"))
    x_star = tree.ravel(hyper.case.x_star)

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(x)
        y = torch.linalg.solve(curvature(hyper.lower)(point, x_star), -_slope_at_zero(hyper, point))
        adjoint = torch.linalg.solve(curvature(hyper.lower)(point, y), grad(hyper.upper, argnums=1)(point, y))
        mixed = jacrev(grad(hyper.lower, argnums=1))(point, y)
        return float(hyper.upper(point, y)), (grad(hyper.upper)(point, y) - mixed.T @ adjoint).numpy()

    for _ in range(3):
        start = (-2 + 2 * torch.randn(len(x_star), generator=generator)).numpy()
        found = scipy.optimize.minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(found.x, x_star.numpy(), atol=1e-5)


def _slope_at_zero(hyper: Hyper, x: Tensor) -> Tensor:
    return grad(hyper.lower, argnums=1)(x, torch.zeros_like(tree.ravel(hyper.y0)))


def test_ridge_data_are_the_standardized_halves() -> None:
    features, targets = load_diabetes(return_X_y=True)
    case = problems.case("ridge_penalties", seed=3)
    order = torch.randperm(442, generator=torch.Generator().manual_seed(3)).numpy()
    train, held = order[:221], order[221:]

    def scaled(table: Any, rows: np.ndarray) -> np.ndarray:
        return (table[rows] - table[train].mean(axis=0)) / table[train].std(axis=0)

    x, w = np.linspace(-3, 1, 10), np.linspace(1, -1, 10)
    fit = 0.5 * np.mean((scaled(features, train) @ w - scaled(targets, train)) ** 2)
    check = 0.5 * np.mean((scaled(features, held) @ w - scaled(targets, held)) ** 2)
    at = torch.from_numpy(x), torch.from_numpy(w)
    assert float(case.problem.lower(*at)) == pytest.approx(fit + 0.5 * np.sum(np.exp(x) * w**2), rel=1e-12)
    assert float(case.problem.upper(*at)) == pytest.approx(check + 0.5e-3 * np.sum((x + 2) ** 2), rel=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_float32_is_kept(name: str) -> None:
    single, double = problems.case(name, dtype=torch.float32), problems.case(name)
    points = (*single.start, single.x_star, single.y_star)
    assert {leaf.dtype for point in points for leaf in tree.leaves(point)} == {torch.float32}
    for level in ("upper", "lower"):
        assert getattr(single.problem, level)(single.x_star, single.y_star).dtype == torch.float32
    assert double.upper_star is not None
    assert single.upper_star == pytest.approx(double.upper_star, rel=1e-4)
    exact = tree.map(torch.Tensor.float, double.x_star)
    assert float(tree.norm(tree.sub(single.x_star, exact))) <= 1e-3 * float(tree.norm(exact))


@pytest.mark.parametrize("name", EXACT)
def test_the_counter_counts_calls(name: str) -> None:
    case, other = problems.case(name), problems.case(name)
    for _ in range(3):
        case.problem.upper(*case.start)
    for _ in range(2):
        case.problem.lower(*case.start)
    assert (case.counter.upper, case.counter.lower) == (3, 2)
    assert (other.counter.upper, other.counter.lower) == (0, 0)


def test_settings_reach_the_problem() -> None:
    case = problems.case("quadratic", n=3, m=4, condition=50.0)
    matrix = curvature(case.problem.lower)(*case.start)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert (case.start[0].shape, matrix.shape) == ((3,), (4, 4))
    torch.testing.assert_close(eigenvalues[[0, -1]], torch.tensor([1.0, 50.0]))
    assert case.settings == {"n": 3, "m": 4, "condition": 50.0, "seed": 0, "dtype": torch.float64, "device": "cpu"}
    assert {"exact"} <= case.tags
    assert problems.case("quadratic_ill_conditioned").name == "quadratic_ill_conditioned"


def test_distance_error_and_check() -> None:
    case = problems.case("quadratic_pytree")
    solution = bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start)
    case.check(solution)
    off = replace(solution, x=tree.map(lambda leaf: leaf + 1e-3, case.x_star))
    size = float(tree.norm(case.x_star))
    assert case.distance(off) == pytest.approx(1e-3 * math.sqrt(5))
    assert case.error(off) == pytest.approx(1e-3 * math.sqrt(5) / size)
    with pytest.raises(AssertionError, match=r"quadratic_pytree: relative error of x is .* above 1e-06"):
        case.check(off)
    with pytest.raises(AssertionError, match="nan"):
        case.check(replace(solution, x=tree.map(lambda leaf: leaf * math.nan, case.x_star)))
    several = replace(case, local_minima=(tree.scale(3.0, case.x_star),))
    near = replace(solution, x=tree.map(lambda leaf: leaf + 1e-3, several.local_minima[0]))
    assert several.distance(near) == pytest.approx(1e-3 * math.sqrt(5))
    assert several.error(near) == pytest.approx(1e-3 * math.sqrt(5) / (3 * size))
    with pytest.raises(ValueError, match="case quadratic_pytree has no exact answer"):
        replace(case, x_star=None).distance(solution)


# The registry.


@pytest.mark.parametrize("name", ["box_active", "BOX_ACTIVE", "Box-Active", "box-active"])
def test_names_are_forgiving(name: str) -> None:
    assert problems.entry(name).name == "box_active"
    assert problems.case(name).name == "box_active"


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"unknown case 'quadratc'; did you mean quadratic\? Known: box, box_active"):
        problems.case("quadratc")
    with pytest.raises(ValueError, match=r"unknown case 'zzz'\. Known: .*ridge_penalties"):
        problems.entry("zzz")


def test_unknown_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"case box has no setting 'radius'; it has: r, dtype, device"):
        problems.case("box", radius=1.0)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'box' is registered already"):
        problems.register("box", "another")(lambda: problems.case("box"))


def test_cases_need_no_external_data(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def factory(name: str) -> Callable[[], Case]:
        def build() -> Case:
            built.append(name)
            return replace(problems.case("box"), name=name)

        return build

    for name, tags in (("here", {"mine"}), ("there", {"mine", "external-data"})):
        found = registry.Entry(name, factory(name), "", frozenset(tags))
        monkeypatch.setitem(registry._ENTRIES, name, found)
    assert [case.name for case in problems.cases("mine")] == ["here"]
    assert built == ["here"]
    assert [case.name for case in problems.cases("mine", "external-data")] == ["there"]
    assert {case.name for case in problems.cases("bilevel", "exact")} == set(EXACT)
    assert problems.cases("no such tag") == []


def test_default_cases_read_bundled_data_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> list[Path]:
        raise AssertionError(f"looked for files: {args}")

    monkeypatch.setattr("problems.datasets._locate", refuse)
    names = {case.name for case in problems.cases()}
    assert names == {name for name, found in problems.entries().items() if "external-data" not in found.tags}
    assert {"logistic_penalties", "ridge_penalties"} <= {case.name for case in problems.cases("real-data")}


def test_entries_describe_every_case() -> None:
    for name, found in problems.entries().items():
        assert found.name == name
        assert found.summary
        assert {"seed", "r", "bound", "dtype"} & set(found.parameters), name
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in found.parameters.values()), name
        assert found.factory.__doc__


# Multinomial logistic regression.


@pytest.fixture(scope="module")
def logistic() -> tuple[Case, bilevel.Solution]:
    case = problems.case("logistic_penalties")
    return case, bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start)


def numpy_levels(x: np.ndarray, w: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Upper value, lower value and validation accuracy from scikit-learn's arrays."""
    features, targets = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(targets))
    features, targets = features[order] / 16, targets[order]

    def loss(rows: slice) -> float:
        scores = log_softmax(features[rows] @ w, axis=1)
        return -scores[np.arange(len(scores)), targets[rows]].mean()

    train, held = slice(0, 1000), slice(1000, None)
    accuracy = np.mean((features[held] @ w).argmax(axis=1) == targets[held])
    ridge = 0.5 * np.sum(np.exp(x)[:, None] * w**2)
    return loss(held) + 0.5e-3 * np.sum((x + 5) ** 2), loss(train) + ridge, float(accuracy)


def test_logistic_objectives_match_numpy(generator: torch.Generator) -> None:
    case = problems.case("logistic_penalties", seed=4)
    x = torch.randn(64, generator=generator)
    w = torch.randn(64, 10, generator=generator)
    upper, lower, accuracy = numpy_levels(x.numpy(), w.numpy(), seed=4)
    oracle = {"upper": case.problem.upper_data, "lower": case.problem.lower_data}
    found = {k: float(getattr(case.problem, k)(x, w, batch=v.full())) for k, v in oracle.items() if v is not None}
    assert found == {"upper": pytest.approx(upper, rel=1e-12), "lower": pytest.approx(lower, rel=1e-12)}
    assert float(case.problem.metrics["accuracy"](x, w)) == pytest.approx(accuracy, abs=1e-12)
    assert (case.counter.upper, case.counter.lower) == (1, 1)


def test_logistic_start(logistic: tuple[Case, bilevel.Solution]) -> None:
    x0, w0 = logistic[0].start
    torch.testing.assert_close(x0, torch.full((64,), -5.0))
    torch.testing.assert_close(w0, torch.zeros(64, 10))


def test_logistic_is_solved_to_rounding(logistic: tuple[Case, bilevel.Solution]) -> None:
    case, solution = logistic
    assert solution.status is bilevel.Status.CONVERGED
    assert solution.accuracy.stationarity is not None
    assert solution.accuracy.stationarity < 1e-5
    assert case.max_steps is not None
    assert solution.steps < case.max_steps
    upper, _, accuracy = numpy_levels(solution.x.numpy(), solution.y.numpy())
    assert solution.upper_value == pytest.approx(upper, rel=1e-12)
    assert solution.metrics["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert accuracy > 0.965


def test_logistic_hypergradient_by_dense_linear_algebra(logistic: tuple[Case, bilevel.Solution]) -> None:
    case, solution = logistic
    assert case.problem.lower_data is not None
    assert case.problem.upper_data is not None
    fit, held = case.problem.lower_data.full(), case.problem.upper_data.full()
    x, w = solution.x, solution.y
    p = torch.softmax(fit["features"] @ w, dim=1)
    onehot = torch.nn.functional.one_hot(fit["targets"], 10)
    slope = fit["features"].T @ (p - onehot) / len(p) + torch.exp(x)[:, None] * w
    assert float(slope.norm()) < 1e-9
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (n, 10, 10)
    curvature = torch.einsum("nj,nab,nk->jakb", fit["features"], blocks, fit["features"]) / len(p)
    matrix = curvature.reshape(640, 640) + torch.diag(torch.exp(x).repeat_interleave(10))
    q = torch.softmax(held["features"] @ w, dim=1) - torch.nn.functional.one_hot(held["targets"], 10)
    adjoint = torch.linalg.solve(matrix, (held["features"].T @ q / len(q)).reshape(-1)).reshape(64, 10)
    hypergradient = 1e-3 * (x + 5) - torch.exp(x) * (w * adjoint).sum(dim=1)
    assert float(hypergradient.norm()) < 1e-6


def test_logistic_report(logistic: tuple[Case, bilevel.Solution], tmp_path: Path) -> None:
    case, solution = logistic
    assert case.report is not None
    found = case.report(solution, tmp_path / "new")
    assert [path.name for path in found.files] == ["penalties.csv", "penalties.png"]
    assert found.files[1].read_bytes().startswith(b"\x89PNG")
    with found.files[0].open() as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([float(row["log_penalty"]) for row in rows], solution.x.numpy())
    np.testing.assert_allclose([float(row["weight_norm"]) for row in rows], solution.y.norm(dim=1).numpy())
    assert [int(row["feature"]) for row in rows] == list(range(64))
    metrics = found.metrics
    assert metrics["accuracy"] == solution.metrics["accuracy"]
    assert metrics["accuracy"] > metrics["start_accuracy"] + 0.01
    assert metrics["cross_entropy"] < 0.6 * metrics["start_cross_entropy"]
    assert metrics["largest_log_penalty"] == float(solution.x.max())
    assert f"smallest log-penalty {float(solution.x.min()):.3f} (feature {int(solution.x.argmin())})" in found.text
    assert f"{metrics['start_accuracy']:.4f}" in found.text


def test_logistic_start_in_the_report_is_the_fitted_common_penalty(tmp_path: Path) -> None:
    case = problems.case("logistic_penalties", dataset="iris", train=60)
    found = run_one_step(case, tmp_path)
    assert case.problem.lower_data is not None
    assert case.problem.upper_data is not None
    fit, held = case.problem.lower_data.full(), case.problem.upper_data.full()

    def value(w: np.ndarray) -> float:
        point = torch.from_numpy(w).reshape(5, 3)
        return float(case.problem.lower(case.start[0], point, batch=fit))

    w = scipy.optimize.minimize(value, np.zeros(15), options={"gtol": 1e-6}).x.reshape(5, 3)
    scores = log_softmax(held["features"].numpy() @ w, axis=1)
    expected = -scores[np.arange(len(scores)), held["targets"].numpy()].mean()
    assert found.metrics["start_cross_entropy"] == pytest.approx(expected, rel=1e-3)


def run_one_step(case: Case, folder: Path) -> Report:
    assert case.report is not None
    return case.report(bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start, max_steps=1), folder)


def test_logistic_on_other_data(tmp_path: Path) -> None:
    case = problems.case("logistic_penalties", dataset="breast_cancer")
    assert case.problem.lower_data is not None
    fit = case.problem.lower_data.full()
    assert fit["features"].shape == (284, 31)
    torch.testing.assert_close(fit["features"].mean(dim=0), torch.cat([torch.zeros(30), torch.ones(1)]))
    assert case.start[1].shape == (31, 2)
    assert run_one_step(case, tmp_path).files[1].read_bytes().startswith(b"\x89PNG")


def test_logistic_minibatches() -> None:
    full = problems.case("logistic_penalties", dataset="iris")
    case = problems.case("logistic_penalties", dataset="iris", batch_size=20)
    assert (full.problem.stochastic, case.problem.stochastic) == (False, True)
    for data in (case.problem.upper_data, case.problem.lower_data):
        assert data is not None
        drawn = data.draw(data.init(torch.Generator()), torch.Generator())
        assert drawn["features"].shape == (20, 5)
    solution = bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start, max_steps=20)
    assert solution.steps == 20
    assert full.max_steps is not None
    assert case.max_steps is None


def test_logistic_keeps_float32() -> None:
    case = problems.case("logistic_penalties", dataset="iris", dtype=torch.float32)
    solution = bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start, max_steps=2)
    assert {solution.x.dtype, solution.y.dtype} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("logistic_penalties", {"train": 0}, r"train must be in 1\.\.1796 for the 1797 rows of digits, got 0"),
        ("logistic_penalties", {"train": 1797}, r"train must be in 1\.\.1796"),
        ("logistic_penalties", {"prior": 0.0}, "prior must be positive, got 0.0"),
        ("logistic_penalties", {"dataset": "diabetes"}, "'diabetes' is a regression set"),
        ("logistic_penalties", {"dataset": "digit"}, "unknown data set 'digit'. Did you mean 'digits'"),
        ("ridge_penalties", {"prior": -1.0}, "prior must be positive, got -1.0"),
    ],
)
def test_wrong_settings(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problems.case(name, **settings)
