"""The way of experts between RAM and a device's slots: asynchronous copies on a side stream for each direction.

Invariant: a kernel that is issued after `use` sees the whole expert; the host's bytes must stay until the event of
`send`, or of `fetch`, is over. Which expert goes where is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from k2lite.backends.base import DONE, Event
from k2lite.quant.types import ExpertWeights

from .pinned import PinnedPool
from .runtime import DeviceEvent, DeviceRuntime
from .slots import DeviceSlots

Copy = Callable[[torch.Tensor, torch.Tensor], Any]
# How an expert goes into a slot: (its weights, the slot's bytes, what copies a part) -> views into the slot.
Place = Callable[[ExpertWeights, torch.Tensor, Copy], ExpertWeights]


@dataclass(frozen=True)
class Sent:
    """An expert on its way: its views in the slot, and when its bytes are there."""

    weights: ExpertWeights
    event: DeviceEvent


class ExpertLink:
    """Copies by `place`, a backend's own; through `pool` what comes from pages that are not locked."""

    def __init__(self, runtime: DeviceRuntime, place: Place, pool: PinnedPool) -> None:
        self._runtime = runtime
        self._place = place
        self._pool = pool
        self._up, self._down = runtime.new_stream(), runtime.new_stream()

    def send(self, expert: ExpertWeights, slots: DeviceSlots, slot: int, *, locked: torch.Tensor | None) -> Sent:
        """Begin to copy an expert into a slot, once the kernels that read the slot are done. `locked` are pages of the
        host that the device reads by itself; a part that doesn't lie there goes through the pool."""

        def copy(src: torch.Tensor, dst: torch.Tensor) -> Event:
            if locked is not None and _lies_in(src, locked):
                self._runtime.copy(src, dst, self._up)
            else:
                self._pool.send(src, dst, self._up)
            return DONE

        weights = self._place(expert, slots.claim(slot, self._up), copy)
        return Sent(weights, self._up.record())

    def fetch(self, slots: DeviceSlots, slot: int, dst: torch.Tensor) -> DeviceEvent:
        """Begin to copy the first bytes of a slot, which have all arrived, back into locked pages of the host, `dst`
        uint8. The slot must stay as it is until the event."""
        slots.after_readers(slot, self._down)  # so that the event below is behind them too
        self._runtime.copy(slots.memory(slot)[: dst.numel()], dst, self._down)
        event = self._down.record()
        slots.read_until(slot, event)
        return event

    def use(self, event: DeviceEvent) -> None:
        """What the device computes from now on starts after `event`."""
        self._runtime.compute_stream().wait(event)

    def computed(self) -> DeviceEvent:
        """The point behind all that the device was told to compute so far."""
        return self._runtime.compute_stream().record()


def _lies_in(part: torch.Tensor, pages: torch.Tensor) -> bool:
    start = part.data_ptr() - pages.data_ptr()
    return start >= 0 and start + part.nbytes <= pages.nbytes
