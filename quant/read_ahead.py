"""Works on the items of an iterator a few ahead: one thread makes them (the disk reads), others work on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(
    items: Iterable[T], work: Callable[[T], R], depth: int, reader: ThreadPoolExecutor, workers: ThreadPoolExecutor
) -> Iterator[R]:
    """What `work` makes of each item, in their order; `depth` of them are made or worked on before they are taken.
    `reader` has one thread; what the iterator or `work` raises is raised here."""
    iterator = iter(items)

    def begin_next() -> Future[R] | None:
        for item in iterator:
            return workers.submit(work, item)
        return None

    pending = deque(reader.submit(begin_next) for _ in range(depth))
    while (begun := pending.popleft().result()) is not None:
        pending.append(reader.submit(begin_next))
        yield begun.result()
