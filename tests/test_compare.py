"""Comparisons: every run becomes a row, every claim is checked, nothing done is lost, and the numbers add up."""

import contextlib
import csv
import functools
import importlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

import bilevel
import problems
from bilevel import Comparison, compare
from bilevel.cli import main
from bilevel.comparison import Trial
from bilevel.comparison_run import Entrant, Plan, Source, WorkerDied, run_plan
from bilevel.kinds import KINDS
from constrained import Box
from implicit import Status
from problems.registry import _ENTRIES

ROOT = Path(bilevel.__file__).parents[1]
FILES = {"compare.csv", "compare.json", "compare.png", "compare.jsonl"}


def case(name: str = "small", *, shift: float = 1.0, best: float | None = None, **fields: Any) -> problems.Case:
    """f = (y - shift)^2 + x^2, g = (y - x)^2: y* = x, x* = shift / 2, F* = shift^2 / 2."""
    counter = problems.OracleCounter()
    problem = bilevel.BilevelProblem(
        counter.watch("upper", lambda x, y: ((y - shift) ** 2).sum() + (x**2).sum()),
        counter.watch("lower", lambda x, y: ((y - x) ** 2).sum()),
        name=name,
        **fields,
    )
    return problems.Case(
        name=name,
        problem=problem,
        start=(torch.zeros(1), torch.zeros(1)),
        source="closed form",
        upper_star=shift**2 / 2 if best is None else best,
        lower_class="strongly convex",
        counter=counter,
    )


@dataclass(frozen=True, kw_only=True)
class Liar(bilevel.ImplicitGradient):
    """Says CONVERGED where it starts, with a y that f likes and g does not."""

    def terminate(self, problem: Any, state: Any) -> Status:
        return Status.CONVERGED

    def assess(self, problem: Any, state: Any, status: Status) -> Any:
        state.y.fill_(1.0)
        return bilevel.Accuracy(), Status.CONVERGED, "trust me"


@dataclass(frozen=True, kw_only=True)
class Crash(bilevel.ImplicitGradient):
    """Raises at some point of its run."""

    where: str = "step"
    kind: type[BaseException] = ZeroDivisionError

    def resolve(self, *args: Any, **kwargs: Any) -> Any:
        return self._fail("resolve") or super().resolve(*args, **kwargs)

    def step(self, *args: Any) -> Any:
        return self._fail("step") or super().step(*args)

    def _fail(self, here: str) -> None:
        if here == self.where:
            raise self.kind("no luck")


@dataclass(frozen=True, kw_only=True)
class CtrlC(bilevel.Penalty):
    """The user presses Ctrl-C during its second step."""

    check_every: int | None = 1

    def step(self, problem: Any, state: Any) -> Any:
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().step(problem, state)


