"""The entry point: budgets, statuses, best-so-far, failures that lose nothing, stochastic runs, modules."""

import math
import os
import signal
from typing import Any

import pytest
import torch
from torch import nn

import bilevel
import constrained
import problems
from bilevel import Batches, BilevelProblem, Status
from implicit import tree

ZERO = torch.zeros((), dtype=torch.float64)


def quadratic() -> problems.Case:
    return problems.case("quadratic")


@pytest.mark.parametrize("algorithm", [bilevel.ImplicitGradient(), bilevel.Penalty()])
def test_budgets_do_not_raise(algorithm: Any) -> None:
    case = quadratic()
    solution = bilevel.solve(case.problem, algorithm, *case.start, max_steps=2)
    assert solution.status is Status.STEP_LIMIT
    assert solution.steps == solution.nit == 2
    assert "raise max_steps" in solution.message
    assert repr(solution).startswith(f"Solution(STEP_LIMIT, upper_value={solution.upper_value:.8g}, ")
    assert "steps=2, x: tensor (" in repr(solution) and len(repr(solution)) < 300
    assert not solution.success
    assert solution.fun == solution.upper_value == float(case.problem.upper(solution.x, solution.y))
    solution = bilevel.solve(case.problem, algorithm, *case.start, time_limit=1e-9)
    assert solution.status is Status.TIME_LIMIT
    solution = bilevel.solve(case.problem, algorithm, *case.start, max_steps=0)
    assert solution.status is Status.STEP_LIMIT
    assert float(tree.norm(tree.sub(solution.x, case.start[0]))) == 0.0


def test_status_never_depends_on_the_step_count() -> None:
    """Converging in exactly the last allowed step is convergence."""
    case = quadratic()
    free = bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start)
    exact = bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start, max_steps=free.steps)
    assert free.status is exact.status is Status.CONVERGED
    short = bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start, max_steps=free.steps - 1)
    assert short.status is Status.STEP_LIMIT


def test_tolerances_reach_the_measured_stationarity() -> None:
    case = quadratic()
    for rtol in (1e-2, 1e-5):
        solution = bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start, rtol=rtol)
        assert solution.status is Status.CONVERGED
        first = solution.history[0]["stationarity"]
        assert solution.accuracy.stationarity is not None
        assert solution.accuracy.stationarity <= rtol * 20 * first
    loose = bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start, atol=1e3)
    assert loose.status is Status.CONVERGED
    assert loose.steps <= 1


def test_a_warm_start_at_the_solution_is_convergence() -> None:
    case = quadratic()
    first = bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start)
    for algorithm in (bilevel.ImplicitGradient(), bilevel.ImplicitGradient(rtol=1e-10)):
        again = bilevel.solve(case.problem, algorithm, first.x, first.y)
        assert again.status is Status.CONVERGED
        case.check(again, rtol=1e-8)
    exact = bilevel.solve(case.problem, bilevel.ImplicitGradient(), case.x_star, case.y_star)
    assert exact.status is Status.CONVERGED


def test_a_callback_stops_the_run_and_sees_values() -> None:
    case = quadratic()
    seen: list[Any] = []

    def watch(info: Any) -> bool:
        seen.append((info.step, info.values["upper_value"]))
        return info.step == 3

    logged: list[str] = []
    solution = bilevel.solve(
        case.problem, bilevel.ImplicitGradient(), *case.start, callbacks=[lambda i: logged.append("x") or 3, watch]
    )
    assert solution.status is Status.STOPPED, "only True stops, not any truthy value"
    assert [s for s, _ in seen] == [1, 2, 3]
    assert [row["upper_value"] for row in solution.history] == [v for _, v in seen]


