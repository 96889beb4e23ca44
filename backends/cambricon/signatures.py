"""The vendor's operations that k2lite calls, as each known version declares them: facts, with their sources.

The library is closed; signatures come from its manual and from callers that are public (read 2026-11-24). Names that
differ between versions are in ALIASES. A parameter is required where it has no default here.
"""

from __future__ import annotations

import inspect

# version: where it is written
SOURCES = {
    "1.3.2": "Torch-MLU-Ops user manual V1.3.2 (2025-01-09), sections 5.1.18, 5.1.19 and 5.1.38",
    "vllm-mlu": "Cambricon/vllm-mlu, vllm_mlu/_mlu_ops.py and its fused_moe: the same order, by position and by name",
    "1.5.0": "DeepLink-org/dlinfer, vendor/camb/camb_ops.py (torch_mlu_ops 1.5.0): max_in_group_list, trans_a, trans_b",
}

_WEIGHT_ONLY = (
    "(a, b, scale, zero=None, bias=None, c=None, act_mode='none', quant_bit_size=8, alpha=1.0, beta=1.0, "
    "use_hp_active=False)"
)
_SMOOTH_QUANT = "(a, b, m_list, expand_idx, c, alpha, beta, a_scale, b_scale, dtype, max_m, bias=None, quant_flag=None)"

SIGNATURES: dict[str, dict[str, str]] = {
    "weight_only_quant_matmul": {"1.3.2": _WEIGHT_ONLY, "vllm-mlu": _WEIGHT_ONLY},
    "group_gemm": {
        "1.3.2": "(a, b, m_list, expand_idx, c, alpha, beta, max_m, bias=None)",
        "vllm-mlu": "(a, b, m_list, expand_idx, c, alpha, beta, max_m, bias=None)",
        "1.5.0": "(a, b, token_count, expand_idx, c, alpha, beta, max_in_group_list, trans_a=False, trans_b=True)",
    },
    "smooth_quant_group_gemm": {"1.3.2": _SMOOTH_QUANT, "vllm-mlu": _SMOOTH_QUANT},
}

# What k2lite calls a parameter: what versions call it.
ALIASES = {"m_list": ("m_list", "token_count"), "max_m": ("max_m", "max_in_group_list")}


def signature(text: str) -> inspect.Signature:
    """Of "(a, b=1)"."""
    namespace: dict[str, object] = {}
    exec(f"def operation{text}: ...", namespace)  # the texts above, nothing else
    return inspect.signature(namespace["operation"])  # type: ignore[arg-type]
