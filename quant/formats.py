"""What a number format is: which stored tensors a matrix becomes, and the way there and back.

One class a format, one file a family: plain.py, fp8.py, int4.py. Bit-exact against independent implementations.
Knows no layers, names of modules or devices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache

import torch

from .errors import CheckpointError

Shape = tuple[int, ...]
Parts = Mapping[str, torch.Tensor]

FP8_NAME = "fp8_e4m3_b128"
INT4_NAMES = {"int4_g32": 32, "int4_g64": 64, "int4_g128": 128}  # and their group sizes
FORMAT_NAMES = ("bf16", "f16", "f32", FP8_NAME, *INT4_NAMES)


class QuantFormat(ABC):
    """A way to store a weight. `suffixes` are the checkpoint's own names of the stored tensors."""

    name: str

    @abstractmethod
    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        """Dtype and shape of each stored tensor of a weight [out, in]."""

    @abstractmethod
    def dequantize(self, parts: Parts, shape: Shape) -> torch.Tensor:
        """The values, float32."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Stored tensors of a float32 weight. Raises CheckpointError on NaN or infinity."""

    def nbytes(self, shape: Shape) -> int:
        return sum(dtype.itemsize * math.prod(part) for dtype, part in self.parts(shape).values())

    def _finite(self, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.to(torch.float32)
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"a weight holds NaN or infinity and can't be quantized to {self.name}")
        return weight.contiguous()

    def _rows_columns(self, shape: Shape) -> tuple[int, int]:
        if len(shape) != 2:
            raise CheckpointError(f"{self.name} stores matrices [out, in], found the shape {list(shape)}")
        return shape[0], shape[1]


@cache
def format_named(name: str) -> QuantFormat:
    """The format called `name`, as in FORMAT_NAMES."""
    from .fp8 import Fp8Block
    from .int4 import PackedInt4
    from .plain import PLAIN_DTYPES, Plain

    if name in PLAIN_DTYPES:
        return Plain(name)
    if name == FP8_NAME:
        return Fp8Block()
    if name in INT4_NAMES:
        return PackedInt4(name)
    raise CheckpointError(f"number format {name!r} is unknown; known: {', '.join(FORMAT_NAMES)}")
