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

from .checkpoint import StoredModule
from .errors import CheckpointError
from .file_reading import read_exactly
from .formats import PACKED_INT, ScaleSearch
from .fp8 import BLOCK
from .quantization_plan import WEIGHT_SHAPE, Matrix
from .safetensors_file import TensorRecord
from .types import QuantTensor

# Weights in one block: 32 MiB in float32, and a few such temporaries.
BLOCK_WEIGHTS = 8 << 20


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
    return row_spans(matrix.source)


def row_spans(source: StoredModule) -> list[tuple[int, int]]:
    """Spans of rows of about BLOCK_WEIGHTS weights that can be read and quantized by themselves in every format."""
    rows = source.shape[0]
    columns = math.prod(source.shape[1:])
    multiple = math.lcm(BLOCK, source.format.row_multiple if source.format else 1)
    step = max(1, BLOCK_WEIGHTS // max(1, columns) // multiple) * multiple
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def read_blocks(matrices: Iterable[Matrix]) -> Iterator[QuantTensor]:
    """The source rows of each matrix, block after block."""
    for matrix in matrices:
        for start, stop in row_blocks(matrix):
            yield read_rows(matrix.source, start, stop)


def convert(
    matrix: Matrix, blocks: Iterator[QuantTensor], scale_search: ScaleSearch, damage: Damage
) -> Iterator[torch.Tensor]:
    """The stored tensors of `matrix` but for weight_shape, in the order of their bytes and in pieces: the first one
    as it is made, the small ones behind it. Takes as many of `blocks` as the matrix has."""
    later: dict[str, list[torch.Tensor]] = {}
    search: ScaleSearch = scale_search if matrix.target.name in PACKED_INT else "amax"
    for _ in row_blocks(matrix):
        block = next(blocks)
        weights = block.dequantize()
        try:
            parts = block.format.recode(block, matrix.target)
            if parts is None:
                parts = matrix.target.quantize(weights, scale_search=search)
        except CheckpointError as error:
            file = next(iter(matrix.source.parts.values()))[0]
            raise CheckpointError(f"{file}: {matrix.module}: {error}") from error
        damage.add(weights, matrix.target.dequantize(parts, block.shape))
        first, *others = (suffix for suffix in parts if suffix != WEIGHT_SHAPE)
        yield parts[first]
        for suffix in others:
            later.setdefault(suffix, []).append(parts[suffix])
    for pieces in later.values():
        yield from pieces


def read_rows(source: StoredModule, start: int, stop: int) -> QuantTensor:
    """Rows [start, stop) of a weight, which are one of its row_spans. Raises CheckpointError naming file and tensor."""
    if source.format is None:
        raise CheckpointError("a weight that is not whole can't be read")
    parts = {
        suffix: _read_range(path, record, *source.format.part_rows(suffix, start, stop))
        for suffix, (path, record) in source.parts.items()
        if suffix != WEIGHT_SHAPE
    }
    return QuantTensor(source.format, (stop - start, *source.shape[1:]), parts)


def _read_range(path: Path, record: TensorRecord, start: int, stop: int) -> torch.Tensor:
    """Entries [start, stop) of a tensor's first axis."""
    shape = (stop - start, *record.shape[1:])
    row_bytes = math.prod(record.shape[1:]) * record.dtype.itemsize
    buffer = torch.empty(shape[0] * row_bytes, dtype=torch.uint8)
    read_exactly(path, record.offset + start * row_bytes, buffer, f"tensor {record.name}")
    return buffer.view(record.dtype).view(shape)
