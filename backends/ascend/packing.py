"""A stored integer matrix as Ascend's operations take it: codes along outputs, two's complement, low nibble first.

Stored (compressed-tensors): [out, in], value + 8 or + 128, along inputs, scales [out, groups]. For the chip: codes
int32 [in, out / 8] or int8 [in, out], scales bf16 [groups, out]. Exact: places and signs of codes change. On the host.
Source: op-plugin's page on npu_convert_weight_to_int4pack (ND).
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch

from k2lite.quant.compiling import kernel

from .transposition import (
    BYTE_ROWS,
    LINE,
    NIBBLE_ROWS,
    SCALE_ROWS,
    SCRATCH_BYTES,
    transpose_codes,
    transpose_nibbles,
    transpose_words,
)

Bytes = np.ndarray[tuple[int, ...], np.dtype[Any]]

# One thread is about as fast as a copy; memory has room for a few more.
THREADS = min(4, os.cpu_count() or 1)
THREADED_FROM_BYTES = 1 << 20

_scratch = threading.local()


def pack_codes(stored: torch.Tensor, bits: int, target: torch.Tensor, first: int = 0) -> None:
    """stored int32 [out, in * bits / 32], rows contiguous, into bytes target uint8 [in, pitch]; outputs begin at
    column `first` there (a multiple of 2 for 4 bits). What is not covered stays as it is."""
    source = stored.contiguous().view(torch.uint8).numpy()
    there = target.numpy()[:, first * bits // 8 :]
    if bits == 4:
        _by_blocks(transpose_nibbles, _plain_nibbles, (NIBBLE_ROWS, 128), source, there, 2 * source.shape[1], 4)
    else:
        _by_blocks(transpose_codes, _plain_codes, (BYTE_ROWS, 64), source, there, source.shape[1], 8)


def pack_scales(stored: torch.Tensor, target: torch.Tensor, first: int = 0) -> None:
    """stored bf16 [out, groups] into target bf16 [groups, pitch], outputs from column `first` on."""
    source = stored.contiguous().view(torch.int16).view(torch.uint16).numpy()
    there = target.view(torch.int16).view(torch.uint16).numpy()[:, first:]
    _by_blocks(transpose_words, _plain_words, (SCALE_ROWS, 32), source, there, source.shape[1], 16)


def _by_blocks(
    fast: Any, plain: Any, block: tuple[int, int], source: Bytes, target: Bytes, columns: int, bits: int
) -> None:
    """The blocked kernel over whole blocks, by several threads where that pays, and the plain one over the edges."""
    rows, pitch, step = source.shape[0], source.strides[0], target.strides[0]
    whole_rows, whole_columns = (size // of * of for size, of in zip((rows, columns), block, strict=True))
    if not whole_rows or not whole_columns:
        plain(source, target, 0, rows, 0, columns)
        return
    begin, end = source.ctypes.data, target.ctypes.data
    streamed = end % LINE == 0 and step % LINE == 0

    def part(first: int, last: int) -> None:
        fast(begin + first * bits // 8, pitch, end + first * step, step, whole_rows, last - first, _room(), streamed)

    parts = THREADS if source.nbytes >= THREADED_FROM_BYTES else 1
    size = -(-whole_columns // (parts * block[1])) * block[1]
    bounds = [(first, min(first + size, whole_columns)) for first in range(0, whole_columns, size)]
    others = [_threads().submit(part, *bound) for bound in bounds[1:]]
    part(*bounds[0])
    for other in others:
        other.result()
    plain(source, target, whole_rows, rows, 0, columns)
    plain(source, target, 0, whole_rows, whole_columns, columns)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="pack")


def _room() -> int:
    """Bytes of this thread's own, on a line's boundary."""
    if not hasattr(_scratch, "bytes"):
        _scratch.bytes = np.empty(SCRATCH_BYTES + LINE, np.uint8)
    address: int = _scratch.bytes.ctypes.data
    return address + -address % LINE


@kernel
def _plain_nibbles(source, target, first_row, rows, first_column, columns):  # type: ignore[no-untyped-def]
    for row in range(first_row, rows, 2):
        for column in range(first_column, columns):
            shift = 4 * (column & 1)
            low = source[row, column >> 1] >> shift & 15 ^ 8
            high = source[row + 1, column >> 1] >> shift & 15 ^ 8 if row + 1 < rows else 0
            target[column, row >> 1] = low | high << 4


@kernel
def _plain_codes(source, target, first_row, rows, first_column, columns):  # type: ignore[no-untyped-def]
    for row in range(first_row, rows):
        for column in range(first_column, columns):
            target[column, row] = source[row, column] ^ 0x80


@kernel
def _plain_words(source, target, first_row, rows, first_column, columns):  # type: ignore[no-untyped-def]
    for row in range(first_row, rows):
        for column in range(first_column, columns):
            target[column, row] = source[row, column]
