"""Works on the items of an iterator a few ahead, in a pool of threads.

Each thread reads what it works on: several reads keep a drive busy, and while some threads wait for it others compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(items: Iterable[T], work: Callable[[T], R], depth: int, workers: ThreadPoolExecutor) -> Iterator[R]:
    """What `work` makes of each item, in their order; `depth` of them are begun before they are taken. Items are taken
    by the caller's thread. What `work` raises is raised here."""
    iterator = iter(items)

    def begin_next() -> Future[R] | None:
        for item in iterator:
            return workers.submit(work, item)
        return None

    pending = deque(begin_next() for _ in range(depth))
    while (begun := pending.popleft()) is not None:
        pending.append(begin_next())
        yield begun.result()
