"""Many experts' blocks over tensors: the table of addresses, the list of tiles, and the two kernels' launches.

Shapes: T tokens, K active experts, D hidden, F expert width, A assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from k2lite.quant.types import ExpertWeights

from .expert_kernels import down_kernel, gate_up_kernel
from .launch import launch
from .products import tile
from .stored import ALIGNMENT, Kind, codes_and_scales, kind_of


@dataclass(frozen=True)
class ExpertKind:
    """What a launch is compiled for: experts of one kind may share it. `kinds` and `dtypes` (codes, scales) are those
    of gate and up together, then of down."""

    kinds: tuple[Kind, Kind]
    dtypes: tuple[tuple[torch.dtype, torch.dtype], tuple[torch.dtype, torch.dtype]]
    hidden: int
    width: int


def expert_kind(expert: ExpertWeights) -> ExpertKind | None:
    """None where gate and up differ, where a part begins at no multiple of 16 bytes, or where activations are not
    rounded: those go matrix by matrix."""
    gate, up, down = expert
    kinds = (kind_of(gate), kind_of(down))
    if kind_of(up) != kinds[0] or "exact" in (kinds[0].format, kinds[1].format):
        return None
    parts = [codes_and_scales(matrix) for matrix in expert]
    if any(part.data_ptr() % ALIGNMENT or not part.is_contiguous() for pair in parts for part in pair):
        return None
    width, hidden = gate.shape
    dtypes = tuple((codes.dtype, scales.dtype) for codes, scales in (parts[0], parts[2]))
    return ExpertKind(kinds, (dtypes[0], dtypes[1]), hidden, width)


def addresses(expert: ExpertWeights) -> list[int]:
    """A row of the table: codes and scales of gate, up and down."""
    return [part.data_ptr() for matrix in expert for part in codes_and_scales(matrix)]


def tiles(counts: Sequence[int], size: int) -> list[list[int]]:
    """Rows (expert, first assignment, assignments) of at most `size` assignments, experts one behind the other."""
    found, first = [], 0
    for expert, count in enumerate(counts):
        found += [[expert, first + at, min(size, count - at)] for at in range(0, count, size)]
        first += count
    return found


def tile_size(most: int) -> int:
    """Assignments of a tile where an expert has at most so many. No assignment's bits depend on it."""
    return int(tile(most, sums=3)["TOKENS"])


@dataclass(frozen=True)
class Work:
    """What the kernels read, all on the device: table int64 [experts, 6]; tiles int32 [n, 3]; tokens int32 [A], whose
    row of x; places int32 [A], which row of the result."""

    table: torch.Tensor
    tiles: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor


def multiply_experts(x: torch.Tensor, work: Work, kind: ExpertKind, out: torch.Tensor, most: int) -> None:
    """Write down(silu(gate x) * (up x)) of each assignment to its row of out, float32 [.., D]. x [T, D] is prepared for
    `kind.kinds[0]`; `most`: assignments of the largest tile, see tile_size."""
    gate_up, down = kind.kinds
    inner = torch.empty(len(work.tokens), kind.width, dtype=torch.bfloat16, device=x.device)
    shape, many = tile(most, sums=3), len(work.tiles)
    launch(
        gate_up_kernel, (-(-kind.width // shape["OUTPUTS"]), many), x, work.table, work.tiles, work.tokens, inner,
        kind.width, kind.hidden, **_loaded(kind.dtypes[0]), **gate_up.loop(kind.hidden, shape["TOKENS"]),
        DOWN_FORMAT=down.format, **shape,
    )  # fmt: skip
    launch(
        down_kernel, (-(-kind.hidden // shape["OUTPUTS"]), many), inner, work.table, work.tiles, work.places, out,
        kind.hidden, kind.width, **_loaded(kind.dtypes[1]), **down.loop(kind.width, shape["TOKENS"]), **shape,
    )  # fmt: skip


def _loaded(dtypes: tuple[torch.dtype, torch.dtype]) -> dict[str, Any]:
    import triton.language as tl

    known = {
        torch.uint8: tl.uint8,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.float32: tl.float32,
    }
    return {"DTYPE": known[dtypes[0]], "SCALE_DTYPE": known[dtypes[1]]}
