"""The sparse group lasso case: what it declares, the exact fit of its lower level, and how the two agree."""

import csv
import types
from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor

import problems
from bilevel.flat import FlatProblem
from bilevel.lower_level import solve_lower_level
from problems import sparse_group_lasso as lasso


@pytest.fixture(scope="module")
def case() -> problems.Case:
    torch.set_default_dtype(torch.float64)
    return problems.case("sparse_group_lasso")


@pytest.fixture(scope="module")
def parts() -> lasso.Parts:
    return lasso.read()


def draw(generator: torch.Generator) -> dict[str, Tensor]:
    return {name: -6 + 3 * torch.rand(n, generator=generator) for name, n in (("group", 10), ("feature", 30))}


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and validation rows from scikit-learn's arrays."""
    features, targets = load_breast_cancer(return_X_y=True)
    order = torch.randperm(569, generator=torch.Generator().manual_seed(0)).numpy()
    train, held = order[:250], order[250:400]
    scaled = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
    signs = 2.0 * targets - 1
    return scaled[train], signs[train], scaled[held], signs[held]


def exact(x: dict[str, Tensor], y: dict[str, Tensor], parts: lasso.Parts) -> float:
    """The lower objective without rounding."""
    norms = torch.stack([torch.linalg.vector_norm(y["weight"][j::10]) for j in range(10)])
    prices = (torch.exp(x["group"]) * norms).sum() + (torch.exp(x["feature"]) * y["weight"].abs()).sum()
    return float(parts.train.loss(y) + prices)


def test_the_groups_are_the_measurements() -> None:
    loaded: Any = load_breast_cancer()
    # "mean radius", "radius error", "worst radius" and so on
    names = [{*name.split()} - {"mean", "error", "worst"} for name in loaded.feature_names]
    assert all(names[j] == names[j + 10] == names[j + 20] for j in range(10))
    assert len({frozenset(name) for name in names}) == lasso.GROUPS
    weight = torch.arange(30.0)
    torch.testing.assert_close(lasso._squares(weight), torch.stack([(weight[j::10] ** 2).sum() for j in range(10)]))


def test_the_objectives_match_numpy(case: problems.Case, generator: torch.Generator) -> None:
    train, labels, held, held_labels = data()
    x = draw(generator)
    shapes = {"weight": (30,), "intercept": (), "size": (10,), "bound": (30,)}
    y = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    w, b = y["weight"].numpy(), float(y["intercept"])
    prices = np.exp(x["group"].numpy()) @ y["size"].numpy() + np.exp(x["feature"].numpy()) @ y["bound"].numpy()
    loss = np.logaddexp(0, -labels * (train @ w + b)).mean()
    assert float(case.problem.lower(x, y)) == pytest.approx(loss + prices, rel=1e-12)
    held_loss = np.logaddexp(0, -held_labels * (held @ w + b)).mean()
    assert float(case.problem.upper(x, y)) == pytest.approx(held_loss, rel=1e-12)
    assert case.problem.lower_inequality is not None
    rows = case.problem.lower_inequality(x, y)
    bound, size = y["bound"].numpy(), y["size"].numpy()
    np.testing.assert_allclose(rows["above"].numpy(), w - bound)
    np.testing.assert_allclose(rows["below"].numpy(), -w - bound)
    norms = np.sqrt(np.sum(w.reshape(3, 10) ** 2, axis=0) + 1e-6)
    np.testing.assert_allclose(rows["size"].numpy(), norms - size)
    assert case.problem.metrics["groups"](x, {"weight": torch.eye(30)[7] * 0.5}) == 1
    assert case.problem.metrics["features"](x, {"weight": torch.eye(30)[7] * 0.5}) == 1


def test_the_fit_satisfies_the_optimality_conditions(parts: lasso.Parts, generator: torch.Generator) -> None:
    for _ in range(3):
        x = draw(generator)
        y = {key: value.requires_grad_(True) for key, value in lasso.fit(parts.train, x).items()}
        slopes = torch.autograd.grad(parts.train.loss(y), [y["weight"], y["intercept"]])
        group, feature = torch.exp(x["group"]), torch.exp(x["feature"])
        assert abs(float(slopes[1])) < 1e-8
        used = 0
        for g in range(10):
            weight, pull, price = y["weight"][g::10].detach(), -slopes[0][g::10], feature[g::10]
            norm = torch.linalg.vector_norm(weight)
            if float(norm) == 0:
                left = (pull.abs() - price).clamp(min=0)
                assert float(torch.linalg.vector_norm(left)) <= float(group[g]) + 1e-8
                continue
            used += 1
            rest = pull - group[g] * weight / norm
            on = weight != 0
            assert float((rest - price * weight.sign())[on].abs().amax()) < 1e-7
            assert bool((rest[~on].abs() <= price[~on] + 1e-8).all())
        assert 0 < used < 10


def test_the_fit_agrees_with_cvxpy(parts: lasso.Parts, generator: torch.Generator) -> None:
    train, labels, _, _ = data()
    x = draw(generator)
    w, b = cp.Variable(30), cp.Variable()
    prices = sum(float(torch.exp(x["group"][g])) * cp.norm2(w[g::10]) for g in range(10))
    prices += np.exp(x["feature"].numpy()) @ cp.abs(w)
    loss = cp.sum(cp.logistic(-cp.multiply(labels, train @ w + b))) / len(labels)
    value: Any = cp.Problem(cp.Minimize(loss + prices)).solve(solver=cp.CLARABEL)
    y = lasso.fit(parts.train, x)
    assert exact(x, y, parts) == pytest.approx(float(value), abs=1e-8)
    assert w.value is not None
    np.testing.assert_allclose(y["weight"].numpy(), w.value, atol=1e-3)


