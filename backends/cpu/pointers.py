"""Memory by address, for kernels that take plain integers: loads, stores, copies, calls and the one atomic counter.

Invariant: nothing here knows what lies at an address; who makes the address keeps the memory alive.
"""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .vector import F32, I1, I8, I32, I64, declared, load, prefetch, store

ADDRESS = types.int64


def _loader(value_type, result, extend):
    def codegen(_context, b, _signature, arguments):
        value = load(b, b.add(arguments[0], b.mul(arguments[1], I64(value_type.width // 8))), value_type)
        return b.zext(value, I64) if extend else value

    return result(ADDRESS, ADDRESS), codegen


@intrinsic
def get64(typingctx, base, index):
    """The index-th 64-bit integer at base."""
    return _loader(I64, types.int64, False)


@intrinsic
def getf(typingctx, address):
    """The float at an address."""
    return types.float32(ADDRESS), lambda _c, b, _s, arguments: load(b, arguments[0], F32)


@intrinsic
def setf(typingctx, address, value):
    """Write a float to an address."""

    def codegen(context, b, _signature, arguments):
        store(b, arguments[0], arguments[1])
        return context.get_dummy_value()

    return types.none(ADDRESS, types.float32), codegen


@intrinsic
def set64(typingctx, address, value):
    """Write a 64-bit integer to an address."""

    def codegen(context, b, _signature, arguments):
        store(b, arguments[0], arguments[1])
        return context.get_dummy_value()

    return types.none(ADDRESS, ADDRESS), codegen


@intrinsic
def copy_bytes(typingctx, target, source, count):
    """memcpy of `count` bytes."""

    def codegen(context, b, _signature, arguments):
        pointer = I8.as_pointer()
        function = declared(b, "llvm.memcpy.p0.p0.i64", ir.VoidType(), [pointer, pointer, I64, I1])
        addresses = [b.inttoptr(value, pointer) for value in arguments[:2]]
        b.call(function, [*addresses, arguments[2], I1(0)])
        return context.get_dummy_value()

    return types.none(ADDRESS, ADDRESS, ADDRESS), codegen


@intrinsic
def zero_bytes(typingctx, target, count):
    """Set `count` bytes to zero."""

    def codegen(context, b, _signature, arguments):
        pointer = I8.as_pointer()
        function = declared(b, "llvm.memset.p0.i64", ir.VoidType(), [pointer, I8, I64, I1])
        b.call(function, [b.inttoptr(arguments[0], pointer), I8(0), arguments[1], I1(0)])
        return context.get_dummy_value()

    return types.none(ADDRESS, ADDRESS), codegen


@intrinsic
def ask_for(typingctx, address):
    """Ask for the cache line at an address, which may be any."""

    def codegen(context, b, _signature, arguments):
        prefetch(b, arguments[0])
        return context.get_dummy_value()

    return types.none(ADDRESS), codegen


def _call(count):
    def codegen(context, b, _signature, arguments):
        function_type = ir.FunctionType(ir.VoidType(), [I64] * count)
        b.call(b.inttoptr(arguments[0], function_type.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.none(*[ADDRESS] * (count + 1)), codegen


@intrinsic
def call3(typingctx, function, a, b, c):
    """Call a compiled kernel of three integers by its address."""
    return _call(3)


@intrinsic
def call7(typingctx, function, a, b, c, d, e, f, g):
    """Call a compiled kernel of seven integers by its address."""
    return _call(7)


@intrinsic
def atomic_add(typingctx, address, amount):
    """Add to a shared 64-bit integer; returns what it was."""

    def codegen(_context, b, _signature, arguments):
        pointer = b.inttoptr(arguments[0], I64.as_pointer())
        return b.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(ADDRESS, types.int64), codegen


@intrinsic
def atomic_swap(typingctx, address, value):
    """Put a shared 64-bit integer; returns what it was."""

    def codegen(_context, b, _signature, arguments):
        pointer = b.inttoptr(arguments[0], I64.as_pointer())
        return b.atomic_rmw("xchg", pointer, arguments[1], "seq_cst")

    return types.int64(ADDRESS, types.int64), codegen


@intrinsic
def atomic_get(typingctx, address):
    """A shared 64-bit integer."""

    def codegen(_context, b, _signature, arguments):
        return b.load_atomic(b.inttoptr(arguments[0], I64.as_pointer()), "seq_cst", 8)

    return types.int64(ADDRESS), codegen


@intrinsic
def atomic_replace(typingctx, address, old, new):
    """Put `new` where `old` is; whether it was."""

    def codegen(_context, b, _signature, arguments):
        pointer = b.inttoptr(arguments[0], I64.as_pointer())
        result = b.cmpxchg(pointer, arguments[1], arguments[2], "seq_cst", "seq_cst")
        return b.extract_value(result, 1)

    return types.boolean(ADDRESS, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the processor that this thread spins."""

    def codegen(context, b, _signature, _arguments):
        if "x86_64" in b.module.triple:
            b.call(declared(b, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        elif "aarch64" in b.module.triple or "arm64" in b.module.triple:
            b.call(declared(b, "llvm.aarch64.hint", ir.VoidType(), [I32]), [I32(1)])
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def system_call(typingctx, function, number, a, b, c, d):
    """libc's `syscall` at the address `function`."""

    def codegen(_context, b, _signature, arguments):
        function_type = ir.FunctionType(I64, [I64], var_arg=True)
        return b.call(b.inttoptr(arguments[0], function_type.as_pointer()), arguments[1:])

    return types.int64(*[ADDRESS] * 6), codegen


@intrinsic
def clock_ns(typingctx, function, buffer):
    """The monotonic clock in nanoseconds by libc's `clock_gettime` at the address `function`."""

    def codegen(_context, b, _signature, arguments):
        function_type = ir.FunctionType(I32, [I32, I64])
        b.call(b.inttoptr(arguments[0], function_type.as_pointer()), [I32(1), arguments[1]])
        seconds, nanoseconds = load(b, arguments[1], I64), load(b, b.add(arguments[1], I64(8)), I64)
        return b.add(b.mul(seconds, I64(1_000_000_000)), nanoseconds)

    return types.int64(ADDRESS, ADDRESS), codegen
