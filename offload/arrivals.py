"""What readers' threads have finished, for the thread that leases to take note of.

Waiting may be interrupted at any moment and loses nothing: it only looks; what has come is taken apart from it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from .store import ExpertRead


class Arrivals:
    """`notify` is called by readers. It holds no cache: a read that is under way must not keep a dropped one alive."""

    def __init__(self) -> None:
        self._done: queue.SimpleQueue[ExpertRead] = queue.SimpleQueue()
        self._any = threading.Event()

    def notify(self, read: ExpertRead) -> None:
        self._done.put(read)
        self._any.set()

    def wait(self) -> None:
        """Until something has come."""
        self._any.wait()

    def take(self) -> Iterator[ExpertRead]:
        """All that has come."""
        self._any.clear()
        while True:
            try:
                read = self._done.get_nowait()
            except queue.Empty:
                return
            yield read
