"""What a number format is: which stored tensors a matrix becomes, and the way there and back.

One class a format, one file a family: plain.py, fp8.py, packed_int.py. Bit-exact against independent implementations.
Knows no layers, names of modules or devices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

from .errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from .types import QuantTensor

Shape = tuple[int, ...]
Parts = Mapping[str, torch.Tensor]

FP8_NAME = "fp8_e4m3_b128"
# Bits of a code, and the columns that share a scale; None: all of a row.
PACKED_INT: dict[str, tuple[int, int | None]] = {
    "int4_g32": (4, 32),
    "int4_g64": (4, 64),
    "int4_g128": (4, 128),
    "int8_g128": (8, 128),
    "int8_channel": (8, None),
}
FORMAT_NAMES = ("bf16", "f16", "f32", FP8_NAME, *PACKED_INT)

# How scales are chosen: from the largest value, or as those of the smallest squared error.
ScaleSearch = Literal["amax", "mse"]
SCALE_SEARCHES: tuple[ScaleSearch, ...] = ("amax", "mse")


class QuantFormat(ABC):
    """A way to store a weight. `suffixes` are the checkpoint's own names of the stored tensors."""

    name: str
    row_multiple: int = 1

    @property
    def kept_as(self) -> QuantFormat:
        """What a folder stores a weight as that is to stay as it is: this format, if a folder can hold it."""
        return self

    def part_rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:  # noqa: ARG002
        """The rows of the stored tensor `suffix` that belong to rows [start, stop) of the weight, which are multiples
        of `row_multiple` or the weight's end."""
        return start, stop

    def recode(self, tensor: QuantTensor, target: QuantFormat) -> dict[str, torch.Tensor] | None:  # noqa: ARG002
        """Stored tensors in `target` whose codes are this tensor's own; None where `target` can't take them over."""
        return None

    @abstractmethod
    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        """Dtype and shape of each stored tensor of a weight [out, in]."""

    @abstractmethod
    def dequantize(self, parts: Parts, shape: Shape) -> torch.Tensor:
        """The values, float32."""

    @abstractmethod
    def quantize(
        self, weight: torch.Tensor, *, scale_search: ScaleSearch = "amax", importance: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Stored tensors of a floating-point weight. Raises CheckpointError on NaN or infinity, RequestError on a
        scale_search or an importance that the format has no use for."""

    def nbytes(self, shape: Shape) -> int:
        return sum(dtype.itemsize * math.prod(part) for dtype, part in self.parts(shape).values())

    def not_finite(self) -> CheckpointError:
        """The error for a weight that holds NaN or infinity."""
        return CheckpointError(f"a weight holds NaN or infinity and can't be quantized to {self.name}")

    def _demand_no_search(self, scale_search: ScaleSearch, importance: torch.Tensor | None) -> None:
        if scale_search != "amax" or importance is not None:
            what = "importance" if scale_search == "amax" else f"scale_search {scale_search!r}"
            raise RequestError(f"{self.name} has no scales to search: {what} is for {', '.join(PACKED_INT)}")

    def _rows_columns(self, shape: Shape) -> tuple[int, int]:
        if len(shape) != 2:
            raise CheckpointError(f"{self.name} stores matrices [out, in], found the shape {list(shape)}")
        return shape[0], shape[1]


@cache
def format_named(name: str) -> QuantFormat:
    """The format called `name`, as in FORMAT_NAMES."""
    from .fp8 import Fp8Block
    from .packed_int import PackedInt
    from .plain import PLAIN_DTYPES, Plain

    if name in PLAIN_DTYPES:
        return Plain(name)
    if name == FP8_NAME:
        return Fp8Block()
    if name in PACKED_INT:
        return PackedInt(name)
    raise CheckpointError(f"number format {name!r} is unknown; known: {', '.join(FORMAT_NAMES)}")
