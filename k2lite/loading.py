"""From a folder to an engine: config, checkpoint, plan, trunk, source, tokenizer, in that order.

Every problem that the files' headers show is found before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from k2lite.backends.base import Backend
from k2lite.backends.fallback import FallbackBackend
from k2lite.backends.registry import AUTO, demand_contract, open_backend
from k2lite.offload.resident import ResidentSource
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.errors import CheckpointError, TokenizerError
from k2lite.quant.quantization_config import parse_quantization_config
from k2lite.quant.types import ExpertWeights

from .config import ModelConfig, read_config
from .engine import Engine
from .generation_config import read_generation_config
from .model import Model
from .placement import plan_placement
from .text.tokenizer import load_tokenizer
from .weights import checkpoint_schema, load_trunk


def open_model(folder: Path, *, latent_norm_eps: float | None = None) -> tuple[ModelConfig, Checkpoint]:
    """Read config.json and every shard's header, but no weights. The checkpoint's `problems` are not yet errors."""
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
) -> Engine:
    """Load a model folder and return an engine that is ready to generate.

    backend: a name (`k2lite.backends.registry.backend_names()`, or "auto") or a Backend.
    allow_fallback: what the backend can't do is done by plain torch, operation by operation.
    notify: gets a line for auto's choice and for each operation that falls back.
    context: tokens that one sequence may hold, prompt and answer; by default the model's limit or 32,768.
    latent_norm_eps: eps of the norms of MLA's two latents; by default 1e-6, as in Hugging Face's code.

    Raises K2LiteError's children; see k2lite.errors."""
    config, checkpoint = open_model(Path(model), latent_norm_eps=latent_norm_eps)
    checkpoint.raise_for_problems()
    device = open_backend(backend, notify=notify) if isinstance(backend, str) else backend
    demand_contract(device.name, device.contract)
    if allow_fallback:
        device = FallbackBackend(device, notify)
    placement = plan_placement(config, checkpoint, device, context_tokens=context)
    tokenizer = load_tokenizer(Path(model))
    if tokenizer.n_vocab > config.vocab_size:
        raise TokenizerError(
            f"{model}: the tokenizer has {tokenizer.n_vocab} tokens and config.json's vocab_size is "
            f"{config.vocab_size}; they belong to different models"
        )
    pack = partial(_pack, device) if placement.packs_experts else None
    experts = ResidentSource(checkpoint, config.moe_layers, config.n_routed_experts, pack=pack)
    trunk = load_trunk(checkpoint, config, device)
    generation_eos, recommended = read_generation_config(Path(model))
    stop_ids = frozenset(config.eos_token_ids) | frozenset(generation_eos) | tokenizer.end_of_turn_ids
    return Engine(
        Model(config, trunk, experts, device),
        experts,
        placement,
        device=device.device,
        stop_ids=stop_ids,
        recommended_sampling=recommended,
        tokenizer=tokenizer,
    )


def _pack(backend: Backend, expert: ExpertWeights) -> ExpertWeights:
    """An expert in the backend's own memory, in the bytes that it multiplies."""
    room = backend.expert_slot([(matrix.format, matrix.shape) for matrix in expert])
    return backend.pack_expert(expert, backend.alloc(room.nbytes))
