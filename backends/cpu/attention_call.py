"""What the attention kernels are given: segments and queries as tables of addresses.

Invariant: at most TOKENS tokens at once, which bounds the memory for whole queries; a token's bits don't depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from k2lite.backends.base import Segment

from .activations import BLOCK, BLOCK_BYTES
from .attention import MOST_HEADS, absorb, attend, attention_scratch_bytes, make_values
from .compute_team import ComputeTeam
from .matrix import IN, Integers

TOKENS = 256


def run_attention(
    team: ComputeTeam,
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    segments: Sequence[Segment],
    kv_b: list[int],
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write out [T, H, V]; kv_b is the matrix's fields."""
    matrix = np.array(kv_b, np.int64)
    places, latent = _latents(segments, len(q_nope))
    for begin in range(0, len(q_nope), TOKENS):
        some = slice(begin, begin + TOKENS)
        _some(team, q_nope[some], q_rope[some], places[some], latent, matrix, scale, out[some])


def _latents(segments: Sequence[Segment], tokens: int) -> tuple[Integers, int]:
    """For each token the address of its sequence's latents and how many it sees; and the width of a latent."""
    places = np.empty((tokens, 2), np.int64)
    for segment in segments:
        if segment.latent.stride() != (segment.latent.shape[1], 1) or segment.latent.dtype != torch.float32:
            raise ValueError("latents are float32 rows that lie one behind another")
        past = segment.latent.shape[0] - (segment.stop - segment.start)
        places[segment.start : segment.stop, 0] = segment.latent.data_ptr()
        places[segment.start : segment.stop, 1] = past + 1 + np.arange(segment.stop - segment.start)
    return places, segments[0].latent.shape[1]


def _some(
    team: ComputeTeam,
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    places: Integers,
    latent: int,
    matrix: Integers,
    scale: float,
    out: torch.Tensor,
) -> None:
    tokens, heads, nope = q_nope.shape
    rank, value = int(matrix[IN]), out.shape[2]
    query_bytes, mixed_bytes = (-(-width // BLOCK) * BLOCK_BYTES for width in (latent, rank))
    queries = torch.empty(tokens * heads, query_bytes, dtype=torch.uint8)
    # the values' job reads whole blocks; the last ones are zero behind the latent's end
    mixed = torch.empty(tokens * heads, mixed_bytes, dtype=torch.uint8)
    tables = [_head_rows(q_nope), _head_rows(q_rope), np.ascontiguousarray(places)]
    scales = np.array([scale], np.float32)
    # few tokens: heads are shared out among threads; else a token is a task
    each = min(MOST_HEADS, heads if tokens >= team.threads else -(-heads // team.threads))
    arguments = [
        matrix.ctypes.data, tokens, heads, nope, q_rope.shape[2], value, tables[0].ctypes.data, tables[1].ctypes.data,
        queries.data_ptr(), query_bytes, tables[2].ctypes.data, latent, each, mixed.data_ptr(), mixed_bytes,
        scales.ctypes.data, out.data_ptr(),
    ]  # fmt: skip
    scratch = attention_scratch_bytes(rank, latent, nope)
    team.launch(absorb, arguments, heads, scratch)
    team.launch(attend, arguments, tokens * -(-heads // each), scratch)
    team.launch(make_values, arguments, heads, scratch)


def _head_rows(x: torch.Tensor) -> Integers:
    """Where each row of x [T, H, n] begins, [T * H]."""
    token, head = (step * x.element_size() for step in x.stride()[:2])
    starts = token * np.arange(x.shape[0], dtype=np.int64)[:, None] + head * np.arange(x.shape[1], dtype=np.int64)
    return x.data_ptr() + starts.ravel()
