"""Which expert is in which slot, and who may use it when.

Most slots hold experts that the policy keeps (resident); a few, the ring, what passes through: prompts, guesses.
An expert in the ring becomes resident by changing places with a victim: no byte is copied. All bookkeeping is done in
the thread that leases; readers' threads only fill slots and queue what they finished. Never sees arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from k2lite.quant.types import ExpertKey, ExpertWeights

from .arrivals import Arrivals
from .governor import PrefetchGovernor
from .held import Held, Leased
from .lease import CacheLease
from .policies import Policy
from .policy import State
from .predictor import Predictor
from .slots import Arena
from .source import ExpertSource, Lease, SourceCounters
from .statistics import RouterStats
from .store import ExpertRead, ExpertStore
from .uninterrupted import uninterrupted

MIN_CHANCE = 0.5  # a guess that is wrong more often than not costs more than it hides
# Uses of each expert, on average, from which on a prompt touches half of a layer's experts and more.
MIN_USES = 2


class ExpertCache(ExpertSource):
    """Experts of `layers` in an arena of which the last `ring` slots are the ring. `shrink` leaves `fewest` slots."""

    def __init__(
        self,
        store: ExpertStore,
        arena: Arena,
        layers: Sequence[int],
        n_routed_experts: int,
        *,
        policy: Policy,
        ring: int,
        fewest: int = 1,
        prefetch_width: int = 0,
    ) -> None:
        self.stats = RouterStats(layers, n_routed_experts)
        self.policy = policy
        self.predictor = Predictor(self.stats)
        self.arena = arena
        self.store = store
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._layers = tuple(layers)
        self._table: dict[ExpertKey, Held] = {}
        self._guesses: dict[ExpertKey, Held] = {}  # those of the table that are guesses
        self._free = list(range(arena.slots - ring))[::-1]
        self._ring = list(range(arena.slots - ring, arena.slots))[::-1]
        self._slots_left, self._fewest = arena.slots, fewest
        self._residents = self._pinned_residents = self._reading = 0
        self._arrivals = Arrivals()
        self._counters = SourceCounters()
        self.governor = PrefetchGovernor(min(prefetch_width, ring), self._counters.prefetch)
        self._leased = Leased(self._table, self._layers)
        self._last: tuple[int, list[int]] | None = None  # the row that was observed last in decode, and its choice
        self.elsewhere: Collection[ExpertKey] = frozenset()  # those that a nearer tier holds: not to be read ahead

    @property
    def counters(self) -> SourceCounters:  # type: ignore[override]
        self._counters.read_s = self.store.busy_s
        return self._counters

    @property
    def resident_experts(self) -> int:
        """Experts that a lease would find, the ring not counted."""
        return self._residents

    # -- what the model calls ----------------------------------------------------------------------------------

    @uninterrupted()
    def observe(self, layer: int, ids: torch.Tensor, weights: torch.Tensor, *, recent: int | None = None) -> None:
        super().observe(layer, ids, weights)
        row = self._row[layer]
        if row == 0:
            self.governor.token_over()
        rows = ids if recent is None else ids[-recent:]
        chosen = sorted(set(rows.flatten().tolist()))
        self.policy.observe(row, chosen)
        if recent is None:
            self.predictor.observe(row, chosen)
        self._last = (row, chosen) if recent is None else None

    def lease(self, layer: int, experts: Sequence[int], keep: Collection[int] | None = None) -> Lease:
        keys = [ExpertKey(layer, expert) for expert in experts]
        if len(set(keys)) != len(keys):
            raise ValueError(f"layer {layer}: an expert is asked for twice in one lease: {sorted(experts)}")
        self._counters.requested_experts += len(keys)
        self.collect()
        if not keys:
            self.settle(layer)  # no key says of which layer the lease is
        lease = CacheLease(self, keys, None if keep is None else {ExpertKey(layer, expert) for expert in keep})
        if self._last is not None and self._last[0] == len(self._layers) - 1 and self.wants_hint(self._layers[0]):
            with uninterrupted():
                self._read_ahead(0, None, None)  # no router can say what the next token's first layer will use
        return lease

    def wants_hint(self, layer: int) -> bool:
        return layer in self._row and self.governor.width > 0

    @uninterrupted()
    def hint(self, layer: int, ranked: Sequence[int] | None) -> None:
        row = self._row[layer]
        before = self._last[1] if self._last is not None and self._last[0] == row - 1 else None
        self._read_ahead(row, before, ranked)

    @uninterrupted()
    def prompt_begins(self, tokens: int, active: int) -> None:
        self.collect()
        if tokens * active >= MIN_USES * self.stats.counts.shape[1]:
            self._read_most_of(0)

    def learned(self) -> dict[str, State]:
        return {
            f"policy.{self.policy.name}": self.policy.state(),
            "router": self.stats.state(),
            "predictor": self.predictor.state(),
        }

    @uninterrupted()
    def recall(self, learned: Mapping[str, State]) -> None:
        for name, owner in ((f"policy.{self.policy.name}", self.policy), ("router", self.stats)):
            if name in learned:
                owner.restore(learned[name])
        if "predictor" in learned:
            self.predictor.restore(learned["predictor"])

    @uninterrupted()
    def shrink(self, slots: int) -> int:
        self.collect()
        done = 0
        while done < slots and self._slots_left > self._fewest:
            if self._free:
                slot = self._free.pop()
            elif self._residents > self._pinned_residents:
                slot = self._evict(self.policy.victim(self._leased))
            else:
                break
            # a slot that was never filled frees nothing now, but must not be filled later
            done += self.arena.give_back(slot)
            self._slots_left -= 1
        return done

    def close(self) -> None:
        self.store.close()

    # -- what a lease calls ------------------------------------------------------------------------------------

    def pin(self, key: ExpertKey) -> Held | None:
        """Lease an expert that has a slot already, and count what it is."""
        held = self._table.get(key)
        if held is None:
            return None
        if held.is_guess:
            held.is_guess = False
            del self._guesses[key]
            if held.weights is not None:
                self._counters.prefetch.useful += 1
            else:
                self._counters.prefetch.late += 1
        elif held.weights is not None and not held.in_ring:
            self._counters.hit_experts += 1
        if held.read is not None:
            self.store.hasten(held.read)
        self._pin(held)
        return held

    def fetch(self, key: ExpertKey, *, keep: bool) -> Held | None:
        """Lease an expert that has no slot: begin to read it. None if no slot is to be had now."""
        if self._free:
            return self._pinned_read(key, self._free.pop(), in_ring=False)
        if keep and self._residents > self._pinned_residents:
            return self._pinned_read(key, self._evict(self.policy.victim(self._leased)), in_ring=False)
        if not self._ring:
            self._drop_guesses()
        if self._ring:
            return self._pinned_read(key, self._ring.pop(), in_ring=True)
        if self._residents > self._pinned_residents and not self._reading:
            # a ring that other leases hold, or none: better a lost resident than a lease that can't be served
            return self._pinned_read(key, self._evict(self.policy.victim(self._leased)), in_ring=False)
        return None

    @uninterrupted()
    def keep(self, held: Held) -> None:
        """A leased expert that came into the ring (it was a guess) becomes resident: it changes places with a free
        slot or a victim, if there is one."""
        if not held.in_ring or held.weights is None:
            return
        if self._free:
            self._ring.append(self._free.pop())
        elif self._residents > self._pinned_residents:
            self._ring.append(self._evict(self.policy.victim(self._leased)))
        else:
            return
        held.in_ring = False
        self._admit(held)

    def unpin(self, held: Held) -> None:
        """End a lease of an expert; what was only passing through leaves."""
        held.pins -= 1
        if held.pins:
            return
        if not held.in_ring and held.weights is not None:
            self._pinned_residents -= 1
        if held.in_ring and held.weights is not None:
            self._drop(held)

    @uninterrupted()
    def read_on(self, layer: int, asked: int) -> None:
        """A prompt has nothing left to ask of `layer`, of whose experts it used `asked`: of the next layer it will use
        as large a share, so the drive goes on there while this layer computes."""
        row = self._row[layer] + 1
        if row < len(self._layers) and asked >= MIN_CHANCE * self.stats.counts.shape[1]:
            self._read_most_of(row)

    @uninterrupted()
    def settle(self, layer: int) -> None:
        """The layer's experts are known now: guesses that were wrong make room."""
        for held in [held for held in self._guesses.values() if held.key.layer == layer]:
            self._drop_guess(held)

    # -- what a nearer tier calls -------------------------------------------------------------------------------

    def slot_of(self, key: ExpertKey) -> int:
        """Where a leased expert lies."""
        return self._table[key].slot

    @uninterrupted()
    def hand_over(self, key: ExpertKey) -> int | None:
        """An expert has gone to the nearer tier: its slot, which is the caller's until `take_back`. None where it is
        not resident, or leased."""
        held = self._table.get(key)
        if held is None or held.pins or held.in_ring or held.weights is None:
            return None
        self.policy.evict(self._row[key.layer], key.expert)
        self._residents -= 1
        del self._table[key]
        self._guesses.pop(key, None)
        return held.slot

    @uninterrupted()
    def take_back(self, slot: int, arrived: tuple[ExpertKey, ExpertWeights] | None) -> None:
        """A slot that was handed over comes back, empty or with another expert that had no slot here."""
        if arrived is None:
            self._free.append(slot)
            return
        key, weights = arrived
        if key in self._table:
            raise RuntimeError(f"{key} came back from the nearer tier and was here already")
        self._table[key] = Held(key, slot, in_ring=False, weights=weights)
        self._residents += 1
        self.policy.admit(self._row[key.layer], key.expert, ahead=False)

    def collect(self, *, wait: bool = False) -> None:
        """Take note of what the readers have finished; with `wait`, of at least one read."""
        if wait:
            began = time.perf_counter()
            self._arrivals.wait()
            self._counters.wait_s += time.perf_counter() - began
        with uninterrupted():
            for read in self._arrivals.take():
                self._finish(read)

    @property
    def is_reading(self) -> bool:
        return self._reading > 0

    @property
    def room(self) -> str:
        """How the slots are used, for a message."""
        leased, free = self._pinned_residents, len(self._free) + len(self._ring)
        return f"{self.arena.slots} slots: {leased} leased, {self._residents - leased} resident, {free} free"

    # -- bookkeeping -------------------------------------------------------------------------------------------

    def _read_ahead(self, row: int, before: Sequence[int] | None, ranked: Sequence[int] | None) -> None:
        """Begin to read the likeliest experts of a layer into free places of the ring."""
        self.collect()
        left = self.governor.width
        for expert, chance in self.predictor.guesses(row, before, ranked):
            if not left or not self._ring or chance < MIN_CHANCE:
                return
            key = ExpertKey(self._layers[row], expert)
            if key not in self._table and key not in self.elsewhere:
                left -= 1
                self._guess(key)

    def _read_most_of(self, row: int) -> None:
        """A prompt uses most of a layer: begin to read what has a free place, in the arena first, then in the ring."""
        if not self.governor.allows_any:
            return
        for expert in np.argsort(-self.stats.counts[row], kind="stable").tolist():
            if not self._free and not self._ring:
                return
            key = ExpertKey(self._layers[row], expert)
            if key not in self._table and key not in self.elsewhere:
                self._guess(key, in_ring=not self._free)

    def _guess(self, key: ExpertKey, *, in_ring: bool = True) -> None:
        self._counters.prefetch.issued += 1
        self._begin(key, (self._ring if in_ring else self._free).pop(), in_ring=in_ring, is_guess=True)

    def _pinned_read(self, key: ExpertKey, slot: int, *, in_ring: bool) -> Held:
        held = self._begin(key, slot, in_ring=in_ring)
        held.pins += 1
        return held

    def _begin(self, key: ExpertKey, slot: int, *, in_ring: bool, is_guess: bool = False) -> Held:
        held = Held(key, slot, in_ring, is_guess=is_guess)
        try:
            held.read = self.store.start(key, self.arena, slot, self._arrivals.notify, urgent=not is_guess)
        except BaseException:
            self._return_slot(held)
            raise
        self._table[key] = held
        if is_guess:
            self._guesses[key] = held
        self._reading += 1
        return held

    def _finish(self, read: ExpertRead) -> None:
        held = self._table[read.key]
        self._reading -= 1
        held.read = None
        if read.weights is None:
            if held.is_guess and read.error is not None:
                self._counters.prefetch.failed += 1
            held.error = read.error
            self._drop(held)
            return
        self._counters.read_experts += 1
        self._counters.read_bytes += read.nbytes
        held.weights = read.weights
        if not held.in_ring:
            self._admit(held)
        elif not held.pins and not held.is_guess:
            self._drop(held)  # its lease has gone

    def _pin(self, held: Held) -> None:
        held.pins += 1
        if held.pins == 1 and not held.in_ring and held.weights is not None:
            self._pinned_residents += 1

    def _admit(self, held: Held) -> None:
        self._residents += 1
        self._pinned_residents += held.pins > 0
        self.policy.admit(self._row[held.key.layer], held.key.expert)

    def _evict(self, victim: tuple[int, int]) -> int:
        row, expert = victim
        held = self._table.pop(ExpertKey(self._layers[row], expert))
        if self._guesses.pop(held.key, None) is not None:
            self._counters.prefetch.wasted += 1
            self._counters.prefetch.wasted_bytes += self.arena.slot_bytes
        if held.pins or held.in_ring or held.weights is None:
            raise RuntimeError(f"the policy {self.policy.name} evicts {held.key}, which is leased or not resident")
        self.policy.evict(row, expert)
        self._residents -= 1
        self._counters.evicted_experts += 1
        return held.slot

    def _drop_guesses(self) -> None:
        for held in [held for held in self._guesses.values() if held.in_ring]:
            self._drop_guess(held)

    def _drop_guess(self, held: Held) -> None:
        if held.read is not None:
            if not held.read.cancelled:
                self._counters.prefetch.wasted += 1
                self.store.cancel(held.read)
            return
        self._counters.prefetch.wasted += 1
        if not held.in_ring:  # it took nobody's place, and is resident by now
            held.is_guess = False
            del self._guesses[held.key]
            return
        self._counters.prefetch.wasted_bytes += self.arena.slot_bytes
        self._drop(held)

    def _drop(self, held: Held) -> None:
        held.weights = None
        del self._table[held.key]
        self._guesses.pop(held.key, None)
        self._return_slot(held)

    def _return_slot(self, held: Held) -> None:
        (self._ring if held.in_ring else self._free).append(held.slot)
