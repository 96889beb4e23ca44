"""The demo folder, written once, and two ways to run the command: here, with streams of its own, or as a user does, as
another process."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from k2lite.cli import main
from k2lite.demo_checkpoint import write_random_demo
from tests.conftest import REPO

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "model"
    write_random_demo(folder)
    return folder


@pytest.fixture(scope="session")
def k2_process() -> Run:
    """A process of its own: 3 s for torch's start, so only where the process is the point."""

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


@pytest.fixture(scope="session")
def k2() -> Run:
    """In this process; an exception that `main` lets through is the test's."""

    def run(*arguments: object, input: str = "") -> subprocess.CompletedProcess[str]:
        command = list(map(str, arguments))
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        given = io.TextIOWrapper(io.BytesIO(input.encode()), encoding="utf-8")
        with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "stdin", given):
            code = main(command)
        return subprocess.CompletedProcess(command, code, _text(out), _text(err))

    return run


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()
