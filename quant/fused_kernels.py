"""Source rows to integer codes in one pass: rows are decoded, scaled, coded and measured while they lie in the
processor's caches. The codes and scales are those of quantize_kernels and scale_search. Knows no torch and no files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32, float64, uint8, uint32

from . import quantize_kernels as steps, row_vectors as vectors
from .compiling import inner, kernel
from .llvm_vectors import WIDTH
from .scale_search import TILE, search_rows

FP8_BLOCK = steps.FP8_BLOCK
# Scales between which no step of a vector's division over- or underflows.
SMALLEST, LARGEST = float32(2.0**-40), float32(2.0**40)
ROWS = 8  # at once: enough groups side by side for a search
_decode_fp8 = inner(steps.decode_fp8.__wrapped__)  # type: ignore[attr-defined]
_decode_bf16 = inner(steps.decode_bf16.__wrapped__)  # type: ignore[attr-defined]
_amax_scales = inner(steps.amax_scales.__wrapped__)  # type: ignore[attr-defined]
_encode = inner(steps.encode.__wrapped__)  # type: ignore[attr-defined]
_decode_integers = inner(steps.decode_integers.__wrapped__)  # type: ignore[attr-defined]
_measure = inner(steps.measure.__wrapped__)  # type: ignore[attr-defined]
# an intrinsic is called without its first parameter, which type checkers don't know
_decode_fp8_row: Any = vectors.decode_fp8_row
_largest_magnitudes: Any = vectors.largest_magnitudes
_encode_nibbles: Any = vectors.encode_nibbles
_encode_bytes: Any = vectors.encode_bytes


@inner
def _scale(values, highest, largest, scales):  # type: ignore[no-untyped-def]
    """As steps.amax_scales, of groups that are multiples of WIDTH. largest: uint32 [G]."""
    rows, groups = scales.shape
    bits = values.view(uint32)
    worst = uint32(0)
    for row in range(rows):
        _largest_magnitudes(bits[row], values.shape[1] // groups, largest)
        for group in range(groups):
            worst = max(worst, largest[group])
            scale = steps.bf16(steps.from_bits(largest[group]) / float32(highest))
            scales[row, group] = scale if scale > float32(0) else float32(1)
    return worst < steps.INFINITE


@inner
def _shift(size, groups):  # type: ignore[no-untyped-def]
    """By how many bits a column is shifted to become its group."""
    shift = 0
    while (1 << shift) < size:
        shift += 1
    return shift if groups > 1 else 63


@inner
def _code_row(values, scales, inverses, lowest, highest, bits, packed, sums, lanes):  # type: ignore[no-untyped-def]
    """Codes and sums of one row float32 [C]. False if a scale is too small or too large for this way."""
    inside = True
    for group in range(len(scales)):
        size = abs(scales[group])
        inside &= (size >= SMALLEST) & (size <= LARGEST)
        inverses[group] = float32(1) / scales[group]
    if not inside:
        return False
    shift = _shift(len(values) // len(scales), len(scales))
    if bits == 4:
        _encode_nibbles(values, scales, inverses, shift, float32(lowest), float32(highest), packed, lanes)
    else:
        _encode_bytes(values, scales, inverses, shift, float32(lowest), float32(highest), packed, lanes)
    for kind in range(3):
        total = 0.0
        for lane in range(WIDTH):
            total += lanes[kind * WIDTH + lane]
        sums[kind] = total
    # what was summed third is the error, which is before - 2 * product + after
    sums[2] = (sums[0] + sums[1] - sums[2]) / 2
    return True


@inner
def _code(values, highest, bits, factors, importance, packed, scales, sums, scratch):  # type: ignore[no-untyped-def]
    """Rows of float32 values [R, C] to their codes, scales and sums. False if one is NaN or infinite."""
    made, codes, largest, inverses, lanes, tile, turned = scratch
    groups = scales.shape[1]
    by_vectors = values.shape[1] // groups % WIDTH == 0
    finite = _scale(values, highest, largest, scales) if by_vectors else _amax_scales(values, highest, scales)
    if not finite:
        return False
    lowest = -highest
    if factors is not None:
        lowest = -highest - 1
        if importance is None:
            search_rows(values, scales, float32(highest), factors, None, tile, None)
        else:
            search_rows(values, scales, float32(highest), factors, importance, tile, turned)
    for row in range(len(values)):
        at = slice(row, row + 1)
        if not by_vectors or not _code_row(
            values[row], scales[row], inverses, lowest, highest, bits, packed[row], sums[row], lanes
        ):
            _encode(values[at], scales[at], lowest, highest, bits, packed[at], codes)
            _decode_integers(packed[at], scales[at], bits, made, codes)
            _measure(values[at], made, sums[at])
    return True


@inner
def _scratch(columns, groups):  # type: ignore[no-untyped-def]
    made, codes = np.empty((1, columns), float32), np.empty(columns, uint8)
    lanes, tile, turned = np.empty(3 * WIDTH, float64), np.empty(TILE, float32), np.empty(TILE, float32)
    return made, codes, np.empty(groups, uint32), np.empty(groups, float32), lanes, tile, turned


@kernel
def fp8_to_integers(source, blocks, highest, bits, factors, importance, packed, scales, sums):  # type: ignore[no-untyped-def]
    """Rows of E4M3 codes uint8 [R, C] with their `blocks` (decode_fp8) to packed uint8 [R, C * bits / 8], scales
    float32 [R, G] and sums float64 [R, 3] (measure). `factors` None: scales by the amax rule; else they are searched as
    search_scales does it, with `importance` float32 [C] or None. False if a weight is NaN or infinite."""
    rows, columns = source.shape
    values, scratch = np.empty((ROWS, columns), float32), _scratch(columns, scales.shape[1])
    for first in range(0, rows, ROWS):
        at = slice(first, min(first + ROWS, rows))
        here = values[: at.stop - first]
        if columns % WIDTH == 0:
            for row in range(len(here)):
                _decode_fp8_row(source[first + row], blocks[(first + row) // FP8_BLOCK], here[row])
        else:
            _decode_fp8(source[at], blocks, first, here)
        if not _code(here, highest, bits, factors, importance, packed[at], scales[at], sums[at], scratch):
            return False
    return True


@kernel
def bf16_to_integers(source, highest, bits, factors, importance, packed, scales, sums):  # type: ignore[no-untyped-def]
    """The same from BF16 bits uint16 [R, C]."""
    rows, columns = source.shape
    values, scratch = np.empty((ROWS, columns), float32), _scratch(columns, scales.shape[1])
    for first in range(0, rows, ROWS):
        at = slice(first, min(first + ROWS, rows))
        here = values[: at.stop - first]
        _decode_bf16(source[at], here)
        if not _code(here, highest, bits, factors, importance, packed[at], scales[at], sums[at], scratch):
            return False
    return True
