"""Sequences of finished requests, kept so that a request that begins like one of them computes only the rest.

Invariant: what a kept sequence holds is exactly what prefilling its ids would give, so answers don't change. Only the
scheduler's thread touches it.
"""

from __future__ import annotations

from k2lite.engine import Engine, Sequence


class PrefixCache:
    """Keeps up to `keep` sequences beside those in use, the least recently used goes first."""

    def __init__(self, engine: Engine, *, keep: int) -> None:
        self._engine = engine
        self._keep = keep
        self._kept: list[Sequence] = []  # the most recently used last

    @property
    def tokens(self) -> int:
        return sum(len(sequence.ids) for sequence in self._kept)

    def take(self, ids: list[int]) -> Sequence:
        """A sequence that holds as long a beginning of `ids` as is known, but not its last token: its logits begin the
        answer."""
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
        while len(self._kept) > self._keep:
            self._kept.pop(0).close()


def shared_tokens(old: list[int], new: list[int]) -> int:
    """Tokens with which both begin."""
    low, high = 0, min(len(old), len(new))
    while low < high:  # slices compare much faster than a loop over tokens
        middle = (low + high + 1) // 2
        low, high = (middle, high) if old[low:middle] == new[low:middle] else (low, middle - 1)
    return low
