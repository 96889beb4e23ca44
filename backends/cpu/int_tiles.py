"""Integer weights times prepared inputs: four rows by one token, and panels of sixteen rows by eight tokens.

Both do the same float operations for a row and a token: exact integer sums of groups of 32, each turned into a float
and added by one fused multiply-add, factor weight scale times input scale, to one of four running sums (group modulo
4). The four are added as (s0 + s1) + (s2 + s3).
"""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from . import isa
from .activations import CHUNK_BYTES, CORRECTIONS, SCALES
from .vector import (
    F32,
    F32X16,
    I8X64,
    I16,
    I16X4,
    I32,
    I32X16,
    I64,
    bf16_to_f32,
    broadcast,
    concat,
    counted_loop,
    dot_bytes,
    dot_nibbles,
    fma,
    load,
    nibbles,
    offset,
    outlined,
    pick,
    prefetch,
    shuffle,
    splat,
    store,
    store_first,
    sum_lanes_of_four,
    sum_quarters,
    vector,
)

# How a row's scales lie: one BF16 for 32, 64 or 128 inputs, or one for the row.
G32, G64, G128, ROW = 0, 1, 2, 3
PANEL_ROWS, PANEL_TOKENS = 16, 8


def _chunk_sums(b, bits, codes, x):
    """128 columns of one row times a chunk's codes: 16 lanes, group g's partial sums in lanes 4 g .. 4 g + 3."""
    path, zero = isa.selected(), splat(I32X16, 0)
    first, second = load(b, x, I8X64), load(b, offset(b, x, 64), I8X64)
    if bits == 4:
        low, high = nibbles(b, load(b, codes, I8X64))
        return dot_nibbles(b, path, dot_nibbles(b, path, zero, low, first), high, second)
    halves = [
        dot_bytes(b, path, zero, load(b, offset(b, codes, 64 * i), I8X64), v) for i, v in ((0, first), (1, second))
    ]
    quarters = [[*range(h, h + 4), *range(h + 8, h + 12)] for h in (0, 4)]  # of lanes: both groups' first and second
    return b.add(*(shuffle(b, *halves, [*q, *(lane + 16 for lane in q)]) for q in quarters))


def _scales_of_four(b, rows, chunk, layout):
    """Weight scales of four rows in a chunk's four groups, as floats in lanes 4 g + r."""
    names = ("scales32", "scales64", "scales_one", "scales_known")
    each32, each64, one, known = (b.append_basic_block(name) for name in names)
    switch = b.switch(layout, one)
    switch.add_case(I64(G32), each32)
    switch.add_case(I64(G64), each64)
    found = []
    b.position_at_end(each32)
    found.append([load(b, b.add(row, b.shl(chunk, I64(3))), I16X4) for row in rows])
    b.branch(known)
    b.position_at_end(each64)
    pairs = [load(b, b.add(row, b.shl(chunk, I64(2))), vector(I16, 2)) for row in rows]
    found.append([pick(b, pair, [0, 0, 1, 1]) for pair in pairs])
    b.branch(known)
    b.position_at_end(one)
    step = b.select(b.icmp_signed("==", layout, I64(G128)), b.shl(chunk, I64(1)), I64(0))
    found.append([broadcast(b, load(b, b.add(row, step), I16), 4) for row in rows])
    b.branch(known)
    b.position_at_end(known)
    scales = []
    for r in range(4):
        phi = b.phi(I16X4)
        for block, values in zip((each32, each64, one), found, strict=True):
            phi.add_incoming(values[r], block)
        scales.append(phi)
    together = concat(b, concat(b, *scales[:2]), concat(b, *scales[2:]))
    return bf16_to_f32(b, pick(b, together, [4 * r + g for g in range(4) for r in range(4)]))


def _four(b, address, step):
    """Addresses of four rows, `step` bytes apart."""
    return [b.add(address, b.mul(step, I64(r))) for r in range(4)]


def _four_rows(bits):
    def codegen(context, b, _signature, arguments):
        code, code_step, scale, scale_step, x, chunks, layout, sums, ahead = arguments
        codes, scales = _four(b, code, code_step), _four(b, scale, scale_step)

        def body(i, carried):
            chunk = b.add(x, b.mul(i, I64(CHUNK_BYTES)))
            at = b.mul(i, I64(16 * bits))
            for row in codes:
                for line in range(bits // 4):
                    prefetch(b, offset(b, b.add(b.add(row, at), ahead), 64 * line))
            rows = [_chunk_sums(b, bits, b.add(row, at), chunk) for row in codes]
            exact = b.add(sum_lanes_of_four(b, rows, b.add), load(b, offset(b, chunk, CORRECTIONS), I32X16))
            factor = b.fmul(_scales_of_four(b, scales, i, layout), load(b, offset(b, chunk, SCALES), F32X16))
            return [fma(b, b.sitofp(exact, F32X16), factor, carried[0])]

        (total,) = counted_loop(b, chunks, [load(b, sums, F32X16)], body)
        store(b, sums, total)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 9), outlined(f"k2lite_four_rows{bits}", codegen)


@intrinsic
def four_rows4(typingctx, codes, code_step, scales, scale_step, x, chunks, layout, sums, ahead):
    """Add `chunks` chunks of four 4-bit rows, steps apart, times x to the running sums, 64 bytes. What lies `ahead`
    bytes on is asked for meanwhile."""
    return _four_rows(4)


