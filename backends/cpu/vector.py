"""LLVM IR for virtual registers of 64 bytes: 16 float lanes, 16 integer lanes, 64 bytes.

Invariant: every float operation is written once over 16 lanes and in one order, with explicit fused multiply-adds and
no fast-math, so a machine with narrower registers does the same operations in parts and rounds alike. Only the
integer dot product, which is exact, is written per instruction set. Addresses are plain 64-bit integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

LANES = 16
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()


def vector(element: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(element, count)


F32X16, I32X16, I8X64 = vector(F32, 16), vector(I32, 16), vector(I8, 64)
F32X4, I32X4, I16X4 = vector(F32, 4), vector(I32, 4), vector(I16, 4)

Builder = Any  # llvmlite has no types
Value = Any


def splat(value_type: ir.VectorType, number: float) -> Value:
    return ir.Constant(value_type, [number] * value_type.count)


def declared(b: Builder, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> Value:
    """An intrinsic or C function of the module, declared once."""
    return b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, arguments), name)


def load(b: Builder, address: Value, value_type: ir.Type, align: int = 1) -> Value:
    return b.load(b.inttoptr(address, value_type.as_pointer()), align=align)


def store(b: Builder, address: Value, value: Value, align: int = 1) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=align)


def prefetch(b: Builder, address: Value) -> None:
    """Ask for a cache line; any address is allowed."""
    pointer = I8.as_pointer()
    function = declared(b, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32, I32, I32])
    b.call(function, [b.inttoptr(address, pointer), I32(0), I32(3), I32(1)])


def shuffle(b: Builder, a: Value, c: Value, lanes: Sequence[int]) -> Value:
    return b.shuffle_vector(a, c, ir.Constant(vector(I32, len(lanes)), list(lanes)))


def pick(b: Builder, a: Value, lanes: Sequence[int]) -> Value:
    return shuffle(b, a, ir.Constant(a.type, ir.Undefined), lanes)


def concat(b: Builder, a: Value, c: Value) -> Value:
    return shuffle(b, a, c, range(2 * a.type.count))


def broadcast(b: Builder, scalar: Value, count: int = LANES) -> Value:
    one = b.insert_element(ir.Constant(vector(scalar.type, count), ir.Undefined), scalar, I32(0))
    return pick(b, one, [0] * count)


def offset(b: Builder, base: Value, nbytes: int) -> Value:
    return b.add(base, I64(nbytes))


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, rounded once."""
    return b.call(declared(b, "llvm.fma.v16f32", F32X16, [F32X16] * 3), [x, y, z])


def as_float_bits(b: Builder, bits: Value) -> Value:
    return b.bitcast(bits, vector(F32, bits.type.count))


def bf16_to_f32(b: Builder, stored: Value) -> Value:
    """<n x i16> bits of BF16 to floats."""
    wide = vector(I32, stored.type.count)
    return as_float_bits(b, b.shl(b.zext(stored, wide), splat(wide, 16)))


def first_lanes(b: Builder, count: Value) -> Value:
    """A mask of the lanes below `count` (i64)."""
    return b.icmp_signed("<", ir.Constant(I32X16, list(range(16))), broadcast(b, b.trunc(count, I32)))


def load_first(b: Builder, address: Value, count: Value) -> Value:
    """`count` floats (0 or less, up to 16 or more), zeros behind; reads no byte beyond them."""
    pointer = F32X16.as_pointer()
    name = "llvm.masked.load.v16f32.p0"
    function = declared(b, name, F32X16, [pointer, I32, vector(I1, 16), F32X16])
    return b.call(function, [b.inttoptr(address, pointer), I32(1), first_lanes(b, count), splat(F32X16, 0.0)])


def store_first(b: Builder, address: Value, value: Value, count: Value) -> None:
    """The first `count` lanes, and nothing beyond them."""
    pointer = F32X16.as_pointer()
    function = declared(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), [F32X16, pointer, I32, vector(I1, 16)])
    b.call(function, [value, b.inttoptr(address, pointer), I32(1), first_lanes(b, count)])


def sum_lanes_of_four(b: Builder, rows: Sequence[Value], add: Any) -> Value:
    """Four vectors of 16 lanes to one: lane 4 g + r is the sum of lanes 4 g .. 4 g + 3 of rows[r], as
    (l0 + l2) + (l1 + l3)."""
    low = [4 * g + lane for g in range(4) for lane in (0, 16, 1, 17)]
    high = [4 * g + lane for g in range(4) for lane in (2, 18, 3, 19)]
    halves = [add(shuffle(b, x, y, low), shuffle(b, x, y, high)) for x, y in (rows[:2], rows[2:])]
    even = [4 * g + lane for g in range(4) for lane in (0, 1, 16, 17)]
    odd = [4 * g + lane for g in range(4) for lane in (2, 3, 18, 19)]
    return add(shuffle(b, halves[0], halves[1], even), shuffle(b, halves[0], halves[1], odd))


def sum_quarters(b: Builder, total: Value) -> Value:
    """16 float lanes to 4: (q0 + q1) + (q2 + q3) of the quarters."""
    q = [pick(b, total, range(4 * i, 4 * i + 4)) for i in range(4)]
    return b.fadd(b.fadd(q[0], q[1]), b.fadd(q[2], q[3]))


