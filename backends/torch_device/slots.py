"""Slots for experts in a device's memory: one allocation, cut once, so that nothing is allocated while a model runs.

Invariant: `claim` tells the stream that will write a slot to start after the last kernel that reads it; nobody writes a
slot without it. Knows no experts.
"""

from __future__ import annotations

import torch

from .runtime import DeviceEvent, DeviceRuntime, DeviceStream

SLOT_ALIGNMENT = 256


def device_slot_bytes(nbytes: int) -> int:
    """What a slot for `nbytes` takes."""
    return -(-nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


class DeviceSlots:
    """`count` slots for `nbytes` each. A backend's kernels may want at most `max_slots` in one arena."""

    def __init__(self, runtime: DeviceRuntime, count: int, nbytes: int, max_slots: int | None = None) -> None:
        self.count = count
        self.slot_bytes = device_slot_bytes(nbytes)
        self._nbytes = nbytes
        self._per_arena = count if max_slots is None else min(max_slots, count)
        self._arenas = [
            runtime.empty(min(self._per_arena, count - first) * self.slot_bytes)
            for first in range(0, count, max(self._per_arena, 1))
        ]
        # the allocator may hand out what a kernel that was issued earlier still reads
        self._read_until: list[DeviceEvent | None] = [runtime.compute_stream().record()] * count

    def memory(self, slot: int) -> torch.Tensor:
        """A slot's bytes, uint8 [nbytes]."""
        at = slot % self._per_arena * self.slot_bytes
        return self._arenas[slot // self._per_arena][at : at + self._nbytes]

    def read_until(self, slot: int, event: DeviceEvent) -> None:
        """Whatever reads the slot now is over at `event`."""
        self._read_until[slot] = event

    def after_readers(self, slot: int, stream: DeviceStream) -> None:
        """What `stream` does from now on begins when all that reads the slot now is over."""
        event = self._read_until[slot]
        if event is not None:
            stream.wait(event)

    def claim(self, slot: int, stream: DeviceStream) -> torch.Tensor:
        """The slot's bytes, for `stream` to write."""
        self.after_readers(slot, stream)
        self._read_until[slot] = None
        return self.memory(slot)
