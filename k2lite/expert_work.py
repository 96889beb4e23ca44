"""Where a layer's experts multiply: beside the trunk, on the host, or a fixed few beside it and the others on the host.

Invariant: where follows from the plan and from an expert's number, never from where its bytes happen to be.
Shapes: T tokens, D hidden, K active experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from k2lite.backends.base import Assignment, Backend
from k2lite.offload.source import SourceCounters
from k2lite.quant.types import ExpertKey, ExpertWeights

# For each expert of a batch, in ascending order, where it was chosen: rows and slots of ids [T, K], int64 [n] each.
Tokens = Mapping[int, tuple[torch.Tensor, torch.Tensor]]


class ExpertWork(ABC):
    """One layer's experts for one batch. `wanted` are those whose bytes the source must bring."""

    wanted: list[int]

    @abstractmethod
    def multiply(self, group: Mapping[int, ExpertWeights]) -> None:
        """Experts have arrived; their views may go when this returns."""

    @abstractmethod
    def results(self) -> torch.Tensor:
        """All experts' results, float32 [T, K, D] beside the trunk."""


class ExpertPlaces(ABC):
    """Where experts multiply, of the whole model."""

    @abstractmethod
    def begin(self, layer: int, x: torch.Tensor, ids: torch.Tensor) -> ExpertWork:
        """Work for hidden states x [T, D] beside the trunk; ids int64 [T, K] on the host."""


class BesideTrunk(ExpertPlaces):
    """All on the trunk's device."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def begin(self, layer: int, x: torch.Tensor, ids: torch.Tensor) -> ExpertWork:  # noqa: ARG002
        return _WorkBeside(self.backend, x, ids)


class OnHost(ExpertPlaces):
    """All on the processor by `host`, but for those of `hot`, which lie beside the trunk for good. Their source never
    hears of them, so they are counted here as `counters` has it."""

    def __init__(
        self,
        trunk: Backend,
        host: Backend,
        hot: Mapping[ExpertKey, ExpertWeights] | None = None,
        counters: SourceCounters | None = None,
    ) -> None:
        self.trunk = trunk
        self.host = host
        self.hot = dict(hot or {})
        self.counters = counters or SourceCounters()

    def begin(self, layer: int, x: torch.Tensor, ids: torch.Tensor) -> ExpertWork:
        there = {key.expert: weights for key, weights in self.hot.items() if key.layer == layer}
        work = _WorkApart(self.trunk, self.host, there, x, ids)
        self.counters.requested_experts += work.hot_experts
        self.counters.hit_experts += work.hot_experts
        self.counters.device.hit_experts += work.hot_experts
        return work


class _WorkBeside(ExpertWork):
    def __init__(self, backend: Backend, x: torch.Tensor, ids: torch.Tensor) -> None:
        self._tokens = tokens_by_expert(ids)
        self.wanted = list(self._tokens)
        self._backend, self._x = backend, x
        self._out = x.new_empty(*ids.shape, x.shape[-1])

    def multiply(self, group: Mapping[int, ExpertWeights]) -> None:
        work = assignments(group, self._tokens, self._backend)
        self._backend.expert_ffn(self._x, work, self._out).wait()

    def results(self) -> torch.Tensor:
        return self._out


class _WorkApart(ExpertWork):
    """The device is told of its experts first and computes while the host does."""

    def __init__(
        self, trunk: Backend, host: Backend, hot: Mapping[int, ExpertWeights], x: torch.Tensor, ids: torch.Tensor
    ) -> None:
        self._tokens = tokens_by_expert(ids)
        chosen = list(self._tokens)
        self.wanted = [expert for expert in chosen if expert not in hot]
        self.hot_experts = len(chosen) - len(self.wanted)
        self._trunk, self._host, self._ids = trunk, host, ids
        self._x = trunk.download(x)
        self._out = torch.zeros(*ids.shape, x.shape[-1])
        self._there: torch.Tensor | None = None
        if len(self.wanted) < len(chosen):
            self._there = x.new_empty(*ids.shape, x.shape[-1])
            group = {expert: hot[expert] for expert in chosen if expert in hot}
            trunk.expert_ffn(x, assignments(group, self._tokens, trunk), self._there).wait()

    def multiply(self, group: Mapping[int, ExpertWeights]) -> None:
        self._host.expert_ffn(self._x, assignments(group, self._tokens, self._host), self._out).wait()

    def results(self) -> torch.Tensor:
        if self._there is None:
            return self._trunk.upload(self._out)
        if self.wanted:
            cold = torch.isin(self._ids, torch.tensor(self.wanted))
            rows, slots = torch.where(cold)
            upload = self._trunk.upload
            self._there[upload(rows), upload(slots)] = upload(self._out[cold])
        return self._there


def tokens_by_expert(ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """For each expert in ids int64 [T, K], in ascending order, where it was chosen: rows and slots, int64 [n] each."""
    if ids.shape[0] == 1:
        rows, slots = torch.zeros_like(ids), torch.arange(ids.shape[1], device=ids.device)
        return dict(zip(ids[0].tolist(), zip(rows.T.unbind(), slots[:, None].unbind(), strict=True), strict=True))
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    numbers, counts = torch.unique_consecutive(flat[order], return_counts=True)
    rows, slots = order // ids.shape[1], order % ids.shape[1]
    bounds = pairwise([0, *torch.cumsum(counts, 0).tolist()])
    return {number: (rows[a:b], slots[a:b]) for number, (a, b) in zip(numbers.tolist(), bounds, strict=True)}


def assignments(group: Mapping[int, ExpertWeights], tokens: Tokens, backend: Backend) -> Sequence[Assignment]:
    """Which rows of a batch go through each expert of `group`, for `backend`."""
    return [
        Assignment(expert, *(there(index, backend) for index in tokens[number])) for number, expert in group.items()
    ]


def there(index: torch.Tensor, backend: Backend) -> torch.Tensor:
    """A tensor of the host where `backend` computes; the tensor itself if that is the processor."""
    return index if backend.device.type == "cpu" else backend.upload(index)
