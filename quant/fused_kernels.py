"""Source rows to integer codes by the amax rule in one pass: a row is decoded, scaled, coded and measured while it lies
in the processor's first cache. The same steps as quantize_kernels', so the same bytes. Knows no torch and no files.
"""

from __future__ import annotations

import numpy as np
from numpy import float32, uint8

from . import quantize_kernels as steps
from .compiling import inner, kernel

_decode_fp8 = inner(steps.decode_fp8.__wrapped__)  # type: ignore[attr-defined]
_decode_bf16 = inner(steps.decode_bf16.__wrapped__)  # type: ignore[attr-defined]
_amax_scales = inner(steps.amax_scales.__wrapped__)  # type: ignore[attr-defined]
_encode = inner(steps.encode.__wrapped__)  # type: ignore[attr-defined]
_decode_integers = inner(steps.decode_integers.__wrapped__)  # type: ignore[attr-defined]
_measure = inner(steps.measure.__wrapped__)  # type: ignore[attr-defined]


@inner
def _code(values, highest, bits, packed, scales, sums, made, scratch):  # type: ignore[no-untyped-def]
    """One row of float32 values [1, C] to its codes, scales and sums. False if one is NaN or infinite."""
    finite = _amax_scales(values, highest, scales)
    _encode(values, scales, -highest, highest, bits, packed, scratch)
    _decode_integers(packed, scales, bits, made, scratch)
    _measure(values, made, sums)
    return finite


@kernel
def fp8_to_integers(codes, blocks, first_row, highest, bits, packed, scales, sums):  # type: ignore[no-untyped-def]
    """Rows of E4M3 codes uint8 [R, C] with their `blocks` (decode_fp8) to packed uint8 [R, C * bits / 8], scales
    float32 [R, G] and sums float64 [R, 3] (measure). False if a weight is NaN or infinite."""
    rows, columns = codes.shape
    values, made, scratch = np.empty((1, columns), float32), np.empty((1, columns), float32), np.empty(columns, uint8)
    finite = True
    for row in range(rows):
        at = slice(row, row + 1)
        _decode_fp8(codes[at], blocks, first_row + row, values)
        finite &= _code(values, highest, bits, packed[at], scales[at], sums[at], made, scratch)
    return finite


@kernel
def bf16_to_integers(source, highest, bits, packed, scales, sums):  # type: ignore[no-untyped-def]
    """The same from BF16 bits uint16 [R, C]."""
    rows, columns = source.shape
    values, made, scratch = np.empty((1, columns), float32), np.empty((1, columns), float32), np.empty(columns, uint8)
    finite = True
    for row in range(rows):
        at = slice(row, row + 1)
        _decode_bf16(source[at], values)
        finite &= _code(values, highest, bits, packed[at], scales[at], sums[at], made, scratch)
    return finite
