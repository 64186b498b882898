"""Unrolled lower levels against closed forms, torch.optim, finite differences and the implicit hypergradient."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import implicit
from implicit import (
    SGD,
    Adagrad,
    Adam,
    Cholesky,
    ConvergenceWarning,
    InnerOptimizer,
    NeumannSeries,
    RMSprop,
    tree,
    unroll,
    unroll_map,
    unrolled,
)
from implicit.tree import Tree
from tests.benchmarks.memory_of_unrolling import Task, measure
from tests.dense import SETTINGS, normal, relative, setting_of, swapped

N, M = 6, 4


def spd(n: int, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(normal(seed, n, n))
    return (q * torch.linspace(0.5, 4.0, n)) @ q.T


A, B, START = spd(N), normal(1, N, M), normal(2, N)
X, TARGET = normal(3, M), normal(4, N)
STEP = 0.2


def lower(x: Tree, y: Tree) -> Tensor:
    """y'Ay/2 - y'Bx, with y* = A^{-1} B x."""
    return 0.5 * y @ (A @ y) - y @ (B @ x)


def upper(x: Tree, y: Tree) -> Tensor:
    return 0.5 * ((y - TARGET) ** 2).sum() + 0.1 * (x**2).sum()


def closed_form(steps: int, kept: int | None = None, step: float = STEP) -> tuple[Tensor, Tensor]:
    """y_T and its derivative in x through the last ``kept`` steps."""
    contraction = torch.eye(N) - step * A
    power = torch.linalg.matrix_power
    inverse = torch.linalg.inv(A)
    y = (torch.eye(N) - power(contraction, steps)) @ inverse @ B @ X + power(contraction, steps) @ START
    k = steps if kept is None else min(kept, steps)
    return y, (torch.eye(N) - power(contraction, k)) @ inverse @ B


def hypergradient_of(steps: int, kept: int | None = None) -> Tensor:
    y, jacobian = closed_form(steps, kept)
    return 0.2 * X + jacobian.T @ (y - TARGET)


def quiet(*args: Any, **options: Any) -> implicit.UnrolledHypergradient:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return unrolled(*args, **options)


# Gradient descent, by closed form.


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"checkpointing": True},
    "every third": {"checkpointing": 3},
    "one segment": {"checkpointing": 100},
    "forward": {"mode": "forward"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("steps", "kept"), [(1, None), (2, None), (17, None), (17, 1), (17, 5), (17, 40)])
def test_gradient_descent_on_a_quadratic(way: str, steps: int, kept: int | None) -> None:
    found = quiet(
        upper, lower, X, START, steps=steps, optimizer=SGD(lr=STEP), truncation=kept, accuracy=False, **WAYS[way]
    )
    y, _ = closed_form(steps)
    assert relative(found.y, y) < 1e-13
    assert relative(found.value, hypergradient_of(steps, kept)) < 1e-13
    assert found.upper_value == pytest.approx(float(upper(X, y)), rel=1e-13)
    assert found.accuracy is None


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("terms", [1, 7, 30])
def test_truncation_at_the_solution_is_the_neumann_series(name: str, terms: int) -> None:
    setting = setting_of(name)
    _, g, x, y = setting.flat
    step = 0.9 / float(torch.linalg.eigvalsh(g.hessian(x, y))[-1])
    args = setting.upper, setting.lower, setting.x, setting.y
    series = implicit.hypergradient(*args, estimator=NeumannSeries(terms=terms, step=step), accuracy=False)
    for way in ("plain", "checkpointed"):
        found = unrolled(*args, steps=40, truncation=terms, optimizer=SGD(lr=step), accuracy=False, **WAYS[way])
        assert relative(tree.ravel(found.value), tree.ravel(series.value)) < 1e-9
        assert tree.describe(found.value) == tree.describe(setting.x)


def test_many_steps_reach_the_implicit_hypergradient() -> None:
    found = unrolled(upper, lower, X, START, steps=400, checkpointing=True)  # step 1 / L measured
    exact = implicit.hypergradient(upper, lower, X, torch.linalg.solve(A, B @ X), linear_solver=Cholesky())
    assert relative(found.value, exact.value) < 1e-10
    assert found.accuracy is not None
    assert found.accuracy.error < 1e-10


def test_the_measured_step_is_one_over_the_largest_curvature() -> None:
    y = unroll(lower, X, START, steps=1)
    assert relative(y, START - (A @ START - B @ X) / 4.0) < 1e-9


# What it admits.


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_bias_of_few_steps_is_reported(name: str, mode: str) -> None:
    """Warm-started short unrolling has a fixed point of its own: peers stop there with a hypergradient 700 times the
    tolerance they claim. Here the distance to the implicit one is measured."""
    setting = setting_of(name)
    with pytest.warns(ConvergenceWarning, match=r"have not reached the lower solution .*or too few of them"):
        found = unrolled(setting.upper, setting.lower, setting.x, setting.y, steps=20, mode=mode)
    true = float((tree.ravel(found.value) - setting.dense()).norm())
    assert true > 0.01 * float(setting.dense().norm())
    assert found.accuracy is not None
    assert found.accuracy.error == pytest.approx(true, rel=1e-5)
    assert found.accuracy.kind == "estimate"


def test_bias_of_an_unsolved_lower_level_is_reported() -> None:
    with pytest.warns(ConvergenceWarning):
        found = unrolled(upper, lower, X, START, steps=3, optimizer=SGD(lr=STEP))
    y, _ = closed_form(3)
    exact = 0.2 * X + B.T @ torch.linalg.solve(A, torch.linalg.solve(A, B @ X) - TARGET)
    assert found.accuracy is not None
    assert found.accuracy.error == pytest.approx(float((found.value - exact).norm()), rel=1e-6)
    assert found.accuracy.lower_residual == pytest.approx(float((A @ y - B @ X).norm()), rel=1e-12)
    assert found.accuracy.lower_error == pytest.approx(float((y - torch.linalg.solve(A, B @ X)).norm()), rel=1e-6)


# Inner optimizers, by torch.optim and by finite differences.


OPTIMIZERS: dict[str, tuple[InnerOptimizer, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "sgd": (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "decay": (SGD(lr=0.1, weight_decay=0.3), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3)),
    "momentum": (SGD(lr=0.1, momentum=0.8), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
    "dampening": (
        SGD(lr=0.1, momentum=0.8, dampening=0.4, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.4, weight_decay=0.1),
    ),
    "nesterov": (
        SGD(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
    "adam": (Adam(lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1)),
    "adam decay": (
        Adam(lr=0.1, betas=(0.7, 0.95), eps=1e-3, weight_decay=0.2),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.7, 0.95), eps=1e-3, weight_decay=0.2),
    ),
    "amsgrad": (
        Adam(lr=0.1, betas=(0.7, 0.8), amsgrad=True),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.7, 0.8), amsgrad=True),
    ),
    "adamw": (
        Adam(lr=0.1, weight_decay=0.2, decoupled=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    ),
    "rmsprop": (RMSprop(lr=0.05, alpha=0.9), lambda p: torch.optim.RMSprop(p, lr=0.05, alpha=0.9)),
    "rmsprop all": (
        RMSprop(lr=0.05, alpha=0.9, momentum=0.5, centered=True, weight_decay=0.1, eps=1e-4),
        lambda p: torch.optim.RMSprop(p, lr=0.05, alpha=0.9, momentum=0.5, centered=True, weight_decay=0.1, eps=1e-4),
    ),
    "adagrad": (Adagrad(lr=0.3), lambda p: torch.optim.Adagrad(p, lr=0.3)),
    "adagrad all": (
        Adagrad(lr=0.3, lr_decay=0.2, weight_decay=0.1, initial_accumulator_value=0.5, eps=1e-3),
        lambda p: torch.optim.Adagrad(
            p, lr=0.3, lr_decay=0.2, weight_decay=0.1, initial_accumulator_value=0.5, eps=1e-3
        ),
    ),
}


def nonlinear(x: Tree, y: Tree) -> Tensor:
    """Not quadratic, with two leaves of one shape that a pairing by position would confuse."""
    a, b = y["a"], y["b"]
    mixed = torch.cosh(0.3 * (a - x["shift"])).sum() + torch.exp(x["log"]) * (b**2).sum()
    return mixed + 0.1 * (b**4).sum() + 0.5 * ((a - 2 * b) ** 2).sum()


POINT = {"shift": normal(5, 3), "log": torch.tensor(-0.5, dtype=torch.float64)}
FROM = {"b": normal(6, 3), "a": normal(7, 3)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_torch_optim(name: str) -> None:
    ours, theirs = OPTIMIZERS[name]
    q = {key: leaf.clone().requires_grad_() for key, leaf in FROM.items()}
    other = theirs([q["b"], q["a"]])
    for steps in range(1, 9):
        other.zero_grad()
        nonlinear(POINT, q).backward()
        other.step()
        found = unroll(nonlinear, POINT, FROM, steps=steps, optimizer=ours)
        for key in q:
            torch.testing.assert_close(found[key], q[key].detach(), rtol=1e-13, atol=1e-14)
    assert not found["a"].requires_grad


@pytest.mark.parametrize("way", ["plain", "checkpointed", "forward"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_derivatives_of_every_optimizer(name: str, way: str) -> None:
    """Central differences of the whole map from x to f(x, y_T(x)), y_0 depending on x."""
    ours, _ = OPTIMIZERS[name]

    def start(x: Tree) -> Tree:
        return {"a": 0.5 * x["shift"] + FROM["a"], "b": FROM["b"] * torch.exp(x["log"])}

    def outer(x: Tree, y: Tree) -> Tensor:
        return (y["a"] * torch.tensor([1.0, -2.0, 0.5])).sum() + (y["b"] ** 2).sum() + 0.1 * (x["shift"] ** 2).sum()

    found = unrolled(outer, nonlinear, POINT, start, steps=7, optimizer=ours, accuracy=False, **WAYS[way])
    flat = tree.ravel(POINT)

    def value(p: Tensor) -> float:
        x = tree.unravel(p, POINT)
        return float(outer(x, unroll(nonlinear, x, start(x), steps=7, optimizer=ours)))

    width = 1e-5
    expected = torch.tensor([(value(flat + e) - value(flat - e)) / (2 * width) for e in width * torch.eye(len(flat))])
    assert relative(tree.ravel(found.value), expected) < 1e-7


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_entries_without_a_gradient_do_not_become_nan(name: str) -> None:
    """The square root of an exact zero has an infinite derivative, and 0 * inf is NaN."""

    def flat(x: Tree, y: Tree) -> Tensor:
        return 0.5 * ((y[:2] - x) ** 2).sum()  # y[2] never enters

    def outer(x: Tree, y: Tree) -> Tensor:
        return (y**2).sum()

    x, y0 = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0, 0.0])  # the first entry starts at its solution
    ours, _ = OPTIMIZERS[name]
    for way in ("plain", "checkpointed", "forward"):
        found = unrolled(outer, flat, x, y0, steps=3, optimizer=ours, accuracy=False, **WAYS[way])
        assert bool(torch.isfinite(found.value).all())
    assert abs(float(found.value[0])) + abs(float(found.value[1])) > 1e-3


def test_the_step_at_a_vanishing_gradient_has_the_derivative_of_the_quotient() -> None:
    """One Adam step from g = 0 is -lr g / (|g| + eps): slope -lr / eps."""
    x = torch.tensor(0.0, requires_grad=True)
    y = unroll(lambda x, y: 0.5 * (y - x) ** 2, x, torch.tensor(0.0), steps=1, optimizer=Adam(lr=0.1, eps=0.25))
    assert float(y.detach()) == 0.0
    y.backward()
    assert float(x.grad) == pytest.approx(0.1 / 0.25)


# Hyperparameters that are learned.


LEARNED: dict[str, Callable[[Tree], InnerOptimizer]] = {
    "sgd": lambda x: SGD(lr=x["lr"].exp(), momentum=x["m"].sigmoid(), weight_decay=x["decay"].exp(), nesterov=True),
    "dampened": lambda x: SGD(lr=x["lr"].exp(), momentum=x["m"].sigmoid(), dampening=0.5 * x["decay"].exp()),
    "adam": lambda x: Adam(lr=x["lr"].exp(), betas=(x["m"].sigmoid(), 0.9), weight_decay=x["decay"].exp()),
    "second": lambda x: Adam(lr=x["lr"].exp(), betas=(0.5, x["m"].sigmoid()), eps=x["decay"].exp(), decoupled=True),
    "rmsprop": lambda x: RMSprop(lr=x["lr"].exp(), alpha=x["m"].sigmoid(), momentum=x["decay"].exp()),
    "adagrad": lambda x: Adagrad(lr=x["lr"].exp(), lr_decay=x["m"].sigmoid(), weight_decay=x["decay"].exp()),
}


@pytest.mark.parametrize("way", ["plain", "checkpointed", "forward"])
@pytest.mark.parametrize("name", LEARNED)
def test_hyperparameters_can_be_learned(name: str, way: str) -> None:
    x = {"lr": torch.tensor(-2.0), "m": torch.tensor(0.3), "decay": torch.tensor(-1.5)}

    def task(x: Tree, y: Tree) -> Tensor:
        return torch.cosh(y - TARGET).sum() + lower(X, y)

    found = unrolled(
        upper=lambda x, y: 0.5 * (y**2).sum(), lower=task, x=x, y0=START, steps=6, optimizer=LEARNED[name],
        accuracy=False, **WAYS[way],
    )  # fmt: skip

    def value(p: Tree) -> float:
        return float(0.5 * (unroll(task, p, START, steps=6, optimizer=LEARNED[name]) ** 2).sum())

    for key in x:
        h = 1e-5
        expected = (value({**x, key: x[key] + h}) - value({**x, key: x[key] - h})) / (2 * h)
        assert abs(expected) > 1e-5
        assert float(found.value[key]) == pytest.approx(expected, rel=1e-6)


def test_one_learned_step_size_for_every_entry() -> None:
    """Meta-SGD: df/ds_i = -grad_i f * grad_i g after one step."""
    rates = {"a": torch.full((3,), 0.1), "b": torch.full((3,), 0.2)}
    y0 = swapped(FROM)
    found = unrolled(
        lambda x, y: (y["a"] ** 2).sum() + (y["b"] ** 3).sum(),
        lambda x, y: nonlinear(POINT, y),
        rates,
        y0,
        steps=1,
        optimizer=lambda x: SGD(lr=x),
        accuracy=False,
    )
    slope = torch.func.grad(nonlinear, argnums=1)(POINT, y0)
    a, b = y0["a"] - 0.1 * slope["a"], y0["b"] - 0.2 * slope["b"]
    assert relative(found.value["a"], -2 * a * slope["a"]) < 1e-13
    assert relative(found.value["b"], -3 * b**2 * slope["b"]) < 1e-13


# MAML.


def test_maml_on_a_quadratic() -> None:
    """x is the start: dF/dx = (I - sA)^T (y_T - target), first order y_T - target."""
    b = B @ X

    def task(x: Tree, y: Tree) -> Tensor:
        return 0.5 * y @ (A @ y) - y @ b

    def run(**options: Any) -> implicit.UnrolledHypergradient:
        return unrolled(
            lambda x, y: 0.5 * ((y - TARGET) ** 2).sum(), task, START, lambda x: x, steps=5,
            optimizer=SGD(lr=STEP), accuracy=False, **options,
        )  # fmt: skip

    y, _ = closed_form(5)
    for way in WAYS:
        found = run(**WAYS[way])
        assert relative(found.value, torch.linalg.matrix_power(torch.eye(N) - STEP * A, 5) @ (y - TARGET)) < 1e-13
    for way in ("plain", "checkpointed"):
        assert relative(run(first_order=True, **WAYS[way]).value, y - TARGET) < 1e-14
    for way in WAYS:  # nothing reaches the start
        assert float(run(truncation=2, **WAYS[way]).value.norm()) == 0.0


def test_a_start_with_a_graph_of_its_own() -> None:
    w = START.clone().requires_grad_()
    y = unroll(lower, X, 3 * w, steps=4, optimizer=SGD(lr=STEP))
    (found,) = torch.autograd.grad(y.sum(), w)
    assert relative(found, 3 * torch.linalg.matrix_power(torch.eye(N) - STEP * A, 4).sum(dim=0)) < 1e-13


def test_tasks_are_batched_by_vmap() -> None:
    targets = normal(8, 5, N)

    def after(target: Tensor, x: Tensor) -> Tensor:
        def task(x: Tree, y: Tree) -> Tensor:
            return torch.cosh(y - target).sum()

        y = unroll(task, x, lambda x: x, steps=3, optimizer=Adam(lr=0.1), functional=True)
        return ((y - target) ** 2).sum()

    x = START.clone().requires_grad_()
    (loop,) = torch.autograd.grad(sum(after(t, x) for t in targets), x)
    (batched,) = torch.autograd.grad(torch.func.vmap(after, in_dims=(0, None))(targets, x).sum(), x)
    per_task = torch.func.vmap(torch.func.grad(after, argnums=1), in_dims=(0, None))(targets, START)
    assert relative(batched, loop) < 1e-13
    assert relative(per_task.sum(dim=0), loop) < 1e-13


# Batches.


@pytest.mark.parametrize("way", WAYS)
def test_batches_are_handed_out_step_by_step(way: str) -> None:
    """g(x, y; c) = c |y - x|^2 / 2: y_T = x + prod (1 - s c_t) (y_0 - x)."""
    weights = [0.5, 1.0, 2.0, 3.0, 0.1]

    def weighted(x: Tree, y: Tree, *, batch: float) -> Tensor:
        return 0.5 * batch * (y - x) ** 2

    kept = 1.0
    for c in weights[:4]:
        kept *= 1 - STEP * c
    for batches in (weights, lambda t: weights[t]):
        found = unrolled(
            lambda x, y: y, weighted, torch.tensor(2.0), torch.tensor(5.0), steps=4, optimizer=SGD(lr=STEP),
            batches=batches, accuracy=False, **WAYS[way],
        )  # fmt: skip
        assert float(found.y) == pytest.approx(2 + kept * 3, rel=1e-14)
        assert float(found.value) == pytest.approx(1 - kept, rel=1e-14)


def test_the_reference_of_batches_is_asked_for() -> None:
    batches = [(A[i : i + 3], B[i : i + 3]) for i in (0, 3)] * 300

    def part(x: Tree, y: Tree, *, batch: Any) -> Tensor:
        rows, right = batch
        return 0.5 * ((rows @ y - right @ x) ** 2).mean()

    def full(x: Tree, y: Tree) -> Tensor:
        return 0.5 * ((A @ y - B @ x) ** 2).mean()

    with pytest.raises(ValueError, match="give the full lower objective as reference, or accuracy=False"):
        unrolled(upper, part, X, START, steps=4, batches=batches, optimizer=SGD(lr=0.1))
    found = unrolled(upper, part, X, START, steps=600, batches=batches, optimizer=SGD(lr=0.3), reference=full)
    assert found.accuracy is not None  # interpolation: every batch has the same solution
    assert found.accuracy.error < 1e-2 * float(found.value.norm())


# Checkpointing and higher orders.


@pytest.mark.parametrize("checkpointing", [False, True, 2])
@pytest.mark.parametrize("optimizer", [SGD(lr=0.1, momentum=0.5), Adam(lr=0.1)], ids=["sgd", "adam"])
def test_second_derivatives(optimizer: InnerOptimizer, checkpointing: bool | int) -> None:
    def after(shift: Tensor, log: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        y0 = {"a": a, "b": FROM["b"]}
        y = unroll(
            nonlinear, {"shift": shift, "log": log}, y0, steps=3, optimizer=optimizer, checkpointing=checkpointing
        )
        return y["a"], y["b"]

    point = tuple(leaf.clone().requires_grad_() for leaf in (POINT["shift"], POINT["log"], FROM["a"]))
    assert gradcheck(after, point)
    assert gradgradcheck(after, point)


def test_third_derivatives_by_forward_over_reverse_over_reverse() -> None:
    """y_1 = y - s x y^3, started at y = x: the very same tensor, whose gradient is still that in y alone."""

    def after(x: Tensor, **options: Any) -> Tensor:
        return unroll(lambda x, y: x * y**4 / 4, x, lambda x: x, steps=1, optimizer=SGD(lr=0.5), **options)

    def third(x: Tensor, **options: Any) -> Tensor:
        x.requires_grad_()
        value = after(x, **options)
        for _ in range(3):
            (value,) = torch.autograd.grad(value, x, create_graph=True)
        return value

    x = torch.tensor(1.3)
    for options in ({}, {"checkpointing": True}):
        assert float(third(x.clone(), **options).detach()) == pytest.approx(-0.5 * 24 * 1.3, rel=1e-12)
    nested = torch.func.jacfwd(torch.func.grad(torch.func.grad(lambda x: after(x, functional=True))))(x)
    assert float(nested) == pytest.approx(-0.5 * 24 * 1.3, rel=1e-12)


def test_memory_is_flat_for_implicit_linear_for_unrolled_and_a_root_for_checkpointed_gradients() -> None:
    task = Task(size=400, rows=10)
    few, many = 36, 144
    growth = {
        name: measure(lambda run=run: run(many)) / measure(lambda run=run: run(few))
        for name, run in task.ways().items()
    }
    assert growth["implicit"] == 1.0
    assert growth["unrolled, truncation=10"] == 1.0
    assert 3.5 < growth["unrolled"] < 4.1
    assert 1.5 < growth["unrolled, checkpointing=True"] < 2.2


def test_checkpoints_are_kept_as_often_as_asked() -> None:
    task = Task(size=400, rows=10)
    peaks = {n: measure(lambda n=n: task.unrolled(100, checkpointing=n)) for n in (1, 10, 100)}
    whole = measure(lambda: task.unrolled(100))
    assert peaks[10] < 0.4 * peaks[1]
    assert peaks[10] < 0.2 * peaks[100]
    assert peaks[100] == pytest.approx(whole, rel=0.05)
    for n in (1, 10, 100):
        assert relative(task.unrolled(100, checkpointing=n), task.unrolled(100)) < 1e-13


def test_nothing_is_kept_where_nothing_is_differentiated() -> None:
    task = Task(size=400, rows=10)

    def run() -> None:
        y = unroll(task.lower, task.x, task.y0, steps=50, optimizer=task.optimizer)
        assert not y.requires_grad

    assert measure(run) < 3 * measure(lambda: task.lower(task.x, task.y0.clone().requires_grad_()))
    x = task.x.clone().requires_grad_()

    def without() -> None:
        with torch.no_grad():
            assert not unroll(task.lower, x, task.y0, steps=50, optimizer=task.optimizer).requires_grad

    assert measure(without) <= 1.05 * measure(lambda: task.lower(x, task.y0.clone().requires_grad_()))


def test_truncation_cuts_captured_tensors_off_as_well() -> None:
    """y_T = (1 - s c)^T y_0 with c captured: the last step alone gives -s y_{T-1}."""
    c = torch.tensor(2.0, requires_grad=True)
    x = torch.tensor(0.0, requires_grad=True)
    y = unroll(lambda x, y: 0.5 * c * y**2 + 0 * x, x, torch.tensor(3.0), steps=4, truncation=1, optimizer=SGD(lr=0.1))
    y.backward()
    assert float(c.grad) == pytest.approx(-0.1 * 3.0 * 0.8**3)
    z = unroll_map(lambda x, y, t: c * y, x, torch.tensor(1.0), steps=4, truncation=1)
    (found,) = torch.autograd.grad(z, c)
    assert float(found) == 2.0**3


def test_checkpointing_refuses_to_lose_a_captured_gradient() -> None:
    scale = torch.tensor(2.0, requires_grad=True)

    def captured(x: Tree, y: Tree) -> Tensor:
        return 0.5 * (torch.exp(scale) * (y - x) ** 2).sum()

    x, y0 = torch.ones(3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"captures a tensor of shape \(\) that requires a gradient"):
        unroll(captured, x, y0, steps=4, optimizer=SGD(lr=0.1), checkpointing=True)
    p = x.clone().requires_grad_()
    unroll(captured, p, y0, steps=4, optimizer=SGD(lr=0.01)).sum().backward()
    assert abs(float(scale.grad)) > 0.1  # without checkpoints nothing is lost


# Maps.


def test_any_map_can_be_unrolled() -> None:
    """Projected gradient steps onto a box: the Jacobian of the free entries alone."""
    options = [{}, {"checkpointing": True}, {"truncation": 60}]
    b = torch.tensor([0.5, 9.0, -9.0])
    matrix = torch.tensor([[2.0, 0.5, 0.0], [0.5, 2.0, 0.3], [0.0, 0.3, 1.0]])

    def step(x: Tree, y: Tree, t: int) -> Tree:
        return (y - 0.4 * (matrix @ y - x)).clamp(-1.0, 1.0)

    for extra in options:
        x = b.clone().requires_grad_()
        y = unroll_map(step, x, torch.zeros(3), steps=100, **extra)
        torch.testing.assert_close(y.detach(), torch.tensor([0.0, 1.0, -1.0]), atol=1e-12, rtol=0)
        (found,) = torch.autograd.grad(y[0], x)
        torch.testing.assert_close(found, torch.tensor([0.5, 0.0, 0.0]))


def test_maps_see_the_step_count_and_trees() -> None:
    seen = []

    def step(x: Tree, y: Tree, t: int) -> Tree:
        seen.append(t)
        return {"b": y["b"] + (t + 1) * x["w"], "a": y["a"]}

    x = {"w": torch.tensor(2.0, requires_grad=True)}
    y = unroll_map(step, x, {"a": torch.tensor(7.0), "b": torch.tensor(0.0)}, steps=5, truncation=3, checkpointing=2)
    assert (float(y["a"].detach()), float(y["b"].detach())) == (7.0, 2.0 * 15)
    y["b"].backward()
    assert float(x["w"].grad) == 3 + 4 + 5
    assert seen == [0, 1, 2, 2, 3, 4, 4, 2, 3]  # the third is looked at for captured tensors; segments again, backwards


@pytest.mark.parametrize("way", ["plain", "checkpointed", "forward"])
def test_key_order_does_not_matter(way: str) -> None:
    def outer(x: Tree, y: Tree) -> Tensor:
        return (y["a"] ** 2).sum() + (y["b"] ** 3).sum() + x["log"]

    def reordered(x: Tree, y: Tree) -> Tensor:
        return nonlinear(swapped(x), swapped(y))

    options: dict[str, Any] = {"steps": 5, "optimizer": Adam(lr=0.1), "accuracy": False, **WAYS[way]}
    first = unrolled(outer, nonlinear, POINT, FROM, **options)
    for x, y0 in ((swapped(POINT), FROM), (POINT, swapped(FROM))):
        found = unrolled(outer, reordered, x, y0, **options)
        assert list(found.value) == list(x)
        assert float(tree.norm(tree.sub(found.value, first.value))) < 1e-13
        assert float(tree.norm(tree.sub(found.y, first.y))) < 1e-13


def test_leaves_that_do_not_enter() -> None:
    x = {"used": torch.tensor(2.0), "loose": torch.ones(2)}
    for way in WAYS:
        found = unrolled(
            lambda x, y: y["w"].sum(), lambda x, y: ((y["w"] - x["used"]) ** 2).sum(), x,
            {"w": torch.zeros(2), "free": torch.ones(())}, steps=2, optimizer=SGD(lr=0.25, momentum=0.1),
            accuracy=False, **WAYS[way],
        )  # fmt: skip
        assert float(found.value["loose"].norm()) == 0.0
        assert float(found.value["used"]) == pytest.approx(2 * (0.5 + 0.05 + 0.25), rel=1e-14)
        assert float(found.y["free"]) == 1.0
    constant = unrolled(
        lambda x, y: torch.tensor(3.0), lambda x, y: torch.tensor(1.0), x, x, steps=2, optimizer=SGD(lr=1.0),
        accuracy=False,
    )  # fmt: skip
    assert (constant.upper_value, float(tree.norm(constant.value))) == (3.0, 0.0)


# Misuse.


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": 2.0}, "steps must be a positive integer, got 2.0"),
        ({"truncation": 0}, "truncation must be None or a positive integer, got 0"),
        ({"checkpointing": 0}, "checkpointing must be True, False or a positive integer, got 0"),
        ({"checkpointing": True, "mode": "forward"}, "checkpointing and first_order belong to mode='reverse'"),
        ({"first_order": True, "mode": "forward"}, "checkpointing and first_order belong to mode='reverse'"),
        ({"mode": "backward"}, "mode must be 'reverse' or 'forward', got 'backward'"),
        ({"batches": [1, 2]}, "batches holds 2 items, 3 steps need as many"),
        ({"batches": [1, 2, 3], "optimizer": None}, "optimizer must be given with batches"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], text: str) -> None:
    given = {"steps": 3, "optimizer": SGD(lr=0.1), "accuracy": False, **options}
    with pytest.raises(ValueError, match=text):
        unrolled(upper, lambda x, y, batch=None: lower(x, y), X, START, **given)


def test_objects_that_are_no_optimizers_are_refused() -> None:
    for wrong in (SGD, "sgd", 0.1, torch.optim.SGD):
        with pytest.raises(TypeError, match=r"optimizer must be one such as SGD\(lr=0.1\)"):
            unroll(lower, X, START, steps=2, optimizer=wrong)
    with pytest.raises(ValueError, match="g has no positive curvature at y0"):
        unroll(lambda x, y: -(y**2).sum(), X, START, steps=2)
    with pytest.raises(ValueError, match="the lower objective must return a scalar, got shape"):
        unroll(lambda x, y: y, X, START, steps=2, optimizer=SGD(lr=0.1))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SGD(lr=-1.0), r"lr must be a tensor or a number in \[0, inf\), got -1.0"),
        (lambda: SGD(lr=0.1, momentum=-0.1), "momentum must be"),
        (lambda: SGD(lr=0.1, nesterov=True), "nesterov needs momentum > 0 and dampening = 0"),
        (lambda: SGD(lr=0.1, nesterov=True, momentum=0.9, dampening=0.1), "nesterov needs momentum"),
        (lambda: Adam(lr=0.1, betas=(0.9, 1.0)), r"betas must be a tensor or a number in \[0, 1\), got 1.0"),
        (lambda: Adam(lr=0.1, betas=0.9), "betas must be a pair, got 0.9"),
        (lambda: Adam(lr=0.1, eps=-1e-8), "eps must be"),
        (lambda: RMSprop(lr=0.1, alpha=-0.1), "alpha must be"),
        (lambda: Adagrad(lr=0.1, lr_decay=-0.1), "lr_decay must be"),
    ],
)
def test_settings_of_optimizers_are_validated(make: Callable[[], InnerOptimizer], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
    with pytest.raises(TypeError, match="lr must be a number or a tensor, got 'fast'"):
        SGD(lr="fast")
