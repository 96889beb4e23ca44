"""Attention as a program for the team: segments and queries as addresses.

Invariant: at most TOKENS tokens at once, which bounds the memory for whole queries; a token's bits don't depend on it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from k2lite.backends.base import Segment

from .activations import BLOCK, BLOCK_BYTES
from .attention import MOST_HEADS, absorb, attend, attention_scratch_bytes, make_values, place_latents
from .compute_team import ComputeTeam, phase
from .matrix import Matrix
from .preparation import is_small

TOKENS = 256


def run_attention(
    team: ComputeTeam,
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    segments: Sequence[Segment],
    kv_b: Matrix,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write out [T, H, V]."""
    with team:
        _run(team, q_nope, q_rope, segments, kv_b, scale, out)


def _run(
    team: ComputeTeam,
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    segments: Sequence[Segment],
    kv_b: Matrix,
    scale: float,
    out: torch.Tensor,
) -> None:
    tokens, heads, nope = q_nope.shape
    rank, value, latent = kv_b.columns, out.shape[2], segments[0].latent.shape[1]
    query_bytes, mixed_bytes = (-(-width // BLOCK) * BLOCK_BYTES for width in (latent, rank))
    rows = min(tokens, TOKENS) * heads
    # the values' job reads whole blocks; the last ones are zero behind the latent's end
    queries = team.room(rows * (query_bytes + mixed_bytes) + 16 * tokens)
    mixed = queries + rows * query_bytes
    table = mixed + rows * mixed_bytes
    places, scales = _places(segments), array("f", [scale])
    nope_token, nope_head, rope_token, rope_head = (4 * step for x in (q_nope, q_rope) for step in x.stride()[:2])
    seen = sum((segment.stop - segment.start) * segment.latent.shape[0] for segment in segments)
    small = is_small(2 * tokens * kv_b.nbytes + 8 * heads * seen * latent)
    program = phase(place_latents, [places.buffer_info()[0], table], len(segments), alone=True)
    for begin in range(0, tokens, TOKENS):
        some = min(TOKENS, tokens - begin)
        # few tokens: heads are shared out among threads; else a token is a task
        each = min(MOST_HEADS, heads if some >= team.threads else -(-heads // team.threads))
        arguments = [
            kv_b.address, some, heads, nope, q_rope.shape[2], value,
            q_nope.data_ptr() + begin * nope_token, nope_token, nope_head,
            q_rope.data_ptr() + begin * rope_token, rope_token, rope_head,
            queries, query_bytes, table + 16 * begin, latent, each, mixed, mixed_bytes, scales.buffer_info()[0],
            out.data_ptr() + 4 * begin * heads * value,
        ]  # fmt: skip
        program += phase(absorb, arguments, heads, alone=small)
        program += phase(attend, arguments, some * -(-heads // each), alone=small)
        program += phase(make_values, arguments, heads, alone=small)
    team.run(program, attention_scratch_bytes(rank, latent, nope))


def _places(segments: Sequence[Segment]) -> array[int]:
    """[n, 4]: first row, end, address of the latents, positions before."""
    places = array("q")
    for segment in segments:
        latent, rows = segment.latent, segment.stop - segment.start
        if latent.stride() != (latent.shape[1], 1) or latent.dtype != torch.float32:
            raise ValueError("latents are float32 rows that lie one behind another")
        places.extend((segment.start, segment.stop, latent.data_ptr(), latent.shape[0] - rows))
    return places
