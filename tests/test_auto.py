"""The automatic choice: what it sees, what it picks, what it does when the pick fails, and no false claim."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
import problems
from bilevel import BilevelProblem, Choice, SolveError, Status, auto, choose
from bilevel.auto import Probe, probe_lower_level
from bilevel.cli import main
from constrained import Box

SIZE = 4


def upper(x: Tensor, y: Tensor) -> Tensor:
    return ((y - 1) ** 2).sum() + (x**2).sum()


def lower(x: Tensor, y: Tensor) -> Tensor:
    return ((y - x) ** 2).sum()


def problem(g: Callable[..., Tensor] = lower, **fields: Any) -> BilevelProblem:
    return BilevelProblem(upper, g, **fields)


def start(size: int = SIZE) -> tuple[Tensor, Tensor]:
    return torch.zeros(size), torch.full((size,), 0.3)


def with_eigenvalues(values: Tensor) -> Callable[..., Tensor]:
    """g whose Hessian in y is a rotated diagonal matrix."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    matrix = (basis * values) @ basis.T
    return lambda x, y: 0.5 * y @ matrix @ y - (x * y).sum()


# --- what it sees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        ([0.5, 1.0, 7.0], "strongly convex"),
        ([0.0, 1.0, 7.0], "singular"),
        ([1e-12, 1.0, 7.0], "singular"),
        ([1e-6, 1.0, 7.0], "strongly convex"),
        ([-0.5, 1.0, 7.0], "nonconvex"),
        ([-9.0, -1.0, -0.5], "nonconvex"),
        ([0.0, 0.0, 0.0], "singular"),
    ],
)
def test_the_probe_finds_the_extreme_eigenvalues(values: list[float], shape: str) -> None:
    found = probe_lower_level(problem(with_eigenvalues(torch.tensor(values))), *start(3))
    assert found.shape == shape
    assert found.smallest == pytest.approx(values[0], abs=1e-13)
    assert found.largest == pytest.approx(values[-1], abs=1e-13)


@pytest.mark.parametrize(("smallest", "shape"), [(0.5, "strongly convex"), (0.0, "singular"), (-0.5, "nonconvex")])
def test_the_probe_of_a_large_level_is_a_lanczos_run(smallest: float, shape: str) -> None:
    values = torch.linspace(1.0, 3.0, 400)
    values[:40] = smallest
    found = probe_lower_level(problem(lambda x, y: 0.5 * (values * y**2).sum() - (x * y).sum()), *start(400))
    assert found.shape == shape
    assert found.smallest == pytest.approx(smallest, abs=1e-3)
    assert found.largest == pytest.approx(3.0, abs=1e-2)


def test_one_point_is_not_enough() -> None:
    """y^4 - y^2 is convex at y0 = 1 and not around it; y^4 is singular at 0 only."""
    double = problem(lambda x, y: (y**4 - y**2 - 0.1 * x * y).sum())
    at = torch.zeros(SIZE), torch.ones(SIZE)
    assert probe_lower_level(double, *at, around=False).shape == "strongly convex"
    assert probe_lower_level(double, *at).shape == "nonconvex"


def test_points_where_g_is_not_finite_are_passed_over() -> None:
    log = problem(lambda x, y: (y - 2 * y.log()).sum() + 0.0 * x.sum())
    found = probe_lower_level(log, torch.zeros(2), torch.ones(2))
    assert found.shape == "strongly convex"
    assert math.isfinite(found.smallest)


def test_points_near_the_start_stay_in_the_upper_set() -> None:
    """g is convex for x >= 0 only."""
    half = problem(lambda x, y: (x.sum() + 0.1) * (y**2).sum(), upper_set=Box(0.0, 1.0))
    free = problem(lambda x, y: (x.sum() + 0.1) * (y**2).sum())
    assert probe_lower_level(half, *start()).shape == "strongly convex"
    assert probe_lower_level(free, *start()).shape == "nonconvex"


