"""The accelerator's memory as the nearest tier: the experts whose next use is nearest stay there, the others pass
through a few slots on their way to the kernels.

An expert has its bytes there or in RAM, never in both for longer than it passes. One policy, the cache's, judges both
tiers. What stays changes places: its bytes are there already, and those of the victim go back into the slot in RAM that
it leaves, in the direction of the link that nobody waits for, one at a time. Where they can't go back (pages that can't
be locked, bytes laid out anew) the victim is forgotten: weights are never written, so nothing is lost.
Invariant: bytes move, arithmetic does not: whatever is leased here multiplies on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from k2lite.backends.packing import views_in_slot
from k2lite.backends.torch_device.expert_link import ExpertLink
from k2lite.backends.torch_device.runtime import DeviceEvent
from k2lite.backends.torch_device.slots import DeviceSlots
from k2lite.quant.types import ExpertKey, ExpertWeights

from .cache import ExpertCache
from .pinned_arena import PinnedArena
from .source import ForwardingSource, Lease
from .uninterrupted import uninterrupted

FEWEST_SLOTS = 2


@dataclass(eq=False)
class OnDevice:
    """An expert in a device slot. `pins` counts leases."""

    key: ExpertKey
    slot: int
    weights: ExpertWeights
    arrived: DeviceEvent
    pins: int = 0


@dataclass(frozen=True)
class Leaving:
    """A victim on its way back to RAM; until it is there it can be used where it was."""

    expert: OnDevice
    host_slot: int
    weights: ExpertWeights
    event: DeviceEvent


class DeviceTier(ForwardingSource):
    """`slots` of which `passing` are for experts that only pass through (at least FEWEST_SLOTS). `sends_back`: slots
    hold the bytes as stored, so a victim's can go back."""

    def __init__(
        self,
        cache: ExpertCache,
        arena: PinnedArena,
        link: ExpertLink,
        slots: DeviceSlots,
        *,
        passing: int,
        sends_back: bool = True,
    ) -> None:
        super().__init__(cache)
        if not FEWEST_SLOTS <= passing <= slots.count:
            raise ValueError(f"{passing} of {slots.count} slots to pass through; at least {FEWEST_SLOTS} are needed")
        self.cache, self.arena, self.link, self.slots = cache, arena, link, slots
        self._slot_bytes = slots.memory(0).nbytes
        # on the device parts begin on boundaries of their own, and a slot in RAM may be too tight for that
        self._sends_back = sends_back and self._slot_bytes <= arena.slot_bytes
        self._room = slots.count - passing
        self._free = deque(range(slots.count))
        self._table: dict[ExpertKey, OnDevice] = {}
        self._leaving: Leaving | None = None
        self._row = {layer: row for row, layer in enumerate(cache.stats.layers)}
        self._counters = cache.counters.device
        cache.elsewhere = self._table.keys()

    @property
    def resident_experts(self) -> int:
        return len(self._table)

    def holds(self, key: ExpertKey) -> bool:
        return key in self._table

    def lease(self, layer: int, experts: Sequence[int], keep: Collection[int] | None = None) -> Lease:
        self.land()
        return DeviceLease(self, layer, experts, keep)

    def close(self) -> None:
        try:
            self.land(wait=True)
        finally:
            super().close()
            self.arena.close()

    # -- what a lease calls ------------------------------------------------------------------------------------

    def pin(self, key: ExpertKey) -> OnDevice | None:
        """Lease an expert that is here."""
        held = self._table.get(key)
        if held is not None:
            held.pins += 1
            self._counters.hit_experts += 1
            self.counters.requested_experts += 1
            self.counters.hit_experts += 1
        return held

    def send(self, key: ExpertKey, weights: ExpertWeights) -> OnDevice:
        """Begin to copy a leased expert of the cache into a slot that is free; it stays its lease's."""
        slot = self._free.popleft()
        try:
            locked = self.arena.locked(self.cache.slot_of(key))
            sent = self.link.send(weights, self.slots, slot, locked=locked)
        except BaseException:
            self._free.appendleft(slot)
            raise
        self._counters.sent_experts += 1
        self._counters.sent_bytes += sum(matrix.nbytes for matrix in weights)
        return OnDevice(key, slot, sent.weights, sent.event, pins=1)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def unpin(self, experts: Iterable[OnDevice], computed: DeviceEvent | None) -> None:
        """End a lease of experts; whatever reads them is over at `computed` (None: the device is lost). What doesn't
        stay leaves its slot."""
        for held in experts:
            held.pins -= 1
            if computed is not None:
                self.slots.read_until(held.slot, computed)
            if self._table.get(held.key) is not held and not held.pins:
                self._free.append(held.slot)

    @uninterrupted()
    def admit(self, candidates: Sequence[OnDevice]) -> None:
        """Of the experts that passed and are no longer leased in RAM, keep those whose next use is nearer than a
        victim's. They have their slots still. Called when no copy that somebody waits for is under way."""
        for held in candidates:
            if len(self._table) < self._room:
                self._keep(held)
                host_slot = self.cache.hand_over(held.key)
                if host_slot is not None:
                    self.cache.take_back(host_slot, None)
        if self._room and self._leaving is None:
            self._exchange([held for held in candidates if held.key not in self._table])

    def land(self, *, wait: bool = False) -> None:
        """A victim that has arrived in RAM, and that nobody uses here, belongs there from now on."""
        leaving = self._leaving
        if leaving is None:
            return
        if wait:
            leaving.event.synchronize()
        if leaving.expert.pins or not leaving.event.query():
            return
        with uninterrupted():
            self._leaving = None
            self._forget(leaving.expert)
            self.cache.take_back(leaving.host_slot, (leaving.expert.key, leaving.weights))

    # -- bookkeeping -------------------------------------------------------------------------------------------

    def _exchange(self, candidates: Sequence[OnDevice]) -> None:
        """The best of the candidates for the worst of those here."""
        idle = [held for held in self._table.values() if not held.pins]
        if not candidates or not idle:
            return
        urgency = self.cache.policy.urgency([self._at(held) for held in (*candidates, *idle)])
        best = int(urgency[: len(candidates)].argmin())
        worst = len(candidates) + int(urgency[len(candidates) :].argmax())
        if urgency[best] >= urgency[worst]:
            return
        comer, victim = candidates[best], idle[worst - len(candidates)]
        host_slot = self.cache.hand_over(comer.key)
        if host_slot is None:
            return
        self._keep(comer)
        self._counters.demoted_experts += 1
        room = self.arena.locked(host_slot) if self._sends_back else None
        if room is not None:
            room = room[: self._slot_bytes]
            event = self.link.fetch(self.slots, victim.slot, room)
            self._leaving = Leaving(victim, host_slot, views_in_slot(victim.weights, room), event)
            self._counters.returned_bytes += room.numel()
            return
        self._forget(victim)
        self.cache.take_back(host_slot, None)

    def _keep(self, held: OnDevice) -> None:
        self._table[held.key] = held
        self._counters.promoted_experts += 1

    def _forget(self, held: OnDevice) -> None:
        del self._table[held.key]
        self._free.append(held.slot)

    def _at(self, held: OnDevice) -> tuple[int, int]:
        return self._row[held.key.layer], held.key.expert


