"""Multi-head latent attention: projections, norms and rotation around the backend's attention over the latent cache.

Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1). In a head's query the rotary part comes last, as in the
checkpoint's rows; the shared rotary key is not normalized.
Shapes: T tokens, D hidden, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from k2lite.backends.base import Backend, Segment

from .batch import BatchRow
from .config import ModelConfig
from .expert_work import there
from .weights import AttentionWeights


class Rotation:
    """Cosines and sines of a batch's positions, made once a step and used by every layer."""

    def __init__(self, config: ModelConfig, rows: Sequence[BatchRow], backend: Backend) -> None:
        positions = [torch.arange(row.position, row.position + row.tokens) for row in rows]
        cos, sin = config.rope.tables(torch.cat(positions))
        self.cos, self.sin = there(cos, backend), there(sin, backend)


def latent_attention(
    x: torch.Tensor,
    weights: AttentionWeights,
    layer: int,
    rows: Sequence[BatchRow],
    rotation: Rotation,
    config: ModelConfig,
    backend: Backend,
) -> torch.Tensor:
    """Attention of normalized hidden states x [T, D]; appends each token's latent to its sequence's cache."""
    tokens, nope = len(x), config.qk_nope_head_dim
    q_latent = backend.rms_norm(backend.linear(x, weights.q_a_proj), weights.q_a_layernorm, config.latent_norm_eps)
    query = backend.linear(q_latent, weights.q_b_proj).view(tokens, config.num_attention_heads, -1)
    q_rope = backend.rope(query[..., nope:], rotation.cos, rotation.sin)

    compressed = backend.linear(x, weights.kv_a_proj_with_mqa)
    latent, k_rope = compressed[:, : config.kv_lora_rank], compressed[:, config.kv_lora_rank :]
    latent = backend.rms_norm(latent, weights.kv_a_layernorm, config.latent_norm_eps)
    entries = torch.cat((latent, backend.rope(k_rope, rotation.cos, rotation.sin)), dim=-1)

    segments = [Segment(row.start, row.stop, row.cache.write(layer, entries[row.start : row.stop])) for row in rows]
    heads = backend.attention(query[..., :nope], q_rope, segments, weights.kv_b_proj, config.softmax_scale)
    return backend.linear(heads.reshape(tokens, -1), weights.o_proj)
