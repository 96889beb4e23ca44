"""A model's config as the metadata of a GGUF file, arch deepseek2, and back.

Invariant: what llama.cpp would compute otherwise than this code is refused or noted, never passed over. Numbers are
float32 in GGUF; back in config.json they are the shortest decimals that mean the same float32.
Source: llama.cpp, conversion/deepseek.py and src/models/deepseek2.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from k2lite.quant.errors import ConfigError
from k2lite.quant.file_reading import shown
from k2lite.quant.gguf_names import ARCHITECTURE, Heads

from .config import ModelConfig

SIGMOID = 2
QUANTIZATION_VERSION = 2
# llama.cpp's LLAMA_FTYPE by export type.
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
# llama.cpp divides by this on load, "for legacy reasons".
YARN_LOG_UNIT = 0.1
KIMI_PRE = "kimi-k2"


def kv_b_heads(config: ModelConfig) -> Heads:
    """How kv_b_proj is split in GGUF."""
    return Heads(config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank)


def metadata_of(config: ModelConfig, *, name: str, type_name: str) -> dict[str, Any]:
    """Keys and values of the architecture. Raises ConfigError for a rotary setting that llama.cpp can't express."""
    latent, rotary = config.kv_lora_rank, config.qk_rope_head_dim
    own = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "leading_dense_block_count": config.first_k_dense_replace,
        "attention.head_count": config.num_attention_heads,
        # MLA is computed as one key and value head that all queries share: the latent, then the rotary key
        "attention.head_count_kv": 1,
        "attention.key_length": latent + rotary,
        "attention.value_length": latent,
        "attention.key_length_mla": config.qk_nope_head_dim + rotary,
        "attention.value_length_mla": config.v_head_dim,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": latent,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": SIGMOID,
        "rope.dimension_count": rotary,
        "rope.freq_base": config.rope.theta,
        **_yarn(config),
    }
    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[type_name],
        "general.quantization_version": QUANTIZATION_VERSION,
        **{f"{ARCHITECTURE}.{key}": value for key, value in own.items()},
    }


def _yarn(config: ModelConfig) -> dict[str, Any]:
    yarn = config.rope.yarn
    if yarn is None:
        return {}
    if yarn.mscale != yarn.mscale_all_dim:
        raise ConfigError(
            f"{config.source}: mscale is {yarn.mscale} and mscale_all_dim {yarn.mscale_all_dim}; a GGUF file can only "
            "say both at once, so they must be equal"
        )
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": yarn.factor,
        "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
        "rope.scaling.yarn_log_multiplier": YARN_LOG_UNIT * yarn.mscale_all_dim,
        "rope.scaling.yarn_beta_fast": yarn.beta_fast,
        "rope.scaling.yarn_beta_slow": yarn.beta_slow,
    }


