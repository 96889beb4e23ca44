"""A mixture-of-experts block: the router chooses, a lease brings the experts, the backend multiplies and sums.

Invariant: the order in which experts arrive changes no bit, because each result has its own place in a buffer and
`combine` sums by ascending expert id. Never asks where an expert lies.
Shapes: T tokens, D hidden, K active experts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from k2lite.backends.base import Assignment, Backend, RoutingRule
from k2lite.offload.source import ExpertSource

from .config import ModelConfig
from .weights import MoeWeights

# A step of more tokens is a prompt: its experts pass through, and those of its last tokens are kept.
DECODE_TOKENS = 16
RECENT_TOKENS = 2


def routing_rule(config: ModelConfig) -> RoutingRule:
    return RoutingRule(
        num_experts_per_tok=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=config.topk_group,
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
    )


def moe_block(
    x: torch.Tensor,
    weights: MoeWeights,
    layer: int,
    rule: RoutingRule,
    experts: ExpertSource,
    backend: Backend,
    look_ahead: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """The block's output for normalized hidden states x [T, D]: [T, D].

    `look_ahead` is called with the shared expert's result [T, D] as soon as this layer's reads are under way."""
    ids, expert_weights = backend.router(x, weights.router, weights.e_score_correction_bias, rule)
    recent = None if ids.shape[0] <= DECODE_TOKENS else RECENT_TOKENS
    experts.observe(layer, ids, expert_weights, recent=recent)
    keep = None if recent is None else torch.unique(ids[-recent:]).tolist()
    out = x.new_empty(*ids.shape, x.shape[-1])
    tokens_of = tokens_by_expert(ids)
    with experts.lease(layer, list(tokens_of), keep) as lease:
        shared = backend.mlp(x, weights.shared_experts)
        look_ahead(shared)
        for group in lease.ready():
            work = [Assignment(expert, *tokens_of[number]) for number, expert in group.items()]
            backend.expert_ffn(x, work, out).wait()
    return backend.combine(out, expert_weights, shared)


def tokens_by_expert(ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """For each expert in ids int64 [T, K], in ascending order, where it was chosen: rows and slots, int64 [n] each."""
    if ids.shape[0] == 1:
        rows, slots = torch.zeros_like(ids), torch.arange(ids.shape[1], device=ids.device)
        return dict(zip(ids[0].tolist(), zip(rows.T.unbind(), slots[:, None].unbind(), strict=True), strict=True))
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    numbers, counts = torch.unique_consecutive(flat[order], return_counts=True)
    rows, slots = order // ids.shape[1], order % ids.shape[1]
    bounds = pairwise([0, *torch.cumsum(counts, 0).tolist()])
    return {number: (rows[a:b], slots[a:b]) for number, (a, b) in zip(numbers.tolist(), bounds, strict=True)}


def guess_experts(x: torch.Tensor, weights: MoeWeights, backend: Backend, count: int) -> list[int]:
    """The `count` experts that this router likes best for normalized hidden states x [T, D], best first: the router of
    the next layer on the present state tells most of its choices (facts/routing.md, section 3, P1)."""
    scores = torch.sigmoid(backend.linear(x, weights.router)) + weights.e_score_correction_bias
    best = scores.amax(0)
    return torch.topk(best, min(count, len(best))).indices.tolist()
