"""Calls that are right but for one thing: the schema or a rule of the documents sees each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import emulator
from .rules import RuleError

BF16 = torch.bfloat16
K, N, E, M = 128, 64, 4, 6


def grouped() -> dict[str, Any]:
    scale = torch.rand(E, K // 32, N).to(BF16)
    return {
        "x": [torch.randn(M, K).to(BF16)],
        "weight": [torch.randint(-(2**31), 2**31 - 1, (E, K, N // 8), dtype=torch.int32)],
        "antiquant_scale": [scale],
        "antiquant_offset": [torch.zeros_like(scale)],
        "group_list": torch.tensor([1, 0, 3, 2]),
        "split_item": 2,
        "group_type": 0,
        "group_list_type": 1,
    }


def dense() -> dict[str, Any]:
    return {
        "x": torch.randn(M, K).to(BF16),
        "weight": torch.zeros(K, N // 8, dtype=torch.int32),
        "antiquant_scale": torch.rand(K // 32, N).to(BF16),
        "antiquant_group_size": 32,
    }


def routing() -> dict[str, Any]:
    return {
        "x": torch.randn(M, K).to(BF16),
        "expert_idx": torch.tensor([[3], [0], [1], [1], [0], [2]], dtype=torch.int32),
        "active_num": M,
        "expert_num": E,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, E],
    }


def unpermute() -> dict[str, Any]:
    return {"permuted_tokens": torch.randn(3, K).to(BF16), "sorted_indices": torch.tensor([2, 0, 1], dtype=torch.int32)}


def attention() -> dict[str, Any]:
    latent = torch.randn(1, 9, 1, 512).to(BF16)
    return {
        "query": torch.randn(1, 3, 8, 512).to(BF16),
        "key": latent,
        "value": latent,
        "query_rope": torch.randn(1, 3, 8, 64).to(BF16),
        "key_rope": torch.randn(1, 9, 1, 64).to(BF16),
        "atten_mask": torch.ones(2048, 2048, dtype=torch.int8).triu_(1),
        "num_query_heads": 8,
        "num_key_value_heads": 1,
        "softmax_scale": 0.1,
        "input_layout": "BSND",
        "sparse_mode": 3,
    }


Change = Callable[[dict[str, Any]], Any]
Wrong = list[tuple[str, Change, str]]


def put(**values: Any) -> Change:
    return lambda call: call.update(values)


def each(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Change a tensor, or every tensor of a list."""

    def apply(call: dict[str, Any]) -> None:
        value = call[name]
        call[name] = [change(t) for t in value] if isinstance(value, list) else change(value)

    return apply


def without(name: str) -> Change:
    return lambda call: call.pop(name)