def test_declared_strong_convexity_is_believed_without_an_evaluation() -> None:
    def never(x: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("not needed")

    found = probe_lower_level(problem(never, strong_convexity=2.0), *start())
    assert (found.shape, found.smallest) == ("strongly convex", 2.0)


def test_a_gradient_that_cannot_be_differentiated_is_said() -> None:
    def fused(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(y[:, None], x[:, None], p=3.0).square().sum()

    assert probe_lower_level(problem(fused), *start()).shape == "unknown"
    choice = choose(problem(fused), *start())
    assert choice.algorithm.name == "Penalty"
    assert "cannot be differentiated" in choice.reason


# --- what it picks ----------------------------------------------------------------------------------------------------


def data(batch_size: int) -> bilevel.Batches:
    return bilevel.Batches((torch.linspace(0, 1, 12),), batch_size)


def batched(x: Tensor, y: Tensor, *, batch: Any) -> Tensor:
    return ((y - x) ** 2).sum() * (1 + batch[0].mean())


def indefinite(x: Tensor, y: Tensor) -> Tensor:
    return (torch.cos(3 * y) + y**2 - x * y).sum()


def row(x: Tensor, y: Tensor) -> Tensor:
    return y - 1 - x.sum()


CHOICES = [
    ("strongly convex", problem(), SIZE, "ImplicitGradient", "eigenvalues of g_yy from 2 to 2"),
    ("x in a box", problem(upper_set=Box(0.0, 1.0)), SIZE, "ImplicitGradient", "strongly convex"),
    ("declared", problem(strong_convexity=2.0), SIZE, "ImplicitGradient", "declared"),
    ("many solutions", problem(lambda x, y: (y.sum() - x.sum()) ** 2), SIZE, "Penalty", "singular"),
    ("y large", problem(), 1000, "ImplicitGradient", "strongly convex"),
    ("nonconvex", problem(indefinite), SIZE, "KKTRelaxation", "not convex"),
    ("nonconvex, large", problem(indefinite), 1000, "Penalty", "not convex"),
    ("rows", problem(lower_inequality=row), SIZE, "KKTRelaxation", "lower_inequality declared, small"),
    ("upper rows", problem(upper_inequality=row), SIZE, "KKTRelaxation", "upper_inequality declared"),
    ("rows, large", problem(lower_inequality=row), 1000, "LVHBA", "too large"),
    ("rows, minibatches", problem(batched, lower_data=data(3), lower_inequality=row), SIZE, "LVHBA", "minibatches"),
    ("minibatches", problem(batched, lower_data=data(3)), SIZE, "ImplicitGradient", "minibatches"),
    ("full batches", problem(batched, lower_data=data(12)), SIZE, "ImplicitGradient", "strongly convex"),
    ("y in a box, large", problem(lower_set=Box(0.0, 1.0)), 1000, "Penalty", "projection"),
]


@pytest.mark.parametrize(("declared", "size", "name", "words"), [c[1:] for c in CHOICES], ids=[c[0] for c in CHOICES])
def test_the_choice_follows_the_structure(declared: BilevelProblem, size: int, name: str, words: str) -> None:
    choice = choose(declared, *start(size))
    assert choice.algorithm == bilevel.algorithm(name)()
    assert choice.reason.startswith(f"{name}: x has {size:,} and y has {size:,} numbers, ")
    assert words in choice.reason
    assert choice.algorithm.refuses(declared) is None
    if choice.fallback is not None:
        assert choice.fallback.name != name
        assert choice.fallback.refuses(declared) is None


@pytest.mark.parametrize(
    "case", [c for c in problems.cases("exact") if "lower_inequality" not in c.problem.constraints]
)
def test_every_exact_case_without_rows_has_a_choice_that_fits(case: Any) -> None:
    choice = choose(case.problem, *case.start)
    assert choice.algorithm.refuses(case.problem) is None


def test_choosing_counts_nothing_and_moves_nothing() -> None:
    x, y = start()
    choose(problem(), x, y)
    assert torch.equal(x, torch.zeros(SIZE)) and torch.equal(y, torch.full((SIZE,), 0.3))
    assert not x.requires_grad and not y.requires_grad


def test_a_misdeclared_problem_is_refused_before_the_choice() -> None:
    with pytest.raises(ValueError, match="lower does not depend on y"):
        choose(problem(lambda x, y: (x**2).sum()), *start())
    with pytest.raises(TypeError, match="x0 is missing"):
        bilevel.solve(problem(), "auto", y0=torch.zeros(SIZE))
    with pytest.raises(TypeError, match=r"bilevel\.Penalty"):
        bilevel.solve(problem(), "Penalty", *start())


def test_where_nothing_fits_all_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "algorithms", lambda: {"ImplicitGradient": bilevel.ImplicitGradient})
    with pytest.raises(ValueError, match=r"no algorithm fits this problem: .*lower_set"):
        choose(problem(lower_set=Box(0.0, 1.0)), *start())


def test_an_algorithm_that_refuses_is_passed_over_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bilevel.ImplicitGradient, "refuses", lambda self, problem: "not today")
    choice = choose(problem(), *start())
    assert choice.algorithm.name != "ImplicitGradient"
    assert "ImplicitGradient does not fit (not today)" in choice.reason


