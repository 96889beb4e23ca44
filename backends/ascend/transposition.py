"""Transposing codes and scales in blocks that fit registers: what makes packing for Ascend as fast as memory.

A block is read a vector of 64 bytes at a time, transposed by rounds of interleaving (row i with row i + half: each
round moves one bit of the row's number to the column's), and written in whole cache lines that bypass the cache.
Knows addresses; packing.py knows shapes.
"""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from k2lite.quant.compiling import inner, kernel

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
BYTE_VECTOR, WORD_VECTOR, PAIRS = ir.VectorType(I8, 64), ir.VectorType(I16, 32), ir.VectorType(I64, 8)
LINE = 64
# What is transposed: nibbles of codes, bytes of codes, words of 2 bytes (scales).
NIBBLES, BYTES, WORDS = 0, 1, 2
# Rows that make a line of output, and columns that a block has.
NIBBLE_ROWS, BYTE_ROWS, WORD_ROWS = 128, 64, 32
BLOCKS = ((NIBBLE_ROWS, 128), (BYTE_ROWS, 64), (WORD_ROWS, 32))
# Columns of nibbles that are worked on at once: 8 lines of a row follow one another in memory.
NIBBLE_COLUMNS = 1024
# Lines beside one another that are written together: columns may lie whole pages apart, and single lines at such a
# distance come to the same banks of memory.
NIBBLE_LINES = 2
SCRATCH_BYTES = 8192 * NIBBLE_LINES * (NIBBLE_COLUMNS // 128)


def _load(b, address, kind):
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def _store(b, address, value, *, streamed=False):
    stored = b.store(value, b.inttoptr(address, value.type.as_pointer()), align=LINE if streamed else 1)
    if streamed:
        stored.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))


def _interleave(b, x, y, size):
    """Low and high halves of x and y, element by element, within each 16 bytes."""
    count, lane = LINE // size, 16 // size
    halves = []
    for first in (0, lane // 2):
        order = [
            at + first + i + side * count for at in range(0, count, lane) for i in range(lane // 2) for side in (0, 1)
        ]
        halves.append(b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, count), order)))
    return halves


def _transposed(b, rows, size):
    """16 / size vectors: element j of row i, within each 16 bytes, becomes element i of row j."""
    half = len(rows) // 2
    for _ in range(len(rows).bit_length() - 1):
        rows = [v for i in range(half) for v in _interleave(b, rows[i], rows[i + half], size)]
    return rows


def _same(b, value, constant):
    return ir.Constant(value.type, [constant] * value.type.count)


def _block(emit):
    """An intrinsic of (source, source pitch, target) that reads rows there and leaves vectors here."""

    @intrinsic
    def block(typingctx, source, pitch, target):
        def codegen(context, b, signature, arguments):
            emit(b, *arguments)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return block


def _rows(b, source, pitch, count, kind):
    return [_load(b, b.add(source, b.mul(pitch, I64(row))), kind) for row in range(count)]


def _emit_nibbles(b, source, pitch, target):
    """32 rows of 64 bytes. Two rows' nibbles of a column become a byte, two's complement for value + 8: for even
    columns, then for odd ones, 16 vectors."""
    rows = _rows(b, source, pitch, 32, BYTE_VECTOR)
    low, high, sign = (_same(b, rows[0], constant) for constant in (0x0F, 0xF0, 0x88))
    four = _same(b, rows[0], 4)
    even, odd = [], []
    for x, y in zip(rows[0::2], rows[1::2], strict=True):
        even.append(b.xor(b.or_(b.and_(x, low), b.shl(y, four)), sign))
        odd.append(b.xor(b.or_(b.lshr(x, four), b.and_(y, high)), sign))
    for at, vectors in ((0, even), (16, odd)):
        for i, vector in enumerate(_transposed(b, vectors, 1)):
            _store(b, b.add(target, I64(LINE * (at + i))), vector)


def _emit_bytes(b, source, pitch, target):
    """16 rows of 64 bytes, stored as value + 128."""
    rows = _rows(b, source, pitch, 16, BYTE_VECTOR)
    sign = _same(b, rows[0], 0x80)
    for i, vector in enumerate(_transposed(b, [b.xor(row, sign) for row in rows], 1)):
        _store(b, b.add(target, I64(LINE * i)), vector)


def _emit_words(b, source, pitch, target):
    """8 rows of 32 words."""
    for i, vector in enumerate(_transposed(b, _rows(b, source, pitch, 8, WORD_VECTOR), 2)):
        _store(b, b.add(target, I64(LINE * i)), vector)


nibbles, codes, words = _block(_emit_nibbles), _block(_emit_bytes), _block(_emit_words)


