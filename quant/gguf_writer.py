"""Writes one GGUF file front to back, under a temporary name until it is whole.

The head comes first and is known before any byte of a tensor, so memory does not grow with the file.
Format: llama.cpp's gguf.h, version 3, little-endian.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .durable_files import PARTIAL, sync
from .errors import CheckpointError
from .ggml_types import GgmlType
from .gguf_file import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, NUMBERS, STRING

VERSION = 3
U16, U32, I32, F32 = 2, 4, 5, 6


@dataclass(frozen=True, slots=True)
class GgufTensorSpec:
    """A tensor that a file will hold; `shape` has the fastest axis last."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size // self.type.elements * self.type.nbytes


@dataclass(frozen=True, slots=True)
class Int32:
    """A value that llama.cpp reads as signed; other integers are written as u32."""

    value: int


@dataclass(frozen=True, slots=True)
class UInt16:
    """A value that llama.cpp reads as u16."""

    value: int


def padded(nbytes: int) -> int:
    return -(-nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def head_bytes(metadata: Mapping[str, Any], tensors: Sequence[GgufTensorSpec]) -> bytes:
    """The file up to its data. Values: str, bool, int (u32), float (f32), Int32, UInt16, and lists of str or of
    Int32."""
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        kind, data = _value(value)
        head += _string(key) + struct.pack("<I", kind) + data
    at = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        head += _string(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", tensor.type.id, at)
        at += padded(tensor.nbytes)
    return bytes(head) + bytes(padded(len(head)) - len(head))


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> tuple[int, bytes]:
    """The value's type and its bytes."""
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, list):
        kinds = {_value(item)[0] for item in value} or {STRING}  # a byte tokenizer has no merges
        if len(kinds) != 1:
            raise TypeError(f"an array of {len(kinds)} types of value")
        return ARRAY, struct.pack("<IQ", kinds.pop(), len(value)) + b"".join(_value(item)[1] for item in value)
    kind = BOOL if isinstance(value, bool) else F32 if isinstance(value, float) else U32
    if isinstance(value, Int32 | UInt16):
        kind, value = I32 if isinstance(value, Int32) else U16, value.value
    return kind, struct.pack(f"<{NUMBERS[kind]}", value)


class GgufWriter:
    """Appends the bytes of the tensors in the order of `tensors`; then `complete` and `publish`. `close` takes away
    what is not published. While it writes it holds a lock, which the system ends with the process."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Sequence[GgufTensorSpec]) -> None:
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        self.written = 0
        self._ends = deque(_ends(tensors))
        self._fd = -1
        self._is_published = False
        try:
            self._fd = os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write(head_bytes(metadata, tensors))
        except OSError as error:
            self.close()
            raise self._failed(error) from error

    @property
    def is_whole(self) -> bool:
        """Whether the last tensor's last byte is written."""
        return not self._ends

    def append(self, tensor: torch.Tensor) -> None:
        """Write a contiguous CPU tensor's bytes, the next ones in order; none may reach over a tensor's end."""
        data = memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
        self.written += len(data)
        if not self._ends or self.written > self._ends[0]:
            raise RuntimeError(f"{self.path}: more bytes than the tensor has")
        try:
            self._write(data)
            if self.written == self._ends[0]:
                self._write(bytes(padded(self.written) - self.written))
                self.written = padded(self.written)
                self._ends.popleft()
        except OSError as error:
            raise self._failed(error) from error

    def complete(self) -> None:
        """Put the whole file on the disk, under its temporary name still."""
        if not self.is_whole:
            raise RuntimeError(f"{self.path}: tensors are missing")
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._failed(error) from error

    def publish(self) -> None:
        """Give the whole file its own name."""
        try:
            self.partial.rename(self.path)
            self._is_published = True
            sync(self.path.absolute().parent)
        except OSError as error:
            raise self._failed(error) from error
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if not self._is_published:
                self.partial.unlink(missing_ok=True)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            view = view[os.write(self._fd, view) :]

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.partial}: can't be written: {error.strerror or error}; make room and begin anew")


def _ends(tensors: Sequence[GgufTensorSpec]) -> Iterator[int]:
    """Where each tensor's bytes end, counted from the start of the data."""
    at = 0
    for tensor in tensors:
        yield at + tensor.nbytes
        at += padded(tensor.nbytes)
