"""Inputs of a matrix product, prepared once for all rows of the weights.

For integer weights: int8 per group of 32 inputs, in chunks of 128 inputs that take 256 bytes: 128 codes in the order
in which the weights' bytes meet them, the four groups' scales and corrections, each four times. For 4-bit weights, the
first 64 codes are the even inputs, the others the odd ones; for 8-bit weights they lie as they come. A correction is
the sum of a group's codes times -8 or -128, which takes away what the stored weights are offset by. For float weights:
float32 in blocks of 32, the 16 even inputs first. What is missing in the last chunk is zero.

Invariant: a group that holds NaN or infinity has the scale NaN, and so has each result that it enters.
"""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from .compiler import kernel
from .pointers import get64, set64
from .vector import (
    F32,
    F32X4,
    F32X16,
    I8,
    I32,
    I32X4,
    I32X16,
    I64,
    broadcast,
    concat,
    declared,
    load_first,
    offset,
    outlined,
    pick,
    shuffle,
    splat,
    store,
    vector,
)

CHUNK, CHUNK_BYTES = 128, 256
GROUP = 32
SCALES, CORRECTIONS = 128, 192  # where they lie in a chunk
BLOCK, BLOCK_BYTES = 32, 128  # of float inputs
FLOAT_PAD = 64

INT4, INT8, FLOAT, ROUNDED = 0, 1, 2, 3  # how an input is prepared

MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
EVEN, ODD = list(range(0, 32, 2)), list(range(1, 32, 2))


def _two_vectors(b, address, valid):
    return [load_first(b, offset(b, address, 64 * i), b.sub(valid, I64(16 * i))) for i in range(2)]


def _peak(b, values):
    """The largest magnitude of 32 floats, NaN if one is NaN: magnitudes compare as integers do."""
    magnitudes = [b.and_(b.bitcast(v, I32X16), splat(I32X16, 0x7FFFFFFF)) for v in values]
    larger = b.select(b.icmp_unsigned(">", *magnitudes), *magnitudes)
    name = "llvm.vector.reduce.umax.v16i32"
    return b.bitcast(b.call(declared(b, name, I32, [I32X16]), [larger]), F32)


def _codes(b, values, scale, usable):
    """32 signed bytes round(x / scale), within 127; zeros where the scale is of no use."""
    divisor, use = broadcast(b, scale), broadcast(b, usable)
    top, bottom, magic = (splat(F32X16, number) for number in (127.0, -127.0, MAGIC))
    parts = []
    for v in values:
        quotient = b.select(use, b.fdiv(v, divisor), splat(F32X16, 0.0))
        quotient = b.select(b.fcmp_ordered(">", quotient, top), top, quotient)
        quotient = b.select(b.fcmp_ordered("<", quotient, bottom), bottom, quotient)
        parts.append(b.fptosi(b.fsub(b.fadd(quotient, magic), magic), I32X16))
    return concat(b, *parts)


def _quantize(bits):
    def codegen(context, b, _signature, arguments):
        address, valid, chunk, group = arguments
        values = _two_vectors(b, address, valid)
        scale = b.fdiv(_peak(b, values), F32(127.0))
        finite = b.fcmp_ordered("<", scale, F32(float("inf")))
        codes = _codes(b, values, scale, b.and_(finite, b.fcmp_ordered(">", scale, F32(0.0))))
        total = b.call(declared(b, "llvm.vector.reduce.add.v32i32", I32, [codes.type]), [codes])
        stored = b.trunc(codes, vector(I8, 32))
        if bits == 4:
            place = b.add(chunk, b.mul(group, I64(16)))
            store(b, place, pick(b, stored, EVEN))
            store(b, offset(b, place, 64), pick(b, stored, ODD))
        else:
            store(b, b.add(chunk, b.mul(group, I64(32))), stored)
        quad = b.add(chunk, b.mul(group, I64(16)))
        scale = b.select(finite, scale, F32(float("nan")))
        store(b, offset(b, quad, SCALES), broadcast(b, scale, F32X4.count))
        correction = b.mul(total, I32(-(1 << (bits - 1))))
        store(b, offset(b, quad, CORRECTIONS), broadcast(b, correction, I32X4.count))
        return context.get_dummy_value()

    return types.none(*[types.int64] * 4), outlined(f"k2lite_quantize{bits}", codegen)


