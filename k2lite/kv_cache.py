"""The latent KV cache of one sequence: kv_lora_rank + qk_rope_head_dim values a token and layer (576 for Kimi-K2).

Rows below `length` are final; `truncate` forgets the last ones. Knows no tokens and no positions but their order.
"""

from __future__ import annotations

import torch

from k2lite.backends.base import Backend

from .config import ModelConfig


class LatentCache:
    """Room for `capacity` tokens, float32 [layers, capacity, latent]. Pages are touched only as they fill."""

    def __init__(self, config: ModelConfig, capacity: int, backend: Backend) -> None:
        self.capacity = capacity
        self.length = 0
        shape = (config.num_hidden_layers, capacity, config.latent_dim)
        self._rows = backend.empty(shape, torch.float32)

    @staticmethod
    def nbytes_for(config: ModelConfig, tokens: int) -> int:
        return 4 * config.num_hidden_layers * config.latent_dim * tokens

    def write(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Put new rows [n, latent] behind the final ones and return the layer's cache with them, [length + n, latent].
        They become final by `advance`, once the whole step has succeeded."""
        end = self.length + len(rows)
        self._rows[layer, self.length : end] = rows
        return self._rows[layer, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"can't truncate a cache of {self.length} tokens to {length}")
        self.length = length

    def copy_from(self, other: LatentCache, length: int) -> None:
        """Become the first `length` tokens of another cache of the same model."""
        if not 0 <= length <= min(other.length, self.capacity):
            raise ValueError(f"can't copy {length} tokens from a cache of {other.length} into one for {self.capacity}")
        self._rows[:, :length] = other._rows[:, :length]
        self.length = length