@intrinsic
def four_rows8(typingctx, codes, code_step, scales, scale_step, x, chunks, layout, sums, ahead):
    """The same for 8-bit rows."""
    return _four_rows(8)


@intrinsic
def finish_four(typingctx, sums, target):
    """Running sums of four rows to their four totals."""

    def codegen(context, b, _signature, arguments):
        store(b, arguments[1], sum_quarters(b, load(b, arguments[0], F32X16)))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen


# -- panels -----------------------------------------------------------------------------------------------------


def transposed(b, rows):
    """16 vectors of 16 lanes, mirrored: lane j of vector i becomes lane i of vector j."""
    for d in (8, 4, 2, 1):
        swapped = list(rows)
        for i in range(16):
            if not i & d:
                keep = [lane if not lane & d else 16 + lane - d for lane in range(16)]
                take = [lane + d if not lane & d else 16 + lane for lane in range(16)]
                swapped[i] = shuffle(b, rows[i], rows[i + d], keep)
                swapped[i + d] = shuffle(b, rows[i], rows[i + d], take)
        rows = swapped
    return rows


def _interleave(widen):
    def codegen(context, b, _signature, arguments):
        table, shift, target = arguments
        rows = []
        for r in range(16):
            row = b.add(load(b, offset(b, table, 8 * r), I64), shift)
            rows.append(load(b, row, I32X16))
        for j, column in enumerate(transposed(b, rows)):
            if widen:
                store(b, offset(b, target, 128 * j), b.shl(column, splat(I32X16, 16)))
                store(b, offset(b, target, 128 * j + 64), b.and_(column, splat(I32X16, -65536)))
            else:
                store(b, offset(b, target, 64 * j), column)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3), outlined(f"k2lite_interleave{int(widen)}", codegen)


@intrinsic
def interleave_words(typingctx, table, shift, target):
    """64 bytes of each of 16 rows, at the table's addresses + shift, to 16 vectors of one word of each row."""
    return _interleave(False)


@intrinsic
def interleave_scales(typingctx, table, shift, target):
    """32 BF16 scales of each of 16 rows to 32 vectors of 16 floats."""
    return _interleave(True)


def _panel(bits):
    words = bits  # vectors of a group: 16 rows by one word each

    def codegen(context, b, _signature, arguments):
        panel, scales, tokens, chunks, group, sums = arguments
        path = isa.selected()
        xs = [b.add(load(b, offset(b, tokens, 8 * t), I64), b.mul(group, I64(16))) for t in range(PANEL_TOKENS)]
        # a group's bytes of 4-bit inputs are 16 even and 16 odd ones; of 8-bit inputs, 32 together
        xb = xs if bits == 4 else [b.add(x, b.mul(group, I64(16))) for x in xs]
        panel = b.add(panel, b.mul(group, I64(64 * words)))
        scales = b.add(scales, b.mul(group, I64(64)))

        def body(i, carried):
            at, here = b.mul(i, I64(CHUNK_BYTES)), b.add(panel, b.mul(i, I64(256 * words)))
            loaded = [load(b, offset(b, here, 64 * j), I8X64) for j in range(words)]
            factor = load(b, b.add(scales, b.mul(i, I64(256))), F32X16)
            if bits == 4:
                parts = [nibbles(b, v) for v in loaded]
                operands = [(low, 4 * j) for j, (low, _) in enumerate(parts)]
                operands += [(high, 64 + 4 * j) for j, (_, high) in enumerate(parts)]
            else:
                operands = [(v, 4 * j) for j, v in enumerate(loaded)]
            multiply = dot_nibbles if bits == 4 else dot_bytes
            results = []
            for x, base, total in zip(xs, xb, carried, strict=True):
                x, base = b.add(x, at), b.add(base, at)
                exact = broadcast(b, load(b, offset(b, x, CORRECTIONS), I32))
                for codes, place in operands:
                    four = b.bitcast(broadcast(b, load(b, offset(b, base, place), I32)), I8X64)
                    exact = multiply(b, path, exact, codes, four)
                scale = b.fmul(factor, broadcast(b, load(b, offset(b, x, SCALES), F32)))
                results.append(fma(b, b.sitofp(exact, F32X16), scale, total))
            return results

        totals = counted_loop(b, chunks, [splat(F32X16, 0.0)] * PANEL_TOKENS, body)
        for t, total in enumerate(totals):
            store(b, offset(b, sums, 64 * t), total)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 6), outlined(f"k2lite_panel{bits}", codegen)


@intrinsic
def panel_tokens4(typingctx, panel, scales, tokens, chunks, group, sums):
    """Running sums `group` (of four) of a 4-bit panel by PANEL_TOKENS tokens, into 64 bytes a token."""
    return _panel(4)


@intrinsic
def panel_tokens8(typingctx, panel, scales, tokens, chunks, group, sums):
    """The same for an 8-bit panel."""
    return _panel(8)


@intrinsic
def finish_panel(typingctx, sums, stride, target, rows):
    """The four running sums of one token at sums, sums + stride, ...: their total, `rows` floats, to target."""

    def codegen(context, b, _signature, arguments):
        sums, stride, target, rows = arguments
        s = [load(b, b.add(sums, b.mul(stride, I64(i))), F32X16) for i in range(4)]
        store_first(b, target, b.fadd(b.fadd(s[0], s[1]), b.fadd(s[2], s[3])), rows)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 4), codegen
