"""One matrix from one format to another, a block of rows at a time, with the error that it costs.

The blocks of many matrices come from one iterator, so that the next are read and worked on, each by a thread, while
this one is written. Rows don't depend on one another in any format (FP8: blocks of 128 rows) and the sums over them are
added in their order, so neither the block size nor the number of threads changes a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .checkpoint import StoredModule
from .decoding import decoded, decoded_spans
from .direct_reading import read_direct
from .errors import CheckpointError
from .formats import FP8_NAME
from .fp8 import BLOCK
from .method import Method, Quantize
from .one_pass import Sums, in_one_pass
from .quantization_plan import WEIGHT_SHAPE, Matrix
from .safetensors_file import TensorRecord
from .types import QuantTensor

# Of a block: what is read at once, and worked on by one thread. Smaller ones have the threads wait for each other.
READ_BYTES = 16 << 20
# Weights that stay in a processor's cache, as float32, from one loop over them to the next.
SPAN_WEIGHTS = 1 << 18


@dataclass
class Damage:
    """What a conversion costs, over all weights of a matrix: sums of squares and products in float64."""

    before: float = 0.0
    after: float = 0.0
    product: float = 0.0

    def add(self, sums: Sums) -> None:
        """Sums [3] of weight**2, made**2 and weight * made."""
        self.before += float(sums[0])
        self.after += float(sums[1])
        self.product += float(sums[2])

    @property
    def relative_mse(self) -> float:
        """Sum of squared errors over sum of squared weights; 0 for zeros that stay zeros."""
        error = self.before - 2 * self.product + self.after  # exact to 1e-14 of `before`; 0 where nothing changed
        return max(0.0, error) / self.before if self.before else 0.0

    @property
    def cosine(self) -> float:
        """Of the angle between the weights before and after; 1 for zeros that stay zeros."""
        norm = math.sqrt(self.before * self.after)
        return self.product / norm if norm else 1.0


@dataclass(frozen=True)
class Block:
    """Some rows of a matrix as stored, and how they are quantized."""

    matrix: Matrix
    rows: QuantTensor
    method: Method
    quantize: Quantize

    def in_one_pass(self) -> tuple[dict[str, torch.Tensor], Sums] | None:
        """What `one_pass` makes of the rows; None where it does not know the way."""
        if self.method.hessians is not None:
            return None
        importance = self.method.importance_of(self.matrix)
        return in_one_pass(self.rows, self.matrix.target, self.method.scale_search, importance)


@dataclass(frozen=True)
class ConvertedBlock:
    """Stored tensors in pieces by suffix, without weight_shape; `sums` is what Damage.add takes."""

    rows: int
    parts: dict[str, list[torch.Tensor]]
    sums: Sums


def block_reads(matrix: Matrix, method: Method) -> Iterator[Callable[[], Block]]:
    """What reads the source rows of a matrix, a block each."""
    quantize, source = method.quantizer(matrix), matrix.source

    def read(start: int, stop: int) -> Block:
        return Block(matrix, read_rows(source, start, stop), method, quantize)

    for start, stop in row_spans(source, READ_BYTES * source.shape[0] // source.nbytes):
        yield partial(read, start, stop)


def read_blocks(matrix: Matrix, method: Method) -> Iterator[Block]:
    """The source rows of a matrix, block after block."""
    return (read() for read in block_reads(matrix, method))


def read_first_rows(matrix: Matrix, method: Method) -> Block:
    """The fewest rows that can be converted by themselves, as a block."""
    rows = read_rows(matrix.source, *row_spans(matrix.source, 1)[0])
    return Block(matrix, rows, method, method.quantizer(matrix))


def blank_block(matrix: Matrix, method: Method) -> Block:
    """The fewest rows of zeros in the source's format: converting them has the compiled loops loaded."""
    source = matrix.source_format
    shape = (row_spans(matrix.source, 1)[0][1], *matrix.source.shape[1:])
    parts = {
        suffix: torch.zeros(size, dtype=dtype)
        for suffix, (dtype, size) in source.parts(shape).items()
        if suffix != WEIGHT_SHAPE
    }
    return Block(matrix, QuantTensor(source, shape, parts), method, method.quantizer(matrix))


