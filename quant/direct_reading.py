"""Reads runs of bytes past the page cache, where they would cost a copy and another file its place.

Invariant: the bytes are those that read_exactly gives; where a file system refuses O_DIRECT it is asked.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

from .file_reading import read_exactly

PAGE = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)
_STAGE_BYTES = 8 << 20
_thread = threading.local()


def page_aligned(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] whose memory begins on a page."""
    memory = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    skipped = -memory.data_ptr() % PAGE
    return memory[skipped : skipped + nbytes]


def read_direct(path: Path, offset: int, nbytes: int, what: str) -> torch.Tensor:
    """uint8 [nbytes] from `path` at `offset`. Raises CheckpointError naming file and `what`."""
    skipped = offset % PAGE
    begin, length = offset - skipped, -(-(skipped + nbytes) // PAGE) * PAGE
    buffer = page_aligned(length)
    wanted = buffer[skipped : skipped + nbytes]
    if not (_DIRECT and _read(path, begin, buffer, skipped + nbytes)):
        read_exactly(path, offset, wanted, what)
    return wanted


def read_direct_into(path: Path, offset: int, buffer: torch.Tensor, what: str) -> None:
    """Fill `buffer`, uint8 [n] anywhere in memory, from `path` at `offset`, piece by piece through a little memory that
    each thread keeps: fresh memory costs more to touch than to copy into. Raises CheckpointError."""
    stage: torch.Tensor | None = getattr(_thread, "stage", None)
    if stage is None:
        stage = _thread.stage = page_aligned(_STAGE_BYTES)
    done = 0
    while _DIRECT and done < buffer.nbytes:
        skipped = (offset + done) % PAGE
        size = min(_STAGE_BYTES - skipped, buffer.nbytes - done)
        length = -(-(skipped + size) // PAGE) * PAGE
        if not _read(path, offset + done - skipped, stage[:length], skipped + size):
            break
        buffer[done : done + size] = stage[skipped : skipped + size]
        done += size
    if done < buffer.nbytes:
        read_exactly(path, offset + done, buffer[done:], what)


def _read(path: Path, begin: int, buffer: torch.Tensor, needed: int) -> bool:
    """Whether at least `needed` bytes of whole pages came; if not, read_exactly does it or says what is wrong."""
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    done = 0
    try:
        fd = os.open(path, os.O_RDONLY | _DIRECT)
    except OSError:
        return False
    try:
        while done < needed:
            count = os.preadv(fd, [view[done:]], begin + done)
            if not count or (done + count < needed and count % PAGE):
                return False
            done += count
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
