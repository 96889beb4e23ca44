"""The house's own rules: links, guards, packages, import direction, device names, file sizes, the README's tree."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO

# A folder may import itself and the folders that follow it.
ORDER = ("k2lite", "offload", "backends", "quant")
LINKED = ("quant", "backends", "offload")
MAX_LINES = 400
# Each name of a device may occur in its own file only; none of those files exists yet.
DEVICE_NAMES = {"torch.cuda": None, "torch.npu": None, "torch.mlu": None}
VAGUE_NAMES = {"utils.py", "util.py", "common.py", "misc.py", "helpers.py", "manager.py", "handler.py"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in _walk(REPO / folder))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        elif path.suffix == ".py":
            yield path


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_point_at_the_real_folder(name: str) -> None:
    link = REPO / "k2lite" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


@pytest.mark.parametrize("name", LINKED)
def test_importing_a_folder_under_its_bare_name_is_refused(name: str) -> None:
    result = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=REPO, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"import k2lite.{name}, not {name}" in result.stderr


def test_the_wheel_holds_every_package_and_one_top_name() -> None:
    setuptools = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {_package_of(path) for path in python_files(*ORDER)}
    assert set(setuptools["packages"]) == found
    for package, folder in setuptools["package-dir"].items():
        assert (REPO / folder / "__init__.py").is_file(), package


def _package_of(path: Path) -> str:
    parts = path.relative_to(REPO).parent.parts
    return ".".join(parts if parts[0] == "k2lite" else ("k2lite", *parts))


def test_imports_point_one_way() -> None:
    wrong = [f"{path.relative_to(REPO)}: {name}" for path in python_files(*ORDER) for name in _upward_imports(path)]
    assert wrong == []


def _upward_imports(path: Path) -> list[str]:
    package = _package_of(path)
    own = path.relative_to(REPO).parts[0]
    above = ORDER[: ORDER.index(own)]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names = [".".join([*base, *([node.module] if node.module else [])])]
        found += [name for name in names if _folder_of(name) in above]
    return found


def _folder_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "k2lite":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LINKED else "k2lite"


def test_the_import_rule_sees_an_upward_import() -> None:
    assert _folder_of("k2lite.quant.types") == "quant"
    assert _folder_of("k2lite.engine") == "k2lite"
    assert "k2lite.engine" in _upward_imports_of_source("from k2lite.engine import Engine", "quant")
    assert "k2lite.offload.source" in _upward_imports_of_source("import k2lite.offload.source", "backends")
    assert _upward_imports_of_source("from k2lite.quant.types import Extent", "offload") == []


def _upward_imports_of_source(source: str, folder: str) -> list[str]:
    probe = REPO / folder / "_probe_of_the_import_test.py"
    probe.write_text(source)
    try:
        return _upward_imports(probe)
    finally:
        probe.unlink()


def test_device_names_stay_in_their_own_files() -> None:
    for path in python_files(*ORDER):
        for name, home in DEVICE_NAMES.items():
            assert name not in path.read_text(encoding="utf-8") or path.name == home, f"{name} in {path}"


def test_files_are_small_named_for_what_they_hold_and_explain_themselves() -> None:
    for path in python_files(*ORDER, "tools"):
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") <= MAX_LINES, f"{path} is longer than {MAX_LINES} lines"
        assert path.name not in VAGUE_NAMES, path
        assert ast.get_docstring(ast.parse(source)), f"{path} has no docstring"


def test_generated_parts_of_the_docs_are_up_to_date() -> None:
    """The tree and the help in the README come from the code."""
    result = subprocess.run(
        [sys.executable, "tools/generate_docs.py", "--check"], cwd=REPO, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["info", "--help"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom k2lite.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tiktoken', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout
