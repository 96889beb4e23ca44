"""Writes one .safetensors file front to back, under a temporary name until it is whole.

The header comes first and is known before any byte of a tensor, so memory does not grow with the file. It is padded
with spaces until the data begins on a page, which safetensors allows; readers with direct I/O then need no rounding.
Format: the README of the safetensors project.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .direct_writing import DirectWriter, write_at
from .durable_files import PARTIAL, sync
from .errors import CheckpointError
from .safetensors_file import DTYPES

PAGE = 4096
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def header_bytes(tensors: Sequence[TensorSpec]) -> bytes:
    """The file up to its data: length, JSON in the order of the tensors, spaces up to a page."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(len(text) + 8) % PAGE)
    return struct.pack("<Q", len(text)) + text


def file_bytes(tensors: Sequence[TensorSpec]) -> int:
    """Size of the whole file."""
    return len(header_bytes(tensors)) + sum(tensor.nbytes for tensor in tensors)


class ShardWriter:
    """Appends tensors in the order of `tensors`. `written` counts bytes of data that were taken; they are in the file
    after `sync`."""

    def __init__(self, path: Path, tensors: Sequence[TensorSpec], *, written: int = 0) -> None:
        """Begin the file, or with `written` go on behind that many bytes of data and drop what lies after them."""
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL)
        self.written = written
        header = header_bytes(tensors)
        self._data_start = len(header)
        self._total = sum(tensor.nbytes for tensor in tensors)
        try:
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._fd, self._data_start + written)
            write_at(self._fd, 0, header)
            self._stream = DirectWriter(self.partial, self._fd, self._data_start + written)
        except OSError as error:
            raise self._failed(error) from error

    def append(self, tensors: Iterable[torch.Tensor]) -> None:
        """Write the bytes of contiguous CPU tensors, the next ones in order."""
        for tensor in tensors:
            try:
                self._stream.append(tensor.contiguous().view(-1).view(torch.uint8))
            except OSError as error:
                raise self._failed(error) from error
            self.written += tensor.nbytes

    def copy(self, source: Path, offset: int, nbytes: int) -> None:
        """Append a range of another file inside the kernel: no bytes pass through here, and a file system that can
        share blocks does. Raises CheckpointError naming the file that can't be read or written."""
        self._flush()
        try:
            fd = os.open(source, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{source}: can't be read: {error.strerror or error}") from error
        try:
            done = 0
            os.lseek(self._fd, self._data_start + self.written, os.SEEK_SET)
            while done < nbytes:
                count = self._copy_some(fd, offset + done, nbytes - done)
                if not count:
                    raise CheckpointError(
                        f"{source}: found {done} of {nbytes} bytes at offset {offset}; the file has become shorter, "
                        "download it again"
                    )
                done += count
        except OSError as error:
            raise self._failed(error) from error
        finally:
            os.close(fd)
        self.written += nbytes
        self._stream.move(self._data_start + self.written)

    def _copy_some(self, fd: int, offset: int, nbytes: int) -> int:
        """Bytes that were copied. Between different file systems the kernel refuses the first call and takes the
        second."""
        try:
            return os.copy_file_range(fd, self._fd, nbytes, offset_src=offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        return os.sendfile(self._fd, fd, offset, nbytes)

    def read_back(self, offset: int, nbytes: int) -> bytes:
        """Bytes of the data that were written before this object was made, or synced."""
        return os.pread(self._fd, nbytes, self._data_start + offset)

    def sync(self) -> None:
        """Put everything written so far on the disk."""
        self._flush()
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._failed(error) from error

    def finish(self) -> None:
        """Put the whole file in place under its own name."""
        if self.written != self._total:
            raise RuntimeError(f"{self.path}: {self.written} of {self._total} bytes were written")
        self.sync()
        self.close()
        self.partial.rename(self.path)
        sync(self.path.parent)

    def close(self) -> None:
        """Leave the unfinished file as it is."""
        if self._fd >= 0:
            self._stream.close()
            os.close(self._fd)
            self._fd = -1

    def _flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.partial}: can't be written: {error.strerror or error}; nothing that was done is lost, make room or "
            "repair the disk and go on with --resume"
        )