@intrinsic
def quantize_group4(typingctx, address, valid, chunk, group):
    """Group `group` (0..3) of a chunk, from `valid` floats at address, for 4-bit weights."""
    return _quantize(4)


@intrinsic
def quantize_group8(typingctx, address, valid, chunk, group):
    """The same for 8-bit weights."""
    return _quantize(8)


def _round_to_bf16(b, value):
    bits = b.bitcast(value, I32X16)
    odd = b.and_(b.lshr(bits, splat(I32X16, 16)), splat(I32X16, 1))
    rounded = b.and_(b.add(b.add(bits, odd), splat(I32X16, 0x7FFF)), splat(I32X16, -65536))
    is_nan = b.fcmp_unordered("uno", value, value)
    return b.select(is_nan, value, b.bitcast(rounded, F32X16))


def _spread(rounded):
    def codegen(context, b, _signature, arguments):
        address, valid, target = arguments
        values = _two_vectors(b, address, valid)
        if rounded:
            values = [_round_to_bf16(b, v) for v in values]
        store(b, target, shuffle(b, *values, EVEN))
        store(b, offset(b, target, 64), shuffle(b, *values, ODD))
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3), outlined(f"k2lite_spread{int(rounded)}", codegen)


@intrinsic
def spread_block(typingctx, address, valid, target):
    """32 floats, or the `valid` first, to a block."""
    return _spread(False)


@intrinsic
def spread_block_rounded(typingctx, address, valid, target):
    """The same, rounded to BF16."""
    return _spread(True)


PIECE = 2048  # inputs that a task prepares


# arguments: first row, bytes from row to row, floats in a row, first prepared row, bytes of one, how, tasks of a row,
# numbers of the rows that are taken (0: all), table of prepared rows to fill, the same of results (0: none), first
# result, bytes from result to result
@kernel(3)
def prepare(arguments, task, _scratch):
    """Prepare PIECE inputs of a row."""
    row, begin = task // get64(arguments, 6), task % get64(arguments, 6) * PIECE
    target, how, count = get64(arguments, 3) + row * get64(arguments, 4), get64(arguments, 5), get64(arguments, 2)
    taken = get64(get64(arguments, 7), row) if get64(arguments, 7) else row
    source = get64(arguments, 0) + taken * get64(arguments, 1)
    if not begin:
        set64(get64(arguments, 8) + 8 * row, target)
        if get64(arguments, 9):
            set64(get64(arguments, 9) + 8 * row, get64(arguments, 10) + row * get64(arguments, 11))
    if how in (INT4, INT8):
        end = min(begin + PIECE, (count + CHUNK - 1) // CHUNK * CHUNK)
        for group in range(begin // GROUP, end // GROUP):
            valid = count - group * GROUP
            chunk = target + group // 4 * CHUNK_BYTES
            if how == INT4:
                quantize_group4(source + group * 128, valid, chunk, group % 4)
            else:
                quantize_group8(source + group * 128, valid, chunk, group % 4)
    else:
        end = min(begin + PIECE, (count + FLOAT_PAD - 1) // FLOAT_PAD * FLOAT_PAD)
        for block in range(begin // BLOCK, end // BLOCK):
            valid = count - block * BLOCK
            if how == FLOAT:
                spread_block(source + block * 128, valid, target + block * BLOCK_BYTES)
            else:
                spread_block_rounded(source + block * 128, valid, target + block * BLOCK_BYTES)


def prepared_bytes(count: int, how: int) -> int:
    """Bytes that a row of `count` inputs takes."""
    if how in (INT4, INT8):
        return -(-count // CHUNK) * CHUNK_BYTES
    return -(-count // FLOAT_PAD) * FLOAT_PAD * 4
