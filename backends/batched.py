"""Norm, router and attention over all rows at once, in float32: for devices, where a call costs more than a row.

The defaults of base.py work row by row, which makes a row's bits its own; here they may depend on the batch. The
router chooses as theirs does: the bias enters the choice only, ties go to the lowest id.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import RoutingRule, Segment

SCORE_BYTES = 256 << 20


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis of x [T, n]."""
    return weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps))


def route(logits: torch.Tensor, bias: torch.Tensor, rule: RoutingRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] to ids int64 [T, K], ascending, and weights float32 [T, K]."""
    scores = torch.sigmoid(logits)
    choice = scores + bias
    if rule.n_group > 1:
        groups = choice.view(len(choice), rule.n_group, -1)
        best_two = groups.topk(2, dim=-1).values.sum(-1)
        kept = torch.sort(best_two, dim=-1, descending=True, stable=True).indices[:, : rule.topk_group]
        lost = torch.ones_like(best_two, dtype=torch.bool).scatter(1, kept, False)
        choice = groups.masked_fill(lost[:, :, None], -torch.inf).flatten(1)
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, : rule.num_experts_per_tok]
    ids = ids.sort(dim=-1).values
    weights = scores.gather(1, ids)
    if rule.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * rule.routed_scaling_factor


def latent_attention(
    q_nope: torch.Tensor, q_rope: torch.Tensor, segments: Sequence[Segment], kv_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """As Backend.attention, kv_b's values float32 [H * (nope + V), R]: one product a sequence, its rows in parts whose
    scores take SCORE_BYTES at most."""
    heads, nope = q_nope.shape[1:]
    rank = kv_b.shape[1]
    per_head = kv_b.view(heads, -1, rank)
    absorbed = torch.einsum("thn,hnr->thr", q_nope, per_head[:, :nope])
    query = torch.cat((absorbed, q_rope), dim=-1)  # [T, H, R + P]
    mixed = [query.new_empty(0, heads, rank)]
    for segment in segments:
        latent = segment.latent
        past = len(latent) - (segment.stop - segment.start)
        step = max(1, SCORE_BYTES // (4 * heads * max(1, len(latent))))
        for first in range(segment.start, segment.stop, step):
            last = min(first + step, segment.stop)
            seen = past + torch.arange(first, last, device=latent.device) - segment.start
            later = torch.arange(len(latent), device=latent.device)[None] > seen[:, None]
            scores = torch.einsum("thr,nr->thn", query[first:last], latent) * scale
            p = torch.softmax(scores.masked_fill(later[:, None], -torch.inf), dim=-1)
            mixed.append(torch.einsum("thn,nr->thr", p, latent[:, :rank]))
    return torch.einsum("thr,hvr->thv", torch.cat(mixed), per_head[:, nope:])
