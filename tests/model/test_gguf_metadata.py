"""A config through GGUF metadata and back, and what llama.cpp can't express."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2lite.config import parse_config
from k2lite.gguf_metadata import config_of, metadata_of
from k2lite.gguf_model import export_metadata
from k2lite.quant.errors import ConfigError
from tests.checkpoints import tiny_config

PATH = Path("m.gguf")
YARN = {"type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
# What a GGUF file does not hold, or holds elsewhere (the tokenizer's ids).
ELSEWHERE = {"source", "unknown_keys", "quantization_config", "bos_token_id", "eos_token_ids", "model_type",
             "num_nextn_predict_layers"}  # fmt: skip


def metadata(raw: dict[str, Any]) -> dict[str, Any]:
    """As a file gives it back: every float is a float32."""
    made = metadata_of(parse_config(raw, Path("config.json")), name="m", type_name="q8_0")
    return {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in made.items()}


def facts(raw: dict[str, Any]) -> dict[str, Any]:
    config = dataclasses.asdict(parse_config(raw, Path("config.json")))
    return {key: value for key, value in config.items() if key not in ELSEWHERE}


@pytest.mark.parametrize("model", ["Kimi-K2-Instruct", "Kimi-K2.5", "Kimi-K2.6", "DeepSeek-V3"])
def test_published_configs_come_back(shared: Path, model: str) -> None:
    raw = json.loads((shared / "data" / model / "config.json").read_text())
    assert facts(config_of(metadata(raw), PATH)[0]) == facts(raw)


@pytest.mark.parametrize("scaling", [None, YARN, YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}])
def test_rotary_settings_come_back(scaling: dict[str, Any] | None) -> None:
    raw = tiny_config(rope_scaling=scaling)
    assert facts(config_of(metadata(raw), PATH)[0]) == facts(raw)


def test_the_family_follows_from_the_tokenizer() -> None:
    made = metadata(tiny_config())
    assert config_of(made, PATH)[0]["model_type"] == "deepseek_v3"
    assert config_of({**made, "tokenizer.ggml.pre": "kimi-k2"}, PATH)[0]["model_type"] == "kimi_k2"


def test_what_differs_in_llama_cpp_is_noted(tmp_path: Path) -> None:
    raw = tiny_config(rope_scaling=YARN, rms_norm_eps=1e-5)
    _, notes = export_metadata(tmp_path, parse_config(raw, Path("config.json")), "bf16")
    assert any("run it with --yarn-beta-fast 1 --yarn-beta-slow 1" in note for note in notes)
    assert any("the eps 1e-05 for the norms of MLA's latents, where k2lite uses 1e-06" in note for note in notes)
    usual = tiny_config(rope_scaling=YARN | {"beta_fast": 32.0})
    _, notes = export_metadata(tmp_path, parse_config(usual, Path("config.json")), "bf16")
    assert not any("--yarn-beta" in note or "eps" in note for note in notes)
    old = metadata(raw)
    del old["deepseek2.rope.scaling.yarn_beta_fast"]
    config, notes = config_of(old, PATH)
    assert config["rope_scaling"]["beta_fast"] == 32.0
    assert any("says no yarn_beta_fast; 32 is taken" in note for note in notes)


def test_what_can_t_be_said_or_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"mscale is 1.0 and mscale_all_dim 0.7; .* must be equal"):
        metadata(tiny_config(rope_scaling=YARN | {"mscale_all_dim": 0.7}))
    made = metadata(tiny_config(rope_scaling=YARN))
    for change, message in (
        ({"general.architecture": "llama"}, "general.architecture is 'llama'"),
        ({"deepseek2.expert_gating_func": 1}, "expert_gating_func is 1; supported: 2"),
        ({"deepseek2.expert_count": None}, "deepseek2.expert_count is missing"),
        ({"deepseek2.expert_count": "8"}, "deepseek2.expert_count is '8'"),
        ({"deepseek2.rope.scaling.type": "linear"}, "rope.scaling.type is 'linear'"),
        ({"deepseek2.rope.scaling.yarn_log_multiplier": None}, "yarn_log_multiplier is missing"),
        ({"deepseek2.rope.freq_base": "x"}, "rope.freq_base is 'x'; supported: a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of({**made, **change}, PATH)
