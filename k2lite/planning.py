"""What `k2lite plan` says: bytes by purpose, expected speeds with low, middle and high, what limits, what would help.

From headers or a config alone, and from bandwidths; reads no weights but for measuring the drive. The speeds are what
memory and drive allow when the backend's arithmetic keeps up with memory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace as replaced
from typing import Any

import numpy as np

from k2lite.offload.policies import DEFAULT_POLICY
from k2lite.offload.replay import replay
from k2lite.offload.routing_analysis import touched_share
from k2lite.offload.routing_trace import RoutingTrace

from .byte_sizes import gib
from .config import ModelConfig
from .device_placement import AUTO_DEVICE_SHARE, DEVICE_HEADROOM_BYTES
from .kv_cache import LatentCache
from .machine import Machine
from .placement import Placement, WeightBytes, plan_memory, planned_context
from .quant.errors import MemoryPlanError
from .quant.types import PROJECTIONS
from .speed_model import (
    CURVES,
    PLACES,
    Bandwidths,
    Curve,
    Decode,
    Place,
    Work,
    decode_speed,
    prefill_speed,
    what_would_help,
)
from .traced_routing import check_fit
from .weights import checkpoint_schema


@dataclass(frozen=True)
class ModelBytes:
    """`weights` as a plan wants them, the embedding table, of which a token reads one row, and the format that the
    trunk is converted to while loading, if it is."""

    weights: WeightBytes
    embeddings: int
    trunk_to: str | None = None


def work_of(config: ModelConfig, model: ModelBytes) -> Work:
    """What one token moves and computes."""
    layers = len(config.moe_layers)
    active = layers * config.num_experts_per_tok
    schema = checkpoint_schema(config)
    projections = [schema.projection_shape(name) for name in PROJECTIONS]
    matrices = [
        spec.shape for name, spec in schema.trunk.items() if len(spec.shape) == 2 and "embed_tokens" not in name
    ]
    trunk = sum(out * width for out, width in matrices)
    elements = trunk + active * sum(out * width for out, width in projections)
    weights = model.weights
    return Work(
        trunk_read=weights.trunk - model.embeddings,
        expert=weights.experts_bytes / max(weights.experts, 1),
        experts=weights.experts,
        active=active,
        layers=config.num_hidden_layers,
        flops_per_token=2 * elements,
        # a prompt's tokens but the last never meet the head
        trunk_flops=2 * (trunk - config.vocab_size * config.hidden_size),
    )


def plan_report(
    config: ModelConfig,
    model: ModelBytes,
    machine: Machine,
    *,
    backend: str,
    arithmetic: str,
    context: int | None,
    packing: int = 0,
    routing: RoutingTrace | None = None,
) -> dict[str, Any]:
    """The plan as --json prints it: bytes, speeds in tokens/s, also for the choices of a trace if there is one. Raises
    MemoryPlanError, ContextLengthError, RequestError where the trace doesn't fit."""
    tokens = planned_context(config, context)
    weights, on_device = model.weights, 0.0

    def planned(in_ram: WeightBytes, *, kv_elsewhere: bool = False) -> Placement:
        return plan_memory(
            config,
            in_ram,
            backend,
            arithmetic,
            context=tokens,
            budget=machine.memory_bytes,
            packing=packing,
            kv_elsewhere=kv_elsewhere,
        )

    if machine.device_bytes:
        # with an accelerator the trunk and KV lie there, and experts in what is left of it
        first = weights.trunk + LatentCache.nbytes_for(config, tokens)
        if first > machine.device_bytes:
            raise MemoryPlanError(
                f"{weights.where}: trunk and KV for {tokens} tokens are {gib(first)}, and the accelerator of "
                f"{machine.name} has {gib(machine.device_bytes)}; a smaller --context needs less"
            )
        placement = planned(replaced(weights, trunk=0), kv_elsewhere=True)
        on_device = max(0.0, float(machine.device_bytes - first - DEVICE_HEADROOM_BYTES - placement.transient_bytes))
    else:
        placement = planned(weights)
    facts: dict[str, Any] = {
        "machine": {"name": machine.name, "memory_bytes": machine.memory_bytes, "device_bytes": machine.device_bytes}
        | asdict(machine.rates),
        "backend": backend,
        "arithmetic": arithmetic,
        "bytes": _bytes(config, placement, model, on_device),
        "chunk_tokens": placement.prefill_chunk_tokens,
    }
    if weights.experts:
        facts |= speeds(config, model, machine, placement, on_device)
        if routing is not None:
            place = facts.get("experts_on", "split")
            there = 0.0 if place == "host" else on_device
            facts["traced"] = traced_speeds(
                config, model, machine.rates, placement, routing, on_device=there, place=place
            )
    return facts


