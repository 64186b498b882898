"""Imports point one way, one module alone uses torch's private pytrees, and a stranger called `implicit` is noticed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["implicit", "constrained", "bilevel", "problems"]
LAZY = {("bilevel/cli.py", "problems"), ("bilevel/settings.py", "problems")}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """Imported module names, and whether the import stands at the top level."""
    body = ast.parse(path.read_text())
    top = set(body.body)
    found = []
    for node in ast.walk(body):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node in top))
    return found


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_left(package: str) -> None:
    later = set(ORDER[ORDER.index(package) + 1 :])
    assert modules(package)
    for path in modules(package):
        name = path.relative_to(ROOT).as_posix()
        for module, at_top in imports(path):
            head = module.split(".")[0]
            if head in later:
                assert (name, head) in LAZY, f"{name} imports {module}"
                assert not at_top, f"{name} must import {module} inside a function"


def test_one_module_imports_torch_pytree() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for package in ORDER
        for path in modules(package)
        if any("_pytree" in module for module, _ in imports(path))
    }
    assert users == {"implicit/tree.py"}


def test_modules_stay_readable() -> None:
    lengths = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for k in ORDER for p in modules(k)}
    assert {name: n for name, n in lengths.items() if n > 500} == {}


@pytest.mark.parametrize("package", ["bilevel", "constrained"])
def test_foreign_implicit_is_named(package: str, tmp_path: Path) -> None:
    (tmp_path / "implicit").mkdir()
    (tmp_path / "implicit" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import {package}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert str(tmp_path / "implicit" / "__init__.py") in done.stderr
    assert "pip uninstall implicit" in done.stderr


def test_importing_the_library_is_light() -> None:
    """Plotting, cvxpy and the problems are loaded when they are used."""
    code = (
        "import sys, bilevel; "
        "print([m for m in ('matplotlib', 'cvxpy', 'problems', 'sklearn', 'pooch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
