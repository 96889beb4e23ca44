"""Blocks of experts as a program for the team: preparation of the tokens, gate and up, down.

Invariant: all memory that the program points at is held until it is over. Experts of one call have the same shapes and
formats. A small call is the calling thread's alone; which threads work changes no bit.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from k2lite.quant.types import ExpertWeights

from .activations import BLOCK, CHUNK, FLOAT_PAD, GROUP, INT4, INT8
from .compute_team import ComputeTeam, phase
from .experts import ENTRY, down, expert_scratch_bytes, gate_up, place_tokens
from .int_linear import ROWS
from .matrix import Matrix, matrix_of
from .multiply import multiply
from .preparation import is_small, prepare_rows


class ExpertCall(NamedTuple):
    """An expert's matrices, and its tokens: rows and slots int64 [n], or None for all rows and slot 0."""

    gate: Matrix
    up: Matrix
    down: Matrix
    rows: torch.Tensor | None
    slots: torch.Tensor | None
    tokens: int

    @property
    def alike(self) -> tuple[int, int, int]:
        """Equal for experts of the same shapes and formats."""
        return id(self.gate.alike), id(self.up.alike), id(self.down.alike)


def expert_call(
    expert: ExpertWeights, rows: torch.Tensor | None, slots: torch.Tensor | None, tokens: int, rounded: bool
) -> ExpertCall | None:
    """None where gate and up don't take their inputs prepared in the same way."""
    gate, up, down = [matrix_of(weight, rounded) for weight in expert]
    return ExpertCall(gate, up, down, rows, slots, tokens) if gate.how == up.how else None


def run_experts(team: ComputeTeam, x: torch.Tensor, calls: Sequence[ExpertCall], out: torch.Tensor) -> None:
    """Write out [T, K, D] for x float32 [T, D]."""
    with team:
        _run(team, x, calls, out)


def _run(team: ComputeTeam, x: torch.Tensor, calls: Sequence[ExpertCall], out: torch.Tensor) -> None:
    gate, _, last = calls[0][:3]
    tokens = sum(call.tokens for call in calls)
    # a few experts of a large batch: only their tokens are prepared, for each expert by itself
    by_expert = tokens < x.shape[0]
    index = torch.cat([call.rows for call in calls if call.rows is not None]) if by_expert else None
    rows = tokens if by_expert else x.shape[0]
    inner_bytes, step = last.prepared_bytes, gate.prepared_bytes
    prepared = team.room(rows * step + tokens * inner_bytes + 8 * (rows + 3 * tokens))
    inner = prepared + rows * step
    tables = inner + tokens * inner_bytes
    entries = _entries(calls, inner, inner_bytes, tables + 8 * rows, 8 * tokens)
    at, small = entries.buffer_info()[0], is_small(3 * gate.nbytes * tokens)
    token_bytes, slot_bytes = (4 * stride for stride in out.stride()[:2])
    places = [at, prepared, step, by_expert, out.data_ptr(), token_bytes, slot_bytes, inner_bytes]
    width, wide = -(-gate.out // ROWS), -(-last.out // ROWS)
    each = (CHUNK, GROUP) if last.how in (INT4, INT8) else (FLOAT_PAD, BLOCK)
    inner_groups = -(-last.columns // each[0]) * (each[0] // each[1])
    first = [multiply.address, at, width, gate.out, last.how, inner_bytes, inner_groups]
    program = prepare_rows(x, index, rows, gate, prepared, tables)
    program += phase(place_tokens, places, len(calls), alone=tokens <= 64)
    program += phase(gate_up, first, len(calls) * width, alone=small)
    program += phase(down, [multiply.address, at, wide], len(calls) * wide, alone=small)
    team.run(program, expert_scratch_bytes(gate.columns, gate.out))


def _entries(calls: Sequence[ExpertCall], inner: int, inner_bytes: int, tables: int, table_bytes: int) -> array[int]:
    """[E, ENTRY], with three tables of all tokens from `tables` on."""
    entries, before = array("q"), 0
    for call in calls:
        at = tables + 8 * before
        places = [0 if tensor is None else tensor.data_ptr() for tensor in (call.rows, call.slots)]
        entries.extend((
            call.gate.address, call.up.address, call.down.address, call.tokens, *places, before,
            at, at + table_bytes, at + 2 * table_bytes, inner + before * inner_bytes,
        ))  # fmt: skip
        before += call.tokens
    assert len(entries) == ENTRY * len(calls)
    return entries
