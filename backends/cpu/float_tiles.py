"""Float weights times float inputs: four rows by one or by four tokens, and any format's rows made into floats.

A row and a token have one running sum of 16 lanes; a block of 32 columns adds its even columns to it, then its odd
ones. At the end lanes are added as in int_tiles: fours as (l0 + l2) + (l1 + l3), then (q0 + q1) + (q2 + q3).
FP8 rows come 2^8 times too small (E4M3 bits read as a half float); the caller puts that factor into the inputs.
"""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import isa
from .activations import BLOCK_BYTES
from .vector import (
    F32,
    F32X4,
    F32X16,
    I8,
    I16,
    I32,
    I32X16,
    I64,
    broadcast,
    counted_loop,
    fma,
    load,
    offset,
    outlined,
    pick,
    prefetch,
    shuffle,
    splat,
    store,
    sum_lanes_of_four,
    sum_quarters,
    vector,
)

# How a row is stored. BLOCKS: float32 in blocks of even and odd, as inputs are.
BF16, FP8, BLOCKS = 0, 1, 2
ROW_BYTES = {BF16: 64, FP8: 32, BLOCKS: 128}  # of 32 columns
FP8_FACTOR = 256.0
EVEN, ODD = list(range(0, 32, 2)), list(range(1, 32, 2))


def _fp8_halves(b, words):
    """<16 x i16>, each with two E4M3 codes: the low and the high codes as floats, 2^-8 of their values."""
    keep = splat(words.type, -16512)  # 0xBF80
    low = b.and_(b.ashr(b.shl(words, splat(words.type, 8)), splat(words.type, 1)), keep)
    high = b.and_(b.ashr(words, splat(words.type, 1)), keep)
    return [_half_to_float(b, bits) for bits in (low, high)]


def _half_to_float(b, bits):
    """<16 x i16> bits of float16 to floats. Exact, so how a path does it is its own affair."""
    if isa.selected() in ("vnni", "avx2"):
        return b.fpext(b.bitcast(bits, vector(ir.HalfType(), 16)), F32X16)
    wide = b.zext(bits, I32X16)
    magnitude = b.shl(b.and_(wide, splat(I32X16, 0x7FFF)), splat(I32X16, 13))
    sign = b.shl(b.and_(wide, splat(I32X16, 0x8000)), splat(I32X16, 16))
    value = b.fmul(b.bitcast(magnitude, F32X16), splat(F32X16, 2.0**112))
    special = b.icmp_unsigned(">=", magnitude, splat(I32X16, 0x0F800000))
    infinite = b.or_(magnitude, splat(I32X16, 0x7F800000))
    return b.bitcast(b.or_(b.select(special, infinite, b.bitcast(value, I32X16)), sign), F32X16)


def _load_block(b, kind, address):
    """32 columns as floats: the even ones, the odd ones."""
    if kind == BF16:
        pairs = load(b, address, I32X16)
        return [b.bitcast(v, F32X16) for v in (b.shl(pairs, splat(I32X16, 16)), b.and_(pairs, splat(I32X16, -65536)))]
    if kind == FP8:
        return _fp8_halves(b, load(b, address, vector(I16, 16)))
    return [load(b, offset(b, address, 64 * i), F32X16) for i in range(2)]


def _tile(kind, tokens):
    def codegen(context, b, _signature, arguments):
        rows, xs = arguments[:4], arguments[4 : 4 + tokens]
        blocks, sums, *ahead = arguments[4 + tokens :]
        places = [(r, t) for r in range(4) for t in range(tokens)]
        starts = [load(b, offset(b, sums, 64 * (4 * t + r)), F32X16) for r, t in places]

        def body(i, carried):
            inputs = []
            for x in xs:
                block = b.add(x, b.mul(i, I64(BLOCK_BYTES)))
                inputs.append([load(b, offset(b, block, 64 * half), F32X16) for half in range(2)])
            totals = []
            for r, row in enumerate(rows):
                at = b.add(row, b.mul(i, I64(ROW_BYTES[kind])))
                if ahead:
                    prefetch(b, b.add(at, ahead[0]))
                even, odd = _load_block(b, kind, at)
                for t in range(tokens):
                    total = fma(b, even, inputs[t][0], carried[r * tokens + t])
                    totals.append(fma(b, odd, inputs[t][1], total))
            return totals

        for (r, t), total in zip(places, counted_loop(b, blocks, starts, body), strict=True):
            store(b, offset(b, sums, 64 * (4 * t + r)), total)
        return context.get_dummy_value()

    return types.none(*[types.int64] * (6 + tokens + (tokens == 1))), outlined(
        f"k2lite_floats{kind}_by{tokens}", codegen
    )


@intrinsic
def bf16_by_one(typingctx, w0, w1, w2, w3, x, blocks, sums, ahead):
    """Add `blocks` blocks of four rows times x to the running sums, [4 rows] vectors. What lies `ahead` bytes on is
    asked for meanwhile."""
    return _tile(BF16, 1)


@intrinsic
def fp8_by_one(typingctx, w0, w1, w2, w3, x, blocks, sums, ahead):
    """The same for FP8 rows."""
    return _tile(FP8, 1)


@intrinsic
def blocks_by_one(typingctx, w0, w1, w2, w3, x, blocks, sums, ahead):
    """The same for float32 rows in blocks."""
    return _tile(BLOCKS, 1)


@intrinsic
def bf16_by_four(typingctx, w0, w1, w2, w3, x0, x1, x2, x3, blocks, sums):
    """The same for four tokens: running sums are [4 tokens, 4 rows] vectors."""
    return _tile(BF16, 4)


