"""The plan: what must be in memory, how many experts fit beside it, and the arithmetic that decides the bits.

Made before anything is loaded, printed in one line, and kept to. What must be there is planned first; the arena of
experts takes the rest. Knows sizes; does not execute.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from k2lite.backends.base import Backend, Memory
from k2lite.offload.packed_copy import PackedCopy
from k2lite.offload.packed_source import packing_bytes
from k2lite.offload.slots import slot_bytes_for
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.errors import BackendError, ContextLengthError, MemoryPlanError, RequestError
from k2lite.quant.quantization_plan import Matrix

from .backend_check import demand_multipliable
from .byte_sizes import gib
from .config import ModelConfig
from .kv_cache import LatentCache

DEFAULT_CONTEXT_TOKENS = 32 * 1024
# Python, torch and what they allocate on the way.
HEADROOM_BYTES = 1 << 30
# Without --ram this share of the machine's memory stays free for others.
SPARE_SHARE = 0.03
# Slots for experts that only pass through: enough reads under way to keep a drive busy, also between two layers.
RING_SLOTS, RING_SHARE = 16, 1 / 24
MAX_CHUNK_TOKENS, EASY_CHUNK_TOKENS = 4096, 32


ExpertsOn = Literal["host", "device", "split"]


@dataclass(frozen=True)
class DeviceShare:
    """Bytes by purpose in the memory of the accelerator `name`. `slots` is how many experts have room there,
    `passing_slots` of them for those that pass through; with experts on the host there is none. `beside_bytes` come on
    top for each slot of the largest arena, which has `arena_slots` at most (None: all)."""

    name: str
    budget_bytes: int
    trunk_bytes: int
    kv_bytes: int
    transient_bytes: int
    headroom_bytes: int
    slots: int
    passing_slots: int
    slot_bytes: int
    beside_bytes: int = 0
    arena_slots: int | None = None

    @property
    def arena_bytes(self) -> int:
        """Of all arenas, and what multiplying takes beside them."""
        return self.slots * self.slot_bytes + self._largest(self.slots) * self.beside_bytes

    def room(self, nbytes: int) -> int:
        """How many slots fit into so many bytes."""
        if not self.slot_bytes:
            return 0
        slots = nbytes // (self.slot_bytes + self.beside_bytes)
        most = self._largest(slots)
        return max(slots, (nbytes - most * self.beside_bytes) // self.slot_bytes) if most < slots else slots

    def _largest(self, slots: int) -> int:
        return slots if self.arena_slots is None else min(slots, self.arena_slots)

    @property
    def resident_slots(self) -> int:
        return self.slots - self.passing_slots

    @property
    def total_bytes(self) -> int:
        return self.arena_bytes + self.trunk_bytes + self.kv_bytes + self.transient_bytes + self.headroom_bytes

    def __str__(self) -> str:
        passing = f", {self.passing_slots} of them to pass through" if self.passing_slots else ""
        experts = f", {self.slots} slots for experts {gib(self.arena_bytes)}{passing}" if self.slots else ""
        return (
            f"on {self.name}: trunk {gib(self.trunk_bytes)}, KV {gib(self.kv_bytes)}{experts}; "
            f"{gib(self.total_bytes)} of {gib(self.budget_bytes)}"
        )


@dataclass(frozen=True)
class Placement:
    """Bytes by purpose in RAM, and the name of the arithmetic. `slots` is how many of the model's `experts` have room
    at once, `ring_slots` of them for those that pass through; `packs_experts`, whether they become other bytes or go to
    another memory before they multiply. With an accelerator, `device` has trunk and KV, and RAM has none of them."""

    backend: str
    arithmetic: str
    context_tokens: int
    prefill_chunk_tokens: int
    trunk_bytes: int
    experts_bytes: int
    kv_bytes: int
    transient_bytes: int
    headroom_bytes: int
    experts: int
    slots: int
    ring_slots: int
    slot_bytes: int
    budget_bytes: int
    packs_experts: bool = False
    sequences: int = 1
    multiply_on: ExpertsOn = "host"
    device: DeviceShare | None = None

    @property
    def arena_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def total_bytes(self) -> int:
        """All that the process will take."""
        return self.arena_bytes + self.trunk_bytes + self.kv_bytes + self.transient_bytes + self.headroom_bytes

    @property
    def everything_fits(self) -> bool:
        return self.slots + (self.device.resident_slots if self.device else 0) >= self.experts

    @property
    def host_multiplies(self) -> bool:
        """Whether anything of the model does so in RAM."""
        if self.device is None:
            return True
        there = {"host": 0, "split": self.device.slots, "device": self.experts}[self.multiply_on]
        return there < self.experts

    @property
    def all_trunk_bytes(self) -> int:
        """Wherever it lies."""
        return self.trunk_bytes + (self.device.trunk_bytes if self.device else 0)

    def experts_on(self, layer: int) -> ExpertsOn:  # noqa: ARG002
        """Where a layer's experts multiply; every layer answers alike."""
        return self.multiply_on

    def __str__(self) -> str:
        if self.device is not None:
            return (
                f"backend {self.backend} ({self.arithmetic}); {self.device}; in RAM: {self.slots} of {self.experts} "
                f"experts {gib(self.arena_bytes)}; KV for {_contexts(self.sequences, self.context_tokens)}; prompts in "
                f"chunks of {self.prefill_chunk_tokens}; {gib(self.total_bytes)} of {gib(self.budget_bytes)}"
            )
        kept = (
            f"all {self.experts} experts {gib(self.arena_bytes)}"
            if self.everything_fits
            else f"{self.slots} of {self.experts} experts {gib(self.arena_bytes)} (the others stay on the drive)"
        )
        return (
            f"backend {self.backend} ({self.arithmetic}); in RAM: trunk {gib(self.trunk_bytes)}, {kept}, "
            f"KV for {_contexts(self.sequences, self.context_tokens)} {gib(self.kv_bytes)}; prompts in chunks of "
            f"{self.prefill_chunk_tokens}; {gib(self.total_bytes)} of {gib(self.budget_bytes)}"
        )


