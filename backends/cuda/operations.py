"""The seam's operations on Triton's kernels, for whatever device holds the tensors. Memory and copies are others'.

Invariant: a token's result has the same bits for any batch and chunk: see codes.add_slice, stored.Stored.splits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from k2lite.quant.types import ExpertWeights, QuantTensor

from ..base import DONE, Assignment, Backend, Event, RoutingRule, Segment
from . import rows
from .attention import attend
from .experts import ExpertKind, Work, addresses, expert_kind, multiply_experts, tile_size, tiles
from .products import multiply, prepare, prepare_silu
from .stored import stored


class TritonOperations(Backend):
    """Everything but capabilities, memory, alloc and copy."""

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        there = stored(weight)
        return multiply(prepare(_rows(x), there.kind), there)

    def mlp(self, x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        x = _rows(x)
        gate, up, down = (stored(weight) for weight in weights)
        prepared = prepare(x, gate.kind)
        gates = multiply(prepared, gate)
        ups = multiply(prepared if up.kind == gate.kind else prepare(x, up.kind), up)
        return multiply(prepare_silu(gates, ups, down.kind), down)

    def expert_ffn(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> Event:
        groups: dict[ExpertKind | None, list[Assignment]] = {}
        for item in work:
            if len(item.rows):
                groups.setdefault(expert_kind(item.expert), []).append(item)
        for item in groups.pop(None, []):
            out[item.rows, item.slots] = self.mlp(x[item.rows], item.expert)
        for kind, items in groups.items():
            assert kind is not None
            self._experts(_rows(x), kind, items, out)
        return DONE

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rows.rms_norm(x.to(torch.float32), weight, eps)

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rows.rope(x, cos, sin)

    def router(
        self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        there = stored(weight, exact=True)
        return rows.choose(multiply(prepare(_rows(x), there.kind), there), bias, rule)

    def combine(self, out: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return rows.combine(out, weights, shared)

    def attention(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        segments: Sequence[Segment],
        kv_b: QuantTensor,
        scale: float,
    ) -> torch.Tensor:
        caches = [
            [segment.latent.data_ptr(), segment.latent.stride(0), len(segment.latent) - segment.stop + row + 1]
            for segment in segments
            for row in range(segment.start, segment.stop)
        ]
        longest = max((seen for _, _, seen in caches), default=0)
        table = self.upload(torch.tensor(caches, dtype=torch.int64).view(-1, 3))
        return attend(q_nope, q_rope, table, longest, stored(kv_b), scale)

    def _experts(self, x: torch.Tensor, kind: ExpertKind, items: Sequence[Assignment], out: torch.Tensor) -> None:
        counts = [len(item.rows) for item in items]
        size = tile_size(max(counts))
        table = torch.tensor([addresses(item.expert) for item in items], dtype=torch.int64)
        tokens = torch.cat([item.rows for item in items]).to(torch.int32)
        places = torch.cat([item.rows * out.shape[1] + item.slots for item in items]).to(torch.int32)
        listed = torch.tensor(tiles(counts, size), dtype=torch.int32)
        work = Work(self.upload(table), self.upload(listed), tokens, places)
        multiply_experts(prepare(x, kind.kinds[0]), work, kind, out, size)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """float32 with contiguous rows."""
    x = x.to(torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous()
