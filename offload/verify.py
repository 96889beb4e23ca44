"""Reads every expert and trunk tensor once at the drive's speed, and compares or computes checksums.

Invariant: memory stays small however large the model is; a piece that can't be read or differs is a line of the result,
never an end of the work. Knows no arithmetic.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.checksums import checksum, expert_piece
from k2lite.quant.errors import CheckpointError
from k2lite.quant.read_ahead import read_ahead

from .slots import Arena, slot_bytes_for
from .store import ExpertRead, ExpertStore

SLOTS = 6
TRUNK_AHEAD = 3
TRUNK_THREADS = 2


@dataclass
class Verification:
    """`checksums` of all pieces that could be read and did not differ, by name; `known` of them were compared with the
    manifest, the others are new. `problems` are sentences."""

    checksums: dict[str, str] = field(default_factory=dict)
    known: int = 0
    read_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify(store: ExpertStore, report: Callable[[int, str], None]) -> Verification:
    """Read all of the store's checkpoint. `report` hears bytes and what was read."""
    found = Verification()
    for name, digest, nbytes, problem in chain(_trunk(store.checkpoint), _experts(store)):
        _note(found, store.checkpoint, name, digest, nbytes, problem, report)
    return found


def _note(
    found: Verification,
    checkpoint: Checkpoint,
    name: str,
    digest: str | None,
    nbytes: int,
    problem: str | None,
    report: Callable[[int, str], None],
) -> None:
    found.read_bytes += nbytes
    if problem is not None:
        found.problems.append(problem)
    elif digest is not None:
        found.checksums[name] = digest
        found.known += name in checkpoint.checksums
    report(found.read_bytes, name)


Piece = tuple[str, str | None, int, str | None]  # name, checksum, bytes, problem


def _trunk(checkpoint: Checkpoint) -> Iterator[Piece]:
    def read(name: str) -> Piece:
        piece = checkpoint.trunk_piece(name)
        try:
            tensor = checkpoint.trunk(name)
        except CheckpointError as error:
            return piece, None, 0, str(error)
        return piece, checksum([tensor]), tensor.nbytes, None

    with ThreadPoolExecutor(TRUNK_THREADS, thread_name_prefix="verify") as workers:
        yield from read_ahead(checkpoint.schema.trunk, read, TRUNK_AHEAD, workers)


def _experts(store: ExpertStore) -> Iterator[Piece]:
    """Experts in the order in which they are read; the store compares those whose checksum is known."""
    arena = Arena(SLOTS, slot_bytes_for(store.checkpoint))
    done: queue.SimpleQueue[ExpertRead] = queue.SimpleQueue()
    keys = store.checkpoint.expert_keys()
    free = list(range(SLOTS))
    under_way = 0
    exhausted = False
    while under_way or not exhausted:
        while free and not exhausted:
            key = next(keys, None)
            if key is None:
                exhausted = True
                break
            store.start(key, arena, free.pop(), done.put)
            under_way += 1
        if not under_way:
            return
        read = done.get()
        under_way -= 1
        name = expert_piece(read.key)
        if read.weights is None:
            yield name, None, 0, str(read.error)
        else:
            yield name, store.checkpoint.checksums.get(name) or checksum(read.weights), read.nbytes, None
        free.append(read.slot)
