"""Slots for experts in a device's memory, allocated and cut once, so that nothing is allocated while a model runs.

Invariant: `claim` tells the stream that will write a slot to start after the last kernel that reads it; nobody writes a
slot without it. Knows no experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .runtime import DeviceEvent, DeviceRuntime, DeviceStream

SLOT_ALIGNMENT = 256


def device_slot_bytes(nbytes: int) -> int:
    """What a slot for `nbytes` takes."""
    return -(-nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


class DeviceSlots:
    """`memory` is what a backend's `pack_expert` takes for each slot: bytes, or one of its `alloc_slots`."""

    def __init__(self, runtime: DeviceRuntime, memory: Sequence[torch.Tensor]) -> None:
        self._memory = tuple(memory)
        # the allocator may hand out what a kernel that was issued earlier still reads
        self._read_until: list[DeviceEvent | None] = [runtime.compute_stream().record()] * self.count

    @classmethod
    def of_bytes(cls, runtime: DeviceRuntime, count: int, nbytes: int, max_slots: int | None = None) -> DeviceSlots:
        """Slots that take any expert of up to `nbytes`, at most `max_slots` in one allocation."""
        step, most = device_slot_bytes(nbytes), max(1, count if max_slots is None else min(max_slots, count))
        memory: list[torch.Tensor] = []
        for first in range(0, count, most):
            slots = min(most, count - first)
            arena = runtime.empty(slots * step)
            memory += [arena[at * step : at * step + nbytes] for at in range(slots)]
        return cls(runtime, memory)

    @property
    def count(self) -> int:
        return len(self._memory)

    def memory(self, slot: int) -> torch.Tensor:
        """A slot as `pack_expert` takes it; where it is bytes, uint8 [nbytes]."""
        return self._memory[slot]

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
