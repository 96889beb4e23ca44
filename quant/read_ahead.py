"""Runs an iterator in a worker thread, a few items ahead: the disk reads while the CPU works."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def read_ahead(items: Iterable[T], depth: int, worker: ThreadPoolExecutor) -> Iterator[T]:
    """The same items in the same order, `depth` of them made or being made before they are taken. `worker` has one
    thread; what the iterator raises is raised here."""
    iterator = iter(items)
    pending: deque[Future[T | object]] = deque(worker.submit(next, iterator, _END) for _ in range(depth))
    while True:
        item = pending.popleft().result()
        if item is _END:
            return
        pending.append(worker.submit(next, iterator, _END))
        yield item  # type: ignore[misc]
