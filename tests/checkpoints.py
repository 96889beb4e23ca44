"""Random Kimi-K2-shaped checkpoints, written without k2lite: numpy, torch and the safetensors package only.

`write_checkpoint` quantizes by code of its own and returns the dequantized weights, so that another implementation of
the model can be the oracle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]

FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
INT4_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "dynamic": False,
                "observer": "minmax",
                "observer_kwargs": {},
                "actorder": None,
                "block_structure": None,
            },
        }
    },
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json of Kimi-K2's keys, small enough for thousands of runs."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "routed_scaling_factor": 2.827,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "max_position_embeddings": 512,
        "bos_token_id": 158,
        "eos_token_id": 159,
        "tie_word_embeddings": False,
        **changes,
    }


def random_weights(config: Mapping[str, Any], *, seed: int) -> Weights:
    """Float32 weights under the checkpoint's names, of sizes that keep a forward pass alive."""
    generator = torch.Generator().manual_seed(seed)
    hidden, heads, experts = config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]
    query = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    key_value = heads * (config["qk_nope_head_dim"] + config["v_head_dim"])
    latent = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    weights: Weights = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=generator)

    def mlp(name: str, width: int) -> None:
        matrix(f"{name}.gate_proj", width, hidden)
        matrix(f"{name}.up_proj", width, hidden)
        matrix(f"{name}.down_proj", hidden, width)

    matrix("model.embed_tokens", config["vocab_size"], hidden)
    weights["model.embed_tokens.weight"] *= hidden**0.5
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        norm(f"{at}.input_layernorm", hidden)
        norm(f"{at}.post_attention_layernorm", hidden)
        matrix(f"{at}.self_attn.q_a_proj", config["q_lora_rank"], hidden)
        norm(f"{at}.self_attn.q_a_layernorm", config["q_lora_rank"])
        matrix(f"{at}.self_attn.q_b_proj", query, config["q_lora_rank"])
        matrix(f"{at}.self_attn.kv_a_proj_with_mqa", latent, hidden)
        norm(f"{at}.self_attn.kv_a_layernorm", config["kv_lora_rank"])
        matrix(f"{at}.self_attn.kv_b_proj", key_value, config["kv_lora_rank"])
        matrix(f"{at}.self_attn.o_proj", hidden, heads * config["v_head_dim"])
        if layer < config["first_k_dense_replace"]:
            mlp(f"{at}.mlp", config["intermediate_size"])
            continue
        matrix(f"{at}.mlp.gate", experts, hidden)
        bias = 0.05 * torch.randn(experts, generator=generator)
        weights[f"{at}.mlp.gate.e_score_correction_bias"] = bias
        for expert in range(experts):
            mlp(f"{at}.mlp.experts.{expert}", config["moe_intermediate_size"])
        mlp(f"{at}.mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])
    norm("model.norm", hidden)
    matrix("lm_head", config["vocab_size"], hidden)
    return weights


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    *,
    format: str = "bf16",
    n_shards: int = 3,
    prefix: str = "",
) -> Weights:
    """Write a folder as its makers would ("bf16", "f32", "fp8", "int4") and return what the weights became.

    INT4 is for routed experts only, FP8 for all Linear weights but head and router, as published."""
    stored: Weights = {}
    dequantized: Weights = {}
    for name, weight in weights.items():
        parts, value = _store(name, weight.float(), format)
        stored |= {prefix + part: tensor for part, tensor in parts.items()}
        dequantized[name] = value
    folder.mkdir(parents=True)
    config = dict(config)
    if format in ("fp8", "int4"):
        block = {"quantization_config": FP8_CONFIG if format == "fp8" else INT4_CONFIG}
        if "text_config" in config:
            config["text_config"] = {**config["text_config"], **block}
        else:
            config |= block
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_shards(folder, stored, n_shards)
    return dequantized


def write_shards(folder: Path, stored: Mapping[str, torch.Tensor], n_shards: int) -> None:
    """The tensors in shards with an index, or in a single file."""
    if n_shards == 1:
        save_file(dict(stored), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(stored), {}
    for shard in range(n_shards):
        # 0905's odd pattern: five digits, then six
        file = f"model-{shard + 1:05d}-of-{n_shards:06d}.safetensors"
        part = names[shard::n_shards] if shard % 2 else names[shard::n_shards][::-1]
        save_file({name: stored[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _store(name: str, weight: torch.Tensor, format: str) -> tuple[Weights, torch.Tensor]:
    module = name.removesuffix(".weight")
    linear = name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))
    if name.endswith("e_score_correction_bias") or format == "f32":
        return {name: weight}, weight
    if format == "fp8" and linear:
        codes, scale, value = _fp8_blocks(weight)
        return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scale}, value
    if format == "int4" and ".mlp.experts." in name:
        packed, scale, value = _int4_groups(weight)
        shape = torch.tensor(weight.shape, dtype=torch.int32)
        return {
            f"{module}.weight_packed": packed,
            f"{module}.weight_scale": scale,
            f"{module}.weight_shape": shape,
        }, value
    rounded = weight.to(torch.bfloat16)
    return {name: rounded}, rounded.float()


def _fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block by block, in a plain loop."""
    rows, columns = weight.shape
    scale = torch.ones(-(-rows // 128), -(-columns // 128))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    value = torch.empty(rows, columns)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scale[i, j] = block.abs().max() / 448.0
            code = (block / scale[i, j]).to(torch.float8_e4m3fn)
            codes[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = code
            value[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = code.float() * scale[i, j]
    return codes, scale, value


def _int4_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Through numpy and byte strings: two codes a byte, the lower column in the low nibble."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // 32, 32)
    scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    codes = (groups / scale.float()[..., None]).round().clamp(-7, 7)
    value = (codes * scale.float()[..., None]).view(rows, columns)
    nibbles = codes.view(rows, columns).numpy().astype(np.int16) + 8
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.uint8)
    return torch.from_numpy(packed.view("<i4").copy()), scale, value
