"""What the vendor's documents demand of each call, as code: dtypes, shapes, group sizes, layouts, limits.

Written from the documents alone (op-plugin, docs/zh/custom_APIs, pages of the operations; facts/backends.md 1.4), for
Atlas A2 and A3. Shares nothing with backends/ascend. A rule is named by the words that a test looks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensors = Sequence[torch.Tensor] | None
HALF = (torch.float16, torch.bfloat16)
INNER_LIMIT = 65536


class RuleError(Exception):
    """A call that the vendor's documents forbid."""


def demand(holds: bool, rule: str) -> None:
    if not holds:
        raise RuleError(rule)


def transposed(tensor: torch.Tensor) -> bool:
    """Whether the last two axes are a contiguous tensor's, swapped."""
    return not tensor.is_contiguous() and tensor.transpose(-1, -2).is_contiguous()


def laid_out(tensor: torch.Tensor, name: str, *, may_be_transposed: bool) -> None:
    allowed = tensor.is_contiguous() or (may_be_transposed and transposed(tensor))
    demand(allowed, f"{name} is neither contiguous" + (" nor transposed" if may_be_transposed else ""))


def grouped_matmul(
    x: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    *,
    bias: Tensors = None,
    scale: Tensors = None,
    offset: Tensors = None,
    antiquant_scale: Tensors = None,
    antiquant_offset: Tensors = None,
    per_token_scale: Tensors = None,
    group_list: torch.Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    **others: object,
) -> None:
    demand(not [name for name, value in others.items() if value is not None], "reserved arguments must be None")
    demand(bias is None and per_token_scale is None, "not emulated: bias, per_token_scale")
    demand(scale is None and offset is None, "scale and offset are for int8 x only")
    demand(act_type == 0, "act_type is for per-token quantization only")
    demand(group_type == 0, "group_type must be 0 for a single x with groups of rows")
    demand(split_item in (2, 3), "split_item must be 2 or 3 for a single output")
    demand(len(x) == 1, "x must be one tensor")
    rows = x[0]
    demand(rows.dim() == 2, "x must be 2-D")
    demand(rows.dtype in HALF, "x must be float16 or bfloat16")
    laid_out(rows, "x", may_be_transposed=False)
    single = len(weight) == 1 and weight[0].dim() == 3
    demand(single or all(w.dim() == 2 for w in weight), "weight must be one 3-D tensor or a list of 2-D ones")
    demand(1 <= len(weight) <= 128, "a list of weights has 128 tensors at most")
    groups = weight[0].shape[0] if single else len(weight)
    demand(groups <= 1024, "1024 groups at most")
    demand(
        len({(w.dtype, w.shape[-1], transposed(w)) for w in weight}) == 1, "weights must have one dtype, N and layout"
    )
    for w in weight:
        laid_out(w, "weight", may_be_transposed=True)
        _weight_and_x(w, rows)
    _quantization(rows, weight, antiquant_scale, antiquant_offset, single)
    demand(group_list is not None, "group_list must be given")
    assert group_list is not None
    demand(group_list.dtype == torch.int64, "group_list must be int64")
    demand(group_list.dim() == 1 and len(group_list) == groups, "group_list must be 1-D, as long as there are groups")
    demand(group_list_type in (0, 1), "group_list_type must be 0 or 1 unless x is int8")
    counts = group_list.tolist()
    if group_list_type == 0:
        counts = [after - before for before, after in zip([0, *counts], counts, strict=False)]
    demand(all(count >= 0 for count in counts), "group_list must not be negative or fall")
    demand(sum(counts) == len(rows), "group_list must add up to the rows of x")


def _weight_and_x(weight: torch.Tensor, x: torch.Tensor) -> None:
    demand(weight.dtype in (x.dtype, torch.int8, torch.int32), "weight must have x's dtype, int8 or int4 in int32")
    demand(weight.shape[-2] == x.shape[1], "K of weight must be that of x")
    demand(not (weight.dtype == torch.int32 and transposed(weight)), "int4 in int32 holds N and is not transposed")
    inner = weight.shape[-2] if transposed(weight) else weight.shape[-1] * (8 if weight.dtype == torch.int32 else 1)
    demand(inner < INNER_LIMIT and x.shape[1] < INNER_LIMIT, "inner axes must be below 65536")


def _quantization(
    x: torch.Tensor, weight: Sequence[torch.Tensor], scale: Tensors, offset: Tensors, single: bool
) -> None:
    if weight[0].dtype not in (torch.int8, torch.int32):
        demand(scale is None and offset is None, "antiquant arguments are for integer weights only")
        return
    demand(scale is not None, "antiquant_scale must be given for integer weights")
    demand(offset is not None, "antiquant_offset must be given, zeros if there is none")
    assert scale is not None
    assert offset is not None
    demand(len(scale) == len(offset) == len(weight), "antiquant lists must be as long as weight")
    for w, s, o in zip(weight, scale, offset, strict=True):
        demand(s.dtype == x.dtype, "antiquant_scale must have x's dtype")
        demand(o.dtype == x.dtype, "antiquant_offset must have x's dtype")
        demand(s.shape == o.shape, "antiquant_offset must have antiquant_scale's shape")
        laid_out(s, "antiquant_scale", may_be_transposed=False)
        laid_out(o, "antiquant_offset", may_be_transposed=False)
        n = w.shape[-1] * (8 if w.dtype == torch.int32 else 1)
        leading = (w.shape[0],) if single else ()
        per_group = s.dim() == len(leading) + 2
        demand(per_group or s.dim() == len(leading) + 1, "antiquant_scale must be [E, N] or [E, G, N]")
        demand(not (per_group and w.dtype == torch.int8), "int8 weights are per channel only")
        demand(
            s.shape[-1] == n and tuple(s.shape[: len(leading)]) == leading, "antiquant_scale must have weight's E and N"
        )
        demand(not per_group or w.shape[-2] % s.shape[-2] == 0, "the number of groups must divide K")


def weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> None:
    demand(quant_scale is None and quant_offset is None and bias is None, "not emulated: output quantization, bias")
    demand(weight_dtype is None, "reserved arguments must be None")
    demand(inner_precise == 0, "inner_precise 1 is for FRACTAL_NZ weights only")
    demand(x.dim() == 2 and weight.dim() == 2, "x and weight must be 2-D")
    demand(x.numel() > 0 and weight.numel() > 0, "empty tensors are not taken")
    demand(x.dtype in HALF, "x must be float16 or bfloat16")
    demand(weight.dtype in (torch.int8, torch.int32), "weight must be int8 or int4 in int32")
    laid_out(x, "x", may_be_transposed=True)
    laid_out(weight, "weight", may_be_transposed=True)
    demand(not (weight.dtype == torch.int32 and transposed(weight)), "int4 in int32 holds N and is not transposed")
    k, n = weight.shape[0], weight.shape[1] * (8 if weight.dtype == torch.int32 else 1)
    demand(x.shape[1] == k, "K of weight must be that of x")
    demand(k <= 65535 and n <= 65535, "K and N must be at most 65535")
    demand(antiquant_scale.dtype == x.dtype, "antiquant_scale must have x's dtype")
    laid_out(antiquant_scale, "antiquant_scale", may_be_transposed=True)
    shape = tuple(antiquant_scale.shape)
    if antiquant_group_size:
        demand(antiquant_group_size % 32 == 0, "antiquant_group_size must be a multiple of 32")
        demand(32 <= antiquant_group_size <= k - 1, "antiquant_group_size must be in 32 .. K - 1")
        demand(shape == (-(-k // antiquant_group_size), n), "antiquant_scale must be [ceil(K / group), N]")
    else:
        demand(shape in ((1,), (1, 1), (n,), (1, n)), "antiquant_scale must be [1], [N] or [1, N] without groups")
    if antiquant_offset is not None:
        demand(antiquant_offset.dtype == x.dtype, "antiquant_offset must have x's dtype")
        demand(antiquant_offset.shape == antiquant_scale.shape, "antiquant_offset must have antiquant_scale's shape")


def moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,  # noqa: ARG001 (not checked without padding)
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> None:
    demand(x_dtype is None and scale is None and offset is None, "not emulated: scales")
    demand(x.dim() == 2, "x must be 2-D")
    demand(x.dtype in (*HALF, torch.float32, torch.int8), "x must be float16, bfloat16, float32 or int8")
    demand(expert_idx.dtype == torch.int32, "expert_idx must be int32")
    demand(expert_idx.dim() == 2 and len(expert_idx) == len(x), "expert_idx must be [rows, K]")
    demand(quant_mode == -1, "not emulated: quantization")
    demand(drop_pad_mode == 0, "not emulated: drop_pad")
    demand(0 <= expert_num <= 10240, "expert_num must be in 0 .. 10240")
    demand(active_num >= -1, "active_num must not be negative")
    demand(expert_tokens_num_type in (0, 1), "expert_tokens_num_type must be 0 or 1")
    demand(expert_tokens_num_flag, "the counts are not written without expert_tokens_num_flag")
    demand(row_idx_type in (0, 1), "row_idx_type must be 0 or 1")
    demand(len(active_expert_range) in (0, 2), "active_expert_range must have two ends")
    first, last = active_expert_range or (0, expert_num)
    demand(0 <= first <= last <= expert_num, "active_expert_range must lie in 0 .. expert_num")
    inside = bool(((expert_idx >= 0) & (expert_idx < expert_num)).all())
    demand(inside, "expert numbers must be below expert_num")


def swiglu(self: torch.Tensor, dim: int = -1) -> None:
    demand(self.dtype in (*HALF, torch.float32), "x must be float16, bfloat16 or float32")
    demand(-self.dim() <= dim < self.dim(), "dim must be an axis of x")
    demand(self.shape[dim] % 2 == 0, "the axis must be even")


def moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> None:
    demand(not padded_mode and restore_shape is None, "padded_mode must be False and restore_shape None")
    demand(permuted_tokens.dim() == 2, "permuted_tokens must be 2-D")
    demand(permuted_tokens.dtype in (*HALF, torch.float32), "permuted_tokens must be float16, bfloat16 or float32")
    demand(sorted_indices.dtype == torch.int32, "sorted_indices must be int32")
    demand(tuple(sorted_indices.shape) == (len(permuted_tokens),), "sorted_indices must be 1-D, one for each row")
    ordered = torch.equal(sorted_indices.sort().values, torch.arange(len(permuted_tokens), dtype=torch.int32))
    demand(ordered, "sorted_indices must name each row once")
    if probs is not None:
        demand(probs.dim() == 2 and probs.numel() == len(permuted_tokens), "probs must be [tokens, K]")
        demand(probs.shape[1] <= 512, "K must be at most 512")


def fused_infer_attention_score_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_rope: torch.Tensor | None = None,
    key_rope: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    **others: object,
) -> None:
    plain = {"pre_tokens": 2147483647, "next_tokens": 2147483647}
    set_here = [name for name, value in others.items() if value != plain.get(name) and value not in (None, 0, False)]
    demand(not set_here, f"not emulated: {', '.join(set_here)}")
    demand(query_rope is not None and key_rope is not None, "query_rope and key_rope must come together")
    assert query_rope is not None
    assert key_rope is not None
    named = {"query": query, "key": key, "value": value, "query_rope": query_rope, "key_rope": key_rope}
    demand(query.dtype in HALF, "query must be float16 or bfloat16")
    demand(len({tensor.dtype for tensor in named.values()}) == 1, "query, key, value and ropes must have one dtype")
    for name, tensor in named.items():
        laid_out(tensor, name, may_be_transposed=False)
    demand(input_layout == "BSND", "not emulated: layouts other than BSND")
    demand(all(tensor.dim() == 4 for tensor in named.values()), "BSND tensors are 4-D")
    demand(key.shape == value.shape, "key and value must have one shape")
    demand(query.shape[3] == 512, "query's D must be 512 in the absorbed form")
    demand(query.shape[2] in (1, 2, 4, 8, 16, 32, 64, 128), "query's heads must be 1, 2, 4 .. 128")
    demand(num_query_heads == query.shape[2], "num_query_heads must be query's N")
    demand(num_key_value_heads == 1 and key.shape[2] == 1, "key must have one head")
    demand(key.shape[3] == 512, "key's D must be 512")
    demand(query_rope.shape == (*query.shape[:3], 64), "query_rope must be query's shape with 64")
    demand(key_rope.shape == (*key.shape[:3], 64), "key_rope must be key's shape with 64")
    demand(query.shape[0] == key.shape[0], "query and key must have one batch")
    demand(query.shape[1] > 0 and key.shape[1] > 0, "empty tensors are not taken")
    demand(query.shape[1] <= key.shape[1], "there must be as many keys as new tokens")
    demand(sparse_mode in (0, 3, 4), "sparse_mode must be 0, 3 or 4")
    demand(softmax_scale != 1.0, "softmax_scale was left at its default")
    if sparse_mode == 0:
        demand(atten_mask is None, "not emulated: a mask with sparse_mode 0")
        return
    demand(sparse_mode == 3, "not emulated: sparse_mode 4")
    demand(atten_mask is not None, "sparse_mode 3 needs atten_mask")
    assert atten_mask is not None
    demand(atten_mask.dtype in (torch.bool, torch.int8, torch.uint8), "atten_mask must be bool, int8 or uint8")
    demand(
        tuple(atten_mask.shape[-2:]) == (2048, 2048) and atten_mask.numel() == 2048 * 2048,
        "atten_mask must be 2048 x 2048",
    )
    laid_out(atten_mask, "atten_mask", may_be_transposed=False)