# -- the exact integer dot product ------------------------------------------------------------------------------


def dot_nibbles(b: Builder, isa: str, acc: Value, codes: Value, x: Value) -> Value:
    """acc (16 x i32) + in each lane the sum of four products of codes (64 bytes, 0..15) and x (64 bytes, signed)."""
    if isa == "vnni":
        return _vpdpbusd(b, acc, codes, x)
    if isa == "avx2":
        return b.add(acc, _by_halves(b, codes, x, 1))
    if isa == "neon":
        return _sdot(b, acc, codes, x)
    return _plain_dot(b, acc, codes, x)


def dot_bytes(b: Builder, isa: str, acc: Value, codes: Value, x: Value) -> Value:
    """As dot_nibbles, for codes 0..255. Where the instruction would saturate or wants signed bytes, the code's two
    halves are multiplied by themselves."""
    if isa == "vnni":
        return _vpdpbusd(b, acc, codes, x)
    if isa in ("avx2", "neon"):
        low, high = nibbles(b, codes)
        if isa == "avx2":
            return b.add(b.add(acc, _by_halves(b, low, x, 1)), _by_halves(b, high, x, 16))
        upper = _sdot(b, splat(I32X16, 0), high, x)
        return b.add(_sdot(b, acc, low, x), b.shl(upper, splat(I32X16, 4)))
    return _plain_dot(b, acc, codes, x)


def nibbles(b: Builder, codes: Value) -> tuple[Value, Value]:
    """The low and the high four bits of 64 bytes."""
    words = vector(I16, 32)
    mask = splat(I8X64, 15)
    shifted = b.bitcast(b.lshr(b.bitcast(codes, words), splat(words, 4)), I8X64)
    return b.and_(codes, mask), b.and_(shifted, mask)


def _vpdpbusd(b: Builder, acc: Value, codes: Value, x: Value) -> Value:
    function = declared(b, "llvm.x86.avx512.vpdpbusd.512", I32X16, [I32X16] * 3)
    return b.call(function, [acc, b.bitcast(codes, I32X16), b.bitcast(x, I32X16)])


def _by_halves(b: Builder, codes: Value, x: Value, factor: int) -> Value:
    """factor * dot by vpmaddubsw on 32 bytes at a time. Codes are below 16: two products can't saturate 16 bits."""
    bytes32, words16, lanes8 = vector(I8, 32), vector(I16, 16), vector(I32, 8)
    pairs = declared(b, "llvm.x86.avx2.pmadd.ub.sw", words16, [bytes32] * 2)
    quads = declared(b, "llvm.x86.avx2.pmadd.wd", lanes8, [words16] * 2)
    parts = []
    for half in (range(32), range(32, 64)):
        products = b.call(pairs, [pick(b, codes, half), pick(b, x, half)])
        parts.append(b.call(quads, [products, splat(words16, factor)]))
    return concat(b, *parts)


def _sdot(b: Builder, acc: Value, codes: Value, x: Value) -> Value:
    """NEON's signed dot product on 16 bytes at a time; codes are below 16. Not run on hardware."""
    bytes16 = vector(I8, 16)
    function = declared(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", I32X4, [I32X4, bytes16, bytes16])
    parts = []
    for i in range(4):
        quarters = [pick(b, v, range(16 * i, 16 * i + 16)) for v in (codes, x)]
        parts.append(b.call(function, [pick(b, acc, range(4 * i, 4 * i + 4)), *quarters]))
    return concat(b, concat(b, *parts[:2]), concat(b, *parts[2:]))


def _plain_dot(b: Builder, acc: Value, codes: Value, x: Value) -> Value:
    words = vector(I16, 64)  # 255 * 127 fits
    products = b.mul(b.zext(codes, words), b.sext(x, words))
    for first in range(4):
        acc = b.add(acc, b.sext(pick(b, products, range(first, 64, 4)), I32X16))
    return acc


# -- loops ------------------------------------------------------------------------------------------------------


def counted_loop(b: Builder, count: Value, carried: Sequence[Value], body: Any) -> list[Value]:
    """for (i = 0; i < count; i++) carried = body(i, carried); returns the last values. `body` may add blocks."""
    entry = b.block
    head, inside, done = (b.append_basic_block(name) for name in ("head", "inside", "done"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(I64(0), entry)
    phis = []
    for value in carried:
        phi = b.phi(value.type)
        phi.add_incoming(value, entry)
        phis.append(phi)
    b.cbranch(b.icmp_signed("<", i, count), inside, done)
    b.position_at_end(inside)
    results = body(i, phis)
    last = b.block
    i.add_incoming(b.add(i, I64(1)), last)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, last)
    b.branch(head)
    b.position_at_end(done)
    return phis


def outlined(name: str, codegen: Any) -> Any:
    """The same code as a function of its own, compiled once however often it is called: for the large pieces."""

    def call(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        module = b.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(ir.VoidType(), [a.type for a in arguments]), name)
            function.linkage = "linkonce_odr"
            function.attributes.add("noinline")
            inner = ir.IRBuilder(function.append_basic_block("entry"))
            codegen(context, inner, signature, function.args)
            inner.ret_void()
        b.call(function, arguments)
        return context.get_dummy_value()

    return call