def columns(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def trial(**fields: Any) -> Trial:
    return Trial(**{"case": "c", "algorithm": "A", "status": "CONVERGED", "verified": True, "value": 0.0, **fields})


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_says_what_the_run_did() -> None:
    given = case(shift=3.0)
    found = compare(given, [bilevel.ImplicitGradient()])
    (row,) = found.trials
    own = bilevel.solve(given.problem, bilevel.ImplicitGradient(), *given.start)
    assert row.value == own.upper_value == pytest.approx(4.5, abs=1e-10)
    assert (row.status, row.steps, row.counts) == ("CONVERGED", own.steps, own.counts)
    assert (row.case, row.algorithm, row.chosen, row.seed) == ("small", "ImplicitGradient", "ImplicitGradient", 0)
    assert row.verified and row.solved and not row.false_claim
    assert row.lower_class == "strongly convex"
    assert row.calls == sum(own.counts.values())
    assert row.seconds > 0
    assert found.missing == 0
    assert found.kind == "bilevel"


def test_by_default_all_algorithms_and_auto_are_tried() -> None:
    found = compare(case(), max_steps=40)
    assert found.algorithms == (*bilevel.algorithms(), "auto")
    assert found.of(algorithm="auto")[0].choice.startswith("ImplicitGradient: ")
    assert found.of(algorithm="auto")[0].chosen == "ImplicitGradient"


@pytest.mark.parametrize(
    ("best", "value", "verified", "solved", "verdict"),
    [
        (0.5, 0.5 + 0.0099, True, True, "solved"),
        (0.5, 0.5 + 0.0101, True, False, "worse point"),
        (0.5, -3.0, True, True, "solved"),
        (-400.0, -396.1, True, True, "solved"),
        (-400.0, -395.9, True, False, "worse point"),
        (0.5, 0.5, False, False, "FALSE CLAIM"),
        (0.5, math.nan, True, False, "worse point"),
        (None, 0.5, True, None, "verified"),
        (None, 0.5, False, None, "FALSE CLAIM"),
    ],
)
def test_solved_means_verified_and_close_to_the_best_known_value(
    best: float | None, value: float, verified: bool, solved: bool | None, verdict: str
) -> None:
    found = trial(best_known=best, value=value, verified=verified)
    assert found.solved is solved
    assert found.verdict == verdict
    assert found.false_claim is not verified


@pytest.mark.parametrize("status", [s.name for s in Status if s is not Status.CONVERGED])
def test_only_converged_can_be_a_false_claim(status: str) -> None:
    assert not trial(status=status, verified=False).false_claim
    assert trial(status=status, verified=False).verdict == "unverified"
    assert trial(status=status, verified=True, best_known=0.0).verdict == "solved"


def test_a_lying_algorithm_is_found_out() -> None:
    """Its upper value is below F*, which must not help it."""
    found = compare([case(), case("other", shift=2.0)], [Liar(), "ImplicitGradient"])
    lies = found.of(algorithm="Liar")
    assert [t.status for t in lies] == ["CONVERGED", "CONVERGED"]
    assert lies[0].value == 0.0 < 0.5
    assert found.false_claims == lies
    assert all(t.solved is False and t.verdict == "FALSE CLAIM" and t.reasons for t in lies)
    liar, honest = found.summary()
    assert (liar.claimed, liar.verified, liar.solved, liar.false_claims) == (2, 0, 0, 2)
    assert (honest.claimed, honest.verified, honest.solved, honest.false_claims) == (2, 2, 2, 0)
    assert "small, Liar: CONVERGED, but not verified" in found.text()
    assert "converged!" in found.text()


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (Crash(), ["ZeroDivisionError", "no luck", "step 1"]),
        (Crash(where="resolve"), ["ZeroDivisionError", "no luck"]),
        (Crash(where="resolve", kind=SystemExit), ["SystemExit"]),
        (Crash(kind=SystemExit), ["SystemExit"]),
    ],
)
def test_whatever_is_raised_becomes_a_row(algorithm: Any, words: list[str]) -> None:
    found = compare(case(), [algorithm, "ImplicitGradient"])
    first, second = found.trials
    assert first.status == "ERROR" and first.verdict == "error" and not first.verified
    for word in words:
        assert word in first.message
    assert second.solved
    assert found.summary()[0].fitting == 1


def test_numerical_failures_and_refusals_are_rows() -> None:
    calls = []

    def nan_later(x: Any, y: Any) -> Any:
        calls.append(1)
        return ((y - x) ** 2).sum() * (math.nan if len(calls) > 30 else 1.0)

    bad = replace(case("bad"), problem=replace(case().problem, lower=nan_later))
    boxed = case("boxed", lower_set=Box(-1.0, 1.0))
    (failed,) = compare(bad, ["Penalty"]).trials
    assert failed.status == "NONFINITE" and failed.fits and not failed.verified
    found = compare([bad, boxed], ["ImplicitGradient"])
    refused = found.trials[1]
    assert refused.status == "REFUSED" and not refused.fits and "lower_set" in refused.message
    assert refused.counts == {} and math.isnan(refused.value)
    (tally,) = found.summary()
    assert tally.fitting == 1


