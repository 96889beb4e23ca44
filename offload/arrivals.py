"""What readers' threads have finished, for the thread that leases to take note of.

Waiting may be interrupted at any moment and loses nothing: it only takes a mark that something came; what has come is
taken apart from it. Built of SimpleQueue, whose waiting is one C call: Ctrl-C inside a threading.Event can leave its
lock taken for good.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator

from .store import ExpertRead


class Arrivals:
    """`notify` is called by readers. It holds no cache: a read that is under way must not keep a dropped one alive."""

    def __init__(self) -> None:
        self._done: queue.SimpleQueue[ExpertRead] = queue.SimpleQueue()
        self._marks: queue.SimpleQueue[None] = queue.SimpleQueue()

    def notify(self, read: ExpertRead) -> None:
        self._done.put(read)
        self._marks.put(None)

    def wait(self) -> None:
        """Until something has come; rarely, a mark is of what was taken before."""
        if self._done.empty():
            self._marks.get()

    def take(self) -> Iterator[ExpertRead]:
        """All that has come."""
        for waiting in (self._marks, self._done):
            while True:
                try:
                    item = waiting.get_nowait()
                except queue.Empty:
                    break
                if item is not None:
                    yield item