# --- what it does ----------------------------------------------------------------------------------------------------


def test_solving_says_why_and_equals_the_chosen_algorithm() -> None:
    found = bilevel.solve(problem(), "auto", *start())
    own = bilevel.solve(problem(), bilevel.ImplicitGradient(), *start())
    assert found.success
    assert torch.equal(found.x, own.x)
    assert found.choice == choose(problem(), *start()).reason
    assert (found.counts, found.steps, own.choice) == (own.counts, own.steps, "")
    assert found.starts == ()


def test_tolerances_budgets_and_callbacks_reach_the_run() -> None:
    seen = []
    found = bilevel.solve(
        problem(lambda x, y: (torch.cosh(y - x) + y**2).sum()),
        "AUTO",
        *start(),
        rtol=0.0,
        atol=0.25,
        max_steps=1,
        callbacks=[lambda info: seen.append(info.max_steps)],
    )
    assert set(seen) == {1}
    assert (found.algorithm.rtol, found.algorithm.atol) == (0.0, 0.25)


@dataclass(frozen=True, kw_only=True)
class Fake(bilevel.ImplicitGradient):
    """Ends at once: with y = ``y`` and the status it is told."""

    y: float = 1.0
    ends: str = "CONVERGED"
    raises: type[Exception] | None = None
    breaks: bool = False

    def resolve(self, problem: Any, *args: Any, **kwargs: Any) -> Any:
        if self.raises is not None:
            raise self.raises("not from here")
        return super().resolve(problem, *args, **kwargs)

    def step(self, problem: Any, state: Any) -> Any:
        if self.breaks:
            raise RuntimeError("licence lost")
        state.counts["upper"] += 1000
        return {"upper_value": 0.0}

    def terminate(self, problem: Any, state: Any) -> Status:
        return Status[self.ends] if state.step == 3 else Status.RUNNING

    def merit(self, problem: Any) -> None:
        return None

    def assess(self, problem: Any, state: Any, status: Status) -> Any:
        state.y.fill_(self.y)
        return bilevel.Accuracy(), status, f"{self.ends} at {self.y}"


def choosing(monkeypatch: pytest.MonkeyPatch, first: Any, second: Any) -> None:
    monkeypatch.setattr(auto, "choose", lambda *_: Choice(algorithm=first, reason="Fake: why", fallback=second))


HONEST = bilevel.ImplicitGradient()


