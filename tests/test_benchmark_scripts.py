"""The benchmark scripts run, at toy size and without other libraries, and their rows agree with dense algebra."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

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
