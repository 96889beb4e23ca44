"""The base of every torch accelerator's backend: memory, copies and errors; its arithmetic is torch's on the device.

A vendor's backend subclasses it and overrides what its kernels do faster: `capabilities`, `linear`, `mlp`,
`expert_ffn`, `attention`, `rms_norm`, `rope`, `router`, `combine`. All of them issue their work on the compute stream
and don't wait: what is called later comes later, so `expert_ffn` returns DONE. The defaults sum in the order of the
reference backend, one token at a time.

Invariant: no method looks at where else an expert's bytes are. Shapes as in base.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch

from k2lite.backends.base import Backend, Capabilities, Event, Memory, dot
from k2lite.backends.packing import copy_into_slot
from k2lite.quant.errors import DeviceLostError, DeviceMemoryError
from k2lite.quant.formats import FORMAT_NAMES, Shape
from k2lite.quant.types import ExpertWeights, QuantTensor

from .expert_link import Copy, ExpertLink, Place
from .pinned import PinnedPool
from .runtime import DeviceEvent, DeviceRuntime

STAGING_PIECES = 4
# A shorter copy is over before pinned staging would have begun.
STAGED_FROM_BYTES = 1 << 20


class Issued(Event):
    """A copy that was issued on the compute stream. `keep` lives until it is over."""

    def __init__(self, event: DeviceEvent, *keep: torch.Tensor) -> None:
        self._event = event
        self._keep = keep

    def wait(self) -> None:
        self._event.synchronize()
        self._keep = ()


class TorchDeviceBackend(Backend):
    """`runtime` is the device. Arithmetic in float32, sums in one order for each token."""

    name: ClassVar[str] = "torch-device"

    def __init__(self, runtime: DeviceRuntime) -> None:
        self.runtime = runtime
        self.device = runtime.device
        self._pool = PinnedPool(runtime, STAGING_PIECES)
        self._lost: str | None = None

    # -- what a vendor overrides ----------------------------------------------------------------------------------

    def capabilities(self) -> Capabilities:
        return Capabilities(formats=frozenset(FORMAT_NAMES), arithmetic="torch on the device, float32")

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        if not len(x):
            return x.new_empty(0, weight.shape[0])
        values = weight.dequantize()
        return torch.stack([dot(values, row) for row in x])

    # -- memory and copies ----------------------------------------------------------------------------------------

    def memory(self) -> Memory:
        """Of the device."""
        return self.runtime.memory()

    def close(self) -> None:
        self._pool.close()

    def alloc(self, nbytes: int) -> torch.Tensor:
        return self.runtime.empty(nbytes)

    def empty(self, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        return self.alloc(nbytes).view(dtype).view(shape)

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> Event:
        """In the order of the compute stream. Between device and host either side may be pageable."""
        dst.copy_(src)
        return Issued(self.runtime.compute_stream().record(), src, dst)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        there = self.empty(tuple(tensor.shape), tensor.dtype)
        if tensor.nbytes < STAGED_FROM_BYTES:
            self.copy(tensor, there).wait()
        else:
            self._pool.send(tensor.contiguous(), there, self.runtime.compute_stream())
        return there

    def pack_expert(self, src: ExpertWeights, slot: torch.Tensor) -> ExpertWeights:
        return self.place_expert(src, slot, self.copy)

    def place_expert(self, src: ExpertWeights, slot: torch.Tensor, copy: Copy) -> ExpertWeights:
        """`pack_expert` with the copies done by `copy(src, dst)`, which may return before they are. A vendor who lays
        bytes out anew overrides this one, with `expert_slot`."""
        return copy_into_slot(src, slot, copy)

    def expert_link(self, place: Place | None = None) -> ExpertLink:
        """A way for experts with two side streams of its own; `place` instead of `place_expert` for a backend around
        this one."""
        return ExpertLink(self.runtime, place or self.place_expert, self._pool)

    # -- errors ---------------------------------------------------------------------------------------------------

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Out of memory: this request fails and what the allocator kept is given back. Lost: whatever is asked of the
        device from then on is refused at once. Never another device instead."""
        if self._lost is not None:
            raise DeviceLostError(self._lost)
        try:
            yield
        except Exception as error:
            meaning = self.runtime.meaning(error)
            if meaning is None:
                raise
            if meaning == "lost":
                self._lost = (
                    f"{self.runtime.name} ({self.device}) failed: {_first_line(error)}; start k2lite again, and look "
                    "at the driver's log if it happens again"
                )
                raise DeviceLostError(self._lost) from error
            memory = self._memory_left()
            self.runtime.free_cached()
            raise DeviceMemoryError(
                f"{self.runtime.name} ({self.device}) has no memory left for this request ({memory}); a smaller "
                "--context or fewer requests at a time need less, a smaller --vram leaves more for others"
            ) from error

    def _memory_left(self) -> str:
        memory = self.memory()
        return f"{memory.available_bytes >> 20} of {memory.total_bytes >> 20} MiB free"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
