"""A stored weight matrix as kernels see it: a row of integers with addresses, sizes and layout.

Invariant: the bytes are the checkpoint's own, at any multiple of 8 (rows of odd sizes: any address). Knows no kernel.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from k2lite.quant.packed_int import PackedInt
from k2lite.quant.types import QuantTensor

from .activations import FLOAT, INT4, INT8, ROUNDED
from .float_tiles import BF16_VALUES, F16_VALUES, F32_VALUES, FP8_CODES, INT4_CODES, INT8_CODES
from .int_tiles import G32, G64, G128, ROW

# What multiplies a matrix.
BY_INT4, BY_INT8, BY_BF16, BY_FP8, BY_FLOATS = range(5)
# The fields of a matrix, 64-bit integers.
PATH, CODES, SCALES, OUT, IN, LAYOUT, CODE_ROW, SCALE_ROW, VALUES, FIELDS = range(10)

Integers = npt.NDArray[np.int64]

_LAYOUTS = {32: G32, 64: G64, 128: G128, None: ROW}
_VALUES = {"bf16": BF16_VALUES, "f16": F16_VALUES, "f32": F32_VALUES}


def matrix_fields(weight: QuantTensor, rounded: bool) -> list[int]:
    """The fields of a weight [out, in]. rounded: inputs of integer weights are rounded to BF16
    rather than to integers."""
    rows, columns = weight.shape
    form = weight.format
    if isinstance(form, PackedInt):
        codes, scale = weight.parts["weight_packed"], weight.parts["weight_scale"]
        four = form.bits == 4
        path = BY_FLOATS if rounded else BY_INT4 if four else BY_INT8
        values = INT4_CODES if four else INT8_CODES
        layout = _LAYOUTS[form.group_size]
        return [path, codes.data_ptr(), scale.data_ptr(), rows, columns, layout,
                columns * form.bits // 8, 2 * scale.shape[1], values]  # fmt: skip
    codes = weight.parts["weight"]
    if form.name in _VALUES:
        path = BY_BF16 if form.name == "bf16" else BY_FLOATS
        return [path, codes.data_ptr(), 0, rows, columns, 0, columns * codes.itemsize, 0, _VALUES[form.name]]
    (scale,) = (part for suffix, part in weight.parts.items() if suffix != "weight")
    return [BY_FP8, codes.data_ptr(), scale.data_ptr(), rows, columns, 0, columns, 4 * scale.shape[1], FP8_CODES]


def preparation(fields: list[int], rounded: bool) -> int:
    """How a matrix's inputs are prepared."""
    if fields[PATH] in (BY_INT4, BY_INT8):
        return INT4 if fields[PATH] == BY_INT4 else INT8
    return ROUNDED if rounded and fields[VALUES] in (INT4_CODES, INT8_CODES) else FLOAT
