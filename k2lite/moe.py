"""A mixture-of-experts block: the router chooses, a lease brings the experts, they multiply where the plan says, and
the backend sums.

Invariant: the order in which experts arrive changes no bit, because each result has its own place in a buffer and
`combine` sums by ascending expert id. Never asks where an expert lies.
Shapes: T tokens, D hidden, K active experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from k2lite.backends.base import Backend, RoutingRule
from k2lite.offload.source import ExpertSource

from .config import ModelConfig
from .expert_work import ExpertPlaces
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
    places: ExpertPlaces,
    look_ahead: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """The block's output for normalized hidden states x [T, D]: [T, D].

    `look_ahead` is called with the shared expert's result [T, D] as soon as this layer's reads are under way."""
    ids, expert_weights = backend.router(x, weights.router, weights.e_score_correction_bias, rule)
    chosen = backend.download(ids)
    recent = None if len(chosen) <= DECODE_TOKENS else RECENT_TOKENS
    experts.observe(layer, chosen, backend.download(expert_weights), recent=recent)
    keep = None if recent is None else torch.unique(chosen[-recent:]).tolist()
    work = places.begin(layer, x, chosen)
    with experts.lease(layer, work.wanted, keep) as lease:
        shared = backend.mlp(x, weights.shared_experts)
        look_ahead(shared)
        for group in lease.ready():
            work.multiply(group)
    return backend.combine(work.results(), expert_weights, shared)


def guess_experts(x: torch.Tensor, weights: MoeWeights, backend: Backend, count: int) -> list[int]:
    """The `count` experts that this router likes best for normalized hidden states x [T, D], best first: the router of
    the next layer on the present state tells most of its choices."""
    scores = torch.sigmoid(backend.linear(x, weights.router)) + weights.e_score_correction_bias
    best = backend.download(scores.amax(0))
    return torch.topk(best, min(count, len(best))).indices.tolist()
