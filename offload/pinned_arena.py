"""The arena when a device copies from it by itself: a slot's pages are locked when it is first sent, exactly those.

Invariant: pages are unlocked before they go back to the system.
"""

from __future__ import annotations

import torch

from k2lite.backends.torch_device.pinned import PinnedPages

from .slots import Arena


class PinnedArena(Arena):
    """`pages` keeps what is locked."""

    def __init__(self, slots: int, slot_bytes: int, pages: PinnedPages) -> None:
        super().__init__(slots, slot_bytes)
        self._pages = pages

    def locked(self, slot: int) -> torch.Tensor | None:
        """A slot's bytes, uint8 [slot_bytes], locked; None where the system doesn't allow it."""
        memory = self.tensor(slot)
        return memory if self._pages.hold(memory) else None

    def give_back(self, slot: int) -> bool:
        if not self.is_used(slot):
            return False
        self._pages.release(self.tensor(slot))
        return super().give_back(slot)

    def close(self) -> None:
        """Unlock all. No copy may be under way."""
        self._pages.close()
