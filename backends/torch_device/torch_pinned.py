"""For vendors whose pages can't be locked where they are, or not in every version: staging that torch itself pins.

Experts that are laid out anew on their way pass through staging anyway, so the host's arena needs no lock. Not run on
hardware.
"""

from __future__ import annotations

from typing import Protocol

import torch

from .module_runtime import ModuleRuntime
from .pinned import PinnedPool
from .runtime import DeviceRuntime


class PinningRuntime(DeviceRuntime, Protocol):
    """A device whose torch module has pinned memory to give."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Memory of the host that the device reads and writes by itself, uint8 [nbytes]."""


class TorchPinnedRuntime(ModuleRuntime):
    """Device `index` of a module that pins what it allocates, and nothing else."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def pin(self, memory: torch.Tensor) -> None:
        raise OSError(f"{memory.nbytes} bytes stay unlocked: {self.name} copies through staging of its own")

    def unpin(self, memory: torch.Tensor) -> None:
        raise RuntimeError(f"{memory.nbytes} bytes were never locked")


class TorchPinnedPool(PinnedPool):
    """A PinnedPool in memory of `PinningRuntime.pinned`."""

    def __init__(self, runtime: PinningRuntime, pieces: int) -> None:
        super().__init__(runtime, pieces)
        self._give = runtime.pinned

    def close(self) -> None:
        for busy in self._busy:
            if busy is not None:
                busy.synchronize()
        self._memory = None

    def _locked(self) -> torch.Tensor:
        if self._memory is None:
            self._memory = self._give(self._pieces * self._piece_bytes)
        return self._memory
