"""The house's own rules: links, guards, packages, import direction, device names, file sizes, generated docs."""

from __future__ import annotations

import ast
import re
import shutil
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
# Each name of a device may occur in its own file only.
DEVICE_HOMES = {"torch.cuda": "cuda_runtime.py", "torch.npu": "npu_device.py", "torch.mlu": "mlu_device.py"}
IMPORTABLE = re.compile(r"k2lite(\.\w+)+")  # a text that importlib could be given
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
    return _wrong_imports(path.read_text(encoding="utf-8"), _package_of(path), path.relative_to(REPO).parts[0])


def _wrong_imports(source: str, package: str, folder: str) -> list[str]:
    """What a file of `package` imports from a folder that stands above its own, or from outside the product."""
    wrong = {*ORDER[: ORDER.index(folder)], "tests", "tools"}
    return [name for name in _imports(source, package) if _folder_of(name) in wrong]


def _imports(source: str, package: str) -> Iterator[str]:
    """Full names of all that is imported, relative imports and names of modules given as strings included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and IMPORTABLE.fullmatch(node.value):
            yield node.value


def _folder_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "k2lite":
        return parts[0]
    return parts[1] if len(parts) > 1 and parts[1] in LINKED else "k2lite"


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("quant", "from k2lite.engine import Engine"),
        ("quant", "from .. import engine"),
        ("quant", "from ..engine import Engine"),
        ("quant", "from ..backends.base import Backend"),
        ("quant", "import k2lite"),
        ("quant", "from k2lite import backends"),
        ("backends", "import k2lite.offload.source"),
        ("backends", "from k2lite import offload"),
        ("offload", "def f():\n    from k2lite.model import Model"),
        ("offload", "importlib.import_module('k2lite.engine')"),
        ("k2lite", "from tests.checkpoints import tiny_config"),
        ("k2lite", "import tools.bench_startup"),
    ],
)
def test_the_import_rule_sees_a_wrong_import(folder: str, line: str) -> None:
    package = folder if folder == "k2lite" else f"k2lite.{folder}"
    assert len(_wrong_imports(line, package, folder)) == 1


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("offload", "from k2lite.quant.types import Extent"),
        ("offload", "from k2lite import backends"),
        ("quant", "from .errors import K2LiteError"),
        ("backends", "from . import base"),
        ("k2lite", "from .text import stream\nimport k2lite.offload"),
    ],
)
def test_the_import_rule_lets_right_ones_pass(folder: str, line: str) -> None:
    package = folder if folder == "k2lite" else f"k2lite.{folder}"
    assert _wrong_imports(line, package, folder) == []


def test_device_names_stay_in_their_own_files() -> None:
    for path in python_files(*ORDER):
        for name, home in DEVICE_HOMES.items():
            source = path.read_text(encoding="utf-8")
            assert path.name == home or not _names_device(source, name, _package_of(path)), f"{name} in {path}"


def _names_device(source: str, name: str, package: str) -> bool:
    """In whatever way it is written: as an attribute, an import, or in a text."""
    return name in source or any(f"{found}.".startswith(f"{name}.") for found in _imports(source, package))


@pytest.mark.parametrize(
    "line", ["x = torch.cuda.Event()", "from torch import cuda", "import torch.cuda", "'torch.cuda'"]
)
def test_the_device_rule_sees_a_name(line: str) -> None:
    assert _names_device(line, "torch.cuda", "k2lite.backends")
    assert not _names_device(line.replace("cuda", "nn"), "torch.cuda", "k2lite.backends")


def test_files_are_small_named_for_what_they_hold_and_explain_themselves() -> None:
    for path in python_files(*ORDER, "tools"):
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") <= MAX_LINES, f"{path} is longer than {MAX_LINES} lines"
        assert path.name not in VAGUE_NAMES, path
        assert ast.get_docstring(ast.parse(source)), f"{path} has no docstring"


def test_generated_parts_of_the_docs_are_up_to_date() -> None:
    """docs/structure.md and docs/commands.md come from the code."""
    result = subprocess.run(
        [sys.executable, "tools/generate_docs.py", "--check"], cwd=REPO, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_links_between_pages_lead_somewhere() -> None:
    for page in [REPO / "README.md", *REPO.glob("docs/*.md"), *REPO.glob("backends/*/README.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


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


def test_looking_at_a_folder_imports_neither_engine_nor_compiler() -> None:
    """Which would add half a second to the start of quantize."""
    code = (
        "import sys, k2lite.model_folder, k2lite.quant.quantizer, k2lite.backend_check\n"
        "heavy = {'k2lite.engine', 'k2lite.offload', 'k2lite.backends.cpu', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_who_skips_for_want_of_shared_is_told_how_many(tmp_path: Path) -> None:
    """The suite's own conftest in a checkout that has no ../shared beside it."""
    (tmp_path / "main" / "tests").mkdir(parents=True)
    for name in ("__init__.py", "conftest.py", "samples.py"):
        shutil.copy(REPO / "tests" / name, tmp_path / "main" / "tests")
    (tmp_path / "main" / "tests" / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(3))\ndef test_a(n, shared): pass\ndef test_b(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    result = subprocess.run(command, cwd=tmp_path / "main", capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "3 tests were skipped: needs ../shared" in result.stdout
