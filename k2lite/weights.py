"""Checkpoint names to the model's parts: which tensors a folder must hold, and the trunk once it is loaded.

The one place where the checkpoint's names occur (there, "mlp.gate" is the router). The trunk is everything but the
routed experts: it is loaded whole. Knows no file layout and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields

import torch

from k2lite.backends.base import Backend
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.conversion import converted_tensor
from k2lite.quant.quantization_plan import Matrix
from k2lite.quant.schema import CheckpointSchema, IgnoredTensor, TrunkSpec
from k2lite.quant.types import ExpertWeights, QuantTensor

from .config import ModelConfig

READERS = 4  # that load the trunk


@dataclass(frozen=True)
class AttentionWeights:
    q_a_proj: QuantTensor
    q_a_layernorm: torch.Tensor
    q_b_proj: QuantTensor
    kv_a_proj_with_mqa: QuantTensor
    kv_a_layernorm: torch.Tensor
    kv_b_proj: QuantTensor
    o_proj: QuantTensor


@dataclass(frozen=True)
class MoeWeights:
    router: QuantTensor
    e_score_correction_bias: torch.Tensor
    shared_experts: ExpertWeights


@dataclass(frozen=True)
class LayerWeights:
    """One layer's trunk. `ffn` is the dense feed-forward block of the first layers, the MoE's trunk part later."""

    input_layernorm: torch.Tensor
    self_attn: AttentionWeights
    post_attention_layernorm: torch.Tensor
    ffn: ExpertWeights | MoeWeights


@dataclass(frozen=True)
class TrunkWeights:
    embed_tokens: QuantTensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: QuantTensor


def checkpoint_schema(config: ModelConfig) -> CheckpointSchema:
    """What the folder of a model with this config must hold, and what it may hold besides."""
    return CheckpointSchema(
        prefix=config.tensor_prefix,
        trunk=dict(_trunk_specs(config)),
        expert_layers=config.moe_layers,
        n_routed_experts=config.n_routed_experts,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_intermediate_size,
        ignored=tuple(_ignored(config)),
    )


def _trunk_specs(config: ModelConfig) -> Iterator[tuple[str, TrunkSpec]]:
    hidden, heads = config.hidden_size, config.num_attention_heads

    def matrix(name: str, *shape: int, quantizable: bool = True) -> tuple[str, TrunkSpec]:
        return name, TrunkSpec(shape, quantizable=quantizable)

    def vector(name: str, size: int) -> tuple[str, TrunkSpec]:
        return name, TrunkSpec((size,), quantizable=False)

    def mlp(name: str, width: int) -> Iterator[tuple[str, TrunkSpec]]:
        yield matrix(f"{name}.gate_proj.weight", width, hidden)
        yield matrix(f"{name}.up_proj.weight", width, hidden)
        yield matrix(f"{name}.down_proj.weight", hidden, width)

    yield matrix("model.embed_tokens.weight", config.vocab_size, hidden, quantizable=False)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        key_value = heads * (config.qk_nope_head_dim + config.v_head_dim)
        yield vector(f"{at}.input_layernorm.weight", hidden)
        yield matrix(f"{at}.self_attn.q_a_proj.weight", config.q_lora_rank, hidden)
        yield vector(f"{at}.self_attn.q_a_layernorm.weight", config.q_lora_rank)
        yield matrix(f"{at}.self_attn.q_b_proj.weight", query, config.q_lora_rank)
        yield matrix(f"{at}.self_attn.kv_a_proj_with_mqa.weight", config.latent_dim, hidden)
        yield vector(f"{at}.self_attn.kv_a_layernorm.weight", config.kv_lora_rank)
        yield matrix(f"{at}.self_attn.kv_b_proj.weight", key_value, config.kv_lora_rank)
        yield matrix(f"{at}.self_attn.o_proj.weight", hidden, heads * config.v_head_dim)
        yield vector(f"{at}.post_attention_layernorm.weight", hidden)
        if config.is_moe(layer):
            yield matrix(f"{at}.mlp.gate.weight", config.n_routed_experts, hidden, quantizable=False)
            yield vector(f"{at}.mlp.gate.e_score_correction_bias", config.n_routed_experts)
            yield from mlp(f"{at}.mlp.shared_experts", config.moe_intermediate_size * config.n_shared_experts)
        else:
            yield from mlp(f"{at}.mlp", config.intermediate_size)
    yield vector("model.norm.weight", hidden)
    yield matrix("lm_head.weight", config.vocab_size, hidden)


def _ignored(config: ModelConfig) -> Iterator[IgnoredTensor]:
    prefix = config.tensor_prefix.replace(".", r"\.")
    yield IgnoredTensor(
        prefix + r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        "left-over rotary frequencies (they follow from the config)",
    )
    for extra in range(config.num_nextn_predict_layers):
        yield IgnoredTensor(
            prefix + rf"model\.layers\.{config.num_hidden_layers + extra}\..*", "multi-token prediction layer (skipped)"
        )
    if config.model_type == "kimi_k25":
        yield IgnoredTensor(
            r"(vision_tower|mm_projector)\..*", "vision tower and projector (skipped: text only)", carried=True
        )


def load_trunk(
    checkpoint: Checkpoint, config: ModelConfig, backend: Backend, quantized: Mapping[str, Matrix] | None = None
) -> TrunkWeights:
    """Read the trunk into the backend's memory: matrices as stored, but for those of `quantized` (by canonical name),
    which are converted on the way; norms and biases as float32. Several tensors are on their way at once, so that the
    drive is kept busy while others are copied and checked."""
    planned = quantized or {}
    # a device's calls stay in one thread, conversions included; the processor's kernels run in this one
    in_ram = _in_ram(backend)
    with ThreadPoolExecutor(READERS if in_ram else 1, "k2lite-trunk") as readers:
        stored = {
            name: readers.submit(_load, checkpoint, backend, name, len(spec.shape))
            for name, spec in checkpoint.schema.trunk.items()
            if name not in planned
        }
        try:
            if in_ram:
                converted = {name: _converted(matrix, backend) for name, matrix in planned.items()}
            else:
                waiting = {name: readers.submit(_converted, matrix, backend) for name, matrix in planned.items()}
                converted = {name: future.result() for name, future in waiting.items()}
            return _assembled(config, stored, converted)
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)
            raise


def _load(checkpoint: Checkpoint, backend: Backend, name: str, axes: int) -> QuantTensor | torch.Tensor:
    if axes == 1:
        return backend.upload(checkpoint.trunk(name).dequantize())
    if not _in_ram(backend):
        return backend.upload_matrix(checkpoint.trunk(name))
    stored = checkpoint.trunk(name, backend.alloc)
    # read where it stays, unless the backend wants other bytes than those stored
    return stored if type(backend).upload_matrix is Backend.upload_matrix else backend.upload_matrix(stored)


def _in_ram(backend: Backend) -> bool:
    return backend.device.type == "cpu"


def _converted(matrix: Matrix, backend: Backend) -> QuantTensor:
    return backend.upload_matrix(converted_tensor(matrix))


def _assembled(
    config: ModelConfig,
    stored: Mapping[str, Future[QuantTensor | torch.Tensor]],
    converted: Mapping[str, QuantTensor],
) -> TrunkWeights:
    """The loaded tensors, by canonical name, in their places."""

    def matrix(name: str) -> QuantTensor:
        found = converted.get(f"{name}.weight") or stored[f"{name}.weight"].result()
        assert isinstance(found, QuantTensor)
        return found

    def vector(name: str) -> torch.Tensor:
        found = stored[name].result()
        assert isinstance(found, torch.Tensor)
        return found

    def mlp(name: str) -> ExpertWeights:
        return ExpertWeights(*(matrix(f"{name}.{projection}") for projection in ExpertWeights._fields))

    def layer(index: int) -> LayerWeights:
        at = f"model.layers.{index}"
        ffn: ExpertWeights | MoeWeights
        if config.is_moe(index):
            bias = vector(f"{at}.mlp.gate.e_score_correction_bias")
            ffn = MoeWeights(matrix(f"{at}.mlp.gate"), bias, mlp(f"{at}.mlp.shared_experts"))
        else:
            ffn = mlp(f"{at}.mlp")
        return LayerWeights(
            input_layernorm=vector(f"{at}.input_layernorm.weight"),
            self_attn=AttentionWeights(
                q_a_proj=matrix(f"{at}.self_attn.q_a_proj"),
                q_a_layernorm=vector(f"{at}.self_attn.q_a_layernorm.weight"),
                q_b_proj=matrix(f"{at}.self_attn.q_b_proj"),
                kv_a_proj_with_mqa=matrix(f"{at}.self_attn.kv_a_proj_with_mqa"),
                kv_a_layernorm=vector(f"{at}.self_attn.kv_a_layernorm.weight"),
                kv_b_proj=matrix(f"{at}.self_attn.kv_b_proj"),
                o_proj=matrix(f"{at}.self_attn.o_proj"),
            ),
            post_attention_layernorm=vector(f"{at}.post_attention_layernorm.weight"),
            ffn=ffn,
        )

    return TrunkWeights(
        embed_tokens=matrix("model.embed_tokens"),
        layers=tuple(layer(index) for index in range(config.num_hidden_layers)),
        norm=vector("model.norm.weight"),
        lm_head=matrix("lm_head"),
    )


def trunk_matrices(trunk: TrunkWeights, prefix: str) -> dict[str, QuantTensor]:
    """The trunk's matrices that may be quantized, by their stored name without ".weight"."""
    found = {f"{prefix}lm_head": trunk.lm_head}
    for index, layer in enumerate(trunk.layers):
        at = f"{prefix}model.layers.{index}"
        for field in fields(layer.self_attn):
            weight = getattr(layer.self_attn, field.name)
            if isinstance(weight, QuantTensor):
                found[f"{at}.self_attn.{field.name}"] = weight
        is_moe = isinstance(layer.ffn, MoeWeights)
        mlp = layer.ffn.shared_experts if isinstance(layer.ffn, MoeWeights) else layer.ffn
        at = f"{at}.mlp.shared_experts" if is_moe else f"{at}.mlp"
        found |= {f"{at}.{name}": weight for name, weight in mlp._asdict().items()}
    return found
