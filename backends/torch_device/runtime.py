"""The little that an accelerator's torch module must offer: memory, streams, events, pages that stay where they are.

Invariant: nothing here names a device. Each vendor fills `DeviceRuntime` in a file of its own; torch's modules for
accelerators are so alike that `module_runtime.py` does nearly all of it.
"""

from __future__ import annotations

from typing import Protocol

import torch

from k2lite.backends.base import Memory

from .meaning import Meaning


class DeviceEvent(Protocol):
    """A point in a stream's work. It is recorded once."""

    def query(self) -> bool:
        """Whether the device has come so far. Does not wait."""

    def synchronize(self) -> None:
        """Hold the calling thread until it has."""


class DeviceStream(Protocol):
    """Work that a device does in order. Two streams know nothing of each other but what `wait` tells them."""

    def record(self) -> DeviceEvent:
        """The point behind all that was issued so far."""

    def wait(self, event: DeviceEvent) -> None:
        """What is issued from now on starts after `event`, which any stream has recorded. The thread doesn't wait."""


class DeviceRuntime(Protocol):
    """One device. Operations of torch run on its compute stream, in the order in which they are called."""

    device: torch.device
    name: str  # as a person knows it: "NVIDIA GeForce RTX 4090"

    def memory(self) -> Memory:
        """Bytes of the device's memory: all, and what can be had now."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Uninitialized bytes on the device, uint8 [nbytes], on a boundary of 256. Raises what `meaning` knows."""

    def free_cached(self) -> None:
        """Give back what the allocator keeps for later."""

    def compute_stream(self) -> DeviceStream:
        """The stream that torch's operations of this thread run on."""

    def new_stream(self) -> DeviceStream:
        """A side stream, for copies."""

    def copy(self, src: torch.Tensor, dst: torch.Tensor, stream: DeviceStream) -> None:
        """Issue a copy on `stream`, one side of it in memory of the host that is pinned."""

    def pin(self, memory: torch.Tensor) -> None:
        """Lock pages of the host (uint8, whole pages) where they are, so that the device can read and write them by
        itself. Raises OSError where the system refuses."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo `pin` of the same bytes; no copy may be under way."""

    def meaning(self, error: BaseException) -> Meaning | None:
        """What an exception of torch's says of the device. None if nothing."""
