"""What attention's roundings may cost: rotary keys, which no norm bounds, must keep more bits than BF16 has."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from k2lite.backends.base import Segment
from k2lite.testing import oracle
from k2lite.testing.samples import matrix, normal
from tests.backends.cuda.interpreted import InterpretedBackend


def test_long_rotary_keys_keep_their_scores() -> None:
    """Keys about 100 long in each number, which differ by about 1: BF16 has steps of a half there."""
    kv_b = matrix(1, "int8_channel", 2 * 48, 64)
    latent, q_nope, q_rope = normal(2, 20, 80), normal(3, 3, 2, 32), normal(4, 3, 2, 16)
    latent[:, 64:] += 100
    found = InterpretedBackend().attention(q_nope, q_rope, [Segment(0, 3, latent)], kv_b, 0.2)
    expected = oracle.attention(
        *(oracle.exact(q) for q in (q_nope, q_rope)), [(0, 3, oracle.exact(latent))], oracle.weight_values(kv_b), 0.2
    )
    assert oracle.relative_error(found, expected) < 5e-3
