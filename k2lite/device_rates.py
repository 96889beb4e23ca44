"""Bandwidths of an accelerator for a plan: its memory, the link from pinned pages of the host, its arithmetic.

Only for telling: nothing that is chosen depends on them. Not run on hardware.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from k2lite.backends.torch_device.backend import TorchDeviceBackend
from k2lite.backends.torch_device.pinned import host_pages

SAMPLE_BYTES = 64 << 20
TIMES = 5


@dataclass(frozen=True)
class DeviceRates:
    """Bytes a second of the accelerator's memory (read or written) and of the link to it; operations a second."""

    memory: float
    link: float
    flops: float


def measure_device(backend: TorchDeviceBackend, sample_bytes: int = SAMPLE_BYTES) -> DeviceRates:
    """In about a second, with twice `sample_bytes` on the device."""
    memory, link = measure_memory_and_link(backend, sample_bytes)
    with backend.telling():
        side = max(256, int((sample_bytes // 8) ** 0.5) // 256 * 256)
        square = backend.upload(torch.ones(side, side, dtype=torch.bfloat16))
        flops = 2 * side**3 / _seconds(backend, lambda: square @ square)
    return DeviceRates(memory, link, flops)


def measure_memory_and_link(backend: TorchDeviceBackend, sample_bytes: int = SAMPLE_BYTES) -> tuple[float, float]:
    """Bytes a second of the device's memory and of the link to it."""
    runtime = backend.runtime
    stream = runtime.compute_stream()
    with backend.telling():
        source, target = backend.alloc(sample_bytes), backend.alloc(sample_bytes)
        pages = host_pages(sample_bytes)
        runtime.pin(pages)
        try:
            link = sample_bytes / _seconds(backend, lambda: runtime.copy(pages, target, stream))
        finally:
            runtime.unpin(pages)
        # a copy reads and writes
        return 2 * sample_bytes / _seconds(backend, lambda: target.copy_(source)), link


def _seconds(backend: TorchDeviceBackend, work: Callable[[], object]) -> float:
    """Of the fastest of a few times."""
    found = []
    for _ in range(TIMES):
        began = time.perf_counter()
        work()
        backend.runtime.compute_stream().record().synchronize()
        found.append(time.perf_counter() - began)
    return min(found)
