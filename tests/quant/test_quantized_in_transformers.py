"""Quantized folders as an independent reader takes them: transformers with compressed-tensors, with default settings.

Loading is not enough, since badly targeted mixes load and are off; in BF16 the logits must be exactly those of a plain
folder that holds the dequantized weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from k2lite.model_folder import open_model
from k2lite.quant.expert_layout import expert_weights, read_extents
from k2lite.quant.recipe import Recipe
from k2lite.quant.types import PROJECTIONS, ExpertKey
from tests.quant.quantizing import run, write_source

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """BF16 values of a folder by plain names."""
    _, checkpoint = open_model(folder)
    assert checkpoint.problems == ()
    weights = {name: checkpoint.trunk(name).dequantize() for name in checkpoint.schema.trunk}
    for layer in checkpoint.schema.expert_layers:
        for expert in range(checkpoint.schema.n_routed_experts):
            layout = checkpoint.expert(ExpertKey(layer, expert))
            made = expert_weights(layout, read_extents(layout))
            for projection, weight in zip(PROJECTIONS, made, strict=True):
                weights[f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"] = weight.dequantize()
    return {
        name: value if name.endswith("e_score_correction_bias") else value.to(torch.bfloat16)
        for name, value in weights.items()
    }


def plain_folder(quantized: Path, folder: Path) -> None:
    folder.mkdir()
    config = json.loads((quantized / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dequantized(quantized), folder / "model.safetensors", metadata={"format": "pt"})


def logits(folder: Path, **options: Any) -> torch.Tensor:
    from transformers import DeepseekV3ForCausalLM

    model, info = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True, **options
    )
    assert {key: value for key, value in info.items() if value} == {}, info
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(torch.tensor([IDS]), use_cache=False).logits[0]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("source", "recipe", "decompress"),
    [
        ("bf16", Recipe("int4_g32", "keep", "keep"), False),
        ("bf16", Recipe("int4_g32", "int8_g128", "keep"), False),
        ("bf16", Recipe("int4_g64", "int8_channel", "keep", scale_search="mse"), False),
        ("bf16", Recipe("int4_g128", "int8_g128", "int8_g128"), False),
        ("int4", Recipe("keep", "int8_g128", "keep"), False),
        ("fp8", Recipe("int4_g32", "keep", "keep"), True),
    ],
)
def test_logits_are_exactly_those_of_the_dequantized_weights(
    tmp_path: Path, source: str, recipe: Recipe, decompress: bool
) -> None:
    write_source(tmp_path / "source", source, model_type="deepseek_v3")
    run(tmp_path / "source", tmp_path / "quantized", recipe)
    plain_folder(tmp_path / "quantized", tmp_path / "plain")
    options = {}
    if decompress:
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    ours, theirs = logits(tmp_path / "plain"), logits(tmp_path / "quantized", **options)
    assert torch.equal(ours, theirs), float((ours - theirs).abs().max() / ours.abs().max())
