"""One CPU backend for all tests: its kernels compile once."""

from __future__ import annotations

import pytest

from k2lite.backends.cpu.backend import CpuBackend


@pytest.fixture(scope="session")
def cpu() -> CpuBackend:
    return CpuBackend()


@pytest.fixture(scope="session")
def rounded() -> CpuBackend:
    return CpuBackend(activations="bf16")
