"""Reads the header of a .safetensors file and believes nothing in it before it was checked.

Invariant: every tensor of a header that is returned lies inside the file, has as many bytes as its dtype and shape
say, and overlaps no other; nothing is allocated in proportion to a number from the file before that number was
checked. Format: the README of the safetensors project. Knows no models.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .file_reading import MAX_JSON_BYTES, MAX_NAME_LENGTH, is_name, parse_json_object, shown

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_MAX_DIMENSIONS = 64
_TOO_LARGE = 1 << 63

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
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
    """The tensors of a file by name, in the order of their bytes. Raises CheckpointError naming the file, the tensor
    where there is one, what was found and what was expected."""
    entries, _, data_start, size = _read_entries(path)
    records = [_record(path, name, entry, data_start, size) for name, entry in entries.items()]
    return _in_order(path, records, data_start, size)


def read_metadata(path: Path) -> dict[str, str]:
    """The strings that a file's writer left in its header. Raises CheckpointError as `read_header`."""
    return _read_entries(path)[1]


def _read_entries(path: Path) -> tuple[dict[str, Any], dict[str, str], int, int]:
    """Unchecked entries, metadata, where the data starts, and the size of the file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(_LENGTH.size)
            if len(prefix) < _LENGTH.size:
                raise _damaged(path, f"a file of {size} bytes", "at least 8 bytes")
            (length,) = _LENGTH.unpack(prefix)
            if length > MAX_JSON_BYTES:
                raise _damaged(path, f"a header of {length} bytes", f"at most {MAX_JSON_BYTES}")
            if _LENGTH.size + length > size:
                raise _damaged(path, f"a header of {length} bytes in a file of {size}", "a header inside the file")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error
    if len(text) < length:
        raise _damaged(path, f"{len(text)} bytes of a header of {length}", "a file that is not being written")
    entries = parse_json_object(text, f"{path}: header")
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, f"the {_METADATA} entry {shown(metadata)}", "an object of strings")
    return entries, metadata, _LENGTH.size + length, size


def _record(path: Path, name: str, entry: Any, data_start: int, file_size: int) -> TensorRecord:
    if not is_name(name):
        raise _damaged(path, f"the tensor name {shown(name)}", f"at most {MAX_NAME_LENGTH} printable characters")

    def bad(found: str, expected: str) -> CheckpointError:
        return _damaged(path, f"tensor {name} with {found}", expected)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad(f"the entry {shown(entry)}", "dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise bad(f"dtype {shown(dtype_name)}", f"one of {', '.join(DTYPES)}")
    if not _is_sizes(shape):
        raise bad(f"shape {shown(shape)}", f"a list of at most {_MAX_DIMENSIONS} integers of 0 or more")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"data_offsets {shown(offsets)}", "two integers of 0 or more, the first not above the second")
    begin, end = offsets
    if data_start + end > file_size:
        raise bad(f"bytes up to {data_start + end} in a file of {file_size}", "bytes inside the file")
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise bad(f"{end - begin} bytes for {dtype_name} {shown(shape)}", f"{shown(nbytes)} bytes")
    if not nbytes and not _fits(shape):
        raise bad(f"shape {shown(shape)}", "sizes whose product fits in 64 bits")
    return TensorRecord(name, dtype, tuple(shape), data_start + begin, nbytes)


def _is_sizes(value: Any) -> bool:
    """A list of plain integers from 0 up; JSON's true is not one, and no size is as large as 2^63."""
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    return all(type(item) is int and 0 <= item < _TOO_LARGE for item in value)


def _fits(shape: list[int]) -> bool:
    """An empty tensor may still have sizes that overflow a reader which multiplies before it meets the zero."""
    return math.prod(size for size in shape if size) < _TOO_LARGE


def _in_order(path: Path, records: list[TensorRecord], data_start: int, size: int) -> dict[str, TensorRecord]:
    """Tensors must follow one another without overlap, hole or rest, as the format demands."""
    records.sort(key=lambda record: (record.offset, record.nbytes))
    at = data_start
    for record in records:
        if record.offset != at:
            kind = "overlaps the tensor before it" if record.offset < at else "leaves a hole before it"
            raise _damaged(path, f"tensor {record.name} at byte {record.offset}, which {kind}", f"byte {at}")
        at += record.nbytes
    if at != size:
        raise _damaged(path, f"{size - at} bytes after the last tensor", "none (a cut or padded file?)")
    return {record.name: record for record in records}


def _damaged(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: found {found}, expected {expected}; download the file again")
