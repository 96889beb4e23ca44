"""From a folder to an engine: config, checkpoint, plan, trunk, source, tokenizer, in that order.

Every problem that the files' headers show is found before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from k2lite.backends.base import Backend
from k2lite.backends.fallback import FallbackBackend
from k2lite.backends.registry import AUTO, demand_contract, open_backend
from k2lite.offload.cache import ExpertCache
from k2lite.offload.packed_source import PackedSource
from k2lite.offload.policies import DEFAULT_POLICY, make_policy
from k2lite.offload.slots import Arena
from k2lite.offload.source import ExpertSource
from k2lite.offload.store import ExpertStore
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.errors import CheckpointError, RequestError, TokenizerError
from k2lite.quant.quantization_config import parse_quantization_config
from k2lite.quant.quantization_plan import plan_trunk
from k2lite.quant.recipe import KEEP

from .byte_sizes import parse_bytes
from .config import ModelConfig, read_config
from .engine import Engine
from .generation_config import read_generation_config
from .learned_routing import recall_file
from .memory_guard import MemoryGuard
from .model import Model
from .placement import Placement, plan_placement
from .recording import Recorder, RecordingBackend, RecordingSource
from .text.tokenizer import load_tokenizer
from .weights import checkpoint_schema, load_trunk, trunk_matrices

# Guesses of the next layer's experts that are read ahead at most; the ranks behind are wrong too often.
PREFETCH_WIDTH = 6


def open_model(folder: Path, *, latent_norm_eps: float | None = None) -> tuple[ModelConfig, Checkpoint]:
    """Read config.json and every shard's header, but no weights. The checkpoint's `problems` are not yet errors."""
    if folder.suffix == ".gguf" and folder.is_file():
        raise CheckpointError(f"{folder}: a GGUF file; k2lite quantize {folder} DST makes a folder of it that runs")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; a model is a folder with config.json and .safetensors files")
    config = read_config(folder, latent_norm_eps=latent_norm_eps)
    quantization = parse_quantization_config(config.quantization_config, config.source)
    return config, Checkpoint.open(folder, checkpoint_schema(config), quantization)


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
    statistics: str | Path | None = None,
    recorder: Recorder | None = None,
    sequences: int = 1,
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
    resident_experts: how many experts have room in RAM, a share (float) or a number (int); by default what fits.
    policy: which experts stay (`k2lite.offload.policies.POLICIES`). prefetch: read ahead on the router's guess.
    mirror: a folder with a copy of the weight files on another drive; reads are shared between the two.
    statistics: a file of what routing showed in earlier runs (`k2lite.learned_routing`); read if it exists.
    None of these six changes a token where the backend is batch-invariant.
    sequences: how many may be open at once; each has a KV cache of the whole context in the plan.
    recorder: is told the inputs of every matrix; slow.

    Raises K2LiteError's children; see k2lite.errors."""
    make_policy(policy, [0], 1, 1)  # an unknown name is said before anything is read
    config, checkpoint = open_model(Path(model), latent_norm_eps=latent_norm_eps)
    checkpoint.raise_for_problems()
    device = _device(backend, activations, threads, notify)
    if allow_fallback:
        device = FallbackBackend(device, notify)
    quantized = plan_trunk(checkpoint, trunk)
    placement = plan_placement(
        config,
        checkpoint,
        device,
        context_tokens=context,
        ram_bytes=None if ram is None else parse_bytes(ram),
        resident_experts=resident_experts,
        quantized=quantized,
        sequences=sequences,
    )
    tokenizer = load_tokenizer(Path(model))
    if tokenizer.n_vocab > config.vocab_size:
        raise TokenizerError(
            f"{model}: the tokenizer has {tokenizer.n_vocab} tokens and config.json's vocab_size is "
            f"{config.vocab_size}; they belong to different models"
        )
    weights = load_trunk(checkpoint, config, device, quantized)
    store = ExpertStore(checkpoint, mirror=None if mirror is None else Path(mirror))
    experts = open_cache(config, store, placement, policy=policy, prefetch=prefetch)
    if statistics is not None:
        recall_file(experts, config, Path(statistics))
    generation_eos, recommended = read_generation_config(Path(model))
    stop_ids = frozenset(config.eos_token_ids) | frozenset(generation_eos) | tokenizer.end_of_turn_ids
    model_experts: ExpertSource = PackedSource(experts, device) if placement.packs_experts else experts
    if recorder is not None:
        device = RecordingBackend(device, recorder, trunk_matrices(weights, config.tensor_prefix))
        model_experts = RecordingSource(model_experts, device, config.tensor_prefix)
    return Engine(
        Model(config, weights, model_experts, device),
        experts,
        placement,
        guard=MemoryGuard(device.memory, experts, placement.slot_bytes),
        device=device.device,
        owns_backend=isinstance(backend, str),
        stop_ids=stop_ids,
        recommended_sampling=recommended,
        tokenizer=tokenizer,
    )


def open_cache(
    config: ModelConfig, store: ExpertStore, placement: Placement, *, policy: str, prefetch: bool
) -> ExpertCache:
    """The experts of a planned model behind their arena."""
    layers = config.moe_layers or (0,)  # a model without experts has a cache that nobody asks
    return ExpertCache(
        store,
        Arena(placement.slots, placement.slot_bytes),
        layers,
        config.n_routed_experts,
        policy=make_policy(policy, layers, config.n_routed_experts, max(1, placement.slots - placement.ring_slots)),
        ring=placement.ring_slots,
        fewest=placement.ring_slots + config.num_experts_per_tok,
        prefetch_width=PREFETCH_WIDTH if prefetch else 0,
    )


def _device(
    backend: str | Backend, activations: str | None, threads: int | None, notify: Callable[[str], None] | None
) -> Backend:
    if isinstance(backend, str):
        return open_backend(backend, notify=notify, activations=activations, threads=threads)
    demand_contract(backend.name, backend.contract)
    if activations is not None or threads is not None:
        raise RequestError("activations and threads are options of a backend that load() opens by name")
    return backend
