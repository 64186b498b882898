"""The benchmark scripts run, at toy size and without other libraries, and their rows agree with dense algebra."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module(request.param)


def run(script: ModuleType, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    import peers

    record = tmp_path / "record.json"
    command = ["--toy", "--no-peers", "--rounds", "1", "--json", str(record), *options]
    table = script.table(peers.parser("", rounds=1).parse_args(command))
    written = json.loads(record.read_text())
    assert written["table"] == table
    assert set(written["missing"].values()) == {"left out by --no-peers"}
    assert all(len(samples) >= 1 for samples in written["seconds"].values())
    return table


@pytest.mark.parametrize("script", ["job1_hypergradient"], indirect=True)
def test_job_1(script: ModuleType, tmp_path: Path) -> None:
    table = run(script, tmp_path)
    assert sum(row["row"].startswith("ours") for row in table) >= 3
    for row in table:
        assert row["relative error"] <= 1e-6, row
        assert row["relative linear residual"] <= 1.01e-8, row
        assert row["products"] > 0


@pytest.mark.parametrize("script", ["job2_solve"], indirect=True)
def test_job_2(script: ModuleType, tmp_path: Path) -> None:
    table = run(script, tmp_path)
    assert sum(row["row"].startswith("ours") for row in table) == 2
    assert len({row["upper value"] for row in table}) == 1
    for row in table:
        assert float(row["true norm"]) <= 1.01e-5, row


@pytest.mark.parametrize("script", ["job3_products"], indirect=True)
def test_job_3(script: ModuleType, tmp_path: Path) -> None:
    table = run(script, tmp_path)
    assert {"row", "k = 1", "k = 8"} <= set(table[0])
    for row in table:
        assert row["relative error"] <= 1e-5, row


@pytest.mark.parametrize("script", ["estimators"], indirect=True)
def test_estimators(script: ModuleType) -> None:
    import job1_hypergradient as job1
    import peers

    table = script.table(job1.load(peers.parser("", rounds=1).parse_args(["--toy"]))).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert len(cells) == 12
    for name, _, true, reported in cells:
        assert float(reported) >= 0.8 * float(true) or float(true) < 1e-7, name


@pytest.mark.parametrize("script", ["sketching"], indirect=True)
def test_sketching(script: ModuleType, tmp_path: Path) -> None:
    table = run(script, tmp_path)
    assert {row["solver"] for row in table} >= {"Kaczmarz", "Gaussian vector", "block Gaussian", "MINRES", "LDLT"}
    for row in table:
        for rtol in (0.1,) if row["solver"] in script.SKETCHES else script.TOLERANCES:
            assert row[f"{rtol:g}: relative residual"] <= rtol, row
            assert row[f"{rtol:g}: relative error"] <= row["condition number"] * rtol, row
            assert row[f"{rtol:g}: steps"] >= 1


@pytest.mark.parametrize("script", ["sketching"], indirect=True)
def test_the_comparison_of_the_paper(script: ModuleType, tmp_path: Path) -> None:
    import peers

    record = tmp_path / "record.json"
    arguments = peers.parser("", rounds=1).parse_args(["--toy", "--quick", "--no-peers", "--json", str(record)])
    arguments.seconds = 5.0
    table = script.paper(arguments)
    assert json.loads(record.read_text())["table"] == table
    assert [row["linear solver"] for row in table if row["residual"] == 1e-8] == ["LDLT", "MINRES", "GMRES"]
    assert {row["linear solver"] for row in table} == set(script.INNER)
    for row in table:
        assert (row["solved"], row["of"]) == (3, 3), row
        assert 1 <= row["steps"] < row["evaluations"], row
        assert 0 < row["unit steps, %"] <= 100
    by_name = {row["linear solver"]: row["linear steps"] for row in table if row["residual"] == 1e-4}
    assert by_name["LDLT"] < by_name["MINRES"] < by_name["block Gaussian"] < by_name["Gaussian vector"]
    assert {script.OURS.get(name, name.lower()) for name in script.equality_table.ICML.split()} <= set(
        script.problems.entries("constrained")
    )


def test_a_missing_library_is_named_and_a_failing_one_loses_its_row_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    peers = importlib.import_module("peers")

    def absent() -> list[Any]:
        raise ModuleNotFoundError("No module named 'absent'")

    def broken() -> None:
        raise FloatingPointError("diverged")

    arguments = peers.parser("", rounds=2).parse_args([])
    comparison = peers.Comparison([peers.Row("ours", lambda: 1.0)])
    comparison.add_peer("absent", absent, True)
    comparison.add_peer("broken", lambda: [peers.Row("broken: row", broken)], True)
    comparison.run(arguments)
    peers.finish(arguments, "title", comparison, [{"row": row.name, "n": None} for row in comparison.rows])
    printed = capsys.readouterr().out
    assert "| ours |  |" in printed
    assert "- absent: not importable (No module named 'absent')" in printed
    assert "- broken: row: failed: FloatingPointError: diverged" in printed
    assert len(comparison.rows[0].seconds) == 6

    comparison.rows.append(peers.Row("ours too", broken))
    with pytest.raises(FloatingPointError, match="diverged"):
        comparison.run(arguments)


def sphere(peers: ModuleType) -> Any:
    """min x_0 on the unit circle with x_1 <= 2 and x_0 >= -2, in numpy; the minimum is at (-1, 0)."""
    return peers.Case(
        "sphere",
        np.array([-0.5, 0.5]),
        lambda x: (x[0], np.array([x @ x - 1.0, x[1] - 2.0])),
        lambda x: (np.array([1.0, 0.0]), np.array([2.0 * x, [0.0, 1.0]])),
        lambda x, multipliers, weight: 2.0 * multipliers[0] * np.eye(2),
        1,
        2,
        np.array([-2.0, -np.inf]),
        np.full(2, np.inf),
    )


@pytest.mark.parametrize("script", ["constrained_peers"], indirect=True)
@pytest.mark.parametrize(
    ("claim", "x", "multipliers", "wrong"),
    [
        ("solved", [-1.0, 0.0], [0.5, 0.0], ""),
        ("solved", [-1.0, 0.0], [-0.5, 0.0], "residual 2.0e+00"),  # the sign
        ("solved", [-1.0, 0.0], [0.5, 1e-3], "residual 2.0e-03"),  # not complementary
        ("solved", [-1.0, 1e-5], [0.5, 0.0], "residual 1.0e-05"),
        ("solved", [1.0, 0.0], [-0.5, 0.0], "no minimum, curvature -1.0e+00"),
        ("infeasible", [0.0, 0.0], None, ""),  # a stationary point of the violation
        ("infeasible", [-1.0, 0.0], None, "violation 0.0e+00 only"),
        ("infeasible", [0.5, 0.0], None, "the violation can fall by 100.0%"),
        ("unbounded", [-1.0, 0.0], None, "f -1, violation 0.0e+00"),
        ("", [7.0, 7.0], None, ""),
    ],
)
def test_a_claim_of_a_constrained_solver_is_judged(
    script: ModuleType, claim: str, x: list[float], multipliers: list[float] | None, wrong: str
) -> None:
    outcome = script.Outcome("ours", np.array(x), "", claim, 1)
    duals = None if multipliers is None else np.array(multipliers)
    case = sphere(script)
    outcome.measured = script.measure(case, outcome.x, duals, fit=claim != "solved")
    assert script.untrue(case, outcome, 1e-8) == wrong


@pytest.mark.parametrize("script", ["constrained_peers"], indirect=True)
def test_missing_multipliers_are_those_of_least_squares(script: ModuleType) -> None:
    found = script.measure(sphere(script), np.array([-1.0, 0.0]), np.array([9.0, 9.0]))
    assert found.residual == 0.0
    assert found.objective == -1.0


@pytest.mark.parametrize("script", ["constrained_peers"], indirect=True)
@pytest.mark.parametrize("solver", ["ours", "slsqp", "trust-constr", "ipopt"])
def test_solvers_get_the_same_functions_and_are_counted(script: ModuleType, solver: str) -> None:
    if solver == "ipopt":
        pytest.importorskip("cyipopt")
    outcome = script.run(sphere(script), solver, seconds=20.0, rounds=1)
    assert np.abs(outcome.x - [-1.0, 0.0]).max() <= 1e-4, outcome
    if solver == "ours":
        assert (outcome.claim, outcome.truth) == ("solved", "")
    assert outcome.counts["values"] >= outcome.counts["derivatives"] >= 1
    assert 0.0 <= outcome.outside <= outcome.seconds


@pytest.mark.parametrize("script", ["constrained_peers"], indirect=True)
def test_evaluations_at_one_point_are_counted_once(script: ModuleType) -> None:
    case, x = sphere(script), np.array([0.3, 0.4])
    case.restart()
    for _ in range(2):
        case.value(x), case.derivative(x)
        case.hessian(x, np.ones(2))
        case.hessian(x, np.zeros(2), 0.0)
    assert case.counts == {"values": 1, "derivatives": 1, "hessians": 1}
    case.value(2 * x)
    assert case.counts["values"] == 2
    case.restart(seconds=-1.0)
    with pytest.raises(script.OutOfTimeError):
        case.value(x)


@pytest.mark.parametrize("script", ["equality_table"], indirect=True)
def test_the_equality_table(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["hs6", "hs7", "hs28", "himmelbc"]
    record = tmp_path / "rows.csv"
    command = ["--problems", ",".join(names), "--solvers", "ours,slsqp", "--rounds", "1", "--out", str(record)]
    rows = script.report(names, script.parser("", "all").parse_args(command))
    assert [(row.problem, row.solver) for row in rows] == [(name, s) for name in names for s in ("ours", "slsqp")]
    assert script.read(record) == rows
    for row in rows:
        assert row.residual <= (1e-8 if row.solver == "ours" else 1e-6), row
        assert row.untrue == ""
    printed = capsys.readouterr().out
    assert "| ours | 4 | 4 / 4 / 4 | 4 | 4 | 0 |" in printed
    assert f"| hs7 | 2 | 1 | {-(3**0.5):.9g} |" in printed

    earlier = script.parser("", "all").parse_args(["--solvers", "ours", "--known", str(record), "--rounds", "1"])
    assert sorted((row.problem, row.solver) for row in script.report(["hs6"], earlier)) == [
        ("hs6", "ours"),
        ("hs6", "slsqp"),
    ]
    assert script.names("icml").index("HS7") == 1
    assert len(script.names("icml")) == 47
    assert {"bt1", "hs6"} <= set(script.names("catalogue")) and "hs71" not in script.names("catalogue")


@pytest.mark.parametrize("script", ["equality_table"], indirect=True)
def test_summaries_of_the_equality_table(script: ModuleType) -> None:
    common = {"n": 2, "m": 1, "values": 1, "derivatives": 1, "hessians": 1, "seconds": 1.0, "solver_seconds": 0.5}
    common |= {"feasibility": 0.0, "complementarity": 0.0, "curvature": 1.0, "f_star": float("inf")}

    def row(problem: str, solver: str, iterations: int, residual: float, f: float, untrue: str = "") -> Any:
        claim = (
            {"claim": "solved", "status": "exit 0"} if residual <= 1e-6 or untrue else {"claim": "", "status": "gone"}
        )
        own = {"problem": problem, "solver": solver, "iterations": iterations, "stationarity": residual, "f": f}
        return script.Row(**common, **claim, **own, untrue=untrue)

    rows = [row("a", "x", 3, 1e-9, 2.0), row("a", "y", 5, 1e-7, 1.9), row("b", "x", 9, 1e-5, 0.0, "residual 1e-05")]
    rows += [row("b", "y", 7, 1e-12, 1.0), row("c", "y", 4, float("nan"), 5.0)]
    best = script.best_values(rows)
    assert best == {"a": 2.0, "b": 1.0, "c": float("inf")}  # 1.9 and 0.0 are of points less accurate than others
    x, y = script.summary(rows, best)
    assert [x[key] for key in list(x)[1:6]] == [2, "2 / 1 / 1", 1, 2, 1]
    assert [y[key] for key in list(y)[1:7]] == [3, "2 / 2 / 1", 2, 2, 0, 6.0]
    table = script.markdown(script.per_problem(rows, best))
    assert "| a | 2 | 1 | 2 | 3 / 1e-09 | 5 / 1e-07 |" in table
    assert "| b | 2 | 1 | 1 | 9 / 1e-05 (FALSE: residual 1e-05) | 7 / 1e-12 |" in table
    assert "| c | 2 | 1 | inf |  | 4 / nan (gone) |" in table


@pytest.mark.parametrize("script", ["inequality_table"], indirect=True)
def test_the_inequality_table(script: ModuleType) -> None:
    import equality_table

    arguments = equality_table.parser("", "hs").parse_args(["--solvers", "ours,slsqp", "--rounds", "1"])
    names = script.names("hs21,hs35,hs71")
    for row in equality_table.report(names, arguments):
        assert (row.claim, row.untrue) == ("solved", ""), row
        assert row.residual <= 1e-6


@pytest.mark.parametrize("script", ["pde_control"], indirect=True)
def test_the_control_problem(script: ModuleType) -> None:
    found = script.one(4)
    assert (found["unknowns and constraints"], found["status"]) == (48, "CONVERGED")
    assert abs(float(found["gap of f"])) <= 1e-8
    assert 0 < 0.9 * script.resident() < script.peak()  # the kernel counts the two at different times
