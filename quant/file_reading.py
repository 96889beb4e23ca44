"""Reading a run of bytes whole, or an error that names the file and what was being read."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import CheckpointError


def read_exactly(path: Path, offset: int, buffer: torch.Tensor, what: str) -> None:
    """Fill `buffer`, uint8 [n] on the CPU, from `path` at `offset`."""
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    break
                done += count
    except OSError as error:
        raise CheckpointError(f"{path}: {what} can't be read: {error.strerror or error}") from error
    if done < len(view):
        raise CheckpointError(
            f"{path}: {what}: found {done} of {len(view)} bytes at offset {offset}; the file has become shorter, "
            "download it again"
        )
