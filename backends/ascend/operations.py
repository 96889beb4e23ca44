"""Each call of a vendor operation, once: torch.ops.npu and nothing else, so that an emulator can stand in.

Every argument that matters is given by name; what the vendor defaults to (softmax_scale 1.0, say) is never relied on.
Shapes: M rows, K inputs, N outputs, G groups of inputs, E weights, S new tokens, L cached tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MAX_GROUPS = 1024  # of one 3-D weight
MAX_WEIGHTS = 128  # of a list of weights
MAX_SIDE = 65535  # K and N of a dense product


def grouped_matmul(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    offset: Sequence[torch.Tensor],
    counts: torch.Tensor,
) -> torch.Tensor:
    """x bf16 [M, K], rows sorted by weight, counts int64 [E] of them, to bf16 [M, N].

    weight: one 3-D tensor [E, K, N] or at most 128 of [K, N]: bf16, int8, or int32 that holds 8 codes along N.
    scale, offset bf16 as many, [.., N] or [.., G, N]; none for bf16."""
    (result,) = torch.ops.npu.npu_grouped_matmul(
        [x],
        list(weight),
        antiquant_scale=list(scale) or None,
        antiquant_offset=list(offset) or None,
        group_list=counts,
        split_item=2,
        group_type=0,
        group_list_type=1,
    )
    return result  # type: ignore[no-any-return]


def dense_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, group_size: int) -> torch.Tensor:
    """x bf16 [M, K] times codes int8 [K, N] or int32 [K, N / 8]; scale bf16 [G, N], or [N] with group_size 0."""
    result: torch.Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(x, weight, scale, antiquant_group_size=group_size)
    return result


def sort_by_expert(
    x: torch.Tensor, numbers: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows x bf16 [M, K] with one expert each, numbers int32 [M] below `experts`: the rows sorted by it, where each row
    went int32 [M], and how many each expert has, int64 [experts]."""
    rows, places, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x,
        numbers[:, None],
        active_num=len(x),
        expert_num=experts,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[0, experts],
        row_idx_type=0,
    )
    return rows, places, counts


def unsort(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The rows [M, N] in the order that they had before `sort_by_expert`."""
    result: torch.Tensor = torch.ops.npu.npu_moe_token_unpermute(rows, places)
    return result


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu of the first half of the columns, times the second."""
    result: torch.Tensor = torch.ops.npu.npu_swiglu(x, -1)
    return result


def latent_attention(
    query: torch.Tensor,
    query_rope: torch.Tensor,
    latent: torch.Tensor,
    key_rope: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """One sequence in the absorbed form. query bf16 [S, H, 512], query_rope [S, H, 64], latent [L, 512], key_rope
    [L, 64], all contiguous; mask int8 [2048, 2048] with ones above the diagonal, None for one token that sees all.
    Returns bf16 [S, H, 512]."""
    keys = latent[None, :, None]
    out, _ = torch.ops.npu.npu_fused_infer_attention_score_v2(
        query[None],
        keys,
        keys,
        query_rope=query_rope[None],
        key_rope=key_rope[None, :, None],
        atten_mask=mask,
        num_query_heads=query.shape[1],
        num_key_value_heads=1,
        softmax_scale=scale,
        input_layout="BSND",
        sparse_mode=0 if mask is None else 3,
    )
    return out[0]  # type: ignore[no-any-return]
