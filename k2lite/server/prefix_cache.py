"""Sequences of finished requests, kept so that a request that begins like one of them computes only the rest: the last
few in memory, all on the drive where there is a store.

Invariant: what a kept sequence holds is exactly what prefilling its ids would give, so answers don't change. Only the
scheduler's thread touches it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from k2lite.engine import Engine, Sequence

from .prefix_store import PrefixStore


class PrefixCache:
    """Keeps up to `keep` sequences in memory beside those in use, the least recently used goes first."""

    def __init__(self, engine: Engine, *, keep: int, store: PrefixStore | None = None) -> None:
        self._engine = engine
        self._keep = keep
        self._store = store
        self._kept: list[Sequence] = []  # the most recently used last

    @property
    def tokens(self) -> int:
        return sum(len(sequence.ids) for sequence in self._kept)

    @property
    def stored_bytes(self) -> int:
        return self._store.total_bytes if self._store else 0

    def take(self, ids: list[int], gone: Callable[[], bool]) -> tuple[Sequence, Future[None] | None]:
        """A sequence that holds as long a beginning of `ids` as is known, but not its last token: its logits begin the
        answer. Where more of it is on the drive than in memory, a future too: the sequence is to be left alone until it
        is done, which is soon if `gone` says that nobody waits any more."""
        sequence = self._from_memory(ids)
        stored = self._store.known(ids[:-1]) if self._store else 0
        if self._store is None or stored <= len(sequence.ids):
            return sequence, None
        return sequence, self._store.load(sequence, ids, stored, gone)

    def _from_memory(self, ids: list[int]) -> Sequence:
        best, shared = None, 0
        for sequence in self._kept:
            common = shared_tokens(sequence.ids, ids[:-1])
            if common >= max(shared, 1):
                best, shared = sequence, common
        if best is None:
            return self._engine.open()
        if shared < len(best.ids):
            return best.fork(shared)  # the other conversation goes on from its own end
        self._kept.remove(best)
        return best

    def give_back(self, sequence: Sequence) -> None:
        """Keep what a request has computed."""
        self._kept.append(sequence)
        if self._store:
            self._store.save(sequence)
        while len(self._kept) > self._keep:
            oldest = self._kept.pop(0)
            if self._store:
                self._store.forget(oldest)
            oldest.close()

    def drop(self, sequence: Sequence) -> None:
        """A request failed at it: nothing of it is kept that is not kept already."""
        if self._store:
            self._store.forget(sequence)
        sequence.close()

    def close(self) -> None:
        if self._store:
            self._store.close()


def shared_tokens(old: list[int], new: list[int]) -> int:
    """Tokens with which both begin."""
    low, high = 0, min(len(old), len(new))
    while low < high:  # slices compare much faster than a loop over tokens
        middle = (low + high + 1) // 2
        low, high = (middle, high) if old[low:middle] == new[low:middle] else (low, middle - 1)
    return low
