"""A tensor whose bytes only the stand-in device touches: every operation on it goes through the device's eyes.

It says that it is on "meta", so that torch itself holds no bytes that the host could read, and an operation that mixes
it with a tensor of the host fails, as on a real device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from .clocks import Block, MisuseError

if TYPE_CHECKING:
    from .runtime import StandInRuntime

DEVICE = torch.device("meta")
# A real device takes these with one argument on the host: it copies first.
_MIXED = {"aten.copy_", "aten._to_copy", "aten.index", "aten.index_put_", "aten.index_put"}


class DeviceTensor(torch.Tensor):
    """`inner` are the values, `block` the allocation that they lie in."""

    inner: torch.Tensor
    block: Block
    runtime: StandInRuntime

    @staticmethod
    def __new__(cls, inner: torch.Tensor, block: Block, runtime: StandInRuntime) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner, made.block, made.runtime = inner, block, runtime
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        simpler = func.decompose(*args, **(kwargs or {}))
        if simpler is not NotImplemented:
            return simpler
        flat, _ = tree_flatten((args, kwargs or {}))
        mine = [item for item in flat if isinstance(item, DeviceTensor)]
        _refuse_the_host(func, flat)
        with torch.inference_mode(False):  # so that all are of one kind, whoever made them
            return mine[0].runtime.operate(func, args, kwargs or {})

    def data_ptr(self) -> int:
        """A number that no memory of the host has."""
        return self.inner.data_ptr() | 1 << 62

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise MisuseError("the host reads the device's memory")

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"


def _refuse_the_host(func: Any, flat: list[Any]) -> None:
    name = str(func).rpartition(".")[0]
    for item in flat:
        if isinstance(item, torch.Tensor) and not isinstance(item, DeviceTensor):
            if item.device.type == "meta":
                raise MisuseError(f"{func}: a tensor without memory, made on no device")
            if item.dim() and name not in _MIXED:
                raise MisuseError(f"{func}: tensors of the host and of the device in one operation")


def unwrapped(tree: Any) -> Any:
    return tree_map(lambda item: item.inner if isinstance(item, DeviceTensor) else item, tree)


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor may touch."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * tensor.itemsize
    return start, start + (last + 1) * tensor.itemsize