@dataclass(frozen=True)
class WeightBytes:
    """What a plan must know of a model's weights: `where` they are, bytes of trunk and experts, `slot` of one expert's
    room, and how many `experts` there are."""

    where: str
    trunk: int
    experts_bytes: int
    slot: int
    experts: int

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        checkpoint: Checkpoint,
        changed: Collection[Matrix] = (),
        packed: PackedCopy | None = None,
    ) -> WeightBytes:
        """`changed` are the trunk's matrices that are converted while loading; `packed` has the experts if they are not
        read from the checkpoint."""
        return cls(
            where=str(checkpoint.folder),
            trunk=checkpoint.trunk_bytes + sum(matrix.nbytes - matrix.source.nbytes for matrix in changed),
            experts_bytes=checkpoint.experts_bytes if packed is None else packed.nbytes,
            slot=slot_bytes_for(checkpoint) if packed is None else packed.slot_bytes,
            experts=len(config.moe_layers) * config.n_routed_experts,
        )


def plan_placement(
    config: ModelConfig,
    checkpoint: Checkpoint,
    backend: Backend,
    *,
    context_tokens: int | None = None,
    ram_bytes: int | None = None,
    resident_experts: float | None = None,
    quantized: Mapping[str, Matrix] | None = None,
    sequences: int = 1,
    packed: PackedCopy | None = None,
) -> Placement:
    """Decide for this machine, or raise: ContextLengthError for a context the model was not made for, BackendError for
    a format the backend can't multiply, RequestError for a number out of range, MemoryPlanError with the sum where
    memory is short.

    `ram_bytes` is what the process may take (default: what the machine can spare). `resident_experts` fixes the slots:
    a share of all experts (a float of at most 1) or their number (an int). `quantized` are the trunk's matrices that
    are converted while loading. `sequences` is how many KV caches of the whole context there may be at once.
    `packed` has the experts as the backend packs them, so that no room is needed to do so."""
    context = planned_context(config, context_tokens)
    changed = list((quantized or {}).values())
    demand_formats(checkpoint, backend, changed)
    return plan_memory(
        config,
        WeightBytes.of(config, checkpoint, changed, packed),
        backend.name,
        arithmetic_name(backend, changed[0].target.name if changed else None),
        context=context,
        budget=budget_of(backend.memory(), ram_bytes),
        resident_experts=resident_experts,
        packing=packing_bytes(checkpoint, backend) if packed is None else 0,
        sequences=sequences,
    )


def budget_of(memory: Memory, asked: int | None, option: str = "--ram") -> int:
    """What may be taken of a memory. Raises MemoryPlanError where more is asked for than there is."""
    if asked is None:
        return spare_bytes(memory)
    if asked > memory.available_bytes:
        raise MemoryPlanError(
            f"{option} {gib(asked)} is more than the {gib(memory.available_bytes)} of memory that is available"
            + ("; k2lite doesn't swap" if option == "--ram" else "")
        )
    return asked


def spare_bytes(memory: Memory) -> int:
    """What k2lite takes unasked: what is available, but for a little."""
    return max(0, memory.available_bytes - int(SPARE_SHARE * memory.total_bytes))


def planned_context(config: ModelConfig, tokens: int | None) -> int:
    """The context in tokens. Raises ContextLengthError for one that the model was not made for."""
    longest = config.max_position_embeddings
    if tokens is not None and not 1 <= tokens <= longest:
        raise ContextLengthError(f"context of {tokens} tokens asked for; this model takes 1 to {longest}")
    return min(DEFAULT_CONTEXT_TOKENS, longest) if tokens is None else tokens


