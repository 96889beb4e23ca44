"""The mistakes that other implementations made (formats.md 3.4 to 3.7), each with a model that would show it.

Where the oracle's logits already catch a mistake, the test here makes that mistake on purpose and sees the logits move:
the bound of test_against_transformers.py would not hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import k2lite
from k2lite.backends import base
from k2lite.backends.base import Backend, RoutingRule
from k2lite.config import ModelConfig
from k2lite.errors import CheckpointError, TokenizerError
from k2lite.model_folder import open_model
from k2lite.rope import RopeConfig
from k2lite.text.byte_tokenizer import write_byte_tokenizer
from tests.checkpoints import FP8_CONFIG, random_weights, tiny_config, write_checkpoint, write_shards

from .oracle import relative_error

IDS = list(range(3, 50))
# with theta 100 the blend of frequencies depends on beta_fast at this small width too
THETA = 100.0
YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traps") / "model"
    config = tiny_config(rope_scaling=YARN, rope_theta=THETA)
    write_checkpoint(folder, config, random_weights(config, seed=2), format="bf16")
    return folder


@pytest.fixture(scope="module")
def right(model: Path) -> torch.Tensor:
    return k2lite.load(model, backend="reference").logits(IDS)


def _no_mscale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RopeConfig, "softmax_mscale", 1.0)


def _mscale_once(patch: pytest.MonkeyPatch) -> None:
    scale: Callable[[ModelConfig], float] = ModelConfig.softmax_scale.fget  # type: ignore[attr-defined]
    patch.setattr(ModelConfig, "softmax_scale", property(lambda c: scale(c) / c.rope.softmax_mscale))


def _beta_fast_of_the_library(patch: pytest.MonkeyPatch) -> None:
    original = RopeConfig.frequencies

    def frequencies(rope: RopeConfig) -> Any:
        assert rope.yarn is not None
        return original(replace(rope, yarn=replace(rope.yarn, beta_fast=32.0)))

    patch.setattr(RopeConfig, "frequencies", frequencies)


def _half_rotation(patch: pytest.MonkeyPatch) -> None:
    def rope(_: Backend, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        between = [1] * (x.dim() - 2)
        cos, sin = (table.view(table.shape[0], *between, table.shape[1]) for table in (cos, sin))
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)

    patch.setattr(Backend, "rope", rope)


def _route(change: Callable[[torch.Tensor, torch.Tensor, RoutingRule], tuple[torch.Tensor, torch.Tensor]]) -> Any:
    def apply(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(base, "route", change)

    return apply


def _bias_in_the_weights(logits: torch.Tensor, bias: torch.Tensor, rule: RoutingRule) -> Any:
    scores = torch.sigmoid(logits) + bias
    ids = scores.topk(rule.num_experts_per_tok).indices.sort().values
    return ids, scores[ids] / scores[ids].sum() * rule.routed_scaling_factor


def _normalized_over_all(logits: torch.Tensor, bias: torch.Tensor, rule: RoutingRule) -> Any:
    scores = torch.sigmoid(logits)
    ids = (scores + bias).topk(rule.num_experts_per_tok).indices.sort().values
    return ids, scores[ids] / scores.sum() * rule.routed_scaling_factor


def _softmax_scores(logits: torch.Tensor, bias: torch.Tensor, rule: RoutingRule) -> Any:
    scores = torch.softmax(logits, -1)
    ids = (scores + bias).topk(rule.num_experts_per_tok).indices.sort().values
    return ids, scores[ids] / scores[ids].sum() * rule.routed_scaling_factor


def _shared_expert_scaled(patch: pytest.MonkeyPatch) -> None:
    original = Backend.combine
    patch.setattr(Backend, "combine", lambda b, out, weights, shared: original(b, out, weights, shared * 2.827))


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "mscale missing from the softmax scale": _no_mscale,
    "mscale not squared": _mscale_once,
    "beta_fast 32 instead of 1": _beta_fast_of_the_library,
    "half rotation": _half_rotation,
    "bias in the final weights": _route(_bias_in_the_weights),
    "weights normalized over all experts": _route(_normalized_over_all),
    "softmax instead of sigmoid": _route(_softmax_scores),
    "routed scaling applied to the shared expert": _shared_expert_scaled,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_would_be_seen(
    model: Path, right: torch.Tensor, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    MISTAKES[mistake](monkeypatch)
    assert relative_error(k2lite.load(model, backend="reference").logits(IDS), right) > 1e-3


@pytest.mark.parametrize("projection", ["q_b_proj", "kv_a_proj_with_mqa"])
def test_the_rotary_part_taken_first_would_be_seen(
    model: Path, right: torch.Tensor, tmp_path: Path, projection: str
) -> None:
    """Rows with the rotary part moved to the front give what a reader that expects it there makes of the true ones."""
    config = json.loads((model / "config.json").read_text())
    weights = random_weights(config, seed=2)
    rotary = config["qk_rope_head_dim"]
    for name in [name for name in weights if projection in name]:
        heads = config["num_attention_heads"] if projection == "q_b_proj" else 1
        rows = weights[name].view(heads, -1, weights[name].shape[1])
        weights[name] = rows.roll(rotary, 1).reshape(weights[name].shape)
    write_checkpoint(tmp_path / "model", config, weights, format="bf16")
    assert relative_error(k2lite.load(tmp_path / "model", backend="reference").logits(IDS), right) > 1e-3


def test_generation_defaults_inside_config_json_are_no_recommendation(tmp_path: Path) -> None:
    """K2.5's text_config carries the library's top_k 50 and temperature 1.0."""
    text = tiny_config(top_k=50, top_p=0.5, temperature=1.0, do_sample=False, max_length=20)
    weights = {f"language_model.{name}": value for name, value in random_weights(text, seed=2).items()}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text, "top_k": 9}))
    write_shards(tmp_path, weights, 1)
    engine = k2lite.load(tmp_path, backend="reference")
    assert engine.recommended_sampling == k2lite.SamplingParams()
    assert len(list(engine.generate([1], max_tokens=30, temperature=0, stop_ids=frozenset()))) == 30


def extended(folder: Path, config: dict[str, Any], extra: dict[str, torch.Tensor], prefix: str = "") -> None:
    """A checkpoint with more tensors than the model needs."""
    text = config.get("text_config", config)
    weights = {prefix + name: value for name, value in random_weights(text, seed=2).items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(folder, weights | extra, 2)


def test_left_over_inv_freq_is_ignored_and_listed(tmp_path: Path) -> None:
    """K2-Instruct carries one a layer, of the wrong length."""
    config = tiny_config()
    extra = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(56) for n in range(3)}
    extended(tmp_path / "with", config, extra)
    extended(tmp_path / "without", config, {})
    _, checkpoint = open_model(tmp_path / "with")
    assert checkpoint.problems == ()
    ((reason, names),) = checkpoint.ignored.items()
    assert "rotary" in reason
    assert sorted(names) == sorted(extra)
    assert torch.equal(
        k2lite.load(tmp_path / "with", backend="reference").logits(IDS),
        k2lite.load(tmp_path / "without", backend="reference").logits(IDS),
    )


def test_the_multi_token_prediction_layer_is_skipped_and_listed(tmp_path: Path) -> None:
    """DeepSeek-V3 has a layer more than num_hidden_layers says; without num_nextn_predict_layers it is an error."""
    config = tiny_config(model_type="deepseek_v3", num_nextn_predict_layers=1)
    names = ("eh_proj", "enorm", "shared_head.head", "mlp.experts.0.up_proj")
    extra = {f"model.layers.3.{name}.weight": torch.ones(4, 4) for name in names}
    extended(tmp_path / "model", config, extra)
    _, checkpoint = open_model(tmp_path / "model")
    assert checkpoint.problems == ()
    assert [sorted(names) for names in checkpoint.ignored.values()] == [sorted(extra)]
    assert len(k2lite.load(tmp_path / "model", backend="reference").logits([1, 2])) == 2

    extended(tmp_path / "unknown", {**config, "num_nextn_predict_layers": 0}, extra)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight"):
        k2lite.load(tmp_path / "unknown", backend="reference")


def test_vision_parts_are_skipped_and_listed(tmp_path: Path) -> None:
    config = {"model_type": "kimi_k25", "text_config": tiny_config(), "vision_config": {}}
    extra = {"vision_tower.encoder.blocks.0.wo.weight": torch.ones(2), "mm_projector.proj.0.bias": torch.ones(2)}
    extended(tmp_path / "model", config, extra, prefix="language_model.")
    _, checkpoint = open_model(tmp_path / "model")
    assert checkpoint.problems == ()
    assert [sorted(names) for names in checkpoint.ignored.values()] == [sorted(extra)]
    assert len(k2lite.load(tmp_path / "model", backend="reference").logits([1, 2])) == 2


def test_a_scale_is_a_multiplier_in_spite_of_its_name(tmp_path: Path) -> None:
    """Doubling every weight_scale_inv of a projection doubles its values."""
    config = tiny_config(quantization_config=FP8_CONFIG)
    name = "model.layers.0.self_attn.o_proj"
    weights = random_weights(config, seed=2)
    weights[f"{name}.weight_scale_inv"] = torch.full((1, 1), 2.0)
    weights[f"{name}.weight"] = torch.ones(64, 80).to(torch.float8_e4m3fn)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    write_shards(tmp_path / "model", weights, 1)
    _, checkpoint = open_model(tmp_path / "model")
    assert checkpoint.trunk(f"{name}.weight").dequantize().eq(2.0).all()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path / "model", config, random_weights(config, seed=2), format="bf16")
    write_byte_tokenizer(tmp_path / "model")
    with pytest.raises(TokenizerError, match="tokenizer has 512 tokens and config.json's vocab_size is 160"):
        k2lite.load(tmp_path / "model", backend="reference")
