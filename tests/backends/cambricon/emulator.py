"""A stand-in for torch_mlu_ops: each known version's signatures, the manual's demands, and the values on the processor.

Written from the manual (V1.3.2, sections 5.1.18, 5.1.19, 5.1.38) and facts/backends.md 2.3 alone; shares nothing with
backends/cambricon but the table of signatures.
"""

from __future__ import annotations

import inspect
from collections import Counter
from types import ModuleType
from typing import Any

import torch

from k2lite.backends.cambricon.signatures import SIGNATURES, signature

HALF = (torch.float16, torch.bfloat16)
calls: Counter[str] = Counter()


class RuleError(Exception):
    """A call that the vendor's manual forbids."""


def demand(holds: bool, rule: str) -> None:
    if not holds:
        raise RuleError(rule)


def stand_in(version: str) -> ModuleType:
    """torch_mlu_ops as `version` has it; what a version is not known to have is as in the manual."""
    module = ModuleType("torch_mlu_ops")
    module.__version__ = version  # type: ignore[attr-defined]
    for name, versions in SIGNATURES.items():
        setattr(module, name, _signed(name, signature(versions.get(version, versions["1.3.2"]))))
    return module


def _signed(name: str, declared: inspect.Signature) -> Any:
    compute = globals()[f"_{name}"]

    def operation(*args: Any, **kwargs: Any) -> Any:
        bound = declared.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        for ours, theirs in (("m_list", "token_count"), ("max_m", "max_in_group_list")):
            if theirs in given:
                given[ours] = given.pop(theirs)
        calls[name] += 1
        return compute(**given)

    operation.__signature__ = declared  # type: ignore[attr-defined]
    return operation


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """int8 [..., K / 2] to [..., K]: low nibble first, two's complement."""
    low, high = codes & 15, (codes >> 4) & 15
    both = torch.stack((low, high), -1).flatten(-2).to(torch.int16)
    return torch.where(both > 7, both - 16, both).float()


def _weight_only_quant_matmul(a: Any, b: Any, scale: Any, zero: Any, bias: Any, c: Any, act_mode: str,
                              quant_bit_size: int, alpha: float, beta: float, use_hp_active: bool) -> Any:  # fmt: skip
    demand(zero is None, "zero must be None")
    demand(bias is None and c is None and not use_hp_active, "not emulated: bias, c, use_hp_active")
    demand((alpha, beta) == (1.0, 1.0), "not emulated: alpha, beta")
    demand(a.dim() == 2 and b.dim() == 2, "a and b must be 2-D")
    demand(a.dtype in HALF, "a must be half or bfloat16")
    demand(b.dtype == torch.int8, "b must be int8")
    demand(a.is_contiguous() and b.is_contiguous() and scale.is_contiguous(), "tensors must be contiguous")
    demand(quant_bit_size in (4, 8), "quant_bit_size must be 4 or 8")
    k = b.shape[1] * (2 if quant_bit_size == 4 else 1)
    demand(a.shape[1] == k, "K of b must be that of a")
    if scale.dim() == 1:
        demand(scale.dtype == torch.float32, "a scale per channel must be float32")
        demand(len(scale) == len(b), "scale must be [N]")
        groups = 1
    else:
        demand(scale.dtype == a.dtype, "a scale per group must have a's dtype")
        demand(scale.shape[0] == len(b) and k % scale.shape[1] == 0, "scale must be [N, G] with G dividing K")
        groups = scale.shape[1]
        demand(k // groups in (64, 128, 256, 512), "groups must be 64, 128, 256 or 512")
        demand(act_mode == "none", "groups need act_mode none")
    demand(act_mode == "none", "not emulated: activation")
    codes = _nibbles(b) if quant_bit_size == 4 else b.float()
    weights = codes * scale.float().view(len(b), groups).repeat_interleave(k // groups, 1)
    return (a.float() @ weights.T).to(a.dtype)


def _groups(a: Any, b: Any, m_list: Any, max_m: Any, expand_idx: Any, c: Any, alpha: Any, beta: Any) -> list[int]:
    demand(expand_idx is None and c is None and alpha is None and beta is None, "not emulated: gather, residual")
    demand(a.dim() == 2 and b.dim() == 3, "a must be [m, k] and b [E, n, k]")
    demand(a.is_contiguous() and b.is_contiguous(), "tensors must be contiguous")
    demand(m_list.dtype == torch.int32, "m_list must be int32")
    demand(m_list.dim() == 1 and len(m_list) == len(b), "m_list must be [E]")
    counts = m_list.tolist()
    demand(sum(counts) == len(a), "m_list must add up to the rows of a")
    demand(isinstance(max_m, int) and max_m >= max(counts), "max_m must be the largest of m_list")
    return counts  # type: ignore[no-any-return]


def _group_gemm(a: Any, b: Any, m_list: Any, max_m: Any, expand_idx: Any, c: Any, alpha: Any, beta: Any,
                bias: Any = None, trans_a: bool = False, trans_b: bool = True) -> Any:  # fmt: skip
    demand(bias is None and not trans_a and trans_b, "not emulated: bias, other transpositions")
    demand(a.dtype in (*HALF, torch.float32), "a must be half, bfloat16 or float32")
    demand(b.dtype == a.dtype, "b must have a's dtype")
    demand(a.shape[1] == b.shape[2], "K of b must be that of a")
    counts = _groups(a, b, m_list, max_m, expand_idx, c, alpha, beta)
    parts = [rows.float() @ weight.float().T for rows, weight in zip(a.split(counts), b, strict=True)]
    return torch.cat(parts).to(a.dtype)


def _smooth_quant_group_gemm(a: Any, b: Any, m_list: Any, expand_idx: Any, c: Any, alpha: Any, beta: Any, a_scale: Any,
                             b_scale: Any, dtype: Any, max_m: Any, bias: Any, quant_flag: Any) -> Any:  # fmt: skip
    demand(bias is None and quant_flag is None, "not emulated: bias, mixed widths")
    demand(a.dtype == torch.int8 and b.dtype == torch.int8, "a and b must be int8")
    demand(dtype in HALF, "dtype must be half or bfloat16")
    demand(a_scale.dtype == torch.float32 and tuple(a_scale.shape) == (len(a),), "a_scale must be float32 [m]")
    demand(b_scale.dtype == torch.float32, "b_scale must be float32")
    demand(b_scale.dim() == 3 and b_scale.is_contiguous(), "not emulated: INT8 weights, one scale a channel")
    demand(a.shape[1] == 2 * b.shape[2], "K of b must be that of a")
    groups, k = len(b_scale), a.shape[1]
    demand(tuple(b_scale.shape[1:]) == tuple(b.shape[:2]), "b_scale must be [G, E, n]")
    demand(k % groups == 0 and k // groups in (128, 256, 512, 1024), "groups must be 128, 256, 512 or 1024")
    counts = _groups(a, b, m_list, max_m, expand_idx, c, alpha, beta)
    parts = []
    for rows, scale, weight, by_group in zip(
        a.split(counts), a_scale.split(counts), b, b_scale.transpose(0, 1), strict=True
    ):
        weights = _nibbles(weight) * by_group.T.repeat_interleave(k // groups, 1)
        parts.append(rows.float() @ weights.T * scale[:, None])
    return torch.cat(parts).to(dtype)
