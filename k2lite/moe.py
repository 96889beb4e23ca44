"""A mixture-of-experts block: the router chooses, a lease brings the experts, the backend multiplies and sums.

Invariant: the order in which experts arrive changes no bit, because each result has its own place in a buffer and
`combine` sums by ascending expert id. Never asks where an expert lies.
Shapes: T tokens, D hidden, K active experts.
"""

from __future__ import annotations

import torch

from k2lite.backends.base import Assignment, Backend, RoutingRule
from k2lite.offload.source import ExpertSource

from .config import ModelConfig
from .weights import MoeWeights


def routing_rule(config: ModelConfig) -> RoutingRule:
    return RoutingRule(
        num_experts_per_tok=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=config.topk_group,
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
    )


def moe_block(
    x: torch.Tensor, weights: MoeWeights, layer: int, rule: RoutingRule, experts: ExpertSource, backend: Backend
) -> torch.Tensor:
    """The block's output for normalized hidden states x [T, D]: [T, D]."""
    ids, expert_weights = backend.router(x, weights.router, weights.e_score_correction_bias, rule)
    experts.observe(layer, ids, expert_weights)
    out = x.new_empty(*ids.shape, x.shape[-1])
    with experts.lease(layer, torch.unique(ids).tolist()) as lease:
        for group in lease.ready():
            work = [Assignment(expert, *torch.where(ids == number)) for number, expert in group.items()]
            backend.expert_ffn(x, work, out).wait()
    return backend.combine(out, expert_weights, backend.mlp(x, weights.shared_experts))