def plan_memory(
    config: ModelConfig,
    weights: WeightBytes,
    backend: str,
    arithmetic: str,
    *,
    context: int,
    budget: int,
    resident_experts: float | None = None,
    packing: int = 0,
    sequences: int = 1,
    chunk: int | None = None,
    kv_elsewhere: bool = False,
    elsewhere: int = 0,
) -> Placement:
    """Share `budget` bytes: what must be there first, experts in what is left. `packing` bytes are for experts that are
    packed. `chunk` tokens of a prompt if that is decided already. `elsewhere` experts have room on an accelerator.
    Raises RequestError, MemoryPlanError."""
    kv = 0 if kv_elsewhere else sequences * LatentCache.nbytes_for(config, context)
    fewest = min(config.num_experts_per_tok + 1, weights.experts)
    most = max(fewest, weights.experts - elsewhere)  # whatever goes elsewhere comes through RAM
    first = weights.trunk + kv + packing + HEADROOM_BYTES + fewest * weights.slot
    chunk = chunk_tokens(config, context, budget - first) if chunk is None else chunk
    transient = transient_bytes(config, chunk) + packing
    room = max(0, budget - weights.trunk - kv - transient - HEADROOM_BYTES) // weights.slot
    fixed = None if resident_experts is None else min(most, _wanted(resident_experts, weights.experts, fewest))
    least = fewest if fixed is None else fixed
    if room < least:
        needed = weights.trunk + kv + transient + HEADROOM_BYTES + least * weights.slot
        raise MemoryPlanError(
            f"{weights.where}: trunk {gib(weights.trunk)} + KV for {_contexts(sequences, context)} {gib(kv)} + a step "
            f"{gib(transient)} + headroom {gib(HEADROOM_BYTES)} + {least} experts {gib(least * weights.slot)} = "
            f"{gib(needed)}, and the budget is {gib(budget)}; a smaller --context needs less"
        )
    slots = min(room, most) if fixed is None else fixed
    return Placement(
        backend=backend,
        arithmetic=arithmetic,
        context_tokens=context,
        prefill_chunk_tokens=chunk,
        trunk_bytes=weights.trunk,
        experts_bytes=weights.experts_bytes,
        kv_bytes=kv,
        transient_bytes=transient,
        headroom_bytes=HEADROOM_BYTES,
        experts=weights.experts,
        slots=slots,
        ring_slots=0 if slots == most else ring_of(config, slots),
        slot_bytes=weights.slot,
        budget_bytes=budget,
        packs_experts=packing > 0,
        sequences=sequences,
    )


def ring_of(config: ModelConfig, slots: int) -> int:
    """How many of the slots are for what only passes through, where not everything fits."""
    return max(1, min(RING_SLOTS, slots - config.num_experts_per_tok, int(RING_SHARE * slots)))


def transient_bytes(config: ModelConfig, tokens: int) -> int:
    """What a step of so many tokens takes for a while: experts' results [T, K, D] and a few rows of every width."""
    active = config.num_experts_per_tok
    heads = config.num_attention_heads * (config.qk_nope_head_dim + config.latent_dim + config.v_head_dim)
    ffn = max(config.intermediate_size, active * config.moe_intermediate_size)
    return 4 * tokens * ((active + 6) * config.hidden_size + 3 * ffn + 2 * heads)


def chunk_tokens(config: ModelConfig, context: int, left: int) -> int:
    """The largest chunk of a prompt, a power of two: each chunk reads most experts once, so fewer chunks are faster,
    but beyond an easy size it may take an eighth of the `left` bytes at most."""
    chunk = MAX_CHUNK_TOKENS
    while chunk > 1:
        takes = transient_bytes(config, chunk)
        if chunk < 2 * context and takes <= left and (chunk <= EASY_CHUNK_TOKENS or takes <= left / 8):
            return chunk
        chunk //= 2
    return chunk


def _wanted(resident_experts: float, experts: int, fewest: int) -> int:
    is_share = isinstance(resident_experts, float)
    if resident_experts <= 0 or (is_share and resident_experts > 1):
        raise RequestError(
            f"resident_experts is {resident_experts}; expected a share above 0 and up to 1.0, or a number of experts"
        )
    count = min(experts, round(resident_experts * experts) if is_share else int(resident_experts))
    if count < fewest:
        raise RequestError(
            f"resident_experts {resident_experts} makes {count} slots; one layer's choice and one more take {fewest}"
        )
    return count


def arithmetic_name(backend: Backend, trunk: str | None) -> str:
    """The backend's, and the format that the trunk is converted to while loading, if it is."""
    name = backend.capabilities().arithmetic
    return name if trunk is None else f"{name}, trunk to {trunk}"


def demand_formats(checkpoint: Checkpoint, backend: Backend, changed: Collection[Matrix] = ()) -> None:
    """Raise BackendError for a folder that the backend can't multiply once `changed` is converted."""
    demand_multipliable(checkpoint, backend.name, backend.capabilities())
    for name in sorted({matrix.target.name for matrix in changed}):
        demand_trunk_format(backend, name)


def demand_trunk_format(backend: Backend, name: str) -> None:
    takes = backend.capabilities().formats
    if name not in takes:
        raise BackendError(f"backend {backend.name} can't multiply {name}; it takes {', '.join(sorted(takes))}")


def _contexts(sequences: int, tokens: int) -> str:
    return f"{tokens} tokens" if sequences == 1 else f"{sequences} x {tokens} tokens"
