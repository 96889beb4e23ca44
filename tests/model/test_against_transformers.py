"""The whole model against transformers' DeepseekV3: logits and greedy tokens, over shapes and checkpoint formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import k2lite
from k2lite.backends.reference import ReferenceBackend
from tests.checkpoints import random_weights, tiny_config, write_checkpoint

from .oracle import load_oracle, oracle_greedy, oracle_logits, relative_error

YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
WIDE = {
    "hidden_size": 192,
    "intermediate_size": 224,
    "moe_intermediate_size": 160,
    "q_lora_rank": 72,
    "kv_lora_rank": 136,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "bf16, no yarn": ("bf16", {"rope_scaling": None}, 17),
    "bf16, yarn": ("bf16", {"rope_theta": 100.0, "rope_scaling": YARN}, 61),
    "bf16, beta_fast 32 and mscale 0.7": (
        "bf16",
        {"rope_theta": 100.0, "rope_scaling": {**YARN, "beta_fast": 32.0, "mscale": 0.7}},
        33,
    ),
    "bf16, groups": ("bf16", {**GROUPS, "model_type": "deepseek_v3"}, 23),
    "bf16, weights not normalized, two shared": ("bf16", {"norm_topk_prob": False, "n_shared_experts": 2}, 9),
    "bf16, two dense layers, eps 1e-5": ("bf16", {"first_k_dense_replace": 2, "rms_norm_eps": 1e-5}, 11),
    "fp8, edge blocks, yarn": ("fp8", {**WIDE, "rope_scaling": YARN}, 29),
    "fp8, groups": ("fp8", {**WIDE, **GROUPS}, 7),
    "int4": ("int4", {}, 31),
    "int4, yarn, groups": ("int4", {**GROUPS, "rope_scaling": YARN}, 45),
    "one token": ("bf16", {}, 1),
    # the latents' norms must keep 1e-6, which the logits show where all other norms have a large eps
    "bf16, eps 0.03": ("bf16", {"rms_norm_eps": 0.03}, 19),
    "bf16, longer than yarn's original length": (
        "bf16",
        {"rope_theta": 100.0, "rope_scaling": {**YARN, "original_max_position_embeddings": 32, "beta_fast": 4.0}},
        71,
    ),
    "fp8, no yarn": ("fp8", {**WIDE, "rope_scaling": None}, 13),
    "int4, 12 experts, all layers sparse": (
        "int4",
        {"n_routed_experts": 12, "num_experts_per_tok": 5, "first_k_dense_replace": 0},
        21,
    ),
    "bf16, all layers dense": ("bf16", {"first_k_dense_replace": 3}, 5),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(tmp_path: Path, name: str) -> None:
    format_name, changes, length = CASES[name]
    seed = list(CASES).index(name)
    config = tiny_config(**changes)
    weights = write_checkpoint(tmp_path / "model", config, random_weights(config, seed=seed), format=format_name)
    oracle = load_oracle(tmp_path / "oracle", config, weights)
    engine = k2lite.load(tmp_path / "model", backend="reference")

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config["vocab_size"], (length,), generator=generator).tolist()
    ours, theirs = engine.logits(ids), oracle_logits(oracle, ids)
    assert ours.shape == theirs.shape == (length, config["vocab_size"])
    assert ours.dtype == torch.float32
    assert relative_error(ours, theirs) < 2e-5

    tokens = engine.generate(ids, max_tokens=64, temperature=0, stop_ids=frozenset())
    assert [int(token) for token in tokens] == oracle_greedy(oracle, ids, 64)


def test_the_oracle_notices_a_changed_weight(tmp_path: Path) -> None:
    """One expert's scale off by 1 %: the bound must catch it, or it proves nothing."""
    config = tiny_config()
    weights = write_checkpoint(tmp_path / "model", config, random_weights(config, seed=3), format="bf16")
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    oracle = load_oracle(tmp_path / "oracle", config, {**weights, name: weights[name] * 1.01})
    engine = k2lite.load(tmp_path / "model", backend="reference")
    ids = list(range(40))
    assert relative_error(engine.logits(ids), oracle_logits(oracle, ids)) > 1e-4


def test_a_vision_model_s_text_part_is_the_same_model(tmp_path: Path) -> None:
    """K2.5's prefix and nested config change names, not numbers."""
    text = tiny_config(rope_scaling=YARN)
    config = {"model_type": "kimi_k25", "text_config": text}
    weights = write_checkpoint(
        tmp_path / "model", config, random_weights(text, seed=5), format="int4", prefix="language_model."
    )
    oracle = load_oracle(tmp_path / "oracle", text, weights)
    engine = k2lite.load(tmp_path / "model", backend="reference")
    ids = list(range(7, 40))
    assert relative_error(engine.logits(ids), oracle_logits(oracle, ids)) < 2e-5


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN, "num_attention_heads": 3, "num_key_value_heads": 3}])
def test_naive_equals_absorbed(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    write_checkpoint(tmp_path / "model", config, random_weights(config, seed=1), format="bf16")
    ids = list(range(50))
    absorbed = k2lite.load(tmp_path / "model", backend=ReferenceBackend(mla="absorbed"))
    naive = k2lite.load(tmp_path / "model", backend=ReferenceBackend(mla="naive"))
    assert relative_error(absorbed.logits(ids), naive.logits(ids)) < 1e-5
    assert absorbed.placement.arithmetic != naive.placement.arithmetic


def test_latent_norm_eps_changes_the_numbers(tmp_path: Path) -> None:
    config = tiny_config(rms_norm_eps=1e-5)
    write_checkpoint(tmp_path / "model", config, random_weights(config, seed=1), format="bf16")
    default, other = (k2lite.load(tmp_path / "model", latent_norm_eps=eps, backend="reference") for eps in (None, 0.1))
    assert relative_error(default.logits([1, 2, 3]), other.logits([1, 2, 3])) > 1e-4
