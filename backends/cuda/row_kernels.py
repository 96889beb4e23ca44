"""What works on rows: norm, rotation, the router's choice, the weighted sum of experts.

Invariant: a program sees one token only, and sums in an order that its width alone decides.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def rms_norm_kernel(x, weight, out, stride, width, eps, SIZE: tl.constexpr):
    """weight * x / sqrt(mean(x^2) + eps) of one row."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    row = tl.load(x + token * stride + at, mask=at < width, other=0.0)
    factor = 1.0 / tl.sqrt(tl.sum(row * row, 0) / width + eps)
    scaled = tl.load(weight + at, mask=at < width, other=0.0) * (row * factor)
    tl.store(out + token * width + at, scaled, mask=at < width)


@triton.jit
def rope_kernel(
    x, cos, sin, out, between, half, token_stride, row_stride, step, ROWS: tl.constexpr, HALF: tl.constexpr
):
    """Interleaved pairs of x [T, between, 2 * half] turned by tables [T, half]. step: from a number to its partner."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    valid = (row < between) & (pair < half)
    source = x + token * token_stride + row.to(tl.int64) * row_stride + pair * 2 * step
    even, odd = tl.load(source, mask=valid, other=0.0), tl.load(source + step, mask=valid, other=0.0)
    across = tl.load(cos + token * half + pair, mask=pair < half, other=0.0)
    along = tl.load(sin + token * half + pair, mask=pair < half, other=0.0)
    target = out + (token * between + row) * 2 * half + pair * 2
    tl.store(target, even * across - odd * along, mask=valid)
    tl.store(target + 1, even * along + odd * across, mask=valid)


@triton.jit
def combine_kernel(results, weights, shared, out, experts, width, SIZE: tl.constexpr):
    """((0 + result 0 * weight 0) + result 1 * weight 1) + ... + shared, by slots."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for slot in range(experts):
        place = results + (token * experts + slot) * width + at
        total += tl.load(place, mask=at < width, other=0.0) * tl.load(weights + token * experts + slot)
    total += tl.load(shared + token * width + at, mask=at < width, other=0.0)
    tl.store(out + token * width + at, total, mask=at < width)


@triton.jit
def rank(score):
    """An integer that orders floats as torch sorts them: NaN above all, which must reach the result."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & HIGHEST)
    return tl.where(score == score, ordered, HIGHEST)


@triton.jit
def first_of(ranks, at, SIZE: tl.constexpr):
    """The place of the highest rank, the lowest place of equal ones."""
    return tl.min(tl.where(ranks == tl.max(ranks, 0), at, SIZE), 0)


@triton.jit
def best_two(choice, inside, at, SIZE: tl.constexpr):
    """The sum of the two best scores of a group; a lone expert's own."""
    ranks = tl.where(inside, rank(choice), LOWEST)
    first = first_of(ranks, at, SIZE)
    rest = tl.where(at == first, LOWEST, ranks)
    second = first_of(rest, at, SIZE)
    others = tl.sum(inside.to(tl.int32), 0) > 1
    return tl.sum(tl.where((at == first) | ((at == second) & others), choice, 0.0), 0)


@triton.jit
def router_kernel(
    logits, bias, ids, weights, E, factor,
    ACTIVE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, NORMALIZED: tl.constexpr,
    SIZE: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """The choice of one token: ACTIVE ids in ascending order, and their weights. The bias enters the choice only."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    logit = tl.load(logits + token * E + at, mask=at < E, other=0.0)
    small = tl.exp(-tl.abs(logit))
    score = tl.where(logit >= 0, 1.0, small) / (1.0 + small)
    choice = score + tl.load(bias + at, mask=at < E, other=0.0)
    ranks = tl.where(at < E, rank(choice), LOWEST)
    if GROUPS > 1:
        g = tl.arange(0, GROUP_SIZE)
        strengths = tl.full((GROUP_SIZE,), LOWEST, tl.int32)
        for group in tl.static_range(GROUPS):
            inside = (at >= group * (E // GROUPS)) & (at < (group + 1) * (E // GROUPS))
            strengths = tl.where(g == group, rank(best_two(choice, inside, at, SIZE)), strengths)
        allowed = tl.zeros((SIZE,), tl.int1)
        for _ in tl.static_range(KEPT):
            group = first_of(strengths, g, GROUP_SIZE)
            allowed = allowed | ((at >= group * (E // GROUPS)) & (at < (group + 1) * (E // GROUPS)))
            strengths = tl.where(g == group, LOWEST, strengths)
        # what is not allowed comes behind all else, and is still there where too few are
        ranks = tl.where(allowed | (at >= E), ranks, LOWEST + 1)
    chosen = tl.zeros((SIZE,), tl.int1)
    for _ in tl.static_range(ACTIVE):
        best = first_of(ranks, at, SIZE)
        chosen = chosen | (at == best)
        ranks = tl.where(at == best, LOWEST, ranks)
    total = tl.sum(tl.where(chosen, score, 0.0), 0)
    weight = score
    if NORMALIZED:
        weight = score / (total + 1e-20)
    slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(ids + token * ACTIVE + slot, at.to(tl.int64), mask=chosen)
    tl.store(weights + token * ACTIVE + slot, weight * factor, mask=chosen)
