"""32 rows of a matrix times some tokens in float: BF16 and FP8 as they lie, all other formats through float32 scratch.

Invariant: a row and a token are added up in the order of float_tiles.py, whatever the number of tokens and however
columns are cut into pieces. FP8's block scale (times the 2^8 of its codes) is multiplied into the inputs.
"""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

import numba
import numpy as np

from .activations import BLOCK, BLOCK_BYTES, FLOAT_PAD
from .float_tiles import (
    BF16_VALUES,
    F16_VALUES,
    F32_VALUES,
    FP8_CODES,
    FP8_FACTOR,
    INT4_CODES,
    bf16_at,
    bf16_by_four,
    bf16_by_one,
    blocks_by_four,
    blocks_by_one,
    finish_rows,
    floats_of,
    fp8_by_four,
    fp8_by_one,
    scale_block,
)
from .int_linear import _scale_index
from .int_tiles import ROW
from .matrix import BY_BF16, BY_FLOATS, BY_FP8, CODE_ROW, CODES, IN, LAYOUT, OUT, PATH, SCALE_ROW, SCALES, VALUES
from .pointers import copy_bytes, get64, getf, set64, setf, zero_bytes

TOKENS = 32  # of a turn
PIECE = 1024  # columns that are worked on together
AHEAD = 2048  # bytes of a row that are asked for before they are needed
MANY = 8  # from so many tokens on, FP8 codes are made into floats once for all of them
_SUMS = 0
_TABLE = _SUMS + 32 * TOKENS * 64
_ENDS = _TABLE + 8 * TOKENS
_FLOATS = _ENDS + 512
_INPUTS = _FLOATS + 4 * PIECE * 4


def float_scratch_bytes(columns: int) -> int:
    return _INPUTS + max(TOKENS * PIECE, columns + FLOAT_PAD) * 4


@numba.njit(error_model="numpy")
def column_bytes(values):
    """Bytes of 32 columns."""
    if values == INT4_CODES:
        return 16
    if values in (BF16_VALUES, F16_VALUES):
        return 64
    return 128 if values == F32_VALUES else 32


