"""Appends to a file past the page cache: what was appended is written 16 MiB at a time by a thread of its own, in whole
pages, while the next is collected.

Invariant: after `flush` the file holds exactly what was appended, not yet synced. The last bytes, less than a page, go
through the page cache and are written again with their page. Where a file system refuses O_DIRECT all goes that way.
Knows nothing of what is written.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .direct_reading import PAGE, page_aligned

BUFFER_BYTES = 16 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


def write_at(fd: int, offset: int, data: bytes | memoryview) -> None:
    """All of `data`, through the page cache."""
    view = memoryview(data)
    while len(view):
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


class DirectWriter:
    """`fd` is `path` open for reading and writing; appending begins at `offset`, where the file ends. Every method
    raises OSError, of this call's bytes or of earlier ones."""

    def __init__(self, path: Path, fd: int, offset: int) -> None:
        self._fd = fd
        self._direct_fd = _open_direct(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._buffer, self._spare = page_aligned(BUFFER_BYTES), page_aligned(BUFFER_BYTES)
        self._writing: Future[None] | None = None
        # where the buffer begins in the file, its bytes, and how many of them the file has already
        self._begin = self._filled = self._clean = 0
        self.move(offset)

    def append(self, data: torch.Tensor) -> None:
        """uint8 [n]."""
        while len(data):
            part = data[: BUFFER_BYTES - self._filled]
            # numpy copies on this thread: torch would wake others, which compute
            np.copyto(self._buffer[self._filled : self._filled + len(part)].numpy(), part.numpy())
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == BUFFER_BYTES:
                self._wait()
                self._writing = self._thread.submit(self._write_pages, self._buffer, self._begin)
                self._buffer, self._spare = self._spare, self._buffer
                self._begin, self._filled, self._clean = self._begin + BUFFER_BYTES, 0, 0

    def flush(self) -> None:
        """Have everything written. What fills no page is kept to be written again."""
        self._wait()
        if self._filled == self._clean:
            return
        pages = self._filled // PAGE * PAGE
        self._write_pages(self._buffer[:pages], self._begin)
        write_at(self._fd, self._begin + pages, _bytes(self._buffer[pages : self._filled]))
        self._buffer[: self._filled - pages] = self._buffer[pages : self._filled].clone()
        self._begin, self._filled = self._begin + pages, self._filled - pages
        self._clean = self._filled

    def move(self, offset: int) -> None:
        """Go on at `offset`, where the file ends now. Everything must be flushed."""
        self._begin, self._filled = offset // PAGE * PAGE, offset % PAGE
        self._clean = self._filled
        if self._filled:
            os.preadv(self._fd, [_bytes(self._buffer[: self._filled])], self._begin)

    def close(self) -> None:
        """What was not flushed may be lost."""
        self._thread.shutdown()
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
            self._direct_fd = -1

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write_pages(self, pages: torch.Tensor, offset: int) -> None:
        view = _bytes(pages)
        while len(view) and self._direct_fd >= 0:
            try:
                count = os.pwrite(self._direct_fd, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break  # direct writing is refused, or not possible up to a limit: the plain way knows why
            if count % PAGE:
                break
            view, offset = view[count:], offset + count
        write_at(self._fd, offset, view)


def _open_direct(path: Path) -> int:
    """-1 where the file system can't."""
    try:
        return os.open(path, os.O_WRONLY | _DIRECT) if _DIRECT else -1
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return -1


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy())  # type: ignore[arg-type]
