"""Kimi-K2 for training: the same function as k2lite's runtime, written for autograd, in bfloat16 where it multiplies
if the CPU has instructions for that, else in float32 (bfloat16 without them takes 1.5 times as long).

Attention is the naive form over packed documents. Parameter names are the checkpoint's own. The routed experts of a
layer are two stacked parameters, experts.gate_up_proj [E, 2, F, D] and experts.down_proj [E, D, F].
Shapes: B rows, T positions, D hidden, H heads, E experts, K active, F expert width, N = B * T tokens on end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2lite.config import ModelConfig

HAS_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
LOW = torch.bfloat16 if HAS_BF16 else torch.float32


# Layers begin nearly silent, so that a token can still be told from the residual stream when it reaches the last one.
QUIET = 0.02


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
    """MLA, document by document. `max_logits` [H], when asked for, holds each head's largest absolute pre-softmax
    logit of the last forward pass."""

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
        self.o_proj = matrix(c.hidden_size, heads * c.v_head_dim, gain=QUIET)
        self.max_logits: Tensor | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int], measure: bool) -> Tensor:
        """x [N, D], its rotary tables [N, P / 2], the number of tokens of each document."""
        documents = list(zip(*(part.split(lengths) for part in self.queries_keys_values(x, cos, sin)), strict=True))
        if measure:
            self.max_logits = self.largest_logits(documents)
        out = torch.cat([self.attend(*(part.transpose(0, 1) for part in document)) for document in documents])
        result: Tensor = self.o_proj(out)
        return result

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, H * V] of one document's [H, T, nope + rope] twice and [H, T, V]."""
        # the fused kernel wants one width for all three
        padded = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        out = F.scaled_dot_product_attention(q[None], k[None], padded[None], is_causal=True, scale=self.c.softmax_scale)
        return out[0, ..., : v.shape[-1]].transpose(0, 1).flatten(1)

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, H, nope + rope] twice and [N, H, V]."""
        c = self.c
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(len(x), c.num_attention_heads, -1)
        q_rope = rotate(q[..., c.qk_nope_head_dim :], cos[:, None], sin[:, None])
        latent = self.kv_a_proj_with_mqa(x)
        k_rope = rotate(latent[..., c.kv_lora_rank :], cos, sin)[:, None].expand(-1, q.shape[1], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent[..., : c.kv_lora_rank]))
        kv = kv.view(len(x), c.num_attention_heads, -1)
        query = torch.cat((q[..., : c.qk_nope_head_dim], q_rope.to(q.dtype)), -1)
        key = torch.cat((kv[..., : c.qk_nope_head_dim], k_rope.to(kv.dtype)), -1)
        return query, key, kv[..., c.qk_nope_head_dim :]

    @torch.no_grad()
    def largest_logits(self, documents: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        largest = torch.zeros(self.c.num_attention_heads)
        for q, k, _ in documents:
            scores = torch.einsum("qhd,khd->hqk", q, k).float().tril_().abs_()
            largest = torch.maximum(largest, scores.amax(dim=(1, 2)))
        return largest * self.c.softmax_scale


class Mlp(nn.Module):
    def __init__(self, c: ModelConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = matrix(width, c.hidden_size)
        self.up_proj = matrix(width, c.hidden_size)
        self.down_proj = matrix(c.hidden_size, width, gain=QUIET)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


# Rows of an expert are padded to a multiple of this: a bfloat16 product of a shape that was not seen before costs
# milliseconds to set up, and every step would bring a thousand of them. float32 products need no set-up.
PAD_ROWS = 128 if LOW is torch.bfloat16 else 8


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
        gate_up_low, down_low = gate_up.flatten(1, 2).to(LOW), down.to(LOW)
        hidden = rows.new_empty(len(rows), gate_up_low.shape[1])
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
        grad_gate_up = grad_gate_up.unflatten(1, (2, -1))
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
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2, width, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width) * QUIET * width**-0.5)
        self.shared_experts = Mlp(c, width * c.n_shared_experts)
        self.load = torch.zeros(experts)
        self.ids = torch.zeros(0, c.num_experts_per_tok, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            scores = torch.sigmoid(F.linear(x.float(), self.router.weight))
            ids = (scores.detach() + self.bias).topk(self.c.num_experts_per_tok, dim=-1).indices
            weights = scores.gather(-1, ids)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.c.routed_scaling_factor
            self.ids = ids
            self.load = torch.bincount(ids.flatten(), minlength=len(self.bias)).float()
            routed: Tensor = _RoutedExperts.apply(x, weights, ids, self.gate_up_proj, self.down_proj)
        result: Tensor = routed + self.shared_experts(x)
        return result

    @torch.no_grad()
    def balance(self, load: Tensor, rate: float, band: tuple[float, float]) -> None:
        """Auxiliary-loss-free balance (DeepSeek-V3, arXiv 2412.19437): over-loaded down, under-loaded up. A load inside
        `band`, in means, is left alone: experts may specialize, but none dies and none takes everything."""
        share = load / load.mean()
        self.bias += rate * ((share < band[0]).float() - (share > band[1]).float())


class Layer(nn.Module):
    def __init__(self, c: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Moe(c) if c.is_moe(index) else Mlp(c, c.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int], measure: bool) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, lengths, measure)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


def document_lengths(documents: Tensor) -> list[int]:
    """Tokens of each run of one number, in rows [B, T] on end; a row's end ends its last run."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = begins.flatten().nonzero().flatten().tolist()
    return [end - begin for begin, end in pairwise([*places, documents.numel()])]


class Transformer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=c.hidden_size**-0.5)
        self.layers = nn.ModuleList(Layer(c, index) for index in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        # One table for both while training (two tensors on disk, as K2 has them): attention that hands a token's own
        # direction on then copies any token, those that were never copied in training too.
        self.lm_head.weight = self.embed_tokens.weight
        cos, sin = c.rope.tables(torch.arange(c.max_position_embeddings))
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor, documents: Tensor, measure: bool = False) -> Tensor:
        """Hidden states [B, T, D] of ids int64 [B, T]. A token sees its own document's tokens up to itself; a document
        is a run of one number in a row of `documents`. `measure` keeps each head's largest logit."""
        flat = positions.flatten()
        cos, sin = self.cos[flat], self.sin[flat]
        lengths = document_lengths(documents)
        x = self.embed_tokens(ids.flatten())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=LOW is torch.bfloat16):
            for layer in self.layers:
                x = layer(x, cos, sin, lengths, measure)
            result: Tensor = self.norm(x).view(*ids.shape, -1)
        return result

    def head(self, hidden: Tensor) -> Tensor:
        """Logits float32 of hidden states [..., D]."""
        return (hidden.to(LOW) @ self.lm_head.weight.to(LOW).T).float()

    @property
    def moes(self) -> Sequence[Moe]:
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, Moe)]
