"""Where a layer's experts come from: the seam between the model's loop and the tiers of memory.

Knows which expert is where; not what an expert computes. One thread leases at a time. The contract of a lease stands
above `ExpertCache` (cache.py), the one source there is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch

from k2lite.quant.types import ExpertWeights

from .policy import State
from .statistics import RouterStats

# Hears (layer, ids int64 [T, K] ascending, weights float32 [T, K]) of every choice.
Observer = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass
class PrefetchCounters:
    """Experts that were read on a guess: `useful` had come when they were asked for, `late` were on their way,
    `wasted` were not asked for. A failed one is read again when it is asked for, and raises then."""

    issued: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    failed: int = 0
    wasted_bytes: int = 0


@dataclass
class DeviceCounters:
    """What an accelerator's memory did as a tier: experts that were there when they were asked for, that were sent
    there, that stayed there (promoted) and left (demoted); bytes that went there and came back."""

    hit_experts: int = 0
    sent_experts: int = 0
    sent_bytes: int = 0
    returned_bytes: int = 0
    promoted_experts: int = 0
    demoted_experts: int = 0


@dataclass
class SourceCounters:
    """What a source did since it was opened. A hit is an expert that needed no read since its last eviction: one that
    was read on a guess is none when it is first used. `read_s` is the time in which something was being read,
    `wait_s` the part of it in which the leasing thread had nothing else to do."""

    requested_experts: int = 0
    hit_experts: int = 0
    read_experts: int = 0
    read_bytes: int = 0
    read_s: float = 0.0
    wait_s: float = 0.0
    evicted_experts: int = 0
    prefetch: PrefetchCounters = field(default_factory=PrefetchCounters)
    device: DeviceCounters = field(default_factory=DeviceCounters)


class Lease(ABC):
    """The right to read some experts of one layer. `in_waves`: a group's views are valid until the next group is asked
    for, else until the release."""

    in_waves: bool = True

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
    def lease(self, layer: int, experts: Sequence[int], keep: Collection[int] | None = None) -> Lease:
        """Lease distinct `experts` of `layer`. `keep` are those that are worth keeping afterwards, None: all."""

    def observe(self, layer: int, ids: torch.Tensor, weights: torch.Tensor, *, recent: int | None = None) -> None:  # noqa: ARG002
        """A router's choice for a batch: ids int64 [T, K] ascending, weights float32 [T, K]. Comes before the lease.
        In prefill a chunk is one batch. What is to be kept is judged by the last `recent` rows (None: all)."""
        self.stats.observe(layer, ids, weights)
        for observer in self.observers:
            observer(layer, ids, weights)

    @abstractmethod
    def wants_hint(self, layer: int) -> bool:
        """Whether a guess of what `layer` will use next is of any use now."""

    @abstractmethod
    def hint(self, layer: int, ranked: Sequence[int] | None) -> None:
        """Guesses of what `layer` will use next, best first; None: nobody has one, statistics are all there is."""

    def prompt_begins(self, tokens: int, active: int) -> None:  # noqa: B027 (a source may have nothing to gain)
        """A step of so many tokens, each of which will use `active` experts of every layer, begins; the layers before
        the first with experts come first. What is read meanwhile changes speed, never tokens."""

    @abstractmethod
    def learned(self) -> dict[str, State]:
        """What routing has shown so far, by part, for `recall`."""

    @abstractmethod
    def recall(self, learned: Mapping[str, State]) -> None:
        """Begin a new conversation with what earlier ones showed, at less weight. Changes speed, never tokens. Raises
        ValueError where the shapes are another model's."""

    @abstractmethod
    def shrink(self, slots: int) -> int:
        """Give the memory of up to so many experts back to the system for good; of how many it was given back."""

    @abstractmethod
    def close(self) -> None:
        """End the reading threads and close the files. Of no use afterwards."""


class ForwardingSource(ExpertSource):
    """Another source, as it is: for sources around it that change a part."""

    def __init__(self, source: ExpertSource) -> None:
        self._source = source

    @property
    def counters(self) -> SourceCounters:  # type: ignore[override]
        return self._source.counters

    @property
    def stats(self) -> RouterStats:  # type: ignore[override]
        return self._source.stats

    def lease(self, layer: int, experts: Sequence[int], keep: Collection[int] | None = None) -> Lease:
        return self._source.lease(layer, experts, keep)

    def observe(self, layer: int, ids: torch.Tensor, weights: torch.Tensor, *, recent: int | None = None) -> None:
        self._source.observe(layer, ids, weights, recent=recent)

    def wants_hint(self, layer: int) -> bool:
        return self._source.wants_hint(layer)

    def hint(self, layer: int, ranked: Sequence[int] | None) -> None:
        self._source.hint(layer, ranked)

    def prompt_begins(self, tokens: int, active: int) -> None:
        self._source.prompt_begins(tokens, active)

    def learned(self) -> dict[str, State]:
        return self._source.learned()

    def recall(self, learned: Mapping[str, State]) -> None:
        self._source.recall(learned)

    def shrink(self, slots: int) -> int:
        return self._source.shrink(slots)

    def close(self) -> None:
        self._source.close()
