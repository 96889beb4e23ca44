"""Multi-head latent attention in the absorbed form, one order for prefill and decode.

Three jobs: the keys' half of kv_b goes into the queries (a task is a head), each token attends to its sequence's
latents (a token and some heads), the values' half makes the result (a head). kv_b is read as stored, and made into
floats one head at a time in scratch: nothing is kept. Cached positions are taken in blocks of 64 from the sequence's
beginning, with a running maximum; so a token's result depends on its position only.
Shapes: T tokens, H heads, N cached positions, R latent width, P rotary width, V value width.
"""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

from functools import cache

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from .activations import BLOCK, BLOCK_BYTES, spread_block
from .compiler import kernel
from .elementwise import add_lanes, each_vector
from .float_linear import AHEAD, row_to_floats
from .float_tiles import bf16_by_one, blocks_by_four, blocks_by_one, finish_rows
from .functions import exp
from .matrix import BY_BF16, CODE_ROW, CODES, IN, PATH
from .pointers import copy_bytes, get64, getf, set64, setf, zero_bytes
from .vector import (
    F32,
    F32X16,
    I32,
    I64,
    broadcast,
    counted_loop,
    declared,
    first_lanes,
    fma,
    load,
    load_first,
    offset,
    outlined,
    splat,
    store,
    store_first,
)

POSITIONS = 64  # of a block
MOST_HEADS = 64  # of a task


def _weighted_rows(vectors):
    def codegen(context, b, _signature, arguments):
        rows, row_bytes, weights, count, factor, lanes, sums = arguments
        factor = broadcast(b, factor)
        if vectors == 1:
            starts = [load_first(b, sums, lanes)]
        else:
            starts = [load(b, offset(b, sums, 64 * v), F32X16) for v in range(vectors)]

        def body(i, carried):
            row, weight = b.add(rows, b.mul(i, row_bytes)), broadcast(b, load(b, b.add(weights, b.mul(i, I64(4))), F32))
            if vectors == 1:
                return [fma(b, weight, load_first(b, row, lanes), carried[0])]
            return [fma(b, weight, load(b, offset(b, row, 64 * v), F32X16), s) for v, s in enumerate(carried)]

        totals = counted_loop(b, count, [b.fmul(s, factor) for s in starts], body)
        for v, total in enumerate(totals):
            if vectors == 1:
                store_first(b, sums, total, lanes)
            else:
                store(b, offset(b, sums, 64 * v), total)
        return context.get_dummy_value()

    i64 = types.int64
    signature = types.none(i64, i64, i64, i64, types.float32, i64, i64)
    return signature, outlined(f"k2lite_weighted_rows{vectors}", codegen)


@intrinsic
def weighted_rows8(typingctx, rows, row_bytes, weights, count, factor, lanes, sums):
    """sums * factor + weight 0 * row 0 + weight 1 * row 1 + ..., 128 columns."""
    return _weighted_rows(8)


@intrinsic
def weighted_rows1(typingctx, rows, row_bytes, weights, count, factor, lanes, sums):
    """The same for the first `lanes` of 16 columns."""
    return _weighted_rows(1)


@numba.njit(error_model="numpy")
def weighted_rows(rows, row_bytes, weights, count, factor, columns, sums):
    """The same for all columns; nothing beyond them is touched."""
    column = 0
    while column + 128 <= columns:
        weighted_rows8(rows + column * 4, row_bytes, weights, count, factor, 16, sums + column * 4)
        column += 128
    while column < columns:
        weighted_rows1(rows + column * 4, row_bytes, weights, count, factor, columns - column, sums + column * 4)
        column += 16


