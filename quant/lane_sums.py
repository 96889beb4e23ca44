"""Groups of weights turned so that each has a lane of its own, and sums down 64 lanes at once, as LLVM vectors: what
the search for scales does for most of its time.

A tile float32 [places, LANES] holds a group of weights down each lane. A sum runs place after place with fused
multiply-adds, so its bits are the same on every processor. Knows nothing of what a scale is for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .llvm_vectors import FLOAT, INT, WIDTH, Vectors, generator, vector

LANES = 64
PARTS = LANES // WIDTH
# Added to a number below 2^22, it leaves the nearest integer, ties to even.
ROUNDER = 12582912.0
_FLOATS = vector(FLOAT)


@intrinsic
def turn_groups(_typing, values, first, begin, places, tile):  # type: ignore[no-untyped-def]
    """Fill tile [places, LANES] with columns begin.. of LANES groups of values float32 [., N], from group `first` on;
    places is a multiple of WIDTH, and the groups are there."""

    def body(v: Vectors) -> None:
        value_at, tile_at = v.pointer(0, FLOAT), v.pointer(4, FLOAT)
        first_, begin_, places_ = v.integer(1), v.integer(2), v.integer(3)
        b, columns = v.builder, v.length(0, 1)
        with v.loop(v.word(0), v.word(LANES), WIDTH) as lane, v.loop(v.word(0), places_, WIDTH) as place:
            start = b.add(b.mul(b.add(first_, lane), columns), b.add(begin_, place))
            rows = [v.load(value_at, b.add(start, b.mul(columns, v.word(row))), _FLOATS) for row in range(WIDTH)]
            for row, turned in enumerate(_transposed(v, rows)):
                v.store(turned, tile_at, b.add(b.mul(b.add(place, v.word(row)), v.word(LANES)), lane))

    return types.void(values, first, begin, places, tile), generator(body)


def _transposed(v: Vectors, rows: list[Any]) -> list[Any]:
    """WIDTH vectors: what was lane j of vector i is lane i of vector j. Blocks off the diagonal change places, of half
    the width first."""
    distance = WIDTH // 2
    while distance:
        upper, lower = [], []
        for lane in range(WIDTH):
            inside = lane % (2 * distance) < distance
            upper.append(lane if inside else WIDTH + lane - distance)
            lower.append(lane + distance if inside else WIDTH + lane)
        made = list(rows)
        for row in range(WIDTH):
            if row % (2 * distance) < distance:
                pair = rows[row], rows[row + distance]
                made[row] = v.builder.shuffle_vector(*pair, ir.Constant(vector(INT), upper))
                made[row + distance] = v.builder.shuffle_vector(*pair, ir.Constant(vector(INT), lower))
        rows, distance = made, distance // 2
    return rows


@intrinsic
def widen_ends(_typing, tile, places, ends):  # type: ignore[no-untyped-def]
    """Have ends float32 [2, LANES], the largest and the smallest value of each lane, take in those of a tile."""

    def loop(v: Vectors) -> None:
        b = v.builder

        def widen(found: list[Any], value: Any, _part: int, _index: Any) -> list[Any]:
            largest, smallest = found
            return [
                b.select(b.fcmp_ordered(">", value, largest), value, largest),
                b.select(b.fcmp_ordered("<", value, smallest), value, smallest),
            ]

        _down_the_lanes(v, v.pointer(0, FLOAT), v.integer(1), v.pointer(2, FLOAT), 2, widen)

    return types.void(tile, places, ends), generator(loop)


@intrinsic
def add_errors(_typing, tile, places, inverse, max_code, weights, sums):  # type: ignore[no-untyped-def]
    """Add to sums[0], float32 [1, LANES], weight * (step - code)**2 of the first `places` of tile [., LANES]: step is
    the value times inverse [LANES], code the integer nearest to it in -max_code - 1..max_code. weights is [., LANES] or
    None for 1."""

    def add(v: Vectors, sums: list[Any], value: Any, inverse: Any, code: Any, weight: Any) -> list[Any]:
        off = v.fma(value, inverse, v.builder.fneg(code))
        weighted = off if weight is None else v.builder.fmul(off, weight)
        return [v.fma(weighted, off, sums[0])]

    return types.void(tile, places, inverse, max_code, weights, sums), generator(lambda v: _sum_codes(v, 1, add))


@intrinsic
def add_products(_typing, tile, places, inverse, max_code, weights, sums):  # type: ignore[no-untyped-def]
    """Like add_errors, with sums [2, LANES]: of weight * step * code and of weight * code**2."""

    def add(v: Vectors, sums: list[Any], value: Any, inverse: Any, code: Any, weight: Any) -> list[Any]:
        weighted = code if weight is None else v.builder.fmul(code, weight)
        step = v.builder.fmul(value, inverse)
        return [v.fma(step, weighted, sums[0]), v.fma(code, weighted, sums[1])]

    return types.void(tile, places, inverse, max_code, weights, sums), generator(lambda v: _sum_codes(v, 2, add))


def _sum_codes(v: Vectors, count: int, add: Callable[..., list[Any]]) -> None:
    """add_errors and add_products but for what is added: `count` sums a lane."""
    b = v.builder
    inverse_at, weight_at = v.pointer(2, FLOAT), v.pointer(4, FLOAT)
    rounder, max_code = v.constant(FLOAT, ROUNDER), v.arguments[3]
    # the bounds of a code that the rounder was added to
    high = v.splat(b.fadd(max_code, ir.Constant(FLOAT, ROUNDER)))
    low = v.splat(b.fsub(ir.Constant(FLOAT, ROUNDER - 1), max_code))
    inverses = [v.load(inverse_at, v.word(part * WIDTH), _FLOATS) for part in range(PARTS)]

    def step(found: list[Any], value: Any, part: int, index: Any) -> list[Any]:
        code = b.fsub(v.between(v.fma(value, inverses[part], rounder), low, high), rounder)
        weight = None if weight_at is None else v.load(weight_at, index, _FLOATS)
        return add(v, found, value, inverses[part], code, weight)

    _down_the_lanes(v, v.pointer(0, FLOAT), v.integer(1), v.pointer(5, FLOAT), count, step)


def _down_the_lanes(
    v: Vectors, tile_at: Any, places: Any, sums_at: Any, count: int, step: Callable[..., list[Any]]
) -> None:
    """`count` numbers a lane, [count, LANES] at sums_at, made anew by `step` from each value of the tile's lanes."""
    b = v.builder
    slots = [v.register(v.load(sums_at, v.word(index * WIDTH), _FLOATS)) for index in range(count * PARTS)]
    with v.loop(v.word(0), places, 1) as place:
        for part in range(PARTS):
            index = b.add(b.mul(place, v.word(LANES)), v.word(part * WIDTH))
            mine = [slots[kind * PARTS + part] for kind in range(count)]
            made = step([b.load(slot) for slot in mine], v.load(tile_at, index, _FLOATS), part, index)
            for slot, value in zip(mine, made, strict=True):
                b.store(value, slot)
    for index, slot in enumerate(slots):
        v.store(b.load(slot), sums_at, v.word(index * WIDTH))
