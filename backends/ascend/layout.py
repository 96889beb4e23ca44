"""What a matrix and an expert look like in Ascend's memory, and arenas of experts.

An arena lies plane by plane: all slots' gate and up codes, then their scales, then those of down. So each plane is one
contiguous 3-D tensor [slots, ...], which is what a grouped product takes; a slot by itself is an arena of one.
Shapes: D hidden, F expert width, G groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from k2lite.quant.formats import PACKED_INT, Parts, QuantFormat, ScaleSearch, Shape, format_named
from k2lite.quant.plain import Plain
from k2lite.quant.types import ExpertWeights, QuantTensor

from ..base import UnsupportedOperationError
from .packing import Packing

ALIGNMENT = 64
CODES, SCALES, WEIGHT = "codes", "scales", "weight"


@dataclass(frozen=True)
class PackedAlongOutputs(QuantFormat):
    """An integer format with its codes along outputs: codes int32 [in, out / 8] or int8 [in, out], scales bf16
    [groups, out]. It keeps the stored format's name. `arena` and `slot` say where an expert lies."""

    name: str
    arena: Arena | None = field(default=None, compare=False)
    slot: int = field(default=0, compare=False)

    @property
    def bits(self) -> int:
        return PACKED_INT[self.name][0]

    def group_size(self, columns: int) -> int:
        """Inputs that share a scale; 0 where that is all of them."""
        group = PACKED_INT[self.name][1] or columns
        return 0 if group == columns else group

    def parts(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        rows, columns = self._rows_columns(shape)
        rows = padded_rows(rows, self.bits)
        groups = columns // (PACKED_INT[self.name][1] or columns)
        codes = (torch.int32, (columns, rows // 8)) if self.bits == 4 else (torch.int8, (columns, rows))
        return {CODES: codes, SCALES: (torch.bfloat16, (groups, rows))}

    def dequantize(self, parts: Parts, shape: Shape) -> torch.Tensor:
        stored = parts[CODES].contiguous().view(torch.int8)
        if self.bits == 4:
            stored = torch.stack((stored << 4 >> 4, stored >> 4), dim=-1).flatten(1)
        scales = parts[SCALES].to(torch.float32).repeat_interleave(len(stored) // len(parts[SCALES]), 0)
        return (stored.to(torch.float32) * scales)[:, : shape[0]].T.contiguous()

    def quantize(
        self, weight: torch.Tensor, *, scale_search: ScaleSearch = "amax", importance: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        stored = format_named(self.name)
        parts = stored.quantize(weight, scale_search=scale_search, importance=importance)
        return dict(packed_matrix(QuantTensor(stored, tuple(weight.shape), parts)).parts)


@dataclass(frozen=True)
class PlacedPlain(Plain):
    """A plain format of a matrix that lies in an arena."""

    arena: Arena | None = field(default=None, compare=False)
    slot: int = field(default=0, compare=False)


def padded_rows(rows: int, bits: int) -> int:
    """Outputs with those that fill the last word."""
    return -(-rows // 8) * 8 if bits == 4 else rows


def packed_matrix(weight: QuantTensor) -> QuantTensor:
    """A stored integer matrix in the layout of the chip, on the host."""
    stored = PackedAlongOutputs(weight.format.name)
    parts = {suffix: torch.zeros(shape, dtype=dtype) for suffix, (dtype, shape) in stored.parts(weight.shape).items()}
    packing = Packing()
    add_matrix(packing, weight, parts[CODES].view(torch.uint8), parts[SCALES])
    packing.run()
    return QuantTensor(stored, weight.shape, parts)


def add_matrix(
    packing: Packing, weight: QuantTensor, codes: torch.Tensor, scales: torch.Tensor, first: int = 0
) -> None:
    """A stored integer matrix into codes uint8 [in, pitch] and scales bf16 [groups, pitch], from output `first` on."""
    packing.add_codes(weight.parts["weight_packed"].cpu(), PACKED_INT[weight.format.name][0], codes, first)
    packing.add_scales(weight.parts["weight_scale"].cpu(), scales, first)


@dataclass(frozen=True)
class Plane:
    """One of an expert's tensors, and the bytes that it takes in a slot."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def room(self) -> int:
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class ExpertKind:
    """Experts that one arena holds: their formats and sizes. BF16 matrices lie as stored [out, in], gate above up."""

    gate_up: str
    down: str
    hidden: int
    width: int

    @classmethod
    def of(cls, expert: Sequence[tuple[QuantFormat, Shape]]) -> ExpertKind:
        """Raises UnsupportedOperationError for what has no layout here."""
        (gate, shape), (up, _), (down, _) = expert
        if gate.name != up.name:
            raise UnsupportedOperationError(f"backend ascend: gate_proj is {gate.name} and up_proj {up.name}")
        if gate.name in PACKED_INT and shape[0] % 8:
            raise UnsupportedOperationError(f"backend ascend: experts of a width {shape[0]}, no multiple of 8")
        return cls(gate.name, down.name, hidden=shape[1], width=shape[0])

    @property
    def planes(self) -> tuple[tuple[Plane, ...], tuple[Plane, ...]]:
        """Of gate and up together, and of down."""
        return (
            _planes(self.gate_up, (2 * self.width, self.hidden)),
            _planes(self.down, (self.hidden, self.width)),
        )

    @property
    def nbytes(self) -> int:
        return sum(plane.room for planes in self.planes for plane in planes)

    @property
    def offsets(self) -> int:
        """Zeros, bf16, that a product wants for each slot of an arena: as many as the larger plane of scales has."""
        names = (self.gate_up, self.down)
        scales = (planes[1] for name, planes in zip(names, self.planes, strict=True) if name in PACKED_INT)
        return max((math.prod(plane.shape) for plane in scales), default=0)


def _planes(name: str, shape: Shape) -> tuple[Plane, ...]:
    if name not in PACKED_INT:
        return (Plane(torch.bfloat16, shape),)
    return tuple(Plane(dtype, size) for dtype, size in PackedAlongOutputs(name).parts(shape).values())


class Arena:
    """`slots` experts of one kind in `memory`, uint8 [slots * kind.nbytes]."""

    def __init__(self, kind: ExpertKind, memory: torch.Tensor, slots: int) -> None:
        self.kind = kind
        self.slots = slots
        self._memory = memory
        at, self._stacked = 0, []
        for planes in kind.planes:
            tensors = []
            for plane in planes:
                raw = memory[at : at + slots * plane.nbytes]
                tensors.append(raw.view(plane.dtype).view(slots, *plane.shape))
                at += slots * plane.room
            self._stacked.append(tensors)

    @property
    def gate_up(self) -> list[torch.Tensor]:
        """Codes and scales, or weights, of all slots, [slots, ...] each."""
        return self._stacked[0]

    @property
    def down(self) -> list[torch.Tensor]:
        return self._stacked[1]

    def slot(self, number: int) -> list[torch.Tensor]:
        """A slot's tensors in the order of planes."""
        return [tensor[number] for tensors in self._stacked for tensor in tensors]

    def weights(self, number: int) -> ExpertWeights:
        """The expert in a slot, as views into it."""
        width, hidden = self.kind.width, self.kind.hidden
        gate_up, down = ([tensor[number] for tensor in tensors] for tensors in self._stacked)
        gate, up = zip(*(_halves(tensor, self.kind.gate_up) for tensor in gate_up), strict=True)
        return ExpertWeights(
            self._matrix(self.kind.gate_up, (width, hidden), gate, number),
            self._matrix(self.kind.gate_up, (width, hidden), up, number),
            self._matrix(self.kind.down, (hidden, width), down, number),
        )

    def _matrix(self, name: str, shape: Shape, tensors: Sequence[torch.Tensor], number: int) -> QuantTensor:
        if name in PACKED_INT:
            stored: QuantFormat = PackedAlongOutputs(name, self, number)
            return QuantTensor(stored, shape, dict(zip((CODES, SCALES), tensors, strict=True)))
        return QuantTensor(PlacedPlain(name, self, number), shape, {WEIGHT: tensors[0]})


def _halves(tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, ...]:
    """Gate and up: columns of integers and scales, rows of BF16."""
    return tensor.chunk(2, dim=1 if name in PACKED_INT else 0)
