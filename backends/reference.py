"""The oracle among the backends: float32, one token at a time, no cleverness.

Every weight is dequantized to float32 where it is used, every sum runs in one order. Slow by design, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from k2lite.quant.formats import FORMAT_NAMES
from k2lite.quant.types import QuantTensor

from .base import DONE, Backend, Capabilities, Event, Memory, Segment, causal_rows, dot, softmax
from .host_memory import host_memory

MlaForm = Literal["absorbed", "naive"]


class ReferenceBackend(Backend):
    """`mla` chooses how attention is written: absorbed (latents only, as other backends decode) or naive (keys and
    values of all heads are made again for each token). Equal but for rounding."""

    name: ClassVar[str] = "reference"

    def __init__(self, *, mla: MlaForm = "absorbed") -> None:
        self.device = torch.device("cpu")
        self._mla = mla

    def capabilities(self) -> Capabilities:
        return Capabilities(formats=frozenset(FORMAT_NAMES), arithmetic=f"reference float32, {self._mla} MLA")

    def memory(self) -> Memory:
        return host_memory()

    def alloc(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        dst.copy_(src)
        return DONE

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        if not len(x):
            return x.new_empty(0, weight.shape[0])
        values = weight.dequantize()
        return torch.stack([dot(values, row) for row in x])

    def attention(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        segments: Sequence[Segment],
        kv_b: QuantTensor,
        scale: float,
    ) -> torch.Tensor:
        if self._mla == "absorbed":
            return super().attention(q_nope, q_rope, segments, kv_b, scale)
        heads, nope = q_nope.shape[1:]
        rank = kv_b.shape[1]
        per_head = kv_b.dequantize().view(heads, -1, rank)
        out = q_nope.new_empty(q_nope.shape[0], heads, per_head.shape[1] - nope)
        for token, latent in causal_rows(segments):
            made = dot(per_head[:, :, None], latent[None, None, :, :rank])  # [H, nope + V, N]
            keys, values = made[:, :nope].transpose(1, 2), made[:, nope:]
            scores = dot(q_nope[token][:, None], keys) + dot(q_rope[token][:, None], latent[None, :, rank:])
            out[token] = dot(softmax(scores * scale)[:, None], values)
        return out