@intrinsic
def softmax_block(typingctx, scores, valid, scale, state):
    """Up to 64 raw scores to e^(score * scale - maximum), zeros behind. state: running maximum, running sum (both
    updated), and the factor by which earlier results shrink."""

    def codegen(context, b, _signature, arguments):
        scores, valid, scale, state = arguments
        peak, total = (load(b, offset(b, state, 4 * i), F32) for i in range(2))
        values = []
        for v in range(4):
            mask = first_lanes(b, b.sub(valid, I64(16 * v)))
            scaled = b.fmul(load(b, offset(b, scores, 64 * v), F32X16), broadcast(b, scale))
            values.append(b.select(mask, scaled, splat(F32X16, float("-inf"))))

        def larger(x, y):
            return b.select(b.fcmp_ordered(">", x, y), x, y)

        most = larger(larger(values[0], values[1]), larger(values[2], values[3]))
        name = "llvm.vector.reduce.fmax.v16f32"
        now = larger(b.call(declared(b, name, F32, [F32X16]), [most]), peak)
        shrink = exp(b, broadcast(b, b.fsub(peak, now)))
        weights = [exp(b, b.fsub(value, broadcast(b, now))) for value in values]
        for v, weight in enumerate(weights):
            store(b, offset(b, scores, 64 * v), weight)
        new = add_lanes(b, b.fadd(b.fadd(weights[0], weights[1]), b.fadd(weights[2], weights[3])))
        shrink = b.extract_element(shrink, I32(0))
        store(b, state, now)
        store(b, offset(b, state, 4), b.fadd(b.fmul(total, shrink), new))
        store(b, offset(b, state, 8), shrink)
        return context.get_dummy_value()

    signature = types.none(types.int64, types.int64, types.float32, types.int64)
    return signature, outlined("k2lite_softmax_block", codegen)


@intrinsic
def divide_row(typingctx, row, count, divisor):
    """`count` floats by a number, in place."""

    def codegen(context, b, _signature, arguments):
        row, count, divisor = arguments
        by = broadcast(b, divisor)

        def apply(at, left, _carried):
            store_first(b, b.add(row, at), b.fdiv(load_first(b, b.add(row, at), left), by), left)
            return []

        each_vector(b, count, [], apply)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.float32), codegen


# -- the three jobs -----------------------------------------------------------------------------------------------

# The fields of a call: kv_b, tokens, heads, nope, rotary, value widths; queries, their bytes from token to token and
# from head to head; the same for rotary parts; whole queries [T * H, padded], their width; table of latents [T,
# (address, positions)], latent width; heads of a task; mixed latents [T * H, padded], their bytes; address of the
# scale; results [T, H, V]
(KV_B, TOKENS, HEADS, NOPE, ROTARY, VALUE, Q_NOPE, NOPE_TOKEN, NOPE_HEAD, Q_ROPE, ROPE_TOKEN, ROPE_HEAD, QUERIES,
 QUERY_BYTES, LATENTS, LATENT, GROUP, MIXED, MIXED_BYTES, SCALE, RESULTS) = range(21)  # fmt: skip


# arguments: segments [n, 4] (first and last row of the batch, latents, positions before), table of latents
@kernel(3)
def place_latents(arguments, task, _scratch):
    """Where a segment's tokens find their latents, and how many of them each sees."""
    segment = get64(arguments, 0) + 32 * task
    for i in range(get64(segment, 1) - get64(segment, 0)):
        at = get64(arguments, 1) + 16 * (get64(segment, 0) + i)
        set64(at, get64(segment, 2))
        set64(at + 8, get64(segment, 3) + 1 + i)


@kernel(3)
def absorb(arguments, head, scratch):
    """Whole queries of one head: its key rows times each token's query, then the rotary part."""
    matrix, nope, heads = get64(arguments, KV_B), get64(arguments, NOPE), get64(arguments, HEADS)
    rank, width = get64(matrix, IN), get64(arguments, QUERY_BYTES)
    blocks = (rank + BLOCK - 1) // BLOCK
    spare = scratch + nope * blocks * BLOCK_BYTES
    first = head * (nope + get64(arguments, VALUE))
    # one token: what has been made into floats is still in the nearest cache
    some = nope if get64(arguments, TOKENS) > 1 else 8
    for n in range(0, nope, some):
        count = min(some, nope - n)
        for row in range(count):
            row_to_floats(matrix, first + n + row, 0, blocks, scratch + row * blocks * BLOCK_BYTES, 1, 1, spare)
        for t in range(get64(arguments, TOKENS)):
            query = get64(arguments, QUERIES) + (t * heads + head) * width
            if not n:
                zero_bytes(query, width)
            source = get64(arguments, Q_NOPE) + t * get64(arguments, NOPE_TOKEN) + head * get64(arguments, NOPE_HEAD)
            weighted_rows(scratch, blocks * BLOCK_BYTES, source + 4 * n, count, np.float32(1), rank, query)
    for t in range(get64(arguments, TOKENS)):
        query = get64(arguments, QUERIES) + (t * heads + head) * width
        rope = get64(arguments, Q_ROPE) + t * get64(arguments, ROPE_TOKEN) + head * get64(arguments, ROPE_HEAD)
        copy_bytes(query + rank * 4, rope, get64(arguments, ROTARY) * 4)


