"""Norm, rotation, the router's choice and the weighted sum over tensors.

Shapes: T tokens, D hidden, E experts, K active experts, P rotary width.
"""

from __future__ import annotations

import torch

from ..base import RoutingRule
from .launch import launch
from .row_kernels import combine_kernel, rms_norm_kernel, rope_kernel, router_kernel

_SIZE = 1024


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis of float32 x [T, n]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    tokens, width = x.shape
    out = torch.empty(tokens, width, device=x.device)
    size = _power(width)
    warps = 8 if size >= 4096 else 4
    launch(rms_norm_kernel, (tokens,), x, weight, out, x.stride(0), width, eps, SIZE=size, warps=warps)
    return out


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Interleaved pairs of x [T, ..., P] turned by tables [T, P / 2]."""
    out = torch.empty(x.shape, device=x.device)
    flat = x.reshape(len(x), -1, x.shape[-1]) if x.numel() else x.new_empty(0, 1, x.shape[-1])
    between, half = flat.shape[1], flat.shape[2] // 2
    launch(
        rope_kernel, (len(x), -(-between // 16)), flat, cos.contiguous(), sin.contiguous(), out, between, half,
        flat.stride(0), flat.stride(1), flat.stride(2), ROWS=16, HALF=_power(half),
    )  # fmt: skip
    return out


def choose(logits: torch.Tensor, bias: torch.Tensor, rule: RoutingRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [T, K], ascending, and weights float32 [T, K] from router logits float32 [T, E]."""
    tokens, experts = logits.shape
    active = rule.num_experts_per_tok
    ids = torch.empty(tokens, active, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, active, device=logits.device)
    launch(
        router_kernel, (tokens,), logits, bias, ids, weights, experts, rule.routed_scaling_factor,
        ACTIVE=active, GROUPS=rule.n_group, KEPT=rule.topk_group, NORMALIZED=rule.norm_topk_prob,
        SIZE=_power(experts), GROUP_SIZE=_power(rule.n_group),
    )  # fmt: skip
    return ids, weights


def combine(results: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Results [T, K, D] by weights [T, K] in the order of slots, then shared [T, D]."""
    tokens, experts, width = results.shape
    out = torch.empty(tokens, width, device=results.device)
    grid = (tokens, -(-width // _SIZE))
    parts = (part.contiguous() for part in (results, weights, shared))
    launch(combine_kernel, grid, *parts, out, experts, width, SIZE=_SIZE)
    return out


def _power(number: int) -> int:
    """The next power of two, which tiles need."""
    return 1 << max(0, number - 1).bit_length()
