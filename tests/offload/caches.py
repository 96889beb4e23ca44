"""A cache over a small folder with chosen slots, and drives that fail, dawdle and shuffle when they are told to."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from k2lite.model_folder import open_model
from k2lite.offload.cache import ExpertCache
from k2lite.offload.direct_files import PAGE_BYTES, DirectFiles
from k2lite.offload.policies import make_policy
from k2lite.offload.slots import Arena, slot_bytes_for
from k2lite.offload.store import ExpertStore

SAID: list[str] = []


class FaultyFiles(DirectFiles):
    """`fault(path, offset)` runs before a read and may raise or sleep; `spoil(path, view, count)` runs after it, may
    change the bytes and says how many came; `most` is what a read brings at most."""

    def __init__(self, fault: Callable[[Path, int], None] | None = None, most: int | None = None) -> None:
        super().__init__(SAID.append)
        self.fault = fault
        self.most = most
        self.spoil: Callable[[Path, memoryview, int], int] | None = None
        self.reads: list[tuple[Path, int]] = []

    def read(self, path: Path, offset: int, view: memoryview) -> int:
        self.reads.append((path, offset))
        if self.fault is not None:
            self.fault(path, offset)
        if offset % PAGE_BYTES or len(view) % PAGE_BYTES:
            raise OSError(errno.EINVAL, "a direct read must be whole pages")  # as the strictest drives say
        count = super().read(path, offset, view)
        if self.spoil is not None:
            count = self.spoil(path, view, count)
        return count if self.most is None else min(count, self.most)


class Gate:
    """A fault that holds all reads until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def __call__(self, _path: Path, _offset: int) -> None:
        if not self.opened.wait(20):
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


def io_error(_path: Path, _offset: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def random_delays(seed: int, most_s: float = 0.002) -> Callable[[Path, int], None]:
    drawn, lock = random.Random(seed), threading.Lock()

    def wait(_path: Path, _offset: int) -> None:
        with lock:
            seconds = drawn.random() * most_s
        time.sleep(seconds)

    return wait


def open_cache(
    folder: Path,
    slots: int,
    *,
    ring: int = 1,
    files: DirectFiles | None = None,
    prefetch_width: int = 0,
    mirror: Path | None = None,
    threads: int = 4,
    policy: str = "lru",
) -> ExpertCache:
    config, checkpoint = open_model(folder)
    checkpoint.raise_for_problems()
    store = ExpertStore(
        checkpoint, mirror=mirror, files=files or DirectFiles(SAID.append), say=SAID.append, threads=threads
    )
    return ExpertCache(
        store,
        Arena(slots, slot_bytes_for(checkpoint)),
        config.moe_layers,
        config.n_routed_experts,
        policy=make_policy(policy, config.moe_layers, config.n_routed_experts, max(1, slots - ring)),
        ring=ring,
        prefetch_width=prefetch_width,
    )
