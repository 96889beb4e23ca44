"""A stored weight matrix as kernels see it: a row of integers with addresses, sizes and layout.

Invariant: the bytes are the checkpoint's own, at any multiple of 8 (rows of odd sizes: any address). Knows no kernel.
"""

from __future__ import annotations

from array import array
from functools import cache

from k2lite.quant.formats import QuantFormat
from k2lite.quant.fp8 import BLOCK, Fp8Block
from k2lite.quant.packed_int import PackedInt
from k2lite.quant.plain import PLAIN_DTYPES
from k2lite.quant.types import QuantTensor

from .activations import FLOAT, INT4, INT8, ROUNDED, prepared_bytes
from .float_tiles import BF16_VALUES, F16_VALUES, F32_VALUES, FP8_CODES, INT4_CODES, INT8_CODES
from .int_tiles import G32, G64, G128, ROW

# What multiplies a matrix.
BY_INT4, BY_INT8, BY_BF16, BY_FP8, BY_FLOATS = range(5)
# The fields of a matrix, 64-bit integers.
PATH, CODES, SCALES, OUT, IN, LAYOUT, CODE_ROW, SCALE_ROW, VALUES = range(9)

_LAYOUTS = {32: G32, 64: G64, 128: G128, None: ROW}
_VALUES = {"bf16": BF16_VALUES, "f16": F16_VALUES, "f32": F32_VALUES}


class Matrix:
    """The fields of a weight [out, in] at `address`. how: the way its inputs are prepared, `prepared_bytes` a row.
    alike: the same object for all weights of a format and a shape."""

    __slots__ = ("_fields", "address", "alike", "columns", "how", "nbytes", "out", "prepared_bytes")

    def __init__(self, weight: QuantTensor, rounded: bool) -> None:
        path, codes, scales, rest = self.alike = _form(weight.format, weight.shape, rounded)
        parts = weight.parts
        self._fields = array("q", [path, parts[codes].data_ptr(), parts[scales].data_ptr() if scales else 0, *rest])
        self.address = self._fields.buffer_info()[0]
        self.out, self.columns = weight.shape
        self.nbytes = self.out * self._fields[CODE_ROW]
        self.how = _preparation(path, self._fields[VALUES], rounded)
        self.prepared_bytes = prepared_bytes(self.columns, self.how)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # addresses are worth nothing to a copy


def matrix_of(weight: QuantTensor, rounded: bool) -> Matrix:
    """A weight as a matrix, made once. rounded: inputs of integer weights are rounded to BF16 rather than to
    integers."""
    key = "cpu bf16" if rounded else "cpu int8"
    matrix = weight.derived.get(key)
    if not isinstance(matrix, Matrix):
        matrix = weight.derived[key] = Matrix(weight, rounded)
    return matrix


@cache
def _form(form: QuantFormat, shape: tuple[int, ...], rounded: bool) -> tuple[int, str, str, tuple[int, ...]]:
    """What all weights of a format and a shape share: path, names of codes and scales, and the other fields."""
    rows, columns = shape
    if isinstance(form, PackedInt):
        four = form.bits == 4
        path = BY_FLOATS if rounded else BY_INT4 if four else BY_INT8
        values = INT4_CODES if four else INT8_CODES
        scale_row = 2 * (columns // form.group_size if form.group_size else 1)
        fields = (rows, columns, _LAYOUTS[form.group_size], columns * form.bits // 8, scale_row, values)
        return path, "weight_packed", "weight_scale", fields
    if isinstance(form, Fp8Block):
        fields = (rows, columns, 0, columns, 4 * -(-columns // BLOCK), FP8_CODES)
        return BY_FP8, "weight", form.scale_suffix, fields
    width = PLAIN_DTYPES[form.name].itemsize
    path = BY_BF16 if form.name == "bf16" else BY_FLOATS
    return path, "weight", "", (rows, columns, 0, columns * width, 0, _VALUES[form.name])


def _preparation(path: int, values: int, rounded: bool) -> int:
    """How a matrix's inputs are prepared."""
    if path in (BY_INT4, BY_INT8):
        return INT4 if path == BY_INT4 else INT8
    return ROUNDED if rounded and values in (INT4_CODES, INT8_CODES) else FLOAT
