"""A stored integer matrix as Ascend's operations take it: codes along outputs, two's complement, low nibble first.

Stored (compressed-tensors): [out, in], value + 8 or + 128, along inputs, scales [out, groups]. For the chip: codes
int32 [in, out / 8] or int8 [in, out], scales bf16 [groups, out]. Exact: places and signs of codes change. On the host.
Source: op-plugin's page on npu_convert_weight_to_int4pack (ND).
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from k2lite.quant.compiling import kernel

from .transposition import (
    BYTE_ROWS,
    LINE,
    NIBBLE_ROWS,
    SCALE_ROWS,
    transpose_codes,
    transpose_nibbles,
    transpose_words,
)

Bytes = np.ndarray[tuple[int, ...], np.dtype[Any]]

_scratch = threading.local()


def pack_codes(stored: torch.Tensor, bits: int, target: torch.Tensor, first: int = 0) -> None:
    """stored int32 [out, in * bits / 32], rows contiguous, into bytes target uint8 [in, pitch]; outputs begin at
    column `first` there (a multiple of 2 for 4 bits). What is not covered stays as it is."""
    source, there = stored.contiguous().view(torch.uint8).numpy(), target.numpy()
    rows, columns = source.shape[0], source.shape[1] * 8 // bits
    kernels = (
        (transpose_nibbles, _plain_nibbles, NIBBLE_ROWS, 128)
        if bits == 4
        else (transpose_codes, _plain_codes, BYTE_ROWS, 64)
    )
    _by_blocks(*kernels, source, there[:, first * bits // 8 :], rows, columns)


def pack_scales(stored: torch.Tensor, target: torch.Tensor, first: int = 0) -> None:
    """stored bf16 [out, groups] into target bf16 [groups, pitch], outputs from column `first` on."""
    source = stored.contiguous().view(torch.int16).view(torch.uint16).numpy()
    there = target.view(torch.int16).view(torch.uint16).numpy()[:, first:]
    _by_blocks(transpose_words, _plain_words, SCALE_ROWS, 32, source, there, source.shape[0], source.shape[1])


def _by_blocks(
    fast: Any,
    plain: Any,
    row_step: int,
    column_step: int,
    source: Bytes,
    target: Bytes,
    rows: int,
    columns: int,
) -> None:
    """The blocked kernel over what is whole blocks, the plain one over the edges."""
    pitch, step = source.strides[0], target.strides[0]
    whole_rows, whole_columns = rows // row_step * row_step, columns // column_step * column_step
    if whole_rows and whole_columns:
        at = target.ctypes.data
        streamed = at % LINE == 0 and step % LINE == 0
        fast(source.ctypes.data, pitch, at, step, whole_rows, whole_columns, _room(), streamed)
    else:
        whole_rows = whole_columns = 0
    plain(source, target, whole_rows, rows, 0, columns)
    plain(source, target, 0, whole_rows, whole_columns, columns)


def _room() -> int:
    """8 KiB of this thread's own, on a line's boundary."""
    if not hasattr(_scratch, "bytes"):
        _scratch.bytes = np.empty((64 * NIBBLE_ROWS) + LINE, np.uint8)
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
