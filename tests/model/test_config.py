"""ModelConfig: the published configs, both spellings of rope, and each unsupported value refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from k2lite.config import ModelConfig, parse_config, read_config
from k2lite.quant.errors import ConfigError
from k2lite.rope import YarnConfig
from tests.checkpoints import tiny_config

SOURCE = Path("config.json")


def parse(**changes: Any) -> ModelConfig:
    raw = {key: value for key, value in {**tiny_config(), **changes}.items() if value is not ...}
    return parse_config(raw, SOURCE)


# What formats.md 1.1 says of each published file: layers, experts, eps, factor, beta_fast, max positions, eos.
PUBLISHED = {
    "Kimi-K2-Instruct": ("kimi_k2", 61, 384, 1e-6, 32.0, 1.0, 131072, (163585,), ""),
    "Kimi-K2.5": ("kimi_k25", 61, 384, 1e-5, 64.0, 32.0, 262144, (163585,), "language_model."),
    "Kimi-K2.6": ("kimi_k25", 61, 384, 1e-5, 64.0, 32.0, 262144, (163586,), "language_model."),
    "Kimi-K2.7-Code-NVFP4": ("kimi_k25", 61, 384, 1e-5, 64.0, 32.0, 262144, (163586,), "language_model."),
    "DeepSeek-V3": ("deepseek_v3", 61, 256, 1e-6, 40.0, 32.0, 163840, (1,), ""),
    "DeepSeek-R1": ("deepseek_v3", 61, 256, 1e-6, 40.0, 32.0, 163840, (1,), ""),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(shared: Path, name: str) -> None:
    config = read_config(shared / "data" / name)
    yarn = config.rope.yarn
    assert yarn is not None
    assert (
        config.model_type,
        config.num_hidden_layers,
        config.n_routed_experts,
        config.rms_norm_eps,
        yarn.factor,
        yarn.beta_fast,
        config.max_position_embeddings,
        config.eos_token_ids,
        config.tensor_prefix,
    ) == PUBLISHED[name]
    assert config.latent_dim == 576
    assert config.latent_norm_eps == 1e-6
    assert config.unknown_keys == ()


def test_a_reconstructed_thinking_config(shared: Path) -> None:
    raw = json.loads((shared / "data" / "Kimi-K2-Thinking" / "config.reconstructed.json").read_text())
    config = parse_config(raw, SOURCE)
    assert config.rope.yarn == YarnConfig(64.0, 4096, 1.0, 1.0, 1.0, 1.0)
    assert config.rms_norm_eps == 1e-5
    assert config.unknown_keys == ("_note",)


@pytest.mark.parametrize("name", ["Kimi-K3", "DeepSeek-V3.2", "Qwen3-30B-A3B", "Qwen3-Next-80B-A3B-Thinking"])
def test_other_architectures_are_refused_by_name(shared: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"model_type is '.*'; supported: 'kimi_k2', 'kimi_k25', 'deepseek_v3'"):
        read_config(shared / "data" / name)


def test_deepseek_routes_in_groups_and_has_an_extra_layer(shared: Path) -> None:
    config = read_config(shared / "data" / "DeepSeek-V3")
    assert (config.n_group, config.topk_group, config.num_nextn_predict_layers) == (8, 4, 1)
    assert config.first_k_dense_replace == 3


UNSUPPORTED = {
    "hidden_act": "gelu",
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "attention_bias": True,
    "tie_word_embeddings": True,
    "moe_layer_freq": 2,
    "num_key_value_heads": 1,
    "q_lora_rank": None,
    "n_shared_experts": None,
    "rope_interleave": False,
    "sliding_window": 4096,
    "index_topk": 2048,
    "num_experts_per_tok": 99,
    "hidden_size": 0,
    "vocab_size": "many",
    "num_hidden_layers": True,
    "rms_norm_eps": float("nan"),
    "norm_topk_prob": 1,
    "first_k_dense_replace": 9,
    "eos_token_id": "end",
    "qk_rope_head_dim": 7,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": None,
    "mlp_bias": True,
    "linear_attn_config": {"num_heads": 2},
    "index_n_heads": 64,
    "index_head_dim": 128,
    "qk_head_dim": 8,
    "head_dim": 24,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1.0,
    "num_nextn_predict_layers": -1,
    "max_position_embeddings": 512.0,
    "v_head_dim": -20,
    "num_attention_heads": False,
    "kv_lora_rank": "32",
    "intermediate_size": [96],
    "bos_token_id": -1,
    "rope_scaling": 4.0,
    "quantization_config": "fp8",
}
# numbers that Python holds and no model has: they must not become an OverflowError or a loop without end
ENORMOUS = {
    "rms_norm_eps": 10**400,
    "routed_scaling_factor": -(10**400),
    "rope_theta": 10**4000,
    "hidden_size": 10**400,
    "num_hidden_layers": 10**9,
    "n_routed_experts": 10**9,
    "num_nextn_predict_layers": 10**9,
}


@pytest.mark.parametrize("key", ENORMOUS)
def test_enormous_numbers_are_refused_in_few_words(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is .*supported") as caught:
        parse(**{key: ENORMOUS[key]})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [8.0, True, None, "4"])
def test_a_derived_size_must_be_that_integer(value: Any) -> None:
    for key in ("num_key_value_heads", "head_dim", "qk_head_dim"):
        with pytest.raises(ConfigError, match=f"{key} is {value!r}; supported: "):
            parse(**{key: value})
    assert parse(head_dim=8, qk_head_dim=24, num_key_value_heads=4) == parse()


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_values_are_refused_naming_key_and_value(key: str) -> None:
    value = UNSUPPORTED[key]
    with pytest.raises(ConfigError) as caught:
        parse(**{key: value})
    message = str(caught.value)
    assert key in message
    assert repr(value) in message or str(value) in message
    assert "supported" in message or "must" in message or "expected" in message


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "kv_lora_rank", "routed_scaling_factor", "rms_norm_eps"])
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        parse(**{key: ...})


@pytest.mark.parametrize(
    ("block", "key"),
    [
        ({"type": "linear", "factor": 2.0}, "type"),
        ({"rope_type": "llama3", "factor": 2.0}, "rope_type"),
        ({"type": "yarn", "original_max_position_embeddings": 64}, "factor"),
        ({"type": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 2.0}, "attention"),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}, "truncate"),
        ({"type": "yarn", "rope_type": "default", "factor": 4.0}, "type"),
        ({"type": "yarn", "factor": None, "original_max_position_embeddings": 64}, "factor"),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7}, "mscale_all_dim"),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale_all_dim": 1}, "mscale is"),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 0}, "beta_fast is 0"),
        ({"type": "default", "partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25; supported: 1"),
    ],
)
def test_unsupported_rope_is_refused(block: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse(rope_scaling=block)


def test_both_spellings_of_rope_mean_the_same() -> None:
    block = {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 1.0,
        "mscale": 1,
        "mscale_all_dim": 1,
    }
    old = parse(rope_theta=5000.0, rope_scaling=block)
    new_block = {**block, "rope_type": "yarn", "rope_theta": 5000.0}
    new = parse(rope_theta=..., rope_scaling=..., rope_parameters=new_block)
    assert old.rope == new.rope
    with pytest.raises(ConfigError, match="differ"):
        parse(rope_theta=5000.0, rope_scaling=block, rope_parameters={**new_block, "factor": 8.0})
    with pytest.raises(ConfigError, match="differ"):
        parse(rope_theta=5000.0, rope_scaling={**block, "rope_theta": 6000.0})
    with pytest.raises(ConfigError, match="rope_theta is missing"):
        parse(rope_theta=..., rope_scaling=block)
    with pytest.raises(ConfigError, match="differ"):
        parse(rope_theta=1.0, rope_scaling=..., rope_parameters=new_block)


@pytest.mark.parametrize("yarn", [True, False])
def test_what_transformers_5_saves_is_read_as_the_old_spelling_is(tmp_path: Path, yarn: bool) -> None:
    """An oracle of the new spelling, and of the keys that its writer adds: none is unknown here."""
    from transformers import DeepseekV3Config

    block = {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    written = copy.deepcopy(block)  # transformers writes into what it is given
    raw = tiny_config(model_type="deepseek_v3", rope_scaling=written if yarn else None, num_nextn_predict_layers=1)
    DeepseekV3Config(**{key: value for key, value in raw.items() if key != "model_type"}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved
    assert "rope_scaling" not in saved
    assert (saved["head_dim"], saved["qk_head_dim"]) == (8, 24)
    read = read_config(tmp_path)
    assert read.unknown_keys == ()
    assert read == parse_config({**raw, "rope_scaling": block if yarn else None}, read.source)


def test_a_config_without_yarn_has_plain_frequencies() -> None:
    for changes in ({"rope_scaling": None}, {"rope_scaling": {"type": "default"}}):
        assert parse(**changes).rope.yarn is None


def test_groups_must_hold_the_experts_that_a_token_uses() -> None:
    with pytest.raises(ConfigError, match="topk_group is 1: 1 groups of 2 experts hold fewer than num_experts_per_tok"):
        parse(n_routed_experts=8, n_group=4, topk_group=1, num_experts_per_tok=3)
    with pytest.raises(ConfigError, match="n_group is 8; it must divide .* into groups of two or more"):
        parse(n_routed_experts=8, n_group=8, topk_group=8)
    assert parse(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=4).topk_group == 2
    assert parse(n_routed_experts=1, num_experts_per_tok=1).n_routed_experts == 1


def test_beta_defaults_are_the_library_s_and_given_ones_are_kept() -> None:
    """K2 gives beta_fast 1; taking the default of 32 instead changes 11 of 32 frequencies."""
    block = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    absent, given = parse(rope_scaling=block).rope.yarn, parse(rope_scaling={**block, "beta_fast": 1}).rope.yarn
    assert absent is not None
    assert given is not None
    assert (absent.beta_fast, absent.beta_slow, absent.mscale_all_dim) == (32.0, 1.0, 0.0)
    assert given.beta_fast == 1.0


def test_unknown_keys_are_kept_for_info_and_artefacts_are_not_settings() -> None:
    config = parse(favourite_colour="red", top_k=50, temperature=1.0, rope_scaling={"type": "default", "mystery": 1})
    assert config.unknown_keys == ("favourite_colour", "rope_scaling.mystery")


def test_unknown_keys_are_listed_as_text_that_can_be_printed() -> None:
    config = parse(**{"a\x1b[2J": 1, "\ud800": 2, "n" * 2000: 3})
    assert len(config.unknown_keys) == 3
    assert all(key.isprintable() and len(key) < 300 for key in config.unknown_keys)


def test_the_text_model_of_k25_is_read_and_vision_skipped() -> None:
    raw = {
        "model_type": "kimi_k25",
        "text_config": {**tiny_config(), "eos_token_id": 3, "colour": 1},
        "vision_config": {"x": 1},
        "eos_token_id": 4,
        "shape": 2,
    }
    config = parse_config(raw, SOURCE)
    assert config.eos_token_ids == (3, 4)
    assert config.unknown_keys == ("shape", "text_config.colour")
    with pytest.raises(ConfigError, match="text_config is missing"):
        parse_config({"model_type": "kimi_k25"}, SOURCE)
    with pytest.raises(ConfigError, match=r"text_config\.hidden_act is 'relu'"):
        parse_config({**raw, "text_config": {**tiny_config(), "hidden_act": "relu"}}, SOURCE)


def test_quantization_may_stand_at_the_top_or_inside_but_not_differ() -> None:
    fp8, other = {"quant_method": "fp8"}, {"quant_method": "other"}
    text = {**tiny_config(), "quantization_config": fp8}
    assert parse_config({"model_type": "kimi_k25", "text_config": text}, SOURCE).quantization_config == fp8
    with pytest.raises(ConfigError, match="quantization_config stands at the top and inside"):
        parse_config({"model_type": "kimi_k25", "text_config": text, "quantization_config": other}, SOURCE)


def test_latent_norm_eps_is_an_option_and_does_not_follow_rms_norm_eps() -> None:
    """formats.md 3.6: Hugging Face uses 1e-6 for the latents whatever rms_norm_eps says; vLLM does not."""
    raw = {**tiny_config(), "rms_norm_eps": 1e-5}
    assert parse_config(raw, SOURCE).latent_norm_eps == 1e-6
    assert parse_config(raw, SOURCE, latent_norm_eps=1e-5).latent_norm_eps == 1e-5
    for eps in (0.0, -1e-6, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="latent_norm_eps"):
            parse_config(raw, SOURCE, latent_norm_eps=eps)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", "\xff", "[" * 100_000, '{"a": 1, "a": 1}', '{"a": {"b": 1, "b": 2}}', "9" * 5000]
)
def test_a_config_that_is_no_json_object_is_a_config_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("depth", [10, 300, 600, *range(900, 1000, 7)])
def test_nested_values_are_refused_in_few_words(tmp_path: Path, depth: int) -> None:
    text = json.dumps(tiny_config(hidden_act="?")).replace('"?"', "[" * depth + "]" * depth)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="hidden_act is|nested too deeply") as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_a_folder_without_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        read_config(tmp_path)
