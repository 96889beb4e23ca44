"""Feed-forward blocks of many experts in two jobs: gate and up with what lies between them and down, then down.

A task of the first job is 32 of an expert's inner units for all its tokens, exactly one group of the inputs of `down`,
so it prepares that group itself. Invariant: an expert's result depends on its own tokens only, each by itself.
"""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

from functools import cache

from numba import types
from numba.extending import intrinsic

from .activations import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    FLOAT,
    INT4,
    INT8,
    quantize_group4,
    quantize_group8,
    spread_block,
    spread_block_rounded,
)
from .compiler import kernel
from .functions import silu
from .int_linear import ROWS
from .multiply import multiply_scratch_bytes
from .pointers import call7, get64, set64
from .vector import F32X16, load, offset, store

# An expert's entry, 64-bit integers: addresses of its three matrices, how many tokens, their rows and slots (0: rows 0,
# 1, ..., slot 0), how many tokens all experts before it have; the tables of prepared inputs, of results and of prepared
# inner values, and the first of those.
GATE, UP, DOWN, COUNT, TOKEN_ROWS, SLOTS, BEFORE, INPUTS, RESULTS, INNER_TABLE, INNER, ENTRY = range(12)
TOKENS = 256  # that a task takes at once
_GATES, _UPS, _TABLES, _MULTIPLY = 0, TOKENS * 128, TOKENS * 256, TOKENS * 272


@cache
def expert_scratch_bytes(hidden: int, width: int) -> int:
    return _MULTIPLY + multiply_scratch_bytes(max(hidden, width))


@intrinsic
def silu_times(typingctx, gate, up, target):
    """32 floats silu(gate) * up; target may be one of the two."""

    def codegen(context, b, _signature, arguments):
        for place in (0, 64):
            gate, up = (load(b, offset(b, address, place), F32X16) for address in arguments[:2])
            store(b, offset(b, arguments[2], place), b.fmul(silu(b, gate), up))
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3), codegen


# arguments: entries, first prepared input, bytes of one, whether inputs lie by expert (else by token), first result,
# bytes from token to token, from slot to slot, bytes of an inner row
@kernel(3)
def place_tokens(arguments, task, _scratch):
    """Fill an expert's tables."""
    entry = get64(arguments, 0) + task * (8 * ENTRY)
    for i in range(get64(entry, COUNT)):
        row, slot = i, 0
        if get64(entry, TOKEN_ROWS):
            row, slot = get64(get64(entry, TOKEN_ROWS), i), get64(get64(entry, SLOTS), i)
        prepared = get64(entry, BEFORE) + i if get64(arguments, 3) else row
        set64(get64(entry, INPUTS) + 8 * i, get64(arguments, 1) + prepared * get64(arguments, 2))
        result = get64(arguments, 4) + row * get64(arguments, 5) + slot * get64(arguments, 6)
        set64(get64(entry, RESULTS) + 8 * i, result)
        set64(get64(entry, INNER_TABLE) + 8 * i, get64(entry, INNER) + i * get64(arguments, 7))


# arguments: multiply, entries, tasks of an expert, width, how inner values are prepared, bytes of a prepared row,
# groups of one
@kernel(3)
def gate_up(arguments, task, scratch):
    """silu(gate x) * (up x) of 32 inner units, prepared for `down`."""
    function, blocks = get64(arguments, 0), get64(arguments, 2)
    entry, block = get64(arguments, 1) + task // blocks * (8 * ENTRY), task % blocks
    width, how = get64(arguments, 3), get64(arguments, 4)
    valid, groups = width - block * ROWS, 1
    if block == blocks - 1:
        groups = get64(arguments, 6) - block  # the last one fills up the row with zeros
    for begin in range(0, get64(entry, COUNT), TOKENS):
        count = min(TOKENS, get64(entry, COUNT) - begin)
        for t in range(count):
            set64(scratch + _TABLES + 8 * t, scratch + _GATES + 128 * t)
            set64(scratch + _TABLES + 8 * (TOKENS + t), scratch + _UPS + 128 * t)
        inputs = get64(entry, INPUTS) + 8 * begin
        first = block * ROWS
        call7(function, get64(entry, GATE), first, inputs, count, scratch + _TABLES, first, scratch + _MULTIPLY)
        call7(
            function, get64(entry, UP), first, inputs, count, scratch + _TABLES + 8 * TOKENS, first, scratch + _MULTIPLY
        )
        for t in range(count):
            values = scratch + _GATES + 128 * t
            silu_times(values, scratch + _UPS + 128 * t, values)
            row = get64(entry, INNER) + (begin + t) * get64(arguments, 5)
            for group in range(groups):
                at, rest = block + group, valid - group * ROWS
                if how == INT4:
                    quantize_group4(values, rest, row + at // 4 * CHUNK_BYTES, at % 4)
                elif how == INT8:
                    quantize_group8(values, rest, row + at // 4 * CHUNK_BYTES, at % 4)
                elif how == FLOAT:
                    spread_block(values, rest, row + at * BLOCK_BYTES)
                else:
                    spread_block_rounded(values, rest, row + at * BLOCK_BYTES)


# arguments: multiply, entries, tasks of an expert
@kernel(3)
def down(arguments, task, scratch):
    """32 outputs of an expert for all its tokens."""
    blocks = get64(arguments, 2)
    entry, first = get64(arguments, 1) + task // blocks * (8 * ENTRY), task % blocks * ROWS
    tokens, results = get64(entry, INNER_TABLE), get64(entry, RESULTS)
    call7(get64(arguments, 0), get64(entry, DOWN), first, tokens, get64(entry, COUNT), results, 0, scratch + _MULTIPLY)


# arguments: rows of gates, rows of ups, results, units in a row
@kernel(3)
def silu_rows(arguments, task, _scratch):
    """silu(gate) * up of 32 units of a row; rows are padded to whole blocks of 32."""
    at = task * 128
    silu_times(get64(arguments, 0) + at, get64(arguments, 1) + at, get64(arguments, 2) + at)
