"""Experts for a backend that multiplies other bytes than those stored, or in another memory: packed on the way.

Invariant: a group's packed experts stay as they are until the next group is asked for or the lease ends. The cache
below keeps the checkpoint's bytes; what is packed lies in a few places that are filled anew for each group.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from k2lite.backends.base import Backend, ExpertSlot
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.formats import QuantFormat, Shape
from k2lite.quant.types import PROJECTIONS, ExpertKey, ExpertWeights

from .source import ExpertSource, ForwardingSource, Lease

PLACES = 8
# How an expert's three matrices are stored.
ExpertKind = tuple[tuple[QuantFormat, Shape], ...]


def expert_kind(checkpoint: Checkpoint, key: ExpertKey) -> ExpertKind:
    """How one expert is stored."""
    modules = checkpoint.expert_modules(key)
    return tuple((modules[name].format, modules[name].shape) for name in PROJECTIONS)  # type: ignore[misc]


def expert_kinds(checkpoint: Checkpoint) -> list[ExpertKind]:
    """Each kind of expert that a whole checkpoint holds, in its order."""
    return list(dict.fromkeys(expert_kind(checkpoint, key) for key in checkpoint.expert_keys()))


def expert_rooms(checkpoint: Checkpoint, backend: Backend) -> list[ExpertSlot]:
    """The room for each kind of expert that a whole checkpoint holds."""
    return [backend.expert_slot(kind) for kind in expert_kinds(checkpoint)]


def packing_bytes(checkpoint: Checkpoint, backend: Backend) -> int:
    """What the places take; 0 for a backend that multiplies experts as stored, in RAM."""
    rooms = expert_rooms(checkpoint, backend)
    if backend.device.type == "cpu" and not any(room.repacked for room in rooms):
        return 0
    return PLACES * max((room.nbytes for room in rooms), default=0)


class PackedSource(ForwardingSource):
    """`source` with each expert packed by `backend` when it is handed out."""

    def __init__(self, source: ExpertSource, backend: Backend) -> None:
        super().__init__(source)
        self._backend = backend
        self._places: Sequence[torch.Tensor] = []
        self._kind: list[tuple[QuantFormat, Shape]] = []

    def lease(self, layer: int, experts: Sequence[int], keep: Collection[int] | None = None) -> Lease:
        return _PackedLease(super().lease(layer, experts, keep), self)

    def pack(self, place: int, expert: ExpertWeights) -> ExpertWeights:
        """Put an expert into one of the places."""
        kind = [(matrix.format, matrix.shape) for matrix in expert]
        if kind != self._kind:
            self._places = []  # given back before others are asked for
            self._places = self._backend.alloc_slots(kind, PLACES)
            self._kind = kind
        return self._backend.pack_expert(expert, self._places[place])


class _PackedLease(Lease):
    def __init__(self, lease: Lease, source: PackedSource) -> None:
        self._lease = lease
        self._source = source

    def ready(self) -> Iterator[Mapping[int, ExpertWeights]]:
        for group in self._lease.ready():
            numbers = list(group)
            for at in range(0, len(numbers), PLACES):
                part = numbers[at : at + PLACES]
                yield {number: self._source.pack(place, group[number]) for place, number in enumerate(part)}

    def release(self) -> None:
        self._lease.release()
