"""Engines on the stand-in device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch

import k2lite
from k2lite.backends.base import Capabilities
from k2lite.backends.reference import ReferenceBackend
from k2lite.backends.torch_device.backend import TorchDeviceBackend
from k2lite.device_placement import DEVICE_HEADROOM_BYTES
from k2lite.quant.types import QuantTensor

from .runtime import StandInRuntime

# The least that can be locked, where slots can't be and the small buffer can, or nothing can.
ONLY_THE_BUFFER, NOTHING = 1 << 20, 1 << 60


class StandInBackend(TorchDeviceBackend):
    """Its arithmetic is the reference backend's, so that this one's tokens are the oracle of its own."""

    name: ClassVar[str] = "stand-in"
    runtime: StandInRuntime

    def __init__(self, seed: int = 0, total_bytes: int = 1 << 30, *, pins: int = 0) -> None:
        super().__init__(StandInRuntime(seed, total_bytes, pins=pins))


class OtherHost(ReferenceBackend):
    """Another arithmetic than the device's: where an expert multiplied shows in the bits."""

    name: ClassVar[str] = "other host"

    def capabilities(self) -> Capabilities:
        return Capabilities(super().capabilities().formats, "one part in a thousand more")

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        return super().linear(x, weight) * 1.001


@contextmanager
def on_stand_in(
    folder: Path, seed: int = 0, *, device_slots: int | None = None, total_bytes: int = 1 << 30, pins: int = 0,
    host: ReferenceBackend | None = None, **options: object,
) -> Iterator[tuple[k2lite.Engine, StandInBackend]]:  # fmt: skip
    """A model whose trunk lies on a stand-in device that has room for `device_slots` experts beside it."""
    backend = StandInBackend(seed, total_bytes, pins=pins)
    options = {"context": 16, "host_backend": host or ReferenceBackend(), **options}
    if device_slots is not None:
        options["vram"] = vram_for(folder, device_slots, **options)
    engine = k2lite.load(folder, backend=backend, **options)  # type: ignore[arg-type]
    with engine:
        yield engine, backend


def vram_for(folder: Path, slots: int, **options: object) -> int:
    """The budget with room for exactly so many experts; the context is short, so a step takes the same then."""
    probe = k2lite.load(folder, backend=StandInBackend(), **options)  # type: ignore[arg-type]
    with probe:
        device = probe.placement.device
    assert device is not None
    return (
        device.trunk_bytes
        + device.kv_bytes
        + device.transient_bytes
        + DEVICE_HEADROOM_BYTES
        + slots * device.slot_bytes
    )
