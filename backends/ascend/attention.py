"""Absorbed MLA through the vendor's fused attention, which knows one shape: latent 512, rotary 64, 2^n heads.

Smaller ones are filled up with zeros, which change no score and no value. One call a sequence.
Shapes: S new tokens, H heads, L cached tokens, R latent width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from ..base import Segment, UnsupportedOperationError
from .operations import latent_attention

LATENT, ROTARY, MAX_HEADS, MASK_SIDE = 512, 64, 128, 2048


def attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    segments: Sequence[Segment],
    kv_b: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As Backend.attention, with kv_b's values bf16 [H * (nope + V), R] and mask int8 [2048, 2048], ones above the
    diagonal."""
    heads, nope = q_nope.shape[1:]
    rank, rotary = kv_b.shape[1], q_rope.shape[2]
    if heads > MAX_HEADS or rank > LATENT or rotary > ROTARY:
        raise UnsupportedOperationError(
            f"backend ascend: attention takes {MAX_HEADS} heads, latents of {LATENT} and rotary parts of {ROTARY} at "
            f"most, and this model has {heads}, {rank} and {rotary}"
        )
    per_head = kv_b.view(heads, -1, rank)
    key_rows, value_rows = per_head[:, :nope], per_head[:, nope:].transpose(1, 2)  # [H, nope, R], [H, R, V]
    absorbed = torch.bmm(q_nope.to(torch.bfloat16).transpose(0, 1), key_rows).transpose(0, 1)  # [T, H, R]
    filled = _power_of_two(heads) - heads
    query = pad(absorbed, (0, LATENT - rank, 0, filled)).contiguous()
    query_rope = pad(q_rope.to(torch.bfloat16), (0, ROTARY - rotary, 0, filled)).contiguous()
    mixed = [
        latent_attention(
            query[segment.start : segment.stop],
            query_rope[segment.start : segment.stop],
            pad(segment.latent[:, :rank].to(torch.bfloat16), (0, LATENT - rank)).contiguous(),
            pad(segment.latent[:, rank:].to(torch.bfloat16), (0, ROTARY - rotary)).contiguous(),
            mask if segment.stop - segment.start > 1 else None,
            scale,
        )
        for segment in segments
        if segment.stop > segment.start
    ]
    if not mixed:
        return q_nope.new_empty(0, heads, value_rows.shape[2])
    latents = torch.cat(mixed)[:, :heads, :rank]
    return torch.bmm(latents.transpose(0, 1), value_rows).transpose(0, 1).to(torch.float32)


def causal_mask(device: torch.device) -> torch.Tensor:
    """What the vendor's "right-down causal" mode wants, whatever the lengths."""
    return torch.ones(MASK_SIDE, MASK_SIDE, dtype=torch.int8, device=device).triu_(1)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