def test_ctrl_c_finishes_the_step_and_returns() -> None:
    case = quadratic()
    before = signal.getsignal(signal.SIGINT)

    def press(info: Any) -> None:
        if info.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    solution = bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start, callbacks=[press])
    assert solution.status is Status.STOPPED
    assert solution.steps == 3
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("algorithm", [bilevel.ImplicitGradient(), bilevel.Penalty(check_every=5)])
@pytest.mark.parametrize("poison", ["upper", "lower"])
def test_nan_during_a_run_keeps_the_last_finite_iterate(algorithm: Any, poison: str) -> None:
    case = quadratic()
    armed = [False]

    def watch(info: Any) -> None:
        armed[0] = info.step >= 5

    def upper(x: Any, y: Any) -> Any:
        return case.problem.upper(x, y) * (math.nan if armed[0] and poison == "upper" else 1.0)

    def lower(x: Any, y: Any) -> Any:
        return case.problem.lower(x, y) * (math.nan if armed[0] and poison == "lower" else 1.0)

    problem = BilevelProblem(upper, lower)
    solution = bilevel.solve(problem, algorithm, *case.start, callbacks=[watch], raise_on_failure=False)
    assert solution.status is Status.NONFINITE
    assert bool(tree.all_finite(solution.x, solution.y))
    assert 5 <= solution.steps <= 10
    assert solution.history
    armed[0] = False
    with pytest.raises(bilevel.SolveError, match="NONFINITE") as caught:
        bilevel.solve(problem, algorithm, *case.start, callbacks=[watch])
    assert bool(tree.all_finite(caught.value.solution.x))


def test_a_step_into_a_nan_region_is_shortened_not_failed() -> None:
    """F = y - log(y) type barriers: the first trial leaves the domain, the search comes back."""
    problem = BilevelProblem(lambda x, y: y - 3 * torch.log(y), lambda x, y: 0.5 * (y - x) ** 2)
    start = torch.tensor(0.05, dtype=torch.float64)
    solution = bilevel.solve(problem, bilevel.ImplicitGradient(), start, start)
    assert solution.status is Status.CONVERGED
    assert float(solution.x) == pytest.approx(3.0, rel=1e-6)


def test_an_indefinite_lower_level_is_reported() -> None:
    problem = BilevelProblem(
        lambda x, y: (y**2).sum() + (x**2).sum(),
        lambda x, y: (y[0] - x) ** 2 - 1e-3 * (y[1] - 1) ** 2 + (y[1] - 1) ** 4,
    )
    y0 = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(bilevel.SolveError, match=r"LINEAR_SOLVE_FAILED.*not positive definite"):
        bilevel.solve(problem, bilevel.ImplicitGradient(), ZERO, y0)


def test_an_exception_mid_run_keeps_the_point_before_it() -> None:
    case = quadratic()
    calls = [0]

    def lower(x: Any, y: Any) -> Any:
        calls[0] += 1
        if calls[0] > 30:
            raise OSError("disk on fire")
        return case.problem.lower(x, y)

    with pytest.raises(bilevel.SolveError, match=r"step \d+ raised OSError: disk on fire") as caught:
        bilevel.solve(BilevelProblem(case.problem.upper, lower), bilevel.ImplicitGradient(), *case.start)
    solution = caught.value.solution
    assert isinstance(caught.value.__cause__, OSError)
    assert solution.steps >= 1
    assert solution.history
    assert bool(tree.all_finite(solution.x))


def test_best_point_is_returned_when_a_run_stops_early() -> None:
    """Adam with a huge step overshoots: the best point seen comes back, not the last."""
    case = quadratic()
    algorithm = bilevel.ImplicitGradient(upper_optimizer=torch.optim.SGD, upper_options={"lr": 0.31})
    solution = bilevel.solve(case.problem, algorithm, *case.start, max_steps=25, raise_on_failure=False)
    values = [row["upper_value"] for row in solution.history]
    assert min(values) < values[-1], "this run must overshoot for the test to say anything"
    assert solution.upper_value == pytest.approx(min(values), rel=1e-9)


def test_a_saddle_of_the_lower_level_is_not_convergence() -> None:
    """CG sees only what grad_y f excites: without a look elsewhere both methods would claim x* = 4/9."""
    problem = BilevelProblem(
        lambda x, y: (y[0] - 1) ** 2 + 0.5 * x**2 + x * y[1] ** 2,
        lambda x, y: 0.5 * (y[0] - 2 * x) ** 2 - 0.5 * y[1] ** 2 + y[1] ** 4 / 4,
    )
    for algorithm in (bilevel.ImplicitGradient(), bilevel.Penalty()):
        solution = bilevel.solve(problem, algorithm, torch.tensor(1.0), torch.zeros(2))
        assert solution.status is Status.STALLED
        assert "negative curvature" in solution.message
        assert any("saddle" in note for note in solution.accuracy.notes)
    solution = bilevel.solve(problem, bilevel.ImplicitGradient(), torch.tensor(1.0), torch.tensor([0.0, 0.1]))
    assert solution.status is Status.CONVERGED
    assert float(solution.x) == pytest.approx(1 / 3, rel=1e-6)


