"""Constrained problems on the command line: what it writes, how it resumes, and what it refuses."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import bilevel
import constrained
import problems
from bilevel import picture
from bilevel.catalogue import catalogue, overview
from bilevel.cli import main
from bilevel.kinds import KINDS
from constrained.registry import default_method, methods
from problems.registry import _ENTRIES

FILES = {"result.json", "run.json", "run.pt", "history.jsonl", "convergence.png", "solution.safetensors"}
ROOT = Path(bilevel.__file__).parents[1]

MY_FILE = """
import os
import signal

import torch

import bilevel
import constrained

x0 = torch.tensor([2.0, 0.5], dtype=torch.float64)
calls = {"objective": 0}


def bowl(x):
    if os.path.exists(os.environ.get("KILL_ONCE_THERE", "nothing")):
        calls["objective"] += 1
        if calls["objective"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    return ((x - 2) ** 2).sum() + (x[0] * x[1]) ** 2


def circle(x):
    return (x**2).sum() - 2


equality = constrained.EqualityProblem(bowl, circle, name="ring")
inequality = constrained.ConstrainedProblem(objective=bowl, inequality=circle, lower=0.0, name="disc")


def make(radius: float = 2.0):
    x = {"a": torch.ones(1, dtype=torch.float64), "b": torch.full((2,), 0.5, dtype=torch.float64)}
    problem = constrained.EqualityProblem(
        lambda x: x["a"].sum() + x["b"].sum(),
        lambda x: {"ring": (x["a"] ** 2).sum() + (x["b"] ** 2).sum() - radius, "line": x["b"][0] - x["b"][1]},
    )
    return problem, x


def broken(kind: str = "nan"):
    count = [0]

    def objective(x):
        count[0] += 1
        if count[0] > 6:
            if kind == "raise":
                raise RuntimeError("the simulator lost its licence")
            return (x * float("nan")).sum()
        return torch.exp(x).sum()

    return constrained.EqualityProblem(objective, lambda x: (x**4).sum() - 2), x0


def either(constrain: bool = True):
    if constrain:
        return equality, x0
    return bilevel.BilevelProblem(lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum()), x0, x0


infeasible = constrained.ConstrainedProblem(objective=bowl, equality=lambda x: (x**2).sum() + 1)
with_too_much = lambda: (equality, x0, x0)
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(MY_FILE)


def run(text: str) -> int:
    return main(text.split())


def result(folder: str | Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    return json.loads((Path(folder) / "result.json").read_text(), parse_constant=refuse)


def history(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]


def killed(text: str, once_there: str) -> None:
    """Run a command that kills itself inside a step soon after ``once_there`` exists."""
    done = subprocess.run(
        [sys.executable, "-m", "bilevel", *text.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "KILL_ONCE_THERE": once_there},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def same_run(a: str | Path, b: str | Path, again: int = 0) -> None:
    """Solutions equal to the byte, histories equal but for the clock; a resumption evaluates its point ``again``."""
    assert (Path(a) / "solution.safetensors").read_bytes() == (Path(b) / "solution.safetensors").read_bytes()
    plain = [[{k: v for k, v in row.items() if k != "seconds"} for row in history(f)] for f in (a, b)]
    assert plain[0] == plain[1]
    extra = {name: number - result(b)["counts"][name] for name, number in result(a)["counts"].items()}
    assert set(extra.values()) <= {0, again}, extra


# --- list ------------------------------------------------------------------------------------------------------------


def test_list_json_has_every_constrained_case_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list --json") == 0
    found = json.loads(capsys.readouterr().out)["constrained"]
    assert [case["name"] for case in found["cases"]] == list(problems.entries("constrained"))
    by_name = {case["name"]: case for case in found["cases"]}
    assert by_name["hs71"]["fits"] == ["InteriorPoint", "AugmentedLagrangian"]
    assert by_name["bt1"]["fits"] == ["AdaSketchNewton", "InteriorPoint", "AugmentedLagrangian"]
    assert by_name["constrained_logistic"]["fits"] is None
    assert by_name["constrained_logistic"]["note"] == "needs --data-dir"
    assert by_name["equality_qp"]["settings"] == {"n": 8, "m": 3, "seed": 0, "dtype": "float64", "device": "cpu"}
    assert "constrained" not in by_name["hs71"]["tags"]
    assert [method["name"] for method in found["algorithms"]] == list(methods())
    by_method = {method["name"]: method for method in found["algorithms"]}
    assert by_method["AugmentedLagrangian"]["settings"]["growth"] == 10.0


def test_list_as_text_is_compact_and_complete() -> None:
    section = overview(catalogue(problems)).partition("Constrained problems")[2]
    words = {word.rstrip(":") for word in section.split()}
    assert set(problems.entries("constrained")) <= words
    assert set(methods()) <= words
    assert len(section.splitlines()) < 70
    hock = [line for line in section.splitlines() if line.startswith("  Hock-Schittkowski")]
    assert len(hock) == 2  # those with equalities alone fit one method more
    equal = [n for n, e in problems.entries("constrained").items() if "hock-schittkowski" in e.tags]
    assert sum(int(line.split()[1]) for line in hock) == len(equal)


# --- what a run writes -----------------------------------------------------------------------------------------------


def test_run_writes_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run HS71 --seed 5 --atol 1e-9 --set barrier=0.05") == 0
    out, err = capsys.readouterr()
    folder = Path("runs/hs71-InteriorPoint")
    assert {p.name for p in folder.iterdir()} == FILES
    case = problems.case("hs71")
    found = result(folder)
    assert (found["case"], found["kind"], found["seed"], found["status"]) == ("hs71", "constrained", 5, "CONVERGED")
    assert found["settings"] == {"dtype": "float64", "device": "cpu"}
    assert found["algorithm"]["name"] == "InteriorPoint"
    assert (found["algorithm"]["settings"]["atol"], found["algorithm"]["settings"]["barrier"]) == (1e-9, 0.05)
    assert found["command"] == "bilevel run HS71 --seed 5 --atol 1e-9 --set barrier=0.05"
    assert set(found["versions"]) == {"bilevel", "torch", "python", "numpy"}
    assert (found["dtype"], found["device"]) == ("float64", "cpu")
    assert found["objective"] == pytest.approx(case.f_star, rel=1e-8)
    assert found["exact"]["optimal_objective"] == case.f_star
    assert found["exact"]["objective_gap"] == (found["objective"] - case.f_star) / abs(case.f_star)
    names = ("stationarity", "feasibility", "complementarity")
    assert found["residual"]["largest"] == max(found["residual"][name] for name in names) <= 1e-9
    assert found["curvature"] > 0.1
    assert found["counts"]["objective"] >= found["steps"] > 0
    assert [row["step"] for row in history(folder)] == list(range(1, found["steps"] + 1))
    assert "x has 4 numbers; 1 equality, 1 inequality, lower and upper bounds; InteriorPoint, float64 on cpu" in out
    for text in ("CONVERGED after", "complementarity", "objective gap", "Hessians", "curvature", str(folder)):
        assert text in out
    assert "step/s" in err
    assert matplotlib.image.imread(folder / "convergence.png")[..., :3].min() < 0.2


def test_the_saved_point_satisfies_the_optimality_conditions() -> None:
    assert run("run hs71 --quiet") == 0
    folder, problem = Path("runs/hs71-InteriorPoint"), problems.case("hs71").problem
    saved = load_file(folder / "solution.safetensors")
    names = ("equality", "inequality", "lower", "upper")
    assert set(saved) == {"x", *(f"multipliers.{name}" for name in names)}
    found, parts = result(folder), [saved[f"multipliers.{name}"] for name in names]
    measured = constrained.kkt_residual(problem, saved["x"], *parts)
    assert found["residual"] == {**vars(measured), "largest": measured.largest}
    for name, part in zip(names, parts, strict=True):
        assert found["multipliers"][name] == {"count": part.numel(), "largest": float(part.abs().max())}
    with safe_open(folder / "solution.safetensors", "pt") as file:
        about = json.loads(file.metadata()["bilevel"])
    assert (about["problem"], about["algorithm"], about["steps"]) == ("hs71", "InteriorPoint", found["steps"])


@pytest.mark.parametrize("method", list(methods()))
def test_every_method_runs(method: str) -> None:
    assert run(f"run bt3 --algorithm {method.lower()} --quiet --out d") == 0
    found = result("d")
    assert (found["status"], found["algorithm"]["name"]) == ("CONVERGED", method)
    assert abs(found["exact"]["objective_gap"]) < 1e-7
    assert found["exact"]["distance_to_known_x"] < 1e-6
    assert [row["step"] for row in history("d")] == list(range(1, found["steps"] + 1))
    saved = load_file("d/solution.safetensors")
    assert set(saved) == {"x", "multipliers.equality"}
    largest = float(saved["multipliers.equality"].abs().max())
    assert largest > float(saved["multipliers.equality"].max())  # the largest one here is negative
    assert found["multipliers"] == {"equality": {"count": 3, "largest": largest}}


@pytest.mark.parametrize("case", ["bt1", "hs10"])
def test_the_default_method_is_that_of_the_registry(case: str) -> None:
    assert run(f"run {case} --quiet --out d") == 0
    assert result("d")["algorithm"]["name"] == default_method(problems.case(case).problem).name


def test_quiet_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run hs10 --quiet --out here") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert out.startswith("CONVERGED after")
    assert ", objective -1: here" in out
    assert err == ""


def test_dtype_data_and_parameters_reach_the_case() -> None:
    assert run("run equality_qp --dtype float32 --device cpu --set n=6 --seed 4 --quiet --out d") == 0
    found = result("d")
    assert found["settings"] == {"n": 6, "m": 3, "seed": 4, "dtype": "float32", "device": "cpu"}
    assert found["dtype"] == "float32"
    assert load_file("d/solution.safetensors")["x"].shape == (6,)


def test_settings_reach_into_the_sketches() -> None:
    command = "run bt3 --algorithm AdaSketchNewton --set linear_solver=SketchAndProject"
    assert run(f"{command} --set linear_solver.sketch=BlockGaussian --max-steps 2 --quiet --out d") == 0
    solver = result("d")["algorithm"]["settings"]["linear_solver"]
    assert (solver["class"], solver["sketch"]["class"]) == ("SketchAndProject", "BlockGaussian")


def test_the_seed_moves_the_sketches() -> None:
    command = "run bt4 --algorithm AdaSketchNewton --max-steps 2 --quiet"
    command += " --set linear_solver=SketchAndProject --set linear_solver.max_steps=50"
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(f"{command} --seed {seed} --out {out}") == 0
    same_run("a", "b")
    assert not torch.equal(load_file("a/solution.safetensors")["x"], load_file("c/solution.safetensors")["x"])


def test_budgets_end_a_run_without_failure() -> None:
    assert run("run hs71 --max-steps 2 --quiet --out d") == 0
    assert (result("d")["status"], result("d")["steps"]) == ("STEP_LIMIT", 2)
    assert run("run hs71 --time-limit 1e-9 --quiet --out e") == 0
    assert result("e")["status"] == "TIME_LIMIT"


def test_the_exact_answer_names_another_known_minimum() -> None:
    case = problems.case("hs10")
    found = constrained.solve(case.problem, constrained.InteriorPoint(), case.start)

    def answer(**known: object) -> dict[str, float]:
        exact = KINDS["constrained"].job(dataclasses.replace(case, **known)).exact
        assert exact is not None
        return exact(found)

    assert answer(f_star=-1.5, other_minima=(-1.0, 4.0))["other_known_minimum"] == -1.0
    assert answer(f_star=-1.5)["objective_gap"] == pytest.approx(0.5 / 1.5)
    assert "other_known_minimum" not in answer(f_star=-1.5)
    assert "other_known_minimum" not in answer(f_star=-1.5, other_minima=(-1.01,))
    assert "other_known_minimum" not in answer(other_minima=(-1.0,))  # it is where f_star is


# --- files of the user -----------------------------------------------------------------------------------------------


def test_solve_reads_the_start_from_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("solve my.py:equality") == 0
    assert "ring: x has 2 numbers; 1 equality; AdaSketchNewton" in capsys.readouterr().out
    folder = "runs/my-equality-AdaSketchNewton"
    assert result(folder)["file"].endswith("my.py:equality")
    assert "exact" not in result(folder)
    # on the circle x = √2 (cos t, sin t): f = 10 - 4 √2 (cos t + sin t) + sin²(2t), least at one of a grid of angles
    t = torch.linspace(0, 2 * math.pi, 100_001)
    values = 10 - 4 * math.sqrt(2) * (t.cos() + t.sin()) + (2 * t).sin() ** 2
    assert result(folder)["objective"] == pytest.approx(float(values.min()), abs=1e-7)
    assert run("solve my.py:inequality --quiet") == 0
    found = result("runs/my-inequality-InteriorPoint")
    assert (found["status"], set(found["multipliers"])) == ("CONVERGED", {"inequality", "lower"})


def test_functions_trees_and_settings() -> None:
    assert run("solve my.py:make --set radius=3 --quiet --out d") == 0
    saved = load_file("d/solution.safetensors")
    assert set(saved) == {"x.a", "x.b", "multipliers.equality.ring", "multipliers.equality.line"}
    # least a + b1 + b2 on a² + b1² + b2² = 3 with b1 = b2
    torch.testing.assert_close(saved["x.b"], -torch.ones(2), rtol=0, atol=1e-7)
    assert result("d")["settings"] == {"radius": 3.0}


def test_a_function_may_return_either_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("solve my.py:either --quiet --out c") == 0
    assert run("solve my.py:either --set constrain=false --quiet --out b") == 0
    assert (result("c")["kind"], result("b")["kind"]) == ("constrained", "bilevel")
    assert run("solve my.py:either --algorithm Penalty --out d") == 2
    assert "Penalty solves bilevel problems, but my.py:either is a constrained problem" in capsys.readouterr().err
    assert run("solve my.py:either --set constrain=false --algorithm InteriorPoint --out d") == 2
    assert "InteriorPoint solves constrained problems" in capsys.readouterr().err
    assert run("solve my.py:either --rtol 1e-3 --out d") == 2


# --- numerical failures ----------------------------------------------------------------------------------------------


def test_an_infeasible_problem_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("solve my.py:infeasible --out d") == 1
    assert "bilevel: error: " in capsys.readouterr().err
    found = result("d")
    assert found["status"] == "INFEASIBLE"
    assert found["residual"]["feasibility"] == pytest.approx(1.0, abs=1e-4)
    assert {p.name for p in Path("d").iterdir()} >= FILES - {"run.pt"}


def test_an_exception_during_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("solve my.py:broken --algorithm AugmentedLagrangian --set kind=raise --out d") == 1
    err = capsys.readouterr().err
    line = 1 + MY_FILE.splitlines().index('                raise RuntimeError("the simulator lost its licence")')
    for word in ("bilevel: error: ", f"my.py:{line}: ", "the simulator lost its licence", "is in d"):
        assert word in err
    assert "Traceback" not in err
    assert "licence" in result("d")["error"]
    assert bool(torch.isfinite(load_file("d/solution.safetensors")["x"]).all())


# --- resumption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "target", "settings"),
    [
        ("AdaSketchNewton", "run bt6", ""),
        ("AdaSketchNewton", "run bt4", "--set linear_solver=SketchAndProject --set linear_solver.max_steps=50"),
        ("InteriorPoint", "run hs71", "--set barrier=0.2"),
        ("AugmentedLagrangian", "run hs43", ""),
    ],
)
def test_resume_is_bitwise(method: str, target: str, settings: str) -> None:
    command = f"{target} --algorithm {method} {settings} --atol 1e-14 --seed 3 --quiet"
    assert run(f"{command} --max-steps 3 --out parts") == 0
    assert run(f"{target} --resume --max-steps 6 --quiet --out parts") == 0  # everything else is remembered
    assert run(f"{command} --max-steps 6 --out whole") == 0
    same_run("parts", "whole", again=1)
    assert result("parts")["steps"] == 6
    assert result("parts")["algorithm"] == result("whole")["algorithm"]


def test_a_killed_run_resumes_bitwise() -> None:
    killed("solve my.py:inequality --checkpoint-every 2 --out killed", once_there="killed/run.pt")
    assert not Path("killed/result.json").exists()
    assert 0 < torch.load("killed/run.pt", weights_only=True)["state"]["step"] < 8
    assert run("solve my.py:inequality --out killed --resume --quiet") == 0
    assert run("solve my.py:inequality --out whole --quiet") == 0
    assert result("whole")["steps"] > 8
    same_run("killed", "whole", again=1)


def test_resume_finds_the_default_folder_and_refuses_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run hs71 --max-steps 2 --quiet") == 0
    assert run("run hs71 --max-steps 4 --resume --quiet") == 0
    assert result("runs/hs71-InteriorPoint")["steps"] == 4
    assert "nothing left" not in capsys.readouterr().err
    assert run("run hs71 --resume --quiet") == 0
    assert "nothing left to do: the run has used its 4 steps; raise --max-steps" in capsys.readouterr().err
    for change, words in [
        ("--set barrier=0.3", "algorithm.barrier is 0.3, was 0.1"),
        ("--seed 9", "seed is 9, was 0"),
        ("--algorithm AugmentedLagrangian --out runs/hs71-InteriorPoint", "was 'InteriorPoint'"),
    ]:
        assert run(f"run hs71 {change} --resume") == 2
        assert words in capsys.readouterr().err
    assert run("run hs71 --algorithm AugmentedLagrangian --max-steps 1 --quiet") == 0
    assert run("run hs71 --resume --quiet") == 2
    assert "several runs" in capsys.readouterr().err


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run hs71 --rtol 1e-6", ["--rtol 1e-06", "constrained", "--atol"]),
        ("run hs71 --algorithm Penalty", ["Penalty solves bilevel", "InteriorPoint, AugmentedLagrangian"]),
        ("run quadratic --algorithm InteriorPoint", ["InteriorPoint solves constrained", "ImplicitGradient, Penalty"]),
        ("run hs71 --algorithm InteriorPiont", ["'InteriorPiont'", "did you mean InteriorPoint?", "AdaSketchNewton"]),
        ("run hs71 --algorithm adasketch-newton", ["equalit", "use InteriorPoint"]),
        ("run hs71 --set barier=0.2", ["barier=0.2", "did you mean barrier?"]),
        ("run hs71 --algorithm AugmentedLagrangian --set growth=0.5", ["growth", "0.5"]),
        ("run hs71 --set n=3", ["n=3", "Settings of case hs71: dtype, device"]),
        ("run hs71 --set device=cuda:77", ["device=cuda:77", "CUDA device", "--device cpu"]),
        ("run hs72x", ["unknown case 'hs72x'", "bilevel list"]),
        ("run hs71 --atol 0", ["atol", "0"]),
        ("run hs71 --max-steps -1", ["max_steps", "-1"]),
        ("run hs71 --data-dir .", ["--data-dir", "no setting 'data_dir'"]),
        ("run hs71 --resume", ["--resume", "runs/hs71-AdaSketchNewton", "without --resume"]),
        ("run bt1 --algorithm AdaSketchNewton --set linear_solver=SketchAndProjct", ["SketchAndProject?"]),
        ("run constrained_logistic --data-dir .", ["a9a", "--data-dir"]),
        ("solve my.py:circle", ["circle", "requires x"]),
        ("solve my.py:with_too_much", ["(problem, x0)", "3 things"]),
        ("solve my.py:x0", ["constrained.EqualityProblem", "bilevel.BilevelProblem", "Tensor", "inequality"]),
        ("solve my.py:equality --dtype float32", ["--dtype", "starting point"]),
    ],
)  # fmt: skip
def test_misuse_exits_2_and_names_the_cure(
    arguments: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bilevel: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert not Path("runs").exists()


def test_a_file_without_a_start_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bare.py").write_text(
        "import constrained\nproblem = constrained.EqualityProblem(lambda x: x.sum(), lambda x: x - 1)\n"
    )
    assert run("solve bare.py:problem") == 2
    err = capsys.readouterr().err
    assert "no variable x0;" in err
    assert "return (problem, x0)" in err
    assert "y0" not in err


