"""Every example in the README, the docs and the docstrings runs."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import bilevel

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[str | None, str]]:
    return [(m["file"], m["code"]) for m in BLOCK.finditer(page.read_text()) if m["language"] == language]


@pytest.fixture(autouse=True)
def _default_dtype() -> None:
    torch.set_default_dtype(torch.float32)  # what a reader has


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    scope: dict[str, object] = {"__name__": "example"}
    for file, code in blocks(page, "python"):
        if file:
            (tmp_path / file).write_text(code)
        exec(compile(code, f"{page.name}", "exec"), scope)
    sys.modules.pop("my_problem", None)


def test_the_readme_shell_commands_work(tmp_path: Path) -> None:
    """The README's own file, solved by the README's own command."""
    page = ROOT / "README.md"
    for file, code in blocks(page, "python"):
        if file:
            (tmp_path / file).write_text(code)
    commands = [code.strip() for _, code in blocks(page, "bash") if code.startswith("bilevel solve")]
    assert commands == ["bilevel solve my_problem.py:problem"]
    arguments = commands[0].split()[1:]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "bilevel", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "CONVERGED" in done.stdout
    written = {p.name for p in tmp_path.rglob("runs/*/*")}
    assert {"result.json", "history.jsonl", "convergence.png", "solution.safetensors"} <= written


def test_the_readme_toll_is_what_its_comment_says() -> None:
    scope: dict[str, Any] = {"__name__": "example"}
    (code,) = (code for _, code in blocks(ROOT / "README.md", "python") if "toll" in code)
    assert "a toll of 1.5, 37.5 % of the cars" in code
    exec(compile(code, "README.md", "exec"), scope)
    solution = scope["solution"]
    torch.testing.assert_close(solution.x, torch.tensor(1.5, dtype=torch.float64))
    torch.testing.assert_close(solution.y, torch.tensor([0.375, 0.625], dtype=torch.float64))
    assert solution.choice and bilevel.verify(scope["problem"], solution.x, solution.y).accepted


def test_the_readme_first_command_runs_an_existing_case() -> None:
    command = blocks(ROOT / "README.md", "bash")[0][1]
    assert "bilevel run hyper_cleaning" in command
    assert "-c constraints.txt" in command


def modules() -> list[str]:
    found = []
    for package in ("implicit", "constrained", "bilevel", "problems"):
        module = importlib.import_module(package)
        found += [package, *(m.name for m in pkgutil.walk_packages(module.__path__, f"{package}."))]
    return [name for name in found if not name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed == 0


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+\.md)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_public_name_has_a_docstring() -> None:
    for package in ("implicit", "constrained", "bilevel", "problems"):
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                assert (value.__doc__ or "").strip(), f"{package}.{name}"
                assert not value.__doc__.startswith(f"{name}("), f"{package}.{name} has dataclass's own docstring"
