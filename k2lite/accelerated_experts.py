"""Puts a plan with an accelerator into practice: which source brings the experts, and where they multiply.

Invariant: the three ways of DESIGN: `device`, bytes move to the accelerator; `host`, the processor multiplies from RAM;
`split`, a fixed set was put on the accelerator when the model was loaded, the others are the processor's.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence

from k2lite.backends.base import Backend
from k2lite.backends.torch_device.pinned import PinnedPages
from k2lite.backends.torch_device.slots import DeviceSlots
from k2lite.offload.cache import ExpertCache
from k2lite.offload.device_tier import DeviceTier
from k2lite.offload.packed_source import expert_rooms
from k2lite.offload.pinned_arena import PinnedArena
from k2lite.offload.slots import Arena, slot_bytes_for
from k2lite.offload.source import ExpertSource
from k2lite.offload.store import ExpertRead, ExpertStore
from k2lite.quant.types import ExpertKey, ExpertWeights

from .device_placement import Accelerator
from .expert_work import BesideTrunk, ExpertPlaces, OnHost
from .placement import Placement

READ_SLOTS = 4


def device_arena(accelerator: Accelerator, placement: Placement, say: Callable[[str], None]) -> Arena:
    """The host's arena; with experts that are sent to the device, one whose pages are locked."""
    if placement.multiply_on != "device":
        return Arena(placement.slots, placement.slot_bytes)
    return PinnedArena(placement.slots, placement.slot_bytes, PinnedPages(accelerator.device.runtime, say))


def device_experts(
    accelerator: Accelerator, cache: ExpertCache, placement: Placement
) -> tuple[ExpertSource, ExpertPlaces]:
    """What the model asks for experts, and where they multiply. Raises what `telling` tells where memory is short."""
    device, trunk = placement.device, accelerator.backend
    if device is None:
        raise ValueError("the plan has no accelerator")
    rooms = expert_rooms(cache.store.checkpoint, trunk) if device.slots else []
    nbytes = max((room.nbytes for room in rooms), default=0)
    most = min((room.max_slots for room in rooms if room.max_slots is not None), default=None)
    if placement.multiply_on == "device":
        slots = DeviceSlots(accelerator.device.runtime, device.slots, nbytes, most)
        if not isinstance(cache.arena, PinnedArena):
            raise TypeError("experts are sent from a PinnedArena")
        tier = DeviceTier(
            cache,
            cache.arena,
            accelerator.device.expert_link(),
            slots,
            passing=device.passing_slots,
            sends_back=not any(room.repacked for room in rooms),
        )
        return tier, BesideTrunk(trunk)
    if placement.multiply_on == "host" or accelerator.hot is None:
        return cache, OnHost(trunk, accelerator.host)
    hottest = accelerator.hot.hottest(device.slots)
    slots = DeviceSlots(accelerator.device.runtime, device.slots, nbytes, most)
    hot = _put_there(hottest, cache.store, trunk, slots)
    cache.elsewhere = hot.keys()
    return cache, OnHost(trunk, accelerator.host, hot, cache.counters)


def _put_there(
    keys: Sequence[ExpertKey], store: ExpertStore, backend: Backend, slots: DeviceSlots
) -> dict[ExpertKey, ExpertWeights]:
    """Read experts and put them into slots for good. Raises CheckpointError."""
    arena = Arena(READ_SLOTS, slot_bytes_for(store.checkpoint))
    done: queue.SimpleQueue[ExpertRead] = queue.SimpleQueue()
    free, todo, under_way = list(range(READ_SLOTS)), list(keys)[::-1], 0
    there: dict[ExpertKey, ExpertWeights] = {}
    while todo or under_way:
        while free and todo:
            store.start(todo.pop(), arena, free.pop(), done.put)
            under_way += 1
        read = done.get()
        under_way -= 1
        free.append(read.slot)
        if read.weights is None:
            raise read.error or RuntimeError(f"{read.key} was not read")
        there[read.key] = backend.pack_expert(read.weights, slots.memory(len(there)))
    return there