def test_a_fault_of_the_users_constraint_is_shown_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.py").write_text(
        "import constrained, torch\nx0 = torch.zeros(2)\ndef h(x):\n    return nothing\n"
        "problem = constrained.EqualityProblem(lambda x: x.sum(), h)\n"
    )
    assert run("solve bad.py:problem") == 2
    assert "bad.py:4: NameError" in capsys.readouterr().err


# --- pictures --------------------------------------------------------------------------------------------------------


def test_plot_of_constrained_runs(capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["runs/hs10-InteriorPoint", "runs/hs10-AugmentedLagrangian"]
    for folder in folders:
        assert run(f"run hs10 --algorithm {folder.rpartition('-')[2]} --quiet") == 0
    curves = picture.read_curves([Path(folder) for folder in folders])
    assert [curve.label for curve in curves] == ["hs10, InteriorPoint", "hs10, AugmentedLagrangian"]
    assert all(curve.kind is KINDS["constrained"] and curve.optimum == -1.0 for curve in curves)
    name, values = curves[0].column(*curves[0].kind.chart.residuals)
    assert (name, values) == ("residual", [row["residual"] for row in history(folders[0])])
    assert values[-1] < 1e-8
    assert run(f"plot {' '.join(folders)} --out both.png") == 0
    assert matplotlib.image.imread("both.png").shape[0] > 400
    Path(folders[0], "result.json").unlink()
    assert picture.read_curve(Path(folders[0])).kind is KINDS["constrained"]


def test_plot_keeps_the_kinds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run hs10 --quiet --out c") == 0
    assert run("run quadratic --max-steps 2 --quiet --out b") == 0
    assert run("plot c b") == 2
    err = capsys.readouterr().err
    for word in ("c (constrained)", "b (bilevel)", "apart"):
        assert word in err
    assert not Path("comparison.png").exists()


def test_a_case_of_ones_own_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def factory(*, dtype: torch.dtype = torch.float64) -> problems.ConstrainedCase:
        base = problems.case("circle", dtype=dtype)
        return problems.ConstrainedCase(name="t", problem=base.problem, start=base.start, source="mine")

    monkeypatch.setitem(_ENTRIES, "own", problems.Entry("own", factory, "", frozenset({"constrained"})))
    assert run("run own --quiet --out d") == 0
    assert "exact" not in result("d")
    assert result("d")["source"] == "mine"
