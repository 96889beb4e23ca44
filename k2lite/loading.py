"""From a folder to an engine: config, checkpoint, plan, trunk, source, tokenizer, in that order.

Every problem that the files' headers show is found before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from k2lite.backends.base import Backend
from k2lite.backends.fallback import FallbackBackend
from k2lite.backends.registry import AUTO, Notify, demand_contract, open_backend
from k2lite.backends.torch_device.backend import TorchDeviceBackend
from k2lite.offload.cache import ExpertCache
from k2lite.offload.direct_files import say_on_stderr
from k2lite.offload.packed_copy import PackedCopy
from k2lite.offload.packed_source import PackedSource
from k2lite.offload.policies import DEFAULT_POLICY, make_policy
from k2lite.offload.slots import Arena
from k2lite.offload.source import ExpertSource
from k2lite.offload.store import ExpertStore
from k2lite.quant.errors import RequestError, TokenizerError
from k2lite.quant.quantization_plan import plan_trunk
from k2lite.quant.recipe import KEEP

from .accelerated_experts import device_arena, device_experts
from .byte_sizes import parse_bytes
from .config import ModelConfig
from .device_placement import Accelerator, plan_with_accelerator
from .engine import Engine
from .expert_work import BesideTrunk, ExpertPlaces
from .generation_config import read_generation_config
from .hot_experts import HotExperts
from .learned_routing import recall_file
from .memory_guard import MemoryGuard
from .model import Model
from .model_folder import open_model
from .packed_writing import write_copy
from .placement import ExpertsOn, Placement, plan_placement
from .recording import Recorder, RecordingBackend, RecordingSource
from .text.tokenizer import load_tokenizer
from .weights import load_trunk, trunk_matrices

# Guesses of the next layer's experts that are read ahead at most; the ranks behind are wrong too often.
PREFETCH_WIDTH = 6


def load(
    model: str | Path,
    *,
    backend: str | Backend = AUTO,
    allow_fallback: bool = False,
    notify: Callable[[str], None] | None = None,
    context: int | None = None,
    latent_norm_eps: float | None = None,
    activations: str | None = None,
    threads: int | None = None,
    trunk: str = KEEP,
    ram: str | int | None = None,
    resident_experts: float | None = None,
    policy: str = DEFAULT_POLICY,
    prefetch: bool = True,
    mirror: str | Path | None = None,
    packed_copy: str | Path | None = None,
    statistics: str | Path | None = None,
    recorder: Recorder | None = None,
    sequences: int = 1,
    vram: str | int | None = None,
    experts_on: ExpertsOn | None = None,
    hot_experts: str | Path | None = None,
    host_backend: str | Backend = "cpu",
) -> Engine:
    """Load a model folder and return an engine that is ready to generate.

    backend: a name (`k2lite.backends.registry.backend_names()`, or "auto") or a Backend.
    allow_fallback: what the backend can't do is done by plain torch, operation by operation.
    notify: gets a line for auto's choice and for each operation that falls back.
    context: tokens that one sequence may hold, prompt and answer; by default the model's limit or 32,768.
    latent_norm_eps: eps of the norms of MLA's two latents; by default 1e-6, as in Hugging Face's code.
    activations: what the CPU backend rounds the inputs of integer weights to, "int8" (default) or "bf16".
    threads: of the CPU backend; by default the processors that this process may use.
    trunk: the format that the trunk's matrices but the head are quantized to while loading, as `quantize --trunk` does;
        "keep" leaves them as stored.
    ram: what the process may take, as "96GiB" or bytes; by default what the machine and its control group can spare.
    resident_experts: how many experts have room in RAM, a share of all (float) or a number (int); by default what fits.
        Those that stay in an accelerator's memory need no room.
    policy: which experts stay (`k2lite.offload.policies.POLICIES`). prefetch: read ahead on the router's guess.
    mirror: a folder with a copy of the weight files on another drive; reads are shared between the two.
    packed_copy: a folder with the experts as the backend packs them; written if it isn't there, which takes as long as
        reading all of them once and as much room.
    statistics: a file of what routing showed in earlier runs (`k2lite.learned_routing`); read if it exists.
    None of these seven changes a token where the backend is batch-invariant.
    sequences: how many may be open at once; each has a KV cache of the whole context in the plan.
    recorder: is told the inputs of every matrix; slow.

    With an accelerator's backend, which takes trunk and KV cache (each of these may change tokens, `vram` where it
    decides what multiplies on the device; name them where two runs must be the same):
    vram: what it may take of the accelerator's memory, as "20GiB" or bytes; by default what is free there.
    experts_on: where experts multiply: "device", "host" (by `host_backend`, which gets `activations` and `threads`) or
        "split"; by default device or host, by the model's and the memory's sizes. Where all are on the device these
        two are refused.
    hot_experts: for "split": a file of statistics that says which experts multiply on the device.

    Raises K2LiteError's children; see k2lite.errors."""
    make_policy(policy, [0], 1, 1)  # an unknown name is said before anything is read
    config, checkpoint = open_model(Path(model), latent_norm_eps=latent_norm_eps)
    checkpoint.raise_for_problems()
    device = _device(backend, activations, threads, notify)
    accelerator = _accelerator(
        device,
        config,
        host=host_backend,
        host_options={"activations": activations, "threads": threads},
        vram=vram,
        experts_on=experts_on,
        hot_experts=hot_experts,
    )
    if accelerator is not None and recorder is not None:
        raise RequestError(f"inputs can't be recorded with backend {device.name}; take --backend cpu or reference")
    if allow_fallback:
        device = FallbackBackend(device, notify)
        accelerator = accelerator and replace(accelerator, backend=device)
    if packed_copy is not None and mirror is not None:
        raise RequestError("a mirror has no effect with a packed copy, which experts are read from")
    packed = None if packed_copy is None else PackedCopy(Path(packed_copy), checkpoint, device)
    quantized = plan_trunk(checkpoint, trunk)
    ram_bytes = None if ram is None else parse_bytes(ram)
    if accelerator is None:
        placement = plan_placement(
            config,
            checkpoint,
            device,
            context_tokens=context,
            ram_bytes=ram_bytes,
            resident_experts=resident_experts,
            quantized=quantized,
            sequences=sequences,
            packed=packed,
        )
    else:
        placement = plan_with_accelerator(
            config,
            checkpoint,
            accelerator,
            ram=accelerator.host.memory(),
            context_tokens=context,
            ram_bytes=ram_bytes,
            resident_experts=resident_experts,
            quantized=quantized,
            sequences=sequences,
            packed=packed,
        )
        _demand_work(placement, {"activations": activations, "threads": threads})
    tokenizer = load_tokenizer(Path(model))
    if tokenizer.n_vocab > config.vocab_size:
        raise TokenizerError(
            f"{model}: the tokenizer has {tokenizer.n_vocab} tokens and config.json's vocab_size is "
            f"{config.vocab_size}; they belong to different models"
        )
    if packed is not None and not packed.is_whole:
        with device.telling():
            write_copy(packed, notify)
    store = ExpertStore(checkpoint, mirror=None if mirror is None else Path(mirror), packed=packed)
    with device.telling():
        weights = load_trunk(checkpoint, config, device, quantized)
        experts, source, places = _experts(config, store, placement, device, accelerator, policy, prefetch, notify)
    if statistics is not None:
        recall_file(experts, config, Path(statistics))
    generation_eos, recommended = read_generation_config(Path(model))
    stop_ids = frozenset(config.eos_token_ids) | frozenset(generation_eos) | tokenizer.end_of_turn_ids
    if recorder is not None:
        device = RecordingBackend(device, recorder, trunk_matrices(weights, config.tensor_prefix))
        source, places = RecordingSource(source, device, config.tensor_prefix), BesideTrunk(device)
    host = device if accelerator is None else accelerator.host
    owned = [device] if isinstance(backend, str) else []
    if accelerator is not None and isinstance(host_backend, str):
        owned.append(accelerator.host)
    return Engine(
        Model(config, weights, source, device, places),
        experts,
        placement,
        guard=MemoryGuard(host.memory, experts, placement.slot_bytes),
        owned_backends=owned,
        stop_ids=stop_ids,
        recommended_sampling=recommended,
        tokenizer=tokenizer,
    )


