"""Lets a recorder see the inputs of every matrix while a model reads a text: a backend and a source of experts around
the real ones.

The numbers that come out are those of the real backend's `linear`. Not for speed: all else that a backend may do in one
stroke is done in the steps of the default. Which expert a weight belongs to is known from the lease that handed it out.
Shapes: T tokens, D hidden, K active experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import ClassVar

import torch

from k2lite.backends.base import Assignment, Backend, Capabilities, Event, Memory, RoutingRule, Segment
from k2lite.offload.source import ExpertSource, ForwardingSource, Lease
from k2lite.quant.types import PROJECTIONS, ExpertWeights, QuantTensor


class Recorder:
    """What is told of each step; a recorder overrides what it wants to know. Modules are stored names without
    ".weight"."""

    def matrix(self, module: str, x: torch.Tensor) -> None:
        """Inputs float32 [T, in] of a matrix: of the trunk, or of a routed expert for the tokens that chose it."""

    def expert(self, module: str, x: torch.Tensor, rows: torch.Tensor) -> None:
        """A routed expert (".../mlp.experts.7") is to read rows (int64 [n]) of its layer's inputs x [T, D]."""


class RecordingBackend(Backend):
    """`backend` with its inputs told to `recorder`. `trunk` are the trunk's matrices by module."""

    name: ClassVar[str] = "recording"

    def __init__(self, backend: Backend, recorder: Recorder, trunk: Mapping[str, QuantTensor]) -> None:
        self.device = backend.device
        self._backend = backend
        self._recorder = recorder
        # by identity: the weights are held by the model, and here
        self._trunk = trunk
        self._modules = {id(weight): module for module, weight in trunk.items()}
        self._experts: dict[int, str] = {}

    def capabilities(self) -> Capabilities:
        return self._backend.capabilities()

    def close(self) -> None:
        self._backend.close()

    def memory(self) -> Memory:
        return self._backend.memory()

    def alloc(self, nbytes: int) -> torch.Tensor:
        return self._backend.alloc(nbytes)

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        return self._backend.copy(src, dst)

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        module = self._modules.get(id(weight))
        if module is not None and len(x):
            self._recorder.matrix(module, x)
        return self._backend.linear(x, weight)

    def router(
        self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._backend.router(x, weight, bias, rule)

    def expert_ffn(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> Event:
        for item in work:
            self._recorder.expert(self._experts[id(item.expert)], x, item.rows)
        return super().expert_ffn(x, work, out)

    def attention(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        segments: Sequence[Segment],
        kv_b: QuantTensor,
        scale: float,
    ) -> torch.Tensor:
        for segment in segments:
            new = segment.latent[segment.start - segment.stop :, : kv_b.shape[1]]
            self._recorder.matrix(self._modules[id(kv_b)], new)
        return self._backend.attention(q_nope, q_rope, segments, kv_b, scale)

    def name_expert(self, module: str, expert: ExpertWeights) -> None:
        """From now on these weights belong to the expert called `module`."""
        self._experts[id(expert)] = module
        for projection in PROJECTIONS:
            self._modules[id(getattr(expert, projection))] = f"{module}.{projection}"

    def forget_expert(self, expert: ExpertWeights) -> None:
        for known in (self._experts, self._modules):
            for weight in (expert, *expert):
                known.pop(id(weight), None)


class RecordingSource(ForwardingSource):
    """Tells `backend` the names of the experts that `source` hands out, for as long as they are leased. `prefix` is
    what stored names begin with."""

    def __init__(self, source: ExpertSource, backend: RecordingBackend, prefix: str) -> None:
        super().__init__(source)
        self._backend, self._prefix = backend, prefix

    def lease(self, layer: int, experts: Sequence[int], keep: Collection[int] | None = None) -> Lease:
        prefix = f"{self._prefix}model.layers.{layer}.mlp.experts."
        return _RecordingLease(super().lease(layer, experts, keep), self._backend, prefix)


class _RecordingLease(Lease):
    def __init__(self, lease: Lease, backend: RecordingBackend, prefix: str) -> None:
        self._lease, self._backend, self._prefix = lease, backend, prefix
        self._named: list[ExpertWeights] = []

    def ready(self) -> Iterator[Mapping[int, ExpertWeights]]:
        for group in self._lease.ready():
            for number, expert in group.items():
                self._backend.name_expert(f"{self._prefix}{number}", expert)
                self._named.append(expert)
            yield group

    def release(self) -> None:
        for expert in self._named:
            self._backend.forget_expert(expert)
        self._lease.release()
