"""A backend whose refusals plain torch makes good, on the same device: what --allow-fallback asks for.

Invariant: what the backend can do, it does, and each operation that falls back is told once. Falling back follows from
formats and shapes alone, never from a moment's state, so the arithmetic is as fixed as without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, TypeVar

import torch

from k2lite.quant.formats import FORMAT_NAMES, QuantFormat, Shape
from k2lite.quant.types import ExpertWeights, QuantTensor

from .base import (
    DONE,
    Assignment,
    Backend,
    Capabilities,
    Event,
    ExpertSlot,
    RoutingRule,
    Segment,
    UnsupportedOperationError,
)
from .forwarding import ForwardingBackend
from .packing import copy_into_slot
from .reference import ReferenceBackend
from .torch_device.backend import TorchDeviceBackend
from .torch_device.expert_link import Copy, ExpertLink

T = TypeVar("T")


class FallbackBackend(ForwardingBackend):
    """`inner` first. `say` gets one line for each operation and reason that falls back."""

    name: ClassVar[str] = "fallback"

    def __init__(self, inner: Backend, say: Callable[[str], None] | None = None) -> None:
        super().__init__(inner)
        self.name = inner.name  # type: ignore[misc]
        self.contract = inner.contract  # type: ignore[misc]
        self.layout_version = inner.layout_version  # type: ignore[misc]
        self._plain = ReferenceBackend()
        self._say = say
        self._told: set[str] = set()

    def capabilities(self) -> Capabilities:
        own = self._inner.capabilities()
        everything = frozenset(FORMAT_NAMES)
        return replace(
            own,
            formats=everything,
            expert_formats=None,
            max_experts=None,
            arithmetic=f"{own.arithmetic}, plain torch where it has none",
        )

    def upload_matrix(self, weight: QuantTensor) -> QuantTensor:
        if self._lacks(weight.format.name, experts=False):
            return super().upload_matrix(weight)
        return self._inner.upload_matrix(weight)

    def expert_slot(self, expert: Sequence[tuple[QuantFormat, Shape]]) -> ExpertSlot:
        if self._lacks(*(stored.name for stored, _ in expert), experts=True):
            return super().expert_slot(expert)
        return self._inner.expert_slot(expert)

    def alloc_slots(self, expert: Sequence[tuple[QuantFormat, Shape]], count: int) -> Sequence[torch.Tensor]:
        if self._lacks(*(stored.name for stored, _ in expert), experts=True):
            return super().alloc_slots(expert, count)
        return self._inner.alloc_slots(expert, count)

    def pack_expert(self, src: ExpertWeights, slot: torch.Tensor) -> ExpertWeights:
        if self._lacks(*(matrix.format.name for matrix in src), experts=True):
            return super().pack_expert(src, slot)
        return self._inner.pack_expert(src, slot)

    def packed_views(self, expert: Sequence[tuple[QuantFormat, Shape]], memory: torch.Tensor) -> ExpertWeights:
        if self._lacks(*(stored.name for stored, _ in expert), experts=True):
            return super().packed_views(expert, memory)
        return self._inner.packed_views(expert, memory)

    def expert_link(self) -> ExpertLink:
        """An accelerator's way of experts, with this backend's choice of how each goes into its slot."""
        if not isinstance(self._inner, TorchDeviceBackend):
            raise TypeError(f"backend {self.name} has no link to a device")
        return self._inner.expert_link(partial(self._place, self._inner))

    def _place(self, device: TorchDeviceBackend, src: ExpertWeights, slot: torch.Tensor, copy: Copy) -> ExpertWeights:
        if self._lacks(*(matrix.format.name for matrix in src), experts=True):
            return copy_into_slot(src, slot, copy)
        return device.place_expert(src, slot, copy)

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        return self._try("linear", [weight], lambda backend: backend.linear(x, weight))

    def embed(self, ids: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        return self._try("embed", [], lambda backend: backend.embed(ids, weight))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._try("rms_norm", [], lambda backend: backend.rms_norm(x, weight, eps))

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self._try("rope", [], lambda backend: backend.rope(x, cos, sin))

    def router(
        self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        most = self._inner.capabilities().max_experts
        if most is not None and weight.shape[0] > most:
            self._tell("router", f"{weight.shape[0]} experts are more than {most}")
            return self._plain.router(x, weight, bias, rule)
        return self._try("router", [weight], lambda backend: backend.router(x, weight, bias, rule))

    def mlp(self, x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        return self._try("mlp", weights, lambda backend: backend.mlp(x, weights))

    def expert_ffn(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> Event:
        """Expert by expert: which of them come in one call depends on what was read first, and must decide nothing."""
        mine = []
        for item in work:
            lacking = self._lacks(*(matrix.format.name for matrix in item.expert), experts=True)
            if lacking:
                self._tell("expert_ffn", f"no {', '.join(sorted(lacking))}")
                self._plain.expert_ffn(x, [item], out)
            else:
                mine.append(item)
        try:
            return self._inner.expert_ffn(x, mine, out)
        except UnsupportedOperationError:
            for item in mine:
                self._try("expert_ffn", [], partial(_one_expert, x, item, out))
            return DONE

    def combine(self, out: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return self._try("combine", [], lambda backend: backend.combine(out, weights, shared))

    def attention(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        segments: Sequence[Segment],
        kv_b: QuantTensor,
        scale: float,
    ) -> torch.Tensor:
        return self._try("attention", [kv_b], lambda backend: backend.attention(q_nope, q_rope, segments, kv_b, scale))

    def _try(self, operation: str, matrices: Sequence[QuantTensor], call: Callable[[Backend], T]) -> T:
        lacking = self._lacks(*(matrix.format.name for matrix in matrices), experts=False)
        if lacking:
            self._tell(operation, f"no {', '.join(sorted(lacking))}")
            return call(self._plain)
        try:
            return call(self._inner)
        except UnsupportedOperationError as error:
            self._tell(operation, str(error))
            return call(self._plain)

    def _lacks(self, *formats: str, experts: bool) -> set[str]:
        return set(formats) - self._inner.capabilities().formats_of(experts=experts)

    def _tell(self, operation: str, reason: str) -> None:
        line = f"backend {self.name}: {operation} falls back to plain torch: {reason}"
        if line not in self._told:
            self._told.add(line)
            if self._say is not None:
                self._say(line)


def _one_expert(x: torch.Tensor, item: Assignment, out: torch.Tensor, backend: Backend) -> None:
    backend.expert_ffn(x, [item], out).wait()
