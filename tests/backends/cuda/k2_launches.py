"""Every kernel's launches at Kimi-K2's sizes, on tensors without memory: what a card would be asked to run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from k2lite.backends.base import RoutingRule
from k2lite.backends.cuda import attention, experts, products, rows
from k2lite.backends.cuda.launch import Launch, observed
from k2lite.backends.cuda.stored import stored
from k2lite.quant.formats import format_named
from k2lite.quant.types import ExpertWeights, QuantTensor

HIDDEN, WIDTH, HEADS, NOPE, ROTARY, VALUE, RANK = 7168, 2048, 64, 128, 64, 128, 512


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def weight(format: str, outputs: int, columns: int) -> QuantTensor:
    kind = format_named(format)
    parts = {name: empty(*shape, dtype=dtype) for name, (dtype, shape) in kind.parts((outputs, columns)).items()}
    return QuantTensor(kind, (outputs, columns), parts)


def linear(tokens: int, format: str, outputs: int, columns: int, *, exact: bool = False) -> None:
    there = stored(weight(format, outputs, columns), exact=exact)
    products.multiply(products.prepare(empty(tokens, columns), there.kind), there)


def expert_block(tokens: int, format: str) -> None:
    """Eight experts a token, `tokens` assignments of the one with the most."""
    expert = ExpertWeights(weight(format, WIDTH, HIDDEN), weight(format, WIDTH, HIDDEN), weight(format, HIDDEN, WIDTH))
    kind = experts.expert_kind(expert)
    assert kind is not None
    lists = (empty(8, 6, dtype=torch.int64), empty(8, 3, dtype=torch.int32))
    places = (empty(8 * tokens, dtype=torch.int32) for _ in range(2))
    prepared = products.prepare(empty(tokens, HIDDEN), kind.kinds[0])
    experts.multiply_experts(prepared, experts.Work(*lists, *places), kind, empty(8 * tokens, HIDDEN), tokens)


def attend(tokens: int, format: str) -> None:
    q_nope, q_rope = empty(tokens, HEADS, NOPE), empty(tokens, HEADS, ROTARY)
    kv_b = stored(weight(format, HEADS * (NOPE + VALUE), RANK))
    attention.attend(q_nope, q_rope, empty(tokens, 3, dtype=torch.int64), 8192, kv_b, 0.1)


def rest() -> None:
    rows.rms_norm(empty(1, HIDDEN), empty(HIDDEN), 1e-6)
    rows.rope(empty(1, HEADS, NOPE + ROTARY)[..., NOPE:], empty(1, ROTARY // 2), empty(1, ROTARY // 2))
    rows.choose(empty(1, 384), empty(384), RoutingRule(8, 1, 1, True, 2.827))
    rows.choose(empty(1, 256), empty(256), RoutingRule(8, 8, 4, True, 2.5))
    rows.combine(empty(1, 8, HIDDEN), empty(1, 8), empty(1, HIDDEN))
    products.prepare_silu(empty(1, WIDTH), empty(1, WIDTH), stored(weight("bf16", HIDDEN, WIDTH)).kind)


CASES: dict[str, Callable[[], None]] = {"rest": rest}
for _tokens in (1, 64, 4096):
    for _format in ("int4_g32", "int4_g64", "int4_g128", "int8_g128", "int8_channel", "fp8_e4m3_b128", "bf16", "f32"):
        for _shape in ((1536, 7168), (12288, 1536)):  # narrow, which is split, and wide
            _name = f"linear {_format} {list(_shape)}, {_tokens} tokens"
            CASES[_name] = lambda t=_tokens, f=_format, s=_shape: linear(t, f, *s)  # type: ignore[misc]
        if _tokens <= 64 and _format != "f32":
            CASES[f"experts {_format}, {_tokens} tokens"] = lambda t=_tokens, f=_format: expert_block(t, f)  # type: ignore[misc]
        CASES[f"attention {_format}, {_tokens} tokens"] = lambda t=_tokens, f=_format: attend(t, f)  # type: ignore[misc]
    CASES[f"router, {_tokens} tokens"] = lambda t=_tokens: linear(t, "bf16", 384, HIDDEN, exact=True)  # type: ignore[misc]


def launches(case: str) -> list[Launch]:
    """What the case `case` of CASES would launch."""
    found: list[Launch] = []
    with observed(found.append):
        CASES[case]()
    return found
