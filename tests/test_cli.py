"""The command line: what it writes, what it refuses and how, and that a killed run ends as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import bilevel
import problems
from bilevel import picture, report, settings
from bilevel.cli import main
from bilevel.kinds import KINDS
from bilevel.targets import load_target
from implicit import StepInfo
from problems.registry import _ENTRIES

FILES = {"result.json", "run.json", "run.pt", "history.jsonl", "convergence.png", "solution.safetensors"}
ROOT = Path(bilevel.__file__).parents[1]

MY_FILE = """
import os
import signal

import torch

import bilevel

generator = torch.Generator().manual_seed(0)
A = torch.randn(40, 4, generator=generator, dtype=torch.float64)
b = torch.randn(40, generator=generator, dtype=torch.float64)
x0 = torch.zeros(4, dtype=torch.float64)
y0 = torch.zeros(4, dtype=torch.float64)
calls = {"lower": 0}


def event():
    if os.path.exists(os.environ.get("KILL_ONCE_THERE", "nothing")):
        calls["lower"] += 1
        if calls["lower"] == 17:
            os.kill(os.getpid(), signal.SIGKILL)


def upper(x, y, *, batch):
    rows, target = batch
    return ((rows @ y - target) ** 2).mean() + 0.05 * (x**2).sum()


def lower(x, y, *, batch):
    event()
    rows, target = batch
    return 0.5 * ((rows @ y - target - rows @ x) ** 2).mean() + 0.05 * (y**2).sum()


def make(batch_size: int = 40, scale: float = 1.0):
    data = bilevel.Batches((scale * A, b), batch_size)
    return bilevel.BilevelProblem(upper, lower, upper_data=data, lower_data=data, name="mine"), x0, y0


def late_nan(kind: str = "nan", after: int = 60):
    count = [0]

    def g(x, y):
        count[0] += 1
        if count[0] > after:
            if kind == "raise":
                raise RuntimeError("the simulator lost its licence")
            return (y * float("nan")).sum()
        return 0.5 * ((y - x) ** 2).sum()

    return bilevel.BilevelProblem(lambda x, y: ((y - 1) ** 2).sum() + 0.1 * (x**2).sum(), g), x0, y0


def loader():
    rows = torch.utils.data.TensorDataset(A, b)
    data = bilevel.Batches(torch.utils.data.DataLoader(rows, batch_size=8))
    return bilevel.BilevelProblem(upper, lower, upper_data=data, lower_data=data), x0, y0


module = bilevel.from_modules(
    upper=torch.zeros((), dtype=torch.float64),
    lower=torch.nn.Linear(4, 1).double(),
    upper_loss=lambda x, net: ((net(A[20:])[:, 0] - b[20:]) ** 2).mean(),
    lower_loss=lambda x, net: ((net(A[:20])[:, 0] - b[:20]) ** 2).mean()
    + x.exp() * sum((p**2).sum() for p in net.parameters.values()),
)
problem = bilevel.BilevelProblem(
    lambda x, y: ((y - 1) ** 2).sum() + 0.1 * (x**2).sum(), lambda x, y: 0.5 * ((y - x) ** 2).sum(), name="mine"
)
number = 3


def needs(k):
    return problem


def five():
    return 5
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


def child(text: str, **environment: str) -> subprocess.Popen:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "bilevel", *text.split()],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run did not get that far"
        time.sleep(0.01)


def same_run(a: str | Path, b: str | Path) -> None:
    """Solutions equal to the byte, histories and counts equal but for the clock."""
    assert (Path(a) / "solution.safetensors").read_bytes() == (Path(b) / "solution.safetensors").read_bytes()
    plain = [[{k: v for k, v in row.items() if k != "seconds"} for row in history(f)] for f in (a, b)]
    assert plain[0] == plain[1]
    assert result(a)["counts"] == result(b)["counts"]


# --- list, help, version ---------------------------------------------------------------------------------------------


def test_list_json_agrees_with_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in found["cases"]] == list(problems.entries())
    by_name = {c["name"]: c for c in found["cases"]}
    assert by_name["box"]["fits"] == ["Penalty", "LVHBA", "KKTRelaxation"]
    assert by_name["quadratic"]["fits"] == ["ImplicitGradient", "Penalty", "LVHBA", "KKTRelaxation"]
    assert by_name["quadratic"]["settings"] == {
        "n": 5, "m": 8, "condition": 10.0, "seed": 0, "dtype": "float64", "device": "cpu",
    }  # fmt: skip
    methods = {m["name"]: m for m in found["algorithms"]}
    assert set(methods) == set(bilevel.algorithms())
    assert methods["Penalty"]["guarantee"] == "BIAS"
    assert methods["Penalty"]["settings"]["step_size"]["low"] == 0.3