def test_where_nothing_fits_auto_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bilevel.Penalty, "refuses", lambda self, problem: "not this one")
    monkeypatch.setattr(KINDS["bilevel"], "methods", lambda: {"Penalty": bilevel.Penalty})
    (row,) = compare(case(), ["auto"]).trials
    assert row.status == "REFUSED"
    assert "no algorithm fits: not this one" in row.message


def test_a_check_that_fails_is_no_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Any, solution: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(KINDS["bilevel"], "verdict", broken)
    (row,) = compare(case(), ["ImplicitGradient"]).trials
    assert not row.verified and row.false_claim
    assert "out of order" in row.reasons


def test_seeds_reach_the_generator() -> None:
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Peek(bilevel.ImplicitGradient):
        def init(self, *args: Any, generator: torch.Generator | None = None) -> Any:
            assert generator is not None
            seen.append(generator.initial_seed())
            return super().init(*args, generator=generator)

    found = compare(case(), {"peek": Peek()}, seeds=3)
    assert seen == [0, 1, 2]
    assert [t.seed for t in found.trials] == [0, 1, 2]
    assert "3/3*" in compare([case(), case("b")], ["ImplicitGradient"], seeds=3).text()


def test_budgets_reach_the_runs() -> None:
    given = replace(case(), max_steps=2)
    slow = bilevel.Penalty(rtol=0.0, check_every=1)
    assert compare(given, [slow]).trials[0].steps == 2
    assert compare(given, [slow], max_steps=3).trials[0].steps == 3
    assert compare(given, [slow], max_steps=10**6, time_limit=0.05).trials[0].status == "TIME_LIMIT"


def test_warnings_of_a_run_are_kept() -> None:
    blind = replace(case(), problem=replace(case().problem, upper=lambda x, y: (x**2).sum()))
    (row,) = compare(blind, ["ImplicitGradient"]).trials
    assert "upper does not depend on y" in row.warnings


def test_traces_tell_time_and_oracle_calls() -> None:
    given = case()
    found = compare(given, ["ImplicitGradient", "Penalty"], max_steps=60)
    for row in found.trials:
        steps, seconds, values, calls = zip(*row.trace, strict=True)
        assert len(row.trace) >= 3
        for numbers in (steps, seconds, calls):
            assert list(numbers) == sorted(numbers)
        assert calls[-1] == row.calls
        assert values[-1] == row.value
        assert 0 < calls[0] < calls[-1]
    assert found.trials[0].counts["lower"] > 0


def test_the_trace_of_two_runs_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first = bilevel.Penalty(rtol=0.0, check_every=1)
    choice = bilevel.Choice(algorithm=first, reason="a try", fallback=bilevel.ImplicitGradient())
    monkeypatch.setattr("bilevel.auto.choose", lambda *_: choice)
    (row,) = compare(case(), {"auto": "auto"}, max_steps=4).trials
    assert row.chosen == "Penalty" and row.starts == 1
    monkeypatch.setattr(bilevel.Penalty, "default_max_steps", 4)
    (row,) = compare(case(), {"auto": "auto"}).trials
    steps, seconds, _, calls = zip(*row.trace, strict=True)
    assert row.chosen == "ImplicitGradient" and row.starts == 2
    assert steps[:5] == (1.0, 2.0, 3.0, 4.0, 1.0)
    assert list(seconds) == sorted(seconds) and list(calls) == sorted(calls)
    assert calls[-1] == row.calls