def test_a_maximum_of_the_upper_level_has_no_distance() -> None:
    problem = BilevelProblem(lambda x, y: -(x**2).sum() + 0 * y.sum(), lambda x, y: 0.5 * ((y - x) ** 2).sum())
    solution = bilevel.solve(problem, bilevel.ImplicitGradient(), torch.zeros(1), torch.zeros(1))
    assert solution.accuracy.distance is None
    assert any("not convex" in note for note in solution.accuracy.notes)


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(3)])
def test_a_failing_callback_loses_nothing(error: BaseException) -> None:
    case = quadratic()

    def broken(info: Any) -> None:
        if info.step == 3:
            raise error

    with pytest.raises(bilevel.SolveError, match="a callback after step 3 raised") as caught:
        bilevel.solve(case.problem, bilevel.ImplicitGradient(), *case.start, callbacks=[broken])
    assert caught.value.solution.steps == 3


def test_torch_optimizers_drive_the_upper_level_and_are_projected() -> None:
    case = quadratic()
    algorithm = bilevel.ImplicitGradient(upper_optimizer=torch.optim.Adam, upper_options={"lr": 0.05}, rtol=1e-6)
    solution = bilevel.solve(case.problem, algorithm, *case.start, max_steps=3000)
    case.check(solution, rtol=1e-4)
    boxed = BilevelProblem(case.problem.upper, case.problem.lower, upper_set=constrained.Box(-0.1, 0.1))
    adam = bilevel.solve(boxed, algorithm, *case.start, max_steps=3000, raise_on_failure=False)
    spg = bilevel.solve(boxed, bilevel.ImplicitGradient(), *case.start)
    assert spg.status is Status.CONVERGED
    assert float((spg.x.abs() - 0.1).abs().min()) == 0.0, "some bound is active"
    assert constrained.Box(-0.1, 0.1).contains(adam.x)
    assert float(tree.norm(tree.sub(spg.x, adam.x))) < 1e-3


