"""Kimi-K2 for training: the same function as k2lite's runtime, written for autograd, in bfloat16 where it multiplies.

Attention is the naive form over packed documents. Parameter names are the checkpoint's own. The routed experts of a
layer are two stacked parameters, experts.gate_up_proj [E, 2 F, D] and experts.down_proj [E, D, F].
Shapes: B rows, T positions, D hidden, H heads, E experts, K active, F expert width, N = B * T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2lite.config import ModelConfig

LOW = torch.bfloat16


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


def matrix(rows: int, columns: int, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(layer.weight, std=gain * columns**-0.5)
    return layer


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs of x [..., P] by tables that broadcast to [..., P / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Attention(nn.Module):
    """MLA. `max_logits` [H], when asked for, holds each head's largest absolute pre-softmax logit in some rows."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        heads = c.num_attention_heads
        self.q_a_proj = matrix(c.q_lora_rank, c.hidden_size)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.latent_norm_eps)
        self.q_b_proj = matrix(heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.q_lora_rank)
        self.kv_a_proj_with_mqa = matrix(c.latent_dim, c.hidden_size)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.latent_norm_eps)
        self.kv_b_proj = matrix(heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        self.o_proj = matrix(c.hidden_size, heads * c.v_head_dim, gain=(2 * c.num_hidden_layers) ** -0.5)
        self.max_logits: Tensor | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, sampled_rows: int) -> Tensor:
        q, k, v = self.queries_keys_values(x, cos, sin)
        if sampled_rows:
            self.max_logits = self.largest_logits(q[:sampled_rows], k[:sampled_rows], mask[:sampled_rows])
        # the fused kernel wants one width for all three
        padded = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        out = F.scaled_dot_product_attention(q, k, padded, attn_mask=mask[:, None], scale=self.c.softmax_scale)
        out = out[..., : v.shape[-1]].transpose(1, 2).flatten(2)
        result: Tensor = self.o_proj(out)
        return result

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, T, nope + rope] twice and [B, H, T, V]."""
        c, (rows, tokens) = self.c, x.shape[:2]
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(rows, tokens, c.num_attention_heads, -1)
        q_rope = rotate(q[..., c.qk_nope_head_dim :], cos[:, :, None], sin[:, :, None])
        latent = self.kv_a_proj_with_mqa(x)
        k_rope = rotate(latent[..., c.kv_lora_rank :], cos, sin)[:, :, None].expand(-1, -1, q.shape[2], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent[..., : c.kv_lora_rank]))
        kv = kv.view(rows, tokens, c.num_attention_heads, -1)
        query = torch.cat((q[..., : c.qk_nope_head_dim], q_rope.to(q.dtype)), -1)
        key = torch.cat((kv[..., : c.qk_nope_head_dim], k_rope.to(kv.dtype)), -1)
        value = kv[..., c.qk_nope_head_dim :]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    @torch.no_grad()
    def largest_logits(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask[:, None], 0)
        largest = torch.maximum(scores.amax(dim=(0, 2, 3)), -scores.amin(dim=(0, 2, 3)))
        return largest.float() * self.c.softmax_scale


class Mlp(nn.Module):
    def __init__(self, c: ModelConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = matrix(width, c.hidden_size)
        self.up_proj = matrix(width, c.hidden_size)
        self.down_proj = matrix(c.hidden_size, width, gain=(2 * c.num_hidden_layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


# Rows of an expert are padded to a multiple of this: a matrix product of a shape that was not seen before costs
# milliseconds to set up, and every step would bring a thousand of them.
PAD_ROWS = 128


def sorted_places(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """Where each choice goes when rows are sorted by expert. For ids [N, K]: which choice stands in each padded row
    (N * K for padding), the row of each choice, and (expert, begin, end) of every expert that was chosen."""
    flat = ids.flatten().numpy().astype(np.int16)
    counts = np.bincount(flat, minlength=experts)
    padded = -(-counts // PAD_ROWS) * PAD_ROWS
    starts = np.cumsum(padded) - padded
    order = np.argsort(flat, kind="stable")
    first = np.cumsum(counts) - counts
    row_of_sorted = np.arange(len(flat)) + np.repeat(starts - first, counts)
    choice = np.full(int(padded.sum()), len(flat), dtype=np.int64)
    choice[row_of_sorted] = order
    row = np.empty(len(flat), dtype=np.int64)
    row[order] = row_of_sorted
    spans = [(e, int(starts[e]), int(starts[e] + padded[e])) for e in range(experts) if counts[e]]
    return torch.from_numpy(choice), torch.from_numpy(row), spans


def with_zero_row(x: Tensor) -> Tensor:
    """x in low precision with a row of zeros behind it, which padding points at."""
    out = torch.zeros(len(x) + 1, x.shape[1], dtype=LOW)
    out[:-1] = x
    return out


class _RoutedExperts(torch.autograd.Function):
    """All experts on the tokens that chose them: a matrix product an expert over rows sorted by expert. One function,
    because autograd's own gather and scatter of rows take longer than the products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        tokens, active = ids.shape
        choice, row, spans = sorted_places(ids, len(gate_up))
        rows = with_zero_row(x)[choice // active]
        gate_up_low, down_low = gate_up.to(LOW), down.to(LOW)
        hidden = rows.new_empty(len(rows), gate_up.shape[1])
        for e, a, b in spans:
            torch.mm(rows[a:b], gate_up_low[e].T, out=hidden[a:b])
        gate, up = hidden.chunk(2, -1)
        acted = F.silu(gate) * up
        sorted_out = rows.new_empty(rows.shape)
        for e, a, b in spans:
            torch.mm(acted[a:b], down_low[e].T, out=sorted_out[a:b])
        out = sorted_out[row].view(tokens, active, -1)
        ctx.save_for_backward(rows, hidden, acted, out, weights, choice, row, gate_up_low, down_low)
        ctx.spans = spans
        return torch.bmm(weights.to(LOW)[:, None], out)[:, 0].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:  # type: ignore[override]
        rows, hidden, acted, out, weights, choice, row, gate_up, down = ctx.saved_tensors
        tokens, active = weights.shape
        low = grad.to(LOW)
        grad_weights = torch.bmm(out, low[:, :, None])[..., 0].float()
        spread = (low[:, None] * weights.to(LOW)[..., None]).view(tokens * active, -1)
        grad_out = with_zero_row(spread)[choice]
        grad_acted = torch.empty_like(acted)
        grad_down = torch.zeros(down.shape, dtype=LOW)
        for e, a, b in ctx.spans:
            torch.mm(grad_out[a:b], down[e], out=grad_acted[a:b])
            torch.mm(grad_out[a:b].T, acted[a:b], out=grad_down[e])
        gate, up = hidden.chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_hidden = torch.cat((grad_acted * up * (sigmoid + silu * (1 - sigmoid)), grad_acted * silu), -1)
        grad_rows = torch.empty_like(rows)
        grad_gate_up = torch.zeros(gate_up.shape, dtype=LOW)
        for e, a, b in ctx.spans:
            torch.mm(grad_hidden[a:b], gate_up[e], out=grad_rows[a:b])
            torch.mm(grad_hidden[a:b].T, rows[a:b], out=grad_gate_up[e])
        grad_x = grad_rows[row].view(tokens, active, -1).sum(1)
        return grad_x, grad_weights, None, grad_gate_up.float(), grad_down.float()


class Moe(nn.Module):
    """`load` [E] counts the choices of the last forward pass; `bias` balances it without a loss."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        experts, hidden, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.router = matrix(experts, hidden)
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(experts))
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * width, hidden) * hidden**-0.5)
        gain = (2 * c.num_hidden_layers * c.num_experts_per_tok) ** -0.5
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width) * gain * width**-0.5)
        self.shared_experts = Mlp(c, width * c.n_shared_experts)
        self.load = torch.zeros(experts)
        self.ids = torch.zeros(0, c.num_experts_per_tok, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        with torch.autocast("cpu", enabled=False):
            scores = torch.sigmoid(F.linear(flat.float(), self.router.weight))
            ids = (scores.detach() + self.bias).topk(self.c.num_experts_per_tok, dim=-1).indices
            weights = scores.gather(-1, ids)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.c.routed_scaling_factor
            self.ids = ids
            self.load = torch.bincount(ids.flatten(), minlength=len(self.bias)).float()
            routed: Tensor = _RoutedExperts.apply(flat, weights, ids, self.gate_up_proj, self.down_proj)
        result: Tensor = routed.view(x.shape) + self.shared_experts(x)
        return result

    @torch.no_grad()
    def balance(self, load: Tensor, rate: float) -> None:
        """Auxiliary-loss-free balance (DeepSeek-V3, arXiv 2412.19437): over-loaded down, under-loaded up."""
        self.bias += rate * torch.sign(load.mean() - load)


class Layer(nn.Module):
    def __init__(self, c: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Moe(c) if c.is_moe(index) else Mlp(c, c.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, sampled_rows: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, sampled_rows)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Transformer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        self.layers = nn.ModuleList(Layer(c, index) for index in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = matrix(c.vocab_size, c.hidden_size)
        cos, sin = c.rope.tables(torch.arange(c.max_position_embeddings))
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor, documents: Tensor, sampled_rows: int = 0) -> Tensor:
        """Hidden states [B, T, D] of ids int64 [B, T]. A token sees its own document's tokens up to itself."""
        tokens = ids.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        mask = (documents[:, :, None] == documents[:, None, :]) & causal
        cos, sin = self.cos[positions], self.sin[positions]
        x = self.embed_tokens(ids)
        with torch.autocast("cpu", dtype=LOW):
            for layer in self.layers:
                x = layer(x, cos, sin, mask, sampled_rows)
            result: Tensor = self.norm(x)
        return result

    def head(self, hidden: Tensor) -> Tensor:
        """Logits float32 of hidden states [..., D]."""
        return (hidden.to(LOW) @ self.lm_head.weight.to(LOW).T).float()

    @property
    def moes(self) -> Sequence[Moe]:
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, Moe)]
