"""Assignments of experts to tokens, as the table of addresses that the expert kernels read.

Invariant: all memory that the table points at is held by it. Experts of one table have the same shapes and formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from k2lite.backends.base import Assignment
from k2lite.quant.types import ExpertWeights

from .activations import BLOCK, FLOAT_PAD, GROUP, INT4, INT8, prepared_bytes
from .experts import COUNT, DOWN, ENTRY, GATE, INNER, INNER_TABLE, INPUTS, RESULTS, UP
from .matrix import FIELDS, IN, OUT, Integers, matrix_fields, preparation


@dataclass(frozen=True)
class ExpertTable:
    """entries [E, ENTRY]; the rest is what the kernels' arguments need."""

    entries: Integers
    hidden: int
    width: int
    input_how: int
    inner_how: int
    inner_bytes: int
    inner_groups: int
    held: tuple[object, ...]


def one_preparation(expert: ExpertWeights, rounded: bool) -> bool:
    """Whether gate and up take their inputs prepared in the same way."""
    gate, up = (preparation(matrix_fields(w, rounded), rounded) for w in (expert.gate_proj, expert.up_proj))
    return gate == up


def expert_table(
    work: Sequence[Assignment], inputs: Sequence[Integers], out: torch.Tensor, rounded: bool
) -> ExpertTable:
    """inputs: for each assignment the addresses of its tokens' prepared inputs; out float32 [T, K, D]."""
    counts = [len(table) for table in inputs]
    fields = [[matrix_fields(weight, rounded) for weight in item.expert] for item in work]
    matrices = np.array(fields, np.int64)  # [E, 3, FIELDS]
    gate, _, down = fields[0]
    inner_how = preparation(down, rounded)
    inner_bytes = prepared_bytes(down[IN], inner_how)
    inner = torch.empty(sum(counts) * inner_bytes, dtype=torch.uint8)
    begins = np.cumsum([0, *counts])
    inner_table = inner.data_ptr() + inner_bytes * np.arange(begins[-1], dtype=np.int64)
    token_table = np.concatenate(inputs)
    steps = [out.element_size() * step for step in out.stride()[:2]]
    rows = torch.cat([item.rows for item in work]).numpy()
    slots = torch.cat([item.slots for item in work]).numpy()
    results = out.data_ptr() + steps[0] * rows + steps[1] * slots
    entries = np.empty((len(work), ENTRY), np.int64)
    base, one = matrices.ctypes.data, 8 * FIELDS
    for column, matrix in ((GATE, 0), (UP, 1), (DOWN, 2)):
        entries[:, column] = base + one * (3 * np.arange(len(work)) + matrix)
    entries[:, COUNT] = counts
    for column, table in ((INPUTS, token_table), (RESULTS, results), (INNER_TABLE, inner_table)):
        entries[:, column] = table.ctypes.data + 8 * begins[:-1]
    entries[:, INNER] = inner.data_ptr() + inner_bytes * begins[:-1]
    padded = -(-down[IN] // 128) * 128 if inner_how in (INT4, INT8) else -(-down[IN] // FLOAT_PAD) * FLOAT_PAD
    groups = padded // (GROUP if inner_how in (INT4, INT8) else BLOCK)
    held = (matrices, inner, inner_table, token_table, results)
    input_how = preparation(gate, rounded)
    return ExpertTable(entries, gate[IN], gate[OUT], input_how, inner_how, inner_bytes, groups, held)
