"""Feed-forward blocks of many experts: gate and up with what lies between them and down, then down.

Experts are addresses in a table and work is a list of tiles, both read from memory, so one captured graph serves any
state of a cache; a tile without rows ends at once. One kernel for decode and prefill, which differ in TOKENS.
A tile is (expert, first assignment, assignments); an assignment is a token and a place in the result.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .codes import add_slice, prepared_place, rounded, row_start, scale_row, silu

MATRICES = tl.constexpr(6)  # addresses of an expert: codes and scales of gate, up, down


@triton.jit
def address(table, expert, which: tl.constexpr, DTYPE: tl.constexpr):
    """The part of an expert at place `which` of its row, which begins on a multiple of 16 bytes."""
    place = tl.load(table + expert * MATRICES + which)
    return tl.multiple_of(place.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def gate_up_kernel(
    x, table, tiles, tokens, inner, F, K,
    DTYPE: tl.constexpr, SCALE_DTYPE: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr, EVEN: tl.constexpr, DOWN_FORMAT: tl.constexpr,
    OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """inner [A, F] = silu(gate x) * (up x) as `down` takes it, for the assignments of a tile; x is [T, K], prepared."""
    tile = tiles + 3 * tl.program_id(1)
    count = tl.load(tile + 2)
    if count == 0:
        return
    expert, first = tl.load(tile), tl.load(tile + 1)
    n, t = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, TOKENS)
    row = tl.minimum(n, F - 1)
    rows, scale_rows = row_start(row, K, FORMAT), scale_row(row, K, FORMAT, GROUP, ONE_SCALE)
    x_rows = tl.load(tokens + first + t, mask=t < count, other=0).to(tl.int64) * K
    gates, gate_scales = address(table, expert, 0, DTYPE), address(table, expert, 1, SCALE_DTYPE)
    ups, up_scales = address(table, expert, 2, DTYPE), address(table, expert, 3, SCALE_DTYPE)
    gate = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    up = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for k in range(0, K, STEP):
        for part in tl.static_range(STEP // GROUP):
            at = k + part * GROUP
            gate = add_slice(
                gate, x, x_rows, t < count, gates, rows, gate_scales, scale_rows, at, K, FORMAT, GROUP, ONE_SCALE, EVEN
            )
            up = add_slice(
                up, x, x_rows, t < count, ups, rows, up_scales, scale_rows, at, K, FORMAT, GROUP, ONE_SCALE, EVEN
            )
    place = inner + (first + t).to(tl.int64)[None, :] * F + prepared_place(n, F, DOWN_FORMAT)[:, None]
    tl.store(place, rounded(silu(gate) * up), mask=(n < F)[:, None] & (t < count)[None, :])


@triton.jit
def down_kernel(
    inner, table, tiles, places, out, D, K,
    DTYPE: tl.constexpr, SCALE_DTYPE: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr, EVEN: tl.constexpr,
    OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out [places, D] = down of inner [A, K], each assignment at its own place."""
    tile = tiles + 3 * tl.program_id(1)
    count = tl.load(tile + 2)
    if count == 0:
        return
    expert, first = tl.load(tile), tl.load(tile + 1)
    n, t = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, TOKENS)
    row = tl.minimum(n, D - 1)
    rows, scale_rows = row_start(row, K, FORMAT), scale_row(row, K, FORMAT, GROUP, ONE_SCALE)
    x_rows = (first + t).to(tl.int64) * K
    codes, scales = address(table, expert, 4, DTYPE), address(table, expert, 5, SCALE_DTYPE)
    acc = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for k in range(0, K, STEP):
        for part in tl.static_range(STEP // GROUP):
            acc = add_slice(
                acc, inner, x_rows, t < count, codes, rows, scales, scale_rows, k + part * GROUP, K,
                FORMAT, GROUP, ONE_SCALE, EVEN,
            )  # fmt: skip
    place = tl.load(places + first + t, mask=t < count, other=0).to(tl.int64)
    tl.store(out + place[None, :] * D + n[:, None], acc, mask=(n < D)[:, None] & (t < count)[None, :])
