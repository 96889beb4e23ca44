"""Names of one model's tensors in GGUF files, arch deepseek2, and under Hugging Face's names. Knows no bytes.

In GGUF the routed experts of a layer are one stack a projection, and kv_b_proj is two tensors: attn_k_b, each head's
key part transposed [heads, kv_lora_rank, qk_nope_head_dim], and attn_v_b [heads, v_head_dim, kv_lora_rank]. Rotary rows
stay in the checkpoint's own order. Source: llama.cpp, conversion/deepseek.py and src/models/deepseek2.cpp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ARCHITECTURE = "deepseek2"
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_STACKS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


@dataclass(frozen=True, slots=True)
class Heads:
    """The sizes that say how kv_b_proj [heads * (nope + value), latent] is split."""

    heads: int
    nope: int
    value: int
    latent: int

    @property
    def rows(self) -> int:
        """Rows of kv_b_proj that one head owns: its keys, then its values."""
        return self.nope + self.value


def gguf_name(name: str) -> str:
    """A trunk tensor's name in GGUF. That of kv_b_proj occurs in old files only; see split_names."""
    layer = _LAYER.fullmatch(name)
    return f"blk.{layer[1]}.{_INSIDE[layer[2]]}" if layer else _OUTSIDE[name]


def split_names(name: str) -> tuple[str, str] | None:
    """The two tensors that kv_b_proj is in GGUF; None for any other name."""
    layer = _LAYER.fullmatch(name)
    if layer is None or layer[2] != "self_attn.kv_b_proj.weight":
        return None
    return f"blk.{layer[1]}.attn_k_b.weight", f"blk.{layer[1]}.attn_v_b.weight"


def stack_name(layer: int, projection: str) -> str:
    """Of the stack [experts, out, in] of a layer's experts."""
    return f"blk.{layer}.{_STACKS[projection]}.weight"


def fused_stack_name(layer: int) -> str:
    """Of gate_proj and up_proj in one stack [experts, 2 * width, hidden], which some files have."""
    return f"blk.{layer}.ffn_gate_up_exps.weight"
