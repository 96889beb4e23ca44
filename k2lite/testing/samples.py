"""Seeded inputs of the suite: activations, and weights in every format with the corners of each."""

from __future__ import annotations

from functools import cache

import torch

from k2lite.backends.base import Backend
from k2lite.quant.formats import FP8_NAME, PACKED_INT, format_named
from k2lite.quant.packed_int import pack
from k2lite.quant.types import ExpertWeights, QuantTensor


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_with_corners(seed: int, tokens: int, width: int) -> torch.Tensor:
    """Activations [tokens, width]: row 1 is zero, row 2 has one number only, row 3 an outlier, row 4 is large, row 5
    tiny."""
    x = normal(seed, tokens, width)
    if tokens > 5:
        x[1] = 0
        x[2] = 0
        x[2, width // 2] = -3.0
        x[3, width - 1] = 400.0
        x[4] *= 1e4
        x[5] *= 1e-6
    return x


def matrix(seed: int, format: str, rows: int, columns: int) -> QuantTensor:
    """A weight of the size of a trained one, as the format's own rounding stores it."""
    stored = format_named(format)
    return QuantTensor(stored, (rows, columns), stored.quantize(normal(seed, rows, columns) * columns**-0.5))


def corner_matrix(seed: int, format: str, rows: int, columns: int) -> QuantTensor:
    """Every code there is, the lowest included, and scales of both signs and many sizes; for FP8 every finite code. A
    row of zeros in all."""
    generator = torch.Generator().manual_seed(seed)
    stored = format_named(format)
    parts = stored.quantize(normal(seed, rows, columns))
    if format in PACKED_INT:
        bits = PACKED_INT[format][0]
        low, high = -(1 << (bits - 1)), 1 << (bits - 1)
        codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int16)
        codes[0], codes[-1, :2] = 0, torch.tensor([low, high - 1])
        exponents = torch.randint(-6, 3, parts["weight_scale"].shape, generator=generator).to(torch.float32)
        signs = torch.randint(0, 2, exponents.shape, generator=generator) * 2 - 1
        parts["weight_packed"] = pack(codes.to(torch.float32), bits)
        parts["weight_scale"] = (signs * 1.1 * 2.0**exponents).to(torch.bfloat16)
    elif format == FP8_NAME:
        codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
        codes[0] = 0
        parts["weight"] = codes.view(torch.float8_e4m3fn)
    else:
        parts["weight"][0] = 0
    return QuantTensor(stored, (rows, columns), parts)


def smallest_step(format: str) -> int:
    """Rows of this format are a multiple of so many columns."""
    if format in PACKED_INT:
        bits, group = PACKED_INT[format]
        return group or 32 // bits
    return 1


@cache
def expert(seed: int, formats: tuple[str, str, str], hidden: int, width: int) -> ExpertWeights:
    gate, up, down = formats
    return ExpertWeights(
        matrix(seed, gate, width, hidden), matrix(seed + 1, up, width, hidden), matrix(seed + 2, down, hidden, width)
    )


def on_device(backend: Backend, weight: QuantTensor, *, shift: int = 0) -> QuantTensor:
    """The weight in the backend's memory, each part `shift` bytes behind a boundary of 64: experts lie at any multiple
    of 8, since a checkpoint's bytes are used where they were read."""
    parts = {}
    for suffix, part in weight.parts.items():
        room = backend.alloc(part.nbytes + shift)[shift:].view(torch.uint8)
        backend.copy(part.contiguous().view(torch.uint8).flatten(), room).wait()
        parts[suffix] = room.view(part.dtype).view(part.shape)
    return QuantTensor(weight.format, weight.shape, parts)


def packed(backend: Backend, source: ExpertWeights) -> ExpertWeights:
    """An expert as `pack_expert` leaves it in a slot of the backend's memory."""
    slot = backend.expert_slot([(weight.format, weight.shape) for weight in source])
    return backend.pack_expert(source, backend.alloc(slot.nbytes))
