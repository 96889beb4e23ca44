"""FP8 E4M3 in blocks of 128 x 128 with one float32 scale each, as K2-Base, K2-Instruct and DeepSeek-V3 are stored.

The scale is what codes are multiplied by, in spite of the name weight_scale_inv that it has there; compressed-tensors
calls the same numbers weight_scale. Blocks at the edges are cut off, not padded.
Source: DeepSeek-V3's README_WEIGHTS.md and inference/kernel.py; compressed-tensors' strategy "block".
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .formats import FP8_NAME, Parts, QuantFormat, ScaleSearch, Shape

BLOCK = 128
E4M3_MAX = 448.0
SCALE = "weight_scale_inv"
COMPRESSED_TENSORS_SCALE = "weight_scale"


@dataclass(frozen=True)
class Fp8Block(QuantFormat):
    """weight F8_E4M3 [out, in], weight_scale_inv F32 [ceil(out / 128), ceil(in / 128)].

    `scale_suffix` is the name of the second in the checkpoint, SCALE or COMPRESSED_TENSORS_SCALE."""

    name: str = field(default=FP8_NAME, init=False)
    scale_suffix: str = SCALE
    row_multiple: int = field(default=BLOCK, init=False)

    def part_rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        return (start // BLOCK, -(-stop // BLOCK)) if suffix == self.scale_suffix else (start, stop)

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        blocks = tuple(-(-size // BLOCK) for size in self._rows_columns(shape))
        return {"weight": (torch.float8_e4m3fn, shape), self.scale_suffix: (torch.float32, blocks)}

    def dequantize(self, parts: Parts, shape: Shape) -> torch.Tensor:
        return parts["weight"].to(torch.float32) * _spread(parts[self.scale_suffix], shape)

    def quantize(
        self, weight: torch.Tensor, *, scale_search: ScaleSearch = "amax", importance: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """scale = amax / 448 of each block; a block of zeros, or so small that this is zero, has scale 1."""
        self._demand_no_search(scale_search, importance)
        from .quantize_kernels import encode_fp8, fp8_scales

        shape = self._rows_columns(weight.shape)
        parts = {suffix: torch.empty(size, dtype=dtype) for suffix, (dtype, size) in self.parts(shape).items()}
        values, scales = weight.to(torch.float32).contiguous().numpy(), parts[self.scale_suffix].numpy()
        if not fp8_scales(values, scales):
            raise self.not_finite()
        encode_fp8(values, scales, parts["weight"].view(torch.uint8).numpy())
        return parts


def _spread(scale: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Each block's scale over its elements, [out, in]."""
    rows, columns = shape
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
