"""The steps of quantizing one row as LLVM vectors: decode E4M3, largest magnitudes, codes with what they cost.

The values and codes are, bit for bit, those of quantize_kernels, which say what the steps are; these take a third of
the time. Columns and groups are multiples of WIDTH; group sizes are powers of two, given as `shift`, or a whole row.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .llvm_vectors import BYTE, DOUBLE, FLOAT, INT, WIDTH, Vectors, generator, vector

# Added to a number below 2^22, it leaves the nearest integer, ties to even, in the low bits of the sum.
ROUNDER = 12582912.0
SPAN = 8 * WIDTH  # columns whose squares are summed in float32, 8 a lane, before they join the sums in float64
_INTS, _FLOATS, _BYTES = vector(INT), vector(FLOAT), vector(BYTE)


@intrinsic
def decode_fp8_row(_typing, codes, scales, out):  # type: ignore[no-untyped-def]
    """Fill out float32 [C] from E4M3 codes uint8 [C] and scales float32, one for 128 columns."""

    def body(v: Vectors) -> None:
        code_at, scale_at, out_at = v.pointer(0, BYTE), v.pointer(1, FLOAT), v.pointer(2, FLOAT)
        b = v.builder
        with v.loop(v.word(0), v.length(2), WIDTH) as column:
            code = b.zext(v.load(code_at, column, _BYTES), _INTS)
            low = b.and_(code, v.constant(INT, 0x7F))
            # E4M3 is float32's top with a bias that is 120 less; what is subnormal there gets a leading 1 and loses it
            small = b.icmp_unsigned("<", low, v.constant(INT, 8))
            bias = b.select(small, v.constant(INT, 121 << 23), v.constant(INT, 120 << 23))
            value = b.bitcast(b.add(b.shl(low, v.constant(INT, 20)), bias), _FLOATS)
            value = b.select(small, b.fsub(value, v.constant(FLOAT, 2.0**-6)), value)
            is_nan = b.icmp_unsigned("==", low, v.constant(INT, 0x7F))
            value = b.select(is_nan, v.constant(FLOAT, float("nan")), value)
            sign = b.shl(b.and_(code, v.constant(INT, 0x80)), v.constant(INT, 24))
            value = b.bitcast(b.or_(b.bitcast(value, _INTS), sign), _FLOATS)
            scale = v.element(scale_at, b.lshr(column, v.word(7)))
            v.store(b.fmul(value, scale), out_at, column)

    return types.void(codes, scales, out), generator(body)


@intrinsic
def largest_magnitudes(_typing, bits, size, largest):  # type: ignore[no-untyped-def]
    """Fill largest uint32 [G] from the bits of float32 values, uint32 [G * size]: those of each group's largest
    magnitude, and a NaN's are larger than infinity's."""

    def body(v: Vectors) -> None:
        bits_at, size_, largest_at = v.pointer(0, INT), v.integer(1), v.pointer(2, INT)
        b = v.builder
        with v.loop(v.word(0), v.length(2), 1) as group:
            begin = b.mul(group, size_)
            found = v.register(v.constant(INT, 0))
            with v.loop(begin, b.add(begin, size_), WIDTH) as column:
                magnitude = b.and_(v.load(bits_at, column, _INTS), v.constant(INT, 0x7FFFFFFF))
                b.store(v.larger(b.load(found), magnitude), found)
            b.store(v.largest(b.load(found)), b.gep(largest_at, [group]))

    return types.void(bits, size, largest), generator(body)


def _encoder(bits: int) -> Any:
    """Codes of a row of `bits` bits each and the sums of what they cost."""

    def encode(_typing, values, scales, inverses, shift, lowest, highest, packed, sums):  # type: ignore[no-untyped-def]
        signature = types.void(values, scales, inverses, shift, lowest, highest, packed, sums)
        return signature, generator(lambda v: _encode(v, bits))

    return encode


def _encode(v: Vectors, bits: int) -> None:
    b = v.builder
    value_at, scale_at, inverse_at = (v.pointer(index, FLOAT) for index in (0, 1, 2))
    shift, columns = v.integer(3), v.length(0)
    low, high = v.splat(v.arguments[4]), v.splat(v.arguments[5])
    packed_at, sum_at = v.pointer(6, BYTE), v.pointer(7, DOUBLE)
    rounder = v.constant(FLOAT, ROUNDER + (1 << (bits - 1)))
    zero = v.constant(FLOAT, 0.0)
    totals = [v.register(v.constant(DOUBLE, 0.0)) for _ in range(3)]
    with v.loop(v.word(0), columns, SPAN) as begin:
        squares = [v.register(zero) for _ in range(3)]
        for square in squares:
            b.store(zero, square)
        end = b.add(begin, v.word(SPAN))
        end = b.select(b.icmp_signed("<", end, columns), end, columns)
        with v.loop(begin, end, WIDTH) as column:
            group = b.lshr(column, shift)
            value, scale, inverse = (
                v.load(value_at, column, _FLOATS),
                v.element(scale_at, group),
                v.element(inverse_at, group),
            )
            # value / scale: one correction makes the product with the inverse the nearest float, since the scale has 8
            # bits and so the quotient never lies half way between two floats
            guess = b.fmul(value, inverse)
            step = v.fma(v.fma(b.fneg(guess), scale, value), inverse, guess)
            rounded = b.fadd(v.between(step, low, high), rounder)
            _store_codes(v, b.bitcast(rounded, _INTS), bits, packed_at, column)
            code = b.fsub(rounded, rounder)
            made = b.fmul(code, scale)  # exact, as is the difference
            for square, number in zip(squares, (value, made, b.fsub(value, made)), strict=True):
                b.store(v.fma(number, number, b.load(square)), square)
        for total, square in zip(totals, squares, strict=True):
            b.store(b.fadd(b.load(total), b.fpext(b.load(square), vector(DOUBLE))), total)
    for index, total in enumerate(totals):
        v.store(b.load(total), sum_at, v.word(index * WIDTH))


def _store_codes(v: Vectors, stored: Any, bits: int, packed_at: Any, column: Any) -> None:
    """The low bytes of 16 numbers, with 4 bits two in a byte."""
    b = v.builder
    if bits == 8:
        v.store(b.trunc(stored, _BYTES), packed_at, column)
        return
    pairs, half = vector(ir.IntType(64), WIDTH // 2), vector(BYTE, WIDTH // 2)
    pair = b.bitcast(b.and_(stored, v.constant(INT, 15)), pairs)
    pair = b.or_(pair, b.lshr(pair, ir.Constant(pairs, [28] * (WIDTH // 2))))
    v.store(b.trunc(pair, half), packed_at, b.lshr(column, v.word(1)))


encode_nibbles = intrinsic(_encoder(4))
encode_bytes = intrinsic(_encoder(8))
