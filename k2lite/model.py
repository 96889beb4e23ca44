"""The whole forward pass of Kimi-K2 and DeepSeek-V3, top to bottom.

    x = Emb[ids];  for each layer: x += Attn(norm(x)); x += FFN(norm(x));  logits = Head(norm(x))

Holds the trunk; asks a source for experts and a backend for arithmetic. Knows neither text nor devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from k2lite.backends.base import Backend
from k2lite.offload.source import ExpertSource

from .attention import Rotation, latent_attention
from .batch import BatchRow
from .config import ModelConfig
from .expert_work import ExpertPlaces, there
from .moe import DECODE_TOKENS, guess_experts, moe_block, routing_rule
from .weights import LayerWeights, MoeWeights, TrunkWeights


class Model:
    """Weights and where the rest of them comes from."""

    def __init__(
        self, config: ModelConfig, trunk: TrunkWeights, experts: ExpertSource, backend: Backend, places: ExpertPlaces
    ) -> None:
        self.config = config
        self._trunk = trunk
        self._experts = experts
        self._backend = backend
        self._places = places
        self._rule = routing_rule(config)

    @property
    def backend(self) -> Backend:
        """What multiplies."""
        return self._backend

    def close(self) -> None:
        """End what brings the experts."""
        self._experts.close()

    def hidden_states(self, ids: torch.Tensor, rows: Sequence[BatchRow]) -> torch.Tensor:
        """Final hidden states float32 [T, D] of token ids int64 [T]. The caches in `rows` hold the tokens' latents
        afterwards; they become part of the sequences by `advance`, which is the caller's."""
        if len(ids) > DECODE_TOKENS:
            self._experts.prompt_begins(len(ids), self.config.num_experts_per_tok)
        rotation = Rotation(self.config, rows, self._backend)
        x = self._backend.embed(there(ids, self._backend), self._trunk.embed_tokens)
        for index, layer in enumerate(self._trunk.layers):
            x = self._layer(x, layer, index, rows, rotation)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [T, vocab] on the host of final hidden states [T, D]."""
        normed = self._backend.rms_norm(hidden, self._trunk.norm, self.config.rms_norm_eps)
        return self._backend.download(self._backend.linear(normed, self._trunk.lm_head))

    def _layer(
        self, x: torch.Tensor, layer: LayerWeights, index: int, rows: Sequence[BatchRow], rotation: Rotation
    ) -> torch.Tensor:
        backend, eps = self._backend, self.config.rms_norm_eps
        normed = backend.rms_norm(x, layer.input_layernorm, eps)
        x = x + latent_attention(normed, layer.self_attn, index, rows, rotation, self.config, backend)
        normed = backend.rms_norm(x, layer.post_attention_layernorm, eps)
        if not isinstance(layer.ffn, MoeWeights):
            return x + backend.mlp(normed, layer.ffn)

        def look_ahead(shared: torch.Tensor) -> None:
            self._hint(x + shared, index + 1)

        return x + moe_block(normed, layer.ffn, index, self._rule, self._experts, backend, self._places, look_ahead)

    def _hint(self, x: torch.Tensor, index: int) -> None:
        """Tell the source what layer `index` may choose, judged by hidden states x [T, D] that lack only the routed
        experts between here and there."""
        if len(x) > DECODE_TOKENS or not self._experts.wants_hint(index):
            return
        layer = self._trunk.layers[index]
        if isinstance(layer.ffn, MoeWeights):
            normed = self._backend.rms_norm(x, layer.post_attention_layernorm, self.config.rms_norm_eps)
            count = self._rule.num_experts_per_tok
            self._experts.hint(index, guess_experts(normed, layer.ffn, self._backend, count))
