"""capabilities, memory, alloc, copy, upload: what everything else stands on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from k2lite.backends.base import CONTRACT, Backend
from k2lite.quant.formats import FORMAT_NAMES

from .case import Case, demand
from .samples import normal


def cases() -> Iterator[Case]:
    yield Case("capabilities", "table", _table)
    yield Case("memory", "bytes", _memory)
    for nbytes in (0, 1, 63, 1000, 1 << 20):
        yield Case("alloc", f"{nbytes} bytes", partial(_alloc, nbytes))
    for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.float8_e4m3fn, torch.int64):
        yield Case("copy", str(dtype).removeprefix("torch."), partial(_copy, dtype))
    yield Case("copy", "into a slice", _copy_into_slice)
    yield Case("upload", "a copy", _upload)


def _table(backend: Backend) -> None:
    can = backend.capabilities()
    demand(can == backend.capabilities(), "its table changes between two calls")
    unknown = (can.formats | can.formats_of(experts=True)) - set(FORMAT_NAMES)
    demand(not unknown, f"unknown formats: {', '.join(sorted(unknown))}")
    demand(bool(can.arithmetic), "its arithmetic has no name")
    demand(backend.contract == CONTRACT, f"contract {backend.contract}, and this k2lite has {CONTRACT}")


def _memory(backend: Backend) -> None:
    found = backend.memory()
    demand(0 < found.available_bytes <= found.total_bytes, f"{found.available_bytes} of {found.total_bytes} bytes")


def _alloc(nbytes: int, backend: Backend) -> None:
    found = backend.alloc(nbytes)
    demand(found.dtype == torch.uint8 and tuple(found.shape) == (nbytes,), f"{found.dtype} {list(found.shape)}")
    demand(found.device == backend.device, f"on {found.device}, the backend's device is {backend.device}")
    demand(found.data_ptr() % 64 == 0, "not aligned to 64 bytes")


def _copy(dtype: torch.dtype, backend: Backend) -> None:
    source = (100 * normal(1, 6, 10)).to(dtype)
    there = backend.alloc(source.nbytes).view(dtype).view(source.shape)
    backend.copy(source, there).wait()
    here = torch.empty_like(source)
    backend.copy(there, here).wait()
    demand(torch.equal(here.view(torch.uint8), source.view(torch.uint8)), "other bytes after there and back")


def _copy_into_slice(backend: Backend) -> None:
    arena = backend.alloc(256)
    backend.copy(torch.zeros(256, dtype=torch.uint8), arena).wait()
    backend.copy(torch.full((64,), 9, dtype=torch.uint8), arena[64:128]).wait()
    expected = [0] * 64 + [9] * 64 + [0] * 128
    demand(arena.cpu().tolist() == expected, "copied beside the slice")


def _upload(backend: Backend) -> None:
    source = normal(2, 3, 5).T  # not contiguous
    expected = source.clone()
    there = backend.upload(source)
    demand(there.device == backend.device, f"on {there.device}")
    source.zero_()
    demand(torch.equal(there.cpu(), expected), "other values, or the source's own memory")
