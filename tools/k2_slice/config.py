"""The config.json of a slice: Kimi-K2's own, with chosen numbers and the formats declared as their readers want it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k2lite.quant.declaration import (
    EXPERTS_TARGETS,
    REST_IGNORE,
    REST_TARGETS,
    ROUTER_IGNORE,
    declaration,
    fp8_declaration,
    group_declaration,
)
from k2lite.quant.errors import RequestError
from k2lite.quant.formats import FP8_NAME, QuantFormat, format_named
from k2lite.quant.fp8 import COMPRESSED_TENSORS_SCALE, Fp8Block
from k2lite.quant.plain import PLAIN_DTYPES
from k2lite.text.byte_tokenizer import N_BYTES, N_VOCAB

# Kimi-K2-Instruct's config.json without what names Python files that aren't there. The ids are the byte tokenizer's.
K2_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": N_BYTES,
    "eos_token_id": N_BYTES + 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 163840,
}


@dataclass(frozen=True)
class SliceFormats:
    """Format names of the routed experts, of the trunk's matrices that may be quantized, and of the head. Norms,
    embeddings and router are BF16, the router's bias F32, as in every published Kimi-K2."""

    experts: str
    trunk: str
    lm_head: str

    def __post_init__(self) -> None:
        """Raises CheckpointError for a name that no format has."""
        for name in (self.experts, self.trunk, self.lm_head):
            format_named(name)

    @property
    def quantized(self) -> set[str]:
        """All names that are no plain floating point."""
        return {self.experts, self.trunk, self.lm_head} - PLAIN_DTYPES.keys()

    def named(self, name: str) -> QuantFormat:
        """The format of this name; beside integers FP8 calls its scales as compressed-tensors does."""
        mixed = name == FP8_NAME and self.quantized != {FP8_NAME}
        return Fp8Block(COMPRESSED_TENSORS_SCALE) if mixed else format_named(name)


# As Moonshot ships K2-Instruct, and K2-Thinking and later.
PRESETS = {
    "fp8": SliceFormats(FP8_NAME, FP8_NAME, "bf16"),
    "int4": SliceFormats("int4_g32", "bf16", "bf16"),
}


def slice_config(
    formats: SliceFormats, *, layers: int, experts: int, vocab: int, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole config.json. `sizes` replaces keys, for tests at a reduced width."""
    if vocab < N_VOCAB:
        raise RequestError(f"a vocabulary of {vocab} asked for; the byte tokenizer alone has {N_VOCAB} tokens")
    numbers = {"num_hidden_layers": layers, "n_routed_experts": experts, "vocab_size": vocab}
    config = {**K2_CONFIG, **numbers, **sizes}
    declared = quantization_config(formats)
    return config if declared is None else {**config, "quantization_config": declared}


def quantization_config(formats: SliceFormats) -> dict[str, Any] | None:
    """Declares the formats: in the FP8 dialect, or with a compressed-tensors group for each class of weights, the
    special ones before the one that takes every other Linear."""
    if formats.quantized <= {FP8_NAME}:
        return fp8_declaration() if formats.quantized else None
    trunk, head = formats.trunk not in PLAIN_DTYPES, formats.lm_head not in PLAIN_DTYPES
    if not trunk and not head:
        return declaration(formats.experts, formats.trunk)
    groups = {EXPERTS_TARGETS: formats.experts}
    if head and formats.lm_head != formats.trunk:
        groups[("lm_head",)] = formats.lm_head
    if trunk:
        groups[REST_TARGETS] = formats.trunk
    ignore = [ROUTER_IGNORE, *(() if head else ("lm_head",)), *(() if trunk else REST_IGNORE)]
    return group_declaration(groups, ignore)
