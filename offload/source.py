"""Where a layer's experts come from: the seam between the model's loop and the tiers of memory.

The contract of a lease, each sentence a test:
* A lease is a context manager and is released exactly once, at the end of its block.
* The views it hands out are valid until then; asking it for more afterwards is a programmer's error (RuntimeError).
* `ready` yields every expert asked for exactly once, resident ones first.
* A failed read raises in the thread that leases, naming file and expert.
* Each expert asked for is counted once.

Knows which expert is where; not what an expert computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from k2lite.quant.types import ExpertWeights

from .statistics import RouterStats

# Hears (layer, ids int64 [T, K] ascending, weights float32 [T, K]) of every choice.
Observer = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass
class SourceCounters:
    """What a source did since it was opened."""

    requested_experts: int = 0
    read_experts: int = 0
    read_bytes: int = 0
    read_s: float = 0.0


class Lease(ABC):
    """The right to read some experts of one layer."""

    @abstractmethod
    def ready(self) -> Iterator[Mapping[int, ExpertWeights]]:
        """Groups of experts, by number, as they become readable."""

    @abstractmethod
    def release(self) -> None:
        """Give the views back. A second call is a programmer's error (RuntimeError)."""

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class ExpertSource(ABC):
    """Hands out leases, and hears what the routers chose."""

    counters: SourceCounters
    stats: RouterStats
    observers: tuple[Observer, ...] = ()  # who else wants to hear: a recording, for one

    @abstractmethod
    def lease(self, layer: int, experts: Sequence[int]) -> Lease:
        """Lease distinct `experts` of `layer`."""

    def observe(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """A router's choice for a batch: ids int64 [T, K] ascending, weights float32 [T, K]. In prefill a chunk is one
        batch: T is its tokens, each layer is observed once a chunk, in the order of layers."""
        self.stats.observe(layer, ids, weights)
        for observer in self.observers:
            observer(layer, ids, weights)
