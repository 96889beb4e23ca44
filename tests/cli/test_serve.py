"""`k2lite serve` as a user starts and ends it, and each mistake in one line."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.cli.conftest import Run
from tests.conftest import REPO


def test_it_answers_until_ctrl_c(demo: Path) -> None:
    command = [sys.executable, "-m", "k2lite", "serve", str(demo), "--port", "0", "--context", "64"]
    with subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = next(match[0] for line in server.stderr if (match := re.search(r"http://127\.0\.0\.1:\d+", line)))
        models = httpx.get(f"{address}/v1/models", timeout=60).json()
        assert [model["id"] for model in models["data"]] == [demo.name]
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "clients need a key"),
        (["--port", "70000"], "--port is 70000"),
        (["--slots", "0"], "--slots must be 1 or more"),
        (["--api-key-file", "nowhere"], "nowhere: can't be read"),
        (["--prefix-dir", "none", "--prefix-size", "1GiB"], "--prefix-size has no effect"),
        (["--prefix-dir", "/proc/none"], "can't keep prefixes here"),
    ],
)
def test_a_mistake_is_one_line(k2: Run, arguments: list[str], said: str) -> None:
    result = k2("serve", *arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