def _lines(streamed):
    @intrinsic
    def lines(typingctx, scratch, apart, target, step):
        """Four vectors, `apart` bytes from one another: their quarters q make the line at target + q * step."""

        def codegen(context, b, signature, arguments):
            scratch, apart, target, step = arguments
            rows = [_load(b, b.add(scratch, b.mul(apart, I64(row))), PAIRS) for row in range(4)]
            for _ in range(2):
                swapped = []
                for x, y in ((rows[0], rows[2]), (rows[1], rows[3])):
                    for order in ([0, 1, 8, 9, 2, 3, 10, 11], [4, 5, 12, 13, 6, 7, 14, 15]):
                        swapped.append(b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, 8), order)))
                rows = swapped
            for quarter, row in enumerate(rows):
                _store(b, b.add(target, b.mul(step, I64(quarter))), row, streamed=streamed)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return lines


@intrinsic
def finished(typingctx):
    """What bypassed the cache is there for every other thread and device."""

    def codegen(context, b, signature, arguments):
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typingctx, address):
    def codegen(context, b, signature, arguments):
        pointer = I8.as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        name = "llvm.prefetch.p0"
        function = b.module.globals.get(name) or ir.Function(b.module, function_type, name)
        b.call(function, [b.inttoptr(arguments[0], pointer), I32(0), I32(2), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


cached_lines, streamed_lines = _lines(False), _lines(True)


@inner
def transpose_nibbles(source, pitch, target, step, rows, columns, scratch, streamed):
    """rows x columns nibbles at `source`, rows `pitch` bytes apart and a multiple of 128, columns a multiple of 128, to
    `target`, where columns lie `step` bytes apart. scratch: SCRATCH_BYTES."""
    for column in range(0, columns, NIBBLE_COLUMNS):
        blocks = min(NIBBLE_COLUMNS, columns - column) // 128
        for row in range(0, rows, NIBBLE_ROWS * NIBBLE_LINES):
            lines = min(NIBBLE_LINES, (rows - row) // NIBBLE_ROWS)
            for group in range(4 * lines):
                at = source + (row + 32 * group) * pitch + column // 2
                for block in range(blocks):
                    nibbles(at + LINE * block, pitch, scratch + 8192 * NIBBLE_LINES * block + 2048 * group)
                for i in range(32, 64):
                    for block in range(blocks):
                        prefetch(at + i * pitch + LINE * block)
            for block in range(blocks):
                there = target + (column + 128 * block) * step + row // 2
                for odd in range(2):
                    for j in range(16):
                        for i in range(lines):
                            line = there + (2 * j + odd) * step + LINE * i
                            at = scratch + 8192 * (NIBBLE_LINES * block + i) + 1024 * odd + LINE * j
                            if streamed:
                                streamed_lines(at, 2048, line, 32 * step)
                            else:
                                cached_lines(at, 2048, line, 32 * step)
    finished()


@inner
def transpose_codes(source, pitch, target, step, rows, columns, scratch, streamed):
    """The same for bytes, rows and columns multiples of 64."""
    for column in range(0, columns, 64):
        for row in range(0, rows, BYTE_ROWS):
            for group in range(4):
                codes(source + (row + 16 * group) * pitch + column, pitch, scratch + 1024 * group)
            there = target + column * step + row
            for j in range(16):
                if streamed:
                    streamed_lines(scratch + LINE * j, 1024, there + j * step, 16 * step)
                else:
                    cached_lines(scratch + LINE * j, 1024, there + j * step, 16 * step)
    finished()


@inner
def transpose_words(source, pitch, target, step, rows, columns, scratch, streamed):
    """The same for words of 2 bytes as they are, rows and columns multiples of 32."""
    for column in range(0, columns, 32):
        for row in range(0, rows, WORD_ROWS):
            for group in range(4):
                words(source + (row + 8 * group) * pitch + 2 * column, pitch, scratch + 512 * group)
            there = target + column * step + 2 * row
            for j in range(8):
                if streamed:
                    streamed_lines(scratch + LINE * j, 512, there + j * step, 8 * step)
                else:
                    cached_lines(scratch + LINE * j, 512, there + j * step, 8 * step)
    finished()


@kernel
def transpose_shares(strips, part, parts, scratch):
    """Share number `part` of `parts` of each strip's columns. strips: int64 [n, 8] of what is transposed (NIBBLES,
    BYTES, WORDS), source, pitch, target, step, rows, columns and whether it is streamed."""
    for number in range(len(strips)):
        unit, source, pitch, target, step, rows, columns, streamed = strips[number]
        block = 128 >> unit
        size = -(-columns // (parts * block)) * block
        first = part * size
        count = min(size, columns - first)
        if count <= 0:
            continue
        there = target + first * step
        if unit == NIBBLES:
            transpose_nibbles(source + first // 2, pitch, there, step, rows, count, scratch, streamed != 0)
        elif unit == BYTES:
            transpose_codes(source + first, pitch, there, step, rows, count, scratch, streamed != 0)
        else:
            transpose_words(source + 2 * first, pitch, there, step, rows, count, scratch, streamed != 0)
