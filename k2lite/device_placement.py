"""The plan with an accelerator: trunk and KV lie in its memory, and experts multiply there, on the host, or split.

Invariant: what is chosen follows from the model and from memory sizes, never from a timing. Knows sizes; does not
execute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from k2lite.backends.base import Backend, Memory
from k2lite.backends.torch_device.backend import TorchDeviceBackend
from k2lite.backends.torch_device.slots import device_slot_bytes
from k2lite.offload.device_tier import FEWEST_SLOTS
from k2lite.offload.packed_source import expert_rooms
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.errors import BackendError, MemoryPlanError, RequestError
from k2lite.quant.quantization_plan import Matrix

from .backend_check import demand_multipliable
from .byte_sizes import gib
from .config import ModelConfig
from .hot_experts import HotExperts
from .kv_cache import LatentCache
from .placement import (
    DeviceShare,
    ExpertsOn,
    Placement,
    WeightBytes,
    budget_of,
    chunk_tokens,
    demand_formats,
    plan_memory,
    planned_context,
    ring_of,
    transient_bytes,
)

# What kernels and torch's allocator take beside what is planned.
DEVICE_HEADROOM_BYTES = 256 << 20
# Experts multiply on the accelerator if this share of them has room there. Below it more bytes cross the link a token
# than RAM gives the processor in the time, on every machine of facts/routing.md section 4 (share 0.5 hits 0.89, so a
# link of 25 GB/s carries what 227 GB/s of RAM do).
AUTO_DEVICE_SHARE = 0.5
PASSING_SHARE = 1 / 8
# Where a token's bits depend on its chunk, the chunk is part of the arithmetic, so no budget may choose it.
FIXED_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Accelerator:
    """An accelerator and what it is to do. `backend` multiplies there (`device`, or that with plain torch to fall back
    to), `host` what it does not; `hot` are experts by their use."""

    device: TorchDeviceBackend
    backend: Backend
    host: Backend
    vram_bytes: int | None = None
    experts_on: ExpertsOn | None = None
    hot: HotExperts | None = None


def plan_with_accelerator(
    config: ModelConfig,
    checkpoint: Checkpoint,
    accelerator: Accelerator,
    *,
    ram: Memory,
    context_tokens: int | None = None,
    ram_bytes: int | None = None,
    resident_experts: float | None = None,
    quantized: Mapping[str, Matrix] | None = None,
    sequences: int = 1,
) -> Placement:
    """As `plan_placement`, with trunk and KV in the accelerator's memory. `ram` is what the host has."""
    context = planned_context(config, context_tokens)
    changed = list((quantized or {}).values())
    backend = accelerator.backend
    weights = WeightBytes.of(config, checkpoint, changed)
    rooms = expert_rooms(checkpoint, backend)
    share = _share(config, weights, accelerator, max((room.nbytes for room in rooms), default=0), context, sequences)
    where = accelerator.experts_on or _chosen(weights, share)
    _demand_formats(checkpoint, accelerator, where, changed)
    chunk = share.chunk
    device = share.with_slots(where, weights)
    there = 0 if where == "host" else device.resident_slots
    fewest = min(config.num_experts_per_tok + 1, weights.experts)  # whatever goes there comes through RAM
    host = plan_memory(
        config,
        replace(weights, trunk=0, experts=max(fewest, weights.experts - there)),
        backend.name,
        arithmetic_of(accelerator, where, device.slots, chunk)
        + (f", trunk to {changed[0].target.name}" if changed else ""),
        context=context,
        budget=budget_of(ram, ram_bytes),
        resident_experts=resident_experts,
        sequences=sequences,
        chunk=chunk,
        kv_elsewhere=True,
    )
    # more may be in RAM at a time than stays there: what goes to the device comes through it
    ring = ring_of(config, host.slots) if where == "device" and weights.experts else host.ring_slots
    return replace(host, experts=weights.experts, ring_slots=ring, multiply_on=where, device=device)


def arithmetic_of(accelerator: Accelerator, where: ExpertsOn, slots: int, chunk: int) -> str:
    """The name of what decides the bits."""
    own, host = accelerator.backend.capabilities(), accelerator.host.capabilities()
    name = own.arithmetic
    if where == "device":
        name += ", experts on the device"
    elif where == "host":
        name += f", experts on the host by {host.arithmetic}"
    else:
        hot = _hot(accelerator)
        name += (
            f", {slots} experts on the device (set {hot.digest(slots)}), the others on the host by {host.arithmetic}"
        )
    return name if own.numerics.batch_invariant else f"{name}, prompts in chunks of {chunk}"


