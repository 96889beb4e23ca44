"""A device of Python: torch's PrivateUse1 under a vendor's name, its tensors kept on the processor.

Every operation goes through one function that refuses to mix host and device: what a real device would fault on.
Streams, events and a second device are not there. One name a process, so tests run it in a subprocess of their own.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# What may read on one side and write on the other.
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}


class MixedDevicesError(Exception):
    """Host and device tensors in one operation."""


class Tensor(torch.Tensor):
    """A tensor of the device; `inner` has its values."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Tensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(_name, 0),
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"device {self.inner!r}"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_name = "privateuseone"


def install(name: str) -> None:
    """Make torch.device(name) this device."""
    global _name
    _name = name
    module = ModuleType(f"torch.{name}")
    vars(module).update(
        device=lambda *_: SimpleNamespace(__enter__=lambda: None, __exit__=lambda *_: None),
        current_device=lambda: 0, device_count=lambda: 1, is_available=lambda: True, _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda _: None, get_device_name=lambda _=0: "a device of Python",
        mem_get_info=lambda _=0: (8 << 30, 16 << 30),
    )  # fmt: skip
    _setup_privateuseone_for_python_backend(rename=name, backend_module=module)
    library = torch.library.Library("aten", "IMPL")
    for operation in ("empty.memory_format", "empty_strided"):
        library.impl(operation, _made(getattr(torch.ops.aten, operation.split(".")[0])), "PrivateUse1")
    _kept.append(library)


_kept: list[torch.library.Library] = []


def _made(operation: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Any:
        return Tensor(operation(*args, **{**kwargs, "device": "cpu"}))

    return make


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    seen: list[torch.Tensor] = []

    def look(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            seen.append(value)
        return value

    tree_map(look, (args, kwargs))
    there = [tensor for tensor in seen if isinstance(tensor, Tensor)]
    here = [tensor for tensor in seen if not isinstance(tensor, Tensor)]
    # numbers of the host may go with device tensors, as everywhere in torch
    if there and any(tensor.dim() for tensor in here) and name not in COPIES:
        raise MixedDevicesError(f"{name}: {len(there)} tensors of the device and {len(here)} of the host")
    wanted = kwargs.get("device")
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    to_host = wanted is not None and torch.device(wanted).type == "cpu"
    inner = tree_map(lambda value: value.inner if isinstance(value, Tensor) else value, (args, kwargs))
    result = func(*inner[0], **inner[1])
    if func._schema.is_mutable and name.endswith("_"):
        return args[0]
    if to_host:
        return result
    return tree_map(lambda value: Tensor(value) if isinstance(value, torch.Tensor) else value, result)
