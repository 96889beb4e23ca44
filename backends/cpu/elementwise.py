"""Norms, rotation, the router's choice and the sum over experts: each row by itself, in one fixed order.

A sum over a row runs over 16 lanes from left to right; the lanes are added as in the float products.
"""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from .compiler import kernel
from .functions import sigmoid
from .pointers import get64, getf, set64, setf
from .vector import (
    F32,
    F32X4,
    F32X16,
    I32,
    I64,
    LANES,
    broadcast,
    counted_loop,
    declared,
    fma,
    load,
    load_first,
    pick,
    splat,
    store_first,
)

COLUMNS = 1024  # of a row that a task of `combine` sums


def add_lanes(b, total):
    """16 lanes to one float, in the order of a row of a product."""
    halves = [pick(b, total, [4 * g + lane for g in range(4)]) for lane in range(4)]
    fours = b.fadd(b.fadd(halves[0], halves[2]), b.fadd(halves[1], halves[3]))
    assert fours.type == F32X4
    q = [b.extract_element(fours, I32(g)) for g in range(4)]
    return b.fadd(b.fadd(q[0], q[1]), b.fadd(q[2], q[3]))


def each_vector(b, count, carried, body):
    """body(byte offset, floats left, carried) for every 16 floats of `count`."""

    def step(i, values):
        return body(b.mul(i, I64(64)), b.sub(count, b.mul(i, I64(LANES))), values)

    return counted_loop(b, b.ashr(b.add(count, I64(LANES - 1)), I64(4)), carried, step)


@intrinsic
def norm_row(typingctx, source, count, weight, eps, target):
    """weight * (x / sqrt(mean(x^2) + eps)) of one row."""

    def codegen(context, b, _signature, arguments):
        source, count, weight, eps, target = arguments

        def square(at, left, carried):
            x = load_first(b, b.add(source, at), left)
            return [fma(b, x, x, carried[0])]

        (squares,) = each_vector(b, count, [splat(F32X16, 0.0)], square)
        mean = b.fdiv(add_lanes(b, squares), b.sitofp(count, F32))
        root = b.call(declared(b, "llvm.sqrt.f32", F32, [F32]), [b.fadd(mean, eps)])
        factor = broadcast(b, b.fdiv(F32(1.0), root))

        def apply(at, left, _carried):
            x = b.fmul(load_first(b, b.add(source, at), left), factor)
            store_first(b, b.add(target, at), b.fmul(load_first(b, b.add(weight, at), left), x), left)
            return []

        each_vector(b, count, [], apply)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, types.float32, types.int64), codegen


# arguments: first row, bytes from row to row, floats in a row, weight, address of eps, results
@kernel(3)
def rms_norm(arguments, task, _scratch):
    """One row."""
    count = get64(arguments, 2)
    source, target = get64(arguments, 0) + task * get64(arguments, 1), get64(arguments, 5) + task * count * 4
    norm_row(source, count, get64(arguments, 3), getf(get64(arguments, 4)), target)


# arguments: rows [T, H, 2 P], bytes from token to token, from head to head, H, P, cosines [T, P], sines [T, P], results
@kernel(3)
def rotate(arguments, task, _scratch):
    """A token's heads: pairs (a, b) to (a cos - b sin, a sin + b cos), each product and sum rounded."""
    heads, pairs = get64(arguments, 3), get64(arguments, 4)
    cosines, sines = get64(arguments, 5) + task * pairs * 4, get64(arguments, 6) + task * pairs * 4
    for head in range(heads):
        source = get64(arguments, 0) + task * get64(arguments, 1) + head * get64(arguments, 2)
        target = get64(arguments, 7) + (task * heads + head) * pairs * 8
        for pair in range(pairs):
            a, b = getf(source + 8 * pair), getf(source + 8 * pair + 4)
            cos, sin = getf(cosines + 4 * pair), getf(sines + 4 * pair)
            setf(target + 8 * pair, a * cos - b * sin)
            setf(target + 8 * pair + 4, a * sin + b * cos)


@intrinsic
def weighted_add(typingctx, rows, row_bytes, weights, experts, shared, count, target):
    """target = ((0 + row 0 * weight 0) + row 1 * weight 1) + ... + shared, for `count` columns; no fused rounding."""

    def codegen(context, b, _signature, arguments):
        rows, row_bytes, weights, experts, shared, count, target = arguments

        def column(at, left, _carried):
            def add(i, carried):
                weight = broadcast(b, load(b, b.add(weights, b.mul(i, I64(4))), F32))
                row = load_first(b, b.add(b.add(rows, b.mul(i, row_bytes)), at), left)
                return [b.fadd(carried[0], b.fmul(row, weight))]

            (total,) = counted_loop(b, experts, [splat(F32X16, 0.0)], add)
            store_first(b, b.add(target, at), b.fadd(total, load_first(b, b.add(shared, at), left)), left)
            return []

        each_vector(b, count, [], column)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 7), codegen


