"""The source for a model that fits: each expert is read once, when it is first leased, and stays.

Invariant: what was read is never moved or freed before `close`, so views outlive their lease by accident only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.expert_layout import expert_weights, read_extents
from k2lite.quant.types import ExpertKey, ExpertWeights

from .source import ExpertSource, Lease, SourceCounters
from .statistics import RouterStats


class ResidentSource(ExpertSource):
    """Experts of `checkpoint` in memory, as stored or as `pack` makes them once they are read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[int],
        n_routed_experts: int,
        *,
        pack: Callable[[ExpertWeights], ExpertWeights] | None = None,
    ) -> None:
        self.counters = SourceCounters()
        self.stats = RouterStats(layers, n_routed_experts)
        self._checkpoint = checkpoint
        self._pack = pack
        self._resident: dict[ExpertKey, ExpertWeights] = {}

    def lease(self, layer: int, experts: Sequence[int]) -> Lease:
        keys = [ExpertKey(layer, expert) for expert in experts]
        if len(set(keys)) != len(keys):
            raise ValueError(f"layer {layer}: an expert is asked for twice in one lease: {sorted(experts)}")
        self.counters.requested_experts += len(keys)
        return _ResidentLease(self, keys)

    def resident(self, key: ExpertKey) -> ExpertWeights | None:
        return self._resident.get(key)

    def read(self, key: ExpertKey) -> ExpertWeights:
        """Read an expert and keep it. Raises CheckpointError."""
        began = time.perf_counter()
        layout = self._checkpoint.expert(key)
        weights = expert_weights(layout, read_extents(layout))
        if self._pack is not None:
            weights = self._pack(weights)
        self._resident[key] = weights
        self.counters.read_experts += 1
        self.counters.read_bytes += layout.nbytes
        self.counters.read_s += time.perf_counter() - began
        return weights


class _ResidentLease(Lease):
    def __init__(self, source: ResidentSource, keys: Sequence[ExpertKey]) -> None:
        self._source = source
        self._keys = keys
        self._released = False

    def ready(self) -> Iterator[Mapping[int, ExpertWeights]]:
        if self._released:
            raise RuntimeError("a lease was used after its release")
        here = {key: self._source.resident(key) for key in self._keys}
        resident = {key.expert: weights for key, weights in here.items() if weights is not None}
        if resident:
            yield resident
        for key, weights in here.items():
            if weights is None:
                yield {key.expert: self._source.read(key)}

    def release(self) -> None:
        if self._released:
            raise RuntimeError("a lease was released twice")
        self._released = True
