"""Reads the head of a GGUF file, whole or in parts, and believes nothing in it before it was checked.

Invariant: every tensor that is returned lies inside its file, aligned, with as many bytes as its type and shape say,
and overlaps no other; nothing is allocated in proportion to a number from the file before that number was checked.
Format: llama.cpp's gguf.h, version 3 and 2, little-endian. Knows no models.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import CheckpointError
from .file_reading import MAX_NAME_LENGTH, is_file, is_name, shown
from .ggml_types import GGML_TYPES, GgmlType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_STRING_BYTES = 64 << 20  # a chat template; a token is far shorter
MAX_ITEMS = 1 << 24  # of an array: a published file has 328,000 strings
MAX_DIMENSIONS = 4
MAX_ENTRIES = 1 << 20  # keys, or tensors: a published file has about 50 and 1,100
STRING, ARRAY, BOOL = 8, 9, 7
# Value types that are one number: the struct format of each. bool is one byte.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A stored tensor. `shape` has the fastest axis last, as numpy's; `offset` counts from the file's start."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """One model: the metadata of its first file, the tensors of all of its files. Arrays of numbers are numpy arrays,
    arrays of strings lists."""

    path: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """The heads of a GGUF file and of the parts that belong to it. Raises CheckpointError naming the file, the key or
    tensor, what was found and what was expected."""
    metadata, tensors = _read_one(path)
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return GgufFile(path, (path,), metadata, tensors)
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count or count > MAX_ENTRIES:
        raise _bad(path, f"split.count {shown(count)}", f"a name ending in -00001-of-{count:05d}.gguf", "rename it")
    if metadata.get("split.no") != 0 or int(match[2]) != 1:
        first = path.with_name(f"{match[1]}-00001-of-{count:05d}.gguf")
        raise _bad(path, f"part {int(match[2])} of {count}", "the first", f"name {first.name}")
    files = [path]
    for number in range(2, count + 1):
        part = path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
        if not is_file(part):
            raise CheckpointError(f"{part}: part is missing; download it again")
        own, more = _read_one(part)
        if own.get("split.no") != number - 1 or own.get("split.count") != count:
            found = f"split.no {shown(own.get('split.no'))} of {shown(own.get('split.count'))}"
            raise _bad(part, found, f"{number - 1} of {count}")
        for name, tensor in more.items():
            if name in tensors:
                raise _bad(part, f"tensor {name}, which lies in {tensors[name].file.name} too", "it once")
            tensors[name] = tensor
        files.append(part)
    stated = metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise _bad(path, f"{len(tensors)} tensors in {count} parts", f"split.tensors.count, {shown(stated)}")
    return GgufFile(path, tuple(files), metadata, tensors)


def _read_one(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            return _Head(path, file, size).read()
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error


class _Head:
    """Reads front to back; `_take` is the only place that moves, and it never passes the end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self._file = file
        self._size = size
        self._at = 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        magic = self._take(4, "the magic")
        if magic != MAGIC:
            raise _bad(self.path, f"the magic {magic!r}", repr(MAGIC), "name a GGUF file")
        version = self._number("I", "the version")
        if version not in VERSIONS:
            big = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise _bad(self.path, f"version {version}{big}", "2 or 3, little-endian", "convert it with gguf's tools")
        n_tensors, n_keys = self._count("tensors"), self._count("keys")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._name("a key")
            if key in metadata:
                raise _bad(self.path, f"key {key} twice", "it once")
            metadata[key] = self._value(self._number("I", key), key)
        infos = [self._tensor_info() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 24 or alignment % 8:
            raise _bad(self.path, f"general.alignment {shown(alignment)}", "a multiple of 8")
        return metadata, self._tensors(infos, alignment)

    def _take(self, nbytes: int, what: str) -> bytes:
        if nbytes > self._size - self._at:
            left = self._size - self._at
            raise _bad(self.path, f"the file's end after {left} bytes of {what}", f"{nbytes} (a cut file?)")
        data = self._file.read(nbytes)
        if len(data) != nbytes:
            raise _bad(self.path, f"{len(data)} of {nbytes} bytes of {what}", "a file that is not being written")
        self._at += nbytes
        return data

    def _number(self, kind: str, what: str) -> Any:
        return struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}"), what))[0]

    def _count(self, what: str) -> int:
        count: int = self._number("Q", f"the number of {what}")
        if count > MAX_ENTRIES:
            raise _bad(self.path, f"{count} {what}", f"at most {MAX_ENTRIES}")
        return count

    def _string(self, what: str) -> str:
        length = self._number("Q", what)
        if length > MAX_STRING_BYTES:
            raise _bad(self.path, f"a text of {length} bytes in {what}", f"at most {MAX_STRING_BYTES}")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _bad(self.path, f"bytes that are not UTF-8 in {what}", "text") from error

    def _name(self, what: str) -> str:
        name = self._string(what)
        if not name or not is_name(name):
            raise _bad(self.path, f"the name {shown(name)}", f"1 to {MAX_NAME_LENGTH} printable characters")
        return name

    def _value(self, kind: int, key: str) -> Any:
        if kind in NUMBERS:
            return self._number(NUMBERS[kind], key)
        if kind == STRING:
            return self._string(key)
        if kind != ARRAY:
            raise _bad(self.path, f"key {key} of value type {kind}", "one of 0 to 12")
        kind, count = self._number("I", key), self._number("Q", key)
        if count > MAX_ITEMS:
            raise _bad(self.path, f"key {key}: an array of {count}", f"at most {MAX_ITEMS}")
        if kind in NUMBERS:
            dtype = np.dtype(NUMBERS[kind]).newbyteorder("<")
            return np.frombuffer(self._take(count * dtype.itemsize, key), dtype)
        if kind != STRING:
            raise _bad(self.path, f"key {key}: an array of value type {kind}", "numbers or strings")
        return [self._string(key) for _ in range(count)]

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, offset into the data."""
        name = self._name("a tensor's name")
        n_dims = self._number("I", name)
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            raise _bad(self.path, f"tensor {name} with {n_dims} dimensions", f"1 to {MAX_DIMENSIONS}")
        shape = tuple(self._number("Q", name) for _ in range(n_dims))[::-1]
        if not all(shape) or math.prod(shape) >= 1 << 60:
            raise _bad(
                self.path, f"tensor {name} of shape {shown(list(shape))}", "sizes of 1 or more that fit in a file"
            )
        return name, shape, self._number("I", name), self._number("Q", name)

    def _tensors(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, GgufTensor]:
        data_start = -(-self._at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, shape, type_id, offset in infos:
            kind = GGML_TYPES.get(type_id)
            if kind is None:
                known = ", ".join(known.name for known in GGML_TYPES.values())
                raise _bad(self.path, f"tensor {name} of ggml type {type_id}", f"one of {known}")
            if shape[-1] % kind.elements:
                raise _bad(
                    self.path, f"tensor {name}: {kind.name} in rows of {shape[-1]}", f"multiples of {kind.elements}"
                )
            nbytes = math.prod(shape) // kind.elements * kind.nbytes
            if offset % alignment or data_start + offset + nbytes > self._size:
                where = f"{nbytes} bytes at {data_start + offset} of {self._size}"
                raise _bad(self.path, f"tensor {name}: {where}", f"a multiple of {alignment} inside the file (cut?)")
            if name in found:
                raise _bad(self.path, f"tensor {name} twice", "it once")
            found[name] = GgufTensor(name, kind, shape, self.path, data_start + offset, nbytes)
        end = 0
        for tensor in sorted(found.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise _bad(
                    self.path, f"tensor {tensor.name} at byte {tensor.offset}, inside another", f"{end} or later"
                )
            end = tensor.offset + tensor.nbytes
        return found


def _bad(path: Path, found: str, expected: str, remedy: str = "download the file again") -> CheckpointError:
    return CheckpointError(f"{path}: found {found}, expected {expected}; {remedy}")