def test_problems_of_one_level_are_judged_by_their_residual() -> None:
    known = problems.case("hs71")
    found = compare(known)
    assert found.kind == "constrained"
    assert set(found.algorithms) == set(KINDS["constrained"].methods())
    newton, interior = found.of(algorithm="AdaSketchNewton")[0], found.of(algorithm="InteriorPoint")[0]
    assert newton.status == "REFUSED"
    assert interior.solved and interior.value == pytest.approx(known.f_star, rel=1e-6)
    assert set(interior.counts) >= {"objective", "gradient", "hessian"}
    assert interior.trace[0][3] > 0
    short = compare(known, ["InteriorPoint"], max_steps=1).trials[0]
    assert not short.verified
    assert "KKT residual" in short.reasons


def test_a_problem_of_ones_own_with_labels() -> None:
    given = case()
    found = compare(
        given.problem,
        {"loose": bilevel.ImplicitGradient(rtol=0.5), "tight": bilevel.ImplicitGradient()},
        start=given.start,
    )
    assert found.algorithms == ("loose", "tight")
    assert found.trials[0].best_known is None and found.trials[0].solved is None
    assert found.trials[0].steps <= found.trials[1].steps
    assert repr(found) == found.text()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: compare([]), ValueError, "nothing to compare"),
        (lambda: compare(3), TypeError, "cases must be"),
        (lambda: compare([case(), case()]), ValueError, "'small' twice"),
        (lambda: compare(case().problem), TypeError, r"start must be \(x0, y0\)"),
        (lambda: compare(case(), start=(torch.zeros(1),)), TypeError, "cases bring their own"),
        (lambda: compare([case(), problems.case("hs71")]), ValueError, "different kinds"),
        (lambda: compare(case(), "Penalty"), TypeError, "must be a list"),
        (lambda: compare(case(), []), ValueError, "empty"),
        (lambda: compare(case(), ["Penlty"]), ValueError, "did you mean Penalty"),
        (lambda: compare(case(), [3]), TypeError, "names or objects"),
        (lambda: compare(case(), ["InteriorPoint"]), ValueError, "constrained problems"),
        (lambda: compare(case(), ["Penalty", bilevel.Penalty(penalty=7)]), ValueError, "dict from labels"),
        (lambda: compare(case(), seeds=0), ValueError, "seeds"),
        (lambda: compare(case(), max_steps=-1), ValueError, "max_steps"),
        (lambda: compare(case(), resume=True), ValueError, "out"),
    ],
)
def test_misuse_is_named(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


# --- texts and files --------------------------------------------------------------------------------------------------


def test_tallies_add_up() -> None:
    rows = [
        trial(case="a", lower_class="convex", seconds=1.0, counts={"upper": 3}, best_known=0.0),
        trial(case="b", lower_class="convex", seconds=3.0, counts={"upper": 5}, best_known=-9.0),
        trial(case="c", lower_class="convex", status="REFUSED", verified=False, seconds=99.0),
        trial(case="d", lower_class="nonconvex", status="STALLED", verified=False, seconds=7.0, best_known=0.0),
        trial(case="e", lower_class="nonconvex", seconds=9.0, verified=True),
    ]
    convex, nonconvex, together = Comparison(tuple(rows)).summary()
    assert (convex.lower_class, nonconvex.lower_class, together.lower_class) == ("convex", "nonconvex", "all")
    assert (convex.fitting, convex.claimed, convex.verified, convex.solved, convex.known) == (2, 2, 2, 1, 2)
    assert (convex.seconds, convex.calls) == (2.0, 4.0)
    assert (nonconvex.fitting, nonconvex.claimed, nonconvex.verified, nonconvex.solved, nonconvex.known) == (
        2,
        1,
        1,
        0,
        1,
    )
    assert (together.fitting, together.solved, together.known, together.seconds) == (4, 1, 3, 5.0)


def test_the_table_of_one_case_fits_100_columns() -> None:
    names = ["ImplicitGradient", "Penalty", "KKTRelaxation", "LVHBA", "auto"]
    rows = [
        trial(
            algorithm=name,
            status="LINEAR_SOLVE_FAILED",
            verified=False,
            value=-1.2345678e-12,
            best_known=-123456.789,
            steps=10**5,
            seconds=1234.56,
            counts={"upper": 10**7, "lower": 10**7},
            starts=12,
            message="word " * 60,
        )
        for name in names
    ]
    text = Comparison(tuple(rows)).text(100)
    assert max(map(len, text.splitlines())) <= 100
    for name in names:
        assert sum(line.startswith(f"{name} ") for line in text.splitlines()) == 1
    assert "2e+07" in text and "linear solve" in text


def test_a_suite_is_one_line_per_case_grouped_by_class() -> None:
    rows = [
        trial(case=name, lower_class=kind, algorithm=algorithm, status=status, best_known=0.0)
        for name, kind in [("one", "nonconvex"), ("two", "strongly convex")]
        for algorithm, status in [("KKTRelaxation", "CONVERGED"), ("auto", "REFUSED")]
    ]
    lines = Comparison(tuple(rows), missing=3).text(100).splitlines()
    assert lines[0].split() == ["KKT"]
    assert lines[1].split() == ["case", "Relaxation", "auto"]
    assert lines[2:6] == [
        "strongly convex:",
        "two   converged*  -",
        "nonconvex:",
        "one   converged*  -",
    ]
    assert "3 more runs are missing" in lines


def test_csv_has_every_row_and_column() -> None:
    found = compare([case(), case("boxed", lower_set=Box(-1.0, 1.0))], ["ImplicitGradient", "auto"], max_steps=60)
    rows = columns(found.csv())
    assert [(r["case"], r["algorithm"]) for r in rows] == [t.key[:2] for t in found.trials]
    needed = ["case", "lower_class", "algorithm", "seed", "status", "verified", "upper_value", "best_known", "solved"]
    needed += ["false_claim", "steps", "seconds", "calls_upper", "calls_lower", "calls_products", "starts"]
    assert set(needed) <= set(rows[0])
    for row, origin in zip(rows, found.trials, strict=True):
        assert float(row["upper_value"]) == pytest.approx(origin.value, nan_ok=True, rel=1e-15)
        assert row["verified"] == str(origin.verified)
        assert row["calls_upper"] == (str(origin.counts["upper"]) if origin.fits else "")
    assert rows[2]["status"] == "REFUSED"


def test_pictures_of_one_case_and_of_several(tmp_path: Path) -> None:
    one = compare(case(), ["ImplicitGradient", Crash(where="resolve")])
    several = compare([case(), case("b")], ["ImplicitGradient", Liar()])
    for k, found in enumerate((one, several, Comparison((trial(status="ERROR", value=math.nan),)))):
        picture = matplotlib.image.imread(found.draw(tmp_path / f"{k}.png"))
        assert picture.shape[1] == 1200
        assert (picture[..., :3].std(axis=(0, 1)) > 0).all()


def test_a_directory_of_results(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = compare(case(), ["ImplicitGradient", Liar()], out=out)
    assert {p.name for p in out.iterdir()} == FILES
    data = json.loads((out / "compare.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert [row["status"] for row in data["runs"]] == ["CONVERGED", "CONVERGED"]
    assert data["summary"][1]["false_claims"] == 1
    assert columns((out / "compare.csv").read_text()) == columns(found.csv())
    compare(case(), ["ImplicitGradient"], out=out)
    assert {p.name for p in (tmp_path / "out.1").iterdir()} == FILES


# --- resuming and interrupts ------------------------------------------------------------------------------------------


def test_resume_runs_only_what_is_missing(tmp_path: Path) -> None:
    first, second = case(), case("b")
    compare([first], ["ImplicitGradient"], out=tmp_path / "o")
    before = first.counter.lower
    found = compare([first, second], ["ImplicitGradient"], out=tmp_path / "o", resume=True)
    assert first.counter.lower == before
    assert second.counter.lower > 0
    assert [t.case for t in found.trials] == ["small", "b"]
    assert all(t.solved for t in found.trials)
    assert len(columns((tmp_path / "o" / "compare.csv").read_text())) == 2
    assert not (tmp_path / "o.1").exists()


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    given = [case(), case("boxed", lower_set=Box(-1.0, 1.0))]
    found = compare(given, ["ImplicitGradient", Crash()], out=tmp_path / "o")
    again = compare(given, ["ImplicitGradient", Crash()], out=tmp_path / "o", resume=True)
    for a, b in zip(found.trials, again.trials, strict=True):
        assert a == b or (math.isnan(a.value) and replace(a, value=0.0) == replace(b, value=0.0))


def test_resume_refuses_other_budgets_and_settings(tmp_path: Path) -> None:
    compare(case(), ["ImplicitGradient"], out=tmp_path / "o", max_steps=9)
    with pytest.raises(ValueError, match="max_steps is 8, was 9"):
        compare(case(), ["ImplicitGradient"], out=tmp_path / "o", max_steps=8, resume=True)
    with pytest.raises(ValueError, match="algorithms"):
        compare(case(), [bilevel.ImplicitGradient(rtol=0.1)], out=tmp_path / "o", max_steps=9, resume=True)
    with pytest.raises(FileNotFoundError, match="without --resume"):
        compare(case(), ["ImplicitGradient"], out=tmp_path / "p", resume=True)
    (tmp_path / "o" / "compare.jsonl").write_text("{nonsense\n")
    with pytest.raises(ValueError, match="damaged"):
        compare(case(), ["ImplicitGradient"], out=tmp_path / "o", max_steps=9, resume=True)


def test_a_line_that_a_kill_cut_off_is_run_again(tmp_path: Path) -> None:
    given = [case(), case("b")]
    compare(given, ["ImplicitGradient"], out=tmp_path / "o")
    journal = tmp_path / "o" / "compare.jsonl"
    journal.write_text(journal.read_text()[:-20])
    before = given[0].counter.lower, given[1].counter.lower
    found = compare(given, ["ImplicitGradient"], out=tmp_path / "o", resume=True)
    assert given[0].counter.lower == before[0]
    assert given[1].counter.lower > before[1]
    assert len(found.trials) == 2
    assert len(journal.read_text().splitlines()) == 3
    for line in journal.read_text().splitlines():
        json.loads(line)


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    given = [case(), case("b")]
    found = compare(given, ["ImplicitGradient", CtrlC(), "auto"], out=tmp_path / "o")
    assert [t.key[:2] for t in found.trials] == [("small", "ImplicitGradient")]
    assert found.missing == 5
    assert {p.name for p in (tmp_path / "o").iterdir()} == FILES
    found = compare(given, ["ImplicitGradient", "auto"], out=tmp_path / "o", resume=True)
    assert found.missing == 0
    assert len(found.trials) == 4


def test_ctrl_c_during_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(job: Any, solution: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(KINDS["bilevel"], "verdict", pressed)
    found = compare(case(), ["ImplicitGradient"])
    assert (found.trials, found.missing) == ((), 1)
    assert found.text() == "nothing was run"


def test_progress_is_told_every_run() -> None:
    seen = []
    compare([case(), case("b")], ["ImplicitGradient"], progress=lambda t, done, n: seen.append((t.case, done, n)))
    assert seen == [("small", 1, 2), ("b", 2, 2)]


def test_a_worker_that_dies_is_named() -> None:
    plan = Plan(
        sources=(Source("doomed", functools.partial(_leave, os.getpid())),),
        entrants=(Entrant("ImplicitGradient", bilevel.ImplicitGradient()),),
    )
    with pytest.raises(WorkerDied, match="ImplicitGradient on doomed"):
        run_plan(plan, kind="bilevel", jobs=2)


def test_processes_leave_ctrl_c_to_the_first_one() -> None:
    plan = Plan(sources=(Source("curious", _blocked),), entrants=(Entrant("auto", None),))
    found = run_plan(plan, kind="bilevel", jobs=2)
    assert "SIGINT blocked: True" in found.trials[0].message
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def _blocked(seed: int | None) -> Any:
    raise ValueError(f"SIGINT blocked: {signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])}")


def _leave(parent: int, seed: int | None) -> Any:
    assert os.getpid() != parent
    os._exit(3)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two quick cases under a tag, in a folder of their own."""
    monkeypatch.chdir(tmp_path)

    def make(name: str) -> Callable[..., problems.Case]:
        def factory(*, shift: float = 1.0, seed: int = 0) -> problems.Case:
            return case(name, shift=shift + seed)

        return factory

    for name in ("tiny_a", "tiny_b"):
        monkeypatch.setitem(_ENTRIES, name, problems.Entry(name, make(name), "quick", frozenset({"tiny"})))


def run(text: str) -> int:
    return main(text.split())


def data(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "compare.json").read_text())


def test_compare_on_the_command_line(shelf: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare tiny_a --algorithms implicit-gradient,auto") == 0
    out, err = capsys.readouterr()
    assert "best known upper value 0.5" in out
    assert "Written to runs/compare-tiny_a" in out
    assert "[2/2] tiny_a  auto (ImplicitGradient): converged" in err
    assert max(map(len, out.splitlines())) <= 100
    assert {p.name for p in Path("runs/compare-tiny_a").iterdir()} == FILES
    assert run("compare --suite tiny --algorithms ImplicitGradient --seeds 2 --quiet --out s") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "tiny_b  2/2*" in out
    values = {(r["case"], r["seed"]): r["upper_value"] for r in data("s")["runs"]}
    assert values[("tiny_a", 1)] == pytest.approx(2.0)  # the seed of the case moves too: shift = 2
    assert values[("tiny_a", 0)] == pytest.approx(0.5)


def test_settings_go_where_they_belong(shelf: None) -> None:
    settings = "--set shift=3 --set penalty=50 --set algorithm.check_every=1 --set implicitgradient.rtol=0.3"
    assert (
        run(f"compare tiny_a --algorithms ImplicitGradient,Penalty,auto --max-steps 5 --quiet --out s {settings}") == 0
    )
    asked = data("s")["request"]
    assert asked["algorithms"] == {
        "ImplicitGradient": {"rtol": 0.3, "check_every": 1},
        "Penalty": {"penalty": 50.0, "check_every": 1},
    }
    assert data("s")["runs"][0]["best_known"] == 4.5
    assert asked["max_steps"] == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("compare", ["--suite"]),
        ("compare quadratic --suite exact", ["--suite"]),
        ("compare quadratik", ["did you mean quadratic?"]),
        ("compare --suite nosuch", ["nosuch", "exact", "real-data"]),
        ("compare quadratic hs71", ["different kinds", "quadratic (bilevel)"]),
        ("compare quadratic --algorithms Penlty", ["did you mean Penalty?"]),
        ("compare quadratic --algorithms InteriorPoint", ["InteriorPoint", "constrained"]),
        ("compare quadratic --algorithms Penalty,Penalty", ["'Penalty' twice"]),
        ("compare quadratic --set lower_stps=3", ["did you mean lower_steps?"]),
        ("compare quadratic --set Penalty.stps=3", ["'stps'", "lower_steps"]),
        ("compare quadratic --algorithms auto --set penalty=3", ["penalty=3"]),
        ("compare quadratic --set n=abc", ["n=abc", "an integer"]),
        ("compare quadratic --seeds 2 --set seed=3", ["--seeds 2", "twice"]),
        ("compare quadratic --seeds 0", ["--seeds", "at least 1"]),
        ("compare quadratic --jobs 0", ["--jobs", "at least 1"]),
        ("compare quadratic --data-dir nowhere", ["nowhere", "no such folder"]),
        ("compare quadratic --data-dir .", ["data_dir"]),
        ("compare logistic_penalties --set dataset=nosuch", ["nosuch"]),
        ("compare quadratic --max-steps -1", ["max_steps"]),
        ("compare quadratic --resume", ["--resume", "compare-quadratic"]),
    ],
)
def test_misuse_exits_2(
    arguments: str,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bilevel: error: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert not Path("runs").exists()


def test_cases_without_their_data_are_left_out_of_a_suite(
    shelf: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*, data_dir: str | None = None) -> problems.Case:
        raise problems.MissingDataError("no files")

    monkeypatch.setitem(
        _ENTRIES, "far", problems.Entry("far", absent, "needs files", frozenset({"tiny", "external-data"}))
    )
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    assert run("compare --suite tiny --algorithms ImplicitGradient --quiet --out s") == 0
    assert "left out for want of --data-dir: far" in capsys.readouterr().err
    assert run("compare --suite tiny --algorithms ImplicitGradient --quiet --out t --data-dir .") == 0
    rows = {row["case"]: row for row in data("t")["runs"]}
    assert rows["far"]["status"] == "ERROR" and "no files" in rows["far"]["message"]
    assert rows["tiny_a"]["solved"]


def test_a_suite_can_be_an_intersection_of_tags(shelf: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare --suite constrained,exact,tiny") == 2
    assert "no case has constrained and exact and tiny" in capsys.readouterr().err
    assert run("compare --suite bilevel,tiny --algorithms ImplicitGradient --quiet --out s") == 0
    assert len(data("s")["runs"]) == 2


def test_processes_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rest = "compare quadratic quadratic_pytree --algorithms ImplicitGradient --max-steps 20 --seeds 2"
    assert run(f"{rest} --out one --quiet") == 0
    assert run(f"{rest} --out two --quiet --jobs 2") == 0
    drop = {"seconds"}
    one, two = ([{k: v for k, v in row.items() if k not in drop} for row in data(f)["runs"]] for f in ("one", "two"))
    assert one == two
    assert len(one) == 4


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_on_the_command_line(jobs: int, tmp_path: Path) -> None:
    """Exit code 0, what is done is written, and --resume goes on; a terminal sends it to all processes."""
    command = (
        "compare quadratic --algorithms ImplicitGradient,Penalty --set Penalty.rtol=0 --max-steps 100000000 --out c "
        f"--jobs {jobs}"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "bilevel", *command.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background, interrupts are ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    journal, end = tmp_path / "c" / "compare.jsonl", time.monotonic() + 120
    try:
        while not (journal.exists() and len(journal.read_text().splitlines()) == 2):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a run that nobody stops would slow down all other tests
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "1 more run is missing" in out
    assert "--resume" in err
    assert [row["algorithm"] for row in data(str(tmp_path / "c"))["runs"]] == ["ImplicitGradient"]
    assert data(str(tmp_path / "c"))["missing"] == 1


def test_the_benchmark_compares_with_a_peer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    script = importlib.import_module("bolib")
    names = "bolib-Bard1988Ex1,bolib-DempeEtal2012,bolib-MitsosBarton2006Ex315"
    found = script.main(["--algorithms", "", "--peers", "slsqp", "--cases", names])
    ends = {t.case: t for t in found.trials}
    assert ends["bolib-Bard1988Ex1"].solved and ends["bolib-DempeEtal2012"].solved
    # From the given start the relaxed system of this nonconvex lower level ends at a maximum or a saddle of it.
    assert not ends["bolib-MitsosBarton2006Ex315"].verified
    assert "slsqp" in capsys.readouterr().out


def test_help_explains_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("compare --help")
    out = capsys.readouterr().out
    for word in ("--suite exact", "solved:", "compare.csv", "Exit codes"):
        assert word in out
