"""transformers' DeepseekV3 as the oracle of the maths: it reads a plain float32 folder that holds the dequantized
weights, so its own readers of compressed formats play no part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def load_oracle(folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
    """A DeepseekV3ForCausalLM in float32 with exactly these weights."""
    from transformers import DeepseekV3ForCausalLM

    folder.mkdir()
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    plain |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(plain))
    tensors = {name: torch.as_tensor(value).float().contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    # a half-loaded oracle runs happily with random weights
    assert {key: value for key, value in info.items() if value} == {}, info
    return model.eval()


@torch.inference_mode()
def oracle_logits(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


@torch.inference_mode()
def oracle_greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    """Greedy tokens through the oracle's own cache."""
    out: list[int] = []
    state = model(torch.tensor([ids]), use_cache=True)
    for _ in range(tokens):
        out.append(int(state.logits[0, -1].argmax()))
        state = model(torch.tensor([out[-1:]]), past_key_values=state.past_key_values, use_cache=True)
    return out


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
