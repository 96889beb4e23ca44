"""A small folder in each format, the schema that it fulfils, and ways to damage it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.errors import CheckpointError
from k2lite.quant.quantization_config import parse_quantization_config
from k2lite.quant.schema import CheckpointSchema, IgnoredTensor, TrunkSpec
from tests.checkpoints import FP8_CONFIG, INT4_CONFIG, Weights, random_weights, tiny_config

INDEX = "model.safetensors.index.json"
CONFIG = tiny_config(num_hidden_layers=2, n_routed_experts=4, hidden_size=160, moe_intermediate_size=96, q_lora_rank=40)
DECLARED = {"bf16": None, "f32": None, "fp8": FP8_CONFIG, "int4": INT4_CONFIG}
EXPERT_SHAPES = {"gate_proj": (96, 160), "up_proj": (96, 160), "down_proj": (160, 96)}


def schema_of(weights: Weights, prefix: str = "", *, hidden: int = 160, width: int = 96) -> CheckpointSchema:
    """Written from the weights themselves, not by the code that makes schemas from configs."""
    plain = ("norm.weight", "embed_tokens.weight", "mlp.gate.weight", "bias")
    return CheckpointSchema(
        prefix=prefix,
        trunk={
            name: TrunkSpec(tuple(weight.shape), quantizable=not name.endswith(plain))
            for name, weight in weights.items()
            if ".mlp.experts." not in name
        },
        expert_layers=(1,),
        n_routed_experts=4,
        hidden_size=hidden,
        moe_intermediate_size=width,
        ignored=(
            IgnoredTensor(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "rotary frequencies"),
            IgnoredTensor(r"vision_tower\..*", "vision"),
        ),
    )


WEIGHTS = random_weights(CONFIG, seed=3)


def open_folder(folder: Path, format: str = "fp8", prefix: str = "") -> Checkpoint:
    quantization = parse_quantization_config(DECLARED[format], folder / "config.json")
    return Checkpoint.open(folder, schema_of(WEIGHTS, prefix), quantization)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_shard(path: Path, edit: Callable[[Weights], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


def change(folder: Path, name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a stored tensor; the index stays true but for its total_size."""
    edit_shard(shard_of(folder, name), lambda tensors: tensors.update({name: value(tensors[name])}))


def add(folder: Path, name: str, tensor: torch.Tensor, *, to: str = "lm_head.weight") -> None:
    path = shard_of(folder, to)
    edit_shard(path, lambda tensors: tensors.update({name: tensor}))
    edit_index(folder, lambda index: index["weight_map"].update({name: path.name}))


def remove(folder: Path, name: str) -> Path:
    path = shard_of(folder, name)
    edit_shard(path, lambda tensors: tensors.pop(name))
    edit_index(folder, lambda index: index["weight_map"].pop(name))
    return path


def the_problem(folder: Path, format: str = "fp8") -> str:
    checkpoint = open_folder(folder, format)
    assert len(checkpoint.problems) == 1, checkpoint.problems
    with pytest.raises(CheckpointError, match="can't be used, 1 problem"):
        checkpoint.raise_for_problems()
    return checkpoint.problems[0]


Q_A = "model.layers.0.self_attn.q_a_proj"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"
