"""MLA in the absorbed form over float32 latent caches, for one new token and for a prompt's.

In four steps: queries meet the key rows of kv_b (absorb), scores and sums over pieces of the cache (score), the pieces
together (merge), sums meet the value rows (values). Invariant: a piece begins at a fixed place of the sequence and a
token's pieces are merged in their order, so its bits depend neither on its chunk nor on its batch. No atomics.

Shapes: T tokens, H heads, R latent width, P rotary width, S pieces; HEADS, WIDTH, ROTARY, NOPE are those of a tile.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .codes import add_slice, prepared, prepared_place, product, remainder, rounded, row_start, scale_row, weight_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def absorb_kernel(
    q, weight, scales, out, T, H, nope, value, R, token_stride, head_stride,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr,
    NOPE: tl.constexpr, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out BF16 [T, H, R]: queries [T, H, nope] times the key rows of kv_b [H * (nope + value), R].

    A scale belongs to a row, which is summed over here, so values are made before they multiply, in TF32."""
    head = tl.program_id(1)
    r = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, NOPE)
    row = head * (nope + value) + tl.minimum(d, nope - 1)[None, :]
    first, scale_first = row_start(row, R, FORMAT), scale_row(row, R, FORMAT, GROUP, ONE_SCALE)
    valid = (d < nope)[None, :] & (r < R)[:, None]
    keys = weight_tile(weight, first, scales, scale_first, r[:, None], valid, FORMAT, GROUP, ONE_SCALE)
    place = q + t.to(tl.int64)[None, :] * token_stride + head * head_stride + d[:, None]
    queries = tl.load(place, mask=(t < T)[None, :] & (d < nope)[:, None], other=0.0)
    absorbed = tl.dot(keys, queries, input_precision="tf32")
    place = out + (t.to(tl.int64)[None, :] * H + head) * R + r[:, None]
    tl.store(place, rounded(absorbed), mask=(t < T)[None, :] & (r < R)[:, None])


@triton.jit
def score_kernel(
    q, q_rope, caches, sums, tops, weights, H, R, P, pieces, scale, token_stride, head_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr, STEP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One piece of a token's cache: sums [T, S, H, R] of its latents by e^(score - top), the tops and the weights' sums
    [T, S, H].

    q BF16 [T, H, R]; q_rope float32 [T, H, P]; caches int64 [T, 3]: address of a cache [N, R + P], floats from row to
    row, rows that the token may see."""
    token, piece = tl.program_id(0), tl.program_id(2)
    seen = tl.load(caches + 3 * token + 2).to(tl.int32)
    if piece * PIECE >= seen:
        return
    cache = tl.load(caches + 3 * token).to(tl.pointer_type(tl.float32))
    stride = tl.load(caches + 3 * token + 1)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    r, p = tl.arange(0, WIDTH), tl.arange(0, ROTARY)
    row = (token.to(tl.int64) * H + h)[:, None]
    known = (h < H)[:, None]
    query = tl.load(q + row * R + r[None, :], mask=known & (r < R)[None, :], other=0.0)
    place = q_rope + token.to(tl.int64) * token_stride + h[:, None] * head_stride + p[None, :]
    turned = tl.load(place, mask=known & (p < P)[None, :], other=0.0)
    turned, turned_rest = rounded(turned), remainder(turned)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    weight = tl.zeros((HEADS,), tl.float32)
    total = tl.zeros((HEADS, WIDTH), tl.float32)
    for begin in range(piece * PIECE, tl.minimum(piece * PIECE + PIECE, seen), STEP):
        n = begin + tl.arange(0, STEP)
        rows, there = cache + n.to(tl.int64)[:, None] * stride, (n < seen)[:, None]
        latent = rounded(tl.load(rows + r[None, :], mask=there & (r < R)[None, :], other=0.0))
        # no norm bounds a rotary key, and a score's error is its chance's factor: 16 bits of both sides
        rotary = tl.load(rows + R + p[None, :], mask=there & (p < P)[None, :], other=0.0)
        rotary, rotary_rest = rounded(rotary), remainder(rotary)
        scores = product(query, tl.trans(latent), tl.zeros((HEADS, STEP), tl.float32))
        scores = product(turned_rest, tl.trans(rotary), scores)
        scores = product(turned, tl.trans(rotary_rest), scores)
        scores = product(turned, tl.trans(rotary), scores) * (scale * LOG2_E)
        scores = tl.where((n < seen)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - higher)
        chances = tl.exp2(scores - higher[:, None])
        weight = weight * shrink + tl.sum(chances, 1)
        total = product(rounded(chances), latent, total * shrink[:, None])
        top = higher
    slot = (token.to(tl.int64) * pieces + piece) * H + h
    tl.store(sums + slot[:, None] * R + r[None, :], total, mask=known & (r < R)[None, :])
    tl.store(tops + slot, top, mask=h < H)
    tl.store(weights + slot, weight, mask=h < H)


@triton.jit
def merge_kernel(
    caches, sums, tops, weights, out, H, R, pieces,
    FORMAT: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The mean of a head's latents, prepared for the value rows: [T, H, R]."""
    token, head = tl.program_id(0), tl.program_id(1)
    seen = tl.load(caches + 3 * token + 2).to(tl.int32)
    r = tl.arange(0, WIDTH)
    first = token.to(tl.int64) * pieces * H + head
    top, weight = tl.load(tops + first), tl.load(weights + first)
    total = tl.load(sums + first * R + r, mask=r < R, other=0.0)
    for piece in range(1, tl.cdiv(seen, PIECE)):
        slot = first + piece * H
        other = tl.load(tops + slot)
        higher = tl.maximum(top, other)
        mine, theirs = tl.exp2(top - higher), tl.exp2(other - higher)
        weight = weight * mine + tl.load(weights + slot) * theirs
        total = total * mine + tl.load(sums + slot * R + r, mask=r < R, other=0.0) * theirs
        top = higher
    place = out + (token.to(tl.int64) * H + head) * R + prepared_place(r, R, FORMAT)
    tl.store(place, prepared(total / weight, FORMAT), mask=r < R)


@triton.jit
def values_kernel(
    mixed, weight, scales, out, T, H, nope, value, R,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr, EVEN: tl.constexpr,
    OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out [T, H, value]: the value rows of kv_b times the mixed latents [T, H, R], prepared."""
    head = tl.program_id(1)
    v = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    row = head * (nope + value) + nope + tl.minimum(v, value - 1)
    rows, scale_rows = row_start(row, R, FORMAT), scale_row(row, R, FORMAT, GROUP, ONE_SCALE)
    x_rows = (t.to(tl.int64) * H + head) * R
    acc = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for k in range(0, R, STEP):
        for part in tl.static_range(STEP // GROUP):
            acc = add_slice(
                acc, mixed, x_rows, t < T, weight, rows, scales, scale_rows, k + part * GROUP, R,
                FORMAT, GROUP, ONE_SCALE, EVEN,
            )  # fmt: skip
    place = out + (t.to(tl.int64)[None, :] * H + head) * value + v[:, None]
    tl.store(place, acc, mask=(v < value)[:, None] & (t < T)[None, :])
