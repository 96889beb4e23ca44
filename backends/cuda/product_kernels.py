"""Products of a weight and tokens: one kernel for one token and for thousands, in every stored format.

Invariant: an output is 0 + p_0 + p_1 + ..., p_s the sum over split s of the columns. Few tokens make the p_s side by
side and add them after (SEPARATE); many make them one after the other. The bits are the same. No atomics.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .codes import add_slice, prepared_place, rounded, row_start, scale_row, silu


@triton.jit
def prepare_kernel(x, out, stride, K, FORMAT: tl.constexpr, SIZE: tl.constexpr):
    """Rows of float32 as products take them: BF16 [T, K], laid out by `prepared_place`."""
    token = tl.program_id(0)
    k = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    values = tl.load(x + token.to(tl.int64) * stride + k, mask=k < K, other=0.0)
    tl.store(out + token.to(tl.int64) * K + prepared_place(k, K, FORMAT), rounded(values), mask=k < K)


@triton.jit
def prepare_silu_kernel(gate, up, out, K, FORMAT: tl.constexpr, SIZE: tl.constexpr):
    """silu(gate) * up, prepared; gate and up are [T, K], contiguous."""
    row = tl.program_id(0).to(tl.int64) * K
    k = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    value = silu(tl.load(gate + row + k, mask=k < K, other=0.0)) * tl.load(up + row + k, mask=k < K, other=0.0)
    tl.store(out + row + prepared_place(k, K, FORMAT), rounded(value), mask=k < K)


@triton.jit
def linear_kernel(
    x, weight, scales, out, T, N, K, x_stride, split_columns,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr, EVEN: tl.constexpr,
    OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr, SEPARATE: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, K] W^T, or the sums of the splits [SPLITS, T, N] where SEPARATE. STEP: columns at once."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = tl.minimum(n, N - 1)
    rows, scale_rows = row_start(row, K, FORMAT), scale_row(row, K, FORMAT, GROUP, ONE_SCALE)
    x_rows = t.to(tl.int64) * x_stride
    first = tl.program_id(2) * split_columns
    total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for split in range(1 if SEPARATE else SPLITS):
        begin = first + split * split_columns
        acc = tl.zeros((OUTPUTS, TOKENS), tl.float32)
        for k in range(begin, tl.minimum(begin + split_columns, K), STEP):
            for part in tl.static_range(STEP // GROUP):
                acc = add_slice(
                    acc, x, x_rows, t < T, weight, rows, scales, scale_rows, k + part * GROUP, K,
                    FORMAT, GROUP, ONE_SCALE, EVEN,
                )  # fmt: skip
        total += acc
    place = out + tl.program_id(2).to(tl.int64) * T * N + t.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(place, total, mask=(n < N)[:, None] & (t < T)[None, :])


@triton.jit
def add_splits_kernel(parts, out, count, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """out [count] = parts [SPLITS, count] summed, the first split first."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * count.to(tl.int64) + at, mask=at < count, other=0.0)
    tl.store(out + at, total, mask=at < count)