def open_cache(
    config: ModelConfig,
    store: ExpertStore,
    placement: Placement,
    *,
    policy: str,
    prefetch: bool,
    arena: Arena | None = None,
) -> ExpertCache:
    """The experts of a planned model behind their arena."""
    layers = config.moe_layers or (0,)  # a model without experts has a cache that nobody asks
    return ExpertCache(
        store,
        Arena(placement.slots, placement.slot_bytes) if arena is None else arena,
        layers,
        config.n_routed_experts,
        policy=make_policy(policy, layers, config.n_routed_experts, max(1, placement.slots - placement.ring_slots)),
        ring=placement.ring_slots,
        fewest=placement.ring_slots + config.num_experts_per_tok,
        prefetch_width=PREFETCH_WIDTH if prefetch else 0,
    )


def _experts(
    config: ModelConfig,
    store: ExpertStore,
    placement: Placement,
    device: Backend,
    accelerator: Accelerator | None,
    policy: str,
    prefetch: bool,
    notify: Notify | None,
) -> tuple[ExpertCache, ExpertSource, ExpertPlaces]:
    """The cache in RAM, what the model asks for experts, and where they multiply."""
    if accelerator is None:
        cache = open_cache(config, store, placement, policy=policy, prefetch=prefetch)
        return cache, PackedSource(cache, device) if placement.packs_experts else cache, BesideTrunk(device)
    say = notify or say_on_stderr
    arena = device_arena(accelerator, placement, say)
    cache = open_cache(config, store, placement, policy=policy, prefetch=prefetch, arena=arena)
    return cache, *device_experts(accelerator, cache, placement)


