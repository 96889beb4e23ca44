"""An expert in a slot of a backend's memory: how many bytes it takes, and its parts one behind another in them.

Invariant: every part begins on a boundary of 64 bytes. Knows no device; copies with what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from k2lite.quant.formats import QuantFormat, Shape
from k2lite.quant.types import ExpertWeights, QuantTensor

ALIGNMENT = 64


def slot_bytes(expert: Sequence[tuple[QuantFormat, Shape]]) -> int:
    """Bytes for all parts of matrices that are stored so."""
    parts = (part for stored, shape in expert for part in stored.parts(shape).values())
    return sum(_aligned(dtype.itemsize * math.prod(shape)) for dtype, shape in parts)


def copy_into_slot(
    src: ExpertWeights, slot: torch.Tensor, copy: Callable[[torch.Tensor, torch.Tensor], Any]
) -> ExpertWeights:
    """Copy each part as it is into `slot`, uint8; returns views into it. `copy` is Backend.copy."""
    packed = views_in_slot(src, slot)
    for matrix, room in zip(src, packed, strict=True):
        for suffix, part in matrix.parts.items():
            copy(part, room.parts[suffix]).wait()
    return packed


def views_in_slot(like: ExpertWeights, slot: torch.Tensor) -> ExpertWeights:
    """Where the parts of an expert like this one lie in a slot, uint8, once they were copied there."""
    found = stored_views([(matrix.format, matrix.shape) for matrix in like], slot)
    return ExpertWeights(
        *(
            QuantTensor(matrix.format, matrix.shape, {suffix: room.parts[suffix] for suffix in matrix.parts})
            for matrix, room in zip(like, found, strict=True)
        )
    )


def stored_views(expert: Sequence[tuple[QuantFormat, Shape]], slot: torch.Tensor) -> ExpertWeights:
    """The same for matrices that are stored so: parts lie in their formats' order."""
    return views([(stored, shape, stored.parts(shape)) for stored, shape in expert], slot)


def views(
    matrices: Sequence[tuple[QuantFormat, Shape, Mapping[str, tuple[torch.dtype, Shape]]]], slot: torch.Tensor
) -> ExpertWeights:
    """Matrices of format, shape and parts (dtype and shape each) that lie one behind another in a slot, uint8."""
    at = 0
    found = []
    for stored, shape, parts in matrices:
        there = {}
        for suffix, (dtype, size) in parts.items():
            nbytes = dtype.itemsize * math.prod(size)
            there[suffix] = slot[at : at + nbytes].view(dtype).view(size)
            at += _aligned(nbytes)
        found.append(QuantTensor(stored, tuple(shape), there))
    return ExpertWeights(*found)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