@numba.njit(error_model="numpy")
def _scores(queries, width, heads, latents, row_bytes, positions, sums, scores):
    """Raw scores of some heads and up to 64 positions, four by four."""
    blocks = width // BLOCK_BYTES
    for p in range(0, positions, 4):
        r0 = latents + p * row_bytes
        r1 = latents + min(p + 1, positions - 1) * row_bytes
        r2 = latents + min(p + 2, positions - 1) * row_bytes
        r3 = latents + min(p + 3, positions - 1) * row_bytes
        for h in range(0, heads, 4):
            q0 = queries + h * width
            q1 = queries + min(h + 1, heads - 1) * width
            q2 = queries + min(h + 2, heads - 1) * width
            q3 = queries + min(h + 3, heads - 1) * width
            zero_bytes(sums, 1024)
            blocks_by_four(r0, r1, r2, r3, q0, q1, q2, q3, blocks, sums)
            for i in range(min(4, heads - h)):
                finish_rows(sums + 256 * i, scores + ((h + i) * POSITIONS + p) * 4)


@kernel(3)
def attend(arguments, task, scratch):
    """One token and some heads over its sequence's latents."""
    heads, each, latent = get64(arguments, HEADS), get64(arguments, GROUP), get64(arguments, LATENT)
    groups = (heads + each - 1) // each
    token, head = task // groups, task % groups * each
    count = min(each, heads - head)
    rank, width = get64(get64(arguments, KV_B), IN), get64(arguments, QUERY_BYTES)
    queries = get64(arguments, QUERIES) + (token * heads + head) * width
    latents, total = get64(get64(arguments, LATENTS), 2 * token), get64(get64(arguments, LATENTS), 2 * token + 1)
    sums, states = scratch, scratch + 1024
    scores = states + 16 * MOST_HEADS
    mixed = scores + 4 * POSITIONS * MOST_HEADS
    mixed_row = (rank + 15) // 16 * 64
    copies = mixed + MOST_HEADS * mixed_row
    scale = getf(get64(arguments, SCALE))
    zero_bytes(mixed, count * mixed_row)
    for h in range(count):
        setf(states + 16 * h, np.float32(-np.inf))
        setf(states + 16 * h + 4, np.float32(0))
    for position in range(0, total, POSITIONS):
        here = min(POSITIONS, total - position)
        rows, row_bytes = latents + position * latent * 4, latent * 4
        if row_bytes != width:  # a width that is no whole block: copies with zeros behind
            zero_bytes(copies, here * width)
            for p in range(here):
                copy_bytes(copies + p * width, rows + p * row_bytes, row_bytes)
            rows, row_bytes = copies, width
        _scores(queries, width, count, rows, row_bytes, here, sums, scores)
        for h in range(count):
            softmax_block(scores + h * POSITIONS * 4, here, scale, states + 16 * h)
        column = 0
        while column < rank:  # some columns for all heads: they stay in the nearest cache
            wide = min(128, rank - column)
            for h in range(count):
                shrink, to = getf(states + 16 * h + 8), mixed + h * mixed_row + column * 4
                weighted_rows(rows + column * 4, row_bytes, scores + h * POSITIONS * 4, here, shrink, wide, to)
            column += wide
    for h in range(count):
        row = mixed + h * mixed_row
        divide_row(row, rank, getf(states + 16 * h + 4))
        to = get64(arguments, MIXED) + (token * heads + head + h) * get64(arguments, MIXED_BYTES)
        for block in range((rank + BLOCK - 1) // BLOCK):
            spread_block(row + block * BLOCK_BYTES, rank - block * BLOCK, to + block * BLOCK_BYTES)


@numba.njit(error_model="numpy")
def _values_of_one(matrix, first, value, x, scratch, arguments, head):
    """One token's results: BF16 rows are multiplied as they lie."""
    rank, code_row = get64(matrix, IN), get64(matrix, CODE_ROW)
    blocks = (rank + BLOCK - 1) // BLOCK
    sums, spare, rows, row_bytes = scratch, scratch + 1024, scratch + 2048, blocks * BLOCK_BYTES
    for v in range(0, value, 4):
        zero_bytes(sums, 256)
        n0, n1 = first + v, first + min(v + 1, value - 1)
        n2, n3 = first + min(v + 2, value - 1), first + min(v + 3, value - 1)
        if get64(matrix, PATH) == BY_BF16 and rank % BLOCK == 0:
            codes = get64(matrix, CODES)
            r0, r1, r2, r3 = codes + n0 * code_row, codes + n1 * code_row, codes + n2 * code_row, codes + n3 * code_row
            bf16_by_one(r0, r1, r2, r3, x, blocks, sums, AHEAD)
        else:
            for r in range(4):
                row_to_floats(matrix, first + min(v + r, value - 1), 0, blocks, rows + r * row_bytes, 0, 1, spare)
            blocks_by_one(rows, rows + row_bytes, rows + 2 * row_bytes, rows + 3 * row_bytes, x, blocks, sums, 0)
        finish_rows(sums, spare)
        to = get64(arguments, RESULTS) + (head * value + v) * 4
        copy_bytes(to, spare, 4 * min(4, value - v))


@kernel(3)
def make_values(arguments, head, scratch):
    """One head's results: its value rows times each token's mixed latents."""
    matrix, nope, value = get64(arguments, KV_B), get64(arguments, NOPE), get64(arguments, VALUE)
    heads, tokens, mixed_bytes = get64(arguments, HEADS), get64(arguments, TOKENS), get64(arguments, MIXED_BYTES)
    blocks = (get64(matrix, IN) + BLOCK - 1) // BLOCK
    sums, spare, rows = scratch, scratch + 1024, scratch + 2048
    first = head * (nope + value) + nope
    if tokens == 1:
        _values_of_one(matrix, first, value, get64(arguments, MIXED) + head * mixed_bytes, scratch, arguments, head)
        return
    for v in range(0, value, 4):
        for r in range(4):
            at = first + min(v + r, value - 1)
            row_to_floats(matrix, at, 0, blocks, rows + r * blocks * BLOCK_BYTES, 0, 1, spare)
        r1, r2, r3 = rows + blocks * BLOCK_BYTES, rows + 2 * blocks * BLOCK_BYTES, rows + 3 * blocks * BLOCK_BYTES
        for t in range(0, tokens, 4):
            x0 = get64(arguments, MIXED) + (t * heads + head) * mixed_bytes
            step = heads * mixed_bytes
            left = tokens - t - 1
            x1, x2, x3 = x0 + min(1, left) * step, x0 + min(2, left) * step, x0 + min(3, left) * step
            zero_bytes(sums, 1024)
            blocks_by_four(rows, r1, r2, r3, x0, x1, x2, x3, blocks, sums)
            for i in range(min(4, tokens - t)):
                finish_rows(sums + 256 * i, spare)
                to = get64(arguments, RESULTS) + (((t + i) * heads + head) * value + v) * 4
                copy_bytes(to, spare, 4 * min(4, value - v))


@cache
def attention_scratch_bytes(rank: int, latent: int, nope: int) -> int:
    """The most of the three jobs."""
    padded = -(-rank // BLOCK) * BLOCK_BYTES
    attends = 1024 + 16 * MOST_HEADS + 4 * POSITIONS * MOST_HEADS + MOST_HEADS * padded
    return max(nope * padded + 128, attends + POSITIONS * -(-latent // BLOCK) * BLOCK_BYTES, 2048 + 4 * padded)
