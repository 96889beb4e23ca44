"""A tensor whose bytes only the stand-in device touches: every operation on it goes through the device's eyes.

It says that it is on "meta", so that torch itself holds no bytes that the host could read, and an operation that mixes
it with a tensor of the host fails, as on a real device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

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
        facts = facts_of(func)
        if facts.decomposes:
            return func.decompose(*args, **(kwargs or {}))
        mine = _mine(facts, args, kwargs or {})
        with torch.inference_mode(False):  # so that all are of one kind, whoever made them
            return mine.runtime.operate(func, facts, args, kwargs or {})

    def data_ptr(self) -> int:
        """A number that no memory of the host has."""
        return self.inner.data_ptr() | 1 << 62

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise MisuseError("the host reads the device's memory")

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"


@dataclass(frozen=True)
class Facts:
    """What an operation's schema says: whether torch makes it of simpler ones, whether its result is a view, whether
    one argument may lie on the host, and for each argument its name and whether it is written."""

    name: str
    decomposes: bool
    is_view: bool
    mixes: bool
    arguments: tuple[tuple[str, bool], ...]


@cache
def facts_of(func: Any) -> Facts:
    schema = func._schema
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return Facts(
        name=str(func),
        decomposes=torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite),
        is_view=not schema.is_mutable and any(item.alias_info for item in schema.returns),
        mixes=str(func).rpartition(".")[0] in _MIXED,
        arguments=tuple(
            (item.name, item.alias_info is not None and item.alias_info.is_write) for item in schema.arguments
        ),
    )


def operands(facts: Facts, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[torch.Tensor, bool]]:
    """The tensors among the arguments, and whether each is written."""
    for number, (name, writes) in enumerate(facts.arguments):
        value = args[number] if number < len(args) else kwargs.get(name)
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, torch.Tensor):
                yield item, writes


def _mine(facts: Facts, args: Any, kwargs: dict[str, Any]) -> DeviceTensor:
    """One of the device's tensors, if all that should be the device's are."""
    found = None
    for item, _ in operands(facts, args, kwargs):
        if isinstance(item, DeviceTensor):
            found = item
        elif item.device.type == "meta":
            raise MisuseError("a tensor without memory, made on no device")
        elif item.dim() and not facts.mixes:
            raise MisuseError("tensors of the host and of the device in one operation")
    if found is None:
        raise MisuseError("an operation without a tensor of the device")
    return found


def unwrapped(tree: Any) -> Any:
    """The same arguments with the values themselves in place of the device's tensors."""
    if isinstance(tree, DeviceTensor):
        return tree.inner
    if isinstance(tree, tuple | list):
        return type(tree)(unwrapped(item) for item in tree)
    return tree


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor may touch."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * tensor.itemsize
    return start, start + (last + 1) * tensor.itemsize