class DeviceLease(Lease):
    """Experts that are on the device first, the others as they arrive in RAM and are sent on. Groups are handed out
    while their bytes are still on the way: the device waits for them, the thread does not."""

    def __init__(self, tier: DeviceTier, layer: int, experts: Sequence[int], keep: Collection[int] | None) -> None:
        self._tier, self._layer, self._keep = tier, layer, keep
        self._held: list[OnDevice] = []  # that passes
        self._sent: list[OnDevice] = []  # and may be under way
        self._released = False
        with uninterrupted():
            found = (tier.pin(ExpertKey(layer, expert)) for expert in experts)
            self._here = [held for held in found if held is not None]
        try:
            here = {held.key.expert for held in self._here}
            others = [expert for expert in experts if expert not in here]
            self._inner = tier.cache.lease(layer, others, keep)
        except BaseException:
            self._released = True
            tier.unpin(self._here, tier.link.computed())
            raise
        self.in_waves = self._inner.in_waves or len(others) > tier.free_slots

    def ready(self) -> Iterator[Mapping[int, ExpertWeights]]:
        self._demand_open()
        if self._here:
            yield {held.key.expert: held.weights for held in self._here}
        for group in self._inner.ready():
            todo = deque(group.items())
            while todo:
                self._demand_open()
                part = self._send(todo)
                yield {held.key.expert: held.weights for held in part}
                if self.in_waves and not self._released:
                    self._pass_on(part)
            if self._inner.in_waves and not self._released:
                self._arrive()  # the bytes in RAM go when the next group is asked for

    def release(self) -> None:
        if self._released:
            raise RuntimeError("a lease was released twice")
        self._released = True
        computed = None
        try:
            self._arrive()
            computed = self._tier.link.computed()
        finally:
            with uninterrupted():
                self._inner.release()
                if computed is not None:
                    self._tier.admit([held for held in self._held if self._is_worth_keeping(held)])
                self._tier.unpin((*self._here, *self._held), computed)

    def __del__(self) -> None:
        # Ctrl-C may come when the lease is made and before its block is entered
        if not getattr(self, "_released", True):
            self.release()

    def _send(self, todo: deque[tuple[int, ExpertWeights]]) -> list[OnDevice]:
        """Send what there is room for; the device waits for it."""
        part: list[OnDevice] = []
        # half of the room, so that the next part is on its way while this one is multiplied
        most = max(1, self._tier.free_slots // 2) if self.in_waves else len(todo)
        while todo and len(part) < most:
            expert, weights = todo.popleft()
            with uninterrupted():
                part.append(self._tier.send(ExpertKey(self._layer, expert), weights))
                self._held.append(part[-1])
                self._sent.append(part[-1])
        for held in part:
            self._tier.link.use(held.arrived)
        return part

    def _pass_on(self, part: Sequence[OnDevice]) -> None:
        """What was multiplied makes room, but for what may stay if there is room enough for the others."""
        computed = self._tier.link.computed()
        for held in part:
            if not (self._is_worth_keeping(held) and self._tier.free_slots >= FEWEST_SLOTS):
                with uninterrupted():
                    self._held.remove(held)
                    self._tier.unpin([held], computed)

    def _arrive(self) -> None:
        for held in self._sent:
            held.arrived.synchronize()
        self._sent.clear()

    def _is_worth_keeping(self, held: OnDevice) -> bool:
        return self._keep is None or held.key.expert in self._keep

    def _demand_open(self) -> None:
        if self._released:
            raise RuntimeError("a lease was used after its release")