def convert_block(block: Block) -> ConvertedBlock:
    """The work of one thread. Raises CheckpointError naming file and module."""
    matrix, rows = block.matrix, block.rows
    columns = math.prod(matrix.source.shape[1:])
    step = BLOCK if matrix.target.name == FP8_NAME else max(1, SPAN_WEIGHTS // columns)
    parts: dict[str, list[torch.Tensor]] = {}
    sums = np.zeros(3)
    try:
        if (whole := block.in_one_pass()) is not None:
            return ConvertedBlock(rows.shape[0], {suffix: [part] for suffix, part in whole[0].items()}, whole[1])
        recoded = rows.format.recode(rows, matrix.target)
        spans = decoded_spans(rows, step) if recoded is None else [decoded(rows)]
        for weights in spans:
            made = block.quantize(weights) if recoded is None else recoded
            sums += _sums(weights, QuantTensor(matrix.target, tuple(weights.shape), made))
            for suffix, part in made.items():
                if suffix != WEIGHT_SHAPE:
                    parts.setdefault(suffix, []).append(part)
    except CheckpointError as error:
        file = next(iter(matrix.source.parts.values()))[0]
        raise CheckpointError(f"{file}: {matrix.module}: {error}") from error
    return ConvertedBlock(block.rows.shape[0], parts, sums)


def converted(matrix: Matrix, blocks: Iterator[ConvertedBlock], damage: Damage) -> Iterator[torch.Tensor]:
    """The stored tensors of `matrix` but for weight_shape, in the order of their bytes and in pieces: the first one
    as it is made, the small ones behind it. Takes as many of `blocks` as the matrix has."""
    later: dict[str, list[torch.Tensor]] = {}
    rows = 0
    while rows < matrix.source.shape[0]:
        block = next(blocks)
        rows += block.rows
        damage.add(block.sums)
        first, *others = block.parts
        yield from block.parts[first]
        for suffix in others:
            later.setdefault(suffix, []).extend(block.parts[suffix])
    for pieces in later.values():
        yield from pieces


def converted_tensor(matrix: Matrix, method: Method | None = None) -> QuantTensor:
    """The whole matrix in memory, with the bytes that `converted` makes of it; by the amax rule where no other is."""
    pieces: dict[str, list[torch.Tensor]] = {}
    for block in map(convert_block, read_blocks(matrix, method or Method())):
        for suffix, parts in block.parts.items():
            pieces.setdefault(suffix, []).extend(parts)
    whole = {suffix: torch.cat(parts) for suffix, parts in pieces.items()}
    if WEIGHT_SHAPE in matrix.specs:
        whole[WEIGHT_SHAPE] = torch.tensor(matrix.source.shape, dtype=torch.int32)
    return QuantTensor(matrix.target, matrix.source.shape, whole)


def row_spans(source: StoredModule, most: int) -> list[tuple[int, int]]:
    """Spans of about `most` of a weight's rows, that can be read and converted by themselves."""
    rows = source.shape[0]
    multiple = math.lcm(BLOCK, source.format.row_multiple if source.format else 1)
    step = max(1, most // multiple) * multiple
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _sums(weights: torch.Tensor, made: QuantTensor) -> Sums:
    from .quantize_kernels import measure

    by_row = np.empty((len(weights), 3))
    shape = len(weights), -1
    measure(weights.view(shape).numpy(), decoded(made).view(shape).numpy(), by_row)
    sums: Sums = by_row.sum(0)
    return sums


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
    buffer = read_direct(path, record.offset + start * row_bytes, shape[0] * row_bytes, f"tensor {record.name}")
    if buffer.data_ptr() % record.dtype.itemsize:
        buffer = buffer.clone()
    return buffer.view(record.dtype).view(shape)