def test_list_as_text_shows_every_case_and_nested_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unbuildable(*, size: int = 3) -> problems.Case:
        raise AssertionError("cases with external data are not built")

    def absent(*, data_dir: str | None = None) -> problems.Case:
        raise problems.MissingDataError("no files")

    monkeypatch.setitem(
        _ENTRIES, "far", problems.Entry("far", unbuildable, "needs files", frozenset({"external-data"}))
    )
    monkeypatch.setitem(_ENTRIES, "gone", problems.Entry("gone", absent, "needs files", frozenset()))
    known = [*problems.entries("bilevel").values(), *problems.entries("constrained").values()]
    needy = sum("external-data" in entry.tags for entry in known)
    assert run("list") == 0
    out = capsys.readouterr().out
    for name in (*problems.entries(), *bilevel.algorithms()):
        assert name in out
    assert out.count("fits      needs --data-dir") == 1 + needy
    assert "step_size.window=none" in out


@pytest.mark.parametrize("arguments", ["--help", "run --help", "solve --help"])
def test_help_teaches_by_examples(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "result.json" in out
    assert "--set n=20" in out


def test_version_and_module_entry_point() -> None:
    process = child("--version")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out.startswith("bilevel ")


# --- what a run writes -----------------------------------------------------------------------------------------------


def test_run_writes_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run Quadratic --set n=3 --seed 5 --rtol 1e-9") == 0
    out, err = capsys.readouterr()
    folder = Path("runs/quadratic-ImplicitGradient")
    assert {p.name for p in folder.iterdir()} == FILES
    case = problems.case("quadratic", n=3, seed=5)
    found = result(folder)
    assert found["case"] == "quadratic"
    assert found["settings"] == {"n": 3, "m": 8, "condition": 10.0, "seed": 5, "dtype": "float64", "device": "cpu"}
    assert found["seed"] == 5
    assert found["status"] == "CONVERGED"
    assert (found["dtype"], found["device"]) == ("float64", "cpu")
    assert found["algorithm"]["name"] == "ImplicitGradient"
    assert found["algorithm"]["settings"]["lower_solver"]["class"] == "NewtonCG"
    assert found["algorithm"]["settings"]["rtol"] == 1e-9
    assert found["command"] == "bilevel run Quadratic --set n=3 --seed 5 --rtol 1e-9"
    assert set(found["versions"]) == {"bilevel", "torch", "python", "numpy"}
    assert found["upper_value"] == pytest.approx(case.upper_star, rel=1e-10)
    assert found["exact"]["optimal_upper_value"] == case.upper_star
    tensors = load_file(folder / "solution.safetensors")
    torch.testing.assert_close(tensors["x"], case.x_star, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(tensors["y"], case.y_star, rtol=1e-7, atol=1e-8)
    distance = float(torch.linalg.vector_norm(tensors["x"] - case.x_star))
    assert found["exact"]["distance_to_exact_x"] == pytest.approx(distance, rel=1e-9)
    assert [row["step"] for row in history(folder)] == list(range(1, found["steps"] + 1))
    with safe_open(folder / "solution.safetensors", "pt") as file:
        about = json.loads(file.metadata()["bilevel"])
    assert (about["problem"], about["status"], about["steps"]) == ("quadratic", "CONVERGED", found["steps"])
    pixels = matplotlib.image.imread(folder / "convergence.png")
    assert pixels.shape[0] > 400
    assert pixels[..., :3].min() < 0.2
    assert "x has 3 numbers; y has 8 numbers; ImplicitGradient, float64 on cpu" in out
    for text in ("CONVERGED after", "stationarity", "estimated distance of x", "second-order products", str(folder)):
        assert text in out
    assert "step/s" in err


def test_quiet_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run quadratic --quiet --out here") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert out.startswith("CONVERGED after")
    assert err == ""


def test_names_and_keys_in_any_spelling() -> None:
    assert run("run QUADRATIC-ILL-CONDITIONED --algorithm PENALTY --max-steps 2 --quiet --set lower-steps=3") == 0
    found = result("runs/quadratic_ill_conditioned-Penalty")
    assert found["algorithm"]["settings"]["lower_steps"] == 3
    assert found["status"] == "STEP_LIMIT"
    assert found["steps"] == 2


def test_default_algorithm_is_the_first_that_fits() -> None:
    assert run("run box --max-steps 3 --quiet") == 0
    assert result("runs/box-Penalty")["algorithm"]["name"] == "Penalty"


def test_pytree_leaves_have_readable_names() -> None:
    assert run("run quadratic_pytree --quiet --out tree") == 0
    tensors = load_file("tree/solution.safetensors")
    assert set(tensors) == {"x.scale", "x.others.0", "y.a", "y.rest.0.b"}
    torch.testing.assert_close(
        tensors["x.others.0"], problems.case("quadratic_pytree").x_star["others"][0], rtol=1e-6, atol=1e-7
    )


def test_colliding_leaf_names_stay_apart() -> None:
    point = {"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}, "c": torch.zeros(1)}
    found = report._named("x", point)
    assert set(found) == {"x['a.b']", "x['a']['b']", "x.c"}
    assert float(found["x['a']['b']"].sum()) == 2.0


def test_dtype_and_device_reach_the_case() -> None:
    assert run("run quadratic --dtype float32 --device cpu --quiet --out f32") == 0
    assert result("f32")["dtype"] == "float32"
    assert load_file("f32/solution.safetensors")["x"].dtype == torch.float32


def test_seed_moves_the_generator_too() -> None:
    command = "solve my.py:make --algorithm Penalty --set batch_size=8 --max-steps 60 --quiet"
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(f"{command} --seed {seed} --out {out}") == 0
    same_run("a", "b")
    assert not torch.equal(load_file("a/solution.safetensors")["x"], load_file("c/solution.safetensors")["x"])


def test_report_of_a_case_is_printed_saved_and_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(solution: bilevel.Solution, folder: Path) -> problems.Report:
        (folder / "table.csv").write_text("1,2\n")
        return problems.Report("TABLE OF TWO", {"auc": 0.5, "bad": float("nan")}, [folder / "table.csv"])

    def factory() -> problems.Case:
        base = problems.case("quadratic")
        return problems.Case(name="t", problem=base.problem, start=base.start, source="", report=write, max_steps=2)

    monkeypatch.setitem(_ENTRIES, "tabled", problems.Entry("tabled", factory, "", frozenset()))
    assert run("run tabled") == 0
    out = capsys.readouterr().out
    assert "TABLE OF TWO" in out
    assert "table.csv" in out.splitlines()[-1]
    found = result("runs/tabled-ImplicitGradient")
    assert found["report"] == {"auc": 0.5, "bad": "nan"}
    assert found["steps"] == 2  # the budget that the case suggests


def test_a_report_that_fails_does_not_lose_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(solution: bilevel.Solution, folder: Path) -> problems.Report:
        raise RuntimeError("a bug in the report")

    def factory() -> problems.Case:
        base = problems.case("quadratic")
        return problems.Case(name="t", problem=base.problem, start=base.start, source="", report=write)

    monkeypatch.setitem(_ENTRIES, "broken", problems.Entry("broken", factory, "", frozenset()))
    with pytest.raises(RuntimeError, match="a bug in the report"):
        run("run broken --quiet")
    assert result("runs/broken-ImplicitGradient")["status"] == "CONVERGED"
    assert {p.name for p in Path("runs/broken-ImplicitGradient").iterdir()} == FILES


def test_an_earlier_run_is_moved_aside(capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (1, 2, 3):
        assert run(f"run quadratic --max-steps {steps} --quiet --out d") == 0
    assert [result(f)["steps"] for f in ("d.1", "d.2", "d")] == [1, 2, 3]
    assert "which is now d.2" in capsys.readouterr().err


def test_misuse_leaves_the_earlier_run_in_place() -> None:
    assert run("run quadratic --max-steps 1 --quiet --out d") == 0
    assert run("run quadratic --max-steps -1 --quiet --out d") == 2
    assert run("run quadratic --set upper_optimizer=Adam --set upper_options.lrr=1 --quiet --out d") == 2
    assert result("d")["steps"] == 1
    assert not Path("d.1").exists()


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_reach_the_algorithm() -> None:
    assert (
        run(
            "run quadratic --max-steps 3 --quiet --out s --set lower_solver=lbfgs --set lower_solver.memory=7 "
            "--set linear_solver=Cholesky --set upper_optimizer=adam --set upper_options.lr=0.01 "
            "--set upper_options.betas=(0.5,0.9) --set step_size.low=0.95 --set step_size.high=0.97 "
            "--set check_every=1e0"
        )
        == 0
    )
    found = result("s")["algorithm"]["settings"]
    assert (found["lower_solver"]["class"], found["lower_solver"]["memory"]) == ("LBFGS", 7)
    assert found["linear_solver"]["class"] == "Cholesky"
    assert found["upper_optimizer"] == "Adam"
    assert found["upper_options"] == {"lr": 0.01, "betas": [0.5, 0.9]}
    assert (found["step_size"]["low"], found["step_size"]["high"]) == (0.95, 0.97)
    assert found["check_every"] == 1


@pytest.mark.parametrize(
    ("text", "hint", "default", "expected"),
    [
        ("3", int, 1, 3),
        ("1e3", int, 1, 1000),
        ("1_000", int, 1, 1000),
        ("-4", int | None, None, -4),
        ("3", int | float, 1, 3),
        ("1e-3", float | None, None, 1e-3),
        ("inf", float, 1.0, float("inf")),
        ("None", float | None, 1.0, None),
        ("TRUE", bool, False, True),
        ("false", bool | None, None, False),
        ("digits", str | None, None, "digits"),
        ("none", str | None, "a", None),
        ("3", str, "a", "3"),
        ("a/b", str | os.PathLike[str] | None, None, "a/b"),
        ("torch.float32", torch.dtype, torch.float64, torch.float32),
        ("sgd", type[torch.optim.Optimizer] | None, None, torch.optim.SGD),
        ("(1, 2)", dict, None, None),
    ],
)
def test_values_take_the_declared_type(text: str, hint: object, default: object, expected: object) -> None:
    if hint is dict:
        assert settings.parse(text, None, None, "k") == (1, 2)
        return
    found = settings.parse(text, hint, default, "k")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("1.5", int),
        ("nan", int),
        ("yes", bool),
        ("1", bool),
        ("x", float),
        ("int64", torch.dtype),
        ("tensor", torch.dtype),
    ],
)
def test_values_of_another_type_are_refused(text: str, hint: object) -> None:
    with pytest.raises(settings.SettingError, match=f"k={text}: expected"):
        settings.parse(text, hint, None, "k")


def test_plain_is_strict_json() -> None:
    value = {"a": float("nan"), "b": [float("-inf"), torch.tensor([1.0, float("inf")])], "c": {2}, "d": torch.float32}
    found = settings.plain({**value, "e": bilevel.Penalty(penalty=3.0), "f": torch.optim.Adam, 3: None})
    assert found["b"] == ["-inf", [1.0, "inf"]]
    assert (found["a"], found["c"], found["d"], found["f"]) == ("nan", [2], "float32", "Adam")
    assert found["e"]["class"] == "Penalty"
    assert found["e"]["penalty"] == 3.0
    json.dumps(found, allow_nan=False)


def test_a_key_of_both_needs_its_prefix(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def factory(*, momentum: float = 0.0) -> problems.Case:
        base = problems.case("quadratic")
        return problems.Case(name="t", problem=base.problem, start=base.start, source="", max_steps=1)

    monkeypatch.setitem(_ENTRIES, "both", problems.Entry("both", factory, "", frozenset()))
    assert run("run both --set momentum=0.5") == 2
    assert "case.momentum" in (err := capsys.readouterr().err)
    assert "algorithm.momentum" in err
    assert run("run both --set case.momentum=0.25 --set algorithm.momentum=0.5 --quiet --out o") == 0
    assert result("o")["settings"] == {"momentum": 0.25}
    assert result("o")["algorithm"]["settings"]["momentum"] == 0.5


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["COMMAND", "--help"]),
        ("rn quadratic", ["'rn'", "run"]),
        ("run", ["CASE"]),
        ("run quadratik", ["'quadratik'", "did you mean quadratic?", "box_active"]),
        ("run quadratic --algorithm penlty", ["'penlty'", "did you mean Penalty?", "ImplicitGradient"]),
        ("run box --algorithm implicit-gradient", ["lower_set", "use Penalty"]),
        ("run quadratic --set lower_stps=3", ["lower_stps=3", "did you mean lower_steps?", "condition", "momentum"]),
        ("run quadratic --set case.lower_steps=3", ["'lower_steps'"]),
        ("run quadratic --set n=abc", ["n=abc", "an integer"]),
        ("run quadratic --set n=2.5", ["n=2.5", "an integer"]),
        ("run quadratic --set n", ["--set n", "key=value"]),
        ("run quadratic --set dtype=int32", ["dtype=int32", "float64"]),
        ("run quadratic --set momentum=true", ["momentum=true", "a number"]),
        ("run quadratic --set momentum=1.5", ["momentum", "[0, 1)", "1.5"]),
        ("run quadratic --set lower_solver=LBFG", ["did you mean LBFGS?"]),
        ("run quadratic --set lower_solver.memory=5", ["lower_solver.memory", "--set lower_solver=LBFGS"]),
        ("run quadratic --set lower_solver=LBFGS --set lower_solver.memry=4", ["memry", "did you mean memory?"]),
        ("run quadratic --set lower_solver=LBFGS --set lower_solver.memory=0", ["lower_solver", "memory", "0"]),
        ("run quadratic --set n.a=4", ["n.a", "no parts"]),
        ("run quadratic --set upper_optimizer=Adm", ["did you mean Adam?"]),
        ("run quadratic --set upper_optimizer=Adam --set upper_options.lrr=1", ["lrr"]),
        ("run quadratic --dtype float16", ["--dtype", "float32"]),
        ("run quadratic --device cuda:77x", ["device=cuda:77x", "--device cpu"]),
        ("run quadratic --set device=cuda:77", ["device=cuda:77", "CUDA device", "--device cpu"]),
        ("run quadratic --seed x", ["--seed", "'x'"]),
        ("run quadratic --seed -1", ["--seed -1"]),
        ("run quadratic --seed 1 --set seed=1", ["--seed 1", "--set seed"]),
        ("run quadratic --max-steps -1", ["max_steps", "-1"]),
        ("run quadratic --time-limit 0", ["time_limit", "positive"]),
        ("run quadratic --rtol -1", ["rtol", "-1"]),
        ("run quadratic --checkpoint-every 0", ["--checkpoint-every 0", "at least 1"]),
        ("run quadratic --data-dir .", ["--data-dir", "no setting 'data_dir'"]),
        ("run logistic_penalties --data-dir nowhere", ["--data-dir", "nowhere", "no such folder"]),
        ("run logistic_penalties --set dataset=nosuch", ["nosuch", "digits"]),
        ("run logistic_penalties --set dataset=mnist --data-dir .", ["mnist", "--data-dir", "BILEVEL_DATA"]),
        ("run quadratic --out my.py", ["--out my.py"]),
        ("run quadratic --resume", ["--resume", "runs/quadratic-ImplicitGradient", "without --resume"]),
        ("run quadratic --resume --out nowhere", ["--resume", "nowhere"]),
        ("solve my.py", ["my.py:NAME", "problem", "make"]),
        ("solve my", ["FILE.py:NAME"]),
        ("solve nofile.py:x", ["nofile.py"]),
        ("solve my.py:problm", ["'problm'", "problem", "module", "make"]),
        ("solve my.py:number", ["my.py:number", "BilevelProblem", "int"]),
        ("solve my.py:five", ["my.py:five", "must return", "int"]),
        ("solve my.py:needs", ["requires k"]),
        ("solve my.py:problem --set alpha=3", ["alpha=3"]),
        ("solve my.py:problem --dtype float32", ["--dtype", "starting point"]),
        ("solve my.py:problem --data-dir .", ["--data-dir"]),
        ("solve my.py:loader --checkpoint-every 5", ["DataLoader", "state_dict"]),
        ("plot nowhere", ["nowhere", "does not exist"]),
        ("plot .", ["history.jsonl"]),
        ("plot", ["DIR"]),
    ],
)  # fmt: skip
def test_misuse_exits_2_and_names_the_cure(
    arguments: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bilevel: error: ")
    assert err.count("\n") == 1  # one paragraph, no traceback
    for word in words:
        assert word in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import torch\n\n1 / 0\n", ["cannot be imported", "bad.py:3", "ZeroDivisionError"]),
        ("def f(:\n", ["bad.py:1", "SyntaxError"]),
        ("import nowhere_to_be_found\n", ["bad.py:1", "nowhere_to_be_found"]),
        ("raise SystemExit(3)\n", ["bad.py:1", "SystemExit: 3"]),
        ("import bilevel\ndef problem():\n    return bilevel.BilevelProblem(1, 2)\n", ["bad.py:3", "upper must be"]),
        ("import bilevel\nproblem = bilevel.BilevelProblem(lambda x, y: y, lambda x, y: y)\n", ["no variable x0"]),
        (
            "import bilevel, torch\nx0 = y0 = torch.zeros(2)\ndef g(x, y):\n    return nothing\n"
            "problem = bilevel.BilevelProblem(lambda x, y: y.sum(), g)\n",
            ["bad.py:4", "NameError", "nothing"],
        ),
        (
            "import bilevel, torch\nx0 = y0 = torch.zeros(2)\ndef g(x, y):\n    return y @ torch.zeros(7)\n"
            "problem = bilevel.BilevelProblem(lambda x, y: y.sum(), g)\n",
            ["bad.py:4", "lower(x, y) failed", "(2,)"],
        ),
        (
            "import bilevel, torch\nx0 = y0 = torch.zeros(2, dtype=int)\n"
            "problem = bilevel.BilevelProblem(lambda x, y: (x - y).sum(), lambda x, y: (y * x).sum())\n",
            ["x0 has dtype torch.int64", ".float()"],
        ),
        (
            "import bilevel, torch\nx0 = y0 = torch.zeros(2)\n"
            "problem = bilevel.BilevelProblem(lambda x, y: (x - y).sum(), lambda x, y: (x * x).sum())\n",
            ["lower does not depend on y"],
        ),
    ],
)  # fmt: skip
def test_faults_of_the_users_file_are_shown_with_their_line(
    source: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.py").write_text(source)
    assert run("solve bad.py:problem") == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_a_missing_data_set_of_a_case_is_misuse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def factory(*, data_dir: str | None = None) -> problems.Case:
        raise problems.MissingDataError("faces.npz not found; pass --data-dir")

    monkeypatch.setitem(_ENTRIES, "faces", problems.Entry("faces", factory, "", frozenset()))
    assert run("run faces") == 2
    assert capsys.readouterr().err == "bilevel: error: faces.npz not found; pass --data-dir\n"


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> str:
        raise TypeError("a bug")

    monkeypatch.setattr(report, "summary", broken)
    with pytest.raises(TypeError, match="a bug"):
        run("run quadratic --max-steps 1")


def test_a_bug_after_the_first_step_is_not_called_misuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: bilevel.Progress, info: StepInfo) -> None:
        raise TypeError("a bug in a callback")

    monkeypatch.setattr(bilevel.Progress, "__call__", broken)
    assert run("run quadratic --max-steps 2") == 1
    assert "a callback after step 1 raised TypeError: a bug in a callback" in capsys.readouterr().err
    assert {"result.json", "solution.safetensors"} <= {
        p.name for p in Path("runs/quadratic-ImplicitGradient").iterdir()
    }


