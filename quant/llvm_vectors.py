"""LLVM vectors of WIDTH numbers inside Numba kernels: loads, constants, fused multiply-adds, loops with registers.

For the few loops that the compiler's own vectoriser does badly. A processor with shorter vectors gets pieces of them
and the same bits: nothing here reorders a sum. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

WIDTH = 16
FLOAT, DOUBLE, INT, BYTE = ir.FloatType(), ir.DoubleType(), ir.IntType(32), ir.IntType(8)


def vector(kind: Any, width: int = WIDTH) -> Any:
    return ir.VectorType(kind, width)


class Vectors:
    """What an intrinsic's code generator is given, with the arguments as vectors need them."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> None:
        self.context, self.builder, self.signature, self.arguments = context, builder, signature, arguments

    def pointer(self, index: int, kind: Any) -> Any:
        """Of argument `index`, a contiguous array of `kind`; None for None."""
        if isinstance(self.signature.args[index], types.NoneType):
            return None
        made = self.context.make_array(self.signature.args[index])(self.context, self.builder, self.arguments[index])
        return self.builder.bitcast(made.data, kind.as_pointer())

    def integer(self, index: int) -> Any:
        """Argument `index` as a machine word."""
        return self.context.cast(self.builder, self.arguments[index], self.signature.args[index], types.intp)

    def length(self, index: int, axis: int = 0) -> Any:
        """Elements along an axis of the array that is argument `index`."""
        array = self.context.make_array(self.signature.args[index])(self.context, self.builder, self.arguments[index])
        return self.builder.extract_value(array.shape, axis)

    def word(self, value: int) -> Any:
        return ir.Constant(ir.IntType(64), value)

    def load(self, pointer: Any, index: Any, kind: Any) -> Any:
        """A vector of `kind` that begins at element `index`."""
        at = self.builder.bitcast(self.builder.gep(pointer, [index]), kind.as_pointer())
        return self.builder.load(at, align=_alignment(kind))

    def store(self, value: Any, pointer: Any, index: Any) -> None:
        at = self.builder.bitcast(self.builder.gep(pointer, [index]), value.type.as_pointer())
        self.builder.store(value, at, align=_alignment(value.type))

    def element(self, pointer: Any, index: Any) -> Any:
        """One element, in all lanes."""
        return self.splat(self.builder.load(self.builder.gep(pointer, [index])))

    def splat(self, scalar: Any) -> Any:
        empty = ir.Constant(vector(scalar.type), ir.Undefined)
        first = self.builder.insert_element(empty, scalar, ir.Constant(INT, 0))
        return self.builder.shuffle_vector(first, empty, ir.Constant(vector(INT), [0] * WIDTH))

    def constant(self, kind: Any, value: float) -> Any:
        return ir.Constant(vector(kind), [value] * WIDTH)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        name = f"llvm.fma.v{WIDTH}f{32 if a.type.element == FLOAT else 64}"
        function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            self.builder.module, ir.FunctionType(a.type, [a.type] * 3), name
        )
        return self.builder.call(function, [a, b, c])

    def between(self, value: Any, low: Any, high: Any) -> Any:
        """Float lanes within low and high."""
        value = self.builder.select(self.builder.fcmp_ordered("<", value, low), low, value)
        return self.builder.select(self.builder.fcmp_ordered(">", value, high), high, value)

    def larger(self, a: Any, b: Any) -> Any:
        """Of unsigned lanes."""
        return self.builder.select(self.builder.icmp_unsigned(">", a, b), a, b)

    def half(self, value: Any, which: int, width: int) -> Any:
        """The lower (0) or upper (1) `width` lanes of twice as many."""
        lanes = ir.Constant(vector(INT, width), list(range(which * width, which * width + width)))
        return self.builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), lanes)

    def largest(self, value: Any) -> Any:
        """Of all unsigned lanes."""
        width = WIDTH
        while width > 1:
            width //= 2
            value = self.larger(self.half(value, 0, width), self.half(value, 1, width))
        return self.builder.extract_element(value, ir.Constant(INT, 0))

    def register(self, initial: Any) -> Any:
        """A variable that loops may change: `builder.load` and `builder.store` it."""
        slot = cgutils.alloca_once(self.builder, initial.type)  # type: ignore[no-untyped-call]
        self.builder.store(initial, slot)
        return slot

    @contextmanager
    def loop(self, begin: Any, end: Any, step: int) -> Iterator[Any]:
        """Over begin, begin + step, ... below end."""
        with cgutils.for_range_slice(self.builder, begin, end, self.word(step), ir.IntType(64)) as (index, _):
            yield index


def _alignment(kind: Any) -> int:
    return {BYTE: 1, DOUBLE: 8}.get(kind.element, 4)


def generator(body: Callable[[Vectors], Any]) -> Callable[..., Any]:
    """An intrinsic's code generator from what it makes of its arguments; no value means None."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        made = body(Vectors(context, builder, signature, arguments))
        return context.get_dummy_value() if made is None else made

    return generate
