"""One matrix from one format to another, a block of rows at a time, with the error that it costs.

The blocks of many matrices come from one iterator, so that the next are read while this one is worked on. Rows don't
depend on one another in any format (FP8: blocks of 128 rows), so the block size changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import CheckpointError
from .file_reading import read_exactly
from .fp8 import BLOCK, Fp8Block
from .method import Method
from .quantization_plan import WEIGHT_SHAPE, Matrix
from .safetensors_file import TensorRecord
from .types import QuantTensor

# Weights in one block: 32 MiB in float32, and a few such temporaries.
BLOCK_WEIGHTS = 8 << 20
AMAX = Method()


@dataclass
class Damage:
    """What a conversion costs, over all weights of a matrix: sums of squares and products in float64."""

    error: float = 0.0
    before: float = 0.0
    after: float = 0.0
    product: float = 0.0

    def add(self, weights: torch.Tensor, made: torch.Tensor) -> None:
        a, b = weights.flatten().double(), made.flatten().double()
        difference = a - b
        self.error += float(difference.dot(difference))
        self.before += float(a.dot(a))
        self.after += float(b.dot(b))
        self.product += float(a.dot(b))

    @property
    def relative_mse(self) -> float:
        """Sum of squared errors over sum of squared weights; 0 for zeros that stay zeros."""
        return self.error / self.before if self.before else 0.0

    @property
    def cosine(self) -> float:
        """Of the angle between the weights before and after; 1 for zeros that stay zeros."""
        norm = math.sqrt(self.before * self.after)
        return self.product / norm if norm else 1.0


def row_blocks(matrix: Matrix) -> list[tuple[int, int]]:
    """The spans of rows that are converted together."""
    rows = matrix.source.shape[0]
    columns = math.prod(matrix.source.shape[1:])
    step = max(1, BLOCK_WEIGHTS // max(1, columns) // BLOCK) * BLOCK
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def read_blocks(matrices: Iterable[Matrix]) -> Iterator[QuantTensor]:
    """The source rows of each matrix, block after block."""
    for matrix in matrices:
        for start, stop in row_blocks(matrix):
            yield _read_rows(matrix, start, stop)


def convert(matrix: Matrix, blocks: Iterator[QuantTensor], method: Method, damage: Damage) -> Iterator[torch.Tensor]:
    """The stored tensors of `matrix` but for weight_shape, in the order of their bytes and in pieces: the first one
    as it is made, the small ones behind it. Takes as many of `blocks` as the matrix has."""
    later: dict[str, list[torch.Tensor]] = {}
    for weights, parts in _converted(matrix, blocks, method):
        damage.add(weights, matrix.target.dequantize(parts, tuple(weights.shape)))
        first, *others = (suffix for suffix in parts if suffix != WEIGHT_SHAPE)
        yield parts[first]
        for suffix in others:
            later.setdefault(suffix, []).append(parts[suffix])
    for pieces in later.values():
        yield from pieces


def converted_tensor(matrix: Matrix, method: Method = AMAX) -> QuantTensor:
    """The whole matrix in memory, with the bytes that `convert` makes of it."""
    pieces: dict[str, list[torch.Tensor]] = {}
    for _, parts in _converted(matrix, read_blocks([matrix]), method):
        for suffix, part in parts.items():
            pieces.setdefault(suffix, []).append(part)
    whole = {suffix: torch.cat(parts) for suffix, parts in pieces.items() if suffix != WEIGHT_SHAPE}
    if WEIGHT_SHAPE in pieces:
        whole[WEIGHT_SHAPE] = torch.tensor(matrix.source.shape, dtype=torch.int32)
    return QuantTensor(matrix.target, matrix.source.shape, whole)


def _converted(
    matrix: Matrix, blocks: Iterator[QuantTensor], method: Method
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The values of each block of rows and what they become."""
    quantize = method.quantizer(matrix)
    for _ in row_blocks(matrix):
        weights = next(blocks).dequantize()
        try:
            yield weights, quantize(weights)
        except CheckpointError as error:
            file = next(iter(matrix.source.parts.values()))[0]
            raise CheckpointError(f"{file}: {matrix.module}: {error}") from error


def _read_rows(matrix: Matrix, start: int, stop: int) -> QuantTensor:
    source = matrix.source_format
    parts = {}
    for suffix, (path, record) in matrix.source.parts.items():
        if suffix != WEIGHT_SHAPE:
            per_block = isinstance(source, Fp8Block) and suffix == source.scale_suffix
            step = BLOCK if per_block else 1
            parts[suffix] = _read_range(path, record, start // step, -(-stop // step))
    return QuantTensor(source, (stop - start, *matrix.source.shape[1:]), parts)


def _read_range(path: Path, record: TensorRecord, start: int, stop: int) -> torch.Tensor:
    """Entries [start, stop) of a tensor's first axis."""
    shape = (stop - start, *record.shape[1:])
    row_bytes = math.prod(record.shape[1:]) * record.dtype.itemsize
    buffer = torch.empty(shape[0] * row_bytes, dtype=torch.uint8)
    read_exactly(path, record.offset + start * row_bytes, buffer, f"tensor {record.name}")
    return buffer.view(record.dtype).view(shape)