# arguments: results [T, K, D], weights [T, K], shared [T, D], sums [T, D], K, D, tasks of a token
@kernel(3)
def combine(arguments, task, _scratch):
    """COLUMNS columns of a token."""
    experts, columns, pieces = get64(arguments, 4), get64(arguments, 5), get64(arguments, 6)
    token, first = task // pieces, task % pieces * COLUMNS
    count = min(COLUMNS, columns - first)
    rows = get64(arguments, 0) + (token * experts * columns + first) * 4
    at = (token * columns + first) * 4
    weights = get64(arguments, 1) + token * experts * 4
    weighted_add(rows, columns * 4, weights, experts, get64(arguments, 2) + at, count, get64(arguments, 3) + at)


@intrinsic
def sigmoid_row(typingctx, source, count, target):
    """The sigmoid of `count` floats."""

    def codegen(context, b, _signature, arguments):
        source, count, target = arguments

        def apply(at, left, _carried):
            store_first(b, b.add(target, at), sigmoid(b, load_first(b, b.add(source, at), left)), left)
            return []

        each_vector(b, count, [], apply)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3), codegen


@numba.njit(error_model="numpy")
def _best(values, count, taken):
    """Index of the largest of `count` floats whose byte in `taken` (floats, 0 or 1) is 0; the lowest of equal ones.
    NaN is the largest, as when torch sorts: it must reach the result."""
    best = -1
    top = np.float32(0.0)
    for i in range(count):
        if getf(taken + 4 * i) == 0:
            value = getf(values + 4 * i)
            if best < 0 or value > top or (value != value and top == top):
                best, top = i, value
    return best


@numba.njit(error_model="numpy")
def _drop_groups(choice, taken, count, groups, kept, spare):
    """Take all but the `kept` best of the groups out of the choice; a group's rank is the sum of its best two."""
    each = count // groups
    for g in range(groups):
        at, mark = choice + g * each * 4, taken + g * each * 4
        first = _best(at, each, mark)
        total = getf(at + 4 * first)
        if each > 1:
            setf(mark + 4 * first, np.float32(1))
            total += getf(at + 4 * _best(at, each, mark))
            setf(mark + 4 * first, np.float32(0))
        setf(spare + 4 * g, total)
        setf(spare + 4 * (groups + g), np.float32(0))
    for _ in range(kept):
        setf(spare + 4 * (groups + _best(spare, groups, spare + 4 * groups)), np.float32(1))
    for i in range(count):
        if getf(spare + 4 * (groups + i // each)) == 0:
            setf(taken + 4 * i, np.float32(1))


# arguments: logits [T, E], bias, ids [T, K], weights [T, K], E, K, groups, groups kept, whether weights are
# normalized, address of their factor. Scratch: scores, choice, marks, groups' ranks and marks.
@kernel(3)
def choose_experts(arguments, task, scratch):
    """The router's choice for one token: ids ascending, and their weights."""
    count, wanted = get64(arguments, 4), get64(arguments, 5)
    choice, taken, spare = scratch + 4 * count, scratch + 8 * count, scratch + 12 * count
    sigmoid_row(get64(arguments, 0) + task * count * 4, count, scratch)
    for i in range(count):
        setf(choice + 4 * i, getf(scratch + 4 * i) + getf(get64(arguments, 1) + 4 * i))
        setf(taken + 4 * i, np.float32(0))
    if get64(arguments, 6) > 1:
        _drop_groups(choice, taken, count, get64(arguments, 6), get64(arguments, 7), spare)
    for _ in range(wanted):
        best = _best(choice, count, taken)
        setf(taken + 4 * best, np.float32(2))
    ids, weights = get64(arguments, 2) + task * wanted * 8, get64(arguments, 3) + task * wanted * 4
    total, slot = np.float32(0), 0
    for i in range(count):
        if getf(taken + 4 * i) == 2:
            set64(ids + 8 * slot, i)
            setf(weights + 4 * slot, getf(scratch + 4 * i))
            total += getf(scratch + 4 * i)
            slot += 1
    factor = getf(get64(arguments, 9))
    for slot in range(wanted):
        weight = getf(weights + 4 * slot)
        if get64(arguments, 8):
            weight = weight / (total + np.float32(1e-20))
        setf(weights + 4 * slot, weight * factor)
