"""What is misdeclared is named before the first step: what, where, and the cure."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bilevel
import constrained
from bilevel import Batches, BilevelProblem


def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum()


def g(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 0.5 * ((y - x) ** 2).sum()


X0, Y0 = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
ALGORITHM = bilevel.ImplicitGradient()


def test_a_sound_problem_passes_silently() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BilevelProblem(f, g).validate(X0, Y0)
        BilevelProblem(lambda x, y: (y**2).sum(), g).validate(X0, Y0)  # a validation loss ignores x


DECLARATIONS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: BilevelProblem(None, g), TypeError, r"upper must be a function of \(x, y\), got NoneType"),  # type: ignore[arg-type]
    (lambda: BilevelProblem(f, 3), TypeError, r"lower must be a function"),  # type: ignore[arg-type]
    (
        lambda: BilevelProblem(f, g, lower_data=torch.ones(3)),
        TypeError,
        r"lower_data must be bilevel.Batches.*Batches\(data\)",
    ),  # type: ignore[arg-type]
    (
        lambda: BilevelProblem(f, g, upper_data=Batches(torch.ones(3))),
        TypeError,
        r"upper_data is declared.*def upper\(x, y, \*, batch\)",
    ),
    (
        lambda: BilevelProblem(f, lambda x, y, *, batch: g(x, y)),
        TypeError,
        r"lower takes a batch, but lower_data is not declared",
    ),
    (lambda: BilevelProblem(f, g, upper_set="box"), TypeError, r"upper_set must be a set from constrained, got 'box'"),  # type: ignore[arg-type]
    (lambda: BilevelProblem(f, g, metrics={"m": 3}), TypeError, r"metrics\['m'\] must be a function"),  # type: ignore[dict-item]
    (lambda: BilevelProblem(f, g, strong_convexity=0.0), ValueError, r"strong_convexity must be positive"),
]


@pytest.mark.parametrize(("build", "error", "message"), DECLARATIONS)
def test_declarations(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def cut(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.tensor(g(x, y).item())


POINTS: list[tuple[Any, Any, Any, Any, type[Exception], str]] = [
    (f, g, [1.0], Y0, TypeError, r"x0\[0\] must be a tensor, got float"),
    (f, g, X0, torch.zeros(3, dtype=torch.long), TypeError, r"y0 has dtype torch.int64; variables must be floating"),
    (f, g, X0 * float("nan"), Y0, ValueError, r"x0 contains NaN or infinity"),
    (f, g, {}, Y0, ValueError, r"x0 has no tensors"),
    (f, g, X0, torch.zeros(4), ValueError, r"upper\(x, y\) failed|lower\(x, y\) failed"),
    (f, lambda x, y: (x**2).sum(), X0, Y0, ValueError, r"lower does not depend on y.*order of the arguments"),
    (f, cut, X0, Y0, ValueError, r"lower does not depend on y.*\.item\(\)"),
    (
        lambda x, y: (y**2).sum(),
        lambda x, y: (y**2).sum(),
        X0,
        Y0,
        ValueError,
        r"x enters neither an objective nor a constraint",
    ),
    (f, lambda x, y: (y - x) ** 2, X0, Y0, ValueError, r"lower must return a scalar, got shape \(3,\)"),
    (lambda x, y: 3.0, g, X0, Y0, TypeError, r"upper must return a scalar tensor.*got float"),
    (f, lambda x, y: g(x, y) + float("nan"), X0, Y0, ValueError, r"lower\(x0, y0\) is nan"),
    (f, lambda x, y: y.abs().sqrt().sum() + g(x, y), X0, Y0, ValueError, r"gradient of lower in y is not finite"),
    (
        f,
        lambda x, y: (y @ torch.ones(4)).sum(),
        X0,
        Y0,
        ValueError,
        r"lower\(x, y\) failed with RuntimeError.*y: tensor \(3,\)",
    ),
]


@pytest.mark.parametrize(("upper", "lower", "x", "y", "error", "message"), POINTS)
def test_points(upper: Any, lower: Any, x: Any, y: Any, error: type[Exception], message: str) -> None:
    calls = []

    def counted(p: Any, q: Any) -> Any:
        calls.append(1)
        return lower(p, q)

    with pytest.raises(error, match=message):
        bilevel.solve(BilevelProblem(upper, counted), ALGORITHM, x, y)
    assert len(calls) <= 3, "refused before the first step"


def test_a_leaf_that_enters_nothing_is_named() -> None:
    x = {"used": torch.zeros(3), "idle": torch.zeros(2)}
    problem = BilevelProblem(lambda x, y: f(x["used"], y), lambda x, y: g(x["used"], y))
    with pytest.raises(ValueError, match=r"x\['idle'\] enters neither an objective nor a constraint"):
        problem.validate(x, Y0)
    y = {"used": torch.zeros(3), "idle": torch.zeros(2)}
    problem = BilevelProblem(lambda x, y: f(x, y["used"]), lambda x, y: g(x, y["used"]))
    with pytest.warns(UserWarning, match=r"y\['idle'\] enters neither the lower objective nor a lower"):
        problem.validate(X0, y)


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("kind", ["inequality", "equality"])
def test_a_leaf_that_enters_a_constraint_alone(kind: str, level: str) -> None:
    x, y = ({"used": torch.zeros(3), "rows": torch.zeros(2)} for _ in range(2))

    def upper(x: Any, y: Any) -> Any:
        return f(x["used"], y["used"])

    def lower(x: Any, y: Any) -> Any:
        return g(x["used"], y["used"])

    def rows(x: Any, y: Any) -> Any:
        return {"a": x["rows"] - 1, "b": y["rows"]}

    declared: dict[str, Any] = {f"{level}_{kind}": rows}
    problem = BilevelProblem(upper, lower, **declared)
    if level == "lower":
        problem.validate(x, y)
    else:
        with pytest.warns(UserWarning, match=r"y\['rows'\] enters neither the lower objective nor a lower constraint"):
            problem.validate(x, y)
    for other in (lambda x, y: y["used"] - x["used"], lambda x, y: torch.ones(2)):
        declared = {f"{level}_{kind}": other}
        problem = BilevelProblem(upper, lower, **declared)
        with (
            pytest.raises(ValueError, match=r"x\['rows'\] enters neither an objective nor a constraint"),
            pytest.warns(UserWarning, match=r"y\['rows'\] enters neither"),
        ):
            problem.validate(x, y)


def test_an_upper_level_without_y_warns() -> None:
    def upper(x: Any, y: Any) -> Any:
        return (x**2).sum()

    without: list[dict[str, Any]] = [{}, {"upper_equality": lambda x, y: x}, {"lower_equality": lambda x, y: y}]
    for rows in without:
        with pytest.warns(UserWarning, match="upper does not depend on y"):
            BilevelProblem(upper, g, **rows).validate(X0, Y0)
    with_y: list[dict[str, Any]] = [{f"upper_{kind}": lambda x, y: y - x} for kind in ("inequality", "equality")]
    for rows in with_y:
        BilevelProblem(upper, g, **rows).validate(X0, Y0)


def test_mixed_devices_are_named() -> None:
    with pytest.raises(ValueError, match=r"several devices \(x0 on cpu, y0 on meta\).*\.to\(device\)"):
        bilevel.problem._check_devices(X0, torch.zeros(3, device="meta"), {})


def test_mixed_dtypes_are_named() -> None:
    y = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float32)}
    problem = BilevelProblem(lambda x, y: f(x[:2], y["a"]), lambda x, y: g(x[:2], y["a"]) + (y["b"] ** 2).sum())
    for algorithm in (ALGORITHM, bilevel.Penalty()):
        with pytest.raises(ValueError, match=r"y0 mixes dtypes.*\['a'\]: torch.float64, \['b'\]: torch.float32"):
            bilevel.solve(problem, algorithm, X0, y)


def test_sets_that_do_not_fit() -> None:
    problem = BilevelProblem(f, g, upper_set=constrained.Box(torch.zeros(2), torch.ones(2)))
    with pytest.raises(ValueError, match="x0"):
        problem.validate(X0, Y0)


def test_a_random_objective_is_refused() -> None:
    noisy = torch.nn.Dropout(0.5)
    problem = BilevelProblem(f, lambda x, y: g(x, y) + noisy(torch.linspace(1, 2, 50)).sum())
    with pytest.raises(ValueError, match=r"lower is random: two evaluations.*\.eval\(\)"):
        problem.validate(X0, Y0)


MISUSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"maxiter": 5}, TypeError, r"no argument 'maxiter'; here it is called max_steps"),
    ({"tol": 1e-3}, TypeError, r"called rtol"),
    ({"nonsense": 1}, TypeError, r"no argument 'nonsense'"),
    ({"max_steps": -1}, ValueError, r"max_steps must be a non-negative integer"),
    ({"max_steps": 1.5}, ValueError, r"max_steps"),
    ({"time_limit": 0.0}, ValueError, r"time_limit must be a positive number"),
    ({"rtol": "a"}, TypeError, r"rtol must be a number or None, got 'a'"),
    ({"time_limit": "3"}, TypeError, r"time_limit must be a number"),
    ({"generator": 3}, TypeError, r"generator must be a torch.Generator, got 3"),
    ({"callbacks": print}, TypeError, r"callbacks must be a list"),
    ({"callbacks": [3]}, TypeError, r"callbacks must be functions of a StepInfo, got 3"),
    ({"rtol": -1.0}, ValueError, r"rtol must be >= 0"),
    ({"algorithm": bilevel.Penalty}, TypeError, r"not the class: Penalty\(\)"),
    (
        {"algorithm": "penalty"},
        TypeError,
        r"'auto' or an object such as bilevel.ImplicitGradient\(\), bilevel.*, got 'penalty'",
    ),
    ({"algorithm": None}, TypeError, r"'auto' or an object such as .*bilevel.LVHBA\(\), .*, got None"),
    ({"x0": None}, TypeError, r"x0 is missing"),
    ({"problem": f}, TypeError, r"problem must be a bilevel.BilevelProblem, got function"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), MISUSE)
def test_misuse_of_solve(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"problem": BilevelProblem(f, g), "algorithm": ALGORITHM, "x0": X0, "y0": Y0, **wrong}
    with pytest.raises(error, match=message):
        bilevel.solve(**arguments)


SETTINGS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: bilevel.Penalty(penalty=-1.0), ValueError, r"penalty must be positive, got -1.0"),
    (lambda: bilevel.Penalty(lower_steps=0), ValueError, r"lower_steps must be a positive integer, got 0"),
    (lambda: bilevel.Penalty(momentum=1.0), ValueError, r"momentum must lie in \[0, 1\)"),
    (lambda: bilevel.Penalty(lower_condition=0.5), ValueError, r"lower_condition must be at least 1"),
    (lambda: bilevel.ImplicitGradient(lower_solver=3), TypeError, r"lower_solver must be a Minimizer"),  # type: ignore[arg-type]
    (lambda: bilevel.ImplicitGradient(linear_solver="cg"), TypeError, r"linear_solver must be a LinearSolver"),  # type: ignore[arg-type]
    (lambda: bilevel.ImplicitGradient(upper_optimizer=torch.optim.LBFGS), ValueError, r"needs a closure"),
    (lambda: bilevel.ImplicitGradient(upper_optimizer="adam"), TypeError, r"must be a torch.optim class"),  # type: ignore[arg-type]
    (lambda: bilevel.ImplicitGradient(check_every=0), ValueError, r"check_every must be a positive integer"),
    (lambda: bilevel.PathEfficiency(low=0.9, high=0.3), ValueError, r"low < high"),
    (lambda: bilevel.algorithm("penality"), ValueError, r"unknown algorithm 'penality'; did you mean Penalty\?"),
]


@pytest.mark.parametrize(("build", "error", "message"), SETTINGS)
def test_settings(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_algorithms_by_name_ignore_case_and_separators() -> None:
    assert bilevel.algorithm("implicit-gradient") is bilevel.algorithm("IMPLICIT_GRADIENT") is bilevel.ImplicitGradient


def test_an_idle_x_is_allowed_where_constraints_leave_a_choice_among_lower_solutions() -> None:
    def upper(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.sum()

    def lower(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -(y**2).sum()

    x, y = torch.zeros(1), torch.full((1,), 0.5)
    BilevelProblem(upper, lower, lower_inequality=lambda x, y: y.abs() - 1).validate(x, y)
    with pytest.raises(ValueError, match="x enters neither an objective nor a constraint"):
        BilevelProblem(upper, lower).validate(x, y)