@pytest.mark.parametrize("chosen", [constrained.Ball(0.3), constrained.Simplex(), constrained.Box(-0.2, 0.3)])
def test_upper_sets_against_scipy(chosen: Any) -> None:
    from scipy.optimize import minimize

    case = problems.case("quadratic", n=4)
    problem = BilevelProblem(case.problem.upper, case.problem.lower, upper_set=chosen)
    solution = bilevel.solve(problem, bilevel.ImplicitGradient(), *case.start)
    assert solution.status is Status.CONVERGED
    hessian = torch.func.hessian(case.problem.lower, argnums=1)(*case.start)
    slope = torch.func.jacrev(torch.func.grad(case.problem.lower, argnums=1))(*case.start)
    constant = torch.func.grad(case.problem.lower, argnums=1)(*case.start)

    def hyper(x: torch.Tensor) -> torch.Tensor:
        return case.problem.upper(x, -torch.linalg.solve(hessian, slope @ x + constant))

    def pair(p: Any) -> Any:
        x = torch.tensor(p, requires_grad=True)
        value = hyper(x)
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    constraints: Any = {
        "Ball": [{"type": "ineq", "fun": lambda p: 0.09 - p @ p, "jac": lambda p: -2 * p}],
        "Simplex": [{"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: p * 0 + 1}],
    }.get(type(chosen).__name__, [])
    bounds = {"Box": [(-0.2, 0.3)] * 4, "Simplex": [(0, None)] * 4}.get(type(chosen).__name__)
    x0 = chosen.project(case.start[0]).numpy()
    found = minimize(
        pair,
        x0,
        jac=True,
        method="SLSQP",
        bounds=bounds,
        constraints=constraints,
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert float((solution.x - torch.tensor(found.x)).norm()) < 1e-6
    assert chosen.contains(solution.x)


def ridge(batch: int | None) -> tuple[BilevelProblem, BilevelProblem, torch.Tensor, torch.Tensor]:
    """Log-penalties of a ridge on noisy data: minibatch problem, full problem, start."""
    g = torch.Generator().manual_seed(5)
    a = torch.randn(400, 8, generator=g)
    t = a @ torch.tensor([2.0, -1.0, 0.5, 0, 0, 0, 0, 0]) + torch.randn(400, generator=g)

    def upper(x: Any, y: Any, *, batch: Any) -> Any:
        return ((batch[0] @ y - batch[1]) ** 2).mean() / 2 + 1e-2 * ((x + 2) ** 2).mean()

    def lower(x: Any, y: Any, *, batch: Any) -> Any:
        return ((batch[0] @ y - batch[1]) ** 2).mean() / 2 + (x.exp() * y**2).sum() / 2

    def build(size: int | None) -> BilevelProblem:
        return BilevelProblem(
            upper, lower, upper_data=Batches((a[:200], t[:200]), size), lower_data=Batches((a[200:], t[200:]), size)
        )

    return build(batch), build(None), torch.full((8,), -2.0), torch.zeros(8)


@pytest.mark.parametrize(
    "algorithm",
    [
        bilevel.ImplicitGradient(),
        bilevel.Penalty(),
        bilevel.ImplicitGradient(upper_optimizer=torch.optim.Adam, upper_options={"lr": 1e-2}),
    ],
)
def test_minibatches_come_close_to_the_full_answer(algorithm: Any) -> None:
    noisy, full, x0, y0 = ridge(20)
    exact = bilevel.solve(full, bilevel.ImplicitGradient(), x0, y0)
    assert exact.status is Status.CONVERGED
    found = bilevel.solve(noisy, algorithm, x0, y0, max_steps=1000, generator=torch.Generator().manual_seed(1))
    assert found.status is Status.STEP_LIMIT

    def hyper(x: torch.Tensor) -> float:
        a, t = full.lower_data.full()  # type: ignore[union-attr]
        y = torch.linalg.solve(a.T @ a / len(a) + torch.diag(x.exp()), a.T @ t / len(a))
        return float(full.upper(x, y, batch=full.upper_data.full()))  # type: ignore[union-attr]

    start, best, reached = hyper(x0), hyper(exact.x), hyper(found.x)
    assert reached - best <= (0.05 if algorithm.__dict__.get("upper_optimizer") is None else 0.25) * (start - best)
    assert found.accuracy.stationarity is not None
    again = bilevel.solve(noisy, algorithm, x0, y0, max_steps=1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.x, again.x)
    other = bilevel.solve(noisy, algorithm, x0, y0, max_steps=1000, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(found.x, other.x)


def test_the_callers_generator_is_not_moved() -> None:
    noisy, _, x0, y0 = ridge(20)
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    bilevel.solve(noisy, bilevel.Penalty(), x0, y0, max_steps=5, generator=generator)
    assert torch.equal(before, generator.get_state())


def test_penalties_that_grow_do_not_break_the_inner_steps() -> None:
    """exp(x) makes the lower level 2000 times steeper than at the start; steps measured there would diverge."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(50, 4, generator=g)
    noise = torch.randn(50, generator=g)
    problem = BilevelProblem(
        lambda x, y: (y**2).sum() + 1e-3 * ((x - 8) ** 2).sum(),
        lambda x, y: ((a @ y - noise) ** 2).mean() / 2 + (x.exp() * y**2).sum() / 2,
    )
    x0, y0 = torch.zeros(4), torch.zeros(4)
    exact = bilevel.solve(problem, bilevel.ImplicitGradient(), x0, y0)
    found = bilevel.solve(problem, bilevel.Penalty(), x0, y0)
    assert float(exact.x.max()) > 6.0
    assert float((found.x - exact.x).norm() / exact.x.norm()) < 1e-2


def test_strong_convexity_turns_the_estimate_into_a_bound() -> None:
    case = quadratic()
    problem = BilevelProblem(case.problem.upper, case.problem.lower, strong_convexity=1.0)
    solution = bilevel.solve(problem, bilevel.ImplicitGradient(rtol=1e-3), *case.start)
    assert solution.accuracy.hypergradient_error_kind == "bound"
    plain = bilevel.solve(case.problem, bilevel.ImplicitGradient(rtol=1e-3), *case.start)
    assert plain.accuracy.hypergradient_error_kind == "estimate"


def test_aux_and_metrics_are_reported() -> None:
    case = quadratic()
    problem = BilevelProblem(
        lambda x, y: (case.problem.upper(x, y), {"size": float(y.detach().norm())}),
        case.problem.lower,
        metrics={"largest": lambda x, y: int(y.argmax()), "broken": lambda x, y: 1 / 0},
    )
    solution = bilevel.solve(problem, bilevel.ImplicitGradient(), *case.start)
    assert solution.aux["upper"]["size"] == float(solution.y.norm())
    assert solution.metrics["largest"] == int(solution.y.argmax())
    assert math.isnan(solution.metrics["broken"])
    problem = BilevelProblem(case.problem.upper, case.problem.lower, metrics={"size": lambda x, y: y.norm()})
    solution = bilevel.solve(problem, bilevel.ImplicitGradient(), *case.start, metrics_every=2)
    assert [("size" in row) for row in solution.history[:4]] == [True, False, True, False]


class Weigher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_penalty = nn.Parameter(torch.full((3,), -1.0))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (self.log_penalty.exp() * weight**2).sum() / 2


@pytest.mark.parametrize("algorithm", [bilevel.ImplicitGradient(), bilevel.Penalty()])
def test_modules_give_the_same_answer_as_functions(algorithm: Any) -> None:
    g = torch.Generator().manual_seed(0)
    a, t = torch.randn(40, 3, generator=g), torch.randn(40, generator=g)
    model, weigher = nn.Linear(3, 1, bias=False), Weigher()
    nn.init.zeros_(model.weight)
    prior = 1e-2

    problem = bilevel.from_modules(
        upper=weigher,
        lower=model,
        upper_loss=lambda up, low: (
            ((low(a[20:])[:, 0] - t[20:]) ** 2).mean() / 2 + prior * ((up.parameters["log_penalty"] + 1) ** 2).sum()
        ),
        lower_loss=lambda up, low: ((low(a[:20])[:, 0] - t[:20]) ** 2).mean() / 2 + up(low.parameters["weight"]),
    )
    plain = BilevelProblem(
        lambda x, y: ((a[20:] @ y - t[20:]) ** 2).mean() / 2 + prior * ((x + 1) ** 2).sum(),
        lambda x, y: ((a[:20] @ y - t[:20]) ** 2).mean() / 2 + (x.exp() * y**2).sum() / 2,
    )
    by_modules = bilevel.solve(problem, algorithm)
    by_functions = bilevel.solve(plain, algorithm, torch.full((3,), -1.0), torch.zeros(3))
    difference = by_modules.x["log_penalty"] - by_functions.x
    assert float(difference.norm()) < 1e-5
    assert weigher.log_penalty[0].item() == -1.0, "the module is not touched"
    problem.load_into_modules(by_modules.x, by_modules.y)
    assert torch.equal(weigher.log_penalty.data, by_modules.x["log_penalty"])
    assert torch.equal(model.weight.data, by_modules.y["weight"])


def test_modules_with_buffers_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2, bias=False)
            self.second = nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight
            self.norm = nn.BatchNorm1d(2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.second(self.norm(self.first(inputs)))

    torch.manual_seed(0)
    module, inputs = Tied(), torch.randn(16, 2)
    statistics = module.norm.running_mean.clone()  # type: ignore[union-attr]
    problem = bilevel.from_modules(
        upper=torch.zeros(()),
        lower=module,
        upper_loss=lambda x, net: (net(inputs) ** 2).mean() + 0.1 * x**2,
        lower_loss=lambda x, net: (
            ((net(inputs) - inputs) ** 2).mean() + x.exp() * sum((p**2).sum() for p in net.parameters.values())
        ),
    )
    assert set(problem.start[1]) == {"first.weight", "norm.weight", "norm.bias"}
    solution = bilevel.solve(problem, bilevel.ImplicitGradient(), max_steps=3, raise_on_failure=False)
    assert bool(tree.all_finite(solution.x, solution.y))
    assert torch.equal(statistics, module.norm.running_mean)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ReLU has no trainable parameters"):
        bilevel.from_modules(upper=torch.zeros(()), lower=nn.ReLU(), upper_loss=abs, lower_loss=abs)