def test_small_problems_run_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel.threads import SMALL, chosen_threads

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with chosen_threads(torch.zeros(SMALL - 1), None) as small:
            assert small == torch.get_num_threads() == 1
        with chosen_threads([torch.zeros(SMALL), torch.zeros(())], None) as large:
            assert large == 2
        with chosen_threads(torch.zeros(SMALL), 1) as asked:
            assert asked == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with chosen_threads(torch.zeros(3), None) as by_environment:
            assert by_environment == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert run("run quadratic --max-steps 1 --threads 0") == 2


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("odd.py").write_text(
        "import bilevel, torch\nx0 = y0 = torch.zeros(2)\n"
        "problem = bilevel.BilevelProblem(lambda x, y: (x**2).sum(), lambda x, y: ((y - x) ** 2).sum())\n"
    )
    assert run("solve odd.py:problem --quiet") == 0
    assert capsys.readouterr().err == (
        "bilevel: warning: upper does not depend on y: the lower level has no influence on the solution\n"
    )


# --- numerical failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ImplicitGradient", "Penalty"])
def test_nan_during_a_run(algorithm: str, capsys: pytest.CaptureFixture[str]) -> None:
    after = 300 if algorithm == "Penalty" else 12
    command = f"solve my.py:late_nan --algorithm {algorithm} --set after={after} --rtol 0 --out n"
    assert run(command) == 1
    assert "bilevel: error: " in capsys.readouterr().err
    found = result("n")
    assert found["status"] == "NONFINITE"
    assert {p.name for p in Path("n").iterdir()} >= FILES - {"run.pt"}
    assert all(bool(torch.isfinite(t).all()) for t in load_file("n/solution.safetensors").values())
    history("n")


