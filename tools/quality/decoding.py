"""Greedy answers of the training model for many prompts at once, with keys and values kept.

The same function as the runtime's, in batched float32; a test compares the two.
Shapes: N tokens of all sequences on end, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.demo_training.transformer import Attention, Layer, Transformer


class _Sequences:
    """Keys and values of each sequence in each layer."""

    def __init__(self, model: Transformer, count: int) -> None:
        self._model = model
        self._cache: list[list[tuple[Tensor, Tensor] | None]] = [[None] * count for _ in model.layers]
        self._lengths = [0] * count

    def read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Take each sequence's next tokens, none for some; hidden states of the last one of each that has any."""
        model = self._model
        lengths = [len(row) for row in rows]
        spans = zip(self._lengths, lengths, strict=True)
        positions = torch.cat([torch.arange(at, at + length) for at, length in spans])
        cos, sin = model.cos[positions], model.sin[positions]
        x = model.embed_tokens(torch.tensor([token for row in rows for token in row]))
        for layer, cache in zip(model.layers, self._cache, strict=True):
            assert isinstance(layer, Layer)
            x = x + self._attend(layer.self_attn, layer.input_layernorm(x), cos, sin, lengths, cache)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self._lengths = [at + length for at, length in zip(self._lengths, lengths, strict=True)]
        ends = torch.tensor(lengths).cumsum(0)[torch.tensor(lengths) > 0] - 1
        last: Tensor = model.norm(x)[ends]
        return last

    def _attend(
        self,
        attention: Attention,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        lengths: list[int],
        cache: list[tuple[Tensor, Tensor] | None],
    ) -> Tensor:
        parts = zip(*(part.split(lengths) for part in attention.queries_keys_values(x, cos, sin)), strict=True)
        outs = []
        for at, (q, k, v) in enumerate(parts):
            if not len(q):
                continue
            before = cache[at]
            keys, values = (k, v) if before is None else (torch.cat((before[0], k)), torch.cat((before[1], v)))
            cache[at] = (keys, values)
            out = F.scaled_dot_product_attention(
                *(part.transpose(0, 1)[None] for part in (q, keys, values)),
                is_causal=before is None,  # later only one token is read at a time
                scale=attention.c.softmax_scale,
            )
            outs.append(out[0].transpose(0, 1).flatten(1))
        result: Tensor = attention.o_proj(torch.cat(outs))
        return result


@torch.no_grad()
def greedy(model: Transformer, prompts: Sequence[Sequence[int]], stop: int, max_tokens: int) -> list[list[int]]:
    """For each prompt its likeliest continuation up to `stop`, which is not part of it."""
    if not prompts:
        return []
    sequences = _Sequences(model, len(prompts))
    answers: list[list[int]] = [[] for _ in prompts]
    rows: list[list[int]] = [list(prompt) for prompt in prompts]
    for _ in range(max_tokens):
        likeliest = model.head(sequences.read(rows)).argmax(-1).tolist()
        open_ones = [at for at, row in enumerate(rows) if row]
        rows = [[] for _ in prompts]
        for at, token in zip(open_ones, likeliest, strict=True):
            if token != stop:
                answers[at].append(token)
                rows[at] = [token]
        if not any(rows):
            break
    return answers
