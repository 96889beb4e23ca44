"""How long a plan will take here, from a second of measuring: the source's disk, the destination's, and the loops.

Reads a few pieces of the source, writes a file that is removed at once, and converts the first rows of one matrix of
each kind. Leaves nothing behind. An estimate: the disk may be slower later, and is taken to do one thing at a time.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .conversion import convert_block, read_first_rows
from .direct_reading import page_aligned, read_direct
from .direct_writing import BUFFER_BYTES, DirectWriter
from .errors import CheckpointError
from .quantization_plan import Matrix, QuantizationPlan
from .quantizer import THREADS

READS, WRITES = 12, 12
LIMIT_S = 0.4  # of each measurement


@dataclass(frozen=True)
class TimeEstimate:
    """Speeds in bytes per second; `compute_s` is with `threads` threads."""

    read_speed: float
    write_speed: float
    read_s: float
    write_s: float
    compute_s: float
    threads: int

    @property
    def seconds(self) -> float:
        return max(self.read_s + self.write_s, self.compute_s)

    @property
    def limit(self) -> str:
        return "disk" if self.read_s + self.write_s >= self.compute_s else "processor"


def estimate_time(plan: QuantizationPlan, folder: Path) -> TimeEstimate:
    """For a new folder that will lie in `folder` or stand there. Raises CheckpointError where it can't be written or
    the source can't be read."""
    pieces = [piece for shard in plan.shards for piece in shard.pieces]
    read_bytes = sum(piece.source_nbytes for piece in pieces)
    read_speed, write_speed = _read_speed(plan), _write_speed(_existing(folder))
    seconds = 0.0
    cost: dict[tuple[str, str], float] = {}
    for matrix in plan.matrices:
        if not matrix.is_kept:
            kinds = matrix.source_format.name, matrix.target.name
            if kinds not in cost:
                cost[kinds] = _seconds_a_weight(matrix, plan)
            seconds += cost[kinds] * math.prod(matrix.source.shape)
    return TimeEstimate(
        read_speed, write_speed, read_bytes / read_speed, plan.total_bytes / write_speed, seconds / THREADS, THREADS
    )


def _read_speed(plan: QuantizationPlan) -> float:
    """Of the largest stored tensors, so that the pieces are whole."""
    stored = (part for matrix in plan.matrices for part in matrix.source.parts.values())
    largest = sorted(stored, key=lambda part: -part[1].nbytes)[:READS]

    def read(number: int) -> int:
        path, record = largest[number % len(largest)]
        nbytes = min(record.nbytes, BUFFER_BYTES)
        read_direct(path, record.offset, nbytes, f"tensor {record.name}")
        return nbytes

    return _speed(read, len(largest))


def _write_speed(folder: Path) -> float:
    data = page_aligned(BUFFER_BYTES)
    data.fill_(1)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".k2lite_speed_") as file:
            writer = DirectWriter(Path(file.name), file.fileno(), 0)

            def write(_: int) -> int:
                writer.append(data)
                writer.flush()
                return len(data)

            try:
                return _speed(write, WRITES, lambda: os.fsync(file.fileno()))
            finally:
                writer.close()
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be written: {error.strerror or error}") from error


def _speed(move: Callable[[int], int], most: int, end: Callable[[], None] = lambda: None) -> float:
    """Bytes per second of a few moves."""
    moved = number = 0
    began = time.perf_counter()
    while number < most and time.perf_counter() - began < LIMIT_S:
        moved += move(number)
        number += 1
    end()
    return max(1, moved) / (time.perf_counter() - began)


def _seconds_a_weight(matrix: Matrix, plan: QuantizationPlan) -> float:
    block = read_first_rows(matrix, plan.recipe.scale_search)
    convert_block(block)  # compiles
    began = time.perf_counter()
    convert_block(block)
    return (time.perf_counter() - began) / math.prod(block.rows.shape)


def _existing(folder: Path) -> Path:
    """The folder or the nearest above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())
