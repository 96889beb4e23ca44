"""The model's facts, frozen, under Hugging Face's own names.

Invariant: a `ModelConfig` describes a model that this code computes exactly. A known key with a value that is
not supported is refused here, by name; unknown keys are kept for `k2lite info` to list and change nothing.
Does not know devices, budgets or files of weights.

Source of names, values and traps: config.json of the Kimi-K2 and DeepSeek-V3 families as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2lite.quant.errors import ConfigError

from .config_reader import KeyReader, read_object
from .rope import RopeConfig

MODEL_TYPES = ("kimi_k2", "kimi_k25", "deepseek_v3")
# Hugging Face's own norms of the two latents ignore rms_norm_eps and take the library's default.
DEFAULT_LATENT_NORM_EPS = 1e-6
# Names are made for each layer and expert before a weight file is looked at; K3 has 93 and 896.
MAX_LAYERS, MAX_EXPERTS = 1000, 4096


@dataclass(frozen=True)
class ModelConfig:
    """Facts of one Kimi-K2 or DeepSeek-V3 model. Sizes are numbers of elements."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    latent_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    num_nextn_predict_layers: int
    quantization_config: Mapping[str, Any] | None
    unknown_keys: tuple[str, ...]
    source: Path

    @property
    def tensor_prefix(self) -> str:
        """What stands before the text model's tensor names in the checkpoint."""
        return "language_model." if self.model_type == "kimi_k25" else ""

    @property
    def latent_dim(self) -> int:
        """Values a token leaves in each layer's cache: the latent, then the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by: (nope + rope width)^-0.5, times YaRN's mscale squared."""
        return float((self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * self.rope.softmax_mscale**2)

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(range(self.first_k_dense_replace, self.num_hidden_layers))


def read_config(folder: Path, *, latent_norm_eps: float | None = None) -> ModelConfig:
    """Read config.json of a model folder.

    `latent_norm_eps` replaces the eps of q_a_layernorm and kv_a_layernorm (1e-6 by default, as in Hugging Face's
    code; vLLM, SGLang and llama.cpp use rms_norm_eps instead). Raises ConfigError."""
    path = folder / "config.json"
    return parse_config(read_object(path), path, latent_norm_eps=latent_norm_eps)


def parse_config(raw: Mapping[str, Any], source: Path, *, latent_norm_eps: float | None = None) -> ModelConfig:
    """Turn the JSON object of a config.json into a ModelConfig, or raise ConfigError naming the key."""
    outer = KeyReader(source, raw)
    model_type = outer.choice("model_type", MODEL_TYPES)
    text = outer.section("text_config") if model_type == "kimi_k25" else outer
    if model_type == "kimi_k25":
        text.choice("model_type", ("kimi_k2", "deepseek_v3"), default="kimi_k2")
    _refuse_unsupported(text)
    if latent_norm_eps is not None and not 0 < latent_norm_eps < float("inf"):
        raise ConfigError(f"latent_norm_eps is {latent_norm_eps}; it must be a number greater than 0")

    heads = text.integer("num_attention_heads")
    text.exactly("num_key_value_heads", heads, why="MLA has one latent for all heads")
    layers = text.integer("num_hidden_layers", at_most=MAX_LAYERS)
    experts = text.integer("n_routed_experts", at_most=MAX_EXPERTS)
    groups = text.integer("n_group", default=1)
    nope, rotary = text.integer("qk_nope_head_dim"), text.integer("qk_rope_head_dim")
    text.exactly("qk_head_dim", nope + rotary, why="it is qk_nope_head_dim + qk_rope_head_dim")
    text.exactly("head_dim", rotary, why="it is what rotates: qk_rope_head_dim")
    max_position = text.integer("max_position_embeddings")
    config = ModelConfig(
        model_type=model_type,
        vocab_size=text.integer("vocab_size"),
        hidden_size=text.integer("hidden_size"),
        intermediate_size=text.integer("intermediate_size"),
        moe_intermediate_size=text.integer("moe_intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        n_routed_experts=experts,
        n_shared_experts=text.integer("n_shared_experts"),
        num_experts_per_tok=text.integer("num_experts_per_tok", at_most=experts),
        n_group=groups,
        topk_group=text.integer("topk_group", default=1, at_most=groups),
        first_k_dense_replace=text.integer("first_k_dense_replace", at_least=0, at_most=layers),
        routed_scaling_factor=text.number("routed_scaling_factor"),
        norm_topk_prob=text.boolean("norm_topk_prob"),
        q_lora_rank=text.integer("q_lora_rank"),
        kv_lora_rank=text.integer("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rotary,
        v_head_dim=text.integer("v_head_dim"),
        rms_norm_eps=text.number("rms_norm_eps"),
        latent_norm_eps=DEFAULT_LATENT_NORM_EPS if latent_norm_eps is None else latent_norm_eps,
        rope=RopeConfig.read(text, dim=rotary),
        max_position_embeddings=max_position,
        bos_token_id=text.optional_integer("bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys((*text.integers("eos_token_id"), *outer.integers("eos_token_id")))),
        num_nextn_predict_layers=text.integer("num_nextn_predict_layers", default=0, at_least=0, at_most=MAX_LAYERS),
        quantization_config=_quantization(outer, text),
        unknown_keys=_unknown_keys(outer, text),
        source=source,
    )
    _check_groups(config)
    return config


def _refuse_unsupported(text: KeyReader) -> None:
    """Keys whose other values would need other arithmetic than this code has."""
    text.choice("hidden_act", ("silu",))
    text.choice("scoring_func", ("sigmoid",), default="sigmoid")
    text.choice("topk_method", ("noaux_tc",), default="noaux_tc")
    text.choice("attention_bias", (False,), default=False)
    text.choice("tie_word_embeddings", (False,), default=False)
    text.choice("moe_layer_freq", (1,), default=1)
    text.choice("rope_interleave", (True,), default=True)
    text.choice("mlp_bias", (False,), default=False)
    text.absent("sliding_window", "linear_attn_config", "index_topk", "index_n_heads", "index_head_dim")


def _check_groups(config: ModelConfig) -> None:
    if config.n_group == 1:
        return
    size, rest = divmod(config.n_routed_experts, config.n_group)
    if rest or size < 2:
        raise ConfigError(
            f"{config.source}: n_group is {config.n_group}; it must divide n_routed_experts "
            f"({config.n_routed_experts}) into groups of two or more"
        )
    if size * config.topk_group < config.num_experts_per_tok:
        raise ConfigError(
            f"{config.source}: topk_group is {config.topk_group}: {config.topk_group} groups of {size} experts hold "
            f"fewer than num_experts_per_tok ({config.num_experts_per_tok})"
        )


def _quantization(outer: KeyReader, text: KeyReader) -> Mapping[str, Any] | None:
    """quantization_config stands at the top, in K2.5 and later inside text_config."""
    found = [s.mapping("quantization_config") for s in {id(outer): outer, id(text): text}.values()]
    given = [value for value in found if value is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise ConfigError(
            f"{outer.path}: quantization_config stands at the top and inside text_config, and the two differ; "
            "keep the one that describes the weights"
        )
    return given[0] if given else None


def _unknown_keys(outer: KeyReader, text: KeyReader) -> tuple[str, ...]:
    text.known(*_WITHOUT_EFFECT)
    if outer is not text:
        outer.known(*_WITHOUT_EFFECT, *_VISION_KEYS, "bos_token_id")
        outer.choice("tie_word_embeddings", (False,), default=False)
    return outer.unread()


# Keys that change nothing here: training-only ones, names of Python classes, and the generation defaults that
# PretrainedConfig writes into every file (artefacts, not a recommendation of how to sample).
_WITHOUT_EFFECT = frozenset(
    """
    architectures auto_map transformers_version torch_dtype dtype _name_or_path name_or_path initializer_range
    attention_dropout aux_loss_alpha seq_aux ep_size pretraining_tp use_cache pad_token_id output_router_logits
    add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label label2id
    is_decoder is_encoder_decoder length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k
    top_p torchscript typical_p use_bfloat16
    """.split()
)
_VISION_KEYS = frozenset(
    """
    vision_config media_placeholder_token_id video_placeholder use_unified_vision_chunk ignore_index
    """.split()
)
