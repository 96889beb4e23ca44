"""An expert in a slot of a backend's memory: how many bytes it takes, and its parts one behind another in them.

Invariant: every part begins on a boundary of 64 bytes. Knows no device; copies with what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    at = 0
    packed = []
    for matrix in like:
        parts = {}
        for suffix, part in matrix.parts.items():
            parts[suffix] = slot[at : at + part.nbytes].view(part.dtype).view(part.shape)
            at += _aligned(part.nbytes)
        packed.append(QuantTensor(matrix.format, matrix.shape, parts))
    return ExpertWeights(*packed)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
