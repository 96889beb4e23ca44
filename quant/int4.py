"""Symmetric INT4 in groups of inputs, as K2-Thinking and later store their experts (compressed-tensors
"pack-quantized").

Word k of a row holds columns 8k to 8k+7, the lowest nibble first; a nibble is the code plus 8; value = code * scale.
Codes written here are -7..7, Moonshot's own grid; -8 is read as well.
Source: compressed-tensors, compressors/pack_quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import CheckpointError
from .formats import INT4_NAMES, Parts, QuantFormat, Shape

CODES_PER_WORD = 8
OFFSET = 8
MAX_CODE = 7


@dataclass(frozen=True)
class PackedInt4(QuantFormat):
    """weight_packed I32 [out, in / 8], weight_scale BF16 [out, in / group_size], weight_shape I32 [2]."""

    name: str

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return INT4_NAMES[self.name]

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        rows, columns = self._rows_columns(shape)
        if columns % self.group_size:
            raise CheckpointError(f"{self.name} needs rows of a multiple of {self.group_size} columns, found {columns}")
        return {
            "weight_packed": (torch.int32, (rows, columns // CODES_PER_WORD)),
            "weight_scale": (torch.bfloat16, (rows, columns // self.group_size)),
            "weight_shape": (torch.int32, (2,)),
        }

    def dequantize(self, parts: Parts, shape: Shape) -> torch.Tensor:
        codes = unpack(parts["weight_packed"]).view(shape[0], -1, self.group_size)
        return (codes * parts["weight_scale"].to(torch.float32)[:, :, None]).view(shape)

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """scale = amax / 7 of each group, rounded to BF16 before codes are chosen; a group of zeros, or so small that
        this is zero, has scale 1."""
        self.parts(tuple(weight.shape))
        groups = self._finite(weight).view(weight.shape[0], -1, self.group_size)
        scale = (groups.abs().amax(dim=-1) / MAX_CODE).to(torch.bfloat16)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        codes = (groups / scale.to(torch.float32)[:, :, None]).round().clamp(-MAX_CODE, MAX_CODE)
        return {
            "weight_packed": pack(codes.view(weight.shape)),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int32),
        }


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [out, in], each -8..7, to words int32 [out, in / 8]."""
    nibbles = (codes.to(torch.int64) + OFFSET).view(codes.shape[0], -1, CODES_PER_WORD)
    words = (nibbles << _shifts()).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Words int32 [out, in / 8] to codes float32 [out, in]."""
    nibbles = (words[:, :, None] >> _shifts().to(torch.int32)) & 0xF
    return (nibbles - OFFSET).to(torch.float32).flatten(1)


def _shifts() -> torch.Tensor:
    return torch.arange(0, 32, 4)
