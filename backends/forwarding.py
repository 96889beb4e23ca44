"""A backend around another one: for those that change a part of what it does.

Forwarded are memory and what a backend must write, with router and attention; what is made of several products (mlp,
expert_ffn) stays the default of Backend, so that it is made of the methods that a child changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from k2lite.quant.formats import Shape
from k2lite.quant.types import QuantTensor

from .base import Backend, Capabilities, Event, Memory, RoutingRule, Segment


class ForwardingBackend(Backend):
    """`inner`, as it is."""

    def __init__(self, inner: Backend) -> None:
        self.device = inner.device
        self._inner = inner

    @property
    def inner(self) -> Backend:
        return self._inner

    def capabilities(self) -> Capabilities:
        return self._inner.capabilities()

    def close(self) -> None:
        self._inner.close()

    def memory(self) -> Memory:
        return self._inner.memory()

    def alloc(self, nbytes: int) -> torch.Tensor:
        return self._inner.alloc(nbytes)

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        return self._inner.copy(src, dst)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._inner.upload(tensor)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._inner.download(tensor)

    def empty(self, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return self._inner.empty(shape, dtype)

    def telling(self) -> AbstractContextManager[None]:
        return self._inner.telling()

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        return self._inner.linear(x, weight)

    def router(
        self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._inner.router(x, weight, bias, rule)

    def attention(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        segments: Sequence[Segment],
        kv_b: QuantTensor,
        scale: float,
    ) -> torch.Tensor:
        return self._inner.attention(q_nope, q_rope, segments, kv_b, scale)