def test_an_exception_during_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("solve my.py:late_nan --algorithm Penalty --set kind=raise --set after=900 --rtol 0 --out e") == 1
    out, err = capsys.readouterr()
    assert "interrupt" not in out
    line = 1 + MY_FILE.splitlines().index('                raise RuntimeError("the simulator lost its licence")')
    for word in ("bilevel: error: ", f"my.py:{line}: ", "the simulator lost its licence", "is in e"):
        assert word in err
    assert "Traceback" not in err
    found = result("e")
    assert found["steps"] > 0
    assert "licence" in found["error"]
    assert {p.name for p in Path("e").iterdir()} >= FILES - {"run.pt"}
    assert len(history("e")) > 0


# --- interrupts and resumption ---------------------------------------------------------------------------------------


def test_ctrl_c_stops_cleanly() -> None:
    process = child("run quadratic --algorithm Penalty --rtol 0 --max-steps 1000000 --checkpoint-every 20 --out c")
    wait_for(Path("c/run.pt").exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "STOPPED after" in out
    found = result("c")
    assert found["status"] == "STOPPED"
    assert 20 <= found["steps"] < 1_000_000
    assert {p.name for p in Path("c").iterdir()} >= FILES


def test_a_killed_case_resumes_bitwise(capsys: pytest.CaptureFixture[str]) -> None:
    command = "run quadratic --algorithm Penalty --rtol 0 --max-steps 160 --set n=4 --set momentum=0.8 --seed 3"
    process = child(f"{command} --checkpoint-every 20 --out killed")
    wait_for(Path("killed/run.pt.previous").exists, process)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not Path("killed/result.json").exists()
    assert run("run quadratic --out killed --resume") == 0  # everything else is remembered
    assert "resuming at step" in capsys.readouterr().out
    assert run(f"{command} --out whole --quiet") == 0
    same_run("killed", "whole")
    assert result("killed")["settings"]["n"] == 4


@pytest.mark.parametrize("algorithm", ["ImplicitGradient", "Penalty"])
@pytest.mark.parametrize("batch", [40, 8])
def test_a_killed_file_resumes_bitwise(algorithm: str, batch: int) -> None:
    # Killed inside a step, at the 17th evaluation after the first checkpoint.
    every, steps = (50, 100) if batch == 8 else (20, 60) if algorithm == "Penalty" else (3, 14)
    command = f"solve my.py:make --algorithm {algorithm} --set batch_size={batch} --rtol 0 --max-steps {steps}"
    process = child(f"{command} --checkpoint-every {every} --out killed", KILL_ONCE_THERE="killed/run.pt")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert 0 < torch.load("killed/run.pt", weights_only=True)["state"]["step"] < steps
    assert run("solve my.py:make --out killed --resume --quiet") == 0
    assert run(f"{command} --out whole --quiet") == 0
    same_run("killed", "whole")


def test_a_cut_checkpoint_falls_back_to_its_predecessor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run box --rtol 0 --max-steps 60 --checkpoint-every 20 --quiet --out cut") == 0
    data = Path("cut/run.pt").read_bytes()
    Path("cut/run.pt").write_bytes(data[: len(data) // 2])
    assert run("run box --max-steps 100 --resume --quiet --out cut") == 0
    err = capsys.readouterr().err
    assert "damaged" in err
    assert "run.pt.previous" in err
    assert run("run box --rtol 0 --max-steps 100 --quiet --out whole") == 0
    same_run("cut", "whole")


def test_resume_finds_the_default_folder_and_extends_the_run() -> None:
    assert run("run quadratic --max-steps 3 --quiet") == 0
    assert run("run quadratic --max-steps 6 --resume --quiet") == 0
    assert run("run quadratic --max-steps 6 --quiet --out whole") == 0
    same_run("runs/quadratic-ImplicitGradient", "whole")
    assert run("run quadratic --algorithm penalty --max-steps 3 --quiet") == 0
    assert run("run quadratic --max-steps 8 --resume --quiet") == 2  # which of the two?


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run quadratic --set n=6", ["case.n is 6, was 5"]),
        ("run quadratic --seed 9", ["seed is 9, was 0", "case.seed is 9, was 0"]),
        ("run quadratic --dtype float32", ["case.dtype is 'float32', was 'float64'"]),
        ("run quadratic --set momentum=0.5", ["algorithm.momentum is 0.5, was 0.9"]),
        ("run quadratic --algorithm Penalty", ["algorithm is 'Penalty', was 'ImplicitGradient'"]),
        ("run quadratic_ill_conditioned", ["target is 'case quadratic_ill_conditioned', was 'case quadratic'"]),
    ],
)
def test_resume_refuses_another_run(arguments: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run quadratic --max-steps 2 --quiet --out d") == 0
    before = Path("d/result.json").read_bytes()
    capsys.readouterr()
    assert run(f"{arguments} --resume --out d") == 2
    err = capsys.readouterr().err
    for word in words:
        assert word in err
    assert Path("d/result.json").read_bytes() == before


def test_data_may_have_moved_when_a_run_is_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def factory(*, data_dir: str | None = None, n: int = 5) -> problems.Case:
        base = problems.case("quadratic", n=n)
        return problems.Case(name="t", problem=base.problem, start=base.start, source=f"{data_dir}")

    monkeypatch.setitem(_ENTRIES, "filed", problems.Entry("filed", factory, "", frozenset()))
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    assert run("run filed --data-dir old --set n=4 --max-steps 2 --quiet --out d") == 0
    assert result("d")["source"] == str(tmp_path / "old")
    assert run("run filed --data-dir new --max-steps 4 --resume --quiet --out d") == 0
    found = result("d")
    assert (found["source"], found["steps"], found["settings"]["n"]) == (str(tmp_path / "new"), 4, 4)


def test_resume_of_a_changed_file_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("solve my.py:problem --max-steps 1 --quiet --out d") == 0
    Path("my.py").write_text(MY_FILE + "\n# edited\n")
    assert run("solve my.py:problem --max-steps 2 --resume --quiet --out d") == 0
    assert "has changed since" in capsys.readouterr().err


def test_resume_without_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run quadratic --max-steps 1 --quiet --out d") == 0
    for name in ("run.pt", "run.pt.previous"):
        Path("d", name).unlink(missing_ok=True)
    assert run("run quadratic --resume --out d") == 2
    assert "before its first checkpoint" in capsys.readouterr().err
    assert run("run quadratic --max-steps 1 --quiet --out e") == 0
    Path("e/run.json").write_text("{")
    assert run("run quadratic --resume --out e") == 2
    assert "run.json" in capsys.readouterr().err


def test_timed_checkpoints_save_when_it_is_time(tmp_path: Path) -> None:
    saver = report.TimedCheckpoint(tmp_path / "run.pt")

    def info(step: int, seconds: float) -> StepInfo:
        return StepInfo(step, seconds, {}, None, None, lambda: {"format": 1, "step": step})

    saver.start(info(0, 5.0))
    saver(info(1, 14.0))
    assert not saver.path.exists()
    saver(info(2, 15.5))
    assert torch.load(saver.path, weights_only=True)["step"] == 2
    saver(info(3, 20.0))
    assert torch.load(saver.path, weights_only=True)["step"] == 2
    saver.end(info(4, 21.0), bilevel.Status.STOPPED)
    assert torch.load(saver.path, weights_only=True)["step"] == 4


# --- files of the user -----------------------------------------------------------------------------------------------


def test_solve_of_a_module_problem_starts_where_the_module_is() -> None:
    assert run("solve my.py:module --algorithm ImplicitGradient --quiet") == 0
    found = result("runs/my-module-ImplicitGradient")
    assert found["file"].endswith("my.py:module")
    assert set(load_file("runs/my-module-ImplicitGradient/solution.safetensors")) == {"x", "y.weight", "y.bias"}


def test_solve_takes_the_start_from_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("solve my.py:problem") == 0
    assert "mine: x has 4 numbers" in capsys.readouterr().out
    # min (x - 1)² + 0.1 x²
    expected = torch.full((4,), 1 / 1.1, dtype=torch.float64)
    torch.testing.assert_close(load_file("runs/my-problem-ImplicitGradient/solution.safetensors")["x"], expected)


def test_keyword_parameters_of_a_function_are_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("solve my.py:make --set scale=2 --set batch_size=10 --max-steps 3 --out m") == 0
    assert result("m")["settings"] == {"batch_size": 10, "scale": 2.0}
    assert "lower data: 40 rows in batches of 10" in capsys.readouterr().out


def test_a_loader_that_cannot_be_saved_runs_without_checkpoints() -> None:
    assert run("solve my.py:loader --max-steps 5 --quiet --out l") == 0
    assert {p.name for p in Path("l").iterdir()} == FILES - {"run.pt"}


def test_the_users_file_hides_no_package(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "helper_beside_it.py").write_text("value = 2.0\n")
    (folder / "problems.py").write_text("from helper_beside_it import value\n" + MY_FILE)
    before = list(sys.path)
    try:
        assert run("solve deep/problems.py:problem --quiet") == 0
    finally:
        sys.modules.pop("helper_beside_it", None)
    assert sys.path == before
    assert sys.modules["problems"] is problems


def test_load_target_keeps_dataclasses_working() -> None:
    Path("typed.py").write_text(
        textwrap.dedent(
            """
            from __future__ import annotations
            import dataclasses, torch, bilevel
            @dataclasses.dataclass
            class Scale:
                value: float = 2.0
            def make(scale: float = 2.0, flag: bool = False):
                s = Scale(scale)
                point = torch.zeros(2)
                def lower(x, y):
                    return (y - s.value * x).square().sum()
                return bilevel.BilevelProblem(lambda x, y: (y - 1).square().sum(), lower), point, point
            """
        )
    )
    target = load_target("typed.py:make")
    assert target.slots["flag"].hint is bool
    job = target.build(scale=3.0)
    assert job.settings == {"scale": 3.0, "flag": False}
    assert float(job.problem.lower(torch.ones(2), torch.zeros(2))) == 18.0


# --- pictures --------------------------------------------------------------------------------------------------------


def test_plot_of_one_and_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    for algorithm in ("ImplicitGradient", "Penalty"):
        assert run(f"run quadratic --algorithm {algorithm} --max-steps 60 --quiet") == 0
    folders = ["runs/quadratic-ImplicitGradient", "runs/quadratic-Penalty"]
    picture_path = Path(folders[0], "convergence.png")
    picture_path.unlink()
    assert run(f"plot {folders[0]}") == 0
    assert picture_path.exists()
    assert run(f"plot {' '.join(folders)}") == 0
    assert "comparison.png" in capsys.readouterr().out
    assert run(f"plot {' '.join(folders)} --out both.png") == 0
    one, two = (matplotlib.image.imread(p)[..., :3] for p in (picture_path, "both.png"))
    blue, orange = np.array([0x1F, 0x77, 0xB4]) / 255, np.array([0xFF, 0x7F, 0x0E]) / 255

    def pixels(image: np.ndarray, colour: np.ndarray) -> int:
        return int((np.abs(image - colour).max(axis=-1) < 0.02).sum())

    assert pixels(one, blue) > 100
    assert pixels(one, orange) == 0
    assert pixels(two, blue) > 100
    assert pixels(two, orange) > 100


def test_runs_with_one_name_are_told_apart() -> None:
    for out in ("a", "b"):
        assert run(f"run quadratic --max-steps 1 --quiet --out {out}") == 0
    labels = [curve.label for curve in picture.read_curves([Path("a"), Path("b")])]
    assert labels == ["quadratic, ImplicitGradient (a)", "quadratic, ImplicitGradient (b)"]


def test_curves_read_back_what_was_written() -> None:
    assert run("run quadratic --quiet --out d") == 0
    curve = picture.read_curve(Path("d"))
    assert curve.label == "quadratic, ImplicitGradient"
    assert curve.optimum == problems.case("quadratic").upper_star
    name, values = curve.column("stationarity", "hypergradient")
    assert (name, values) == ("stationarity", [row["stationarity"] for row in history("d")])
    Path("d/history.jsonl").write_text('{"step": 1')
    with pytest.raises(ValueError, match="damaged"):
        picture.read_curve(Path("d"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([[1.0, 100.0]], True), ([[1.0, 2.0]], False), ([[-1.0, 100.0]], False), ([[]], False), ([[1.0], [50.0]], True)],
)
def test_log_axes_only_where_they_help(values: list[list[float]], expected: bool) -> None:
    assert picture._wants_log(values) is expected


def test_only_rough_curves_get_a_running_mean() -> None:
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    mean = picture._running_mean(noise)
    assert mean is not None
    assert mean[100] == pytest.approx(sum(noise[90:111]) / 21)
    assert picture._running_mean([1.0 / (i + 1) for i in range(200)]) is None
    assert picture._running_mean(noise[:30]) is None
    assert picture._running_mean([*noise, float("nan")]) is None


def test_histories_with_nan_or_nothing_can_be_drawn(tmp_path: Path) -> None:
    rows = [{"step": 1, "seconds": 0.1, "upper_value": "nan", "stationarity": "inf"}]
    for name, history_rows in (("a", []), ("b", rows), ("c", rows + [{"step": 2, "seconds": 0.2, "upper_value": 3.0}])):
        path = picture.draw(tmp_path / f"{name}.png", [picture.Curve(name, KINDS["bilevel"], history_rows)], name)
        assert path.stat().st_size > 1000