def _device(backend: str | Backend, activations: str | None, threads: int | None, notify: Notify | None) -> Backend:
    if isinstance(backend, str):
        return open_backend(backend, notify=notify, host_options={"activations": activations, "threads": threads})
    demand_contract(backend.name, backend.contract)
    if (activations is not None or threads is not None) and not isinstance(backend, TorchDeviceBackend):
        raise RequestError("activations and threads are options of a backend that load() opens by name")
    return backend


def _accelerator(
    device: Backend,
    config: ModelConfig,
    *,
    host: str | Backend,
    host_options: Mapping[str, object],
    vram: str | int | None,
    experts_on: ExpertsOn | None,
    hot_experts: str | Path | None,
) -> Accelerator | None:
    """What is to be planned with an accelerator; None for a backend that is none. Raises RequestError for what has no
    effect then."""
    asked = {"vram": vram, "experts_on": experts_on, "hot_experts": hot_experts}
    if not isinstance(device, TorchDeviceBackend):
        for option, given in asked.items():
            if given is not None:
                raise RequestError(f"{option} has no effect with backend {device.name!r}, which is no accelerator's")
        return None
    if hot_experts is not None and experts_on != "split":
        raise RequestError("hot_experts has no effect unless experts_on is split")
    if not isinstance(host, str) and any(value is not None for value in host_options.values()):
        raise RequestError("activations and threads are options of a host_backend that load() opens by name")
    return Accelerator(
        device,
        device,
        open_backend(host, host_options=host_options) if isinstance(host, str) else host,
        vram_bytes=None if vram is None else parse_bytes(vram),
        experts_on=experts_on,
        hot=None if hot_experts is None else HotExperts.read(Path(hot_experts), config),
    )


def _demand_work(placement: Placement, host_options: Mapping[str, object]) -> None:
    """Raise RequestError for options of the host where nothing multiplies there, whoever decided so."""
    for option, value in host_options.items():
        if value is not None and not placement.host_multiplies:
            raise RequestError(
                f"{option} has no effect: all experts multiply on the device, and nothing on the host; leave it out, "
                "or let experts_on be host"
            )
