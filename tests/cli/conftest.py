"""The demo folder, written once, and a way to run the command as a user does: another process, its own streams."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from k2lite.demo_checkpoint import write_random_demo
from tests.conftest import REPO

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "model"
    write_random_demo(folder)
    return folder


@pytest.fixture(scope="session")
def k2() -> Run:
    def run(*arguments: object, input: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "k2lite", *map(str, arguments)],
            cwd=REPO,
            input=input,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run
