"""32 rows of an integer matrix times some tokens: four rows at a time for few tokens, panels for many.

Invariant: both ways give a row and a token the same bits (int_tiles.py). Ends of rows and of the matrix are copied to
scratch and filled up with zeros; nothing beyond a tensor is read.
"""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

import numba

from .activations import CHUNK, CHUNK_BYTES
from .float_tiles import bf16_at
from .int_tiles import (
    G32,
    G64,
    G128,
    PANEL_ROWS,
    PANEL_TOKENS,
    finish_four,
    finish_panel,
    four_rows4,
    four_rows8,
    interleave_scales,
    interleave_words,
    panel_tokens4,
    panel_tokens8,
)
from .matrix import BY_INT4, CODE_ROW, CODES, IN, LAYOUT, OUT, PATH, SCALE_ROW, SCALES
from .pointers import ask_for, copy_bytes, get64, getf, set64, setf, zero_bytes

ROWS = 32  # of a task
AHEAD = 4096  # bytes of a row that are asked for before they are needed, at most
FEW_TOKENS = 4  # up to so many, rows are taken as they lie
# Scratch: running sums, addresses, the ends of rows; then a panel and its scales.
_SUMS, _TABLE, _ROWS, _ENDS, _END_SCALES, _PANEL = 0, 2048, 2560, 3072, 5120, 5632


