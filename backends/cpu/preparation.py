"""The first phase of every product: rows of floats to inputs as the kernels take them.

Knows no weights. `is_small` is for all phases: what a thread does alone before another could have helped.
"""

from __future__ import annotations

import torch

from .activations import PIECE, prepare
from .compute_team import phase
from .matrix import Matrix

SMALL = 1 << 17  # bytes of weights times tokens: some microseconds


def is_small(nbytes: int) -> bool:
    """Whether handing a phase over, and on a busy machine waiting for who took it, costs more than it gains."""
    return nbytes <= SMALL


def prepare_rows(
    x: torch.Tensor,
    index: torch.Tensor | None,
    rows: int,
    matrix: Matrix,
    prepared: int,
    table: int,
    results: tuple[int, int, int] = (0, 0, 0),
) -> list[int]:
    """Prepare `rows` rows of x float32 [T, n] (those that `index` int64 names, or all) for a matrix, at the address
    `prepared`, and fill the table of their addresses; results: the same for a table, the first result and its bytes."""
    pieces = max(1, -(-matrix.columns // PIECE))
    arguments = [
        x.data_ptr(), 4 * x.stride(0), matrix.columns, prepared, matrix.prepared_bytes, matrix.how, pieces,
        0 if index is None else index.data_ptr(), table, *results,
    ]  # fmt: skip
    return phase(prepare, arguments, rows * pieces, alone=is_small(16 * rows * matrix.columns))
