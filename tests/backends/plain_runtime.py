"""A device that does everything at once: what the emulated vendors stand on, on the processor or a device of Python."""

from __future__ import annotations

import torch

from k2lite.backends.base import Memory
from k2lite.backends.torch_device.meaning import Meaning


class Now:
    """A stream and an event: nothing is ever under way."""

    def record(self) -> Now:
        return self

    def wait(self, event: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class PlainRuntime:
    """Fills PinningRuntime for torch.device(kind)."""

    def __init__(self, kind: str = "cpu", total_bytes: int = 8 << 30) -> None:
        self.device = torch.device(kind)
        self.name = f"an emulated chip ({kind})"
        self._total = total_bytes

    def memory(self) -> Memory:
        return Memory(self._total, self._total)

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def free_cached(self) -> None:
        pass

    def compute_stream(self) -> Now:
        return Now()

    def new_stream(self) -> Now:
        return Now()

    def copy(self, src: torch.Tensor, dst: torch.Tensor, stream: object) -> None:  # noqa: ARG002
        dst.copy_(src)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, memory: torch.Tensor) -> None:
        raise OSError(f"{memory.nbytes} bytes stay unlocked")

    def unpin(self, memory: torch.Tensor) -> None:
        raise AssertionError(f"{memory.nbytes} bytes were never locked")

    def meaning(self, error: BaseException) -> Meaning | None:  # noqa: ARG002
        return None
