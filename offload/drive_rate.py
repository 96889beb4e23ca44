"""The store's own rate: experts read one after another, nothing computed meanwhile."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Sequence

from k2lite.quant.types import ExpertKey

from .slots import Arena, slot_bytes_for
from .store import ExpertRead, ExpertStore

IN_FLIGHT = 4


def store_rate(
    store: ExpertStore,
    *,
    keys: Sequence[ExpertKey] | None = None,
    seconds: float = 1.0,
    seed: int = 0,
    most_bytes: int = 4 << 30,
) -> float:
    """Bytes a second, over about `seconds`, of these experts in their order (default: of any in random order). Raises
    CheckpointError where an expert can't be read."""
    if keys is None:
        left = list(store.checkpoint.expert_keys())
        random.Random(seed).shuffle(left)
    else:
        left = list(reversed(keys))
    arena = Arena(IN_FLIGHT, slot_bytes_for(store.checkpoint))
    for slot in range(IN_FLIGHT):
        arena.tensor(slot).fill_(0)  # touched, so that no page fault is timed
    done: queue.SimpleQueue[ExpertRead] = queue.SimpleQueue()
    free = list(range(IN_FLIGHT))
    nbytes = under_way = 0
    began = time.perf_counter()
    while True:
        over = time.perf_counter() - began > seconds or nbytes >= most_bytes or not left
        while free and not over and left:
            store.start(left.pop(), arena, free.pop(), done.put)
            under_way += 1
        if not under_way:
            return nbytes / (time.perf_counter() - began)
        read = done.get()
        under_way -= 1
        if read.error is not None:
            while under_way:
                done.get()
                under_way -= 1
            raise read.error
        nbytes += read.nbytes
        free.append(read.slot)
