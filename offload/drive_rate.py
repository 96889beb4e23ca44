"""How fast a drive reads: experts in random order as the store reads them, or, before there are any, pages of a file
that is written for it. Nothing is computed meanwhile."""

from __future__ import annotations

import os
import queue
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from k2lite.quant.errors import RequestError
from k2lite.quant.types import ExpertKey

from .direct_files import DirectFiles
from .read_pool import Group, ReadPool
from .slots import Arena
from .store import READ_BYTES, READ_THREADS, ExpertRead, ExpertStore

IN_FLIGHT = 4
# Of the file for `folder_rate`: more than a drive's own cache holds, and written in a second or two.
TRIAL_BYTES = 512 << 20


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
    arena = Arena(IN_FLIGHT, store.slot_bytes)
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


def folder_rate(folder: Path, *, seconds: float = 1.0, size: int = TRIAL_BYTES, seed: int = 0) -> float:
    """Bytes a second of the drive that `folder` lies on, with as many and as large requests as the store makes. Writes
    a file of `size` bytes there and takes it away again. Raises RequestError where that can't be done."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".k2lite-drive-", dir=folder) as file:
            block = random.Random(seed).randbytes(READ_BYTES)  # nothing that a file system could compress
            for _ in range(0, size, READ_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return _random_read_rate(Path(file.name), size // READ_BYTES, seconds, seed)
    except OSError as error:
        raise RequestError(f"{folder}: its drive can't be measured: {error.strerror or error}") from error


def _random_read_rate(path: Path, blocks: int, seconds: float, seed: int) -> float:
    """`blocks` of READ_BYTES in random order, again and again until the time is over."""
    files, pool = DirectFiles(), ReadPool(READ_THREADS)
    arena = Arena(READ_THREADS, READ_BYTES)
    done: queue.SimpleQueue[tuple[int, int | OSError]] = queue.SimpleQueue()
    order = random.Random(seed)

    def start(slot: int) -> None:
        offset = READ_BYTES * order.randrange(blocks)

        def read() -> None:
            try:
                done.put((slot, files.read(path, offset, arena.memory(slot))))
            except OSError as error:
                done.put((slot, error))

        pool.submit(Group([read], urgent=True))

    try:
        began, nbytes = time.perf_counter(), 0
        for slot in range(arena.slots):
            arena.tensor(slot).fill_(0)  # touched, so that no page fault is timed
            start(slot)
        while time.perf_counter() - began < seconds:
            slot, found = done.get()
            if isinstance(found, OSError):
                raise found
            nbytes += found
            start(slot)
        return nbytes / (time.perf_counter() - began)
    finally:
        pool.close()
        files.close()
