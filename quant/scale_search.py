"""Looks for the scales that make the smallest squared error, a group of weights at a time.

Codes are -8..7 or -128..127, and a scale may be negative: of a group's two ends, the one with the largest weight gets
the code that only the low end has. llama.cpp's Q4_0 does the same; no scale for codes -7..7 is as good as its rule.

LANES groups are worked on side by side, turned so that each has a lane of its own: a sum runs down its lane in one
fixed order, so that the bits depend neither on the number of threads, nor on how many rows are given at once, nor on a
processor's vectors. Knows nothing of packing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32

from .compiling import inner, kernel
from .lane_sums import LANES, add_errors, add_products, turn_groups, widen_ends
from .llvm_vectors import WIDTH
from .quantize_kernels import bf16

# By the largest code, factors of the scale that puts the largest weight on that code. At 7/8 it has code -8, below that
# it is clipped; above, chance decides how well the other weights fall. In 8 bits clipping costs more than it gains.
FACTORS = {
    7: np.array([step / 40 for step in range(28, 43)], float32),
    127: np.array([step / 200 for step in range(194, 210)], float32),
}
REFINEMENTS = 2
# A gain smaller than this may be float32's rounding: it is no reason to leave a scale.
LEAST_GAIN = float32(1e-4)
# an intrinsic is called without its first parameter, which type checkers don't know
sum_errors: Any = add_errors
sum_products: Any = add_products
_turn_whole: Any = turn_groups
_widen: Any = widen_ends
SPAN = 128  # weights of a group that are in the turned tile at once
TILE = (SPAN, LANES)


def search_scales(weights: np.ndarray, scales: np.ndarray, max_code: int, importance: np.ndarray | None = None) -> None:
    """Replace scales float32 [R, G], those of the amax rule, by the BF16 numbers that make the smallest sum of
    importance * (weight - code * scale)**2 of each group of weights float32 [R, C], for codes -max_code - 1..max_code
    and max_code 7 or 127; they stay where none is better. All finite, contiguous.

    importance is float32 [C], one number a column and at least 0, None for 1. The candidates are the scales times
    FACTORS, signed, then REFINEMENTS times the scale that the best codes so far would like to have, in closed form
    (least squares); all are rounded to BF16 first."""
    turned = None if importance is None else np.empty(TILE, float32)
    _search(weights, scales, float32(max_code), FACTORS[max_code], importance, np.empty(TILE, float32), turned)


@inner
def search_rows(rows, scales, max_code, factors, importance, tile, weights):  # type: ignore[no-untyped-def]
    """search_scales with the FACTORS of max_code, a float32. tile and weights float32 [SPAN, LANES] are where spans of
    rows and of importance are turned; weights is None where importance is."""
    groups_a_row = scales.shape[1]
    scales = scales.reshape(-1)
    values = rows.reshape(len(scales), -1)
    size = values.shape[1]
    trials, errors = np.empty((1 + len(factors), LANES), float32), np.empty((1 + len(factors), LANES), float32)
    sums, inverse = np.empty((2, LANES), float32), np.empty(LANES, float32)
    best, error = np.empty(LANES, float32), np.empty(LANES, float32)
    for first in range(0, len(scales), LANES):
        count = min(LANES, len(scales) - first)
        for lane in range(LANES):
            best[lane] = scales[first + lane] if lane < count else float32(1)
        # the ends of each group, then in turn the errors of trials and the scale that the best codes would like
        for step in range(2 + 2 * REFINEMENTS):
            finding_errors = step % 2 == 1
            count_trials = len(trials) if step == 1 else 1
            _clear(errors[:count_trials])
            _clear(sums)
            for begin in range(0, size, SPAN):
                places = min(SPAN, size - begin)
                if step == 0 or size > SPAN:
                    if count == LANES and places % WIDTH == 0:
                        _turn_whole(values, first, begin, places, tile)
                    else:
                        _turn(values, first, begin, places, tile)
                    if importance is not None:
                        _turn_importance(importance, first, groups_a_row, size, begin, places, weights)
                if step == 0:
                    _widen(tile, places, sums)
                elif finding_errors:
                    for trial in range(count_trials):
                        _invert(trials[trial], inverse)
                        sum_errors(tile, places, inverse, max_code, weights, errors[trial : trial + 1])
                else:
                    _invert(best, inverse)
                    sum_products(tile, places, inverse, max_code, weights, sums)
            if step == 0:
                _signed_trials(best, sums, factors, trials)
            elif finding_errors:
                _keep_best(trials, errors, count_trials, step == 1, max_code, best, error)
            else:
                for lane in range(LANES):
                    trials[0, lane] = bf16(best[lane] * sums[0, lane] / sums[1, lane])
        for lane in range(count):
            scales[first + lane] = best[lane]


@inner
def _clear(table):  # type: ignore[no-untyped-def]
    for row in range(len(table)):
        for lane in range(LANES):
            table[row, lane] = 0


@inner
def _turn(values, first, begin, places, tile):  # type: ignore[no-untyped-def]
    """Columns begin.. of LANES groups, each group down its lane; zeros where there is none."""
    for lane in range(LANES):
        if first + lane < len(values):
            group = values[first + lane, begin : begin + places]
            for place in range(places):
                tile[place, lane] = group[place]
        else:
            for place in range(places):
                tile[place, lane] = 0


@inner
def _turn_importance(importance, first, groups_a_row, size, begin, places, weights):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        start = (first + lane) % groups_a_row * size + begin
        group = importance[start : start + places]
        for place in range(places):
            weights[place, lane] = group[place]


@inner
def _signed_trials(scales, ends, factors, trials):  # type: ignore[no-untyped-def]
    """The scales as they are, then times each factor, negative where a group reaches further up than down."""
    for lane in range(LANES):
        trials[0, lane] = scales[lane]
    for trial in range(len(factors)):
        factor = factors[trial]
        for lane in range(LANES):
            scale = -scales[lane] if ends[0, lane] > -ends[1, lane] else scales[lane]
            trials[1 + trial, lane] = bf16(scale * factor)


@inner
def _invert(scales, inverse):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        inverse[lane] = float32(1) / scales[lane]


@inner
def _keep_best(trials, errors, count, begin, max_code, best, error):  # type: ignore[no-untyped-def]
    """Take trials that are better than the best so far. Errors are compared as roots, out of units of the scale: sums
    of squares in these never over- or underflow. With `begin` the first trial is what to be better than."""
    for trial in range(count):
        for lane in range(LANES):
            scale = trials[trial, lane]
            off = np.sqrt(errors[trial, lane]) * abs(scale)
            better = off < error[lane] * (float32(1) - LEAST_GAIN)  # false for the NaN of a scale that is 0 or infinite
            better &= abs(scale) * (max_code + float32(1)) < float32(np.inf)  # the lowest code must be finite
            if (begin and trial == 0) or better:
                best[lane], error[lane] = scale, off


_search = kernel(search_rows.py_func)
