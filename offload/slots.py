"""The arena: one piece of page-aligned memory, allocated once, cut into slots that each hold any expert.

Pages are touched as slots fill. Knows bytes; not which expert is in which slot.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch

from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.types import Extent

from .direct_files import PAGE_BYTES

HUGE_PAGE_BYTES = 2 << 20


def rounded_out(extent: Extent) -> tuple[int, int]:
    """First byte and length of the whole pages that hold an extent."""
    start = extent.offset // PAGE_BYTES * PAGE_BYTES
    end = -(-(extent.offset + extent.nbytes) // PAGE_BYTES) * PAGE_BYTES
    return start, end - start


def run_bytes(extents: Iterable[Extent]) -> int:
    """Bytes of a slot that an expert with these extents fills."""
    return sum(rounded_out(extent)[1] for extent in extents)


def slot_bytes_for(checkpoint: Checkpoint) -> int:
    """Bytes of a slot that holds any routed expert of the checkpoint."""
    return max((run_bytes(checkpoint.expert_extents(key)) for key in checkpoint.expert_keys()), default=PAGE_BYTES)


class Arena:
    """`slots` slots of `slot_bytes` (a multiple of the page) each."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        if slot_bytes % PAGE_BYTES:
            raise ValueError(f"slots of {slot_bytes} bytes are no whole pages")
        self.slots = slots
        self.slot_bytes = slot_bytes
        # private: Python's default is shared memory, which gives no page back and has no huge ones
        self._map = mmap.mmap(-1, max(slots * slot_bytes, PAGE_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and slot_bytes >= HUGE_PAGE_BYTES:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(self._map)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._used: set[int] = set()

    @property
    def nbytes(self) -> int:
        return self.slots * self.slot_bytes

    def memory(self, slot: int) -> memoryview:
        """A slot's bytes, for a read to fill."""
        self._used.add(slot)
        return self._memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def tensor(self, slot: int) -> torch.Tensor:
        """A slot's bytes, uint8 [slot_bytes]."""
        self._used.add(slot)
        return self._bytes[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def is_used(self, slot: int) -> bool:
        """Whether it was ever asked for, and not given back since."""
        return slot in self._used

    def give_back(self, slot: int) -> bool:
        """Return a slot's pages to the system, if it was ever filled: whether it was. Its bytes are lost, and come back
        as zeros when it is used again."""
        if slot not in self._used:
            return False
        self._used.remove(slot)
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, slot * self.slot_bytes, self.slot_bytes)
        return True
