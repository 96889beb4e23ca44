"""A trunk of packed integers or of FP8 blocks multiplies as its dequantized weights do, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import k2lite
from k2lite.quant.declaration import declaration
from k2lite.quant.formats import format_named
from k2lite.quant.fp8 import Fp8Block
from tests.checkpoints import Weights, random_weights, tiny_config, write_checkpoint, write_shards

# rows of whole groups of 128 wherever a Linear has its inputs
SIZES = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2}
CONFIG = tiny_config(**SIZES, n_routed_experts=4, q_lora_rank=128, kv_lora_rank=128, v_head_dim=32)
IDS = [3, 150, 7, 7, 21, 90]


def write(folder: Path, experts: str, trunk: str) -> Weights:
    """Write a folder in these formats; return its values."""
    stored: Weights = {}
    values: Weights = {}
    for name, weight in random_weights(CONFIG, seed=8).items():
        module = name.removesuffix(".weight")
        linear = name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))
        chosen = (experts if ".mlp.experts." in name else trunk) if linear else "f32"
        fmt = Fp8Block("weight_scale") if chosen.startswith("fp8") else format_named(chosen)
        parts = fmt.quantize(weight)
        stored |= {f"{module}.{suffix}" if linear else name: part for suffix, part in parts.items()}
        values[name] = fmt.dequantize(parts, tuple(weight.shape))
    folder.mkdir()
    config = {**CONFIG, "quantization_config": declaration(experts, trunk)}
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(folder, stored, 1)
    return values


@pytest.mark.parametrize(
    ("experts", "trunk"),
    [("int4_g32", "int8_g128"), ("int8_g128", "int8_channel"), ("int4_g128", "fp8_e4m3_b128")],
)
def test_logits_are_those_of_the_dequantized_weights(tmp_path: Path, experts: str, trunk: str) -> None:
    values = write(tmp_path / "quantized", experts, trunk)
    write_checkpoint(tmp_path / "plain", CONFIG, values, format="f32")
    quantized, plain = (
        k2lite.load(tmp_path / name, backend="reference").logits(IDS) for name in ("quantized", "plain")
    )
    assert torch.equal(quantized, plain)
    assert quantized.shape == (len(IDS), CONFIG["vocab_size"])
