"""What laying out one of K2's experts for Ascend costs, beside reading it: both measured in turn, medians of pairs.

    python tools/bench_ascend_packing.py [FILE]

FILE is where 1.5 GB are written and read (default: in the temporary folder). An expert is 24.8 MB: INT4 codes and BF16
scales in groups of 32. Reads are direct, four experts at a time as the store does, and a read is a quarter of that.
"""

from __future__ import annotations

import math
import mmap
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from k2lite.backends.ascend import packing
from k2lite.backends.ascend.backend import AscendBackend
from k2lite.backends.ascend.layout import ExpertKind
from k2lite.quant.formats import format_named
from k2lite.quant.types import ExpertWeights, QuantTensor

HIDDEN, WIDTH = 7168, 2048
EXPERTS, PAIRS, IN_FLIGHT = 60, 12, 4


def random_expert(generator: torch.Generator) -> ExpertWeights:
    stored = format_named("int4_g32")
    matrices = []
    for shape in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        parts = {}
        for suffix, (dtype, size) in stored.parts(shape).items():
            # huge pages, as the store's arena has
            room = torch.from_numpy(np.empty(dtype.itemsize * math.prod(size), np.uint8)).view(dtype).view(size)
            parts[suffix] = room
            room.view(torch.uint8).random_(0, 120, generator=generator)
        matrices.append(QuantTensor(stored, shape, parts))
    return ExpertWeights(*matrices)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the stand-in for a chip is a test's
    from tests.backends.plain_runtime import PlainRuntime

    generator = torch.Generator().manual_seed(0)
    experts = [random_expert(generator) for _ in range(6)]
    kind = ExpertKind.of([(matrix.format, matrix.shape) for matrix in experts[0]])
    backend = AscendBackend(PlainRuntime())
    for expert in experts:
        backend.staged(expert, kind)  # compiled, and every page touched
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / f"k2lite-{os.getpid()}"
    nbytes = sum(matrix.nbytes for matrix in experts[0]) // 4096 * 4096
    try:
        write(given, nbytes)
        descriptor = os.open(given, os.O_RDONLY | os.O_DIRECT)
        rooms = [mmap.mmap(-1, nbytes) for _ in range(IN_FLIGHT)]
        reads: list[float] = []
        packs: dict[int, list[float]] = {threads: [] for threads in sorted({1, packing.THREADS})}
        for pair in range(PAIRS):
            reads.append(read_seconds(descriptor, rooms, nbytes, pair))
            for packing.THREADS, seconds in packs.items():
                seconds.append(pack_seconds(backend, kind, experts))
        os.close(descriptor)
    finally:
        given.unlink(missing_ok=True)
    read = statistics.median(reads)
    print(f"an expert of {nbytes / 1e6:.1f} MB: read in {read * 1e3:.1f} ms ({nbytes / read / 1e9:.2f} GB/s)")
    for threads, seconds in packs.items():
        share = statistics.median(pack / read for pack, read in zip(seconds, reads, strict=True))
        print(
            f"laid out by {threads} thread(s) in {statistics.median(seconds) * 1e3:.1f} ms (best "
            f"{min(seconds) * 1e3:.1f}): {share:.0%} of reading (median of {PAIRS} pairs)"
        )


def write(path: Path, nbytes: int) -> None:
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(EXPERTS * nbytes // len(block) + 1):
            file.write(block)
        os.fsync(file.fileno())


def read_seconds(descriptor: int, rooms: list[mmap.mmap], nbytes: int, pair: int) -> float:
    """Of one expert, when IN_FLIGHT are read at a time."""
    numbers = [(IN_FLIGHT * pair + at) * 7 % EXPERTS for at in range(IN_FLIGHT)]
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(lambda _: None, rooms))
        began = time.perf_counter()
        list(pool.map(lambda room, number: os.preadv(descriptor, [room], number * nbytes), rooms, numbers))
        return (time.perf_counter() - began) / IN_FLIGHT


def pack_seconds(backend: AscendBackend, kind: ExpertKind, experts: list[ExpertWeights]) -> float:
    """Of one expert, whose bytes are in no cache."""
    began = time.perf_counter()
    for expert in experts:
        backend.staged(expert, kind)
    return (time.perf_counter() - began) / len(experts)


if __name__ == "__main__":
    main()
