"""GGUF's blocks as number formats: each row a run of blocks, each block its scale and its codes together.

Q4_0 and Q8_0 are read and written here, bit for bit as llama.cpp does; Q4_1 to MXFP4, the K- and the IQ-quants are
read through the gguf package. Codes that fit are taken over as they are (`recode`), never through floating point:
symmetric INT4 and INT8 into Q4_0 and Q8_0, Q4_0 into int4_g32; only a scale changes its type.
Source: llama.cpp, ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import CheckpointError, RequestError
from .formats import PACKED_INT, Parts, QuantFormat, ScaleSearch, Shape, format_named
from .ggml_types import BY_NAME, GgmlType
from .packed_int import BLOCK_WEIGHTS, pack, unpack
from .plain import PLAIN_DTYPES
from .types import QuantTensor

BLOCKS = "blocks"
GROUP = 32
WRITTEN = ("q4_0", "q8_0")


@dataclass(frozen=True)
class GgmlBlocks(QuantFormat):
    """blocks U8 [out, in / elements * bytes]."""

    name: str

    @property
    def type(self) -> GgmlType:
        return BY_NAME[self.name]

    @property
    def kept_as(self) -> QuantFormat:
        """Q4_0 has the groups and nearly the codes of int4_g32; of the others only bf16 holds every value closely."""
        return format_named("int4_g32" if self.name == "q4_0" else "bf16")

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        rows, columns = self._rows_columns(shape)
        if columns % self.type.elements:
            raise CheckpointError(
                f"{self.name} needs rows of a multiple of {self.type.elements} columns, found {columns}"
            )
        return {BLOCKS: (torch.uint8, (rows, columns // self.type.elements * self.type.nbytes))}

    def dequantize(self, parts: Parts, shape: Shape) -> torch.Tensor:
        blocks = parts[BLOCKS]
        if self.name not in WRITTEN:
            return _by_package(blocks, self.type).view(shape)
        scale, codes = split_blocks(blocks, self.name)
        return (codes.to(torch.float32) * scale.to(torch.float32)[:, :, None]).view(shape)

    def quantize(
        self, weight: torch.Tensor, *, scale_search: ScaleSearch = "amax", importance: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """llama.cpp's reference rules. Q4_0: d = the value farthest from zero / -8; Q8_0: d = amax / 127. Codes are
        chosen with d in float32, d is stored in F16; one too large for F16 is a CheckpointError."""
        if self.name not in WRITTEN:
            raise RequestError(f"{self.name} is read and not written; written are {', '.join(WRITTEN)}")
        self._demand_no_search(scale_search, importance)
        (dtype, size), rows = self.parts(tuple(weight.shape))[BLOCKS], weight.shape[0]
        blocks = torch.empty(size, dtype=dtype)
        step = max(1, BLOCK_WEIGHTS // weight.shape[1])
        for first in range(0, rows, step):
            values = weight[first : first + step].to(torch.float32).contiguous()
            self._demand_finite(values)
            groups = values.view(-1, weight.shape[1] // GROUP, GROUP)
            scale, codes = (_q4_0 if self.name == "q4_0" else _q8_0)(groups)
            blocks[first : first + step] = join_blocks(_as_f16(scale, "a scale"), codes, self.name)
        return {BLOCKS: blocks}

    def _demand_finite(self, values: torch.Tensor) -> None:
        if not torch.isfinite(values).all():
            raise self.not_finite()

    def recode(self, tensor: QuantTensor, target: QuantFormat) -> dict[str, torch.Tensor] | None:
        if self.name != "q4_0" or target.name != "int4_g32":
            return None
        f16, codes = split_blocks(tensor.parts[BLOCKS], self.name)
        self._demand_finite(f16)
        return {
            "weight_packed": pack(codes.view(tensor.shape), 4),
            "weight_scale": f16.to(torch.bfloat16),
            "weight_shape": torch.tensor(tensor.shape, dtype=torch.int32),
        }


@dataclass
class ScaleCount:
    """Scales that were cast from BF16 to F16: how many there are, how many changed, how many of those became zero."""

    scales: int = 0
    changed: int = 0
    zeroed: int = 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        differ = before.to(torch.float32) != after.to(torch.float32)
        self.scales += before.numel()
        self.changed += int(differ.sum())
        self.zeroed += int((differ & (after == 0)).sum())

    def __iadd__(self, other: ScaleCount) -> ScaleCount:
        self.scales += other.scales
        self.changed += other.changed
        self.zeroed += other.zeroed
        return self


def packed_as_blocks(tensor: QuantTensor, target: QuantFormat, count: ScaleCount) -> torch.Tensor | None:
    """The blocks, uint8 [out, bytes], of symmetric INT4 or INT8 with its codes as they are; None where the codes don't
    fit the target. Raises CheckpointError for a scale that F16 can't hold."""
    if tensor.format.name not in PACKED_INT or target.name not in WRITTEN:
        return None
    bits, size = PACKED_INT[tensor.format.name]
    rows, columns = tensor.shape
    if (bits == 8 and target.name == "q4_0") or columns % GROUP:
        return None
    codes = unpack(tensor.parts["weight_packed"], bits).to(torch.int8).view(rows, -1, GROUP)
    scale = tensor.parts["weight_scale"]
    f16 = _as_f16(scale, f"a scale of {tensor.format.name}")
    count.add(scale, f16)
    return join_blocks(f16.repeat_interleave((size or columns) // GROUP, dim=1), codes, target.name)


def split_blocks(blocks: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Q4_0 or Q8_0: scales F16 [rows, groups] and signed codes int8 [rows, groups, 32]."""
    by_block = blocks.contiguous().view(len(blocks), -1, BY_NAME[name].nbytes)
    scale = by_block[:, :, :2].contiguous().view(torch.float16).squeeze(-1)
    stored = by_block[:, :, 2:]
    if name == "q8_0":
        return scale, stored.contiguous().view(torch.int8)
    # the low nibbles are the first half of the group, the high ones the second
    return scale, torch.cat((stored & 0xF, stored >> 4), dim=-1).view(torch.int8) - 8


def join_blocks(scale: torch.Tensor, codes: torch.Tensor, name: str) -> torch.Tensor:
    """The inverse of split_blocks: uint8 [rows, bytes]."""
    stored = codes.view(torch.uint8)
    if name == "q4_0":
        half = (codes + 8).view(torch.uint8)
        stored = half[:, :, : GROUP // 2] | half[:, :, GROUP // 2 :] << 4
    return torch.cat((scale.contiguous().unsqueeze(-1).view(torch.uint8), stored), dim=-1).flatten(1)


def _q4_0(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    farthest = groups.abs().argmax(dim=-1, keepdim=True)  # of equals the first, as in llama.cpp
    scale = groups.gather(-1, farthest) / -8
    codes = (groups * _inverse(scale)).add_(8.5).trunc_().clamp_(0, 15).sub_(8)
    return scale.squeeze(-1), codes.to(torch.int8)


def _q8_0(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127
    scaled = groups * _inverse(scale)
    # halves go away from zero; torch's own round takes them to the even neighbour
    whole = scaled.abs().floor()
    codes = torch.where(scaled.abs() - whole >= 0.5, whole + 1, whole).copysign_(scaled)
    return scale.squeeze(-1), codes.to(torch.int8)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 where that is no number, so that a group whose scale is 0 or nearly so gets codes of 0."""
    inverse = 1 / scale
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))


def _as_f16(scale: torch.Tensor, what: str) -> torch.Tensor:
    """Scales in F16, rounded to the nearest. GGUF has no other type for them."""
    f16 = scale.to(torch.float16)
    if not torch.isfinite(f16).all():
        worst = float(scale.to(torch.float32).abs().max())
        raise CheckpointError(f"{what} is {worst:g}, which GGUF's F16 can't hold (65504 at most); export it as bf16")
    return f16


def _by_package(blocks: torch.Tensor, kind: GgmlType) -> torch.Tensor:
    from gguf import GGMLQuantizationType, dequantize

    values = dequantize(blocks.contiguous().numpy(), GGMLQuantizationType(kind.id))
    return torch.from_numpy(values)


def format_of_type(kind: GgmlType) -> QuantFormat:
    """How k2lite reads a GGUF type: bf16, f16 and f32 are what they are everywhere."""
    return format_named(kind.name) if kind.name in PLAIN_DTYPES else GgmlBlocks(kind.name)
