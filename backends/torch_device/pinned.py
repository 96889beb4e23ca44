"""Memory of the host that a device reads and writes by itself: exactly as large as asked, its pages locked in place.

torch's own pinned memory rounds up to a power of two, a third more for experts. Here pages come from the system and are
locked through the runtime; memory that exists already is locked where it lies, a slot at a time, as slots fill.
Invariant: what is locked is unlocked before it is given back. Knows no experts.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch

from k2lite.quant.errors import BackendError

from .runtime import DeviceEvent, DeviceRuntime, DeviceStream

PIECE_BYTES = 4 << 20


class PinnedPages:
    """Which pieces of the host's memory are locked. Where the system refuses once, it is told once and not asked
    again: copies go through a `PinnedPool` then, at the price of one copy in RAM."""

    def __init__(self, runtime: DeviceRuntime, say: Callable[[str], None]) -> None:
        self._runtime = runtime
        self._say = say
        self._held: dict[int, torch.Tensor] = {}
        self._refused = False

    def hold(self, memory: torch.Tensor) -> bool:
        """Lock `memory`, uint8 of whole pages, if it isn't; whether it is locked now."""
        if memory.data_ptr() in self._held:
            return True
        if self._refused:
            return False
        try:
            self._runtime.pin(memory)
        except OSError as error:
            self._refused = True
            self._say(f"{error}; experts reach the device through a small pinned buffer, which is slower")
            return False
        self._held[memory.data_ptr()] = memory
        return True

    def release(self, memory: torch.Tensor) -> None:
        """Unlock one piece, if it is locked. No copy of it may be under way."""
        if self._held.pop(memory.data_ptr(), None) is not None:
            self._runtime.unpin(memory)

    def close(self) -> None:
        for memory in list(self._held.values()):
            self.release(memory)


class PinnedPool:
    """One locked piece of memory, cut into pieces that copies pass through in turn. Made when it is first used."""

    def __init__(self, runtime: DeviceRuntime, pieces: int, piece_bytes: int = PIECE_BYTES) -> None:
        self._runtime = runtime
        self._pieces, self._piece_bytes = pieces, piece_bytes
        self._memory: torch.Tensor | None = None
        self._busy: list[DeviceEvent | None] = [None] * pieces
        self._next = 0

    def send(self, src: torch.Tensor, dst: torch.Tensor, stream: DeviceStream) -> None:
        """Copy `src` of the host, contiguous, into `dst` on the device, of equal bytes. `src` is free on return."""
        memory = self._locked()  # raises BackendError where the system refuses
        source, there = _bytes(src), _bytes(dst)
        for at in range(0, source.numel(), self._piece_bytes):
            part = source[at : at + self._piece_bytes]
            number, self._next = self._next, (self._next + 1) % self._pieces
            busy = self._busy[number]
            if busy is not None:
                busy.synchronize()
            room = memory[number * self._piece_bytes :][: part.numel()]
            room.copy_(part)
            self._runtime.copy(room, there[at : at + part.numel()], stream)
            self._busy[number] = stream.record()

    def close(self) -> None:
        for busy in self._busy:
            if busy is not None:
                busy.synchronize()
        if self._memory is not None:
            self._runtime.unpin(self._memory)
            self._memory = None

    def _locked(self) -> torch.Tensor:
        if self._memory is None:
            memory = host_pages(self._pieces * self._piece_bytes)
            try:
                self._runtime.pin(memory)
            except OSError as error:
                raise BackendError(
                    f"{error}; a buffer of {memory.nbytes >> 20} MiB must be locked for the device: raise ulimit -l"
                ) from error
            self._memory = memory
        return self._memory


def host_pages(nbytes: int) -> torch.Tensor:
    """Fresh memory of the host on a page's boundary, uint8 [nbytes], whole pages."""
    if nbytes % mmap.PAGESIZE:
        raise ValueError(f"{nbytes} bytes are no whole pages")
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)
