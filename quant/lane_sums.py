"""Sums down 64 lanes at once, as LLVM vectors: what the search for scales does for most of its time.

A tile float32 [places, LANES] holds a group of weights down each lane. Written as vectors of 16 because the compiler's
own vectoriser takes half minutes for these loops and stays at half their width; a processor with shorter vectors gets
pieces of them and, place after place with fused multiply-adds, the same bits. Knows nothing of what a scale is for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 64
WIDTH = 16
# Added to a number below 2^22, it leaves the nearest integer, ties to even.
ROUNDER = 12582912.0
_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)


@intrinsic
def add_errors(_typing, tile, places, inverse, max_code, weights, sums):  # type: ignore[no-untyped-def]
    """Add to sums[0], float32 [1, LANES], weight * (step - code)**2 of the first `places` of tile [., LANES]: step is
    the value times inverse [LANES], code the integer nearest to it in -max_code - 1..max_code. weights is [., LANES] or
    None for 1."""

    def body(build: _Builder, sums: list[Any], value: Any, inverse: Any, weight: Any) -> list[Any]:
        off = build.fma(value, inverse, build.builder.fneg(build.code(value, inverse)))
        weighted = off if weight is None else build.builder.fmul(off, weight)
        return [build.fma(weighted, off, sums[0])]

    return _signature(tile, places, inverse, max_code, weights, sums), _code_generator(body, 1)


@intrinsic
def add_products(_typing, tile, places, inverse, max_code, weights, sums):  # type: ignore[no-untyped-def]
    """Like add_errors, with sums [2, LANES]: of weight * step * code and of weight * code**2."""

    def body(build: _Builder, sums: list[Any], value: Any, inverse: Any, weight: Any) -> list[Any]:
        code = build.code(value, inverse)
        weighted = code if weight is None else build.builder.fmul(code, weight)
        step = build.builder.fmul(value, inverse)
        return [build.fma(step, weighted, sums[0]), build.fma(code, weighted, sums[1])]

    return _signature(tile, places, inverse, max_code, weights, sums), _code_generator(body, 2)


class _Builder:
    def __init__(self, builder: Any, max_code: Any) -> None:
        self.builder = builder
        self.rounder = _splat(builder, ir.Constant(ir.FloatType(), ROUNDER))
        # the bounds of a code that the rounder was added to
        high = builder.fadd(max_code, ir.Constant(ir.FloatType(), ROUNDER))
        low = builder.fsub(ir.Constant(ir.FloatType(), ROUNDER - 1), max_code)
        self.high, self.low = _splat(builder, high), _splat(builder, low)
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        self._fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{WIDTH}f32")  # type: ignore[no-untyped-call]

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.builder.call(self._fma, [a, b, c])

    def code(self, value: Any, inverse: Any) -> Any:
        code = self.fma(value, inverse, self.rounder)
        code = self.builder.select(self.builder.fcmp_ordered("<", code, self.low), self.low, code)
        code = self.builder.select(self.builder.fcmp_ordered(">", code, self.high), self.high, code)
        return self.builder.fsub(code, self.rounder)


def _signature(*arguments: Any) -> Any:
    return types.void(*arguments)


def _splat(builder: Any, scalar: Any) -> Any:
    empty = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH))


def _code_generator(body: Callable[..., list[Any]], count: int) -> Callable[..., Any]:
    """The loop over places, with `count` vectors of sums for every WIDTH lanes held in registers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def data(index: int) -> Any:
            """Pointer to the first vector of a contiguous array, None for None."""
            if isinstance(signature.args[index], types.NoneType):
                return None
            pointer = context.make_array(signature.args[index])(context, builder, arguments[index]).data
            return builder.bitcast(pointer, _VECTOR.as_pointer())

        def at(pointer: Any, index: Any) -> Any:
            return builder.gep(pointer, [index])

        def load(pointer: Any, index: Any) -> Any:
            return builder.load(at(pointer, index), align=4)

        tile, inverse, weights, sums = data(0), data(2), data(4), data(5)
        places = context.cast(builder, arguments[1], signature.args[1], types.intp)
        build = _Builder(builder, arguments[3])
        integer = places.type
        parts = LANES // WIDTH
        factors = [load(inverse, ir.Constant(integer, part)) for part in range(parts)]
        slots = []
        for index in range(count * parts):
            slot = cgutils.alloca_once(builder, _VECTOR)  # type: ignore[no-untyped-call]
            builder.store(load(sums, ir.Constant(integer, index)), slot)
            slots.append(slot)
        with cgutils.for_range(builder, places, intp=integer) as loop:
            row = builder.mul(loop.index, ir.Constant(integer, parts))
            for part in range(parts):
                index = builder.add(row, ir.Constant(integer, part))
                weight = None if weights is None else load(weights, index)
                mine = [slots[kind * parts + part] for kind in range(count)]
                made = body(build, [builder.load(slot) for slot in mine], load(tile, index), factors[part], weight)
                for slot, value in zip(mine, made, strict=True):
                    builder.store(value, slot)
        for index, slot in enumerate(slots):
            builder.store(builder.load(slot), at(sums, ir.Constant(integer, index)), align=4)
        return context.get_dummy_value()

    return generate
