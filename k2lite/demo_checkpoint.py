"""Writes a small Kimi-K2 with random weights: a real folder in K2-Instruct's own file format.

FP8 blocks of 128 x 128 with F32 scales, BF16 norms, embeddings, head and router, several shards with an index, a
byte-level tokenizer in tiktoken format and a chat template. It shows that everything runs; its text is noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from k2lite.quant.declaration import declaration
from k2lite.quant.durable_files import write_new_folder
from k2lite.quant.formats import FP8_NAME, PACKED_INT, format_named
from k2lite.quant.fp8 import COMPRESSED_TENSORS_SCALE, SCALE, Fp8Block
from k2lite.quant.types import PROJECTIONS

from .config import ModelConfig, parse_config
from .text.byte_tokenizer import write_byte_tokenizer
from .weights import checkpoint_schema

N_SHARDS = 4
# Kimi-K2-Instruct's config.json, scaled down; 192 and 320 are no multiples of 128, so edge blocks occur.
DEMO_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 48,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 2.827,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 8192,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "bfloat16",
}


def write_random_demo(folder: Path, *, seed: int = 0) -> None:
    """Write the folder, complete or not at all. Refuses a name that exists, unless it is an empty folder."""
    write_random_model(folder, DEMO_CONFIG, experts=FP8_NAME, trunk=FP8_NAME, seed=seed)


def write_random_model(folder: Path, config: dict[str, Any], *, experts: str, trunk: str, seed: int) -> None:
    """The same for another config.json, with routed experts and the trunk's matrices in other formats; what `config`
    declares of them is replaced."""
    declared = {key: value for key, value in config.items() if key != "quantization_config"}
    quantization = declaration(experts, trunk)
    if quantization is not None:
        declared["quantization_config"] = quantization
    write_new_folder(folder, lambda partial: _fill(partial, declared, experts, trunk, seed))


def _fill(folder: Path, declared: dict[str, Any], experts: str, trunk: str, seed: int) -> None:
    config = parse_config(declared, folder / "config.json")
    tensors = dict(_tensors(config, experts, trunk, torch.Generator().manual_seed(seed)))
    _write_weights(folder, tensors)
    _write_json(folder / "config.json", declared)
    _write_json(folder / "generation_config.json", {"max_length": config.max_position_embeddings, "eos_token_id": 258})
    write_byte_tokenizer(folder)


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(N_SHARDS):
        file = f"model-{shard + 1}-of-{N_SHARDS}.safetensors"
        part = names[len(names) * shard // N_SHARDS : len(names) * (shard + 1) // N_SHARDS]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensors(
    config: ModelConfig, experts: str, trunk: str, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its stored name. Sizes of values are such that a forward pass neither grows nor dies."""
    schema = checkpoint_schema(config)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul(columns**-0.5)

    fp8 = Fp8Block(COMPRESSED_TENSORS_SCALE if {experts, trunk} & set(PACKED_INT) else SCALE)

    def stored(name: str, weight: torch.Tensor, format: str) -> Iterator[tuple[str, torch.Tensor]]:
        module = name.removesuffix(".weight")
        for suffix, part in (fp8 if format == FP8_NAME else format_named(format)).quantize(weight).items():
            yield f"{module}.{suffix}", part

    for name, spec in schema.trunk.items():
        if name.endswith("e_score_correction_bias"):
            yield name, 0.02 * torch.randn(spec.shape, generator=generator)
        elif len(spec.shape) == 1:
            yield name, (1 + 0.1 * torch.randn(spec.shape, generator=generator)).to(torch.bfloat16)
        elif not spec.quantizable or name == "lm_head.weight":
            yield name, matrix(*spec.shape).to(torch.bfloat16)
        else:
            yield from stored(name, matrix(*spec.shape), trunk)
    width = (config.moe_intermediate_size, config.hidden_size)
    for layer in schema.expert_layers:
        for expert in range(schema.n_routed_experts):
            for projection in PROJECTIONS:
                shape = width[::-1] if projection == "down_proj" else width
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                yield from stored(name, matrix(*shape), experts)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
