"""The stand-in device: fills DeviceRuntime. Its copies on side streams happen late, each stream's in order, the streams
among each other in any; bytes are poison until then. Whoever forgets an event is told, at once or by wrong tokens.

Kernels are torch's on the processor, when they are called. The same seed gives the same delays.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from k2lite.backends.base import Memory
from k2lite.backends.torch_device.meaning import Meaning, meaning_of

from .clocks import Access, Block, Clock, MisuseError, Stream, learn
from .device_tensor import DEVICE, DeviceTensor, Facts, byte_range, operands, unwrapped

POISON = 0xA5
PAGE = 4096


class StandInEvent:
    def __init__(self, runtime: StandInRuntime, stream: Stream) -> None:
        self.runtime = runtime
        self.stream = stream
        self.count = stream.clock.get(stream.number, 0)
        self.clock: Clock = dict(stream.clock)

    def query(self) -> bool:
        """Over if its stream happens to have come so far; being asked lets a little happen."""
        self.runtime.let_something_happen()
        over = not (self.stream.late and self.stream.late[0][0] <= self.count)
        if over:
            self.synchronize()
        return over

    def synchronize(self) -> None:
        self.runtime.reach(self)
        learn(self.runtime.host_clock, self.clock)


class StandInStream:
    def __init__(self, runtime: StandInRuntime, stream: Stream) -> None:
        self.runtime = runtime
        self.stream = stream

    def record(self) -> StandInEvent:
        return StandInEvent(self.runtime, self.stream)

    def wait(self, event: StandInEvent) -> None:  # type: ignore[override]
        if event.runtime is not self.runtime:
            raise MisuseError("an event of another device")
        self.runtime.demand_alive()
        if self.stream is self.runtime.compute:
            self.runtime.reach(event)  # kernels happen when they are called, and this one comes after
        else:
            self.stream.late.append((self.stream.begin({}), partial(self.runtime.reach, event)))
        learn(self.stream.clock, event.clock)


class StandInRuntime:
    """`total_bytes` of memory. `pins`: how many bytes at least the host lets be locked at a time; a number between a
    slot's and a buffer's refuses the one and not the other."""

    def __init__(self, seed: int = 0, total_bytes: int = 1 << 30, *, pins: int = 0, name: str = "stand-in") -> None:
        self.device = DEVICE
        self.name = name
        self.total_bytes = total_bytes
        self.used_bytes = self.peak_bytes = 0
        self.host_clock: Clock = {}
        self.sent_bytes = self.fetched_bytes = 0
        self.lost = False
        self._pins = pins
        self._drawn = random.Random(seed)
        self.compute = Stream(0)
        self._streams = [self.compute]
        self._current = self.compute
        self._blocks: dict[int, weakref.ref[Block]] = {}
        self.pinned: dict[int, int] = {}

    # -- DeviceRuntime ------------------------------------------------------------------------------------------

    def memory(self) -> Memory:
        return Memory(self.total_bytes, max(0, self.total_bytes - self.used_bytes))

    def empty(self, nbytes: int) -> torch.Tensor:
        self.demand_alive()
        room = torch.full((nbytes + 256,), POISON, dtype=torch.uint8)
        at = -room.data_ptr() % 256
        return self._wrap(room[at : at + nbytes])

    def free_cached(self) -> None:
        self.demand_alive()

    def compute_stream(self) -> StandInStream:
        return StandInStream(self, self.compute)

    def new_stream(self) -> StandInStream:
        self._streams.append(Stream(len(self._streams)))
        return StandInStream(self, self._streams[-1])

    def copy(self, src: torch.Tensor, dst: torch.Tensor, stream: StandInStream) -> None:  # type: ignore[override]
        """Noted now, done later: the host's bytes are those of then."""
        self.demand_alive()
        if src.shape != dst.shape or src.dtype != dst.dtype:
            raise MisuseError("a copy between unlike tensors")
        for side in (src, dst):
            if not isinstance(side, DeviceTensor) and not self._is_pinned(side):
                raise MisuseError("an asynchronous copy of memory that is not pinned")
        if not any(isinstance(side, DeviceTensor) for side in (src, dst)):
            raise MisuseError("a copy from host to host on a stream")
        here = stream.stream
        count = here.begin(self.host_clock)
        for side, writes in ((src, False), (dst, True)):
            if isinstance(side, DeviceTensor):
                self._touch(side, here, count, writes, "a copy")
        if isinstance(dst, DeviceTensor):
            self.sent_bytes += src.nbytes
        else:
            self.fetched_bytes += src.nbytes
        inner = unwrapped((src, dst))
        here.late.append((count, partial(_copy_now, *inner)))
        if here is self.compute:
            here.happen(count)
        self.let_something_happen()

    def pin(self, memory: torch.Tensor) -> None:
        if memory.nbytes < self._pins:
            raise OSError("the host does not let pages be locked")
        if memory.data_ptr() % PAGE or memory.nbytes % PAGE:
            raise MisuseError("only whole pages can be pinned")
        start, stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        if any(start < first + size and first < stop for first, size in self.pinned.items()):
            raise MisuseError("pages are pinned twice")
        self.pinned[start] = memory.nbytes

    def unpin(self, memory: torch.Tensor) -> None:
        if self.pinned.pop(memory.data_ptr(), None) != memory.nbytes:
            raise MisuseError("pages are unpinned that were not pinned so")
        if any(stream.late for stream in self._streams if stream is not self.compute):
            for stream in self._streams:
                if stream.late and not all(self._knows(stream, count) for count, _ in stream.late):
                    raise MisuseError("pages are unpinned while copies may be under way")

    def meaning(self, error: BaseException) -> Meaning | None:
        return meaning_of(error)

    # -- operations ---------------------------------------------------------------------------------------------

    def operate(self, func: Any, facts: Facts, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation of torch on the compute stream."""
        self.demand_alive()
        count = self.compute.begin(self.host_clock)
        mine = [(item, writes) for item, writes in operands(facts, args, kwargs) if isinstance(item, DeviceTensor)]
        if not facts.is_view:
            for tensor, writes in mine:
                self._touch(tensor, self.compute, count, writes, facts.name)
        inner = {name: unwrapped(item) for name, item in kwargs.items() if name not in ("device", "pin_memory")}
        result = func(*unwrapped(args), **inner)
        if self._goes_to_host(func, args, kwargs):
            learn(self.host_clock, self.compute.clock)
            return result
        originals = {id(tensor.inner): tensor for tensor, _ in mine}
        wrapped = [
            self._wrapped(item, originals) for item in (result if isinstance(result, tuple | list) else [result])
        ]
        if not facts.is_view:
            for tensor in wrapped:
                if isinstance(tensor, DeviceTensor):
                    self._touch(tensor, self.compute, count, True, facts.name)
        return type(result)(wrapped) if isinstance(result, tuple | list) else wrapped[0]

    def _wrapped(self, item: Any, originals: dict[int, DeviceTensor]) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        same = originals.get(id(item))
        return self._wrap(item) if same is None else same

    def _goes_to_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        if func is torch.ops.aten.copy_.default:
            return not isinstance(args[0], DeviceTensor)
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cpu":
            return False
        if func is not torch.ops.aten._to_copy.default:
            raise MisuseError(f"{func}: a tensor of the host made like one of the device")
        return True

    # -- what tests do to it --------------------------------------------------------------------------------------

    def lose(self) -> None:
        """From now on every call fails, as when a card falls off the bus."""
        self.lost = True

    @contextmanager
    def only(self, nbytes: int) -> Iterator[None]:
        """Others take the memory but for `nbytes` more than what is used now."""
        before, self.total_bytes = self.total_bytes, self.used_bytes + nbytes
        try:
            yield
        finally:
            self.total_bytes = before

    def demand_alive(self) -> None:
        if self.lost:
            raise torch.AcceleratorError("stand-in error: the device fell off the bus\nmore lines follow")

    # -- time -----------------------------------------------------------------------------------------------------

    def let_something_happen(self) -> None:
        """Some of the late work of some stream, or nothing."""
        stream = self._drawn.choice(self._streams)
        if stream.late and self._drawn.random() < 0.3:
            stream.happen(stream.late[self._drawn.randrange(len(stream.late))][0])

    def reach(self, event: StandInEvent) -> None:
        """All that comes before `event` has happened."""
        event.stream.happen(event.count)

    def _knows(self, stream: Stream, count: int) -> bool:
        return self.host_clock.get(stream.number, 0) >= count

    # -- memory ---------------------------------------------------------------------------------------------------

    def _touch(self, tensor: DeviceTensor, stream: Stream, count: int, writes: bool, what: str) -> None:
        if stream is self.compute and tensor.block.alone is not None:
            tensor.block.alone = count
            return
        start, stop = byte_range(tensor.inner)
        if start < stop:
            tensor.block.touch(Access(start, stop, writes, stream.number, count, what), stream.clock)

    def _wrap(self, inner: torch.Tensor) -> DeviceTensor:
        at = inner.untyped_storage().data_ptr()
        known = self._blocks.get(at)
        block = known() if known is not None else None
        if block is None:
            block = self._allocate(inner.untyped_storage().nbytes())
            if at:
                self._blocks[at] = weakref.ref(block)
        return DeviceTensor(inner, block, self)

    def _allocate(self, nbytes: int) -> Block:
        if self.used_bytes + nbytes > self.total_bytes:
            raise torch.OutOfMemoryError(
                f"stand-in out of memory: {nbytes} bytes asked for, {self.total_bytes - self.used_bytes} are free"
            )
        self.used_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return Block(nbytes, self._free)

    def _free(self, nbytes: int) -> None:
        self.used_bytes -= nbytes

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return not tensor.nbytes or any(first <= start and stop <= first + size for first, size in self.pinned.items())


@torch.inference_mode()
def _copy_now(src: torch.Tensor, dst: torch.Tensor) -> None:
    dst.copy_(src)
