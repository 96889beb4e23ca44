"""A GGUF file in parts of a limited size, NAME-00001-of-0000N.gguf, as llama.cpp's gguf-split writes them.

A tensor is never cut, so one that is larger than a part has a part of its own. The first part holds all metadata. Parts
get their own names together, once all are whole and on the disk, the first one last: without it none is read.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .durable_files import PARTIAL, remove_unlocked
from .errors import RequestError
from .gguf_writer import GgufTensorSpec, GgufWriter, Int32, UInt16, head_bytes, padded

# Beside the parts: the source's shards, and what Python and torch hold open.
OTHER_FILES = 256

Part = tuple[Path, Mapping[str, Any], Sequence[GgufTensorSpec]]


def parts_of(
    path: Path, metadata: Mapping[str, Any], tensors: Sequence[GgufTensorSpec], most_bytes: int | None
) -> list[Part]:
    """Path, metadata and tensors of each part: of `path` itself where one part holds all. `most_bytes` limits a part's
    tensors, as in gguf-split, not its head."""
    groups: list[list[GgufTensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if most_bytes is not None and groups[-1] and size + tensor.nbytes > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += padded(tensor.nbytes)
    if len(groups) == 1:
        return [(path, metadata, tensors)]
    parts: list[Part] = []
    for number, group in enumerate(groups):
        of_part = {
            "split.no": UInt16(number),
            "split.count": UInt16(len(groups)),
            "split.tensors.count": Int32(len(tensors)),
        }
        own = path.with_name(f"{path.stem}-{number + 1:05d}-of-{len(groups):05d}{path.suffix}")
        parts.append((own, {**metadata, **of_part} if number == 0 else of_part, group))
    return parts


def part_bytes(part: Part) -> int:
    """Of a part's file."""
    _, metadata, tensors = part
    return len(head_bytes(metadata, tensors)) + sum(padded(spec.nbytes) for spec in tensors)


def demand_places(parts: Sequence[Part]) -> None:
    """Raise RequestError where a name is taken, or where more parts are wanted than may be open at once: each holds its
    lock to the end."""
    for path, *_ in parts:
        if path.exists():
            raise RequestError(f"{path}: exists already; name a new file")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(parts) + OTHER_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise RequestError(
            f"{len(parts)} parts are more files than a process may hold open here ({hard}): raise --split-max-size"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def remove_leftovers(path: Path) -> list[str]:
    """Take away what runs that were cut off have left of `path` and its parts; returns their names and sizes. Raises
    RequestError where another run is writing them."""
    pattern = re.compile(re.escape(path.stem) + r"(-\d{5}-of-\d{5})?" + re.escape(path.suffix + PARTIAL))
    return remove_unlocked(left for left in sorted(path.absolute().parent.iterdir()) if pattern.fullmatch(left.name))


class SplitWriter:
    """Appends the bytes of all parts' tensors in their order. Leaving the block without `finish` takes every unfinished
    file away."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._left = list(parts)
        self._whole: list[GgufWriter] = []
        self._open: GgufWriter | None = None

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in (*self._whole, *([self._open] if self._open else [])):
            writer.close()

    def append(self, tensor: torch.Tensor) -> None:
        if self._open is None or self._open.is_whole:
            self._complete()
            self._open = GgufWriter(*self._left.pop(0))
        self._open.append(tensor)

    def finish(self) -> None:
        """Put the whole file, or all its parts, in place."""
        self._complete()
        if self._left:
            raise RuntimeError(f"{self._left[0][0]}: a part was not written")
        for writer in reversed(self._whole):
            writer.publish()

    def _complete(self) -> None:
        if self._open is not None:
            self._open.complete()
            self._whole.append(self._open)
            self._open = None
