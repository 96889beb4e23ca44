"""MuonClip, the optimizer of the Kimi K2 report (arXiv 2507.20534, section 2.1): Muon with RMS-matched updates for
matrices (arXiv 2502.16982), AdamW for the rest, and QK-Clip on the attention logits.

Knows parameters and heads; nothing of data or schedules.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .transformer import Attention

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5
UPDATE_RMS = 0.2  # AdamW's usual update RMS, so its learning rates carry over


def orthogonalize(update: Tensor) -> Tensor:
    """Newton-Schulz towards the nearest semi-orthogonal matrix, for [..., n, m].

    An iteration is x <- (a + b s + c s s) x with s = x x^T. The factors are polynomials of the first s, so they commute
    and are multiplied up on the small side; x itself is multiplied once, at the end. In float32, because s squares the
    spread of the singular values."""
    a, b, c = NEWTON_SCHULZ
    tall = update.shape[-2] > update.shape[-1]
    x = update.reshape(-1, *update.shape[-2:])
    x = x.mT.contiguous() if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    square = x @ x.mT
    product = identity = torch.eye(x.shape[-2]).expand_as(square)
    for step in range(STEPS):
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c) + a * identity
        product = factor @ product if step else factor
        if step < STEPS - 1:
            square = factor @ square @ factor
    x = product @ x
    return (x.mT if tall else x).reshape(update.shape)


class Muon(torch.optim.Optimizer):
    """For matrices [n, m] and stacks of them [..., n, m]: momentum (Nesterov), orthogonalized, RMS-matched, decoupled
    weight decay."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                update = orthogonalize(p.grad + group["momentum"] * momentum)
                scale = UPDATE_RMS * max(p.shape[-2:]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


@torch.no_grad()
def qk_clip(attention: Attention, threshold: float) -> int:
    """Scale the heads whose largest logit exceeded `threshold` in the last forward pass, and return their number.

    A head's logit shrinks by gamma = threshold / largest: the no-position parts of query and key by sqrt(gamma) each,
    the rotary query by gamma; the rotary key is shared by all heads and stays."""
    if attention.max_logits is None:
        raise ValueError("qk_clip needs the logits of a forward pass that measures them")
    c = attention.c
    gamma = (threshold / attention.max_logits.clamp(min=1e-12)).clamp(max=1.0)
    clipped = int((gamma < 1).sum())
    if clipped:
        query = attention.q_b_proj.weight.view(c.num_attention_heads, -1, c.q_lora_rank)
        key_value = attention.kv_b_proj.weight.view(c.num_attention_heads, -1, c.kv_lora_rank)
        query[:, : c.qk_nope_head_dim] *= gamma.sqrt()[:, None, None]
        query[:, c.qk_nope_head_dim :] *= gamma[:, None, None]
        key_value[:, : c.qk_nope_head_dim] *= gamma.sqrt()[:, None, None]
    return clipped
