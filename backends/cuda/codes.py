"""How stored bytes become numbers, and the one product that every kernel is made of: pieces of functions in Triton.

Invariant: codes become BF16 exactly, scales multiply float32 sums, so only activations are rounded. Triton's
interpreter has no BF16 arithmetic; INTERPRETED widens to float32 what is BF16 already, which changes no value.

Shapes in kernels: N outputs (rows of a weight), K inputs (its columns), T tokens.
"""

# mypy: ignore-errors
# (Triton finds the types of what it compiles)

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
BF16_128 = tl.constexpr(0x4300)  # 128.0: its last 7 bits are ones, so that 128 + code is an OR
FLOAT_2_23 = tl.constexpr(0x4B000000)  # 2^23, likewise with 23 bits
FP8_REBIAS = tl.constexpr(2.0**120)  # between the exponents' biases of E4M3 and BF16
BLOCK = tl.constexpr(128)


@triton.jit
def rounded(x):
    """float32 to BF16, the nearest even. (The interpreter's own conversion loses carries.)"""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = nearest.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(tl.bfloat16)
    return result


@triton.jit
def remainder(x):
    """What `rounded` left of x, in BF16: both together hold 16 bits of it."""
    return rounded(x - rounded(x).to(tl.float32))


@triton.jit
def computable(x):
    """BF16 in a type that this machine adds and multiplies."""
    if INTERPRETED:
        result = x.to(tl.float32)
    else:
        result = x
    return result


@triton.jit
def product(a, b, total):
    """total + a b for BF16 (or numbers made by `computable`), in float32."""
    return tl.dot(computable(a), computable(b), total)


@triton.jit
def from_bits(bits):
    return computable(bits.to(tl.int16).to(tl.bfloat16, bitcast=True))


@triton.jit
def nibble(bits):
    """4-bit codes, stored plus 8, exactly."""
    return from_bits(bits | BF16_128) - 136.0


@triton.jit
def int8_code(stored):
    """8-bit codes, stored plus 128, exactly: BF16 holds all integers to 256."""
    value = (stored.to(tl.int32) | FLOAT_2_23).to(tl.float32, bitcast=True) - 8388736.0
    return computable(rounded(value))


@triton.jit
def fp8_code(stored):
    """E4M3 exactly, subnormal numbers included; 0x7F and 0xFF are NaN. Works on cards without FP8 too."""
    wide = stored.to(tl.int32)
    magnitude = wide & 0x7F
    bits = ((wide & 0x80) << 8) | (magnitude << 4)
    bits = tl.where(magnitude == 0x7F, 0x7FC0, bits)
    return from_bits(bits) * FP8_REBIAS


@triton.jit
def scale_column(k, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr):
    """Which of a row's scales belongs to column k."""
    if ONE_SCALE:
        column = 0 * k
    else:
        column = k // GROUP
    return column


@triton.jit
def load_weight(where, inside, EVEN: tl.constexpr):
    if EVEN:
        stored = tl.load(where)
    else:
        stored = tl.load(where, mask=inside, other=0)
    return stored


