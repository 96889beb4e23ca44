"""The plan: what must be in memory, where each layer's experts multiply, and the arithmetic that decides the bits.

Made before anything is loaded, printed in one line, and kept to. Knows sizes; does not execute.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from k2lite.backends.base import Backend
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.errors import ContextLengthError, MemoryPlanError
from k2lite.quant.formats import QuantFormat, Shape
from k2lite.quant.types import PROJECTIONS, ExpertKey

from .backend_check import demand_multipliable
from .config import ModelConfig
from .kv_cache import LatentCache

DEFAULT_CONTEXT_TOKENS = 32 * 1024
# Python, torch and a step's temporaries.
HEADROOM_BYTES = 1 << 30


@dataclass(frozen=True)
class Placement:
    """Bytes by purpose, the name of the arithmetic, and whether experts get other bytes or another memory once read."""

    backend: str
    arithmetic: str
    context_tokens: int
    trunk_bytes: int
    experts_bytes: int
    kv_bytes: int
    packs_experts: bool = False

    def experts_on(self, layer: int) -> Literal["host", "device", "split"]:  # noqa: ARG002
        """Where a layer's experts multiply; one device so far, so every layer answers alike."""
        return "host"

    def __str__(self) -> str:
        return (
            f"backend {self.backend} ({self.arithmetic}); in RAM: trunk {gib(self.trunk_bytes)}, "
            f"experts {gib(self.experts_bytes)}, KV for {self.context_tokens} tokens {gib(self.kv_bytes)}"
        )


def plan_placement(
    config: ModelConfig, checkpoint: Checkpoint, backend: Backend, *, context_tokens: int | None = None
) -> Placement:
    """Decide, or raise: ContextLengthError for a context the model was not made for, BackendError for a format the
    backend can't multiply, MemoryPlanError with the sum where memory is short."""
    longest = config.max_position_embeddings
    if context_tokens is not None and not 1 <= context_tokens <= longest:
        raise ContextLengthError(f"context of {context_tokens} tokens asked for; this model takes 1 to {longest}")
    context = min(DEFAULT_CONTEXT_TOKENS, longest) if context_tokens is None else context_tokens
    capabilities = backend.capabilities()
    demand_multipliable(checkpoint, backend.name, capabilities)
    experts_bytes, packs_experts = _experts_in_memory(checkpoint, backend)
    placement = Placement(
        backend=backend.name,
        arithmetic=capabilities.arithmetic,
        context_tokens=context,
        trunk_bytes=checkpoint.trunk_bytes,
        experts_bytes=experts_bytes,
        packs_experts=packs_experts,
        kv_bytes=LatentCache.nbytes_for(config, context),
    )
    needed = placement.trunk_bytes + placement.experts_bytes + placement.kv_bytes + HEADROOM_BYTES
    available = backend.memory().available_bytes
    if needed > available:
        raise MemoryPlanError(
            f"{checkpoint.folder}: trunk {gib(placement.trunk_bytes)} + experts {gib(placement.experts_bytes)} + "
            f"KV for {context} tokens {gib(placement.kv_bytes)} + headroom {gib(HEADROOM_BYTES)} = {gib(needed)}, and "
            f"{gib(available)} of memory is available; all experts must be in RAM in this version"
            + ("" if context_tokens else " (a smaller --context needs less)")
        )
    return placement


def _experts_in_memory(checkpoint: Checkpoint, backend: Backend) -> tuple[int, bool]:
    """Bytes of all experts where they multiply, and whether they go through the backend's `pack_expert` on the way:
    to another memory than RAM, or to other bytes than those stored."""
    kinds = _expert_kinds(checkpoint)
    slots = {stored: backend.expert_slot(stored) for stored in kinds}
    if backend.device.type == "cpu" and not any(slot.repacked for slot in slots.values()):
        return checkpoint.experts_bytes, False
    return sum(slots[stored].nbytes * count for stored, count in kinds.items()), True


def _expert_kinds(checkpoint: Checkpoint) -> Counter[tuple[tuple[QuantFormat, Shape], ...]]:
    """How many experts are stored in which way; of a checkpoint without problems."""
    schema = checkpoint.schema
    keys = (ExpertKey(layer, expert) for layer in schema.expert_layers for expert in range(schema.n_routed_experts))
    found = (checkpoint.expert_modules(key) for key in keys)
    return Counter(tuple((modules[name].format, modules[name].shape) for name in PROJECTIONS) for modules in found)  # type: ignore[misc]


def gib(nbytes: int) -> str:
    """Bytes as a person reads them: GiB, below one MiB, below that KiB."""
    if nbytes >= 2**30:
        return f"{nbytes / 2**30:.2f} GiB"
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"
