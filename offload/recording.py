"""Records what an ExpertSource observes. Keeps ids and weights only: 32 bytes a token and layer at K = 8.

Invariant: a token's choices of all layers end up in one row, whatever the chunks were, since every layer sees the same
tokens in the same order. Records one stream of tokens: rows of several sequences in a step are not told apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


class RoutingRecorder:
    """Give `observe` to ExpertSource.observers. Shapes: T tokens, L layers, K active experts."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._ids: dict[int, list[npt.NDArray[np.uint16]]] = {layer: [] for layer in layers}
        self._weights: dict[int, list[npt.NDArray[np.float16]]] = {layer: [] for layer in layers}

    def observe(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """One layer's choices for a batch: ids int64 [T, K], weights float32 [T, K]."""
        self._ids[layer].append(ids.cpu().numpy().astype(np.uint16))
        self._weights[layer].append(weights.cpu().numpy().astype(np.float16))

    @property
    def n_tokens(self) -> int:
        """Tokens that all layers have seen."""
        return min(sum(len(part) for part in parts) for parts in self._ids.values())

    def arrays(self) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float16]]:
        """ids and weights [T, L, K]; a step that broke off in the middle is left out. ValueError if there is none."""
        n_tokens = self.n_tokens
        ids = [np.concatenate(parts)[:n_tokens] for parts in self._ids.values()]
        weights = [np.concatenate(parts)[:n_tokens] for parts in self._weights.values()]
        return np.stack(ids, axis=1), np.stack(weights, axis=1)