@pytest.mark.parametrize("ends", ["CONVERGED", "STALLED", "STEP_LIMIT", "NONFINITE", "INFEASIBLE", "UNBOUNDED"])
def test_a_first_choice_without_a_verified_point_is_followed_by_the_second(
    ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choosing(monkeypatch, Fake(ends=ends), HONEST)
    found = bilevel.solve(problem(), "auto", *start())
    own = bilevel.solve(problem(), HONEST, *start())
    assert found.success and torch.equal(found.x, own.x)
    assert found.algorithm.name == "ImplicitGradient"
    first, second = found.starts
    assert (first.name, first.accepted, second.name, second.accepted) == ("Fake", False, "ImplicitGradient", True)
    assert first.status.name == ("STALLED" if ends == "CONVERGED" else ends)
    assert second.upper_value == own.upper_value
    alone = bilevel.solve(problem(), Fake(ends=ends), *start(), raise_on_failure=False)
    assert alone.counts["upper"] >= 3000
    assert found.counts == {name: own.counts[name] + alone.counts[name] for name in own.counts}
    assert "so ImplicitGradient was tried too, whose point is better" in found.choice
    assert found.choice.startswith("Fake: why")


def test_no_false_claim_when_both_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing(monkeypatch, Fake(y=1.0), Fake(y=2.0))
    found = bilevel.solve(problem(), "auto", *start())
    assert found.status is Status.STALLED
    assert "bilevel.verify does not accept" in found.message
    assert [s.accepted for s in found.starts] == [False, False]
    assert float(found.y[0]) == 1.0  # the smaller upper value of the two
    assert "whose point is not better" in found.choice


def test_without_a_fallback_a_lie_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing(monkeypatch, Fake(), None)
    found = bilevel.solve(problem(), "auto", *start())
    assert found.status is Status.STALLED
    assert found.starts == ()


def test_the_better_of_two_points_is_the_verified_one(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing(monkeypatch, Fake(y=0.0, ends="STALLED"), Fake(y=1.0))
    found = bilevel.solve(problem(), "auto", *start())
    assert float(found.y[0]) == 0.0  # y* = x = 0, although f is smaller at y = 1
    assert found.status is Status.STALLED
    assert [s.accepted for s in found.starts] == [True, False]


def test_infeasible_is_the_answer_although_another_run_stops_elsewhere() -> None:
    problem = BilevelProblem(
        lambda x, y: (x**2).sum(), lambda x, y: ((y - x) ** 2).sum(), upper_inequality=lambda x, y: x + 1 - y
    )
    zero = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(SolveError, match="INFEASIBLE") as caught:
        bilevel.solve(problem, "auto", zero, zero)
    assert caught.value.solution.status is Status.INFEASIBLE
    assert caught.value.solution.algorithm.name == "KKTRelaxation", "the first choice, whatever the second run claims"


def test_unbounded_at_an_accepted_point_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing(monkeypatch, Fake(y=0.0, ends="UNBOUNDED"), HONEST)
    with pytest.raises(SolveError, match="UNBOUNDED") as caught:
        bilevel.solve(problem(), "auto", *start())
    assert caught.value.solution.choice == "Fake: why", "without a second run"


@pytest.mark.parametrize(("y", "answer"), [(0.0, "UNBOUNDED"), (1.0, "STALLED")])
def test_unbounded_of_the_second_choice_counts_at_an_accepted_point(
    y: float, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choosing(monkeypatch, Fake(y=0.0, ends="STALLED"), Fake(y=y, ends="UNBOUNDED"))
    found = bilevel.solve(problem(), "auto", *start(), raise_on_failure=False)
    assert found.status is Status[answer]
    assert [s.accepted for s in found.starts] == [True, y == 0.0]
    assert ("whose point is not better" in found.choice) == (answer == "STALLED")


def test_a_declared_problem_without_a_lower_bound_ends_unbounded() -> None:
    problem = BilevelProblem(
        lambda x, y: (x + y).sum(), lambda x, y: ((y - x) ** 2).sum(), lower_inequality=lambda x, y: y - x - 1
    )
    zero = torch.zeros((), dtype=torch.float64)
    with pytest.raises(SolveError, match="UNBOUNDED") as caught:
        bilevel.solve(problem, "auto", zero, zero)
    found = caught.value.solution
    assert found.algorithm.name == "KKTRelaxation" and "tried too" not in found.choice
    assert found.upper_value < -1e6 and abs(float(found.y - found.x)) < 1e-3


def test_failures_of_both_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing(monkeypatch, Fake(ends="NONFINITE"), Fake(ends="INFEASIBLE"))
    with pytest.raises(SolveError) as failed:
        bilevel.solve(problem(), "auto", *start())
    assert len(failed.value.solution.starts) == 2
    assert bilevel.solve(problem(), "auto", *start(), raise_on_failure=False).status.is_failure


@pytest.mark.parametrize(
    "options",
    [{"max_steps": 3}, {"time_limit": 1e-9}, {"callbacks": [lambda info: True]}],
    ids=["steps", "time", "stopped"],
)
def test_no_second_run_without_a_budget(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    choosing(monkeypatch, Fake(ends="STALLED"), HONEST)
    found = bilevel.solve(problem(), "auto", *start(), **options)
    assert found.algorithm.name == "Fake"
    assert found.choice == "Fake: why"
    assert found.starts == ()


def test_the_second_run_gets_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing(monkeypatch, Fake(ends="STALLED"), bilevel.Penalty(rtol=0.0, check_every=1))
    found = bilevel.solve(problem(), "auto", *start(), max_steps=8)
    assert (found.algorithm.name, found.steps) == ("Penalty", 5)


def test_on_large_problems_a_used_budget_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing(monkeypatch, Fake(ends="STEP_LIMIT"), HONEST)
    assert bilevel.solve(problem(), "auto", *start(400)).algorithm.name == "Fake"
    choosing(monkeypatch, Fake(ends="STALLED"), HONEST)
    assert bilevel.solve(problem(), "auto", *start(400)).algorithm.name == "ImplicitGradient"


def test_a_choice_that_refuses_the_start_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing(monkeypatch, Fake(raises=ValueError), HONEST)
    found = bilevel.solve(problem(), "auto", *start())
    assert found.success
    assert found.choice == "ImplicitGradient: Fake refused (not from here)"
    choosing(monkeypatch, Fake(raises=ValueError), Fake(raises=ValueError))
    with pytest.raises(ValueError, match="not from here"):
        bilevel.solve(problem(), "auto", *start())
    choosing(monkeypatch, Fake(raises=ValueError), None)
    with pytest.raises(ValueError, match="not from here"):
        bilevel.solve(problem(), "auto", *start())


def test_an_exception_during_the_run_is_raised_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing(monkeypatch, Fake(breaks=True), HONEST)
    with pytest.raises(SolveError, match=r"step 1 raised RuntimeError: licence lost") as failed:
        bilevel.solve(problem(), "auto", *start())
    assert failed.value.solution is not None


def test_a_checkpoint_goes_on_with_what_was_chosen() -> None:
    given = problem(lambda x, y: (torch.cosh(y - x) + 0.1 * y**2).sum())
    whole = bilevel.solve(given, "auto", *start(), rtol=0.0, max_steps=6)
    half = bilevel.solve(given, "auto", *start(), rtol=0.0, max_steps=3)
    resumed = bilevel.solve(given, "auto", checkpoint=half.checkpoint, max_steps=6)
    assert torch.equal(resumed.x, whole.x)
    assert resumed.algorithm.name == whole.algorithm.name


# --- on the command line ---------------------------------------------------------------------------------------------

MY_FILE = """
import torch
import bilevel

problem = bilevel.BilevelProblem(lambda x, y: ((y - 1) ** 2).sum() + (x**2).sum(), lambda x, y: ((y - x) ** 2).sum())
x0, y0 = torch.zeros(3), torch.zeros(3)
"""


def run(text: str) -> int:
    return main(text.split())


def test_auto_is_an_algorithm_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(MY_FILE)
    assert run("solve my.py:problem --algorithm auto") == 0
    assert "auto chose ImplicitGradient: x has 3 and y has 3 numbers" in " ".join(capsys.readouterr().out.split())
    result = json.loads(Path("runs/my-problem-auto/result.json").read_text())
    assert result["choice"].startswith("ImplicitGradient: ")
    assert result["algorithm"]["name"] == "ImplicitGradient"
    assert run("run quadratic --algorithm Auto --max-steps 2 --rtol 0 --quiet") == 0
    assert run("run quadratic --resume --max-steps 4 --quiet") == 0
    assert json.loads(Path("runs/quadratic-auto/result.json").read_text())["steps"] == 4
    assert run("run hs71 --algorithm auto --quiet") == 0
    assert json.loads(Path("runs/hs71-auto/result.json").read_text())["algorithm"]["name"] == "InteriorPoint"
    capsys.readouterr()
    assert run("run quadratic --algorithm auto --set penalty=3") == 2
    assert "penalty=3" in capsys.readouterr().err
    assert run("list") == 0
    assert "auto: picked by" in capsys.readouterr().out


def test_a_fallback_belongs_to_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(MY_FILE)
    choosing(monkeypatch, Fake(), HONEST)
    assert run("solve my.py:problem --algorithm auto --out o") == 0
    out, err = capsys.readouterr()
    assert "ImplicitGradient was tried too" in " ".join(out.split())
    assert "earlier run" not in err
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("o")] == ["o"]
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert [s["accepted"] for s in result["starts"]] == [False, True]


def test_the_phrase_of_a_probe_is_readable() -> None:
    found: Probe = probe_lower_level(problem(with_eigenvalues(torch.tensor([0.0, 2.0]))), *start(2))
    assert found.said == "eigenvalues of g_yy from 0 to 2 at 9 points: convex but singular, so that y may not be unique"
