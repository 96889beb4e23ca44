"""Symmetric integers of 4 or 8 bits, packed in words, with a BF16 scale a group of inputs or a row: compressed-tensors'
"pack-quantized". In INT4 with groups of 32, K2-Thinking and later store their experts.

A word of a row holds its next 8 (4 bits) or 4 (8 bits) columns, the lowest bits first; stored is the code plus 8 or
128; value = code * scale. Codes written here are -7..7, Moonshot's own grid, or -127..127; one less is read as well,
and written where scales are searched.
Source: compressed-tensors, compressors/pack_quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .errors import CheckpointError, RequestError
from .formats import PACKED_INT, SCALE_SEARCHES, Parts, QuantFormat, ScaleSearch, Shape

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

# Weights that are worked on at once: their 1 MiB in float32 stays in a processor's cache from one loop to the next.
BLOCK_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class PackedInt(QuantFormat):
    """weight_packed I32 [out, in * bits / 32], weight_scale BF16 [out, in / group_size], weight_shape I32 [2]."""

    name: str

    @property
    def bits(self) -> int:
        """Bits of a code, 4 or 8."""
        return PACKED_INT[self.name][0]

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None: all of a row."""
        return PACKED_INT[self.name][1]

    @property
    def max_code(self) -> int:
        """The largest code; the smallest that is written is minus this, where scales are not searched."""
        return (1 << (self.bits - 1)) - 1

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        rows, columns = self._rows_columns(shape)
        multiple = self.group_size or 32 // self.bits
        if columns % multiple:
            raise CheckpointError(f"{self.name} needs rows of a multiple of {multiple} columns, found {columns}")
        return {
            "weight_packed": (torch.int32, (rows, columns * self.bits // 32)),
            "weight_scale": (torch.bfloat16, (rows, columns // (self.group_size or columns))),
            "weight_shape": (torch.int32, (2,)),
        }

    def dequantize(self, parts: Parts, shape: Shape) -> torch.Tensor:
        scale = parts["weight_scale"].to(torch.float32)[:, :, None]
        codes = unpack(parts["weight_packed"], self.bits)
        return codes.view(*scale.shape[:2], -1).mul_(scale).view(shape)

    def quantize(
        self, weight: torch.Tensor, *, scale_search: ScaleSearch = "amax", importance: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """ "amax": scale = amax / max_code of each group, rounded to BF16 before codes are chosen; a group of zeros, or
        so small that this is zero, has scale 1. "mse": the scale of scale_search.search_scales, negative for some
        groups, with importance float32 [in], one number a column (an input's second moment, say). Rows don't depend on
        one another."""
        shape = tuple(weight.shape)
        parts = {suffix: torch.empty(size, dtype=dtype) for suffix, (dtype, size) in self.parts(shape).items()}
        parts["weight_shape"].copy_(torch.tensor(shape))
        importance = self.demand_importance(scale_search, importance, shape[1])
        packed = parts["weight_packed"].view(torch.uint8).numpy()
        step = max(1, BLOCK_WEIGHTS // shape[1])
        for first in range(0, shape[0], step):
            rows = slice(first, first + step)
            groups = weight[rows].to(torch.float32).reshape(-1, *self._groups(shape[1]))
            scale = self.scales(groups, scale_search, importance)
            parts["weight_scale"][rows] = scale
            self._encode(groups, scale, scale_search, packed[rows])
        return parts

    def scales(
        self, groups: torch.Tensor, scale_search: ScaleSearch, importance: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scales of float32 groups [R, G, N] by the rule: float32 [R, G], of numbers that BF16 holds. importance is
        float32 [G, N] or None, for "mse". Raises CheckpointError on NaN or infinity."""
        from .quantize_kernels import amax_scales
        from .scale_search import search_scales

        weights = groups.flatten(1).contiguous().numpy()
        scales = np.empty(groups.shape[:2], np.float32)
        if not amax_scales(weights, self.max_code, scales):
            raise self.not_finite()
        if scale_search == "mse":
            search_scales(weights, scales, self.max_code, None if importance is None else importance.flatten().numpy())
        return torch.from_numpy(scales)

    def lowest_code(self, scale_search: ScaleSearch) -> int:
        """The smallest code that is written."""
        return -self.max_code - (scale_search == "mse")

    def _encode(self, groups: torch.Tensor, scales: torch.Tensor, scale_search: ScaleSearch, packed: Bytes) -> None:
        """Fill packed uint8 [R, bytes of a row]."""
        from .quantize_kernels import encode

        weights = groups.flatten(1).numpy()
        scratch = np.empty(weights.shape[1], np.uint8)
        lowest = self.lowest_code(scale_search)
        encode(weights, scales.numpy(), lowest, self.max_code, self.bits, packed, scratch)

    def _groups(self, columns: int) -> tuple[int, int]:
        """Groups in a row, and weights in a group."""
        size = self.group_size or columns
        return columns // size, size

    def demand_importance(
        self, scale_search: ScaleSearch, importance: torch.Tensor | None, columns: int
    ) -> torch.Tensor | None:
        """Importance by group, float32 [G, N]. Raises RequestError where it can't be one."""
        if scale_search not in SCALE_SEARCHES:
            raise RequestError(f"scale_search is {scale_search!r}; known: {', '.join(SCALE_SEARCHES)}")
        if importance is None:
            return None
        if scale_search != "mse":
            raise RequestError(f"importance has no effect with scale_search {scale_search!r}; it needs 'mse'")
        if tuple(importance.shape) != (columns,):
            raise RequestError(f"importance has the shape {list(importance.shape)}, expected [{columns}], the columns")
        importance = importance.to(torch.float32)
        if not (torch.isfinite(importance) & (importance >= 0)).all():
            raise RequestError("importance holds a number that is negative, NaN or infinite")
        return importance.reshape(self._groups(columns)).contiguous()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [out, in], each of `bits` bits and signed, to words int32 [out, in * bits / 32]."""
    stored = (codes + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        stored = stored[:, 0::2] | stored[:, 1::2] << 4
    return stored.contiguous().view(torch.int32)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words int32 [out, in * bits / 32] to codes float32 [out, in]."""
    stored = words.contiguous().view(torch.uint8)
    if bits == 4:
        stored = torch.stack((stored & 0xF, stored >> 4), dim=-1).flatten(1)
    return stored.to(torch.float32).sub_(1 << (bits - 1))
