"""Norm and router over all rows of a batch at once, in float32: for devices, where a call costs more than a row.

The defaults of base.py work row by row, which makes a row's bits its own; here they may depend on the batch. Both
choose alike: the bias enters the choice only, ties go to the lowest id.
"""

from __future__ import annotations

import torch

from .base import RoutingRule


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