@triton.jit
def add_slice(
    acc, x, x_rows, x_valid, weight, rows, scales, scale_rows, k, K,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """acc [N, T] + W[:, k : k + GROUP] x[:, k : k + GROUP]^T, one scale a row and slice. The order of sums depends on
    formats alone, never on T: this is what makes a token's bits its own.

    rows, scale_rows, x_rows: offsets of rows, in elements. x: BF16 as `prepare` lays it out, float32 for "exact".
    EVEN: K is a multiple of what is taken at once, so that no mask is needed."""
    if FORMAT == "int4":
        column = tl.arange(0, GROUP // 2)
        at = k // 2 + column
        inside = (k + 2 * column) < K
        stored = load_weight(weight + rows[:, None] + at[None, :], inside[None, :], EVEN)
        where = x + x_rows[None, :] + at[:, None]
        valid = x_valid[None, :] if EVEN else x_valid[None, :] & inside[:, None]
        even = tl.load(where, mask=valid, other=0.0)
        odd = tl.load(where + K // 2, mask=valid, other=0.0)
        wide = stored.to(tl.int16)
        part = product(nibble(wide & 15), even, tl.zeros_like(acc))
        part = product(nibble(wide >> 4), odd, part)
    else:
        at = k + tl.arange(0, GROUP)
        inside = at < K
        stored = load_weight(weight + rows[:, None] + at[None, :], inside[None, :], EVEN)
        valid = x_valid[None, :] if EVEN else x_valid[None, :] & inside[:, None]
        given = tl.load(x + x_rows[None, :] + at[:, None], mask=valid, other=0.0)
        if FORMAT == "exact":
            acc = tl.dot(stored.to(tl.float32), given, acc, input_precision="ieee")
        elif FORMAT == "bf16":
            acc = product(stored, given, acc)
        elif FORMAT == "int8":
            part = product(int8_code(stored), given, tl.zeros_like(acc))
        else:
            part = product(fp8_code(stored), given, tl.zeros_like(acc))
    if FORMAT != "exact" and FORMAT != "bf16":
        # a slice behind the last column multiplies zeros: any scale will do that exists
        column = scale_column(k if EVEN else tl.minimum(k, K - 1), GROUP, ONE_SCALE)
        acc += part * tl.load(scales + scale_rows + column).to(tl.float32)[:, None]
    return acc


@triton.jit
def weight_tile(
    weight, rows, scales, scale_rows, columns, valid,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr,
):  # fmt: skip
    """Dequantized values, float32 [rows, columns]; `rows`, `scale_rows` [n, 1] are offsets, `columns` is [1, m]."""
    if FORMAT == "int4":
        stored = tl.load(weight + rows + columns // 2, mask=valid, other=0).to(tl.int16)
        value = nibble((stored >> (4 * (columns % 2)).to(tl.int16)) & 15).to(tl.float32)
    else:
        stored = tl.load(weight + rows + columns, mask=valid, other=0)
        if FORMAT == "int8":
            value = int8_code(stored).to(tl.float32)
        elif FORMAT == "fp8":
            value = fp8_code(stored).to(tl.float32)
        else:
            value = stored.to(tl.float32)
    if FORMAT != "exact" and FORMAT != "bf16":
        scale = tl.load(scales + scale_rows + scale_column(columns, GROUP, ONE_SCALE), mask=valid, other=0.0)
        value = value * scale.to(tl.float32)
    return value


@triton.jit
def scale_row(row, K, FORMAT: tl.constexpr, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr):
    """Where the scales of rows begin. FP8 has one row of scales for 128 rows."""
    if ONE_SCALE:
        first = row
    elif FORMAT == "fp8":
        first = row // BLOCK * tl.cdiv(K, BLOCK)
    else:
        first = row * (K // GROUP)
    return first


@triton.jit
def row_start(row, K, FORMAT: tl.constexpr):
    """Where rows of stored elements begin: bytes of two codes for INT4."""
    if FORMAT == "int4":
        first = row.to(tl.int64) * (K // 2)
    else:
        first = row.to(tl.int64) * K
    return first


@triton.jit
def prepared_place(k, K, FORMAT: tl.constexpr):
    """Where `prepare` puts input k: for INT4 even inputs come first, then odd ones, as a byte's two codes meet them."""
    if FORMAT == "int4":
        place = k % 2 * (K // 2) + k // 2
    else:
        place = k
    return place


@triton.jit
def prepared(x, FORMAT: tl.constexpr):
    """Activations as a product with such a weight takes them."""
    if FORMAT == "exact":
        result = x
    else:
        result = rounded(x)
    return result


@triton.jit
def silu(x):
    """x / (1 + e^-x), without overflow."""
    small = tl.exp(-tl.abs(x))
    return x * (tl.where(x >= 0, 1.0, small) / (1.0 + small))
