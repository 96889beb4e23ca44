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

from .transposition import BLOCKS, BYTES, LINE, NIBBLES, SCRATCH_BYTES, WORDS, transpose_shares

Bytes = np.ndarray[tuple[int, ...], np.dtype[Any]]

# One thread is about as fast as a copy; memory has room for a few more.
THREADS = min(4, os.cpu_count() or 1)
THREADED_FROM_BYTES = 1 << 20

_scratch = threading.local()


class Packing:
    """Matrices to be laid out anew, together: each thread takes a share of every one, so that a whole expert is handed
    over to the threads once."""

    def __init__(self) -> None:
        self._strips: list[tuple[int, ...]] = []
        self._nbytes = 0
        self._kept: list[Bytes] = []  # what the addresses are of

    def add_codes(self, stored: torch.Tensor, bits: int, target: torch.Tensor, first: int = 0) -> None:
        """stored int32 [out, in * bits / 32], rows contiguous, into bytes target uint8 [in, pitch]; outputs begin at
        column `first` there (a multiple of 2 for 4 bits). What is not covered stays as it is."""
        source = stored.contiguous().view(torch.uint8).numpy()
        there = target.numpy()[:, first * bits // 8 :]
        columns = source.shape[1] * 8 // bits
        self._add(
            NIBBLES if bits == 4 else BYTES, _plain_nibbles if bits == 4 else _plain_codes, source, there, columns
        )

    def add_scales(self, stored: torch.Tensor, target: torch.Tensor, first: int = 0) -> None:
        """stored bf16 [out, groups] into target bf16 [groups, pitch], outputs from column `first` on."""
        source = stored.contiguous().view(torch.int16).view(torch.uint16).numpy()
        there = target.view(torch.int16).view(torch.uint16).numpy()[:, first:]
        self._add(WORDS, _plain_words, source, there, source.shape[1])

    def run(self) -> None:
        """Do what was added."""
        if not self._strips:
            return
        strips = np.array(self._strips, np.int64)
        parts = THREADS if self._nbytes >= THREADED_FROM_BYTES else 1
        others = [_threads().submit(_share, strips, part, parts) for part in range(1, parts)]
        _share(strips, 0, parts)
        for other in others:
            other.result()
        self._strips, self._kept, self._nbytes = [], [], 0

    def _add(self, unit: int, plain: Any, source: Bytes, target: Bytes, columns: int) -> None:
        """The blocked kernel over whole blocks, later, and the plain one over the edges, now."""
        rows, pitch, step = source.shape[0], source.strides[0], target.strides[0]
        block_rows, block_columns = BLOCKS[unit]
        whole_rows, whole_columns = rows // block_rows * block_rows, columns // block_columns * block_columns
        if not whole_rows or not whole_columns:
            plain(source, target, 0, rows, 0, columns)
            return
        begin, end = source.ctypes.data, target.ctypes.data
        streamed = end % LINE == 0 and step % LINE == 0
        self._strips.append((unit, begin, pitch, end, step, whole_rows, whole_columns, int(streamed)))
        self._kept += [source, target]
        self._nbytes += source.nbytes
        plain(source, target, whole_rows, rows, 0, columns)
        plain(source, target, 0, whole_rows, whole_columns, columns)


def _share(strips: Bytes, part: int, parts: int) -> None:
    transpose_shares(strips, part, parts, _room())


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
