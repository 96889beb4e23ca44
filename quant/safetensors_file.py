"""Reads the header of a .safetensors file and believes nothing in it before it was checked.

Invariant: every tensor of a header that is returned lies inside the file, has as many bytes as its dtype and shape
say, and overlaps no other; nothing is allocated in proportion to a number from the file before that number was
checked. Format: the README of the safetensors project. Knows no models.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the safetensors package's own limit
_LENGTH = struct.Struct("<Q")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where a tensor lies: `offset` bytes from the start of its file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorRecord]:
    """The tensors of a file by name, in the order of their bytes. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(_LENGTH.size)
            if len(prefix) < _LENGTH.size:
                raise _damaged(path, f"a file of {size} bytes", "at least 8 bytes")
            (length,) = _LENGTH.unpack(prefix)
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, f"a header of {length} bytes", f"at most {MAX_HEADER_BYTES}")
            if _LENGTH.size + length > size:
                raise _damaged(path, f"a header of {length} bytes in a file of {size}", "a header inside the file")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error
    entries = _parse(path, text)
    data_start = _LENGTH.size + length
    records = [
        _record(path, name, entry, data_start, size) for name, entry in entries.items() if name != "__metadata__"
    ]
    return _in_order(path, records, data_start, size)


def _parse(path: Path, text: bytes) -> Mapping[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _damaged(path, f"the name {twice!r:.200} twice in the header", "each name once")
        return table

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise _damaged(path, f"a header that is not JSON ({error!s:.100})", "a JSON object") from error
    if not isinstance(entries, dict):
        raise _damaged(path, f"a header that is a JSON {type(entries).__name__}", "a JSON object")
    metadata = entries.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "a __metadata__ entry of another kind", "an object of strings")
    return entries


def _record(path: Path, name: str, entry: Any, data_start: int, file_size: int) -> TensorRecord:
    def bad(found: str, expected: str) -> CheckpointError:
        return _damaged(path, f"tensor {name!r:.200} with {found}", expected)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad(f"the entry {entry!r:.100}", "dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise bad(f"dtype {dtype_name!r:.50}", f"one of {', '.join(DTYPES)}")
    if not _is_sizes(shape):
        raise bad(f"shape {shape!r:.100}", "a list of integers of 0 or more")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"data_offsets {offsets!r:.100}", "two integers, the first not above the second")
    begin, end = offsets
    if data_start + end > file_size:
        raise bad(f"bytes up to {data_start + end} in a file of {file_size}", "bytes inside the file")
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise bad(f"{end - begin} bytes for {dtype_name} {shape!r:.100}", f"{nbytes!r:.40} bytes")
    return TensorRecord(name, dtype, tuple(shape), data_start + begin, nbytes)


def _is_sizes(value: Any) -> bool:
    """A list of plain integers from 0 up; JSON's true is not one, and no size is as large as 2^63."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


def _in_order(path: Path, records: list[TensorRecord], data_start: int, size: int) -> dict[str, TensorRecord]:
    """Tensors must follow one another without overlap, hole or rest, as the format demands."""
    records.sort(key=lambda record: (record.offset, record.nbytes))
    at = data_start
    for record in records:
        if record.offset != at:
            kind = "overlaps the tensor before it" if record.offset < at else "leaves a hole before it"
            found = f"tensor {record.name!r:.200} at byte {record.offset}, which {kind}"
            raise _damaged(path, found, f"byte {at}")
        at += record.nbytes
    if at != size:
        raise _damaged(path, f"{size - at} bytes after the last tensor", "none (a cut or padded file?)")
    return {record.name: record for record in records}


def _damaged(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: found {found}, expected {expected}; download the file again")
