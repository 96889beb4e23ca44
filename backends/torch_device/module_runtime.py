"""A runtime over one of torch's modules for accelerators: they share their names of streams, events and memory.

Invariant: a module is handed in, never imported, so this file knows no vendor. Not run on hardware.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

import torch

from k2lite.backends.base import Memory

from .meaning import Meaning, meaning_of
from .runtime import DeviceEvent, DeviceStream


class ModuleStream:
    """A stream of the module, under the names of `DeviceStream`."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def record(self) -> DeviceEvent:
        event: DeviceEvent = self.raw.record_event()
        return event

    def wait(self, event: DeviceEvent) -> None:
        self.raw.wait_event(event)


class ModuleRuntime(ABC):
    """Device `index` of `module`. A vendor adds how pages are pinned."""

    def __init__(self, module: ModuleType, kind: str, index: int = 0) -> None:
        self._module = module
        self.device = torch.device(kind, index)
        module.set_device(index)
        self.name = str(module.get_device_name(index))

    def memory(self) -> Memory:
        """What the driver has free, and what torch's allocator keeps and does not use."""
        free, total = self._module.mem_get_info(self.device)
        kept = self._module.memory_reserved(self.device) - self._module.memory_allocated(self.device)
        return Memory(total_bytes=int(total), available_bytes=min(int(total), int(free) + int(kept)))

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def free_cached(self) -> None:
        self._module.empty_cache()

    def compute_stream(self) -> DeviceStream:
        return ModuleStream(self._module.current_stream(self.device))

    def new_stream(self) -> DeviceStream:
        return ModuleStream(self._module.Stream(self.device))

    def copy(self, src: torch.Tensor, dst: torch.Tensor, stream: DeviceStream) -> None:
        if not isinstance(stream, ModuleStream):
            raise TypeError(f"a stream of another runtime: {stream!r}")
        with self._module.stream(stream.raw):
            dst.copy_(src, non_blocking=True)

    @abstractmethod
    def pin(self, memory: torch.Tensor) -> None:
        """As in DeviceRuntime."""

    @abstractmethod
    def unpin(self, memory: torch.Tensor) -> None:
        """As in DeviceRuntime."""

    def meaning(self, error: BaseException) -> Meaning | None:
        return meaning_of(error)