def test_many_fits_at_once(parts: lasso.Parts, generator: torch.Generator) -> None:
    points = [draw(generator) for _ in range(2)]
    both = lasso.fit(parts.train, {key: torch.stack([p[key] for p in points]) for key in points[0]})
    for k, x in enumerate(points):
        single = lasso.fit(parts.train, x)
        for key in single:
            torch.testing.assert_close(both[key][k], single[key], atol=1e-6, rtol=1e-6)


def test_nothing_is_left_at_the_upper_end(parts: lasso.Parts) -> None:
    x = {"group": torch.full((10,), lasso.BOUNDS[1]), "feature": torch.full((30,), lasso.BOUNDS[1])}
    y = lasso.fit(parts.train, x)
    assert float(y["weight"].abs().max()) == 0.0
    share = float((parts.train.labels > 0).double().mean())
    assert float(y["intercept"]) == pytest.approx(np.log(share / (1 - share)), abs=1e-6)


def test_too_few_steps_raise(parts: lasso.Parts, generator: torch.Generator) -> None:
    with pytest.raises(RuntimeError, match="not fitted in 3 steps"):
        lasso.fit(parts.train, draw(generator), max_steps=3)


def test_the_declared_lower_level_is_the_lasso(
    case: problems.Case, parts: lasso.Parts, generator: torch.Generator
) -> None:
    """Its value lies between the exact one and that plus the rounding of all tips."""
    x0, y0 = case.start
    flat = FlatProblem(case.problem, x0, y0)
    x = draw(generator)
    fitted = lasso.fit(parts.train, x)
    solved = solve_lower_level(flat, flat.flat_x(x), flat.flat_y(y0))
    assert solved.status.name == "CONVERGED"
    y = flat.y_tree(solved.y)
    least, rounding = exact(x, fitted, parts), 1e-3 * float(torch.exp(x["group"]).sum())
    assert least - 1e-9 <= float(case.problem.lower(x, y)) <= least + rounding
    assert exact(x, y, parts) == pytest.approx(least, abs=rounding)
    torch.testing.assert_close(y["weight"], fitted["weight"], atol=0.02, rtol=0)
    torch.testing.assert_close(y["bound"], y["weight"].abs(), atol=1e-4, rtol=0)


def test_the_case_is_declared_consistently(case: problems.Case, parts: lasso.Parts) -> None:
    x0, y0 = case.start
    case.problem.validate(x0, y0)
    flat = FlatProblem(case.problem, x0, y0)
    assert (flat.n, flat.m, flat.lower_level.inequalities, flat.upper_level.inequalities) == (40, 71, 70, 0)
    assert not flat.lower_level.affine
    assert flat.violation(flat.flat_x(x0), flat.flat_y(y0)) < 1e-14
    assert case.problem.upper_set.contains(x0)
    assert [len(p.labels) for p in (parts.train, parts.valid, parts.test)] == [250, 150, 169]
    torch.testing.assert_close(y0["weight"], lasso.fit(parts.train, x0)["weight"])
    assert float(case.problem.lower(x0, y0)) <= exact(x0, y0, parts) + 1e-3 * 10 * np.exp(lasso.START)
    with pytest.raises(ValueError, match=r"tip must be positive, got 0.0"):
        problems.case("sparse_group_lasso", tip=0.0)


def test_rows_are_convex(case: problems.Case, generator: torch.Generator) -> None:
    assert case.problem.lower_inequality is not None
    flat = FlatProblem(case.problem, *case.start)
    for _ in range(5):
        one, two = torch.randn(2, flat.m, generator=generator).mul(0.01)
        x = flat.flat_x(case.start[0])
        middle = flat.lower_level.inequality(x, (one + two) / 2)
        ends = (flat.lower_level.inequality(x, one) + flat.lower_level.inequality(x, two)) / 2
        assert bool((middle <= ends + 1e-15).all())


def test_float32_is_kept() -> None:
    single, double = problems.case("sparse_group_lasso", dtype=torch.float32), problems.case("sparse_group_lasso")
    assert {leaf.dtype for leaf in (*single.start[0].values(), *single.start[1].values())} == {torch.float32}
    value = single.problem.lower(*single.start)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(double.problem.lower(*double.start)), rel=1e-4)


def test_the_report(case: problems.Case, parts: lasso.Parts, tmp_path: Path) -> None:
    x = {"group": torch.linspace(-5, -4, 10), "feature": torch.linspace(-6, -5, 30)}
    y = lasso.complete(lasso.fit(parts.train, x), 1e-3)
    found: Any = types.SimpleNamespace(x=x, y=y)
    assert case.report is not None
    report = case.report(found, tmp_path)
    assert report.metrics["learned_validation_loss"] == float(parts.valid.loss(y))
    assert report.metrics["start_test_accuracy"] == parts.test.accuracy(case.start[1])
    assert report.metrics["start_validation_loss"] == pytest.approx(float(parts.valid.loss(case.start[1])), rel=1e-8)
    pairs = [
        {"group": torch.full((10,), -5.0 + i), "feature": torch.full((30,), -5.0 + j)} for i, j in ((-1, -1), (0, -2))
    ]
    best = min(float(parts.valid.loss(lasso.fit(parts.train, pair))) for pair in pairs)
    assert report.metrics["common_validation_loss"] <= best * (1 + 1e-8)
    assert best < report.metrics["start_validation_loss"]
    assert report.metrics["learned_features"] == int((y["weight"].abs() > 1e-3).sum())
    assert "best common log-penalties" in report.text
    with report.files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert float(rows[13]["group_log_penalty"]) == float(x["group"][3])
    assert float(rows[13]["weight"]) == float(y["weight"][13])