@intrinsic
def fp8_by_four(typingctx, w0, w1, w2, w3, x0, x1, x2, x3, blocks, sums):
    """The same for four tokens and FP8 rows."""
    return _tile(FP8, 4)


@intrinsic
def blocks_by_four(typingctx, w0, w1, w2, w3, x0, x1, x2, x3, blocks, sums):
    """The same for four tokens and float32 rows in blocks."""
    return _tile(BLOCKS, 4)


@intrinsic
def finish_rows(typingctx, sums, target):
    """Running sums of four rows, 4 vectors, to their four totals."""

    def codegen(context, b, _signature, arguments):
        rows = [load(b, offset(b, arguments[0], 64 * r), F32X16) for r in range(4)]
        total = sum_quarters(b, sum_lanes_of_four(b, rows, b.fadd))
        assert total.type == F32X4
        store(b, arguments[1], total)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


@intrinsic
def scale_block(typingctx, source, factor, target):
    """A block of 32 floats times a factor."""

    def codegen(context, b, _signature, arguments):
        source, factor, target = arguments
        for place in (0, 64):
            product = b.fmul(load(b, offset(b, source, place), F32X16), broadcast(b, factor))
            store(b, offset(b, target, place), product)
        return context.get_dummy_value()

    return types.none(types.int64, types.float32, types.int64), codegen


# -- any format's columns as floats in blocks ----------------------------------------------------------------------

INT4_CODES, INT8_CODES, BF16_VALUES, FP8_CODES, F16_VALUES, F32_VALUES = range(6)
_STORED = (16, 32, 64, 32, 64, 128)  # bytes of a block


def _integer_halves(b, codes, offset_of):
    wide = [b.sub(b.zext(v, I32X16), splat(I32X16, offset_of)) for v in codes]
    return [b.sitofp(v, F32X16) for v in wide]


def _values(b, kind, address):
    if kind == INT4_CODES:
        codes = load(b, address, vector(I8, 16))
        parts = (b.and_(codes, splat(codes.type, 15)), b.lshr(codes, splat(codes.type, 4)))
        return _integer_halves(b, parts, 8)
    if kind == INT8_CODES:
        codes = load(b, address, vector(I8, 32))
        return _integer_halves(b, [pick(b, codes, EVEN), pick(b, codes, ODD)], 128)
    if kind == BF16_VALUES:
        return _load_block(b, BF16, address)
    if kind == FP8_CODES:
        return _load_block(b, FP8, address)
    if kind == F16_VALUES:
        bits = load(b, address, vector(I16, 32))
        return [_half_to_float(b, pick(b, bits, lanes)) for lanes in (EVEN, ODD)]
    values = [load(b, offset(b, address, 64 * i), F32X16) for i in range(2)]
    return [shuffle(b, *values, EVEN), shuffle(b, *values, ODD)]


def _in_order(b, kind, address):
    """The same as they come."""
    if kind == BF16_VALUES:
        halves = [b.zext(load(b, offset(b, address, 32 * i), vector(I16, 16)), I32X16) for i in range(2)]
        return [b.bitcast(b.shl(v, splat(I32X16, 16)), F32X16) for v in halves]
    if kind == INT8_CODES:
        return _integer_halves(b, [load(b, offset(b, address, 16 * i), vector(I8, 16)) for i in range(2)], 128)
    if kind == F32_VALUES:
        return [load(b, offset(b, address, 64 * i), F32X16) for i in range(2)]
    halves = _values(b, kind, address)
    return [shuffle(b, *halves, [lane // 2 + 16 * (lane % 2) for lane in range(16 * i, 16 * i + 16)]) for i in range(2)]


@intrinsic
def floats_of(typingctx, kind, address, factor, target, natural, blocks):
    """Blocks of 32 columns, stored as `kind` says, times a factor, to blocks (natural 0) or as they come (1)."""

    def codegen(context, b, _signature, arguments):
        kind, address, factor, target, natural, blocks = arguments
        by, done = broadcast(b, factor), b.append_basic_block("made")
        ways = [(k, way) for k in range(6) for way in (0, 1)]
        cases = [b.append_basic_block(f"kind{k}{'natural' * way}") for k, way in ways]
        switch = b.switch(b.add(b.mul(kind, I64(2)), natural), done)
        for number, ((k, way), case) in enumerate(zip(ways, cases, strict=True)):
            switch.add_case(I64(number), case)
            b.position_at_end(case)

            def body(i, _carried, make=_in_order if way else _values, k=k):
                to = b.add(target, b.mul(i, I64(BLOCK_BYTES)))
                for half, value in enumerate(make(b, k, b.add(address, b.mul(i, I64(_STORED[k]))))):
                    store(b, offset(b, to, 64 * half), b.fmul(value, by))
                return []

            counted_loop(b, blocks, [], body)
            b.branch(done)
        b.position_at_end(done)
        return context.get_dummy_value()

    i64 = types.int64
    signature = types.none(i64, i64, types.float32, i64, i64, i64)
    return signature, outlined("k2lite_floats_of", codegen)


@intrinsic
def bf16_at(typingctx, base, index):
    """The index-th BF16 number at base, as a float."""

    def codegen(_context, b, _signature, arguments):
        bits = load(b, b.add(arguments[0], b.mul(arguments[1], I64(2))), I16)
        return b.bitcast(b.shl(b.zext(bits, I32), I32(16)), F32)

    return types.float32(types.int64, types.int64), codegen
