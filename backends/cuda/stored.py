"""A weight as kernels take it: its codes as bytes where they lie, its scales, and what decides the order of sums.

Invariant: tile sizes and splits follow from format and shape, never from the number of tokens or from an address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from k2lite.quant.formats import FP8_NAME, PACKED_INT
from k2lite.quant.types import QuantTensor

from ..base import UnsupportedOperationError

SLICE = 128  # columns that are multiplied at once where no smaller group has its own scale
ALIGNMENT = 16  # bytes that a thread loads at once
OUTPUTS = 64
PROGRAMS = 256  # that fill a large card
SPLIT_COLUMNS = 512  # that are worth a program of their own, a multiple of every STEP


@dataclass(frozen=True)
class Kind:
    """How elements are stored, as kernels tell them apart. group: columns of a slice; one_scale: of a whole row."""

    format: str
    group: int
    one_scale: bool = False

    @property
    def activations(self) -> torch.dtype:
        """What tokens are rounded to before they meet such a weight."""
        return torch.float32 if self.format == "exact" else torch.bfloat16

    @property
    def sums(self) -> int:
        """Tiles of float32 that a product takes: one of a slice beside the whole, where slices have scales; as much as
        three where float32 itself multiplies, without matrix instructions."""
        return {"bf16": 1, "exact": 3}.get(self.format, 2)

    def layout(self) -> dict[str, Any]:
        """What a kernel that reads such a weight is compiled for."""
        return {"FORMAT": self.format, "GROUP": self.group, "ONE_SCALE": self.one_scale}

    def loop(self, columns: int, tokens: int) -> dict[str, Any]:
        """The same of one that sums over the columns for tiles of so many tokens. STEP, the columns of a turn of its
        loop, fills registers with addresses and shared memory with tokens; it changes no order."""
        most = 2 * SLICE if self.format == "int4" and tokens <= 16 else SLICE
        if (self.format == "bf16" and tokens > 64) or (self.format == "exact" and tokens > 16):
            most = self.group
        step = min(most, -(-columns // self.group) * self.group)
        return {**self.layout(), "STEP": step, "EVEN": columns % step == 0}


@dataclass(frozen=True)
class Stored:
    """codes: uint8 [out, bytes of a row] or numbers [out, in]; scales: as in the checkpoint, `codes` where there are
    none."""

    kind: Kind
    codes: torch.Tensor
    scales: torch.Tensor
    outputs: int
    columns: int

    @property
    def split_columns(self) -> int:
        """Columns that are summed by themselves, so that a narrow weight keeps a large card busy."""
        splits = max(1, min(PROGRAMS // -(-self.outputs // OUTPUTS), self.columns // SPLIT_COLUMNS))
        return -(-self.columns // (splits * SPLIT_COLUMNS)) * SPLIT_COLUMNS

    @property
    def splits(self) -> int:
        return -(-self.columns // self.split_columns)


def kind_of(weight: QuantTensor, *, exact: bool = False) -> Kind:
    """exact: activations keep float32, as they must for a router."""
    name = weight.format.name
    if name in PACKED_INT:
        bits, group = PACKED_INT[name]
        return Kind(f"int{bits}", group or SLICE, group is None)
    if name == FP8_NAME:
        return Kind("fp8", SLICE)
    if name in ("f32", "f16") or (exact and name == "bf16"):
        return Kind("exact", 32)
    if name == "bf16":
        return Kind("bf16", SLICE // 2)
    raise UnsupportedOperationError(f"backend cuda can't multiply {name}; with --allow-fallback plain torch does")


def stored(weight: QuantTensor, *, exact: bool = False) -> Stored:
    """The same memory; a part that does not begin on a multiple of 16 bytes, as no slot of ours does, is copied."""
    kind = kind_of(weight, exact=exact)
    codes, scales = codes_and_scales(weight)
    return Stored(kind, _aligned(codes), _aligned(scales), *weight.shape)


def codes_and_scales(weight: QuantTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts that multiply, in the dtypes that kernels load."""
    if "weight_packed" in weight.parts:
        return weight.parts["weight_packed"].view(torch.uint8), weight.parts["weight_scale"]
    codes = weight.parts["weight"]
    if codes.dtype != torch.float8_e4m3fn:
        return codes, codes
    (suffix,) = (suffix for suffix in weight.parts if suffix != "weight")
    return codes.view(torch.uint8), weight.parts[suffix]


def _aligned(part: torch.Tensor) -> torch.Tensor:
    return part if part.data_ptr() % ALIGNMENT == 0 and part.is_contiguous() else part.clone().contiguous()
