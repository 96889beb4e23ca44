"""The trained model as Moonshot stores K2-Instruct: FP8 blocks, several shards, an index, config, tokenizer files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from k2lite.model_folder import open_model
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.expert_layout import expert_weights, read_extents
from k2lite.quant.formats import FP8_NAME, format_named
from k2lite.quant.schema import CheckpointSchema
from k2lite.quant.types import ExpertKey

from .transformer import Transformer

N_SHARDS = 4
TOKENIZER_FILES = ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja")


def checkpoint_weights(model: Transformer) -> dict[str, Tensor]:
    """Float32 weights under the checkpoint's names."""
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        value = value.float()
        if name.endswith("mlp.gate_up_proj"):
            for expert, matrix in enumerate(value):
                at = f"model.{name.removesuffix('.gate_up_proj')}.experts.{expert}"
                weights[f"{at}.gate_proj.weight"] = matrix[0].clone()
                weights[f"{at}.up_proj.weight"] = matrix[1].clone()
        elif name.endswith("mlp.down_proj"):
            for expert, matrix in enumerate(value):
                at = f"model.{name.removesuffix('.down_proj')}.experts.{expert}"
                weights[f"{at}.down_proj.weight"] = matrix.clone()
        elif name.endswith("mlp.router.weight"):
            weights[f"model.{name.replace('router', 'gate')}"] = value
        elif name.endswith("mlp.bias"):
            weights[f"model.{name.replace('mlp.bias', 'mlp.gate.e_score_correction_bias')}"] = value
        else:
            weights[name if name.startswith("lm_head") else f"model.{name}"] = value
    return weights


def load_exported(model: Transformer, folder: Path) -> None:
    """Give `model` the weights of an exported folder, so that training goes on from what was shipped."""
    _, checkpoint = open_model(folder)
    checkpoint.raise_for_problems()
    load_values(model, checkpoint.schema, values_of(checkpoint))


def values_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights in float32, by stored name without ".weight"."""
    schema = checkpoint.schema
    values = {
        schema.prefix + name.removesuffix(".weight"): checkpoint.trunk(name).dequantize() for name in schema.trunk
    }
    for layer in schema.expert_layers:
        for number in range(schema.n_routed_experts):
            layout = checkpoint.expert(ExpertKey(layer, number))
            at = f"{schema.prefix}model.layers.{layer}.mlp.experts.{number}"
            made = expert_weights(layout, read_extents(layout))
            values |= {f"{at}.{name}": weight.dequantize() for name, weight in made._asdict().items()}
    return values


def load_values(model: Transformer, schema: CheckpointSchema, values: Mapping[str, Tensor]) -> None:
    """Give `model` these weights. Gate and up, and the experts of a layer, become stacks."""
    state = model.state_dict()
    for layer in schema.expert_layers:
        experts = [f"model.layers.{layer}.mlp.experts.{number}" for number in range(schema.n_routed_experts)]
        pairs = [torch.stack((values[f"{at}.gate_proj"], values[f"{at}.up_proj"])) for at in experts]
        state[f"layers.{layer}.mlp.gate_up_proj"] = torch.stack(pairs)
        state[f"layers.{layer}.mlp.down_proj"] = torch.stack([values[f"{at}.down_proj"] for at in experts])
    for name in schema.trunk:
        own = name.removeprefix("model.").replace("mlp.gate.e_score_correction_bias", "mlp.bias")
        state[own.replace("mlp.gate.weight", "mlp.router.weight")] = values[name.removesuffix(".weight")]
    model.load_state_dict(state)


def store(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The stored tensors of a weight: FP8 for the projections, BF16 for the rest, F32 for the router's bias."""
    if name.endswith("e_score_correction_bias"):
        return {name: weight}
    if "_proj" in name:
        parts = format_named(FP8_NAME).quantize(weight)
        return {f"{name.removesuffix('.weight')}.{suffix}": part for suffix, part in parts.items()}
    return {name: weight.to(torch.bfloat16)}


@torch.no_grad()
def round_like_export(model: Transformer) -> None:
    """Give the model the values that the exported weights have, so that it is evaluated as it ships."""
    fp8 = format_named(FP8_NAME)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            for matrix in parameter.view(-1, *parameter.shape[-2:]):
                matrix.copy_(fp8.dequantize(fp8.quantize(matrix.contiguous()), tuple(matrix.shape)))
        else:
            parameter.copy_(parameter.to(torch.bfloat16))


def export(model: Transformer, config: dict[str, Any], tokenizer_folder: Path, folder: Path) -> None:
    """Write the whole folder beside itself and put it in place by renaming."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stored = {
        part: value for name, weight in checkpoint_weights(model).items() for part, value in store(name, weight).items()
    }
    names = list(stored)
    weight_map: dict[str, str] = {}
    for shard in range(N_SHARDS):
        file = f"model-{shard + 1}-of-{N_SHARDS}.safetensors"
        part = names[len(names) * shard // N_SHARDS : len(names) * (shard + 1) // N_SHARDS]
        save_file({name: stored[name].contiguous() for name in part}, partial / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in stored.values())
    _write_json(partial / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(partial / "config.json", config)
    generation = {
        "max_length": config["max_position_embeddings"],
        "eos_token_id": config["eos_token_id"] + 1,
        "temperature": 0.0,
    }
    _write_json(partial / "generation_config.json", generation)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_folder / name, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
