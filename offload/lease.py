"""A lease of an `ExpertCache`: groups of experts as they become readable, in waves where they don't fit at once.

Invariant: whatever happens, release leaves every slot with an owner: the policy, the ring, or a read that is under way.
"""

from __future__ import annotations

import _thread
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from k2lite.quant.errors import MemoryPlanError
from k2lite.quant.types import ExpertKey, ExpertWeights

from .source import Lease
from .uninterrupted import uninterrupted

if TYPE_CHECKING:
    from .cache import ExpertCache
    from .held import Held


# In waves a group is small, so that its slots are free for the next reads soon.
WAVE_EXPERTS = 2


# The contract of a lease, each sentence a test in tests/offload/test_lease.py:
# * A lease is a context manager and is released exactly once, at the end of its block.
# * Its views are valid until then; in a lease of more experts than there is room for, or with less than all to keep,
#   a group's views are valid until the next group is asked for. Asking a released lease for more is a programmer's
#   error (RuntimeError).
# * `ready` yields every expert asked for exactly once, resident ones first, the rest as they arrive; in waves, a few at
#   a time, and what has arrived before what is resident.
# * All misses that have a slot are submitted when the lease is made, before the first group is asked for.
# * Prefetch takes no lease, may be refused, and never takes a slot from a leased or a resident expert.
# * More experts than slots come in waves; where not even one slot can be had, it is MemoryPlanError, never a dead-lock.
# * A failed read raises in the thread that leases, naming file, layer and expert; the cache stays usable.
# * Each expert asked for is counted once.
class CacheLease(Lease):
    """`keep`: the keys worth keeping, None: all."""

    def __init__(self, cache: ExpertCache, keys: Sequence[ExpertKey], keep: Collection[ExpertKey] | None) -> None:
        self._cache = cache
        self._keep = keep
        self._asked = len(keys)
        self._held: dict[ExpertKey, Held] = {}
        self._todo: deque[ExpertKey] = deque()
        self._waiting: list[Held] = []
        self._released = False
        try:
            with uninterrupted():
                self._take(keys)
        except BaseException:
            self.release()
            raise
        self.in_waves = bool(self._todo) or (keep is not None and len(keep) < len(keys))

    def _take(self, keys: Sequence[ExpertKey]) -> None:
        for key in keys:
            held = self._cache.pin(key)
            if held is None:
                self._todo.append(key)
            else:
                self._held[key] = held
        self._waiting = [held for held in self._held.values() if held.weights is None]
        for layer in {key.layer for key in keys}:
            self._cache.settle(layer)
        self._submit()

    def ready(self) -> Iterator[Mapping[int, ExpertWeights]]:
        self._demand_open()
        here = deque(held for held in self._held.values() if held.weights is not None)
        self._waiting = [held for held in self._waiting if held.weights is None]
        while here or self._waiting or self._todo:
            self._demand_open()
            with uninterrupted():
                self._submit()
            if not here and not self._waiting and not self._cache.is_reading:
                raise MemoryPlanError(
                    f"layer {self._todo[0].layer}: no slot can be had for {len(self._todo)} experts "
                    f"({self._cache.room}); ask for fewer at once or give the experts more memory"
                )
            self._cache.collect(wait=not here and not any(map(_is_over, self._waiting)))
            here.extendleft(self._arrived())  # first what another read waits for the slot of
            count = min(len(here), WAVE_EXPERTS) if self.in_waves else len(here)
            if count:
                yield from self._group([here.popleft() for _ in range(count)])

    def _arrived(self) -> list[Held]:
        """Take what can be read now out of what is waited for. Raises where a read has failed."""
        over = [held for held in self._waiting if _is_over(held)]
        self._waiting = [held for held in self._waiting if not _is_over(held)]
        for held in over:
            if held.error is not None:
                raise held.error
        for held in [held for held in over if held.weights is None]:
            # a guess that was being cancelled when it was asked for: read it again
            del self._held[held.key]
            self._todo.append(held.key)
        return [held for held in over if held.weights is not None]

    def release(self) -> None:
        if self._released:
            raise RuntimeError("a lease was released twice")
        with uninterrupted():
            self._released = True
            self._give_back(list(self._held.values()))
            self._todo.clear()

    def __del__(self) -> None:
        # Ctrl-C may come when the lease is made and before its block is entered: nobody else can give it back then
        interrupted = False
        while not getattr(self, "_released", True):
            try:
                self.release()
            except KeyboardInterrupt:
                interrupted = True
        if interrupted:  # nothing can be raised from here, so it comes again a moment later
            threading.Timer(0.001, _thread.interrupt_main).start()

    def _group(self, members: Sequence[Held]) -> Iterator[Mapping[int, ExpertWeights]]:
        if self._keep is not None and not self._todo:
            self._cache.read_on(members[0].key.layer, self._asked)
        for held in members:
            if held.in_ring and self._keeps(held.key):
                self._cache.keep(held)
        yield {held.key.expert: held.weights for held in members if held.weights is not None}
        if not self._released and self.in_waves:
            with uninterrupted():
                self._give_back([held for held in members if held.in_ring])

    def _submit(self) -> None:
        while self._todo:
            key = self._todo[0]
            # a read that another lease began is waited for like one's own
            held = self._cache.pin(key)
            held = held or self._cache.fetch(key, keep=self._keeps(key))
            if held is None:
                return
            self._todo.popleft()
            self._held[key] = held
            self._waiting.append(held)

    def _give_back(self, members: Iterable[Held]) -> None:
        for held in members:
            del self._held[held.key]
            self._cache.unpin(held)

    def _keeps(self, key: ExpertKey) -> bool:
        return self._keep is None or key in self._keep

    def _demand_open(self) -> None:
        if self._released:
            raise RuntimeError("a lease was used after its release")


def _is_over(held: Held) -> bool:
    return held.read is None
