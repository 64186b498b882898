"""Quadratic forms found, kept Hessians, and declared regularizers: the same answers, with far fewer products."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import bilevel
import implicit
from bilevel import BilevelProblem, ImplicitGradient
from implicit import CG, GradientGraph, Hessian, KeptHessian, QuadraticForm, tree
from implicit.structure import Factorized, FormGraph, depends_on
from implicit.tree import Tree
from tests.dense import normal, relative

ROWS, TARGETS = normal(1, 60, 12) * torch.logspace(0, -1.5, 12), normal(2, 60)
HELD, HELD_TARGETS = normal(3, 40, 12) * torch.logspace(0, -1.5, 12), normal(4, 40)
LABELS = torch.sign(TARGETS)
X0 = torch.full((12,), -4.0, dtype=torch.float64)


def squares(x: Tree, y: Tensor) -> Tensor:
    return 0.5 * ((ROWS @ y - TARGETS) ** 2).mean()


def logistic(x: Tree, y: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-LABELS * (ROWS @ y)).mean()


def penalties(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (torch.exp(x) * y**2).sum()


def coupled(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (torch.exp(x[:-1]) * (y[1:] - y[:-1]) ** 2).sum() + 0.01 * (y**2).sum()


def upper(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * ((HELD @ y - HELD_TARGETS) ** 2).mean() + 0.01 * ((x + 4) ** 2).sum()


def test_a_quadratic_is_found_and_differentiates_like_the_original() -> None:
    like = {"w": torch.zeros(3, 2), "b": torch.zeros(()), "none": torch.zeros(0)}
    rows = normal(5, 9, 7)

    def fn(y: Tree) -> Tensor:
        flat = torch.cat([y["w"].reshape(-1), y["b"].reshape(1)])
        return ((rows @ flat - 1) ** 2).sum() + 3 * y["b"] + 2

    form = QuadraticForm.find(fn, like)
    assert form is not None
    point = tree.map(lambda leaf: torch.full_like(leaf, 0.7), like)
    assert float(form(point)) == pytest.approx(float(fn(point)), rel=1e-13)
    dense = torch.func.hessian(lambda f: fn(tree.unravel(f, like)))(tree.ravel(point))
    assert relative(form.matrix, dense) < 1e-13
    ours, theirs = GradientGraph(lambda _, q: form(q), (), point), GradientGraph(lambda _, q: fn(q), (), point)
    assert relative(tree.ravel(ours.gradient), tree.ravel(theirs.gradient)) < 1e-13
    vectors = normal(6, 4, 7)
    assert relative(Hessian.of(ours).flat_mm(vectors), vectors @ dense) < 1e-13
    assert relative(Hessian.of(ours).flat_mv(vectors[0]), dense @ vectors[0]) < 1e-13
    flat = normal(7, 7).requires_grad_()
    assert gradcheck(lambda f: form(tree.unravel(f, like)), (flat,))
    assert gradgradcheck(lambda f: form(tree.unravel(f, like)), (flat,))


def test_the_graph_of_a_form_answers_like_that_of_the_function() -> None:
    like = {"w": normal(5, 3, 2), "none": torch.zeros(0), "b": normal(6)}
    x = {"w": normal(7, 3, 1), "b": torch.tensor(0.3)}
    rows = normal(8, 9, 7)

    def data(x: Tree, y: Tree) -> Tensor:
        return ((rows @ torch.cat([y["b"].reshape(1), y["w"].reshape(-1)]) - 1) ** 2).mean()

    def regularizer(x: Tree, y: Tree) -> Tensor:
        return (torch.exp(x["w"]) * y["w"] ** 2).sum() + x["b"] * y["b"] ** 3

    form = QuadraticForm.find(lambda q: data(x, q), like)
    assert form is not None
    ours = FormGraph(form, regularizer, x, like)
    theirs = GradientGraph(lambda p, q: data(p, q) + regularizer(p, q), x, like)
    assert float(ours.value) == pytest.approx(float(theirs.value), rel=1e-13)
    v = {"none": torch.zeros(0), "b": normal(9), "w": normal(10, 3, 2)}
    batch = tree.map(lambda leaf: torch.stack([leaf, 2 * leaf - 1, leaf**2]), v)
    pairs = [
        (ours.gradient, theirs.gradient),
        (ours.hvp(v), theirs.hvp(v)),
        (ours.mixed_vjp(v), theirs.mixed_vjp(v)),
        (ours.joint(v), theirs.joint(v)),
        (ours.hvp_batch(batch), theirs.hvp_batch(batch)),
        (Hessian.of(ours) @ v, Hessian.of(theirs) @ v),
    ]
    for found, expected in pairs:
        assert relative(tree.ravel(found), tree.ravel(expected)) < 1e-13
    assert relative(Hessian.of(ours).to_dense(), Hessian.of(theirs).to_dense()) < 1e-13


@pytest.mark.parametrize(
    "fn",
    [
        lambda y: (y**4).sum() + (y**2).sum(),
        lambda y: torch.nn.functional.huber_loss(y, torch.ones_like(y)),
        lambda y: (y**2).sum() + 1e-6 * (y**3).sum(),
        lambda y: torch.log(y - 1).sum(),  # NaN at zero
        lambda y: torch.linalg.vector_norm(y),
        lambda y: torch.clamp(1 - y, min=0).square().sum(),
    ],
    ids=["quartic", "huber", "slightly cubic", "log", "norm", "squared hinge"],
)
def test_what_is_not_quadratic_is_not_taken_for_it(fn: Any) -> None:
    assert QuadraticForm.find(fn, torch.zeros(5)) is None


def test_an_affine_function_is_a_quadratic_form() -> None:
    form = QuadraticForm.find(lambda y: 3 * y.sum() + 1, torch.zeros(4))
    assert form is not None
    assert float(form(torch.ones(4))) == 13.0
    assert torch.equal(form.matrix, torch.zeros(4, 4))


def test_dependence_is_read_off_the_graph() -> None:
    x = {"a": torch.ones(2), "b": torch.ones(1)}
    assert not depends_on(lambda x, y: (y**2).sum(), x, torch.ones(3))
    assert depends_on(lambda x, y: (y**2).sum() + x["b"].sum(), x, torch.ones(3))


def dense(fn: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.func.hessian(fn, argnums=1)(x, y)


def test_the_factor_is_that_of_the_hessian_at_the_new_point() -> None:
    x, y = X0 + normal(8, 12), normal(9, 12)
    kept = KeptHessian.at(squares, X0, torch.zeros(12), declared=True)
    assert kept is not None
    found = kept.preconditioner(GradientGraph(penalties, x, y))
    assert isinstance(found, Factorized)
    total = dense(lambda p, q: squares(p, q) + penalties(p, q), x, y)
    assert relative(found.factor @ found.factor.T, total) < 1e-13
    rows = normal(10, 3, 12)
    applied = found.init(Hessian(lambda q: squares(x, q), y))(rows)
    assert relative(applied, torch.linalg.solve(total, rows.T).T) < 1e-10

    def whole(p: Tree, q: Tree) -> Tensor:
        return squares(p, q) + penalties(p, q)

    undeclared = KeptHessian.at(whole, X0, torch.zeros(12), declared=False)
    assert undeclared is not None
    again = undeclared.preconditioner(GradientGraph(whole, x, y))
    assert isinstance(again, Factorized)
    assert relative(again.factor, found.factor) < 1e-11


def test_changes_beyond_the_diagonal_are_told() -> None:
    x, y = X0 + normal(8, 12), normal(9, 12)
    kept = KeptHessian.at(squares, X0, y, declared=True)
    assert kept is not None
    assert kept.preconditioner(GradientGraph(coupled, x, y)) == "the regularizer's Hessian is not diagonal"
    whole = KeptHessian.at(lambda p, q: squares(p, q) + coupled(p, q), X0, y, declared=False)
    assert whole is not None
    message = whole.preconditioner(GradientGraph(lambda p, q: squares(p, q) + coupled(p, q), x, y))
    assert message == "the Hessian changes beyond its diagonal"
    negative = kept.preconditioner(GradientGraph(lambda p, q: -5 * (q**2).sum(), x, y))
    assert negative is None


def solved(lower: Any, regularizer: Any = None, max_steps: int | None = None, **options: Any) -> bilevel.Solution:
    problem = BilevelProblem(upper, lower, regularizer=regularizer)
    return bilevel.solve(problem, ImplicitGradient(**options), X0.clone(), torch.zeros(12), max_steps=max_steps)


CASES = {
    "quadratic": (squares, penalties, "the quadratic data term was replaced by its 12 x 12 matrix"),
    "logistic": (logistic, penalties, "the 12 x 12 Hessian of the data term was kept"),
    "coupled": (squares, coupled, "no Hessian is kept: the regularizer's Hessian is not diagonal"),
}


@pytest.mark.parametrize("name", CASES)
def test_declaring_a_regularizer_changes_the_cost_and_not_the_answer(name: str) -> None:
    data, regularizer, note = CASES[name]
    plain = solved(lambda x, y: data(x, y) + regularizer(x, y), keep_hessian=0)
    declared = solved(data, regularizer)
    assert plain.status is declared.status is bilevel.Status.CONVERGED
    assert relative(declared.x, plain.x) < 1e-5
    assert relative(declared.y, plain.y) < 1e-6
    assert note in declared.message
    assert "kept" not in plain.message
    assert declared.accuracy.hypergradient_error == pytest.approx(0, abs=1e-8)
    if name != "coupled":
        assert declared.counts["products"] < plain.counts["products"] / 2
    if name == "quadratic":
        assert declared.counts["lower"] < 10  # the data are touched to write the form down, and not again


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 0.0), (torch.float64, 1e4)])
def test_values_far_below_those_at_zero_keep_their_digits(dtype: torch.dtype, offset: float) -> None:
    rows = torch.cat([normal(21, 100, 6), torch.ones(100, 1)], dim=1).to(dtype)
    truth = torch.cat([normal(22, 6), torch.tensor([offset])])
    targets = (rows.double() @ truth + 0.1 * normal(23, 100)).to(dtype)
    held, held_targets = rows[50:], targets[50:]

    def data(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((rows[:50] @ y - targets[:50]) ** 2).mean()

    def f(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((held @ y - held_targets) ** 2).mean() + 1e-3 * (x + 4) ** 2

    def penalty(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * torch.exp(x) * (y[:6] ** 2).sum()

    start = torch.tensor(-4.0, dtype=dtype), torch.zeros(7, dtype=dtype)
    problem = BilevelProblem(f, data, regularizer=penalty)
    kept, plain = (bilevel.solve(problem, ImplicitGradient(keep_hessian=k), *start) for k in (None, 0))
    assert "7 x 7 matrix" in kept.message
    assert kept.status is bilevel.Status.CONVERGED
    assert kept.upper_value == pytest.approx(plain.upper_value, rel=1e-3)


def test_a_form_that_the_data_contradict_is_dropped() -> None:
    far = 3e5 + 3e4 * torch.arange(60.0)  # beyond every probe the loss is linear

    def data(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.huber_loss(ROWS @ y, far, delta=1e3)

    problem = BilevelProblem(lambda x, y: 1e-8 * (y**2).sum() + (x**2).sum(), data, regularizer=penalties)
    start = X0 - 6, torch.zeros(12)
    found = bilevel.solve(problem, ImplicitGradient(), *start, max_steps=0, raise_on_failure=False)
    assert "12 x 12 matrix" not in found.message
    at_start = torch.func.grad(lambda q: data(found.x, q))(start[1])
    gradient = torch.func.grad(lambda q: data(found.x, q) + penalties(found.x, q))(found.y)
    assert float(gradient.norm()) < 1e-6 * float(at_start.norm())


def test_objectives_may_refuse_points_far_away() -> None:
    def data(x: Tensor, y: Tensor) -> Tensor:
        assert float(y.detach().norm()) < 50
        return squares(x, y)

    assert solved(data, penalties).status is bilevel.Status.CONVERGED


def test_half_precision_keeps_nothing() -> None:
    problem = BilevelProblem(
        lambda x, y: ((y - 1) ** 2).sum() + x**2,
        lambda x, y: ((y - 2) ** 2).sum(),
        regularizer=lambda x, y: (x.exp() * y**2).sum(),
    )
    start = torch.tensor(0.5, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)
    found = bilevel.solve(problem, ImplicitGradient(), *start, max_steps=2, raise_on_failure=False)
    assert "kept" not in found.message and "matrix" not in found.message


def test_one_trial_that_is_not_finite_does_not_end_the_keeping() -> None:
    found = solved(squares, broken, max_steps=6)
    assert any(not math.isfinite(value) for value in BROKEN)  # the search did meet one
    assert "12 x 12 matrix" in found.message


def test_an_adjoint_system_without_a_solution_is_no_convergence() -> None:
    rows = normal(25, 6, 12)
    problem = BilevelProblem(
        lambda x, y: (y @ normal(26, 12)) + (x**2).sum(),
        lambda x, y: 0.5 * ((rows @ y - 1) ** 2).mean() + 0.5 * (torch.exp(x) * y**2).sum(),
    )
    algorithm = ImplicitGradient(keep_hessian=0)
    found = bilevel.solve(problem, algorithm, torch.full((12,), -45.0), torch.zeros(12), raise_on_failure=False)
    assert found.status is not bilevel.Status.CONVERGED


def test_keeping_needs_the_solvers_that_it_preconditions() -> None:
    with pytest.raises(ValueError, match="keep_hessian=50 preconditions NewtonCG and CG"):
        ImplicitGradient(keep_hessian=50, lower_solver=implicit.LBFGS())


def test_an_undeclared_quadratic_keeps_its_hessian() -> None:
    def whole(x: Tree, y: Tree) -> Tensor:
        return squares(x, y) + penalties(x, y)

    plain, kept = solved(whole, keep_hessian=0), solved(whole)
    assert "12 x 12 Hessian of the lower objective, which is quadratic in y, was kept" in kept.message
    assert relative(kept.x, plain.x) < 1e-5
    assert kept.counts["products"] < plain.counts["products"] / 2


def test_solvers_of_the_users_choice_are_left_alone() -> None:
    found = solved(squares, penalties, linear_solver=CG(rtol=1e-10))
    assert found.algorithm.keep_hessian == 0
    assert "matrix" not in found.message
    small = solved(squares, penalties, keep_hessian=11)
    assert "matrix" not in small.message


BROKEN: list[float] = []
"""Values of :func:`broken` so far."""


def broken(x: Tensor, y: Tensor) -> Tensor:
    """Penalties that are NaN at points the line search tries."""
    value = 0.5 * (torch.where(x > -3.8, torch.sqrt(-3.8 - x), torch.exp(x)) * y**2).sum()
    BROKEN.append(float(value.detach()))
    return value


RESUMED = {
    "quadratic": (squares, penalties),
    "logistic": (logistic, penalties),
    "not diagonal": (squares, coupled),
    "not diagonal, undeclared": (lambda x, y: squares(x, y) + coupled(x, y), None),
    "not finite": (squares, broken),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("at", [1, 3])
def test_a_resumed_run_keeps_the_same_matrix(name: str, at: int, tmp_path: Path) -> None:
    data, regularizer = RESUMED[name]
    problem = BilevelProblem(upper, data, regularizer=regularizer)
    whole = bilevel.solve(problem, ImplicitGradient(), X0.clone(), torch.zeros(12), max_steps=6)
    path = tmp_path / "run.pt"
    save = bilevel.SaveCheckpoint(path, every=1)
    bilevel.solve(problem, ImplicitGradient(), X0.clone(), torch.zeros(12), max_steps=at, callbacks=[save])
    resumed = bilevel.solve(problem, checkpoint=bilevel.load_checkpoint(path), max_steps=6)
    assert torch.equal(resumed.x, whole.x) and torch.equal(resumed.y, whole.y)
    assert resumed.counts == whole.counts


def test_a_resumed_run_on_trees_keeps_the_same_matrix(tmp_path: Path) -> None:
    def joined(x: Tree, y: Tree) -> Tensor:
        return logistic(x, torch.cat([y["b"], y["a"][0]]))

    problem = BilevelProblem(
        lambda x, y: upper(x, torch.cat([y["b"], y["a"][0]])),
        joined,
        regularizer=lambda x, y: 0.5 * (torch.exp(x[:4]) * y["b"] ** 2).sum() + 0.05 * (y["a"][0] ** 2).sum(),
    )
    start = X0.clone(), {"a": [torch.zeros(8)], "b": torch.zeros(4)}
    path = tmp_path / "run.pt"
    bilevel.solve(problem, ImplicitGradient(), *start, max_steps=2, callbacks=[bilevel.SaveCheckpoint(path, every=1)])
    resumed = bilevel.solve(problem, checkpoint=bilevel.load_checkpoint(path), max_steps=5)
    whole = bilevel.solve(problem, ImplicitGradient(), *start, max_steps=5)
    assert "12 x 12 Hessian of the data term was kept" in whole.message
    assert torch.equal(resumed.x, whole.x) and torch.equal(tree.ravel(resumed.y), tree.ravel(whole.y))
    assert resumed.counts == whole.counts


@pytest.mark.parametrize("algorithm", [bilevel.Penalty(), ImplicitGradient(keep_hessian=0)])
def test_every_algorithm_sees_the_regularizer(algorithm: Any) -> None:
    declared = BilevelProblem(upper, squares, regularizer=penalties)
    joined = BilevelProblem(upper, lambda x, y: squares(x, y) + penalties(x, y))
    runs = [bilevel.solve(p, algorithm, X0.clone(), torch.zeros(12), max_steps=20) for p in (declared, joined)]
    assert relative(runs[0].x, runs[1].x) < 1e-10


def test_minibatches_add_the_regularizer_once() -> None:
    data = bilevel.Batches({"a": ROWS, "t": TARGETS}, batch_size=20)

    def batch_loss(x: Tree, y: Tree, *, batch: Any) -> Tensor:
        return 0.5 * ((batch["a"] @ y - batch["t"]) ** 2).mean()

    problem = BilevelProblem(upper, batch_loss, regularizer=penalties, lower_data=data)
    value = problem.value("lower", X0, torch.ones(12), data.full())
    assert float(value) == pytest.approx(float(squares(X0, torch.ones(12)) + penalties(X0, torch.ones(12))), rel=1e-13)
    generator = torch.Generator().manual_seed(0)
    found = bilevel.solve(problem, ImplicitGradient(), X0.clone(), torch.zeros(12), max_steps=50, generator=generator)
    assert bool(tree.all_finite(found.x, found.y))


def test_modules_bring_regularizers_too() -> None:
    model = torch.nn.Linear(12, 1, bias=False)
    problem = bilevel.from_modules(
        upper=torch.tensor(-3.0),
        lower=model,
        upper_loss=lambda x, net: ((net(HELD)[:, 0] - HELD_TARGETS) ** 2).mean(),
        lower_loss=lambda x, net: ((net(ROWS)[:, 0] - TARGETS) ** 2).mean(),
        regularizer=lambda x, net: x.exp() * sum((p**2).sum() for p in net.parameters.values()),
    )
    found = bilevel.solve(problem, ImplicitGradient(), max_steps=30, raise_on_failure=False)
    assert "12 x 12 matrix" in found.message
    weights = torch.linalg.solve(ROWS.T @ ROWS / 60 + torch.exp(found.x) * torch.eye(12), ROWS.T @ TARGETS / 60)
    assert relative(found.y["weight"][0], weights) < 1e-9


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"regularizer": 3}, TypeError, "regularizer must be a function of \\(x, y\\), got int"),
        ({"regularizer": lambda x, y, batch: y.sum()}, TypeError, "regularizer takes a batch, but it is r\\(x, y\\)"),
    ],
)
def test_misuse_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BilevelProblem(upper, squares, **options)


def test_a_regularizer_that_fails_is_named() -> None:
    problem = BilevelProblem(upper, squares, regularizer=lambda x, y: y)
    with pytest.raises(ValueError, match="regularizer must return a scalar, got shape"):
        bilevel.solve(problem, ImplicitGradient(), X0.clone(), torch.zeros(12))


@pytest.mark.parametrize("value", [-1, 2.5])
def test_keep_hessian_is_checked(value: Any) -> None:
    with pytest.raises(ValueError, match="keep_hessian must be None or an integer >= 0"):
        ImplicitGradient(keep_hessian=value)


def test_float32_finds_the_same_structure() -> None:
    rows, targets = ROWS.float(), TARGETS.float()
    form = QuadraticForm.find(lambda y: 0.5 * ((rows @ y - targets) ** 2).mean(), torch.zeros(12, dtype=torch.float32))
    assert form is not None
    assert form.matrix.dtype == torch.float32
    assert relative(form.matrix.double(), ROWS.T @ ROWS / 60) < 1e-6
    assert implicit.QuadraticForm.find(lambda y: (y**3).sum(), torch.zeros(3, dtype=torch.float32)) is None