def speeds(
    config: ModelConfig, model: ModelBytes, machine: Machine, placement: Placement, on_device: float = 0.0
) -> dict[str, Any]:
    """Predicted decode and prefill speeds of a placement."""
    work = work_of(config, model)
    rates, bank = machine.rates, work.experts * work.expert
    slots = min(placement.slots - placement.ring_slots, placement.experts) * work.expert
    auto = experts_on(on_device, bank)
    place: Place = auto if machine.device_bytes else "split"
    there = {where: 0.0 if where == "host" else on_device for where in PLACES}
    held = {where: min(slots, bank - there[where]) for where in PLACES}

    def decode(where: Place) -> dict[Curve, Decode]:
        return {
            curve: decode_speed(work, rates, curve, held=held[where], on_device=there[where], place=where)
            for curve in CURVES
        }

    facts: dict[str, Any] = {}
    if machine.device_bytes:
        best = {where: {curve: found.best for curve, found in decode(where).items()} for where in PLACES}
        facts = {"experts_on": auto, "places": best}
    chosen, chunk = decode(place), placement.prefill_chunk_tokens
    sizes = {"held": held[place], "on_device": there[place]}
    return facts | {
        "decode": {curve: asdict(found) for curve, found in chosen.items()},
        "prefill_tok_s": {
            str(tokens): prefill_speed(work, rates, min(tokens, chunk), **sizes, place=place)
            for tokens in (128, 512, 2048, 8192)
        },
        "limit": chosen["middle"].limit,
        "would_help": what_would_help(work, rates, **sizes, place=place),
    }


