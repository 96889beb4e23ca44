"""Puts a plan with an accelerator into practice: which source brings the experts, and where they multiply.

Invariant: the three ways of DESIGN: `device`, bytes move to the accelerator; `host`, the processor multiplies from RAM;
`split`, a fixed set was put on the accelerator when the model was loaded, the others are the processor's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from k2lite.backends.base import Backend
from k2lite.backends.fallback import FallbackBackend
from k2lite.backends.torch_device.pinned import PinnedPages
from k2lite.backends.torch_device.slots import DeviceSlots
from k2lite.offload.cache import ExpertCache
from k2lite.offload.device_tier import DeviceTier
from k2lite.offload.packed_copy import reads_in_turn
from k2lite.offload.packed_source import PackedSource, expert_kinds, expert_rooms
from k2lite.offload.pinned_arena import PinnedArena
from k2lite.offload.slots import Arena
from k2lite.offload.source import ExpertSource
from k2lite.offload.store import ExpertStore
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.types import ExpertKey, ExpertWeights

from .device_placement import Accelerator
from .expert_work import BesideTrunk, ExpertPlaces, OnHost
from .placement import Placement


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
    if placement.multiply_on == "device":
        slots = device_slots(accelerator, cache.store.checkpoint, device.slots)
        rooms = expert_rooms(cache.store.checkpoint, trunk)
        if not isinstance(cache.arena, PinnedArena):
            raise TypeError("experts are sent from a PinnedArena")
        tier = DeviceTier(
            cache,
            cache.arena,
            trunk.expert_link() if isinstance(trunk, FallbackBackend) else accelerator.device.expert_link(),
            slots,
            passing=device.passing_slots,
            sends_back=not any(room.repacked for room in rooms),
        )
        return tier, BesideTrunk(trunk)
    source = PackedSource(cache, accelerator.host) if placement.packs_experts else cache
    if placement.multiply_on == "host" or accelerator.hot is None:
        return source, OnHost(trunk, accelerator.host)
    hottest = accelerator.hot.hottest(device.slots)
    slots = device_slots(accelerator, cache.store.checkpoint, device.slots)
    hot = _put_there(hottest, cache.store, trunk, slots)
    cache.elsewhere = hot.keys()
    return source, OnHost(trunk, accelerator.host, hot, cache.counters)


def device_slots(accelerator: Accelerator, checkpoint: Checkpoint, count: int) -> DeviceSlots:
    """Laid out by the backend where all experts are alike and become other bytes; else bytes that take any of them."""
    runtime, backend = accelerator.device.runtime, accelerator.backend
    kinds = expert_kinds(checkpoint)
    rooms = [backend.expert_slot(kind) for kind in kinds]
    if count and len(kinds) == 1 and rooms[0].repacked:
        return DeviceSlots(runtime, backend.alloc_slots(kinds[0], count))
    nbytes = max((room.nbytes for room in rooms), default=0)
    most = min((room.max_slots for room in rooms if room.max_slots is not None), default=None)
    return DeviceSlots.of_bytes(runtime, count, nbytes, most)


def _put_there(
    keys: Sequence[ExpertKey], store: ExpertStore, backend: Backend, slots: DeviceSlots
) -> dict[ExpertKey, ExpertWeights]:
    """Read experts and put them into slots for good. Raises CheckpointError."""
    there: dict[ExpertKey, ExpertWeights] = {}
    for read in reads_in_turn(store, list(keys)):
        assert read.weights is not None
        there[read.key] = backend.pack_expert(read.weights, slots.memory(len(there)))
    return there
