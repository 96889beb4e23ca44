"""Compiled loops over rows of weights: decode a source, find amax scales, make codes, measure what they cost.

Arrays are numpy, contiguous, made by the caller; every function runs without the GIL on one thread. Rows (FP8: blocks
of 128 rows) don't depend on one another, and sums are taken in one fixed order, whatever a processor's vectors are.
Knows no torch, no files and no names of formats.
"""

from __future__ import annotations

import numpy as np
from numpy import float32, float64, uint8, uint16, uint32

from .compiling import inner, kernel

FP8_BLOCK = 128
LANES = 128
INFINITE = uint32(0x7F800000)  # as bits; above are NaNs
NAN = uint32(0x7FC00000)
E4M3_MAX = float32(448)
E4M3_MAX_BITS = uint32(0x43E00000)
MAGNITUDE = uint32(0x7FFFFFFF)
# Added to a number below 2^22, it leaves the nearest integer, ties to even, in the low bits of the sum.
ROUNDER = float32(12582912.0)


@inner
def bits_of(value):  # type: ignore[no-untyped-def]
    return np.float32(value).view(np.uint32)


@inner
def from_bits(bits):  # type: ignore[no-untyped-def]
    return np.uint32(bits).view(np.float32)


@kernel
def decode_fp8(codes, scales, first_row, out):  # type: ignore[no-untyped-def]
    """float32 out [R, C] of E4M3 codes uint8 [R, C] and their blocks' scales float32 [., ceil(C / 128)]; row 0 of
    `codes` is row `first_row` of those blocks."""
    rows, columns = codes.shape
    bits = out.view(uint32)
    for row in range(rows):
        block = (first_row + row) // FP8_BLOCK
        for first in range(0, columns, FP8_BLOCK):
            last = min(first + FP8_BLOCK, columns)
            code, into, value = codes[row, first:last], bits[row, first:last], out[row, first:last]
            scale = scales[block, first // FP8_BLOCK]
            for column in range(last - first):
                stored = uint32(code[column])
                low = uint32(stored & uint32(0x7F))
                # E4M3 is float32's top with a bias that is 120 less; what is subnormal there is a multiple of 2^-9
                small = bits_of(float32(low) * float32(2.0**-9))
                number = small if low < uint32(8) else uint32((low << uint32(20)) + uint32(120 << 23))
                number = NAN if low == uint32(0x7F) else number
                into[column] = number | ((stored & uint32(0x80)) << uint32(24))
            for column in range(last - first):
                value[column] *= scale


@kernel
def decode_bf16(bits, out):  # type: ignore[no-untyped-def]
    """float32 out [R, C] of BF16 bits uint16 [R, C]."""
    into = out.view(uint32)
    for row in range(len(bits)):
        source, target = bits[row], into[row]
        for column in range(len(source)):
            target[column] = uint32(source[column]) << uint32(16)


@inner
def bf16(value):  # type: ignore[no-untyped-def]
    """A finite float32 rounded to what BF16 holds, nearest, ties to even; too large becomes infinity."""
    bits = bits_of(value)
    return from_bits((bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) & uint32(0xFFFF0000))


@kernel
def amax_scales(weights, max_code, scales):  # type: ignore[no-untyped-def]
    """Fill scales [R, G], float32 that BF16 holds: amax / max_code of each group of weights float32 [R, C], 1 where
    that is 0. False if a weight is NaN or infinite."""
    rows, groups = scales.shape
    size = weights.shape[1] // groups
    bits = weights.view(uint32)
    worst = uint32(0)
    for row in range(rows):
        for group in range(groups):
            part = bits[row, group * size : (group + 1) * size]
            largest = uint32(0)
            for column in range(size):
                largest = max(largest, uint32(part[column] & MAGNITUDE))
            worst = max(worst, largest)
            scale = bf16(from_bits(largest) / float32(max_code))
            scales[row, group] = scale if scale > float32(0) else float32(1)
    return worst < INFINITE


@kernel
def encode(weights, scales, lowest, highest, bits, packed, scratch):  # type: ignore[no-untyped-def]
    """Stored codes of weights float32 [R, C]: the integer nearest to weight / scale within lowest..highest, plus half
    the codes there are; packed uint8 [R, C * bits / 8] holds one in a byte (8 bits) or two, the lower column in the
    low nibble. scales: float32 [R, G]; scratch: uint8 [C]."""
    rows, groups = scales.shape
    columns = weights.shape[1]
    size = columns // groups
    low, high = float32(lowest), float32(highest)
    rounder = ROUNDER + float32(1 << (bits - 1))
    pairs = scratch.view(uint16)
    for row in range(rows):
        codes = packed[row] if bits == 8 else scratch
        for group in range(groups):
            scale = scales[row, group]
            part = weights[row, group * size : (group + 1) * size]
            into = codes[group * size : (group + 1) * size]
            for column in range(size):
                step = part[column] / scale
                step = low if step < low else step
                step = high if step > high else step
                into[column] = uint8(bits_of(step + rounder))
        if bits == 4:
            words = packed[row]
            for pair in range(len(words)):
                words[pair] = uint8(pairs[pair] | (pairs[pair] >> uint16(4)))


@kernel
def decode_integers(packed, scales, bits, out, scratch):  # type: ignore[no-untyped-def]
    """float32 out [R, C] of codes as `encode` stores them. scales: float32 [R, G]; scratch: uint8 [C]."""
    rows, columns = out.shape
    groups = scales.shape[1]
    size = columns // groups
    half = float32(1 << (bits - 1))
    pairs = scratch.view(uint16)
    for row in range(rows):
        codes = packed[row] if bits == 8 else scratch
        if bits == 4:
            words = packed[row]
            for pair in range(len(words)):
                word = uint16(words[pair])
                pairs[pair] = (word | (word << uint16(4))) & uint16(0x0F0F)
        for group in range(groups):
            scale = scales[row, group]
            into = out[row, group * size : (group + 1) * size]
            source = codes[group * size : (group + 1) * size]
            for column in range(size):
                into[column] = (float32(source[column]) - half) * scale


@kernel
def measure(weights, made, sums):  # type: ignore[no-untyped-def]
    """Fill sums float64 [R, 3]: of each row of float32 [R, C] the sums of weight**2, made**2 and weight * made."""
    rows, columns = weights.shape
    lanes = np.empty(3 * LANES, float64)
    for row in range(rows):
        lanes[:] = 0
        for first in range(0, columns, LANES):
            last = min(first + LANES, columns)
            before, after = weights[row, first:last], made[row, first:last]
            for lane in range(last - first):
                a, b = float64(before[lane]), float64(after[lane])
                lanes[lane] += a * a
                lanes[LANES + lane] += b * b
                lanes[2 * LANES + lane] += a * b
        for kind in range(3):
            total = 0.0
            for lane in range(LANES):
                total += lanes[kind * LANES + lane]
            sums[row, kind] = total


@kernel
def fp8_scales(weights, scales):  # type: ignore[no-untyped-def]
    """Fill scales float32 [ceil(R / 128), ceil(C / 128)]: amax / 448 of each block of weights float32 [R, C], 1 where
    that is 0. False if a weight is NaN or infinite."""
    rows, columns = weights.shape
    bits = weights.view(uint32)
    worst = uint32(0)
    for block_row in range(scales.shape[0]):
        for block in range(scales.shape[1]):
            largest = uint32(0)
            for row in range(block_row * FP8_BLOCK, min((block_row + 1) * FP8_BLOCK, rows)):
                part = bits[row, block * FP8_BLOCK : min((block + 1) * FP8_BLOCK, columns)]
                for column in range(len(part)):
                    largest = max(largest, uint32(part[column] & MAGNITUDE))
            worst = max(worst, largest)
            scale = from_bits(largest) / E4M3_MAX
            scales[block_row, block] = scale if scale > float32(0) else float32(1)
    return worst < INFINITE


@kernel
def encode_fp8(weights, scales, codes):  # type: ignore[no-untyped-def]
    """E4M3 codes uint8 [R, C] nearest to weight / scale, ties to the even code, of weights float32 [R, C] and scales as
    `fp8_scales` makes them; a quotient that rounds above 448 becomes 448."""
    rows, columns = weights.shape
    for row in range(rows):
        for first in range(0, columns, FP8_BLOCK):
            last = min(first + FP8_BLOCK, columns)
            part, into = weights[row, first:last], codes[row, first:last]
            scale = scales[row // FP8_BLOCK, first // FP8_BLOCK]
            for column in range(last - first):
                bits = bits_of(part[column] / scale)
                low = uint32(bits & MAGNITUDE)
                low = min(low, E4M3_MAX_BITS)
                # subnormal codes are multiples of 2^-9, which is the last bit of numbers near 2^14
                small = uint32(bits_of(from_bits(low) + float32(2.0**14)) - uint32(141 << 23))
                # else round the mantissa to 3 bits and take 120 from the exponent
                odd = uint32((low >> uint32(20)) & uint32(1))
                number = uint32(low - uint32(120 << 23) + uint32(0x7FFFF) + odd) >> uint32(20)
                code = small if low < uint32(121 << 23) else number
                into[column] = uint8(code | ((bits >> uint32(24)) & uint32(0x80)))
