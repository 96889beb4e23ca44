"""Where a layer's experts multiply: beside the trunk, on the host, or a fixed few beside it and the others on the host.

Invariant: where follows from the plan and from an expert's number, never from where its bytes happen to be.
Shapes: T tokens, D hidden, K active experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from k2lite.backends.base import Assignment, Backend
from k2lite.quant.types import ExpertKey, ExpertWeights


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
    """All on the processor by `host`, but for those of `hot`, which lie beside the trunk for good."""

    def __init__(self, trunk: Backend, host: Backend, hot: Mapping[ExpertKey, ExpertWeights] | None = None) -> None:
        self.trunk = trunk
        self.host = host
        self.hot = dict(hot or {})

    def begin(self, layer: int, x: torch.Tensor, ids: torch.Tensor) -> ExpertWork:
        there = {key.expert: weights for key, weights in self.hot.items() if key.layer == layer}
        return _WorkApart(self.trunk, self.host, there, x, ids)


class _WorkBeside(ExpertWork):
    def __init__(self, backend: Backend, x: torch.Tensor, ids: torch.Tensor) -> None:
        self.wanted = torch.unique(ids).tolist()
        self._backend, self._x, self._ids = backend, x, ids
        self._out = x.new_empty(*ids.shape, x.shape[-1])

    def multiply(self, group: Mapping[int, ExpertWeights]) -> None:
        work = assignments(group, self._ids, self._backend)
        self._backend.expert_ffn(self._x, work, self._out).wait()

    def results(self) -> torch.Tensor:
        return self._out


class _WorkApart(ExpertWork):
    """The device is told of its experts first and computes while the host does."""

    def __init__(
        self, trunk: Backend, host: Backend, hot: Mapping[int, ExpertWeights], x: torch.Tensor, ids: torch.Tensor
    ) -> None:
        chosen = torch.unique(ids).tolist()
        self.wanted = [expert for expert in chosen if expert not in hot]
        self._trunk, self._host, self._ids = trunk, host, ids
        self._x = trunk.download(x)
        self._out = torch.zeros(*ids.shape, x.shape[-1])
        self._there: torch.Tensor | None = None
        if len(self.wanted) < len(chosen):
            self._there = x.new_empty(*ids.shape, x.shape[-1])
            group = {expert: hot[expert] for expert in chosen if expert in hot}
            trunk.expert_ffn(x, assignments(group, ids, trunk), self._there).wait()

    def multiply(self, group: Mapping[int, ExpertWeights]) -> None:
        self._host.expert_ffn(self._x, assignments(group, self._ids, self._host), self._out).wait()

    def results(self) -> torch.Tensor:
        if self._there is None:
            return self._trunk.upload(self._out)
        if self.wanted:
            cold = torch.isin(self._ids, torch.tensor(self.wanted))
            rows, slots = torch.where(cold)
            upload = self._trunk.upload
            self._there[upload(rows), upload(slots)] = upload(self._out[cold])
        return self._there


def assignments(group: Mapping[int, ExpertWeights], ids: torch.Tensor, backend: Backend) -> Sequence[Assignment]:
    """Which rows of a batch go through each expert of `group`, for `backend`; ids int64 [T, K] on the host."""
    return [
        Assignment(expert, *(there(index, backend) for index in torch.where(ids == number)))
        for number, expert in group.items()
    ]


def there(index: torch.Tensor, backend: Backend) -> torch.Tensor:
    """A tensor of the host where `backend` computes; the tensor itself if that is the processor."""
    return index if backend.device.type == "cpu" else backend.upload(index)
