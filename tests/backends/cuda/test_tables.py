"""Experts as addresses: the table may change between launches that do not, as a captured graph's do not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from k2lite.backends.cuda.experts import Work, addresses, expert_kind, multiply_experts, tiles
from k2lite.backends.cuda.products import prepare
from k2lite.quant.types import ExpertWeights, QuantTensor
from k2lite.testing import oracle
from k2lite.testing.samples import expert, normal
from tests.backends.cuda import interpreted  # noqa: F401


def test_one_launch_serves_any_state_of_a_cache() -> None:
    formats = ("int4_g32", "int4_g32", "int4_g32")
    first, second = expert(1, formats, 64, 64), expert(4, formats, 64, 64)
    kind = expert_kind(first)
    assert kind is not None
    assert kind == expert_kind(second)
    x = normal(7, 2, 64)
    prepared = prepare(x, kind.kinds[0])
    out = torch.zeros(3, 64)
    work = Work(
        table=torch.tensor([addresses(first), addresses(second), [0] * 6]),
        tiles=torch.tensor(
            [[0, 0, 2], [1, 2, 1], [2, 3, 0]], dtype=torch.int32
        ),  # the last has no rows: no expert is read
        tokens=torch.tensor([0, 1, 1], dtype=torch.int32),
        places=torch.tensor([2, 0, 1], dtype=torch.int32),
    )
    for table in ([first, second], [second, first]):
        work.table[:2] = torch.tensor([addresses(item) for item in table])
        multiply_experts(prepared, work, kind, out, 16)
        for place, token, item in ((2, 0, table[0]), (0, 1, table[0]), (1, 1, table[1])):
            expected = oracle.mlp(oracle.exact(x[token : token + 1]), item)
            assert oracle.relative_error(out[place : place + 1], expected) < 5e-3


def test_tiles_cover_each_expert_s_assignments_once() -> None:
    assert tiles([3, 0, 5], 4) == [[0, 0, 3], [2, 3, 4], [2, 7, 1]]


def test_experts_that_need_another_path_have_no_kind() -> None:
    usual = expert(1, ("int4_g32", "int4_g32", "int8_g128"), 128, 128)
    assert expert_kind(usual) is not None
    assert expert_kind(expert(1, ("int4_g32", "int4_g64", "int4_g32"), 128, 128)) is None
    assert expert_kind(expert(1, ("f32", "f32", "f32"), 128, 128)) is None
    codes = usual.gate_proj.parts["weight_packed"]
    shifted = torch.empty(codes.nbytes + 8, dtype=torch.uint8)[8:].view(torch.int32).view(codes.shape)
    gate = QuantTensor(
        usual.gate_proj.format, usual.gate_proj.shape, {**usual.gate_proj.parts, "weight_packed": shifted}
    )
    assert expert_kind(ExpertWeights(gate, usual.up_proj, usual.down_proj)) is None