def traced_speeds(
    config: ModelConfig,
    model: ModelBytes,
    rates: Bandwidths,
    placement: Placement,
    trace: RoutingTrace,
    *,
    chunk_tokens: int | None = None,
    on_device: float = 0.0,
    place: Place = "split",
) -> dict[str, Any]:
    """Predicted speeds of a placement when the routers choose what a trace says (MoE layer i follows trace layer i,
    looped): the hit rate is that of the default policy in a replay. A trace doesn't tell what the next layer's router
    would have named, so nothing is read ahead. Raises RequestError."""
    check_fit(trace, config)
    ids = trace.ids[:, np.arange(len(config.moe_layers)) % trace.ids.shape[1]]
    work = work_of(config, model)
    slots = placement.slots - placement.ring_slots + int(on_device / work.expert)
    found = replay(ids, config.n_routed_experts, DEFAULT_POLICY, slots, warmup_tokens=len(ids) // 4).hit_rate
    held = min(slots, placement.experts) * work.expert - on_device
    chunk = placement.prefill_chunk_tokens if chunk_tokens is None else chunk_tokens
    share = touched_share(ids, chunk, config.n_routed_experts)
    return {
        "decode": asdict(decode_speed(work, rates, found, held=held, on_device=on_device, place=place, recall=0.0)),
        "chunk_tokens": chunk,
        "prefill_tok_s": prefill_speed(work, rates, chunk, held=held, on_device=on_device, place=place, share=share),
    }


def experts_on(on_device: float, bank: float) -> Place:
    """Where experts multiply unasked, as device_placement.py decides: `on_device` of `bank` bytes have room."""
    return "device" if bank and on_device >= AUTO_DEVICE_SHARE * bank else "host"


def _bytes(config: ModelConfig, placement: Placement, model: ModelBytes, on_device: float) -> dict[str, Any]:
    kept = on_device if experts_on(on_device, placement.experts_bytes) == "device" else 0
    return {
        "trunk": model.weights.trunk,
        "embeddings": model.embeddings,
        "experts_all": placement.experts_bytes,
        "experts": placement.experts,
        "slots": placement.slots,
        "arena": placement.arena_bytes,
        "experts_on_device": int(on_device),
        "kv": LatentCache.nbytes_for(config, placement.context_tokens),
        "step": placement.transient_bytes,
        "headroom": placement.headroom_bytes,
        "context_tokens": placement.context_tokens,
        "drive": max(0, placement.experts_bytes - placement.arena_bytes - int(kept)),
    }


def as_text(name: str, facts: dict[str, Any]) -> str:
    """The plan as a person reads it."""
    machine, size = facts["machine"], facts["bytes"]
    trunk_at = "accelerator" if machine["device_bytes"] else "RAM"
    lines = [
        f"{name} on {machine['name']}: memory {gib(machine['memory_bytes'])} at {machine['memory'] / 1e9:.1f} GB/s, "
        f"drive {machine['drive'] / 1e9:.2f} GB/s"
        + (
            f"; accelerator {gib(machine['device_bytes'])} at {machine['device'] / 1e9:.0f} GB/s, link "
            f"{machine['bus'] / 1e9:.1f} GB/s"
            if machine["device_bytes"]
            else ""
        ),
        f"  backend     {facts['backend']} ({facts['arithmetic']})",
        f"  trunk       {gib(size['trunk'])} in {trunk_at}, KV for {size['context_tokens']} tokens {gib(size['kv'])}",
        f"  experts     {gib(size['experts_all'])}: {size['slots']} of {size['experts']} in RAM "
        f"({gib(size['arena'])}), "
        + (f"{gib(size['experts_on_device'])} on the accelerator, " if machine["device_bytes"] else "")
        + f"{gib(size['drive'])} on the drive only",
        f"  besides     a step {gib(size['step'])} (prompts in chunks of {facts['chunk_tokens']} tokens), "
        f"headroom {gib(size['headroom'])}",
    ]
    if copy := facts.get("packed_copy"):
        state = "is there" if copy["is_whole"] else "the first run writes it"
        lines.append(f"  packed copy {gib(copy['bytes'])} in {copy['folder']} ({state})")
    if "decode" not in facts:
        return "\n".join(lines)
    lines.append("  decode      tok/s       hit rate   from the drive a token   nothing overlaps .. everything")
    for curve, found in facts["decode"].items():
        lines.append(
            f"    {curve:<8}  {found['best']:8.2f}    {found['hit_rate']:7.1%}    "
            f"{found['missing_bytes'] / 1e9:10.2f} GB            {found['serial']:8.2f} .. {found['perfect']:.2f}"
        )
    if traced := facts.get("traced"):
        found = traced["decode"]
        lines.append(
            f"    {'trace':<8}  {found['best']:8.2f}    {found['hit_rate']:7.1%}    "
            f"{found['missing_bytes'] / 1e9:10.2f} GB            {found['serial']:8.2f} .. {found['perfect']:.2f}; "
            f"prefill {traced['prefill_tok_s']:.1f} in chunks of {traced['chunk_tokens']}"
        )
    for where, found in facts.get("places", {}).items():
        taken = " (what run takes unasked)" if where == facts["experts_on"] else ""
        speed = f"{found['middle']:.2f} tok/s ({found['low']:.2f} .. {found['high']:.2f})"
        lines.append(f"  {'experts on ' + where:<17} {speed}{taken}")
    rates = facts["prefill_tok_s"]
    prefill = ", ".join(f"{tokens} tokens {rate:.1f}" for tokens, rate in rates.items())
    unknown = "not known: the host's operations a second are not (host_tflops in the machine's file)"
    lines.append(f"  prefill     {'tok/s for a prompt of ' + prefill if all(rates.values()) else unknown}")
    lines.append(f"  limit       {facts['limit']}")
    ranked = sorted(facts["would_help"].items(), key=lambda item: -item[1])
    lines.append("  would help  " + ", ".join(f"{what} x {factor:.2f}" for what, factor in ranked))
    lines.append("  speeds are what memory and drive allow; a backend whose arithmetic is slower than memory is slower")
    return "\n".join(lines)
