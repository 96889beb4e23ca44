"""Threads that read: demand before speculation, speculation only while no demand is queued or under way.

Work is a group of pieces that begin, are hastened and are cancelled together. Knows neither files nor experts.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence

from .uninterrupted import uninterrupted


class Group:
    """Pieces of one read. `urgent`: somebody waits for it."""

    def __init__(self, pieces: Sequence[Callable[[], None]], *, urgent: bool) -> None:
        self.pieces = tuple(pieces)
        self.urgent = urgent


class _Shared:
    """What the threads see. They hold no reference to the pool, so that dropping the pool ends them."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.queues: dict[bool, deque[tuple[Group, Callable[[], None]]]] = {True: deque(), False: deque()}
        self.running = 0
        self.running_urgent = 0
        self.closed = False
        self.busy_s = 0.0
        self.busy_since: float | None = None

    def take(self) -> tuple[Callable[[], None], bool] | None:
        """The next piece and whether it is urgent; None when the pool is closed. Waits. `end` must follow."""
        with self.changed:
            while not self.closed:
                urgent = bool(self.queues[True])
                if urgent or (self.queues[False] and not self.running_urgent):
                    _, piece = self.queues[urgent].popleft()
                    self.running += 1
                    self.running_urgent += urgent
                    if self.busy_since is None:
                        self.busy_since = time.perf_counter()
                    return piece, urgent
                self.changed.wait()
        return None

    def end(self, urgent: bool) -> None:
        with self.changed:
            self.running -= 1
            self.running_urgent -= urgent
            if not self.running and not self.queues[True] and self.busy_since is not None:
                self.busy_s += time.perf_counter() - self.busy_since
                self.busy_since = None
            if urgent and not self.running_urgent:
                self.changed.notify_all()  # speculation may go on


def _work(shared: _Shared) -> None:
    while (taken := shared.take()) is not None:
        piece, urgent = taken
        try:
            piece()
        finally:
            shared.end(urgent)
        del taken, piece


def _stop(shared: _Shared) -> None:
    with shared.changed:
        shared.closed = True
        shared.queues[True].clear()
        shared.queues[False].clear()
        shared.changed.notify_all()


class ReadPool:
    """`threads` readers. A piece must not raise. `close` lets running pieces finish and drops the rest."""

    def __init__(self, threads: int) -> None:
        self._shared = _Shared()
        self._finalizer = weakref.finalize(self, _stop, self._shared)
        self._threads = [
            threading.Thread(target=_work, args=(self._shared,), name=f"k2lite-read-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, group: Group) -> None:
        shared = self._shared
        with shared.changed:
            shared.queues[group.urgent].extend((group, piece) for piece in group.pieces)
            shared.changed.notify(len(group.pieces))

    def hasten(self, group: Group) -> None:
        """Somebody waits for a speculative group now: what has not begun goes before all other speculation."""
        self._move(group)
        group.urgent = True

    def cancel(self, group: Group) -> int:
        """Drop the pieces of a speculative group that have not begun; how many those are."""
        return self._move(group, drop=True)

    def _move(self, group: Group, *, drop: bool = False) -> int:
        shared = self._shared
        with shared.changed:
            waiting = [item for item in shared.queues[False] if item[0] is group]
            if waiting:
                shared.queues[False] = deque(item for item in shared.queues[False] if item[0] is not group)
                if not drop:
                    shared.queues[True].extend(waiting)
                    shared.changed.notify_all()
        return len(waiting)

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one piece was under way."""
        shared = self._shared
        with uninterrupted(), shared.changed:
            running = time.perf_counter() - shared.busy_since if shared.busy_since is not None else 0.0
            return shared.busy_s + running

    def close(self) -> None:
        self._finalizer()
        for thread in self._threads:
            thread.join()