@dataclass(frozen=True)
class _Share:
    """The accelerator's memory before experts have any. `room` is how many slots fit."""

    share: DeviceShare
    chunk: int
    room: int

    def with_slots(self, where: ExpertsOn, weights: WeightBytes) -> DeviceShare:
        if where == "host" or not weights.experts:
            return self.share
        if where == "split":
            return replace(self.share, slots=min(self.room, weights.experts))
        if self.room < FEWEST_SLOTS:
            raise MemoryPlanError(
                f"{weights.where}: trunk and KV leave {gib(self.room * self.share.slot_bytes)} of "
                f"{gib(self.share.budget_bytes)} on {self.share.name}, and experts that multiply there take "
                f"{FEWEST_SLOTS} slots of {gib(self.share.slot_bytes)}; a smaller --context, a larger --vram or "
                "--experts-on host"
            )
        slots = min(self.room, weights.experts + FEWEST_SLOTS)
        passing = max(FEWEST_SLOTS, min(16, int(slots * PASSING_SHARE)))
        return replace(self.share, slots=slots, passing_slots=FEWEST_SLOTS if slots > weights.experts else passing)


def _share(
    config: ModelConfig, weights: WeightBytes, accelerator: Accelerator, expert: int, context: int, sequences: int
) -> _Share:
    """Trunk, KV and a step in the accelerator's memory. Raises MemoryPlanError with the sum."""
    backend, name = accelerator.backend, accelerator.device.runtime.name
    budget = budget_of(backend.memory(), accelerator.vram_bytes, "--vram")
    kv = sequences * LatentCache.nbytes_for(config, context)
    left = budget - weights.trunk - kv - DEVICE_HEADROOM_BYTES
    invariant = backend.capabilities().numerics.batch_invariant
    chunk = chunk_tokens(config, context, left) if invariant else FIXED_CHUNK_TOKENS
    step = transient_bytes(config, chunk)
    if left < step:
        raise MemoryPlanError(
            f"{weights.where}: trunk {gib(weights.trunk)} + KV {gib(kv)} + a step {gib(step)} + headroom "
            f"{gib(DEVICE_HEADROOM_BYTES)} = {gib(budget - left + step)}, and {name} may give "
            f"{gib(budget)}; a smaller --context or --trunk int8_g128 needs less, a larger --vram gives more"
        )
    slot = device_slot_bytes(expert)
    share = DeviceShare(name, budget, weights.trunk, kv, step, DEVICE_HEADROOM_BYTES, 0, 0, slot)
    return _Share(share, chunk, (left - step) // slot if slot else 0)


def _chosen(weights: WeightBytes, share: _Share) -> ExpertsOn:
    """From sizes alone."""
    fits = weights.experts and share.room >= FEWEST_SLOTS and share.room >= AUTO_DEVICE_SHARE * weights.experts
    return "device" if fits else "host"


def _demand_formats(
    checkpoint: Checkpoint, accelerator: Accelerator, where: ExpertsOn, changed: Sequence[Matrix]
) -> None:
    """Raise BackendError for what one of the two can't multiply of its part."""
    backend, host = accelerator.backend, accelerator.host
    if where != "host":
        demand_formats(checkpoint, backend, changed)
    if where == "device":
        return
    own, theirs = backend.capabilities(), host.capabilities()
    taken = theirs.formats_of(experts=True)
    demand_multipliable(
        checkpoint, f"{backend.name} with experts on {host.name}", replace(own, expert_formats=taken, max_experts=None)
    )
    missing = {matrix.target.name for matrix in changed} - own.formats
    if missing:
        raise BackendError(f"backend {backend.name} can't multiply {', '.join(sorted(missing))}")


def _hot(accelerator: Accelerator) -> HotExperts:
    if accelerator.hot is None:
        raise RequestError(
            "experts split between host and device need --hot-experts FILE: statistics of an earlier run (run "
            "--statistics FILE makes them) say which are the hottest"
        )
    return accelerator.hot
