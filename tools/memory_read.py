"""The memory's ceiling: how fast the backend's own threads read touched buffers, adding up 64-bit words."""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from k2lite.backends.cpu.backend import CpuBackend
from k2lite.backends.cpu.compiler import kernel
from k2lite.backends.cpu.pointers import get64, set64
from k2lite.backends.cpu.vector import I32, I64, counted_loop, load, offset, splat, vector

PIECE = 1 << 16
WORDS = vector(I64, 8)


@intrinsic
def sum_words(typingctx, address, count):  # noqa: ARG001
    """The sum of `count` times 256 bytes."""

    def codegen(_context, b, _signature, arguments):
        address, count = arguments

        def body(i, sums):
            at = b.add(address, b.mul(i, I64(256)))
            return [b.add(total, load(b, offset(b, at, 64 * j), WORDS)) for j, total in enumerate(sums)]

        sums = counted_loop(b, count, [splat(WORDS, 0)] * 4, body)
        total = b.add(b.add(sums[0], sums[1]), b.add(sums[2], sums[3]))
        return b.extract_element(total, I32(0))

    return types.int64(types.int64, types.int64), codegen


# arguments: table of addresses, sums
@kernel(3)
def read_piece(arguments, task, _scratch):
    """Read one piece."""
    set64(get64(arguments, 1) + 64 * task, sum_words(get64(get64(arguments, 0), task), PIECE // 256))


def read_bytes_per_second(backend: CpuBackend, tensors: Sequence[torch.Tensor]) -> float:
    """Of whole pieces of the tensors."""
    counts = [tensor.nbytes // PIECE for tensor in tensors]
    places = [t.data_ptr() + PIECE * np.arange(n, dtype=np.int64) for t, n in zip(tensors, counts, strict=True)]
    table = np.concatenate(places)
    sums = np.empty(8 * len(table), np.int64)
    began = time.perf_counter()
    backend._team.launch(read_piece, [table.ctypes.data, sums.ctypes.data], len(table))
    return len(table) * PIECE / (time.perf_counter() - began)