def int_scratch_bytes(columns: int) -> int:
    chunks = -(-columns // CHUNK)
    return _PANEL + chunks * (CHUNK * PANEL_ROWS + 4 * 64 * 1)


@numba.njit(error_model="numpy")
def _scale_index(layout, group):
    if layout == G32:
        return group
    if layout == G64:
        return group // 2
    return group // 4 if layout == G128 else 0


@numba.njit(error_model="numpy")
def _copy_ends(matrix, row, step, count, scratch):
    """The last, partial chunk of `count` rows from `row` on, `step` apart, the last one repeated past the matrix's
    end."""
    columns, last = get64(matrix, IN), get64(matrix, OUT) - 1
    bits = 4 if get64(matrix, PATH) == BY_INT4 else 8
    full = columns // CHUNK
    chunk_bytes = CHUNK * bits // 8
    for r in range(count):
        at = min(row + r * step, last)
        codes = get64(matrix, CODES) + at * get64(matrix, CODE_ROW) + full * chunk_bytes
        scales = get64(matrix, SCALES) + at * get64(matrix, SCALE_ROW)
        zero_bytes(scratch + _ENDS + r * chunk_bytes, chunk_bytes)
        copy_bytes(scratch + _ENDS + r * chunk_bytes, codes, (columns - full * CHUNK) * bits // 8)
        zero_bytes(scratch + _END_SCALES + 8 * r, 8)
        for group in range((columns - full * CHUNK + 31) // 32):
            source = scales + 2 * _scale_index(get64(matrix, LAYOUT), full * 4 + group)
            copy_bytes(scratch + _END_SCALES + 8 * r + 2 * group, source, 2)


@numba.njit(error_model="numpy")
def _four_apart(matrix, row, step, ahead, tokens, count, outputs, base, scratch):
    """Rows row, row + step, ... by all tokens; step 0: one row. The rows `ahead` of them are asked for meanwhile, or of
    long rows what comes next."""
    bits4 = get64(matrix, PATH) == BY_INT4
    columns, layout = get64(matrix, IN), get64(matrix, LAYOUT)
    code_row, scale_row = get64(matrix, CODE_ROW), get64(matrix, SCALE_ROW)
    codes, scales = get64(matrix, CODES) + row * code_row, get64(matrix, SCALES) + row * scale_row
    code_step, scale_step = step * code_row, step * scale_row
    full, end = columns // CHUNK, scratch + _ENDS
    if full * CHUNK < columns:
        _copy_ends(matrix, row, step, 4, scratch)
    if ahead:
        for r in range(4):
            for line in range(0, scale_row, 64):
                ask_for(scales + r * scale_step + ahead * scale_row + line)
    ahead = min(ahead * code_row, AHEAD) if code_row > AHEAD else ahead * code_row
    for t in range(count):
        x = get64(tokens, t)
        zero_bytes(scratch + _SUMS, 64)
        if bits4:
            four_rows4(codes, code_step, scales, scale_step, x, full, layout, scratch + _SUMS, ahead)
        else:
            four_rows8(codes, code_step, scales, scale_step, x, full, layout, scratch + _SUMS, ahead)
        ahead = 0
        if full * CHUNK < columns:
            x += full * CHUNK_BYTES
            if bits4:
                four_rows4(end, 64, scratch + _END_SCALES, 8, x, 1, G32, scratch + _SUMS, 0)
            else:
                four_rows8(end, 128, scratch + _END_SCALES, 8, x, 1, G32, scratch + _SUMS, 0)
        totals = scratch + _SUMS + 64
        finish_four(scratch + _SUMS, totals)
        output = get64(outputs, t) + 4 * (row - base)
        for r in range(4 if step else 1):
            setf(output + 4 * r * step, getf(totals + 4 * r))


@numba.njit(error_model="numpy")
def few_tokens(matrix, first, stop, tokens, count, outputs, base, scratch):
    """Rows [first, stop), each of four from its own quarter: so memory is read in four long runs, which the processor's
    own prefetch follows; it stops at a page's end, and ours goes on."""
    each = (stop - first) // 4
    for k in range(each):
        ahead = 1 if k + 1 < each else 3 * each + 1  # then the next task's rows
        if first + k + 3 * each + ahead >= get64(matrix, OUT):
            ahead = 0
        _four_apart(matrix, first + k, each, ahead, tokens, count, outputs, base, scratch)
    for row in range(first + 4 * each, stop):
        _four_apart(matrix, row, 0, 0, tokens, count, outputs, base, scratch)


@numba.njit(error_model="numpy")
def _build_panel(matrix, row, scratch, scales_at):
    """16 rows from `row` on, word by word, and their scales as floats."""
    columns, last, layout = get64(matrix, IN), get64(matrix, OUT) - 1, get64(matrix, LAYOUT)
    chunk_bytes = 64 if get64(matrix, PATH) == BY_INT4 else 128
    full = columns // CHUNK
    panel, table = scratch + _PANEL, scratch + _ROWS
    for r in range(PANEL_ROWS):
        set64(table + 8 * r, get64(matrix, CODES) + min(row + r, last) * get64(matrix, CODE_ROW))
    for piece in range(full * chunk_bytes // 64):
        interleave_words(table, piece * 64, panel + piece * 1024)
    for r in range(PANEL_ROWS):
        set64(table + 8 * r, get64(matrix, SCALES) + min(row + r, last) * get64(matrix, SCALE_ROW))
    known = 0
    if layout == G32:
        known = full * 4 // 32 * 32
        for piece in range(known // 32):
            interleave_scales(table, piece * 64, scales_at + piece * 2048)
    for group in range(known, full * 4):
        index = _scale_index(layout, group)
        for r in range(PANEL_ROWS):
            setf(scales_at + group * 64 + 4 * r, bf16_at(get64(table, r), index))
    if full * CHUNK < columns:
        _copy_ends(matrix, row, 1, PANEL_ROWS, scratch)
        for r in range(PANEL_ROWS):
            set64(table + 8 * r, scratch + _ENDS + r * chunk_bytes)
        for piece in range(chunk_bytes // 64):
            interleave_words(table, piece * 64, panel + (full * chunk_bytes // 64 + piece) * 1024)
        for group in range(4):
            for r in range(PANEL_ROWS):
                scale = bf16_at(scratch + _END_SCALES + 8 * r, group)
                setf(scales_at + (full * 4 + group) * 64 + 4 * r, scale)


@numba.njit(error_model="numpy")
def many_tokens(matrix, first, stop, tokens, count, outputs, base, scratch):
    """Rows [first, stop) in panels, each by eight tokens at a time."""
    bits4 = get64(matrix, PATH) == BY_INT4
    chunks = (get64(matrix, IN) + CHUNK - 1) // CHUNK
    panel, sums, table = scratch + _PANEL, scratch + _SUMS, scratch + _TABLE
    scales = panel + chunks * CHUNK * PANEL_ROWS // (2 if bits4 else 1)
    for row in range(first, stop, PANEL_ROWS):
        _build_panel(matrix, row, scratch, scales)
        for t in range(0, count, PANEL_TOKENS):
            for i in range(PANEL_TOKENS):
                set64(table + 8 * i, get64(tokens, min(t + i, count - 1)))
            for group in range(4):
                if bits4:
                    panel_tokens4(panel, scales, table, chunks, group, sums + 512 * group)
                else:
                    panel_tokens8(panel, scales, table, chunks, group, sums + 512 * group)
            for i in range(min(PANEL_TOKENS, count - t)):
                output = get64(outputs, t + i) + 4 * (row - base)
                finish_panel(sums + 64 * i, 512, output, min(PANEL_ROWS, stop - row))
