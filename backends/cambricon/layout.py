"""A stored integer matrix as the vendor's operations take it: the same places, two's complement instead of an offset.

Only signs of codes change: one XOR a byte. Scales of groups stay BF16 [out, groups]; one scale a row is float32 [out].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from k2lite.quant.formats import PACKED_INT, Parts, QuantFormat, ScaleSearch, Shape, format_named
from k2lite.quant.types import QuantTensor

CODES, SCALES, WEIGHT = "codes", "scales", "weight"


@dataclass(frozen=True)
class SignedCodes(QuantFormat):
    """codes int8 [out, in * bits / 8], scales bf16 [out, groups] or float32 [out]. Keeps the stored format's name."""

    name: str

    @property
    def bits(self) -> int:
        return PACKED_INT[self.name][0]

    @property
    def by_row(self) -> bool:
        return PACKED_INT[self.name][1] is None

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        rows, columns = self._rows_columns(shape)
        group = PACKED_INT[self.name][1] or columns
        scales = (torch.float32, (rows,)) if self.by_row else (torch.bfloat16, (rows, columns // group))
        return {CODES: (torch.int8, (rows, columns * self.bits // 8)), SCALES: scales}

    def dequantize(self, parts: Parts, shape: Shape) -> torch.Tensor:
        return values(parts[CODES], parts[SCALES], self.bits).view(shape)

    def quantize(
        self, weight: torch.Tensor, *, scale_search: ScaleSearch = "amax", importance: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        stored = format_named(self.name)
        parts = stored.quantize(weight, scale_search=scale_search, importance=importance)
        return dict(signed(QuantTensor(stored, tuple(weight.shape), parts)).parts)


def signed(weight: QuantTensor) -> QuantTensor:
    """A stored integer matrix with signed codes."""
    laid_out = SignedCodes(weight.format.name)
    flip = 0x88 if laid_out.bits == 4 else 0x80
    codes = (weight.parts["weight_packed"].contiguous().view(torch.uint8) ^ flip).view(torch.int8)
    scales = weight.parts["weight_scale"]
    scales = scales.to(torch.float32).flatten() if laid_out.by_row else scales.contiguous()
    return QuantTensor(laid_out, weight.shape, {CODES: codes, SCALES: scales})


def values(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 [..., out, in] of codes [..., out, in * bits / 8] and scales [..., out, groups] or [..., out]."""
    if bits == 4:
        codes = torch.stack((codes << 4 >> 4, codes >> 4), dim=-1).flatten(-2)
    if scales.dim() < codes.dim():
        scales = scales[..., None]
    grouped = codes.to(torch.float32).view(*codes.shape[:-1], scales.shape[-1], -1)
    return (grouped * scales.to(torch.float32)[..., None]).flatten(-2)
