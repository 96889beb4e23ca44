"""The kernel that multiplies 32 rows of a matrix of any format by some tokens, and the one that shares out a matrix."""

# mypy: ignore-errors
# (Numba finds the types of what it compiles)

from __future__ import annotations

from functools import cache

from .compiler import kernel
from .float_linear import float_scratch_bytes, float_tokens
from .int_linear import FEW_TOKENS, ROWS, few_tokens, int_scratch_bytes, many_tokens
from .matrix import BY_INT8, OUT, PATH
from .pointers import call7, get64


@kernel(7)
def multiply(matrix, first, tokens, count, outputs, base, scratch):
    """Rows [first, first + 32) of a matrix by `count` tokens. tokens, outputs: tables of addresses of prepared inputs
    and of float32 results; row `base` has its result at an output's beginning."""
    stop = min(first + ROWS, get64(matrix, OUT))
    if get64(matrix, PATH) > BY_INT8:
        float_tokens(matrix, first, stop, tokens, count, outputs, base, scratch)
    elif count <= FEW_TOKENS:
        few_tokens(matrix, first, stop, tokens, count, outputs, base, scratch)
    else:
        many_tokens(matrix, first, stop, tokens, count, outputs, base, scratch)


# arguments: multiply, matrix, tokens, count, outputs
@kernel(3)
def linear_rows(arguments, task, scratch):
    """Task `task` of a product: its 32 rows."""
    call7(
        get64(arguments, 0), get64(arguments, 1), task * ROWS, get64(arguments, 2), get64(arguments, 3),
        get64(arguments, 4), 0, scratch,
    )  # fmt: skip


@cache
def multiply_scratch_bytes(columns: int) -> int:
    return max(int_scratch_bytes(columns), float_scratch_bytes(columns))
