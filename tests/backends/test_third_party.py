"""Another's backend: installed into an environment of its own, found by name, used by flag, held to the suite."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import k2lite
from k2lite.demo_checkpoint import write_random_demo
from tests.conftest import REPO

PACKAGE = REPO / "tests" / "example_backend"
# What has nothing to do with where the package comes from is tested elsewhere; this is the way of a user.
PIP = ("install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that has the example, and k2lite and its libraries from where they are."""
    folder = tmp_path_factory.mktemp("environment")
    source = shutil.copytree(PACKAGE, folder / "source")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    interpreter = folder / "env" / "bin" / "python"
    libraries = next((folder / "env").glob("lib/python*/site-packages"))
    paths = [str(REPO), *site.getsitepackages()]
    (libraries / "outside.pth").write_text("\n".join(paths) + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(interpreter), *PIP, str(source)]
    result = subprocess.run(install, capture_output=True, text=True, env=_environment(), cwd=folder)
    assert result.returncode == 0, result.stderr
    return interpreter


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    return {**kept, "OMP_NUM_THREADS": "1"}  # small tensors: threads would only wait for one another


def run(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """k2lite in that environment, from a folder that holds no k2lite."""
    command = [str(python), "-m", "k2lite", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=_environment(), cwd=python.parent, timeout=200)


def test_it_is_listed_with_what_it_says_of_itself(python: Path) -> None:
    result = run(python, "backends", "--json")
    assert result.returncode == 0, result.stderr
    (row,) = [row for row in json.loads(result.stdout)["backends"] if row["name"] == "example"]
    assert row["ready"]
    assert row["reason"].startswith("numpy ")
    assert row["contract"] == 1
    assert "int4_g32" in row["formats"]
    assert row["group_sizes"] == [32, "channel"]
    assert row["evidence"] == "not tested"
    assert len(row["devices"]) == 1


def test_it_answers_by_flag(python: Path, tmp_path: Path) -> None:
    write_random_demo(tmp_path / "demo")
    arguments = ("-p", "1", "--raw", "--max-tokens", 2, "--temperature", 0, "--json")
    result = run(python, "run", tmp_path / "demo", "--backend", "example", *arguments)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    engine = k2lite.load(tmp_path / "demo", backend="reference")
    ids = engine.tokenizer.encode("1")
    assert answer["ids"] == list(map(int, engine.generate(ids, max_tokens=2, temperature=0)))
    assert answer["plan"]["backend"] == "example"
    assert answer["plan"]["arithmetic"] == "example: float64 products in numpy"


def test_the_suite_holds_it_and_writes_a_report(python: Path, tmp_path: Path) -> None:
    result = run(python, "backends", "test", "example", "--report", tmp_path / "report.json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert report["backend"] == "example"
    assert {case["operation"] for case in report["cases"]} >= {"linear", "attention", "router", "expert_ffn", "model"}
    assert all(case["passed"] for case in report["cases"])
    assert not [case for case in report["cases"] if "int4_g64" in case["case"]]  # its table does not claim it