@numba.njit(error_model="numpy")
def row_to_floats(matrix, row, column, blocks, target, natural, scaled, spare):
    """`blocks` blocks of a row from `column` on (a multiple of 32) as float32, zeros past its end; spare: 128 bytes.
    scaled 0: FP8 codes without their scale and their factor."""
    values, columns = get64(matrix, VALUES), get64(matrix, IN)
    width = column_bytes(values)
    codes = get64(matrix, CODES) + row * get64(matrix, CODE_ROW) + column // BLOCK * width
    whole, i = min(blocks, (columns - column) // BLOCK), 0
    while i < blocks:
        at = column + i * BLOCK
        source, to = codes + i * width, target + i * BLOCK_BYTES
        alike = min(_blocks_alike(matrix, values), whole - i)  # columns begin at whole pieces, so at a scale's first
        if alike > 0:
            floats_of(values, source, _factor(matrix, values, row, at, scaled), to, natural, alike)
            i += alike
            continue
        zero_bytes(spare, 128)
        copy_bytes(spare, source, (columns - at) * width // BLOCK)
        floats_of(values, spare, _factor(matrix, values, row, at, scaled), to, natural, 1)
        if values < BF16_VALUES:
            _clear(to, columns - at, natural)
        i += 1


@numba.njit(error_model="numpy")
def _blocks_alike(matrix, values):
    """Blocks of a row that share a scale."""
    if values == FP8_CODES:
        return 4
    if values >= BF16_VALUES or get64(matrix, LAYOUT) == ROW:
        return 1 << 30
    return 1 << get64(matrix, LAYOUT)  # G32, G64, G128


@numba.njit(error_model="numpy")
def _factor(matrix, values, row, column, scaled):
    """What the codes at a row's column are multiplied by."""
    scales = get64(matrix, SCALES) + row * get64(matrix, SCALE_ROW)
    if values == FP8_CODES:
        scales = get64(matrix, SCALES) + row // 128 * get64(matrix, SCALE_ROW)
        return getf(scales + column // 128 * 4) * np.float32(FP8_FACTOR) if scaled else np.float32(1.0)
    if values < BF16_VALUES:
        return bf16_at(scales, _scale_index(get64(matrix, LAYOUT), column // BLOCK))
    return np.float32(1.0)


@numba.njit(error_model="numpy")
def _clear(block, valid, natural):
    """Zero what is beyond `valid` columns of a block: an integer's zero byte is not the number zero."""
    for column in range(valid, BLOCK):
        place = column if natural else column // 2 + 16 * (column % 2)
        zero_bytes(block + 4 * place, 4)


@numba.njit(error_model="numpy")
def _tile(path, r0, r1, r2, r3, table, at, count, blocks, sums, ahead):
    """Four rows by `count` tokens, `at` bytes into each token's inputs."""
    t = 0
    while t + 4 <= count:
        x0, x1 = get64(table, t) + at, get64(table, t + 1) + at
        x2, x3 = get64(table, t + 2) + at, get64(table, t + 3) + at
        to = sums + t * 256
        if path == BY_BF16:
            bf16_by_four(r0, r1, r2, r3, x0, x1, x2, x3, blocks, to)
        elif path == BY_FP8:
            fp8_by_four(r0, r1, r2, r3, x0, x1, x2, x3, blocks, to)
        else:
            blocks_by_four(r0, r1, r2, r3, x0, x1, x2, x3, blocks, to)
        t += 4
    while t < count:
        x0, to = get64(table, t) + at, sums + t * 256
        if path == BY_BF16:
            bf16_by_one(r0, r1, r2, r3, x0, blocks, to, ahead)
        elif path == BY_FP8:
            fp8_by_one(r0, r1, r2, r3, x0, blocks, to, ahead)
        else:
            blocks_by_one(r0, r1, r2, r3, x0, blocks, to, ahead)
        t += 1


@numba.njit(error_model="numpy")
def _scale_inputs(matrix, row, column, blocks, tokens, count, scratch):
    """FP8: this piece of each token's inputs times the scales of the rows' blocks; fills the table of copies."""
    scales = get64(matrix, SCALES) + row // 128 * get64(matrix, SCALE_ROW)
    for t in range(count):
        source = get64(tokens, t) + column * 4
        target = scratch + _INPUTS + t * blocks * BLOCK_BYTES
        set64(scratch + _TABLE + 8 * t, target)
        for i in range(blocks):
            factor = getf(scales + (column + i * BLOCK) // 128 * 4) * np.float32(FP8_FACTOR)
            scale_block(source + i * BLOCK_BYTES, factor, target + i * BLOCK_BYTES)


@numba.njit(error_model="numpy")
def _step(first, stop):
    """Between the four rows that are taken together: from each quarter of the rows one, so that memory is read in four
    long runs; where there are no quarters, the next ones."""
    return (stop - first) // 4 if (stop - first) % 4 == 0 else 1


@numba.njit(error_model="numpy")
def _first_of_four(first, stop, group):
    return first + group * (4 if (stop - first) % 4 else 1)


@numba.njit(error_model="numpy")
def _piece(matrix, first, stop, column, width, table, at, count, scratch):
    """Add columns [column, column + width) of all rows and tokens to the running sums."""
    path, columns, last = get64(matrix, PATH), get64(matrix, IN), get64(matrix, OUT) - 1
    code_row, block_bytes = get64(matrix, CODE_ROW), column_bytes(get64(matrix, VALUES))
    whole = min(width, columns - column) // BLOCK
    rest = min(width, columns - column) - whole * BLOCK
    start, step = get64(matrix, CODES) + column // BLOCK * block_bytes, _step(first, stop)
    for group in range((stop - first + 3) // 4):
        sums = scratch + _SUMS + group * TOKENS * 256
        n0 = _first_of_four(first, stop, group)
        n1, n2, n3 = min(n0 + step, last), min(n0 + 2 * step, last), min(n0 + 3 * step, last)
        if path == BY_FLOATS or (path == BY_FP8 and count >= MANY):
            made, blocks, row_bytes = scratch + _FLOATS, whole + (rest > 0), PIECE * 4
            scaled = 1 if path == BY_FLOATS else 0
            for r in range(4):
                row, to = min(n0 + r * step, last), made + r * row_bytes
                row_to_floats(matrix, row, column, blocks, to, 0, scaled, scratch + _ENDS)
            m1, m2, m3 = made + row_bytes, made + 2 * row_bytes, made + 3 * row_bytes
            _tile(BY_FLOATS, made, m1, m2, m3, table, at, count, blocks, sums, 0)
            continue
        r0, r1, r2, r3 = start + n0 * code_row, start + n1 * code_row, start + n2 * code_row, start + n3 * code_row
        _tile(path, r0, r1, r2, r3, table, at, count, whole, sums, AHEAD)
        if rest:
            ends, skip, used = scratch + _ENDS, whole * block_bytes, rest * block_bytes // BLOCK
            zero_bytes(ends, 256)
            copy_bytes(ends, r0 + skip, used)
            copy_bytes(ends + 64, r1 + skip, used)
            copy_bytes(ends + 128, r2 + skip, used)
            copy_bytes(ends + 192, r3 + skip, used)
            beyond = at + whole * BLOCK_BYTES
            _tile(path, ends, ends + 64, ends + 128, ends + 192, table, beyond, count, 1, sums, 0)


@numba.njit(error_model="numpy")
def _some_tokens(matrix, first, stop, tokens, count, outputs, base, scratch):
    """At most TOKENS tokens."""
    path, columns, groups = get64(matrix, PATH), get64(matrix, IN), (stop - first + 3) // 4
    for group in range(groups):
        zero_bytes(scratch + _SUMS + group * TOKENS * 256, count * 256)
    # one token's rows are read from end to end; for more, a piece of the inputs stays in the cache
    step = columns + BLOCK if count == 1 and path != BY_FLOATS else PIECE
    for column in range(0, columns, step):
        width = min(step, columns - column)
        if path == BY_FP8:
            _scale_inputs(matrix, first, column, (width + BLOCK - 1) // BLOCK, tokens, count, scratch)
            _piece(matrix, first, stop, column, width, scratch + _TABLE, 0, count, scratch)
        else:
            _piece(matrix, first, stop, column, width, tokens, column * 4, count, scratch)
    for group in range(groups):
        for t in range(count):
            finish_rows(scratch + _SUMS + (group * TOKENS + t) * 256, scratch + _ENDS)
            for r in range(4):
                row = _first_of_four(first, stop, group) + r * _step(first, stop)
                if row < stop:
                    setf(get64(outputs, t) + 4 * (row - base), getf(scratch + _ENDS + 4 * r))


@numba.njit(error_model="numpy")
def float_tokens(matrix, first, stop, tokens, count, outputs, base, scratch):
    """Rows [first, stop), within one block of FP8 scales, by all tokens."""
    for t in range(0, count, TOKENS):
        _some_tokens(matrix, first, stop, tokens + 8 * t, min(TOKENS, count - t), outputs + 8 * t, base, scratch)
