"""The arena when a device copies from it by itself: a slot's pages are locked when it is first sent, exactly those.

Invariant: pages are unlocked before they go back to the system.
"""

from __future__ import annotations

from k2lite.backends.torch_device.pinned import PinnedPages

from .slots import Arena


class PinnedArena(Arena):
    """`pages` keeps what is locked."""

    def __init__(self, slots: int, slot_bytes: int, pages: PinnedPages) -> None:
        super().__init__(slots, slot_bytes)
        self._pages = pages

    def lock(self, slot: int) -> bool:
        """Lock a slot's pages, if they are not; False where the system doesn't allow it."""
        return self._pages.hold(self.tensor(slot))

    def give_back(self, slot: int) -> None:
        self._pages.release(self.tensor(slot))
        super().give_back(slot)

    def close(self) -> None:
        """Unlock all. No copy may be under way."""
        self._pages.close()
