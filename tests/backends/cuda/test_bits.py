"""A token's bits are its own: in tiles of any size, alone and among others, splits side by side and not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from k2lite.backends.base import Assignment, Segment
from k2lite.backends.cuda import attention
from k2lite.backends.cuda.products import FEW_TOKENS
from k2lite.backends.cuda.stored import stored
from k2lite.testing import oracle
from k2lite.testing.samples import expert, matrix, normal, rows_with_corners
from tests.backends.cuda.interpreted import InterpretedBackend


@pytest.fixture
def backend() -> InterpretedBackend:
    return InterpretedBackend()


@pytest.mark.parametrize("format", ["int4_g128", "bf16"])
def test_columns_in_splits_sum_up_the_same_for_any_number_of_tokens(backend: InterpretedBackend, format: str) -> None:
    weight = matrix(1, format, 24, 1152)
    assert stored(weight).splits == 2
    x = rows_with_corners(2, FEW_TOKENS + 2, 1152)
    many = backend.linear(x, weight)
    expected = oracle.linear(oracle.exact(x), oracle.weight_values(weight))
    assert oracle.relative_error(many, expected) < 4e-3
    assert torch.equal(backend.linear(x[:17], weight), many[:17])
    assert torch.equal(backend.linear(x[3:4], weight), many[3:4])


def test_an_expert_s_bits_do_not_depend_on_its_tile(backend: InterpretedBackend) -> None:
    weights = expert(3, ("int4_g32", "int4_g32", "int4_g32"), 64, 64)
    x = normal(4, 17, 64).bfloat16().float()
    rows = torch.arange(17)
    many = torch.zeros(17, 1, 64)
    backend.expert_ffn(x, [Assignment(weights, rows, torch.zeros_like(rows))], many)
    exact = oracle.mlp(oracle.exact(x), weights).value
    assert np.linalg.norm(oracle.exact(many[:, 0]) - exact) < 5e-3 * np.linalg.norm(exact)
    one = torch.zeros(1, 1, 64)
    backend.expert_ffn(x[16:17], [Assignment(weights, rows[:1], rows[:1])], one)
    assert torch.equal(one[0], many[16])


def test_pieces_of_a_cache_are_those_of_the_sequence(
    backend: InterpretedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """140 cached tokens are two pieces; a chunk's rows and one row alone see the same ones, in turns or at once."""
    kv_b = matrix(5, "int8_channel", 2 * 48, 64)
    latent, q_nope, q_rope = normal(6, 140, 80), normal(7, 2, 2, 32), normal(8, 2, 2, 16)
    found = backend.attention(q_nope, q_rope, [Segment(0, 2, latent)], kv_b, 0.2)
    expected = oracle.attention(
        *(oracle.exact(q) for q in (q_nope, q_rope)), [(0, 2, oracle.exact(latent))], oracle.weight_values(kv_b), 0.2
    )
    assert oracle.relative_error(found, expected) < 5e-3
    alone = backend.attention(q_nope[:1], q_rope[:1], [Segment(0, 1, latent[:139])], kv_b, 0.2)
    assert torch.equal(alone[0], found[0])
    monkeypatch.setattr(attention, "SCRATCH_BYTES", 1)
    assert torch.equal(backend.attention(q_nope, q_rope, [Segment(0, 2, latent)], kv_b, 0.2), found)