def config_of(metadata: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """The config.json that a GGUF file's metadata amounts to, and what its reader should know. Raises ConfigError
    naming the key."""
    keys = _Keys(metadata, path)
    architecture = keys.text("general.architecture")
    if architecture != ARCHITECTURE:
        raise ConfigError(f"{path}: general.architecture is {architecture!r}; supported: {ARCHITECTURE!r}")
    gating = keys.integer("expert_gating_func", default=1)
    if gating != SIGMOID:
        raise ConfigError(f"{path}: expert_gating_func is {gating}; supported: {SIGMOID}, sigmoid")
    latent, rotary = keys.integer("attention.kv_lora_rank"), keys.integer("rope.dimension_count")
    heads = keys.integer("attention.head_count")
    # files from before MLA was computed in the latent say the sizes of a head in the plain keys
    mla = "_mla" if keys.has("attention.key_length_mla") else ""
    notes: list[str] = []
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2" if metadata.get("tokenizer.ggml.pre") == KIMI_PRE else "deepseek_v3",
        "vocab_size": _vocab_size(keys, metadata),
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count") - keys.integer("nextn_predict_layers", default=0),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_routed_experts": keys.integer("expert_count"),
        "n_shared_experts": keys.integer("expert_shared_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "n_group": keys.integer("expert_group_count", default=1),
        "topk_group": keys.integer("expert_group_used_count", default=1),
        "first_k_dense_replace": keys.integer("leading_dense_block_count", default=0),
        "moe_layer_freq": 1,
        "routed_scaling_factor": keys.number("expert_weights_scale", default=1.0),
        "norm_topk_prob": bool(keys.integer("expert_weights_norm", default=0)),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": keys.integer("attention.q_lora_rank"),
        "kv_lora_rank": latent,
        "qk_nope_head_dim": keys.integer(f"attention.key_length{mla}") - rotary,
        "qk_rope_head_dim": rotary,
        "v_head_dim": keys.integer(f"attention.value_length{mla}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", default=10000.0),
        "rope_scaling": _rope_scaling(keys, notes),
        "max_position_embeddings": keys.integer("context_length"),
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
        "torch_dtype": "bfloat16",
    }
    for key in ("bos_token_id", "eos_token_id"):
        if f"tokenizer.ggml.{key}" in metadata:
            config[key] = keys.integer(f"tokenizer.ggml.{key}", prefix="")
    if config["rms_norm_eps"] != 1e-6:
        notes.append(
            f"llama.cpp uses the eps {config['rms_norm_eps']:g} for the norms of MLA's latents too, k2lite 1e-6 unless "
            "--latent-norm-eps says otherwise"
        )
    return config, notes


def _vocab_size(keys: _Keys, metadata: Mapping[str, Any]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return keys.integer("vocab_size", default=len(tokens) if isinstance(tokens, list) else -1)


def _rope_scaling(keys: _Keys, notes: list[str]) -> dict[str, Any] | None:
    kind = keys.text("rope.scaling.type", default="none")
    if kind == "none":
        return None
    if kind != "yarn":
        raise ConfigError(f"{keys.path}: rope.scaling.type is {shown(kind)}; supported: 'yarn', 'none'")
    for side, default in (("fast", 32.0), ("slow", 1.0)):
        if not keys.has(f"rope.scaling.yarn_beta_{side}"):
            notes.append(
                f"{keys.path}: says no yarn_beta_{side}; {default:g} is taken, as llama.cpp does"
                + (", but Kimi-K2-Instruct, 0905 and Thinking have 1: mend DST/config.json" if side == "fast" else "")
            )
    mscale = _shortest(keys.number("rope.scaling.yarn_log_multiplier") / YARN_LOG_UNIT)
    return {
        "type": "yarn",
        "factor": keys.number("rope.scaling.factor"),
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", default=32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", default=1.0),
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


class _Keys:
    """Typed reading of the metadata; keys are those of the architecture unless another prefix is given."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata = metadata
        self.path = path

    def has(self, key: str) -> bool:
        return f"{ARCHITECTURE}.{key}" in self._metadata

    def integer(self, key: str, *, default: int | None = None, prefix: str = f"{ARCHITECTURE}.") -> int:
        value = self._get(prefix + key, default)
        if isinstance(value, np.ndarray):  # one number a layer, all equal in the models that are supported
            value = value[0].item() if value.size and (value == value[0]).all() else value
        if not isinstance(value, int) or value < 0:
            raise ConfigError(f"{self.path}: {prefix}{key} is {shown(value)}; supported: an integer of 0 or more")
        return int(value)

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self._get(f"{ARCHITECTURE}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.path}: {ARCHITECTURE}.{key} is {shown(value)}; supported: a number")
        return _shortest(value)

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self._get(key if key.startswith("general.") else f"{ARCHITECTURE}.{key}", default)
        if not isinstance(value, str):
            raise ConfigError(f"{self.path}: {key} is {shown(value)}; supported: a text")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self._metadata.get(key, default)
        if value is None or (isinstance(value, int) and value == -1):
            raise ConfigError(f"{self.path}: {key} is missing; it has no default")
        return value


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32."""
    return float(str(np.float32(value)))
