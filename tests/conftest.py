"""Fixtures every folder of the suite uses, and the count of what was skipped for want of ../shared."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests import samples

# Kernels for a card that is not here run in Triton's interpreter; it is read once, when Triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"
NEEDS_SHARED = "needs ../shared (golden vectors and configs), which is absent here"

# a shell's background jobs ignore Ctrl-C, and so would the children that tests send it to
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="the full counts of what is sampled otherwise (make soak)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--soak"):
        samples.take_full_counts()


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether full counts were asked for."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden vectors, configs and traces beside the checkout; the test is skipped without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip(NEEDS_SHARED)
    return SHARED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests did not run for want of ../shared: a quiet skip looks like a pass."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if NEEDS_SHARED in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests were skipped: {NEEDS_SHARED}", yellow=True)
