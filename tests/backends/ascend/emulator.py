"""The vendor's operations on the processor: declared as the wheels declare them, held to rules.py, then computed.

Values come from the documents' formulas, in float32 of the inputs as given, rounded to the output's dtype once.
`calls` has the names of what ran.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch

from k2lite.backends.ascend.schemas import SCHEMAS, declaration

from . import rules

calls: Counter[str] = Counter()


@cache
def install() -> torch.library.Library:
    """Define and implement all; once a process. Skips where the vendor's own package would clash."""
    if importlib.util.find_spec("torch_npu") is not None:
        pytest.skip("torch_npu is installed: its own operations are not replaced by emulated ones")
    library = torch.library.Library("npu", "DEF")
    for operation in SCHEMAS:
        library.define(declaration(operation))
        library.impl(operation, _counted(operation), "CPU")
    return library


def _counted(operation: str) -> Any:
    check = getattr(rules, operation.removeprefix("npu_"))
    compute = globals()[f"_{operation.removeprefix('npu_')}"]

    def call(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        calls[operation] += 1
        return compute(*args, **kwargs)

    return call


def codes(weight: torch.Tensor) -> torch.Tensor:
    """int8, or nibbles of int32 along the last axis, the lowest first, two's complement: float32."""
    if weight.dtype != torch.int32:
        return weight.float()
    nibbles = [(weight >> 4 * place & 15) for place in range(8)]
    stacked = torch.stack(nibbles, dim=-1).flatten(-2)
    return torch.where(stacked > 7, stacked - 16, stacked).float()


def _antiquantized(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """(weight + offset) * scale for one weight [K, N]; scale [N] or [G, N]."""
    values = codes(weight)
    if scale.dim() == 2:
        each = -(-len(values) // len(scale))
        group = torch.arange(len(values)) // each
        scale, offset = scale[group], None if offset is None else offset[group]
    return (values if offset is None else values + offset.float()) * scale.float()


def _grouped_matmul(x: Any, weight: Any, *, antiquant_scale: Any = None, antiquant_offset: Any = None,
                    group_list: Any = None, group_list_type: int = 0, **_: Any) -> list[torch.Tensor]:  # fmt: skip
    rows = x[0]
    single = weight[0].dim() == 3
    counts = group_list if group_list_type == 1 else torch.diff(group_list, prepend=torch.zeros(1, dtype=torch.int64))
    parts, at = [], 0
    for number, count in enumerate(counts.tolist()):
        one = [
            None if t is None else t[0][number] if single else t[number]
            for t in (weight, antiquant_scale, antiquant_offset)
        ]
        if count:
            matrix = one[0].float() if one[1] is None else _antiquantized(*one)
            parts.append(rows[at : at + count].float() @ matrix)
        at += count
    n = weight[0].shape[-1] * (8 if weight[0].dtype == torch.int32 else 1)
    return [torch.cat([*parts, torch.empty(0, n)]).to(rows.dtype)]


def _weight_quant_batchmatmul(x: torch.Tensor, weight: torch.Tensor, antiquant_scale: torch.Tensor,
                              antiquant_offset: Any = None, *_: Any, **__: Any) -> torch.Tensor:  # fmt: skip
    return (x.float() @ _antiquantized(weight, antiquant_scale, antiquant_offset)).to(x.dtype)


def _moe_init_routing_v2(x: torch.Tensor, expert_idx: torch.Tensor, *, expert_num: int = -1, active_num: int = -1,
                         active_expert_range: Any = (), expert_tokens_num_type: int = 0, row_idx_type: int = 0,
                         **_: Any) -> tuple[torch.Tensor, ...]:  # fmt: skip
    first, last = active_expert_range or (0, expert_num)
    flat = expert_idx.flatten().long()
    key = torch.where((flat >= first) & (flat < last), flat, expert_num)
    order = torch.sort(key, stable=True).indices
    valid = int((key < expert_num).sum())
    counts = torch.bincount(key[key < expert_num] - first, minlength=last - first)
    places = torch.full((len(flat),), -1, dtype=torch.int32)
    places[order[:valid]] = torch.arange(valid, dtype=torch.int32)
    if row_idx_type == 1:
        places = order.to(torch.int32)
    taken = valid if active_num in (-1, 0) else min(active_num, valid)
    rows = torch.empty(len(flat) if active_num in (-1, 0) else min(active_num, len(flat)), x.shape[1], dtype=x.dtype)
    rows[:taken] = x[order[:taken] // expert_idx.shape[1]]
    rows[taken:] = torch.nan if x.is_floating_point() else 77  # left as it was
    return rows, places, counts if expert_tokens_num_type == 1 else counts.cumsum(0), torch.empty(len(x))


def _swiglu(self: torch.Tensor, dim: int = -1) -> torch.Tensor:
    gate, up = self.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(self.dtype)


def _moe_token_unpermute(permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, probs: Any = None,
                         *_: Any, **__: Any) -> torch.Tensor:  # fmt: skip
    rows = permuted_tokens.float()[sorted_indices.long()]
    if probs is not None:
        rows = (rows.view(*probs.shape, -1) * probs.float()[..., None]).sum(1)
    return rows.to(permuted_tokens.dtype)


def _fused_infer_attention_score_v2(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, query_rope: Any,
                                    key_rope: Any, atten_mask: Any = None, softmax_scale: float = 1.0,
                                    sparse_mode: int = 0, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k = (torch.cat(pair, -1).float() for pair in ((query, query_rope), (key, key_rope)))
    scores = torch.einsum("bshd,bld->bhsl", q, k[:, :, 0]) * softmax_scale
    new, seen = scores.shape[-2:]
    if sparse_mode == 3:  # the mask's pattern, its right lower corner on the last key of the last token
        later = torch.arange(seen)[None] > torch.arange(new)[:, None] + (seen - new)
        masked = bool(atten_mask.flatten()[1]) and not bool(atten_mask.flatten()[2048])
        scores = scores.masked_fill(later if masked else ~later, -torch.inf)
    out = torch.einsum("bhsl,bld->bshd", torch.softmax(scores, -1), value[:, :, 0].float())
    return out.to(query.dtype), torch.zeros(1)