def all_of(names: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(call: dict[str, Any]) -> None:
        for name in names.split():
            each(name, change)(call)

    return apply


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of twice the room."""
    return torch.stack((tensor, tensor), -1)[..., 0]


def padded_slots(call: dict[str, Any]) -> None:
    """Slots that lie apart, as bytes of one expert behind those of another would."""
    call["weight"] = [torch.zeros(E, K + 8, N // 8, dtype=torch.int32)[:, :K]]


GROUPED: Wrong = [
    ("x in float32", each("x", torch.Tensor.float), "x must be float16 or bfloat16"),
    ("x 3-D", each("x", lambda t: t[None]), "x must be 2-D"),
    ("x not contiguous", each("x", strided), "x is neither contiguous"),
    ("slots apart", padded_slots, "weight is neither contiguous"),
    ("another K", each("x", lambda t: t[:, :96].contiguous()), "K of weight"),
    ("transposed int4", each("weight", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)), "not transposed"),
    ("weight in uint8", each("weight", lambda t: t.view(torch.uint8)), "weight must have x's dtype"),
    ("129 weights", put(weight=[torch.zeros(K, N // 8, dtype=torch.int32)] * 129), "128 tensors at most"),
    ("1025 groups", put(weight=[torch.zeros(1025, K, 1, dtype=torch.int32)]), "1024 groups at most"),
    ("unequal weights", put(weight=[torch.zeros(K, n, dtype=torch.int32) for n in (8, 4)]), "one dtype, N and layout"),
    ("no offset", without("antiquant_offset"), "antiquant_offset must be given"),
    ("no scale", without("antiquant_scale"), "antiquant_scale must be given"),
    ("scale in float32", each("antiquant_scale", torch.Tensor.float), "antiquant_scale must have x's dtype"),
    ("offset in float32", each("antiquant_offset", torch.Tensor.float), "antiquant_offset must have x's dtype"),
    ("offset of another shape", each("antiquant_offset", lambda t: t[:, :1]), "have antiquant_scale's shape"),
    ("scales along inputs", each("antiquant_scale", lambda t: t.transpose(1, 2)), "have antiquant_scale's shape"),
    ("3 groups", all_of("antiquant_scale antiquant_offset", lambda t: t[:, :3].contiguous()), "must divide K"),
    ("groups of int8", put(weight=[torch.zeros(E, K, N, dtype=torch.int8)]), "per channel only"),
    ("counts in int32", each("group_list", torch.Tensor.int), "group_list must be int64"),
    ("counts that lack a row", put(group_list=torch.tensor([1, 0, 2, 2])), "add up to the rows"),
    ("ends given as counts", put(group_list=torch.tensor([1, 1, 4, 6])), "add up to the rows"),
    ("counts given as ends", put(group_list_type=0), "negative or fall"),
    ("counts of fewer", put(group_list=torch.tensor([4, 2])), "as long as there are groups"),
    ("pairs", put(group_list_type=2), "group_list_type must be 0 or 1"),
    ("several outputs", put(split_item=0), "split_item must be 2 or 3"),
    ("no group type", without("group_type"), "group_type must be 0"),
    ("an activation", put(act_type=5), "per-token quantization only"),
    ("x alone", put(x=torch.zeros(M, K)), "schema"),
    ("a name that is none", put(group_sizes=[1]), "schema"),
]  # fmt: skip
DENSE: Wrong = [
    ("group of 48", put(antiquant_group_size=48), "multiple of 32"),
    ("group of 16", put(antiquant_group_size=16), "multiple of 32"),
    ("one group over all", put(antiquant_group_size=K, antiquant_scale=torch.rand(1, N).to(BF16)), "32 .. K - 1"),
    ("scale of another shape", each("antiquant_scale", lambda t: t.T), "ceil"),
    ("groups without their size", put(antiquant_group_size=0), "without groups"),
    ("x in float32", each("x", torch.Tensor.float), "x must be float16 or bfloat16"),
    ("scale in float16", each("antiquant_scale", torch.Tensor.half), "antiquant_scale must have x's dtype"),
    ("another K", each("weight", lambda t: t[:96]), "K of weight"),
    ("no rows", each("x", lambda t: t[:0]), "empty tensors"),
    ("N too large", put(weight=torch.zeros(K, 8192, dtype=torch.int32)), "at most 65535"),
    ("plain weight", each("weight", torch.Tensor.float), "weight must be int8"),
    ("no scale", without("antiquant_scale"), "schema"),
]  # fmt: skip
ROUTING: Wrong = [
    ("numbers in int64", each("expert_idx", torch.Tensor.long), "expert_idx must be int32"),
    ("numbers 1-D", each("expert_idx", torch.Tensor.flatten), "must be [rows, K]"),
    ("a number too large", put(expert_num=3, active_expert_range=[0, 3]), "below expert_num"),
    ("a range too large", put(active_expert_range=[0, 5]), "active_expert_range"),
    ("no counts", without("expert_tokens_num_flag"), "counts are not written"),
    ("three ends of a range", put(active_expert_range=[0, 1, 2]), "two ends"),
]
UNPERMUTE: Wrong = [
    ("places in int64", each("sorted_indices", torch.Tensor.long), "sorted_indices must be int32"),
    ("a place twice", put(sorted_indices=torch.tensor([0, 0, 1], dtype=torch.int32)), "each row once"),
    ("a place too few", each("sorted_indices", lambda t: t[:2]), "one for each row"),
]
SWIGLU: Wrong = [("an odd width", lambda c: c.update(self=torch.zeros(2, 5)), "even")]
TENSORS = "query key value query_rope key_rope"
ATTENTION: Wrong = [
    ("the default scale", without("softmax_scale"), "softmax_scale was left"),
    ("latents of 576", each("query", lambda t: torch.cat((t, t[..., :64]), -1)), "query's D must be 512"),
    ("12 heads", all_of("query query_rope", lambda t: torch.cat((t, t[:, :, :4]), 2)), "heads must be"),
    ("a head too many in words", put(num_query_heads=16), "num_query_heads"),
    ("keys of every head", put(num_key_value_heads=8), "key must have one head"),
    ("a slice of the cache", each("key", strided), "key is neither contiguous"),
    ("no mask", without("atten_mask"), "needs atten_mask"),
    ("a small mask", each("atten_mask", lambda t: t[:3, :9].contiguous()), "2048 x 2048"),
    ("a mask in float", each("atten_mask", torch.Tensor.float), "atten_mask must be bool"),
    ("no rope", without("key_rope"), "must come together"),
    ("rope of 32", each("query_rope", lambda t: t[..., :32].contiguous()), "query_rope must be"),
    ("rope in float16", each("key_rope", torch.Tensor.half), "one dtype"),
    ("sparse mode 2", put(sparse_mode=2), "sparse_mode must be"),
    ("float32", all_of(TENSORS, torch.Tensor.float), "float16 or bfloat16"),
    ("version 1's name of the heads", put(num_heads=8), "schema"),
]  # fmt: skip
CALLS: list[tuple[str, Callable[[], dict[str, Any]], Wrong]] = [
    ("npu_grouped_matmul", grouped, GROUPED),
    ("npu_weight_quant_batchmatmul", dense, DENSE),
    ("npu_moe_init_routing_v2", routing, ROUTING),
    ("npu_moe_token_unpermute", unpermute, UNPERMUTE),
    ("npu_swiglu", lambda: {"self": torch.zeros(2, 6)}, SWIGLU),
    ("npu_fused_infer_attention_score_v2", attention, ATTENTION),
]


@pytest.mark.parametrize(("operation", "right"), [(name, right) for name, right, _ in CALLS])
def test_the_right_call_passes(operation: str, right: Callable[[], dict[str, Any]]) -> None:
    emulator.install()
    getattr(torch.ops.npu, operation)(**right())


@pytest.mark.parametrize(
    ("operation", "right", "change", "rule"),
    [
        pytest.param(operation, right, change, rule, id=f"{operation}: {name}")
        for operation, right, wrong in CALLS
        for name, change, rule in wrong
    ],
)
def test_a_wrong_call_is_seen(operation: str, right: Callable[[], dict[str, Any]], change: Change, rule: str) -> None:
    emulator.install()
    call = right()
    change(call)
    if rule == "schema":
        with pytest.raises((RuntimeError, TypeError), match=r"npu::|Expected a value of type|missing value"):
            getattr(torch.ops.npu, operation)(**call)
        return
    with pytest.raises(RuleError) as caught:
        getattr(torch.ops.npu, operation)(**call)
    assert rule in str(caught.value)
